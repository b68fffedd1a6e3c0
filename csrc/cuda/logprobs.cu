// Launches the kernels of logprobs.cuh, one block per row.
#include <cuda_runtime.h>

#include "logprobs.cuh"
#include "ops.h"

namespace rlhf_fast::cuda {
namespace {

template <class Format>
void launch_forward(const ConstMatrix& logits, const Head& head, const RowStatistics& result, cudaStream_t queue) {
  const unsigned threads = threads_for<Format>(logits.columns);
  logprobs_kernel<Format><<<logits.rows, threads, 0, queue>>>(logits, head, transform_of(head), result);
}

struct Backward {
  const ConstMatrix& logits;
  const Head& head;
  const double* lse;
  const float* entropy;
  const UpstreamGradients& gradients;
  const Matrix& result;
  cudaStream_t queue;

  template <class In, class Out>
  void launch() const {
    const unsigned threads = threads_for<In>(logits.columns);
    logprobs_backward_kernel<In, Out>
        <<<logits.rows, threads, 0, queue>>>(logits, head, transform_of(head), lse, entropy, gradients, result);
  }
};

template <class Out>
void launch_head_rows(const ConstMatrix& logits, const Head& head, const RowStatistics& statistics,
                      const Matrix& result, cudaStream_t queue) {
  const unsigned threads = threads_for<Float32>(logits.columns);
  head_rows_kernel<Out><<<logits.rows, threads, 0, queue>>>(logits, head, transform_of(head), statistics, result);
}

}  // namespace

int token_logprobs_forward(const ConstMatrix& logits, const Head& head, const RowStatistics& result, void* stream) {
  if (logits.rows == 0) {
    return cudaSuccess;
  }
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (logits.dtype) {
    case Dtype::float32:
      launch_forward<Float32>(logits, head, result, queue);
      break;
    case Dtype::bfloat16:
      launch_forward<Bfloat16>(logits, head, result, queue);
      break;
    default:
      launch_forward<Float16>(logits, head, result, queue);
  }
  return cudaGetLastError();
}

int token_logprobs_backward(const ConstMatrix& logits, const Head& head, const double* lse, const float* entropy,
                            const UpstreamGradients& gradients, const Matrix& result, void* stream) {
  if (logits.rows == 0) {
    return cudaSuccess;
  }
  const Backward backward{logits, head, lse, entropy, gradients, result, static_cast<cudaStream_t>(stream)};
  if (logits.dtype == Dtype::bfloat16 && result.dtype == Dtype::bfloat16) {
    backward.launch<Bfloat16, Bfloat16>();
  } else if (logits.dtype == Dtype::float16 && result.dtype == Dtype::float16) {
    backward.launch<Float16, Float16>();
  } else if (logits.dtype != Dtype::float32) {
    return cudaErrorInvalidValue;
  } else if (result.dtype == Dtype::float32) {
    backward.launch<Float32, Float32>();
  } else if (result.dtype == Dtype::bfloat16) {
    backward.launch<Float32, Bfloat16>();
  } else {
    backward.launch<Float32, Float16>();
  }
  return cudaGetLastError();
}

int head_rows(const ConstMatrix& logits, const Head& head, const RowStatistics& statistics, const Matrix& result,
              void* stream) {
  if (logits.rows == 0) {
    return cudaSuccess;
  }
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (result.dtype) {
    case Dtype::float32:
      launch_head_rows<Float32>(logits, head, statistics, result, queue);
      break;
    case Dtype::bfloat16:
      launch_head_rows<Bfloat16>(logits, head, statistics, result, queue);
      break;
    default:
      launch_head_rows<Float16>(logits, head, statistics, result, queue);
  }
  return cudaGetLastError();
}

}  // namespace rlhf_fast::cuda
