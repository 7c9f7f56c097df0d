// Sees every load and store of the kernels in a program: what they move, and which of them race.
//
// g++ -fsanitize=thread puts a call before each load and store of a file. Here these calls end in accesses.cpp instead
// of in ThreadSanitizer, so a program links it and the CPU device, and compiles its file of kernels with the flags that
// the Makefile calls `accesses`. Blocks run one after the other, as observer.h of the CPU device says; what a kernel
// does to its own variables (the stack) and to built-in variables is left out, as a GPU keeps those in registers.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "dev/cpu/cuda_runtime.h"

namespace accesses {

enum class Watch { nothing, races, traffic };
void watch(Watch what);  // from now on; forgets what was seen before

// --- Races
//
// Two threads, the same bytes, at least one of them writing, and neither a barrier of their block nor, for lanes of a
// warp, a __syncwarp between: the order is not the program's, so the result may not be. Between blocks of one launch
// nothing orders. Atomics race with plain accesses, not with each other. As CUDA documents, a shuffle or vote orders no
// memory. Bytes are told apart in pairs.
struct Race {
    std::string kernel, text;  // the lines and what they do
    int times;
};
std::vector<Race> races();

// Names of the kernels that were launched.
const std::set<std::string>& kernels();

// --- Traffic

constexpr int sector = 32;  // bytes that memory moves at once

// What one line of source does in a launch. A warp instruction is what the lanes do at its n-th execution.
struct Line {
    bool shared = false, write = false;
    int size = 0;             // bytes of a lane
    double instructions = 0;  // of warps
    double bytes = 0;         // distinct ones, summed over instructions
    // Global memory: sectors asked for, and how few could hold the bytes. Shared memory: passes over the 32 banks, and
    // how few would do without conflicts.
    double asked = 0, needed = 0;
};

// Counts of the blocks that were run, scaled to all blocks of the launch.
struct Launch {
    std::string kernel;
    dim3 grid, block;
    size_t shared_bytes = 0;
    int64_t blocks = 0, blocks_run = 0;
    std::map<uintptr_t, Line> lines;  // by address of code
    double bytes = 0;                 // of global memory, each once: read (if it was not written before) and written
    double sectors = 0;               // the same in sectors
    // Sectors that a block touches again, by how many new ones it touched in between: [i] up to 2^i. These come from a
    // cache, unless it is too small.
    std::array<double, 40> again = {};
    double longest_chain = 0;  // loads of the warp that has most

    double asked() const { return sum(false, &Line::asked); }
    double needed() const { return sum(false, &Line::needed); }
    double shared_asked() const { return sum(true, &Line::asked); }
    double shared_needed() const { return sum(true, &Line::needed); }

  private:
    double sum(bool shared, double Line::*count) const {
        double total = 0;
        for (const auto& [code, line] : lines) total += line.shared == shared ? line.*count : 0;
        return total;
    }
};
const std::vector<Launch>& launches();

// Work that is no kernel. While traffic is watched it is noted, not done.
struct Product {
    int64_t m, n, k;
    double bytes;
};
const std::vector<Product>& products();
double filled_bytes();

// Of each launch that is watched for traffic, so many blocks are run at most, spread over the grid, and none of kernels
// with one of these words in their name.
void sample(int64_t blocks, const std::vector<std::string>& not_run = {});

// "file:line" in the kernel's own text for addresses of code, also where the access is in a function that it calls.
std::map<uintptr_t, std::string> source_lines(const std::vector<uintptr_t>& code);

}  // namespace accesses
