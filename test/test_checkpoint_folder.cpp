// Checkpoint folders: a kill at any moment leaves a whole checkpoint; damage is seen, and what is damaged is kept.
#include "trainer/checkpoint_folder.h"

#include <signal.h>
#include <sys/wait.h>

#include "file_test.h"

namespace {

namespace fs = std::filesystem;

struct CheckpointFolders : FileTest {};

std::string save(const std::string& run, int64_t step, const std::string& contents) {
    CheckpointFolder checkpoint(run, step);
    fs::create_directory(checkpoint.path() + "/state");
    checkpoint.write("state/a", contents);
    checkpoint.write("b", contents);
    return checkpoint.publish();
}

bool is_whole(const std::string& checkpoint) { return changed_file(checkpoint, true).empty(); }

std::vector<int64_t> steps(const std::string& run) {
    std::vector<int64_t> result;
    for (const auto& [step, path] : list_checkpoints(run)) {
        EXPECT_EQ(path, run + "/checkpoints/" + checkpoint_name(step));
        result.push_back(step);
    }
    return result;
}

// All names under checkpoints/, hidden ones too.
std::vector<std::string> entries(const std::string& run) {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(run + "/checkpoints")) names.push_back(entry.path().filename());
    std::sort(names.begin(), names.end());
    return names;
}

TEST_F(CheckpointFolders, AppearWhenPublished) {
    EXPECT_EQ(checkpoint_name(0), "step_00000000");
    EXPECT_EQ(checkpoint_name(100), "step_00000100");
    EXPECT_EQ(checkpoint_name(1234567890), "step_1234567890");
    const std::string run = path("runs/a");
    EXPECT_TRUE(list_checkpoints(run).empty());

    CheckpointFolder checkpoint(run, 100);
    EXPECT_EQ(checkpoint.path(), run + "/checkpoints/.step_00000100.tmp");
    write_file(checkpoint.path() + "/x", "1");
    EXPECT_TRUE(list_checkpoints(run).empty());
    EXPECT_EQ(checkpoint.publish(), run + "/checkpoints/step_00000100");
    EXPECT_EQ(steps(run), std::vector<int64_t>{100});
    EXPECT_EQ(read_file(run + "/checkpoints/step_00000100/x"), "1");
    EXPECT_EQ(entries(run), std::vector<std::string>{"step_00000100"});
}

TEST_F(CheckpointFolders, AreListedByStep) {
    for (const int64_t step : {int64_t{1000000000}, int64_t{0}, int64_t{999999999}, int64_t{50}})
        save(folder, step, "x");
    for (const char* stranger :
         {"step_7", "step_00000007x", "step_-0000007", "step_ 0000007", ".step_00000007.tmp", "best"}) {
        fs::create_directory(path(std::string("checkpoints/") + stranger));
    }
    raw_file("checkpoints/step_00000008", "a file");
    EXPECT_EQ(steps(folder), (std::vector<int64_t>{0, 50, 999999999, 1000000000}));
}

TEST_F(CheckpointFolders, VanishUnpublished) {
    EXPECT_ANY_THROW({
        CheckpointFolder checkpoint(folder, 100);
        write_file(checkpoint.path() + "/x", "1");
        throw std::runtime_error("the disk is full");
    });
    EXPECT_TRUE(entries(folder).empty());
    raw_file("file", "");
    expect_contains(error_of([&] { CheckpointFolder checkpoint(path("file"), 100); }),
                    {path("file"), "Not a directory"});
}

TEST_F(CheckpointFolders, ReplaceTheOneOfTheSameStep) {
    save(folder, 100, "old");
    write_file(path("checkpoints/step_00000100/only in the old one"), "");
    const std::string published = save(folder, 100, "new");
    EXPECT_EQ(read_file(published + "/b"), "new");
    EXPECT_EQ(read_file(published + "/state/a"), "new");
    EXPECT_FALSE(fs::exists(published + "/only in the old one"));
    EXPECT_EQ(entries(folder), std::vector<std::string>{"step_00000100"});
}

TEST_F(CheckpointFolders, AreReplacedWhereNamesCannotBeExchangedToo) {
    constexpr unsigned refused = ~0u;  // renameat2 knows no such flags, and fails as it does on NFS
    for (const unsigned flags : {unsigned{RENAME_EXCHANGE}, refused}) {
        for (const char* name : {"new", "old", "aside"}) {
            fs::create_directory(path(name));
            write_file(path(name) + "/name", name);
        }
        checkpoint_folder::replace_folder(path("new"), path("old"), path("aside"), flags);
        EXPECT_EQ(read_file(path("old/name")), "new");
        EXPECT_EQ(read_file(path("aside/name")), "old");
        EXPECT_FALSE(fs::exists(path("new")));
    }
}

// Runs `action` in a process of its own, and kills it (SIGKILL) after the given time, or when it asks for it.
void run_and_kill(const std::function<void()>& action, int microseconds) {
    const pid_t child = fork();
    if (child == 0) {
        action();
        _exit(0);
    }
    if (microseconds >= 0) {
        usleep(microseconds);
        kill(child, SIGKILL);
    }
    int status = 0;
    waitpid(child, &status, 0);
    EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

TEST_F(CheckpointFolders, OutliveAKillBeforePublishing) {
    save(folder, 50, "good");
    run_and_kill(
        [&] {
            CheckpointFolder checkpoint(folder, 100);
            write_file(checkpoint.path() + "/b", "half");
            raise(SIGKILL);
        },
        -1);
    EXPECT_TRUE(fs::exists(path("checkpoints/.step_00000100.tmp/b"))) << "the kill came too early";
    EXPECT_EQ(steps(folder), std::vector<int64_t>{50});
    EXPECT_EQ(read_file(path("checkpoints/step_00000050/b")), "good");

    CheckpointFolder again(folder, 100);
    EXPECT_TRUE(fs::is_empty(again.path())) << "the killed run's files would be published";
    CheckpointFolder other(folder, 150);
    EXPECT_EQ(entries(folder), (std::vector<std::string>{".step_00000150.tmp", "step_00000050"}));
}

TEST_F(CheckpointFolders, OutliveAKillAtAnyMoment) {
    save(folder, 100, "0");
    std::mt19937 random(4);
    for (int round = 0; round < 30; round++) {
        run_and_kill(
            [&] {
                for (int i = 0;; i++) save(folder, 100, std::to_string(i));
            },
            static_cast<int>(random() % 30000));
        ASSERT_EQ(steps(folder), std::vector<int64_t>{100});
        EXPECT_EQ(read_file(path("checkpoints/step_00000100/state/a")), read_file(path("checkpoints/step_00000100/b")));
    }
    save(folder, 100, "last");
    EXPECT_EQ(entries(folder), std::vector<std::string>{"step_00000100"});
}

TEST_F(CheckpointFolders, ShowAnyFlippedBit) {
    const std::string checkpoint = save(folder, 100, "contents");
    EXPECT_TRUE(is_whole(checkpoint));
    for (const char* name : {"state/a", "b", "state/checksums.json"}) {
        const std::string file = checkpoint + "/" + name, contents = read_file(file);
        for (size_t bit = 0; bit < 8 * contents.size(); bit++) {
            std::string flipped = contents;
            flipped[bit / 8] ^= static_cast<char>(1 << bit % 8);
            write_file(file, flipped);
            bool whole = false;
            try {
                whole = is_whole(checkpoint);
            } catch (const std::runtime_error&) {  // a name that is no file's
            }
            // Spaces and line ends between the words of JSON mean nothing.
            const bool space = contents[bit / 8] <= ' ' && flipped[bit / 8] <= ' ';
            EXPECT_TRUE(!whole || space) << name << ", bit " << bit;
        }
        write_file(file, contents);
    }
    write_file(checkpoint + "/state/a", "other");
    expect_contains(changed_file(checkpoint, true), {checkpoint + "/state/a", "damaged"});
    EXPECT_EQ(changed_file(checkpoint, false), "") << "the state is not the model's";
    fs::remove(checkpoint + "/state/checksums.json");
    EXPECT_EQ(changed_file(checkpoint, true), "") << "nothing is recorded";
}

TEST_F(CheckpointFolders, AreSetAsideUnderNewNames) {
    for (const char* name : {"step_00000100.damaged", "step_00000100.damaged-2", "step_00000100.damaged-3"}) {
        EXPECT_EQ(set_aside(save(folder, 100, name)), path("checkpoints/") + name);
        EXPECT_EQ(read_file(path("checkpoints/") + name + "/b"), name);
        EXPECT_TRUE(steps(folder).empty());
    }
}

TEST_F(CheckpointFolders, ArePruned) {
    remove_old_checkpoints(folder, 2, {}, is_whole);  // none there
    for (const int64_t step : {0, 50, 100, 150}) save(folder, step, "x");
    for (const int keep : {0, -1, 4}) remove_old_checkpoints(folder, keep, {}, is_whole);
    EXPECT_EQ(steps(folder).size(), 4u);

    CheckpointFolder unpublished(folder, 200);
    fs::create_directory(path("checkpoints/.step_00000050.old"));  // of a kill while it was removed
    raw_file("checkpoints/.step_00000050.old/x", "");
    remove_old_checkpoints(folder, 2, {}, is_whole);
    EXPECT_EQ(entries(folder), (std::vector<std::string>{".step_00000200.tmp", "step_00000100", "step_00000150"}));
    remove_old_checkpoints(folder, 1, {}, is_whole);
    EXPECT_EQ(steps(folder), std::vector<int64_t>{150});
}

TEST_F(CheckpointFolders, ArePrunedByWholeOnes) {
    for (const int64_t step : {10, 20, 30, 40, 50, 60}) save(folder, step, "x");
    for (const char* damaged : {"20", "50"}) raw_file(std::string("checkpoints/step_000000") + damaged + "/b", "y");
    remove_old_checkpoints(folder, 2, {path("checkpoints/step_00000010")}, is_whole);
    EXPECT_EQ(entries(folder), (std::vector<std::string>{"step_00000010", "step_00000020.damaged", "step_00000040",
                                                         "step_00000050.damaged", "step_00000060"}));
}

TEST_F(CheckpointFolders, AreNeverSeenHalfRemoved) {
    constexpr int files = 200;
    std::mt19937 random(5);
    for (int round = 0; round < 15; round++) {
        for (const int64_t step : {50, 100}) fs::create_directories(path("checkpoints/" + checkpoint_name(step)));
        for (int i = 0; i < files; i++) raw_file("checkpoints/step_00000050/" + std::to_string(i), "x");
        run_and_kill(
            [&] {
                remove_old_checkpoints(folder, 1, {}, is_whole);
                pause();
            },
            static_cast<int>(random() % 4000));
        for (const auto& [step, path] : list_checkpoints(folder)) {
            const auto left = std::distance(fs::directory_iterator(path), {});
            EXPECT_EQ(left, step == 50 ? files : 0);
        }
    }
}

}  // namespace
