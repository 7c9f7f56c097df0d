// One field of a JSON object, read without a look at what the others hold: numbers of any size, any depth.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

// What is wrong with a text, for a message that begins with where the text is from.
struct JsonError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The string that is the object's field of this name; of several the last, as in Python. The whole text is checked
// against RFC 8259. Half a surrogate pair (\ud83d of a cut-off emoji) is U+FFFD.
std::string string_field(std::string_view text, std::string_view name);
