// Launches the kernels of policy.cuh: one kernel a loss, after 4 bytes of zeros for its counter of finished blocks.
#include <cuda_runtime.h>

#include "ops.h"
#include "policy.cuh"

namespace rlhf_fast::cuda {
namespace {

Partials partials_in(void* workspace) {
  auto* counter = static_cast<unsigned*>(workspace);
  return {reinterpret_cast<double*>(counter + 4), counter};
}

}  // namespace

int64_t loss_workspace(int64_t count) {
  const int64_t blocks = count > FLAT_BLOCKS ? count : FLAT_BLOCKS;
  return 4 * sizeof(unsigned) + POLICY_FIELDS * blocks * sizeof(double);
}

int policy_loss(const Sequences& sequences, int64_t tokens, const PolicyInputs& inputs, const Reduction& reduction,
                const PolicyResults& results, void* workspace, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const Tokens layout{sequences, tokens};
  const Partials partials = partials_in(workspace);
  cudaMemsetAsync(partials.counter, 0, sizeof(unsigned), queue);
  if (is_flat(layout, inputs, reduction)) {
    flat_policy_kernel<<<flat_blocks(layout), LOSS_THREADS, 0, queue>>>(layout, inputs, reduction, results, partials);
  } else {
    sequence_policy_kernel<<<sequence_blocks(layout), LOSS_THREADS, 0, queue>>>(layout, inputs, reduction, results,
                                                                                partials);
  }
  return cudaGetLastError();
}

int value_loss(const Sequences& sequences, int64_t tokens, const ValueInputs& inputs, const Reduction& reduction,
               const ValueResults& results, void* workspace, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const Tokens layout{sequences, tokens};
  const Partials partials = partials_in(workspace);
  cudaMemsetAsync(partials.counter, 0, sizeof(unsigned), queue);
  if (reduction.aggregate == Aggregate::sequence) {
    sequence_value_kernel<<<sequence_blocks(layout), LOSS_THREADS, 0, queue>>>(layout, inputs, reduction, results,
                                                                               partials);
  } else {
    flat_value_kernel<<<flat_blocks(layout), LOSS_THREADS, 0, queue>>>(layout, inputs, reduction, results, partials);
  }
  return cudaGetLastError();
}

int scaled_gradient(const float* gradient, const float* grad, const float* scale, int64_t n, float* out, void* stream) {
  if (n == 0) {
    return cudaSuccess;
  }
  const auto blocks = static_cast<unsigned>((n + LOSS_TILE - 1) / LOSS_TILE);
  scale_kernel<<<blocks, LOSS_THREADS, 0, static_cast<cudaStream_t>(stream)>>>(gradient, grad, scale, n, out);
  return cudaGetLastError();
}

}  // namespace rlhf_fast::cuda
