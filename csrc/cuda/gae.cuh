// Generalized advantage estimation as a parallel scan of affine maps (the algebra is in ../math.h): one block of
// threads walks one sequence from its end in tiles of THREADS * ITEMS tokens. Every thread composes ITEMS neighbouring
// tokens, a warp composes its threads by shuffles, the block its warps through shared memory; the carry goes from tile
// to tile.
//
// Apart from the launch (gae.cu) so that tests/kernels/test_cuda_build.py can run this very code on the host.
#pragma once

#include "../math.h"
#include "../ops.h"

namespace rlhf_fast::cuda {

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int WARP = 32;

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

// Four neighbouring values in one 16-byte access where the address allows it. Tokens outside the sequence and masked
// ones are identity maps: what is loaded for them is never used.
struct Tokens {
  float reward[4];
  float value[4];
  bool counts[4];
};

__device__ __forceinline__ Tokens load_four(const GaeInputs& in, int64_t at, int64_t end, bool aligned) {
  Tokens tokens;
  if (aligned && at + 4 <= end) {
    const float4 reward = *reinterpret_cast<const float4*>(in.rewards + at);
    const float4 value = *reinterpret_cast<const float4*>(in.values + at);
    const uchar4 mask = *reinterpret_cast<const uchar4*>(in.mask + at);
    return {{reward.x, reward.y, reward.z, reward.w},
            {value.x, value.y, value.z, value.w},
            {mask.x != 0, mask.y != 0, mask.z != 0, mask.w != 0}};
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const bool inside = at + i < end;
    tokens.counts[i] = inside && in.mask[at + i];
    tokens.reward[i] = inside ? in.rewards[at + i] : 0.0f;
    tokens.value[i] = inside ? in.values[at + i] : 0.0f;
  }
  return tokens;
}

__device__ __forceinline__ void store_four(float* out, const float (&x)[4], int64_t at, int64_t end, bool aligned) {
  if (aligned && at + 4 <= end) {
    *reinterpret_cast<float4*>(out + at) = make_float4(x[0], x[1], x[2], x[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (at + i < end) {
      out[at + i] = x[i];
    }
  }
}

__device__ __forceinline__ bool is_aligned(const void* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <int THREADS>
__global__ void __launch_bounds__(THREADS)
    gae_kernel(Sequences sequences, GaeInputs in, float* __restrict__ advantages, float* __restrict__ returns) {
  constexpr int WARPS = THREADS / WARP;
  constexpr int ITEMS = 4;
  constexpr int TILE = THREADS * ITEMS;
  __shared__ Affine warp_maps[WARPS];

  const int64_t sequence = blockIdx.x;
  const int64_t begin = sequences.offsets ? sequences.offsets[sequence] : sequence * sequences.length;
  const int64_t end = sequences.offsets ? sequences.offsets[sequence + 1] : begin + sequences.length;
  const int lane = threadIdx.x % WARP;
  const int warp = threadIdx.x / WARP;
  const bool aligned = begin % 4 == 0 && is_aligned(in.rewards, 16) && is_aligned(in.values, 16) &&
                       is_aligned(in.mask, 4) && is_aligned(advantages, 16) && is_aligned(returns, 16);
  float carry = in.bootstrap ? in.bootstrap[sequence] : 0.0f;

  for (int64_t tile = (end - begin + TILE - 1) / TILE - 1; tile >= 0; tile--) {
    const int64_t at = begin + tile * TILE + threadIdx.x * ITEMS;
    const Tokens tokens = load_four(in, at, end, aligned);
    Affine map = identity_map();
#pragma unroll
    for (int i = ITEMS - 1; i >= 0; i--) {
      const Affine own = gae_map(tokens.reward[i], tokens.value[i], in.gamma, in.lam);
      map = tokens.counts[i] ? compose(own, map) : map;
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

    float advantage[ITEMS];
    float ret[ITEMS];
#pragma unroll
    for (int i = ITEMS - 1; i >= 0; i--) {
      const float reward = tokens.reward[i];
      const float value = tokens.value[i];
      const bool counts = tokens.counts[i];
      advantage[i] = counts ? gae_advantage(reward, value, incoming, in.gamma) : 0.0f;
      ret[i] = counts ? gae_return(reward, incoming, in.gamma) : 0.0f;
      incoming = counts ? apply(gae_map(reward, value, in.gamma, in.lam), incoming) : incoming;
    }
    store_four(advantages, advantage, at, end, aligned);
    store_four(returns, ret, at, end, aligned);
    carry = next_carry;
    __syncthreads();  // before the next tile overwrites warp_maps
  }
}

}  // namespace rlhf_fast::cuda
