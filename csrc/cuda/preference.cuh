// Preference losses: one thread per pair makes loss, rewards and both slopes.
#pragma once

#include "../losses.h"
#include "device.cuh"

namespace rlhf_fast::cuda {

constexpr int PAIR_THREADS = 128;

__global__ void __launch_bounds__(PAIR_THREADS) preference_kernel(PreferenceInputs in, PreferenceResults out) {
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (pair >= in.pairs) {
    return;
  }
  const float w = in.chosen[pair] - in.ref_chosen[pair];
  const float l = in.rejected[pair] - in.ref_rejected[pair];
  const PairLoss result = preference_loss(w, l, in.beta, in.label_smoothing, in.kind);
  out.losses[pair] = result.loss;
  out.chosen_rewards[pair] = in.beta * w;
  out.rejected_rewards[pair] = in.beta * l;
  if (out.slopes) {
    out.slopes[pair] = result.chosen_slope;
    out.slopes[in.pairs + pair] = result.rejected_slope;
  }
}

}  // namespace rlhf_fast::cuda
