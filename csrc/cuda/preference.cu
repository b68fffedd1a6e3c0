// Launches the kernel of preference.cuh.
#include <cuda_runtime.h>

#include "ops.h"
#include "preference.cuh"

namespace rlhf_fast::cuda {

int dpo_loss(const PreferenceInputs& inputs, const PreferenceResults& results, void* stream) {
  if (inputs.pairs == 0) {
    return cudaSuccess;
  }
  const auto blocks = static_cast<unsigned>((inputs.pairs + PAIR_THREADS - 1) / PAIR_THREADS);
  preference_kernel<<<blocks, PAIR_THREADS, 0, static_cast<cudaStream_t>(stream)>>>(inputs, results);
  return cudaGetLastError();
}

}  // namespace rlhf_fast::cuda
