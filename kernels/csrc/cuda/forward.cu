// Multi-scale deformable attention, forward (Deformable DETR, eq. 3).
//
// A group of lanes computes one (query, head). Phase 1: each lane prepares some of the samples,
// four tokens and four weights each, in shared memory. Phase 2: the group walks the samples; per
// sample it reads the record (two broadcasts) and four channel vectors, and adds them. Nothing is
// shared beyond a warp, so warps run independently.
#include "dispatch.cuh"
#include "sampling.cuh"

namespace sparse_detr::cuda {
namespace {

template <typename W, typename Source>
__global__ void __launch_bounds__(kThreads, kForwardBlocks / W::kWords)
    forward_kernel(Problem problem, int tiles, Source source,
                   const typename W::T* __restrict__ value, typename W::T* __restrict__ output) {
  using T = typename W::T;
  using A = typename W::A;
  __shared__ Corners corners_of[W::kGroups * W::kStride];
  __shared__ CornerWeights<A> weights_of[W::kGroups * W::kStride];

  const int lane = threadIdx.x % W::G, group = threadIdx.x / W::G, groups = blockDim.x / W::G;
  Corners* corners = corners_of + group * W::kStride;
  CornerWeights<A>* weights = weights_of + group * W::kStride;
  const Tile tile(problem, tiles, groups);
  const int stride = problem.heads * problem.channels / W::V;
  const int count = problem.levels * problem.points;
  value += (tile.image * problem.tokens * problem.heads + tile.head) * problem.channels;
  output += tile.image * problem.queries * problem.heads * problem.channels;
  source.select_image(problem, tile.image);

  for (int slot = group; slot < tile.count; slot += groups) {
    const int query = tile.query(problem, slot);
    // A group without a query stays in step with its warp: it reads row 0 and samples nothing.
    const Row row{max(query, 0), max(query, 0) * problem.heads + tile.head};
    source.template start<W::G>(problem, row, lane);

    for (int c0 = 0; c0 < problem.channels; c0 += W::V * W::G) {
      const int c = c0 + lane * W::V;
      const T* mine = opaque(value + (W::kExact || c < problem.channels ? c : 0));
      A sum[W::V] = {};
      for (int first = 0; first < count; first += W::kChunk) {
        const int chunk = min(W::kChunk, count - first);
        __syncwarp();
#pragma unroll 1
        for (int s = lane; s < chunk; s += W::G) {
          const int l = problem.level_of(first + s);
          const Level& level = problem.level[l];
          const Sample<A> sample = source.sample(problem, row, first + s, level, l);
          A dx, dy;
          corners[s] = locate(query < 0 ? A(NAN) : sample.x, sample.y, level, stride, dx, dy);
          weights[s] = bilinear(dx, dy);
#pragma unroll
          for (int i = 0; i < 4; ++i) weights[s].w[i] *= sample.weight;
        }
        __syncwarp();
#pragma unroll 1
        for (int s = 0; s < chunk; ++s) {
          const Corners corner = corners[s];
          const CornerWeights<A> by = weights[s];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (corner.at[i] < 0) continue;
            A x[W::V];
            load<T, W::V>(mine + int64_t(corner.at[i]) * W::V, x);
#pragma unroll
            for (int v = 0; v < W::V; ++v) sum[v] += by.w[i] * x[v];
          }
        }
      }
      if (query >= 0 && (W::kExact || c < problem.channels)) {
        store<T, W::V>(output + int64_t(row.head) * problem.channels + c, sum);
      }
      if (W::kExact) break;
    }
  }
}

}  // namespace

cudaError_t forward(const Problem& problem, Dtype dtype, const void* value, const Samples& samples,
                    void* output, cudaStream_t stream) {
  return for_each_width(dtype, problem.channels, [&](auto width) {
    using W = decltype(width);
    return for_each_source<W>(problem, samples, [&](auto source) {
      return launch<W, forward_kernel<W, decltype(source)>>(
          problem, stream, 0, source, static_cast<const typename W::T*>(value),
          static_cast<typename W::T*>(output));
    });
  });
}

}  // namespace sparse_detr::cuda
