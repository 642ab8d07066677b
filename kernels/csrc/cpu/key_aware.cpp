// key_aware_deform_attn: scores from the sampled keys, softmax, weighted sum of the sampled values.
// Keys and values are gathered corner by corner in both passes; no sampled row is ever stored.

#include "samples.h"

namespace sparse_detr {

namespace {

template <typename T, typename A>
void widen(const T* from, int D, A* to) {
  for (int c = 0; c < D; ++c) to[c] = load_one(from + c);
}

template <typename T, typename A>
void locate(const KeyAware<T>& in, int64_t row, int m, Samples<A>& samples) {
  samples.locate({in.locations, std::is_same_v<A, double> ? Scalar::kDouble : Scalar::kFloat},
                 2 * (row * in.sizes.M + m) * samples.count);
}

}  // namespace

template <typename T>
void key_aware_forward(const KeyAware<T>& in, T* output, Accumulator<T>* lse, int64_t first,
                       int64_t last) {
  using A = Accumulator<T>;
  const Sizes& s = in.sizes;
  const bool shared = in.key == in.value;
  // Two sets, in turn: while one head is worked on, the cache lines of the next one are on their
  // way.
  Samples<A> samples_of[2] = {{s, 0, s.samples()}, {s, 0, s.samples()}};
  const int chunks = int(samples_of[0].chunks.size());
  Corners<const T> keys_of[2] = {{s, chunks}, {s, chunks}},
                   values_of[2] = {{s, chunks}, {s, chunks}};
  const auto prepare = [&](int64_t i) {
    const int64_t row = in.order[i / s.M], m = i % s.M;
    const int64_t base = row / s.Q * s.image_stride() + m * s.D;
    locate(in, row, int(m), samples_of[i & 1]);
    keys_of[i & 1].point_to(in.key + base, samples_of[i & 1]);
    if (shared) return;
    values_of[i & 1].point_to(in.value + base, samples_of[i & 1]);
  };
  Dots<A> dots(chunks);
  std::vector<A> query(s.D), scores(chunks * kChunk);
  const A scale = 1 / std::sqrt(A(s.D));
  prepare(first * s.M);
  for (int64_t i = first * s.M; i < last * s.M; ++i) {
    if (i + 1 < last * s.M) prepare(i + 1);
    const int64_t head = in.order[i / s.M] * s.M + i % s.M;
    Samples<A>& samples = samples_of[i & 1];
    const Corners<const T>& keys = keys_of[i & 1];
    widen(in.query + head * s.D, s.D, query.data());
    corner_dots(keys, s.D, query.data(), dots, keys_of[~i & 1]);
    for (int c = 0; c < chunks; ++c) {
      Slopes<A> slope;
      slopes(samples.chunks[c], dots[c], slope);
      for (int j = 0; j < kChunk; ++j) scores[c * kChunk + j] = scale * slope.value[j];
    }
    lse[head] = softmax(samples.count, scores);
    samples.set_shares(scores.data());
    samples.weigh();
    weighted_sum((shared ? keys_of : values_of)[i & 1], samples, s.D, output + head * s.D,
                 (shared ? keys_of : values_of)[~i & 1]);
  }
}

template <typename T>
void key_aware_backward(const KeyAware<T>& in, const KeyAwareGradients<T>& grad, int64_t b,
                        int head, int head_end) {
  using A = Accumulator<T>;
  const Sizes& s = in.sizes;
  const bool shared = in.key == in.value;  // keys are the values: one gradient for both
  // Two sets, in turn, as in the forward pass.
  Samples<A> samples_of[2] = {{s, 0, s.samples()}, {s, 0, s.samples()}};
  const int n = samples_of[0].count, chunks = int(samples_of[0].chunks.size()),
            padded = chunks * kChunk;
  Corners<const T> keys_of[2] = {{s, chunks}, {s, chunks}},
                   values_of[2] = {{s, chunks}, {s, chunks}};
  Corners<A> grad_keys_of[2] = {{s, chunks}, {s, chunks}},
             grad_values_of[2] = {{s, chunks}, {s, chunks}};
  const int heads = head_end - head;
  const auto row_of = [&](int64_t i) { return in.order[b * s.Q + i / heads]; };
  const auto prepare = [&](int64_t i) {
    const int m = head + int(i % heads);
    const int64_t offset = b * s.image_stride() + m * s.D;
    Samples<A>& samples = samples_of[i & 1];
    locate(in, row_of(i), m, samples);
    keys_of[i & 1].point_to(in.key + offset, samples);
    if (!shared) values_of[i & 1].point_to(in.value + offset, samples);
    if (grad.value) grad_values_of[i & 1].point_to(grad.value + offset, samples);
    if (!shared && grad.key) grad_keys_of[i & 1].point_to(grad.key + offset, samples);
  };
  Dots<A> key_dots(chunks), value_dots(chunks);
  std::vector<Slopes<A>> by_key(chunks), by_value(chunks);
  std::vector<A> query(s.D), grad_output(s.D), weight(padded), grad_score(padded),
      grad_xy(2 * padded);
  const A scale = 1 / std::sqrt(A(s.D));
  if (s.Q > 0) prepare(0);
  for (int64_t i = 0; i < s.Q * heads; ++i) {
    if (i + 1 < s.Q * heads) prepare(i + 1);
    const int now = i & 1, next = ~i & 1;
    const int64_t row_head = row_of(i) * s.M + head + i % heads;
    Samples<A>& samples = samples_of[now];
    const Corners<const T>* value_corners = shared ? keys_of : values_of;
    widen(in.query + row_head * s.D, s.D, query.data());
    widen(grad.grad_output + row_head * s.D, s.D, grad_output.data());
    corner_dots(keys_of[now], s.D, query.data(), key_dots, keys_of[next]);
    corner_dots(value_corners[now], s.D, grad_output.data(), value_dots, value_corners[next]);

    const A lse = grad.lse[row_head];
    A mean = 0;
    for (int c = 0; c < chunks; ++c) {
      slopes(samples.chunks[c], key_dots[c], by_key[c]);
      slopes(samples.chunks[c], value_dots[c], by_value[c]);
      for (int j = 0; j < kChunk; ++j)
        weight[c * kChunk + j] = exp_nonpositive(scale * by_key[c].value[j] - lse);
      for (int j = 0; j < samples.chunks[c].count; ++j)
        mean += weight[c * kChunk + j] * by_value[c].value[j];
    }
    for (int c = 0; c < chunks; ++c) {
      const Chunk<A>& chunk = samples.chunks[c];
      for (int j = 0; j < kChunk; ++j) {
        const int k = c * kChunk + j;
        const A w = weight[k], g = scale * w * (by_value[c].value[j] - mean);
        grad_score[k] = g;
        grad_xy[2 * k] = (w * by_value[c].by_x[j] + g * by_key[c].by_x[j]) * chunk.width[j];
        grad_xy[2 * k + 1] = (w * by_value[c].by_y[j] + g * by_key[c].by_y[j]) * chunk.height[j];
      }
    }
    if (grad.locations) std::copy_n(grad_xy.data(), 2 * n, grad.locations + 2 * row_head * n);

    if (grad.query) {
      samples.set_shares(grad_score.data());
      samples.weigh();
      weighted_sum(keys_of[now], samples, s.D, grad.query + row_head * s.D, keys_of[now]);
    }
    const Term<A> by_values = {weight.data(), grad_output.data()};
    const Term<A> by_scores = {grad_score.data(), query.data()};
    if (shared) {
      if (grad.value)
        scatter(grad_values_of[now], samples, s.D, {by_values, by_scores}, grad_values_of[next]);
    } else {
      if (grad.value) scatter(grad_values_of[now], samples, s.D, {by_values}, grad_values_of[next]);
      if (grad.key) scatter(grad_keys_of[now], samples, s.D, {by_scores}, grad_keys_of[next]);
    }
  }
}

#define INSTANTIATE(T)                                                                           \
  template void key_aware_forward<T>(const KeyAware<T>&, T*, Accumulator<T>*, int64_t, int64_t); \
  template void key_aware_backward<T>(const KeyAware<T>&, const KeyAwareGradients<T>&, int64_t,  \
                                      int, int);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)

}  // namespace sparse_detr
