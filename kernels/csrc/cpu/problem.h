// What the bindings hand to the kernels: plain pointers and sizes, no torch type.
// All arrays are contiguous, in the shapes of op.py.

#pragma once

#include <vector>

#include "simd.h"

namespace sparse_detr {

enum class Scalar { kDouble, kFloat, kBFloat16, kHalf };

// A float array whose type is known at run time only; it is converted row by row.
struct Side {
  const void* data = nullptr;
  Scalar type = Scalar::kFloat;
};
struct MutableSide {
  void* data = nullptr;  // nullptr: not wanted
  Scalar type = Scalar::kFloat;
};

struct Level {
  int32_t height, width, start;  // start: first token
};

struct Sizes {
  int64_t B, N, Q;
  int M, D, L, P;
  const Level* levels;
  int samples() const { return L * P; }
  int64_t image_stride() const { return N * M * D; }
  int64_t token_stride() const { return int64_t(M) * D; }
};

// ms_deform_attn (reference_dim 0: coordinates are locations, shares are weights) and
// ms_deform_attn_fused (reference_dim 2 or 4: offsets and logits).
template <typename T>
struct Attention {
  using A = Accumulator<T>;
  Sizes sizes;
  const T* value;
  int reference_dim;
  const A* reference;
  Side coordinates;
  Side shares;
  const int64_t* order;  // visiting_order() of the rows
};

template <typename T>
struct AttentionGradients {
  using A = Accumulator<T>;
  const T* grad_output;
  A* value;               // (B, N, M, D), zeroed; nullptr: not wanted
  A* reference_of_heads;  // (B, Q, M, L, reference_dim), to be summed over M; or nullptr
  MutableSide coordinates;
  MutableSide shares;
};

template <typename T>
struct KeyAware {
  using A = Accumulator<T>;
  Sizes sizes;
  const T* query;
  const T* key;  // == value: keys are the values
  const T* value;
  const A* locations;
  const int64_t* order;  // visiting_order() of the rows
};

template <typename T>
struct KeyAwareGradients {
  using A = Accumulator<T>;
  const T* grad_output;
  const A* lse;
  T* query;      // nullptr: not wanted
  A* key;        // zeroed; nullptr: not wanted, or keys are the values
  A* value;      // zeroed; nullptr: not wanted
  A* locations;  // nullptr: not wanted
};

// Rows are (image, query) pairs: b * Q + q. They are visited image by image, neighbours in the map
// one after the other, whatever the order of the queries is: most of what a query samples is then
// in the cache. It depends on the inputs only, so that sums have the same bits in every run.
// place[row * stride]: normalised (x, y) near which the row samples.
template <typename A>
std::vector<int64_t> visiting_order(int64_t B, int64_t Q, const A* place, int64_t stride);

// Forward: the rows order[first] ... order[last - 1]. Backward: heads of one image are independent:
// a call covers heads [head, head_end) and levels [level, level_end) of image b, over all queries,
// and adds to the value gradient of these heads and levels only.
template <typename T>
void attention_forward(const Attention<T>& in, T* output, int64_t first, int64_t last);
template <typename T>
void attention_backward(const Attention<T>& in, const AttentionGradients<T>& grad, int64_t b,
                        int head, int head_end, int level, int level_end);
// Turns gradients of softmax weights into gradients of logits, in place, when the levels of a head
// went to different calls above.
template <typename T>
void softmax_backward(const Attention<T>& in, Accumulator<T>* grad, int64_t row, int64_t row_end);

template <typename T>
void key_aware_forward(const KeyAware<T>& in, T* output, Accumulator<T>* lse, int64_t first,
                       int64_t last);
template <typename T>
void key_aware_backward(const KeyAware<T>& in, const KeyAwareGradients<T>& grad, int64_t b,
                        int head, int head_end);

// Adds the attention of one layer that falls on level l of image b, in units of
// 2^-kSplatFractionBits, to map (N entries of this image).
void splat(const Sizes& sizes, Side locations, Side weights, int64_t b, int l, int64_t* map);

}  // namespace sparse_detr
