// Log-probabilities, entropy and their gradients over rows of logits, one block per row: memory is read once forward,
// read once and written once backward. Which thread takes which column follows from the number of columns alone, so a
// row's result is the same bits whatever rows surround it, and at whatever address it begins.
#pragma once

#include "../head.h"
#include "device.cuh"
#include "formats.cuh"

namespace rlhf_fast::cuda {

constexpr int ROW_THREADS = 512;

// Threads of a block. From the number of columns alone: the order of a row's sums follows from it.
template <class Format>
unsigned threads_for(int64_t columns) {
  const int64_t vectors = (columns + Format::WIDTH - 1) / Format::WIDTH;
  const int64_t threads = (vectors + WARP - 1) / WARP * WARP;
  return static_cast<unsigned>(threads < ROW_THREADS ? threads : ROW_THREADS);
}

// 2^x by the special function unit: relative error 2^-22, 0 below -126
__device__ __forceinline__ float exp2_of(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < EXP2_FLOOR ? 0.0f : fast_exp2(x);
#endif
}

// max(x, floor) in one instruction that keeps a NaN
__device__ __forceinline__ float at_least(float x, float floor) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(floor));
  return y;
#else
  return x < floor ? floor : x;
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Statistics of a row
// ---------------------------------------------------------------------------------------------------------------------

// One thread's share of the softmax sum. Terms equal to the maximum are counted apart: added among the others they
// would round those to multiples of 1e-7, and when the maximum is nearly the whole sum, 1 - p is made of the others.
struct ThreadSum {
  SoftmaxSum<float> rest;
  float ones;
};

template <int WIDTH>
__device__ __forceinline__ void take_up(ThreadSum& state, const float (&x)[WIDTH], float scale_log2) {
  float max = x[0];
#pragma unroll
  for (int i = 1; i < WIDTH; i++) {
    max = x[i] > max ? x[i] : max;
  }
  if (max > state.rest.max) {
    state.rest.sum += state.ones;
    state.ones = 0.0f;
    raise_max(state.rest, max, scale_log2);
  }
  const float shift = shift_of(state.rest);
#pragma unroll
  for (int i = 0; i < WIDTH; i++) {
    const float d = (x[i] - shift) * scale_log2;
    const float e = exp2_of(d);
    state.ones += d < 0.0f ? 0.0f : 1.0f;
    state.rest.sum += d < 0.0f ? e : 0.0f;
    // a logit of -inf adds 0 * finite to the entropy
    state.rest.weighted = fused(e, at_least(d, EXP2_FLOOR), state.rest.weighted);
  }
}

// The whole row's; every thread gets it.
__device__ __forceinline__ SoftmaxSum<double> block_sum(const ThreadSum& mine, float scale_log2) {
  const float max = block_reduce(mine.rest.max, Max());
  SoftmaxSum<double> state{mine.rest.max, static_cast<double>(mine.ones) + mine.rest.sum, mine.rest.weighted};
  raise_max(state, max, scale_log2);
  return {max, block_reduce(state.sum, Add()), block_reduce(state.weighted, Add())};
}

template <class Format>
__device__ __forceinline__ void transform_vector(const uint4& words, int64_t column, int64_t columns,
                                                 const Transform& transform, float (&x)[Format::WIDTH]) {
  Format::unpack(words, x);
  if (transform.softcap > 0.0f) {
#pragma unroll
    for (int i = 0; i < Format::WIDTH; i++) {
      const float capped = transformed(x[i], transform);
      // the cap makes something finite of the -inf behind the end
      x[i] = column + i < columns ? capped : -infinity();
    }
  }
}

template <class Format>
__device__ __forceinline__ SoftmaxSum<double> sum_row(const typename Format::Item* row, int64_t columns,
                                                      const Transform& transform) {
  constexpr int WIDTH = Format::WIDTH;
  constexpr int AT_ONCE = 4;  // loads in flight
  const int64_t step = static_cast<int64_t>(blockDim.x) * WIDTH;
  const bool aligned = is_aligned(row, 16);
  ThreadSum state{empty_softmax_sum<float>(), 0.0f};
  for (int64_t begin = static_cast<int64_t>(threadIdx.x) * WIDTH; begin < columns; begin += AT_ONCE * step) {
    uint4 words[AT_ONCE];
    load_vectors<Format>(row, begin, step, columns, aligned, words);
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
      const int64_t column = begin + k * step;
      if (column < columns) {
        float x[WIDTH];
        transform_vector<Format>(words[k], column, columns, transform, x);
        take_up(state, x, transform.scale_log2);
      }
    }
  }
  return block_sum(state, transform.scale_log2);
}

__device__ __forceinline__ bool is_label(int64_t label, int64_t columns) {
  return label >= 0 && label < columns;
}

template <class Format>
__device__ __forceinline__ float label_logit(const typename Format::Item* row, int64_t label, int64_t columns,
                                             const Transform& transform) {
  return is_label(label, columns) ? transformed(Format::widened(row[label]), transform) : __builtin_nanf("");
}

__device__ __forceinline__ void ignore_row(int64_t row, const RowStatistics& out) {
  if (threadIdx.x == 0) {
    out.logprobs[row] = 0.0f;
    out.entropy[row] = 0.0f;
    out.lse[row] = 0.0;
  }
}

struct RowResult {
  Normaliser normaliser;
  double entropy;
};

// By one thread; the sum is known to all of them.
__device__ __forceinline__ RowResult write_statistics(const SoftmaxSum<double>& sum, float label_logit, int64_t row,
                                                      const Transform& transform, const RowStatistics& out) {
  const Normaliser normaliser = normaliser_of(sum);
  const double entropy = entropy_of(sum, normaliser);
  out.logprobs[row] = static_cast<float>(log_probability(label_logit, normaliser, transform));
  out.entropy[row] = static_cast<float>(entropy);
  out.lse[row] = normaliser.anchor * transform.scale + normaliser.log_sum;
  return {normaliser, entropy};
}

template <class Format>
__global__ void __launch_bounds__(ROW_THREADS, 2)
    logprobs_kernel(ConstMatrix logits, Head head, Transform transform, RowStatistics out) {
  const int64_t row = blockIdx.x;
  const int64_t label = head.labels[row];
  if (label == head.ignore_index) {
    ignore_row(row, out);
    return;
  }
  const auto* x = static_cast<const typename Format::Item*>(logits.data) + row * logits.row_stride;
  const SoftmaxSum<double> sum = sum_row<Format>(x, logits.columns, transform);
  if (threadIdx.x == 0) {
    write_statistics(sum, label_logit<Format>(x, label, logits.columns, transform), row, transform, out);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradient of a row
// ---------------------------------------------------------------------------------------------------------------------

// logit_gradient of math.h with the device's exponential
__device__ __forceinline__ float fast_logit_gradient(float x, const RowGradient& row) {
  const float log2_p = fused(x - row.shift, row.scale_log2, -row.offset);
  return exp2_of(log2_p) * fused(row.slope, at_least(log2_p, EXP2_FLOOR), row.constant);
}

struct RowPlan {
  RowGradient row;
  float at_label;
};

// The gradients of one vector, the first of which is `from_label` columns behind the label.
template <class In>
__device__ __forceinline__ void gradient_of(const uint4& words, int64_t from_label, const RowPlan& plan,
                                            const Transform& transform, float (&gradient)[In::WIDTH]) {
  const float inverse_softcap = transform.softcap > 0.0f ? 1.0f / transform.softcap : 0.0f;
  float logit[In::WIDTH];
  In::unpack(words, logit);
#pragma unroll
  for (int i = 0; i < In::WIDTH; i++) {
    const float z = transformed(logit[i], transform);
    gradient[i] = fast_logit_gradient(z, plan.row);
    if (transform.softcap > 0.0f) {
      gradient[i] *= soft_clip_slope(z, inverse_softcap);
    }
    gradient[i] = from_label + i == 0 ? plan.at_label : gradient[i];  // before rounding to a 16-bit result
  }
}

// The kernels walk the row in vectors that suit the result's address, and each is read before it is written, so the
// result may lie over the logits. From the end, as its last part was read last and may still be in the cache.
template <class In, class Out>
__device__ __forceinline__ void write_gradient(const typename In::Item* x, typename Out::Item* out, int64_t columns,
                                               int64_t label, const RowPlan& plan, const Transform& transform) {
  constexpr int WIDTH = In::WIDTH;
  constexpr int AT_ONCE = 2;
  constexpr int BYTES = WIDTH * sizeof(typename Out::Item);
  const int lead = static_cast<int>(reinterpret_cast<uintptr_t>(out) % BYTES / sizeof(typename Out::Item));
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == lead * sizeof(typename In::Item);
  const int64_t step = -static_cast<int64_t>(blockDim.x) * WIDTH;
  const int64_t last = (columns + lead - 1) / WIDTH - threadIdx.x;
  for (int64_t begin = last * WIDTH - lead; begin > -WIDTH; begin += AT_ONCE * step) {
    uint4 words[AT_ONCE];
    load_vectors<In>(x, begin, step, columns, aligned, words);
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
      const int64_t column = begin + k * step;
      if (column > -WIDTH) {
        float gradient[WIDTH];
        gradient_of<In>(words[k], column - label, plan, transform, gradient);
        store_vector<Out>(out, column, columns, gradient);
      }
    }
  }
}

template <class Out, int WIDTH>
__device__ __forceinline__ void fill_row(typename Out::Item* out, int64_t columns, float value) {
  constexpr int BYTES = WIDTH * sizeof(typename Out::Item);
  const int lead = static_cast<int>(reinterpret_cast<uintptr_t>(out) % BYTES / sizeof(typename Out::Item));
  float x[WIDTH];
#pragma unroll
  for (int i = 0; i < WIDTH; i++) {
    x[i] = value;
  }
  const int64_t step = static_cast<int64_t>(blockDim.x) * WIDTH;
  for (int64_t column = static_cast<int64_t>(threadIdx.x) * WIDTH - lead; column < columns; column += step) {
    store_vector<Out>(out, column, columns, x);
  }
}

template <class In, class Out>
__global__ void __launch_bounds__(ROW_THREADS, 2)
    logprobs_backward_kernel(ConstMatrix logits, Head head, Transform transform, const double* __restrict__ lse,
                             const float* __restrict__ entropy, UpstreamGradients gradients, Matrix result) {
  __shared__ RowPlan plan;
  const int64_t row = blockIdx.x;
  const int64_t columns = logits.columns;
  const int64_t label = head.labels[row];
  const float logprob_gradient = gradients.logprobs[row];
  const float entropy_gradient = gradients.entropy ? gradients.entropy[row] : 0.0f;
  const auto* x = static_cast<const typename In::Item*>(logits.data) + row * logits.row_stride;
  auto* out = static_cast<typename Out::Item*>(result.data) + row * result.row_stride;
  if (label == head.ignore_index) {
    fill_row<Out, In::WIDTH>(out, columns, 0.0f);
    return;
  }
  if (!is_label(label, columns)) {
    fill_row<Out, In::WIDTH>(out, columns, __builtin_nanf(""));
    return;
  }
  if (logprob_gradient == 0.0f && entropy_gradient == 0.0f) {
    fill_row<Out, In::WIDTH>(out, columns, 0.0f);
    return;
  }
  Normaliser normaliser{0.0f, lse[row]};
  if (!(normaliser.log_sum < 1e7 && normaliser.log_sum > -1e7)) {
    // logits so large that adding log(sum) to them changed nothing (a row masked with the lowest finite number, say)
    normaliser = normaliser_of(sum_row<In>(x, columns, transform));
  }
  if (threadIdx.x == 0) {
    const RowUpstream up{normaliser, entropy[row], logprob_gradient, entropy_gradient};
    plan = {gradient_constants(up, transform),
            label_gradient(label_logit<In>(x, label, columns, transform), up, transform)};
  }
  __syncthreads();
  write_gradient<In, Out>(x, out, columns, label, plan, transform);
}

// The row kernel of the fused head: statistics, then U = d logprob / d raw logit.
template <class Out>
__global__ void __launch_bounds__(ROW_THREADS, 2)
    head_rows_kernel(ConstMatrix logits, Head head, Transform transform, RowStatistics statistics, Matrix result) {
  __shared__ RowPlan plan;
  const int64_t row = blockIdx.x;
  const int64_t columns = logits.columns;
  const int64_t label = head.labels[row];
  const float* x = static_cast<const float*>(logits.data) + row * logits.row_stride;
  auto* out = static_cast<typename Out::Item*>(result.data) + row * result.row_stride;
  if (label == head.ignore_index) {
    ignore_row(row, statistics);
    fill_row<Out, Float32::WIDTH>(out, columns, 0.0f);
    return;
  }
  const SoftmaxSum<double> sum = sum_row<Float32>(x, columns, transform);
  if (threadIdx.x == 0) {
    const float logit = label_logit<Float32>(x, label, columns, transform);
    const RowResult forward = write_statistics(sum, logit, row, transform, statistics);
    const RowUpstream up{forward.normaliser, forward.entropy, 1.0, 0.0};
    plan = {gradient_constants(up, transform), label_gradient(logit, up, transform)};
  }
  __syncthreads();
  if (!is_label(label, columns)) {
    fill_row<Out, Float32::WIDTH>(out, columns, __builtin_nanf(""));
    return;
  }
  write_gradient<Float32, Out>(x, out, columns, label, plan, transform);
}

}  // namespace rlhf_fast::cuda
