// Attention map splat (Sparse DETR, section 3.3): the attention that each token receives from the
// samples of all queries and heads. A thread per sample adds four integers to the map, so the
// result is the same to the last bit in every run, on every device and in reference.py: products
// in double, each rounded to a multiple of 2^-kSplatFractionBits (half to even), sums in int64.
//
// Here the pixel coordinate is location * size, without the half-pixel shift of the sampling.
#include "../splat_units.h"
#include "dispatch.cuh"

namespace sparse_detr::cuda {
namespace {

template <typename A>
__global__ void __launch_bounds__(kThreads)
    splat_kernel(Problem problem, const A* __restrict__ locations, const A* __restrict__ weights,
                 unsigned long long* __restrict__ fixed) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t per_image = problem.samples();
  if (i >= problem.images * per_image) return;
  const int s = static_cast<int>(i % (problem.levels * problem.points));
  const Level& level = problem.level[problem.level_of(s)];
  const auto location = load_pair(locations + 2 * i);
  // Rounded products: contracting them with the subtraction below would change the last bit.
  const double x = __dmul_rn(location.x, level.width), y = __dmul_rn(location.y, level.height);
  if (!(x >= -1 && y >= -1 && x < level.width && y < level.height)) return;
  const double left = floor(x), top = floor(y), share = __ldg(weights + i);
  const double part_x[2] = {1 - (x - left), x - left}, part_y[2] = {1 - (y - top), y - top};
  unsigned long long* map = fixed + i / per_image * problem.tokens + level.start;
  for (int dy = 0; dy < 2; ++dy) {
    for (int dx = 0; dx < 2; ++dx) {
      const int column = static_cast<int>(left) + dx, row = static_cast<int>(top) + dy;
      if (column < 0 || column >= level.width || row < 0 || row >= level.height) continue;
      const double part = part_x[dx] * part_y[dy] * share;
      atomicAdd(map + row * level.width + column,
                static_cast<unsigned long long>(__double2ll_rn(part * kSplatUnitsPerOne)));
    }
  }
}

template <typename A>
__global__ void __launch_bounds__(kThreads)
    splat_to_float_kernel(const long long* __restrict__ fixed, int64_t count, A* __restrict__ map) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) map[i] = static_cast<A>(fixed[i] / kSplatUnitsPerOne);
}

}  // namespace

cudaError_t splat(const Problem& problem, Dtype dtype, const void* locations, const void* weights,
                  void* fixed, cudaStream_t stream) {
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    return launch_flat(splat_kernel<A>, problem.images * problem.samples(), stream, problem,
                       static_cast<const A*>(locations), static_cast<const A*>(weights),
                       static_cast<unsigned long long*>(fixed));
  };
  return dtype == Dtype::kFloat64 ? run(double()) : run(float());
}

cudaError_t splat_to_float(Dtype dtype, const void* fixed, int64_t count, void* map,
                           cudaStream_t stream) {
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    return launch_flat(splat_to_float_kernel<A>, count, stream,
                       static_cast<const long long*>(fixed), count, static_cast<A*>(map));
  };
  return dtype == Dtype::kFloat64 ? run(double()) : run(float());
}

}  // namespace sparse_detr::cuda
