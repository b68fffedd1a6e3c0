// The CPU operations and the instruction sets they are compiled for.
#pragma once

#include "../ops.h"

namespace rlhf_fast {

static inline int64_t tokens_of(const Sequences& sequences) {
  return sequences.offsets ? sequences.offsets[sequences.count] : sequences.count * sequences.length;
}

#define RF_DECLARE_CPU_OPS(ISA)                                                                                       \
  namespace ISA {                                                                                                     \
  void token_logprobs_forward(const ConstMatrix& logits, const Head& head, const RowStatistics& result, int threads); \
  void token_logprobs_backward(const ConstMatrix& logits, const Head& head, const double* lse, const float* entropy,  \
                               const UpstreamGradients& gradients, const Matrix& result, int threads);                \
  void head_rows(const ConstMatrix& logits, const Head& head, const RowStatistics& statistics, const Matrix& result,  \
                 int threads);                                                                                        \
  void gae(const Sequences& sequences, const GaeInputs& inputs, float* advantages, float* returns, int threads);      \
  void kl_shaped_gae(const Sequences& sequences, const ShapedGaeInputs& inputs, const ShapedGaeResults& results,      \
                     int threads);                                                                                    \
  void policy_loss(const Sequences& sequences, const PolicyInputs& inputs, const Reduction& reduction,                \
                   const PolicyResults& results, int threads);                                                        \
  void value_loss(const Sequences& sequences, const ValueInputs& inputs, const Reduction& reduction,                  \
                  const ValueResults& results, int threads);                                                          \
  void scale(const float* x, int64_t n, float factor, float* out, int threads);                                       \
  void decode_attention(const DecodeInputs& inputs, void* out, int threads);                                          \
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
  decltype(&base::kl_shaped_gae) kl_shaped_gae;
  decltype(&base::policy_loss) policy_loss;
  decltype(&base::value_loss) value_loss;
  decltype(&base::scale) scale;
  decltype(&base::decode_attention) decode_attention;
};

// The widest set this processor runs, or the one named by RLHF_FAST_CPU_ISA (base, avx2, avx512).
// Throws std::invalid_argument if that name is unknown or the processor lacks it.
const CpuOps& cpu_ops();
void select_isa(const char* name);
// The names of the sets this processor runs, widest first, ending with null.
const char* const* supported_isas();

}  // namespace rlhf_fast
