// The CPU operations as Python functions: rlhf_fast._C.cpu.
#include "../bindings.h"

#include "ops.h"

namespace rlhf_fast {
namespace {

void token_logprobs_forward(Address data, int dtype, int64_t rows, int64_t columns, int64_t row_stride, Address labels,
                            int64_t ignore_index, float temperature, float softcap, Address logprobs, Address entropy,
                            Address lse, int threads) {
  check_threads(threads);
  const ConstMatrix logits = const_matrix(data, dtype, rows, columns, row_stride);
  const Head head = head_of(labels, logits, ignore_index, 1.0f, temperature, softcap);
  cpu_ops().token_logprobs_forward(logits, head, row_statistics(logprobs, entropy, lse, rows), threads);
}

void token_logprobs_backward(Address data, int dtype, int64_t rows, int64_t columns, int64_t row_stride, Address labels,
                             int64_t ignore_index, float temperature, float softcap, Address lse, Address entropy,
                             Address grad_logprobs, Address grad_entropy, float logit_scale, Address result,
                             int result_dtype, int64_t result_stride, int threads) {
  check_threads(threads);
  const ConstMatrix logits = const_matrix(data, dtype, rows, columns, row_stride);
  const Head head = head_of(labels, logits, ignore_index, logit_scale, temperature, softcap);
  const UpstreamGradients gradients{pointer<const float>(grad_logprobs, rows, "grad_logprobs"),
                                    optional_pointer<const float>(grad_entropy)};
  cpu_ops().token_logprobs_backward(logits, head, pointer<const double>(lse, rows, "lse"),
                                    pointer<const float>(entropy, rows, "entropy"), gradients,
                                    matrix(result, result_dtype, result_stride, logits), threads);
}

void head_rows(Address data, int64_t rows, int64_t columns, int64_t row_stride, Address labels, int64_t ignore_index,
               float logit_scale, float temperature, float softcap, Address logprobs, Address entropy, Address lse,
               Address result, int result_dtype, int64_t result_stride, int threads) {
  check_threads(threads);
  const ConstMatrix logits = const_matrix(data, static_cast<int>(Dtype::float32), rows, columns, row_stride);
  const Head head = head_of(labels, logits, ignore_index, logit_scale, temperature, softcap);
  const Matrix out = result ? matrix(result, result_dtype, result_stride, logits) : Matrix{};
  cpu_ops().head_rows(logits, head, row_statistics(logprobs, entropy, lse, rows), out, threads);
}

// The kernel trusts the offsets with memory: they must rise from 0 to the number of tokens.
void check_offsets(const Sequences& sequences, int64_t tokens) {
  int64_t previous = 0;
  for (int64_t i = 0; i <= sequences.count; i++) {
    const int64_t offset = sequences.offsets[i];
    if (offset < previous || (i == 0 && offset != 0) || (i == sequences.count && offset != tokens)) {
      throw std::invalid_argument("cu_seqlens must rise from 0 to the number of tokens, " + std::to_string(tokens) +
                                  "; entry " + std::to_string(i) + " is " + std::to_string(offset));
    }
    previous = offset;
  }
}

void gae(Address rewards, Address values, Address mask, Address bootstrap, int64_t count, int64_t length, float gamma,
         float lam, Address advantages, Address returns, int threads) {
  check_threads(threads);
  const Sequences sequences = sequences_of(count, length, 0);
  const int64_t tokens = count * length;
  cpu_ops().gae(sequences, gae_inputs(rewards, values, mask, bootstrap, gamma, lam, tokens),
                pointer<float>(advantages, tokens, "advantages"), pointer<float>(returns, tokens, "returns"), threads);
}

void gae_packed(Address rewards, Address values, Address mask, Address bootstrap, int64_t tokens, Address cu_seqlens,
                int64_t count, float gamma, float lam, Address advantages, Address returns, int threads) {
  check_threads(threads);
  check_size(tokens, "tokens");
  pointer<const int32_t>(cu_seqlens, count + 1, "cu_seqlens");
  const Sequences sequences = sequences_of(count, 0, cu_seqlens);
  check_offsets(sequences, tokens);
  cpu_ops().gae(sequences, gae_inputs(rewards, values, mask, bootstrap, gamma, lam, tokens),
                pointer<float>(advantages, tokens, "advantages"), pointer<float>(returns, tokens, "returns"), threads);
}

// (count, length), or packed when there are offsets; the number of tokens must be what Python says it is.
Sequences checked_sequences(int64_t tokens, int64_t count, int64_t length, Address cu_seqlens) {
  check_size(tokens, "tokens");
  Sequences sequences = sequences_of(count, length, cu_seqlens);
  if (cu_seqlens) {
    check_offsets(sequences, tokens);
  } else if (count * length != tokens) {
    throw std::invalid_argument(std::to_string(count) + " sequences of " + std::to_string(length) + " are not " +
                                std::to_string(tokens) + " tokens");
  }
  return sequences;
}

void kl_shaped_gae(Address scores, Address logprobs, Address ref_logprobs, Address values, Address mask,
                   Address bootstrap, int64_t tokens, int64_t count, int64_t length, Address cu_seqlens, float kl_coef,
                   int estimator, float clip, float gamma, float lam, bool whiten, float eps, Address advantages,
                   Address returns, Address rewards, Address kl, int threads) {
  check_threads(threads);
  const Sequences sequences = checked_sequences(tokens, count, length, cu_seqlens);
  const ShapedGaeInputs inputs{pointer<const float>(scores, tokens ? count : 0, "scores"),
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
  cpu_ops().kl_shaped_gae(sequences, inputs, results, threads);
}

void policy_loss(Address logprobs, Address old_logprobs, Address advantages, int64_t advantage_count, Address mask,
                 Address ref_logprobs, Address rollout_logprobs, Address entropy, int64_t tokens, int64_t count,
                 int64_t length, Address cu_seqlens, int kind, float lower, float upper, float dual_clip, float is_clip,
                 float kl_coef, int kl_estimator, float entropy_coef, bool per_sequence, int level, int aggregate,
                 Address denominator, float divisor, Address loss, Address figures, Address gradient,
                 Address entropy_gradient, int threads) {
  check_threads(threads);
  const Sequences sequences = checked_sequences(tokens, count, length, cu_seqlens);
  if (advantage_count != (per_sequence ? count : tokens)) {
    throw std::invalid_argument("advantages must be one per " + std::string(per_sequence ? "sequence" : "token") +
                                ", got " + std::to_string(advantage_count));
  }
  const PolicyInputs inputs{pointer<const float>(logprobs, tokens, "logprobs"),
                            optional_pointer<const float>(old_logprobs),
                            pointer<const float>(advantages, tokens ? advantage_count : 0, "advantages"),
                            pointer<const uint8_t>(mask, tokens, "mask"),
                            optional_pointer<const float>(ref_logprobs),
                            optional_pointer<const float>(rollout_logprobs),
                            optional_pointer<const float>(entropy),
                            per_sequence,
                            policy_terms(kind, lower, upper, dual_clip, is_clip, kl_coef, kl_estimator, entropy_coef),
                            enumerator(level, Level::sequence_token, "level")};
  const PolicyResults results{pointer<float>(loss, 1, "loss"), pointer<float>(figures, POLICY_FIGURES, "figures"),
                              optional_pointer<float>(gradient), optional_pointer<float>(entropy_gradient)};
  cpu_ops().policy_loss(sequences, inputs, reduction_of(aggregate, denominator, divisor), results, threads);
}

void value_loss(Address values, Address old_values, Address returns, Address mask, int64_t tokens, int64_t count,
                int64_t length, Address cu_seqlens, float clip, int aggregate, Address denominator, float divisor,
                Address loss, Address figures, Address gradient, int threads) {
  check_threads(threads);
  const Sequences sequences = checked_sequences(tokens, count, length, cu_seqlens);
  const ValueInputs inputs{pointer<const float>(values, tokens, "values"), optional_pointer<const float>(old_values),
                           pointer<const float>(returns, tokens, "returns"),
                           pointer<const uint8_t>(mask, tokens, "mask"), clip};
  const ValueResults results{pointer<float>(loss, 1, "loss"), pointer<float>(figures, VALUE_FIGURES, "figures"),
                             optional_pointer<float>(gradient)};
  cpu_ops().value_loss(sequences, inputs, reduction_of(aggregate, denominator, divisor), results, threads);
}

// gradient * grad * scale, the latter two being scalars in memory.
void scaled_gradient(Address gradient, int64_t size, Address grad, Address figures, Address out, int threads) {
  check_threads(threads);
  check_size(size, "size");
  const float factor = *pointer<const float>(grad, 1, "grad") * *pointer<const float>(figures, 1, "figures");
  cpu_ops().scale(pointer<const float>(gradient, size, "gradient"), size, factor, pointer<float>(out, size, "out"),
                  threads);
}

Cache cache_of(Address data, int64_t row_stride, int64_t head_stride, int64_t place_stride, int64_t elements,
               const char* name) {
  check_size(row_stride, name);
  check_size(head_stride, name);
  check_size(place_stride, name);
  return {pointer<const void>(data, elements, name), row_stride, head_stride, place_stride};
}

void decode_attention(Address query, Address keys, Address values, Address lengths, int dtype, int64_t batch,
                      int64_t heads, int64_t width, int64_t value_width, int64_t key_heads, int64_t key_row,
                      int64_t key_head, int64_t key_place, int64_t value_row, int64_t value_head, int64_t value_place,
                      float scale, int64_t window, int64_t longest, Address out, int threads) {
  check_threads(threads);
  check_size(longest, "longest");
  const int64_t elements = batch * heads * width;
  const int64_t results = batch * heads * value_width;
  const int64_t* length = pointer<const int64_t>(lengths, batch, "lengths");
  for (int64_t i = 0; i < batch; i++) {
    if (length[i] < 0 || length[i] > longest) {
      throw std::invalid_argument("lengths must be in [0, " + std::to_string(longest) + "], and entry " +
                                  std::to_string(i) + " is " + std::to_string(length[i]));
    }
  }
  const DecodeInputs inputs{pointer<const void>(query, elements, "query"),
                            cache_of(keys, key_row, key_head, key_place, elements * longest, "keys"),
                            cache_of(values, value_row, value_head, value_place, results * longest, "values"),
                            length,
                            dtype_of(dtype),
                            batch,
                            heads,
                            key_heads,
                            width,
                            value_width,
                            scale,
                            window};
  cpu_ops().decode_attention(inputs, pointer<void>(out, results, "out"), threads);
}

py::tuple isas() {
  py::list names;
  for (const char* const* name = supported_isas(); *name; ++name) {
    names.append(*name);
  }
  return py::tuple(names);
}

}  // namespace

void bind_cpu(py::module_ m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("isas", &isas, "Instruction sets this processor runs, widest first.");
  m.def("isa", [] { return cpu_ops().name; }, "The instruction set in use (RLHF_FAST_CPU_ISA names one).");
  m.def("select_isa", &select_isa, py::arg("name"));
  m.def("token_logprobs_forward", &token_logprobs_forward, release());
  m.def("token_logprobs_backward", &token_logprobs_backward, release());
  m.def("head_rows", &head_rows, release());
  m.def("gae", &gae, release());
  m.def("gae_packed", &gae_packed, release());
  m.def("kl_shaped_gae", &kl_shaped_gae, release());
  m.def("policy_loss", &policy_loss, release());
  m.def("value_loss", &value_loss, release());
  m.def("scaled_gradient", &scaled_gradient, release());
  m.def("decode_attention", &decode_attention, release());
}

}  // namespace rlhf_fast
