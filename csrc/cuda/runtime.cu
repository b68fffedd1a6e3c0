// Questions about the driver, answered without raising: a machine without a driver still imports the module.
#include <cuda_runtime.h>

#include "ops.h"

namespace rlhf_fast::cuda {

int device_count(int* error) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();  // or the next launch would report this one
    count = 0;
  }
  *error = status;
  return count;
}

int runtime_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return version;
}

int driver_version() {
  int version = 0;
  cudaDriverGetVersion(&version);
  return version;
}

const char* error_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace rlhf_fast::cuda
