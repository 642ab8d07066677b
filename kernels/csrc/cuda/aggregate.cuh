// Sums a block's contributions to a gradient map before they leave the multiprocessor.
//
// Neighbouring queries sample the same tokens: the 64 queries of a tile make 1 024 contributions
// to a level, four per sample, and these fall on some dozens to hundreds of tokens. In memory each
// addition costs a trip to L2. So the block sorts its contributions by token, in shared memory (a
// counting sort), every group of lanes adds up an equal share of the sorted list, and only where
// the token changes it adds to memory: once per token and group instead of once per contribution.
//
// The sort has 2 048 counters. A level with fewer tokens is covered as a whole. Of a larger one it
// covers the window around the block's own tile, where queries come in tiles and the level is at
// most twice as fine as theirs; contributions outside the window follow unsorted. Other levels see
// hardly any token twice: their contributions stay in the order in which they come.
#pragma once

#include <type_traits>

#include "sampling.cuh"

namespace sparse_detr::cuda {

constexpr int kTileQueries = Problem::kTileSide * Problem::kTileSide;
constexpr int kPassPoints = 4;  // samples per query that are summed together
static_assert(kTileQueries * kPassPoints == kThreads, "a thread per sample");

constexpr int kBins = 2048;
constexpr int kWindowSide = 45;  // pixels, where the level is large: 45 x 45 < kBins
constexpr int kSlotBits = 6;     // of a query in its tile
static_assert(1 << kSlotBits == kTileQueries && kWindowSide * kWindowSide < kBins);

// Pixels of a level; width 0: none.
struct Window {
  int top, left, height, width;

  DEVICE Window(const Tile& tile, const Level& level) : top(0), left(0), height(0), width(0) {
    if (level.height * level.width < kBins) {
      height = level.height;
      width = level.width;
    } else if (tile.width > 0) {
      const float across = float(level.width) / tile.width;
      const float down = float(level.height) / tile.height;
      if (across * down > 4) return;
      width = min(level.width, kWindowSide);
      height = min(level.height, (kBins - 1) / width);
      left = static_cast<int>((tile.x + Tile::kSide / 2) * across) - width / 2;
      top = static_cast<int>((tile.y + Tile::kSide / 2) * down) - height / 2;
      left = max(0, min(left, level.width - width));
      top = max(0, min(top, level.height - height));
    }
  }
  DEVICE int pixels() const { return height * width; }
};

// Rows of a map (N, M, D), from this lane's channels of token 0.
template <typename T>
struct Rows {
  T* first;
  int bytes;  // from one token to the next

  DEVICE Rows(T* first, int stride)
      : first(opaque(first)), bytes(opaque(stride * static_cast<int>(sizeof(T)))) {}
  DEVICE T* operator[](int token) const {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(first) + int64_t(token) * bytes);
  }
};

// Contributes weight[i] times the i-th channel vector of the query in `slot` to a token.
template <int kWeights>
struct alignas(kWeights == 1 ? 8 : 4) Term {
  unsigned key;  // token << kSlotBits | slot
  float weight[kWeights];
};

// Lives in shared memory. A pass: count, __syncthreads, sort, __syncthreads, put, __syncthreads,
// walk and clear, __syncthreads, restart. sort() and its barrier are not needed without a window.
template <int kWeights>
struct Aggregation {
  static constexpr int kTerms = 4 * kThreads;
  static constexpr unsigned kNowhere = ~0u >> kSlotBits;  // token of a contribution to nothing

  // Two 16-bit counters per word: a pixel's contributions, then the place of its first one. The
  // counter behind the window's last pixel is that of contributions elsewhere.
  unsigned bins[kBins / 2];
  int total;
  Term<kWeights> terms[kTerms];

  DEVICE static int words(const Window& window) { return window.pixels() / 2 + 1; }

  DEVICE void clear(const Window& window) {
#pragma unroll 1
    for (int i = threadIdx.x; i < words(window); i += kThreads) bins[i] = 0;
  }

  DEVICE void restart() {
    if (threadIdx.x == 0) total = 0;
  }

  // Counts the corners of this thread's sample, the first of which is in (row, column). Returns
  // in place[] the counter and how many came before; -1 for corners outside the map.
  DEVICE void count(const Window& window, const Corners& corners, int row, int column,
                    int (&place)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      place[k] = -1;
      if (corners.at[k] < 0 || window.width == 0) continue;
      const int x = column + k % 2 - window.left, y = row + k / 2 - window.top;
      const bool within = x >= 0 && y >= 0 && x < window.width && y < window.height;
      const int bin = within ? y * window.width + x : window.pixels();
      const int shift = bin % 2 * 16;
      place[k] = bin << 16 | (atomicAdd(&bins[bin / 2], 1u << shift) >> shift & 0xffff);
    }
  }

  // From counts to places. Which pixel comes first does not matter: a warp takes the next free
  // place for all its pixels together.
  DEVICE void sort(const Window& window) {
    const int lane = threadIdx.x % 32, end = words(window);
    unsigned mine = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < end; i += kThreads) mine += (bins[i] & 0xffff) + (bins[i] >> 16);
    unsigned next = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const unsigned before = __shfl_up_sync(kAllLanes, next, step);
      if (lane >= step) next += before;
    }
    const unsigned all = __shfl_sync(kAllLanes, next, 31);
    int start = 0;
    if (lane == 0) start = atomicAdd(&total, static_cast<int>(all));
    next += __shfl_sync(kAllLanes, start, 0) - mine;
#pragma unroll 1
    for (int i = threadIdx.x; i < end; i += kThreads) {
      const unsigned counts = bins[i];
      bins[i] = next | (next + (counts & 0xffff)) << 16;
      next += (counts & 0xffff) + (counts >> 16);
    }
  }

  // Where corner k of this thread's sample goes. Call it for all corners.
  DEVICE Term<kWeights>* put(const Window& window, const int (&place)[4], int k) {
    if (window.width == 0) return &terms[k * kThreads + threadIdx.x];
    if (place[k] < 0) return nullptr;
    const int bin = place[k] >> 16;
    return &terms[(bins[bin / 2] >> bin % 2 * 16 & 0xffff) + (place[k] & 0xffff)];
  }

  // This group's share of the list: add(slot, weights) for each term, flush(token) after the terms
  // of a token. `add` adds to sums that `flush` sets to zero; kNowhere's are dropped by it.
  template <typename Add, typename Flush>
  DEVICE void walk(const Window& window, int group, int groups, Add add, Flush flush) const {
    const int count = window.width == 0 ? kTerms : total;
    const int share = (count + groups - 1) / groups | 1;  // odd: groups begin in different banks
    const int end = min((group + 1) * share, count);
    unsigned token = kNowhere;
#pragma unroll 1
    for (int i = group * share; i < end; ++i) {
      const Term<kWeights> term = terms[i];
      if (term.key >> kSlotBits != token) {
        flush(token);
        token = term.key >> kSlotBits;
      }
      add(static_cast<int>(term.key % kTileQueries), term.weight);
    }
    flush(token);
  }
};

}  // namespace sparse_detr::cuda
