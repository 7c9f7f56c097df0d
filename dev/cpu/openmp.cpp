// An OpenMP thread that has nothing to do waits by spinning: for minutes, where the variable below is not set, and a
// kernel launch takes microseconds. With other programs on the same cores the spinning threads take the time that
// those they wait for would need, and a training step becomes ten times as long. libgomp reads the variable before
// main and offers no call for it, so the program sets it and starts itself again.
#include <unistd.h>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace {

[[gnu::constructor]] void limit_spinning() {
    if (getenv("GOMP_SPINCOUNT") || getenv("OMP_WAIT_POLICY")) return;
    std::ifstream file("/proc/self/cmdline", std::ios::binary);
    std::string words((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    std::vector<char*> arguments;
    for (size_t at = 0; at < words.size(); at += words.find('\0', at) + 1 - at) arguments.push_back(&words[at]);
    if (arguments.empty()) return;
    arguments.push_back(nullptr);
    setenv("GOMP_SPINCOUNT", "20000", 1);  // some 50 microseconds
    execv("/proc/self/exe", arguments.data());
    unsetenv("GOMP_SPINCOUNT");  // it did not start: go on as it is
}

}  // namespace
