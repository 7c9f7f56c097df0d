// Ranks that do the same work: each finds settings, data and checkpoints by itself, on a disk of its own perhaps, and a
// sum over ranks that found different ones is garbage, or hangs.
#pragma once

#include <string>

#include "trainer/basics.h"
#include "trainer/run_record.h"
#include "trainer/world.h"

// What rank `root` has. All ranks call.
inline std::string broadcast(std::string message, int root) {
    int64_t length = (int64_t)message.size();
    broadcast_bytes(&length, sizeof(length), root);
    message.resize(length);
    broadcast_bytes(message.data(), length, root);
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
    reduce(&first, 1, MPI_MIN);
    if (first == ranks) return;
    throw Error(broadcast(line, first) + "; start all ranks with the same program, command, data and run folder");
}
