// What keeps a run from being lost, on the host alone: its log, the lock of its folder, the watchdog.
#include <gtest/gtest.h>

#include <atomic>

#include "temporary_folder.h"
#include "trainer/folder_lock.h"
#include "trainer/run_log.h"
#include "trainer/watchdog.h"

namespace {

TEST(RunLog, EndsALineThatWasCut) {
    const TemporaryFolder folder;
    const std::string path = folder / "log.jsonl";
    for (const char* before : {"", "{\"event\":\"end\"}\n"}) {
        write_file(path, before);
        RunLog log;
        log.open(path);
        EXPECT_TRUE(log.write("val", {{"step", 1}}));
        EXPECT_EQ(read_file(path), before + std::string("{\"event\":\"val\",\"step\":1}\n"));
    }
    write_file(path, "{\"event\":\"tr");
    RunLog log;
    log.open(path);
    log.write("val", {{"step", 1}});
    EXPECT_EQ(read_file(path), "{\"event\":\"tr\n{\"event\":\"val\",\"step\":1}\n");
}

TEST(RunLog, KeepsWhatAFullDiskRefuses) {
    const TemporaryFolder folder;
    RunLog log;
    log.open("/dev/full");
    EXPECT_FALSE(log.write("train", {{"step", 1}}));
    EXPECT_FALSE(log.write("train", {{"step", 2}}));
    EXPECT_EQ(log.error, "cannot write /dev/full: No space left on device");
    const std::string path = folder / "log.jsonl";
    log.file.emplace(path, O_WRONLY | O_CREAT | O_APPEND);
    EXPECT_TRUE(log.write("train", {{"step", 3}}));
    EXPECT_EQ(log.error, "");
    EXPECT_EQ(read_file(path),
              "{\"event\":\"train\",\"step\":1}\n{\"event\":\"train\",\"step\":2}\n{\"event\":\"train\",\"step\":3}\n");
}

TEST(RunLog, TextThatIsNotUtf8) {
    const TemporaryFolder folder;
    RunLog log;
    log.open(folder / "log.jsonl");
    log.write("end", {{"reason", "caf\xe9"}});
    EXPECT_EQ(read_file(folder / "log.jsonl"), "{\"event\":\"end\",\"reason\":\"caf\xef\xbf\xbd\"}\n");
    EXPECT_EQ(first_line("caf\xe9\x1b[31m\nmore"), "caf\xef\xbf\xbd [31m");
}

TEST(RunLog, WhichEventsStillCount) {
    const TemporaryFolder folder;
    const std::string path = folder / "log.jsonl";
    std::string log;
    const auto counts = [&](const char* event, int step, const std::string& rest = "") {
        log += std::string("{\"event\":\"") + event + "\",\"step\":" + std::to_string(step) + rest + "}\n";
        write_file(path, log);
        return std::pair(count_events(path, "val", 4) > 0, count_events(path, "probe", 4) > 0);
    };
    using Found = std::pair<bool, bool>;
    EXPECT_EQ(count_events(path, "val", 4), 0u) << "no log";
    EXPECT_EQ(counts("val", 40), Found(false, false));
    EXPECT_EQ(counts("train", 4), Found(false, false));
    EXPECT_EQ(counts("val", 4), Found(true, false));
    EXPECT_EQ(counts("probe", 4), Found(true, true));
    EXPECT_EQ(counts("train", 5), Found(true, true));
    EXPECT_EQ(counts("train", 3), Found(false, false)) << "resumed before it";
    counts("eval", 4, R"(,"task":"a","n":1)");
    EXPECT_EQ(count_events(path, "eval", 4), 1u) << "stopped before the second task";
    counts("eval", 4, R"(,"task":"a","n":2)");
    EXPECT_EQ(count_events(path, "eval", 4), 1u) << "the first task again";
    counts("eval", 4, R"(,"task":"b","n":2)");
    EXPECT_EQ(count_events(path, "eval", 4), 2u);
}

TEST(FolderLock, OneAtATime) {
    const TemporaryFolder folder;
    const auto refused = [](const std::string& path) {
        try {
            FolderLock second(path);
        } catch (const Error& e) {
            return std::string(e.what());
        }
        return std::string("no error");
    };
    {
        FolderLock first(folder.path);
        EXPECT_NE(refused(folder.path).find("in use by another run ()"), std::string::npos) << "nothing written yet";
        first.sign();
        EXPECT_NE(refused(folder.path).find("in use by another run (process " + std::to_string(getpid()) + " on "),
                  std::string::npos);
    }
    EXPECT_EQ(refused(folder.path), "no error") << "the lock goes with its object";
    EXPECT_EQ(read_file(folder / ".lock"), "") << "as does the name";
    EXPECT_THROW(FolderLock(folder / "nowhere"), std::runtime_error);
}

// Ticks of 10 ms: a second is 100 of them.
struct Watched {
    Watchdog dog;
    std::atomic<bool> hung = false;
    std::string where;

    explicit Watched(int64_t seconds) {
        const auto hangs = [this](const std::string& text) { where = text, hung = true; };
        dog.start(seconds, hangs, std::chrono::milliseconds(10));
    }
    bool hangs_within(int milliseconds, bool beats = false) {
        for (int i = 0; i < milliseconds / 10 && !hung; i++) {
            if (beats) dog.beat();
            std::this_thread::sleep_for(std::chrono::milliseconds(10));
        }
        return hung;
    }
};

TEST(Watchdog, SaysWhereNothingMoves) {
    Watched watched(1);
    watched.dog.at_step(7);
    const Watchdog::Phase outer(watched.dog, "computing");
    { const Watchdog::Phase inner(watched.dog, "waiting for data"); }
    ASSERT_TRUE(watched.hangs_within(20000));
    watched.dog.stop();
    EXPECT_EQ(watched.where, "step 7: no progress in 1 s, computing");
}

TEST(Watchdog, LeavesAloneWhatMovesOrMayWait) {
    Watched watched(1);
    {
        const Watchdog::Phase phase(watched.dog, "validating");
        EXPECT_FALSE(watched.hangs_within(1500, true)) << "it beats";
    }
    EXPECT_FALSE(watched.hangs_within(1500)) << "in no phase";
    const Watchdog::Phase outer(watched.dog, "computing");
    {
        const Watchdog::Phase phase(watched.dog, Watchdog::unwatched);
        EXPECT_FALSE(watched.hangs_within(1500)) << "unwatched";
    }
    EXPECT_TRUE(watched.hangs_within(20000)) << "watched again";
}

TEST(Watchdog, ZeroIsNever) {
    Watched watched(0);
    const Watchdog::Phase phase(watched.dog, "computing");
    EXPECT_FALSE(watched.hangs_within(300));
}

}  // namespace
