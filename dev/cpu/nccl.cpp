// NCCL's collectives by MPI.
//
// A reduction is done by the rank that needs the result: it receives that part from all others and adds them in the
// order of the ranks. So a reduce-scatter moves what NCCL's ring moves, and the result depends on nothing but the
// values. An all-reduce is a reduce-scatter and an all-gather. Long messages go in pieces, since MPI counts in int.
#include "nccl.h"

#ifndef OMPI_SKIP_MPICXX
#define OMPI_SKIP_MPICXX 1  // the C++ bindings, long removed from MPI, draw warnings
#endif
#include <mpi.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

struct ncclComm {
    MPI_Comm mpi = MPI_COMM_NULL;
    int ranks = 0, rank = 0;
};

namespace {

constexpr size_t piece_bytes = size_t(16) << 20;  // of one rank's part: bounds the receive buffers

std::string& last_error() {
    static thread_local std::string message = "no error";
    return message;
}

ncclResult_t failed(ncclResult_t result, const std::string& message) {
    last_error() = message;
    fprintf(stderr, "NCCL on the CPU: %s\n", message.c_str());
    return result;
}

// Send and receive in a group start together, and the group's end waits for them.
thread_local int group_depth = 0;
thread_local std::vector<MPI_Request> group_requests;

size_t size_of(ncclDataType_t type) {
    switch (type) {
        case ncclInt8:
        case ncclUint8: return 1;
        case ncclBfloat16: return 2;
        case ncclInt32:
        case ncclUint32:
        case ncclFloat32: return 4;
        case ncclInt64:
        case ncclUint64:
        case ncclFloat64: return 8;
    }
    return 0;
}

ncclResult_t check(const ncclComm* comm, ncclDataType_t type, int root = 0) {
    if (comm == nullptr) return failed(ncclInvalidArgument, "the communicator is null");
    if (size_of(type) == 0) return failed(ncclInvalidArgument, "unknown data type " + std::to_string(type));
    if (root < 0 || root >= comm->ranks) return failed(ncclInvalidArgument, "no rank " + std::to_string(root));
    return ncclSuccess;
}

ncclResult_t check(const ncclComm* comm, ncclDataType_t type, ncclRedOp_t op, int root = 0) {
    if (op != ncclSum && op != ncclAvg && op != ncclMax && op != ncclMin && op != ncclProd)
        return failed(ncclInvalidArgument, "unknown reduction " + std::to_string(op));
    return check(comm, type, root);
}

// --- Local reductions

template <class Sum, class T>
void accumulate(Sum* total, const T* values, size_t n, ncclRedOp_t op) {
    switch (op) {
        case ncclSum:
        case ncclAvg:
            for (size_t i = 0; i < n; i++) total[i] = Sum(total[i] + Sum(values[i]));
            break;
        case ncclProd:
            for (size_t i = 0; i < n; i++) total[i] = Sum(total[i] * Sum(values[i]));
            break;
        case ncclMax:
            for (size_t i = 0; i < n; i++) total[i] = std::max(total[i], Sum(values[i]));
            break;
        case ncclMin:
            for (size_t i = 0; i < n; i++) total[i] = std::min(total[i], Sum(values[i]));
            break;
    }
}

// result = reduction over r of parts[r][0 .. n), accumulated in Sum
template <class Sum, class T>
void reduce_parts(T* result, const std::vector<const void*>& parts, size_t n, ncclRedOp_t op) {
    constexpr size_t block = 1024;  // stays in the first-level cache
    Sum total[block];
    for (size_t begin = 0; begin < n; begin += block) {
        const size_t count = std::min(block, n - begin);
        const T* first = static_cast<const T*>(parts[0]) + begin;
        for (size_t i = 0; i < count; i++) total[i] = Sum(first[i]);
        for (size_t r = 1; r < parts.size(); r++) accumulate(total, static_cast<const T*>(parts[r]) + begin, count, op);
        if (op == ncclAvg)
            for (size_t i = 0; i < count; i++) total[i] = Sum(total[i] / Sum(parts.size()));
        for (size_t i = 0; i < count; i++) result[begin + i] = T(total[i]);
    }
}

void reduce_parts(void* result, const std::vector<const void*>& parts, size_t n, ncclDataType_t type, ncclRedOp_t op) {
    switch (type) {
        case ncclInt8: return reduce_parts<int8_t>(static_cast<int8_t*>(result), parts, n, op);
        case ncclUint8: return reduce_parts<uint8_t>(static_cast<uint8_t*>(result), parts, n, op);
        case ncclInt32: return reduce_parts<int32_t>(static_cast<int32_t*>(result), parts, n, op);
        case ncclUint32: return reduce_parts<uint32_t>(static_cast<uint32_t*>(result), parts, n, op);
        case ncclInt64: return reduce_parts<int64_t>(static_cast<int64_t*>(result), parts, n, op);
        case ncclUint64: return reduce_parts<uint64_t>(static_cast<uint64_t*>(result), parts, n, op);
        case ncclFloat32: return reduce_parts<float>(static_cast<float*>(result), parts, n, op);
        case ncclFloat64: return reduce_parts<double>(static_cast<double*>(result), parts, n, op);
        case ncclBfloat16: return reduce_parts<float>(static_cast<__nv_bfloat16*>(result), parts, n, op);
    }
}

// --- Communication

// A range of elements that one rank reduces.
struct Part {
    size_t begin, count;
};

// Each rank r ends with the reduction of parts[r] of all ranks' `send` in its `receive`. Exchanged piece by piece.
void reduce_to_owners(const char* send, char* receive, const std::vector<Part>& parts, ncclDataType_t type,
                      ncclRedOp_t op, const ncclComm& comm) {
    const size_t size = size_of(type), piece = piece_bytes / size;
    const Part own = parts[size_t(comm.rank)];
    size_t longest = 0;
    for (const Part& part : parts) longest = std::max(longest, part.count);
    const size_t own_piece = std::min(piece, own.count);
    const auto buffer = std::make_unique_for_overwrite<char[]>(own_piece * size * size_t(comm.ranks));
    std::vector<MPI_Request> requests;
    std::vector<const void*> sources(size_t(comm.ranks));

    for (size_t done = 0; done < longest; done += piece) {
        const auto piece_of = [&](const Part& part) {
            return done < part.count ? std::min(piece, part.count - done) : 0;
        };
        const size_t count = piece_of(own);
        requests.clear();
        for (int r = 0; r < comm.ranks; r++) {
            if (r == comm.rank) continue;
            if (count > 0) {
                char* target = buffer.get() + size_t(r) * own_piece * size;
                MPI_Irecv(target, int(count * size), MPI_BYTE, r, 0, comm.mpi, &requests.emplace_back());
                sources[size_t(r)] = target;
            }
            const Part& part = parts[size_t(r)];
            if (piece_of(part) > 0) {
                MPI_Isend(send + (part.begin + done) * size, int(piece_of(part) * size), MPI_BYTE, r, 0, comm.mpi,
                          &requests.emplace_back());
            }
        }
        MPI_Waitall(int(requests.size()), requests.data(), MPI_STATUSES_IGNORE);
        // Reducing after all sends are done lets `receive` lie inside `send`: what is overwritten is this rank's part.
        sources[size_t(comm.rank)] = send + (own.begin + done) * size;
        if (count > 0) reduce_parts(receive + done * size, sources, count, type, op);
    }
}

// Rank r's part of `data` becomes part r of everyone's `data`.
void gather_parts(char* data, const std::vector<Part>& parts, size_t size, const ncclComm& comm) {
    std::vector<MPI_Request> requests;
    for (int distance = 1; distance < comm.ranks; distance++) {
        const int to = (comm.rank + distance) % comm.ranks, from = (comm.rank - distance + comm.ranks) % comm.ranks;
        const Part out = parts[size_t(comm.rank)], in = parts[size_t(from)];
        const size_t out_bytes = out.count * size, in_bytes = in.count * size;
        for (size_t done = 0; done < std::max(out_bytes, in_bytes); done += piece_bytes) {
            const size_t in_piece = done < in_bytes ? std::min(piece_bytes, in_bytes - done) : 0;
            const size_t out_piece = done < out_bytes ? std::min(piece_bytes, out_bytes - done) : 0;
            if (in_piece > 0) {
                MPI_Irecv(data + in.begin * size + done, int(in_piece), MPI_BYTE, from, 0, comm.mpi,
                          &requests.emplace_back());
            }
            if (out_piece > 0) {
                MPI_Isend(data + out.begin * size + done, int(out_piece), MPI_BYTE, to, 0, comm.mpi,
                          &requests.emplace_back());
            }
        }
    }
    MPI_Waitall(int(requests.size()), requests.data(), MPI_STATUSES_IGNORE);
}

std::vector<Part> equal_parts(size_t count_each, int ranks) {
    std::vector<Part> parts;
    for (int r = 0; r < ranks; r++) parts.push_back({size_t(r) * count_each, count_each});
    return parts;
}

// `count` elements in one part a rank, as even as can be.
std::vector<Part> even_parts(size_t count, int ranks) {
    std::vector<Part> parts;
    const auto bound = [&](int r) {
        return count / size_t(ranks) * size_t(r) + std::min(count % size_t(ranks), size_t(r));
    };
    for (int r = 0; r < ranks; r++) parts.push_back({bound(r), bound(r + 1) - bound(r)});
    return parts;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------
// Communicators

const char* ncclGetErrorString(ncclResult_t result) {
    constexpr const char* texts[] = {"no error",
                                     "unhandled cuda error",
                                     "unhandled system error",
                                     "internal error",
                                     "invalid argument",
                                     "invalid usage",
                                     "remote process exited or there was a network error",
                                     "NCCL operation in progress"};
    return size_t(result) < std::size(texts) ? texts[size_t(result)] : "unknown result code";
}
const char* ncclGetLastError(ncclComm_t) { return last_error().c_str(); }
ncclResult_t ncclGetVersion(int* version) { return *version = NCCL_VERSION_CODE, ncclSuccess; }

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    if (id == nullptr) return failed(ncclInvalidArgument, "the id is null");
    *id = {"MPI_COMM_WORLD"};
    return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank) {
    int initialized = 0;
    MPI_Initialized(&initialized);
    if (!initialized) return failed(ncclInvalidUsage, "ncclCommInitRank: call MPI_Init first");
    if (comm == nullptr) return failed(ncclInvalidArgument, "ncclCommInitRank: the communicator is null");
    if (strcmp(id.internal, "MPI_COMM_WORLD") != 0)
        return failed(ncclInvalidArgument, "ncclCommInitRank: the id is not one of ncclGetUniqueId");
    int world_ranks = 0, world_rank = 0;
    MPI_Comm_size(MPI_COMM_WORLD, &world_ranks);
    MPI_Comm_rank(MPI_COMM_WORLD, &world_rank);
    if (ranks != world_ranks || rank != world_rank) {
        return failed(ncclInvalidArgument, "ncclCommInitRank: rank " + std::to_string(rank) + " of " +
                                               std::to_string(ranks) + ", but MPI's is " + std::to_string(world_rank) +
                                               " of " + std::to_string(world_ranks));
    }
    *comm = new ncclComm{.ranks = ranks, .rank = rank};
    MPI_Comm_dup(MPI_COMM_WORLD, &(*comm)->mpi);
    return ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t comm) { return comm ? ncclSuccess : ncclInvalidArgument; }
ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    if (comm == nullptr) return ncclSuccess;
    int finalized = 0;
    MPI_Finalized(&finalized);
    if (!finalized) MPI_Comm_free(&comm->mpi);
    delete comm;
    return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
    if (comm == nullptr) return ncclSuccess;
    MPI_Abort(comm->mpi, 1);
    return ncclSystemError;
}
ncclResult_t ncclCommCount(const ncclComm_t comm, int* count) {
    if (comm == nullptr || count == nullptr) return ncclInvalidArgument;
    return *count = comm->ranks, ncclSuccess;
}
ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
    if (comm == nullptr || rank == nullptr) return ncclInvalidArgument;
    return *rank = comm->rank, ncclSuccess;
}
ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int* device) {
    if (comm == nullptr || device == nullptr) return ncclInvalidArgument;
    return *device = 0, ncclSuccess;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
    if (comm == nullptr || error == nullptr) return ncclInvalidArgument;
    return *error = ncclSuccess, ncclSuccess;
}

ncclResult_t ncclGroupStart() { return group_depth++, ncclSuccess; }
ncclResult_t ncclGroupEnd() {
    if (group_depth == 0) return failed(ncclInvalidUsage, "ncclGroupEnd without ncclGroupStart");
    if (--group_depth > 0) return ncclSuccess;
    MPI_Waitall(int(group_requests.size()), group_requests.data(), MPI_STATUSES_IGNORE);
    group_requests.clear();
    return ncclSuccess;
}

// ---------------------------------------------------------------------------------------------------------------
// Collectives

ncclResult_t ncclReduceScatter(const void* send, void* receive, size_t receive_count, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t comm, cudaStream_t) {
    const ncclResult_t result = check(comm, type, op);
    if (result != ncclSuccess) return result;
    reduce_to_owners(static_cast<const char*>(send), static_cast<char*>(receive),
                     equal_parts(receive_count, comm->ranks), type, op, *comm);
    return ncclSuccess;
}

ncclResult_t ncclAllGather(const void* send, void* receive, size_t send_count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t) {
    const ncclResult_t result = check(comm, type);
    if (result != ncclSuccess) return result;
    char* own = static_cast<char*>(receive) + size_t(comm->rank) * send_count * size_of(type);
    if (own != send) memcpy(own, send, send_count * size_of(type));
    gather_parts(static_cast<char*>(receive), equal_parts(send_count, comm->ranks), size_of(type), *comm);
    return ncclSuccess;
}

ncclResult_t ncclAllReduce(const void* send, void* receive, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t) {
    const ncclResult_t result = check(comm, type, op);
    if (result != ncclSuccess) return result;
    const std::vector<Part> parts = even_parts(count, comm->ranks);
    char* to = static_cast<char*>(receive);
    reduce_to_owners(static_cast<const char*>(send), to + parts[size_t(comm->rank)].begin * size_of(type), parts, type,
                     op, *comm);
    gather_parts(to, parts, size_of(type), *comm);
    return ncclSuccess;
}

ncclResult_t ncclReduce(const void* send, void* receive, size_t count, ncclDataType_t type, ncclRedOp_t op, int root,
                        ncclComm_t comm, cudaStream_t) {
    const ncclResult_t result = check(comm, type, op, root);
    if (result != ncclSuccess) return result;
    std::vector<Part> parts(size_t(comm->ranks), Part{0, 0});
    parts[size_t(root)] = {0, count};
    reduce_to_owners(static_cast<const char*>(send), static_cast<char*>(receive), parts, type, op, *comm);
    return ncclSuccess;
}

ncclResult_t ncclBroadcast(const void* send, void* receive, size_t count, ncclDataType_t type, int root,
                           ncclComm_t comm, cudaStream_t) {
    const ncclResult_t result = check(comm, type, root);
    if (result != ncclSuccess) return result;
    const size_t bytes = count * size_of(type);
    char* data = static_cast<char*>(receive);
    if (comm->rank == root && send != receive) memcpy(data, send, bytes);
    for (size_t done = 0; done < bytes; done += piece_bytes)
        MPI_Bcast(data + done, int(std::min(piece_bytes, bytes - done)), MPI_BYTE, root, comm->mpi);
    return ncclSuccess;
}
ncclResult_t ncclBcast(void* buffer, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                       cudaStream_t stream) {
    return ncclBroadcast(buffer, buffer, count, type, root, comm, stream);
}

ncclResult_t ncclSend(const void* send, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t) {
    const ncclResult_t result = check(comm, type, peer);
    if (result != ncclSuccess) return result;
    ncclGroupStart();
    for (size_t bytes = count * size_of(type), done = 0; done < bytes; done += piece_bytes) {
        MPI_Isend(static_cast<const char*>(send) + done, int(std::min(piece_bytes, bytes - done)), MPI_BYTE, peer, 1,
                  comm->mpi, &group_requests.emplace_back());
    }
    return ncclGroupEnd();
}

ncclResult_t ncclRecv(void* receive, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t) {
    const ncclResult_t result = check(comm, type, peer);
    if (result != ncclSuccess) return result;
    ncclGroupStart();
    for (size_t bytes = count * size_of(type), done = 0; done < bytes; done += piece_bytes) {
        MPI_Irecv(static_cast<char*>(receive) + done, int(std::min(piece_bytes, bytes - done)), MPI_BYTE, peer, 1,
                  comm->mpi, &group_requests.emplace_back());
    }
    return ncclGroupEnd();
}
