// From the addresses and sizes that Python sends to the structs of ops.h, checked. The operations run without the GIL;
// their arguments are checked before any thread starts, because an exception must not leave an OpenMP region.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "ops.h"

namespace rlhf_fast {

namespace py = pybind11;
using Address = uintptr_t;

void bind_cpu(py::module_ m);
void bind_cuda(py::module_ m);

// A tensor that has elements but no address is a FakeTensor (torch.compile, torch.export): refuse it, or we crash.
template <class T>
T* pointer(Address address, int64_t elements, const char* name) {
  if (address == 0 && elements > 0) {
    throw std::invalid_argument(std::string(name) + ": null pointer; is it a FakeTensor or a meta tensor?");
  }
  return reinterpret_cast<T*>(address);
}

template <class T>
T* optional_pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Dtype dtype_of(int code) {
  if (code < 0 || code > static_cast<int>(Dtype::float16)) {
    throw std::invalid_argument("dtype code " + std::to_string(code) + " is not float32, bfloat16 or float16");
  }
  return static_cast<Dtype>(code);
}

inline void check_size(int64_t size, const char* name) {
  if (size < 0) {
    throw std::invalid_argument(std::string(name) + " is negative: " + std::to_string(size));
  }
}

inline void check_threads(int threads) {
  if (threads < 1) {
    throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
  }
}

inline ConstMatrix const_matrix(Address data, int dtype, int64_t rows, int64_t columns, int64_t row_stride) {
  check_size(rows, "rows");
  check_size(columns, "columns");
  check_size(row_stride, "row_stride");
  return {pointer<const void>(data, rows * columns, "logits"), dtype_of(dtype), rows, columns, row_stride};
}

inline Matrix matrix(Address data, int dtype, int64_t row_stride, const ConstMatrix& like) {
  if (row_stride < like.columns && like.rows > 1) {
    throw std::invalid_argument("the rows of the result overlap: row stride " + std::to_string(row_stride) +
                                " is below its " + std::to_string(like.columns) + " columns");
  }
  return {pointer<void>(data, like.rows * like.columns, "result"), dtype_of(dtype), row_stride};
}

inline Head head_of(Address labels, const ConstMatrix& logits, int64_t ignore_index, float logit_scale,
                    float temperature, float softcap) {
  // written so that NaN fails too
  if (!(temperature > 0.0f) || !(logit_scale > 0.0f) || !(softcap >= 0.0f)) {
    throw std::invalid_argument("temperature and logit_scale must be positive and softcap not negative; got " +
                                std::to_string(temperature) + ", " + std::to_string(logit_scale) + ", " +
                                std::to_string(softcap));
  }
  const int64_t* label = pointer<const int64_t>(labels, logits.rows, "labels");
  for (int64_t row = 0; row < logits.rows; row++) {
    if (label[row] != ignore_index && (label[row] < 0 || label[row] >= logits.columns)) {
      throw std::out_of_range("label " + std::to_string(label[row]) + " in row " + std::to_string(row) +
                              " is outside [0, " + std::to_string(logits.columns) + ") and is not ignore_index " +
                              std::to_string(ignore_index));
    }
  }
  return {label, ignore_index, logit_scale, temperature, softcap};
}

inline RowStatistics row_statistics(Address logprobs, Address entropy, Address lse, int64_t rows) {
  return {pointer<float>(logprobs, rows, "logprobs"), pointer<float>(entropy, rows, "entropy"),
          pointer<double>(lse, rows, "lse")};
}

inline Sequences sequences_of(int64_t count, int64_t length, Address offsets) {
  check_size(count, "count");
  check_size(length, "length");
  return {count, length, optional_pointer<const int32_t>(offsets)};
}

inline GaeInputs gae_inputs(Address rewards, Address values, Address mask, Address bootstrap, float gamma, float lam,
                            int64_t tokens) {
  return {pointer<const float>(rewards, tokens, "rewards"),
          pointer<const float>(values, tokens, "values"),
          pointer<const uint8_t>(mask, tokens, "mask"),
          optional_pointer<const float>(bootstrap),
          gamma,
          lam};
}

// A code of an enum whose last enumerator is `last`.
template <class Enum>
Enum enumerator(int code, Enum last, const char* name) {
  if (code < 0 || code > static_cast<int>(last)) {
    throw std::invalid_argument(std::string(name) + " code " + std::to_string(code) + " is unknown");
  }
  return static_cast<Enum>(code);
}

inline Reduction reduction_of(int aggregate, Address denominator, float divisor) {
  return {enumerator(aggregate, Aggregate::constant, "aggregate"), optional_pointer<const float>(denominator), divisor};
}

inline PolicyTerms policy_terms(int kind, float lower, float upper, float dual_clip, float is_clip, float kl_coef,
                                int kl_estimator, float entropy_coef) {
  return {enumerator(kind, PolicyKind::reinforce, "kind"),
          lower,
          upper,
          dual_clip,
          is_clip,
          kl_coef,
          enumerator(kl_estimator, KlEstimator::abs, "KL estimator"),
          entropy_coef};
}

}  // namespace rlhf_fast
