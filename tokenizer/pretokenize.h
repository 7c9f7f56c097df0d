// Pre-tokenization: a text is cut into words, which merges never reach across, by one or more splits in turn.
//
// A split is a regex. The patterns of GPT-2, Llama 3 and Qwen2 have scanners written by hand, at several times the
// speed of PCRE2's JIT, to which all others go. The reference for what a pattern means is Oniguruma, the regex engine
// of Hugging Face's `tokenizers`: what PCRE2 would read otherwise is translated or refused.
//
// Errors are std::runtime_error with one line of text.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

struct Regex;  // a compiled pattern, in pretokenize.cpp

// The end of the word that starts at `begin`; the text goes on to `end`, and is valid UTF-8.
using WordEnd = const char* (*)(const char* begin, const char* end);

enum class SplitBehavior { removed, isolated, contiguous, merged_with_previous, merged_with_next };

struct Split {
    WordEnd word_end = nullptr;          // for a known pattern, all of whose matches are words
    std::shared_ptr<const Regex> regex;  // for the others
    SplitBehavior behavior = SplitBehavior::isolated;
    bool invert = false;  // what does not match is what is split off

    bool scans() const { return word_end && behavior == SplitBehavior::isolated; }

    // `where` is for error messages. `scan`: use the scanner for a known pattern.
    static Split compile(const std::string& pattern, const std::string& where, bool scan = true);
    // Appends the words of `text`, which is valid UTF-8. Thread-safe.
    void cut(std::string_view text, std::vector<std::string_view>& words) const;
};

extern const char* const gpt2_pattern;
extern const char* const llama3_pattern;
extern const char* const qwen2_pattern;  // Llama 3's, but each digit is a word

// The pattern that matches `literal`.
std::string escaped(std::string_view literal);
