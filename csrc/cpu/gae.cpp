// Generalized advantage estimation, padded or packed, from rewards or from scores and log-probabilities. Compiled once
// per instruction set (see logprobs.cpp).
//
// The recurrence (math.h: one affine map of a carry per token) runs from the last token to the first, and each step
// waits for the one before. So it is cut into tiles: the maps of a tile are made by vector code, then ROWS sequences
// walk their carries side by side, each using the time the others wait, then vector code turns carries into results.
#include "../losses.h"
#include "ops.h"

namespace rlhf_fast::RF_ISA {
namespace {

constexpr int ROWS = 8;
constexpr int64_t TILE = 128;
constexpr int64_t PIECE = 16384;  // tokens of one step of whitening
constexpr int MAX_PARTS = 256;

// Sequences of one group; the tokens of [begin, end) are still to do.
struct Group {
  int rows;
  int64_t begin[ROWS];
  int64_t end[ROWS];
  float carry[ROWS];
};

// The maps of one tile, aligned at its end; `offset` then holds the carry that comes in from the next token.
struct Tile {
  alignas(64) float slope[ROWS][TILE];
  alignas(64) float offset[ROWS][TILE];
};

Group group_of(const Sequences& sequences, int64_t first, const float* bootstrap) {
  Group group{};
  const int64_t left = sequences.count - first;
  group.rows = left < ROWS ? static_cast<int>(left) : ROWS;
  for (int k = 0; k < group.rows; k++) {
    const int64_t row = first + k;
    group.begin[k] = sequences.offsets ? sequences.offsets[row] : row * sequences.length;
    group.end[k] = sequences.offsets ? sequences.offsets[row + 1] : group.begin[k] + sequences.length;
    group.carry[k] = bootstrap ? bootstrap[row] : 0.0f;
  }
  return group;
}

int64_t tokens_in_tile(const Group& group, int row) {
  const int64_t left = group.end[row] - group.begin[row];
  return left < TILE ? left : TILE;
}

int64_t longest(const Group& group) {
  int64_t most = 0;
  for (int k = 0; k < group.rows; k++) {
    const int64_t n = tokens_in_tile(group, k);
    most = n > most ? n : most;
  }
  return most;
}

// Selects, never multiplies by the mask: what is masked may be NaN.
__attribute__((noinline)) void make_maps(const GaeInputs& in, int64_t at, int64_t n, float* slope, float* offset) {
  const float* rewards = in.rewards + at;
  const float* values = in.values + at;
  const uint8_t* mask = in.mask + at;
  const float gamma = in.gamma;
  const float lam = in.lam;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const Affine map = gae_map(rewards[i], values[i], gamma, lam);
    const Affine identity = identity_map();
    slope[i] = mask[i] ? map.slope : identity.slope;
    offset[i] = mask[i] ? map.offset : identity.offset;
  }
}

void walk_carries(Tile& tile, int64_t first, float (&carry)[ROWS]) {
  float c[ROWS];
  for (int k = 0; k < ROWS; k++) {
    c[k] = carry[k];
  }
  for (int64_t i = TILE - 1; i >= first; i--) {
#pragma GCC unroll 8
    for (int k = 0; k < ROWS; k++) {
      const float incoming = c[k];
      c[k] = apply({tile.slope[k][i], tile.offset[k][i]}, incoming);
      tile.offset[k][i] = incoming;
    }
  }
  for (int k = 0; k < ROWS; k++) {
    carry[k] = c[k];
  }
}

__attribute__((noinline)) void write_results(const GaeInputs& in, int64_t at, int64_t n, const float* carry,
                                             float* advantages, float* returns) {
  const float* rewards = in.rewards + at;
  const float* values = in.values + at;
  const uint8_t* mask = in.mask + at;
  const float gamma = in.gamma;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    advantages[at + i] = mask[i] ? gae_advantage(rewards[i], values[i], carry[i], gamma) : 0.0f;
    returns[at + i] = mask[i] ? gae_return(rewards[i], carry[i], gamma) : 0.0f;
  }
}

// `prepare(at, n, row of the group)` makes the rewards of a tile, `done(at, n)` takes its advantages.
template <class Prepare, class Done>
void run_group(Group group, const GaeInputs& in, float* advantages, float* returns, Prepare prepare, Done done) {
  Tile tile;
  for (int64_t most = longest(group); most > 0; most = longest(group)) {
    const int64_t first = TILE - most;
    for (int k = 0; k < ROWS; k++) {
      const int64_t n = k < group.rows ? tokens_in_tile(group, k) : 0;
      // a sequence shorter than the longest ends in identity maps, which keep its carry
      for (int64_t i = first; i < TILE - n; i++) {
        tile.slope[k][i] = identity_map().slope;
        tile.offset[k][i] = identity_map().offset;
      }
      if (k < group.rows) {
        prepare(group.end[k] - n, n, k);
      }
      make_maps(in, group.end[k] - n, n, &tile.slope[k][TILE - n], &tile.offset[k][TILE - n]);
    }
    walk_carries(tile, first, group.carry);
    for (int k = 0; k < group.rows; k++) {
      const int64_t n = tokens_in_tile(group, k);
      group.end[k] -= n;
      write_results(in, group.end[k], n, &tile.offset[k][TILE - n], advantages, returns);
      done(group.end[k], n);
    }
  }
}

int worth_threads(int64_t tokens, int threads) {
  return tokens < 65536 ? 1 : threads;
}

// ---------------------------------------------------------------------------------------------------------------------
// Rewards from scores and log-probabilities
// ---------------------------------------------------------------------------------------------------------------------

template <KlEstimator ESTIMATOR>
__attribute__((noinline)) void shape_rewards(const ShapedGaeInputs& in, int64_t at, int64_t n,
                                             const ShapedGaeResults& out) {
  const float* logprobs = in.logprobs + at;
  const float* ref_logprobs = in.ref_logprobs + at;
  const uint8_t* mask = in.mask + at;
  const float kl_coef = in.kl_coef;
  float* kl = out.kl + at;
  float* rewards = out.rewards + at;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float difference = ref_logprobs[i] - logprobs[i];
    const float estimate = kl_estimate(mask[i] ? difference : 0.0f, ESTIMATOR).value;
    kl[i] = mask[i] ? estimate : 0.0f;
    rewards[i] = mask[i] ? -kl_coef * estimate : 0.0f;
  }
}

using ShapeRewards = decltype(&shape_rewards<KlEstimator::k1>);

ShapeRewards shape_rewards_by(KlEstimator estimator) {
  switch (estimator) {
    case KlEstimator::k1:
      return shape_rewards<KlEstimator::k1>;
    case KlEstimator::k2:
      return shape_rewards<KlEstimator::k2>;
    case KlEstimator::k3:
    case KlEstimator::k3_plus:  // the same value
      return shape_rewards<KlEstimator::k3>;
    default:
      return shape_rewards<KlEstimator::abs>;
  }
}

// The place of a sequence's score, or -1.
int64_t last_unmasked(const uint8_t* mask, int64_t begin, int64_t end) {
  int64_t at = end - 1;
  while (at >= begin && !mask[at]) {
    at--;
  }
  return at < begin ? -1 : at;
}

// In double: a mean far from 0 would otherwise leave no digits to the variance.
struct Moments {
  double sum;
  double squares;
  double count;
};

__attribute__((noinline)) void add_moments(const float* x, const uint8_t* mask, int64_t n, Moments& total) {
  double sum = 0.0, squares = 0.0;
  int32_t count = 0;
#pragma omp simd reduction(+ : sum, squares, count)
  for (int64_t i = 0; i < n; i++) {
    const double value = x[i];  // 0 where masked
    sum += value;
    squares += value * value;
    count += mask[i] != 0;
  }
  total.sum += sum;
  total.squares += squares;
  total.count += count;
}

// The mean in two floats, as one would shift every result by its rounding.
__attribute__((noinline)) void apply_whitening(float* x, const uint8_t* mask, int64_t n, float mean, float rest,
                                               float factor) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float whitened = ((x[i] - mean) - rest) * factor;
    x[i] = mask[i] ? whitened : 0.0f;
  }
}

void whiten(float* x, const uint8_t* mask, int64_t tokens, const Moments& moments, float eps, int threads) {
  const double count = moments.count < 1.0 ? 1.0 : moments.count;
  const double mean = moments.sum / count;
  const double variance = moments.squares / count - mean * mean;
  const float rounded = static_cast<float>(mean);
  const float rest = static_cast<float>(mean - rounded);
  const float factor = static_cast<float>(1.0 / __builtin_sqrt((variance < 0.0 ? 0.0 : variance) + eps));
#pragma omp parallel for schedule(static) num_threads(worth_threads(tokens, threads))
  for (int64_t at = 0; at < tokens; at += PIECE) {
    apply_whitening(x + at, mask + at, tokens - at < PIECE ? tokens - at : PIECE, rounded, rest, factor);
  }
}

// One group: rewards are made just before the recursion reads them, advantages summed while they are in the cache.
void run_shaped_group(const Sequences& sequences, int64_t first, const ShapedGaeInputs& in, const ShapedGaeResults& out,
                      ShapeRewards shape, Moments& moments) {
  const Group group = group_of(sequences, first, in.bootstrap);
  int64_t scored[ROWS];
  for (int k = 0; k < group.rows; k++) {
    scored[k] = last_unmasked(in.mask, group.begin[k], group.end[k]);
  }
  const auto prepare = [&](int64_t at, int64_t n, int k) {
    shape(in, at, n, out);
    if (scored[k] >= at && scored[k] < at + n) {
      out.rewards[scored[k]] += bounded_score(in.scores[first + k], in.clip);
    }
  };
  const auto done = [&](int64_t at, int64_t n) {
    if (in.whiten) {
      add_moments(out.advantages + at, in.mask + at, n, moments);
    }
  };
  run_group(group, {out.rewards, in.values, in.mask, in.bootstrap, in.gamma, in.lam}, out.advantages, out.returns,
            prepare, done);
}

}  // namespace

void gae(const Sequences& sequences, const GaeInputs& inputs, float* advantages, float* returns, int threads) {
  const auto nothing = [](auto...) {};
#pragma omp parallel for schedule(dynamic) num_threads(worth_threads(tokens_of(sequences), threads))
  for (int64_t first = 0; first < sequences.count; first += ROWS) {
    run_group(group_of(sequences, first, inputs.bootstrap), inputs, advantages, returns, nothing, nothing);
  }
}

void kl_shaped_gae(const Sequences& sequences, const ShapedGaeInputs& inputs, const ShapedGaeResults& results,
                   int threads) {
  const ShapeRewards shape = shape_rewards_by(inputs.estimator);
  const int64_t tokens = tokens_of(sequences);
  // the parts, and the order of their sums, are the same for every number of threads
  const int64_t rows_per_part = (sequences.count / (ROWS * MAX_PARTS) + 1) * ROWS;
  Moments parts[MAX_PARTS] = {};
#pragma omp parallel for schedule(dynamic) num_threads(worth_threads(tokens, threads))
  for (int64_t begin = 0; begin < sequences.count; begin += rows_per_part) {
    const int64_t end = begin + rows_per_part < sequences.count ? begin + rows_per_part : sequences.count;
    Moments moments{};
    for (int64_t first = begin; first < end; first += ROWS) {
      run_shaped_group(sequences, first, inputs, results, shape, moments);
    }
    parts[begin / rows_per_part] = moments;
  }
  if (inputs.whiten) {
    Moments total{};
    for (const Moments& part : parts) {
      total = {total.sum + part.sum, total.squares + part.squares, total.count + part.count};
    }
    whiten(results.advantages, inputs.mask, tokens, total, inputs.whiten_eps, threads);
  }
}

}  // namespace rlhf_fast::RF_ISA
