// Key-aware deformable attention (Lite DETR, section 3.4), forward and backward.
//
// The weight of a sample is softmax_j(<query, key_j> / sqrt(D)), where key_j is sampled from the
// keys like value_j from the values. A sample outside the map has a zero key, hence score 0: it
// takes its part of the softmax. As in forward.cu a group of lanes owns one (query, head) and the
// lanes prepare the samples in shared memory. The softmax runs online over the samples, so nothing
// per sample reaches memory; the backward recomputes it from its log-sum-exp.
//
// kShared: the keys are the values, sampled once.
#include "dispatch.cuh"
#include "sampling.cuh"

namespace sparse_detr::cuda {
namespace {

// sample = sum over the corners of by * map, of one lane's channels.
template <typename W>
DEVICE void gather(const typename W::T* map, const Corners& corners,
                   const CornerWeights<typename W::A>& by, typename W::A (&sample)[W::V]) {
#pragma unroll
  for (int v = 0; v < W::V; ++v) sample[v] = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (corners.at[k] < 0) continue;
    typename W::A x[W::V];
    load<typename W::T, W::V>(map + int64_t(corners.at[k]) * W::V, x);
#pragma unroll
    for (int v = 0; v < W::V; ++v) sample[v] += by.w[k] * x[v];
  }
}

template <int V, typename A>
DEVICE A dot(const A (&x)[V], const A (&y)[V]) {
  A sum = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) sum += x[v] * y[v];
  return sum;
}

template <typename W, bool kShared>
__global__ void __launch_bounds__(kThreads, (kShared && W::kExact ? 4 : 2) / W::kWords)
    key_aware_forward_kernel(Problem problem, int tiles, Given<typename W::A> source,
                             const typename W::T* __restrict__ query,
                             const typename W::T* __restrict__ key,
                             const typename W::T* __restrict__ value,
                             typename W::T* __restrict__ output, typename W::A* __restrict__ lse) {
  using T = typename W::T;
  using A = typename W::A;
  // Samples in hand at a time; with two, the running sum is rescaled half as often.
  constexpr int kBatch = kShared && W::V < 8 ? 2 : 1;
  __shared__ Corners corners_of[W::kGroups * W::kStride];
  __shared__ CornerWeights<A> weights_of[W::kGroups * W::kStride];

  const int lane = threadIdx.x % W::G, group = threadIdx.x / W::G, groups = blockDim.x / W::G;
  Corners* corners = corners_of + group * W::kStride;
  CornerWeights<A>* weights = weights_of + group * W::kStride;
  const Tile tile(problem, tiles, groups);
  const int stride = problem.heads * problem.channels / W::V;
  const int count = problem.levels * problem.points;
  const A scale = 1 / sqrt(A(problem.channels));

  const int64_t plane =
      (tile.image * problem.tokens * problem.heads + tile.head) * problem.channels;
  const int64_t first_row = tile.image * problem.queries * problem.heads;
  source.select_image(problem, tile.image);
  const T* lane_key = opaque(key + plane + lane * W::V);
  const T* lane_value = opaque(value + plane + lane * W::V);
  const int channels = W::kExact ? 1 : problem.channels - lane * W::V;  // of this lane

  for (int slot = group; slot < tile.count; slot += groups) {
    const int at = tile.query(problem, slot);
    const Row row{max(at, 0), max(at, 0) * problem.heads + tile.head};
    const int64_t first_channel = (first_row + row.head) * problem.channels + lane * W::V;
    A q[W::V];
    if (W::kExact) load<T, W::V>(query + first_channel, q);

    // The channels of the output, in blocks; the scores need all channels every time.
    for (int c = 0; c < (W::kExact ? 1 : problem.channels); c += W::V * W::G) {
      A peak = -INFINITY, total = 0, sum[W::V] = {};
      for (int first = 0; first < count; first += W::kChunk) {
        const int chunk = min(W::kChunk, count - first);
        __syncwarp();
#pragma unroll 1
        for (int s = lane; s < (chunk + kBatch - 1) / kBatch * kBatch; s += W::G) {
          Sample<A> sample{A(NAN), 0, 0};
          const int l = min(problem.level_of(first + s), problem.levels - 1);
          if (s < chunk && at >= 0) {
            sample = source.sample(problem, row, first + s, problem.level[l], l);
          }
          A dx, dy;
          corners[s] = locate(sample.x, sample.y, problem.level[l], stride, dx, dy);
          weights[s] = bilinear(dx, dy);
        }
        __syncwarp();

#pragma unroll 1
        for (int s = 0; s < chunk; s += kBatch) {
          A score[kBatch], sample[kBatch][W::V] = {}, next = peak;
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            const Corners at = corners[s + i];
            const CornerWeights<A> by = weights[s + i];
            if constexpr (W::kExact) {
              gather<W>(lane_key, at, by, sample[i]);
              score[i] = dot<W::V>(q, sample[i]);
              if constexpr (!kShared) gather<W>(lane_value, at, by, sample[i]);
            } else {
              score[i] = 0;
              for (int k = 0; k < channels; k += W::V * W::G) {
                load<T, W::V>(query + first_channel + k, q);
                gather<W>(lane_key + k, at, by, sample[i]);
                score[i] += dot<W::V>(q, sample[i]);
              }
              if (c < channels) gather<W>(lane_value + c, at, by, sample[i]);
            }
            score[i] = s + i < chunk ? group_sum<W::G>(score[i]) * scale : A(-INFINITY);
            next = max(next, score[i]);
          }
          const A shrink = exp(peak - next);
          total *= shrink;
#pragma unroll
          for (int v = 0; v < W::V; ++v) sum[v] *= shrink;
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            const A share = exp(score[i] - next);
            total += share;
#pragma unroll
            for (int v = 0; v < W::V; ++v) sum[v] += share * sample[i][v];
          }
          peak = next;
        }
      }
      if (at < 0) continue;
#pragma unroll
      for (int v = 0; v < W::V; ++v) sum[v] /= total;
      if (c < channels) store<T, W::V>(output + first_channel + c, sum);
      if (c == 0 && lane == 0) lse[first_row + row.head] = peak + log(total);
    }
  }
}

// With t = p g for the values and u = p (<g, v> - <g, output>) / sqrt(D) q for the keys, where g is
// grad_output and p the sample's share: t and u times the corner weights go to the maps, u / q
// times the key to the query, and <t, dv/dx> + <u, dk/dx> to the location.
template <typename W, bool kShared, typename Map>
__global__ void __launch_bounds__(kThreads, (kShared && W::V == 4 ? 3 : 2) / W::kWords)
    key_aware_backward_kernel(Problem problem, int tiles, Given<typename W::A> source,
                              const typename W::T* __restrict__ grad_output,
                              const typename W::T* __restrict__ output,
                              const typename W::A* __restrict__ lse,
                              const typename W::T* __restrict__ query,
                              const typename W::T* __restrict__ key,
                              const typename W::T* __restrict__ value,
                              typename W::A* __restrict__ grad_query, Map grad_key, Map grad_value,
                              typename W::A* __restrict__ grad_locations) {
  using T = typename W::T;
  using A = typename W::A;
  constexpr int V = W::V, kStep = W::V * W::G;
  __shared__ Corners corners_of[W::kGroups * W::kStride];
  __shared__ Cell<A> cells_of[W::kGroups * W::kStride];

  const int lane = threadIdx.x % W::G, group = threadIdx.x / W::G, groups = blockDim.x / W::G;
  Corners* corners = corners_of + group * W::kStride;
  Cell<A>* cells = cells_of + group * W::kStride;
  const Tile tile(problem, tiles, groups);
  const int stride = problem.heads * problem.channels / V;
  const int count = problem.levels * problem.points;
  const A scale = 1 / sqrt(A(problem.channels));

  const int64_t plane =
      (tile.image * problem.tokens * problem.heads + tile.head) * problem.channels;
  const int64_t first_row = tile.image * problem.queries * problem.heads;
  source.select_image(problem, tile.image);
  if (grad_locations) grad_locations += 2 * tile.image * problem.samples();
  grad_key.start(problem);
  grad_value.start(problem);
  const T* lane_key = opaque(key + plane + lane * V);
  const T* lane_value = opaque(value + plane + lane * V);
  auto* lane_grad_key = opaque(grad_key.map + plane + lane * V);
  auto* lane_grad_value = opaque(grad_value.map + plane + lane * V);
  const int channels = W::kExact ? 1 : problem.channels - lane * V;  // of this lane

  for (int slot = group; slot < tile.count; slot += groups) {
    const int at = tile.query(problem, slot);
    const Row row{max(at, 0), max(at, 0) * problem.heads + tile.head};
    const int64_t first_channel = (first_row + row.head) * problem.channels + lane * V;
    A q[V], g[V], grad_q[V] = {};
    A mean = 0;  // <g, output>
    for (int c = 0; c < channels; c += kStep) {
      load<T, V>(query + first_channel + c, q);
      load<T, V>(grad_output + first_channel + c, g);
      A out[V];
      load<T, V>(output + first_channel + c, out);
      mean += dot<V>(g, out);
      if (!W::kExact && grad_query && at >= 0) grad_query[first_channel + c] = 0;
    }
    mean = group_sum<W::G>(mean);
    const A log_total = lse[first_row + row.head];

    for (int first = 0; first < count; first += W::kChunk) {
      const int chunk = min(W::kChunk, count - first);
      __syncwarp();
#pragma unroll 1
      for (int s = lane; s < chunk; s += W::G) {
        const int l = problem.level_of(first + s);
        const Sample<A> sample = source.sample(problem, row, first + s, problem.level[l], l);
        Cell<A> cell;
        corners[s] = locate(at < 0 ? A(NAN) : sample.x, sample.y, problem.level[l], stride, cell.dx,
                            cell.dy);
        cells[s] = cell;
      }
      __syncwarp();

#pragma unroll 1
      for (int s = 0; s < chunk; ++s) {
        const Corners corner = corners[s];
        const A dx = cells[s].dx, dy = cells[s].dy;
        const CornerWeights<A> by = bilinear(dx, dy);
        A along_q[4] = {}, along_g[4] = {}, sampled_key[V] = {};  // corners along q and g
        for (int c = 0; c < channels; c += kStep) {
          if (!W::kExact) {
            load<T, V>(query + first_channel + c, q);
            load<T, V>(grad_output + first_channel + c, g);
          }
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            if (corner.at[k] < 0) continue;
            A x[V];
            load<T, V>(lane_value + (int64_t(corner.at[k]) * V + c), x);
            along_g[k] += dot<V>(g, x);
            if constexpr (!kShared) load<T, V>(lane_key + (int64_t(corner.at[k]) * V + c), x);
            along_q[k] += dot<V>(q, x);
#pragma unroll
            for (int v = 0; v < V; ++v) sampled_key[v] += by.w[k] * x[v];
          }
        }
        const A score = group_sum<W::G>(interpolate(along_q, dx, dy)) * scale;
        const A share = exp(score - log_total);
        const A pull = share * (group_sum<W::G>(interpolate(along_g, dx, dy)) - mean) * scale;

        if (grad_locations) {
          const A g_pixel = group_sum_pair<W::G>(
              share * slope_x(along_g, dy) + pull * slope_x(along_q, dy),
              share * slope_y(along_g, dx) + pull * slope_y(along_q, dx), lane);
          if (lane < 2 && at >= 0) {
            const Level& level = problem.level[problem.level_of(first + s)];
            const int64_t i = int64_t(row.head) * count + first + s;
            grad_locations[2 * i + lane] = g_pixel * (lane ? level.height : level.width);
          }
        }
        for (int c = 0; c < channels; c += kStep) {
          if (!W::kExact) {
            load<T, V>(query + first_channel + c, q);
            load<T, V>(grad_output + first_channel + c, g);
          }
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            if (corner.at[k] < 0) continue;
            const int64_t i = int64_t(corner.at[k]) * V + c;
            A x[V];
            if (grad_value.map) {
#pragma unroll
              for (int v = 0; v < V; ++v) {
                x[v] = by.w[k] * (kShared ? share * g[v] + pull * q[v] : share * g[v]);
              }
              grad_value.template add<V>(lane_grad_value + i, x);
            }
            if (!kShared && grad_key.map) {
#pragma unroll
              for (int v = 0; v < V; ++v) x[v] = by.w[k] * pull * q[v];
              grad_key.template add<V>(lane_grad_key + i, x);
            }
          }
          if (!W::kExact && grad_query && at >= 0) {  // this lane's own number
            gather<W>(lane_key + c, corner, by, sampled_key);
            grad_query[first_channel + c] += pull * sampled_key[0];
          }
        }
#pragma unroll
        for (int v = 0; v < V; ++v) grad_q[v] += pull * sampled_key[v];
      }
    }
    if (W::kExact && grad_query && at >= 0) {
#pragma unroll
      for (int v = 0; v < V; v += 4) {
        *reinterpret_cast<float4*>(grad_query + first_channel + v) =
            make_float4(grad_q[v], grad_q[v + 1], grad_q[v + 2], grad_q[v + 3]);
      }
    }
  }
}

template <typename W, typename Map>
cudaError_t backward_with(const Problem& problem, const void* grad_output, const void* output,
                          const void* lse, const void* query, const void* key, const void* value,
                          const Samples& samples, void* grad_query, const Map& grad_key,
                          const Map& grad_value, void* grad_locations, cudaStream_t stream) {
  using T = typename W::T;
  using A = typename W::A;
  const auto run = [&](auto launch) {
    return launch(
        problem, stream, 0, Given<A>(samples, problem.points), static_cast<const T*>(grad_output),
        static_cast<const T*>(output), static_cast<const A*>(lse), static_cast<const T*>(query),
        static_cast<const T*>(key ? key : value), static_cast<const T*>(value),
        static_cast<A*>(grad_query), grad_key, grad_value, static_cast<A*>(grad_locations));
  };
  if (key) {
    return run(
        [](const auto&... x) { return launch<W, key_aware_backward_kernel<W, false, Map>>(x...); });
  }
  return run(
      [](const auto&... x) { return launch<W, key_aware_backward_kernel<W, true, Map>>(x...); });
}

}  // namespace

cudaError_t key_aware_forward(const Problem& problem, Dtype dtype, const void* query,
                              const void* key, const void* value, const void* locations,
                              void* output, void* lse, cudaStream_t stream) {
  Samples samples;
  samples.locations = locations;
  return for_each_width(dtype, problem.channels, [&](auto width) {
    using W = decltype(width);
    using T = typename W::T;
    using A = typename W::A;
    const auto run = [&](auto launch) {
      return launch(problem, stream, 0, Given<A>(samples, problem.points),
                    static_cast<const T*>(query), static_cast<const T*>(key ? key : value),
                    static_cast<const T*>(value), static_cast<T*>(output), static_cast<A*>(lse));
    };
    if (key) {
      return run(
          [](const auto&... x) { return launch<W, key_aware_forward_kernel<W, false>>(x...); });
    }
    return run([](const auto&... x) { return launch<W, key_aware_forward_kernel<W, true>>(x...); });
  });
}

cudaError_t key_aware_backward(const Problem& problem, Dtype dtype, const void* grad_output,
                               const void* output, const void* lse, const void* query,
                               const void* key, const void* value, const void* locations,
                               void* grad_query, const GradientMap& grad_key,
                               const GradientMap& grad_value, void* grad_locations,
                               cudaStream_t stream) {
  Samples samples;
  samples.locations = locations;
  if (grad_key.fixed || grad_value.fixed) {
    return for_each_dtype(dtype, [&](auto zero) {
      using W = AnyWidth<decltype(zero)>;
      using Map = FixedMap<typename W::A>;
      return backward_with<W>(problem, grad_output, output, lse, query, key, value, samples,
                              grad_query, Map(grad_key), Map(grad_value), grad_locations, stream);
    });
  }
  return for_each_width(dtype, problem.channels, [&](auto width) {
    using W = decltype(width);
    using Map = FloatingMap<typename W::A>;
    return backward_with<W>(problem, grad_output, output, lse, query, key, value, samples,
                            grad_query, Map(grad_key), Map(grad_value), grad_locations, stream);
  });
}

}  // namespace sparse_detr::cuda
