// The order in which queries are visited.

#include <algorithm>

#include "problem.h"

namespace sparse_detr {

// A counting sort by the cell of the query's place on a 12 x 12 grid: the windows that the queries
// of a cell sample fit a level-2 cache together. Rows of level 0, one after the other, do not.
template <typename A>
std::vector<int64_t> visiting_order(int64_t B, int64_t Q, const A* place, int64_t stride) {
  constexpr int kSide = 12;
  const auto cell = [&](const A* p) {
    const auto step = [=](A x) {
      return x > 0 ? int(std::min(x, A(0.999)) * kSide) : 0;
    };  // NaN: 0
    return step(p[1]) * kSide + step(p[0]);
  };
  std::vector<int64_t> order(B * Q);
  for (int64_t b = 0; b < B; ++b) {
    int64_t next[kSide * kSide + 1] = {};
    for (int64_t row = b * Q; row < (b + 1) * Q; ++row) ++next[cell(place + row * stride) + 1];
    for (int i = 0; i < kSide * kSide; ++i) next[i + 1] += next[i];
    for (int64_t row = b * Q; row < (b + 1) * Q; ++row)
      order[b * Q + next[cell(place + row * stride)]++] = row;
  }
  return order;
}

template std::vector<int64_t> visiting_order(int64_t, int64_t, const double*, int64_t);
template std::vector<int64_t> visiting_order(int64_t, int64_t, const float*, int64_t);

}  // namespace sparse_detr
