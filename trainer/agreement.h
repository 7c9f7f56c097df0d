// Ranks that do the same work: each finds settings, data and checkpoints by itself, on a disk of its own perhaps, and a
// sum over ranks that found different ones is garbage, or hangs.
#pragma once

#include <mpi.h>

#include <string>

#include "trainer/basics.h"
#include "trainer/run_record.h"

// What rank `root` has. All ranks call.
inline std::string broadcast(std::string message, int root) {
    int64_t length = (int64_t)message.size();
    MPI_Bcast(&length, 1, MPI_INT64_T, root, MPI_COMM_WORLD);
    message.resize(length);
    MPI_Bcast(message.data(), narrow(length), MPI_CHAR, root, MPI_COMM_WORLD);
    return message;
}

// Throws on all ranks, in one line, what the first rank that differs has otherwise than rank 0. All ranks call.
inline void check_ranks_agree(int rank, int ranks, const json& record) {
    if (ranks == 1) return;
    const std::string own = record.dump(-1, ' ', false, json::error_handler_t::replace);
    std::string line;
    for (const Difference& d : differences(json::parse(broadcast(own, 0)), json::parse(own))) {
        if (line.empty()) line = text("rank %d is not as rank 0: ", rank);
        else line += "; ";
        line += d.name + ": " + d.before + " on rank 0, " + d.after + text(" on rank %d", rank);
    }
    int first = line.empty() ? ranks : rank;
    MPI_Allreduce(MPI_IN_PLACE, &first, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
    if (first == ranks) return;
    throw Error(broadcast(line, first) + "; start all ranks with the same program, command, data and run folder");
}
