// Ends a run that hangs: a rank died without a word, a link was cut, a file system does not answer. The main thread
// says what it is doing, again and again while it gets on; a thread of its own notices when it no longer does.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <stop_token>
#include <string>
#include <thread>

#include "trainer/basics.h"

class Watchdog {
  public:
    // hangs(): called by the thread, once, after `seconds` without a sign of life; its text says where. 0: never.
    // Counts its own ticks, not the clock: a run that was suspended does not hang.
    void start(int64_t seconds, std::function<void(const std::string& where)> hangs,
               std::chrono::milliseconds tick = std::chrono::seconds(1)) {
        if (seconds <= 0) return;
        thread_ = std::jthread([=, this](const std::stop_token& stop) {
            std::mutex mutex;
            std::condition_variable_any wake;
            std::unique_lock lock(mutex);
            uint64_t last = beats_;
            const char* phase = unwatched;
            for (int64_t idle = 0; idle * tick < std::chrono::seconds(seconds); idle++) {
                wake.wait_for(lock, stop, tick, [] { return false; });
                if (stop.stop_requested()) return;
                const uint64_t beats = beats_;
                phase = phase_;
                if (beats != last || phase == unwatched) idle = -1;
                last = beats;
            }
            hangs(text("step %lld: no progress in %lld s, %s", (long long)step_, (long long)seconds, phase));
        });
    }
    void stop() { thread_ = {}; }

    // The main thread gets on.
    void beat() { beats_++; }

    // While one lives, that is what the main thread is doing. `unwatched`: it waits for what may take any time.
    static constexpr const char* unwatched = nullptr;
    struct Phase {
        Watchdog& watchdog;
        const char* before;
        Phase(Watchdog& watchdog, const char* name) : watchdog(watchdog), before(watchdog.enter(name)) {}
        Phase(const Phase&) = delete;
        ~Phase() { watchdog.enter(before); }
    };
    void at_step(int64_t step) { step_ = step; }

  private:
    const char* enter(const char* phase) {
        beat();
        return phase_.exchange(phase);
    }

    std::atomic<const char*> phase_ = unwatched;
    std::atomic<int64_t> step_ = 0;
    std::atomic<uint64_t> beats_ = 0;
    std::jthread thread_;
};

inline Watchdog watchdog;  // this process's

constexpr const char* waiting_for_ranks = "waiting for the other ranks";
