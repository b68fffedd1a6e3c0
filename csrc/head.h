// What a row of logits needs once, in double: the constants of its softmax, and the exact entry of its label. Host and
// device; see math.h for the rules of such headers.
#pragma once

#include "math.h"
#include "ops.h"

namespace rlhf_fast {
namespace {

// The constants of a Head that every element needs. Without a softcap logit_scale is folded into `scale_log2`; with one
// the elements are capped while they are loaded.
struct Transform {
  float softcap;
  float logit_scale;        // multiplies a raw logit before the softcap
  float scale_log2;         // multiplies a loaded logit: base-2 exponent of the softmax
  double scale;             // the same in base e, exactly as the rounded scale_log2 has it
  float slope_without_cap;  // d z / d raw logit, soft_clip_slope aside
};

RF_HD Transform transform_of(const Head& head) {
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

RF_HD float transformed(float x, const Transform& transform) {
  return transform.softcap > 0.0f ? soft_clip(x * transform.logit_scale, transform.softcap) : x;
}

// What turns a logit into a log-probability: log p = (x - anchor) * scale - log_sum.
struct Normaliser {
  float anchor;
  double log_sum;
};

RF_HD double log_probability(float x, const Normaliser& row, const Transform& transform) {
  return (static_cast<double>(x) - row.anchor) * transform.scale - row.log_sum;
}

RF_HD Normaliser normaliser_of(const SoftmaxSum<double>& state) {
  // weighted, unlike the maximum and the sum, takes up every NaN; a row without any finite maximum has no softmax
  const bool defined = state.weighted == state.weighted && absolute(state.max) < infinity();
  return {state.max, defined ? __builtin_log(state.sum) : __builtin_nan("")};
}

RF_HD double entropy_of(const SoftmaxSum<double>& state, const Normaliser& row) {
  const double entropy = row.log_sum - LN_2 * state.weighted / state.sum;
  return entropy < 0.0 ? 0.0 : entropy;
}

struct RowUpstream {
  Normaliser normaliser;
  double entropy;
  double logprob_gradient;
  double entropy_gradient;
};

RF_HD RowGradient gradient_constants(const RowUpstream& up, const Transform& transform) {
  const double anchor = up.normaliser.anchor;
  const double log_sum = up.normaliser.log_sum;
  const double slope = transform.slope_without_cap;
  // as much as possible goes into the shift, which is subtracted first; rounding the small rest does not matter
  const float shift = static_cast<float>(anchor + log_sum / transform.scale);
  return {
      shift,
      static_cast<float>((log_sum - (shift - anchor) * transform.scale) / LN_2),
      transform.scale_log2,
      static_cast<float>(slope * (-up.logprob_gradient - up.entropy_gradient * up.entropy)),
      static_cast<float>(slope * -up.entropy_gradient * LN_2),
  };
}

// The label's own entry. 1 - p through expm1: for a token that is almost certain the difference keeps all its digits.
RF_HD float label_gradient(float logit, const RowUpstream& up, const Transform& transform) {
  const double logprob = log_probability(logit, up.normaliser, transform);
  const bool impossible = logprob < -700.0;
  const double p = impossible ? 0.0 : __builtin_exp(logprob);
  const double from_entropy = impossible ? 0.0 : -up.entropy_gradient * p * (logprob + up.entropy);
  const double gradient = -up.logprob_gradient * __builtin_expm1(logprob) + from_entropy;
  const float cap_slope = transform.softcap > 0.0f ? soft_clip_slope(logit, 1.0f / transform.softcap) : 1.0f;
  return static_cast<float>(gradient * transform.slope_without_cap * cap_slope);
}

}  // namespace
}  // namespace rlhf_fast
