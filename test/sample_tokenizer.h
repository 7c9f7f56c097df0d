// What the tests of the tokenizer and of its command share: a small tokenizer, text for it, errors as text.
#pragma once

#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../tokenizer/train_bpe.h"

using Ids = std::vector<uint32_t>;
using Strings = std::vector<std::string>;

inline std::string error_of(const std::function<void()>& action) {
    try {
        action();
    } catch (const std::runtime_error& error) {
        return error.what();
    }
    return "no error";
}

// Pseudo-English: words of few letters, so that pairs repeat and tie often; runs of one letter, so that pairs overlap.
inline std::string sample_text(size_t length, unsigned seed) {
    const Strings pieces = {"aa", "a",  "b",  "ab", "the", "then", "tt",   " ", " ",
                            " ",  "\n", "12", "  ", "--",  "é",    "世界", "👍"};
    std::mt19937 random(seed);
    std::string text;
    while (text.size() < length) text += pieces[random() % pieces.size()];
    return text;
}

inline std::string random_bytes(size_t length, unsigned seed) {
    std::mt19937 random(seed);
    std::string bytes(length, 0);
    for (char& byte : bytes) byte = char(random());
    return bytes;
}

inline Tokenizer trained(const std::string& text, size_t vocab_size) {
    WordCounts counts;
    count_words(untrained_tokenizer(), text, counts);
    return train_bpe(counts, vocab_size);
}

inline const Tokenizer& sample_tokenizer() {
    static const Tokenizer tokenizer = trained(sample_text(20000, 1), 400);
    return tokenizer;
}
