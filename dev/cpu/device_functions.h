// What a CUDA kernel may say, with the same meaning on the CPU: qualifiers, built-in variables, barriers, warp
// collectives, atomics and intrinsics. How threads run is described in device.cpp.
//
// A call that CUDA leaves undefined (a lane outside its own mask, a barrier only some threads reach, a shuffle from
// a lane that does not take part) ends the program, with one line that says where and why.
#pragma once
#include <math.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <source_location>

#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))

// A block runs on one OS thread from start to end, so what that thread owns is the block's. constinit tells g++ that
// a variable defined elsewhere needs no initialization check at each access. The tag becomes part of the symbol's
// name: a debug build finds every __shared__ variable by it, to fill it with NaNs before each block.
#define __shared__ __attribute__((abi_tag("shared"))) constinit thread_local

// A block's dynamic shared memory. Kernels declare it themselves, outside any namespace, as
//     extern __shared__ __align__(16) float dynamic_shared[];
// and no other name or type. It is declared here too, as g++ forgets constinit on an array of unknown length.
constexpr size_t dynamic_shared_limit = 227 * 1024;  // bytes, as on Hopper
extern __shared__ float dynamic_shared[dynamic_shared_limit / sizeof(float)];

extern constinit thread_local uint3 threadIdx, blockIdx;
extern constinit thread_local dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cpu_device {

using Where = std::source_location;

enum class Barrier : uint8_t { sync, sync_or, sync_and, sync_count };
enum class Collective : uint8_t {
    sync,
    shuffle,
    shuffle_up,
    shuffle_down,
    shuffle_xor,
    ballot,
    any,
    all,
    add,
    min_signed,
    max_signed,
    min_unsigned,
    max_unsigned,
    bit_and,
    bit_or,
    bit_xor,
    load_matrices,  // of the tensor core: tensor_core.h
    load_transposed,
    mma
};

// Wait until every thread of the block that has not exited is here; returns what `kind` makes of their predicates.
int block_barrier(Barrier kind, int predicate, Where where);

// Wait until every lane in mask that has not exited is here. A shuffle returns the value of lane `source`, the others
// what they make of all values; those of the tensor core get pointers and return nothing.
uint64_t warp_collective(Collective kind, unsigned mask, uint64_t value, unsigned source, Where where);

[[noreturn]] void fail_in_kernel(const char* message, Where where);

inline unsigned lane_id() {
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    return thread % 32;
}

template <class T>
concept Shuffled = std::is_trivially_copyable_v<T> && sizeof(T) <= 8;

template <Shuffled T>
T shuffle(Collective kind, unsigned mask, T value, unsigned source, Where where) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = warp_collective(kind, mask, bits, source, where);
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline unsigned group_begin(unsigned lane, int width, Where where) {
    if (width < 1 || width > 32 || !std::has_single_bit(unsigned(width))) [[unlikely]]
        fail_in_kernel("a shuffle's width must be 1, 2, 4, 8, 16 or 32", where);
    return lane & ~unsigned(width - 1);
}

}  // namespace cpu_device

// ---------------------------------------------------------------------------------------------------------------
// Barriers of a block

inline void __syncthreads(cpu_device::Where where = cpu_device::Where::current()) {
    if (blockDim.x * blockDim.y * blockDim.z == 1) return;  // has no one to wait for, and may run outside of fibers
    cpu_device::block_barrier(cpu_device::Barrier::sync, 0, where);
}
inline int __syncthreads_or(int predicate, cpu_device::Where where = cpu_device::Where::current()) {
    return cpu_device::block_barrier(cpu_device::Barrier::sync_or, predicate, where);
}
inline int __syncthreads_and(int predicate, cpu_device::Where where = cpu_device::Where::current()) {
    return cpu_device::block_barrier(cpu_device::Barrier::sync_and, predicate, where);
}
inline int __syncthreads_count(int predicate, cpu_device::Where where = cpu_device::Where::current()) {
    return cpu_device::block_barrier(cpu_device::Barrier::sync_count, predicate, where);
}

// ---------------------------------------------------------------------------------------------------------------
// Collectives of a warp

inline void __syncwarp(unsigned mask = 0xffffffff, cpu_device::Where where = cpu_device::Where::current()) {
    cpu_device::warp_collective(cpu_device::Collective::sync, mask, 0, 0, where);
}

template <cpu_device::Shuffled T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              cpu_device::Where where = cpu_device::Where::current()) {
    const unsigned begin = cpu_device::group_begin(cpu_device::lane_id(), width, where);
    return cpu_device::shuffle(cpu_device::Collective::shuffle, mask, value, begin + (source & (width - 1)), where);
}
template <cpu_device::Shuffled T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 cpu_device::Where where = cpu_device::Where::current()) {
    const unsigned lane = cpu_device::lane_id(), begin = cpu_device::group_begin(lane, width, where);
    const unsigned source = lane - begin < delta ? lane : lane - delta;
    return cpu_device::shuffle(cpu_device::Collective::shuffle_up, mask, value, source, where);
}
template <cpu_device::Shuffled T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   cpu_device::Where where = cpu_device::Where::current()) {
    const unsigned lane = cpu_device::lane_id(), begin = cpu_device::group_begin(lane, width, where);
    const unsigned source = delta >= begin + width - lane ? lane : lane + delta;
    return cpu_device::shuffle(cpu_device::Collective::shuffle_down, mask, value, source, where);
}
// With width < 32 a lane reads from earlier groups too, but not from later ones (CUDA C++ Programming Guide).
template <cpu_device::Shuffled T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  cpu_device::Where where = cpu_device::Where::current()) {
    const unsigned lane = cpu_device::lane_id(), begin = cpu_device::group_begin(lane, width, where);
    const unsigned other = lane ^ unsigned(lane_mask), source = other < begin + width ? other : lane;
    return cpu_device::shuffle(cpu_device::Collective::shuffle_xor, mask, value, source, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, cpu_device::Where where = cpu_device::Where::current()) {
    return unsigned(cpu_device::warp_collective(cpu_device::Collective::ballot, mask, predicate != 0, 0, where));
}
inline int __any_sync(unsigned mask, int predicate, cpu_device::Where where = cpu_device::Where::current()) {
    return int(cpu_device::warp_collective(cpu_device::Collective::any, mask, predicate != 0, 0, where));
}
inline int __all_sync(unsigned mask, int predicate, cpu_device::Where where = cpu_device::Where::current()) {
    return int(cpu_device::warp_collective(cpu_device::Collective::all, mask, predicate != 0, 0, where));
}

template <class T>
concept Word = std::same_as<T, int> || std::same_as<T, unsigned>;

template <Word T>
T __reduce_add_sync(unsigned mask, T value, cpu_device::Where where = cpu_device::Where::current()) {
    return T(cpu_device::warp_collective(cpu_device::Collective::add, mask, unsigned(value), 0, where));
}
template <Word T>
T __reduce_min_sync(unsigned mask, T value, cpu_device::Where where = cpu_device::Where::current()) {
    using enum cpu_device::Collective;
    constexpr auto kind = std::same_as<T, int> ? min_signed : min_unsigned;
    return T(cpu_device::warp_collective(kind, mask, unsigned(value), 0, where));
}
template <Word T>
T __reduce_max_sync(unsigned mask, T value, cpu_device::Where where = cpu_device::Where::current()) {
    using enum cpu_device::Collective;
    constexpr auto kind = std::same_as<T, int> ? max_signed : max_unsigned;
    return T(cpu_device::warp_collective(kind, mask, unsigned(value), 0, where));
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value,
                                  cpu_device::Where where = cpu_device::Where::current()) {
    return unsigned(cpu_device::warp_collective(cpu_device::Collective::bit_and, mask, value, 0, where));
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value,
                                 cpu_device::Where where = cpu_device::Where::current()) {
    return unsigned(cpu_device::warp_collective(cpu_device::Collective::bit_or, mask, value, 0, where));
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value,
                                  cpu_device::Where where = cpu_device::Where::current()) {
    return unsigned(cpu_device::warp_collective(cpu_device::Collective::bit_xor, mask, value, 0, where));
}

// ---------------------------------------------------------------------------------------------------------------
// Atomics and memory. Each returns the value before, and orders nothing else, as on the GPU.

template <class T>
concept AtomicInteger = Word<T> || std::same_as<T, unsigned long long>;
template <class T>
concept AtomicNumber = AtomicInteger<T> || std::same_as<T, float> || std::same_as<T, double>;

template <AtomicNumber T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
    return std::atomic_ref(*address).fetch_add(value, std::memory_order_relaxed);
}
template <Word T>
T atomicSub(T* address, std::type_identity_t<T> value) {
    return std::atomic_ref(*address).fetch_sub(value, std::memory_order_relaxed);
}
template <AtomicNumber T>
T atomicExch(T* address, std::type_identity_t<T> value) {
    return std::atomic_ref(*address).exchange(value, std::memory_order_relaxed);
}
template <AtomicInteger T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
    std::atomic_ref(*address).compare_exchange_strong(expected, value, std::memory_order_relaxed);
    return expected;
}
template <AtomicInteger T>
T atomicMax(T* address, std::type_identity_t<T> value) {
    std::atomic_ref target(*address);
    T old = target.load(std::memory_order_relaxed);
    while (old < value && !target.compare_exchange_weak(old, value, std::memory_order_relaxed)) {
    }
    return old;
}
template <AtomicInteger T>
T atomicMin(T* address, std::type_identity_t<T> value) {
    std::atomic_ref target(*address);
    T old = target.load(std::memory_order_relaxed);
    while (old > value && !target.compare_exchange_weak(old, value, std::memory_order_relaxed)) {
    }
    return old;
}
template <AtomicInteger T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
    return std::atomic_ref(*address).fetch_and(value, std::memory_order_relaxed);
}
template <AtomicInteger T>
T atomicOr(T* address, std::type_identity_t<T> value) {
    return std::atomic_ref(*address).fetch_or(value, std::memory_order_relaxed);
}
template <AtomicInteger T>
T atomicXor(T* address, std::type_identity_t<T> value) {
    return std::atomic_ref(*address).fetch_xor(value, std::memory_order_relaxed);
}

inline void __threadfence_block() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }

template <class T>
T __ldg(const T* address) {
    return *address;
}
template <class T>
T __ldcs(const T* address) {
    return *address;
}
template <class T>
T __ldcg(const T* address) {
    return *address;
}
template <class T>
void __stcs(T* address, std::type_identity_t<T> value) {
    *address = value;
}
template <class T>
void __stcg(T* address, std::type_identity_t<T> value) {
    *address = value;
}

[[noreturn]] inline void __trap(cpu_device::Where where = cpu_device::Where::current()) {
    cpu_device::fail_in_kernel("__trap", where);
}

// ---------------------------------------------------------------------------------------------------------------
// Bits

constexpr unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
constexpr int __float_as_int(float x) { return std::bit_cast<int>(x); }
constexpr float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
constexpr float __int_as_float(int x) { return std::bit_cast<float>(x); }
constexpr long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
constexpr double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

constexpr int __popc(unsigned x) { return std::popcount(x); }
constexpr int __popcll(unsigned long long x) { return std::popcount(x); }
constexpr int __clz(int x) { return std::countl_zero(unsigned(x)); }
constexpr int __clzll(long long x) { return std::countl_zero((unsigned long long)x); }
constexpr int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(unsigned(x)) + 1; }
constexpr int __ffsll(long long x) { return x == 0 ? 0 : std::countr_zero((unsigned long long)x) + 1; }
constexpr unsigned __brev(unsigned x) {
    x = (x >> 1 & 0x55555555) | (x & 0x55555555) << 1;
    x = (x >> 2 & 0x33333333) | (x & 0x33333333) << 2;
    x = (x >> 4 & 0x0f0f0f0f) | (x & 0x0f0f0f0f) << 4;
    return __builtin_bswap32(x);
}
constexpr int __mulhi(int a, int b) { return int((long long)a * b >> 32); }
constexpr unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
constexpr unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}

// ---------------------------------------------------------------------------------------------------------------
// Arithmetic

constexpr int min(int a, int b) { return b < a ? b : a; }
constexpr int max(int a, int b) { return a < b ? b : a; }
constexpr unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
constexpr unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
constexpr long min(long a, long b) { return b < a ? b : a; }
constexpr long max(long a, long b) { return a < b ? b : a; }
constexpr long long min(long long a, long long b) { return b < a ? b : a; }
constexpr long long max(long long a, long long b) { return a < b ? b : a; }
constexpr unsigned long min(unsigned long a, unsigned long b) { return b < a ? b : a; }
constexpr unsigned long max(unsigned long a, unsigned long b) { return a < b ? b : a; }
constexpr unsigned long long min(unsigned long long a, unsigned long long b) { return b < a ? b : a; }
constexpr unsigned long long max(unsigned long long a, unsigned long long b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline int __float2int_rn(float x) { return int(lrintf(x)); }
inline int __float2int_rd(float x) { return int(floorf(x)); }
inline int __float2int_rz(float x) { return int(x); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }

// The intrinsics below bear names that glibc's <math.h> declares, without defining them: hence noexcept.

// exp(x) for every x, without branches, so that loops over it become vector code. Error at most 2 units in the last
// place (test_cpu_device measures it). exp(x) = 2^n exp(r) with |r| <= log(2)/2; exp(r) is a near-minimax polynomial.
__forceinline__ float __expf(float x) noexcept {
    x = x < -105.0f ? -105.0f : x;    // exp rounds to 0 there; a NaN passes both comparisons
    x = x > 89.0f ? 89.0f : x;        // exp overflows there
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
    const float shifted = x * 1.44269504f + shift;
    const float n = shifted - shift;
    const float r = (x - n * 0.69140625f) - n * 1.74093056e-3f;  // log(2) in two parts: the first product is exact
    float p = 1.39262508e-3f;
    p = p * r + 8.36323288e-3f;
    p = p * r + 4.16665542e-2f;
    p = p * r + 1.66665767e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    // 2^n as a product of two factors, since n reaches from -152 to 128 and one float holds only -126 to 127.
    const unsigned biased = __float_as_uint(shifted) - __float_as_uint(shift) + 2 * 127;
    const unsigned half = biased >> 1;
    return p * __uint_as_float(half << 23) * __uint_as_float((biased - half) << 23);
}

// tanh(x) for every x, without branches; error at most 2 units in the last place.
__forceinline__ float __tanhf(float x) noexcept {
    const float z = x * x, e = __expf(2.0f * fabsf(x));
    float p = -6.04516510e-3f;
    p = p * z + 2.09613291e-2f;
    p = p * z - 5.38432632e-2f;
    p = p * z + 1.33327189e-1f;
    p = p * z - 3.33333284e-1f;
    const float near = x + x * z * p;
    const float far = copysignf(1.0f - 2.0f / (e + 1.0f), x);
    return fabsf(x) < 0.625f ? near : far;
}

inline float __logf(float x) noexcept { return logf(x); }
inline float __log2f(float x) noexcept { return log2f(x); }
inline float __log10f(float x) noexcept { return log10f(x); }
inline float __exp10f(float x) noexcept { return exp10f(x); }
inline float __powf(float x, float y) noexcept { return powf(x, y); }
inline float __sinf(float x) noexcept { return sinf(x); }
inline float __cosf(float x) noexcept { return cosf(x); }
inline float __tanf(float x) noexcept { return tanf(x); }
inline void __sincosf(float x, float* sine, float* cosine) noexcept { *sine = sinf(x), *cosine = cosf(x); }
