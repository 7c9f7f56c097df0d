// How kernels run on the CPU.
//
// The blocks of a grid are shared out over OpenMP threads. The threads of one block are run by fibers of one OS
// thread, one at a time. A fiber is a worker: it takes the first CUDA thread that has not started, calls the kernel
// for it, takes the next. Only when a CUDA thread must wait, at a barrier or for the other lanes of its warp, does
// another fiber go on with the threads that can. So a kernel that never waits is a plain loop on one fiber.
//
// Threads take turns in a fixed order (set_order): of all that can run, the first in that order does. Between two
// barriers this runs the whole block in that order, and between two collectives of a warp, the warp; results that
// differ between orders show a missing barrier.
#include <omp.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "inline_launch.h"
#include "observer.h"
#include "runtime.h"
#include "symbols.h"
#include "tensor_core.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
constexpr bool address_sanitizer = true;
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
constexpr bool address_sanitizer = false;
static void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

#if __has_include(<valgrind/valgrind.h>)
#include <valgrind/valgrind.h>
#else
#define VALGRIND_STACK_REGISTER(begin, end) ((void)(begin), (void)(end))
#endif

#ifdef CPU_DEVICE_DEBUG
constexpr bool debug = true;
#else
constexpr bool debug = false;
#endif

constinit thread_local uint3 threadIdx = {0, 0, 0}, blockIdx = {0, 0, 0};
constinit thread_local dim3 blockDim, gridDim;
alignas(256) __shared__ float dynamic_shared[dynamic_shared_limit / sizeof(float)] = {};

namespace cpu_device {
namespace {

constexpr unsigned max_threads = 1024, no_thread = max_threads;
constexpr size_t default_shared_limit = 48 * 1024;

const char* name(Barrier kind) {
    constexpr const char* names[] = {"__syncthreads", "__syncthreads_or", "__syncthreads_and", "__syncthreads_count"};
    return names[int(kind)];
}
const char* name(Collective kind) {
    constexpr const char* names[] = {"__syncwarp",
                                     "__shfl_sync",
                                     "__shfl_up_sync",
                                     "__shfl_down_sync",
                                     "__shfl_xor_sync",
                                     "__ballot_sync",
                                     "__any_sync",
                                     "__all_sync",
                                     "__reduce_add_sync",
                                     "__reduce_min_sync",
                                     "__reduce_max_sync",
                                     "__reduce_min_sync",
                                     "__reduce_max_sync",
                                     "__reduce_and_sync",
                                     "__reduce_or_sync",
                                     "__reduce_xor_sync",
                                     "load_matrices",
                                     "load_transposed",
                                     "mma"};
    return names[int(kind)];
}

// ---------------------------------------------------------------------------------------------------------------
// Order

struct Order {
    enum { forward, reverse, shuffle } kind = forward;
    uint64_t seed = 0;
    bool operator==(const Order&) const = default;
};

uint64_t mix(uint64_t x) {  // a bijection whose output looks random (SplitMix64's)
    x += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

bool parse(const char* text, Order& order) {
    const std::string value = text;
    if (value == "forward") return order = {Order::forward}, true;
    if (value == "reverse") return order = {Order::reverse}, true;
    const std::string prefix = "shuffle:";
    if (!value.starts_with(prefix) || value.size() == prefix.size()) return false;
    char* end = nullptr;
    const uint64_t seed = strtoull(text + prefix.size(), &end, 10);
    if (*end != 0) return false;
    return order = {Order::shuffle, seed}, true;
}

Order& current_order() {
    static Order order = [] {
        Order initial;
        const char* text = getenv("CPU_DEVICE_ORDER");
        if (text != nullptr && !parse(text, initial)) {
            fprintf(stderr, "cpu_device: CPU_DEVICE_ORDER is \"%s\"; it must be forward, reverse or shuffle:SEED\n",
                    text);
            std::_Exit(1);
        }
        return initial;
    }();
    return order;
}

// The i-th of n blocks to start.
uint64_t block_at(const Order& order, uint64_t i, uint64_t n) {
    if (order.kind == Order::forward) return i;
    if (order.kind == Order::reverse) return n - 1 - i;
    uint64_t step = mix(order.seed) % n | 1;  // i * step + start visits all blocks once if step and n share no factor
    while (std::gcd(step, n) != 1) step += 2;
    return uint64_t(((unsigned __int128)i * step + mix(order.seed + 1)) % n);
}

uint3 coordinates(uint64_t i, dim3 size) {
    return {unsigned(i % size.x), unsigned(i / size.x % size.y), unsigned(i / size.x / size.y)};
}

// ---------------------------------------------------------------------------------------------------------------
// Fibers

struct Fiber {
    void* stopped_at = nullptr;    // its stack pointer, while it does not run
    const void* bottom = nullptr;  // its stack, for AddressSanitizer
    size_t size = 0;
    void* fake_stack = nullptr;
    Fiber* came_from = nullptr;  // the fiber that switched to this one last
};

size_t stack_size() {
    static const size_t size = [] {
        const char* text = getenv("CPU_DEVICE_STACK_KB");
        const size_t kilobytes = text != nullptr ? strtoull(text, nullptr, 10) : address_sanitizer ? 512 : 128;
        return std::max<size_t>(kilobytes, 16) * 1024 / 4096 * 4096;
    }();
    return size;
}

// A stack with an inaccessible page below it, so that an overflow is a segmentation fault. Each such page splits the
// address space once more and Linux allows 65,530 pieces, so machines with very many cores do without on the rest.
char* allocate_stack() {
    constexpr size_t guard = 4096;
    static std::atomic<int> guards = 0;
    void* memory = mmap(nullptr, guard + stack_size(), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED) {
        fprintf(stderr, "cpu_device: no memory for a fiber's stack of %zu KB; lower CPU_DEVICE_STACK_KB\n",
                stack_size() / 1024);
        std::_Exit(1);
    }
    if (guards.fetch_add(1, std::memory_order_relaxed) < 16384) mprotect(memory, guard, PROT_NONE);
    char* stack = static_cast<char*>(memory) + guard;
    (void)VALGRIND_STACK_REGISTER(stack, stack + stack_size());
    return stack;
}

// ---------------------------------------------------------------------------------------------------------------
// Blocks

struct Launch {
    const void* kernel;
    void (*thread)(void*);
    void* arguments;
    dim3 grid, block;
    size_t shared_bytes;
    Order order;
};

struct Thread {
    uint3 index = {0, 0, 0};
    unsigned position = 0;   // in the order
    Fiber* fiber = nullptr;  // where it runs, from its start to its end
    // What it waits in, or waited in last: this barrier, or else its warp's collective.
    bool in_barrier = false;
    Barrier barrier = {};
    Where where;
};

// A warp, and for each lane the collective it is in. As arrays, so that g++ handles all lanes at once.
struct Warp {
    unsigned exited = 0;     // lanes that have ended, or never existed
    unsigned waiting = 0;    // lanes inside a collective
    uint64_t call[32] = {};  // which one: its kind and mask
    uint64_t value[32] = {}, result[32] = {};
    uint32_t source[32] = {};
};

constexpr uint64_t call_of(Collective kind, unsigned mask) { return uint64_t(kind) << 32 | mask; }
constexpr Collective kind_of(uint64_t call) { return Collective(call >> 32); }
constexpr unsigned mask_of(uint64_t call) { return unsigned(call); }

// The block that an OS thread runs. The object lives on for the next blocks, since it owns the fibers.
struct Block {
    const Launch* launch = nullptr;
    unsigned size = 0, live = 0, running = no_thread;
    Thread threads[max_threads];
    Warp warps[max_threads / 32];

    uint16_t thread_at[max_threads];  // position in the order -> thread
    // Threads start in the order. So of those that can run, the ones that have waited (awake) come before those that
    // have not started.
    unsigned started = 0;
    uint64_t awake[max_threads / 64] = {};  // one bit a position
    unsigned first_awake = 0;               // words below this one are 0; 16 when all are
    dim3 prepared_size = dim3(0, 0, 0);
    Order prepared_order;

    unsigned arrived = 0;  // at the barrier, where the first to come was:
    unsigned first_arrived = no_thread;
    int votes = 0, barrier_result = 0;

    Fiber home;  // the OS thread's own stack
    Fiber* current = &home;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Fiber*> idle;

    void run(const Launch& launch, uint64_t index);
    void prepare_threads(uint64_t block_index);

    unsigned take_next();
    void wake(unsigned warp, unsigned lanes);
    void suspend();
    void work();
    void switch_to(Fiber& fiber);
    void finish_switch();
    Fiber& idle_fiber();
    void exit_thread();

    int wait_for_block(Barrier kind, int predicate, Where where);
    void open_barrier();
    uint64_t wait_for_warp(Collective kind, unsigned mask, uint64_t value, unsigned source, Where where);
    void complete_if_all_wait(unsigned warp, uint64_t call);
    void exchange(unsigned warp, unsigned taking_part);

    [[noreturn]] void deadlock();
    [[noreturn, gnu::format(printf, 3, 4)]] void fail(const Thread& thread, const char* format, ...);

    ~Block() {
        for (const auto& fiber : fibers) munmap(const_cast<void*>(fiber->bottom), fiber->size);
    }
};

struct SharedMemory {
    size_t poisoned_from = sizeof dynamic_shared;
    ~SharedMemory() { ASAN_UNPOISON_MEMORY_REGION(dynamic_shared, sizeof dynamic_shared); }
};
thread_local SharedMemory shared_memory;

thread_local std::unique_ptr<Block> own_block;
constinit thread_local Block* block = nullptr;

std::string text(uint3 i) {
    char buffer[48];
    snprintf(buffer, sizeof buffer, "(%u,%u,%u)", i.x, i.y, i.z);
    return buffer;
}
std::string text(dim3 i) { return text(uint3{i.x, i.y, i.z}); }
std::string text(Where where) {
    const std::string file = where.file_name();
    return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

// Ends the program. Of several OS threads that fail at once, one gets to speak.
void Block::fail(const Thread& thread, const char* format, ...) {
    static std::mutex mutex;
    mutex.lock();
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr,
            "cpu_device: kernel %s<<<%s, %s, %zu>>>, block %s, thread %s: ", function_name(launch->kernel).c_str(),
            text(launch->grid).c_str(), text(launch->block).c_str(), launch->shared_bytes, text(blockIdx).c_str(),
            text(thread.index).c_str());
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    fflush(nullptr);
    std::_Exit(1);
}

// --- Fibers of the block

inline void Block::switch_to(Fiber& fiber) {
    Fiber& self = *current;
    fiber.came_from = &self;
    current = &fiber;
    __sanitizer_start_switch_fiber(&self.fake_stack, fiber.bottom, fiber.size);
    switch_stack(&self.stopped_at, fiber.stopped_at);
    finish_switch();
}

// The first thing done on a fiber that was switched to. AddressSanitizer tells where the previous stack lies; of the
// OS thread's own that is the only way to know.
inline void Block::finish_switch() {
    Fiber& previous = *current->came_from;
    __sanitizer_finish_switch_fiber(current->fake_stack, &previous.bottom, &previous.size);
}

Fiber& Block::idle_fiber() {
    if (idle.empty()) {
        Fiber& fiber = *fibers.emplace_back(new Fiber);
        fiber.bottom = allocate_stack();
        fiber.size = stack_size();
        // If all stacks began at the same place of a page, their warm ends would fight for the same cache lines.
        const size_t stagger = fibers.size() * 320 % 4096;
        char* top = static_cast<char*>(const_cast<void*>(fiber.bottom)) + fiber.size - stagger;
        fiber.stopped_at = new_stack(top, fiber.size - stagger, [] {
            block->finish_switch();
            block->work();
        });
        idle.push_back(&fiber);
    }
    Fiber& fiber = *idle.back();
    idle.pop_back();
    return fiber;
}

// What a fiber does, for ever: run threads from their start; when the next thread is one that waits on another
// fiber, or the block is done, leave the OS thread to that.
void Block::work() {
    for (;;) {
        do {
            threads[running].fiber = current;
            launch->thread(launch->arguments);
            exit_thread();
            running = take_next();
            if (running == no_thread) break;
            threadIdx = threads[running].index;
        } while (threads[running].fiber == nullptr);

        if (running == no_thread && live > 0) deadlock();
        idle.push_back(current);
        switch_to(running == no_thread ? home : *threads[running].fiber);
    }
}

// Let others run until this thread is runnable again.
void Block::suspend() {
    const unsigned self = running, next = take_next();
    if (next == self) return;
    if (next == no_thread) deadlock();
    running = next;
    threadIdx = threads[next].index;
    Fiber* fiber = threads[next].fiber;
    switch_to(fiber != nullptr ? *fiber : idle_fiber());
}

// The runnable thread that comes first in the order, or no_thread.
inline unsigned Block::take_next() {
    for (; first_awake < max_threads / 64; first_awake++) {
        uint64_t& word = awake[first_awake];
        if (word == 0) continue;
        const unsigned position = first_awake * 64 + unsigned(std::countr_zero(word));
        word &= word - 1;
        return thread_at[position];
    }
    return started < size ? thread_at[started++] : no_thread;
}

inline void Block::wake(unsigned warp, unsigned lanes) {
    if (prepared_order.kind == Order::forward) {  // position and index are the same
        awake[warp / 2] |= uint64_t(lanes) << warp % 2 * 32;
        first_awake = std::min(first_awake, warp / 2);
        return;
    }
    for (; lanes != 0; lanes &= lanes - 1) {
        const unsigned position = threads[warp * 32 + unsigned(std::countr_zero(lanes))].position;
        awake[position / 64] |= uint64_t(1) << position % 64;
        first_awake = std::min(first_awake, position / 64);
    }
}

// CUDA does not count threads that have exited, so this exit may be what others wait for.
inline void Block::exit_thread() {
    Warp& warp = warps[running / 32];
    threads[running].fiber = nullptr;
    warp.exited |= 1u << running % 32;
    live--;
    for (unsigned lanes = warp.waiting; lanes != 0; lanes &= lanes - 1) {
        const unsigned lane = unsigned(std::countr_zero(lanes));
        if (warp.waiting >> lane & 1) complete_if_all_wait(running / 32, warp.call[lane]);
    }
    if (arrived > 0 && arrived == live) open_barrier();
}

// --- Barriers

int Block::wait_for_block(Barrier kind, int predicate, Where where) {
    Thread& self = threads[running];
    self.in_barrier = true;
    self.barrier = kind;
    self.where = where;
    if (arrived++ == 0) {
        first_arrived = running;
        votes = 0;
    } else {
        const Thread& first = threads[first_arrived];
        if (first.barrier != kind || first.where.line() != where.line()) {
            fail(self, "%s at %s, but thread %s of the block is in %s at %s: all threads must reach the same barrier",
                 name(kind), text(where).c_str(), text(first.index).c_str(), name(first.barrier),
                 text(first.where).c_str());
        }
    }
    votes += predicate != 0;
    if (arrived == live) open_barrier();
    suspend();
    return barrier_result;
}

void Block::open_barrier() {
    const Barrier kind = threads[first_arrived].barrier;
    // Threads that have exited count for none of the three.
    barrier_result = kind == Barrier::sync_or    ? votes > 0
                     : kind == Barrier::sync_and ? unsigned(votes) == arrived
                                                 : votes;
    arrived = 0;
    if (observer::block_met) observer::block_met();
    for (unsigned warp = 0; warp < (size + 31) / 32; warp++) wake(warp, ~warps[warp].exited);
}

// --- Collectives of a warp

uint64_t Block::wait_for_warp(Collective kind, unsigned mask, uint64_t value, unsigned source, Where where) {
    const unsigned lane = running % 32;
    Thread& self = threads[running];
    Warp& warp = warps[running / 32];
    self.in_barrier = false;
    self.where = where;
    if ((mask >> lane & 1) == 0) [[unlikely]] {
        fail(self, "%s at %s with mask %#x, which does not name the calling lane %u", name(kind), text(where).c_str(),
             mask, lane);
    }
    warp.call[lane] = call_of(kind, mask);
    warp.value[lane] = value;
    warp.source[lane] = source;
    warp.waiting |= 1u << lane;
    if ((mask & ~warp.exited & ~warp.waiting) == 0) complete_if_all_wait(running / 32, call_of(kind, mask));
    suspend();
    return warp.result[lane];
}

// Lanes meet when all of the mask that have not exited wait with that very mask. One that waits with another mask may
// still come: its own group may complete first.
void Block::complete_if_all_wait(unsigned warp_index, uint64_t call) {
    Warp& warp = warps[warp_index];
    const unsigned mask = mask_of(call), taking_part = mask & ~warp.exited;
    if ((taking_part & ~warp.waiting) != 0) return;
    unsigned other_call = 0;
    for (unsigned i = 0; i < 32; i++) other_call |= unsigned(warp.call[i] != call) << i;
    other_call &= taking_part;
    if (other_call != 0) [[unlikely]] {
        for (unsigned lanes = other_call; lanes != 0; lanes &= lanes - 1) {
            if (mask_of(warp.call[std::countr_zero(lanes)]) != mask) return;
        }
        const unsigned one = unsigned(std::countr_zero(other_call)),
                       two = unsigned(std::countr_zero(taking_part & ~other_call));
        const Thread &a = threads[warp_index * 32 + one], &b = threads[warp_index * 32 + two];
        fail(a, "%s at %s meets %s at %s (thread %s) with the same mask %#x", name(kind_of(warp.call[one])),
             text(a.where).c_str(), name(kind_of(call)), text(b.where).c_str(), text(b.index).c_str(), mask);
    }
    exchange(warp_index, taking_part);
    warp.waiting &= ~taking_part;
    wake(warp_index, taking_part);
}

uint64_t combine(Collective kind, uint64_t a, uint64_t b) {
    using enum Collective;
    switch (kind) {
        case add: return uint32_t(a + b);
        case min_signed: return uint32_t(std::min(int32_t(a), int32_t(b)));
        case max_signed: return uint32_t(std::max(int32_t(a), int32_t(b)));
        case min_unsigned: return std::min(a, b);
        case max_unsigned: return std::max(a, b);
        case all:
        case bit_and: return a & b;
        case any:
        case ballot:
        case bit_or: return a | b;
        case bit_xor: return a ^ b;
        default: return 0;
    }
}

// Sets the result of every lane that takes part, and of no other: one may not have fetched its last result yet.
void Block::exchange(unsigned warp_index, unsigned taking_part) {
    Warp& warp = warps[warp_index];
    const unsigned first = unsigned(std::countr_zero(taking_part)) % 32;  // there is one
    const Collective kind = kind_of(warp.call[first]);
    if (kind == Collective::sync) {
        if (observer::lanes_met) observer::lanes_met(warp_index, taking_part);
        return;
    }
    if (kind >= Collective::load_matrices) {
        if (taking_part != ~0u) [[unlikely]] {
            const Thread& thread = threads[warp_index * 32 + first];
            fail(thread, "%s at %s without all lanes of the warp (lanes here %#x): undefined", name(kind),
                 text(thread.where).c_str(), taking_part);
        }
        return run_tensor_core(kind, warp.value);
    }
    if (kind >= Collective::shuffle && kind <= Collective::shuffle_xor) {
        unsigned absent = 0;
        for (unsigned i = 0; i < 32; i++) absent |= (~taking_part >> (warp.source[i] % 32) & 1) << i;
        if ((absent & taking_part) != 0) [[unlikely]] {
            const unsigned lane = unsigned(std::countr_zero(absent & taking_part));
            const Thread& thread = threads[warp_index * 32 + lane];
            fail(thread, "%s at %s reads from lane %u, which does not take part (mask %#x, lanes here %#x): undefined",
                 name(kind), text(thread.where).c_str(), warp.source[lane], mask_of(warp.call[lane]), taking_part);
        }
        for (unsigned i = 0; i < 32; i++)
            warp.result[i] = taking_part >> i & 1 ? warp.value[warp.source[i] % 32] : warp.result[i];
        return;
    }
    uint64_t total = 0;
    for (unsigned rest = taking_part; rest != 0; rest &= rest - 1) {
        const int i = std::countr_zero(rest);
        const uint64_t value = kind == Collective::ballot ? warp.value[i] << i : warp.value[i];
        total = rest == taking_part ? value : combine(kind, total, value);
    }
    for (unsigned i = 0; i < 32; i++) warp.result[i] = taking_part >> i & 1 ? total : warp.result[i];
}

// Every thread waits: say for what, once for each place where threads wait.
void Block::deadlock() {
    std::map<std::string, std::pair<const Thread*, unsigned>> places;
    for (unsigned i = 0; i < size; i++) {
        const Thread& thread = threads[i];
        if (thread.fiber == nullptr) continue;
        std::string place;
        if (thread.in_barrier) {
            place = std::string("in ") + name(thread.barrier) + " at " + text(thread.where) + " for the whole block";
        } else {
            const Warp& warp = warps[i / 32];
            const unsigned mask = mask_of(warp.call[i % 32]);
            unsigned absent = 0;
            for (unsigned k = 0; k < 32; k++)
                absent |= unsigned((~warp.waiting >> k & 1) || warp.call[k] != warp.call[i % 32]) << k;
            char lanes[80];
            snprintf(lanes, sizeof lanes, " (mask %#x) for lanes %#x of warp %u", mask, mask & absent & ~warp.exited,
                     i / 32);
            place = std::string("in ") + name(kind_of(warp.call[i % 32])) + " at " + text(thread.where) + lanes;
        }
        const auto [entry, is_new] = places.try_emplace(place, &thread, 0);
        if (!is_new) entry->second.second++;
    }
    std::string message;
    for (const auto& [place, who] : places) {
        if (!message.empty()) message += "; ";
        message += "thread " + text(who.first->index);
        if (who.second > 0) message += " and " + std::to_string(who.second) + " more";
        message += " wait " + place;
    }
    fail(*places.begin()->second.first, "deadlock: %s; %u of %u threads have exited", message.c_str(), size - live,
         size);
}

// --- One block from start to end

void Block::prepare_threads(uint64_t block_index) {
    const dim3 shape = launch->block;
    const Order& order = launch->order;
    const bool same_shape = shape.x == prepared_size.x && shape.y == prepared_size.y && shape.z == prepared_size.z;
    if (same_shape && order == prepared_order && order.kind != Order::shuffle) return;
    prepared_size = shape;
    prepared_order = order;
    for (unsigned i = 0; i < size; i++) {
        threads[i].index = coordinates(i, shape);
        thread_at[i] = uint16_t(order.kind == Order::reverse ? size - 1 - i : i);
    }
    if (order.kind == Order::shuffle) {
        uint64_t random = mix(order.seed ^ mix(block_index));
        for (unsigned i = size - 1; i > 0; i--) std::swap(thread_at[i], thread_at[(random = mix(random)) % (i + 1)]);
    }
    for (unsigned i = 0; i < size; i++) threads[thread_at[i]].position = i;
}

void Block::run(const Launch& new_launch, uint64_t index) {
    launch = &new_launch;
    size = live = launch->block.x * launch->block.y * launch->block.z;
    gridDim = launch->grid;
    blockDim = launch->block;
    blockIdx = coordinates(index, launch->grid);
    prepare_threads(index);
    prepare_shared_memory(launch->shared_bytes);

    const unsigned last_warp = (size - 1) / 32;
    for (unsigned i = 0; i <= last_warp; i++) warps[i].exited = warps[i].waiting = 0;
    if (size % 32 != 0) warps[last_warp].exited = ~0u << size % 32;
    started = 0;
    first_awake = max_threads / 64;
    arrived = 0;
    forget_copies();

    running = take_next();
    threadIdx = threads[running].index;
    switch_to(idle_fiber());
}

void run_block(const Launch& launch, uint64_t index) {
    if (block == nullptr) {
        own_block = std::make_unique<Block>();
        block = own_block.get();
    }
    block->run(launch, block_at(launch.order, index, uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z));
}

// ---------------------------------------------------------------------------------------------------------------
// Launches

std::mutex shared_limits_mutex;
std::map<const void*, size_t> shared_limits;  // bytes of dynamic shared memory, of kernels that asked for more

size_t shared_limit(const void* kernel) {
    const std::lock_guard lock(shared_limits_mutex);
    const auto found = shared_limits.find(kernel);
    return found == shared_limits.end() ? default_shared_limit : found->second;
}

cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel) {
    const dim3 grid = config.gridDim, block = config.blockDim;
    if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
    if (config.numAttrs != 0) return cudaErrorNotSupported;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || block.x == 0 || block.y == 0 || block.z == 0)
        return cudaErrorInvalidConfiguration;
    if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
    if (block.x > 1024 || block.y > 1024 || block.z > 64 || size_t(block.x) * block.y * block.z > max_threads)
        return cudaErrorInvalidConfiguration;
    if (config.dynamicSmemBytes > default_shared_limit && config.dynamicSmemBytes > shared_limit(kernel))
        return cudaErrorInvalidValue;
    return cudaSuccess;
}

}  // namespace

void prepare_shared_memory(size_t bytes) {
    if (size_t& from = shared_memory.poisoned_from; address_sanitizer && from != bytes) {
        from = bytes;
        ASAN_UNPOISON_MEMORY_REGION(dynamic_shared, sizeof dynamic_shared);
        ASAN_POISON_MEMORY_REGION(reinterpret_cast<char*>(dynamic_shared) + from, sizeof dynamic_shared - from);
    }
    if (!debug) return;
    memset(dynamic_shared, 0xff, bytes);
    static const std::vector<ThreadLocal> variables = thread_locals("B6shared");
    for (const ThreadLocal& variable : variables) {
        char* address = thread_storage() + variable.offset;
        if (address != reinterpret_cast<char*>(dynamic_shared)) memset(address, 0xff, variable.size);
    }
}

bool set_order(const char* order) { return parse(order, current_order()); }

cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel) {
    const cudaError_t error = check(config, kernel);
    return error == cudaSuccess ? error : set_error(error);
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*thread)(void*), void* arguments) {
    const cudaError_t error = check_launch(config, kernel);
    if (error != cudaSuccess) return error;
    const Launch launch = {kernel,         thread, arguments, config.gridDim, config.blockDim, config.dynamicSmemBytes,
                           current_order()};
    const uint64_t blocks = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
    if (observer::begin_launch) {
        observer::begin_launch(kernel, launch.grid, launch.block, launch.shared_bytes);
        for (int64_t i; (i = observer::next_block()) >= 0;) run_block(launch, uint64_t(i));
        return cudaSuccess;
    }
    const uint64_t cores = uint64_t(cpu_threads()), chunk = std::max<uint64_t>(1, blocks / (cores * 16));
    if (blocks == 1 || cores == 1) {
        for (uint64_t i = 0; i < blocks; i++) run_block(launch, i);
    } else {
#pragma omp parallel for schedule(dynamic, chunk)
        for (uint64_t i = 0; i < blocks; i++) run_block(launch, i);
    }
    return cudaSuccess;
}

int block_barrier(Barrier kind, int predicate, Where where) { return block->wait_for_block(kind, predicate, where); }

uint64_t warp_collective(Collective kind, unsigned mask, uint64_t value, unsigned source, Where where) {
    return block->wait_for_warp(kind, mask, value, source, where);
}

observer::Stack observer::running_stack() {
    return {static_cast<const char*>(block->current->bottom), block->current->size};
}

void fail_in_kernel(const char* message, Where where) {
    block->fail(block->threads[block->running], "%s at %s", message, text(where).c_str());
}

}  // namespace cpu_device

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    using namespace cpu_device;
    if (kernel == nullptr) return set_error(cudaErrorInvalidDeviceFunction);
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || size_t(value) > dynamic_shared_limit)
        return set_error(cudaErrorInvalidValue);
    const std::lock_guard lock(shared_limits_mutex);
    shared_limits[kernel] = size_t(value);
    return cudaSuccess;
}
