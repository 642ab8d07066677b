// Vectors without intrinsics: GCC/Clang vector extensions, compiled for the ISA in the flags.
//
// Every width D of a head is cut into blocks of 32, 16, 8 and 1 channels (for_each_block), and the
// loops over samples are templates on the block, so that a block's accumulators stay in registers.
// T is the type in memory (double, float, BFloat16, Half), A = Accumulator<T> the type of all sums.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace sparse_detr {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename A, int W>
struct VectorOf {
  typedef A type __attribute__((vector_size(W * sizeof(A))));
};
template <typename A>
struct VectorOf<A, 1> {
  typedef A type;
};
template <typename A, int W>
using Vector = typename VectorOf<A, W>::type;

// Lanes of the vectors that hold a block of C channels.
template <typename A, int C>
constexpr int kLanes = C < kVectorBytes / int(sizeof(A)) ? C : kVectorBytes / int(sizeof(A));

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename To, typename From>
inline To convert(const From& from) {
  if constexpr (std::is_arithmetic_v<From>) {
    return static_cast<To>(from);
  } else {
    return __builtin_convertvector(from, To);
  }
}

// W consecutive elements as a vector of A.
template <int W, typename T>
inline Vector<Accumulator<T>, W> load(const T* p) {
  using V = Vector<Accumulator<T>, W>;
  if constexpr (std::is_floating_point_v<T>) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
  } else {
    using Bits = Vector<uint32_t, W>;
    Vector<uint16_t, W> narrow;
    std::memcpy(&narrow, p, sizeof(narrow));
    const Bits wide = convert<Bits>(narrow);
    if constexpr (std::is_same_v<T, BFloat16>) {
      return bit_cast<V>(Bits(wide << 16));
    } else {
      // Exponent and mantissa move to their places in float32; times 2^112 corrects the exponent
      // bias, also of subnormals. Infinity and NaN (exponent 31) get the full exponent after it.
      const Bits magnitude = (wide & 0x7fffu) << 13;
      const Bits special = magnitude >= (0x7c00u << 13) ? Bits{} + 0x7f800000u : Bits{};
      const V scaled = bit_cast<V>(magnitude) * 0x1p112f;
      return bit_cast<V>(Bits(bit_cast<Bits>(scaled) | special | ((wide & 0x8000u) << 16)));
    }
  }
}

template <typename T>
inline Accumulator<T> load_one(const T* p) {
  return load<1>(p);
}

// One element of A to memory, rounded to nearest even.
inline void store_one(double* p, double x) { *p = x; }
inline void store_one(float* p, float x) { *p = x; }
inline void store_one(BFloat16* p, float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  p->bits = x != x ? 0x7fc0 : uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
inline void store_one(Half* p, float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t magnitude = u & 0x7fffffffu;
  uint32_t h;
  if (magnitude >= 0x47800000u) {  // 65536 and above, infinity, NaN
    h = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below the smallest normal: the addition rounds
    h = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    h = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  p->bits = uint16_t(h | ((u >> 16) & 0x8000u));
}

template <int W, typename T>
inline void store(T* p, Vector<Accumulator<T>, W> v) {
  if constexpr (std::is_floating_point_v<T>) {
    std::memcpy(p, &v, sizeof(v));
  } else {
    float x[W];
    std::memcpy(x, &v, sizeof(v));
    for (int i = 0; i < W; ++i) store_one(p + i, x[i]);
  }
}

// f(std::integral_constant<int, C>, first channel) for blocks that cover D channels.
template <typename F>
inline void for_each_block(int D, F&& f) {
  int c = 0;
  for (; c + 32 <= D; c += 32) f(std::integral_constant<int, 32>(), c);
  if (c + 16 <= D) {
    f(std::integral_constant<int, 16>(), c);
    c += 16;
  }
  if (c + 8 <= D) {
    f(std::integral_constant<int, 8>(), c);
    c += 8;
  }
  for (; c < D; ++c) f(std::integral_constant<int, 1>(), c);
}

// ---- shuffles: lane i of the result is lane Lane(i, W) of (a, b), numbered 0 .. 2W-1

constexpr int even_lane(int i, int) { return 2 * i; }
constexpr int odd_lane(int i, int) { return 2 * i + 1; }
constexpr int low_halves(int i, int W) { return i / 2 + i % 2 * W; }  // a0 b0 a1 b1 ...
constexpr int high_halves(int i, int W) { return i / 2 + i % 2 * W + W / 2; }

template <int Half>
constexpr int rotated(int i, int W) {
  return (i + Half) % W;
}

template <int (*Lane)(int, int), typename A, int W, std::size_t... I>
inline Vector<A, W> shuffle(Vector<A, W> a, Vector<A, W> b, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Lane(I, W)...);
#else
  using Index = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  constexpr Vector<Index, W> lanes = {Lane(I, W)...};
  return __builtin_shuffle(a, b, lanes);
#endif
}
template <int (*Lane)(int, int), typename A, int W>
inline Vector<A, W> shuffle(Vector<A, W> a, Vector<A, W> b) {
  return shuffle<Lane, A, W>(a, b, std::make_index_sequence<W>());
}

// ---- blocks of K * W consecutive channels as K vectors
//
// Of BFloat16 two neighbouring vectors hold the even and the odd channels of their 2 * W: taking a
// 32-bit word apart needs a shift and a mask, widening 16 bits in order a shuffle for each vector.
// Sums over channels do not mind the order; what is not of type T is brought into it.

template <typename T, int K>
constexpr bool kSplit = std::is_same_v<T, BFloat16> && K % 2 == 0;

template <typename T, int W, int K>
inline void load_block(const T* p, Vector<Accumulator<T>, W> (&v)[K]) {
  using V = Vector<Accumulator<T>, W>;
  if constexpr (kSplit<T, K>) {
    using Bits = Vector<uint32_t, W>;
    for (int i = 0; i < K; i += 2) {
      Bits words;
      std::memcpy(&words, p + i * W, sizeof(words));
      v[i] = bit_cast<V>(Bits(words << 16));
      v[i + 1] = bit_cast<V>(Bits(words & 0xffff0000u));
    }
  } else {
    for (int i = 0; i < K; ++i) v[i] = load<W>(p + i * W);
  }
}

// Channels of type A in the order of a block of T.
template <typename T, int W, int K, typename A = Accumulator<T>>
inline void load_block_as(const A* p, Vector<A, W> (&v)[K]) {
  for (int i = 0; i < K; ++i) v[i] = load<W>(p + i * W);
  if constexpr (kSplit<T, K>) {
    for (int i = 0; i < K; i += 2) {
      const auto low = v[i], high = v[i + 1];
      v[i] = shuffle<even_lane, A, W>(low, high);
      v[i + 1] = shuffle<odd_lane, A, W>(low, high);
    }
  }
}

template <typename T, int W, int K>
inline void store_block(T* p, const Vector<Accumulator<T>, W> (&v)[K]) {
  if constexpr (kSplit<T, K>) {
    using Bits = Vector<uint32_t, W>;
    const auto rounded = [](Vector<float, W> x) {  // as store_one
      const Bits u = bit_cast<Bits>(x);
      return Bits(x != x ? Bits{} + 0x7fc00000u : u + 0x7fffu + ((u >> 16) & 1u));
    };
    for (int i = 0; i < K; i += 2) {
      const Bits words = rounded(v[i]) >> 16 | (rounded(v[i + 1]) & 0xffff0000u);
      std::memcpy(p + i * W, &words, sizeof(words));
    }
  } else {
    for (int i = 0; i < K; ++i) store<W>(p + i * W, v[i]);
  }
}

// combine() over all lanes, in every lane.
template <typename A, int W, int Half = W / 2, typename F>
inline Vector<A, W> over_lanes(Vector<A, W> v, F&& combine) {
  if constexpr (Half == 0) {
    return v;
  } else {
    return over_lanes<A, W, Half / 2>(combine(v, shuffle<rotated<Half>, A, W>(v, v)), combine);
  }
}

// The vector whose lane i is the sum of the lanes of row(i), for W rows; depth first, so that only
// log2(W) vectors are alive. Each step adds the halves of two vectors and interleaves the results,
// hence rows are met in bit-reversed order: `first` counts in steps of W / Rows.
template <typename A, int W, int Rows = W, typename F>
inline Vector<A, W> lane_sums(F&& row, int first = 0) {
  if constexpr (Rows == 1) {
    return row(first);
  } else {
    const Vector<A, W> a = lane_sums<A, W, Rows / 2>(row, first);
    const Vector<A, W> b = lane_sums<A, W, Rows / 2>(row, first + W / Rows);
    return shuffle<low_halves, A, W>(a, b) + shuffle<high_halves, A, W>(a, b);
  }
}

}  // namespace sparse_detr
