// The samples of one (image, query, head): where their four corners lie, what each corner weighs,
// and the loops over the corners that forward and backward passes are made of.
//
// Samples come in chunks of 16, the last one filled up with samples that lie outside: everything
// per sample is then a short loop of constant length over one vector register.
// Corner i of a sample: 0 top left, 1 top right, 2 bottom left, 3 bottom right. A corner outside
// the map points to a row of zeros (reads) or to a scratch row (writes): no branch per corner, and
// what the map holds elsewhere, NaN included, never leaks in.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "problem.h"

namespace sparse_detr {

constexpr int kChunk = 16;

inline int whole_chunks(int count) { return (count + kChunk - 1) / kChunk * kChunk; }

// ---- rows of run-time type

template <typename F>
inline void with_pointer(const void* data, Scalar type, F&& f) {
  switch (type) {
    case Scalar::kDouble:
      return f(static_cast<const double*>(data));
    case Scalar::kFloat:
      return f(static_cast<const float*>(data));
    case Scalar::kBFloat16:
      return f(static_cast<const BFloat16*>(data));
    case Scalar::kHalf:
      return f(static_cast<const Half*>(data));
  }
}

// `count` elements from `index` on, as A: where they are, or converted into `buffer`.
template <typename A>
inline const A* load_row(const Side& side, int64_t index, int count, A* buffer) {
  const A* row = buffer;
  with_pointer(side.data, side.type, [&](auto* from) {
    if constexpr (std::is_same_v<decltype(from), const A*>) {
      row = from + index;
    } else {
      for (int i = 0; i < count; ++i) buffer[i] = A(load_one(from + index + i));
    }
  });
  return row;
}

template <typename A>
inline void store_row(const MutableSide& side, int64_t index, int count, const A* from) {
  with_pointer(side.data, side.type, [&](auto* data) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    T* to = const_cast<T*>(data) + index;
    for (int i = 0; i < count; ++i) store_one(to + i, Accumulator<T>(from[i]));
  });
}

// ---- samples

template <typename A>
struct alignas(64) Chunk {
  using Index = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

  int count;  // samples that exist, the rest lies outside
  // Of the level of each sample.
  A width[kChunk], height[kChunk];
  Index columns[kChunk], start[kChunk];
  // Pixel coordinate (0 at the centre of the first pixel) = given coordinate * scale + centre.
  A scale_x[kChunk], scale_y[kChunk], centre_x[kChunk], centre_y[kChunk];

  // Set by locate(): place inside the cell, bilinear weights, first token of the cell (which may
  // lie outside) and, as masks, which corners are inside.
  A dx[kChunk], dy[kChunk], bilinear[4][kChunk];
  Index token[kChunk], inside[4][kChunk];

  A share[kChunk];      // attention weight
  A weight[4][kChunk];  // bilinear weight times share: set by weigh()

  // `xy`: interleaved coordinates of the 16 samples.
  void locate(const A* xy) {
    constexpr int W = kLanes<A, kChunk>;
    for (int j = 0; j < kChunk; j += W) locate_lanes_<W>(xy + 2 * j, j);
  }

  void weigh() {
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < kChunk; ++j) weight[i][j] = bilinear[i][j] * share[j];
  }

 private:
  template <int W>
  void locate_lanes_(const A* xy, int j) {
    using Real = Vector<A, W>;
    using Int = Vector<Index, W>;
    const auto index = [&](const Index* p) {
      Int v;
      std::memcpy(&v, p + j, sizeof(v));
      return v;
    };
    const auto set_index = [&](Index* p, Int v) { std::memcpy(p + j, &v, sizeof(v)); };

    const Real first = load<W>(xy), second = load<W>(xy + W);
    Real x = shuffle<even_lane, A, W>(first, second) * load<W>(scale_x + j) + load<W>(centre_x + j);
    Real y = shuffle<odd_lane, A, W>(first, second) * load<W>(scale_y + j) + load<W>(centre_y + j);
    const Real w = load<W>(width + j), h = load<W>(height + j);
    const Int valid = (x >= -1) & (x < w) & (y >= -1) & (y < h);  // false for NaN
    const Real outside = Real{} - 2;  // of the cell at -2, all four corners are outside
    x = valid ? x : outside;
    y = valid ? y : outside;
    Int column = convert<Int>(x), row = convert<Int>(y);  // rounds towards zero
    column += convert<Real>(column) > x;                  // a true comparison is -1
    row += convert<Real>(row) > y;
    const Real fx = x - convert<Real>(column), fy = y - convert<Real>(row);

    const Int columns_ = index(columns);
    set_index(token, index(start) + row * columns_ + column);
    const Int left = column >= 0, right = valid & (convert<Real>(column + 1) < w);
    const Int top = row >= 0, bottom = valid & (convert<Real>(row + 1) < h);
    set_index(inside[0], top & left);
    set_index(inside[1], top & right);
    set_index(inside[2], bottom & left);
    set_index(inside[3], bottom & right);

    store<W>(dx + j, fx);
    store<W>(dy + j, fy);
    store<W>(bilinear[0] + j, Real((1 - fy) * (1 - fx)));
    store<W>(bilinear[1] + j, Real((1 - fy) * fx));
    store<W>(bilinear[2] + j, Real(fy * (1 - fx)));
    store<W>(bilinear[3] + j, Real(fy * fx));
  }
};

// Samples [first, first + count) of the L * P samples of a head.
template <typename A>
class Samples {
 public:
  const int first, count;
  std::vector<Chunk<A>> chunks;

  Samples(const Sizes& sizes, int first, int count)
      : first(first),
        count(count),
        chunks((count + kChunk - 1) / kChunk),
        buffer_(2 * kChunk * chunks.size()) {
    for (int j = 0; j < kChunk * int(chunks.size()); ++j) {
      Chunk<A>& chunk = chunks[j / kChunk];
      const int i = j % kChunk;
      const Level& level = sizes.levels[(first + std::min(j, count - 1)) / sizes.P];
      chunk.count = std::min(kChunk, count - j / kChunk * kChunk);
      chunk.width[i] = A(level.width);
      chunk.height[i] = A(level.height);
      chunk.columns[i] = level.width;
      chunk.start[i] = level.start;
      chunk.scale_x[i] = j < count ? A(level.width) : 0;
      chunk.scale_y[i] = j < count ? A(level.height) : 0;
      chunk.centre_x[i] = chunk.centre_y[i] = j < count ? A(-0.5) : A(-2);
      chunk.share[i] = 0;
    }
  }

  // From now on coordinates are offsets from these references (L, 2 or 4), not locations.
  void set_reference(const A* reference, int dim, int P) {
    for (int j = 0; j < count; ++j) {
      Chunk<A>& chunk = chunks[j / kChunk];
      const int i = j % kChunk;
      const A* r = reference + (first + j) / P * dim;
      chunk.centre_x[i] = r[0] * chunk.width[i] - A(0.5);
      chunk.centre_y[i] = r[1] * chunk.height[i] - A(0.5);
      chunk.scale_x[i] = dim == 2 ? 1 : r[2] * chunk.width[i] * A(0.5) / P;
      chunk.scale_y[i] = dim == 2 ? 1 : r[3] * chunk.height[i] * A(0.5) / P;
    }
  }

  // Coordinates of the samples, from element `index` of the side on.
  void locate(const Side& side, int64_t index) {
    const A* xy = load_row(side, index, 2 * count, buffer_.data());
    coordinates_ = xy;
    const int full = count / kChunk;
    for (int c = 0; c < full; ++c) chunks[c].locate(xy + 2 * kChunk * c);
    if (count % kChunk == 0) return;
    A* const last = buffer_.data() + 2 * kChunk * full;  // a whole chunk is read: copy the rest
    for (int i = 0; i < 2 * (count % kChunk); ++i) last[i] = xy[2 * kChunk * full + i];
    chunks[full].locate(last);
  }

  // (x, y) of each sample as given to locate().
  const A* coordinates() const { return coordinates_; }

  void set_shares(const A* share) {
    for (Chunk<A>& chunk : chunks) {
      std::memcpy(chunk.share, share,
                  chunk.count == kChunk ? sizeof(chunk.share) : chunk.count * sizeof(A));
      share += kChunk;
    }
  }

  void weigh() {
    for (Chunk<A>& chunk : chunks) chunk.weigh();
  }

 private:
  std::vector<A> buffer_;
  const A* coordinates_ = nullptr;
};

// ---- softmax

// exp(x) for x <= 0 to about one unit in the last place, in a form that compilers vectorise.
inline float exp_nonpositive(float x) {
  x = x < -87.0f ? -87.0f : x;  // keeps NaN
  const float n = std::floor(x * 1.44269504f + 0.5f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n log 2, |r| <= 0.35
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t exponent = int32_t(n == n ? n : 0.0f);
  return p * bit_cast<float>((exponent + 127) << 23);
}
inline double exp_nonpositive(double x) { return std::exp(x); }

// Softmax of the first `count` of the scores, in place. The scores fill whole chunks. Returns
// the log of the sum of exponentials.
template <typename A>
inline A softmax(int count, std::vector<A>& scores) {
  constexpr int W = kLanes<A, kChunk>;
  using V = Vector<A, W>;
  const int padded = int(scores.size());
  for (int j = count; j < padded; ++j) scores[j] = -std::numeric_limits<A>::infinity();
  V top = load<W>(scores.data());
  for (int j = W; j < padded; j += W) {
    const V x = load<W>(&scores[j]);
    top = x > top ? x : top;
  }
  top = over_lanes<A, W>(top, [](V a, V b) { return a > b ? a : b; });
  V sum = {};
  for (int j = 0; j < padded; j += W) {
    A x[W];
    store<W>(x, V(load<W>(&scores[j]) - top));
    for (int i = 0; i < W; ++i) x[i] = exp_nonpositive(x[i]);
    store<W>(&scores[j], load<W>(x));
    sum += load<W>(x);
  }
  sum = over_lanes<A, W>(sum, [](V a, V b) { return a + b; });
  const V scale = 1 / sum;
  for (int j = 0; j < padded; j += W) store<W>(&scores[j], V(load<W>(&scores[j]) * scale));
  return top[0] + std::log(sum[0]);
}

// ---- corners

// Addresses of the corners of all samples in an array of tokens (N, M, D).
template <typename T>
class Corners {
 public:
  struct alignas(64) Addresses {
    T* at[4][kChunk];
  };

  Corners(const Sizes& sizes, int chunks)
      : outside_(sizes.D), chunks_(chunks), bytes_(sizes.token_stride() * int64_t(sizeof(T))) {}

  // `base` is channel 0 of the head at token 0.
  template <typename A>
  void point_to(T* base, const Samples<A>& samples) {
    const int64_t outside = reinterpret_cast<int64_t>(outside_.data());
    const int64_t origin = reinterpret_cast<int64_t>(base), bytes = bytes_;
    for (size_t c = 0; c < chunks_.size(); ++c) {
      const Chunk<A>& chunk = samples.chunks[c];
      int64_t address[4][kChunk];
      for (int j = 0; j < kChunk; ++j) {
        const int64_t corner = origin + int64_t(chunk.token[j]) * bytes;
        const int64_t below = corner + int64_t(chunk.columns[j]) * bytes;
        address[0][j] = chunk.inside[0][j] ? corner : outside;
        address[1][j] = chunk.inside[1][j] ? corner + bytes : outside;
        address[2][j] = chunk.inside[2][j] ? below : outside;
        address[3][j] = chunk.inside[3][j] ? below + bytes : outside;
      }
      std::memcpy(chunks_[c].at, address, sizeof(address));
    }
  }

  const Addresses& operator[](size_t chunk) const { return chunks_[chunk]; }

 private:
  std::vector<std::remove_const_t<T>> outside_;
  std::vector<Addresses> chunks_;
  int64_t bytes_;
};

// The loops below ask for the cache lines of `next`, the corners that the same loop meets in its
// next call, while they work: one corner for each of theirs, because a processor that has some 16
// requests open stops at one more.
template <int C, typename T>
inline void prefetch(const T* row) {
  for (size_t c = 0; c < C; c += 64 / sizeof(T)) __builtin_prefetch(row + c);
}

// out[0..D) = sum over samples and corners of weight * value at the corner.
template <typename T, typename A = Accumulator<T>>
inline void weighted_sum(const Corners<const T>& corners, const Samples<A>& samples, int D, T* out,
                         const Corners<const T>& next) {
  for_each_block(D, [&](auto channels, int c) {
    constexpr int C = channels, W = kLanes<A, C>, K = C / W;
    using V = Vector<A, W>;
    constexpr int kChains = W * sizeof(A) == 64 && K <= 2 ? 4 : 2;  // additions in flight
    V sum[kChains][K] = {};
    for (size_t k = 0; k < samples.chunks.size(); ++k) {
      const Chunk<A>& chunk = samples.chunks[k];
      const auto& at = corners[k].at;
      const auto& next_at = next[k].at;
      for (int j = 0; j < chunk.count; ++j) {
        for (int i = 0; i < 4; ++i) {
          prefetch<C>(next_at[i][j] + c);
          V row[K];
          load_block<T, W>(at[i][j] + c, row);
          for (int v = 0; v < K; ++v) sum[i % kChains][v] += chunk.weight[i][j] * row[v];
        }
      }
    }
    for (int v = 0; v < K; ++v) {
      if constexpr (kChains == 4) sum[0][v] += sum[2][v], sum[1][v] += sum[3][v];
      sum[0][v] += sum[1][v];
    }
    store_block<T, W>(out + c, sum[0]);
  });
}

// <value at the corner, vector> per corner and sample.
template <typename A>
using Dots = std::vector<std::array<A, 4 * kChunk>>;

template <typename T, typename A = Accumulator<T>>
inline void corner_dots(const Corners<const T>& corners, int D, const A* vector, Dots<A>& dots,
                        const Corners<const T>& next) {
  for_each_block(D, [&](auto channels, int c) {
    constexpr int C = channels, W = kLanes<A, C>, K = C / W;
    using V = Vector<A, W>;
    V factor[K];
    load_block_as<T, W>(vector + c, factor);
    for (size_t k = 0; k < dots.size(); ++k) {
      for (int j = 0; j < 4 * kChunk; j += W) {
        const T* const* row = &corners[k].at[0][0] + j;
        const T* const* next_row = &next[k].at[0][0] + j;
        V sums = lane_sums<A, W>([&](int lane) {
          prefetch<C>(next_row[lane] + c);
          V block[K];
          load_block<T, W>(row[lane] + c, block);
          V products = block[0] * factor[0];
          for (int v = 1; v < K; ++v) products += block[v] * factor[v];
          return products;
        });
        if (c > 0) sums += load<W>(&dots[k][j]);
        store<W>(&dots[k][j], sums);
      }
    }
  });
}

// One term of a sample's gradient: share of the sample (one per sample, in order) times a vector
// (D).
template <typename A>
struct Term {
  const A* share;
  const A* vector;
};

// value at the corner += bilinear weight * sum of the terms
template <typename A, int Terms>
inline void scatter(const Corners<A>& corners, const Samples<A>& samples, int D,
                    const Term<A> (&terms)[Terms], const Corners<A>& next) {
  for_each_block(D, [&](auto channels, int c) {
    constexpr int C = channels, W = kLanes<A, C>, K = C / W;
    using V = Vector<A, W>;
    V vector[Terms][K];
    for (int t = 0; t < Terms; ++t)
      for (int v = 0; v < K; ++v) vector[t][v] = load<W>(terms[t].vector + c + v * W);
    for (size_t k = 0; k < samples.chunks.size(); ++k) {
      const Chunk<A>& chunk = samples.chunks[k];
      const auto& at = corners[k].at;
      const auto& next_at = next[k].at;
      for (int j = 0; j < chunk.count; ++j) {
        V row[K];
        for (int v = 0; v < K; ++v) {
          row[v] = terms[0].share[k * kChunk + j] * vector[0][v];
          for (int t = 1; t < Terms; ++t) row[v] += terms[t].share[k * kChunk + j] * vector[t][v];
        }
        for (int i = 0; i < 4; ++i) {
          A* p = at[i][j] + c;
          prefetch<C>(next_at[i][j] + c);
          for (int v = 0; v < K; ++v)
            store<W>(p + v * W, V(load<W>(p + v * W) + chunk.bilinear[i][j] * row[v]));
        }
      }
    }
  });
}

// The bilinear sample <value(x, y), vector> and its derivatives by x and y in pixels.
template <typename A>
struct Slopes {
  A value[kChunk], by_x[kChunk], by_y[kChunk];
};

template <typename A>
inline void slopes(const Chunk<A>& chunk, const std::array<A, 4 * kChunk>& dots, Slopes<A>& out) {
  for (int j = 0; j < kChunk; ++j) {
    const A d0 = dots[j], d1 = dots[kChunk + j], d2 = dots[2 * kChunk + j],
            d3 = dots[3 * kChunk + j];
    const A dx = chunk.dx[j], dy = chunk.dy[j];
    const A top = d0 + dx * (d1 - d0), bottom = d2 + dx * (d3 - d2);
    out.value[j] = top + dy * (bottom - top);
    out.by_x[j] = (1 - dy) * (d1 - d0) + dy * (d3 - d2);
    out.by_y[j] = bottom - top;
  }
}

}  // namespace sparse_detr
