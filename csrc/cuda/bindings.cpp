// The CUDA operations as Python functions: rlhf_fast._C.cuda. Nothing that lies on the device is looked at: labels and
// boundaries are as the caller says, and every function returns before its kernel has run.
#include "../bindings.h"

#include "ops.h"

namespace rlhf_fast {
namespace {

void check_cuda(int error) {
  if (error) {
    throw std::runtime_error(std::string("CUDA: ") + cuda::error_text(error));
  }
}

void check_blocks(int64_t blocks, const char* name) {
  if (blocks > INT32_MAX) {
    throw std::invalid_argument("more " + std::string(name) + " than a launch takes: " + std::to_string(blocks));
  }
}

void* stream_of(Address stream) {
  return reinterpret_cast<void*>(stream);
}

Sequences device_sequences(int64_t count, int64_t length, Address cu_seqlens) {
  check_blocks(count, "sequences");
  return sequences_of(count, length, cu_seqlens);
}

void gae_cuda(Address rewards, Address values, Address mask, Address bootstrap, int64_t count, int64_t length,
              Address cu_seqlens, int64_t tokens, float gamma, float lam, Address advantages, Address returns,
              Address stream) {
  check_cuda(cuda::gae(
      device_sequences(count, length, cu_seqlens), gae_inputs(rewards, values, mask, bootstrap, gamma, lam, tokens),
      pointer<float>(advantages, tokens, "advantages"), pointer<float>(returns, tokens, "returns"), stream_of(stream)));
}

void kl_shaped_gae_cuda(Address scores, Address logprobs, Address ref_logprobs, Address values, Address mask,
                        Address bootstrap, int64_t count, int64_t length, Address cu_seqlens, int64_t tokens,
                        float kl_coef, int estimator, float clip, float gamma, float lam, bool whiten, float eps,
                        Address advantages, Address returns, Address rewards, Address kl, Address workspace,
                        Address stream) {
  check_size(tokens, "tokens");
  const ShapedGaeInputs inputs{pointer<const float>(scores, count, "scores"),
                               pointer<const float>(logprobs, tokens, "logprobs"),
                               pointer<const float>(ref_logprobs, tokens, "ref_logprobs"),
                               pointer<const float>(values, tokens, "values"),
                               pointer<const uint8_t>(mask, tokens, "mask"),
                               optional_pointer<const float>(bootstrap),
                               kl_coef,
                               enumerator(estimator, KlEstimator::abs, "KL estimator"),
                               clip,
                               gamma,
                               lam,
                               whiten,
                               eps};
  const ShapedGaeResults results{pointer<float>(advantages, tokens, "advantages"),
                                 pointer<float>(returns, tokens, "returns"), pointer<float>(rewards, tokens, "rewards"),
                                 pointer<float>(kl, tokens, "kl")};
  check_cuda(cuda::kl_shaped_gae(device_sequences(count, length, cu_seqlens), inputs, results, tokens,
                                 pointer<void>(workspace, count, "workspace"), stream_of(stream)));
}

ConstMatrix device_matrix(Address data, int dtype, int64_t rows, int64_t columns, int64_t row_stride) {
  check_blocks(rows, "rows");
  return const_matrix(data, dtype, rows, columns, row_stride);
}

// The labels stay on the device, unread.
Head device_head(Address labels, int64_t rows, int64_t ignore_index, float logit_scale, float temperature,
                 float softcap) {
  // written so that NaN fails too
  if (!(temperature > 0.0f) || !(logit_scale > 0.0f) || !(softcap >= 0.0f)) {
    throw std::invalid_argument("temperature and logit_scale must be positive and softcap not negative");
  }
  return {pointer<const int64_t>(labels, rows, "labels"), ignore_index, logit_scale, temperature, softcap};
}

void token_logprobs_forward_cuda(Address data, int dtype, int64_t rows, int64_t columns, int64_t row_stride,
                                 Address labels, int64_t ignore_index, float logit_scale, float temperature,
                                 float softcap, Address logprobs, Address entropy, Address lse, Address stream) {
  const ConstMatrix logits = device_matrix(data, dtype, rows, columns, row_stride);
  const Head head = device_head(labels, rows, ignore_index, logit_scale, temperature, softcap);
  check_cuda(
      cuda::token_logprobs_forward(logits, head, row_statistics(logprobs, entropy, lse, rows), stream_of(stream)));
}

void token_logprobs_backward_cuda(Address data, int dtype, int64_t rows, int64_t columns, int64_t row_stride,
                                  Address labels, int64_t ignore_index, float logit_scale, float temperature,
                                  float softcap, Address lse, Address entropy, Address grad_logprobs,
                                  Address grad_entropy, Address result, int result_dtype, int64_t result_stride,
                                  Address stream) {
  const ConstMatrix logits = device_matrix(data, dtype, rows, columns, row_stride);
  const Head head = device_head(labels, rows, ignore_index, logit_scale, temperature, softcap);
  const UpstreamGradients gradients{pointer<const float>(grad_logprobs, rows, "grad_logprobs"),
                                    optional_pointer<const float>(grad_entropy)};
  check_cuda(cuda::token_logprobs_backward(logits, head, pointer<const double>(lse, rows, "lse"),
                                           pointer<const float>(entropy, rows, "entropy"), gradients,
                                           matrix(result, result_dtype, result_stride, logits), stream_of(stream)));
}

void head_rows_cuda(Address data, int64_t rows, int64_t columns, int64_t row_stride, Address labels,
                    int64_t ignore_index, float logit_scale, float temperature, float softcap, Address logprobs,
                    Address entropy, Address lse, Address result, int result_dtype, int64_t result_stride,
                    Address stream) {
  const ConstMatrix logits = device_matrix(data, static_cast<int>(Dtype::float32), rows, columns, row_stride);
  const Head head = device_head(labels, rows, ignore_index, logit_scale, temperature, softcap);
  check_cuda(cuda::head_rows(logits, head, row_statistics(logprobs, entropy, lse, rows),
                             matrix(result, result_dtype, result_stride, logits), stream_of(stream)));
}

void policy_loss_cuda(Address logprobs, Address old_logprobs, Address advantages, Address mask, Address ref_logprobs,
                      Address rollout_logprobs, Address entropy, bool per_sequence, int64_t count, int64_t length,
                      Address cu_seqlens, int64_t tokens, int kind, float lower, float upper, float dual_clip,
                      float is_clip, float kl_coef, int kl_estimator, float entropy_coef, int level, int aggregate,
                      Address denominator, float divisor, Address loss, Address figures, Address gradient,
                      Address entropy_gradient, Address workspace, Address stream) {
  check_size(tokens, "tokens");
  const PolicyTerms terms = policy_terms(kind, lower, upper, dual_clip, is_clip, kl_coef, kl_estimator, entropy_coef);
  const PolicyInputs inputs{pointer<const float>(logprobs, tokens, "logprobs"),
                            optional_pointer<const float>(old_logprobs),
                            pointer<const float>(advantages, per_sequence ? count : tokens, "advantages"),
                            pointer<const uint8_t>(mask, tokens, "mask"),
                            optional_pointer<const float>(ref_logprobs),
                            optional_pointer<const float>(rollout_logprobs),
                            optional_pointer<const float>(entropy),
                            per_sequence,
                            terms,
                            enumerator(level, Level::sequence_token, "level")};
  const PolicyResults results{pointer<float>(loss, 1, "loss"), pointer<float>(figures, 1, "figures"),
                              optional_pointer<float>(gradient), optional_pointer<float>(entropy_gradient)};
  check_cuda(cuda::policy_loss(device_sequences(count, length, cu_seqlens), tokens, inputs,
                               reduction_of(aggregate, denominator, divisor), results,
                               pointer<void>(workspace, 1, "workspace"), stream_of(stream)));
}

void value_loss_cuda(Address values, Address old_values, Address returns, Address mask, int64_t count, int64_t length,
                     Address cu_seqlens, int64_t tokens, float clip, int aggregate, Address denominator, float divisor,
                     Address loss, Address figures, Address gradient, Address workspace, Address stream) {
  check_size(tokens, "tokens");
  const ValueInputs inputs{pointer<const float>(values, tokens, "values"), optional_pointer<const float>(old_values),
                           pointer<const float>(returns, tokens, "returns"),
                           pointer<const uint8_t>(mask, tokens, "mask"), clip};
  const ValueResults results{pointer<float>(loss, 1, "loss"), pointer<float>(figures, 1, "figures"),
                             optional_pointer<float>(gradient)};
  check_cuda(cuda::value_loss(device_sequences(count, length, cu_seqlens), tokens, inputs,
                              reduction_of(aggregate, denominator, divisor), results,
                              pointer<void>(workspace, 1, "workspace"), stream_of(stream)));
}

void scaled_gradient_cuda(Address gradient, Address grad, Address scale, int64_t n, Address out, Address stream) {
  check_size(n, "n");
  check_cuda(cuda::scaled_gradient(pointer<const float>(gradient, n, "gradient"), pointer<const float>(grad, 1, "grad"),
                                   pointer<const float>(scale, 1, "scale"), n, pointer<float>(out, n, "out"),
                                   stream_of(stream)));
}

void dpo_loss_cuda(Address chosen, Address rejected, Address ref_chosen, Address ref_rejected, int64_t pairs,
                   float beta, float label_smoothing, int kind, Address losses, Address chosen_rewards,
                   Address rejected_rewards, Address slopes, Address stream) {
  check_size(pairs, "pairs");
  const PreferenceInputs inputs{pointer<const float>(chosen, pairs, "chosen"),
                                pointer<const float>(rejected, pairs, "rejected"),
                                pointer<const float>(ref_chosen, pairs, "ref_chosen"),
                                pointer<const float>(ref_rejected, pairs, "ref_rejected"),
                                pairs,
                                beta,
                                label_smoothing,
                                enumerator(kind, PreferenceKind::apo_down, "kind")};
  const PreferenceResults results{
      pointer<float>(losses, pairs, "losses"), pointer<float>(chosen_rewards, pairs, "chosen_rewards"),
      pointer<float>(rejected_rewards, pairs, "rejected_rewards"), optional_pointer<float>(slopes)};
  check_cuda(cuda::dpo_loss(inputs, results, stream_of(stream)));
}

py::tuple device_count() {
  int error = 0;
  const int count = cuda::device_count(&error);
  return py::make_tuple(count, error ? cuda::error_text(error) : "");
}

}  // namespace

void bind_cuda(py::module_ m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.attr("architectures") = RF_CUDA_ARCHITECTURES;
  m.def("runtime_version", &cuda::runtime_version, "The CUDA version this module was built with, e.g. 13000.");
  m.def("driver_version", &cuda::driver_version, "The newest CUDA version the driver supports; 0 without a driver.");
  m.def("device_count", &device_count, "The number of devices, and the error's text if there is none.");
  m.def("gae", &gae_cuda, release());
  m.def("kl_shaped_gae_workspace", &cuda::kl_shaped_gae_workspace, "Bytes of its workspace for so many sequences.");
  m.def("kl_shaped_gae", &kl_shaped_gae_cuda, release());
  m.def("token_logprobs_forward", &token_logprobs_forward_cuda, release());
  m.def("token_logprobs_backward", &token_logprobs_backward_cuda, release());
  m.def("head_rows", &head_rows_cuda, release());
  m.def("loss_workspace", &cuda::loss_workspace, "Bytes of the workspace of policy_loss and value_loss.");
  m.def("policy_loss", &policy_loss_cuda, release());
  m.def("value_loss", &value_loss_cuda, release());
  m.def("scaled_gradient", &scaled_gradient_cuda, release());
  m.def("dpo_loss", &dpo_loss_cuda, release());
}
}  // namespace rlhf_fast
