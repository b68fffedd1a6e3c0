// Launches the scans of gae.cuh, one block per sequence.
#include <cuda_runtime.h>

#include "gae.cuh"
#include "ops.h"

namespace rlhf_fast::cuda {

// A short sequence fits one warp, which needs no barrier across warps. Not among packed ones, whose lengths are known
// on the device only: their mean would make a sequence's bits depend on its neighbours.
bool fits_one_warp(const Sequences& sequences) {
  return !sequences.offsets && sequences.length <= 256;
}

int gae(const Sequences& sequences, const GaeInputs& inputs, float* advantages, float* returns, void* stream) {
  if (sequences.count == 0) {
    return cudaSuccess;
  }
  const auto blocks = static_cast<unsigned>(sequences.count);
  const auto queue = static_cast<cudaStream_t>(stream);
  if (fits_one_warp(sequences)) {
    gae_kernel<32><<<blocks, 32, 0, queue>>>(sequences, inputs, advantages, returns);
  } else {
    gae_kernel<256><<<blocks, 256, 0, queue>>>(sequences, inputs, advantages, returns);
  }
  return cudaGetLastError();
}

int64_t kl_shaped_gae_workspace(int64_t count) {
  return 3 * count * sizeof(double) + 2 * sizeof(float) + sizeof(unsigned);
}

int kl_shaped_gae(const Sequences& sequences, const ShapedGaeInputs& inputs, const ShapedGaeResults& results,
                  int64_t tokens, void* workspace, void* stream) {
  if (sequences.count == 0 || tokens == 0) {
    return cudaSuccess;
  }
  const auto blocks = static_cast<unsigned>(sequences.count);
  const auto queue = static_cast<cudaStream_t>(stream);
  auto* leaves = static_cast<double*>(workspace);
  auto* shift_and_scale = reinterpret_cast<float*>(leaves + 3 * sequences.count);
  const Whitening whitening{leaves, shift_and_scale, reinterpret_cast<unsigned*>(shift_and_scale + 2)};
  if (inputs.whiten) {
    cudaMemsetAsync(whitening.counter, 0, sizeof(unsigned), queue);
  }
  if (fits_one_warp(sequences)) {
    shaped_gae_kernel<32><<<blocks, 32, 0, queue>>>(sequences, inputs, results, whitening);
  } else {
    shaped_gae_kernel<256><<<blocks, 256, 0, queue>>>(sequences, inputs, results, whitening);
  }
  if (inputs.whiten) {
    const auto flat = static_cast<unsigned>((tokens + 1023) / 1024);
    whiten_kernel<<<flat, 256, 0, queue>>>(results.advantages, inputs.mask, tokens, shift_and_scale);
  }
  return cudaGetLastError();
}

}  // namespace rlhf_fast::cuda
