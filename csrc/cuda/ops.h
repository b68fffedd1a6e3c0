// The CUDA operations as plain functions, so that bindings.cpp needs no CUDA header. Pointers are device pointers; the
// stream is a cudaStream_t. Launches go to the current device; errors come back as cudaError_t, 0 for none.
//
// A workspace is device memory of at least as many bytes as its function says, 16-byte aligned; what it holds does not
// matter. It belongs to one launch, so launches on different streams, and graph replays, do not meet in it.
#pragma once

#include "../ops.h"

namespace rlhf_fast::cuda {

int gae(const Sequences& sequences, const GaeInputs& inputs, float* advantages, float* returns, void* stream);

int64_t kl_shaped_gae_workspace(int64_t count);
int kl_shaped_gae(const Sequences& sequences, const ShapedGaeInputs& inputs, const ShapedGaeResults& results,
                  int64_t tokens, void* workspace, void* stream);

// Labels outside the vocabulary give rows of NaN; nothing is read for them. The gradient's dtype is that of the logits,
// or any for float32 logits.
int token_logprobs_forward(const ConstMatrix& logits, const Head& head, const RowStatistics& result, void* stream);
int token_logprobs_backward(const ConstMatrix& logits, const Head& head, const double* lse, const float* entropy,
                            const UpstreamGradients& gradients, const Matrix& result, void* stream);
// float32 logits
int head_rows(const ConstMatrix& logits, const Head& head, const RowStatistics& statistics, const Matrix& result,
              void* stream);

int64_t loss_workspace(int64_t count);
int policy_loss(const Sequences& sequences, int64_t tokens, const PolicyInputs& inputs, const Reduction& reduction,
                const PolicyResults& results, void* workspace, void* stream);
int value_loss(const Sequences& sequences, int64_t tokens, const ValueInputs& inputs, const Reduction& reduction,
               const ValueResults& results, void* workspace, void* stream);
// out = gradient * grad * scale, both on the device
int scaled_gradient(const float* gradient, const float* grad, const float* scale, int64_t n, float* out, void* stream);

int dpo_loss(const PreferenceInputs& inputs, const PreferenceResults& results, void* stream);

// None of these is called at import: creating a CUDA context before a fork breaks the child.
int device_count(int* error);
int runtime_version();
int driver_version();
const char* error_text(int error);

}  // namespace rlhf_fast::cuda
