// The Python face of the native kernels: module rlhf_fast._C. It knows nothing of torch: tensors come as addresses,
// sizes and strides, a CUDA stream as an integer, so one build serves every torch version.
#include "bindings.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of rlhf_fast. Internal: the arguments are addresses.";
  rlhf_fast::bind_cpu(m.def_submodule("cpu"));
#ifdef RF_CUDA
  rlhf_fast::bind_cuda(m.def_submodule("cuda"));
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
}
