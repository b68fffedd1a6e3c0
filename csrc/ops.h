// What the native operations take, on the CPU and on CUDA devices. Torch-free: raw pointers, sizes, strides in
// elements.
#pragma once

#include <cstdint>

namespace rlhf_fast {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// A matrix of `rows` x `columns`; columns are contiguous, rows may be any distance apart (0 repeats one row).
struct ConstMatrix {
  const void* data;
  Dtype dtype;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
};

struct Matrix {
  void* data;
  Dtype dtype;
  int64_t row_stride;
};

// How raw logits become log-probabilities: z = softcap(logit_scale * x) / temperature.
struct Head {
  const int64_t* labels;  // (rows,), each in [0, columns) or ignore_index
  int64_t ignore_index;
  float logit_scale;
  float temperature;
  float softcap;  // 0: none
};

struct RowStatistics {
  float* logprobs;
  float* entropy;
  double* lse;
};

struct UpstreamGradients {
  const float* logprobs;
  const float* entropy;  // may be null
};

// Sequences of one or many lengths: sequence i covers [offsets[i], offsets[i + 1]), or row i of a (count, length)
// matrix when offsets is null.
struct Sequences {
  int64_t count;
  int64_t length;
  const int32_t* offsets;
};

struct GaeInputs {
  const float* rewards;
  const float* values;
  const uint8_t* mask;
  const float* bootstrap;  // (count,), may be null: 0
  float gamma;
  float lam;
};

enum class KlEstimator : int { k1, k2, k3, k3_plus, abs };

// From scores to advantages. Rewards are -kl_coef * KL per token, plus the score at a sequence's last unmasked token.
struct ShapedGaeInputs {
  const float* scores;  // (count,)
  const float* logprobs;
  const float* ref_logprobs;
  const float* values;
  const uint8_t* mask;
  const float* bootstrap;  // (count,), may be null: 0
  float kl_coef;
  KlEstimator estimator;
  float clip;  // bound of |score|; infinity: none
  float gamma;
  float lam;
  bool whiten;
  float whiten_eps;
};

struct ShapedGaeResults {
  float* advantages;
  float* returns;
  float* rewards;
  float* kl;
};

enum class PolicyKind : int { clip, cispo, reinforce };

// Bounds as the formulas use them; infinity where there is none.
struct PolicyTerms {
  PolicyKind kind;
  float lower;      // 1 - clip_low
  float upper;      // 1 + clip_high; cispo: clip_high
  float dual_clip;  // infinity: none
  float is_clip;    // infinity: none
  float kl_coef;    // 0 without a reference
  KlEstimator kl_estimator;
  float entropy_coef;  // 0 without an entropy
};

enum class Level : int { token, sequence, sequence_token };
enum class Aggregate : int { token, sequence, constant };

// How token losses become one number: their sum over a denominator.
struct Reduction {
  Aggregate aggregate;
  const float* denominator;  // on the device; null: `divisor`
  float divisor;             // 0: the local count
};

struct PolicyInputs {
  const float* logprobs;
  const float* old_logprobs;  // null: logprobs themselves
  const float* advantages;    // (count,) if per_sequence, else like logprobs
  const uint8_t* mask;
  const float* ref_logprobs;      // may be null
  const float* rollout_logprobs;  // may be null
  const float* entropy;           // may be null
  bool per_sequence;
  PolicyTerms terms;
  Level level;
};

// The order is that of FIGURES in kernels/policy/terms.py.
enum PolicyFigure : int {
  POLICY_SCALE,
  CLIP_LOW,
  CLIP_HIGH,
  CLIP_REGION,
  APPROX_KL,
  RATIO_MEAN,
  RATIO_MAX,
  KL,
  ENTROPY,
  IS_RATIO_MEAN,
  IS_RATIO_MAX,
  ROLLOUT_GAP,
  POLICY_FIGURES
};

struct PolicyResults {
  float* loss;              // 1
  float* figures;           // POLICY_FIGURES; those of absent inputs are 0
  float* gradient;          // d sum / d logprobs, without the denominator; may be null
  float* entropy_gradient;  // likewise
};

struct ValueInputs {
  const float* values;
  const float* old_values;  // may be null without a clip
  const float* returns;
  const uint8_t* mask;
  float clip;  // infinity: none
};

// The order is that of VALUE_FIGURES in kernels/policy/terms.py.
enum ValueFigure : int { VALUE_SCALE, CLIP_FRACTION, VALUE_MEAN, RETURN_MEAN, VALUE_FIGURES };

struct ValueResults {
  float* loss;      // 1
  float* figures;   // VALUE_FIGURES
  float* gradient;  // d sum / d values, without the denominator; may be null
};

// One query of each sequence over its keys and values: tensors (rows, key_heads, places, width or
// value_width), the last dimension contiguous.
struct Cache {
  const void* data;
  int64_t row_stride;
  int64_t head_stride;
  int64_t place_stride;
};

struct DecodeInputs {
  const void* query;  // (batch, heads, width), contiguous
  Cache keys;
  Cache values;
  const int64_t* lengths;  // (batch,), the keys of each sequence
  Dtype dtype;             // of all but the lengths
  int64_t batch;
  int64_t heads;
  int64_t key_heads;
  int64_t width;
  int64_t value_width;
  float scale;
  int64_t window;  // a query sees this many of the last keys at most
};

enum class PreferenceKind : int { sigmoid, ipo, hinge, robust, exo_pair, nca_pair, sppo_hard, apo_zero, apo_down };

// One number per pair.
struct PreferenceInputs {
  const float* chosen;
  const float* rejected;
  const float* ref_chosen;
  const float* ref_rejected;
  int64_t pairs;
  float beta;
  float label_smoothing;
  PreferenceKind kind;
};

struct PreferenceResults {
  float* losses;
  float* chosen_rewards;
  float* rejected_rewards;
  float* slopes;  // (2, pairs): d loss / d chosen, d loss / d rejected; may be null
};

}  // namespace rlhf_fast
