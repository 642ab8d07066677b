// Stands in for the CUDA toolkit's header, so that a host compiler turns the .cu files into a CPU
// library: the kernels themselves run, line by line, on a machine without a GPU.
//
// A warp is 32 fibers. Each runs alone until it reaches a warp-wide operation (__syncwarp, a
// shuffle) and waits there for the others; a lane that leaves the kernel while others wait is an
// error. A warp runs alone until all its lanes reach __syncthreads or the end; then the next warp
// runs. Lanes and warps run in ascending or descending order (`descending`): code that lacks a
// barrier sees stale shared memory in one of the two. Blocks run one after the other. Addresses of
// vector loads and reductions must be aligned as on the device.
#pragma once

// Before __CUDA_ARCH__ is defined, which they test.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>

#define __CUDA_ARCH__ EMULATED_ARCH
#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

using std::exp, std::floor, std::ilogb, std::isfinite, std::ldexp, std::log, std::max, std::min,
    std::sqrt;

struct float2 {
  float x, y;
};
struct double2 {
  double x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim;  // of the lane that runs

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace sparse_detr::cuda {
inline double dynamic_memory[48 << 7];  // 48 KB
}

namespace emulator {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s\n", what);
  std::abort();
}

enum Wait { kWarpWide, kBlockWide, kFinished };  // what a lane waits for

struct Lane {
  jmp_buf resume;
  uint64_t exchanged[2];  // two in turn: one wait per shuffle is enough
  unsigned shuffles;
  Wait waits;
};

inline constexpr unsigned kWarp = 32, kMostThreads = 1024;
inline constexpr size_t kStack = 64 << 10;
inline Lane lanes[kMostThreads];
inline char* stacks[kMostThreads];
inline jmp_buf scheduler;
inline Lane* current;
inline bool descending = false;
inline int64_t vector_reductions = 0;  // so far
inline std::function<void()> body;

// Back to the scheduler, until all lanes of the warp or block have come this far. (_setjmp and
// _longjmp make no system call, unlike swapcontext.)
inline void wait(Wait what) {
  current->waits = what;
  if (!_setjmp(current->resume)) _longjmp(scheduler, 1);
}

inline void enter() {
  for (;;) {
    wait(kFinished);
    body();
  }
}

inline void resume(Lane& lane) {
  current = &lane;
  if (!_setjmp(scheduler)) _longjmp(lane.resume, 1);
}

inline void start_lane(unsigned i) {
  stacks[i] = new char[kStack];
  current = &lanes[i];
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stacks[i];
  context.uc_stack.ss_size = kStack;
  makecontext(&context, enter, 0);
  if (!_setjmp(scheduler)) setcontext(&context);
}

// Runs a warp from one warp-wide operation to the next, until its lanes wait for the block or have
// finished.
inline Wait run_warp(unsigned first) {
  for (;;) {
    for (unsigned i = 0; i < kWarp; ++i) {
      const unsigned lane = first + (descending ? kWarp - 1 - i : i);
      threadIdx = dim3(lane, 0, 0);
      resume(lanes[lane]);
    }
    const Wait waits = lanes[first].waits;
    for (unsigned i = 0; i < kWarp; ++i) {
      if (lanes[first + i].waits != waits) fail("lanes of a warp meet different barriers");
    }
    if (waits != kWarpWide) return waits;
  }
}

// Runs a block from one __syncthreads to the next.
inline void run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) {
    if (stacks[i] == nullptr) start_lane(i);
  }
  const unsigned warps = threads / kWarp;
  for (Wait waits = kBlockWide; waits != kFinished;) {
    for (unsigned i = 0; i < warps; ++i) {
      const Wait found = run_warp(kWarp * (descending ? warps - 1 - i : i));
      if (i > 0 && found != waits) fail("warps of a block meet different barriers");
      waits = found;
    }
  }
}

template <typename T>
T exchange(T x, unsigned from) {  // a lane of the same warp
  static_assert(sizeof(T) <= 8);
  const unsigned slot = current->shuffles++ % 2;
  std::memcpy(&current->exchanged[slot], &x, sizeof(T));
  wait(kWarpWide);
  std::memcpy(&x, &lanes[threadIdx.x / kWarp * kWarp + from].exchanged[slot], sizeof(T));
  return x;
}

template <typename T>
T* aligned(T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) fail("misaligned address");
  return p;
}

}  // namespace emulator

inline void __syncwarp() { emulator::wait(emulator::kWarpWide); }
inline void __syncthreads() { emulator::wait(emulator::kBlockWide); }
template <typename T>
T __shfl_sync(unsigned, T x, unsigned lane) {
  return emulator::exchange(x, lane);
}
template <typename T>
T __shfl_xor_sync(unsigned, T x, unsigned mask) {
  return emulator::exchange(x, threadIdx.x % emulator::kWarp ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T x, unsigned step) {
  const unsigned lane = threadIdx.x % emulator::kWarp;
  return emulator::exchange(x, lane < step ? lane : lane - step);
}

template <typename T>
T __ldg(const T* p) {
  return *emulator::aligned(p);
}

template <typename T>
T atomicAdd(T* p, T x) {
  const T before = *emulator::aligned(p);
  *p += x;
  return before;
}
inline void atomicAdd(float4* p, float4 x) {
  emulator::aligned(p);
  ++emulator::vector_reductions;
  p->x += x.x, p->y += x.y, p->z += x.z, p->w += x.w;
}

inline float __uint_as_float(unsigned x) {
  float y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
inline long long __double2ll_rn(double x) { return std::llrint(x); }
inline double __dmul_rn(double x, double y) { return x * y; }

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  using namespace emulator;
  if (config->blockDim.x % kWarp || config->blockDim.x > kMostThreads || config->gridDim.x == 0) {
    return cudaErrorInvalidConfiguration;
  }
  if (config->dynamicSmemBytes > sizeof(sparse_detr::cuda::dynamic_memory)) {
    return cudaErrorInvalidValue;
  }
  const std::tuple<Params...> params(std::forward<Args>(args)...);
  body = [&] { std::apply(kernel, params); };
  blockDim = config->blockDim;
  for (unsigned block = 0; block < config->gridDim.x; ++block) {
    blockIdx = dim3(block, 0, 0);
    for (double& x : sparse_detr::cuda::dynamic_memory) x = NAN;
    run_block(blockDim.x);
  }
  return cudaSuccess;
}
