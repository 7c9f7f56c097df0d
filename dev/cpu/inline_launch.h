// Kernels of one-thread blocks, as a build for speed launches them: g++ compiles the loop over the blocks together with
// the kernel. Nothing waits in such a block, so no fiber is needed.
#pragma once
#include "cuda_runtime.h"

namespace cpu_device {

int cpu_threads();

// What is wrong with the configuration of this kernel's launch, for cudaGetLastError() too.
cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel);

// Before each block: makes reads of what it has not written, and accesses beyond what its launch asked for, show.
void prepare_shared_memory(size_t bytes);

// Blocks first .. last - 1 of the launch.
template <auto kernel, class... Arguments>
__attribute__((flatten)) void run_blocks(const cudaLaunchConfig_t& config, uint64_t first, uint64_t last,
                                         Arguments... arguments) {
    const dim3 grid = gridDim = config.gridDim;
    blockDim = dim3(1);
    threadIdx = {0, 0, 0};
    const uint64_t row = first / grid.x;
    uint3 block = {unsigned(first % grid.x), unsigned(row % grid.y), unsigned(row / grid.y)};
    for (uint64_t i = first; i < last; i++) {
        blockIdx = block;
#ifdef CPU_DEVICE_DEBUG
        prepare_shared_memory(config.dynamicSmemBytes);
#endif
        kernel(arguments...);
        if (++block.x < grid.x) continue;
        block.x = 0;
        if (++block.y < grid.y) continue;
        block.y = 0, block.z++;
    }
}

template <auto kernel, class... Arguments>
cudaError_t launch_inline(const cudaLaunchConfig_t& config, Arguments... arguments) {
    const cudaError_t error = check_launch(config, reinterpret_cast<const void*>(kernel));
    if (error != cudaSuccess) return error;
    const dim3 grid = config.gridDim;
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z, cores = uint64_t(cpu_threads());
    if (blocks == 1 || cores == 1) {
        run_blocks<kernel>(config, 0, blocks, arguments...);
        return cudaSuccess;
    }
    const uint64_t chunk = std::max<uint64_t>(1, blocks / (cores * 16));
#pragma omp parallel for schedule(dynamic, 1)
    for (uint64_t first = 0; first < blocks; first += chunk)
        run_blocks<kernel>(config, first, std::min(blocks, first + chunk), arguments...);
    return cudaSuccess;
}

}  // namespace cpu_device
