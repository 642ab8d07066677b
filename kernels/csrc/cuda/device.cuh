// How a group of lanes holds the D channels of a head, reads and adds them, and sums over them.
//
// G neighbouring lanes work on one (query, head). Each holds V consecutive channels, 16 bytes
// where the head width allows it, so one load of the group is one token's whole channel vector.
// A warp holds 32 / G queries of the same head, a block of 256 threads 256 / G.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"

#define DEVICE __device__ __forceinline__

namespace sparse_detr::cuda {

constexpr int kThreads = 256;
// Blocks per multiprocessor that the register count must allow: 48 registers a thread on Hopper,
// 64 on earlier devices.
#if __CUDA_ARCH__ >= 900
constexpr int kForwardBlocks = 5;
#else
constexpr int kForwardBlocks = 4;
#endif
constexpr int kBackwardBlocks = 4;
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

// kExact: D == V * G. Otherwise (any D, one channel per lane) kernels step over the channels in
// blocks of V * G, and lanes beyond D idle.
template <typename T_, int V_, int G_, bool kExact_>
struct Width {
  using T = T_;
  using A = Accumulator<T>;
  static constexpr int V = V_, G = G_;
  static constexpr bool kExact = kExact_;
  static constexpr int kWords = sizeof(A) / 4;  // registers of a number
  static constexpr int kGroups = kThreads / G;  // queries in flight in the largest block
  // Samples prepared at a time; 32 bytes each, so at most 16 KB of shared memory in float32.
  static constexpr int kChunk = 2 * G < 32 ? 2 * G : 32;
  // One record of padding puts the groups of a warp into different banks.
  static constexpr int kStride = kChunk + 1;
  static_assert(G >= 4 && G <= 32 && (G & (G - 1)) == 0, "a group is part of one warp");
};

template <typename T>
using AnyWidth = Width<T, 1, 32, false>;

// ---- conversion --------------------------------------------------------------------------------

DEVICE float widen(float x) { return x; }
DEVICE double widen(double x) { return x; }
DEVICE float widen(__half x) { return __half2float(x); }
DEVICE float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

DEVICE void narrow(float x, float& y) { y = x; }
DEVICE void narrow(double x, double& y) { y = x; }
DEVICE void narrow(float x, __half& y) { y = __float2half_rn(x); }
DEVICE void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }

// 16-bit numbers from and to their bits; the last argument selects the type.
DEVICE float from_bits(unsigned short bits, __half) { return widen(__ushort_as_half(bits)); }
DEVICE float from_bits(unsigned short bits, __nv_bfloat16) {
  return __uint_as_float(static_cast<unsigned>(bits) << 16);
}
DEVICE unsigned short to_bits(float x, __half) { return __half_as_ushort(__float2half_rn(x)); }
DEVICE unsigned short to_bits(float x, __nv_bfloat16) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

// ---- one lane's channels -----------------------------------------------------------------------

// Hides where a pointer came from. Else the compiler adds base, block and lane offsets anew at
// every use, three instructions for each address instead of one.
template <typename T>
DEVICE T* opaque(T* p) {
#ifdef __CUDACC__
  asm("" : "+l"(p));
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

// Hides how a number came about. Else the compiler splits a product that it was computed with into
// 64-bit steps at every use.
DEVICE int opaque(int x) {
#ifdef __CUDACC__
  asm("" : "+r"(x));
#endif
  return x;
}

// V 16-bit elements from their words.
template <typename T, int V>
DEVICE void unpack(const unsigned* words, float (&x)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    x[i] = from_bits(static_cast<unsigned short>(words[i / 2] >> (i % 2 * 16)), T());
  }
}

// V consecutive elements of read-only memory, aligned to V * sizeof(T) bytes: one load.
template <typename T, int V, typename A>
DEVICE void load(const T* p, A (&x)[V]) {
  if constexpr (V == 1) {
    x[0] = widen(__ldg(p));
  } else if constexpr (sizeof(T) == 4) {
    static_assert(V == 4, "16 bytes");
    const float4 q = __ldg(reinterpret_cast<const float4*>(p));
    x[0] = q.x, x[1] = q.y, x[2] = q.z, x[3] = q.w;
  } else {
    static_assert(sizeof(T) == 2 && (V == 2 || V == 4 || V == 8), "4, 8 or 16 bytes");
    if constexpr (V == 8) {
      const uint4 q = __ldg(reinterpret_cast<const uint4*>(p));
      const unsigned words[4] = {q.x, q.y, q.z, q.w};
      unpack<T>(words, x);
    } else if constexpr (V == 4) {
      const uint2 q = __ldg(reinterpret_cast<const uint2*>(p));
      const unsigned words[2] = {q.x, q.y};
      unpack<T>(words, x);
    } else {
      const unsigned word = __ldg(reinterpret_cast<const unsigned*>(p));
      unpack<T>(&word, x);
    }
  }
}

// The same from shared memory.
template <typename T, int V>
DEVICE void load_shared(const T* p, float (&x)[V]) {
  if constexpr (sizeof(T) == 4) {
    static_assert(V == 4, "16 bytes");
    const float4 q = *reinterpret_cast<const float4*>(p);
    x[0] = q.x, x[1] = q.y, x[2] = q.z, x[3] = q.w;
  } else if constexpr (V == 8) {
    const uint4 q = *reinterpret_cast<const uint4*>(p);
    const unsigned words[4] = {q.x, q.y, q.z, q.w};
    unpack<T>(words, x);
  } else {
    static_assert(sizeof(T) == 2 && V == 4, "8 or 16 bytes");
    const uint2 q = *reinterpret_cast<const uint2*>(p);
    const unsigned words[2] = {q.x, q.y};
    unpack<T>(words, x);
  }
}

// The reverse, rounded to nearest.
template <typename T, int V, typename A>
DEVICE void store(T* p, const A (&x)[V]) {
  if constexpr (V == 1) {
    narrow(x[0], *p);
  } else if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
  } else {
    unsigned words[V / 2];
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      words[i] = to_bits(x[2 * i], T()) | static_cast<unsigned>(to_bits(x[2 * i + 1], T())) << 16;
    }
    if constexpr (V == 8) {
      *reinterpret_cast<uint4*>(p) = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
      *reinterpret_cast<uint2*>(p) = make_uint2(words[0], words[1]);
    }
  }
}

// Shared memory whose size the launch gives.
#ifdef __CUDACC__
extern __shared__ double dynamic_memory[];
#endif
template <typename A>
DEVICE A* dynamic_shared() {
  return reinterpret_cast<A*>(dynamic_memory);
}

// ---- sums over lanes ---------------------------------------------------------------------------

// The sum over the group, on every lane.
template <int G, typename A>
DEVICE A group_sum(A x) {
#pragma unroll
  for (int step = G / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

template <int G, typename A>
DEVICE A group_max(A x) {
#pragma unroll
  for (int step = G / 2; step > 0; step /= 2) {
    x = max(x, __shfl_xor_sync(kAllLanes, x, step));
  }
  return x;
}

// The sums over the group of four values per lane; lane j returns that of x[j % 4]. Each exchange
// halves the values in hand: 3 + log2(G / 4) shuffles instead of 4 log2(G).
template <int G, typename A>
DEVICE A group_sum_transposed(const A (&x)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  const A a = (odd ? x[1] : x[0]) + __shfl_xor_sync(kAllLanes, odd ? x[0] : x[1], 1);
  const A b = (odd ? x[3] : x[2]) + __shfl_xor_sync(kAllLanes, odd ? x[2] : x[3], 1);
  A sum = (high ? b : a) + __shfl_xor_sync(kAllLanes, high ? a : b, 2);
#pragma unroll
  for (int step = G / 2; step >= 4; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return sum;
}

// Even lanes return the sum of a over the group, odd lanes that of b.
template <int G, typename A>
DEVICE A group_sum_pair(A a, A b, int lane) {
  const bool odd = lane & 1;
  A sum = (odd ? b : a) + __shfl_xor_sync(kAllLanes, odd ? a : b, 1);
#pragma unroll
  for (int step = G / 2; step >= 2; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return sum;
}

// ---- sums in memory ----------------------------------------------------------------------------

// The unit of a fixed-point sum: the smallest power of two at which the sum over a head's Q * L * P
// samples, each of magnitude <= bound, cannot overflow int64. Integer sums don't depend on the
// order of their terms, so the result is reproducible to the last bit. With 2^18 samples the unit
// is 2^-44 of the bound. A bound that is not finite makes every sum NaN.
struct FixedPoint {
  double scale, unit;

  DEVICE FixedPoint(double bound, const Problem& problem) {
    if (!isfinite(bound)) {
      scale = 0;
      unit = bound - bound;  // NaN
      return;
    }
    // |sum| < 2^(ilogb + 1). The scale stays finite for the smallest bounds.
    const double samples = double(problem.queries) * problem.levels * problem.points;
    const int shift = bound == 0 ? 0 : min(62 - 1 - ilogb(bound * samples), 1000);
    scale = ldexp(1.0, shift);
    unit = ldexp(1.0, -shift);
  }
};

// Adds V channels. One vector reduction (REDG.F32x4) per four floats where the hardware has it.
template <typename A, int V>
DEVICE void add_to(A* p, const A (&x)[V]) {
#if __CUDA_ARCH__ >= 900 && CUDART_VERSION >= 12010
  constexpr bool kVector = sizeof(A) == 4 && V % 4 == 0;
#else
  constexpr bool kVector = false;
#endif
  if constexpr (kVector) {
#pragma unroll
    for (int i = 0; i < V; i += 4) {
      atomicAdd(reinterpret_cast<float4*>(p + i), make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) atomicAdd(p + i, x[i]);
  }
}

// A gradient map (B, N, M, D) that many samples add to, see GradientMap in launch.h. `p` points
// into `map`; a null map is a gradient that nobody wants.
template <typename A>
struct FloatingMap {
  static constexpr bool kFloating = true;
  A* map;

  explicit FloatingMap(const GradientMap& x) : map(static_cast<A*>(x.sum)) {}
  DEVICE void start(const Problem&) {}

  // Sums of one lane before they go to the map: sum += weight * x, and flush.
  using Sum = A;
  DEVICE void accumulate(A& sum, A weight, A x) const { sum += weight * x; }
  template <int V>
  DEVICE void flush(A* p, const A (&sum)[V]) const {
    add_to<A, V>(p, sum);
  }

  template <int V>
  DEVICE void add(A* p, const A (&x)[V]) const {
    add_to<A, V>(p, x);
  }
};

template <typename A>
struct FixedMap {
  static constexpr bool kFloating = false;
  unsigned long long* map;
  const A* bound;
  double scale;

  explicit FixedMap(const GradientMap& x)
      : map(static_cast<unsigned long long*>(x.fixed)), bound(static_cast<const A*>(x.bound)) {}
  DEVICE void start(const Problem& problem) {
    if (map) scale = FixedPoint(*bound, problem).scale;
  }

  // Every term is rounded for itself, so that the sum is the same however terms meet.
  using Sum = unsigned long long;
  DEVICE void accumulate(Sum& sum, A weight, A x) const {
    sum += static_cast<Sum>(__double2ll_rn(weight * x * scale));
  }
  template <int V>
  DEVICE void flush(Sum* p, const Sum (&sum)[V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) atomicAdd(p + v, sum[v]);
  }

  template <int V>
  DEVICE void add(unsigned long long* p, const A (&x)[V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      atomicAdd(p + v, static_cast<unsigned long long>(__double2ll_rn(x[v] * scale)));
    }
  }
};

}  // namespace sparse_detr::cuda
