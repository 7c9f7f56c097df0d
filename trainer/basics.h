// What every file of the trainer uses, on the host and without CUDA: errors, formatted text, sizes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>

#include "tokenizer/unicode.h"

// ---------------------------------------------------------------------------------------------------------------
// Text

// printf into a string.
[[gnu::format(printf, 1, 2)]] inline std::string text(const char* format, ...) {
    va_list args;
    va_start(args, format);
    char* buffer = nullptr;
    const int length = vasprintf(&buffer, format, args);
    va_end(args);
    std::string result = length < 0 ? format : buffer;
    if (length >= 0) free(buffer);
    return result;
}

// 1234567 as 1,234,567.
inline std::string with_commas(double value) {
    std::string digits = text("%.0f", value);
    for (int i = (int)digits.size() - 3; i > 0; i -= 3) digits.insert(digits.begin() + i, ',');
    return digits;
}

// Seconds as 5s, 2m 05s, 3h 07m.
inline std::string duration(double seconds) {
    const long s = std::lround(std::max(0.0, seconds));
    if (s < 60) return text("%lds", s);
    if (s < 3600) return text("%ldm %02lds", s / 60, s % 60);
    return text("%ldh %02ldm", s / 3600, s / 60 % 60);
}

// Of a message, which may hold bytes of a damaged file or of a name that is not UTF-8: those become U+FFFD.
inline std::string first_line(const std::string& message) {
    std::string buffer, line(to_utf8(message.substr(0, message.find('\n')), buffer));
    std::replace_if(
        line.begin(), line.end(), [](unsigned char c) { return c < ' ' || c == 0x7F; }, ' ');
    return line;
}

// ---------------------------------------------------------------------------------------------------------------
// Errors: one line, thrown; main prints it and takes the other ranks down.

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A flag or a value that the user can mend: exit status 2.
struct UsageError : Error {
    using Error::Error;
};

// ---------------------------------------------------------------------------------------------------------------
// Sizes

// A product of dimensions is int64_t; libraries and grids want int.
inline int narrow(int64_t value) {
    if (value < std::numeric_limits<int>::min() || value > std::numeric_limits<int>::max()) {
        throw Error(text("%lld does not fit into 32 bits: lower --batch-size or --seq-len", (long long)value));
    }
    return (int)value;
}

// constexpr, so that kernels may call them too.
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t multiple) { return ceil_div(a, multiple) * multiple; }
