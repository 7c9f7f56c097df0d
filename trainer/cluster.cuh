// The ranks of a run: MPI starts them, NCCL sums over them, in a stream of its own.
#pragma once
#include <mpi.h>
#include <nccl.h>

#include "trainer/device.cuh"
#include "trainer/watchdog.h"

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

// MPI must be initialized. One device a rank.
inline Cluster join_cluster() {
    Cluster cluster;
    const Watchdog::Phase phase(watchdog, "joining the other ranks");
    MPI_Comm_rank(MPI_COMM_WORLD, &cluster.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &cluster.ranks);
    MPI_Comm node;
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, cluster.rank, MPI_INFO_NULL, &node);
    MPI_Comm_rank(node, &cluster.local_rank);
    MPI_Comm_free(&node);
    int devices = 0;
    CHECK_CUDA(cudaGetDeviceCount(&devices));
    CHECK_CUDA(cudaSetDevice(cluster.local_rank % devices));
    CHECK_CUDA(cudaStreamCreate(&main_stream));
    if (cluster.ranks == 1) return cluster;
    ncclUniqueId id;
    if (cluster.rank == 0) CHECK_NCCL(ncclGetUniqueId(&id));
    MPI_Bcast(&id, sizeof(id), MPI_BYTE, 0, MPI_COMM_WORLD);
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
