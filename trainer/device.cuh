// What every kernel file needs: the number type of the build, checks, launches, and a few device primitives.
// The code here and in the files that include it is plain CUDA C++. nvcc compiles it for the GPU; g++ compiles
// the same text for the CPU, where dev/cpu/ holds headers of the names included below.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <memory_resource>
#include <type_traits>
#include <vector>

#ifdef CPU_DEVICE_FAST
#include "inline_launch.h"
#endif

#include "trainer/basics.h"
#include "trainer/floats.cuh"
#include "trainer/watchdog.h"

// floatX: the type of matmul operands (activations and the weights' working copy). Everything that is summed over
// many terms (residual stream, gradients of parameters, master weights, optimizer) is fp32 in every build.
#ifdef PRECISION_BF16
using floatX = __nv_bfloat16;
constexpr const char* precision_name = "bf16";
#else
using floatX = float;
constexpr const char* precision_name = "fp32";
#endif
#ifdef __CUDACC__
constexpr bool is_cpu = false;
#else
constexpr bool is_cpu = true;
#endif
constexpr const char* device_kind = is_cpu ? "cpu" : "cuda";
constexpr bool is_fp32 = std::is_same_v<floatX, float>;

// ---------------------------------------------------------------------------------------------------------------
// Errors

inline void cuda_check(cudaError_t error, const char* call, const char* file, int line) {
    if (error == cudaSuccess) return;
    const char* hint = error == cudaErrorMemoryAllocation ? " (lower --batch-size or --seq-len)" : "";
    throw Error(text("%s:%d: %s: %s%s", file, line, call, cudaGetErrorString(error), hint));
}
#define CHECK_CUDA(call) cuda_check((call), #call, __FILE__, __LINE__)

// ---------------------------------------------------------------------------------------------------------------
// Launch

inline cudaStream_t main_stream = nullptr;  // every kernel and copy of the model runs in this stream

extern __shared__ __align__(16) float dynamic_shared[];  // of as many bytes as the launch says

inline cudaLaunchConfig_t launch_config(const void* kernel, dim3 grid, int threads, size_t shared_bytes) {
    if (shared_bytes > 48 * 1024) {
        CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes));
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = main_stream;
    watchdog.beat();
    return config;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, Arguments... arguments) {
    const cudaLaunchConfig_t config = launch_config((const void*)kernel, grid, threads, shared_bytes);
    CHECK_CUDA(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

// The kernel being part of the function's name, g++ can compile it into the loop over one-thread blocks.
template <auto kernel, class... Arguments>
void launch(dim3 grid, int threads, size_t shared_bytes, Arguments... arguments) {
#ifdef CPU_DEVICE_FAST
    if (threads == 1) {
        const cudaLaunchConfig_t config = launch_config((const void*)kernel, grid, threads, shared_bytes);
        CHECK_CUDA(cpu_device::launch_inline<kernel>(config, arguments...));
        return;
    }
#endif
    launch(kernel, grid, threads, shared_bytes, arguments...);
}

// ---------------------------------------------------------------------------------------------------------------
// Memory

// In DEBUG builds it starts as NaNs, as it does on the CPU, so that a read before a write shows.
template <class T>
T* allocate_on_device(int64_t bytes) {
    T* data = nullptr;
    CHECK_CUDA(cudaMalloc(&data, bytes));
#if defined(DEBUG) && defined(__CUDACC__)
    CHECK_CUDA(cudaMemset(data, 0xff, bytes));
#endif
    return data;
}

// Of a result on its way to the host.
template <class T>
struct DeviceArray {
    T* data = nullptr;
    int64_t count;

    explicit DeviceArray(int64_t count) : data(allocate_on_device<T>(count * sizeof(T))), count(count) {}
    DeviceArray(const DeviceArray&) = delete;
    ~DeviceArray() { cudaFree(data); }

    std::vector<T> read() const {
        std::vector<T> values(count);
        CHECK_CUDA(cudaMemcpyAsync(values.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost, main_stream));
        CHECK_CUDA(cudaStreamSynchronize(main_stream));
        return values;
    }
};

// Host memory from which the device copies while the host goes on.
struct PinnedMemory : std::pmr::memory_resource {
    void* do_allocate(size_t bytes, size_t) override {
        void* memory = nullptr;
        CHECK_CUDA(cudaMallocHost(&memory, bytes));
        return memory;
    }
    void do_deallocate(void* memory, size_t, size_t) override { cudaFreeHost(memory); }
    bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }
};

// ---------------------------------------------------------------------------------------------------------------
// Device primitives

// What differs in the CPU build for speed: a block is one thread, which works on wider vectors instead. The build that
// runs the GPU's blocks on a CPU, for tests and under DEBUG, is as the GPU.
#ifdef CPU_DEVICE_FAST
constexpr bool is_fast_cpu = true;
#else
constexpr bool is_fast_cpu = false;
#endif
constexpr int warp_size = is_fast_cpu ? 1 : 32;
constexpr unsigned full_warp = 0xffffffffu;

constexpr int block_threads(int64_t threads) { return is_fast_cpu ? 1 : (int)threads; }

// Elements a thread moves at a time, where T is the widest type of those it moves: 16 bytes on the GPU, a vector
// register in the CPU build for speed.
#if defined(CPU_DEVICE_FAST) && defined(__AVX512F__)
template <class T>
constexpr int wide = 16;
#elif defined(CPU_DEVICE_FAST)
template <class T>
constexpr int wide = 8;
#else
template <class T>
constexpr int wide = 16 / sizeof(T);
#endif

// Calls function(n) with the largest n, as a compile-time constant, that is not over wide<T> and divides `length`, a
// multiple of `least`. All rows are multiples of 4 elements.
template <class T, int least = 4, int n = wide<T>, class Function>
void with_width(int64_t length, Function function) {
    if constexpr (n > least) {
        if (length % n != 0) return with_width<T, least, n / 2>(length, function);
    }
    function(std::integral_constant<int, n>());
}

// Threads of a block that shares rows of `length` elements, n of them a thread at a time.
inline int row_threads(int64_t length, int n) {
    return block_threads(std::min<int64_t>(256, round_up(ceil_div(length, n), 32)));
}

// A tensor whose rows do not matter is cut into shares of this many elements, one a block.
constexpr int block_share = is_fast_cpu ? 4096 : 1024;

template <auto kernel, int n, class... Arguments>
void launch_shares(int64_t count, Arguments... arguments) {
    launch<kernel>(dim3(narrow(ceil_div(count, block_share))), block_threads(block_share / n), 0, arguments..., count);
}

// visit(i) for the first of each n elements of the block's share of `count` that this thread owns.
template <int n, class Visit>
__device__ inline void for_share(int64_t count, Visit visit) {
    const int64_t begin = (int64_t)blockIdx.x * block_share, end = min(count, begin + block_share);
    for (int64_t i = begin + threadIdx.x * n; i < end; i += blockDim.x * n) visit(i);
}

// Sum and maximum over groups of `lanes` neighbouring lanes (a power of two); every lane of the warp must call.
template <class T>
__device__ inline T group_sum(T x, int lanes = warp_size) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(full_warp, x, offset);
    return x;
}
__device__ inline float group_max(float x, int lanes = warp_size) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(full_warp, x, offset));
    return x;
}

// The sum of x over the block, for thread 0; all threads must call.
template <class T>
__device__ inline T block_sum(T x) {
    __shared__ T sums[32];
    x = group_sum(x);
    if (threadIdx.x % warp_size == 0) sums[threadIdx.x / warp_size] = x;
    __syncthreads();
    for (int warp = 1; threadIdx.x == 0 && warp < (int)blockDim.x / warp_size; warp++) x += sums[warp];
    __syncthreads();  // before the next call writes
    return x;
}

// Multiprocessors of the GPU. A CPU counts as one of a fixed size, so that its number of threads changes no result.
inline int multiprocessors() {
    if (is_cpu) return 64;
    int device, count;
    CHECK_CUDA(cudaGetDevice(&device));
    CHECK_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
}

// sum (C) = the column sums of partial (rows, C), or += if it accumulates: the last step of a gradient that many blocks
// have summed, in a fixed order. With a second sum (C) the rows hold both, partial (rows, 2, C). A group of up to 8
// lanes owns every so many-th row of its block's columns, a lane n of these. Bytes: reads 4 rows a column, writes 4,
// and reads them if it accumulates.
constexpr int partial_threads = 256, partial_lanes = block_threads(8);
template <int n>
__global__ void add_partial_rows_kernel(float* sum, float* second, const float* partial, int rows, int C,
                                        bool accumulate) {
    __shared__ float sums[partial_threads * n];
    const int lane = threadIdx.x % partial_lanes, groups = blockDim.x / partial_lanes;
    const int c = (blockIdx.x * partial_lanes + lane) * n, columns = second ? 2 * C : C;
    Floats<n> total = 0.0f;
    for (int row = threadIdx.x / partial_lanes; c < columns && row < rows; row += groups)
        total += load<n>(partial + (int64_t)row * columns + c);
    store_shared(sums + threadIdx.x * n, total);
    __syncthreads();
    if (c >= columns || threadIdx.x >= partial_lanes) return;
    for (int group = 1; group < groups; group++) total += load<n>(sums + (group * partial_lanes + lane) * n);
    float* target = c < C ? sum + c : second + (c - C);
    store(target, accumulate ? load<n>(target) + total : total);
}

inline void add_partial_rows(float* sum, float* second, const float* partial, int rows, int C, bool accumulate) {
    with_width<float>(C, [&](auto n) {
        launch<add_partial_rows_kernel<n>>(dim3(ceil_div(second ? 2 * C : C, partial_lanes * n)),
                                           block_threads(partial_threads), 0, sum, second, partial, rows, C,
                                           accumulate);
    });
}
