// Unicode as Hugging Face's `tokenizers` (0.23) sees it: UTF-8, classes of characters, normal forms.
//
// Its regex engine knows Unicode 16, its normalizer Unicode 9. Here the tables come from utf8proc, whose version is the
// system's; unicode.cpp lists what the versions disagree on, so that every code point is taken as `tokenizers` does.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

struct Character {
    uint32_t code_point, length;  // length in bytes
};

// The character at p, which is the start of one in valid UTF-8.
inline Character character_at(const char* p) {
    const auto byte = [p](int i) { return uint32_t(uint8_t(p[i])); };
    const auto tail = [&](int i) { return byte(i) & 0x3F; };
    if (byte(0) < 0x80) return {byte(0), 1};
    if (byte(0) < 0xE0) return {(byte(0) & 0x1F) << 6 | tail(1), 2};
    if (byte(0) < 0xF0) return {(byte(0) & 0x0F) << 12 | tail(1) << 6 | tail(2), 3};
    return {(byte(0) & 0x07) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3), 4};
}

// The start of the character before p, which is not the first of its text.
inline const char* previous_character(const char* p) {
    do --p;
    while ((uint8_t(*p) & 0xC0) == 0x80);
    return p;
}

void append_utf8(std::string& text, uint32_t code_point);

// The text with U+FFFD in place of what is not UTF-8, one for each maximal subpart (as Python and Rust do); in `buffer`
// unless there is nothing to replace.
std::string_view to_utf8(std::string_view text, std::string& buffer);

// The text without the blanks at its end, or at both ends, that Python's str.rstrip and str.strip remove.
std::string_view strip_end(std::string_view text);
std::string_view strip(std::string_view text);

// "Lu", "Nd", ...; "Cn": unassigned.
std::string_view general_category(uint32_t code_point);

// \p{L}, \p{N}, \s, and the rest.
enum class CharacterClass : uint8_t { other, letter, number, space };

struct ClassTable {
    uint16_t page_of[0x1100];  // code point >> 8 -> page; equal pages are kept once
    std::vector<std::array<uint8_t, 256>> pages;
    CharacterClass operator[](uint32_t code_point) const {
        return CharacterClass(pages[page_of[code_point >> 8]][code_point & 0xFF]);
    }
};
const ClassTable& class_table();

// \w: what may not stand beside an added token that is a single_word.
bool is_word_character(uint32_t code_point);

// NFC, NFD, NFKC or NFKD.
struct NormalForm {
    int options;                 // utf8proc's
    std::vector<bool> affected;  // code points that the form may change, or compose with the one before, or reorder

    static NormalForm named(std::string_view name);
    // `text` must be valid UTF-8; the result is in `buffer` unless nothing changes.
    std::string_view apply(std::string_view text, std::string& buffer) const;
};
