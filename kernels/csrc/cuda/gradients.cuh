// Gradients of the sources of samples, shared by the two ways to compute the backward.
#pragma once

#include "sampling.cuh"

namespace sparse_detr::cuda {

// In all of them gx, gy are with respect to pixel coordinates.

template <typename A>
struct GivenGradient {
  A* locations;
  A* weights;

  explicit GivenGradient(const SampleGradients& x)
      : locations(static_cast<A*>(x.locations)), weights(static_cast<A*>(x.weights)) {}

  static constexpr bool kSoftmax = false;
  DEVICE bool wanted() const { return locations || weights; }

  DEVICE void select_image(const Problem& problem, int64_t image) {
    if (locations) locations += 2 * image * problem.samples();
    if (weights) weights += image * problem.samples();
  }

  DEVICE void store(const Problem& problem, const Given<A>&, Row row, int s, const Level& level,
                    int, A weight, A gx, A gy) const {
    const int64_t i = row.head * (problem.levels * problem.points) + s;
    if (weights) weights[i] = weight;
    if (locations) {
      locations[2 * i] = gx * level.width;
      locations[2 * i + 1] = gy * level.height;
    }
  }
};

template <typename A, typename S>
struct FusedGradient {
  S* offsets;
  S* logits;
  A* pixels;

  explicit FusedGradient(const SampleGradients& x)
      : offsets(static_cast<S*>(x.offsets)),
        logits(static_cast<S*>(x.logits)),
        pixels(static_cast<A*>(x.pixels)) {}

  static constexpr bool kSoftmax = true;
  DEVICE bool wanted() const { return offsets || logits || pixels; }

  DEVICE void select_image(const Problem& problem, int64_t image) {
    const int64_t first = image * problem.samples();
    if (offsets) offsets += 2 * first;
    if (logits) logits += first;
    if (pixels) pixels += 2 * first;
  }

  // The weight's gradient waits for store_logits().
  DEVICE void store(const Problem& problem, const Fused<A, S>& source, Row row, int s,
                    const Level& level, int l, A, A gx, A gy) const {
    const int64_t i = row.head * (problem.levels * problem.points) + s;
    if (pixels) {
      pixels[2 * i] = gx;
      pixels[2 * i + 1] = gy;
    }
    if (offsets) {
      if (source.boxes) {
        const A* box = source.reference + int64_t(row.query * problem.levels + l) * 4;
        const auto size = load_pair(box + 2);
        gx *= source.step * size.x * level.width;
        gy *= source.step * size.y * level.height;
      }
      narrow(gx, offsets[2 * i]);
      narrow(gy, offsets[2 * i + 1]);
    }
  }

  // Softmax: d / d logit_j = w_j (g_j - sum_k w_k g_k), where g is the gradient of the weights.
  template <int G>
  DEVICE void store_logits(const Problem& problem, const Fused<A, S>& source, Row row, int lane,
                           const A* gradient, bool valid) const {
    const int count = problem.levels * problem.points, first = row.head * count;
    A mean = 0;
#pragma unroll 1
    for (int s = lane; s < count; s += G) mean += source.weight(first + s) * gradient[s];
    mean = group_sum<G>(mean);
    if (!valid || !logits) return;
#pragma unroll 1
    for (int s = lane; s < count; s += G) {
      narrow(source.weight(first + s) * (gradient[s] - mean), logits[int64_t(first) + s]);
    }
  }
};

template <typename A>
GivenGradient<A> gradient_of(const Given<A>&, const SampleGradients& x) {
  return GivenGradient<A>(x);
}
template <typename A, typename S>
FusedGradient<A, S> gradient_of(const Fused<A, S>&, const SampleGradients& x) {
  return FusedGradient<A, S>(x);
}

// What shared memory holds of a sample in the backward.
template <typename A>
struct Record {
  union {
    Corners corners;
    alignas(16) A along[4];  // replaces the corners: their values along grad_output
  };
  Cell<A> cell;
};

}  // namespace sparse_detr::cuda
