// Rates that the kernels' design rests on, measured alone:
//
//   copy       device memory, read and write
//   gather     128-byte rows at random from a map of 22.8 MB (a 800x1333 image's values: in L2) and
//              from 16 KB (in L1): what the forward lives on
//   red        additions to random rows of such a map, one float or four per instruction; and
//              to 273 rows (the coarsest level): what the backward lives on
//   shared     integer additions with return value to 2 048 counters in shared memory, at
//              random and with 8 lanes on each: what sorting lives on
//
//   nvcc -O3 -arch=native benchmarks/gpu/micro.cu -o micro && ./micro FILE.json
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(call)                                                       \
  do {                                                                    \
    const cudaError_t error = (call);                                     \
    if (error != cudaSuccess) {                                           \
      std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error)); \
      std::exit(1);                                                       \
    }                                                                     \
  } while (0)

constexpr int kThreads = 256, kRowFloats = 32, kSteps = 256;

__device__ __forceinline__ unsigned next(unsigned x) { return x * 1664525u + 1013904223u; }
__device__ __forceinline__ unsigned below(unsigned x, unsigned n) { return __umulhi(x, n); }

__global__ void copy(const float4* from, float4* to, size_t count) {
  for (size_t i = size_t(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += size_t(gridDim.x) * kThreads) {
    to[i] = from[i];
  }
}

// Eight lanes read a row; four independent rows at a time.
__global__ void gather(const float4* map, unsigned rows, float* out) {
  const unsigned lane = threadIdx.x % 8;
  unsigned x = (blockIdx.x * kThreads + threadIdx.x) / 8 * 2654435761u + 1;
  float4 sum = {0, 0, 0, 0};
  for (int step = 0; step < kSteps; step += 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x = next(x);
      const float4 v = __ldg(map + below(x, rows) * (kRowFloats / 4) + lane);
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
  }
  out[blockIdx.x * kThreads + threadIdx.x] = sum.x + sum.y + sum.z + sum.w;
}

template <bool kVector>
__global__ void reduce(float* map, unsigned rows) {
  const unsigned lane = threadIdx.x % 8;
  unsigned x = (blockIdx.x * kThreads + threadIdx.x) / 8 * 2654435761u + 1;
  for (int step = 0; step < kSteps; ++step) {
    x = next(x);
    float* p = map + below(x, rows) * kRowFloats + lane * 4;
#if __CUDA_ARCH__ >= 900
    if (kVector) {
      atomicAdd(reinterpret_cast<float4*>(p), make_float4(1, 2, 3, 4));
      continue;
    }
#endif
    for (int i = 0; i < 4; ++i) atomicAdd(p + i, 1.0f);
  }
}

template <int kLanesPerCounter>
__global__ void count(unsigned* out) {
  __shared__ unsigned counters[2048];
  for (int i = threadIdx.x; i < 2048; i += kThreads) counters[i] = 0;
  __syncthreads();
  unsigned x = (blockIdx.x * kThreads + threadIdx.x) / kLanesPerCounter * 2654435761u + 1, sum = 0;
  for (int step = 0; step < kSteps; ++step) {
    x = next(x);
    sum += atomicAdd(&counters[below(x, 2048)], 1u);
  }
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

// Median and best seconds of 20 launches after 3.
template <typename Launch>
void measure(Launch launch, double* median, double* best) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<double> seconds;
  for (int i = 0; i < 23; ++i) {
    CHECK(cudaEventRecord(begin));
    launch();
    CHECK(cudaEventRecord(end));
    CHECK(cudaGetLastError());
    CHECK(cudaEventSynchronize(end));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 3) seconds.push_back(ms * 1e-3);
  }
  std::sort(seconds.begin(), seconds.end());
  *median = seconds[seconds.size() / 2];
  *best = seconds[0];
}

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: micro FILE.json\n");
    return 2;
  }
  cudaDeviceProp gpu;
  CHECK(cudaGetDeviceProperties(&gpu, 0));
  const int blocks = gpu.multiProcessorCount * 8;
  const size_t threads = size_t(blocks) * kThreads, big = size_t(1) << 30;
  char *a, *b;
  CHECK(cudaMalloc(&a, big));
  CHECK(cudaMalloc(&b, big));
  CHECK(cudaMemset(a, 0, big));
  const unsigned rows = 22223 * 8, hot = 273 * 8;  // of 32 floats: 8 heads
  const double bytes = double(threads) * kSteps * 16;

  std::FILE* file = std::fopen(argv[1], "w");
  if (file == nullptr) {
    std::perror(argv[1]);
    return 1;
  }
  std::fprintf(file, "{\"gpu\": \"%s\", \"multiprocessors\": %d", gpu.name,
               gpu.multiProcessorCount);
  const auto report = [&](const char* name, const char* unit, double amount, auto launch) {
    double median, best;
    measure(launch, &median, &best);
    std::fprintf(file, ",\n \"%s\": {\"unit\": \"%s\", \"median\": %.4g, \"best\": %.4g}", name,
                 unit, amount / median * 1e-12, amount / best * 1e-12);
    std::printf("%-34s %8.3f %s (best %.3f)\n", name, amount / median * 1e-12, unit,
                amount / best * 1e-12);
  };
  float4* map = reinterpret_cast<float4*>(a);
  float* out = reinterpret_cast<float*>(b);
  report("copy", "TB/s", 2.0 * big, [&] { copy<<<blocks, kThreads>>>(map, (float4*)b, big / 16); });
  report("gather from L2", "TB/s", bytes, [&] { gather<<<blocks, kThreads>>>(map, rows, out); });
  report("gather from L1", "TB/s", bytes, [&] { gather<<<blocks, kThreads>>>(map, 128, out); });
  report("red, one float", "TB/s", bytes,
         [&] { reduce<false><<<blocks, kThreads>>>((float*)a, rows); });
  report("red, four floats", "TB/s", bytes,
         [&] { reduce<true><<<blocks, kThreads>>>((float*)a, rows); });
  report("red, one float, hot rows", "TB/s", bytes,
         [&] { reduce<false><<<blocks, kThreads>>>((float*)a, hot); });
  report("red, four floats, hot rows", "TB/s", bytes,
         [&] { reduce<true><<<blocks, kThreads>>>((float*)a, hot); });
  report("shared additions, random", "T/s", double(threads) * kSteps,
         [&] { count<1><<<blocks, kThreads>>>((unsigned*)b); });
  report("shared additions, 8 lanes alike", "T/s", double(threads) * kSteps,
         [&] { count<8><<<blocks, kThreads>>>((unsigned*)b); });
  std::fprintf(file, "}\n");
  std::fclose(file);
  return 0;
}
