// The command: trains a tokenizer on a corpus, encodes a corpus to token shards, decodes and counts shards.
//
//   1. Going through a corpus
//   2. tokenize train
//   3. What is validation text
//   4. tokenize encode
//   5. tokenize decode, tokenize stats
//   6. The command line
#include <omp.h>
#include <unistd.h>
#include <zlib.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <future>

#include "conversation.h"
#include "corpus.h"
#include "shard_file.h"
#include "shards.h"
#include "train_bpe.h"
#include "trainer/files.h"
#include "trainer/random.h"

namespace fs = std::filesystem;

// ---------------------------------------------------------------------------------------------------------------------
// 1. Going through a corpus

struct Batch {
    std::vector<Part> parts;
    size_t next_file;  // where the corpus goes on
    int64_t next_part;
    double progress;
};

static Batch read_batch(Corpus& corpus) {
    static const size_t batch_bytes = std::max<size_t>(8, omp_get_max_threads()) << 20;
    Batch batch;
    size_t bytes = 0;
    for (Part part; bytes < batch_bytes && corpus.next(part); batch.parts.push_back(std::move(part))) {
        bytes += part.text.size() + sizeof(Part);
    }
    batch.next_file = corpus.file;
    batch.next_part = corpus.part;
    batch.progress = corpus.progress();
    return batch;
}

struct Progress {
    const char* doing;
    double begin = 0;  // of a resumed run: the share of the corpus that was done before
    std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now(), shown = start;
    size_t bytes = 0;

    double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); }
    double megabytes_per_second() const { return double(bytes) / 1e6 / seconds(); }

    void show(const Batch& batch) {
        using namespace std::chrono_literals;
        for (const Part& part : batch.parts) bytes += part.text.size();
        const bool terminal = isatty(STDERR_FILENO), last = batch.progress >= 1;
        const auto now = std::chrono::steady_clock::now();
        if (now - shown < (terminal ? 200ms : 10000ms) && !(terminal && last)) return;
        shown = now;
        const double left = seconds() * (1 - batch.progress) / std::max(batch.progress - begin, 1e-6);
        std::fprintf(stderr, "%s%s: %3.0f%%  %.1f MB  %.1f MB/s  %.0f s left%s", terminal ? "\r\033[K" : "", doing,
                     100 * batch.progress, double(bytes) / 1e6, megabytes_per_second(), left,
                     terminal && !last ? "" : "\n");
    }
};

[[noreturn]] static void fail_without_text(const Corpus& corpus) {
    const size_t others = corpus.files.size() - 1;
    fail(corpus.files[0].path + (others ? " and " + std::to_string(others) + " more" : ""),
         corpus.conversations ? "no conversation has an answer: a message of the role \"assistant\""
                              : "the corpus has no text; give files that are not empty");
}

// Calls action(part), and names the part's file in what it throws.
template <class Action>
static void with_file_named(const Corpus& corpus, const Part& part, Action action) try {
    action(part);
} catch (const std::runtime_error& error) {
    fail(corpus.files[part.file].path, error.what());
}

// Calls use(batch) for batch after batch, while the next one is being read.
template <class Use>
static void for_each_batch(Corpus& corpus, Use use) {
    Batch batch = read_batch(corpus);
    while (!batch.parts.empty()) {
        std::future<Batch> next = std::async(std::launch::async, [&] { return read_batch(corpus); });
        use(batch);
        batch = next.get();
    }
}

// Calls work(i, thread) for i in 0 .. count - 1, and throws what one of them threw.
template <class Work>
static void for_each_in_parallel(size_t count, Work work) {
    std::exception_ptr error;
#pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < count; ++i) {
        try {
            work(i, omp_get_thread_num());
        } catch (...) {
#pragma omp critical
            error = std::current_exception();
        }
    }
    if (error) std::rethrow_exception(error);
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. tokenize train

struct TrainOptions {
    size_t vocab_size = 8192;
    std::string out = "data/tokenizer.json", field = "text";
    std::vector<std::string> special_tokens, files;
};

static void make_folder_of(const std::string& file) {
    const fs::path folder = fs::path(file).parent_path();
    std::error_code error;
    if (!folder.empty()) fs::create_directories(folder, error);
    if (error) {
        fail("cannot make the folder " + folder.string() + ": " + error.message() + "; choose another --out");
    }
    replace_file(file + ".check", "");  // finds out now, not after the training, that the folder cannot be written
    fs::remove(file + ".check");
}

static void train(const TrainOptions& options) {
    Corpus corpus(options.files, options.field);
    make_folder_of(options.out);
    const Tokenizer bytes_only = untrained_tokenizer();
    std::vector<WordCounts> counts(omp_get_max_threads());  // one a thread
    Progress progress{"count words"};
    for_each_batch(corpus, [&](const Batch& batch) {
        for_each_in_parallel(batch.parts.size(), [&](size_t i, int thread) {
            with_file_named(corpus, batch.parts[i],
                            [&](const Part& part) { count_words(bytes_only, part.text, counts[thread]); });
        });
        progress.show(batch);
    });
    for (size_t i = 1; i < counts.size(); ++i) {
        for (const auto& [word, count] : counts[i]) counts[0][word] += count;
        counts[i] = {};
    }
    if (counts[0].empty()) fail_without_text(corpus);
    const double counted = progress.seconds();
    std::vector<std::string> special_tokens = {"<|endoftext|>"};
    for (const std::string& token : options.special_tokens) {
        if (std::find(special_tokens.begin(), special_tokens.end(), token) == special_tokens.end())
            special_tokens.push_back(token);
    }
    const Tokenizer tokenizer = train_bpe(counts[0], options.vocab_size, special_tokens);
    tokenizer.save(options.out);
    std::fprintf(stderr, "%s: %zu tokens from %.1f MB of text, %zu distinct words (count %.1f s, merge %.1f s)\n",
                 options.out.c_str(), tokenizer.vocab_size(), double(progress.bytes) / 1e6, counts[0].size(), counted,
                 progress.seconds() - counted);
    if (tokenizer.vocab_size() < options.vocab_size) {
        std::fprintf(stderr, "tokenize: the text has no more pairs to merge: %zu tokens instead of %zu\n",
                     tokenizer.vocab_size(), options.vocab_size);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. What is validation text
//
// A document goes whole to one side, by a hash of --seed and its beginning: the same one goes the same way wherever it
// stands, in another corpus too, and twice the same document is never on both sides.

struct EncodeOptions {
    std::string tokenizer, out = "data", field = "text", shard_tokens = "100M", chat_template;
    double val_fraction = 0.01;
    uint64_t seed = 1;
    std::vector<std::string> files;
};

static uint64_t document_hash(uint64_t seed, const Part& part) {
    std::string_view text = part.text;
    // Less than a part, so that it is not a matter of how documents are cut. Conversations, which never are, may all
    // begin with the same long message.
    if (part.conversation.messages.empty()) text = text.substr(0, 4096);
    uint64_t hash = random_bits(seed, 0);
    for (size_t i = 0; i < text.size(); i += 8) {
        uint64_t eight = 0;
        std::memcpy(&eight, &text[i], std::min<size_t>(8, text.size() - i));
        hash = mix64(hash ^ eight) + golden_gamma;
    }
    return mix64(hash ^ text.size());
}

struct ValidationRule {
    uint64_t threshold = 0;           // validation: documents with a lower hash,
    int64_t train_bytes = INT64_MAX;  // and all text from here on
};

// The threshold is --val-fraction of the hashes, but both sides get a document: if chance would have it otherwise in a
// small corpus, the one closest to the threshold changes sides. If there is one document only (a book), its end is the
// validation text: --val-fraction of it, and at least 16 KiB or a tenth.
static ValidationRule validation_rule(const EncodeOptions& options, bool conversations) {
    ValidationRule rule;
    if (options.val_fraction == 0) return rule;
    rule.threshold = uint64_t(options.val_fraction * 0x1p64);
    uint64_t lowest = UINT64_MAX, highest = 0;
    int64_t bytes = 0;
    Corpus corpus(options.files, options.field);
    corpus.conversations = conversations;
    for (Part part; corpus.next(part);) {
        bytes += int64_t(part.text.size());
        if (part.continues || (conversations && !part.conversation.has_answer())) continue;
        const uint64_t hash = document_hash(options.seed, part);
        lowest = std::min(lowest, hash);
        highest = std::max(highest, hash);
        if (lowest < rule.threshold && rule.threshold <= highest) return rule;  // as in any large corpus, soon
    }
    if (lowest < highest) {
        rule.threshold = lowest < rule.threshold ? highest : lowest + 1;
    } else if (conversations) {
        fail(corpus.files[0].path,
             "one conversation, or none with an answer, is too little to train and validate on; give more, or "
             "--val-fraction 0");
    } else if (bytes >= 16) {
        const int64_t share = int64_t(options.val_fraction * double(bytes)),
                      least = std::min(bytes / 10, int64_t(1) << 14);
        rule = {0, bytes - std::max({share, least, int64_t(1)})};
    } else if (bytes == 0) {
        fail_without_text(corpus);
    } else {
        fail(corpus.files[0].path, "the corpus is too short for validation text: " + std::to_string(bytes) +
                                       " bytes; give more or --val-fraction 0");
    }
    return rule;
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. tokenize encode

// The shards are useless beside another tokenizer.json than their own.
static void check_no_other_tokenizer(const Tokenizer& tokenizer, const std::string& source, const std::string& beside) {
    if (fs::exists(beside) && read_file(beside) != tokenizer.json) {
        fail(beside + " is another tokenizer than " + source + "; remove it or choose another --out");
    }
}

// What the shards follow from; an interrupted run is resumed if this is the same.
static nlohmann::json job_of(const EncodeOptions& options, int64_t shard_tokens, const Tokenizer& tokenizer,
                             const Corpus& corpus, const std::string& chat_template = "") {
    const auto* json = reinterpret_cast<const Bytef*>(tokenizer.json.data());
    nlohmann::json job = {{"tokenizer_crc32", crc32_z(0, json, tokenizer.json.size())},
                          {"field", options.field},
                          {"val_fraction", options.val_fraction},
                          {"seed", options.seed},
                          {"shard_tokens", shard_tokens}};
    if (!chat_template.empty()) job["template"] = chat_template;
    for (const Corpus::File& file : corpus.files)
        job["files"].push_back({printable(file.path), file.bytes, file.modified});
    return job;
}

// How far an encode has come.
struct Position {
    size_t file = 0;   // the next part's
    int64_t part = 0;  // its number in the file
    int64_t bytes = 0, documents = 0;
    int64_t unanswered = 0;  // conversations, left out
    bool in_val = false;     // the last part was validation text
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Position, file, part, bytes, documents, unanswered, in_val)

static Position position_in(const ShardWriter& shards, const Corpus& corpus) {
    Position position;
    bool good = true;
    try {
        position = shards.resumed;
    } catch (const nlohmann::json::exception&) {
        good = false;
    }
    if (!good || position.file > corpus.files.size() || position.part < 0 || position.bytes < 0) {
        fail(shards.folder + "/resume.json",
             "damaged: \"position\" is no place in the text; remove the file, and the encode starts over");
    }
    return position;
}

// The index of the first part of validation text by the rule's train_bytes, cut off from the part before if need be.
static size_t cut_at_validation(std::vector<Part>& parts, int64_t left_to_train) {
    size_t i = 0;
    for (; i < parts.size() && left_to_train >= int64_t(parts[i].text.size()); ++i) {
        left_to_train -= int64_t(parts[i].text.size());
    }
    if (i == parts.size() || left_to_train < 8) return i;
    std::string_view text = parts[i].text;
    size_t cut = cut_point(text, size_t(left_to_train));
    if (cut == text.npos) {  // anywhere, but not within a character
        for (cut = size_t(left_to_train); cut > 1 && (uint8_t(text[cut]) & 0xC0) == 0x80;) --cut;
    }
    const Part rest = {parts[i].text.substr(cut), true, parts[i].file};
    parts[i].text.resize(cut);
    parts.insert(parts.begin() + i + 1, rest);
    return i + 1;
}

// By which template conversations are written out; empty: the corpus is documents.
static std::string choose_template(const EncodeOptions& options, const Corpus& corpus, const Tokenizer& tokenizer) {
    if (!options.chat_template.empty() || !corpus.begins_with_conversation()) return options.chat_template;
    const std::string name = ChatTemplate::usual(tokenizer);
    std::fprintf(stderr, "encode: conversations, by --template %s\n", name.c_str());
    return name;
}

// What a part becomes.
struct EncodedPart {
    uint64_t hash = 0;                      // of its document, where it begins it
    EncodedConversation conversation = {};  // or the tokens of a document's part, and no answer
};

static void say_result(const std::string& out, const ShardWriter& shards, const Position& position,
                       const Progress& progress, bool conversations) {
    const auto& [train, val] = shards.streams;
    const auto targets = [](const ShardWriter::Stream& stream) {
        int64_t sum = 0;
        for (const WrittenShard& shard : stream.shards) sum += shard.targets;
        return std::to_string(sum);
    };
    char ratio[32];
    std::snprintf(ratio, sizeof ratio, "%.2f bytes a token",
                  double(position.bytes) / double(train.tokens() + val.tokens()));
    std::fprintf(
        stderr,
        "%s: %lld %s, %.1f MB; train: %lld tokens in %zu shards, val: %lld tokens in %zu shards; %s, %.1f MB/s\n",
        out.c_str(), (long long)position.documents, conversations ? "conversations" : "documents",
        double(position.bytes) / 1e6, (long long)train.tokens(), train.shards.size(), (long long)val.tokens(),
        val.shards.size(), conversations ? (targets(train) + " and " + targets(val) + " are targets").c_str() : ratio,
        progress.megabytes_per_second());
    if (position.unanswered > 0) {
        std::fprintf(stderr, "encode: left out %lld conversations without an answer of the assistant\n",
                     (long long)position.unanswered);
    }
}

static void encode(const EncodeOptions& options, int64_t shard_tokens) {
    using namespace std::chrono_literals;
    const Tokenizer tokenizer = Tokenizer::load(options.tokenizer);
    if (!tokenizer.document_start) {
        fail(options.tokenizer,
             "no added token <|endoftext|>, <|begin_of_text|> or <|end_of_text|> to start documents with; add one to "
             "the file");
    }
    Corpus corpus(options.files, options.field);
    corpus.whole = !tokenizer.cuttable();
    const std::string template_name = choose_template(options, corpus, tokenizer);
    std::optional<ChatTemplate> chat_template;
    if (!template_name.empty()) chat_template.emplace(template_name, tokenizer, options.tokenizer);
    const bool conversations = corpus.conversations = chat_template.has_value();
    const std::string beside = options.out + "/tokenizer.json";
    check_no_other_tokenizer(tokenizer, options.tokenizer, beside);
    const ValidationRule rule = validation_rule(options, conversations);
    ShardWriter shards(options.out, tokenizer.vocab_size(), shard_tokens,
                       job_of(options, shard_tokens, tokenizer, corpus, template_name));
    if (rule.train_bytes != INT64_MAX) {
        std::fprintf(stderr, "encode: a single document: what follows its first %.1f KB is the validation text\n",
                     double(rule.train_bytes) / 1e3);
    }
    Position position;
    if (!shards.resumed.is_null()) {
        position = position_in(shards, corpus);
        corpus.skip_to(position.file, position.part);
        std::fprintf(stderr, "encode: resumes after %.1f MB\n", double(position.bytes) / 1e6);
    } else if (shards.discarded) {
        std::fprintf(stderr, "encode: starts over: %s was interrupted in another job (text, tokenizer or options)\n",
                     options.out.c_str());
    }

    std::vector<WordCache> caches(omp_get_max_threads());  // one a thread
    Progress progress{"encode", corpus.progress()};
    auto saved = progress.start - 1h;
    for_each_batch(corpus, [&](Batch& batch) {
        const size_t first_val = cut_at_validation(batch.parts, rule.train_bytes - position.bytes);
        const std::vector<Part>& parts = batch.parts;
        std::vector<EncodedPart> encoded(parts.size());
        for_each_in_parallel(parts.size(), [&](size_t i, int thread) {
            EncodedPart& out = encoded[i];
            if (!parts[i].continues) out.hash = document_hash(options.seed, parts[i]);
            with_file_named(corpus, parts[i], [&](const Part& part) {
                if (conversations) out.conversation = chat_template->encode(part.conversation, caches[thread]);
                else tokenizer.encode(part.text, Special::as_text, caches[thread], out.conversation.tokens);
            });
        });
        for (size_t i = 0; i < parts.size(); ++i) {
            if (conversations && encoded[i].conversation.answers.empty()) {
                ++position.unanswered;
                continue;
            }
            const bool starts = !parts[i].continues, was_val = position.in_val;
            if (starts) position.in_val = encoded[i].hash < rule.threshold;
            if (i >= first_val) position.in_val = true;
            const auto split = position.in_val ? ShardWriter::val : ShardWriter::train;
            if (conversations) {
                shards.write(split, encoded[i].conversation);
            } else {
                if (starts || was_val != position.in_val) shards.write(split, {*tokenizer.document_start});
                shards.write(split, encoded[i].conversation.tokens);
            }
            position.bytes += int64_t(parts[i].text.size());
            position.documents += starts;
        }
        position.file = batch.next_file;
        position.part = batch.next_part;
        if (const auto now = std::chrono::steady_clock::now(); now - saved > 2s) {
            shards.checkpoint(position);
            saved = now;
        }
        progress.show(batch);
    });
    if (position.bytes == 0) fail_without_text(corpus);
    if (!fs::exists(beside)) tokenizer.save(beside);
    shards.commit(position, {{"documents", position.documents}, {"bytes", position.bytes}});
    say_result(options.out, shards, position, progress, conversations);
}

// ---------------------------------------------------------------------------------------------------------------------
// 5. tokenize decode, tokenize stats

static void check_tokens(const std::vector<uint32_t>& tokens, const Tokenizer& tokenizer, const std::string& source,
                         const std::string& shard) {
    for (const uint32_t id : tokens) {
        if (id < tokenizer.vocab_size()) continue;
        fail(shard, "token " + std::to_string(id) + " is not in " + source + ", which has " +
                        std::to_string(tokenizer.vocab_size()) + "; give the tokenizer.json the shard was made with");
    }
}

static void finish_output() {
    if (std::fflush(stdout) != 0 || std::ferror(stdout))
        fail("cannot write to the standard output; check the disk or the program that reads it");
}

static void decode(const std::string& tokenizer_path, const std::vector<std::string>& shards) {
    const Tokenizer tokenizer = Tokenizer::load(tokenizer_path);
    for (const std::string& shard : paths_of(shards)) {
        read_shard(shard, [&](const std::vector<uint32_t>& tokens) {
            check_tokens(tokens, tokenizer, tokenizer_path, shard);
            const std::string text = tokenizer.decode(tokens);
            std::fwrite(text.data(), 1, text.size(), stdout);
        });
    }
    finish_output();
}

struct StatsOptions {
    std::string tokenizer;
    size_t top = 20;
    std::vector<std::string> shards;
};

// A token as a JSON string; bytes that are no UTF-8 by themselves show as U+FFFD.
static std::string shown(const std::string& token) {
    return nlohmann::json(token).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

static void stats(const StatsOptions& options) {
    const Tokenizer tokenizer = Tokenizer::load(options.tokenizer);
    const uint32_t start = tokenizer.document_start.value_or(UINT32_MAX);
    std::vector<int64_t> counts(tokenizer.vocab_size());
    struct Sums {
        int64_t tokens = 0, documents = 0, bytes = 0, targets = 0;
    } all;
    const std::vector<std::string> shards = paths_of(options.shards);
    std::vector<std::optional<Targets>> targets;  // of each shard
    for (const std::string& shard : shards)
        targets.push_back(read_targets(shard, read_shard_header(open_shard_file(shard)).tokens));
    const bool has_targets = std::any_of(targets.begin(), targets.end(), [](const auto& t) { return t.has_value(); });
    const auto print = [&](const Sums& sums, const std::string& name) {
        std::printf("%14lld %12lld ", (long long)sums.tokens, (long long)sums.documents);
        if (has_targets) std::printf("%14lld ", (long long)sums.targets);
        std::printf("%14lld %8.3f  %s\n", (long long)sums.bytes,
                    sums.tokens ? double(sums.bytes) / double(sums.tokens) : 0.0, name.c_str());
    };
    std::printf("%14s %12s %s%14s %8s  shard\n", "tokens", "documents", has_targets ? "       targets " : "",
                "bytes of text", "/ token");
    for (size_t s = 0; s < shards.size(); ++s) {
        const std::string& shard = shards[s];
        const std::optional<uint32_t> recorded = recorded_crc32(shard);
        Sums sums;
        const uint32_t crc = read_shard(shard, [&](const std::vector<uint32_t>& chunk) {
            check_tokens(chunk, tokenizer, options.tokenizer, shard);
            for (uint32_t id : chunk) {
                ++counts[id];
                sums.documents += id == start;
                sums.bytes += id == start ? 0 : int64_t(tokenizer.tokens[id].size());
            }
            sums.tokens += int64_t(chunk.size());
        });
        if (recorded.value_or(crc) != crc) {
            fail(shard, "damaged: its checksum is not that in shards.json; encode the corpus again");
        }
        if (targets[s]) {
            if (targets[s]->tokens_crc32 != crc)
                fail(targets_path(shard),
                     "belongs to another shard than " + shard + "; encode the conversations again");
            sums.documents = 0;  // an answer may end with the token that starts documents
            for (const Answer *a = targets[s]->answers.data(), *before = nullptr, *end = a + targets[s]->answers.size();
                 a < end; before = a++) {
                sums.documents += !before || a->conversation != before->conversation;
                sums.targets += a->end - a->begin;
            }
        }
        print(sums, shard);
        all.tokens += sums.tokens, all.documents += sums.documents;
        all.bytes += sums.bytes, all.targets += sums.targets;
    }
    print(all, "all");

    std::vector<uint32_t> ids;
    for (uint32_t id = 0; id < counts.size(); ++id) {
        if (counts[id] > 0) ids.push_back(id);
    }
    std::stable_sort(ids.begin(), ids.end(), [&](uint32_t a, uint32_t b) { return counts[a] > counts[b]; });
    std::printf("\n%zu of %zu tokens occur; the most frequent:\n%14s %8s %8s  token\n", ids.size(), counts.size(),
                "times", "share", "id");
    for (size_t i = 0; i < std::min(options.top, ids.size()); ++i) {
        std::printf("%14lld %7.3f%% %8u  %s\n", (long long)counts[ids[i]],
                    100 * double(counts[ids[i]]) / double(all.tokens), ids[i], shown(tokenizer.tokens[ids[i]]).c_str());
    }
    finish_output();
}

// ---------------------------------------------------------------------------------------------------------------------
// 6. The command line

// "100M" -> 100,000,000. A shard's header counts its tokens in an int32.
static int64_t parse_count(const std::string& text) {
    char* end = nullptr;
    double value = std::strtod(text.c_str(), &end);
    const std::string suffix = end;
    if (suffix == "K" || suffix == "k") value *= 1e3;
    else if (suffix == "M" || suffix == "m") value *= 1e6;
    else if (suffix == "G" || suffix == "g") value *= 1e9;
    else if (!suffix.empty() || end == text.c_str()) value = 0;
    if (!(value >= 1 && value < 2147483648.0)) {
        throw CLI::ValidationError("--shard-tokens", "expected 1 to 2147483647, K, M, G allowed, found " + text);
    }
    return int64_t(value);
}

// What a JSON file can hold, a tokenizer.json or a corpus.
static std::string not_utf8(const std::string& text) {
    std::string buffer;
    return to_utf8(text, buffer).data() == text.data() ? "" : "expected UTF-8, found \"" + printable(text) + "\"";
}

int main(int argc, char** argv) {
    CLI::App app(
        "Byte-level BPE: trains a tokenizer, encodes text to token shards, decodes and counts shards.\n"
        "FILE: .txt (a document; <|endoftext|> separates several), .jsonl (a document or a conversation a line), .json "
        "(a\n"
        "list of those), each with .gz or .zst too; a folder of the first two; or a pattern in quotes ('*.txt').\n"
        "OMP_NUM_THREADS sets the threads; no result depends on it.",
        "tokenize");
    app.require_subcommand(1);

    TrainOptions train_options;
    CLI::App* train_command = app.add_subcommand("train", "Train a tokenizer.json on text");
    train_command->add_option("--vocab-size", train_options.vocab_size, "Tokens: 256 bytes, merges, special tokens")
        ->check(CLI::Range(257, 1 << 24))
        ->capture_default_str();
    train_command
        ->add_option("--special", train_options.special_tokens, "A special token beside <|endoftext|>; may be repeated")
        ->allow_extra_args(false)
        ->check(
            [](const std::string& token) { return token.empty() ? "expected a token, found \"\"" : not_utf8(token); });
    train_command->add_option("--out", train_options.out, "The file to write")->capture_default_str();
    train_command->add_option("--field", train_options.field, "A .jsonl's field with the text")
        ->check(not_utf8)
        ->capture_default_str();
    train_command->add_option("FILE", train_options.files, "Text")->required();

    EncodeOptions encode_options;
    CLI::App* encode_command =
        app.add_subcommand("encode",
                           "Encode text to shards train_000000.bin, val_000000.bin ... An interrupted run resumes when "
                           "the same command is\n"
                           "given again; a complete one is replaced when the new one is complete.");
    encode_command->add_option("--tokenizer", encode_options.tokenizer, "tokenizer.json")->required();
    encode_command->add_option("--out", encode_options.out, "The folder to write")->capture_default_str();
    encode_command
        ->add_option("--val-fraction", encode_options.val_fraction, "Share of the documents to validate on, each whole")
        ->check(CLI::Range(0.0, 0.5))
        ->capture_default_str();
    encode_command->add_option("--seed", encode_options.seed, "Chooses the documents to validate on")
        ->capture_default_str();
    encode_command->add_option("--shard-tokens", encode_options.shard_tokens, "Tokens a shard; K, M, G allowed")
        ->capture_default_str();
    encode_command->add_option("--field", encode_options.field, "A .jsonl's field with the text")
        ->check(not_utf8)
        ->capture_default_str();
    encode_command
        ->add_option("--template", encode_options.chat_template,
                     "The .jsonl are conversations, or prompts and completions, written out by this template (default, "
                     "where the first one is no text: that of the vocabulary's special tokens, else plain)")
        ->check(CLI::IsMember(ChatTemplate::names()));
    encode_command->add_option("FILE", encode_options.files, "Text")->required();

    std::string decode_tokenizer;
    std::vector<std::string> decode_shards;
    CLI::App* decode_command = app.add_subcommand("decode", "Write the text of shards to the standard output");
    decode_command->add_option("--tokenizer", decode_tokenizer, "tokenizer.json")->required();
    decode_command->add_option("SHARD", decode_shards, "A .bin file")->required();

    StatsOptions stats_options;
    CLI::App* stats_command = app.add_subcommand(
        "stats", "Count tokens, documents and bytes of shards, and check them against the checksums in shards.json");
    stats_command->add_option("--tokenizer", stats_options.tokenizer, "tokenizer.json")->required();
    stats_command->add_option("--top", stats_options.top, "Most frequent tokens to show")->capture_default_str();
    stats_command->add_option("SHARD", stats_options.shards, "A .bin file")->required();

    try {
        app.parse(argc, argv);
        const int64_t shard_tokens = parse_count(encode_options.shard_tokens);
        if (*train_command && train_options.vocab_size < 257 + train_options.special_tokens.size()) {
            throw CLI::ValidationError("--vocab-size", "expected at least 257 and one for each --special, found " +
                                                           std::to_string(train_options.vocab_size));
        }
        if (*train_command) train(train_options);
        else if (*encode_command) encode(encode_options, shard_tokens);
        else if (*decode_command) decode(decode_tokenizer, decode_shards);
        else stats(stats_options);
        return 0;
    } catch (const CLI::ParseError& error) {
        if (error.get_exit_code() == 0) return app.exit(error);  // --help
        std::fprintf(stderr, "tokenize: %s; see tokenize --help\n", printable(error.what()).c_str());
        return 2;
    } catch (const fs::filesystem_error& error) {
        std::fprintf(stderr, "tokenize: cannot change %s: %s; check the folder and its rights\n",
                     printable(error.path1().string()).c_str(), error.code().message().c_str());
        return 1;
    } catch (const std::bad_alloc&) {
        std::fprintf(stderr, "tokenize: out of memory; take fewer threads by OMP_NUM_THREADS\n");
        return 1;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "tokenize: %s\n", printable(error.what()).c_str());
        return 1;
    }
}
