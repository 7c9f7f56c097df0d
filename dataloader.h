// Token shards streamed from disk. Two loaders:
//   TrainLoader   shuffled rows without end, the same sequence for any batch size and any number of ranks
//   ValLoader     the first tokens of the shards in file-name order, the same rows for any batch size
//
// A batch has B rows of T tokens. There are three ways to fill them:
//   stream        a row is a window of T tokens, wherever documents begin and end in it
//   documents     a row is one document, cut to T tokens or padded. A document starts with the document token (the
//                 end-of-text token) and goes on to the next one, which is its last target: there the model learns to
//                 stop. Padding has no target. A document without a token of its own is left out; so is what stands
//                 before a shard's first document token, the rest of a document that began in another shard.
//   packed        a row is one or more documents of a shard, each cut to T tokens, then padding. Which ones share a row
//                 does not change from epoch to epoch.
//
// Where shards have targets beside them, their documents are conversations, which their targets tell apart. Then
// targets of training are the tokens of answers alone, if not told otherwise, and what follows the last one is left out
// of the row. A conversation whose first T tokens predict no token of an answer has no row.
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
#include <map>
#include <memory_resource>
#include <mutex>
#include <numeric>
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
    std::pmr::vector<int32_t> inputs;     // (B, T)
    std::pmr::vector<int32_t> targets;    // (B, T) the token after each input; -1 is not counted
    std::pmr::vector<int32_t> positions;  // (B, T) of packed rows: of each input in its document; of padding, 0
};

constexpr int32_t no_document_token = -1;  // rows are a stream

// How rows are filled.
struct RowFormat {
    enum Rows { stream, documents, packed } rows;
    int32_t document_token;        // starts each document; of conversations not needed
    bool train_on_prompt = false;  // all of a conversation is targets

    RowFormat(int32_t document_token = no_document_token)
        : RowFormat(document_token == no_document_token ? stream : documents, document_token) {}
    RowFormat(Rows rows, int32_t document_token, bool train_on_prompt = false)
        : rows(rows), document_token(document_token), train_on_prompt(train_on_prompt) {}
    bool has_documents() const { return rows != stream; }
    bool is_packed() const { return rows == packed; }
};

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
    std::optional<uint32_t> crc32;   // of its tokens, where it is recorded
    std::optional<Targets> targets;  // of conversations
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
    Shard shard{read_shard_header(file), path, status.st_dev, status.st_ino, recorded_crc32(path), {}};
    if (shard.tokens == 0) fail(path, "the shard holds no tokens");
    shard.targets = read_targets(path, shard.tokens);
    if (shard.targets) {
        if (shard.crc32.value_or(shard.targets->tokens_crc32) != shard.targets->tokens_crc32)
            fail(targets_path(path), "belongs to another shard than " + path + "; encode the conversations again");
        shard.crc32 = shard.targets->tokens_crc32;
    }
    return shard;
}

inline std::vector<Shard> open_shards(const std::string& glob, const std::string& flag) {
    std::vector<Shard> shards;
    for (const std::string& path : find_shards(glob, flag)) {
        shards.push_back(open_shard(path));
        if (shards.back().targets.has_value() == shards[0].targets.has_value()) continue;
        const Shard &bare = shards[0].targets ? shards.back() : shards[0],
                    &other = shards[0].targets ? shards[0] : shards.back();
        fail(targets_path(bare.path), "missing, while " + other.path +
                                          " has its targets beside it: name shards of conversations alone, or of "
                                          "documents alone");
    }
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
            fail(shard_->path, std::string("damaged: the checksum of its tokens is not that in the ") +
                                   (shard_->targets ? "targets" : "shards.json") +
                                   " beside it; copy it again, or encode the text again");
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

// The documents of a shard, and the rows that they make.
struct DocumentRows {
    struct Document {
        uint32_t begin;
        uint32_t inputs;       // tokens it fills in a row
        uint32_t answers = 0;  // the first of Targets::answers that is its own
    };
    std::vector<Document> documents;
    std::vector<uint32_t> row_begins, row_documents;  // packed: row r is documents row_documents[row_begins[r] ...
    int64_t cut = 0;                                  // documents of more than T tokens
    int64_t left_out = 0;                             // conversations without a target in T tokens

    int64_t rows(bool packed) const {
        return packed ? (int64_t)row_begins.size() - 1 : static_cast<int64_t>(documents.size());
    }
};

// A document reaches to the next one, at most: a stray document token may end it before.
inline DocumentRows rows_of_documents(const std::vector<uint32_t>& starts, int64_t tokens, int64_t T) {
    DocumentRows rows;
    for (size_t i = 0; i < starts.size(); i++) {
        const int64_t length = i + 1 < starts.size() ? starts[i + 1] - starts[i] : tokens - starts[i] - 1;
        rows.documents.push_back({starts[i], static_cast<uint32_t>(std::min(length, T))});
        rows.cut += length > T;
    }
    return rows;
}

// Conversations that begin before `limit`.
inline DocumentRows rows_of_conversations(const std::vector<Answer>& answers, int64_t tokens, int64_t T,
                                          bool train_on_prompt, int64_t limit) {
    DocumentRows rows;
    for (size_t i = 0, end; i < answers.size() && answers[i].conversation < limit; i = end) {
        const int64_t begin = answers[i].conversation;
        for (end = i + 1; end < answers.size() && answers[end].conversation == begin;) end++;
        const int64_t next = end < answers.size() ? answers[end].conversation : tokens;
        const int64_t inputs = (train_on_prompt ? next : answers[end - 1].end) - begin - 1;
        if (!train_on_prompt && answers[i].begin - begin > T) {
            rows.left_out++;
            continue;
        }
        rows.cut += inputs > T;
        rows.documents.push_back(
            {static_cast<uint32_t>(begin), static_cast<uint32_t>(std::min(inputs, T)), static_cast<uint32_t>(i)});
    }
    return rows;
}

// Puts the longest first, each into the row that it fills best (best fit decreasing): within a few percent of the
// fewest rows.
inline void pack(DocumentRows& rows, int64_t T) {
    std::vector<uint32_t> by_length(rows.documents.size());
    std::iota(by_length.begin(), by_length.end(), 0);
    std::stable_sort(by_length.begin(), by_length.end(),
                     [&](uint32_t a, uint32_t b) { return rows.documents[a].inputs > rows.documents[b].inputs; });
    std::vector<std::vector<uint32_t>> packed;           // rows
    std::map<int64_t, std::vector<uint32_t>> with_room;  // rows by the tokens that they have room for
    for (const uint32_t document : by_length) {
        const int64_t length = rows.documents[document].inputs;
        const auto best = with_room.lower_bound(length);
        int64_t room = T;
        uint32_t row = static_cast<uint32_t>(packed.size());
        if (best == with_room.end()) {
            packed.emplace_back();
        } else {
            room = best->first, row = best->second.back();
            best->second.pop_back();
            if (best->second.empty()) with_room.erase(best);
        }
        packed[row].push_back(document);
        if (room > length) with_room[room - length].push_back(row);
    }
    rows.row_begins = {0};
    for (const std::vector<uint32_t>& documents : packed) {
        rows.row_documents.insert(rows.row_documents.end(), documents.begin(), documents.end());
        rows.row_begins.push_back(static_cast<uint32_t>(rows.row_documents.size()));
    }
}

// A document's tokens and targets; returns how many.
inline int64_t read_document(Reader& reader, const Shard& shard, const DocumentRows::Document& document,
                             const RowFormat& format, int32_t* inputs, int32_t* targets) {
    const int64_t begin = document.begin;
    std::vector<int32_t> tokens(std::min<int64_t>(document.inputs + 1, shard.tokens - begin));
    reader.read(shard, begin, static_cast<int64_t>(tokens.size()), tokens.data());
    int64_t n = static_cast<int64_t>(tokens.size()) - 1;
    if (!shard.targets)
        n = std::min<int64_t>(n, std::find(tokens.begin() + 1, tokens.end(), format.document_token) - tokens.begin());
    std::copy_n(tokens.begin(), n, inputs);
    std::copy_n(tokens.begin() + 1, n, targets);
    if (!shard.targets || format.train_on_prompt) return n;
    std::fill_n(targets, n, -1);
    const std::vector<Answer>& answers = shard.targets->answers;
    for (size_t i = document.answers; i < answers.size() && answers[i].conversation == begin; i++) {
        for (int64_t at = answers[i].begin - begin; at < answers[i].end - begin && at <= n; at++)
            targets[at - 1] = tokens[at];
    }
    return n;
}

// Row `row`: inputs and targets (T), and positions (T) where rows are packed. Padding is the document token, of
// conversations 0, without target.
inline void read_row(Reader& reader, const Shard& shard, const DocumentRows& rows, int64_t row, int64_t T,
                     const RowFormat& format, int32_t* inputs, int32_t* targets, int32_t* positions) {
    std::fill_n(inputs, T, shard.targets ? 0 : format.document_token);
    std::fill_n(targets, T, -1);
    if (!format.is_packed()) {
        read_document(reader, shard, rows.documents[row], format, inputs, targets);
        return;
    }
    std::fill_n(positions, T, 0);
    int64_t at = 0;
    for (uint32_t i = rows.row_begins[row]; i < rows.row_begins[row + 1]; i++) {
        const auto& document = rows.documents[rows.row_documents[i]];
        const int64_t n = read_document(reader, shard, document, format, inputs + at, targets + at);
        std::iota(positions + at, positions + at + n, 0);
        at += n;
    }
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
// shards are read once at the start, for conversations their targets; where they are stays in memory, 12 bytes each.
class TrainLoader {
  public:
    // A batch stays as it is until the kept-th next() after the one that returned it, so that a device may still be
    // copying from it.
    static constexpr int kept = 4;

    // The batches lie in `memory`.
    TrainLoader(const std::string& glob, int B, int T, int rank, int ranks, uint64_t seed, int vocab_size,
                RowFormat format = {}, std::pmr::memory_resource* memory = std::pmr::get_default_resource())
        : B_(B),
          T_(T),
          rank_(rank),
          ranks_(ranks),
          format_(format),
          shards_(shard_io::open_shards(glob, "--train")),
          tokens_(count_tokens(shards_)),
          reader_(vocab_size),
          order_(drop_shards_without_rows(glob, vocab_size), seed),
          window_(T + 1),
          ring_(make_ring(static_cast<size_t>(B) * T, format.is_packed(), memory)) {
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

    // Where rows are documents or conversations: how many have a row, how many of them are cut, and how many have none.
    int64_t documents() const {
        return sum([](const auto& rows) { return (int64_t)rows.documents.size(); });
    }
    int64_t cut() const {
        return sum([](const auto& rows) { return rows.cut; });
    }
    int64_t left_out() const { return left_out_; }
    bool conversations() const { return shards_[0].targets.has_value(); }

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

    static std::vector<Batch> make_ring(size_t size, bool packed, std::pmr::memory_resource* memory) {
        std::vector<Batch> ring;
        for (int i = 0; i < 4 * kept; i++) {
            ring.push_back({std::pmr::vector<int32_t>(size, memory), std::pmr::vector<int32_t>(size, memory),
                            std::pmr::vector<int32_t>(packed ? size : 0, memory)});
        }
        return ring;
    }

    template <class Count>
    int64_t sum(Count count) const {
        int64_t sum = 0;
        for (const shard_io::DocumentRows& rows : documents_) sum += count(rows);
        return sum;
    }

    // Leaves the shards that have a row, and returns the number of rows of each.
    std::vector<int64_t> drop_shards_without_rows(const std::string& glob, int vocab_size) {
        std::vector<Shard> shards = std::exchange(shards_, {});
        const bool has_documents = format_.has_documents(), conversations = has_documents && shards[0].targets;
        std::vector<std::vector<uint32_t>> starts;
        if (has_documents && !conversations)
            starts = shard_io::find_documents(shards, format_.document_token, vocab_size);
        std::vector<int64_t> rows;
        for (size_t s = 0; s < shards.size(); s++) {
            shard_io::DocumentRows documents;
            if (conversations) {
                documents = shard_io::rows_of_conversations(shards[s].targets->answers, shards[s].tokens, T_,
                                                            format_.train_on_prompt, shards[s].tokens);
            } else if (has_documents) {
                documents = shard_io::rows_of_documents(starts[s], shards[s].tokens, T_);
            }
            if (format_.is_packed()) shard_io::pack(documents, T_);
            left_out_ += documents.left_out;
            const int64_t n = has_documents ? documents.rows(format_.is_packed()) : (shards[s].tokens - 1) / T_;
            if (n == 0) continue;
            rows.push_back(n);
            shards_.push_back(std::move(shards[s]));
            if (has_documents) documents_.push_back(std::move(documents));
        }
        if (!rows.empty()) return rows;
        if (conversations) {
            fail(glob + ": none of " + std::to_string(left_out_) + " conversations has an answer in its first " +
                 std::to_string(T_ + 1) + " tokens: raise --seq-len");
        }
        if (has_documents) {
            fail(glob + ": no document: none of " + std::to_string(tokens_) + " tokens is " +
                 std::to_string(format_.document_token) +
                 ", which should start each: set --eot-token to the one that does");
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
            read_row(place, batch, b * T_);
        }
        return true;
    }

    // To where `at` is in the batch.
    void read_row(const RowOrder::Place& place, Batch& batch, int64_t at) {
        const Shard& shard = shards_[place.shard];
        int32_t *inputs = batch.inputs.data() + at, *targets = batch.targets.data() + at;
        if (format_.has_documents()) {
            shard_io::read_row(reader_, shard, documents_[place.shard], place.row, T_, format_, inputs, targets,
                               format_.is_packed() ? batch.positions.data() + at : nullptr);
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
    RowFormat format_;
    std::vector<Shard> shards_;
    int64_t tokens_;
    std::vector<shard_io::DocumentRows> documents_;  // of each shard
    int64_t left_out_ = 0;
    int64_t start_ = 0;  // the global row at which read_ and taken_ began to count

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
// rows are documents, in their order or packed. After the last row targets are -1.
class ValLoader {
  public:
    // Predicts the first max_tokens tokens, or the documents that begin among them; 0 for all.
    ValLoader(const std::string& glob, int B, int T, int64_t max_tokens, int vocab_size, RowFormat format = {})
        : B_(B), T_(T), vocab_size_(vocab_size), format_(format), shards_(shard_io::open_shards(glob, "--val")) {
        int64_t tokens = 0;
        for (const Shard& shard : shards_) tokens += shard.tokens;
        if (tokens < 2) fail(glob + ": one token alone predicts nothing: add validation data");
        predicted_ = max_tokens > 0 ? std::min(max_tokens, tokens - 1) : tokens - 1;
        int64_t first = 0;  // the place of the shard's first token among all
        for (const Shard& shard : shards_) {
            if (first <= predicted_) shard_io::Ahead(shard).finish();
            first += shard.tokens;
        }
        if (format_.has_documents()) find_documents(glob, max_tokens > 0 ? max_tokens : tokens);
    }

    int64_t batches() const {
        const int64_t rows = format_.has_documents() ? rows_ : (predicted_ + T_ - 1) / T_;
        return (rows + B_ - 1) / B_;
    }
    int64_t predicted_tokens() const { return predicted_; }
    const std::vector<Shard>& shards() const { return shards_; }
    bool conversations() const { return shards_[0].targets.has_value(); }

    // Any batch, in any order. A batch past the last one counts no target: ranks may run in step to the end.
    void read(int64_t batch, Batch& out) const {
        out.inputs.assign(B_ * T_, 0);
        out.targets.assign(B_ * T_, -1);
        out.positions.assign(format_.is_packed() ? B_ * T_ : 0, 0);
        shard_io::Reader reader(vocab_size_);
        if (format_.has_documents()) read_documents(reader, batch * B_, out);
        else read_stream(reader, batch * B_ * T_, out);
    }

  private:
    // Those that begin among the first `tokens` tokens.
    void find_documents(const std::string& glob, int64_t tokens) {
        shard_io::Reader reader(vocab_size_);
        for (size_t s = 0; s < shards_.size() && tokens > 0; tokens -= shards_[s++].tokens) {
            const Shard& shard = shards_[s];
            documents_.push_back(
                shard.targets
                    ? shard_io::rows_of_conversations(shard.targets->answers, shard.tokens, T_, format_.train_on_prompt,
                                                      tokens)
                    : shard_io::rows_of_documents(
                          shard_io::find_documents(reader, shard, format_.document_token, tokens), shard.tokens, T_));
            if (format_.is_packed()) shard_io::pack(documents_.back(), T_);
            rows_ += documents_.back().rows(format_.is_packed());
        }
        if (rows_ == 0 && conversations()) {
            fail(glob + ": no conversation to validate on has an answer in its first " + std::to_string(T_ + 1) +
                 " tokens: raise --seq-len or --eval-tokens");
        }
        if (rows_ == 0) {
            fail(glob + ": no document begins with token " + std::to_string(format_.document_token) +
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
        const int64_t end = std::min(first + B_, rows_);
        int64_t begin = 0;  // the shard's first row among all
        for (size_t s = 0; s < documents_.size(); begin += documents_[s++].rows(format_.is_packed())) {
            const int64_t behind = std::min(end, begin + documents_[s].rows(format_.is_packed()));
            for (int64_t row = std::max(first, begin); row < behind; row++) {
                const int64_t at = (row - first) * T_;
                shard_io::read_row(reader, shards_[s], documents_[s], row - begin, T_, format_, &out.inputs[at],
                                   &out.targets[at], format_.is_packed() ? &out.positions[at] : nullptr);
            }
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
    RowFormat format_;
    std::vector<Shard> shards_;
    int64_t predicted_ = 0;
    std::vector<shard_io::DocumentRows> documents_;  // of each shard
    int64_t rows_ = 0;                               // of all
};
