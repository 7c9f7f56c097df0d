// Token shards streamed from disk. Two loaders:
//   TrainLoader   shuffled windows without end, the same sequence for any batch size and any number of ranks
//   ValLoader     the shards in file-name order, each token predicted once
//
// A shard is a file of llm.c: 256 int32 of header (magic, version, number of tokens, zeros), then the tokens, all
// little endian. B is the number of sequences in a batch, T the number of tokens in a sequence. Errors are
// std::runtime_error, one line that names the file.
#pragma once

#include <fcntl.h>
#include <glob.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <stop_token>
#include <string>
#include <thread>
#include <utility>
#include <vector>

static_assert(std::endian::native == std::endian::little, "shards are little endian and read as they lie on disk");

struct Batch {
    std::vector<int32_t> inputs;   // (B, T)
    std::vector<int32_t> targets;  // (B, T) the token after each input; -1 is not counted
};

// ---------------------------------------------------------------------------------------------------------------------
// Shards

// The files that match, sorted byte by byte: the order must not depend on the locale. `flag` is for the message.
inline std::vector<std::string> find_shards(const std::string& glob, const char* flag = "--train") {
    glob_t matches{};
    const int status = ::glob(glob.c_str(), GLOB_NOSORT, nullptr, &matches);
    std::vector<std::string> paths;
    if (status == 0) paths.assign(matches.gl_pathv, matches.gl_pathv + matches.gl_pathc);
    globfree(&matches);
    if (paths.empty()) {
        throw std::runtime_error("no shards match " + glob + ": run `make data` (or " + flag + " GLOB)");
    }
    std::sort(paths.begin(), paths.end());
    return paths;
}

struct Shard {
    std::string path;
    int64_t tokens;
    int token_bytes;  // 2 or 4
};

namespace shard_io {

constexpr int64_t header_bytes = 256 * sizeof(int32_t);

[[noreturn]] inline void fail(const std::string& path, const std::string& what) {
    throw std::runtime_error(path + ": " + what);
}

// An open file, closed when it goes out of scope.
class File {
  public:
    File() = default;
    explicit File(const std::string& path) : fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
        if (fd_ < 0) fail(path, std::string("cannot open: ") + std::strerror(errno));
    }
    File(File&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    File& operator=(File&& other) noexcept {
        std::swap(fd_, other.fd_);
        return *this;
    }
    ~File() {
        if (fd_ >= 0) ::close(fd_);
    }

    struct stat status() const {
        struct stat result {};
        ::fstat(fd_, &result);
        return result;
    }

    // All of `bytes` from `offset`, or an error.
    void read(const std::string& path, int64_t offset, int64_t bytes, void* out) const {
        for (int64_t done = 0; done < bytes;) {
            const ssize_t n = ::pread(fd_, static_cast<char*>(out) + done, bytes - done, offset + done);
            if (n < 0 && errno == EINTR) continue;
            if (n < 0) fail(path, "cannot read at byte " + std::to_string(offset + done) + ": " + std::strerror(errno));
            if (n == 0)
                fail(path, "ends at byte " + std::to_string(offset + done) + ", and was longer when it was opened");
            done += n;
        }
    }

  private:
    int fd_ = -1;
};

// What a file with the wrong magic number probably is.
inline std::string guess(uint32_t magic) {
    const uint32_t swapped = magic >> 24 | (magic >> 8 & 0xff00) | (magic << 8 & 0xff0000) | magic << 24;
    if (swapped == 20240520 || swapped == 20240801) return "the byte order is big endian, write it little endian";
    if (magic == 20240522) return "this is a multiple-choice evaluation file of llm.c, not a stream of tokens";
    if (magic == 20240326 || magic == 20240327 || magic == 20240328)
        return "this is a model or tokenizer file of llm.c";
    if (magic / 10000 >= 2024 && magic / 10000 < 2100) return "this may be another version of the format";
    return "a raw token file without header, or no token file; build/tokenize encode writes shards";
}

// Checks a file's header against its size.
inline Shard open_shard(const std::string& path) {
    const File file(path);
    const struct stat status = file.status();
    if (!S_ISREG(status.st_mode)) fail(path, "not a regular file");
    const int64_t size = status.st_size;
    if (size == 0) fail(path, "the file is empty; make it again");
    if (size < header_bytes) {
        fail(path,
             "truncated: " + std::to_string(size) + " bytes, but the header alone has " + std::to_string(header_bytes));
    }
    std::array<uint32_t, 3> header;
    file.read(path, 0, sizeof header, header.data());
    const auto [magic, version, count] = header;
    if (magic != 20240520 && magic != 20240801) {
        fail(path, "expected magic number 20240520 (uint16 tokens) or 20240801 (uint32 tokens), found " +
                       std::to_string(magic) + ": " + guess(magic));
    }
    const int token_bytes = magic == 20240520 ? 2 : 4;
    const uint32_t expected_version = magic == 20240520 ? 1 : 7;
    if (version != expected_version) {
        fail(path, "expected version " + std::to_string(expected_version) + " for magic number " +
                       std::to_string(magic) + ", found " + std::to_string(version) +
                       ": make the shards again with build/tokenize encode");
    }
    const int64_t expected_size = header_bytes + int64_t{count} * token_bytes;
    if (size != expected_size) {
        fail(path, (size < expected_size ? "truncated: " : "too long: ") + std::to_string(size) + " bytes, but " +
                       std::to_string(count) + " tokens need " + std::to_string(expected_size) +
                       "; copy or make it again");
    }
    if (count == 0) fail(path, "the shard holds no tokens");
    return {path, count, token_bytes};
}

inline std::vector<Shard> open_shards(const std::string& glob, const char* flag) {
    std::vector<Shard> shards;
    for (const std::string& path : find_shards(glob, flag)) shards.push_back(open_shard(path));
    return shards;
}

// Reads stretches of tokens. Keeps one file open only: a data set can have more shards than a process may have files.
class Reader {
  public:
    explicit Reader(int vocab_size) : vocab_size_(vocab_size) {}

    // Tokens position .. position + count - 1 of the shard.
    void read(const Shard& shard, int64_t position, int64_t count, int32_t* out) {
        if (path_ != shard.path) {
            file_ = File(shard.path);
            path_ = shard.path;
        }
        const int64_t offset = header_bytes + position * shard.token_bytes;
        if (shard.token_bytes == 4) {
            file_.read(path_, offset, count * 4, out);
        } else {
            narrow_.resize(count);
            file_.read(path_, offset, count * 2, narrow_.data());
            std::copy(narrow_.begin(), narrow_.end(), out);
        }
        check(position, count, out);
    }

  private:
    // As unsigned numbers, so that a token of 2^31 and more is too large instead of negative.
    void check(int64_t position, int64_t count, const int32_t* tokens) const {
        uint32_t largest = 0;
        for (int64_t i = 0; i < count; i++) largest = std::max(largest, static_cast<uint32_t>(tokens[i]));
        if (largest < static_cast<uint32_t>(vocab_size_)) return;
        int64_t bad = 0;
        while (static_cast<uint32_t>(tokens[bad]) < static_cast<uint32_t>(vocab_size_)) bad++;
        fail(path_, "token " + std::to_string(static_cast<uint32_t>(tokens[bad])) + " at position " +
                        std::to_string(position + bad) + " is outside the vocabulary of " +
                        std::to_string(vocab_size_) +
                        ": set --vocab or --tokenizer to what the shards were made with, or make them again");
    }

    int vocab_size_;
    std::string path_;
    File file_;
    std::vector<uint16_t> narrow_;
};

}  // namespace shard_io

// ---------------------------------------------------------------------------------------------------------------------
// The order of the training windows

// Scatters the bits of x: the finalizer of SplitMix64.
inline uint64_t hash64(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

inline uint64_t hash64(uint64_t a, uint64_t b) { return hash64(hash64(a + 0x9e3779b97f4a7c15u) + b); }

// A permutation of 0 .. n-1 drawn by a key, computed for one number at a time: there is no table in memory, however
// large the shard, and no cost to seeking. A Feistel network permutes the numbers of 2 * half_bits bits; one that falls
// outside 0 .. n-1 is sent through again until it is back inside, which keeps the map one to one.
struct Permutation {
    uint64_t n, key;
    int half_bits = std::max(1, static_cast<int>(std::bit_width(n - 1) + 1) / 2);

    uint64_t operator()(uint64_t i) const {
        do i = feistel(i);
        while (i >= n);
        return i;
    }

    uint64_t feistel(uint64_t i) const {
        const uint64_t mask = (uint64_t{1} << half_bits) - 1;
        uint64_t left = i >> half_bits, right = i & mask;
        for (uint64_t round = 0; round < 6; round++) {
            left ^= hash64(key + round, right) & mask;
            std::swap(left, right);
        }
        return left << half_bits | right;
    }
};

// The global sequence of windows g = 0, 1, 2, ...: each epoch permutes the shards, and the windows within each shard.
class WindowOrder {
  public:
    struct Place {
        int shard;
        int64_t window;
    };

    // windows[s]: the number of windows in shard s, at least 1.
    WindowOrder(std::vector<int64_t> windows, uint64_t seed) : windows_(std::move(windows)), seed_(seed) {
        for (int64_t n : windows_) epoch_windows_ += n;
    }

    int64_t epoch_windows() const { return epoch_windows_; }

    Place operator()(int64_t g) {
        if (g / epoch_windows_ != epoch_) start_epoch(g / epoch_windows_);
        g %= epoch_windows_;
        const size_t k = std::upper_bound(first_.begin(), first_.end(), g) - first_.begin() - 1;
        const int shard = order_[k];
        const Permutation permutation{static_cast<uint64_t>(windows_[shard]), hash64(epoch_key_, shard + 1)};
        return {shard, static_cast<int64_t>(permutation(g - first_[k]))};
    }

  private:
    void start_epoch(int64_t epoch) {
        epoch_ = epoch;
        epoch_key_ = hash64(seed_, epoch);
        order_.clear();
        first_.clear();
        int64_t first = 0;
        for (size_t k = 0; k < windows_.size(); k++) {
            order_.push_back(static_cast<int>(Permutation{windows_.size(), hash64(epoch_key_, 0)}(k)));
            first_.push_back(first);
            first += windows_[order_[k]];
        }
    }

    std::vector<int64_t> windows_;
    uint64_t seed_;
    int64_t epoch_windows_ = 0;
    int64_t epoch_ = -1;
    uint64_t epoch_key_ = 0;
    std::vector<int> order_;      // the k-th shard of this epoch
    std::vector<int64_t> first_;  // the place of its first window in the epoch
};

// ---------------------------------------------------------------------------------------------------------------------
// Training data

// Window i of a shard has inputs iT .. iT+T-1 and targets iT+1 .. iT+T; the partial window at a shard's end is dropped.
// Micro-batch m of a rank takes the windows (m * ranks + rank) * B .. + B-1 of the global sequence: one micro-batch of
// all ranks is a contiguous piece of it, whatever B and ranks are. A thread reads ahead, so next() seldom waits.
class TrainLoader {
  public:
    TrainLoader(const std::string& glob, int B, int T, int rank, int ranks, uint64_t seed, int vocab_size)
        : B_(B),
          T_(T),
          rank_(rank),
          ranks_(ranks),
          shards_(shard_io::open_shards(glob, "--train")),
          tokens_(count_tokens(shards_)),
          order_(drop_short_shards(glob), seed),
          reader_(vocab_size),
          window_(T + 1) {}

    // This rank's next micro-batch; valid until the next call of next() or seek(). Throws what the reading thread met.
    const Batch& next() {
        if (!thread_.joinable()) thread_ = std::jthread([this](std::stop_token stop) { read_ahead(stop); });
        std::unique_lock lock(mutex_);
        filled_.wait(lock, [this] { return read_ > taken_ || error_; });
        if (read_ == taken_) std::rethrow_exception(error_);
        const Batch& batch = ring_[taken_++ % ring_.size()];
        freed_.notify_one();
        return batch;
    }

    int64_t tokens() const { return tokens_; }                  // in all shards
    int64_t windows() const { return order_.epoch_windows(); }  // in an epoch, over all ranks

    // Windows that all ranks together have consumed since training started. Seeking there resumes exactly, on any
    // number of ranks.
    int64_t position() const { return start_ + taken_ * B_ * ranks_; }

    void seek(int64_t window) {
        if (window < 0) throw std::runtime_error("data position " + std::to_string(window) + " is negative");
        thread_ = {};  // stops and joins
        start_ = window;
        read_ = taken_ = 0;
        error_ = nullptr;
    }

  private:
    static int64_t count_tokens(const std::vector<Shard>& shards) {
        int64_t tokens = 0;
        for (const Shard& shard : shards) tokens += shard.tokens;
        return tokens;
    }

    // Leaves the shards that hold a whole window, and returns the number of windows of each.
    std::vector<int64_t> drop_short_shards(const std::string& glob) {
        std::erase_if(shards_, [this](const Shard& shard) { return shard.tokens < T_ + 1; });
        if (shards_.empty()) {
            throw std::runtime_error(glob + ": no shard has the " + std::to_string(int64_t{T_} + 1) +
                                     " tokens that a sequence of " + std::to_string(T_) +
                                     " needs: lower --seq-len or add data");
        }
        std::vector<int64_t> windows;
        for (const Shard& shard : shards_) windows.push_back((shard.tokens - 1) / T_);
        return windows;
    }

    void read_ahead(std::stop_token stop) try {
        for (int64_t m = 0;; m++) {
            {
                std::unique_lock lock(mutex_);
                // One place of the ring belongs to the batch that next() handed out last.
                const auto has_room = [&] { return m - taken_ + 1 < static_cast<int64_t>(ring_.size()); };
                if (!freed_.wait(lock, stop, has_room)) return;
            }
            const int64_t first = start_ + (m * ranks_ + rank_) * B_;
            if (!fill(first, ring_[m % ring_.size()], stop)) return;
            std::lock_guard lock(mutex_);
            read_ = m + 1;
            filled_.notify_one();
        }
    } catch (...) {
        std::lock_guard lock(mutex_);
        error_ = std::current_exception();
        filled_.notify_one();
    }

    // Windows first .. first + B-1 of the global sequence; false when told to stop.
    bool fill(int64_t first, Batch& batch, const std::stop_token& stop) {
        batch.inputs.resize(static_cast<size_t>(B_) * T_);
        batch.targets.resize(static_cast<size_t>(B_) * T_);
        for (int64_t b = 0; b < B_; b++) {
            if (stop.stop_requested()) return false;
            const auto [shard, window] = order_(first + b);
            reader_.read(shards_[shard], window * T_, T_ + 1, window_.data());
            std::copy_n(window_.begin(), T_, batch.inputs.begin() + b * T_);
            std::copy_n(window_.begin() + 1, T_, batch.targets.begin() + b * T_);
        }
        return true;
    }

    // Constant after construction, but for start_, which changes only while no thread runs.
    int64_t B_, T_, rank_, ranks_;
    std::vector<Shard> shards_;
    int64_t tokens_;
    int64_t start_ = 0;  // the global window at which read_ and taken_ began to count

    // The thread's own.
    WindowOrder order_;
    shard_io::Reader reader_;
    std::vector<int32_t> window_;  // (T + 1)

    // Shared, under mutex_; the batches themselves belong to the thread until they are counted in read_.
    std::mutex mutex_;
    std::condition_variable_any filled_, freed_;
    std::array<Batch, 4> ring_;
    int64_t read_ = 0, taken_ = 0;  // micro-batches
    std::exception_ptr error_;

    std::jthread thread_;  // last, so that it ends before what it uses
};

// ---------------------------------------------------------------------------------------------------------------------
// Validation data

// The shards in file-name order are one stream; window i predicts its tokens iT+1 .. iT+T from iT .. iT+T-1. The
// windows join without overlap, so a batch is one stretch of the stream. After the last predicted token inputs are 0,
// targets -1.
class ValLoader {
  public:
    // Predicts the first max_tokens tokens, 0 for all.
    ValLoader(const std::string& glob, int B, int T, int64_t max_tokens, int vocab_size)
        : batch_tokens_(int64_t{B} * T), vocab_size_(vocab_size), shards_(shard_io::open_shards(glob, "--val")) {
        int64_t tokens = 0;
        for (const Shard& shard : shards_) tokens += shard.tokens;
        if (tokens < 2) throw std::runtime_error(glob + ": one token alone predicts nothing: add validation data");
        predicted_ = max_tokens > 0 ? std::min(max_tokens, tokens - 1) : tokens - 1;
    }

    int64_t batches() const { return (predicted_ + batch_tokens_ - 1) / batch_tokens_; }
    int64_t predicted_tokens() const { return predicted_; }

    // Any batch, in any order. A batch past the last one counts no target: ranks may run in step to the end.
    void read(int64_t batch, Batch& out) const {
        const int64_t start = batch * batch_tokens_;
        const int64_t n = std::clamp<int64_t>(predicted_ - start, 0, batch_tokens_);
        out.inputs.assign(batch_tokens_, 0);
        out.targets.assign(batch_tokens_, -1);
        if (n == 0) return;

        std::vector<int32_t> stretch(n + 1);
        shard_io::Reader reader(vocab_size_);
        int64_t first = 0;  // the place of the shard's first token in the stream
        for (const Shard& shard : shards_) {
            const int64_t begin = std::max(start, first), end = std::min(start + n + 1, first + shard.tokens);
            if (begin < end) reader.read(shard, begin - first, end - begin, &stretch[begin - start]);
            first += shard.tokens;
        }
        std::copy_n(stretch.begin(), n, out.inputs.begin());
        std::copy_n(stretch.begin() + 1, n, out.targets.begin());
    }

  private:
    int64_t batch_tokens_;
    int vocab_size_;
    std::vector<Shard> shards_;
    int64_t predicted_ = 0;
};
