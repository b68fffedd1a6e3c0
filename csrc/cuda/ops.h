// The CUDA operations as plain functions, so that bindings.cpp needs no CUDA header. Pointers are device pointers; the
// stream is a cudaStream_t. Launches go to the current device; errors come back as cudaError_t, 0 for none.
#pragma once

#include "../ops.h"

namespace rlhf_fast::cuda {

int gae(const Sequences& sequences, const GaeInputs& inputs, float* advantages, float* returns, void* stream);

// None of these is called at import: creating a CUDA context before a fork breaks the child.
int device_count(int* error);
int runtime_version();
int driver_version();
const char* error_text(int error);

}  // namespace rlhf_fast::cuda
