// Multi-scale deformable attention, backward.
//
// As in the forward, a group of lanes owns one (query, head) and works in phases, with no
// __syncthreads. Phase 1, a lane per sample: corners and position in the cell, to shared memory.
// Phase 2, the group per sample: the dot product of grad_output with each corner's channels; and
// grad_output times each corner's weight, added to the value's gradient by one vector reduction
// per lane and corner. Phase 3, a lane per sample: the four dot products give the gradients of
// weight and location.
#include <type_traits>

#include "dispatch.cuh"
#include "gradients.cuh"

namespace sparse_detr::cuda {
namespace {

template <typename W, typename Source, typename Gradient, typename Map>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks / W::kWords)
    backward_kernel(Problem problem, int tiles, Source source, Gradient gradient, Map grad_value,
                    const typename W::T* __restrict__ grad_output,
                    const typename W::T* __restrict__ value) {
  using T = typename W::T;
  using A = typename W::A;
  __shared__ Record<A> records_of[W::kGroups * W::kStride];

  const int lane = threadIdx.x % W::G, group = threadIdx.x / W::G, groups = blockDim.x / W::G;
  Record<A>* records = records_of + group * W::kStride;
  const Tile tile(problem, tiles, groups);
  const int stride = problem.heads * problem.channels / W::V;
  const int count = problem.levels * problem.points;
  A* weight_gradients = Gradient::kSoftmax ? dynamic_shared<A>() + group * count : nullptr;

  const int64_t plane =
      (tile.image * problem.tokens * problem.heads + tile.head) * problem.channels;
  grad_value.start(problem);
  source.select_image(problem, tile.image);
  gradient.select_image(problem, tile.image);
  const T* lane_value = opaque(value + plane + lane * W::V);
  auto* lane_map = opaque(grad_value.map + plane + lane * W::V);
  const T* lane_output = opaque(
      grad_output + tile.image * problem.queries * problem.heads * problem.channels + lane * W::V);
  // Each lane's steps over the channels; a single one for exact widths.
  const int channels = W::kExact ? 1 : problem.channels - lane * W::V;

  for (int slot = group; slot < tile.count; slot += groups) {
    const int query = tile.query(problem, slot);
    const Row row{max(query, 0), max(query, 0) * problem.heads + tile.head};
    source.template start<W::G>(problem, row, lane);
    const T* row_output = lane_output + int64_t(row.head) * problem.channels;
    A g[W::V];
    if (W::kExact) load<T, W::V>(row_output, g);

    for (int first = 0; first < count; first += W::kChunk) {
      const int chunk = min(W::kChunk, count - first);
      __syncwarp();
#pragma unroll 1
      for (int s = lane; s < chunk; s += W::G) {
        const int l = problem.level_of(first + s);
        const Sample<A> sample = source.sample(problem, row, first + s, problem.level[l], l);
        Cell<A> cell;
        cell.weight = sample.weight;
        records[s].corners = locate(query < 0 ? A(NAN) : sample.x, sample.y, problem.level[l],
                                    stride, cell.dx, cell.dy);
        records[s].cell = cell;
      }
      __syncwarp();

#pragma unroll 1
      for (int s = 0; s < chunk; ++s) {
        const Corners corners = records[s].corners;
        const Cell<A> cell = records[s].cell;
        A dot[4] = {};
        const CornerWeights<A> by = bilinear(cell.dx, cell.dy);
        for (int c = 0; c < channels; c += W::V * W::G) {
          if (!W::kExact) load<T, W::V>(row_output + c, g);
          if (gradient.wanted()) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              if (corners.at[k] < 0) continue;
              A x[W::V];
              load<T, W::V>(lane_value + (int64_t(corners.at[k]) * W::V + c), x);
#pragma unroll
              for (int v = 0; v < W::V; ++v) dot[k] += g[v] * x[v];
            }
          }
          if (grad_value.map) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              if (corners.at[k] < 0) continue;
              A x[W::V];
#pragma unroll
              for (int v = 0; v < W::V; ++v) x[v] = by.w[k] * cell.weight * g[v];
              grad_value.template add<W::V>(lane_map + (int64_t(corners.at[k]) * W::V + c), x);
            }
          }
        }
        if (gradient.wanted()) {
          const A along = group_sum_transposed<W::G>(dot, lane);
          __syncwarp();  // all lanes have read the corners
          if (lane < 4) records[s].along[lane] = along;
        }
      }
      __syncwarp();

      if (gradient.wanted()) {
#pragma unroll 1
        for (int s = lane; s < chunk; s += W::G) {
          const Cell<A> cell = records[s].cell;
          A along[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) along[k] = records[s].along[k];
          const A weight = interpolate(along, cell.dx, cell.dy);
          if (Gradient::kSoftmax) weight_gradients[first + s] = weight;
          if (query < 0) continue;
          const int l = problem.level_of(first + s);
          gradient.store(problem, source, row, first + s, problem.level[l], l, weight,
                         cell.weight * slope_x(along, cell.dy),
                         cell.weight * slope_y(along, cell.dx));
        }
      }
    }
    if constexpr (Gradient::kSoftmax) {
      __syncwarp();
      gradient.template store_logits<W::G>(problem, source, row, lane, weight_gradients,
                                           query >= 0);
      __syncwarp();
    }
  }
}

// grad_reference of one (query, level): the sum over heads and points, in a fixed order.
template <typename A, typename S>
__global__ void __launch_bounds__(kThreads)
    reference_kernel(Problem problem, Fused<A, S> source, const A* __restrict__ pixels,
                     A* __restrict__ grad_reference) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;  // query * L + l
  if (i >= problem.images * problem.queries * problem.levels) return;
  const int l = static_cast<int>(i % problem.levels);
  const A width = problem.level[l].width, height = problem.level[l].height;
  A x = 0, y = 0, w = 0, h = 0;
  for (int m = 0; m < problem.heads; ++m) {
    for (int p = 0; p < problem.points; ++p) {
      const int64_t s =
          ((i / problem.levels * problem.heads + m) * problem.levels + l) * problem.points + p;
      const auto g = load_pair(pixels + 2 * s);
      x += g.x * width;
      y += g.y * height;
      if (source.boxes) {
        const auto offset = load_pair(source.offsets + 2 * s);
        w += g.x * width * offset.x * source.step;
        h += g.y * height * offset.y * source.step;
      }
    }
  }
  A* out = grad_reference + i * (source.boxes ? 4 : 2);
  out[0] = x;
  out[1] = y;
  if (source.boxes) {
    out[2] = w;
    out[3] = h;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    fixed_kernel(Problem problem, const long long* __restrict__ fixed,
                 const Accumulator<T>* __restrict__ bound, int64_t count, T* __restrict__ map) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const double unit = FixedPoint(*bound, problem).unit;
  narrow(static_cast<Accumulator<T>>(fixed[i] * unit), map[i]);
}

template <typename W, typename Map>
cudaError_t backward_with(const Problem& problem, const void* grad_output, const void* value,
                          const Samples& samples, const Map& grad_value,
                          const SampleGradients& gradients, cudaStream_t stream) {
  return for_each_source<W>(problem, samples, [&](auto source) {
    const auto gradient = gradient_of(source, gradients);
    using Gradient = std::remove_const_t<decltype(gradient)>;
    const size_t bytes =
        Gradient::kSoftmax ? problem.levels * problem.points * sizeof(typename W::A) : 0;
    return launch<W, backward_kernel<W, decltype(source), Gradient, Map>>(
        problem, stream, bytes, source, gradient, grad_value,
        static_cast<const typename W::T*>(grad_output), static_cast<const typename W::T*>(value));
  });
}

}  // namespace

cudaError_t backward(const Problem& problem, Dtype dtype, const void* grad_output,
                     const void* value, const Samples& samples, const GradientMap& grad_value,
                     const SampleGradients& gradients, cudaStream_t stream) {
  if (problem.aggregate && (grad_value.sum || grad_value.fixed) && can_aggregate(problem, dtype)) {
    return backward_aggregated(problem, dtype, grad_output, value, samples, grad_value, gradients,
                               stream);
  }
  if (grad_value.fixed) {  // 64-bit reductions have no vector form: one channel per lane
    return for_each_dtype(dtype, [&](auto zero) {
      using W = AnyWidth<decltype(zero)>;
      return backward_with<W>(problem, grad_output, value, samples,
                              FixedMap<typename W::A>(grad_value), gradients, stream);
    });
  }
  // The softmax keeps L * P numbers per group in shared memory: with many samples, fewer groups.
  const int channels = problem.levels * problem.points <= 512 ? problem.channels : 0;
  return for_each_width(dtype, channels, [&](auto width) {
    using W = decltype(width);
    return backward_with<W>(problem, grad_output, value, samples,
                            FloatingMap<typename W::A>(grad_value), gradients, stream);
  });
}

cudaError_t reference_gradient(const Problem& problem, Dtype dtype, const void* pixels,
                               const Samples& samples, void* grad_reference, cudaStream_t stream) {
  return for_each_dtype(dtype, [&](auto zero) {
    using W = AnyWidth<decltype(zero)>;
    using A = typename W::A;
    return for_each_source<W>(problem, samples, [&](auto source) {
      if constexpr (std::is_same_v<decltype(source), Given<A>>) {
        return cudaErrorInvalidValue;
      } else {
        return launch_flat(reference_kernel<A, typename decltype(source)::Scalar>,
                           problem.images * problem.queries * problem.levels, stream, problem,
                           source, static_cast<const A*>(pixels), static_cast<A*>(grad_reference));
      }
    });
  });
}

cudaError_t fixed_to_float(const Problem& problem, Dtype dtype, const void* fixed,
                           const void* bound, int64_t count, void* map, cudaStream_t stream) {
  return for_each_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch_flat(fixed_kernel<T>, count, stream, problem,
                       static_cast<const long long*>(fixed),
                       static_cast<const Accumulator<T>*>(bound), count, static_cast<T*>(map));
  });
}

}  // namespace sparse_detr::cuda
