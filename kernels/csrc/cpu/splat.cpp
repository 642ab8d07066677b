// attention_map_splat: attention weights spread over the tokens around their sampling locations, in
// 64-bit fixed point, so that the map does not depend on the order of the samples.

#include "../splat_units.h"
#include "samples.h"

namespace sparse_detr {

void splat(const Sizes& s, Side locations, Side weights, int64_t b, int l, int64_t* map) {
  const int64_t W = s.levels[l].width, H = s.levels[l].height;
  int64_t* level = map + s.levels[l].start;
  std::vector<double> xy_buffer(2 * s.P), share_buffer(s.P);
  for (int64_t i = b * s.Q * s.M; i < (b + 1) * s.Q * s.M; ++i) {
    const int64_t first = (i * s.L + l) * s.P;
    const double* xy = load_row(locations, 2 * first, 2 * s.P, xy_buffer.data());
    const double* share = load_row(weights, first, s.P, share_buffer.data());
    for (int p = 0; p < s.P; ++p) {
      const double x = xy[2 * p] * W, y = xy[2 * p + 1] * H;  // paper: no half-pixel shift here
      if (!(x >= -1 && x < W && y >= -1 && y < H)) continue;  // NaN: outside
      const double left = std::floor(x), top = std::floor(y), dx = x - left, dy = y - top;
      const int64_t column = int64_t(left), row = int64_t(top);
      const auto add = [&](int64_t r, int64_t c, double part) {
        if (r < 0 || r >= H || c < 0 || c >= W) return;
        level[r * W + c] += std::llrint(part * share[p] * kSplatUnitsPerOne);
      };
      add(row, column, (1 - dx) * (1 - dy));
      add(row, column + 1, dx * (1 - dy));
      add(row + 1, column, (1 - dx) * dy);
      add(row + 1, column + 1, dx * dy);
    }
  }
}

}  // namespace sparse_detr
