// The launchers behind C functions, for ctypes.
#include "launch.h"

using namespace sparse_detr::cuda;

extern "C" {

struct Sizes {
  int64_t images, queries, heads, channels, points, levels;
  const int64_t* shapes;
  int tiled_from, aggregate;
};

static Problem problem_of(const Sizes& s) {
  Problem p(s.images, static_cast<int>(s.queries), static_cast<int>(s.heads),
            static_cast<int>(s.channels), static_cast<int>(s.points), static_cast<int>(s.levels),
            s.shapes);
  p.tiled_from = s.tiled_from;
  p.aggregate = s.aggregate;
  return p;
}

void set_descending(int descending) { emulator::descending = descending; }

int64_t vector_reductions() { return emulator::vector_reductions; }

int level_of(int points, int sample) {
  const int64_t shape[2] = {1, 1};
  return Problem(1, 1, 1, 1, points, 1, shape).level_of(sample);
}

int run_forward(const Sizes* s, int dtype, const void* value, const Samples* samples,
                void* output) {
  return forward(problem_of(*s), Dtype(dtype), value, *samples, output, nullptr);
}

int run_backward(const Sizes* s, int dtype, const void* grad_output, const void* value,
                 const Samples* samples, const GradientMap* grad_value,
                 const SampleGradients* gradients, void* grad_reference) {
  const Problem p = problem_of(*s);
  const int error =
      backward(p, Dtype(dtype), grad_output, value, *samples, *grad_value, *gradients, nullptr);
  if (error || !grad_reference) return error;
  return reference_gradient(p, Dtype(dtype), gradients->pixels, *samples, grad_reference, nullptr);
}

int run_key_aware_forward(const Sizes* s, int dtype, const void* query, const void* key,
                          const void* value, const void* locations, void* output, void* lse) {
  return key_aware_forward(problem_of(*s), Dtype(dtype), query, key, value, locations, output, lse,
                           nullptr);
}

int run_key_aware_backward(const Sizes* s, int dtype, const void* grad_output, const void* output,
                           const void* lse, const void* query, const void* key, const void* value,
                           const void* locations, void* grad_query, const GradientMap* grad_key,
                           const GradientMap* grad_value, void* grad_locations) {
  return key_aware_backward(problem_of(*s), Dtype(dtype), grad_output, output, lse, query, key,
                            value, locations, grad_query, *grad_key, *grad_value, grad_locations,
                            nullptr);
}

int run_fixed_to_float(const Sizes* s, int dtype, const void* fixed, const void* bound,
                       int64_t count, void* map) {
  return fixed_to_float(problem_of(*s), Dtype(dtype), fixed, bound, count, map, nullptr);
}

int run_splat(const Sizes* s, int dtype, const void* locations, const void* weights, void* fixed) {
  return splat(problem_of(*s), Dtype(dtype), locations, weights, fixed, nullptr);
}

int run_splat_to_float(int dtype, const void* fixed, int64_t count, void* map) {
  return splat_to_float(Dtype(dtype), fixed, count, map, nullptr);
}

}  // extern "C"
