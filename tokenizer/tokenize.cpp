// The command: trains a tokenizer on a corpus, encodes a corpus to token shards, decodes a shard.
#include <omp.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <future>

#include "corpus.h"
#include "shards.h"
#include "train_bpe.h"

namespace fs = std::filesystem;

// ---------------------------------------------------------------------------------------------------------------------
// Going through a corpus

struct Batch {
    std::vector<Part> parts;
    double progress;
};

static Batch read_batch(Corpus& corpus) {
    constexpr size_t batch_bytes = 8 << 20;
    Batch batch;
    size_t bytes = 0;
    for (Part part; bytes < batch_bytes && corpus.next(part); batch.parts.push_back(std::move(part))) {
        bytes += part.text.size();
    }
    batch.progress = corpus.progress();
    return batch;
}

struct Progress {
    std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now(), shown = start;
    size_t bytes = 0;

    double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); }

    void show(const char* doing, const Batch& batch) {
        using namespace std::chrono_literals;
        for (const Part& part : batch.parts) bytes += part.text.size();
        const bool terminal = isatty(STDERR_FILENO), last = batch.progress >= 1;
        const auto now = std::chrono::steady_clock::now();
        if (now - shown < (terminal ? 200ms : 10000ms) && !(terminal && last)) return;
        shown = now;
        const double done = std::max(batch.progress, 1e-6);
        std::fprintf(stderr, "%s%s: %3.0f%%  %.1f MB  %.1f MB/s  %.0f s left%s", terminal ? "\r\033[K" : "", doing,
                     100 * done, double(bytes) / 1e6, double(bytes) / 1e6 / seconds(), seconds() * (1 - done) / done,
                     terminal && !last ? "" : "\n");
    }
};

// Calls use(batch) for batch after batch, while the next one is being read.
template <class Use>
static void for_each_batch(Corpus& corpus, Use use) {
    Batch batch = read_batch(corpus);
    if (batch.parts.empty()) throw std::runtime_error("the corpus has no text; give files that are not empty");
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
// tokenize train

struct TrainOptions {
    size_t vocab_size = 8192;
    std::string out = "data/tokenizer.json", field = "text";
    std::vector<std::string> files;
};

static void make_folder_of(const std::string& file) {
    const fs::path folder = fs::path(file).parent_path();
    std::error_code error;
    if (!folder.empty()) fs::create_directories(folder, error);
    if (error) {
        throw std::runtime_error("cannot make the folder " + folder.string() + ": " + error.message() +
                                 "; choose another --out");
    }
    write_whole_file(file + ".check", "");  // finds out now, not after the training, that the folder cannot be written
    fs::remove(file + ".check");
}

static void train(const TrainOptions& options) {
    Corpus corpus(options.files, options.field);
    make_folder_of(options.out);
    const Tokenizer bytes_only = untrained_tokenizer();
    std::vector<WordCounts> counts(omp_get_max_threads());  // one a thread
    Progress progress;
    for_each_batch(corpus, [&](const Batch& batch) {
        for_each_in_parallel(batch.parts.size(), [&](size_t i, int thread) {
            count_words(bytes_only, batch.parts[i].text, counts[thread]);
        });
        progress.show("count words", batch);
    });
    for (size_t i = 1; i < counts.size(); ++i) {
        for (const auto& [word, count] : counts[i]) counts[0][word] += count;
        counts[i] = {};
    }
    const double counted = progress.seconds();
    const Tokenizer tokenizer = train_bpe(counts[0], options.vocab_size);
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
// tokenize encode

struct EncodeOptions {
    std::string tokenizer, out = "data", field = "text", shard_tokens = "100M";
    double val_fraction = 0.01;
    std::vector<std::string> files;
};

// A part goes to validation whenever validation has less than its fraction of the bytes so far. So validation is
// spread over the whole corpus, has its share within a part's size, does not depend on chance, and gets the second
// part of even the smallest corpus.
struct ValidationChooser {
    double fraction;
    int64_t bytes = 0, val_bytes = 0;
    bool last = false;

    bool choose(size_t size) {
        last = double(val_bytes) < fraction * double(bytes);
        bytes += int64_t(size);
        if (last) val_bytes += int64_t(size);
        return last;
    }
};

// A corpus of a single part (no part fills a batch): its last tenth is the validation text.
static void split_only_part(Batch& batch) {
    Part& whole = batch.parts[0];
    if (whole.text.size() < 16) return;
    const size_t cut = cut_point(whole.text, whole.text.size() - std::max<size_t>(whole.text.size() / 10, 1));
    batch.parts.push_back({whole.text.substr(cut), true});
    batch.parts[0].text.resize(cut);
}

// The shards are useless beside another tokenizer.json than their own.
static void check_no_other_tokenizer(const Tokenizer& tokenizer, const std::string& source, const std::string& beside) {
    if (fs::exists(beside) && read_whole_file(beside) != tokenizer.json) {
        throw std::runtime_error(beside + " is another tokenizer than " + source +
                                 "; remove it or choose another --out");
    }
}

static void encode(const EncodeOptions& options, int64_t shard_tokens) {
    const Tokenizer tokenizer = Tokenizer::load(options.tokenizer);
    if (!tokenizer.document_start) {
        throw std::runtime_error(options.tokenizer +
                                 ": no added token <|endoftext|>, <|begin_of_text|> or <|end_of_text|> "
                                 "to start documents with; add one to the file");
    }
    Corpus corpus(options.files, options.field);
    const std::string beside = options.out + "/tokenizer.json";
    check_no_other_tokenizer(tokenizer, options.tokenizer, beside);
    ShardWriter shards(options.out, tokenizer.vocab_size(), shard_tokens);

    std::vector<WordCache> caches(omp_get_max_threads());  // one a thread
    ValidationChooser validation{options.val_fraction};
    Progress progress;
    size_t documents = 0;
    for_each_batch(corpus, [&](Batch& batch) {
        if (validation.bytes == 0 && batch.parts.size() == 1 && options.val_fraction > 0) split_only_part(batch);
        std::vector<std::vector<uint32_t>> tokens(batch.parts.size());
        for_each_in_parallel(batch.parts.size(), [&](size_t i, int thread) {
            tokenizer.encode(batch.parts[i].text, Special::as_text, caches[thread], tokens[i]);
        });
        for (size_t i = 0; i < batch.parts.size(); ++i) {
            const bool was_val = validation.last, is_val = validation.choose(batch.parts[i].text.size());
            const auto split = is_val ? ShardWriter::val : ShardWriter::train;
            // A part goes on where the one before ended, if that one lies before it on disk too.
            if (!batch.parts[i].continues || was_val != is_val) shards.write(split, {*tokenizer.document_start});
            shards.write(split, tokens[i]);
            documents += !batch.parts[i].continues;
        }
        progress.show("encode", batch);
    });
    if (!fs::exists(beside)) tokenizer.save(beside);
    shards.commit();
    const auto& [train, val] = shards.streams;
    std::fprintf(
        stderr,
        "%s: %zu documents, %.1f MB; train: %lld tokens in %d shards, val: %lld tokens in %d shards; %.2f bytes a "
        "token, %.1f MB/s\n",
        options.out.c_str(), documents, double(progress.bytes) / 1e6, (long long)train.total, train.files,
        (long long)val.total, val.files, double(progress.bytes) / double(train.total + val.total),
        double(progress.bytes) / 1e6 / progress.seconds());
}

// ---------------------------------------------------------------------------------------------------------------------
// tokenize decode

static void decode(const std::string& tokenizer_path, const std::string& shard) {
    const Tokenizer tokenizer = Tokenizer::load(tokenizer_path);
    read_shard(shard, [&](const std::vector<uint32_t>& tokens) {
        const std::string text = tokenizer.decode(tokens);
        std::fwrite(text.data(), 1, text.size(), stdout);
    });
    if (std::fflush(stdout) != 0 || std::ferror(stdout))
        throw std::runtime_error("cannot write to the standard output");
}

// ---------------------------------------------------------------------------------------------------------------------
// The command line

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

int main(int argc, char** argv) {
    CLI::App app(
        "Byte-level BPE: trains a tokenizer, encodes text to token shards, decodes a shard.\n"
        "FILE: .txt (a document; <|endoftext|> separates several), .jsonl (a document a line),\n"
        "either with .gz or .zst, or a folder of them.",
        "tokenize");
    app.require_subcommand(1);

    TrainOptions train_options;
    CLI::App* train_command = app.add_subcommand("train", "Train a tokenizer.json on text");
    train_command->add_option("--vocab-size", train_options.vocab_size, "Tokens: 256 bytes, merges, <|endoftext|>")
        ->check(CLI::Range(257, 1 << 24))
        ->capture_default_str();
    train_command->add_option("--out", train_options.out, "The file to write")->capture_default_str();
    train_command->add_option("--field", train_options.field, "A .jsonl's field with the text")->capture_default_str();
    train_command->add_option("FILE", train_options.files, "Text")->required();

    EncodeOptions encode_options;
    CLI::App* encode_command =
        app.add_subcommand("encode", "Encode text to shards train_000000.bin, val_000000.bin ...");
    encode_command->add_option("--tokenizer", encode_options.tokenizer, "tokenizer.json")->required();
    encode_command->add_option("--out", encode_options.out, "The folder to write")->capture_default_str();
    encode_command->add_option("--val-fraction", encode_options.val_fraction, "Share of the text to validate on")
        ->check(CLI::Range(0.0, 0.5))
        ->capture_default_str();
    encode_command->add_option("--shard-tokens", encode_options.shard_tokens, "Tokens a shard; K, M, G allowed")
        ->capture_default_str();
    encode_command->add_option("--field", encode_options.field, "A .jsonl's field with the text")
        ->capture_default_str();
    encode_command->add_option("FILE", encode_options.files, "Text")->required();

    std::string decode_tokenizer, shard;
    CLI::App* decode_command = app.add_subcommand("decode", "Write a shard's text to the standard output");
    decode_command->add_option("--tokenizer", decode_tokenizer, "tokenizer.json")->required();
    decode_command->add_option("SHARD", shard, "A .bin file")->required();

    try {
        app.parse(argc, argv);
        const int64_t shard_tokens = parse_count(encode_options.shard_tokens);
        if (*train_command) train(train_options);
        else if (*encode_command) encode(encode_options, shard_tokens);
        else decode(decode_tokenizer, shard);
        return 0;
    } catch (const CLI::ParseError& error) {
        if (error.get_exit_code() == 0) return app.exit(error);  // --help
        std::fprintf(stderr, "tokenize: %s; see tokenize --help\n", error.what());
        return 2;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "tokenize: %s\n", error.what());
        return 1;
    }
}
