// Token shards streamed from disk. Two loaders:
//   TrainLoader   shuffled rows without end, the same sequence for any batch size and any number of ranks
//   ValLoader     the first tokens of the shards in file-name order, the same rows for any batch size
//
// A batch has B rows of T tokens. There are two ways to fill them:
//   stream        a row is a window of T tokens, wherever documents begin and end in it
//   documents     a row is one document, cut to T tokens or padded. A document starts with the document token (the
//                 end-of-text token) and goes on to the next one, which is its last target: there the model learns to
//                 stop. Padding has no target. A document without a token of its own is left out; so is what stands
//                 before a shard's first document token, the rest of a document that began in another shard.
//
// A shard is a file of llm.c: see tokenizer/shard_file.h. Where a shards.json beside it records the checksum of its
// tokens, no row of a shard is handed out before all of it has been checked. Errors are std::runtime_error, one line
// that names the file.
#pragma once

#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory_resource>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <stop_token>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tokenizer/shard_file.h"
#include "trainer/files.h"
#include "trainer/random.h"

struct Batch {
    std::pmr::vector<int32_t> inputs;   // (B, T)
    std::pmr::vector<int32_t> targets;  // (B, T) the token after each input; -1 is not counted
};

constexpr int32_t no_document_token = -1;  // rows are a stream

// ---------------------------------------------------------------------------------------------------------------------
// Shards

// The files that match, in the order of their names. `flag` is for the message.
inline std::vector<std::string> find_shards(const std::string& glob, const std::string& flag = "--train") {
    const std::vector<std::string> paths = find_paths(glob);
    if (paths.empty()) fail("no shards match " + glob + ": run `make data` (or " + flag + " GLOB)");
    for (const std::string& path : paths) {
        std::error_code ignored;
        if (!std::filesystem::is_directory(path, ignored)) continue;
        const std::string in_it = path + (path.ends_with('/') ? "" : "/") + (flag == "--val" ? "val" : "train");
        fail(path, "a folder, where shards are expected: name them, as in " + flag + " '" + in_it + "_*.bin'");
    }
    return paths;
}

struct Shard : ShardHeader {
    std::string path;
    dev_t device;  // with inode: which file it is, whatever it is called
    ino_t inode;
    std::optional<uint32_t> crc32;  // of its tokens, where it is recorded
};

// Validation files must not be trained on, by whatever path or link they are reached.
inline void check_apart(const std::vector<Shard>& train, const std::vector<Shard>& val) {
    for (const Shard& v : val) {
        for (const Shard& t : train) {
            if (v.device != t.device || v.inode != t.inode) continue;
            const std::string same = t.path == v.path ? "" : " (the same file as " + t.path + ")";
            fail(v.path + same +
                 " is among the training and the validation shards: change --train or --val, or the loss says nothing "
                 "about unseen text");
        }
    }
}

namespace shard_io {

// What to do about a shard that cannot be opened any more.
constexpr const char* vanished = "it was there at the start: put it back, and go on with --resume";

inline Shard open_shard(const std::string& path) {
    const File file = open_shard_file(path);
    const struct stat status = file.status();
    const Shard shard{read_shard_header(file), path, status.st_dev, status.st_ino, recorded_crc32(path)};
    if (shard.tokens == 0) fail(path, "the shard holds no tokens");
    return shard;
}

inline std::vector<Shard> open_shards(const std::string& glob, const std::string& flag) {
    std::vector<Shard> shards;
    for (const std::string& path : find_shards(glob, flag)) shards.push_back(open_shard(path));
    return shards;
}

// Fetches a shard from disk ahead of its use, a bit at a time, and tells whether it is whole.
class Ahead {
  public:
    Ahead() = default;
    explicit Ahead(const Shard& shard) : shard_(&shard), file_(open_shard_file(shard.path, vanished)) {}

    // Asks the system for the first `bytes` of the file, and checks what it was asked for so long ago that it is there.
    void fetch(int64_t bytes) {
        constexpr int64_t on_its_way = 16 << 20;
        check(fetched_ - on_its_way);
        file_.prefetch(fetched_, bytes - fetched_);
        fetched_ = bytes;
    }
    int64_t fetched() const { return fetched_; }

    // Throws if the tokens are not those that were recorded.
    void finish() {
        check(shard_->file_bytes());
        if (shard_->crc32.value_or(crc_) != crc_) {
            fail(shard_->path,
                 "damaged: the checksum of its tokens is not that in the shards.json beside it; copy it "
                 "again, or encode the text again");
        }
    }

  private:
    void check(int64_t end) {
        if (!shard_->crc32) return;
        char piece[1 << 16];
        while (checked_ < end) {
            const int64_t bytes = std::min<int64_t>(end - checked_, sizeof piece);
            file_.read(checked_, bytes, piece);
            crc_ = crc32_of(crc_, piece, bytes);
            checked_ += bytes;
        }
    }

    const Shard* shard_ = nullptr;
    File file_;
    int64_t fetched_ = 0, checked_ = Shard::bytes;
    uint32_t crc_ = 0;
};

// Reads stretches of tokens. Keeps one file open only: a data set can have more shards than a process may have files.
class Reader {
  public:
    explicit Reader(int vocab_size) : vocab_size_(vocab_size) {}

    // Tokens position .. position + count - 1 of the shard.
    void read(const Shard& shard, int64_t position, int64_t count, int32_t* out) {
        if (file_.path() != shard.path) file_ = open_shard_file(shard.path, vanished);
        const int64_t offset = Shard::bytes + position * shard.token_bytes;
        if (shard.token_bytes == 4) {
            file_.read(offset, count * 4, out);
        } else {
            narrow_.resize(count);
            file_.read(offset, count * 2, narrow_.data());
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
        fail(file_.path(), "token " + std::to_string(static_cast<uint32_t>(tokens[bad])) + " at position " +
                               std::to_string(position + bad) + " is outside the vocabulary of " +
                               std::to_string(vocab_size_) +
                               ": set --vocab or --tokenizer to what the shards were made with, or make them again");
    }

    int vocab_size_;
    File file_;
    std::vector<uint16_t> narrow_;
};

// ---------------------------------------------------------------------------------------------------------------------
// Documents

// Where the documents start that begin among the first `end` tokens of a shard.
inline std::vector<uint32_t> find_documents(Reader& reader, const Shard& shard, int32_t document_token, int64_t end) {
    constexpr int64_t piece = 1 << 18;
    std::vector<uint32_t> starts;
    std::vector<int32_t> tokens(piece);
    const int64_t read = std::min(end + 1, shard.tokens);  // one more: a document is known by its second token
    bool may_start = false;                                // the token before was a document token
    for (int64_t position = 0; position < read; position += piece) {
        const int64_t n = std::min(piece, read - position);
        reader.read(shard, position, n, tokens.data());
        for (int64_t i = 0; i < n; i++) {
            const bool is_start = tokens[i] == document_token;
            if (may_start && !is_start) starts.push_back(static_cast<uint32_t>(position + i - 1));
            may_start = is_start;
        }
    }
    return starts;
}

// The documents of whole shards, several shards at a time.
inline std::vector<std::vector<uint32_t>> find_documents(const std::vector<Shard>& shards, int32_t document_token,
                                                         int vocab_size) {
    std::vector<std::vector<uint32_t>> starts(shards.size());
    std::vector<std::exception_ptr> errors(shards.size());
    std::atomic<size_t> next = 0;
    const auto work = [&] {
        Reader reader(vocab_size);
        for (size_t s; (s = next++) < shards.size();) {
            try {
                starts[s] = find_documents(reader, shards[s], document_token, shards[s].tokens);
            } catch (...) {
                errors[s] = std::current_exception();
            }
        }
    };
    {
        const size_t threads = std::min<size_t>(shards.size(), std::clamp(std::thread::hardware_concurrency(), 1u, 8u));
        std::vector<std::jthread> pool;
        for (size_t i = 0; i < threads; i++) pool.emplace_back(work);
    }
    for (const std::exception_ptr& error : errors) {
        if (error) std::rethrow_exception(error);
    }
    return starts;
}

// The row of the document that starts at `start`: inputs and targets (T). Padding is the document token, without
// target.
inline void read_document(Reader& reader, const Shard& shard, int64_t start, int64_t T, int32_t document_token,
                          int32_t* inputs, int32_t* targets) {
    std::vector<int32_t> tokens(std::min(T + 1, shard.tokens - start));
    reader.read(shard, start, static_cast<int64_t>(tokens.size()), tokens.data());
    const auto next = std::find(tokens.begin() + 1, tokens.end(), document_token);
    const int64_t n = std::min<int64_t>(next - tokens.begin(), static_cast<int64_t>(tokens.size()) - 1);
    std::fill(std::copy_n(tokens.begin(), n, inputs), inputs + T, document_token);
    std::fill(std::copy_n(tokens.begin() + 1, n, targets), targets + T, -1);
}

}  // namespace shard_io

// ---------------------------------------------------------------------------------------------------------------------
// The order of the training rows

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

// The global sequence of rows g = 0, 1, 2, ...: each epoch permutes the shards, and the rows within each shard.
class RowOrder {
  public:
    struct Place {
        int shard;
        int64_t row;
        int64_t used;    // rows of the shard that came before in this epoch
        int next_shard;  // the one that comes after this one
    };

    // rows[s]: the number of rows in shard s, at least 1.
    RowOrder(std::vector<int64_t> rows, uint64_t seed) : rows_(std::move(rows)), seed_(seed) {
        for (int64_t n : rows_) epoch_rows_ += n;
    }

    int64_t epoch_rows() const { return epoch_rows_; }
    int64_t shard_rows(int shard) const { return rows_[shard]; }

    Place operator()(int64_t g) {
        if (g / epoch_rows_ != epoch_) start_epoch(g / epoch_rows_);
        g %= epoch_rows_;
        const size_t k = std::upper_bound(first_.begin(), first_.end(), g) - first_.begin() - 1;
        const int shard = order_[k];
        const Permutation permutation{static_cast<uint64_t>(rows_[shard]), hash64(epoch_key_, shard + 1)};
        const int64_t used = g - first_[k];
        const int next_shard = k + 1 < order_.size() ? order_[k + 1] : shard_at(epoch_ + 1, 0);
        return {shard, static_cast<int64_t>(permutation(used)), used, next_shard};
    }

  private:
    int shard_at(int64_t epoch, size_t k) const {
        return static_cast<int>(Permutation{rows_.size(), hash64(hash64(seed_, epoch), 0)}(k));
    }

    void start_epoch(int64_t epoch) {
        epoch_ = epoch;
        epoch_key_ = hash64(seed_, epoch);
        order_.clear();
        first_.clear();
        int64_t first = 0;
        for (size_t k = 0; k < rows_.size(); k++) {
            order_.push_back(shard_at(epoch, k));
            first_.push_back(first);
            first += rows_[order_[k]];
        }
    }

    std::vector<int64_t> rows_;
    uint64_t seed_;
    int64_t epoch_rows_ = 0;
    int64_t epoch_ = -1;
    uint64_t epoch_key_ = 0;
    std::vector<int> order_;      // the k-th shard of this epoch
    std::vector<int64_t> first_;  // the place of its first row in the epoch
};

// ---------------------------------------------------------------------------------------------------------------------
// Training data

// Row i of a shard is its window with inputs iT .. iT+T-1 and targets iT+1 .. iT+T, the partial window at its end being
// dropped; or its i-th document. Micro-batch m of a rank takes the rows (m * ranks + rank) * B .. + B-1 of the global
// sequence: one micro-batch of all ranks is a contiguous piece of it, whatever B and ranks are.
//
// A thread reads ahead into a fixed number of batches, so that next() seldom waits. Rows come from random places of a
// shard, and a disk gives its full rate only in sequence: so the thread has the system fetch a shard whole before it
// reads from it, a bit at a time while the shard before is being used up, and checks it on the way. For documents all
// shards are read once at the start; their starts stay in memory, 4 bytes each.
class TrainLoader {
  public:
    // A batch stays as it is until the kept-th next() after the one that returned it, so that a device may still be
    // copying from it.
    static constexpr int kept = 4;

    // document_token: each row is a document. The batches lie in `memory`.
    TrainLoader(const std::string& glob, int B, int T, int rank, int ranks, uint64_t seed, int vocab_size,
                int32_t document_token = no_document_token,
                std::pmr::memory_resource* memory = std::pmr::get_default_resource())
        : B_(B),
          T_(T),
          rank_(rank),
          ranks_(ranks),
          document_token_(document_token),
          shards_(shard_io::open_shards(glob, "--train")),
          tokens_(count_tokens(shards_)),
          reader_(vocab_size),
          order_(drop_shards_without_rows(glob, vocab_size), seed),
          window_(T + 1),
          ring_(make_ring(static_cast<size_t>(B) * T, memory)) {
        // What the shards were made with another vocabulary for shows at once; the rest is checked as it is read.
        for (const Shard& shard : shards_) {
            std::vector<int32_t> sample(std::min<int64_t>(shard.tokens, 1024));
            reader_.read(shard, 0, static_cast<int64_t>(sample.size()), sample.data());
        }
    }

    // This rank's next micro-batch. Throws what the reading thread met.
    const Batch& next() {
        if (!thread_.joinable()) start();
        std::unique_lock lock(mutex_);
        const auto ready = [this] { return read_ > taken_ || error_; };
        if (!ready()) {
            const auto began = std::chrono::steady_clock::now();
            filled_.wait(lock, ready);
            waited_ += std::chrono::steady_clock::now() - began;
        }
        if (read_ == taken_) std::rethrow_exception(error_);
        const Batch& batch = ring_[taken_++ % ring_.size()];
        freed_.notify_one();
        return batch;
    }

    // What next() has waited for the disk, in milliseconds, all calls together. Exactly 0 if all batches were ready.
    double waited_ms() const { return std::chrono::duration<double, std::milli>(waited_).count(); }

    const std::vector<Shard>& shards() const { return shards_; }  // those that have a row
    int64_t tokens() const { return tokens_; }                    // in all shards
    int64_t rows() const { return order_.epoch_rows(); }          // in an epoch, over all ranks

    // Rows that all ranks together have consumed since training started. Seeking there resumes exactly, on any number
    // of ranks.
    int64_t position() const { return start_ + taken_ * B_ * ranks_; }

    // Reading begins at once.
    void seek(int64_t row) {
        if (row < 0) fail("data position " + std::to_string(row) + " is negative");
        thread_ = {};  // stops and joins
        start_ = row;
        read_ = taken_ = 0;
        error_ = nullptr;
        shard_ = next_shard_ = -1;
        start();
    }

  private:
    static int64_t count_tokens(const std::vector<Shard>& shards) {
        int64_t tokens = 0;
        for (const Shard& shard : shards) tokens += shard.tokens;
        return tokens;
    }

    static std::vector<Batch> make_ring(size_t size, std::pmr::memory_resource* memory) {
        std::vector<Batch> ring;
        for (int i = 0; i < 4 * kept; i++)
            ring.push_back({std::pmr::vector<int32_t>(size, memory), std::pmr::vector<int32_t>(size, memory)});
        return ring;
    }

    // Leaves the shards that have a row, and returns the number of rows of each.
    std::vector<int64_t> drop_shards_without_rows(const std::string& glob, int vocab_size) {
        const bool documents = document_token_ != no_document_token;
        const std::vector<Shard> shards = std::exchange(shards_, {});
        std::vector<std::vector<uint32_t>> starts;
        if (documents) starts = shard_io::find_documents(shards, document_token_, vocab_size);
        std::vector<int64_t> rows;
        for (size_t s = 0; s < shards.size(); s++) {
            const int64_t n = documents ? static_cast<int64_t>(starts[s].size()) : (shards[s].tokens - 1) / T_;
            if (n == 0) continue;
            rows.push_back(n);
            shards_.push_back(shards[s]);
            if (documents) documents_.push_back(std::move(starts[s]));
        }
        if (!rows.empty()) return rows;
        if (documents) {
            fail(glob + ": no document: none of " + std::to_string(tokens_) + " tokens is " +
                 std::to_string(document_token_) + ", which should start each: set --eot-token to the one that does");
        }
        fail(glob + ": no shard has the " + std::to_string(T_ + 1) + " tokens that a sequence of " +
             std::to_string(T_) + " needs: lower --seq-len or add data");
    }

    void start() {
        thread_ = std::jthread([this](const std::stop_token& stop) { read_ahead(stop); });
    }

    void read_ahead(const std::stop_token& stop) try {
        for (int64_t m = 0;; m++) {
            {
                std::unique_lock lock(mutex_);
                const auto has_room = [&] { return m - taken_ + kept < static_cast<int64_t>(ring_.size()); };
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

    // Rows first .. first + B-1 of the global sequence; false when told to stop.
    bool fill(int64_t first, Batch& batch, const std::stop_token& stop) {
        for (int64_t b = 0; b < B_; b++) {
            if (stop.stop_requested()) return false;
            const RowOrder::Place place = order_(first + b);
            fetch_ahead(place);
            read_row(place, batch.inputs.data() + b * T_, batch.targets.data() + b * T_);
        }
        return true;
    }

    void read_row(const RowOrder::Place& place, int32_t* inputs, int32_t* targets) {
        const Shard& shard = shards_[place.shard];
        if (document_token_ != no_document_token) {
            const int64_t start = documents_[place.shard][place.row];
            shard_io::read_document(reader_, shard, start, T_, document_token_, inputs, targets);
        } else {
            reader_.read(shard, place.row * T_, T_ + 1, window_.data());
            std::copy_n(window_.begin(), T_, inputs);
            std::copy_n(window_.begin() + 1, T_, targets);
        }
    }

    // Keeps the share of the next shard that has been fetched equal to the share of this one that is used up.
    void fetch_ahead(const RowOrder::Place& place) {
        constexpr int64_t step = 1 << 20, largest = 1 << 30;  // bytes
        if (place.shard != shard_) {
            const Shard& shard = shards_[place.shard];
            if (place.shard != next_shard_) {  // at the start there was no shard before
                ahead_ = shard_io::Ahead(shard);
                // A huge one would take too long, and more memory than there is.
                if (shard.file_bytes() <= largest) ahead_.fetch(shard.file_bytes());
            }
            ahead_.finish();
            shard_ = place.shard;
            next_shard_ = place.next_shard;
            ahead_ = shard_io::Ahead(shards_[next_shard_]);
        }
        const double share = static_cast<double>(place.used + 1) / static_cast<double>(order_.shard_rows(shard_));
        const int64_t size = shards_[next_shard_].file_bytes();
        const int64_t due = std::min(size, static_cast<int64_t>(share * static_cast<double>(size)) + step);
        if (ahead_.fetched() == size || (due < size && due < ahead_.fetched() + step)) return;
        ahead_.fetch(due);
    }

    // Constant after construction, but for start_, which changes only while no thread runs.
    int64_t B_, T_, rank_, ranks_;
    int32_t document_token_;
    std::vector<Shard> shards_;
    int64_t tokens_;
    std::vector<std::vector<uint32_t>> documents_;  // where each shard's documents start
    int64_t start_ = 0;                             // the global row at which read_ and taken_ began to count

    // The thread's own.
    shard_io::Reader reader_;
    RowOrder order_;
    std::vector<int32_t> window_;       // (T + 1)
    int shard_ = -1, next_shard_ = -1;  // the one being read, and the one being fetched
    shard_io::Ahead ahead_;

    // Shared, under mutex_; the batches themselves belong to the thread until they are counted in read_.
    std::mutex mutex_;
    std::condition_variable_any filled_, freed_;
    std::vector<Batch> ring_;
    int64_t read_ = 0, taken_ = 0;  // micro-batches
    std::exception_ptr error_;
    std::chrono::steady_clock::duration waited_{};

    std::jthread thread_;  // last, so that it ends before what it uses
};

// ---------------------------------------------------------------------------------------------------------------------
// Validation data

// A fixed set of rows, whatever the batch size. The shards in file-name order are one stream. Window i of it predicts
// tokens iT+1 .. iT+T from iT .. iT+T-1; the windows join without overlap, so a batch is one stretch of the stream. Or
// row i is the i-th document. After the last row targets are -1.
class ValLoader {
  public:
    // Predicts the first max_tokens tokens, or the documents that begin among them; 0 for all.
    ValLoader(const std::string& glob, int B, int T, int64_t max_tokens, int vocab_size,
              int32_t document_token = no_document_token)
        : B_(B),
          T_(T),
          vocab_size_(vocab_size),
          document_token_(document_token),
          shards_(shard_io::open_shards(glob, "--val")) {
        int64_t tokens = 0;
        for (const Shard& shard : shards_) tokens += shard.tokens;
        if (tokens < 2) fail(glob + ": one token alone predicts nothing: add validation data");
        predicted_ = max_tokens > 0 ? std::min(max_tokens, tokens - 1) : tokens - 1;
        int64_t first = 0;  // the place of the shard's first token among all
        for (const Shard& shard : shards_) {
            if (first <= predicted_) shard_io::Ahead(shard).finish();
            first += shard.tokens;
        }
        if (document_token != no_document_token) find_documents(glob, max_tokens > 0 ? max_tokens : tokens);
    }

    int64_t batches() const {
        const int64_t rows =
            document_token_ == no_document_token ? (predicted_ + T_ - 1) / T_ : static_cast<int64_t>(documents_.size());
        return (rows + B_ - 1) / B_;
    }
    int64_t predicted_tokens() const { return predicted_; }
    const std::vector<Shard>& shards() const { return shards_; }

    // Any batch, in any order. A batch past the last one counts no target: ranks may run in step to the end.
    void read(int64_t batch, Batch& out) const {
        out.inputs.assign(B_ * T_, 0);
        out.targets.assign(B_ * T_, -1);
        shard_io::Reader reader(vocab_size_);
        if (document_token_ == no_document_token) read_stream(reader, batch * B_ * T_, out);
        else read_documents(reader, batch * B_, out);
    }

  private:
    struct Document {
        int shard;
        uint32_t start;
    };

    // Those that begin among the first `tokens` tokens.
    void find_documents(const std::string& glob, int64_t tokens) {
        shard_io::Reader reader(vocab_size_);
        for (size_t s = 0; s < shards_.size() && tokens > 0; tokens -= shards_[s++].tokens) {
            for (const uint32_t start : shard_io::find_documents(reader, shards_[s], document_token_, tokens))
                documents_.push_back({static_cast<int>(s), start});
        }
        if (documents_.empty()) {
            fail(glob + ": no document begins with token " + std::to_string(document_token_) +
                 " among the tokens to validate on: raise --eval-tokens, or set --eot-token to "
                 "the token that starts each");
        }
        predicted_ = 0;
        Batch batch;
        for (int64_t b = 0; b < batches(); b++) {
            read(b, batch);
            predicted_ += batch.targets.end() - batch.targets.begin() -
                          std::count(batch.targets.begin(), batch.targets.end(), -1);
        }
    }

    void read_documents(shard_io::Reader& reader, int64_t first, Batch& out) const {
        const int64_t rows = std::clamp<int64_t>(static_cast<int64_t>(documents_.size()) - first, 0, B_);
        for (int64_t b = 0; b < rows; b++) {
            const auto& [shard, start] = documents_[first + b];
            shard_io::read_document(reader, shards_[shard], start, T_, document_token_, &out.inputs[b * T_],
                                    &out.targets[b * T_]);
        }
    }

    void read_stream(shard_io::Reader& reader, int64_t start, Batch& out) const {
        const int64_t n = std::clamp<int64_t>(predicted_ - start, 0, B_ * T_);
        if (n == 0) return;
        std::vector<int32_t> stretch(n + 1);
        int64_t first = 0;  // the place of the shard's first token in the stream
        for (const Shard& shard : shards_) {
            const int64_t begin = std::max(start, first), end = std::min(start + n + 1, first + shard.tokens);
            if (begin < end) reader.read(shard, begin - first, end - begin, &stretch[begin - start]);
            first += shard.tokens;
        }
        std::copy_n(stretch.begin(), n, out.inputs.begin());
        std::copy_n(stretch.begin() + 1, n, out.targets.begin());
    }

    int64_t B_, T_;
    int vocab_size_;
    int32_t document_token_;
    std::vector<Shard> shards_;
    int64_t predicted_ = 0;
    std::vector<Document> documents_;
};
