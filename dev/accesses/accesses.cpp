#include "accesses.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdio>
#include <cstring>
#include <memory>
#include <set>
#include <tuple>
#include <unordered_map>

#include "dev/cpu/observer.h"
#include "dev/cpu/symbols.h"

namespace accesses {
namespace {

Watch watched = Watch::nothing;
bool in_kernel = false;
std::string kernel_name;
std::set<std::string> kernel_names;
int64_t block_count = 0, blocks_started = 0;

// ---------------------------------------------------------------------------------------------------------------
// Where an address lies

enum class Space { global, shared, other };

struct Range {
    uintptr_t begin = 0, size = 0;
    bool holds(uintptr_t address) const { return address - begin < size; }
};

Range main_stack() {
    pthread_attr_t attributes;
    void* bottom = nullptr;
    size_t size = 0;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &size);
    pthread_attr_destroy(&attributes);
    return {(uintptr_t)bottom, size};
}

// A kernel's __shared__ variables, its dynamic shared memory among them.
std::vector<Range> shared_variables() {
    std::vector<Range> ranges;
    for (const cpu_device::ThreadLocal& variable : cpu_device::thread_locals("B6shared"))
        ranges.push_back({(uintptr_t)cpu_device::thread_storage() + variable.offset, variable.size});
    return ranges;
}

Space space_of(uintptr_t address) {
    const auto stack = cpu_device::observer::running_stack();
    if (Range{(uintptr_t)stack.bottom, stack.size}.holds(address)) return Space::other;
    static const uintptr_t storage = (uintptr_t)cpu_device::thread_storage();
    if (Range{storage, (uintptr_t)__builtin_thread_pointer() - storage}.holds(address)) {
        static const std::vector<Range> variables = shared_variables();
        for (const Range& variable : variables) {
            if (variable.holds(address)) return Space::shared;
        }
        return Space::other;  // threadIdx and its like
    }
    static const Range home = main_stack();  // where a launch's arguments are
    return home.holds(address) ? Space::other : Space::global;
}

unsigned thread_index() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }

extern "C" char __executable_start;

// ---------------------------------------------------------------------------------------------------------------
// Races

// Epochs count barriers and starts of blocks, over the whole program: an access of an earlier epoch lies before a
// barrier if its block is this one, and one before the launch's first epoch does not matter.
uint32_t epoch = 0, first_epoch_of_block = 0, first_epoch_of_launch = 0;

// Vector clocks of a warp's lanes: clock[i] counts lane i's meetings, seen[i][j] is the last clock of j before which
// everything is known to lie before what i does now.
struct Warp {
    uint32_t clock[32], seen[32][32];
};
Warp warps[32];

struct Access {
    uint32_t epoch = 0, clock = 0, code = 0;
    uint16_t thread = 0;
    bool write = false;
};

// Of two bytes: the last write, and reads that a later write must be ordered after. Of the threads that have read
// since, the latest; and one each from another lane, warp and block where there was one. Atomics are kept like reads.
struct Readers {
    Access latest, other_lane, other_warp, other_block;

    void add(const Access& access) {
        if (latest.epoch < first_epoch_of_launch) *this = {};
        else if (latest.epoch < first_epoch_of_block) other_block = latest;
        else if (latest.thread / 32 != access.thread / 32) other_warp = latest;
        else if (latest.thread != access.thread) other_lane = latest;
        latest = access;
    }
};
struct Cell {
    Access writer;
    Readers readers;
    bool atomics = false;
};

constexpr int cell_bytes = 2, page_bits = 12;
struct Page {
    Cell cells[(1 << page_bits) / cell_bytes];
};
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t last_number = 0;
Page* last_page = nullptr;
std::unordered_map<uintptr_t, Readers> atomics;
std::map<std::tuple<std::string, uint32_t, uint32_t, std::string>, int> found_races;

Cell& cell_at(uintptr_t address) {
    const uintptr_t number = address >> page_bits;
    if (!last_page || number != last_number) {
        std::unique_ptr<Page>& page = pages[number];
        if (!page) page = std::make_unique<Page>();
        last_number = number, last_page = page.get();
    }
    return last_page->cells[(address & ((1 << page_bits) - 1)) / cell_bytes];
}

bool ordered(const Access& before, const Access& now, bool shared) {
    if (before.epoch < first_epoch_of_launch) return true;
    if (before.epoch < first_epoch_of_block) return shared;
    if (before.epoch != now.epoch || before.thread == now.thread) return true;
    if (before.thread / 32 != now.thread / 32) return false;
    return warps[now.thread / 32].seen[now.thread % 32][before.thread % 32] > before.clock;
}

void check(const Access& before, const char* did, const Access& now, const char* does, bool shared) {
    if (ordered(before, now, shared)) return;
    const char* who = before.epoch < first_epoch_of_block     ? "another block"
                      : before.thread / 32 != now.thread / 32 ? "another warp of the block"
                                                              : "another lane of the warp";
    const std::string text =
        std::string(does) + " in " + (shared ? "shared" : "global") + " memory, " + did + " by " + who;
    found_races[{kernel_name, before.code, now.code, text}]++;
}

void check_races(uintptr_t address, int size, bool write, bool atomic, bool shared, uintptr_t code) {
    const unsigned thread = thread_index();
    const Access now = {epoch, warps[thread / 32].clock[thread % 32], uint32_t(code - (uintptr_t)&__executable_start),
                        uint16_t(thread), write};
    const char* does = atomic ? "atomic" : write ? "write" : "read";
    const auto check_all = [&](const Readers& earlier, const char* did) {
        for (const Access* access : {&earlier.latest, &earlier.other_lane, &earlier.other_warp, &earlier.other_block})
            check(*access, did, now, does, shared);
    };
    for (uintptr_t at = address / cell_bytes; at <= (address + size - 1) / cell_bytes; at++) {
        Cell& cell = cell_at(at * cell_bytes);
        check(cell.writer, "write", now, does, shared);
        if (write) check_all(cell.readers, "read");
        if (cell.atomics && !atomic) check_all(atomics[at], "atomic");
        if (atomic) cell.atomics = true, atomics[at].add(now);
        else if (write) cell.writer = now;
        else cell.readers.add(now);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Traffic

std::vector<Launch> seen_launches;
std::vector<Product> seen_products;
double bytes_filled = 0;
int64_t sampled_blocks = INT64_MAX;
std::vector<std::string> kernels_not_run;

// The n-th execution of an instruction by a warp.
struct Instruction {
    uint64_t order = 0;  // how many accesses its first lane has made before: lanes run one after the other here
    uintptr_t code = 0;
    uintptr_t address[32];
    uint32_t lanes = 0, size = 0;
    bool write = false, shared = false;
};
struct Site {
    uint32_t count[32] = {};  // executions by each lane
    std::vector<Instruction> instructions;
};
std::unordered_map<uint64_t, Site> sites;  // of this block since its last barrier; by code and warp
uint64_t accesses_of[1024];                // by thread of this block
double loads_of[32];                       // by warp of this block

// Of the launch: which bytes of a sector were read and written, and by how many blocks (2: more than one).
struct Sector {
    uint32_t read = 0, written = 0;
    int64_t last_block = -1, last_new = 0;
    int blocks = 0;
};
std::unordered_map<uintptr_t, Sector> sectors;
int64_t new_in_block = 0;  // sectors this block has touched

void count_access(uintptr_t address, int size, bool write, bool shared, uintptr_t code) {
    const unsigned thread = thread_index(), lane = thread % 32;
    Site& site = sites[(uint64_t)code << 6 | thread / 32];
    const uint32_t n = site.count[lane]++;
    if (site.instructions.size() <= n) site.instructions.resize(n + 1);
    Instruction& i = site.instructions[n];
    if (!i.lanes) i.order = accesses_of[thread], i.code = code, i.size = size, i.write = write, i.shared = shared;
    i.address[lane] = address;
    i.lanes |= 1u << lane;
    accesses_of[thread]++;
}

// Passes over the banks, each 4 bytes wide: all lanes at once, half warps of 8-byte or quarters of 16-byte accesses.
void count_banks(const Instruction& i, Line& line) {
    const int lanes = i.size <= 4 ? 32 : i.size <= 8 ? 16 : 8;
    for (int first = 0; first < 32; first += lanes) {
        std::vector<uintptr_t> words;
        for (int lane = first; lane < first + lanes; lane++) {
            if (!(i.lanes >> lane & 1)) continue;
            for (uintptr_t w = i.address[lane] / 4; w <= (i.address[lane] + i.size - 1) / 4; w++) words.push_back(w);
        }
        if (words.empty()) continue;
        std::sort(words.begin(), words.end());
        words.erase(std::unique(words.begin(), words.end()), words.end());
        int in_bank[32] = {};
        for (const uintptr_t w : words) in_bank[w % 32]++;
        line.asked += *std::max_element(in_bank, in_bank + 32), line.needed++;
    }
}

void touch(uintptr_t number, uint32_t bytes, bool write, Launch& launch) {
    Sector& s = sectors[number];
    const bool again = s.last_block == blocks_started;
    if (again) {
        const uint64_t distance = uint64_t(new_in_block - s.last_new);
        launch.again[std::bit_width(distance)] += 1;
    } else {
        s.blocks = std::min(2, s.blocks + 1);
        s.last_block = blocks_started;
        new_in_block++;
    }
    s.last_new = new_in_block;
    if (write) s.written |= bytes;
    else s.read |= bytes & ~s.written;
}

void count_sectors(const Instruction& i, Line& line, Launch& launch) {
    std::vector<std::pair<uintptr_t, uint32_t>> asked;  // sectors, and which of their bytes
    for (uint32_t lanes = i.lanes; lanes; lanes &= lanes - 1) {
        const uintptr_t begin = i.address[std::countr_zero(lanes)], end = begin + i.size;
        for (uintptr_t number = begin / sector; number * sector < end; number++) {
            const uintptr_t from = std::max(begin, number * sector), to = std::min(end, (number + 1) * sector);
            const auto mask = uint32_t(((uint64_t(1) << (to - from)) - 1) << from % sector);
            const auto same = std::find_if(asked.rbegin(), asked.rend(), [&](auto& s) { return s.first == number; });
            if (same == asked.rend()) asked.push_back({number, mask});
            else same->second |= mask;
        }
    }
    int bytes = 0;
    for (const auto& [number, mask] : asked) bytes += std::popcount(mask), touch(number, mask, i.write, launch);
    line.bytes += bytes, line.asked += (double)asked.size(), line.needed += (bytes + sector - 1) / sector;
}

// Of one interval between barriers: the warps' instructions, in an order in which warps take turns.
void count_instructions(Launch& launch) {
    std::vector<std::pair<const Instruction*, unsigned>> all;
    for (const auto& [key, site] : sites) {
        for (const Instruction& i : site.instructions) all.push_back({&i, key & 63});
    }
    std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) {
        return std::tuple(a.first->order, a.second, a.first->code) <
               std::tuple(b.first->order, b.second, b.first->code);
    });
    for (const auto& [i, warp] : all) {
        Line& line = launch.lines[i->code];
        line.shared = i->shared, line.write = i->write, line.size = (int)i->size;
        line.instructions++;
        if (i->shared) count_banks(*i, line);
        else count_sectors(*i, line, launch), loads_of[warp] += !i->write;
    }
    sites.clear();
}

void end_block() {
    if (watched != Watch::traffic) return;
    Launch& launch = seen_launches.back();
    count_instructions(launch);
    launch.blocks_run++;
    launch.longest_chain = std::max(launch.longest_chain, *std::max_element(loads_of, loads_of + 32));
    memset(loads_of, 0, sizeof loads_of);
    memset(accesses_of, 0, sizeof accesses_of);
    new_in_block = 0;
}

// From the blocks that were run to all. What several of them touched is taken to be one operand of all blocks.
void end_launch() {
    if (watched != Watch::traffic) return;
    Launch& launch = seen_launches.back();
    if (launch.blocks_run == 0) return;
    const double scale = (double)launch.blocks / (double)launch.blocks_run;
    for (auto& [code, line] : launch.lines) {
        for (double* count : {&line.instructions, &line.bytes, &line.asked, &line.needed}) *count *= scale;
    }
    for (double& count : launch.again) count *= scale;
    for (const auto& [number, s] : sectors) {
        const double times = s.blocks > 1 ? 1 : scale;
        launch.bytes += times * (std::popcount(s.read) + std::popcount(s.written));
        launch.sectors += times * ((s.read != 0) + (s.written != 0));
    }
    sectors.clear();
}

void access(void* pointer, size_t size, bool write, bool atomic, uintptr_t code) {
    if (!in_kernel || size == 0) return;
    const uintptr_t address = (uintptr_t)pointer;
    const Space space = space_of(address);
    if (space == Space::other) return;
    const bool shared = space == Space::shared;
    if (watched == Watch::races) check_races(address, (int)size, write, atomic, shared, code);
    else count_access(address, (int)size, write, shared, code);
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------
// What others ask

void watch(Watch what) {
    watched = what;
    found_races.clear(), pages.clear(), atomics.clear();
    last_page = nullptr;
    seen_launches.clear(), seen_products.clear(), kernel_names.clear();
    bytes_filled = 0;
}

void sample(int64_t blocks, const std::vector<std::string>& not_run) {
    sampled_blocks = blocks;
    kernels_not_run = not_run;
}

const std::set<std::string>& kernels() { return kernel_names; }
const std::vector<Launch>& launches() { return seen_launches; }
const std::vector<Product>& products() { return seen_products; }
double filled_bytes() { return bytes_filled; }

std::vector<Race> races() {
    std::vector<uintptr_t> code;
    const auto base = (uintptr_t)&__executable_start;
    for (const auto& [race, times] : found_races)
        code.push_back(base + std::get<1>(race)), code.push_back(base + std::get<2>(race));
    const std::map<uintptr_t, std::string> lines = source_lines(code);
    std::vector<Race> result;
    for (const auto& [race, times] : found_races) {
        const auto& [kernel, before, now, text] = race;
        result.push_back({kernel, lines.at(base + now) + " " + text + " at " + lines.at(base + before), times});
    }
    return result;
}

// addr2line names the functions that were inlined at an address from the inside out; the last is the kernel.
std::map<uintptr_t, std::string> source_lines(const std::vector<uintptr_t>& code) {
    std::map<uintptr_t, std::string> lines;
    if (code.empty()) return lines;
    char path[4096] = {};
    if (readlink("/proc/self/exe", path, sizeof path - 1) < 0) return lines;
    std::string command = std::string("addr2line -a -i -e '") + path + "'";
    for (const uintptr_t address : code) {
        char text[32];
        lines[address] = "?";
        snprintf(text, sizeof text, " %lx", address - 1 - (uintptr_t)&__executable_start);  // inside of the call
        command += text;
    }
    FILE* pipe = popen(command.c_str(), "r");
    if (!pipe) return lines;
    char text[4096];
    uintptr_t address = 0;
    while (fgets(text, sizeof text, pipe)) {
        std::string line = text;
        line = line.substr(0, line.find_first_of(" \n"));
        if (line.starts_with("0x")) address = strtoull(text, nullptr, 16) + 1 + (uintptr_t)&__executable_start;
        else if (line.find("cuda_runtime.h") == std::string::npos && line.find("/c++/") == std::string::npos)
            lines[address] = line.substr(line.rfind('/') + 1);
    }
    pclose(pipe);
    return lines;
}

}  // namespace accesses

// ---------------------------------------------------------------------------------------------------------------
// What the CPU device tells

namespace cpu_device::observer {
using namespace accesses;

void begin_launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
    static std::map<const void*, std::string> names;
    std::string& name = names[kernel];
    if (name.empty()) name = function_name(kernel);
    kernel_name = name;
    kernel_names.insert(name);
    blocks_started = 0;
    block_count = (int64_t)grid.x * grid.y * grid.z;
    first_epoch_of_launch = epoch + 1;
    if (watched != Watch::traffic) return;
    Launch& launch = seen_launches.emplace_back();
    launch.kernel = name, launch.grid = grid, launch.block = block;
    launch.shared_bytes = shared_bytes, launch.blocks = block_count;
    for (const std::string& word : kernels_not_run) {
        if (name.find(word) != std::string::npos) block_count = 0;
    }
}

int64_t next_block() {
    if (in_kernel) end_block();
    const bool all = watched != Watch::traffic || block_count <= sampled_blocks;
    in_kernel = blocks_started < (all ? block_count : sampled_blocks);
    if (!in_kernel) {
        end_launch();
        return -1;
    }
    first_epoch_of_block = ++epoch;
    for (Warp& warp : warps) {
        std::fill_n(warp.clock, 32, 1);
        memset(warp.seen, 0, sizeof warp.seen);
    }
    const int64_t i = blocks_started++;
    // The middle of each of equal parts of the grid.
    return all ? i : (int64_t)((2 * i + 1) * (__int128)block_count / (2 * sampled_blocks));
}

void block_met() {
    if (!in_kernel) return;
    epoch++;
    if (watched == Watch::traffic) count_instructions(seen_launches.back());
}

// What any of them knows, all know; and what each has done so far.
void lanes_met(unsigned number, unsigned lanes) {
    Warp& warp = warps[number];
    uint32_t known[32] = {};
    for (unsigned rest = lanes; rest; rest &= rest - 1) {
        const int lane = std::countr_zero(rest);
        for (int j = 0; j < 32; j++) known[j] = std::max(known[j], warp.seen[lane][j]);
    }
    for (unsigned rest = lanes; rest; rest &= rest - 1) {
        const int lane = std::countr_zero(rest);
        known[lane] = ++warp.clock[lane];
    }
    for (unsigned rest = lanes; rest; rest &= rest - 1) memcpy(warp.seen[std::countr_zero(rest)], known, sizeof known);
}

void touched(const void* address, size_t size, bool write) {
    accesses::access(const_cast<void*>(address), size, write, false, (uintptr_t)__builtin_return_address(0));
}

bool product(int64_t m, int64_t n, int64_t k, double bytes) {
    if (watched != Watch::traffic) return false;
    seen_products.push_back({m, n, k, bytes});
    return true;
}

bool fill(size_t bytes) {
    if (watched != Watch::traffic) return false;
    bytes_filled += (double)bytes;
    return true;
}

}  // namespace cpu_device::observer

// ---------------------------------------------------------------------------------------------------------------
// What g++ calls

#define CODE ((uintptr_t)__builtin_return_address(0))
#define ACCESS(kind, n)                                                                              \
    void __tsan_##kind##read##n(void* address) { accesses::access(address, n, false, false, CODE); } \
    void __tsan_##kind##write##n(void* address) { accesses::access(address, n, true, false, CODE); }
#define ACCESSES(n) ACCESS(, n) ACCESS(unaligned_, n) ACCESS(volatile_, n) ACCESS(unaligned_volatile_, n)

// Atomics are done here, each as a read and a write at once. `Old` is what they return.
#define UPDATE(bits, type, name, call)                                  \
    type __tsan_atomic##bits##_##name(type* address, type value, int) { \
        accesses::access(address, sizeof(type), true, true, CODE);      \
        return call(address, value, __ATOMIC_SEQ_CST);                  \
    }
#define COMPARE(bits, type, strength, weak)                                                                       \
    bool __tsan_atomic##bits##_compare_exchange_##strength(type* address, type* expected, type value, int, int) { \
        accesses::access(address, sizeof(type), true, true, CODE);                                                \
        return __atomic_compare_exchange_n(address, expected, value, weak, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);   \
    }
#define ATOMICS(bits, type)                                                            \
    type __tsan_atomic##bits##_load(const type* address, int) {                        \
        accesses::access(const_cast<type*>(address), sizeof(type), false, true, CODE); \
        return __atomic_load_n(address, __ATOMIC_SEQ_CST);                             \
    }                                                                                  \
    void __tsan_atomic##bits##_store(type* address, type value, int) {                 \
        accesses::access(address, sizeof(type), true, true, CODE);                     \
        __atomic_store_n(address, value, __ATOMIC_SEQ_CST);                            \
    }                                                                                  \
    UPDATE(bits, type, exchange, __atomic_exchange_n)                                  \
    UPDATE(bits, type, fetch_add, __atomic_fetch_add)                                  \
    UPDATE(bits, type, fetch_sub, __atomic_fetch_sub)                                  \
    UPDATE(bits, type, fetch_and, __atomic_fetch_and)                                  \
    UPDATE(bits, type, fetch_or, __atomic_fetch_or)                                    \
    UPDATE(bits, type, fetch_xor, __atomic_fetch_xor)                                  \
    COMPARE(bits, type, strong, false)                                                 \
    COMPARE(bits, type, weak, true)

extern "C" {
ACCESSES(1) ACCESSES(2) ACCESSES(4) ACCESSES(8) ACCESSES(16) void __tsan_read_range(void* address, size_t size) {
    accesses::access(address, size, false, false, CODE);
}
void __tsan_write_range(void* address, size_t size) { accesses::access(address, size, true, false, CODE); }
ATOMICS(8, uint8_t)
ATOMICS(16, uint16_t) ATOMICS(32, uint32_t) ATOMICS(64, uint64_t) void __tsan_atomic_thread_fence(int) {}
void __tsan_atomic_signal_fence(int) {}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
