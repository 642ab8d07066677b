// Multi-scale deformable attention, backward, with the gradient of the values summed per block
// before it goes to memory (aggregate.cuh). Same results as backward.cu up to the order of sums.
//
// A block of 256 threads takes 64 queries of one head, level by level, four samples per query at a
// time: one sample per thread in phase 1 (corners, weights, counting), 2 (sorting) and 4 (gradients
// of weight and location from four dot products); in phase 3 groups of G lanes form the dot
// products of grad_output with the corners' channels, and add up the sorted contributions.
// grad_output's rows wait in shared memory.
#include <type_traits>

#include "aggregate.cuh"
#include "dispatch.cuh"
#include "gradients.cuh"

namespace sparse_detr::cuda {
namespace {

template <typename W, typename Source, typename Gradient, typename Map>
__global__ void __launch_bounds__(kThreads, Map::kFloating ? kBackwardBlocks : kBackwardBlocks - 1)
    aggregated_backward_kernel(Problem problem, int tiles, Source source, Gradient gradient,
                               Map grad_value, const typename W::T* __restrict__ grad_output,
                               const typename W::T* __restrict__ value) {
  using T = typename W::T;
  using A = typename W::A;
  constexpr int V = W::V, D = W::V * W::G;
  __shared__ Aggregation<1> sums;
  __shared__ Record<A> records[kThreads];
  alignas(16) __shared__ T rows[kTileQueries * D];  // of grad_output

  const Tile tile(problem, tiles, kTileQueries);
  const int lane = threadIdx.x % W::G, group = threadIdx.x / W::G;
  const int stride = problem.heads * problem.channels;
  const int count = problem.levels * problem.points;
  // This thread's samples.
  const int slot = threadIdx.x / kPassPoints, point = threadIdx.x % kPassPoints;
  const int query = tile.query(problem, slot);
  const Row row{max(query, 0), max(query, 0) * problem.heads + tile.head};
  A* weight_gradients = Gradient::kSoftmax ? dynamic_shared<A>() + slot * (count | 1) : nullptr;

  const int64_t plane =
      (tile.image * problem.tokens * problem.heads + tile.head) * problem.channels;
  grad_value.start(problem);
  source.select_image(problem, tile.image);
  gradient.select_image(problem, tile.image);
  const Rows values(value + plane + lane * V, stride);
  const Rows map(grad_value.map + plane + lane * V, stride);

  grad_output += tile.image * problem.queries * stride;
#pragma unroll 1
  for (int s = group; s < kTileQueries; s += W::kGroups) {
    const int head_row = max(tile.query(problem, s), 0) * problem.heads + tile.head;
    A x[V];
    load<T, V>(grad_output + (int64_t(head_row) * D + lane * V), x);
    store<T, V>(rows + (s * D + lane * V), x);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < kBins / 2; i += kThreads) sums.bins[i] = 0;
  sums.restart();
  source.template start<kPassPoints>(problem, row, point);
  __syncthreads();

#pragma unroll 1
  for (int l = 0; l < problem.levels; ++l) {
    const Level& level = problem.level[l];
    const Window window(tile, level);
#pragma unroll 1
    for (int first = 0; first < problem.points; first += kPassPoints) {
      const int s = l * problem.points + first + point;
      const bool mine = query >= 0 && first + point < problem.points;
      int place[4];
      {
        Sample<A> sample{A(NAN), 0, 0};
        if (mine) sample = source.sample(problem, row, s, level, l);
        Cell<A> cell;
        int top, left;
        const Corners corners = locate(sample.x, sample.y, level, 1, cell.dx, cell.dy, top, left);
        cell.weight = sample.weight;
        records[threadIdx.x].corners = corners;
        records[threadIdx.x].cell = cell;
        sums.count(window, corners, top, left, place);
      }
      __syncthreads();
      if (window.width > 0) {
        sums.sort(window);
        __syncthreads();
      }
      {
        const Corners corners = records[threadIdx.x].corners;
        const Cell<A> cell = records[threadIdx.x].cell;
        const CornerWeights<A> by = bilinear(cell.dx, cell.dy);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          // A corner outside the map, -1, becomes kNowhere.
          const unsigned key = static_cast<unsigned>(corners.at[k]) << kSlotBits | slot;
          Term<1>* term = sums.put(window, place, k);
          if (term == nullptr) continue;
          term->key = key;
          term->weight[0] = by.w[k] * cell.weight;
        }
      }
      __syncthreads();

      if (gradient.wanted()) {
        const int end = min(kPassPoints, problem.points - first);
#pragma unroll 1
        for (int s = group; s < kTileQueries; s += W::kGroups) {
          A g[V];
          load_shared<T, V>(rows + (s * D + lane * V), g);
#pragma unroll 1
          for (int p = 0; p < end; ++p) {
            Record<A>& record = records[s * kPassPoints + p];
            const Corners corners = record.corners;
            A dot[4] = {};
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              if (corners.at[k] < 0) continue;
              A x[V];
              load<T, V>(values[corners.at[k]], x);
#pragma unroll
              for (int v = 0; v < V; ++v) dot[k] += g[v] * x[v];
            }
            const A along = group_sum_transposed<W::G>(dot, lane);
            __syncwarp();  // all lanes have read the corners
            if (lane < 4) record.along[lane] = along;
          }
        }
      }
      typename Map::Sum sum[V] = {};
      sums.walk(
          window, group, W::kGroups,
          [&](int s, const float (&weight)[1]) {
            A g[V];
            load_shared<T, V>(rows + (s * D + lane * V), g);
#pragma unroll
            for (int v = 0; v < V; ++v) grad_value.accumulate(sum[v], weight[0], g[v]);
          },
          [&](unsigned token) {
            if (token != sums.kNowhere) grad_value.flush(map[token], sum);
#pragma unroll
            for (int v = 0; v < V; ++v) sum[v] = 0;
          });
      sums.clear(window);
      __syncthreads();
      sums.restart();

      if (gradient.wanted()) {
        const Record<A> record = records[threadIdx.x];
        const A weight = interpolate(record.along, record.cell.dx, record.cell.dy);
        if (Gradient::kSoftmax && first + point < problem.points) weight_gradients[s] = weight;
        if (mine) {
          gradient.store(problem, source, row, s, level, l, weight,
                         record.cell.weight * slope_x(record.along, record.cell.dy),
                         record.cell.weight * slope_y(record.along, record.cell.dx));
        }
      }
    }
  }
  if constexpr (Gradient::kSoftmax) {
    __syncwarp();  // the four threads of a query are neighbours
    gradient.template store_logits<kPassPoints>(problem, source, row, point, weight_gradients,
                                                query >= 0);
  }
}

template <typename W, typename Map>
cudaError_t aggregated_with(const Problem& problem, const void* grad_output, const void* value,
                            const Samples& samples, const Map& grad_value,
                            const SampleGradients& gradients, cudaStream_t stream) {
  return for_each_source<W>(problem, samples, [&](auto source) {
    const auto gradient = gradient_of(source, gradients);
    using Source = decltype(source);
    using Gradient = std::remove_const_t<decltype(gradient)>;
    const size_t bytes = Gradient::kSoftmax ? kTileQueries * sizeof(typename W::A) *
                                                  (problem.levels * problem.points | 1)
                                            : 0;
    return launch_tiles<aggregated_backward_kernel<W, Source, Gradient, Map>>(
        problem, stream, kThreads, kTileQueries, bytes, source, gradient, grad_value,
        static_cast<const typename W::T*>(grad_output), static_cast<const typename W::T*>(value));
  });
}

}  // namespace

bool can_aggregate(const Problem& problem, Dtype dtype) {
  const int samples = problem.levels * problem.points;
  return dtype != Dtype::kFloat64 &&
         (problem.channels == 16 || problem.channels == 32 || problem.channels == 64) &&
         samples <= kAggregatedSamples && problem.tokens < (1 << (32 - kSlotBits)) - 1;
}

cudaError_t backward_aggregated(const Problem& problem, Dtype dtype, const void* grad_output,
                                const void* value, const Samples& samples,
                                const GradientMap& grad_value, const SampleGradients& gradients,
                                cudaStream_t stream) {
  return for_each_width(dtype, problem.channels, [&](auto width) {
    using W = decltype(width);
    if constexpr (W::kExact) {
      using A = typename W::A;
      if (grad_value.fixed) {
        return aggregated_with<W>(problem, grad_output, value, samples, FixedMap<A>(grad_value),
                                  gradients, stream);
      }
      return aggregated_with<W>(problem, grad_output, value, samples, FloatingMap<A>(grad_value),
                                gradients, stream);
    } else {
      return cudaErrorInvalidValue;
    }
  });
}

}  // namespace sparse_detr::cuda
