// torch.ops.sparse_detr.* for the CPU key: checks what the pointers rely on, allocates, runs in
// parallel. Schemas are registered in Python (op.py).

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../splat_units.h"
#include "problem.h"

namespace sparse_detr {
namespace {

using at::Tensor;

constexpr int64_t kGrain = 32;  // queries that are worth a thread's wake-up

// (H, W, start) per level; the kernels count tokens and image sides in int32.
std::vector<Level> levels_of(at::IntArrayRef shapes, int64_t tokens) {
  TORCH_CHECK_VALUE(!shapes.empty() && shapes.size() % 2 == 0,
                    "shapes must be [H0, W0, H1, W1, ...]");
  TORCH_CHECK_VALUE(tokens < (int64_t(1) << 31), "more than 2^31 tokens per image: ", tokens);
  std::vector<Level> levels;
  int64_t start = 0;
  for (size_t i = 0; i < shapes.size(); i += 2) {
    const int64_t height = shapes[i], width = shapes[i + 1];
    TORCH_CHECK_VALUE(height > 0 && width > 0 && height <= tokens && width <= tokens &&
                          start + height * width <= tokens,
                      "levels ", shapes, " do not fit ", tokens, " tokens");
    levels.push_back({int32_t(height), int32_t(width), int32_t(start)});
    start += height * width;
  }
  TORCH_CHECK_VALUE(start == tokens, "levels ", shapes, " have ", start, " tokens, expected ",
                    tokens);
  return levels;
}

// Sizes of one call: value (B, N, M, D), samples (B, Q, M, L, P, 2).
struct Call {
  std::vector<Level> levels;
  Sizes sizes;

  Call(const Tensor& value, at::IntArrayRef shapes, const Tensor& samples) {
    TORCH_CHECK_VALUE(value.dim() == 4, "value must be (B, N, M, D), got ", value.sizes());
    levels = levels_of(shapes, value.size(1));
    TORCH_CHECK_VALUE(samples.dim() == 6 && samples.size(0) == value.size(0) &&
                          samples.size(2) == value.size(2) &&
                          samples.size(3) == int64_t(levels.size()) && samples.size(5) == 2,
                      "samples must be (B, Q, M, L, P, 2), got ", samples.sizes(), " for value ",
                      value.sizes(), " and ", levels.size(), " levels");
    sizes = {value.size(0),      value.size(1),      samples.size(1),      int(value.size(2)),
             int(value.size(3)), int(levels.size()), int(samples.size(4)), levels.data()};
  }
  Call(const Call&) = delete;

  bool empty() const { return sizes.B * sizes.Q * sizes.M * sizes.D * sizes.P == 0; }
};

Scalar scalar_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return Scalar::kDouble;
    case at::kFloat:
      return Scalar::kFloat;
    case at::kBFloat16:
      return Scalar::kBFloat16;
    case at::kHalf:
      return Scalar::kHalf;
    default:
      TORCH_CHECK_VALUE(false, "expected a floating dtype, got ", x.scalar_type());
  }
}
Side side(const Tensor& x) { return {x.const_data_ptr(), scalar_of(x)}; }
MutableSide mutable_side(const Tensor& x, bool wanted) {
  return {wanted ? x.mutable_data_ptr() : nullptr, scalar_of(x)};
}

at::ScalarType accumulator_of(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

template <typename T, typename R = T>
R* pointer(const Tensor& x) {
  return static_cast<R*>(x.data_ptr());
}

void check_sizes(const char* name, const Tensor& x, at::IntArrayRef expected) {
  TORCH_CHECK_VALUE(x.sizes() == expected, name, " must have shape ", expected, ", got ",
                    x.sizes());
}
void check_type(const char* name, const Tensor& x, at::ScalarType expected) {
  TORCH_CHECK_VALUE(x.scalar_type() == expected, name, " must have dtype ", expected, ", got ",
                    x.scalar_type());
}

// f(T()) for the element type of x.
template <typename F>
void for_type(const Tensor& x, F&& f) {
  switch (scalar_of(x)) {
    case Scalar::kDouble:
      return f(double());
    case Scalar::kFloat:
      return f(float());
    case Scalar::kBFloat16:
      return f(BFloat16());
    case Scalar::kHalf:
      return f(Half());
  }
}

Tensor empty(at::IntArrayRef sizes, const Tensor& like, at::ScalarType type) {
  return at::empty(sizes, like.options().dtype(type));
}
Tensor zeros(const Tensor& like, at::ScalarType type) {
  return at::zeros(like.sizes(), like.options().dtype(type));
}
Tensor unwanted(const Tensor& like) { return at::empty({0}, like.options()); }

// f(b, l, head, head_end) over all (image, level, head), neighbouring heads together. One thread
// takes all heads of an image in one go; many threads split images into heads, then levels.
template <typename F>
void parallel_over_heads(const Sizes& s, int levels, F&& f) {
  at::parallel_for(0, s.B * levels * s.M, 1, [&](int64_t unit, int64_t end) {
    while (unit < end) {
      const int64_t head = unit % s.M;
      const int64_t count = std::min(end - unit, s.M - head);
      f(unit / s.M / levels, int(unit / s.M % levels), int(head), int(head + count));
      unit += count;
    }
  });
}

// ---- ms_deform_attn, plain (reference undefined) and fused

// Every query is placed by its first reference or its first sampling location.
std::vector<int64_t> order_of(const Tensor& place) {
  const int64_t B = place.size(0), Q = place.size(1), stride = place.stride(1);
  return place.scalar_type() == at::kDouble
             ? visiting_order(B, Q, pointer<const double>(place), stride)
             : visiting_order(B, Q, pointer<const float>(place), stride);
}

struct AttentionInputs {
  Tensor value, reference, coordinates, shares;
  Call call;
  std::vector<int64_t> order;

  AttentionInputs(const Tensor& value, at::IntArrayRef shapes, const Tensor& reference,
                  const Tensor& coordinates, const Tensor& shares)
      : value(value.contiguous()),
        reference(reference.defined() ? reference.contiguous() : reference),
        coordinates(coordinates.contiguous()),
        shares(shares.contiguous()),
        call(value, shapes, coordinates) {
    const Sizes& s = call.sizes;
    if (reference.defined()) {
      TORCH_CHECK_VALUE(reference.dim() == 4 && (reference.size(3) == 2 || reference.size(3) == 4),
                        "reference must be (B, Q, L, 2 or 4), got ", reference.sizes());
      check_sizes("reference", reference, {s.B, s.Q, s.L, reference.size(3)});
      check_type("reference", reference, accumulator_of(value));
      check_sizes("logits", shares, {s.B, s.Q, s.M, s.L * s.P});
    } else {
      check_type("locations", coordinates, accumulator_of(value));
      check_sizes("weights", shares, {s.B, s.Q, s.M, s.L, s.P});
    }
    if (!call.empty()) order = order_of(reference.defined() ? this->reference : this->coordinates);
  }

  template <typename T>
  Attention<T> as() const {
    using A = Accumulator<T>;
    const bool fused = reference.defined();
    return {call.sizes,
            pointer<const T>(value),
            fused ? int(reference.size(3)) : 0,
            fused ? pointer<const A>(reference) : nullptr,
            side(coordinates),
            side(shares),
            order.data()};
  }
};

Tensor forward(const AttentionInputs& in) {
  const Sizes& s = in.call.sizes;
  if (in.call.empty()) return at::zeros({s.B, s.Q, s.M * s.D}, in.value.options());
  Tensor output = empty({s.B, s.Q, s.M * s.D}, in.value, in.value.scalar_type());
  for_type(in.value, [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, s.B * s.Q, kGrain, [&](int64_t begin, int64_t end) {
      attention_forward<T>(in.as<T>(), pointer<T>(output), begin, end);
    });
  });
  return output;
}

struct AttentionOutputs {
  Tensor value, reference, coordinates, shares;
};

AttentionOutputs backward(const AttentionInputs& in, const Tensor& grad_output, bool need_value,
                          bool need_reference, bool need_coordinates, bool need_shares) {
  const Sizes& s = in.call.sizes;
  check_sizes("grad_output", grad_output, {s.B, s.Q, s.M * s.D});
  check_type("grad_output", grad_output, in.value.scalar_type());
  const auto type = accumulator_of(in.value);
  const bool fused = in.reference.defined();
  const Tensor grad = grad_output.contiguous();
  Tensor value = need_value ? zeros(in.value, type) : unwanted(in.value);
  Tensor heads;
  if (need_reference) heads = empty({s.B, s.Q, s.M, s.L, in.reference.size(3)}, in.reference, type);
  // With the levels of a head in several tasks, the softmax is differentiated after all of them.
  const bool split = s.B * s.M < 2 * at::get_num_threads() && s.L > 1;
  Tensor coordinates =
      need_coordinates ? empty(in.coordinates.sizes(), in.coordinates, in.coordinates.scalar_type())
                       : unwanted(in.coordinates);
  Tensor shares = need_shares ? empty(in.shares.sizes(), in.shares,
                                      fused && split ? type : in.shares.scalar_type())
                              : unwanted(in.shares);
  if (!in.call.empty()) {
    for_type(in.value, [&](auto zero) {
      using T = decltype(zero);
      using A = Accumulator<T>;
      const Attention<T> attention = in.as<T>();
      const AttentionGradients<T> grads = {
          pointer<const T>(grad), need_value ? pointer<A>(value) : nullptr,
          need_reference ? pointer<A>(heads) : nullptr, mutable_side(coordinates, need_coordinates),
          mutable_side(shares, need_shares)};
      parallel_over_heads(s, split ? s.L : 1, [&](int64_t b, int l, int head, int head_end) {
        attention_backward<T>(attention, grads, b, head, head_end, split ? l : 0,
                              split ? l + 1 : s.L);
      });
      if (fused && split && need_shares) {
        at::parallel_for(0, s.B * s.Q, kGrain, [&](int64_t begin, int64_t end) {
          softmax_backward<T>(attention, pointer<A>(shares), begin, end);
        });
      }
    });
  } else {
    for (Tensor* x : {&coordinates, &shares, &heads})
      if (x->defined()) x->zero_();
  }
  Tensor reference = need_reference ? heads.sum(2) : unwanted(in.value);
  return {value.to(in.value.scalar_type()), reference, coordinates,
          shares.to(in.shares.scalar_type())};
}

Tensor ms_deform_attn(const Tensor& value, at::IntArrayRef shapes, const Tensor& locations,
                      const Tensor& weights) {
  return forward({value, shapes, Tensor(), locations, weights});
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(
    const Tensor& grad_output, const Tensor& value, at::IntArrayRef shapes, const Tensor& locations,
    const Tensor& weights, c10::List<bool> mask) {
  const auto grad = backward({value, shapes, Tensor(), locations, weights}, grad_output, mask[0],
                             false, mask[1], mask[2]);
  return {grad.value, grad.coordinates, grad.shares};
}

Tensor ms_deform_attn_fused(const Tensor& value, at::IntArrayRef shapes, const Tensor& reference,
                            const Tensor& offsets, const Tensor& logits) {
  return forward({value, shapes, reference, offsets, logits});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ms_deform_attn_fused_backward(
    const Tensor& grad_output, const Tensor& value, at::IntArrayRef shapes, const Tensor& reference,
    const Tensor& offsets, const Tensor& logits, c10::List<bool> mask) {
  const auto grad = backward({value, shapes, reference, offsets, logits}, grad_output, mask[0],
                             mask[1], mask[2], mask[3]);
  return {grad.value, grad.reference, grad.coordinates, grad.shares};
}

// ---- key_aware_deform_attn

struct KeyAwareInputs {
  Tensor query, key, value, locations;
  Call call;
  std::vector<int64_t> order;

  KeyAwareInputs(const Tensor& query, const std::optional<Tensor>& key, const Tensor& value,
                 at::IntArrayRef shapes, const Tensor& locations)
      : query(query.contiguous()),
        value(value.contiguous()),
        locations(locations.contiguous()),
        call(value, shapes, locations) {
    this->key = key ? key->contiguous() : this->value;
    const Sizes& s = call.sizes;
    check_sizes("query", query, {s.B, s.Q, s.M, s.D});
    check_sizes("key", this->key, value.sizes());
    check_type("query", query, value.scalar_type());
    check_type("key", this->key, value.scalar_type());
    check_type("locations", locations, accumulator_of(value));
    if (!call.empty()) order = order_of(this->locations);
  }

  template <typename T>
  KeyAware<T> as() const {
    return {call.sizes,
            pointer<const T>(query),
            pointer<const T>(key),
            pointer<const T>(value),
            pointer<const Accumulator<T>>(locations),
            order.data()};
  }
};

std::tuple<Tensor, Tensor> key_aware_deform_attn(const Tensor& query,
                                                 const std::optional<Tensor>& key,
                                                 const Tensor& value, at::IntArrayRef shapes,
                                                 const Tensor& locations) {
  const KeyAwareInputs in(query, key, value, shapes, locations);
  const Sizes& s = in.call.sizes;
  const auto type = accumulator_of(value);
  Tensor output = empty({s.B, s.Q, s.M * s.D}, value, value.scalar_type());
  Tensor lse = empty({s.B, s.Q, s.M}, value, type);
  if (in.call.empty()) return {output.zero_(), lse.zero_()};
  for_type(value, [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, s.B * s.Q, kGrain, [&](int64_t begin, int64_t end) {
      key_aware_forward<T>(in.as<T>(), pointer<T>(output), pointer<Accumulator<T>>(lse), begin,
                           end);
    });
  });
  return {output, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> key_aware_deform_attn_backward(
    const Tensor& grad_output, const Tensor& output, const Tensor& lse, const Tensor& query,
    const std::optional<Tensor>& key, const Tensor& value, at::IntArrayRef shapes,
    const Tensor& locations, c10::List<bool> mask) {
  const KeyAwareInputs in(query, key, value, shapes, locations);
  const Sizes& s = in.call.sizes;
  check_sizes("grad_output", grad_output, {s.B, s.Q, s.M * s.D});
  check_type("grad_output", grad_output, value.scalar_type());
  check_sizes("lse", lse, {s.B, s.Q, s.M});
  const auto type = accumulator_of(value);
  check_type("lse", lse, type);
  const Tensor grad = grad_output.contiguous(), log_sum = lse.contiguous();
  const bool need_key = mask[1] && key;
  Tensor grad_query = mask[0] ? zeros(in.query, value.scalar_type()) : unwanted(value);
  Tensor grad_key = need_key ? zeros(in.key, type) : unwanted(value);
  Tensor grad_value = mask[2] ? zeros(in.value, type) : unwanted(value);
  Tensor grad_locations = mask[3] ? zeros(in.locations, type) : unwanted(locations);
  if (!in.call.empty()) {
    for_type(value, [&](auto zero) {
      using T = decltype(zero);
      using A = Accumulator<T>;
      const KeyAwareGradients<T> grads = {pointer<const T>(grad),
                                          pointer<const A>(log_sum),
                                          mask[0] ? pointer<T>(grad_query) : nullptr,
                                          need_key ? pointer<A>(grad_key) : nullptr,
                                          mask[2] ? pointer<A>(grad_value) : nullptr,
                                          mask[3] ? pointer<A>(grad_locations) : nullptr};
      parallel_over_heads(s, 1, [&](int64_t b, int, int head, int head_end) {
        key_aware_backward<T>(in.as<T>(), grads, b, head, head_end);
      });
    });
  }
  const auto to = value.scalar_type();
  return {grad_query, grad_key.to(to), grad_value.to(to), grad_locations};
}

// ---- attention_map_splat

Tensor attention_map_splat(at::TensorList locations, at::TensorList weights,
                           at::IntArrayRef shapes) {
  TORCH_CHECK_VALUE(!locations.empty() && locations.size() == weights.size(),
                    "expected one locations and one weights tensor per layer");
  int64_t tokens = 0;
  for (size_t i = 0; i + 1 < shapes.size(); i += 2) tokens += shapes[i] * shapes[i + 1];
  const std::vector<Level> levels = levels_of(shapes, tokens);
  const int64_t B = locations[0].size(0);
  Tensor map = at::zeros({B, tokens}, locations[0].options().dtype(at::kLong));
  for (size_t i = 0; i < locations.size(); ++i) {
    const Tensor xy = locations[i].contiguous(), share = weights[i].contiguous();
    TORCH_CHECK_VALUE(
        xy.dim() == 6 && xy.size(0) == B && xy.size(3) == int64_t(levels.size()) && xy.size(5) == 2,
        "locations must be (B, Q, M, L, P, 2), got ", xy.sizes());
    check_sizes("weights", share, xy.sizes().slice(0, 5));
    const Sizes s = {B,
                     tokens,
                     xy.size(1),
                     int(xy.size(2)),
                     0,
                     int(levels.size()),
                     int(xy.size(4)),
                     levels.data()};
    at::parallel_for(0, B * s.L, 1, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u)
        splat(s, side(xy), side(share), u / s.L, int(u % s.L),
              pointer<int64_t>(map) + u / s.L * tokens);
    });
  }
  const bool wide =
      locations[0].scalar_type() == at::kDouble || weights[0].scalar_type() == at::kDouble;
  return map.to(at::kDouble).div_(kSplatUnitsPerOne).to(wide ? at::kDouble : at::kFloat);
}

}  // namespace
}  // namespace sparse_detr

TORCH_LIBRARY_IMPL(sparse_detr, CPU, m) {
  m.impl("ms_deform_attn", &sparse_detr::ms_deform_attn);
  m.impl("ms_deform_attn_backward", &sparse_detr::ms_deform_attn_backward);
  m.impl("ms_deform_attn_fused", &sparse_detr::ms_deform_attn_fused);
  m.impl("ms_deform_attn_fused_backward", &sparse_detr::ms_deform_attn_fused_backward);
  m.impl("key_aware_deform_attn", &sparse_detr::key_aware_deform_attn);
  m.impl("key_aware_deform_attn_backward", &sparse_detr::key_aware_deform_attn_backward);
  m.impl("attention_map_splat", &sparse_detr::attention_map_splat);
}
