#include "unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>

// ---------------------------------------------------------------------------------------------------------------------
// UTF-8

void append_utf8(std::string& text, uint32_t code_point) {
    uint8_t bytes[4];
    text.append(reinterpret_cast<char*>(bytes), size_t(utf8proc_encode_char(int32_t(code_point), bytes)));
}

struct Subpart {
    size_t length;  // in bytes; of a malformed character: the bytes that a decoder replaces by one U+FFFD
    bool valid;
};

// The UTF-8 character at the start of s, which is not empty. A malformed one is as long as it is the beginning of some
// valid character, and at least a byte: Unicode's "maximal subpart".
static Subpart first_subpart(std::string_view s) {
    const auto byte = [&](size_t i) { return i < s.size() ? uint8_t(s[i]) : 0; };
    const auto in = [&](size_t i, int low, int high) { return byte(i) >= low && byte(i) <= high; };
    const uint8_t lead = byte(0);
    if (lead < 0x80) return {1, true};
    if (lead < 0xC2 || lead > 0xF4) return {1, false};  // a continuation, an overlong form, or above U+10FFFF
    const size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    const int low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;   // below: overlong
    const int high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;  // above: a surrogate, or above U+10FFFF
    if (!in(1, low, high)) return {1, false};
    for (size_t i = 2; i < length; ++i) {
        if (!in(i, 0x80, 0xBF)) return {i, false};
    }
    return {length, true};
}

// The length of the ASCII at the start, rounded down to a multiple of 8.
static size_t ascii_prefix(std::string_view text) {
    size_t i = 0;
    for (uint64_t eight; i + 8 <= text.size(); i += 8) {
        std::memcpy(&eight, text.data() + i, 8);
        if (eight & 0x8080808080808080) break;
    }
    return i;
}

// The length of the longest valid beginning.
static size_t valid_prefix(std::string_view text) {
    size_t i = 0;
    while (i < text.size()) {
        if (uint8_t(text[i]) < 0x80) i += ascii_prefix(text.substr(i));
        if (i == text.size()) break;
        const Subpart c = first_subpart(text.substr(i));
        if (!c.valid) break;
        i += c.length;
    }
    return i;
}

std::string_view to_utf8(std::string_view text, std::string& buffer) {
    size_t valid = valid_prefix(text);
    if (valid == text.size()) return text;
    buffer.clear();
    while (!text.empty()) {
        buffer += text.substr(0, valid);
        text.remove_prefix(valid);
        if (text.empty()) break;
        buffer += "\uFFFD";
        text.remove_prefix(first_subpart(text).length);
        valid = valid_prefix(text);
    }
    return buffer;
}

// What Python's str.isspace says of a character.
static bool is_python_space(std::string_view character) {
    const Subpart part = first_subpart(character);
    if (!part.valid || part.length != character.size()) return false;
    const uint32_t c = character_at(character.data()).code_point;
    return (c >= 9 && c <= 13) || (c >= 28 && c <= 32) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

std::string_view strip_end(std::string_view text) {
    while (!text.empty()) {
        size_t begin = text.size() - 1;
        while (begin > 0 && (uint8_t(text[begin]) & 0xC0) == 0x80) --begin;
        if (!is_python_space(text.substr(begin))) break;
        text.remove_suffix(text.size() - begin);
    }
    return text;
}

std::string_view strip(std::string_view text) {
    text = strip_end(text);
    while (!text.empty()) {
        const size_t length = first_subpart(text).length;
        if (!is_python_space(text.substr(0, length))) break;
        text.remove_prefix(length);
    }
    return text;
}

// ---------------------------------------------------------------------------------------------------------------------
// Classes

struct Assigned {
    uint32_t first, last;
    const char* category;
};

// Assigned in Unicode 15.1 and 16, which Debian 12's utf8proc (Unicode 15) does not know; and U+1171E, which moved.
static constexpr Assigned assigned_later[] = {
    {0x897, 0x897, "Mn"},     {0x1B4E, 0x1B4F, "Po"},   {0x1B7F, 0x1B7F, "Po"},   {0x1C89, 0x1C89, "Lu"},
    {0x1C8A, 0x1C8A, "Ll"},   {0x2427, 0x2429, "So"},   {0x2FFC, 0x2FFF, "So"},   {0x31E4, 0x31E5, "So"},
    {0x31EF, 0x31EF, "So"},   {0xA7CB, 0xA7CC, "Lu"},   {0xA7CD, 0xA7CD, "Ll"},   {0xA7DA, 0xA7DA, "Lu"},
    {0xA7DB, 0xA7DB, "Ll"},   {0xA7DC, 0xA7DC, "Lu"},   {0x105C0, 0x105F3, "Lo"}, {0x10D40, 0x10D49, "Nd"},
    {0x10D4A, 0x10D4D, "Lo"}, {0x10D4E, 0x10D4E, "Lm"}, {0x10D4F, 0x10D4F, "Lo"}, {0x10D50, 0x10D65, "Lu"},
    {0x10D69, 0x10D6D, "Mn"}, {0x10D6E, 0x10D6E, "Pd"}, {0x10D6F, 0x10D6F, "Lm"}, {0x10D70, 0x10D85, "Ll"},
    {0x10D8E, 0x10D8F, "Sm"}, {0x10EC2, 0x10EC4, "Lo"}, {0x10EFC, 0x10EFC, "Mn"}, {0x11380, 0x11389, "Lo"},
    {0x1138B, 0x1138B, "Lo"}, {0x1138E, 0x1138E, "Lo"}, {0x11390, 0x113B5, "Lo"}, {0x113B7, 0x113B7, "Lo"},
    {0x113B8, 0x113BA, "Mc"}, {0x113BB, 0x113C0, "Mn"}, {0x113C2, 0x113C2, "Mc"}, {0x113C5, 0x113C5, "Mc"},
    {0x113C7, 0x113CA, "Mc"}, {0x113CC, 0x113CD, "Mc"}, {0x113CE, 0x113CE, "Mn"}, {0x113CF, 0x113CF, "Mc"},
    {0x113D0, 0x113D0, "Mn"}, {0x113D1, 0x113D1, "Lo"}, {0x113D2, 0x113D2, "Mn"}, {0x113D3, 0x113D3, "Lo"},
    {0x113D4, 0x113D5, "Po"}, {0x113D7, 0x113D8, "Po"}, {0x113E1, 0x113E2, "Mn"}, {0x116D0, 0x116E3, "Nd"},
    {0x1171E, 0x1171E, "Mc"}, {0x11BC0, 0x11BE0, "Lo"}, {0x11BE1, 0x11BE1, "Po"}, {0x11BF0, 0x11BF9, "Nd"},
    {0x11F5A, 0x11F5A, "Mn"}, {0x13460, 0x143FA, "Lo"}, {0x16100, 0x1611D, "Lo"}, {0x1611E, 0x16129, "Mn"},
    {0x1612A, 0x1612C, "Mc"}, {0x1612D, 0x1612F, "Mn"}, {0x16130, 0x16139, "Nd"}, {0x16D40, 0x16D42, "Lm"},
    {0x16D43, 0x16D6A, "Lo"}, {0x16D6B, 0x16D6C, "Lm"}, {0x16D6D, 0x16D6F, "Po"}, {0x16D70, 0x16D79, "Nd"},
    {0x18CFF, 0x18CFF, "Lo"}, {0x1CC00, 0x1CCEF, "So"}, {0x1CCF0, 0x1CCF9, "Nd"}, {0x1CD00, 0x1CEB3, "So"},
    {0x1E5D0, 0x1E5ED, "Lo"}, {0x1E5EE, 0x1E5EF, "Mn"}, {0x1E5F0, 0x1E5F0, "Lo"}, {0x1E5F1, 0x1E5FA, "Nd"},
    {0x1E5FF, 0x1E5FF, "Po"}, {0x1F8B2, 0x1F8BB, "So"}, {0x1F8C0, 0x1F8C1, "So"}, {0x1FA89, 0x1FA89, "So"},
    {0x1FA8F, 0x1FA8F, "So"}, {0x1FABE, 0x1FABE, "So"}, {0x1FAC6, 0x1FAC6, "So"}, {0x1FADC, 0x1FADC, "So"},
    {0x1FADF, 0x1FADF, "So"}, {0x1FAE9, 0x1FAE9, "So"}, {0x1FBCB, 0x1FBEF, "So"}, {0x2EBF0, 0x2EE5D, "Lo"}};

std::string_view general_category(uint32_t code_point) {
    const auto found = std::lower_bound(std::begin(assigned_later), std::end(assigned_later), code_point,
                                        [](const Assigned& range, uint32_t c) { return range.last < c; });
    if (found != std::end(assigned_later) && found->first <= code_point) return found->category;
    return utf8proc_category_string(utf8proc_int32_t(code_point));
}

static CharacterClass class_of(uint32_t c, std::string_view category) {
    if (category[0] == 'L') return CharacterClass::letter;
    if (category[0] == 'N') return CharacterClass::number;
    if (category[0] == 'Z' || (c >= '\t' && c <= '\r') || c == 0x85) return CharacterClass::space;
    return CharacterClass::other;
}

const ClassTable& class_table() {
    static const ClassTable table = [] {
        std::vector<std::array<uint8_t, 256>> all(0x1100);
        for (uint32_t c = 0; c < 0x110000; ++c) {
            all[c >> 8][c & 0xFF] = uint8_t(class_of(c, utf8proc_category_string(utf8proc_int32_t(c))));
        }
        for (const auto& [first, last, category] : assigned_later) {
            for (uint32_t c = first; c <= last; ++c) all[c >> 8][c & 0xFF] = uint8_t(class_of(c, category));
        }
        ClassTable t;
        std::map<std::array<uint8_t, 256>, uint16_t> known;
        for (uint32_t i = 0; i < 0x1100; ++i) {
            const auto [at, is_new] = known.emplace(all[i], uint16_t(t.pages.size()));
            if (is_new) t.pages.push_back(all[i]);
            t.page_of[i] = at->second;
        }
        return t;
    }();
    return table;
}

// Alphabetic, marks, decimal digits, connecting punctuation, joiners. Alphabetic beyond letters, marks and letter
// numbers are the circled and squared Latin letters alone.
bool is_word_character(uint32_t c) {
    const std::string_view category = general_category(c);
    return category[0] == 'L' || category[0] == 'M' || category == "Nd" || category == "Nl" || category == "Pc" ||
           (c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) || (c >= 0x1F150 && c <= 0x1F169) ||
           (c >= 0x1F170 && c <= 0x1F189) || c == 0x200C || c == 0x200D;
}

// ---------------------------------------------------------------------------------------------------------------------
// Normal forms

// What normalization affects only since Unicode 10: for `tokenizers` these are characters like any other. (Between
// them lie characters that no normal form affects.)
static constexpr uint32_t unaffected[][2] = {
    {0x7FD, 0x7FD},     {0x897, 0x8D3},     {0x9FE, 0x9FE},     {0xC3C, 0xC3C},     {0xD3B, 0xD3C},
    {0xEBA, 0xEBA},     {0x1715, 0x1715},   {0x1ABF, 0x1AFF},   {0x1DF6, 0x1DFA},   {0x32FF, 0x32FF},
    {0xA7F1, 0xA7F4},   {0xA82C, 0xA82C},   {0xAB69, 0xAB69},   {0x105C0, 0x107BA}, {0x10D24, 0x10F85},
    {0x11070, 0x11070}, {0x1133B, 0x1133B}, {0x11380, 0x113FF}, {0x1145E, 0x1145E}, {0x11839, 0x11A99},
    {0x11D42, 0x11F42}, {0x16100, 0x1613F}, {0x16D40, 0x16FF1}, {0x1CCD6, 0x1CCF9}, {0x1E030, 0x1E5FF},
    {0x1F16C, 0x1F16C}, {0x1FBF0, 0x1FBF9}};

static bool is_newer(uint32_t c) {
    return std::any_of(std::begin(unaffected), std::end(unaffected),
                       [c](const uint32_t(&range)[2]) { return c >= range[0] && c <= range[1]; });
}

static std::string mapped(std::string_view text, int options) {
    uint8_t* normal = nullptr;
    const auto length = utf8proc_map(reinterpret_cast<const uint8_t*>(text.data()), utf8proc_ssize_t(text.size()),
                                     &normal, utf8proc_option_t(options));
    if (length < 0) throw std::runtime_error(std::string("cannot normalize a text: ") + utf8proc_errmsg(length));
    const std::unique_ptr<uint8_t, decltype(&std::free)> owner(normal, std::free);
    return std::string(reinterpret_cast<char*>(normal), size_t(length));
}

NormalForm NormalForm::named(std::string_view name) {
    const bool compose = name.back() == 'C', compatible = name.size() == 4;
    NormalForm form{
        UTF8PROC_STABLE | (compose ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE) | (compatible ? UTF8PROC_COMPAT : 0),
        std::vector<bool>(0x110000)};
    const auto mark = [&](uint32_t first, uint32_t last) {
        for (uint32_t c = first; c <= last; ++c) form.affected[c] = true;
    };
    if (compose) {  // Hangul: vowels and final consonants compose with what is before them
        mark(0x1161, 0x1175);
        mark(0x11A8, 0x11C2);
    } else {
        mark(0xAC00, 0xD7A3);
    }
    for (uint32_t c = 0xA0; c < 0x110000; ++c) {
        const utf8proc_property_t* property = utf8proc_get_property(utf8proc_int32_t(c));
        if (property->combining_class) form.affected[c] = true;
        if (property->decomp_seqindex == UINT16_MAX || (c >= 0xAC00 && c <= 0xD7A3)) continue;
        std::string character;
        append_utf8(character, c);
        if (mapped(character, form.options) != character) form.affected[c] = true;
        if (!compose || property->decomp_type != 0) continue;
        const std::string parts = mapped(character, UTF8PROC_STABLE | UTF8PROC_DECOMPOSE);
        for (size_t i = character_at(parts.data()).length; i < parts.size();) {
            const Character part = character_at(parts.data() + i);
            form.affected[part.code_point] = true;
            i += part.length;
        }
    }
    for (const auto& [first, last] : unaffected) std::fill_n(form.affected.begin() + first, last - first + 1, false);
    return form;
}

// Only stretches of affected characters, each with the character before it, are handed to utf8proc.
std::string_view NormalForm::apply(std::string_view text, std::string& buffer) const {
    buffer.clear();
    const char* const end = text.data() + text.size();
    const char* done = text.data();
    const char* before = nullptr;  // the character before p, where it is not done
    for (const char* p = done; p < end;) {
        const Character c = character_at(p);
        if (!affected[c.code_point]) {
            before = p;
            p += c.length;
            continue;
        }
        const char* const begin = before && !is_newer(character_at(before).code_point) ? before : p;
        while (p < end && affected[character_at(p).code_point]) p += character_at(p).length;
        buffer.append(done, begin);
        buffer += mapped({begin, p}, options);
        done = p;
        before = nullptr;
    }
    if (done == text.data()) return text;
    buffer.append(done, end);
    return buffer;
}
