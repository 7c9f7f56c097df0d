// The functions of trainer/tensor_core.cuh, which says what they mean, on the CPU (tensor_core.cpp).
//
// The lanes of a warp publish where their fragments are, and the last of them to come computes for all: one meeting a
// product. Copies come as late as CUDA allows: the destination is filled with NaNs when a copy starts, and the copy is
// made inside the wait for it. So a missing wait, or a missing barrier behind it or before the next copy, shows.
#pragma once
#include "device_functions.h"
#include "observer.h"

namespace cpu_device {

struct LoadMatrices {  // what a lane brings
    uint32_t* parts;
    const void* row;
};
struct Mma {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};

// What a collective of the tensor core does, given each lane's operands: pointers to the structs above.
void run_tensor_core(Collective kind, const uint64_t (&operands)[32]);

void start_copy(void* to, const void* from, unsigned bytes, bool valid, Where where);
void commit_copies();
void wait_for_copies(unsigned pending);
void forget_copies();  // of the block before

}  // namespace cpu_device

inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                cpu_device::Where where = cpu_device::Where::current()) {
    const cpu_device::Mma operands = {d, a, {b0, b1}};
    cpu_device::warp_collective(cpu_device::Collective::mma, 0xffffffff, (uint64_t)&operands, 0, where);
}
inline void load_matrices(uint32_t (&part)[4], const void* row,
                          cpu_device::Where where = cpu_device::Where::current()) {
    const cpu_device::LoadMatrices operands = {part, row};
    if (cpu_device::observer::touched) cpu_device::observer::touched(row, 16, false);
    cpu_device::warp_collective(cpu_device::Collective::load_matrices, 0xffffffff, (uint64_t)&operands, 0, where);
}
inline void load_transposed(uint32_t (&part)[4], const void* row,
                            cpu_device::Where where = cpu_device::Where::current()) {
    const cpu_device::LoadMatrices operands = {part, row};
    if (cpu_device::observer::touched) cpu_device::observer::touched(row, 16, false);
    cpu_device::warp_collective(cpu_device::Collective::load_transposed, 0xffffffff, (uint64_t)&operands, 0, where);
}

template <int bytes>
void copy_async(void* to, const void* from, bool valid, cpu_device::Where where = cpu_device::Where::current()) {
    static_assert(bytes == 4 || bytes == 8 || bytes == 16);
    cpu_device::start_copy(to, from, bytes, valid, where);
}
inline void copies_commit() { cpu_device::commit_copies(); }
template <int pending>
void copies_wait() {
    cpu_device::wait_for_copies(pending);
}

inline float exp2_approx(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0 : y;
}
