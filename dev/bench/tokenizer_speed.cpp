// How fast text becomes ids, on one thread and on two.
//
//     tokenizer_speed TOKENIZER FILE...      MB/s of each file, and where the time goes
//     tokenizer_speed --once TOKENIZER FILE  seconds on one thread with an empty cache, and the number of ids
//     tokenizer_speed --ids TOKENIZER        texts from the standard input to ids on the standard output, for
//                                            dev/reference/tokenizer_check.py: a text is its length in bytes (uint64)
//                                            and its bytes; an answer is the number of ids (uint64) and the ids
//                                            (uint32)
//
// The floor of one thread is reading: every byte is looked at. Beside it stand the words alone, without ids, and what
// PCRE2's JIT takes for them instead of the scanner.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <iostream>
#include <thread>

#include "tokenizer/bpe.h"
#include "trainer/files.h"

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

static double seconds_to_cut(const Split& split, const std::vector<std::string_view>& pieces, int runs) {
    std::vector<std::string_view> words;
    return median_of(runs, [&] {
        for (std::string_view piece : pieces) {
            words.clear();
            split.cut(piece, words);
        }
    });
}

static void measure(const Tokenizer& tokenizer, const std::string& path) {
    std::string buffer;
    const std::string content = read_file(path);
    const std::string_view text = to_utf8(content, buffer);
    const std::vector<std::string_view> pieces = pieces_of(text);
    const double mb = double(text.size()) / 1e6;
    constexpr int runs = 7;

    size_t ids = 0;
    uint64_t sum = 0;
    const double one = median_of(runs, [&] { ids = encode(tokenizer, pieces, 1); });
    const double two = median_of(runs, [&] { encode(tokenizer, pieces, 2); });
    const double read = median_of(runs, [&] {
        for (char c : text) sum += uint8_t(c);
    });
    std::printf("%s: %.1f MB, %.2f bytes an id%s\n", path.c_str(), mb, mb * 1e6 / double(ids), sum ? "" : ", all zero");
    std::printf("  ids on one thread %.1f MB/s, on two %.1f MB/s: %.2f times; reading alone %.0f MB/s\n", mb / one,
                mb / two, one / two, mb / read);
    for (const auto& [name, pattern] : {std::pair{"GPT-2", gpt2_pattern}, {"Llama 3", llama3_pattern}}) {
        const double scanner = seconds_to_cut(Split::compile(pattern, name), pieces, runs);
        const double regex = seconds_to_cut(Split::compile(pattern, name, false), pieces, runs);
        std::printf("  words alone, %s's pattern: scanner %.1f MB/s, PCRE2's JIT %.1f MB/s: %.1f times\n", name,
                    mb / scanner, mb / regex, regex / scanner);
    }
}

static void measure_once(const Tokenizer& tokenizer, const std::string& path) {
    const std::string text = read_file(path);
    size_t ids = 0;
    const double time = seconds([&] { ids = encode(tokenizer, pieces_of(text), 1); });
    std::printf("%.6f %zu\n", time, ids);
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
    const std::vector<std::string> arguments(argv + 1, argv + argc);
    const std::string mode = arguments.size() > 1 && arguments[0].starts_with("--") ? arguments[0] : "";
    if (arguments.size() < 2 || (mode == "--ids" && argc != 3) || (mode == "--once" && argc != 4)) {
        std::fprintf(stderr, "usage: tokenizer_speed [--once] TOKENIZER FILE... | tokenizer_speed --ids TOKENIZER\n");
        return 2;
    }
    try {
        const Tokenizer tokenizer = Tokenizer::load(arguments[mode.empty() ? 0 : 1]);
        if (mode == "--ids") answer_with_ids(tokenizer);
        else if (mode == "--once") measure_once(tokenizer, arguments[2]);
        else
            for (size_t i = 1; i < arguments.size(); ++i) measure(tokenizer, arguments[i]);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "tokenizer_speed: %s\n", error.what());
        return 1;
    }
}
