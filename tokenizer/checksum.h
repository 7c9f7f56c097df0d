// What tells a damaged shard from a whole one of the same size: the CRC-32 of its tokens, which `tokenize encode`
// records in the shards.json beside the shards.
#pragma once

#include <zlib.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

// Of the bytes that gave `before` (0 for none) and these.
inline uint32_t crc32_of(uint32_t before, const void* data, size_t bytes) {
    return static_cast<uint32_t>(crc32_z(before, static_cast<const Bytef*>(data), bytes));
}

// What is recorded of the shard's tokens; nothing for a shard that encode did not write.
inline std::optional<uint32_t> recorded_crc32(const std::string& shard) try {
    const std::filesystem::path path(shard);
    std::ifstream file(path.parent_path() / "shards.json");
    if (!file) return std::nullopt;
    const nlohmann::json list = nlohmann::json::parse(file);
    for (const nlohmann::json& entry : list.at("shards")) {
        if (entry.at("name") == path.filename().string()) return entry.at("crc32").get<uint32_t>();
    }
    return std::nullopt;
} catch (const nlohmann::json::exception&) {  // some other shards.json
    return std::nullopt;
}
