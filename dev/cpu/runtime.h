// What the parts of the CPU device share with each other, and no one else needs.
#pragma once
#include "cuda_runtime.h"

namespace cpu_device {

// Remembers the error for cudaGetLastError and returns it.
cudaError_t set_error(cudaError_t error);

// OpenMP threads this process uses; the first call decides and tells OpenMP.
int cpu_threads();

}  // namespace cpu_device
