// Generalized advantage estimation as a parallel scan of affine maps (the algebra is in ../math.h): one block of
// threads walks one sequence from its end in tiles of THREADS * 4 tokens. Every thread composes 4 neighbouring tokens,
// a warp composes its threads by shuffles, the block its warps through shared memory; the carry goes from tile to tile.
//
// The scan has two users: plain GAE, and the whole way from scores to whitened advantages.
#pragma once

#include "../losses.h"
#include "device.cuh"

namespace rlhf_fast::cuda {

__device__ __forceinline__ Affine shuffle_down(Affine map, int distance) {
  return {__shfl_down_sync(ALL_LANES, map.slope, distance), __shfl_down_sync(ALL_LANES, map.offset, distance)};
}

// The composition of this lane's map with those of all later lanes.
__device__ __forceinline__ Affine compose_later_lanes(Affine map, int lane) {
#pragma unroll
  for (int distance = 1; distance < WARP; distance *= 2) {
    const Affine later = shuffle_down(map, distance);
    if (lane + distance < WARP) {
      map = compose(map, later);
    }
  }
  return map;
}

// The tokens [begin, end) of one sequence.
struct Span {
  int64_t begin;
  int64_t end;
};

__device__ __forceinline__ Span span_of(const Sequences& sequences, int64_t sequence) {
  if (sequences.offsets) {
    return {sequences.offsets[sequence], sequences.offsets[sequence + 1]};
  }
  return {sequence * sequences.length, (sequence + 1) * sequences.length};
}

// Masked tokens and those outside the sequence are identity maps.
struct Steps {
  Four reward;
  Four value;
  FourFlags counts;
};

// Scan one sequence. `user.load(at)` returns the Steps of 4 tokens (or something with their members), and
// `user.store(tokens, advantages, returns, at)` takes the results.
template <int THREADS, class User>
__device__ __forceinline__ void scan_sequence(Span span, float carry, float gamma, float lam, User& user) {
  constexpr int WARPS = THREADS / WARP;
  constexpr int ITEMS = 4;
  constexpr int TILE = THREADS * ITEMS;
  __shared__ Affine warp_maps[WARPS];
  const int lane = threadIdx.x % WARP;
  const int warp = threadIdx.x / WARP;

  for (int64_t tile = (span.end - span.begin + TILE - 1) / TILE - 1; tile >= 0; tile--) {
    const int64_t at = span.begin + tile * TILE + threadIdx.x * ITEMS;
    const auto tokens = user.load(at);
    Affine map = identity_map();
#pragma unroll
    for (int i = ITEMS - 1; i >= 0; i--) {
      const Affine own = gae_map(tokens.reward.x[i], tokens.value.x[i], gamma, lam);
      map = tokens.counts.x[i] ? compose(own, map) : map;
    }

    const Affine from_lane = compose_later_lanes(map, lane);
    if (lane == 0) {
      warp_maps[warp] = from_lane;
    }
    __syncthreads();

    // what arrives from the later warps, then from the later lanes of this warp
    float incoming = carry;
    float next_carry = carry;
#pragma unroll
    for (int w = WARPS - 1; w >= 0; w--) {
      next_carry = apply(warp_maps[w], next_carry);
      incoming = w > warp ? next_carry : incoming;
    }
    const Affine later_lanes = shuffle_down(from_lane, 1);
    incoming = lane == WARP - 1 ? incoming : apply(later_lanes, incoming);

    Four advantage;
    Four ret;
#pragma unroll
    for (int i = ITEMS - 1; i >= 0; i--) {
      const float reward = tokens.reward.x[i];
      const float value = tokens.value.x[i];
      const bool counts = tokens.counts.x[i];
      advantage.x[i] = counts ? gae_advantage(reward, value, incoming, gamma) : 0.0f;
      ret.x[i] = counts ? gae_return(reward, incoming, gamma) : 0.0f;
      incoming = counts ? apply(gae_map(reward, value, gamma, lam), incoming) : incoming;
    }
    user.store(tokens, advantage, ret, at);
    carry = next_carry;
    __syncthreads();  // before the next tile overwrites warp_maps
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Plain GAE
// ---------------------------------------------------------------------------------------------------------------------

struct PlainGae {
  const GaeInputs& in;
  float* advantages;
  float* returns;
  int64_t end;
  bool aligned;

  __device__ __forceinline__ Steps load(int64_t at) const {
    return {load_four(in.rewards, at, end, aligned), load_four(in.values, at, end, aligned),
            load_mask(in.mask, at, end, aligned)};
  }

  __device__ __forceinline__ void store(const Steps&, const Four& advantage, const Four& ret, int64_t at) const {
    store_four(advantages, advantage, at, end, aligned);
    store_four(returns, ret, at, end, aligned);
  }
};

template <int THREADS>
__global__ void __launch_bounds__(THREADS)
    gae_kernel(Sequences sequences, GaeInputs in, float* __restrict__ advantages, float* __restrict__ returns) {
  const Span span = span_of(sequences, blockIdx.x);
  const bool aligned = span.begin % 4 == 0 && is_aligned(in.rewards, 16) && is_aligned(in.values, 16) &&
                       is_aligned(in.mask, 4) && is_aligned(advantages, 16) && is_aligned(returns, 16);
  PlainGae user{in, advantages, returns, span.end, aligned};
  scan_sequence<THREADS>(span, in.bootstrap ? in.bootstrap[blockIdx.x] : 0.0f, in.gamma, in.lam, user);
}

// ---------------------------------------------------------------------------------------------------------------------
// From scores to whitened advantages: KL, rewards, GAE and the moments of the advantages in one launch, whitening in a
// second one
// ---------------------------------------------------------------------------------------------------------------------

// Number, mean and summed squared deviation. In double: these are a few numbers per thread, and the spread of a batch
// with a large mean would be lost in float.
struct Spread {
  double count;
  double mean;
  double squares;
};

// Chan, Golub, LeVeque 1983, eq. 2.1
__device__ __forceinline__ Spread joined(const Spread& a, const Spread& b) {
  const double count = a.count + b.count;
  if (count == 0.0) {
    return a;
  }
  const double apart = b.mean - a.mean;
  const double share = b.count / count;
  return {count, a.mean + apart * share, a.squares + b.squares + apart * apart * a.count * share};
}

__device__ __forceinline__ Spread spread_of(const Four& x, const FourFlags& counts) {
  double count = 0.0;
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    count += counts.x[i] ? 1.0 : 0.0;
    sum += counts.x[i] ? x.x[i] : 0.0;
  }
  const double mean = count > 0.0 ? sum / count : 0.0;
  double squares = 0.0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const double apart = counts.x[i] ? x.x[i] - mean : 0.0;
    squares += apart * apart;
  }
  return {count, mean, squares};
}

// The same of all threads together; every thread gets it.
__device__ __forceinline__ Spread block_spread(const Spread& mine) {
  const double count = block_reduce(mine.count, Add());
  const double mean = block_reduce(mine.count * mine.mean, Add()) / (count > 0.0 ? count : 1.0);
  const double apart = mine.mean - mean;
  return {count, mean, block_reduce(mine.squares + mine.count * apart * apart, Add())};
}

// What the blocks tell each other; `leaves` are (3, count): the Spread of each sequence.
struct Whitening {
  double* leaves;
  float* shift_and_scale;  // 2
  unsigned* counter;
};

struct ShapedSteps : Steps {
  Four kl;
};

struct ShapedGae {
  const ShapedGaeInputs& in;
  const ShapedGaeResults& out;
  int64_t end;
  int64_t last;  // the token that takes the score
  float score;
  bool aligned;
  Spread spread;

  __device__ __forceinline__ ShapedSteps load(int64_t at) const {
    const Four logprob = load_four(in.logprobs, at, end, aligned);
    const Four ref = load_four(in.ref_logprobs, at, end, aligned);
    ShapedSteps steps;
    steps.value = load_four(in.values, at, end, aligned);
    steps.counts = load_mask(in.mask, at, end, aligned);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const bool counts = steps.counts.x[i];
      const float kl = kl_estimate(ref.x[i] - logprob.x[i], in.estimator).value;
      steps.kl.x[i] = counts ? kl : 0.0f;
      steps.reward.x[i] = (counts ? -in.kl_coef * kl : 0.0f) + (at + i == last ? score : 0.0f);
    }
    return steps;
  }

  __device__ __forceinline__ void store(const ShapedSteps& steps, const Four& advantage, const Four& ret, int64_t at) {
    store_four(out.advantages, advantage, at, end, aligned);
    store_four(out.returns, ret, at, end, aligned);
    store_four(out.rewards, steps.reward, at, end, aligned);
    store_four(out.kl, steps.kl, at, end, aligned);
    if (in.whiten) {
      spread = joined(spread, spread_of(advantage, steps.counts));
    }
  }
};

// The last unmasked token of a sequence, -1 without any. Walks from the end, so it rarely reads more than padding.
template <int THREADS>
__device__ __forceinline__ int64_t last_unmasked(const uint8_t* mask, Span span, bool aligned) {
  constexpr int TILE = THREADS * 4;
  for (int64_t tile = (span.end - span.begin + TILE - 1) / TILE - 1; tile >= 0; tile--) {
    const int64_t at = span.begin + tile * TILE + threadIdx.x * 4;
    const FourFlags counts = load_mask(mask, at, span.end, aligned);
    int mine = -1;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      mine = counts.x[i] ? static_cast<int>(threadIdx.x) * 4 + i : mine;
    }
    const int last = block_reduce(mine, Max());
    if (last >= 0) {
      return span.begin + tile * TILE + last;
    }
  }
  return -1;
}

// Merge the sequences' moments, in the order of the sequences whichever block does it.
__device__ __forceinline__ void finish_whitening(const Whitening& whitening, float eps) {
  const int64_t leaves = gridDim.x;
  double count = 0.0;
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < leaves; i += blockDim.x) {
    const double n = __ldcg(whitening.leaves + i);
    count += n;
    sum += n * __ldcg(whitening.leaves + leaves + i);
  }
  count = block_reduce(count, Add());
  count = count > 0.0 ? count : 1.0;
  const double mean = block_reduce(sum, Add()) / count;
  double squares = 0.0;
  for (int64_t i = threadIdx.x; i < leaves; i += blockDim.x) {
    const double apart = __ldcg(whitening.leaves + leaves + i) - mean;
    squares += __ldcg(whitening.leaves + 2 * leaves + i) + __ldcg(whitening.leaves + i) * apart * apart;
  }
  squares = block_reduce(squares, Add());
  if (threadIdx.x == 0) {
    whitening.shift_and_scale[0] = static_cast<float>(mean);
    whitening.shift_and_scale[1] = static_cast<float>(1.0 / __builtin_sqrt(squares / count + eps));
  }
}

template <int THREADS>
__global__ void __launch_bounds__(THREADS)
    shaped_gae_kernel(Sequences sequences, ShapedGaeInputs in, ShapedGaeResults out, Whitening whitening) {
  const int64_t sequence = blockIdx.x;
  const Span span = span_of(sequences, sequence);
  const bool aligned = span.begin % 4 == 0 && is_aligned(in.logprobs, 16) && is_aligned(in.ref_logprobs, 16) &&
                       is_aligned(in.values, 16) && is_aligned(in.mask, 4) && is_aligned(out.advantages, 16) &&
                       is_aligned(out.returns, 16) && is_aligned(out.rewards, 16) && is_aligned(out.kl, 16);
  const int64_t last = last_unmasked<THREADS>(in.mask, span, aligned);
  const float score = last < 0 ? 0.0f : bounded_score(in.scores[sequence], in.clip);
  ShapedGae user{in, out, span.end, last, score, aligned, {0.0, 0.0, 0.0}};
  scan_sequence<THREADS>(span, in.bootstrap ? in.bootstrap[sequence] : 0.0f, in.gamma, in.lam, user);
  if (!in.whiten) {
    return;
  }
  const Spread spread = block_spread(user.spread);
  if (threadIdx.x == 0) {
    const int64_t leaves = gridDim.x;
    whitening.leaves[sequence] = spread.count;
    whitening.leaves[leaves + sequence] = spread.mean;
    whitening.leaves[2 * leaves + sequence] = spread.squares;
  }
  if (is_last_block(whitening.counter)) {
    finish_whitening(whitening, in.whiten_eps);
  }
}

__global__ void __launch_bounds__(256)
    whiten_kernel(float* x, const uint8_t* mask, int64_t tokens, const float* shift_and_scale) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
  if (at >= tokens) {
    return;
  }
  const bool aligned = is_aligned(x, 16) && is_aligned(mask, 4);
  const float shift = shift_and_scale[0];
  const float scale = shift_and_scale[1];
  const FourFlags counts = load_mask(mask, at, tokens, aligned);
  Four four = load_four(x, at, tokens, aligned);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    four.x[i] = counts.x[i] ? (four.x[i] - shift) * scale : 0.0f;
  }
  store_four(x, four, at, tokens, aligned);
}

}  // namespace rlhf_fast::cuda
