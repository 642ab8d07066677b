// What the bindings and the kernels share: the problem's sizes and one launcher per operator.
// No torch header is included here or in any .cu file, so that a kernel file compiles in seconds.
//
// Letters: B images, N tokens of all levels, Q queries, M heads, D channels per head, L levels,
// P points. All tensors are contiguous. T is the dtype of value, A (float64 for float64, else
// float32) the dtype of sums. Launchers enqueue on `stream`, never synchronise, and return the
// launch error; a null gradient pointer means "not wanted".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

namespace sparse_detr::cuda {

constexpr int kMaxLevels = 8;
constexpr int kMaxSamples = 2048;       // L * P
constexpr int64_t kEnoughBlocks = 512;  // to occupy a large device
constexpr int kAggregatedSamples = 32;  // L * P, for the aggregated backward

enum class Dtype { kFloat32, kFloat64, kFloat16, kBFloat16 };

struct Level {
  int height, width;
  int start;  // first token of the level
  int tile;   // first tile of the level
};

// Passed to kernels by value: level sizes arrive in constant memory, nothing to load or validate.
//
// Queries that are the tokens of levels tiled_from, ..., L - 1 in order (self-attention of an
// encoder) can be taken in tiles of 8x8 pixels: neighbours sample overlapping windows, which then
// come from L1. Any other list of queries is taken as it comes: tiled_from = -1. The choice
// changes the speed, not the result.
struct Problem {
  static constexpr int kTileSide = 8;

  int64_t images;
  int tokens, queries, heads, channels, levels, points;
  int tiles;  // of all levels
  int tiled_from;
  bool aggregate;       // backward: sum the values' gradient per block first, where possible
  unsigned reciprocal;  // ceil(2^28 / P)
  Level level[kMaxLevels];

  // shapes: height and width of each level. At most kMaxLevels levels.
  Problem(int64_t images, int queries, int heads, int channels, int points, int levels,
          const int64_t* shapes)
      : images(images),
        tokens(0),
        queries(queries),
        heads(heads),
        channels(channels),
        levels(levels),
        points(points),
        tiles(0),
        tiled_from(-1),
        aggregate(false),
        reciprocal(points > 0 ? unsigned(((1 << 28) + points - 1) / points) : 0) {
    for (int l = 0; l < levels; ++l) {
      const int height = static_cast<int>(shapes[2 * l]);
      const int width = static_cast<int>(shapes[2 * l + 1]);
      level[l] = {height, width, tokens, tiles};
      tokens += height * width;
      tiles += ((height + kTileSide - 1) / kTileSide) * tiles_across(l);
    }
  }

  // Samples of an image, Q * M * L * P. They must fit an int, as must N * M * D; B is unlimited.
  HOST_DEVICE int64_t samples() const { return int64_t(queries) * heads * levels * points; }

  // Takes queries that are the tokens of some last levels in tiles, unless that makes few blocks.
  void choose_order() {
    tiled_from = -1;
    for (int l = 0; l < levels; ++l) {
      if (tokens - level[l].start != queries) continue;
      if (images * heads * (tiles - level[l].tile) >= kEnoughBlocks) tiled_from = l;
      return;
    }
  }

  // Whether blocks of 64 queries are enough to occupy the device.
  bool fills_device() const {
    const int blocks = tiled_from < 0 ? (queries + 63) / 64 : tiles - level[tiled_from].tile;
    return 2 * images * heads * blocks >= kEnoughBlocks;
  }

  HOST_DEVICE int tiles_across(int l) const { return (level[l].width + kTileSide - 1) / kTileSide; }

  // l of sample s = l * P + p, without a division: exact for s < 8 * 4096.
  HOST_DEVICE int level_of(int s) const {
    return static_cast<int>(static_cast<unsigned>(s) * reciprocal >> 28);
  }
};

// Where samples and their weights come from: given, or computed inside the kernel ("fused").
struct Samples {
  const void* locations = nullptr;  // given: (B, Q, M, L, P, 2) A
  const void* weights = nullptr;    // given: (B, Q, M, L, P) A
  const void* reference = nullptr;  // fused: (B, Q, L, 2 or 4) A
  const void* offsets = nullptr;    // fused: (B, Q, M, L, P, 2) T or A
  const void* logits = nullptr;     // fused: (B, Q, M, L * P), dtype as offsets
  bool boxes = false;               // fused: references are boxes (cx, cy, w, h)
  Dtype dtype = Dtype::kFloat32;    // fused: dtype of offsets and logits
};

// Gradients of the same tensors, same dtypes.
struct SampleGradients {
  void* locations = nullptr;
  void* weights = nullptr;
  void* offsets = nullptr;
  void* logits = nullptr;
  // (B, Q, M, L, P, 2) A: gradient with respect to pixel coordinates, from which
  // reference_gradient() sums the gradient of the references.
  void* pixels = nullptr;
};

// A gradient map (B, N, M, D) into which many samples add. Zero on entry.
//   sum     A, added with floating-point atomics: fast, the order of the terms varies; or
//   fixed   64-bit fixed point: the same bits in every run. `bound` (one A on the device) is an
//           upper bound of every term's magnitude; it sets the unit, see FixedPoint. fixed_to_float
//           turns the sums into numbers.
struct GradientMap {
  void* sum = nullptr;
  void* fixed = nullptr;
  const void* bound = nullptr;
};

// output (B, Q, M * D) T.
cudaError_t forward(const Problem&, Dtype, const void* value, const Samples&, void* output,
                    cudaStream_t);

cudaError_t backward(const Problem&, Dtype, const void* grad_output, const void* value,
                     const Samples&, const GradientMap& grad_value, const SampleGradients&,
                     cudaStream_t);

// The same, with sums in shared memory first. For 16, 32 or 64 channels that are not float64, and
// kAggregatedSamples; grad_value is wanted. backward() calls it where problem.aggregate is set.
bool can_aggregate(const Problem&, Dtype);
cudaError_t backward_aggregated(const Problem&, Dtype, const void* grad_output, const void* value,
                                const Samples&, const GradientMap& grad_value,
                                const SampleGradients&, cudaStream_t);

// grad_reference (B, Q, L, 2 or 4) A from the pixel gradients that backward() left behind.
cudaError_t reference_gradient(const Problem&, Dtype, const void* pixels, const Samples&,
                               void* grad_reference, cudaStream_t);

// output (B, Q, M * D) T and lse (B, Q, M) A. key == nullptr: the keys are the values.
cudaError_t key_aware_forward(const Problem&, Dtype, const void* query, const void* key,
                              const void* value, const void* locations, void* output, void* lse,
                              cudaStream_t);

// With key == nullptr, grad_value receives both gradients. grad_query is (B, Q, M, D) in A.
cudaError_t key_aware_backward(const Problem&, Dtype, const void* grad_output, const void* output,
                               const void* lse, const void* query, const void* key,
                               const void* value, const void* locations, void* grad_query,
                               const GradientMap& grad_key, const GradientMap& grad_value,
                               void* grad_locations, cudaStream_t);

// map[i] = T(fixed[i] * unit) for count numbers.
cudaError_t fixed_to_float(const Problem&, Dtype, const void* fixed, const void* bound,
                           int64_t count, void* map, cudaStream_t);

// Adds one layer's attention to fixed (B, N) in units of 2^-kSplatFractionBits, bit-reproducibly.
cudaError_t splat(const Problem&, Dtype, const void* locations, const void* weights, void* fixed,
                  cudaStream_t);
cudaError_t splat_to_float(Dtype, const void* fixed, int64_t count, void* map, cudaStream_t);

}  // namespace sparse_detr::cuda
