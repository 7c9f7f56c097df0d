// log.jsonl: what a run did, for programs. One JSON object a line, its "event" first, its fields in the order given.
#pragma once

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "trainer/basics.h"

using json = nlohmann::ordered_json;  // keeps the order in which fields were added

// JSON in one line. Floating-point numbers have nine digits (%.9g), enough to tell any two floats apart; those that are
// not finite have no JSON form and are null.
inline std::string to_line(const json& value) {
    if (value.is_number_float()) {
        const double number = value.get<double>();
        return std::isfinite(number) ? text("%.9g", number) : "null";
    }
    const auto dump = [](const json& leaf) { return leaf.dump(-1, ' ', false, json::error_handler_t::replace); };
    if (!value.is_structured()) return dump(value);
    std::string line;
    for (const auto& [key, field] : value.items()) {
        if (!line.empty()) line += ",";
        if (value.is_object()) line += dump(key) + ":";
        line += to_line(field);
    }
    return value.is_object() ? "{" + line + "}" : "[" + line + "]";
}

// Open on the first rank only; elsewhere write() does nothing.
struct RunLog {
    std::unique_ptr<FILE, int (*)(FILE*)> file{nullptr, fclose};

    // Appends to what is there.
    void open(const std::string& path) {
        file.reset(fopen(path.c_str(), "a"));
        if (!file) throw Error(path + ": cannot be opened for writing: " + strerror(errno));
    }

    // On its way to disk when it returns: a run that is killed has logged every step it finished.
    void write(const char* event, const json& fields) {
        if (!file) return;
        json line = {{"event", event}};
        line.update(fields);
        fprintf(file.get(), "%s\n", to_line(line).c_str());
        if (fflush(file.get()) != 0) throw Error(std::string("log.jsonl: ") + strerror(errno));
    }
};
