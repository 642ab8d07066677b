// From run-time dtypes and head widths to kernel instances, and the launch.
#pragma once

#include <algorithm>
#include <atomic>

#include "sampling.cuh"

namespace sparse_detr::cuda {

// Calls f(Width) for the dtype and number of channels. Widths 16, 32 and 64 have vector lanes;
// any other width, and float64, one channel per lane.
template <typename F>
cudaError_t for_each_width(Dtype dtype, int channels, F f) {
  switch (dtype) {
    case Dtype::kFloat32:
      if (channels == 32) return f(Width<float, 4, 8, true>());
      if (channels == 16) return f(Width<float, 4, 4, true>());
      if (channels == 64) return f(Width<float, 4, 16, true>());
      return f(AnyWidth<float>());
    case Dtype::kFloat16:
      if (channels == 32) return f(Width<__half, 8, 4, true>());
      if (channels == 16) return f(Width<__half, 4, 4, true>());
      if (channels == 64) return f(Width<__half, 8, 8, true>());
      return f(AnyWidth<__half>());
    case Dtype::kBFloat16:
      if (channels == 32) return f(Width<__nv_bfloat16, 8, 4, true>());
      if (channels == 16) return f(Width<__nv_bfloat16, 4, 4, true>());
      if (channels == 64) return f(Width<__nv_bfloat16, 8, 8, true>());
      return f(AnyWidth<__nv_bfloat16>());
    case Dtype::kFloat64:
      return f(AnyWidth<double>());
  }
  return cudaErrorInvalidValue;
}

// Calls f(T()).
template <typename F>
cudaError_t for_each_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float());
    case Dtype::kFloat64:
      return f(double());
    case Dtype::kFloat16:
      return f(__half());
    case Dtype::kBFloat16:
      return f(__nv_bfloat16());
  }
  return cudaErrorInvalidValue;
}

template <typename T>
constexpr Dtype kDtype = Dtype::kFloat32;
template <>
constexpr Dtype kDtype<double> = Dtype::kFloat64;
template <>
constexpr Dtype kDtype<__half> = Dtype::kFloat16;
template <>
constexpr Dtype kDtype<__nv_bfloat16> = Dtype::kBFloat16;

// Calls f(source) with Given, or Fused for offsets and logits in A or T.
template <typename W, typename F>
cudaError_t for_each_source(const Problem& problem, const Samples& samples, F f) {
  using A = typename W::A;
  using T = typename W::T;
  if (samples.reference == nullptr) return f(Given<A>(samples, problem.points));
  if (samples.dtype == kDtype<A>) return f(Fused<A, A>(samples, problem.points));
  if constexpr (sizeof(T) == 2) {
    if (samples.dtype == kDtype<T>) return f(Fused<A, T>(samples, problem.points));
  }
  return cudaErrorInvalidValue;
}

// Shared memory and L1 are one memory. Asks for as much of it as shared memory as the blocks that
// fit a multiprocessor can use, and leaves the rest to L1, which the gathers live on. Once per
// kernel and device; a wish, so its failure is none.
template <auto kKernel>
void leave_the_rest_to_l1(int threads, size_t dynamic_bytes) {
#ifdef __CUDACC__
  static std::atomic<uint64_t> done{0};
  int device = 0, blocks = 0, most = 0, reserved = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= 64 || done.load() >> device & 1) return;
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, kKernel) == cudaSuccess &&
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kKernel, threads, dynamic_bytes) ==
          cudaSuccess &&
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) ==
          cudaSuccess &&
      cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device) ==
          cudaSuccess) {
    const size_t bytes = blocks * (attributes.sharedSizeBytes + dynamic_bytes + reserved);
    const int percent = static_cast<int>(std::min<size_t>(100, (100 * bytes + most - 1) / most));
    cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout, percent);
  }
  cudaGetLastError();
  done.fetch_or(uint64_t(1) << device);
#endif
}

// One block per (image, tile of queries, head); kernel(problem, tiles, args...). `groups` is the
// number of queries of a block where they come as a list.
template <auto kKernel, typename... Args>
cudaError_t launch_tiles(const Problem& problem, cudaStream_t stream, int threads, int groups,
                         size_t dynamic_bytes, const Args&... args) {
  const int tiles = Tile::number(problem, groups);
  const int64_t blocks = problem.images * problem.heads * tiles;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  leave_the_rest_to_l1<kKernel>(threads, dynamic_bytes);

  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = dynamic_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kKernel, problem, tiles, args...);
}

// The same with a group of lanes per query. Blocks shrink for short lists of queries, so that there
// are enough of them to occupy the device, and where `bytes_per_query` of dynamic shared memory
// would not fit.
template <typename W, auto kKernel, typename... Args>
cudaError_t launch(const Problem& problem, cudaStream_t stream, size_t bytes_per_query,
                   const Args&... args) {
  constexpr size_t kDynamicBytes = 16 << 10;  // beside at most 32 KB of static shared memory
  const auto blocks = [&](int threads) {
    return problem.images * problem.heads * Tile::number(problem, threads / W::G);
  };
  int threads = kThreads;
  while (threads > 64 && problem.tiled_from < 0 && blocks(threads) < kEnoughBlocks) threads /= 2;
  while (threads > 32 && threads / W::G * bytes_per_query > kDynamicBytes) threads /= 2;
  return launch_tiles<kKernel>(problem, stream, threads, threads / W::G,
                               threads / W::G * bytes_per_query, args...);
}

// One thread per item.
template <typename... Params, typename... Args>
cudaError_t launch_flat(void (*kernel)(Params...), int64_t items, cudaStream_t stream,
                        const Args&... args) {
  const int64_t blocks = (items + kThreads - 1) / kThreads;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace sparse_detr::cuda
