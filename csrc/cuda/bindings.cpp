// The CUDA operations as Python functions: rlhf_fast._C.cuda.
#include "../bindings.h"

#include "ops.h"

namespace rlhf_fast {
namespace {

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

}  // namespace

void bind_cuda(py::module_ m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.attr("architectures") = RF_CUDA_ARCHITECTURES;
  m.def("runtime_version", &cuda::runtime_version, "The CUDA version this module was built with, e.g. 13000.");
  m.def("driver_version", &cuda::driver_version, "The newest CUDA version the driver supports; 0 without a driver.");
  m.def("device_count", &device_count, "The number of devices, and the error's text if there is none.");
  m.def("gae", &gae_cuda, release());
}
}  // namespace rlhf_fast
