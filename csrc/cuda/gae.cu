// Launches the scan of gae.cuh, one block per sequence.
#include <cuda_runtime.h>

#include "gae.cuh"
#include "ops.h"

namespace rlhf_fast::cuda {

int gae(const Sequences& sequences, const GaeInputs& inputs, float* advantages, float* returns, void* stream) {
  if (sequences.count == 0) {
    return cudaSuccess;
  }
  const auto blocks = static_cast<unsigned>(sequences.count);
  const auto queue = static_cast<cudaStream_t>(stream);
  // a short sequence fits one warp, which needs no barrier across warps; `length` bounds packed sequences too
  if (sequences.length <= 256) {
    gae_kernel<32><<<blocks, 32, 0, queue>>>(sequences, inputs, advantages, returns);
  } else {
    gae_kernel<256><<<blocks, 256, 0, queue>>>(sequences, inputs, advantages, returns);
  }
  return cudaGetLastError();
}

}  // namespace rlhf_fast::cuda
