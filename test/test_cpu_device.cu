// The CPU device (dev/cpu) keeps CUDA's promises: threads, barriers, warps, memory, errors, number formats, and
// cuBLASLt's products. Expectations come from the CUDA documentation; products are compared with a loop in double.
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "trainer/tensor_core.cuh"

extern __shared__ __align__(16) float dynamic_shared[];

namespace {

constexpr unsigned full = 0xffffffff;

// An array in device memory. Under AddressSanitizer an access beyond its end is reported.
template <class T>
struct Array {
    T* data = nullptr;
    size_t size;
    explicit Array(size_t size, T value = T()) : size(size) {
        EXPECT_EQ(cudaMalloc(&data, size * sizeof(T)), cudaSuccess);
        std::fill_n(data, size, value);
    }
    explicit Array(const std::vector<T>& values) : Array(values.size()) {
        std::copy(values.begin(), values.end(), data);
    }
    Array(const Array&) = delete;
    ~Array() { cudaFree(data); }
    T& operator[](size_t i) { return data[i]; }
};

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Arguments... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Runs what follows in one order of threads and leaves the usual order behind.
struct WithOrder {
    explicit WithOrder(const char* order) { EXPECT_TRUE(cpu_device::set_order(order)) << order; }
    ~WithOrder() { cpu_device::set_order("forward"); }
};
const char* const orders[] = {"forward", "reverse", "shuffle:1", "shuffle:2", "shuffle:77"};

// ---------------------------------------------------------------------------------------------------------------
// Threads

__global__ void record_indices_kernel(uint3* threads, uint3* blocks, int* visits) {
    const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const unsigned i = block * blockDim.x * blockDim.y * blockDim.z + thread;
    threads[i] = threadIdx;
    blocks[i] = blockIdx;
    atomicAdd(&visits[i], 1);
}

TEST(Threads, EveryIndexOfA3DGridOnce) {
    const dim3 grid(3, 4, 5), block(7, 3, 2);
    const size_t n = 60 * 42;
    for (const char* order : orders) {
        const WithOrder with(order);
        Array<uint3> threads(n), blocks(n);
        Array<int> visits(n, 0);
        ASSERT_EQ(launch(record_indices_kernel, grid, block, 0, threads.data, blocks.data, visits.data), cudaSuccess);
        for (unsigned i = 0; i < n; i++) {
            const unsigned b = i / 42, t = i % 42;
            ASSERT_EQ(visits[i], 1) << order;
            ASSERT_TRUE(threads[i].x == t % 7 && threads[i].y == t / 7 % 3 && threads[i].z == t / 21) << i;
            ASSERT_TRUE(blocks[i].x == b % 3 && blocks[i].y == b / 3 % 4 && blocks[i].z == b / 12) << i;
        }
    }
}

__global__ void order_kernel(int* next, int* turn) { turn[threadIdx.x] = (*next)++; }

TEST(Threads, TakeTurnsInTheOrderAskedFor) {
    const auto turns = [](const char* order) {
        const WithOrder with(order);
        Array<int> next(1, 0), turn(100);
        EXPECT_EQ(launch(order_kernel, 1, 100, 0, next.data, turn.data), cudaSuccess);
        return std::vector<int>(turn.data, turn.data + 100);
    };
    const std::vector<int> forward = turns("forward"), reverse = turns("reverse"), shuffled = turns("shuffle:5");
    for (int i = 0; i < 100; i++) EXPECT_TRUE(forward[i] == i && reverse[i] == 99 - i);
    EXPECT_EQ(shuffled, turns("shuffle:5"));
    EXPECT_NE(shuffled, turns("shuffle:6"));
    EXPECT_NE(shuffled, forward);
    EXPECT_FALSE(cpu_device::set_order("backward"));
    EXPECT_FALSE(cpu_device::set_order("shuffle:"));
    EXPECT_FALSE(cpu_device::set_order("shuffle:1x"));
}

template <class T, int N>
struct Big {
    T values[N];
};
__global__ void by_value_kernel(Big<int, 100> big, const float factor, float* out, long long offset) {
    out[0] = factor * float(std::accumulate(big.values, big.values + 100, 0)) + float(offset);
    big.values[0] = 1000;  // each thread has a copy of its own
}

TEST(Threads, ArgumentsAreCopies) {
    Big<int, 100> big;
    std::iota(big.values, big.values + 100, 0);
    Array<float> out(1);
    ASSERT_EQ(launch(by_value_kernel, 2, 64, 0, big, 2, out.data, 5), cudaSuccess);  // int converts to float, long long
    EXPECT_EQ(out[0], 2 * 4950 + 5);
}

__constant__ float coefficients[4];
__device__ int device_counter = 0;
__global__ void constant_kernel(float* out) {
    out[threadIdx.x] = coefficients[threadIdx.x];
    atomicAdd(&device_counter, 1);
}

TEST(Threads, ConstantAndDeviceVariables) {
    const float values[] = {1, 2, 3, 4};
    ASSERT_EQ(cudaMemcpyToSymbol(coefficients, values, sizeof values), cudaSuccess);
    EXPECT_EQ(cudaMemcpyToSymbol(coefficients, values, sizeof values, 4), cudaErrorInvalidValue);
    Array<float> out(4);
    ASSERT_EQ(launch(constant_kernel, 1, 4, 0, out.data), cudaSuccess);
    for (int i = 0; i < 4; i++) EXPECT_EQ(out[i], values[i]);
    int count = 0;
    ASSERT_EQ(cudaMemcpyFromSymbol(&count, device_counter, sizeof count), cudaSuccess);
    EXPECT_EQ(count, 4);
}

// ---------------------------------------------------------------------------------------------------------------
// Barriers and shared memory

// Reverses each block's elements; with the barrier left out it would read what has not been written.
template <bool with_barrier>
__global__ void reverse_kernel(int* data) {
    __shared__ int tile[256];
    tile[threadIdx.x] = -1;
    __syncthreads();
    tile[threadIdx.x] = data[blockIdx.x * blockDim.x + threadIdx.x];
    if (with_barrier) __syncthreads();
    data[blockIdx.x * blockDim.x + threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

std::vector<int> reversed_blocks(void (*kernel)(int*), const char* order) {
    const WithOrder with(order);
    Array<int> data(7 * 200);
    std::iota(data.data, data.data + data.size, 0);
    EXPECT_EQ(launch(kernel, 7, 200, 0, data.data), cudaSuccess);
    return {data.data, data.data + data.size};
}

TEST(Barriers, SharedMemoryIsExchangedInEveryOrder) {
    for (const char* order : orders) {
        const std::vector<int> result = reversed_blocks(reverse_kernel<true>, order);
        for (int i = 0; i < 1400; i++) ASSERT_EQ(result[i], i / 200 * 200 + 199 - i % 200) << order;
    }
}

TEST(Barriers, AMissingOneShowsInAnotherOrder) {
    EXPECT_NE(reversed_blocks(reverse_kernel<false>, "forward"), reversed_blocks(reverse_kernel<false>, "reverse"));
    EXPECT_NE(reversed_blocks(reverse_kernel<false>, "forward"), reversed_blocks(reverse_kernel<false>, "shuffle:3"));
}

__global__ void early_exit_kernel(int* out, unsigned live) {
    __shared__ int count;
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    if (threadIdx.x >= live) return;
    atomicAdd(&count, 1);
    __syncthreads();
    if (threadIdx.x % 3 == 1) return;  // threads exit while others wait already
    __syncthreads();
    atomicAdd(&count, 100000);
    __syncthreads();
    out[threadIdx.x] = count;
}

TEST(Barriers, ExitedThreadsDoNotCount) {
    for (const char* order : orders) {
        const WithOrder with(order);
        for (unsigned live : {1u, 31u, 32u, 33u, 100u, 128u}) {
            Array<int> out(128, -1);
            ASSERT_EQ(launch(early_exit_kernel, 1, 128, 0, out.data, live), cudaSuccess);
            const int survivors = int(live - (live + 1) / 3);
            for (unsigned i = 0; i < 128; i++)
                ASSERT_EQ(out[i], i < live && i % 3 != 1 ? int(live) + 100000 * survivors : -1) << order << " " << live;
        }
    }
}

__global__ void vote_kernel(int* out) {
    const unsigned i = threadIdx.x;
    int result = __syncthreads_count(i % 5 == 0);
    if (i == 0) out[0] = result;
    result = __syncthreads_or(i == 70);
    if (i == 1) out[1] = result != 0;
    result = __syncthreads_or(i == 700);
    if (i == 2) out[2] = result != 0;
    result = __syncthreads_and(i < 96);
    if (i == 3) out[3] = result != 0;
    result = __syncthreads_and(i < 95);
    if (i == 4) out[4] = result != 0;
}

TEST(Barriers, Votes) {
    for (const char* order : orders) {
        const WithOrder with(order);
        Array<int> out(5);
        ASSERT_EQ(launch(vote_kernel, 1, 96, 0, out.data), cudaSuccess);
        const int expected[] = {20, 1, 0, 1, 0};
        for (int i = 0; i < 5; i++) EXPECT_EQ(out[i], expected[i]) << order << " " << i;
    }
}

// Threads of a block hand a token on, each in its own turn: many barriers inside nested device functions.
__device__ void pass_on(int* token, int turn) {
    if (int(threadIdx.x) == turn) *token = *token * 3 + turn;
    __syncthreads();
}
__device__ int relay(int* token, int depth) {
    if (depth > 0) relay(token, depth - 1);
    pass_on(token, depth);
    return *token;
}
__global__ void relay_kernel(int* out) {
    __shared__ int token;
    if (threadIdx.x == 0) token = 0;
    __syncthreads();
    float local[256];  // locals survive the switches
    for (int i = 0; i < 256; i++) local[i] = float(i + int(threadIdx.x));
    const int result = relay(&token, 9);
    float sum = 0;
    for (int i = 0; i < 256; i++) sum += local[i];
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum == 256 * 255 / 2 + 256 * float(threadIdx.x) ? result : -1;
}

TEST(Barriers, InsideNestedDeviceFunctions) {
    int expected = 0;
    for (int i = 0; i < 10; i++) expected = expected * 3 + i;
    for (const char* order : orders) {
        const WithOrder with(order);
        Array<int> out(3 * 1024);
        ASSERT_EQ(launch(relay_kernel, 3, 1024, 0, out.data), cudaSuccess);
        for (size_t i = 0; i < out.size; i++) ASSERT_EQ(out[i], expected) << order << " " << i;
    }
}

__global__ void dynamic_shared_kernel(float* out, int n) {
    for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) dynamic_shared[i] = float(i + int(blockIdx.x));
    __syncthreads();
    for (int i = int(threadIdx.x); i < n; i += int(blockDim.x))
        out[int(blockIdx.x) * n + i] = dynamic_shared[n - 1 - i];
}

TEST(SharedMemory, DynamicUpToTheLimitThatWasAskedFor) {
    EXPECT_EQ(reinterpret_cast<uintptr_t>(dynamic_shared) % 16, 0u);
    const auto run = [](size_t bytes) {
        const int n = int(bytes / sizeof(float));
        Array<float> out(size_t(4 * n));
        const cudaError_t error = launch(dynamic_shared_kernel, 4, 96, bytes, out.data, n);
        if (error != cudaSuccess) return error;
        for (int i = 0; i < 4 * n; i++) EXPECT_EQ(out[size_t(i)], float(n - 1 - i % n + i / n));
        return error;
    };
    EXPECT_EQ(run(1000), cudaSuccess);
    EXPECT_EQ(run(48 * 1024), cudaSuccess);
    EXPECT_EQ(run(48 * 1024 + 4), cudaErrorInvalidValue);
    EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidValue);
    const auto kernel = dynamic_shared_kernel;
    const cudaFuncAttribute size = cudaFuncAttributeMaxDynamicSharedMemorySize;
    EXPECT_EQ(cudaFuncSetAttribute(kernel, size, 227 * 1024 + 1), cudaErrorInvalidValue);
    EXPECT_EQ(cudaFuncSetAttribute(kernel, size, 227 * 1024), cudaSuccess);
    EXPECT_EQ(run(227 * 1024), cudaSuccess);
    EXPECT_EQ(run(227 * 1024 + 4), cudaErrorInvalidValue);
    cudaGetLastError();
}

#ifdef CPU_DEVICE_DEBUG
template <class T>
__device__ float uninitialized() {
    __shared__ T tile[8];
    return tile[threadIdx.x % 8];
}
__global__ void uninitialized_kernel(float* out) {
    __shared__ float tile[8];
    out[0] = tile[threadIdx.x], out[1] = dynamic_shared[threadIdx.x], out[2] = uninitialized<float>();
    __syncthreads();
    tile[threadIdx.x] = dynamic_shared[threadIdx.x] = 1;
}
TEST(SharedMemory, ADebugBuildFillsItWithNaNs) {
    Array<float> out(3, 0.0f);
    ASSERT_EQ(launch(uninitialized_kernel, 3, 8, 32, out.data), cudaSuccess);
    for (int i = 0; i < 3; i++) EXPECT_TRUE(std::isnan(out[i])) << i;
    float* fresh;
    ASSERT_EQ(cudaMalloc(&fresh, 4), cudaSuccess);
    EXPECT_TRUE(std::isnan(*fresh));
    cudaFree(fresh);
}
#endif

#ifdef __SANITIZE_ADDRESS__
__global__ void overrun_kernel(float* out, int i) { out[0] = dynamic_shared[i]; }
TEST(SharedMemoryDeathTest, AddressSanitizerSeesAccessBeyondWhatWasAskedFor) {
    Array<float> out(1);
    EXPECT_EQ(launch(overrun_kernel, 1, 1, 400, out.data, 99), cudaSuccess);
    EXPECT_DEATH(launch(overrun_kernel, 1, 1, 400, out.data, 100), "AddressSanitizer");
    EXPECT_EQ(launch(overrun_kernel, 1, 1, 404, out.data, 100), cudaSuccess);
    EXPECT_DEATH(launch(record_indices_kernel, 1, 2, 0, (uint3*)out.data, (uint3*)out.data, (int*)out.data),
                 "AddressSanitizer");
}
#endif

// ---------------------------------------------------------------------------------------------------------------
// Warps

// What CUDA documents for each shuffle, as the lane that is read from.
int shuffle_source(int kind, int lane, int argument, int width) {
    const int begin = lane / width * width;
    if (kind == 0) return begin + ((argument % width) + width) % width;
    if (kind == 1) return lane - argument < begin ? lane : lane - argument;
    if (kind == 2) return lane + argument >= begin + width ? lane : lane + argument;
    return (lane ^ argument) < begin + width ? lane ^ argument : lane;
}

template <class T>
__global__ void shuffle_kernel(const T* in, T* out, int argument, int width) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
    const T value = in[i];
    out[i] = __shfl_sync(full, value, argument, width);
    out[n + i] = __shfl_up_sync(full, value, unsigned(argument), width);
    out[2 * n + i] = __shfl_down_sync(full, value, unsigned(argument), width);
    out[3 * n + i] = __shfl_xor_sync(full, value, argument, width);
}

template <class T>
void test_shuffles(T scale) {
    const int n = 2 * 96;
    Array<T> in(n), out(4 * n);
    for (int i = 0; i < n; i++) in[i] = T(T(i + 1) * scale);
    for (int width : {32, 16, 8, 4, 2, 1}) {
        for (int argument : {0, 1, 2, 3, 5, 7, 8, 15, 16, 21, 31}) {
            ASSERT_EQ(launch(shuffle_kernel<T>, 2, 96, 0, in.data, out.data, argument, width), cudaSuccess);
            for (int kind = 0; kind < 4; kind++)
                for (int i = 0; i < n; i++) {
                    const int source = i / 32 * 32 + shuffle_source(kind, i % 32, argument, width);
                    ASSERT_EQ(out[kind * n + i], in[source]) << kind << " " << i << " " << argument << " " << width;
                }
        }
    }
}

TEST(Warps, ShufflesOfEachTypeAndWidth) {
    test_shuffles<int>(-1000003);
    test_shuffles<unsigned>(3000000019u);
    test_shuffles<float>(1.37f);
    test_shuffles<double>(1.0 / 3);
    test_shuffles<long long>(-1234567890123LL);
    test_shuffles<unsigned long long>(0x123456789abcdefULL);
    for (const char* order : {"reverse", "shuffle:4"}) {
        const WithOrder with(order);
        test_shuffles<float>(0.5f);
    }
}

__global__ void row_sum_kernel(const float* in, float* out, int columns) {
    float sum = 0;
    for (int i = int(threadIdx.x); i < columns; i += 32) sum += in[int(blockIdx.x) * columns + i];
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(full, sum, offset);
    out[blockIdx.x * 32 + threadIdx.x] = sum;
}

TEST(Warps, EveryLaneHasTheSumInEveryOrder) {
    const int rows = 50, columns = 777;
    Array<float> in(rows * columns), out(rows * 32);
    for (size_t i = 0; i < in.size; i++) in[i] = float(i % 13);
    for (const char* order : orders) {
        const WithOrder with(order);
        ASSERT_EQ(launch(row_sum_kernel, rows, 32, 0, in.data, out.data, columns), cudaSuccess);
        for (int r = 0; r < rows; r++) {
            const float expected = std::accumulate(&in[r * columns], &in[r * columns] + columns, 0.0f);
            for (int lane = 0; lane < 32; lane++) ASSERT_EQ(out[r * 32 + lane], expected) << order;
        }
    }
}

// The two sides of each branch name only their own lanes, take different numbers of steps, and meet again.
__global__ void divergent_kernel(int* out) {
    const int lane = int(threadIdx.x) % 32;
    int value = __shfl_xor_sync(full, lane ^ 16, 16);  // lane; some fetch it only when others have gone on
    if (lane < 20) {
        for (int i = 0; i < 5; i++) value = __shfl_sync(0x000fffff, value, (lane + 1) % 20);
        if (lane % 2 == 0) value += __popc(__ballot_sync(0x00055555, lane > 9));
        else value += 100 * __reduce_add_sync(0x000aaaaa, 1);
        __syncwarp(0x000fffff);
    } else {
        for (int i = 0; i < 7; i++) value = __shfl_sync(0xfff00000, value, lane == 31 ? 20 : lane + 1);
        value += 1000 * __any_sync(0xfff00000, lane == 25) + 2000 * __all_sync(0xfff00000, lane >= 20);
    }
    value += 10000 * __popc(__ballot_sync(full, 1));
    out[threadIdx.x] = value;
}

TEST(Warps, DivergentMasksAreIndependent) {
    for (const char* order : orders) {
        const WithOrder with(order);
        Array<int> out(64);
        ASSERT_EQ(launch(divergent_kernel, 1, 64, 0, out.data), cudaSuccess);
        for (int i = 0; i < 64; i++) {
            const int lane = i % 32;
            const int expected = lane >= 20      ? (lane - 20 + 7) % 12 + 20 + 3000
                                 : lane % 2 == 0 ? (lane + 5) % 20 + 5
                                                 : (lane + 5) % 20 + 1000;
            ASSERT_EQ(out[i], expected + 320000) << order << " " << i;
        }
    }
}

__global__ void reductions_kernel(int* out) {
    const int lane = int(threadIdx.x) % 32, value = (lane * 7919 % 101) - 50;
    int* result = out + threadIdx.x * 10;
    result[0] = __reduce_add_sync(full, value);
    result[1] = __reduce_min_sync(full, value);
    result[2] = __reduce_max_sync(full, value);
    result[3] = int(__reduce_min_sync(full, unsigned(value)));
    result[4] = int(__reduce_max_sync(full, unsigned(value)));
    result[5] = int(__reduce_and_sync(full, unsigned(value) | 0x11));
    result[6] = int(__reduce_or_sync(full, unsigned(value) & 0x3c));
    result[7] = int(__reduce_xor_sync(full, unsigned(value)));
    result[8] = int(__ballot_sync(full, value > 0));
    result[9] = __any_sync(full, value == 50) * 2 + __all_sync(full, value > -51);
}

TEST(Warps, ReductionsAndVotes) {
    int expected[10] = {0, 1000, -1000, -1, 0, -1, 0, 0, 0, 1};
    for (int lane = 0; lane < 32; lane++) {
        const int value = (lane * 7919 % 101) - 50;
        expected[0] += value;
        expected[1] = std::min(expected[1], value);
        expected[2] = std::max(expected[2], value);
        expected[3] = int(std::min(unsigned(expected[3]), unsigned(value)));
        expected[4] = int(std::max(unsigned(expected[4]), unsigned(value)));
        expected[5] &= value | 0x11;
        expected[6] |= value & 0x3c;
        expected[7] ^= value;
        expected[8] |= int(unsigned(value > 0) << lane);
        if (value == 50) expected[9] |= 2;
    }
    Array<int> out(32 * 10);
    ASSERT_EQ(launch(reductions_kernel, 1, 32, 0, out.data), cudaSuccess);
    for (int i = 0; i < 320; i++) ASSERT_EQ(out[i], expected[i % 10]) << i;
}

// CUDA counts neither lanes that never existed nor lanes that have exited.
__global__ void partial_warp_kernel(unsigned* ballots, int* sums) {
    const int i = int(threadIdx.x);
    ballots[i] = __ballot_sync(full, 1);
    if (i % 4 == 3) return;
    sums[i] = __reduce_add_sync(full, i);
    if (i % 4 == 0) __syncwarp(0x77777777);
    else __syncwarp(0x77777777);
    ballots[i] |= __ballot_sync(0x77777777, i % 2) << 16;
}

TEST(Warps, PartialWarpsAndExitedLanes) {
    for (const char* order : orders) {
        const WithOrder with(order);
        Array<unsigned> ballots(42);
        Array<int> sums(42, 0);
        ASSERT_EQ(launch(partial_warp_kernel, 1, 42, 0, ballots.data, sums.data), cudaSuccess);
        int first = 0, second = 0;
        for (int i = 0; i < 42; i++) (i < 32 ? first : second) += i % 4 == 3 ? 0 : i;
        for (int i = 0; i < 42; i++) {
            const unsigned exists = i < 32 ? full : 0x3ff, odd = i < 32 ? 0x22222222 : 0x222;
            ASSERT_EQ(ballots[i], i % 4 == 3 ? exists : exists | odd << 16) << order << " " << i;
            ASSERT_EQ(sums[i], i % 4 == 3 ? 0 : i < 32 ? first : second) << order << " " << i;
        }
    }
}

// A lane that exits while the others already wait for it must release them.
__global__ void late_exit_kernel(int* out) {
    const int lane = int(threadIdx.x);
    if (lane == 31) return;
    out[lane] = __popc(__ballot_sync(full, 1));
    if (lane >= 16) return;
    out[lane] += 100 * __popc(__ballot_sync(full, 1));
}

TEST(Warps, LanesThatExitReleaseTheOthers) {
    for (const char* order : orders) {
        const WithOrder with(order);
        Array<int> out(32, -1);
        ASSERT_EQ(launch(late_exit_kernel, 1, 32, 0, out.data), cudaSuccess);
        for (int i = 0; i < 32; i++) ASSERT_EQ(out[i], i == 31 ? -1 : i < 16 ? 1631 : 31) << order << " " << i;
    }
}

__global__ void warp_id_3d_kernel(unsigned* out) {
    const unsigned i = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    out[i] = __shfl_sync(full, i, 0);
}

TEST(Warps, AreConsecutiveThreadsOfA3DBlock) {
    Array<unsigned> out(5 * 4 * 8);
    ASSERT_EQ(launch(warp_id_3d_kernel, 1, dim3(5, 4, 8), 0, out.data), cudaSuccess);
    for (unsigned i = 0; i < 160; i++) EXPECT_EQ(out[i], i / 32 * 32);
}

// ---------------------------------------------------------------------------------------------------------------
// What CUDA leaves undefined ends the program, with one line

__global__ void wrong_kernel(int what) {
    const int i = int(threadIdx.x);
    switch (what) {
        case 1:
            if (i != 5) __syncwarp(1u << 5 | 1u << i);
            else __syncthreads();
            break;
        case 2:
            if (i < 32) __syncthreads();
            else __syncthreads();
            break;
        case 3: __syncwarp(0xfffffffe); break;
        case 4:
            if (i < 16) __ballot_sync(full, 1);
            else __any_sync(full, 1);
            break;
        case 5:
            if (i == 7) return;
            __shfl_sync(full, i, 7);
            break;
        case 6: __shfl_xor_sync(full, i, 1, 12); break;
        case 7:
            if (i < 16) __syncthreads();
            else __syncthreads_or(1);
            break;
        case 8: __shfl_down_sync(i < 16 ? 0xffff : 0xffff0000, i, 16); break;
        case 9: __trap();
    }
}

TEST(UndefinedDeathTest, IsReported) {
    GTEST_FLAG_SET(death_test_style, "threadsafe");
    const WithOrder with("forward");  // which thread speaks depends on it
    const auto run = [](int what, unsigned threads = 64) { launch(wrong_kernel, dim3(1, 1, 1), threads, 0, what); };
    EXPECT_EXIT(run(1, 32), testing::ExitedWithCode(1),
                "cpu_device: kernel .*wrong_kernel<<<\\(1,1,1\\), \\(32,1,1\\), 0>>>, block \\(0,0,0\\).*deadlock.*"
                "thread \\(5,0,0\\) wait in __syncthreads at test_cpu_device.cu:[0-9]+ for the whole block");
    EXPECT_EXIT(run(1, 32), testing::ExitedWithCode(1),
                "wait in __syncwarp at test_cpu_device.cu:[0-9]+ \\(mask 0x21\\) for lanes 0x20 of warp 0");
    EXPECT_EXIT(run(2), testing::ExitedWithCode(1), "all threads must reach the same barrier");
    EXPECT_EXIT(run(7, 32), testing::ExitedWithCode(1), "all threads must reach the same barrier");
    EXPECT_EXIT(run(3), testing::ExitedWithCode(1), "thread \\(0,0,0\\): .*does not name the calling lane 0");
    EXPECT_EXIT(run(4), testing::ExitedWithCode(1), "meets __ballot_sync|meets __any_sync");
    EXPECT_EXIT(run(5), testing::ExitedWithCode(1), "reads from lane 7, which does not take part");
    EXPECT_EXIT(run(8), testing::ExitedWithCode(1), "reads from lane 16, which does not take part");
    EXPECT_EXIT(run(6), testing::ExitedWithCode(1), "width must be");
    EXPECT_EXIT(run(9), testing::ExitedWithCode(1), "__trap");
}

// ---------------------------------------------------------------------------------------------------------------
// Tensor core: expectations are the tables of the PTX ISA, written out

float as_float(uint32_t pair, int half) { return std::bit_cast<float>(half ? pair & 0xffff0000 : pair << 16); }

// a (32, 4), b (32, 2), d (32, 4): each lane's registers, warp after warp
__global__ void mma_kernel(float* d, const uint32_t* a, const uint32_t* b) {
    uint32_t own_a[4];
    float own_d[4];
    for (int i = 0; i < 4; i++) own_a[i] = a[threadIdx.x * 4 + i], own_d[i] = d[threadIdx.x * 4 + i];
    mma(own_d, own_a, b[threadIdx.x * 2], b[threadIdx.x * 2 + 1]);
    for (int i = 0; i < 4; i++) d[threadIdx.x * 4 + i] = own_d[i];
}

TEST(TensorCore, MultipliesFragments) {
    std::mt19937 random(3);
    for (const char* order : orders) {
        const WithOrder with(order);
        Array<uint32_t> a(64 * 4), b(64 * 2);
        Array<float> d(64 * 4);
        const auto small = [&] { return float(int(random() % 17) - 8); };  // products and sums are exact
        for (size_t i = 0; i < a.size; i++) a[i] = bf16_pair(small(), small());
        for (size_t i = 0; i < b.size; i++) b[i] = bf16_pair(small(), small());
        for (size_t i = 0; i < d.size; i++) d[i] = small();
        const std::vector<float> before(d.data, d.data + d.size);
        ASSERT_EQ(launch(mma_kernel, 1, 64, 0, d.data, a.data, b.data), cudaSuccess);
        for (int warp = 0; warp < 2; warp++) {
            float matrix_a[16][16], matrix_b[16][8];
            for (int lane = 0; lane < 32; lane++) {
                for (int i = 0; i < 8; i++) {  // a0 .. a7 of the ISA: register i / 2
                    const int row = lane / 4 + (i < 2 || (4 <= i && i < 6) ? 0 : 8);
                    const int k = lane % 4 * 2 + (i & 1) + (i >= 4 ? 8 : 0);
                    matrix_a[row][k] = as_float(a[size_t(warp * 32 + lane) * 4 + i / 2], i % 2);
                }
                for (int i = 0; i < 4; i++) {
                    const int k = lane % 4 * 2 + (i & 1) + (i >= 2 ? 8 : 0);
                    matrix_b[k][lane / 4] = as_float(b[size_t(warp * 32 + lane) * 2 + i / 2], i % 2);
                }
            }
            for (int lane = 0; lane < 32; lane++) {
                for (int i = 0; i < 4; i++) {
                    const int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + (i & 1);
                    const size_t at = size_t(warp * 32 + lane) * 4 + i;
                    float expected = before[at];
                    for (int k = 0; k < 16; k++) expected += matrix_a[row][k] * matrix_b[k][column];
                    ASSERT_EQ(d[at], expected) << order << " row " << row << " column " << column;
                }
            }
        }
    }
}

template <bool transposed>
__global__ void load_matrices_kernel(uint32_t* parts) {
    auto* elements = reinterpret_cast<uint16_t*>(dynamic_shared);
    for (int i = 0; i < 32 * 8; i += 32) elements[i + threadIdx.x] = uint16_t(i + threadIdx.x);
    __syncwarp();
    uint32_t own[4];
    const void* row = elements + (31 - threadIdx.x) * 8;  // the parts' rows from the last to the first
    if (transposed) load_transposed(own, row);
    else load_matrices(own, row);
    for (int i = 0; i < 4; i++) parts[threadIdx.x * 4 + i] = own[i];
}

TEST(TensorCore, LoadsFragments) {
    for (const char* order : orders) {
        const WithOrder with(order);
        Array<uint32_t> plain(32 * 4), transposed(32 * 4);
        ASSERT_EQ(launch(load_matrices_kernel<false>, 1, 32, 512, plain.data), cudaSuccess);
        ASSERT_EQ(launch(load_matrices_kernel<true>, 1, 32, 512, transposed.data), cudaSuccess);
        const auto element = [](int part, int row, int column) { return uint32_t((31 - part * 8 - row) * 8 + column); };
        for (int lane = 0; lane < 32; lane++) {
            for (int i = 0; i < 4; i++) {
                const int g = lane / 4, p = lane % 4 * 2;
                ASSERT_EQ(plain[size_t(lane) * 4 + i], element(i, g, p) | element(i, g, p + 1) << 16);
                ASSERT_EQ(transposed[size_t(lane) * 4 + i], element(i, p, g) | element(i, p + 1, g) << 16);
            }
        }
    }
}

__global__ void copy_async_kernel(uint32_t* seen, const uint32_t* from) {
    auto* to = reinterpret_cast<uint32_t*>(dynamic_shared);
    const auto look = [&](int moment) {
        for (int i = 0; i < 8; i++) seen[moment * 8 + i] = to[i];
    };
    for (int i = 0; i < 8; i++) to[i] = 100 + i;
    copy_async<16>(to, from, true);
    copies_commit();
    copy_async<8>(to + 4, from + 4, true);
    copies_commit();
    copies_commit();  // a group without copies counts
    copy_async<4>(to + 6, nullptr, false);
    look(0);
    copies_wait<2>();
    look(1);
    copies_wait<1>();
    look(2);
    copies_wait<0>();
    look(3);  // the last is in no group yet
    copies_commit();
    copies_wait<0>();
    look(4);
}

TEST(TensorCore, CopiesComeAsLateAsAllowed) {
    constexpr uint32_t nan = 0xffffffff;
    Array<uint32_t> seen(40), from(std::vector<uint32_t>{1, 2, 3, 4, 5, 6});
    ASSERT_EQ(launch(copy_async_kernel, 1, 1, 32, seen.data, from.data), cudaSuccess);
    const uint32_t expected[5][8] = {{nan, nan, nan, nan, nan, nan, nan, 107},
                                     {1, 2, 3, 4, nan, nan, nan, 107},
                                     {1, 2, 3, 4, 5, 6, nan, 107},
                                     {1, 2, 3, 4, 5, 6, nan, 107},
                                     {1, 2, 3, 4, 5, 6, 0, 107}};
    for (size_t i = 0; i < 40; i++)
        EXPECT_EQ(seen[i], expected[i / 8][i % 8]) << "moment " << i / 8 << " word " << i % 8;
}

// Sums of the tiles of `numbers`, copied by neighbours, while the next tile is on its way to the other half: what the
// attention kernels do. `missing`: 1 the wait, 2 the barrier behind it, 3 the one before the next copy.
template <int missing>
__global__ void sum_tiles_kernel(float* sums, const float* numbers, int tiles) {
    const int threads = int(blockDim.x), i = int(threadIdx.x);
    float sum = 0;
    copy_async<4>(dynamic_shared + i, numbers + i, true);
    copies_commit();
    for (int tile = 0; tile < tiles; tile++) {
        if (missing != 1) copies_wait<0>();
        if (missing != 2) __syncthreads();
        sum += dynamic_shared[(i + 33) % threads];
        if (missing != 3) __syncthreads();
        copy_async<4>(dynamic_shared + i, numbers + (tile + 1) * threads + i, tile + 1 < tiles);
        copies_commit();
    }
    sums[i] = sum;
}

TEST(TensorCore, AMissingWaitOrBarrierShows) {
    constexpr int threads = 64, tiles = 5;
    Array<float> numbers(threads * tiles);
    for (size_t i = 0; i < numbers.size; i++) numbers[i] = float(i);
    const auto wrong = [&](void (*kernel)(float*, const float*, int), const char* order) {
        const WithOrder with(order);
        Array<float> sums(threads);
        EXPECT_EQ(launch(kernel, 1, threads, threads * 4, sums.data, numbers.data, tiles), cudaSuccess);
        int count = 0;
        for (int i = 0; i < threads; i++) count += !(sums[i] == tiles * ((i + 33) % threads) + 10 * threads);
        return count;
    };
    for (const char* order : orders) {
        EXPECT_EQ(wrong(sum_tiles_kernel<0>, order), 0) << order;
        EXPECT_EQ(wrong(sum_tiles_kernel<1>, order), threads) << order;
        EXPECT_GT(wrong(sum_tiles_kernel<2>, order), 0) << order;
        EXPECT_GT(wrong(sum_tiles_kernel<3>, order), 0) << order;
    }
}

TEST(TensorCore, Exp2) {
    double worst = 0;
    for (float x = -126; x < 128; x += 0.00137f)
        worst = std::max(worst, std::abs(exp2_approx(x) / std::exp2(double(x)) - 1));
    EXPECT_LE(worst, 2 * std::numeric_limits<float>::epsilon());
    EXPECT_EQ(exp2_approx(-INFINITY), 0);
    EXPECT_EQ(exp2_approx(-126.5f), 0);  // what the GPU makes of subnormal numbers
    EXPECT_EQ(exp2_approx(200), INFINITY);
    EXPECT_TRUE(std::isnan(exp2_approx(NAN)));
}

__global__ void wrong_tensor_core_kernel(int what, const float* from) {
    const int i = int(threadIdx.x);
    uint32_t part[4];
    float d[4];
    if (what == 1 && i == 3) return;
    if (what == 2) return copy_async<16>(dynamic_shared + 1, from, true);
    if (what == 3) return copy_async<8>(dynamic_shared, from + 1, true);
    if (what == 4 && i < 8) load_matrices(part, dynamic_shared);
    mma(d, part, 0, 0);
}

TEST(TensorCoreDeathTest, WhatIsUndefinedIsReported) {
    GTEST_FLAG_SET(death_test_style, "threadsafe");
    Array<float> from(8);
    const auto run = [&](int what) { launch(wrong_tensor_core_kernel, 1, 32, 64, what, from.data); };
    EXPECT_EXIT(run(1), testing::ExitedWithCode(1),
                "mma at .*without all lanes of the warp \\(lanes here 0xfffffff7\\)");
    EXPECT_EXIT(run(2), testing::ExitedWithCode(1), "no multiples of its size");
    EXPECT_EXIT(run(3), testing::ExitedWithCode(1), "no multiples of its size");
    EXPECT_EXIT(run(4), testing::ExitedWithCode(1), "meets load_matrices|meets mma");
}

// ---------------------------------------------------------------------------------------------------------------
// Atomics

template <class T>
__global__ void atomics_kernel(T* cells, float* float_sum, double* double_sum) {
    const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
    atomicAdd(&cells[0], 3);
    atomicMax(&cells[1], T(i * 37 % 1001));
    atomicMin(&cells[2], T(i * 37 % 1001 + 5));
    T old = cells[3];
    for (T seen; (seen = atomicCAS(&cells[3], old, old + 2)) != old;) old = seen;
    atomicExch(&cells[4], 9);
    atomicOr(&cells[5], T(1 << i % 20));
    atomicAdd(float_sum, 1.0f);
    atomicAdd(double_sum, 0.5);
}

template <class T>
void test_atomics() {
    Array<T> cells(6, 0);
    cells[2] = 100000;
    Array<float> float_sum(1, 0.0f);
    Array<double> double_sum(1, 0.0);
    ASSERT_EQ(launch(atomics_kernel<T>, 50, 100, 0, cells.data, float_sum.data, double_sum.data), cudaSuccess);
    const T expected[] = {15000, 1000, 5, 10000, 9, 0xfffff};
    for (int i = 0; i < 6; i++) EXPECT_EQ(cells[i], expected[i]) << i;
    EXPECT_EQ(float_sum[0], 5000.0f);
    EXPECT_EQ(double_sum[0], 2500.0);
}

TEST(Atomics, LoseNothing) {
    test_atomics<int>();
    test_atomics<unsigned>();
    test_atomics<unsigned long long>();
}

// The last block to finish sums what all have written.
__global__ void last_block_kernel(float* partial, unsigned* finished, float* total) {
    __shared__ bool is_last;
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = float(blockIdx.x);
        __threadfence();
        is_last = atomicAdd(finished, 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!is_last || threadIdx.x != 0) return;
    float sum = 0;
    for (unsigned i = 0; i < gridDim.x; i++) sum += partial[i];
    *total = sum;
}

TEST(Atomics, LastBlockSeesAllOthers) {
    for (const char* order : orders) {
        const WithOrder with(order);
        Array<float> partial(300, -1.0f), total(1);
        Array<unsigned> finished(1, 0);
        ASSERT_EQ(launch(last_block_kernel, 300, 64, 0, partial.data, finished.data, total.data), cudaSuccess);
        EXPECT_EQ(total[0], 300 * 299 / 2.0f);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Intrinsics

// Distance in units of the last place of the exact value, which for results below the normal range is 2^-149.
double ulps(float value, double exact) {
    if (double(value) == exact) return 0;
    const double unit = std::exp2(std::max(std::ilogb(exact), -126) - 23);
    return std::fabs(double(value) - exact) / unit;
}

TEST(Intrinsics, ExpIsAccurateEverywhere) {
    std::vector<float> x;
    for (double t = -104; t < 88.72; t += 1.0 / 4096) x.push_back(float(t));
    for (float t = 1e-30f; t < 1; t *= 1.01f) x.push_back(t), x.push_back(-t);
    std::vector<float> y = x;
    for (float& value : y) value = __expf(value);
    double worst = 0;
    for (size_t i = 0; i < x.size(); i++) worst = std::max(worst, ulps(y[i], std::exp(double(x[i]))));
    EXPECT_LE(worst, 2.0);
    RecordProperty("expf_ulps", std::to_string(worst));
    const float infinity = std::numeric_limits<float>::infinity();
    EXPECT_EQ(__expf(0.0f), 1.0f);
    for (float low : {-104.1f, -200.0f, -1e10f, -3e38f, -infinity}) EXPECT_EQ(__expf(low), 0.0f) << low;
    for (float high : {88.7229f, 89.0f, 100.0f, 1e10f, infinity}) EXPECT_EQ(__expf(high), infinity) << high;
    EXPECT_TRUE(std::isnan(__expf(NAN)));
    EXPECT_TRUE(std::isnan(__expf(-NAN)));
}

TEST(Intrinsics, TanhIsAccurateEverywhere) {
    double worst = 0;
    const auto check = [&](float x) {
        worst = std::max(worst, ulps(__tanhf(x), std::tanh(double(x))));
        ASSERT_EQ(__tanhf(-x), -__tanhf(x));
    };
    for (double t = 0; t < 10; t += 1.0 / 16384) check(float(t));
    for (float t = 1e-30f; t < 1; t *= 1.01f) check(t);
    EXPECT_LE(worst, 2.0);
    RecordProperty("tanhf_ulps", std::to_string(worst));
    EXPECT_EQ(__tanhf(50.0f), 1.0f);
    EXPECT_EQ(__tanhf(-std::numeric_limits<float>::infinity()), -1.0f);
    EXPECT_TRUE(std::isnan(__tanhf(NAN)));
}

TEST(Intrinsics, Bits) {
    EXPECT_EQ(__float_as_uint(1.0f), 0x3f800000u);
    EXPECT_EQ(__uint_as_float(0xc0000000), -2.0f);
    EXPECT_EQ(__popc(0xf0f0u), 8);
    EXPECT_EQ(__clz(1), 31);
    EXPECT_EQ(__clz(0), 32);
    EXPECT_EQ(__clzll(1), 63);
    EXPECT_EQ(__ffs(0), 0);
    EXPECT_EQ(__ffs(8), 4);
    EXPECT_EQ(__brev(0x80000001), 0x80000001u);
    EXPECT_EQ(__brev(0x00000006), 0x60000000u);
    EXPECT_EQ(__brev(0x12345678), 0x1e6a2c48u);
    EXPECT_EQ(__umulhi(0xffffffff, 0xffffffff), 0xfffffffeu);
    EXPECT_EQ(__mulhi(-2, 0x7fffffff), -1);
    EXPECT_EQ(__umul64hi(1ULL << 63, 6), 3ULL);
    EXPECT_EQ(max(3, 5) + min(2.5f, 1.5f), 6.5f);
    EXPECT_EQ(rsqrtf(0.25f), 2.0f);
    EXPECT_EQ(__saturatef(2.0f) + __saturatef(-1.0f), 1.0f);
}

// ---------------------------------------------------------------------------------------------------------------
// bfloat16

// To nearest, ties to the even neighbour, by looking at both neighbours.
unsigned short nearest_bf16(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    const unsigned low = bits & 0xffff0000, high = low + 0x10000;
    const unsigned rest = bits & 0xffff;
    if (rest != 0x8000) return (unsigned short)((rest < 0x8000 ? low : high) >> 16);
    return (unsigned short)((low >> 16 & 1 ? high : low) >> 16);
}

TEST(BFloat16, EveryValueSurvivesAndRoundingIsToNearestEven) {
    for (unsigned bits = 0; bits < 0x10000; bits++) {
        const float exact = __bfloat162float(__ushort_as_bfloat16((unsigned short)bits));
        ASSERT_EQ(__float_as_uint(exact), bits << 16);
        if (std::isnan(exact)) {
            ASSERT_EQ(__bfloat16_as_ushort(__float2bfloat16(exact)), 0x7fff);
            continue;
        }
        ASSERT_EQ(__bfloat16_as_ushort(__float2bfloat16(exact)), bits);
        if (std::isinf(exact)) continue;
        for (unsigned rest : {1u, 2u, 0x1234u, 0x7ffeu, 0x7fffu, 0x8000u, 0x8001u, 0x8002u, 0xabcdu, 0xffffu}) {
            const float between = __uint_as_float(bits << 16 | rest);
            ASSERT_EQ(__bfloat16_as_ushort(__float2bfloat16_rn(between)), nearest_bf16(between)) << between;
        }
    }
    EXPECT_TRUE(std::isnan(float(__float2bfloat16(__uint_as_float(0x7f800001)))));  // not rounded to infinity
    EXPECT_TRUE(std::isnan(float(__float2bfloat16(__uint_as_float(0xffffffff)))));
    EXPECT_EQ(float(__float2bfloat16(3.4e38f)), std::numeric_limits<float>::infinity());
}

TEST(BFloat16, OfADoubleIsRoundedOnce) {
    EXPECT_EQ(float(__double2bfloat16(1.00390625)), 1.0f);                // a tie: to even
    EXPECT_EQ(float(__double2bfloat16(1.00390625 + 1e-12)), 1.0078125f);  // fp32 would make it the tie
    EXPECT_EQ(float(__double2bfloat16(-1.00390625 - 1e-12)), -1.0078125f);
    EXPECT_EQ(float(__double2bfloat16(1.01171875 - 1e-12)), 1.0078125f);
}

TEST(BFloat16, OperatorsAndPairs) {
    const __nv_bfloat16 a = 1.5f, b = 2.25f;
    EXPECT_EQ(float(a + b), 3.75f);
    EXPECT_EQ(float(a * b), 3.375f);
    EXPECT_EQ(float(b / a), 1.5f);
    EXPECT_EQ(float(-a - b), -3.75f);
    EXPECT_TRUE(a < b && a != b && b >= a && a == __nv_bfloat16(1.5f));
    __nv_bfloat16 c = a;
    c += b, c *= a;
    EXPECT_EQ(float(c), 5.625f);
    const __nv_bfloat162 pair = __floats2bfloat162_rn(1.0f, 2.0f);
    static_assert(sizeof pair == 4 && alignof(__nv_bfloat162) == 4 && sizeof a == 2);
    EXPECT_EQ(__low2float(pair), 1.0f);
    EXPECT_EQ(__high2float(pair), 2.0f);
    EXPECT_EQ(__bfloat1622float2(pair + pair).y, 4.0f);
}

// ---------------------------------------------------------------------------------------------------------------
// Runtime

__global__ void nothing_kernel() {}

TEST(Runtime, LaunchErrorsAreCudas) {
    EXPECT_EQ(launch(nothing_kernel, 1, 1024, 0), cudaSuccess);
    EXPECT_EQ(cudaGetLastError(), cudaSuccess);
    EXPECT_EQ(launch(nothing_kernel, 1, 1025, 0), cudaErrorInvalidConfiguration);
    EXPECT_EQ(cudaPeekAtLastError(), cudaErrorInvalidConfiguration);
    EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidConfiguration);
    EXPECT_EQ(cudaGetLastError(), cudaSuccess);
    EXPECT_EQ(launch(nothing_kernel, 1, dim3(32, 33), 0), cudaErrorInvalidConfiguration);
    EXPECT_EQ(launch(nothing_kernel, 1, dim3(1, 1, 65), 0), cudaErrorInvalidConfiguration);
    EXPECT_EQ(launch(nothing_kernel, 0, 32, 0), cudaErrorInvalidConfiguration);
    EXPECT_EQ(launch(nothing_kernel, 1, dim3(32, 0), 0), cudaErrorInvalidConfiguration);
    EXPECT_EQ(launch(nothing_kernel, dim3(1, 65536), 1, 0), cudaErrorInvalidConfiguration);
    EXPECT_EQ(launch(nothing_kernel, 1, 1, 48 * 1024 + 1), cudaErrorInvalidValue);
    EXPECT_STREQ(cudaGetErrorName(cudaErrorInvalidConfiguration), "cudaErrorInvalidConfiguration");
    EXPECT_STREQ(cudaGetErrorString(cudaErrorMemoryAllocation), "out of memory");
    cudaGetLastError();
}

// Large ones are made in pieces, by all threads: none may be missing, and the bytes around them stay.
TEST(Runtime, LargeCopiesAndFills) {
    const size_t size = (size_t(5) << 20) + 3;
    std::vector<uint32_t> source(size / 4 + 2);
    std::mt19937 random(1);
    std::generate(source.begin(), source.end(), random);
    const uint8_t* from = reinterpret_cast<const uint8_t*>(source.data()) + 1;
    std::vector<uint8_t> to(size + 2, 9), filled(size + 2, 9);
    EXPECT_EQ(cudaMemcpy(to.data() + 1, from, size, cudaMemcpyDeviceToDevice), cudaSuccess);
    EXPECT_EQ(memcmp(to.data() + 1, from, size), 0);
    EXPECT_EQ(cudaMemset(filled.data() + 1, 7, size), cudaSuccess);
    EXPECT_EQ(std::count(filled.begin(), filled.end(), 7), std::ptrdiff_t(size));
    for (const auto& bytes : {to, filled}) EXPECT_TRUE(bytes.front() == 9 && bytes.back() == 9);
}

TEST(Runtime, Memory) {
    void* address = nullptr;
    EXPECT_EQ(cudaMalloc(&address, size_t(1) << 60), cudaErrorMemoryAllocation);
    EXPECT_EQ(address, nullptr);
    EXPECT_EQ(cudaGetLastError(), cudaErrorMemoryAllocation);
    EXPECT_EQ(cudaFree(nullptr), cudaSuccess);
    int on_stack;
    EXPECT_EQ(cudaFree(&on_stack), cudaErrorInvalidValue);
    cudaGetLastError();
    for (size_t size : {size_t(1), size_t(1000), size_t(5) << 20}) {
        ASSERT_EQ(cudaMalloc(&address, size), cudaSuccess);
        EXPECT_EQ(reinterpret_cast<uintptr_t>(address) % 256, 0u);
        EXPECT_EQ(cudaMemset(address, 7, size), cudaSuccess);
        EXPECT_EQ(static_cast<char*>(address)[size - 1], 7);
        EXPECT_EQ(cudaFree(address), cudaSuccess);
    }
    std::vector<int> host(12), back(12, 0);
    std::iota(host.begin(), host.end(), 0);
    Array<int> device(12, -1);
    EXPECT_EQ(cudaMemcpy(device.data, host.data(), 48, cudaMemcpyHostToDevice), cudaSuccess);
    EXPECT_EQ(cudaMemcpyAsync(back.data(), device.data, 48, cudaMemcpyDeviceToHost, nullptr), cudaSuccess);
    EXPECT_EQ(back, host);
    EXPECT_EQ(cudaMemcpy(back.data(), host.data(), 4, cudaMemcpyKind(17)), cudaErrorInvalidMemcpyDirection);
    // Columns 1 and 2 of 3 rows of 4, packed.
    EXPECT_EQ(cudaMemcpy2D(back.data(), 8, device.data + 1, 16, 8, 3, cudaMemcpyDeviceToHost), cudaSuccess);
    EXPECT_EQ(std::vector<int>(back.begin(), back.begin() + 6), (std::vector<int>{1, 2, 5, 6, 9, 10}));
    size_t free = 0, total = 0;
    EXPECT_EQ(cudaMemGetInfo(&free, &total), cudaSuccess);
    EXPECT_GT(free, 0u);
    EXPECT_LE(free, total);
#ifndef CPU_DEVICE_DEBUG  // which would write to all of it
    void* more = nullptr;
    ASSERT_EQ(cudaMalloc(&address, total / 5 * 3), cudaSuccess);  // the operating system would promise both
    EXPECT_EQ(cudaMalloc(&more, total / 5 * 3), cudaErrorMemoryAllocation);
    EXPECT_EQ(cudaFree(address), cudaSuccess);
#endif
    cudaGetLastError();
}

TEST(Runtime, StreamsAndEvents) {
    cudaStream_t stream;
    cudaEvent_t begin, end, untimed;
    ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    ASSERT_EQ(cudaEventCreate(&begin), cudaSuccess);
    ASSERT_EQ(cudaEventCreate(&end), cudaSuccess);
    ASSERT_EQ(cudaEventCreateWithFlags(&untimed, cudaEventDisableTiming), cudaSuccess);
    float milliseconds = -1;
    EXPECT_EQ(cudaEventElapsedTime(&milliseconds, begin, end), cudaErrorInvalidResourceHandle);
    EXPECT_EQ(cudaEventRecord(begin, stream), cudaSuccess);
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    EXPECT_EQ(cudaEventRecord(end, stream), cudaSuccess);
    EXPECT_EQ(cudaEventRecord(untimed), cudaSuccess);
    EXPECT_EQ(cudaStreamWaitEvent(stream, untimed), cudaSuccess);
    EXPECT_EQ(cudaEventQuery(end), cudaSuccess);
    EXPECT_EQ(cudaStreamQuery(stream), cudaSuccess);
    EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    EXPECT_EQ(cudaEventSynchronize(end), cudaSuccess);
    EXPECT_EQ(cudaEventElapsedTime(&milliseconds, begin, end), cudaSuccess);
    EXPECT_GE(milliseconds, 10.0f);
    EXPECT_EQ(cudaEventElapsedTime(&milliseconds, begin, untimed), cudaErrorInvalidResourceHandle);
    for (cudaEvent_t event : {begin, end, untimed}) EXPECT_EQ(cudaEventDestroy(event), cudaSuccess);
    EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
    cudaGetLastError();
}

TEST(Runtime, Properties) {
    int count = 0, device = -1, value = 0;
    EXPECT_EQ(cudaGetDeviceCount(&count), cudaSuccess);
    EXPECT_EQ(cudaGetDevice(&device), cudaSuccess);
    EXPECT_EQ(count, 1);
    EXPECT_EQ(device, 0);
    EXPECT_EQ(cudaSetDevice(1), cudaErrorInvalidDevice);
    cudaDeviceProp properties;
    ASSERT_EQ(cudaGetDeviceProperties(&properties, 0), cudaSuccess);
    EXPECT_GT(strlen(properties.name), 0u);
#ifdef __x86_64__
    EXPECT_NE(strstr(properties.name, ", family "), nullptr) << properties.name;
#endif
    EXPECT_EQ(properties.warpSize, 32);
    EXPECT_GE(properties.multiProcessorCount, 1);
    EXPECT_GT(properties.totalGlobalMem, size_t(1) << 20);
    EXPECT_EQ(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), cudaSuccess);
    EXPECT_EQ(value, 227 * 1024);
    cudaGetLastError();
}

// Two host threads may launch at once.
TEST(Runtime, HostThreadsLaunchIndependently) {
    std::vector<std::vector<int>> results(4);
    std::vector<std::thread> threads;
    for (auto& result : results)
        threads.emplace_back([&] { result = reversed_blocks(reverse_kernel<true>, "forward"); });
    for (std::thread& thread : threads) thread.join();
    for (const auto& result : results)
        for (int i = 0; i < 1400; i++) ASSERT_EQ(result[i], i / 200 * 200 + 199 - i % 200);
}

// ---------------------------------------------------------------------------------------------------------------
// cuBLASLt

constexpr double bf16_half_ulp = 1.0 / 256, fp32_half_ulp = 1.0 / (1 << 24);

// A matrix in memory of either type, with gaps between columns (or rows) and between the matrices of a batch; gaps
// hold a value that must not change.
struct TestMatrix {
    cudaDataType type;
    int rows, columns, batch;
    bool row_order;
    int64_t ld, stride;
    Array<char> memory;
    cublasLtMatrixLayout_t layout = nullptr;

    TestMatrix(cudaDataType type, int rows, int columns, bool row_order = false, int batch = 1, int gap = 0)
        : type(type),
          rows(rows),
          columns(columns),
          batch(batch),
          row_order(row_order),
          ld((row_order ? columns : rows) + gap),
          stride(ld * (row_order ? rows : columns) + 3 * gap),
          memory(size_t(stride * batch) * (type == CUDA_R_32F ? 4 : 2)) {
        for (int64_t i = 0; i < stride * batch; i++) set(i, 12345);
        EXPECT_EQ(cublasLtMatrixLayoutCreate(&layout, type, uint64_t(rows), uint64_t(columns), ld),
                  CUBLAS_STATUS_SUCCESS);
        const int32_t order = row_order ? CUBLASLT_ORDER_ROW : CUBLASLT_ORDER_COL;
        cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_ORDER, &order, sizeof order);
        cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof batch);
        cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride);
    }
    ~TestMatrix() { cublasLtMatrixLayoutDestroy(layout); }
    int64_t index(int b, int i, int j) const { return b * stride + (row_order ? i * ld + j : i + j * ld); }
    double get(int64_t i) const {
        if (type == CUDA_R_32F) return reinterpret_cast<const float*>(memory.data)[i];
        return float(reinterpret_cast<const __nv_bfloat16*>(memory.data)[i]);
    }
    void set(int64_t i, double value) {
        if (type == CUDA_R_32F) reinterpret_cast<float*>(memory.data)[i] = float(value);
        else reinterpret_cast<__nv_bfloat16*>(memory.data)[i] = __double2bfloat16(value);
    }
    double at(int b, int i, int j) const { return get(index(b, i, j)); }
    void fill(std::mt19937& random) {
        std::uniform_real_distribution<double> uniform(-1, 1);
        for (int b = 0; b < batch; b++)
            for (int j = 0; j < columns; j++)
                for (int i = 0; i < rows; i++) set(index(b, i, j), uniform(random));
    }
    void check_gaps() const {
        std::vector<bool> used(size_t(stride * batch), false);
        for (int b = 0; b < batch; b++)
            for (int j = 0; j < columns; j++)
                for (int i = 0; i < rows; i++) used[size_t(index(b, i, j))] = true;
        for (int64_t i = 0; i < stride * batch; i++)
            if (!used[size_t(i)]) {
                ASSERT_EQ(get(i), type == CUDA_R_32F ? 12345 : float(__nv_bfloat16(12345.0f)));
            }
    }
};

struct Case {
    int m = 37, n = 29, k = 41;
    bool transa = false, transb = false, rows_a = false, rows_b = false, rows_d = false;
    cudaDataType type = CUDA_R_32F, result_type = CUDA_R_32F, bias_type = CUDA_R_32F;
    float alpha = 1, beta = 0;
    uint32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    int batch = 1, gap = 0;
    bool broadcast_b = false, separate_c = false;

    std::string text() const {
        return std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k) + (transa ? " T" : " N") +
               (transb ? "T" : "N") + (rows_a ? " rows_a" : "") + (rows_b ? " rows_b" : "") +
               (rows_d ? " rows_d" : "") + " types " + std::to_string(type) + " " + std::to_string(result_type) +
               " epilogue " + std::to_string(epilogue) + " alpha " + std::to_string(alpha) + " beta " +
               std::to_string(beta) + " batch " + std::to_string(batch) + " gap " + std::to_string(gap);
    }
};

double gelu(double x) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }
double gelu_derivative(double x) {
    const double u = std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x), t = std::tanh(u);
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
}

struct Descriptor {
    cublasLtMatmulDesc_t desc = nullptr;
    Descriptor() { EXPECT_EQ(cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), CUBLAS_STATUS_SUCCESS); }
    ~Descriptor() { cublasLtMatmulDescDestroy(desc); }
    template <class T>
    void set(cublasLtMatmulDescAttributes_t attribute, T value) {
        EXPECT_EQ(cublasLtMatmulDescSetAttribute(desc, attribute, &value, sizeof value), CUBLAS_STATUS_SUCCESS);
    }
};

cublasLtHandle_t handle() {
    static cublasLtHandle_t handle = [] {
        cublasLtHandle_t result;
        EXPECT_EQ(cublasLtCreate(&result), CUBLAS_STATUS_SUCCESS);
        return result;
    }();
    return handle;
}

// One product against the naive one. The tolerance bounds the error of a sum of k products in fp32 in any order,
// k + 4 roundings on terms of at most 1 (Higham, Accuracy and Stability, 3.1), plus rounding to the result's type.
void test_product(const Case& c) {
    SCOPED_TRACE(c.text());
    std::mt19937 random(unsigned(c.m * 1000 + c.n * 100 + c.k));
    TestMatrix a(c.type, c.transa ? c.k : c.m, c.transa ? c.m : c.k, c.rows_a, c.batch, c.gap);
    TestMatrix b(c.type, c.transb ? c.n : c.k, c.transb ? c.k : c.n, c.rows_b, c.batch, c.gap);
    TestMatrix d(c.result_type, c.m, c.n, c.rows_d, c.batch, c.gap),
        old(c.result_type, c.m, c.n, c.rows_d, c.batch, c.gap);
    TestMatrix aux(c.result_type, c.m, c.n, false, c.batch, c.gap + 1),
        aux_before(c.result_type, c.m, c.n, false, c.batch, c.gap + 1);
    const bool by_columns = c.epilogue == CUBLASLT_EPILOGUE_BGRADB;
    const int bias_length = by_columns ? c.n : c.m;
    TestMatrix bias(c.bias_type, bias_length, 1, false, c.batch);
    for (TestMatrix* matrix : {&a, &b, &d, &aux, &bias}) matrix->fill(random);
    if (c.broadcast_b) {
        const int64_t none = 0;
        cublasLtMatrixLayoutSetAttribute(b.layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &none, sizeof none);
        b.stride = 0, b.batch = 1;
    }
    std::copy_n(d.memory.data, d.memory.size, old.memory.data);
    std::copy_n(aux.memory.data, aux.memory.size, aux_before.memory.data);

    Descriptor desc;
    desc.set(CUBLASLT_MATMUL_DESC_TRANSA, int32_t(c.transa ? CUBLAS_OP_T : CUBLAS_OP_N));
    desc.set(CUBLASLT_MATMUL_DESC_TRANSB, int32_t(c.transb ? CUBLAS_OP_T : CUBLAS_OP_N));
    desc.set(CUBLASLT_MATMUL_DESC_EPILOGUE, c.epilogue);
    if (c.epilogue != CUBLASLT_EPILOGUE_DEFAULT) {
        desc.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<void*>(bias.memory.data));
        desc.set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, int32_t(c.bias_type));
        desc.set(CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE, bias.stride);
        desc.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, static_cast<void*>(aux.memory.data));
        desc.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, aux.ld);
        desc.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE, aux.stride);
    }
    const std::vector<double> bias_before = [&] {
        std::vector<double> values;
        for (int batch = 0; batch < c.batch; batch++)
            for (int i = 0; i < bias_length; i++) values.push_back(bias.at(batch, i, 0));
        return values;
    }();
    cublasLtMatmulHeuristicResult_t result;
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulPreferenceCreate(&preference);
    int found = 0;
    ASSERT_EQ(cublasLtMatmulAlgoGetHeuristic(handle(), desc.desc, a.layout, b.layout, d.layout, d.layout, preference, 1,
                                             &result, &found),
              CUBLAS_STATUS_SUCCESS);
    cublasLtMatmulPreferenceDestroy(preference);
    ASSERT_EQ(found, 1);
    if (c.separate_c) d.fill(random);  // D's former content must not matter then
    const void* c_data = c.separate_c ? old.memory.data : d.memory.data;
    ASSERT_EQ(cublasLtMatmul(handle(), desc.desc, &c.alpha, a.memory.data, a.layout, b.memory.data, b.layout, &c.beta,
                             c_data, c.separate_c ? old.layout : d.layout, d.memory.data, d.layout, &result.algo,
                             nullptr, 0, nullptr),
              CUBLAS_STATUS_SUCCESS);

    const bool writes_aux = (c.epilogue & CUBLASLT_EPILOGUE_GELU_AUX) == CUBLASLT_EPILOGUE_GELU_AUX;
    const double sum_error = (c.k + 4) * fp32_half_ulp * (c.k + 2) * std::max(1.0f, std::fabs(c.alpha));
    const auto rounding = [](cudaDataType type, double x) {
        return (type == CUDA_R_32F ? fp32_half_ulp : bf16_half_ulp) * std::fabs(x);
    };
    for (int batch = 0; batch < c.batch; batch++) {
        std::vector<double> gradient(size_t(bias_length), 0.0), magnitude(size_t(bias_length), 0.0);
        for (int j = 0; j < c.n; j++) {
            for (int i = 0; i < c.m; i++) {
                double sum = 0;
                for (int k = 0; k < c.k; k++) {
                    const double left = c.transa ? a.at(batch, k, i) : a.at(batch, i, k);
                    const double right = c.transb ? b.at(batch, j, k) : b.at(batch, k, j);
                    sum += left * right;
                    if (c.epilogue == CUBLASLT_EPILOGUE_BGRADA && j == 0) gradient[size_t(i)] += left;
                    if (c.epilogue == CUBLASLT_EPILOGUE_BGRADB && i == 0) gradient[size_t(j)] += right;
                }
                double x = c.alpha * sum;
                if (c.beta != 0) x += c.beta * old.at(batch, i, j);
                if (c.epilogue & CUBLASLT_EPILOGUE_BIAS) x += bias_before[size_t(batch * bias_length + i)];
                double expected = x, slope = 1;
                if (c.epilogue & CUBLASLT_EPILOGUE_GELU) expected = gelu(x), slope = 1.2;
                if (c.epilogue & 64) {
                    slope = gelu_derivative(aux_before.at(batch, i, j));
                    expected = x * slope;
                    slope = std::fabs(slope);
                }
                const double tolerance = slope * sum_error + 1e-6 + rounding(c.result_type, expected);
                ASSERT_NEAR(d.at(batch, i, j), expected, tolerance) << batch << " " << i << " " << j;
                if (writes_aux) {
                    ASSERT_NEAR(aux.at(batch, i, j), x, sum_error + rounding(c.result_type, x));
                }
                if (c.epilogue == CUBLASLT_EPILOGUE_DGELU_BGRAD) {
                    gradient[size_t(i)] += expected;
                    magnitude[size_t(i)] +=
                        std::fabs(expected) * fp32_half_ulp * c.n + tolerance - rounding(c.result_type, expected);
                }
            }
        }
        if (c.epilogue == CUBLASLT_EPILOGUE_BGRADA || by_columns)
            std::fill(magnitude.begin(), magnitude.end(), fp32_half_ulp * c.k * c.k);
        for (int i = 0; i < bias_length; i++) {
            const double value = bias.at(batch, i, 0);
            if (c.epilogue == CUBLASLT_EPILOGUE_DGELU_BGRAD || c.epilogue >= CUBLASLT_EPILOGUE_BGRADA)
                ASSERT_NEAR(value, gradient[size_t(i)],
                            magnitude[size_t(i)] + rounding(c.bias_type, gradient[size_t(i)]));
            else ASSERT_EQ(value, bias_before[size_t(batch * bias_length + i)]);
        }
    }
    d.check_gaps();
    aux.check_gaps();
    if (!writes_aux) {
        ASSERT_EQ(memcmp(aux.memory.data, aux_before.memory.data, aux.memory.size), 0);
    }
}

struct Types {
    cudaDataType type, result, bias;
};
const Types all_types[] = {{CUDA_R_32F, CUDA_R_32F, CUDA_R_32F},
                           {CUDA_R_16BF, CUDA_R_16BF, CUDA_R_16BF},
                           {CUDA_R_16BF, CUDA_R_32F, CUDA_R_32F},
                           {CUDA_R_16BF, CUDA_R_16BF, CUDA_R_32F}};

TEST(Matmul, EveryLayout) {
    for (const Types& t : {all_types[0], all_types[1], all_types[2]})
        for (int bits = 0; bits < 32; bits++)
            for (const float beta : {0.0f, 1.0f}) {
                test_product({.transa = bool(bits & 1),
                              .transb = bool(bits & 2),
                              .rows_a = bool(bits & 4),
                              .rows_b = bool(bits & 8),
                              .rows_d = bool(bits & 16),
                              .type = t.type,
                              .result_type = t.result,
                              .beta = beta,
                              .gap = bits % 3 * 2});
            }
}

TEST(Matmul, ShapesAndScales) {
    const int shapes[][3] = {{1, 1, 1},    {1, 50, 7},     {50, 1, 7},  {33, 17, 1},
                             {64, 64, 64}, {128, 96, 200}, {3, 200, 65}};
    for (const auto& s : shapes)
        for (const Types& t : {all_types[0], all_types[1]})
            for (const auto& [alpha, beta] : {std::pair{1.0f, 0.0f}, {0.125f, 0.0f}, {-2.0f, 1.0f}, {1.0f, 0.5f}}) {
                test_product({.m = s[0],
                              .n = s[1],
                              .k = s[2],
                              .transa = true,
                              .type = t.type,
                              .result_type = t.result,
                              .alpha = alpha,
                              .beta = beta});
                test_product({.m = s[0],
                              .n = s[1],
                              .k = s[2],
                              .transb = true,
                              .type = t.type,
                              .result_type = t.result,
                              .alpha = alpha,
                              .beta = beta,
                              .separate_c = true});
            }
}

TEST(Matmul, LongSums) {
    for (int bits = 0; bits < 4; bits++)
        for (const float beta : {0.0f, 1.0f}) {
            test_product({.m = 5,
                          .n = 3,
                          .k = 8200,
                          .transa = bool(bits & 1),
                          .transb = bool(bits & 2),
                          .alpha = 0.5f,
                          .beta = beta,
                          .gap = bits});
        }
}

TEST(Matmul, EveryEpilogue) {
    for (const Types& t : all_types)
        for (const uint32_t epilogue :
             {CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_GELU, CUBLASLT_EPILOGUE_GELU_BIAS, CUBLASLT_EPILOGUE_GELU_AUX,
              CUBLASLT_EPILOGUE_GELU_AUX_BIAS, CUBLASLT_EPILOGUE_DGELU, CUBLASLT_EPILOGUE_DGELU_BGRAD,
              CUBLASLT_EPILOGUE_BGRADA, CUBLASLT_EPILOGUE_BGRADB})
            for (int bits = 0; bits < 4; bits++) {
                const float alphas[] = {1, 1, 0.5, 0.5}, betas[] = {0, 1, 0, 2};
                test_product({.m = 70,
                              .n = 19,
                              .k = 24,
                              .transa = bool(bits & 1),
                              .transb = bool(bits & 2),
                              .type = t.type,
                              .result_type = t.result,
                              .bias_type = t.bias,
                              .alpha = alphas[bits],
                              .beta = betas[bits],
                              .epilogue = epilogue,
                              .gap = bits,
                              .separate_c = bits == 1});
            }
}

TEST(Matmul, Batches) {
    for (const Types& t : {all_types[0], all_types[1], all_types[2]})
        for (int bits = 0; bits < 8; bits++)
            for (const float beta : {0.0f, 1.0f}) {
                test_product({.m = 20,
                              .n = 12,
                              .k = 16,
                              .transa = bool(bits & 1),
                              .transb = bool(bits & 2),
                              .rows_d = bool(bits & 4),
                              .type = t.type,
                              .result_type = t.result,
                              .alpha = 0.5f,
                              .beta = beta,
                              .batch = 5,
                              .gap = bits % 2});
            }
    test_product({.m = 20, .n = 12, .k = 16, .batch = 3, .broadcast_b = true});
    test_product({.m = 20, .n = 12, .k = 16, .epilogue = CUBLASLT_EPILOGUE_GELU_AUX_BIAS, .batch = 3});
    test_product({.m = 20, .n = 12, .k = 16, .epilogue = CUBLASLT_EPILOGUE_DGELU_BGRAD, .batch = 3, .gap = 2});
}

TEST(Matmul, SameBitsEveryTime) {
    std::mt19937 random(1);
    TestMatrix a(CUDA_R_32F, 300, 200), b(CUDA_R_32F, 200, 100), first(CUDA_R_32F, 300, 100),
        again(CUDA_R_32F, 300, 100);
    a.fill(random), b.fill(random);
    const Descriptor desc;
    const float one = 1, zero = 0;
    for (TestMatrix* d : {&first, &again, &again, &again}) {
        ASSERT_EQ(cublasLtMatmul(handle(), desc.desc, &one, a.memory.data, a.layout, b.memory.data, b.layout, &zero,
                                 d->memory.data, d->layout, d->memory.data, d->layout, nullptr, nullptr, 0, nullptr),
                  CUBLAS_STATUS_SUCCESS);
        EXPECT_EQ(memcmp(d->memory.data, first.memory.data, first.memory.size), 0);
    }
}

TEST(Matmul, WithBetaZeroNaNsInDDoNotMatter) {
    std::mt19937 random(1);
    TestMatrix a(CUDA_R_32F, 30, 20), b(CUDA_R_32F, 20, 10), d(CUDA_R_32F, 30, 10);
    a.fill(random), b.fill(random);
    memset(d.memory.data, 0xff, d.memory.size);
    const Descriptor desc;
    const float one = 1, zero = 0;
    ASSERT_EQ(cublasLtMatmul(handle(), desc.desc, &one, a.memory.data, a.layout, b.memory.data, b.layout, &zero,
                             d.memory.data, d.layout, d.memory.data, d.layout, nullptr, nullptr, 0, nullptr),
              CUBLAS_STATUS_SUCCESS);
    for (int i = 0; i < 300; i++) EXPECT_TRUE(std::isfinite(d.get(i)));
}

TEST(Matmul, WhatIsNotSupportedIsRefused) {
    TestMatrix a(CUDA_R_32F, 8, 8), half(CUDA_R_16BF, 8, 8), wide(CUDA_R_32F, 8, 9), rows(CUDA_R_32F, 8, 8, true);
    const float one = 1;
    const auto run = [&](const Descriptor& desc, const TestMatrix& a, const TestMatrix& b, TestMatrix& d) {
        testing::internal::CaptureStderr();
        const cublasStatus_t status =
            cublasLtMatmul(handle(), desc.desc, &one, a.memory.data, a.layout, b.memory.data, b.layout, &one,
                           d.memory.data, d.layout, d.memory.data, d.layout, nullptr, nullptr, 0, nullptr);
        const std::string message = testing::internal::GetCapturedStderr();
        EXPECT_EQ(status == CUBLAS_STATUS_NOT_SUPPORTED, message.find("not supported") != std::string::npos) << message;
        return status;
    };
    Descriptor plain, relu, bias, device_scalars;
    relu.set(CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t(2));
    bias.set(CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t(CUBLASLT_EPILOGUE_BIAS));
    device_scalars.set(CUBLASLT_MATMUL_DESC_POINTER_MODE, int32_t(CUBLASLT_POINTER_MODE_DEVICE));
    EXPECT_EQ(run(plain, a, half, a), CUBLAS_STATUS_NOT_SUPPORTED);
    EXPECT_EQ(run(plain, a, a, half), CUBLAS_STATUS_NOT_SUPPORTED);
    EXPECT_EQ(run(relu, a, a, a), CUBLAS_STATUS_NOT_SUPPORTED);
    EXPECT_EQ(run(bias, a, a, rows), CUBLAS_STATUS_NOT_SUPPORTED);
    EXPECT_EQ(run(device_scalars, a, a, a), CUBLAS_STATUS_NOT_SUPPORTED);
    EXPECT_EQ(run(plain, wide, a, a), CUBLAS_STATUS_INVALID_VALUE);  // 8 x 9 times 8 x 8
    EXPECT_EQ(run(bias, a, a, a), CUBLAS_STATUS_INVALID_VALUE);      // no bias pointer
    const int32_t batches = 2;
    TestMatrix batch(CUDA_R_32F, 8, 8, false, 2);
    cublasLtMatrixLayoutSetAttribute(batch.layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batches, sizeof batches);
    EXPECT_EQ(run(plain, a, a, batch), CUBLAS_STATUS_INVALID_VALUE);
    EXPECT_EQ(cublasLtMatmulDescSetAttribute(plain.desc, CUBLASLT_MATMUL_DESC_TRANSA, &one, 2),
              CUBLAS_STATUS_INVALID_VALUE);
    EXPECT_STREQ(cublasLtGetStatusString(CUBLAS_STATUS_NOT_SUPPORTED), "CUBLAS_STATUS_NOT_SUPPORTED");
}

}  // namespace
