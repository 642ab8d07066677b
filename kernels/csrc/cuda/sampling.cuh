// One sample: where it falls in its level's map, which four tokens it reads and how they weigh.
//
// Pixel coordinates: 0 is the centre of the first pixel; a normalised location l is l * size - 0.5.
// Bilinear, zero outside the map (grid_sample with zero padding and align_corners = False); a NaN
// coordinate is outside. Tokens outside are never read, so what memory holds there is irrelevant.
#pragma once

#include "device.cuh"

namespace sparse_detr::cuda {

template <typename A>
struct Sample {
  A x, y;  // pixel coordinates in the level
  A weight;
};

// The corners of the cell around a sample, in the order (y, x) = 00, 01, 10, 11.
struct alignas(16) Corners {
  int at[4];  // token times locate()'s stride; or -1, outside the map
};

template <typename A>
struct alignas(16) Cell {
  A dx, dy;  // position in the cell, [0, 1)
  A weight;
  A spare;
};

template <typename A>
struct alignas(16) CornerWeights {
  A w[4];
};

template <typename A>
DEVICE CornerWeights<A> bilinear(A dx, A dy) {
  return {{(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx}};
}

// A sample of a map whose corners have the values c.
template <typename A>
DEVICE A interpolate(const A (&c)[4], A dx, A dy) {
  return (1 - dy) * ((1 - dx) * c[0] + dx * c[1]) + dy * ((1 - dx) * c[2] + dx * c[3]);
}

// d(value) / dx and d(value) / dy of a sample whose corners have the values c.
template <typename A>
DEVICE A slope_x(const A (&c)[4], A dy) {
  return (1 - dy) * (c[1] - c[0]) + dy * (c[3] - c[2]);
}
template <typename A>
DEVICE A slope_y(const A (&c)[4], A dx) {
  return (1 - dx) * (c[2] - c[0]) + dx * (c[3] - c[1]);
}

// Corners, the position in the cell, and the cell's row and column. `stride` is that of tokens, in
// the units in which corners are wanted. The comparisons are false for NaN and bound x and y before
// they become integers.
template <typename A>
DEVICE Corners locate(A x, A y, const Level& level, int stride, A& dx, A& dy, int& row,
                      int& column) {
  Corners corners{{-1, -1, -1, -1}};
  dx = dy = 0;
  row = column = 0;
  if (x >= -1 && y >= -1 && x < level.width && y < level.height) {
    const A left = floor(x), top = floor(y);
    dx = x - left;
    dy = y - top;
    column = static_cast<int>(left), row = static_cast<int>(top);
    const bool west = column >= 0, east = column + 1 < level.width;
    const bool north = row >= 0, south = row + 1 < level.height;
    const int at = (level.start + row * level.width + column) * stride;
    const int below = south ? at + level.width * stride : 0;
    if (north && west) corners.at[0] = at;
    if (north && east) corners.at[1] = at + stride;
    if (south && west) corners.at[2] = below;
    if (south && east) corners.at[3] = below + stride;
  }
  return corners;
}
template <typename A>
DEVICE Corners locate(A x, A y, const Level& level, int stride, A& dx, A& dy) {
  int row, column;
  return locate(x, y, level, stride, dx, dy, row, column);
}

// ---- sources of samples ------------------------------------------------------------------------

// A query and head of the block's image: rows of tensors (Q, ...) and (Q, M, ...).
struct Row {
  int query, head;
};

DEVICE float2 load_pair(const float* p) { return __ldg(reinterpret_cast<const float2*>(p)); }
DEVICE double2 load_pair(const double* p) { return __ldg(reinterpret_cast<const double2*>(p)); }
template <typename S>
DEVICE float2 load_pair(const S* p) {
  float x[2];
  load<S, 2>(p, x);
  return make_float2(x[0], x[1]);
}

// Locations and weights that were computed outside. Key-aware attention has no weights: null.
template <typename A>
struct Given {
  const A* locations;
  const A* weights;

  Given(const Samples& x, int)
      : locations(static_cast<const A*>(x.locations)), weights(static_cast<const A*>(x.weights)) {}

  DEVICE void select_image(const Problem& problem, int64_t image) {
    const int64_t first = image * problem.samples();
    locations += 2 * first;
    if (weights) weights += first;
  }

  template <int G>
  DEVICE void start(const Problem&, Row, int) {}

  // s = l * P + p
  DEVICE Sample<A> sample(const Problem& problem, Row row, int s, const Level& level, int) const {
    const int i = row.head * (problem.levels * problem.points) + s;
    const auto xy = load_pair(locations + 2 * int64_t(i));
    return {xy.x * level.width - A(0.5), xy.y * level.height - A(0.5),
            weights ? __ldg(weights + i) : A(1)};
  }
};

// Locations from reference points or boxes plus offsets, weights by softmax over the L * P logits.
// S is the dtype of offsets and logits.
template <typename A, typename S>
struct Fused {
  using Scalar = S;
  const A* reference;
  const S* offsets;
  const S* logits;
  bool boxes;
  A step;         // of an offset, in box sizes: 0.5 / P
  A peak, scale;  // softmax = exp(logit - peak) * scale

  Fused(const Samples& x, int points)
      : reference(static_cast<const A*>(x.reference)),
        offsets(static_cast<const S*>(x.offsets)),
        logits(static_cast<const S*>(x.logits)),
        boxes(x.boxes),
        step(A(0.5) / points) {}

  DEVICE void select_image(const Problem& problem, int64_t image) {
    const int64_t first = image * problem.samples();
    offsets += 2 * first;
    logits += first;
    reference += image * problem.queries * problem.levels * (boxes ? 4 : 2);
  }

  // Called by all lanes of the group, before sample() and weight().
  template <int G>
  DEVICE void start(const Problem& problem, Row row, int lane) {
    const int count = problem.levels * problem.points;
    const S* p = logits + int64_t(row.head) * count;
    peak = -INFINITY;
#pragma unroll 1
    for (int s = lane; s < count; s += G) peak = max(peak, widen(__ldg(p + s)));
    peak = group_max<G>(peak);
    A sum = 0;
#pragma unroll 1
    for (int s = lane; s < count; s += G) sum += exp(widen(__ldg(p + s)) - peak);
    scale = 1 / group_sum<G>(sum);
  }

  DEVICE A weight(int i) const { return exp(widen(__ldg(logits + i)) - peak) * scale; }

  DEVICE Sample<A> sample(const Problem& problem, Row row, int s, const Level& level, int l) const {
    const int i = row.head * (problem.levels * problem.points) + s;
    const auto offset = load_pair(offsets + 2 * int64_t(i));
    const A* r = reference + int64_t(row.query * problem.levels + l) * (boxes ? 4 : 2);
    const auto centre = load_pair(r);
    A x, y;
    if (boxes) {  // offsets in units of half the box size over P
      const auto size = load_pair(r + 2);
      x = (centre.x + offset.x * step * size.x) * level.width;
      y = (centre.y + offset.y * step * size.y) * level.height;
    } else {  // offsets in pixels
      x = centre.x * level.width + offset.x;
      y = centre.y * level.height + offset.y;
    }
    return {x - A(0.5), y - A(0.5), weight(i)};
  }
};

// ---- which queries a block works on -------------------------------------------------------------

// The queries of this block: slots 0 .. count-1, a group per slot. Blocks are numbered (image,
// tile, head), heads fastest, so that blocks of one time read neighbouring locations.
struct Tile {
  static constexpr int kSide = Problem::kTileSide;

  int64_t image;
  int head, count;
  int start;                // list: query of slot 0; tiled: query of the level's first token
  int x, y, width, height;  // tiled: pixel of slot 0 and size of the level

  // Number of tiles of an image, where a block has `groups` groups.
  static int number(const Problem& problem, int groups) {
    if (problem.tiled_from < 0) return (problem.queries + groups - 1) / groups;
    return problem.tiles - problem.level[problem.tiled_from].tile;
  }

  DEVICE Tile(const Problem& problem, int tiles, int groups) {
    const unsigned block = blockIdx.x / problem.heads;
    head = blockIdx.x % problem.heads;
    image = block / tiles;
    int tile = block % tiles;
    if (problem.tiled_from < 0) {
      count = groups;
      start = tile * groups;
      x = y = width = height = 0;
      return;
    }
    count = kSide * kSide;
    tile += problem.level[problem.tiled_from].tile;
    int l = problem.levels - 1;
    while (problem.level[l].tile > tile) --l;
    tile -= problem.level[l].tile;
    start = problem.level[l].start - problem.level[problem.tiled_from].start;
    width = problem.level[l].width;
    height = problem.level[l].height;
    y = tile / problem.tiles_across(l) * kSide;
    x = tile % problem.tiles_across(l) * kSide;
  }

  // The query in a slot, or -1 where the tile reaches over the edge of the map or the list.
  DEVICE int query(const Problem& problem, int slot) const {
    if (problem.tiled_from < 0) return start + slot < problem.queries ? start + slot : -1;
    const int column = x + slot % kSide, row = y + slot / kSide;
    return column < width && row < height ? start + row * width + column : -1;
  }
};

}  // namespace sparse_detr::cuda
