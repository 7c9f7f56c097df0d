// Files: what is written comes back, and what fails is told.
#include "trainer/files.h"

#include <poll.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/time.h>

#include <thread>

#include "file_test.h"

namespace {

namespace fs = std::filesystem;

struct Files : FileTest {};

TEST_F(Files, ReportsAFullDisk) {
    expect_contains(error_of([] { write_file("/dev/full", "x"); }), {"/dev/full", "No space left"});
    expect_contains(error_of([&] { write_file(path("none/x"), "x"); }), {path("none/x"), "No such file"});
    expect_contains(error_of([&] { read_file(path("none")); }), {path("none"), "No such file"});
    expect_contains(error_of([&] { read_file(folder); }), {folder, "Is a directory"});
}

// Where the file may not grow on, write() first takes a part of the bytes, then fails.
TEST_F(Files, ReportsAShortWrite) {
    struct rlimit before {};
    getrlimit(RLIMIT_FSIZE, &before);
    const auto handler = signal(SIGXFSZ, SIG_IGN);
    const struct rlimit limit = {1000, before.rlim_max};
    setrlimit(RLIMIT_FSIZE, &limit);
    const std::string message = error_of([&] { write_file(path("text"), std::string(2000, 'x')); });
    setrlimit(RLIMIT_FSIZE, &before);
    signal(SIGXFSZ, handler);
    expect_contains(message, {path("text"), "File too large"});
    EXPECT_EQ(fs::file_size(path("text")), 1000u);
}

// A pipe whose reader is slow, and a timer: write() stops at each signal, wherever it is.
TEST_F(Files, GoesOnAfterAnInterruptedWrite) {
    const std::vector<char> random = random_bytes(400'000, 6);
    const std::string contents(random.begin(), random.end());
    ASSERT_EQ(mkfifo(path("pipe").c_str(), 0600), 0);
    const int pipe = open(path("pipe").c_str(), O_RDWR);

    sigset_t alarm, former;
    sigemptyset(&alarm);
    sigaddset(&alarm, SIGALRM);
    pthread_sigmask(SIG_BLOCK, &alarm, &former);  // only the writer is to be interrupted
    std::string received;
    std::thread reader([&] {
        std::vector<char> piece(4096);
        struct pollfd ready = {pipe, POLLIN, 0};
        while (received.size() < contents.size() && poll(&ready, 1, 2000) == 1) {  // 2 s: the writer lost bytes
            usleep(500);
            const ssize_t n = read(pipe, piece.data(), piece.size());
            if (n > 0) received.append(piece.data(), n);
        }
    });
    pthread_sigmask(SIG_SETMASK, &former, nullptr);
    struct sigaction action {
    }, before{};
    action.sa_handler = [](int) {};
    sigaction(SIGALRM, &action, &before);
    const struct itimerval every_two_ms = {{0, 2000}, {0, 2000}}, never = {};
    setitimer(ITIMER_REAL, &every_two_ms, nullptr);
    EXPECT_NO_THROW(write_file(path("pipe"), contents));
    setitimer(ITIMER_REAL, &never, nullptr);
    sigaction(SIGALRM, &before, nullptr);

    reader.join();
    close(pipe);
    EXPECT_TRUE(received == contents);
}

TEST_F(Files, BringsBackWhatIsWritten) {
    const std::vector<char> random = random_bytes(200'000, 7);
    for (const std::string& contents :
         {std::string("{}\n"), std::string(), std::string("a\0b", 3), std::string(random.begin(), random.end())}) {
        write_file(path("x"), contents);
        EXPECT_EQ(read_file(path("x")), contents);
        replace_file(path("y"), contents);
        EXPECT_EQ(read_file(path("y")), contents);
    }
    EXPECT_FALSE(fs::exists(path("y.tmp")));
}

TEST_F(Files, ReplacesAWholeFileOrNothing) {
    fs::create_directory(path("taken"));
    expect_contains(error_of([&] { replace_file(path("taken"), "new"); }), {"cannot write " + path("taken")});
    EXPECT_FALSE(fs::exists(path("taken.tmp")));
}

TEST_F(Files, ReadsAPieceOrSaysWhereTheFileEnds) {
    const File file(raw_file("x", "0123456789"));
    char piece[4];
    file.read(3, 4, piece);
    EXPECT_EQ(std::string(piece, 4), "3456");
    EXPECT_EQ(file.size(), 10);
    expect_contains(error_of([&] { file.read(8, 4, piece); }), {path("x") + ": ends at byte 10"});
    expect_contains(error_of([&] { File(folder).size(); }), {folder.string() + ": a folder"});
    ASSERT_EQ(mkfifo(path("pipe").c_str(), 0600), 0);
    expect_contains(error_of([&] { File(path("pipe"), O_RDONLY | O_NONBLOCK).size(); }), {"not a regular file"});
}

TEST_F(Files, SayErrorsInOneLine) {
    EXPECT_EQ(error_of([] { fail("x", "found \"a\nb\x7f\""); }), "x: found \"a b \"");
    EXPECT_EQ(error_of([&] { File("/none/caf\xe9\n/x"); }),
              "cannot open /none/caf\\xe9 /x: No such file or directory; check the path");
}

// A character stays; each byte that belongs to none is written out.
TEST_F(Files, PrintAnyBytesAsALineOfUtf8) {
    EXPECT_EQ(printable("a é 世 👍 \uFFFD"), "a é 世 👍 \uFFFD");
    EXPECT_EQ(printable(std::string("a\0b\tc\u0085d", 8)), "a b c d");
    EXPECT_EQ(printable("\xe9"), "\\xe9");
    EXPECT_EQ(printable("x\xe4\xb8y\xff\xc0\xaf"), "x\\xe4\\xb8y\\xff\\xc0\\xaf");
    EXPECT_EQ(printable("\xed\xa0\x80"), "\\xed\\xa0\\x80");           // half a surrogate pair
    EXPECT_EQ(printable("\xf4\x90\x80\x80"), "\\xf4\\x90\\x80\\x80");  // beyond U+10FFFF
    EXPECT_EQ(printable(""), "");
}

TEST_F(Files, SayWhatMayNotBeSearched) {
    fs::create_directory(path("closed"));
    raw_file("closed/x", "");
    EXPECT_EQ(find_paths(path("closed/*")), std::vector<std::string>{path("closed/x")});
    fs::permissions(path("closed"), fs::perms::none);
    const bool root = geteuid() == 0;  // reads everything: become nobody, for this thread alone
    chmod(folder.c_str(), 0755);
    ASSERT_TRUE(!root || syscall(SYS_setresuid, -1, 65534, -1) == 0);
    const std::string message = error_of([&] { find_paths(path("closed/*")); });
    ASSERT_TRUE(!root || syscall(SYS_setresuid, -1, 0, -1) == 0);
    fs::permissions(path("closed"), fs::perms::owner_all);
    expect_contains(message, {path("closed"), "Permission denied"});
}

}  // namespace
