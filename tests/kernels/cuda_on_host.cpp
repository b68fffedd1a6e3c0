// The CUDA kernels of csrc/cuda as host functions with the arguments of their bindings, less workspace and stream; what
// comes before those is for test_cuda_kernels.py to choose. Every integer is an int64_t, every number a float.
#include "cuda_on_host.h"

#include "csrc/cuda/gae.cuh"
#include "csrc/cuda/logprobs.cuh"
#include "csrc/cuda/policy.cuh"
#include "csrc/cuda/preference.cuh"

using namespace rlhf_fast;
using namespace rlhf_fast::cuda;

extern "C" void gae(int64_t threads, const float* rewards, const float* values, const uint8_t* mask,
                    const float* bootstrap, int64_t count, int64_t length, const int32_t* offsets, int64_t tokens,
                    float gamma, float lam, float* advantages, float* returns) {
  const Sequences sequences{count, length, offsets};
  const GaeInputs inputs{rewards, values, mask, bootstrap, gamma, lam};
  const auto kernel = threads == 32 ? gae_kernel<32> : gae_kernel<96>;
  host::launch(count, threads, 0, [=] { kernel(sequences, inputs, advantages, returns); });
}

extern "C" void kl_shaped_gae(int64_t threads, int64_t order, const float* scores, const float* logprobs,
                              const float* ref_logprobs, const float* values, const uint8_t* mask,
                              const float* bootstrap, int64_t count, int64_t length, const int32_t* offsets,
                              int64_t tokens, float kl_coef, int64_t estimator, float clip, float gamma, float lam,
                              int64_t whiten, float eps, float* advantages, float* returns, float* rewards, float* kl) {
  const Sequences sequences{count, length, offsets};
  const ShapedGaeInputs inputs{
      scores, logprobs, ref_logprobs, values,      mask, bootstrap, kl_coef, static_cast<KlEstimator>(estimator),
      clip,   gamma,    lam,          whiten != 0, eps};
  const ShapedGaeResults results{advantages, returns, rewards, kl};
  std::vector<double> leaves(3 * count);
  float shift_and_scale[2];
  unsigned counter = 0;
  const Whitening whitening{leaves.data(), shift_and_scale, &counter};
  const auto kernel = threads == 32 ? shaped_gae_kernel<32> : shaped_gae_kernel<96>;
  host::launch(count, threads, order, [=] { kernel(sequences, inputs, results, whitening); });
  if (whiten) {
    const float* scale = shift_and_scale;
    host::launch((tokens + 127) / 128, 32, 0, [=] { whiten_kernel(advantages, mask, tokens, scale); });
  }
}

extern "C" void token_logprobs_forward(const void* data, int64_t dtype, int64_t rows, int64_t columns, int64_t stride,
                                       const int64_t* labels, int64_t ignore_index, float logit_scale,
                                       float temperature, float softcap, float* logprobs, float* entropy, double* lse) {
  const ConstMatrix logits{data, static_cast<Dtype>(dtype), rows, columns, stride};
  const Head head{labels, ignore_index, logit_scale, temperature, softcap};
  const RowStatistics out{logprobs, entropy, lse};
  const auto kernel = dtype == 0   ? logprobs_kernel<Float32>
                      : dtype == 1 ? logprobs_kernel<Bfloat16>
                                   : logprobs_kernel<Float16>;
  const unsigned threads = dtype == 0 ? threads_for<Float32>(columns) : threads_for<Bfloat16>(columns);
  host::launch(rows, threads, 0, [=] { kernel(logits, head, transform_of(head), out); });
}

extern "C" void token_logprobs_backward(const void* data, int64_t dtype, int64_t rows, int64_t columns, int64_t stride,
                                        const int64_t* labels, int64_t ignore_index, float logit_scale,
                                        float temperature, float softcap, const double* lse, const float* entropy,
                                        const float* grad_logprobs, const float* grad_entropy, void* result,
                                        int64_t result_dtype, int64_t result_stride) {
  const ConstMatrix logits{data, static_cast<Dtype>(dtype), rows, columns, stride};
  const Head head{labels, ignore_index, logit_scale, temperature, softcap};
  const UpstreamGradients gradients{grad_logprobs, grad_entropy};
  const Matrix out{result, static_cast<Dtype>(result_dtype), result_stride};
  const auto from_float32 = result_dtype == 0   ? logprobs_backward_kernel<Float32, Float32>
                            : result_dtype == 1 ? logprobs_backward_kernel<Float32, Bfloat16>
                                                : logprobs_backward_kernel<Float32, Float16>;
  const auto kernel = dtype == 0   ? from_float32
                      : dtype == 1 ? logprobs_backward_kernel<Bfloat16, Bfloat16>
                                   : logprobs_backward_kernel<Float16, Float16>;
  const unsigned threads = dtype == 0 ? threads_for<Float32>(columns) : threads_for<Bfloat16>(columns);
  host::launch(rows, threads, 0, [=] { kernel(logits, head, transform_of(head), lse, entropy, gradients, out); });
}

extern "C" void head_rows(const float* data, int64_t rows, int64_t columns, int64_t stride, const int64_t* labels,
                          int64_t ignore_index, float logit_scale, float temperature, float softcap, float* logprobs,
                          float* entropy, double* lse, void* result, int64_t result_dtype, int64_t result_stride) {
  const ConstMatrix logits{data, Dtype::float32, rows, columns, stride};
  const Head head{labels, ignore_index, logit_scale, temperature, softcap};
  const Matrix out{result, static_cast<Dtype>(result_dtype), result_stride};
  const auto kernel = result_dtype == 0   ? head_rows_kernel<Float32>
                      : result_dtype == 1 ? head_rows_kernel<Bfloat16>
                                          : head_rows_kernel<Float16>;
  const unsigned threads = threads_for<Float32>(columns);
  host::launch(rows, threads, 0, [=] { kernel(logits, head, transform_of(head), {logprobs, entropy, lse}, out); });
}

extern "C" void policy_loss(int64_t order, const float* logprobs, const float* old_logprobs, const float* advantages,
                            const uint8_t* mask, const float* ref_logprobs, const float* rollout_logprobs,
                            const float* entropy, int64_t per_sequence, int64_t count, int64_t length,
                            const int32_t* offsets, int64_t tokens, int64_t kind, float lower, float upper,
                            float dual_clip, float is_clip, float kl_coef, int64_t kl_estimator, float entropy_coef,
                            int64_t level, int64_t aggregate, const float* denominator, float divisor, float* loss,
                            float* figures, float* gradient, float* entropy_gradient) {
  const Tokens layout{{count, length, offsets}, tokens};
  const PolicyTerms terms{static_cast<PolicyKind>(kind),          lower,       upper, dual_clip, is_clip, kl_coef,
                          static_cast<KlEstimator>(kl_estimator), entropy_coef};
  const PolicyInputs in{logprobs,         old_logprobs, advantages,        mask,  ref_logprobs,
                        rollout_logprobs, entropy,      per_sequence != 0, terms, static_cast<Level>(level)};
  const Reduction reduction{static_cast<Aggregate>(aggregate), denominator, divisor};
  const PolicyResults out{loss, figures, gradient, entropy_gradient};
  unsigned counter = 0;
  const bool flat = is_flat(layout, in, reduction);
  const int64_t grid = flat ? flat_blocks(layout) : sequence_blocks(layout);
  std::vector<double> values(POLICY_FIELDS * grid);
  const Partials partials{values.data(), &counter};
  const auto kernel = flat ? flat_policy_kernel : sequence_policy_kernel;
  host::launch(grid, LOSS_THREADS, order, [=] { kernel(layout, in, reduction, out, partials); });
}

extern "C" void value_loss(int64_t order, const float* values, const float* old_values, const float* returns,
                           const uint8_t* mask, int64_t count, int64_t length, const int32_t* offsets, int64_t tokens,
                           float clip, int64_t aggregate, const float* denominator, float divisor, float* loss,
                           float* figures, float* gradient) {
  const Tokens layout{{count, length, offsets}, tokens};
  const ValueInputs in{values, old_values, returns, mask, clip};
  const Reduction reduction{static_cast<Aggregate>(aggregate), denominator, divisor};
  const ValueResults out{loss, figures, gradient};
  unsigned counter = 0;
  const bool flat = reduction.aggregate != Aggregate::sequence;
  const int64_t grid = flat ? flat_blocks(layout) : sequence_blocks(layout);
  std::vector<double> left(VALUE_SUMS * grid);
  const Partials partials{left.data(), &counter};
  const auto kernel = flat ? flat_value_kernel : sequence_value_kernel;
  host::launch(grid, LOSS_THREADS, order, [=] { kernel(layout, in, reduction, out, partials); });
}

extern "C" void scaled_gradient(const float* gradient, const float* grad, const float* scale, int64_t n, float* out) {
  host::launch((n + LOSS_TILE - 1) / LOSS_TILE, LOSS_THREADS, 0, [=] { scale_kernel(gradient, grad, scale, n, out); });
}

extern "C" void dpo_loss(const float* chosen, const float* rejected, const float* ref_chosen, const float* ref_rejected,
                         int64_t pairs, float beta, float label_smoothing, int64_t kind, float* losses,
                         float* chosen_rewards, float* rejected_rewards, float* slopes) {
  const PreferenceInputs in{chosen, rejected, ref_chosen,      ref_rejected,
                            pairs,  beta,     label_smoothing, static_cast<PreferenceKind>(kind)};
  const PreferenceResults out{losses, chosen_rewards, rejected_rewards, slopes};
  host::launch((pairs + PAIR_THREADS - 1) / PAIR_THREADS, PAIR_THREADS, 0, [=] { preference_kernel(in, out); });
}
