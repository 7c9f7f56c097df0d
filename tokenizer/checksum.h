// What tells a damaged file from a whole one of the same size: a CRC-32. That of a shard's tokens is recorded by
// `tokenize encode` in the shards.json beside the shards, those of a checkpoint's files in its state/checksums.json.
#pragma once

#include <zlib.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "trainer/files.h"

// Of the bytes that gave `before` (0 for none) and these.
inline uint32_t crc32_of(uint32_t before, const void* data, size_t bytes) {
    return static_cast<uint32_t>(crc32_z(before, static_cast<const Bytef*>(data), bytes));
}

// Likewise, of bytes begin .. end - 1 of a file, which need not fit into memory.
inline uint32_t crc32_of(uint32_t before, const File& file, int64_t begin, int64_t end) {
    char piece[1 << 16];
    for (int64_t bytes; begin < end; begin += bytes) {
        bytes = std::min<int64_t>(end - begin, sizeof piece);
        file.read(begin, bytes, piece);
        before = crc32_of(before, piece, bytes);
    }
    return before;
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
