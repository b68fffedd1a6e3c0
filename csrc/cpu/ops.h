// The CPU operations: what they take and which instruction sets they are compiled for. Torch-free: raw pointers, sizes,
// strides in elements.
#pragma once

#include <cstdint>

namespace rlhf_fast {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// A matrix of `rows` x `columns`; columns are contiguous, rows may be any distance apart (0 repeats one row).
struct ConstMatrix {
  const void* data;
  Dtype dtype;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
};

struct Matrix {
  void* data;
  Dtype dtype;
  int64_t row_stride;
};

// How raw logits become log-probabilities: z = softcap(logit_scale * x) / temperature.
struct Head {
  const int64_t* labels;  // (rows,), each in [0, columns) or ignore_index
  int64_t ignore_index;
  float logit_scale;
  float temperature;
  float softcap;  // 0: none
};

struct RowStatistics {
  float* logprobs;
  float* entropy;
  double* lse;
};

struct UpstreamGradients {
  const float* logprobs;
  const float* entropy;  // may be null
};

// Sequences of one or many lengths: sequence i covers [offsets[i], offsets[i + 1]), or row i of a (count, length)
// matrix when offsets is null.
struct Sequences {
  int64_t count;
  int64_t length;
  const int32_t* offsets;
};

struct GaeInputs {
  const float* rewards;
  const float* values;
  const uint8_t* mask;
  const float* bootstrap;  // (count,), may be null: 0
  float gamma;
  float lam;
};

#define RF_DECLARE_CPU_OPS(ISA)                                                                                       \
  namespace ISA {                                                                                                     \
  void token_logprobs_forward(const ConstMatrix& logits, const Head& head, const RowStatistics& result, int threads); \
  void token_logprobs_backward(const ConstMatrix& logits, const Head& head, const double* lse, const float* entropy,  \
                               const UpstreamGradients& gradients, const Matrix& result, int threads);                \
  void head_rows(const ConstMatrix& logits, const Head& head, const RowStatistics& statistics, const Matrix& result,  \
                 int threads);                                                                                        \
  void gae(const Sequences& sequences, const GaeInputs& inputs, float* advantages, float* returns, int threads);      \
  }

RF_DECLARE_CPU_OPS(base)
#ifdef RF_X86
RF_DECLARE_CPU_OPS(avx2)
RF_DECLARE_CPU_OPS(avx512)
#endif

// One instruction set's version of every operation.
struct CpuOps {
  const char* name;
  decltype(&base::token_logprobs_forward) token_logprobs_forward;
  decltype(&base::token_logprobs_backward) token_logprobs_backward;
  decltype(&base::head_rows) head_rows;
  decltype(&base::gae) gae;
};

// The widest set this processor runs, or the one named by RLHF_FAST_CPU_ISA (base, avx2, avx512).
// Throws std::invalid_argument if that name is unknown or the processor lacks it.
const CpuOps& cpu_ops();
void select_isa(const char* name);
// The names of the sets this processor runs, widest first, ending with null.
const char* const* supported_isas();

}  // namespace rlhf_fast
