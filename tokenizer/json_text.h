// What a JSON object holds, read without a look at what nobody asks for: numbers of any size, any depth.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

// What is wrong with a text, for a message that begins with where the text is from.
struct JsonError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The string that is the object's field of this name; of several the last, as in Python. The whole text is checked
// against RFC 8259. Half a surrogate pair (\ud83d of a cut-off emoji) is U+FFFD.
std::string string_field(std::string_view text, std::string_view name);

// The fields of an object in their order, each value as it stands in the text. The whole text is checked as above.
// Throws where it is no object.
using JsonFields = std::vector<std::pair<std::string, std::string_view>>;
JsonFields json_fields(std::string_view text);

// Of such fields the value of the one with this name, chosen as above.
std::optional<std::string_view> find_field(const JsonFields& fields, std::string_view name);

// Of such a value: the elements of a list; what a string says. Throw where it is none; `what` names it in the message.
std::vector<std::string_view> json_elements(std::string_view value, const std::string& what);
std::string json_string(std::string_view value, const std::string& what);
