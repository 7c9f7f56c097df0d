// The tensor core's instructions, each as one function, with what it means: 16 x 16 times 16 x 8 products of bf16,
// summed in fp32; loads of their operands from shared memory; and copies to shared memory that do not hold up the
// thread. g++ compiles the same names for the CPU device (dev/cpu/tensor_core.h).
//
// A matrix lies spread over the registers of a warp, a "fragment" a lane: two bf16 neighbours to a register, the first
// in its lower half. In all of them lane l holds row g = l / 4 and the pair of columns p = 2 (l % 4), p + 1 of an 8 x 8
// part; larger matrices are made of such parts, which a register number tells apart:
//
//     8 x 8 part, by lane             A 16 x 16 (rows, k)     B 16 x 8 (k, columns)      D 16 x 8 (rows, columns)
//     columns 0 1  2 3  4 5  6 7             k < 8  k >= 8
//     row 0    0    1    2    3    rows < 8    a0     a2      k < 8    b0  both as B^T:   rows < 8    d0 d1
//     row 1    4    5    6    7    rows >= 8   a1     a3      k >= 8   b1  its row g is   rows >= 8   d2 d3
//     ...                                                                  B's column g
//     row 7   28   29   30   31
//
// D is fp32, one register an element: d0, d1 the pair of row g, d2, d3 the pair of row g + 8. So the two parts of D
// side by side that two products leave, rounded to bf16, are the A of a next product, lane by lane: nothing moves.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

// Two numbers as a register of a fragment
__device__ inline uint32_t bf16_pair(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return (uint32_t)__cvta_generic_to_shared(pointer);
}

// d += A B. All lanes of the warp call together.
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 parts from shared memory, part i into part[i]: its row r is the 16 bytes at the `row` that lane 8 i + r
// brings, a multiple of 16. All lanes call together. Eight rows are read at a time; they must lie in different banks.
__device__ __forceinline__ void load_matrices(uint32_t (&part)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(part[0]), "=r"(part[1]), "=r"(part[2]), "=r"(part[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same, each part transposed: a lane receives column l / 4, rows 2 (l % 4) and the next.
__device__ __forceinline__ void load_transposed(uint32_t (&part)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(part[0]), "=r"(part[1]), "=r"(part[2]), "=r"(part[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Starts a copy of 4, 8 or 16 bytes from global to shared memory, both multiples of that; zeros where not `valid`, and
// `from` is not read. The copy is one of the group that copies_commit closes. Only after copies_wait may the calling
// thread read what came, and the others after a barrier that follows it.
template <int bytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
    const int read = valid ? bytes : 0;
    if constexpr (bytes == 16) {  // past the first-level cache, which keeps nothing here that is asked for again
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(read)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(bytes),
                     "r"(read)
                     : "memory");
    }
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the latest `pending` groups of this thread's copies have come.
template <int pending>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// 2^x, off by at most 2 units in the last place; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#else
#include "tensor_core.h"
#endif
