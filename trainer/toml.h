// TOML as config.toml has it: lines NAME = VALUE. Read by toml++, which nvcc cannot compile: so not in this header.
#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

using TomlValue = std::variant<std::string, int64_t, double, bool>;

struct TomlEntry {
    std::string name;
    int line;
    TomlValue value;
};

// Throws a UsageError that names the file, and the line that is no TOML or has another kind of value.
std::vector<TomlEntry> read_toml(const std::string& path);
