// The per-token and per-pair formulas of the losses, host and device: value and derivative together, as the kernels
// make the gradient in the forward pass. See math.h for the rules of such headers.
#pragma once

#include "math.h"
#include "ops.h"

namespace rlhf_fast {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// KL estimators, functions of d = ref_logprob - logprob (kernels/kl)
// ---------------------------------------------------------------------------------------------------------------------

// e^d - d - 1. Near 0, where the three cancel, by its series.
RF_HD float k3_of(float d) {
  float p = 2.4801587e-5f;  // 1 / 8!
  p = fused(p, d, 1.9841270e-4f);
  p = fused(p, d, 1.3888889e-3f);
  p = fused(p, d, 8.3333333e-3f);
  p = fused(p, d, 4.1666667e-2f);
  p = fused(p, d, 1.6666667e-1f);
  p = fused(p, d, 0.5f);
  const float series = p * d * d;
  return absolute(d) < 0.5f ? series : exponential_minus_one(d) - d;
}

struct Estimate {
  float value;
  float slope;  // d value / d logprob
};

RF_HD Estimate kl_estimate(float d, KlEstimator estimator) {
  switch (estimator) {
    case KlEstimator::k1:
      return {-d, 1.0f};
    case KlEstimator::k2:
      return {0.5f * d * d, -d};
    case KlEstimator::k3:
      return {k3_of(d), -exponential_minus_one(d)};
    case KlEstimator::k3_plus:
      return {k3_of(d), -d};
    default:
      return {absolute(d), d > 0.0f ? -1.0f : d < 0.0f ? 1.0f : 0.0f};
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Policy loss (kernels/policy)
// ---------------------------------------------------------------------------------------------------------------------

// beyond it exp overflows a float, and a clipped token's gradient would be 0 * inf
constexpr float MAX_LOG_RATIO = 80.0f;

RF_HD float importance_ratio(float log_ratio) {
  return exponential(log_ratio < MAX_LOG_RATIO ? log_ratio : MAX_LOG_RATIO);
}

struct Surrogate {
  float loss;
  float through_ratio;  // d loss / d log-ratio
  float direct;         // d loss / d logprob beside the ratio
  bool low;             // clipped from below
  bool high;            // clipped from above
};

// `log_ratio` is that of the token or of its sequence, as the level has it.
RF_HD Surrogate surrogate(float logprob, float log_ratio, float advantage, const PolicyTerms& terms) {
  const float ratio = importance_ratio(log_ratio);
  if (terms.kind == PolicyKind::clip) {
    const float bounded = ratio < terms.lower ? terms.lower : ratio > terms.upper ? terms.upper : ratio;
    const float unclipped = ratio * advantage;
    const float clipped = bounded * advantage;
    const bool follows = !(clipped < unclipped) && !(log_ratio > MAX_LOG_RATIO);
    const float loss = -(clipped < unclipped ? clipped : unclipped);
    const float bound = -terms.dual_clip * advantage;
    const bool dual = advantage < 0.0f && loss > bound;
    return {dual ? bound : loss, follows && !dual ? -unclipped : 0.0f, 0.0f,
            ratio < terms.lower && advantage<0.0f, ratio> terms.upper && advantage > 0.0f};
  }
  if (terms.kind == PolicyKind::cispo) {
    const float weight = (ratio > terms.upper ? terms.upper : ratio) * advantage;
    return {-weight * logprob, 0.0f, -weight, false, ratio > terms.upper && advantage > 0.0f};
  }
  return {-advantage * logprob, 0.0f, -advantage, false, false};
}

// ---------------------------------------------------------------------------------------------------------------------
// Value loss (kernels/policy)
// ---------------------------------------------------------------------------------------------------------------------

struct ValueError {
  float loss;
  float slope;  // d loss / d value
  bool clipped;
};

// clip is infinity for the plain squared error.
RF_HD ValueError value_error(float value, float old_value, float target, float clip) {
  const float error = value - target;
  const float moved = value - old_value;
  const bool inside = absolute(moved) <= clip;
  // as a clamp of the difference: min and max of old +- clip would round twice
  const float bounded = old_value + (moved < -clip ? -clip : moved > clip ? clip : moved);
  const float clipped_error = bounded - target;
  const bool clipped = clip < infinity() && clipped_error * clipped_error > error * error;
  const float used = clipped ? clipped_error : error;
  return {0.5f * used * used, clipped && !inside ? 0.0f : used, clipped};
}

// ---------------------------------------------------------------------------------------------------------------------
// Preference losses (kernels/preference): functions of the log-ratios w (chosen) and l (rejected) to the reference
// ---------------------------------------------------------------------------------------------------------------------

RF_HD float sigmoid(float x) {
  const float e = exponential(-absolute(x));
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

RF_HD float log_sigmoid(float x) {
  return (x < 0.0f ? x : 0.0f) - __builtin_log1pf(exponential(-absolute(x)));
}

struct PairLoss {
  float loss;
  float chosen_slope;    // d loss / d w
  float rejected_slope;  // d loss / d l
};

RF_HD PairLoss preference_loss(float w, float l, float beta, float smoothing, PreferenceKind kind) {
  const float d = beta * (w - l);
  switch (kind) {
    case PreferenceKind::sigmoid: {
      const float slope = beta * (smoothing * sigmoid(d) - (1.0f - smoothing) * sigmoid(-d));
      return {-(1.0f - smoothing) * log_sigmoid(d) - smoothing * log_sigmoid(-d), slope, -slope};
    }
    case PreferenceKind::robust: {
      const float inverse = 1.0f / (1.0f - 2.0f * smoothing);
      const float slope = -beta * inverse * ((1.0f - smoothing) * sigmoid(-d) + smoothing * sigmoid(d));
      return {inverse * (smoothing * log_sigmoid(-d) - (1.0f - smoothing) * log_sigmoid(d)), slope, -slope};
    }
    case PreferenceKind::ipo: {
      const float error = w - l - 1.0f / (2.0f * beta);
      return {error * error, 2.0f * error, -2.0f * error};
    }
    case PreferenceKind::hinge: {
      const float slope = d < 1.0f ? -beta : 0.0f;
      return {d < 1.0f ? 1.0f - d : 0.0f, slope, -slope};
    }
    case PreferenceKind::exo_pair: {
      const float win = sigmoid(d);
      const float lose = sigmoid(-d);
      const float on_win = log_sigmoid(d) - __builtin_log1pf(-smoothing);
      const float on_lose = log_sigmoid(-d) - __builtin_logf(smoothing);
      // the terms from the logarithms' own slopes cancel: win * lose - lose * win
      const float slope = beta * win * lose * (on_win - on_lose);
      return {win * on_win + lose * on_lose, slope, -slope};
    }
    case PreferenceKind::nca_pair: {
      const float chosen = beta * w;
      const float rejected = beta * l;
      return {-log_sigmoid(chosen) - 0.5f * log_sigmoid(-chosen) - 0.5f * log_sigmoid(-rejected),
              beta * (0.5f * sigmoid(chosen) - sigmoid(-chosen)), 0.5f * beta * sigmoid(rejected)};
    }
    case PreferenceKind::sppo_hard: {
      const float of_chosen = w - 0.5f / beta;
      const float of_rejected = l + 0.5f / beta;
      return {of_chosen * of_chosen + of_rejected * of_rejected, 2.0f * of_chosen, 2.0f * of_rejected};
    }
    case PreferenceKind::apo_zero: {
      const float chosen = sigmoid(-beta * w);
      const float rejected = sigmoid(beta * l);
      return {chosen + rejected, -beta * chosen * sigmoid(beta * w), beta * rejected * sigmoid(-beta * l)};
    }
    default: {
      const float chosen = sigmoid(beta * w);
      const float pair = sigmoid(-d);
      const float slope = beta * pair * sigmoid(d);
      return {chosen + pair, beta * chosen * sigmoid(-beta * w) - slope, slope};
    }
  }
}

}  // namespace
}  // namespace rlhf_fast
