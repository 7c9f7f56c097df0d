// How fast text becomes ids, on one thread and on two.
//
//     tokenizer_speed TOKENIZER FILE...      MB/s of each file, and where the time goes
//     tokenizer_speed --ids TOKENIZER        texts from the standard input to ids on the standard output, for
//                                            dev/reference/tokenizer_check.py: a text is its length in bytes (uint64) and
//                                            its bytes; an answer is the number of ids (uint64) and the ids (uint32)
//
// The floor of one thread: every byte must be read, and every word looked up once in a table too large for the first
// two caches. Both are measured on the same text: a sum of its bytes, and a hash table of just its words.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <iostream>
#include <thread>

#include "tokenizer/bpe.h"

static double seconds(const std::function<void()>& action) {
    using Clock = std::chrono::steady_clock;
    const auto start = Clock::now();
    action();
    return std::chrono::duration<double>(Clock::now() - start).count();
}

static double median_of(int runs, const std::function<void()>& action) {
    std::vector<double> times;
    for (int i = 0; i < runs; ++i) times.push_back(seconds(action));
    std::nth_element(times.begin(), times.begin() + runs / 2, times.end());
    return times[runs / 2];
}

// Pieces of about a megabyte, as `tokenize encode` hands them to its threads; they end after a newline.
static std::vector<std::string_view> pieces_of(std::string_view text) {
    std::vector<std::string_view> pieces;
    while (!text.empty()) {
        const size_t newline = text.find('\n', std::min<size_t>(1 << 20, text.size() - 1));
        const size_t length = newline == text.npos ? text.size() : newline + 1;
        pieces.push_back(text.substr(0, length));
        text.remove_prefix(length);
    }
    return pieces;
}

static size_t encode(const Tokenizer& tokenizer, const std::vector<std::string_view>& pieces, size_t threads) {
    std::vector<size_t> counts(threads);
    std::vector<std::thread> workers;
    for (size_t thread = 0; thread < threads; ++thread) {
        workers.emplace_back([&, thread] {
            WordCache cache;
            std::vector<uint32_t> ids;
            size_t count = 0;
            for (size_t i = thread; i < pieces.size(); i += threads) {
                ids.clear();
                tokenizer.encode(pieces[i], Special::as_text, cache, ids);
                count += ids.size();
            }
            counts[thread] = count;
        });
    }
    for (std::thread& worker : workers) worker.join();
    size_t all = 0;
    for (size_t count : counts) all += count;
    return all;
}

static void measure(const Tokenizer& tokenizer, const std::string& path) {
    const std::string text = read_whole_file(path);
    const std::vector<std::string_view> pieces = pieces_of(text);
    const double mb = double(text.size()) / 1e6;
    constexpr int runs = 7;

    size_t ids = 0, words = 0;
    uint64_t sum = 0;
    const double one = median_of(runs, [&] { ids = encode(tokenizer, pieces, 1); });
    const double two = median_of(runs, [&] { encode(tokenizer, pieces, 2); });
    const double read = median_of(runs, [&] {
        for (char c : text) sum += uint8_t(c);
    });
    const double split = median_of(runs, [&] {
        std::vector<std::string_view> cut;
        std::string buffer;
        words = 0;
        for (std::string_view piece : pieces) {
            tokenizer.split(piece, buffer, cut);
            words += cut.size();
        }
    });
    std::printf("%s: %.1f MB, %.2f bytes a word, %.2f bytes an id%s\n", path.c_str(), mb, mb * 1e6 / double(words),
                mb * 1e6 / double(ids), sum == 0 ? " (zeros)" : "");
    std::printf("  one thread %.1f MB/s, %.1f ns a word; two threads %.1f MB/s, %.2f times\n", mb / one,
                one * 1e9 / double(words), mb / two, one / two);
    std::printf("  words alone %.1f MB/s: %.0f%% of the time; reading alone %.0f MB/s: %.1f%%\n", mb / split,
                100 * split / one, mb / read, 100 * read / one);
}

static void answer_with_ids(const Tokenizer& tokenizer) {
    WordCache cache;
    std::string text;
    std::vector<uint32_t> ids;
    for (uint64_t length; std::cin.read(reinterpret_cast<char*>(&length), sizeof length);) {
        text.resize(length);
        std::cin.read(text.data(), std::streamsize(length));
        ids.clear();
        tokenizer.encode(text, Special::parse, cache, ids);
        const uint64_t count = ids.size();
        std::cout.write(reinterpret_cast<const char*>(&count), sizeof count);
        std::cout.write(reinterpret_cast<const char*>(ids.data()), std::streamsize(count * sizeof ids[0]));
        std::cout.flush();
    }
}

int main(int argc, char** argv) {
    const bool ids_only = argc == 3 && std::string_view(argv[1]) == "--ids";
    if (argc < 3) {
        std::fprintf(stderr, "usage: tokenizer_speed TOKENIZER FILE... | tokenizer_speed --ids TOKENIZER\n");
        return 2;
    }
    try {
        if (ids_only) {
            answer_with_ids(Tokenizer::load(argv[2]));
            return 0;
        }
        const Tokenizer tokenizer = Tokenizer::load(argv[1]);
        for (int i = 2; i < argc; ++i) measure(tokenizer, argv[i]);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "tokenizer_speed: %s\n", error.what());
        return 1;
    }
}
