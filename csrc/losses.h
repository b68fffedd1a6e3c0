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

// e^d - 1 - d from d and e^d - 1. Near 0, where the three cancel, by its series.
//
// Here and below what costs something is computed first and selected afterwards: within a ?: the compiler makes a copy
// of it for each branch, and a loop pays for all of them.
RF_HD float k3_of(float d, float exponential_minus_one_of_d) {
  float p = 2.4801587e-5f;  // 1 / 8!
  p = fused(p, d, 1.9841270e-4f);
  p = fused(p, d, 1.3888889e-3f);
  p = fused(p, d, 8.3333333e-3f);
  p = fused(p, d, 4.1666667e-2f);
  p = fused(p, d, 1.6666667e-1f);
  p = fused(p, d, 0.5f);
  const float series = p * d * d;
  const float difference = exponential_minus_one_of_d - d;
  return absolute(d) < 0.5f ? series : difference;
}

struct Estimate {
  float value;
  float slope;  // d value / d logprob
};

RF_HD Estimate kl_estimate(float d, KlEstimator estimator) {
  const float minus_one = exponential_minus_one(d);
  switch (estimator) {
    case KlEstimator::k1:
      return {-d, 1.0f};
    case KlEstimator::k2:
      return {0.5f * d * d, -d};
    case KlEstimator::k3:
      return {k3_of(d, minus_one), -minus_one};
    case KlEstimator::k3_plus:
      return {k3_of(d, minus_one), -d};
    default:
      return {absolute(d), d > 0.0f ? -1.0f : d < 0.0f ? 1.0f : 0.0f};
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Rewards (kernels/advantages)
// ---------------------------------------------------------------------------------------------------------------------

RF_HD float bounded_score(float score, float clip) {
  return score < -clip ? -clip : score > clip ? clip : score;
}

// ---------------------------------------------------------------------------------------------------------------------
// Policy loss (kernels/policy)
// ---------------------------------------------------------------------------------------------------------------------

// beyond it exp overflows a float, and a clipped token's gradient would be 0 * inf
constexpr float MAX_LOG_RATIO = 80.0f;
constexpr float MAX_RATIO = 5.5406224e34f;  // its exponential

// Bounded after the exponential, which the KL of the same log-ratio then shares.
RF_HD float importance_ratio(float log_ratio) {
  const float ratio = exponential(log_ratio);
  return log_ratio > MAX_LOG_RATIO ? MAX_RATIO : ratio;
}

struct Surrogate {
  float loss;
  float through_ratio;  // d loss / d log-ratio
  float direct;         // d loss / d logprob beside the ratio
  float low;            // 1 if clipped from below, else 0
  float high;           // the same from above
};

// `log_ratio` and `ratio`, its importance_ratio, are those of the token or of its sequence, as the level has it. Here
// and below conditions choose between two numbers and nothing else: combined with && and ||, or kept as flags, they
// cost the compiler its vectors.
RF_HD Surrogate clipped_surrogate(float log_ratio, float ratio, float advantage, const PolicyTerms& terms) {
  const float from_below = ratio < terms.lower ? terms.lower : ratio;
  const float bounded = from_below > terms.upper ? terms.upper : from_below;
  const float unclipped = ratio * advantage;
  const float clipped = bounded * advantage;
  const float loss = -(clipped < unclipped ? clipped : unclipped);
  const float slope = clipped < unclipped ? 0.0f : -unclipped;
  const float bound = advantage < 0.0f ? -terms.dual_clip * advantage : infinity();
  const float follows = loss > bound ? 0.0f : slope;
  const float if_bad = advantage < 0.0f ? 1.0f : 0.0f;
  const float if_good = advantage > 0.0f ? 1.0f : 0.0f;
  return {loss > bound ? bound : loss, log_ratio > MAX_LOG_RATIO ? 0.0f : follows, 0.0f,
          ratio < terms.lower ? if_bad : 0.0f, ratio > terms.upper ? if_good : 0.0f};
}

RF_HD Surrogate surrogate(float logprob, float log_ratio, float ratio, float advantage, const PolicyTerms& terms) {
  if (terms.kind == PolicyKind::clip) {
    return clipped_surrogate(log_ratio, ratio, advantage, terms);
  }
  if (terms.kind == PolicyKind::cispo) {
    const float weight = (ratio > terms.upper ? terms.upper : ratio) * advantage;
    const float if_good = advantage > 0.0f ? 1.0f : 0.0f;
    return {-weight * logprob, 0.0f, -weight, 0.0f, ratio > terms.upper ? if_good : 0.0f};
  }
  return {-advantage * logprob, 0.0f, -advantage, 0.0f, 0.0f};
}

// ---------------------------------------------------------------------------------------------------------------------
// Value loss (kernels/policy)
// ---------------------------------------------------------------------------------------------------------------------

struct ValueError {
  float loss;
  float slope;    // d loss / d value
  float clipped;  // 1 if the clipped error counts, else 0
};

// Without a clip (infinity) old_value may be any number.
RF_HD ValueError value_error(float value, float old_value, float target, float clip) {
  const float error = value - target;
  const float moved = value - old_value;
  // as a clamp of the difference: min and max of old +- clip would round twice
  const float from_below = moved < -clip ? -clip : moved;
  const float bounded = from_below > clip ? clip : from_below;
  // a value that is not clipped keeps its error, which old + bounded - target would round
  const float clipped_error = bounded == moved ? error : old_value + bounded - target;
  const float square = error * error;
  const float clipped_square = clipped_error * clipped_error;
  const float larger = clipped_square <= square ? square : clipped_square;  // NaN if either is
  return {0.5f * larger, clipped_square > square ? 0.0f : error, clipped_square > square ? 1.0f : 0.0f};
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
