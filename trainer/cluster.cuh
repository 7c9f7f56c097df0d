// The ranks of a run, one device each: NCCL sums over them, in a stream of its own.
#pragma once
#include <nccl.h>

#include "trainer/device.cuh"
#include "trainer/watchdog.h"
#include "trainer/world.h"

inline void nccl_check(ncclResult_t result, const char* call, const char* file, int line) {
    if (result != ncclSuccess) throw Error(text("%s:%d: %s: %s", file, line, call, ncclGetErrorString(result)));
}
#define CHECK_NCCL(call) nccl_check((call), #call, __FILE__, __LINE__)

struct Cluster {
    int rank = 0, ranks = 1, local_rank = 0;
    ncclComm_t comm = nullptr;
    cudaStream_t stream = nullptr;
    cudaEvent_t computed = nullptr, summed = nullptr;
};

// The world must have been entered.
inline Cluster join_cluster() {
    Cluster cluster;
    const Watchdog::Phase phase(watchdog, "joining the other ranks");
    const World world;
    cluster.rank = world.rank, cluster.ranks = world.ranks;
    cluster.local_rank = rank_on_machine();
    int devices = 0;
    CHECK_CUDA(cudaGetDeviceCount(&devices));
    CHECK_CUDA(cudaSetDevice(cluster.local_rank % devices));
    CHECK_CUDA(cudaStreamCreate(&main_stream));
    if (cluster.ranks == 1) return cluster;
    ncclUniqueId id;
    if (cluster.rank == 0) CHECK_NCCL(ncclGetUniqueId(&id));
    broadcast_bytes(&id, sizeof(id), 0);
    CHECK_NCCL(ncclCommInitRank(&cluster.comm, cluster.ranks, id, cluster.rank));
    // Before the main stream's: a sum that waits for a place behind a product would make all ranks wait.
    int least, greatest;
    CHECK_CUDA(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    CHECK_CUDA(cudaStreamCreateWithPriority(&cluster.stream, cudaStreamDefault, greatest));
    CHECK_CUDA(cudaEventCreateWithFlags(&cluster.computed, cudaEventDisableTiming));
    CHECK_CUDA(cudaEventCreateWithFlags(&cluster.summed, cudaEventDisableTiming));
    return cluster;
}

// data = its sum over the ranks, after all that the main stream has been given so far.
template <class T>
void sum_over_ranks(const Cluster& cluster, T* data, int64_t count) {
    if (cluster.ranks == 1 || count == 0) return;
    constexpr ncclDataType_t type = std::is_same_v<T, double> ? ncclFloat64 : ncclFloat32;
    CHECK_CUDA(cudaEventRecord(cluster.computed, main_stream));
    CHECK_CUDA(cudaStreamWaitEvent(cluster.stream, cluster.computed, 0));
    const Watchdog::Phase phase(watchdog, waiting_for_ranks);  // on a CPU; a GPU does it later
    CHECK_NCCL(ncclAllReduce(data, data, count, type, ncclSum, cluster.comm, cluster.stream));
}

// What the main stream is given from here on comes after the sums.
inline void wait_for_sums(const Cluster& cluster) {
    if (cluster.ranks == 1) return;
    CHECK_CUDA(cudaEventRecord(cluster.summed, cluster.stream));
    CHECK_CUDA(cudaStreamWaitEvent(main_stream, cluster.summed, 0));
}
