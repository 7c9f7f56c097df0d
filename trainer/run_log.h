// log.jsonl: what a run did, for programs. One JSON object a line, its "event" first, its fields in the order given.
#pragma once

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>

#include "trainer/basics.h"
#include "trainer/files.h"

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
    std::optional<File> file;
    std::string unwritten;  // lines that found no room on the disk: they go before the next one
    std::string error;      // why, while there are any

    // Appends to what is there. A last line that a crash cut short is ended first.
    void open(const std::string& path) {
        file.emplace(path, O_RDWR | O_CREAT | O_APPEND, "check the folder and its rights");
        const struct stat found = file->status();
        if (!S_ISREG(found.st_mode) || found.st_size == 0) return;
        char last;
        file->read(found.st_size - 1, 1, &last);
        if (last != '\n') unwritten = "\n";
    }

    // On its way to disk when it returns: a run that is killed has logged every step it finished. False, and `error`
    // says why, where the disk takes no more; nothing is lost while the process lives.
    bool write(const char* event, const json& fields) {
        if (!file) return true;
        json line = {{"event", event}};
        line.update(fields);
        unwritten += to_line(line) + "\n";
        error.clear();
        while (!unwritten.empty() && error.empty()) {
            const ssize_t n = ::write(file->descriptor(), unwritten.data(), unwritten.size());
            if (n >= 0) unwritten.erase(0, n);
            else if (errno != EINTR) error = "cannot write " + file->path() + ": " + strerror(errno);
        }
        return error.empty();
    }
};

// How many events of that step a log has which still count: a resumed run repeats the steps behind its checkpoint.
// Those that go on alike behind the step are one: an evaluation of the same task.
inline size_t count_events(const std::string& path, const std::string& event, int64_t step) {
    std::ifstream log(path);
    std::set<std::string> found;  // their fields behind the step
    for (std::string line; std::getline(log, line);) {
        char name[16];
        long long at = 0;
        int end = 0;
        if (sscanf(line.c_str(), "{\"event\":\"%15[a-z]\",\"step\":%lld%n", name, &at, &end) != 2) continue;
        if (name == event && at == step) found.insert(line.substr(end, line.find(',', end + 1) - end));
        if (name == std::string("train") && at <= step) found.clear();
    }
    return found.size();
}
