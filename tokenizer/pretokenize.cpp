//   1. Scanners of the known patterns
//   2. Oniguruma's syntax in PCRE2's
//   3. Splits
#define PCRE2_CODE_UNIT_WIDTH 8
#include "pretokenize.h"

#include <pcre2.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cctype>
#include <cstring>
#include <stdexcept>

#include "trainer/files.h"
#include "unicode.h"

// ---------------------------------------------------------------------------------------------------------------------
// 1. Scanners

const char* const gpt2_pattern = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
const char* const llama3_pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
const char* const qwen2_pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

using enum CharacterClass;

static constexpr auto ascii_class = [] {
    std::array<CharacterClass, 128> table{};
    for (int c = 0; c < 128; ++c) {
        const int lower = c | 0x20;
        table[c] = lower >= 'a' && lower <= 'z'           ? letter
                   : c >= '0' && c <= '9'                 ? number
                   : c == ' ' || (c >= '\t' && c <= '\r') ? space
                                                          : other;
    }
    return table;
}();

struct Classified {
    uint32_t length;  // in bytes; 0 at the end of the text
    CharacterClass character_class;
    bool is(CharacterClass c) const { return length && character_class == c; }
};

static inline Classified classify(const char* p, const char* end) {
    if (p == end) return {0, other};
    if (uint8_t(*p) < 0x80) return {1, ascii_class[uint8_t(*p)]};
    const Character c = character_at(p);
    return {c.length, class_table()[c.code_point]};
}

// The ASCII letters at p, eight bytes at a time, as far as whole eights go.
static inline const char* skip_letters(const char* p, const char* end) {
    constexpr uint64_t ones = 0x0101010101010101;
    for (uint64_t eight; end - p >= 8; p += 8) {
        std::memcpy(&eight, p, 8);
        const uint64_t lower = (eight | 0x20 * ones) & 0x7F * ones;  // sums below stay within their bytes
        const uint64_t from_a = lower + (0x80 - 'a') * ones, beyond_z = lower + (0x80 - 'z' - 1) * ones;
        const uint64_t others = ~(from_a & ~beyond_z & ~eight) & 0x80 * ones;
        if (others) return p + std::countr_zero(others) / 8;
    }
    return p;
}

// The end of the run of class `c` that goes on at p.
static inline const char* skip(const char* p, const char* end, CharacterClass c) {
    if constexpr (std::endian::native == std::endian::little) {
        if (c == letter) p = skip_letters(p, end);
    }
    for (;;) {
        while (p < end && uint8_t(*p) < 0x80 && ascii_class[uint8_t(*p)] == c) ++p;
        if (p == end || uint8_t(*p) < 0x80) return p;
        const Classified next = classify(p, end);
        if (next.character_class != c) return p;
        p += next.length;
    }
}

// The length of 's, 't, 're, 've, 'm, 'll or 'd at the apostrophe p, or 0. With any_case also that of 'S, ..., and of
// 's with the long s, U+017F, which is an s to a regex that ignores case.
template <bool any_case>
static size_t contraction(const char* p, const char* end) {
    const auto at = [&](int i) {
        return p + i < end ? char(any_case && uint8_t(p[i]) < 0x80 ? p[i] | 0x20 : p[i]) : 0;
    };
    switch (at(1)) {
        case 's':
        case 't':
        case 'm':
        case 'd': return 2;
        case 'r':
        case 'v': return at(2) == 'e' ? 3 : 0;
        case 'l': return at(2) == 'l' ? 3 : 0;
        case char(0xC5): return any_case && at(2) == char(0xBF) ? 3 : 0;
        default: return 0;
    }
}

// \s+(?!\S)|\s+ at a space: all the spaces at the end of a text, else all but the last, but at least one.
static const char* blanks(const char* begin, const char* end) {
    const char* const stop = skip(begin, end, space);
    if (stop == end) return stop;
    const char* const last = previous_character(stop);
    return last == begin ? stop : last;
}

static const char* gpt2_word_end(const char* begin, const char* end) {
    const char* p = begin;
    if (*p == '\'') {
        if (const size_t length = contraction<false>(p, end)) return p + length;
    }
    if (*p == ' ') ++p;
    const Classified c = classify(p, end);
    if (c.length == 0 || c.character_class == space) return blanks(begin, end);
    return skip(p + c.length, end, c.character_class);
}

// Llama 3's pattern, but for the number of digits in a word.
template <int max_digits>
static const char* llama3_word_end(const char* begin, const char* end) {
    const auto is_newline = [](char c) { return c == '\r' || c == '\n'; };
    if (*begin == '\'') {
        if (const size_t length = contraction<true>(begin, end)) return begin + length;
    }
    const Classified first = classify(begin, end);
    const char* p = begin + first.length;
    if (first.is(letter)) return skip(p, end, letter);
    if (first.is(number)) {
        for (int digits = 1; digits < max_digits; ++digits) {
            const Classified next = classify(p, end);
            if (!next.is(number)) break;
            p += next.length;
        }
        return p;
    }
    const Classified second = classify(p, end);
    if (second.is(letter) && !is_newline(*begin)) return skip(p + second.length, end, letter);
    if (first.is(other) || (*begin == ' ' && second.is(other))) {
        p = skip(p, end, other);
        while (p < end && is_newline(*p)) ++p;
        return p;
    }
    // Spaces: up to the last newline among them, if there is one.
    const char* const stop = skip(p, end, space);
    for (const char* last = stop; last > begin; --last) {
        if (is_newline(last[-1])) return last;
    }
    return blanks(begin, end);
}

static WordEnd scanner_of(std::string_view pattern) {
    if (pattern == gpt2_pattern) return gpt2_word_end;
    if (pattern == llama3_pattern) return llama3_word_end<3>;
    if (pattern == qwen2_pattern) return llama3_word_end<1>;
    return nullptr;
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. Oniguruma's syntax in PCRE2's

struct Regex {
    pcre2_code* code;
    ~Regex() { pcre2_code_free(code); }
};

static std::string pcre2_message(int error) {
    char message[128];
    pcre2_get_error_message(error, reinterpret_cast<PCRE2_UCHAR*>(message), sizeof message);
    return message;
}

// `pattern` in PCRE2's syntax; for messages: `where`, and the pattern as it was `given`.
static std::shared_ptr<const Regex> compile_pcre2(const std::string& pattern, const std::string& given,
                                                  const std::string& where) {
    int error = 0;
    PCRE2_SIZE offset = 0;
    pcre2_code* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                                     PCRE2_UTF | PCRE2_UCP, &error, &offset, nullptr);
    if (!code) {
        fail(where, "cannot compile the regex " + given + ": " + pcre2_message(error) +
                        "; use a tokenizer.json whose regex PCRE2 understands");
    }
    pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);  // where there is no JIT, the interpreter gives the same matches
    return std::shared_ptr<const Regex>(new Regex{code});
}

// Calls visit(begin, end) for each match, as Oniguruma's Rust binding finds them: an empty match right after another
// match does not count.
template <class Visit>
static void for_each_match(const Regex& regex, std::string_view text, Visit visit) {
    struct Memory {  // this function is called for short texts too
        pcre2_match_data* data = pcre2_match_data_create(1, nullptr);
        pcre2_match_context* context = pcre2_match_context_create(nullptr);
        pcre2_jit_stack* stack = pcre2_jit_stack_create(size_t(32) << 10, size_t(64) << 20, nullptr);
        ~Memory() {
            pcre2_match_data_free(data);
            pcre2_match_context_free(context);
            pcre2_jit_stack_free(stack);
        }
    };
    static thread_local const Memory memory;
    // A megabyte of spaces is unusual, and no error; a pattern that takes exponential time is.
    pcre2_set_match_limit(memory.context, uint32_t(std::min<uint64_t>(10'000'000 + 100 * text.size(), UINT32_MAX)));
    pcre2_jit_stack_assign(memory.context, nullptr, memory.stack);
    const PCRE2_SIZE* span = pcre2_get_ovector_pointer(memory.data);

    size_t last_end = text.npos;
    for (size_t from = 0; from <= text.size();) {
        const int found = pcre2_match(regex.code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                                      PCRE2_NO_UTF_CHECK, memory.data, memory.context);
        if (found == PCRE2_ERROR_NOMATCH) break;
        if (found < 0) {
            throw std::runtime_error("cannot split a text: " + pcre2_message(found) + "; shorten its longest lines");
        }
        const size_t begin = span[0], end = span[1];
        if (begin == end && end == last_end) {
            from += from < text.size() ? character_at(text.data() + from).length : 1;
            continue;
        }
        visit(begin, end);
        last_end = from = end;
    }
}

// Code points assigned since the Unicode version that PCRE2 knows.
static const std::vector<uint32_t>& unknown_to_pcre2() {
    static const std::vector<uint32_t> unknown = [] {
        std::string assigned;
        for (uint32_t c = 0x80; c < 0x110000; ++c) {
            if ((c < 0xD800 || c > 0xDFFF) && general_category(c) != "Cn") append_utf8(assigned, c);
        }
        std::vector<uint32_t> found;
        for_each_match(*compile_pcre2("\\p{Cn}", "\\p{Cn}", "Unicode"), assigned, [&](size_t begin, size_t) {
            found.push_back(character_at(assigned.data() + begin).code_point);
        });
        return found;
    }();
    return unknown;
}

// Those of a general category ("L", "Lu") as ranges of a set in a regex.
static std::string unknown_of(std::string_view category) {
    std::string set;
    uint32_t first = 0, last = 0;
    const auto add_range = [&] {
        if (first) append_utf8(set, first), set += '-', append_utf8(set, last);
    };
    for (uint32_t c : unknown_to_pcre2()) {
        if (!general_category(c).starts_with(category)) continue;
        if (c != last + 1) add_range(), first = c;
        last = c;
    }
    add_range();
    return set;
}

// The end of the interval {1,3} that starts at `begin`, or npos where none does.
static size_t interval_end(std::string_view pattern, size_t begin) {
    const size_t end = pattern.find_first_not_of("0123456789,", begin + 1);
    return end != pattern.npos && pattern[end] == '}' && end > begin + 1 ? end : pattern.npos;
}

// Oniguruma's pattern in PCRE2's syntax: \s as Unicode's White_Space (PCRE2 counts U+180E too), categories of the
// Unicode version that `tokenizers` has, sets within sets (a union, which PCRE2 does not know). Refuses what would mean
// something else.
static std::string to_pcre2(const std::string& pattern, const std::string& where) {
    const auto refuse = [&](const std::string& what) {
        fail(where, what + " in the regex " + pattern +
                        " is not supported; use a tokenizer.json such as GPT-2's, Llama 3's or Qwen's");
    };
    const std::string spaces = R"(\p{Z}\x09-\x0d\x85)";
    std::string out;
    int depth = 0;  // of [
    for (size_t i = 0; i < pattern.size(); ++i) {
        const char c = pattern[i];
        if (c == '\\') {
            const char kind = ++i < pattern.size() ? pattern[i] : 0;
            std::string set;
            if (kind == 's' || kind == 'S') {
                set = spaces;
            } else if (kind == 'd' || kind == 'D') {
                set = "\\p{Nd}" + unknown_of("Nd");
            } else if (kind == 'p' || kind == 'P') {
                const size_t close = pattern.find('}', i);
                if (pattern.compare(i + 1, 1, "{") != 0 || close == pattern.npos) refuse("a \\p without {}");
                const std::string name = pattern.substr(i + 2, close - i - 2);
                const bool general = name.size() == 1 || (name.size() == 2 && std::islower(uint8_t(name[1])));
                if (name.starts_with('^')) refuse("\\p{^");
                set = "\\p{" + name + "}" + (general ? unknown_of(name) : "");
                i = close;
            } else if (uint8_t(kind) < 0x80 && std::isalpha(uint8_t(kind)) && !std::strchr("rntfax", kind)) {
                refuse(std::string("\\") + kind);
            } else {
                out += {c, kind};
                continue;
            }
            const bool negated = std::isupper(uint8_t(kind));
            if (depth && negated) refuse(std::string("\\") + kind + " in [ ]");
            out += depth ? set : (negated ? "[^" : "[") + set + "]";
        } else if (c == '[') {
            const char next = i + 1 < pattern.size() ? pattern[i + 1] : 0;
            if (depth && (next == '^' || next == ':')) refuse(std::string("[") + next + " in [ ]");
            if (depth++ == 0) out += c;
            if (next == '^' && ++i) out += next;
            if (i + 1 < pattern.size() && pattern[i + 1] == ']') refuse("[]");
        } else if (c == ']' && depth) {
            if (--depth == 0) out += c;
        } else if (depth && c == '&' && pattern.compare(i, 2, "&&") == 0) {
            refuse("&& in [ ]");
        } else if (!depth && (c == '^' || c == '$')) {
            refuse(std::string(1, c));
        } else if (!depth && c == '(' && pattern.compare(i, 3, "(?m") == 0) {
            refuse("(?m");
        } else if (const size_t end = c == '{' && !depth ? interval_end(pattern, i) : pattern.npos;
                   end != pattern.npos) {
            // To Oniguruma, + repeats an interval instead of making it possessive, and {,3} starts at 0.
            if (pattern[i + 1] == ',' || pattern.compare(end + 1, 1, "+") == 0) refuse("{,} or {}+");
            out += c;
        } else {
            out += c;
        }
    }
    return out;
}

std::string escaped(std::string_view literal) {
    std::string out;
    for (char c : literal) {
        if (uint8_t(c) < 0x80 && !std::isalnum(uint8_t(c))) out += '\\';
        out += c;
    }
    return out;
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. Splits

struct Piece {
    size_t begin, end;
    bool matches;
};

Split Split::compile(const std::string& pattern, const std::string& where, bool scan) {
    Split split;
    if (scan) split.word_end = scanner_of(pattern);
    if (!split.word_end) split.regex = compile_pcre2(to_pcre2(pattern, where), pattern, where);
    return split;
}

// A piece joins the one before it; with merged_with_next the one after it, so the pieces are looked at backwards.
static void join(std::vector<Piece>& pieces, SplitBehavior behavior) {
    const bool backwards = behavior == SplitBehavior::merged_with_next;
    if (backwards) std::reverse(pieces.begin(), pieces.end());
    size_t count = 0;
    bool previous_matches = false;
    for (const Piece piece : pieces) {
        const bool joins = behavior == SplitBehavior::contiguous ? piece.matches == previous_matches
                                                                 : piece.matches && !previous_matches;
        previous_matches = piece.matches;
        if (joins && count > 0) {
            pieces[count - 1].begin = std::min(pieces[count - 1].begin, piece.begin);
            pieces[count - 1].end = std::max(pieces[count - 1].end, piece.end);
        } else {
            pieces[count++] = piece;
        }
    }
    pieces.resize(count);
    if (backwards) std::reverse(pieces.begin(), pieces.end());
}

void Split::cut(std::string_view text, std::vector<std::string_view>& words) const {
    std::vector<Piece> pieces;
    size_t done = 0;
    const auto add = [&](size_t begin, size_t end, bool matches) {
        if (behavior != SplitBehavior::isolated && behavior != SplitBehavior::removed) {
            pieces.push_back({begin, end, matches != invert});
        } else if (begin != end && (behavior == SplitBehavior::isolated || matches == invert)) {
            words.push_back(text.substr(begin, end - begin));
        }
    };
    const auto add_match = [&](size_t begin, size_t end) {
        if (done != begin) add(done, begin, false);
        add(begin, end, true);
        done = end;
    };
    if (word_end) {
        const char* const stop = text.data() + text.size();
        while (done < text.size()) add_match(done, size_t(word_end(text.data() + done, stop) - text.data()));
    } else {
        for_each_match(*regex, text, add_match);
    }
    if (done != text.size()) add(done, text.size(), false);

    join(pieces, behavior);
    for (const Piece& piece : pieces) {
        if (piece.begin != piece.end) words.push_back(text.substr(piece.begin, piece.end - piece.begin));
    }
}
