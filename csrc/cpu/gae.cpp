// Generalized advantage estimation, padded or packed. Compiled once per instruction set (see logprobs.cpp).
//
// The recurrence runs from the last token to the first, one dependent multiply-add per token. Walking several sequences
// side by side keeps the processor busy while each waits for its own.
#include "../math.h"
#include "ops.h"

namespace rlhf_fast::RF_ISA {
namespace {

constexpr int SIDE_BY_SIDE = 4;

struct Span {
  int64_t begin;
  int64_t end;
};

Span span_of(const Sequences& sequences, int64_t index) {
  if (sequences.offsets) {
    return {sequences.offsets[index], sequences.offsets[index + 1]};
  }
  return {index * sequences.length, (index + 1) * sequences.length};
}

// One token, whose carry comes from the next unmasked one. Selects, never multiplies by the mask: masked input may be
// NaN.
RF_HD void step(const GaeInputs& in, int64_t at, float& carry, float* advantages, float* returns) {
  const bool counts = in.mask[at];
  const float reward = in.rewards[at];
  const float value = in.values[at];
  advantages[at] = counts ? gae_advantage(reward, value, carry, in.gamma) : 0.0f;
  returns[at] = counts ? gae_return(reward, carry, in.gamma) : 0.0f;
  carry = counts ? apply(gae_map(reward, value, in.gamma, in.lam), carry) : carry;
}

void group(const Sequences& sequences, int64_t first, const GaeInputs& in, float* advantages, float* returns) {
  const int64_t left = sequences.count - first;
  const int width = left < SIDE_BY_SIDE ? static_cast<int>(left) : SIDE_BY_SIDE;
  int64_t end[SIDE_BY_SIDE];
  int64_t begin[SIDE_BY_SIDE];
  float carry[SIDE_BY_SIDE];
  int64_t shared = width == SIDE_BY_SIDE ? INT64_MAX : 0;
  for (int k = 0; k < width; k++) {
    const Span span = span_of(sequences, first + k);
    begin[k] = span.begin;
    end[k] = span.end;
    carry[k] = in.bootstrap ? in.bootstrap[first + k] : 0.0f;
    shared = end[k] - begin[k] < shared ? end[k] - begin[k] : shared;
  }
  for (int64_t i = 1; i <= shared; i++) {
#pragma GCC unroll 4
    for (int k = 0; k < SIDE_BY_SIDE; k++) {
      step(in, end[k] - i, carry[k], advantages, returns);
    }
  }
  for (int k = 0; k < width; k++) {
    for (int64_t at = end[k] - shared - 1; at >= begin[k]; at--) {
      step(in, at, carry[k], advantages, returns);
    }
  }
}

}  // namespace

void gae(const Sequences& sequences, const GaeInputs& inputs, float* advantages, float* returns, int threads) {
  const int64_t tokens =
      sequences.offsets ? sequences.offsets[sequences.count] : sequences.count * sequences.length;
  const int used = tokens < 16384 ? 1 : threads;
#pragma omp parallel for schedule(dynamic) num_threads(used)
  for (int64_t first = 0; first < sequences.count; first += SIDE_BY_SIDE) {
    group(sequences, first, inputs, advantages, returns);
  }
}

}  // namespace rlhf_fast::RF_ISA
