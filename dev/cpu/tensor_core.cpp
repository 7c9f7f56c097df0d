#include "tensor_core.h"

#include <vector>

#include "observer.h"

namespace cpu_device {
namespace {

inline float number(uint32_t pair, int half) { return std::bit_cast<float>(half ? pair & 0xffff0000 : pair << 16); }

void multiply(const uint64_t (&operands)[32]) {
    float a[16][16], b[16][8], d[16][8];  // B as (k, columns)
    for (int lane = 0; lane < 32; lane++) {
        const Mma& own = *(const Mma*)operands[lane];
        const int g = lane / 4, p = lane % 4 * 2;
        for (int half = 0; half < 2; half++) {
            for (int i = 0; i < 4; i++) a[g + i % 2 * 8][p + i / 2 * 8 + half] = number(own.a[i], half);
            for (int i = 0; i < 2; i++) b[p + i * 8 + half][g] = number(own.b[i], half);
            for (int i = 0; i < 2; i++) d[g + i * 8][p + half] = own.d[i * 2 + half];
        }
    }
    for (int row = 0; row < 16; row++) {
        for (int k = 0; k < 16; k++) {
            for (int column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
        }
    }
    for (int lane = 0; lane < 32; lane++) {
        const Mma& own = *(const Mma*)operands[lane];
        for (int i = 0; i < 4; i++) own.d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    }
}

void load(const uint64_t (&operands)[32], bool transposed) {
    for (int i = 0; i < 4; i++) {
        uint16_t part[8][8];
        for (int row = 0; row < 8; row++) memcpy(part[row], ((const LoadMatrices*)operands[8 * i + row])->row, 16);
        for (int lane = 0; lane < 32; lane++) {
            const int g = lane / 4, p = lane % 4 * 2;
            const uint32_t low = transposed ? part[p][g] : part[g][p];
            const uint32_t high = transposed ? part[p + 1][g] : part[g][p + 1];
            ((const LoadMatrices*)operands[lane])->parts[i] = low | high << 16;
        }
    }
}

struct Copy {
    void* to;
    const void* from;  // null: zeros
    unsigned bytes;
};

// The copies of a thread that have not come, in order, and how many of them each group has; the rest have no group yet.
struct Copies {
    std::vector<Copy> waiting;
    std::vector<size_t> groups;
    size_t grouped = 0;
};
thread_local std::vector<Copies> copies;

Copies& own_copies() {
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    if (copies.size() <= thread) copies.resize(1024);
    return copies[thread];
}

}  // namespace

void run_tensor_core(Collective kind, const uint64_t (&operands)[32]) {
    if (kind == Collective::mma) multiply(operands);
    else load(operands, kind == Collective::load_transposed);
}

void start_copy(void* to, const void* from, unsigned bytes, bool valid, Where where) {
    if ((uintptr_t)to % bytes != 0 || (valid && (uintptr_t)from % bytes != 0)) [[unlikely]]
        fail_in_kernel("an asynchronous copy between addresses that are no multiples of its size", where);
    if (observer::touched) {
        if (valid) observer::touched(from, bytes, false);
        observer::touched(to, bytes, true);
    }
    memset(to, 0xff, bytes);
    own_copies().waiting.push_back({to, valid ? from : nullptr, bytes});
}

void commit_copies() {
    Copies& own = own_copies();
    own.groups.push_back(own.waiting.size() - own.grouped);
    own.grouped = own.waiting.size();
}

void wait_for_copies(unsigned pending) {
    Copies& own = own_copies();
    if (own.groups.size() <= pending) return;
    const auto done = own.groups.end() - pending;
    size_t count = 0;
    for (auto group = own.groups.begin(); group != done; ++group) count += *group;
    for (size_t i = 0; i < count; i++) {
        const Copy& copy = own.waiting[i];
        if (observer::touched) observer::touched(copy.to, copy.bytes, true);
        if (copy.from != nullptr) memcpy(copy.to, copy.from, copy.bytes);
        else memset(copy.to, 0, copy.bytes);
    }
    own.waiting.erase(own.waiting.begin(), own.waiting.begin() + (ptrdiff_t)count);
    own.groups.erase(own.groups.begin(), done);
    own.grouped -= count;
}

void forget_copies() {
    for (Copies& own : copies) own.waiting.clear(), own.groups.clear(), own.grouped = 0;
}

}  // namespace cpu_device
