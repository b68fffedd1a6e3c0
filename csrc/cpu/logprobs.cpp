// Log-probabilities, entropy and their gradients over rows of logits. Compiled once per instruction set with RF_ISA
// naming the namespace. No standard headers with inline functions here (see math.h).
//
// A row is walked in blocks that stay in the L1 cache: one pass finds the block's maximum, one sums the exponentials,
// so memory is read once whatever the vocabulary. Rows do not share work: the result of a row never depends on the
// batch around it or on the number of threads.
#include "../math.h"
#include "ops.h"

namespace rlhf_fast::RF_ISA {
namespace {

constexpr int64_t BLOCK = 4096;

int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

int64_t item_size(Dtype dtype) {
  return dtype == Dtype::float32 ? 4 : 2;
}

const void* address(const ConstMatrix& matrix, int64_t row, int64_t column) {
  return static_cast<const char*>(matrix.data) + (row * matrix.row_stride + column) * item_size(matrix.dtype);
}

void* address(const Matrix& matrix, int64_t row, int64_t column) {
  return static_cast<char*>(matrix.data) + (row * matrix.row_stride + column) * item_size(matrix.dtype);
}

// The constants of a Head that every element needs. Without a softcap logit_scale is folded into `scale_log2`; with one
// the elements are capped while they are loaded.
struct Transform {
  float softcap;
  float logit_scale;       // multiplies a raw logit before the softcap
  float scale_log2;        // multiplies a loaded logit: base-2 exponent of the softmax
  double scale;            // the same in base e, exactly as the rounded scale_log2 has it
  float slope_without_cap;  // d z / d raw logit, soft_clip_slope aside
};

Transform transform_of(const Head& head) {
  const double inverse_temperature = 1.0 / head.temperature;
  const bool capped = head.softcap > 0.0f;
  const float scale_log2 = static_cast<float>((capped ? 1.0 : head.logit_scale) * inverse_temperature / LN_2);
  return {
      head.softcap,
      head.logit_scale,
      scale_log2,
      scale_log2 * LN_2,
      static_cast<float>(head.logit_scale * inverse_temperature),
  };
}

void apply_softcap(float* x, int64_t n, const Transform& transform) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    x[i] = soft_clip(x[i] * transform.logit_scale, transform.softcap);
  }
}

// Elements [begin, begin + n) of a row as float32, softcap applied. Points into the row itself where nothing changes.
const float* load(const ConstMatrix& logits, int64_t row, int64_t begin, int64_t n, const Transform& transform,
                  float* buffer) {
  const void* source = address(logits, row, begin);
  if (logits.dtype == Dtype::float32) {
    const float* x = static_cast<const float*>(source);
    if (transform.softcap == 0.0f) {
      return x;
    }
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      buffer[i] = x[i];
    }
  } else if (logits.dtype == Dtype::bfloat16) {
    const uint16_t* x = static_cast<const uint16_t*>(source);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      buffer[i] = float_from_bf16(x[i]);
    }
  } else {
    const uint16_t* x = static_cast<const uint16_t*>(source);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      buffer[i] = float_from_half(x[i]);
    }
  }
  if (transform.softcap > 0.0f) {
    apply_softcap(buffer, n, transform);
  }
  return buffer;
}

void store(const float* x, int64_t n, Dtype dtype, void* destination) {
  if (dtype == Dtype::bfloat16) {
    uint16_t* out = static_cast<uint16_t*>(destination);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      out[i] = bf16_from_float(x[i]);
    }
  } else {
    uint16_t* out = static_cast<uint16_t*>(destination);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      out[i] = half_from_float(x[i]);
    }
  }
}

float load_one(const ConstMatrix& logits, int64_t row, int64_t column, const Transform& transform) {
  float buffer[1];
  return *load(logits, row, column, 1, transform, buffer);
}

// Sums and maxima run in LANES independent lanes, whatever the width of the vector registers: short chains are fast and
// round less, and every instruction set adds in the same order.
constexpr int64_t LANES = 32;

float block_max(const float* x, int64_t n) {
  float lanes[LANES];
#pragma omp simd
  for (int64_t l = 0; l < LANES; l++) {
    lanes[l] = -infinity();
  }
  const int64_t whole = n - n % LANES;
  for (int64_t i = 0; i < whole; i += LANES) {
#pragma omp simd
    for (int64_t l = 0; l < LANES; l++) {
      lanes[l] = x[i + l] > lanes[l] ? x[i + l] : lanes[l];
    }
  }
  for (int64_t i = whole; i < n; i++) {
    lanes[i - whole] = x[i] > lanes[i - whole] ? x[i] : lanes[i - whole];
  }
  float max = -infinity();
#pragma omp simd reduction(max : max)
  for (int64_t l = 0; l < LANES; l++) {
    max = lanes[l] > max ? lanes[l] : max;
  }
  return max;
}

// `next` is where the block after this one begins in memory: fetching it while the exponentials keep the processor busy
// halves the time that the maximum has to wait for memory.
void add_block(SoftmaxSum<double>& state, const float* x, int64_t n, float scale_log2, const char* next,
               int64_t next_step) {
  raise_max(state, block_max(x, n), scale_log2);
  const float shift = shift_of(state);
  float sum[LANES] = {};
  float weighted[LANES] = {};
  const int64_t whole = n - n % LANES;
  for (int64_t i = 0; i < whole; i += LANES) {
    __builtin_prefetch(next);
    __builtin_prefetch(next + 64);
    next += next_step;
#pragma omp simd
    for (int64_t l = 0; l < LANES; l++) {
      const float d = log2_distance(x[i + l], shift, scale_log2);
      const float e = fast_exp2(d);
      sum[l] += e;
      weighted[l] = fused(e, d, weighted[l]);
    }
  }
  const int64_t rest = n - whole;
#pragma omp simd
  for (int64_t l = 0; l < rest; l++) {
    const float d = log2_distance(x[whole + l], shift, scale_log2);
    const float e = fast_exp2(d);
    sum[l] += e;
    weighted[l] = fused(e, d, weighted[l]);
  }
  double total = 0.0;
  double total_weighted = 0.0;
#pragma omp simd reduction(+ : total, total_weighted)
  for (int64_t l = 0; l < LANES; l++) {
    total += sum[l];
    total_weighted += weighted[l];
  }
  state.sum += total;
  state.weighted += total_weighted;
}

SoftmaxSum<double> sum_row(const ConstMatrix& logits, int64_t row, const Transform& transform) {
  alignas(64) float buffer[BLOCK];
  SoftmaxSum<double> state = empty_softmax_sum<double>();
  for (int64_t begin = 0; begin < logits.columns; begin += BLOCK) {
    const int64_t n = smaller(BLOCK, logits.columns - begin);
    const float* x = load(logits, row, begin, n, transform, buffer);
    const char* next = static_cast<const char*>(address(logits, row, begin + n));
    add_block(state, x, n, transform.scale_log2, next, LANES * item_size(logits.dtype));
  }
  return state;
}

struct RowResult {
  double logprob;
  double entropy;
  double lse;
};

RowResult finish_row(const SoftmaxSum<double>& state, float label_logit, const Transform& transform) {
  const double nan = __builtin_nan("");
  // weighted, unlike the maximum and the sum, takes up every NaN; a row without any finite maximum has no softmax
  if (state.weighted != state.weighted || absolute(state.max) == infinity()) {
    return {nan, nan, nan};
  }
  const double log_sum = __builtin_log(state.sum);
  const double distance = (static_cast<double>(label_logit) - state.max) * transform.scale;
  const double entropy = log_sum - LN_2 * state.weighted / state.sum;
  return {distance - log_sum, entropy > 0.0 ? entropy : 0.0, state.max * transform.scale + log_sum};
}

void write(const RowStatistics& result, int64_t row, const RowResult& value) {
  result.logprobs[row] = static_cast<float>(value.logprob);
  result.entropy[row] = static_cast<float>(value.entropy);
  result.lse[row] = value.lse;
}

// Upstream gradients of one row and what they meet: lse and entropy as the forward pass returned them.
struct RowUpstream {
  double lse;
  double entropy;
  double logprob_gradient;
  double entropy_gradient;
};

RowGradient gradient_constants(const RowUpstream& up, const Transform& transform) {
  const float shift = static_cast<float>(up.lse / transform.scale);
  const double offset = (up.lse - shift * transform.scale) / LN_2;
  const double slope = transform.slope_without_cap;
  return {
      shift,
      static_cast<float>(offset),
      transform.scale_log2,
      static_cast<float>(slope * (-up.logprob_gradient - up.entropy_gradient * up.entropy)),
      static_cast<float>(slope * -up.entropy_gradient * LN_2),
  };
}

// The label's own entry. 1 - p through expm1: for a token that is almost certain the difference keeps all its digits.
float label_gradient(float logit, const RowUpstream& up, const Transform& transform) {
  const double logprob = logit * transform.scale - up.lse;
  const bool impossible = logprob < -700.0;
  const double p = impossible ? 0.0 : __builtin_exp(logprob);
  const double from_entropy = impossible ? 0.0 : -up.entropy_gradient * p * (logprob + up.entropy);
  double gradient = -up.logprob_gradient * __builtin_expm1(logprob) + from_entropy;
  gradient *= transform.slope_without_cap;
  return static_cast<float>(transform.softcap > 0.0f ? gradient * soft_clip_slope(logit, 1.0f / transform.softcap)
                                                     : gradient);
}

void block_gradient(const float* x, int64_t n, const RowGradient& row, const Transform& transform, float* out) {
  if (transform.softcap > 0.0f) {
    const float inverse_softcap = 1.0f / transform.softcap;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      out[i] = logit_gradient(x[i], row) * soft_clip_slope(x[i], inverse_softcap);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      out[i] = logit_gradient(x[i], row);
    }
  }
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
    block_gradient(x, n, constants, transform, out);
    if (label >= begin && label < begin + n) {
      out[label - begin] = at_label;  // before rounding to a 16-bit result
    }
    if (out == scratch) {
      store(scratch, n, result.dtype, destination);
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
      write(result, row, {0.0, 0.0, 0.0});
      continue;
    }
    const float label_logit = load_one(logits, row, label, transform);
    write(result, row, finish_row(sum_row(logits, row, transform), label_logit, transform));
  }
}

void token_logprobs_backward(const ConstMatrix& logits, const Head& head, const double* lse, const float* entropy,
                             const UpstreamGradients& gradients, const Matrix& result, int threads) {
  const Transform transform = transform_of(head);
  const int chunk = rows_at_a_time(logits);
#pragma omp parallel for schedule(dynamic, chunk) num_threads(worth_threads(logits, threads))
  for (int64_t row = 0; row < logits.rows; row++) {
    const int64_t label = head.labels[row];
    const float entropy_gradient = gradients.entropy ? gradients.entropy[row] : 0.0f;
    if (label == head.ignore_index || (gradients.logprobs[row] == 0.0f && entropy_gradient == 0.0f)) {
      zero_row(logits.columns, row, result);
      continue;
    }
    const RowUpstream up{lse[row], entropy[row], gradients.logprobs[row], entropy_gradient};
    row_gradient(logits, row, label, up, transform, result);
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
      write(statistics, row, {0.0, 0.0, 0.0});
      if (result.data) {
        zero_row(logits.columns, row, result);
      }
      continue;
    }
    const float label_logit = load_one(logits, row, label, transform);
    const RowResult value = finish_row(sum_row(logits, row, transform), label_logit, transform);
    write(statistics, row, value);
    if (result.data) {
      // the row is still in the L2 cache
      row_gradient(logits, row, label, {value.lse, value.entropy, 1.0, 0.0}, transform, result);
    }
  }
}

}  // namespace rlhf_fast::RF_ISA
