#include "trainer/toml.h"

#include <toml++/toml.h>

#include <optional>
#include <sstream>

#include "trainer/basics.h"
#include "trainer/files.h"

namespace {

[[noreturn]] void refuse(const std::string& path, const toml::source_region& where, const std::string& why) {
    throw UsageError(text("%s:%d: %s", path.c_str(), (int)where.begin.line, why.c_str()));
}

std::optional<TomlValue> value_of(const toml::node& node) {
    if (const auto* value = node.as_string()) return value->get();
    if (const auto* value = node.as_integer()) return value->get();
    if (const auto* value = node.as_floating_point()) return value->get();
    if (const auto* value = node.as_boolean()) return value->get();
    return {};
}

}  // namespace

std::vector<TomlEntry> read_toml(const std::string& path) {
    toml::table table;
    try {
        const std::string contents = read_file(path);
        table = toml::parse(contents);
    } catch (const toml::parse_error& e) {
        refuse(path, e.source(), std::string(e.description()) + "; expected are lines NAME = VALUE, text in quotes");
    } catch (const std::runtime_error& e) {
        throw UsageError(e.what());
    }
    std::vector<TomlEntry> entries;
    for (const auto& [key, node] : table) {
        const std::string name(key.str());
        const std::optional<TomlValue> value = value_of(node);
        if (!value) {
            std::ostringstream type;
            type << node.type();
            refuse(path, key.source(), name + ": must be a single value, and is of type " + type.str());
        }
        entries.push_back({name, (int)key.source().begin.line, *value});
    }
    return entries;
}
