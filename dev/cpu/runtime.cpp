// CUDA's runtime on the CPU: errors, the device, streams, events, memory.
#include "runtime.h"

#include <omp.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "observer.h"

struct CUstream_st {};

struct CUevent_st {
    bool timed, recorded = false;
    std::chrono::steady_clock::time_point time = {};
};

namespace cpu_device {
namespace {

thread_local cudaError_t last_error = cudaSuccess;

int cores_of(pid_t process) {
    cpu_set_t set;
    CPU_ZERO(&set);
    return sched_getaffinity(process, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 0;
}

// Ranks on one machine share its cores. mpirun may have bound this rank to some of them already; those it was given
// itself are found in its, the parent's, affinity. So: no more than an even share of the parent's cores, and no more
// than this process may use.
int share_of_cores() {
    const int usable = std::max(1, cores_of(0));
    const char* text = getenv("OMPI_COMM_WORLD_LOCAL_SIZE");
    const int ranks = text != nullptr ? std::max(1, atoi(text)) : 1;
    if (ranks == 1) return usable;
    int machine = cores_of(getppid());
    if (machine == 0) machine = int(sysconf(_SC_NPROCESSORS_ONLN));
    return std::max(1, std::min(usable, machine / ranks));
}

// Bytes of memory this process may use: the machine's, or its control group's where that is less.
size_t total_memory() {
    static const size_t total = [] {
        size_t bytes = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE));
        for (const char* path : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
            size_t limit = 0;
            if (std::ifstream(path) >> limit && limit > 0) bytes = std::min(bytes, limit);
        }
        return bytes;
    }();
    return total;
}

size_t available_memory() {
    std::ifstream file("/proc/meminfo");
    for (std::string key, unit; file >> key;) {
        size_t kilobytes = 0;
        if (key == "MemAvailable:" && file >> kilobytes) return std::min(kilobytes * 1024, total_memory());
        std::getline(file, unit);
    }
    return total_memory();
}

// What cudaMalloc and cudaMallocHost gave out. Linux promises more memory than there is and kills later; so the sum
// is held below the machine's memory here, and the caller gets cudaErrorMemoryAllocation as on a GPU.
struct Heap {
    std::mutex mutex;
    std::map<void*, size_t> sizes;
    size_t used = 0;
};
Heap device_heap, host_heap;

cudaError_t allocate(Heap& heap, void** address, size_t size) {
    if (address == nullptr) return set_error(cudaErrorInvalidValue);
    *address = nullptr;
    if (size == 0) return cudaSuccess;
    const std::lock_guard lock(heap.mutex);
    if (size > total_memory() || heap.used > total_memory() - size) return set_error(cudaErrorMemoryAllocation);
    constexpr size_t huge_page = size_t(2) << 20;
    const bool large = size >= 2 * huge_page;
    void* memory = nullptr;
    if (posix_memalign(&memory, large ? huge_page : 256, size) != 0) return set_error(cudaErrorMemoryAllocation);
    if (large) madvise(memory, size, MADV_HUGEPAGE);
#ifdef CPU_DEVICE_DEBUG
    memset(memory, 0xff, size);  // NaNs, so that a read before the first write shows
#endif
    heap.sizes[memory] = size;
    heap.used += size;
    *address = memory;
    return cudaSuccess;
}

cudaError_t release(Heap& heap, void* address) {
    if (address == nullptr) return cudaSuccess;
    const std::lock_guard lock(heap.mutex);
    const auto found = heap.sizes.find(address);
    if (found == heap.sizes.end()) return set_error(cudaErrorInvalidValue);
    heap.used -= found->second;
    heap.sizes.erase(found);
    free(address);
    return cudaSuccess;
}

// One core alone does not reach the memory's rate.
template <class Work>
void in_parallel_pieces(size_t size, Work work) {
    constexpr size_t piece = size_t(1) << 20;
#pragma omp parallel for if (size > 2 * piece)
    for (size_t begin = 0; begin < size; begin += piece) work(begin, std::min(piece, size - begin));
}

bool is_kind(cudaMemcpyKind kind) { return kind >= cudaMemcpyHostToHost && kind <= cudaMemcpyDefault; }

}  // namespace

cudaError_t set_error(cudaError_t error) { return error == cudaSuccess ? error : last_error = error; }

int cpu_threads() {
    static const int threads = [] {
        if (getenv("OMP_NUM_THREADS") == nullptr) omp_set_num_threads(share_of_cores());
        return omp_get_max_threads();
    }();
    return threads;
}

}  // namespace cpu_device

using cpu_device::allocate;
using cpu_device::release;
using cpu_device::set_error;

// ---------------------------------------------------------------------------------------------------------------
// Errors

struct ErrorText {
    cudaError_t error;
    const char *name, *text;
};
constexpr ErrorText error_texts[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInvalidMemcpyDirection, "cudaErrorInvalidMemcpyDirection", "invalid copy direction for memcpy"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorUnknown, "cudaErrorUnknown", "unknown error"},
};

static const ErrorText& describe(cudaError_t error) {
    static constexpr ErrorText unknown = {cudaErrorUnknown, "unrecognized error code", "unrecognized error code"};
    for (const ErrorText& entry : error_texts) {
        if (entry.error == error) return entry;
    }
    return unknown;
}

const char* cudaGetErrorName(cudaError_t error) { return describe(error).name; }
const char* cudaGetErrorString(cudaError_t error) { return describe(error).text; }

cudaError_t cudaPeekAtLastError() { return cpu_device::last_error; }
cudaError_t cudaGetLastError() { return std::exchange(cpu_device::last_error, cudaSuccess); }

// ---------------------------------------------------------------------------------------------------------------
// The device

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : set_error(cudaErrorInvalidDevice); }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaDeviceReset() { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
    if (properties == nullptr) return set_error(cudaErrorInvalidValue);
    if (device != 0) return set_error(cudaErrorInvalidDevice);
    *properties = {};
    // The family and model too: "AMD EPYC" has been several processors, whose results differ in their last bits.
    std::map<std::string, std::string> first;
    std::ifstream cpuinfo("/proc/cpuinfo");
    for (std::string line; std::getline(cpuinfo, line) && !line.empty();)
        if (const size_t colon = line.find(": "); colon != line.npos)
            first[line.substr(0, line.find('\t'))] = line.substr(colon + 2);
    std::string name = first.contains("model name") ? first["model name"] : "CPU";
    if (first.contains("cpu family") && first.contains("model"))
        name += ", family " + first["cpu family"] + ", model " + first["model"];
    snprintf(properties->name, sizeof properties->name, "%s", name.c_str());
    properties->totalGlobalMem = cpu_device::total_memory();
    properties->sharedMemPerBlock = 48 * 1024;
    properties->sharedMemPerBlockOptin = dynamic_shared_limit;
    properties->sharedMemPerMultiprocessor = dynamic_shared_limit + 1024;
    properties->warpSize = warpSize;
    properties->maxThreadsPerBlock = 1024;
    properties->maxThreadsPerMultiProcessor = 1024;
    properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
    properties->maxThreadsDim[2] = 64;
    properties->maxGridSize[0] = 0x7fffffff;
    properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
    properties->major = 8;  // the oldest GPU whose instructions the kernels may use
    properties->minor = 0;
    properties->multiProcessorCount = cpu_device::cpu_threads();
    properties->l2CacheSize = int(std::max(0L, sysconf(_SC_LEVEL3_CACHE_SIZE)));
    properties->integrated = 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    static const cudaDeviceProp properties = [] {
        cudaDeviceProp result;
        return cudaGetDeviceProperties(&result, 0), result;
    }();
    if (value == nullptr) return set_error(cudaErrorInvalidValue);
    if (device != 0) return set_error(cudaErrorInvalidDevice);
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock: *value = properties.maxThreadsPerBlock; break;
        case cudaDevAttrMaxBlockDimX: *value = properties.maxThreadsDim[0]; break;
        case cudaDevAttrMaxBlockDimY: *value = properties.maxThreadsDim[1]; break;
        case cudaDevAttrMaxBlockDimZ: *value = properties.maxThreadsDim[2]; break;
        case cudaDevAttrMaxGridDimX: *value = properties.maxGridSize[0]; break;
        case cudaDevAttrMaxGridDimY: *value = properties.maxGridSize[1]; break;
        case cudaDevAttrMaxGridDimZ: *value = properties.maxGridSize[2]; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = int(properties.sharedMemPerBlock); break;
        case cudaDevAttrWarpSize: *value = properties.warpSize; break;
        case cudaDevAttrMultiProcessorCount: *value = properties.multiProcessorCount; break;
        case cudaDevAttrL2CacheSize: *value = properties.l2CacheSize; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = properties.maxThreadsPerMultiProcessor; break;
        case cudaDevAttrComputeCapabilityMajor: *value = properties.major; break;
        case cudaDevAttrComputeCapabilityMinor: *value = properties.minor; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = int(properties.sharedMemPerMultiprocessor); break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(properties.sharedMemPerBlockOptin); break;
        default: return set_error(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------
// Streams and events: all work is done when it is enqueued, so there is never anything to wait for

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
    return cudaStreamCreateWithFlags(stream, flags);
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    if (stream == nullptr || flags > cudaStreamNonBlocking) return set_error(cudaErrorInvalidValue);
    return *stream = new CUstream_st, cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    if (least != nullptr) *least = 0;
    if (greatest != nullptr) *greatest = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    if (stream == nullptr) return set_error(cudaErrorInvalidResourceHandle);
    return delete stream, cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t event, unsigned) {
    return event != nullptr ? cudaSuccess : set_error(cudaErrorInvalidResourceHandle);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, void (*function)(void*), void* data) {
    if (function == nullptr) return set_error(cudaErrorInvalidValue);
    return function(data), cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
    if (event == nullptr || flags > (cudaEventBlockingSync | cudaEventDisableTiming))
        return set_error(cudaErrorInvalidValue);
    return *event = new CUevent_st{.timed = (flags & cudaEventDisableTiming) == 0}, cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    if (event == nullptr) return set_error(cudaErrorInvalidResourceHandle);
    return delete event, cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
    if (event == nullptr) return set_error(cudaErrorInvalidResourceHandle);
    event->recorded = true;
    event->time = std::chrono::steady_clock::now();
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    return event != nullptr ? cudaSuccess : set_error(cudaErrorInvalidResourceHandle);
}
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaEventSynchronize(event); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    if (milliseconds == nullptr) return set_error(cudaErrorInvalidValue);
    if (begin == nullptr || end == nullptr) return set_error(cudaErrorInvalidResourceHandle);
    if (!begin->timed || !end->timed || !begin->recorded || !end->recorded)
        return set_error(cudaErrorInvalidResourceHandle);
    *milliseconds = std::chrono::duration<float, std::milli>(end->time - begin->time).count();
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------
// Memory

cudaError_t cudaMalloc(void** address, size_t size) { return allocate(cpu_device::device_heap, address, size); }
cudaError_t cudaFree(void* address) { return release(cpu_device::device_heap, address); }
cudaError_t cudaMallocHost(void** address, size_t size) { return allocate(cpu_device::host_heap, address, size); }
cudaError_t cudaHostAlloc(void** address, size_t size, unsigned) { return cudaMallocHost(address, size); }
cudaError_t cudaFreeHost(void* address) { return release(cpu_device::host_heap, address); }

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    if (free == nullptr || total == nullptr) return set_error(cudaErrorInvalidValue);
    *total = cpu_device::total_memory();
    *free = std::min(*total, cpu_device::available_memory());
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
    if (!cpu_device::is_kind(kind)) return set_error(cudaErrorInvalidMemcpyDirection);
    if (size == 0) return cudaSuccess;
    if (to == nullptr || from == nullptr) return set_error(cudaErrorInvalidValue);
    cpu_device::in_parallel_pieces(size, [&](size_t begin, size_t count) {
        memcpy(static_cast<char*>(to) + begin, static_cast<const char*>(from) + begin, count);
    });
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind, cudaStream_t) {
    return cudaMemcpy(to, from, size, kind);
}
cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                         cudaMemcpyKind kind) {
    if (width > to_pitch || width > from_pitch) return set_error(cudaErrorInvalidValue);
    for (size_t row = 0; row < height; row++) {
        const cudaError_t error = cudaMemcpy(static_cast<char*>(to) + row * to_pitch,
                                             static_cast<const char*>(from) + row * from_pitch, width, kind);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t) {
    return cudaMemcpy2D(to, to_pitch, from, from_pitch, width, height, kind);
}
cudaError_t cudaMemset(void* address, int byte, size_t size) {
    if (size == 0) return cudaSuccess;
    if (address == nullptr) return set_error(cudaErrorInvalidValue);
    if (cpu_device::observer::fill && cpu_device::observer::fill(size)) return cudaSuccess;
    cpu_device::in_parallel_pieces(
        size, [&](size_t begin, size_t count) { memset(static_cast<char*>(address) + begin, byte, count); });
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* address, int byte, size_t size, cudaStream_t) {
    return cudaMemset(address, byte, size);
}
