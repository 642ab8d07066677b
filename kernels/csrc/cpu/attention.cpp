// ms_deform_attn and ms_deform_attn_fused: forward by query (all heads of a query share its cache
// lines), backward by head and level, where the gradients of the value never overlap: no atomics,
// and the same sum for any number of threads.

#include "samples.h"

namespace sparse_detr {

namespace {

// Places and attention weights of the samples of (row, head).
template <typename T, typename A>
class Reader {
 public:
  Reader(const Attention<T>& in, int first, int count)
      : samples(in.sizes, first, count), in_(in), weights_(whole_chunks(in.sizes.samples())) {}

  void read(int64_t row, int m) {
    const Sizes& s = in_.sizes;
    const int dim = in_.reference_dim;
    if (dim > 0 && row != row_) samples.set_reference(in_.reference + row * s.L * dim, dim, s.P);
    row_ = row;
    const int64_t head = (row * s.M + m) * s.samples();
    samples.locate(in_.coordinates, 2 * (head + samples.first));
    shares_ = load_row(in_.shares, head, s.samples(), weights_.data());
    if (dim > 0) {
      if (shares_ != weights_.data()) std::copy_n(shares_, s.samples(), weights_.data());
      softmax(s.samples(), weights_);
      shares_ = weights_.data();
    }
    samples.set_shares(shares_ + samples.first);
  }

  // Attention weights of all L * P samples of the last head that was read.
  const A* shares() const { return shares_; }

  Samples<A> samples;

 private:
  const Attention<T>& in_;
  std::vector<A> weights_;
  const A* shares_ = nullptr;
  int64_t row_ = -1;
};

// Gradient (L, 2 or 4) of the references of one query from one head, levels [level, level_end),
// given the gradients by pixel coordinates.
template <typename A>
void reference_gradient(const Samples<A>& samples, const Sizes& s, int dim, int level,
                        int level_end, const A* grad_x, const A* grad_y, A* out) {
  const A* offset = samples.coordinates();
  for (int l = level; l < level_end; ++l) {
    A x = 0, y = 0, w = 0, h = 0;
    for (int j = (l - level) * s.P; j < (l - level + 1) * s.P; ++j) {
      x += grad_x[j];
      y += grad_y[j];
      w += grad_x[j] * offset[2 * j];
      h += grad_y[j] * offset[2 * j + 1];
    }
    const A width = s.levels[l].width, height = s.levels[l].height;
    out[l * dim] = x * width;
    out[l * dim + 1] = y * height;
    if (dim == 4) {
      out[l * dim + 2] = w * width * A(0.5) / s.P;
      out[l * dim + 3] = h * height * A(0.5) / s.P;
    }
  }
}

// (gradient of the weights) -> (gradient of the logits), with the softmax weights.
template <typename A>
void softmax_gradient(int count, const A* weights, A* grad) {
  A mean = 0;
  for (int j = 0; j < count; ++j) mean += weights[j] * grad[j];
  for (int j = 0; j < count; ++j) grad[j] = weights[j] * (grad[j] - mean);
}

}  // namespace

template <typename T>
void attention_forward(const Attention<T>& in, T* output, int64_t first, int64_t last) {
  using A = Accumulator<T>;
  const Sizes& s = in.sizes;
  // Two sets, in turn: while one head is summed, the cache lines of the next one are on their way.
  Reader<T, A> readers[2] = {{in, 0, s.samples()}, {in, 0, s.samples()}};
  const int chunks = int(readers[0].samples.chunks.size());
  Corners<const T> corners[2] = {{s, chunks}, {s, chunks}};
  const auto prepare = [&](int64_t i) {
    const int64_t row = in.order[i / s.M], m = i % s.M;
    readers[i & 1].read(row, int(m));
    readers[i & 1].samples.weigh();
    corners[i & 1].point_to(in.value + row / s.Q * s.image_stride() + m * s.D,
                            readers[i & 1].samples);
  };
  prepare(first * s.M);
  for (int64_t i = first * s.M; i < last * s.M; ++i) {
    if (i + 1 < last * s.M) prepare(i + 1);
    T* const to = output + in.order[i / s.M] * s.token_stride() + i % s.M * s.D;
    weighted_sum(corners[i & 1], readers[i & 1].samples, s.D, to, corners[~i & 1]);
  }
}

template <typename T>
void attention_backward(const Attention<T>& in, const AttentionGradients<T>& grad, int64_t b,
                        int head, int head_end, int level, int level_end) {
  using A = Accumulator<T>;
  const Sizes& s = in.sizes;
  const int dim = in.reference_dim, P = s.P;
  const bool slopes_wanted = grad.coordinates.data || grad.shares.data || grad.reference_of_heads;
  const int first_sample = level * P, count = (level_end - level) * P;
  // Two sets, in turn, as in the forward pass.
  Reader<T, A> readers[2] = {{in, first_sample, count}, {in, first_sample, count}};
  const int chunks = int(readers[0].samples.chunks.size()), padded = chunks * kChunk;
  Corners<const T> corners[2] = {{s, chunks}, {s, chunks}};
  Corners<A> grad_corners[2] = {{s, chunks}, {s, chunks}};
  Dots<A> dots(chunks);
  std::vector<A> grad_output(s.D), grad_x(padded), grad_y(padded), grad_xy(2 * padded),
      grad_share(padded);
  const int heads = head_end - head;
  const auto row_of = [&](int64_t i) { return in.order[b * s.Q + i / heads]; };
  const auto prepare = [&](int64_t i) {
    const int m = head + int(i % heads);
    const int64_t offset = b * s.image_stride() + m * s.D;
    Reader<T, A>& reader = readers[i & 1];
    reader.read(row_of(i), m);
    if (slopes_wanted) corners[i & 1].point_to(in.value + offset, reader.samples);
    if (grad.value) grad_corners[i & 1].point_to(grad.value + offset, reader.samples);
  };
  if (s.Q > 0) prepare(0);
  for (int64_t i = 0; i < s.Q * heads; ++i) {
    if (i + 1 < s.Q * heads) prepare(i + 1);
    const int64_t row_head = row_of(i) * s.M + head + i % heads;
    const Reader<T, A>& reader = readers[i & 1];
    const Samples<A>& samples = reader.samples;
    const T* from = grad.grad_output + row_head * s.D;
    for (int c = 0; c < s.D; ++c) grad_output[c] = load_one(from + c);
    if (slopes_wanted) {
      corner_dots(corners[i & 1], s.D, grad_output.data(), dots, corners[~i & 1]);
      for (int c = 0; c < chunks; ++c) {
        const Chunk<A>& chunk = samples.chunks[c];
        Slopes<A> slope;
        slopes(chunk, dots[c], slope);
        for (int j = 0; j < kChunk; ++j) {
          const int k = c * kChunk + j;
          grad_share[k] = slope.value[j];
          grad_x[k] = slope.by_x[j] * chunk.share[j];  // per pixel
          grad_y[k] = slope.by_y[j] * chunk.share[j];
        }
      }
      if (grad.reference_of_heads)
        reference_gradient(samples, s, dim, level, level_end, grad_x.data(), grad_y.data(),
                           grad.reference_of_heads + row_head * s.L * dim);
      for (int c = 0; c < chunks; ++c) {
        const Chunk<A>& chunk = samples.chunks[c];
        for (int j = 0; j < kChunk; ++j) {
          const int k = c * kChunk + j;
          grad_xy[2 * k] = grad_x[k] * chunk.scale_x[j];
          grad_xy[2 * k + 1] = grad_y[k] * chunk.scale_y[j];
        }
      }
      if (dim > 0 && samples.count == s.samples())
        softmax_gradient(samples.count, reader.shares(), grad_share.data());
      const int64_t first = row_head * s.samples() + samples.first;
      if (grad.coordinates.data)
        store_row(grad.coordinates, 2 * first, 2 * samples.count, grad_xy.data());
      if (grad.shares.data) store_row(grad.shares, first, samples.count, grad_share.data());
    }
    if (grad.value)
      scatter(grad_corners[i & 1], samples, s.D,
              {{reader.shares() + samples.first, grad_output.data()}}, grad_corners[~i & 1]);
  }
}

template <typename T>
void softmax_backward(const Attention<T>& in, Accumulator<T>* grad, int64_t row, int64_t row_end) {
  using A = Accumulator<T>;
  const Sizes& s = in.sizes;
  const int n = s.samples();
  std::vector<A> weights(whole_chunks(n));
  for (int64_t i = row * s.M; i < row_end * s.M; ++i) {
    const A* logits = load_row(in.shares, i * n, n, weights.data());
    if (logits != weights.data()) std::copy_n(logits, n, weights.data());
    softmax(n, weights);
    softmax_gradient(n, weights.data(), grad + i * n);
  }
}

#define INSTANTIATE(T)                                                                            \
  template void attention_forward<T>(const Attention<T>&, T*, int64_t, int64_t);                  \
  template void attention_backward<T>(const Attention<T>&, const AttentionGradients<T>&, int64_t, \
                                      int, int, int, int);                                        \
  template void softmax_backward<T>(const Attention<T>&, Accumulator<T>*, int64_t, int64_t);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)

}  // namespace sparse_detr
