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

#include "trainer/basics.h"
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

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, Arguments... arguments) {
    if (shared_bytes > 48 * 1024) {
        CHECK_CUDA(
            cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes));
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = main_stream;
    watchdog.beat();
    CHECK_CUDA(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

// ---------------------------------------------------------------------------------------------------------------
// Memory of a result on its way to the host

template <class T>
struct DeviceArray {
    T* data = nullptr;
    int64_t count;

    explicit DeviceArray(int64_t count) : count(count) { CHECK_CUDA(cudaMalloc(&data, count * sizeof(T))); }
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

constexpr int warp_size = 32;
constexpr unsigned full_warp = 0xffffffffu;

__host__ __device__ inline float to_float(float x) { return x; }
__host__ __device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T>
__host__ __device__ inline T from_float(float x) {
    if constexpr (std::is_same_v<T, float>) return x;
    else return __float2bfloat16(x);
}

// Four neighbours, moved as one word of 16 (fp32) or 8 (bf16) bytes and worked on in fp32. All rows are multiples
// of 4 elements, so every row starts on such a word.
struct Float4 {
    float v[4];
    __device__ float& operator[](int i) { return v[i]; }
    __device__ float operator[](int i) const { return v[i]; }
};

template <class T>
struct alignas(4 * sizeof(T)) Word4 {
    T v[4];
};

template <class T>
__device__ inline Float4 load4(const T* address) {
    const Word4<T> word = *reinterpret_cast<const Word4<T>*>(address);
    Float4 x;
    for (int i = 0; i < 4; i++) x[i] = to_float(word.v[i]);
    return x;
}

template <class T>
__device__ inline void store4(T* address, Float4 x) {
    Word4<T> word;
    for (int i = 0; i < 4; i++) word.v[i] = from_float<T>(x[i]);
    *reinterpret_cast<Word4<T>*>(address) = word;
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

// sum[i] += sum over k < count of weights[k] * rows[k * stride + i]: a vector times a matrix, the sums in registers.
// The weights come from memory because a loop cannot index registers, and `count` is too large to unroll.
#if defined(__CUDACC__) || defined(CPU_DEVICE_DEBUG)
template <int count, int n>
__device__ __forceinline__ void add_weighted_rows(float (&sum)[n], const float* weights, const float* rows,
                                                  int stride) {
#pragma unroll 2
    for (int k = 0; k < count; k++) {
        const float weight = weights[k];
#pragma unroll
        for (int i = 0; i < n; i++) sum[i] += weight * rows[k * stride + i];
    }
}
#else
#include "vector_rows.h"  // g++ finds no vectors in the loop above that last from one k to the next
#endif

// sum (C) = the column sums of partial (rows, C), or += if it accumulates: the last step of a gradient that many blocks
// have summed, in a fixed order. With a second sum (C) the rows hold both, partial (rows, 2, C). A thread owns a
// column. Bytes: reads 4 rows a column, writes 4, and reads them if it accumulates.
__global__ void add_partial_rows_kernel(float* sum, float* second, const float* partial, int rows, int C,
                                        bool accumulate) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x, columns = second ? 2 * C : C;
    if (c >= columns) return;
    float column = 0;
    for (int row = 0; row < rows; row++) column += partial[(int64_t)row * columns + c];
    float& total = c < C ? sum[c] : second[c - C];
    total = accumulate ? total + column : column;
}

inline void add_partial_rows(float* sum, float* second, const float* partial, int rows, int C, bool accumulate) {
    const int columns = second ? 2 * C : C;
    launch(add_partial_rows_kernel, dim3(ceil_div(columns, 128)), 128, 0, sum, second, partial, rows, C, accumulate);
}
