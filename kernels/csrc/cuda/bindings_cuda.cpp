// torch.ops.sparse_detr.* for the CUDA key: checks what the kernels rely on, allocates, launches on
// the current stream of the tensors' device. Schemas are registered in Python (op.py).

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <optional>
#include <string_view>
#include <tuple>

#include "launch.h"

namespace sparse_detr::cuda {
namespace {

using at::Tensor;

Dtype dtype_of(const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kDouble:
      return Dtype::kFloat64;
    case at::kHalf:
      return Dtype::kFloat16;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    default:
      TORCH_CHECK_VALUE(false, name, " must have a floating dtype, got ", x.scalar_type());
  }
}

at::ScalarType accumulator_of(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Contiguous, and aligned for 16-byte loads, which a slice of another tensor may not be.
Tensor dense(const Tensor& x) {
  Tensor y = x.contiguous();
  return reinterpret_cast<uintptr_t>(y.const_data_ptr()) % 16 ? y.clone() : y;
}

void check(const char* name, const Tensor& x, at::IntArrayRef sizes, at::ScalarType type,
           at::Device device) {
  TORCH_CHECK_VALUE(x.sizes() == sizes, name, " must have shape ", sizes, ", got ", x.sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == type, name, " must have dtype ", type, ", got ",
                    x.scalar_type());
  TORCH_CHECK_VALUE(x.device() == device, name, " must be on ", device, ", got ", x.device());
}

Tensor empty(at::IntArrayRef sizes, const Tensor& like, at::ScalarType type) {
  return at::empty(sizes, like.options().dtype(type));
}
Tensor unwanted(const Tensor& like) { return at::empty({0}, like.options()); }

void* pointer(const Tensor& x) { return x.defined() && x.numel() ? x.data_ptr() : nullptr; }

// The sizes of one call, from value (B, N, M, D) and samples (B, Q, M, L, P, 2).
Problem problem_of(int64_t tokens, int64_t channels, at::IntArrayRef shapes,
                   const Tensor& samples) {
  constexpr int64_t kInt = std::numeric_limits<int>::max();
  TORCH_CHECK_VALUE(!shapes.empty() && shapes.size() % 2 == 0,
                    "shapes must be [H0, W0, H1, W1, ...], got ", shapes);
  const int64_t levels = static_cast<int64_t>(shapes.size()) / 2;
  TORCH_CHECK_VALUE(levels <= kMaxLevels, "the CUDA kernels take at most ", kMaxLevels,
                    " levels, got ", levels);
  TORCH_CHECK_VALUE(samples.dim() == 6 && samples.size(3) == levels && samples.size(5) == 2,
                    "samples must be (B, Q, M, ", levels, ", P, 2), got ", samples.sizes());
  const int64_t queries = samples.size(1), heads = samples.size(2), points = samples.size(4);
  TORCH_CHECK_VALUE(levels * points <= kMaxSamples, "the CUDA kernels take at most ", kMaxSamples,
                    " samples (levels * points) per query and head, got ", levels * points);
  int64_t sum = 0;
  for (int64_t l = 0; l < levels; ++l) {
    const int64_t height = shapes[2 * l], width = shapes[2 * l + 1];
    TORCH_CHECK_VALUE(height > 0 && width > 0 && height <= tokens && width <= tokens, "shapes ",
                      shapes, " do not fit ", tokens, " tokens");
    sum += height * width;
  }
  TORCH_CHECK_VALUE(sum == tokens, "shapes ", shapes, " have ", sum, " tokens, expected ", tokens);
  TORCH_CHECK_VALUE(tokens * heads * channels <= kInt, "an image's value has ", tokens, " x ",
                    heads, " x ", channels,
                    " numbers, the CUDA kernels take less than 2^31 (in a "
                    "batch of any size)");
  TORCH_CHECK_VALUE(
      2 * queries * heads * levels * points <= kInt && queries * heads * channels <= kInt,
      "an image has ", queries, " queries x ", heads, " heads x ", levels * points,
      " samples, the CUDA kernels take less than 2^30: split the queries");
  Problem problem(samples.size(0), static_cast<int>(queries), static_cast<int>(heads),
                  static_cast<int>(channels), static_cast<int>(points), static_cast<int>(levels),
                  shapes.data());
  problem.choose_order();
  return problem;
}

// How the backward adds to the values' gradient, SPARSE_DETR_BACKWARD: per corner ("direct"), per
// block first where the kernels can ("aggregated"), or that where blocks fill the device ("auto").
Problem with_backward_path(Problem problem) {
  const char* found = std::getenv("SPARSE_DETR_BACKWARD");
  const std::string_view path = found && *found ? found : "auto";
  TORCH_CHECK_VALUE(path == "auto" || path == "direct" || path == "aggregated",
                    "SPARSE_DETR_BACKWARD=", found, " is not one of auto, direct, aggregated");
  problem.aggregate = path == "aggregated" || (path == "auto" && problem.fills_device());
  return problem;
}

bool empty(const Problem& p) { return p.images * p.queries * p.heads * p.channels * p.points == 0; }

// Guards the device for the duration of a call and knows its stream.
struct OnDevice {
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;

  explicit OnDevice(const Tensor& x)
      : guard(x.device()), stream(c10::cuda::getCurrentCUDAStream(x.device().index())) {}
};

// Largest magnitude, on the device.
Tensor magnitude(const Tensor& x, at::ScalarType type) {
  return at::linalg_vector_norm(x, INFINITY, std::nullopt, false, type);
}

// The gradient of `like`, into which the kernels add; see GradientMap.
struct MapBuffer {
  Tensor like, sum, bound;

  MapBuffer(const Tensor& like, bool wanted, const Tensor& bound) : like(like), bound(bound) {
    if (!wanted) return;
    const auto type = bound.defined() ? at::kLong : accumulator_of(like);
    sum = at::zeros(like.sizes(), like.options().dtype(type));
  }

  GradientMap map() const {
    GradientMap map;
    (bound.defined() ? map.fixed : map.sum) = pointer(sum);
    map.bound = pointer(bound);
    return map;
  }

  Tensor finish(const Problem& problem, cudaStream_t stream) const {
    if (!sum.defined()) return unwanted(like);
    if (!bound.defined()) return sum.to(like.scalar_type());
    Tensor result = at::empty(like.sizes(), like.options());
    C10_CUDA_CHECK(fixed_to_float(problem, dtype_of("value", like), pointer(sum), pointer(bound),
                                  sum.numel(), pointer(result), stream));
    return result;
  }
};

// ---- ms_deform_attn, plain (reference undefined) and fused --------------------------------------

struct Inputs {
  Tensor value, reference, coordinates, shares;  // dense; the last two in a dtype of the kernels
  Problem problem;
  Dtype dtype;

  Inputs(const Tensor& value, at::IntArrayRef shapes, const Tensor& reference,
         const Tensor& coordinates, const Tensor& shares)
      : value(dense(value)),
        problem(checked(value, shapes, coordinates)),
        dtype(dtype_of("value", value)) {
    const auto type = accumulator_of(value);
    const int64_t B = problem.images, Q = problem.queries, M = problem.heads, L = problem.levels,
                  P = problem.points;
    if (!reference.defined()) {
      check("locations", coordinates, {B, Q, M, L, P, 2}, type, value.device());
      check("weights", shares, {B, Q, M, L, P}, shares.scalar_type(), value.device());
      this->coordinates = dense(coordinates);
      this->shares = dense(shares.to(type));
      return;
    }
    TORCH_CHECK_VALUE(reference.dim() == 4 && (reference.size(3) == 2 || reference.size(3) == 4),
                      "reference must be (B, Q, L, 2 or 4), got ", reference.sizes());
    check("reference", reference, {B, Q, L, reference.size(3)}, type, value.device());
    check("offsets", coordinates, {B, Q, M, L, P, 2}, coordinates.scalar_type(), value.device());
    check("logits", shares, {B, Q, M, L * P}, shares.scalar_type(), value.device());
    this->reference = dense(reference);
    const bool as_value = coordinates.scalar_type() == value.scalar_type() &&
                          shares.scalar_type() == value.scalar_type();
    this->coordinates = dense(as_value ? coordinates : coordinates.to(type));
    this->shares = dense(as_value ? shares : shares.to(type));
  }

  static Problem checked(const Tensor& value, at::IntArrayRef shapes, const Tensor& samples) {
    TORCH_CHECK_VALUE(value.dim() == 4, "value must be (B, N, M, D), got ", value.sizes());
    TORCH_CHECK_VALUE(
        samples.dim() == 6 && samples.size(0) == value.size(0) && samples.size(2) == value.size(2),
        "samples must be (B, Q, M, L, P, 2), got ", samples.sizes(), " for value ", value.sizes());
    return problem_of(value.size(1), value.size(3), shapes, samples);
  }

  Samples samples() const {
    Samples s;
    if (!reference.defined()) {
      s.locations = pointer(coordinates);
      s.weights = pointer(shares);
      return s;
    }
    s.reference = pointer(reference);
    s.offsets = pointer(coordinates);
    s.logits = pointer(shares);
    s.boxes = reference.size(3) == 4;
    s.dtype = dtype_of("offsets", coordinates);
    return s;
  }
};

Tensor forward(const Inputs& in) {
  const Problem& p = in.problem;
  const OnDevice device(in.value);
  Tensor output =
      at::empty({p.images, p.queries, int64_t(p.heads) * p.channels}, in.value.options());
  if (empty(p)) return output.zero_();
  C10_CUDA_CHECK(
      forward(p, in.dtype, pointer(in.value), in.samples(), pointer(output), device.stream));
  return output;
}

struct Gradients {
  Tensor value, reference, coordinates, shares;
};

// `coordinates` and `shares`: as the caller gave them; their gradients get those dtypes.
Gradients backward(const Inputs& in, const Tensor& grad_output, const Tensor& coordinates,
                   const Tensor& shares, bool need_value, bool need_reference,
                   bool need_coordinates, bool need_shares) {
  const Problem p = with_backward_path(in.problem);
  const auto type = accumulator_of(in.value);
  const bool fused = in.reference.defined();
  check("grad_output", grad_output, {p.images, p.queries, int64_t(p.heads) * p.channels},
        in.value.scalar_type(), in.value.device());
  const auto zeros = [](const Tensor& x, bool wanted) {
    return wanted ? at::zeros(x.sizes(), x.options()) : unwanted(x);
  };
  if (empty(p)) {
    return {zeros(in.value, need_value), zeros(fused ? in.reference : in.value, need_reference),
            zeros(coordinates, need_coordinates), zeros(shares, need_shares)};
  }
  const OnDevice device(in.value);
  const Tensor grad = dense(grad_output);
  Tensor bound;
  if (need_value && at::globalContext().deterministicAlgorithms()) {
    bound = magnitude(grad, type);
    if (!fused) bound = bound.mul(magnitude(in.shares, type));
  }
  const MapBuffer value(in.value, need_value, bound);
  const auto like = [](const Tensor& x, bool wanted) {
    return wanted ? at::empty(x.sizes(), x.options()) : unwanted(x);
  };
  Tensor grad_coordinates = like(in.coordinates, need_coordinates);
  Tensor grad_shares = like(in.shares, need_shares);
  Tensor grad_reference = fused ? like(in.reference, need_reference) : Tensor();
  Tensor pixels;
  if (need_reference) pixels = empty(in.coordinates.sizes(), in.value, type);

  SampleGradients gradients;
  (fused ? gradients.offsets : gradients.locations) = pointer(grad_coordinates);
  (fused ? gradients.logits : gradients.weights) = pointer(grad_shares);
  gradients.pixels = pointer(pixels);
  C10_CUDA_CHECK(backward(p, in.dtype, pointer(grad), pointer(in.value), in.samples(), value.map(),
                          gradients, device.stream));
  if (need_reference) {
    C10_CUDA_CHECK(reference_gradient(p, in.dtype, pointer(pixels), in.samples(),
                                      pointer(grad_reference), device.stream));
  }
  return {value.finish(p, device.stream), grad_reference,
          grad_coordinates.to(coordinates.scalar_type()), grad_shares.to(shares.scalar_type())};
}

Tensor ms_deform_attn(const Tensor& value, at::IntArrayRef shapes, const Tensor& locations,
                      const Tensor& weights) {
  return forward({value, shapes, Tensor(), locations, weights});
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(
    const Tensor& grad_output, const Tensor& value, at::IntArrayRef shapes, const Tensor& locations,
    const Tensor& weights, c10::List<bool> mask) {
  const auto grad = backward({value, shapes, Tensor(), locations, weights}, grad_output, locations,
                             weights, mask[0], false, mask[1], mask[2]);
  return {grad.value, grad.coordinates, grad.shares};
}

Tensor ms_deform_attn_fused(const Tensor& value, at::IntArrayRef shapes, const Tensor& reference,
                            const Tensor& offsets, const Tensor& logits) {
  return forward({value, shapes, reference, offsets, logits});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ms_deform_attn_fused_backward(
    const Tensor& grad_output, const Tensor& value, at::IntArrayRef shapes, const Tensor& reference,
    const Tensor& offsets, const Tensor& logits, c10::List<bool> mask) {
  const auto grad = backward({value, shapes, reference, offsets, logits}, grad_output, offsets,
                             logits, mask[0], mask[1], mask[2], mask[3]);
  return {grad.value, grad.reference, grad.coordinates, grad.shares};
}

// ---- key_aware_deform_attn ----------------------------------------------------------------------

struct KeyAwareInputs {
  Tensor query, key, value, locations;  // dense; key is undefined where the values are the keys
  Problem problem;
  Dtype dtype;

  KeyAwareInputs(const Tensor& query, const std::optional<Tensor>& key, const Tensor& value,
                 at::IntArrayRef shapes, const Tensor& locations)
      : query(dense(query)),
        value(dense(value)),
        locations(dense(locations)),
        problem(Inputs::checked(value, shapes, locations)),
        dtype(dtype_of("value", value)) {
    if (key) {
      check("key", *key, value.sizes(), value.scalar_type(), value.device());
      this->key = dense(*key);
    }
    const int64_t B = problem.images, Q = problem.queries, M = problem.heads, D = problem.channels;
    check("query", query, {B, Q, M, D}, value.scalar_type(), value.device());
    check("locations", locations, locations.sizes(), accumulator_of(value), value.device());
  }
};

std::tuple<Tensor, Tensor> key_aware_deform_attn(const Tensor& query,
                                                 const std::optional<Tensor>& key,
                                                 const Tensor& value, at::IntArrayRef shapes,
                                                 const Tensor& locations) {
  const KeyAwareInputs in(query, key, value, shapes, locations);
  const Problem& p = in.problem;
  const OnDevice device(value);
  Tensor output = at::zeros({p.images, p.queries, int64_t(p.heads) * p.channels}, value.options());
  Tensor lse =
      at::zeros({p.images, p.queries, p.heads}, value.options().dtype(accumulator_of(value)));
  if (!empty(p)) {
    C10_CUDA_CHECK(key_aware_forward(p, in.dtype, pointer(in.query), pointer(in.key),
                                     pointer(in.value), pointer(in.locations), pointer(output),
                                     pointer(lse), device.stream));
  }
  return {output, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> key_aware_deform_attn_backward(
    const Tensor& grad_output, const Tensor& output, const Tensor& lse, const Tensor& query,
    const std::optional<Tensor>& key, const Tensor& value, at::IntArrayRef shapes,
    const Tensor& locations, c10::List<bool> mask) {
  const KeyAwareInputs in(query, key, value, shapes, locations);
  const Problem& p = in.problem;
  const auto type = accumulator_of(value), to = value.scalar_type();
  const int64_t width = int64_t(p.heads) * p.channels;
  check("grad_output", grad_output, {p.images, p.queries, width}, to, value.device());
  check("output", output, {p.images, p.queries, width}, to, value.device());
  check("lse", lse, {p.images, p.queries, p.heads}, type, value.device());
  const bool need_query = mask[0], need_key = mask[1] && key, need_value = mask[2];
  const OnDevice device(value);
  Tensor bound;
  if (!empty(p) && (need_key || need_value) && at::globalContext().deterministicAlgorithms()) {
    // |d value| <= |g| and |d key| <= |<g, value - output>| |query| / sqrt(D), for shares <= 1.
    bound = magnitude(value, type).mul(magnitude(query, type));
    bound = bound.mul(2 * std::sqrt(double(p.channels))).add(1).mul(magnitude(grad_output, type));
  }
  const MapBuffer grad_key(key ? in.key : in.value, need_key, bound);
  const MapBuffer grad_value(in.value, need_value, bound);
  Tensor grad_query =
      need_query ? at::zeros(query.sizes(), query.options().dtype(type)) : unwanted(query);
  Tensor grad_locations =
      mask[3] ? at::zeros(locations.sizes(), locations.options()) : unwanted(locations);
  if (!empty(p)) {
    const Tensor grad = dense(grad_output), out = dense(output), total = dense(lse);
    C10_CUDA_CHECK(key_aware_backward(p, in.dtype, pointer(grad), pointer(out), pointer(total),
                                      pointer(in.query), pointer(in.key), pointer(in.value),
                                      pointer(in.locations), pointer(grad_query), grad_key.map(),
                                      grad_value.map(), pointer(grad_locations), device.stream));
  }
  return {grad_query.to(to), grad_key.finish(p, device.stream), grad_value.finish(p, device.stream),
          grad_locations};
}

// ---- attention_map_splat ------------------------------------------------------------------------

Tensor attention_map_splat(at::TensorList locations, at::TensorList weights,
                           at::IntArrayRef shapes) {
  TORCH_CHECK_VALUE(!locations.empty() && locations.size() == weights.size(),
                    "expected one locations and one weights tensor per layer, got ",
                    locations.size(), " and ", weights.size());
  int64_t tokens = 0;
  for (size_t i = 0; i + 1 < shapes.size(); i += 2) tokens += shapes[i] * shapes[i + 1];
  const Tensor& first = locations[0];
  const bool wide = first.scalar_type() == at::kDouble || weights[0].scalar_type() == at::kDouble;
  const auto type = wide ? at::kDouble : at::kFloat;
  const Dtype dtype = wide ? Dtype::kFloat64 : Dtype::kFloat32;
  const OnDevice device(first);
  Tensor fixed = at::zeros({first.size(0), tokens}, first.options().dtype(at::kLong));
  for (size_t i = 0; i < locations.size(); ++i) {
    const Problem problem = problem_of(tokens, 1, shapes, locations[i]);
    TORCH_CHECK_VALUE(problem.images == first.size(0), "locations have ", first.size(0), " and ",
                      problem.images, " images");
    const Tensor xy = dense(locations[i].to(type)), share = dense(weights[i].to(type));
    check("locations", xy, xy.sizes(), type, first.device());
    check("weights", share, xy.sizes().slice(0, 5), type, first.device());
    if (xy.numel() == 0) continue;
    C10_CUDA_CHECK(
        splat(problem, dtype, pointer(xy), pointer(share), pointer(fixed), device.stream));
  }
  Tensor map = at::zeros({first.size(0), tokens}, first.options().dtype(type));
  C10_CUDA_CHECK(splat_to_float(dtype, pointer(fixed), map.numel(), pointer(map), device.stream));
  return map;
}

}  // namespace
}  // namespace sparse_detr::cuda

TORCH_LIBRARY_IMPL(sparse_detr, CUDA, m) {
  m.impl("ms_deform_attn", &sparse_detr::cuda::ms_deform_attn);
  m.impl("ms_deform_attn_backward", &sparse_detr::cuda::ms_deform_attn_backward);
  m.impl("ms_deform_attn_fused", &sparse_detr::cuda::ms_deform_attn_fused);
  m.impl("ms_deform_attn_fused_backward", &sparse_detr::cuda::ms_deform_attn_fused_backward);
  m.impl("key_aware_deform_attn", &sparse_detr::cuda::key_aware_deform_attn);
  m.impl("key_aware_deform_attn_backward", &sparse_detr::cuda::key_aware_deform_attn_backward);
  m.impl("attention_map_splat", &sparse_detr::cuda::attention_map_splat);
}
