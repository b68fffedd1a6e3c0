// The Python face of the native kernels: module rlhf_fast._C. It knows nothing of torch: tensors come as addresses,
// sizes and strides, a CUDA stream as an integer, so one build serves every torch version.
//
// The operations run without the GIL. Their arguments are checked here, before any thread starts, because an exception
// must not leave an OpenMP region.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/ops.h"
#ifdef RF_CUDA
#include "cuda/ops.h"
#endif

namespace py = pybind11;
using namespace rlhf_fast;
using Address = uintptr_t;

namespace {

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

Dtype dtype_of(int code) {
  if (code < 0 || code > static_cast<int>(Dtype::float16)) {
    throw std::invalid_argument("dtype code " + std::to_string(code) + " is not float32, bfloat16 or float16");
  }
  return static_cast<Dtype>(code);
}

void check_size(int64_t size, const char* name) {
  if (size < 0) {
    throw std::invalid_argument(std::string(name) + " is negative: " + std::to_string(size));
  }
}

void check_threads(int threads) {
  if (threads < 1) {
    throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
  }
}

ConstMatrix const_matrix(Address data, int dtype, int64_t rows, int64_t columns, int64_t row_stride) {
  check_size(rows, "rows");
  check_size(columns, "columns");
  check_size(row_stride, "row_stride");
  return {pointer<const void>(data, rows * columns, "logits"), dtype_of(dtype), rows, columns, row_stride};
}

Matrix matrix(Address data, int dtype, int64_t row_stride, const ConstMatrix& like) {
  if (row_stride < like.columns && like.rows > 1) {
    throw std::invalid_argument("the rows of the result overlap: row stride " + std::to_string(row_stride) +
                                " is below its " + std::to_string(like.columns) + " columns");
  }
  return {pointer<void>(data, like.rows * like.columns, "result"), dtype_of(dtype), row_stride};
}

Head head_of(Address labels, const ConstMatrix& logits, int64_t ignore_index, float logit_scale, float temperature,
             float softcap) {
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

RowStatistics row_statistics(Address logprobs, Address entropy, Address lse, int64_t rows) {
  return {pointer<float>(logprobs, rows, "logprobs"), pointer<float>(entropy, rows, "entropy"),
          pointer<double>(lse, rows, "lse")};
}

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

Sequences sequences_of(int64_t count, int64_t length, Address offsets) {
  check_size(count, "count");
  check_size(length, "length");
  return {count, length, optional_pointer<const int32_t>(offsets)};
}

GaeInputs gae_inputs(Address rewards, Address values, Address mask, Address bootstrap, float gamma, float lam,
                     int64_t tokens) {
  return {pointer<const float>(rewards, tokens, "rewards"),
          pointer<const float>(values, tokens, "values"),
          pointer<const uint8_t>(mask, tokens, "mask"),
          optional_pointer<const float>(bootstrap),
          gamma,
          lam};
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

py::tuple isas() {
  py::list names;
  for (const char* const* name = supported_isas(); *name; ++name) {
    names.append(*name);
  }
  return py::tuple(names);
}

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
}

#ifdef RF_CUDA
void check_cuda(int error) {
  if (error) {
    throw std::runtime_error(std::string("CUDA: ") + cuda::error_text(error));
  }
}

void gae_cuda(Address rewards, Address values, Address mask, Address bootstrap, int64_t count, int64_t length,
              Address cu_seqlens, int64_t tokens, float gamma, float lam, Address advantages, Address returns,
              Address stream) {
  if (count > INT32_MAX) {
    throw std::invalid_argument("more sequences than a launch takes: " + std::to_string(count));
  }
  check_cuda(cuda::gae(sequences_of(count, length, cu_seqlens),
                       gae_inputs(rewards, values, mask, bootstrap, gamma, lam, tokens),
                       pointer<float>(advantages, tokens, "advantages"), pointer<float>(returns, tokens, "returns"),
                       reinterpret_cast<void*>(stream)));
}

py::tuple device_count() {
  int error = 0;
  const int count = cuda::device_count(&error);
  return py::make_tuple(count, error ? cuda::error_text(error) : "");
}

void bind_cuda(py::module_ m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.attr("architectures") = RF_CUDA_ARCHITECTURES;
  m.def("runtime_version", &cuda::runtime_version, "The CUDA version this module was built with, e.g. 13000.");
  m.def("driver_version", &cuda::driver_version, "The newest CUDA version the driver supports; 0 without a driver.");
  m.def("device_count", &device_count, "The number of devices, and the error's text if there is none.");
  m.def("gae", &gae_cuda, release());
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of rlhf_fast. Internal: the arguments are addresses.";
  bind_cpu(m.def_submodule("cpu"));
#ifdef RF_CUDA
  bind_cuda(m.def_submodule("cuda"));
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
}
