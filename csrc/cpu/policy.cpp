// Policy and value loss: loss, metrics and gradient in one pass over the tokens. Compiled once per instruction set (see
// logprobs.cpp).
//
// Rows of tokens are handed to the threads in parts that depend on the shapes alone, and what the parts sum to is
// combined in their order, in double: the results do not depend on the number of threads. Within a row blocks stay in
// the L1 cache, so each term of the loss (surrogate, KL, entropy, ...) is a loop of its own with its options known to
// the compiler, and a masked token is selected away in each: what is masked may be NaN.
#include "../losses.h"
#include "blocks.h"

namespace rlhf_fast::RF_ISA {
namespace {

constexpr int64_t BLOCK = 512;
constexpr int MAX_PARTS = 256;
constexpr int64_t PART_TOKENS = 8192;

struct Range {
  int64_t begin;
  int64_t end;
};

// The rows that threads share: sequences, or the pieces of a lone one.
struct Rows {
  Sequences sequences;
  int64_t tokens;
  int64_t rows_per_part;
  int parts;
  bool pieces;
};

Rows rows_of(const Sequences& sequences, bool by_sequence) {
  const bool pieces = sequences.count == 1 && !by_sequence;
  Rows rows{sequences, tokens_of(sequences), 0, 0, pieces};
  if (pieces) {
    rows.sequences = {(rows.tokens + PART_TOKENS - 1) / PART_TOKENS, PART_TOKENS, nullptr};
  }
  const int64_t count = rows.sequences.count;
  const int64_t wanted = 1 + smaller(smaller(rows.tokens / PART_TOKENS, MAX_PARTS - 1), count);
  rows.rows_per_part = 1 + count / wanted;
  rows.parts = static_cast<int>((count + rows.rows_per_part - 1) / rows.rows_per_part);
  return rows;
}

Range row_range(const Rows& rows, int64_t row) {
  if (rows.sequences.offsets) {
    return {rows.sequences.offsets[row], rows.sequences.offsets[row + 1]};
  }
  const int64_t begin = row * rows.sequences.length;
  return {begin, smaller(begin + rows.sequences.length, rows.tokens)};
}

int worth_threads(const Rows& rows, int threads) {
  return rows.tokens < 32768 ? 1 : threads;
}

RF_LOOP uint16_t block_count(const uint8_t* mask, int64_t n) {
  uint16_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; i++) {
    count += mask[i] != 0;
  }
  return count;
}

int64_t count_tokens(const uint8_t* mask, Range range) {
  int64_t count = 0;
  for (int64_t at = range.begin; at < range.end; at += BLOCK) {
    count += block_count(mask + at, smaller(BLOCK, range.end - at));
  }
  return count;
}

// In the width of the numbers it selects: compiled with bytes, a loop takes four vectors of floats for one of the mask
// and shuffles lanes about, for twice the time.
RF_LOOP void widen_mask(const uint8_t* mask, int64_t n, int32_t* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    out[i] = mask[i];
  }
}

void zero(float* out, Range range) {
  if (out) {
    __builtin_memset(out + range.begin, 0, (range.end - range.begin) * sizeof(float));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// What the sums of a loss become
// ---------------------------------------------------------------------------------------------------------------------

template <int FIGURES>
struct Sums {
  double loss;
  double tokens;
  double sequences;  // those with tokens
  double figures[FIGURES];
};

// The factor of a row's tokens in the sum.
float weight_of(const Reduction& reduction, int64_t count) {
  return reduction.aggregate == Aggregate::sequence ? 1.0f / static_cast<float>(count) : 1.0f;
}

template <int FIGURES>
double denominator_of(const Reduction& reduction, const Sums<FIGURES>& sums, int64_t tokens) {
  if (reduction.denominator || reduction.divisor != 0.0f) {
    return reduction.denominator ? *reduction.denominator : reduction.divisor;
  }
  const double local = reduction.aggregate == Aggregate::token      ? sums.tokens
                       : reduction.aggregate == Aggregate::sequence ? sums.sequences
                                                                    : static_cast<double>(tokens);
  return local < 1.0 ? 1.0 : local;
}

// Figure 0 of every loss is its scale; the others are means over tokens, but for those that `is_max` names.
template <int FIGURES, class IsMax>
Sums<FIGURES> combine(const Sums<FIGURES>* parts, int count, IsMax is_max) {
  Sums<FIGURES> total{};
  for (int part = 0; part < count; part++) {
    total.loss += parts[part].loss;
    total.tokens += parts[part].tokens;
    total.sequences += parts[part].sequences;
    for (int k = 1; k < FIGURES; k++) {
      const double x = parts[part].figures[k];
      total.figures[k] = !is_max(k) ? total.figures[k] + x : x > total.figures[k] ? x : total.figures[k];
    }
  }
  return total;
}

template <int FIGURES, class IsMax>
void write_sums(const Sums<FIGURES>& sums, double denominator, IsMax is_max, float* loss, float* figures) {
  *loss = static_cast<float>(sums.loss / denominator);
  figures[0] = static_cast<float>(1.0 / denominator);
  const double tokens = sums.tokens < 1.0 ? 1.0 : sums.tokens;
  for (int k = 1; k < FIGURES; k++) {
    figures[k] = static_cast<float>(is_max(k) ? sums.figures[k] : sums.figures[k] / tokens);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Policy loss
// ---------------------------------------------------------------------------------------------------------------------

using PolicySums = Sums<POLICY_FIGURES>;

bool is_policy_max(int figure) {
  return figure == RATIO_MAX || figure == IS_RATIO_MAX;
}

// A block of tokens: their inputs, what earlier loops made of them, and where the gradient goes.
struct PolicyBlock {
  const float* logprobs;
  const float* old_logprobs;
  const float* advantages;
  const int32_t* mask;
  const float* importance;  // truncated ratio to the rollout policy, of each token
  float* gradient;
  float* through_mean;  // instead of `gradient`, what passes through the mean log-ratio of the sequence
  int64_t n;
  float mean_log_ratio;  // level sequence, and sequence_token
  float weight;
};

struct Through {
  bool sequence;  // the ratio is the sequence's
  bool mean;      // so is its gradient
  bool importance;
};

RF_LOOP double sum_of(const float* x, int64_t n) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) {
    sum += x[i];
  }
  return sum;
}

RF_LOOP double sum_log_ratios(const float* logprobs, const float* old_logprobs, const uint8_t* mask, int64_t n) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) {
    const float log_ratio = logprobs[i] - old_logprobs[i];
    sum += mask[i] ? log_ratio : 0.0f;
  }
  return sum;
}

// A masked token has log-ratio and advantage 0, and with them loss, slope and approximate KL.
template <PolicyKind KIND, bool SEQUENCE, bool MEAN, bool IMPORTANCE>
RF_LOOP void surrogate_loop(const PolicyBlock& block, const PolicyTerms& given, PolicySums& sums) {
  PolicyTerms terms = given;
  terms.kind = KIND;
  const PolicyBlock b = block;
  float loss = 0.0f, low = 0.0f, high = 0.0f, approx_kl = 0.0f, ratios = 0.0f, ratio_max = 0.0f;
#pragma omp simd reduction(+ : loss, low, high, approx_kl, ratios) reduction(max : ratio_max)
  for (int64_t i = 0; i < b.n; i++) {
    const bool keep = b.mask[i] != 0;
    const float new_logprob = b.logprobs[i];
    const float difference = new_logprob - b.old_logprobs[i];
    const float given_advantage = b.advantages[i];
    const float logprob = keep ? new_logprob : 0.0f;
    const float own = keep ? difference : 0.0f;
    const float advantage = keep ? given_advantage : 0.0f;
    const float log_ratio = SEQUENCE ? b.mean_log_ratio : own;
    const float level_ratio = importance_ratio(log_ratio);
    const Surrogate s = surrogate(logprob, log_ratio, level_ratio, advantage, terms);
    const float factor = IMPORTANCE ? b.importance[i] * b.weight : b.weight;
    loss += IMPORTANCE ? s.loss * b.importance[i] : s.loss;
    const float slope = factor * (MEAN ? s.direct : s.through_ratio + s.direct);
    b.gradient[i] = keep ? slope : 0.0f;
    if (MEAN) {
      b.through_mean[i] = keep ? factor * s.through_ratio : 0.0f;
    }
    low += s.low;
    high += s.high;
    // a mean over tokens: the digits that k3_of saves near 0 are not worth a tenth of this loop
    approx_kl += exponential_minus_one(own) - own;
    const float ratio = keep ? level_ratio : 0.0f;
    ratios += ratio;
    ratio_max = ratio > ratio_max ? ratio : ratio_max;
  }
  sums.loss += static_cast<double>(loss) * b.weight;
  sums.figures[CLIP_LOW] += low;
  sums.figures[CLIP_HIGH] += high;
  sums.figures[APPROX_KL] += approx_kl;
  sums.figures[RATIO_MEAN] += ratios;
  sums.figures[RATIO_MAX] = ratio_max > sums.figures[RATIO_MAX] ? ratio_max : sums.figures[RATIO_MAX];
}

// min(pi_old / pi_rollout, bound) of each token, and the metrics of that ratio before its truncation.
RF_LOOP void importance_loop(const float* old_logprobs, const float* rollout_logprobs, const int32_t* mask, int64_t n,
                             float bound, float* out, PolicySums& sums) {
  float ratios = 0.0f, gap = 0.0f, ratio_max = 0.0f;
#pragma omp simd reduction(+ : ratios, gap) reduction(max : ratio_max)
  for (int64_t i = 0; i < n; i++) {
    const bool keep = mask[i] != 0;
    const float difference = old_logprobs[i] - rollout_logprobs[i];
    const float log_ratio = keep ? difference : 0.0f;
    const float ratio = importance_ratio(log_ratio);
    out[i] = ratio > bound ? bound : ratio;
    const float kept = keep ? ratio : 0.0f;
    ratios += kept;
    gap += absolute(log_ratio);
    ratio_max = kept > ratio_max ? kept : ratio_max;
  }
  sums.figures[IS_RATIO_MEAN] += ratios;
  sums.figures[ROLLOUT_GAP] += gap;
  sums.figures[IS_RATIO_MAX] = ratio_max > sums.figures[IS_RATIO_MAX] ? ratio_max : sums.figures[IS_RATIO_MAX];
}

// Adds kl_coef * KL to loss and gradient.
template <KlEstimator ESTIMATOR>
RF_LOOP void kl_loop(const PolicyBlock& block, const float* ref_logprobs, float coef, PolicySums& sums) {
  const PolicyBlock b = block;
  const float factor = coef * b.weight;
  float kl = 0.0f;
#pragma omp simd reduction(+ : kl)
  for (int64_t i = 0; i < b.n; i++) {
    const bool keep = b.mask[i] != 0;
    const float difference = ref_logprobs[i] - b.logprobs[i];
    const Estimate estimate = kl_estimate(keep ? difference : 0.0f, ESTIMATOR);
    kl += keep ? estimate.value : 0.0f;
    const float slope = factor * estimate.slope;
    b.gradient[i] += keep ? slope : 0.0f;
  }
  sums.loss += static_cast<double>(kl) * factor;
  sums.figures[KL] += kl;
}

// A KL that is only measured: a coefficient of 0 must not make 0 * inf of it.
template <KlEstimator ESTIMATOR>
RF_LOOP void kl_metric_loop(const PolicyBlock& block, const float* ref_logprobs, PolicySums& sums) {
  const PolicyBlock b = block;
  float kl = 0.0f;
#pragma omp simd reduction(+ : kl)
  for (int64_t i = 0; i < b.n; i++) {
    const float difference = ref_logprobs[i] - b.logprobs[i];
    const Estimate estimate = kl_estimate(b.mask[i] ? difference : 0.0f, ESTIMATOR);
    kl += b.mask[i] ? estimate.value : 0.0f;
  }
  sums.figures[KL] += kl;
}

RF_LOOP float entropy_loop(const float* entropy, const int32_t* mask, int64_t n, float slope, float* gradient) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) {
    const float x = entropy[i];
    sum += mask[i] ? x : 0.0f;
    gradient[i] = mask[i] ? slope : 0.0f;
  }
  return sum;
}

RF_LOOP void spread(const uint8_t* mask, int64_t n, float share, float* gradient) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    gradient[i] += mask[i] ? share : 0.0f;
  }
}

using SurrogateLoop = void (*)(const PolicyBlock&, const PolicyTerms&, PolicySums&);

template <PolicyKind KIND>
SurrogateLoop surrogate_loop_of(const Through& through) {
  if (through.mean) {
    return through.importance ? surrogate_loop<KIND, true, true, true> : surrogate_loop<KIND, true, true, false>;
  }
  if (through.sequence) {
    return through.importance ? surrogate_loop<KIND, true, false, true> : surrogate_loop<KIND, true, false, false>;
  }
  return through.importance ? surrogate_loop<KIND, false, false, true> : surrogate_loop<KIND, false, false, false>;
}

SurrogateLoop surrogate_loop_of(PolicyKind kind, const Through& through) {
  switch (kind) {
    case PolicyKind::clip:
      return surrogate_loop_of<PolicyKind::clip>(through);
    case PolicyKind::cispo:
      return surrogate_loop_of<PolicyKind::cispo>(through);
    default:
      return surrogate_loop_of<PolicyKind::reinforce>(through);
  }
}

template <KlEstimator ESTIMATOR>
void add_kl(const PolicyBlock& block, const float* ref_logprobs, float coef, PolicySums& sums) {
  if (coef != 0.0f) {
    kl_loop<ESTIMATOR>(block, ref_logprobs, coef, sums);
  } else {
    kl_metric_loop<ESTIMATOR>(block, ref_logprobs, sums);
  }
}

using KlLoop = decltype(&add_kl<KlEstimator::k1>);

KlLoop kl_loop_of(KlEstimator estimator) {
  switch (estimator) {
    case KlEstimator::k1:
      return add_kl<KlEstimator::k1>;
    case KlEstimator::k2:
      return add_kl<KlEstimator::k2>;
    case KlEstimator::k3:
      return add_kl<KlEstimator::k3>;
    case KlEstimator::k3_plus:
      return add_kl<KlEstimator::k3_plus>;
    default:
      return add_kl<KlEstimator::abs>;
  }
}

// What is the same for every row of a call.
struct PolicyCall {
  PolicyInputs in;
  Reduction reduction;
  PolicyResults out;
  Through through;
  SurrogateLoop surrogate;
  KlLoop kl;
};

PolicyCall policy_call(PolicyInputs in, const Reduction& reduction, const PolicyResults& out) {
  in.old_logprobs = in.old_logprobs ? in.old_logprobs : in.logprobs;
  const bool importance = in.rollout_logprobs && in.terms.is_clip < infinity();
  const Through through{in.level != Level::token, in.level == Level::sequence, importance};
  return {in, reduction, out, through, surrogate_loop_of(in.terms.kind, through), kl_loop_of(in.terms.kl_estimator)};
}

double mean_log_ratio(const PolicyInputs& in, Range range, int64_t count) {
  double sum = 0.0;
  for (int64_t at = range.begin; at < range.end; at += BLOCK) {
    sum += sum_log_ratios(in.logprobs + at, in.old_logprobs + at, in.mask + at, smaller(BLOCK, range.end - at));
  }
  return sum / static_cast<double>(count);
}

// One block, each term of the loss after the other. Returns what passes through the mean log-ratio.
double run_block(const PolicyCall& call, PolicyBlock& block, int64_t at, PolicySums& sums) {
  const PolicyInputs& in = call.in;
  alignas(64) int32_t mask[BLOCK];
  alignas(64) float importance[BLOCK], through_mean[BLOCK], unwanted[BLOCK];
  widen_mask(in.mask + at, block.n, mask);
  block.logprobs = in.logprobs + at;
  block.old_logprobs = in.old_logprobs + at;
  block.advantages = in.per_sequence ? block.advantages : in.advantages + at;
  block.mask = mask;
  block.importance = importance;
  block.gradient = call.out.gradient ? call.out.gradient + at : unwanted;
  block.through_mean = through_mean;
  if (in.rollout_logprobs) {
    importance_loop(block.old_logprobs, in.rollout_logprobs + at, block.mask, block.n, in.terms.is_clip, importance,
                    sums);
  }
  call.surrogate(block, in.terms, sums);
  if (in.ref_logprobs) {
    call.kl(block, in.ref_logprobs + at, in.terms.kl_coef, sums);
  }
  if (in.entropy) {
    const float slope = -in.terms.entropy_coef * block.weight;
    float* gradient = call.out.entropy_gradient ? call.out.entropy_gradient + at : unwanted;
    const float entropy = entropy_loop(in.entropy + at, block.mask, block.n, slope, gradient);
    sums.loss += in.terms.entropy_coef != 0.0f ? static_cast<double>(entropy) * slope : 0.0;
    sums.figures[ENTROPY] += entropy;
  }
  return call.through.mean ? sum_of(through_mean, block.n) : 0.0;
}

void run_row(const PolicyCall& call, int64_t sequence, Range range, PolicySums& sums) {
  const PolicyInputs& in = call.in;
  const int64_t count = count_tokens(in.mask, range);
  if (count == 0) {
    zero(call.out.gradient, range);
    zero(call.out.entropy_gradient, range);
    return;
  }
  sums.tokens += static_cast<double>(count);
  sums.sequences += 1.0;
  alignas(64) float advantages[BLOCK];
  PolicyBlock block{};
  block.advantages = advantages;
  block.weight = weight_of(call.reduction, count);
  block.mean_log_ratio = call.through.sequence ? static_cast<float>(mean_log_ratio(in, range, count)) : 0.0f;
  for (int64_t i = 0; in.per_sequence && i < smaller(BLOCK, range.end - range.begin); i++) {
    advantages[i] = in.advantages[sequence];
  }
  double through_mean = 0.0;
  for (int64_t at = range.begin; at < range.end; at += BLOCK) {
    block.n = smaller(BLOCK, range.end - at);
    through_mean += run_block(call, block, at, sums);
  }
  if (call.through.mean && call.out.gradient) {
    // d mean / d logprob is 1 / count, on every unmasked token
    spread(in.mask + range.begin, range.end - range.begin,
           static_cast<float>(through_mean / static_cast<double>(count)), call.out.gradient + range.begin);
  }
}

void finish(PolicySums& sums) {
  double* figures = sums.figures;
  figures[CLIP_REGION] = figures[CLIP_LOW] + figures[CLIP_HIGH];  // never both: they want advantages of opposite sign
  // comparisons pass over NaN, sums do not
  figures[RATIO_MAX] = figures[RATIO_MEAN] == figures[RATIO_MEAN] ? figures[RATIO_MAX] : figures[RATIO_MEAN];
  figures[IS_RATIO_MAX] =
      figures[IS_RATIO_MEAN] == figures[IS_RATIO_MEAN] ? figures[IS_RATIO_MAX] : figures[IS_RATIO_MEAN];
}

}  // namespace

void policy_loss(const Sequences& sequences, const PolicyInputs& inputs, const Reduction& reduction,
                 const PolicyResults& results, int threads) {
  const PolicyCall call = policy_call(inputs, reduction, results);
  const Rows rows = rows_of(sequences, call.through.sequence || reduction.aggregate == Aggregate::sequence);
  PolicySums parts[MAX_PARTS];
#pragma omp parallel for schedule(dynamic) num_threads(worth_threads(rows, threads))
  for (int part = 0; part < rows.parts; part++) {
    PolicySums sums{};
    const int64_t begin = part * rows.rows_per_part;
    const int64_t end = smaller(begin + rows.rows_per_part, rows.sequences.count);
    for (int64_t row = begin; row < end; row++) {
      run_row(call, rows.pieces ? 0 : row, row_range(rows, row), sums);
    }
    parts[part] = sums;
  }
  PolicySums total = combine(parts, rows.parts, is_policy_max);
  finish(total);
  write_sums(total, denominator_of(reduction, total, rows.tokens), is_policy_max, results.loss, results.figures);
}

// ---------------------------------------------------------------------------------------------------------------------
// Value loss
// ---------------------------------------------------------------------------------------------------------------------

namespace {

using ValueSums = Sums<VALUE_FIGURES>;

bool is_value_max(int) {
  return false;
}

RF_LOOP void value_loop(const ValueInputs& in, int64_t at, int64_t n, float weight, float* gradient, ValueSums& sums) {
  const float* values = in.values + at;
  const float* old_values = in.old_values + at;
  const float* returns = in.returns + at;
  alignas(64) int32_t mask[BLOCK];
  widen_mask(in.mask + at, n, mask);
  const float clip = in.clip;
  float loss = 0.0f, clipped = 0.0f, value_sum = 0.0f, return_sum = 0.0f;
#pragma omp simd reduction(+ : loss, clipped, value_sum, return_sum)
  for (int64_t i = 0; i < n; i++) {
    const bool keep = mask[i] != 0;
    const float given[3] = {values[i], old_values[i], returns[i]};
    const float value = keep ? given[0] : 0.0f;
    const float target = keep ? given[2] : 0.0f;
    const ValueError error = value_error(value, keep ? given[1] : 0.0f, target, clip);
    loss += error.loss;
    clipped += error.clipped;
    value_sum += value;
    return_sum += target;
    gradient[i] = keep ? weight * error.slope : 0.0f;
  }
  sums.loss += static_cast<double>(loss) * weight;
  sums.figures[CLIP_FRACTION] += clipped;
  sums.figures[VALUE_MEAN] += value_sum;
  sums.figures[RETURN_MEAN] += return_sum;
}

void run_value_row(const ValueInputs& in, const Reduction& reduction, float* gradient, Range range, ValueSums& sums) {
  const int64_t count = count_tokens(in.mask, range);
  if (count == 0) {
    zero(gradient, range);
    return;
  }
  alignas(64) float unwanted[BLOCK];
  sums.tokens += static_cast<double>(count);
  sums.sequences += 1.0;
  for (int64_t at = range.begin; at < range.end; at += BLOCK) {
    value_loop(in, at, smaller(BLOCK, range.end - at), weight_of(reduction, count), gradient ? gradient + at : unwanted,
               sums);
  }
}

}  // namespace

void value_loss(const Sequences& sequences, const ValueInputs& inputs, const Reduction& reduction,
                const ValueResults& results, int threads) {
  ValueInputs in = inputs;
  in.old_values = in.old_values ? in.old_values : in.returns;
  const Rows rows = rows_of(sequences, reduction.aggregate == Aggregate::sequence);
  ValueSums parts[MAX_PARTS];
#pragma omp parallel for schedule(dynamic) num_threads(worth_threads(rows, threads))
  for (int part = 0; part < rows.parts; part++) {
    ValueSums sums{};
    const int64_t begin = part * rows.rows_per_part;
    const int64_t end = smaller(begin + rows.rows_per_part, rows.sequences.count);
    for (int64_t row = begin; row < end; row++) {
      run_value_row(in, reduction, results.gradient, row_range(rows, row), sums);
    }
    parts[part] = sums;
  }
  const ValueSums total = combine(parts, rows.parts, is_value_max);
  write_sums(total, denominator_of(reduction, total, rows.tokens), is_value_max, results.loss, results.figures);
}

// ---------------------------------------------------------------------------------------------------------------------
// The backward pass of both
// ---------------------------------------------------------------------------------------------------------------------

void scale(const float* x, int64_t n, float factor, float* out, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(n < 65536 ? 1 : threads)
  for (int64_t i = 0; i < n; i++) {
    out[i] = x[i] * factor;
  }
}

}  // namespace rlhf_fast::RF_ISA
