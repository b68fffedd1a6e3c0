// Losses of policy and critic: loss, figures and gradient in one launch. A token's loss depends on its own numbers and
// at most its sequence's, so there are two kernels of each: a flat one that knows no sequences, and one with a block
// per sequence. Either way the last block to finish adds up what the others left.
#pragma once

#include "../losses.h"
#include "device.cuh"

namespace rlhf_fast::cuda {

constexpr int LOSS_THREADS = 256;
constexpr int LOSS_TILE = LOSS_THREADS * 4;
// of the flat kernels: a number of the algorithm, not of the device, as the order of the sums follows from it
constexpr int FLAT_BLOCKS = 1024;

struct Tokens {
  Sequences sequences;
  int64_t count;  // of tokens, masked or not
};

// The grids.
inline unsigned flat_blocks(const Tokens& tokens) {
  const int64_t wanted = (tokens.count + LOSS_TILE - 1) / LOSS_TILE;
  return static_cast<unsigned>(wanted < 1 ? 1 : wanted < FLAT_BLOCKS ? wanted : FLAT_BLOCKS);
}

inline unsigned sequence_blocks(const Tokens& tokens) {
  return static_cast<unsigned>(tokens.sequences.count > 1 ? tokens.sequences.count : 1);
}

// Whether the flat kernel can do it. With packed advantages per sequence it would have to search for each token's.
inline bool is_flat(const Tokens& tokens, const PolicyInputs& in, const Reduction& reduction) {
  return in.level == Level::token && reduction.aggregate != Aggregate::sequence &&
         !(in.per_sequence && tokens.sequences.offsets);
}

// Where blocks leave their totals.
struct Partials {
  double* values;
  unsigned* counter;
};

// The tokens of a block: tiles from `begin` on in steps of `step`.
struct Walk {
  int64_t begin;
  int64_t end;
  int64_t step;
};

__device__ __forceinline__ Walk flat_walk(const Tokens& tokens) {
  return {static_cast<int64_t>(blockIdx.x) * LOSS_TILE, tokens.count, static_cast<int64_t>(gridDim.x) * LOSS_TILE};
}

// A grid has at least one block, a batch may have no sequence.
__device__ __forceinline__ Walk sequence_walk(const Sequences& sequences) {
  const int64_t sequence = blockIdx.x;
  if (sequence >= sequences.count) {
    return {0, 0, LOSS_TILE};
  }
  if (sequences.offsets) {
    return {sequences.offsets[sequence], sequences.offsets[sequence + 1], LOSS_TILE};
  }
  return {sequence * sequences.length, (sequence + 1) * sequences.length, LOSS_TILE};
}

// What one thread has found.
template <int FIELDS>
struct ThreadTotals {
  double loss;
  float sums[FIELDS];  // sums[0], the loss, stays 0
};

// The same in double throughout.
template <int FIELDS>
struct Widened {
  double x[FIELDS];
};

template <int FIELDS>
__device__ __forceinline__ Widened<FIELDS> widened(const ThreadTotals<FIELDS>& mine) {
  Widened<FIELDS> all;
#pragma unroll
  for (int field = 0; field < FIELDS; field++) {
    all.x[field] = field == 0 ? mine.loss : mine.sums[field];
  }
  return all;
}

// What the sum of the token losses is divided by.
__device__ __forceinline__ double denominator_of(const Reduction& reduction, double tokens, double sequences,
                                                 int64_t positions) {
  if (reduction.denominator) {
    return *reduction.denominator;
  }
  if (reduction.divisor != 0.0f) {
    return reduction.divisor;
  }
  const double local = reduction.aggregate == Aggregate::token      ? tokens
                       : reduction.aggregate == Aggregate::sequence ? sequences
                                                                    : static_cast<double>(positions);
  return local > 1.0 ? local : 1.0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Policy
// ---------------------------------------------------------------------------------------------------------------------

// sums over tokens, then maxima. A thread adds up its own in float, but for the loss: it comes out the same, nearly
// always to the bit, whichever kernel cuts the tokens in its way.
enum PolicySum : int {
  SUM_LOSS,
  SUM_TOKENS,
  SUM_SEQUENCES,
  SUM_LOW,
  SUM_HIGH,
  SUM_REGION,
  SUM_APPROX_KL,
  SUM_RATIO,
  SUM_KL,
  SUM_ENTROPY,
  SUM_IS_RATIO,
  SUM_GAP,
  POLICY_SUMS,
  TOP_RATIO = POLICY_SUMS,
  TOP_IS_RATIO,
  POLICY_FIELDS
};

// Four tokens as they are in memory.
struct PolicyFour {
  Four logprob;
  Four old;
  Four advantage;
  Four ref;
  Four rollout;
  Four entropy;
  FourFlags counts;
};

struct PolicyReader {
  const PolicyInputs& in;
  int64_t length;    // of padded sequences
  float advantage;   // of the whole sequence, in a kernel with a block per sequence
  bool by_sequence;  // that kernel
  bool aligned;

  __device__ __forceinline__ Four advantages(int64_t at, int64_t end) const {
    if (!in.per_sequence) {
      return load_four(in.advantages, at, end, aligned);
    }
    if (by_sequence) {
      return {{advantage, advantage, advantage, advantage}};
    }
    Four four{};
    int64_t row = at / length;
    int64_t column = at - row * length;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      four.x[i] = at + i < end ? in.advantages[row] : 0.0f;
      column++;
      row += column == length;
      column = column == length ? 0 : column;
    }
    return four;
  }

  __device__ __forceinline__ PolicyFour load(int64_t at, int64_t end) const {
    PolicyFour four;
    four.logprob = load_four(in.logprobs, at, end, aligned);
    four.old = in.old_logprobs ? load_four(in.old_logprobs, at, end, aligned) : four.logprob;
    four.advantage = advantages(at, end);
    four.ref = load_four(in.ref_logprobs, at, end, aligned);
    four.rollout = load_four(in.rollout_logprobs, at, end, aligned);
    four.entropy = load_four(in.entropy, at, end, aligned);
    four.counts = load_mask(in.mask, at, end, aligned);
    return four;
  }
};

__device__ __forceinline__ PolicyReader policy_reader(const PolicyInputs& in, const PolicyResults& out,
                                                      const Walk& walk, int64_t length, bool by_sequence) {
  const bool aligned = walk.begin % 4 == 0 && is_aligned(in.logprobs, 16) && is_aligned(in.old_logprobs, 16) &&
                       (in.per_sequence || is_aligned(in.advantages, 16)) && is_aligned(in.mask, 4) &&
                       is_aligned(in.ref_logprobs, 16) && is_aligned(in.rollout_logprobs, 16) &&
                       is_aligned(in.entropy, 16) && is_aligned(out.gradient, 16) &&
                       is_aligned(out.entropy_gradient, 16);
  const bool own = by_sequence && in.per_sequence && walk.begin < walk.end;
  return {in, length, own ? in.advantages[blockIdx.x] : 0.0f, by_sequence, aligned};
}

// The ratio of what is trained to what sampled, as the rollout engine reported it.
__device__ __forceinline__ float rollout_ratio(const PolicyFour& four, int i) {
  return importance_ratio(four.old.x[i] - four.rollout.x[i]);
}

__device__ __forceinline__ float rollout_weight(const PolicyFour& four, int i, const PolicyInputs& in) {
  if (!(in.terms.is_clip < infinity())) {
    return 1.0f;
  }
  const float ratio = rollout_ratio(four, i);
  return ratio > in.terms.is_clip ? in.terms.is_clip : ratio;
}

// Add the loss and the figures of one unmasked token; returns d loss / d logprob but for a share in its sequence's
// ratio. `log_ratio` is that of the level.
__device__ __forceinline__ float policy_token(const PolicyFour& four, int i, float log_ratio, const PolicyInputs& in,
                                              float share, ThreadTotals<POLICY_FIELDS>& mine) {
  const float logprob = four.logprob.x[i];
  const float ratio = importance_ratio(log_ratio);
  const Surrogate term = surrogate(logprob, log_ratio, ratio, four.advantage.x[i], in.terms);
  const float weight = rollout_weight(four, i, in);
  float loss = weight * term.loss;
  float slope = weight * (in.level == Level::sequence ? term.direct : term.direct + term.through_ratio);
  if (in.ref_logprobs) {
    const Estimate kl = kl_estimate(four.ref.x[i] - logprob, in.terms.kl_estimator);
    mine.sums[SUM_KL] += kl.value;
    if (in.terms.kl_coef != 0.0f) {
      loss += in.terms.kl_coef * kl.value;
      slope += in.terms.kl_coef * kl.slope;
    }
  }
  if (in.entropy) {
    mine.sums[SUM_ENTROPY] += four.entropy.x[i];
    if (in.terms.entropy_coef != 0.0f) {
      loss -= in.terms.entropy_coef * four.entropy.x[i];
    }
  }
  if (in.rollout_logprobs) {
    const float ratio = rollout_ratio(four, i);
    mine.sums[SUM_IS_RATIO] += ratio;
    mine.sums[SUM_GAP] += absolute(four.old.x[i] - four.rollout.x[i]);
    mine.sums[TOP_IS_RATIO] = Max()(mine.sums[TOP_IS_RATIO], ratio);
  }
  mine.loss += share * loss;
  mine.sums[SUM_TOKENS] += 1.0f;
  mine.sums[SUM_LOW] += term.low;
  mine.sums[SUM_HIGH] += term.high;
  mine.sums[SUM_REGION] += term.low + term.high;  // never both: they want advantages of opposite sign
  mine.sums[SUM_APPROX_KL] += k3_of(logprob - four.old.x[i], exponential_minus_one(logprob - four.old.x[i]));
  mine.sums[SUM_RATIO] += ratio;
  mine.sums[TOP_RATIO] = Max()(mine.sums[TOP_RATIO], ratio);
  return slope;
}

// What a token's loss takes from its sequence.
struct SequenceTerms {
  float log_ratio;  // mean over the unmasked tokens
  float through;    // d loss / d that mean, over their number
  float share;      // of a token in the sum: 1, or 1 / their number
  bool any;         // unmasked token
};

__device__ __forceinline__ void policy_walk(const PolicyReader& reader, const Walk& walk, const SequenceTerms& sequence,
                                            const PolicyResults& out, ThreadTotals<POLICY_FIELDS>& mine) {
  const PolicyInputs& in = reader.in;
  const float entropy_slope = -in.terms.entropy_coef * sequence.share;
  for (int64_t at = walk.begin + threadIdx.x * 4; at < walk.end; at += walk.step) {
    const PolicyFour four = reader.load(at, walk.end);
    Four gradient{};
    Four entropy_gradient{};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (four.counts.x[i]) {
        const float own = four.logprob.x[i] - four.old.x[i];
        const float log_ratio = in.level == Level::token ? own : sequence.log_ratio;
        const float slope = policy_token(four, i, log_ratio, in, sequence.share, mine);
        gradient.x[i] = sequence.share * (slope + sequence.through);
        entropy_gradient.x[i] = entropy_slope;
      }
    }
    if (out.gradient) {
      store_four(out.gradient, gradient, at, walk.end, reader.aligned);
    }
    if (out.entropy_gradient) {
      store_four(out.entropy_gradient, entropy_gradient, at, walk.end, reader.aligned);
    }
  }
}

// One thread of the last block.
__device__ __forceinline__ void write_policy_results(const double (&totals)[POLICY_FIELDS], const Reduction& reduction,
                                                     int64_t positions, const PolicyResults& out) {
  const double tokens = totals[SUM_TOKENS];
  const double denominator = denominator_of(reduction, tokens, totals[SUM_SEQUENCES], positions);
  const double mean = 1.0 / (tokens > 1.0 ? tokens : 1.0);
  *out.loss = static_cast<float>(totals[SUM_LOSS] / denominator);
  out.figures[POLICY_SCALE] = static_cast<float>(1.0 / denominator);
  out.figures[CLIP_LOW] = static_cast<float>(totals[SUM_LOW] * mean);
  out.figures[CLIP_HIGH] = static_cast<float>(totals[SUM_HIGH] * mean);
  out.figures[CLIP_REGION] = static_cast<float>(totals[SUM_REGION] * mean);
  out.figures[APPROX_KL] = static_cast<float>(totals[SUM_APPROX_KL] * mean);
  out.figures[RATIO_MEAN] = static_cast<float>(totals[SUM_RATIO] * mean);
  out.figures[RATIO_MAX] = static_cast<float>(totals[TOP_RATIO]);
  out.figures[KL] = static_cast<float>(totals[SUM_KL] * mean);
  out.figures[ENTROPY] = static_cast<float>(totals[SUM_ENTROPY] * mean);
  out.figures[IS_RATIO_MEAN] = static_cast<float>(totals[SUM_IS_RATIO] * mean);
  out.figures[IS_RATIO_MAX] = static_cast<float>(totals[TOP_IS_RATIO]);
  out.figures[ROLLOUT_GAP] = static_cast<float>(totals[SUM_GAP] * mean);
}

__device__ __forceinline__ void finish_policy(const ThreadTotals<POLICY_FIELDS>& mine, const Tokens& tokens,
                                              const Reduction& reduction, const PolicyResults& out,
                                              const Partials& partials) {
  __shared__ double totals[POLICY_FIELDS];
  const bool last =
      grid_reduce<POLICY_SUMS, POLICY_FIELDS - POLICY_SUMS>(widened(mine).x, partials.values, partials.counter, totals);
  if (last && threadIdx.x == 0) {
    write_policy_results(totals, reduction, tokens.count, out);
  }
}

// level "token" and an aggregate that knows no sequences; advantages per token, or per padded sequence
__global__ void __launch_bounds__(LOSS_THREADS, 2)
    flat_policy_kernel(Tokens tokens, PolicyInputs in, Reduction reduction, PolicyResults out, Partials partials) {
  const Walk walk = flat_walk(tokens);
  const PolicyReader reader = policy_reader(in, out, walk, tokens.sequences.length, false);
  ThreadTotals<POLICY_FIELDS> mine{};
  policy_walk(reader, walk, {0.0f, 0.0f, 1.0f, true}, out, mine);
  finish_policy(mine, tokens, reduction, out, partials);
}

// The sequence's mean log-ratio, and for level "sequence" the derivative of its losses by it.
__device__ __forceinline__ SequenceTerms sequence_terms(const PolicyReader& reader, const Walk& walk, bool mean_loss) {
  const PolicyInputs& in = reader.in;
  double tokens = 0.0;
  double log_ratios = 0.0;
  for (int64_t at = walk.begin + threadIdx.x * 4; at < walk.end; at += walk.step) {
    const FourFlags counts = load_mask(in.mask, at, walk.end, reader.aligned);
    const Four logprob = load_four(in.logprobs, at, walk.end, reader.aligned);
    const Four old = in.old_logprobs ? load_four(in.old_logprobs, at, walk.end, reader.aligned) : logprob;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      tokens += counts.x[i] ? 1.0 : 0.0;
      log_ratios += counts.x[i] ? logprob.x[i] - old.x[i] : 0.0f;
    }
  }
  tokens = block_reduce(tokens, Add());
  const bool any = tokens > 0.0;
  const double mean = 1.0 / (any ? tokens : 1.0);
  SequenceTerms terms{0.0f, 0.0f, mean_loss ? static_cast<float>(mean) : 1.0f, any};
  if (in.level == Level::token) {
    return terms;
  }
  terms.log_ratio = static_cast<float>(block_reduce(log_ratios, Add()) * mean);
  if (in.level == Level::sequence) {
    double through = 0.0;
    for (int64_t at = walk.begin + threadIdx.x * 4; at < walk.end; at += walk.step) {
      const PolicyFour four = reader.load(at, walk.end);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (four.counts.x[i]) {
          const Surrogate term = surrogate(four.logprob.x[i], terms.log_ratio, importance_ratio(terms.log_ratio),
                                           four.advantage.x[i], in.terms);
          through += rollout_weight(four, i, in) * term.through_ratio;
        }
      }
    }
    terms.through = static_cast<float>(block_reduce(through, Add()) * mean);
  }
  return terms;
}

__global__ void __launch_bounds__(LOSS_THREADS, 2)
    sequence_policy_kernel(Tokens tokens, PolicyInputs in, Reduction reduction, PolicyResults out, Partials partials) {
  const Walk walk = sequence_walk(tokens.sequences);
  const PolicyReader reader = policy_reader(in, out, walk, tokens.sequences.length, true);
  const SequenceTerms sequence = sequence_terms(reader, walk, reduction.aggregate == Aggregate::sequence);
  ThreadTotals<POLICY_FIELDS> mine{};
  policy_walk(reader, walk, sequence, out, mine);
  mine.sums[SUM_SEQUENCES] = threadIdx.x == 0 && sequence.any ? 1.0f : 0.0f;
  finish_policy(mine, tokens, reduction, out, partials);
}

// ---------------------------------------------------------------------------------------------------------------------
// Critic
// ---------------------------------------------------------------------------------------------------------------------

enum ValueSum : int {
  VALUE_LOSS,
  VALUE_TOKENS,
  VALUE_SEQUENCES,
  VALUE_CLIPPED,
  VALUE_VALUES,
  VALUE_RETURNS,
  VALUE_SUMS
};

__device__ __forceinline__ bool value_alignment(const ValueInputs& in, const ValueResults& out, const Walk& walk) {
  return walk.begin % 4 == 0 && is_aligned(in.values, 16) && is_aligned(in.old_values, 16) &&
         is_aligned(in.returns, 16) && is_aligned(in.mask, 4) && is_aligned(out.gradient, 16);
}

__device__ __forceinline__ void value_walk(const ValueInputs& in, const Walk& walk, float share, bool aligned,
                                           const ValueResults& out, ThreadTotals<VALUE_SUMS>& mine) {
  for (int64_t at = walk.begin + threadIdx.x * 4; at < walk.end; at += walk.step) {
    const Four value = load_four(in.values, at, walk.end, aligned);
    const Four old = load_four(in.old_values, at, walk.end, aligned);
    const Four target = load_four(in.returns, at, walk.end, aligned);
    const FourFlags counts = load_mask(in.mask, at, walk.end, aligned);
    Four gradient{};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (counts.x[i]) {
        const ValueError error = value_error(value.x[i], old.x[i], target.x[i], in.clip);
        gradient.x[i] = share * error.slope;
        mine.loss += share * error.loss;
        mine.sums[VALUE_TOKENS] += 1.0f;
        mine.sums[VALUE_CLIPPED] += error.clipped;
        mine.sums[VALUE_VALUES] += value.x[i];
        mine.sums[VALUE_RETURNS] += target.x[i];
      }
    }
    if (out.gradient) {
      store_four(out.gradient, gradient, at, walk.end, aligned);
    }
  }
}

__device__ __forceinline__ void finish_value(const ThreadTotals<VALUE_SUMS>& mine, const Tokens& tokens,
                                             const Reduction& reduction, const ValueResults& out,
                                             const Partials& partials) {
  __shared__ double totals[VALUE_SUMS];
  if (!grid_reduce<VALUE_SUMS, 0>(widened(mine).x, partials.values, partials.counter, totals) || threadIdx.x != 0) {
    return;
  }
  const double unmasked = totals[VALUE_TOKENS];
  const double denominator = denominator_of(reduction, unmasked, totals[VALUE_SEQUENCES], tokens.count);
  const double mean = 1.0 / (unmasked > 1.0 ? unmasked : 1.0);
  *out.loss = static_cast<float>(totals[VALUE_LOSS] / denominator);
  out.figures[VALUE_SCALE] = static_cast<float>(1.0 / denominator);
  out.figures[CLIP_FRACTION] = static_cast<float>(totals[VALUE_CLIPPED] * mean);
  out.figures[VALUE_MEAN] = static_cast<float>(totals[VALUE_VALUES] * mean);
  out.figures[RETURN_MEAN] = static_cast<float>(totals[VALUE_RETURNS] * mean);
}

__global__ void __launch_bounds__(LOSS_THREADS, 2)
    flat_value_kernel(Tokens tokens, ValueInputs in, Reduction reduction, ValueResults out, Partials partials) {
  const Walk walk = flat_walk(tokens);
  ThreadTotals<VALUE_SUMS> mine{};
  value_walk(in, walk, 1.0f, value_alignment(in, out, walk), out, mine);
  finish_value(mine, tokens, reduction, out, partials);
}

// aggregate "sequence"
__global__ void __launch_bounds__(LOSS_THREADS, 2)
    sequence_value_kernel(Tokens tokens, ValueInputs in, Reduction reduction, ValueResults out, Partials partials) {
  const Walk walk = sequence_walk(tokens.sequences);
  const bool aligned = value_alignment(in, out, walk);
  int counted = 0;
  for (int64_t at = walk.begin + threadIdx.x * 4; at < walk.end; at += walk.step) {
    const FourFlags counts = load_mask(in.mask, at, walk.end, aligned);
    counted += counts.x[0] + counts.x[1] + counts.x[2] + counts.x[3];
  }
  const int unmasked = block_reduce(counted, Add());
  ThreadTotals<VALUE_SUMS> mine{};
  value_walk(in, walk, 1.0f / static_cast<float>(unmasked > 1 ? unmasked : 1), aligned, out, mine);
  mine.sums[VALUE_SEQUENCES] = threadIdx.x == 0 && unmasked > 0 ? 1.0f : 0.0f;
  finish_value(mine, tokens, reduction, out, partials);
}

// ---------------------------------------------------------------------------------------------------------------------
// The way back
// ---------------------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(LOSS_THREADS)
    scale_kernel(const float* gradient, const float* grad, const float* scale, int64_t n, float* out) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
  if (at >= n) {
    return;
  }
  const bool aligned = is_aligned(gradient, 16) && is_aligned(out, 16);
  const float factor = *grad * *scale;
  Four four = load_four(gradient, at, n, aligned);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    four.x[i] *= factor;
  }
  store_four(out, four, at, n, aligned);
}

}  // namespace rlhf_fast::cuda
