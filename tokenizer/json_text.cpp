#include "json_text.h"

#include <algorithm>
#include <array>
#include <cstdint>

#include "unicode.h"

namespace {

// Reads from left to right. Brackets are kept in a list: a recursion would let a deep text overflow the stack.
struct Scanner {
    std::string_view text;
    size_t at = 0;

    char peek() const { return at < text.size() ? text[at] : 0; }

    bool accept(char c) {
        if (peek() != c || at == text.size()) return false;
        ++at;
        return true;
    }

    [[noreturn]] void expected(const std::string& what) const {
        const size_t length = peek() < 0 ? character_at(&text[at]).length : 1;
        throw JsonError("not valid JSON: expected " + what + " at byte " + std::to_string(at + 1) + ", found " +
                        (at == text.size() ? "the end" : "'" + std::string(text.substr(at, length)) + "'") +
                        "; correct or remove the line");
    }

    char next_token() {
        while (at < text.size() && std::string_view(" \t\r\n").find(text[at]) != text.npos) ++at;
        return peek();
    }

    // The next character, if it is this one.
    bool accept_token(char c) { return next_token() == c && accept(c); }

    void digits() {
        if (peek() < '0' || peek() > '9') expected("a digit");
        while (peek() >= '0' && peek() <= '9') ++at;
    }

    void number() {
        accept('-');
        if (!accept('0')) digits();
        if (accept('.')) digits();
        if (accept('e') || accept('E')) {
            if (!accept('+')) accept('-');
            digits();
        }
    }

    uint32_t four_hex_digits() {
        uint32_t value = 0;
        for (int i = 0; i < 4; ++i, ++at) {
            const size_t digit = std::string_view("0123456789abcdef").find(char(peek() | 0x20));
            if (digit == text.npos || peek() < '0') expected("four hexadecimal digits behind \\u");
            value = value << 4 | uint32_t(digit);
        }
        return value;
    }

    // Behind \u. Two halves, each \uXXXX, are one character.
    uint32_t code_point() {
        const uint32_t first = four_hex_digits();
        if (first < 0xD800 || first > 0xDFFF) return first;
        const size_t behind = at;
        if (first < 0xDC00 && accept('\\') && accept('u')) {
            const uint32_t second = four_hex_digits();
            if (second >= 0xDC00 && second <= 0xDFFF) return 0x10000 + ((first & 0x3FF) << 10 | (second & 0x3FF));
        }
        at = behind;
        return 0xFFFD;
    }

    void escape(std::string& out) {
        static constexpr std::string_view names = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
        if (accept('u')) return append_utf8(out, code_point());
        const size_t i = at < text.size() ? names.find(text[at]) : names.npos;
        if (i == names.npos) expected("one of \"\\/bfnrtu behind \\");
        out += meanings[i];
        ++at;
    }

    // Replaces `out`.
    void string(std::string& out) {
        static constexpr auto plain = [] {
            std::array<bool, 256> plain{};
            for (int c = 0x20; c < 256; ++c) plain[c] = c != '"' && c != '\\';
            return plain;
        }();
        out.clear();
        if (!accept('"')) expected("a string");
        while (!accept('"')) {
            const size_t begin = at;
            while (at < text.size() && plain[uint8_t(text[at])]) ++at;
            out += text.substr(begin, at - begin);
            if (accept('\\')) escape(out);
            else if (peek() != '"') expected(at == text.size() ? "'\"'" : "no bare control character in a string");
        }
    }

    void scalar(std::string& buffer) {
        if (peek() == '"') return string(buffer);
        if (peek() == '-' || (peek() >= '0' && peek() <= '9')) return number();
        for (const std::string_view word : {"true", "false", "null"}) {
            if (!text.substr(at).starts_with(word)) continue;
            at += word.size();
            return;
        }
        expected("a value");
    }

    // The name of an object's field, and the colon behind it.
    void key(std::string& name) {
        next_token();
        string(name);
        if (!accept_token(':')) expected("':'");
    }

    // Any value.
    void value(std::string& buffer) {
        std::string open;  // brackets
        do {
            if (const char c = next_token(); c == '{' || c == '[') {
                open += c;
                ++at;
                if (next_token() != closing(c)) {
                    if (c == '{') key(buffer);
                    continue;
                }
            } else {
                scalar(buffer);
            }
            while (!open.empty() && !accept_token(',')) close(open);
            if (!open.empty() && open.back() == '{') key(buffer);
        } while (!open.empty());
    }

    static char closing(char bracket) { return bracket == '{' ? '}' : ']'; }

    void close(std::string& open) {
        const char c = closing(open.back());
        if (!accept_token(c)) expected(std::string("',' or '") + c + "'");
        open.pop_back();
    }
};

// Throws where a text is not valid UTF-8.
void check_utf8(std::string_view text) {
    std::string buffer;
    const std::string_view valid = to_utf8(text, buffer);
    if (valid.data() == text.data()) return;
    const auto bad = std::mismatch(text.begin(), text.end(), valid.begin()).first;
    throw JsonError("not valid JSON: expected UTF-8 at byte " + std::to_string(bad - text.begin() + 1) + ", found '" +
                    *bad + "'; correct or remove the line");
}

// Calls field(name) where each value begins, which it passes over. Returns whether the text is an object.
template <class Field>
bool for_each_field(Scanner& scanner, Field field) {
    std::string buffer, key;
    const bool is_object = scanner.accept_token('{');
    if (!is_object) scanner.value(buffer);
    else if (!scanner.accept_token('}')) {
        do {
            scanner.key(key);
            scanner.next_token();
            field(key);
        } while (scanner.accept_token(','));
        if (!scanner.accept_token('}')) scanner.expected("',' or '}'");
    }
    scanner.next_token();
    if (scanner.at < scanner.text.size()) scanner.expected("the end");
    return is_object;
}

// "a list", of a value as it stands in a text.
std::string kind_of(std::string_view value) {
    switch (value.empty() ? 0 : value[0]) {
        case '{': return "an object";
        case '[': return "a list";
        case '"': return "a string";
        case 't':
        case 'f':
        case 'n': return std::string(value);
        default: return "a number";
    }
}

}  // namespace

std::string string_field(std::string_view text, std::string_view name) {
    check_utf8(text);
    std::string buffer, found;
    bool is_there = false, is_string = false;
    Scanner scanner{text};
    const bool is_object = for_each_field(scanner, [&](const std::string& key) {
        const bool wanted = key == name, string = scanner.peek() == '"';
        scanner.value(wanted ? found : buffer);
        if (wanted) is_there = true, is_string = string;
    });
    const std::string wanted = "\"" + std::string(name) + "\"", advice = "; name the right one with --field";
    if (!is_object) throw JsonError("not a JSON object; a line is expected to be {" + wanted + ": \"...\"}");
    if (!is_there) throw JsonError("no field " + wanted + advice);
    if (!is_string) throw JsonError("the field " + wanted + " is not a string" + advice);
    return found;
}

JsonFields json_fields(std::string_view text) {
    check_utf8(text);
    JsonFields fields;
    std::string buffer;
    Scanner scanner{text};
    const bool is_object = for_each_field(scanner, [&](const std::string& key) {
        const size_t begin = scanner.at;
        scanner.value(buffer);
        fields.push_back({key, text.substr(begin, scanner.at - begin)});
    });
    if (!is_object) throw JsonError("not a JSON object, which a line is expected to be");
    return fields;
}

std::optional<std::string_view> find_field(const JsonFields& fields, std::string_view name) {
    const auto found = std::find_if(fields.rbegin(), fields.rend(), [&](const auto& f) { return f.first == name; });
    return found == fields.rend() ? std::nullopt : std::optional(found->second);
}

std::vector<std::string_view> json_elements(std::string_view value, const std::string& what) {
    if (!value.starts_with('[')) throw JsonError(what + ": expected a list, found " + kind_of(value));
    std::vector<std::string_view> elements;
    std::string buffer;
    Scanner scanner{value, 1};
    if (scanner.accept_token(']')) return elements;
    do {
        scanner.next_token();
        const size_t begin = scanner.at;
        scanner.value(buffer);
        elements.push_back(value.substr(begin, scanner.at - begin));
    } while (scanner.accept_token(','));
    return elements;
}

std::string json_string(std::string_view value, const std::string& what) {
    if (!value.starts_with('"')) throw JsonError(what + ": expected a string, found " + kind_of(value));
    std::string string;
    Scanner{value}.string(string);
    return string;
}
