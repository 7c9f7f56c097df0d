// What the loader gives, with the shards in the page cache and with the disk alone; and what one of 8 ranks that take a
// million tokens a second each waits for data. Makes 4 shards of 25 million tokens, with the checksums that encode
// records.
//   make bench
//   build/DEVICE-PRECISION-NORM/loader FOLDER       shards on another disk (default: the temporary folder)
#include <filesystem>
#include <fstream>

#include "../../dataloader.h"

namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

constexpr int vocab_size = 50257, document_token = 50256, B = 16;
constexpr int64_t shard_tokens = 25'000'000;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Documents of 400 tokens on average. Adds the shard to `list`.
std::string write_shard(const std::string& folder, int number, nlohmann::json& list) {
    const std::string path = folder + "/" + std::to_string(number) + ".bin";
    const uint32_t header[256] = {20240520, 1, (uint32_t)shard_tokens};
    std::vector<uint16_t> tokens(shard_tokens);
    for (int64_t i = 0; i < shard_tokens; i++) {
        const uint64_t random = hash64(number, i);
        tokens[i] = (uint16_t)(random >> 32 & 1023) < 1024 / 400 ? document_token : random % (vocab_size - 1);
    }
    std::ofstream file(path, std::ios::binary);
    file.write((const char*)header, sizeof header).write((const char*)tokens.data(), shard_tokens * 2);
    file.close();
    if (!file) fail(path, "cannot be written");
    list.push_back({{"name", fs::path(path).filename().string()},
                    {"crc32", crc32_of(0, tokens.data(), tokens.size() * sizeof(uint16_t))}});
    return path;
}

// Takes the shards out of the page cache; what is not on disk yet stays.
void forget(const std::vector<std::string>& paths) {
    for (const std::string& path : paths) {
        const int file = open(path.c_str(), O_RDONLY);
        fdatasync(file);
        posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
        close(file);
    }
}

// Bytes a second of the disk, or of the page cache, read from front to back.
double measure_reading(const std::vector<std::string>& paths) {
    std::vector<char> buffer(1 << 20);
    int64_t bytes = 0;
    const auto start = Clock::now();
    for (const std::string& path : paths) {
        const int file = open(path.c_str(), O_RDONLY);
        for (ssize_t n; (n = read(file, buffer.data(), buffer.size())) > 0;) bytes += n;
        close(file);
    }
    return (double)bytes / seconds_since(start);
}

void bench(const std::string& folder, const std::vector<std::string>& paths, int T, bool documents, bool cached) {
    const std::string glob = folder + "/*.bin";
    const int32_t token = documents ? document_token : no_document_token;
    const double batch_tokens = (double)B * T;

    // Two thirds of an epoch as fast as it goes.
    TrainLoader alone(glob, B, T, 0, 1, 1, vocab_size, token);
    if (cached) measure_reading(paths);
    else forget(paths);
    const int64_t batches = alone.rows() * 2 / 3 / B;
    auto start = Clock::now();
    alone.seek(0);
    for (int64_t i = 0; i < batches; i++) alone.next();
    const double rate = (double)batches * batch_tokens / seconds_since(start);

    // Four seconds of training; the first batch is read before.
    TrainLoader one_of_8(glob, B, T, 0, 8, 1, vocab_size, token);
    if (!cached) forget(paths);
    one_of_8.next();
    const double before = one_of_8.waited_ms();
    const int64_t steps = (int64_t)(4e6 / batch_tokens);
    int64_t waits = 0;
    start = Clock::now();
    for (int64_t i = 1; i <= steps; i++) {
        std::this_thread::sleep_until(start + std::chrono::duration<double>((double)i * batch_tokens / 1e6));
        const double waited = one_of_8.waited_ms();
        one_of_8.next();
        waits += one_of_8.waited_ms() > waited;
    }
    printf("  %-9s %5d  %-10s %12.1f %15.1f ms in %lld of %lld\n", documents ? "documents" : "stream", T,
           cached ? "page cache" : "disk", rate * 1e-6, one_of_8.waited_ms() - before, (long long)waits,
           (long long)steps);
}

}  // namespace

int main(int argc, char** argv) {
    std::string folder = (argc > 1 ? std::string(argv[1]) : fs::temp_directory_path().string()) + "/loader.XXXXXX";
    int status = 0;
    try {
        if (!mkdtemp(folder.data())) fail_errno("cannot make", folder);
        std::vector<std::string> paths;
        nlohmann::json list;
        for (int i = 0; i < 4; i++) paths.push_back(write_shard(folder, i, list));
        std::ofstream(folder + "/shards.json") << nlohmann::json{{"shards", list}};
        forget(paths);
        const double disk = measure_reading(paths), cache = measure_reading(paths);
        printf("front to back: disk %.0f MB/s, page cache %.0f MB/s\n", disk * 1e-6, cache * 1e-6);
        printf("  %-9s %5s  %-10s %12s %25s\n", "pack", "T", "from", "M tokens/s", "waits, as one of 8 ranks");
        for (const bool documents : {false, true}) {
            for (const int T : {256, 1024}) {
                for (const bool cached : {true, false}) bench(folder, paths, T, documents, cached);
            }
        }
    } catch (const std::exception& e) {
        fprintf(stderr, "loader: %s\n", e.what());
        status = 1;
    }
    fs::remove_all(folder);
    return status;
}
