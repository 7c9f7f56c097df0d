// What a program may ask to be told of kernels as they run, and of the work that is no kernel. The functions are
// weak: one that a program does not define is null, and is not called. dev/accesses defines them.
#pragma once
#include <cstddef>
#include <cstdint>

#include "vector_types.h"

namespace cpu_device::observer {

// A launch whose blocks run one after the other on one OS thread: those that next_block() names, until it says -1.
[[gnu::weak]] void begin_launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes);
[[gnu::weak]] int64_t next_block();

// All threads of the block have met in a barrier; these lanes of a warp have met in __syncwarp.
[[gnu::weak]] void block_met();
[[gnu::weak]] void lanes_met(unsigned warp, unsigned lanes);

// The CPU device itself reads or writes memory for the CUDA thread that runs: what the compiler does not tell of.
[[gnu::weak]] void touched(const void* address, size_t size, bool write);

// A matrix product, and memory that is set or copied. What returns true is not done.
[[gnu::weak]] bool product(int64_t m, int64_t n, int64_t k, double bytes);
[[gnu::weak]] bool fill(size_t bytes);

// The stack of the CUDA thread that runs.
struct Stack {
    const char* bottom;
    size_t size;
};
Stack running_stack();

}  // namespace cpu_device::observer
