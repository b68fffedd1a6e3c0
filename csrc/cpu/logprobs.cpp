// Log-probabilities, entropy and their gradients over rows of logits. Compiled once per instruction set with RF_ISA
// naming the namespace. No standard headers with inline functions here (see math.h).
//
// A row is walked in blocks that stay in the L1 cache: one pass finds the block's maximum, one sums the exponentials,
// so memory is read once whatever the vocabulary. Rows do not share work: the result of a row never depends on the
// batch around it or on the number of threads.
#include "../head.h"
#include "blocks.h"

namespace rlhf_fast::RF_ISA {
namespace {

constexpr int64_t BLOCK = 512;

const void* address(const ConstMatrix& matrix, int64_t row, int64_t column) {
  return static_cast<const char*>(matrix.data) + (row * matrix.row_stride + column) * item_size(matrix.dtype);
}

void* address(const Matrix& matrix, int64_t row, int64_t column) {
  return static_cast<char*>(matrix.data) + (row * matrix.row_stride + column) * item_size(matrix.dtype);
}

RF_LOOP void soft_clip_block(const float* x, int64_t n, float scale, float softcap, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    out[i] = soft_clip(x[i] * scale, softcap);
  }
}

struct BlockSum {
  double sum;
  double weighted;
};

RF_LOOP BlockSum block_sum(const float* x, int64_t n, float shift, float scale_log2) {
  float sum = 0.0f;
  float weighted = 0.0f;
#pragma omp simd reduction(+ : sum, weighted)
  for (int64_t i = 0; i < n; i++) {
    const float d = log2_distance(x[i], shift, scale_log2);
    const float e = fast_exp2(d);
    sum += e;
    weighted = fused(e, d, weighted);
  }
  return {sum, weighted};
}

// The same for a block that holds the maximum, whose term is 1. Added among the others it would round them all to
// multiples of 1e-7, and when it is nearly the whole sum, 1 - p is made of those others.
RF_LOOP BlockSum block_sum_with_max(const float* x, int64_t n, float shift, float scale_log2) {
  float ones = 0.0f;
  float rest = 0.0f;
  float weighted = 0.0f;
#pragma omp simd reduction(+ : ones, rest, weighted)
  for (int64_t i = 0; i < n; i++) {
    const float d = log2_distance(x[i], shift, scale_log2);
    const float e = fast_exp2(d);
    ones += d < 0.0f ? 0.0f : 1.0f;
    rest += d < 0.0f ? e : 0.0f;
    weighted = fused(e, d, weighted);
  }
  return {static_cast<double>(ones) + rest, weighted};
}

RF_LOOP void block_gradient(const float* x, int64_t n, RowGradient row, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    out[i] = logit_gradient(x[i], row);
  }
}

RF_LOOP void multiply_by_clip_slope(const float* clipped, int64_t n, float inverse_softcap, float* gradient) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    gradient[i] *= soft_clip_slope(clipped[i], inverse_softcap);
  }
}

// Elements [begin, begin + n) of a row as float32, softcap applied. Points into the row itself where nothing changes.
const float* load(const ConstMatrix& logits, int64_t row, int64_t begin, int64_t n, const Transform& transform,
                  float* buffer) {
  const void* source = address(logits, row, begin);
  const float* x = widened(source, logits.dtype, n, buffer);
  if (transform.softcap > 0.0f) {
    soft_clip_block(x, n, transform.logit_scale, transform.softcap, buffer);
    x = buffer;
  }
  return x;
}

float load_one(const ConstMatrix& logits, int64_t row, int64_t column, const Transform& transform) {
  float buffer[1];
  return *load(logits, row, column, 1, transform, buffer);
}

SoftmaxSum<double> sum_row(const ConstMatrix& logits, int64_t row, const Transform& transform) {
  alignas(64) float buffer[BLOCK];
  SoftmaxSum<double> state = empty_softmax_sum<double>();
  for (int64_t begin = 0; begin < logits.columns; begin += BLOCK) {
    const int64_t n = smaller(BLOCK, logits.columns - begin);
    const float* x = load(logits, row, begin, n, transform, buffer);
    const float max = block_max(x, n);
    raise_max(state, max, transform.scale_log2);
    const auto sum = max == state.max ? block_sum_with_max : block_sum;
    const BlockSum block = sum(x, n, shift_of(state), transform.scale_log2);
    state.sum += block.sum;
    state.weighted += block.weighted;
  }
  return state;
}

struct RowResult {
  Normaliser normaliser;
  double entropy;
};

RowResult normalise_row(const ConstMatrix& logits, int64_t row, const Transform& transform) {
  const SoftmaxSum<double> state = sum_row(logits, row, transform);
  const Normaliser normaliser = normaliser_of(state);
  return {normaliser, entropy_of(state, normaliser)};
}

// One row of the forward pass: its statistics, and what a gradient needs.
RowResult forward_row(const ConstMatrix& logits, int64_t row, int64_t label, const Transform& transform,
                      const RowStatistics& statistics) {
  const RowResult result = normalise_row(logits, row, transform);
  const Normaliser& normaliser = result.normaliser;
  const float label_logit = load_one(logits, row, label, transform);
  statistics.logprobs[row] = static_cast<float>(log_probability(label_logit, normaliser, transform));
  statistics.entropy[row] = static_cast<float>(result.entropy);
  statistics.lse[row] = normaliser.anchor * transform.scale + normaliser.log_sum;
  return result;
}

void ignore_row(int64_t row, const RowStatistics& statistics) {
  statistics.logprobs[row] = 0.0f;
  statistics.entropy[row] = 0.0f;
  statistics.lse[row] = 0.0;
}

// The normaliser from a log-sum-exp. When the logits are so large that adding log(sum) to them changed nothing (a row
// masked with the lowest finite number, say), the sum is formed again.
Normaliser normaliser_from(double lse, const ConstMatrix& logits, int64_t row, const Transform& transform) {
  const bool lost = (lse < 0.0 ? -lse : lse) > 1e7;
  return lost ? normaliser_of(sum_row(logits, row, transform)) : Normaliser{0.0f, lse};
}

// Each block is read before it is written, so `result` may be the logits themselves.
void row_gradient(const ConstMatrix& logits, int64_t row, int64_t label, const RowUpstream& up,
                  const Transform& transform, const Matrix& result) {
  alignas(64) float buffer[BLOCK];
  alignas(64) float scratch[BLOCK];
  const float at_label = label_gradient(load_one(logits, row, label, transform), up, transform);
  const RowGradient constants = gradient_constants(up, transform);
  for (int64_t begin = 0; begin < logits.columns; begin += BLOCK) {
    const int64_t n = smaller(BLOCK, logits.columns - begin);
    const float* x = load(logits, row, begin, n, transform, buffer);
    void* destination = address(result, row, begin);
    float* out = result.dtype == Dtype::float32 ? static_cast<float*>(destination) : scratch;
    block_gradient(x, n, constants, out);
    if (transform.softcap > 0.0f) {
      multiply_by_clip_slope(x, n, 1.0f / transform.softcap, out);
    }
    if (label >= begin && label < begin + n) {
      out[label - begin] = at_label;  // before rounding to a 16-bit result
    }
    if (out == scratch) {
      narrow(scratch, n, result.dtype, destination);
    }
  }
}

void zero_row(int64_t columns, int64_t row, const Matrix& result) {
  __builtin_memset(address(result, row, 0), 0, columns * item_size(result.dtype));
}

// Rows cost nothing when ignored, so threads take them as they come, about 32 thousand elements at a time.
int rows_at_a_time(const ConstMatrix& logits) {
  return static_cast<int>(1 + 32768 / (logits.columns + 1));
}

int worth_threads(const ConstMatrix& logits, int threads) {
  return logits.rows * logits.columns < 32768 ? 1 : threads;
}

}  // namespace

void token_logprobs_forward(const ConstMatrix& logits, const Head& head, const RowStatistics& result, int threads) {
  const Transform transform = transform_of(head);
  const int chunk = rows_at_a_time(logits);
#pragma omp parallel for schedule(dynamic, chunk) num_threads(worth_threads(logits, threads))
  for (int64_t row = 0; row < logits.rows; row++) {
    const int64_t label = head.labels[row];
    if (label == head.ignore_index) {
      ignore_row(row, result);
    } else {
      forward_row(logits, row, label, transform, result);
    }
  }
}

void token_logprobs_backward(const ConstMatrix& logits, const Head& head, const double* lse, const float* entropy,
                             const UpstreamGradients& gradients, const Matrix& result, int threads) {
  const Transform transform = transform_of(head);
  const int chunk = rows_at_a_time(logits);
#pragma omp parallel for schedule(dynamic, chunk) num_threads(worth_threads(logits, threads))
  for (int64_t row = 0; row < logits.rows; row++) {
    const int64_t label = head.labels[row];
    const float logprob_gradient = gradients.logprobs[row];
    const float entropy_gradient = gradients.entropy ? gradients.entropy[row] : 0.0f;
    if (label == head.ignore_index || (logprob_gradient == 0.0f && entropy_gradient == 0.0f)) {
      zero_row(logits.columns, row, result);
    } else {
      const Normaliser normaliser = normaliser_from(lse[row], logits, row, transform);
      row_gradient(logits, row, label, {normaliser, entropy[row], logprob_gradient, entropy_gradient}, transform,
                   result);
    }
  }
}

void head_rows(const ConstMatrix& logits, const Head& head, const RowStatistics& statistics, const Matrix& result,
               int threads) {
  const Transform transform = transform_of(head);
  const int chunk = rows_at_a_time(logits);
#pragma omp parallel for schedule(dynamic, chunk) num_threads(worth_threads(logits, threads))
  for (int64_t row = 0; row < logits.rows; row++) {
    const int64_t label = head.labels[row];
    if (label == head.ignore_index) {
      ignore_row(row, statistics);
      if (result.data) {
        zero_row(logits.columns, row, result);
      }
      continue;
    }
    const RowResult forward = forward_row(logits, row, label, transform, statistics);
    if (result.data) {
      // the row is still in the L2 cache
      row_gradient(logits, row, label, {forward.normaliser, forward.entropy, 1.0, 0.0}, transform, result);
    }
  }
}

}  // namespace rlhf_fast::RF_ISA
