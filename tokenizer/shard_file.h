// What stands in a shard's header, and what shards.json says of it: for those who write shards and those who read them.
//
// A shard is a file of llm.c: 256 int32 (magic, version, number of tokens, zeros), then the tokens, little endian.
//   vocabulary up to 65,536   magic 20240520, version 1, uint16
//   larger                    magic 20240801, version 7, uint32
//
// What tells a damaged shard from a whole one of the same size is the CRC-32 of its tokens, which `tokenize encode`
// records in the shards.json beside the shards. Errors are std::runtime_error, one line that names the file.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "trainer/crc32.h"
#include "trainer/files.h"

static_assert(std::endian::native == std::endian::little, "shards are little endian and read as they lie on disk");

struct ShardHeader {
    static constexpr uint32_t narrow_magic = 20240520, narrow_version = 1, wide_magic = 20240801, wide_version = 7;
    using Words = std::array<uint32_t, 256>;
    static constexpr int64_t bytes = sizeof(Words);

    int64_t tokens;
    int token_bytes;  // 2 or 4

    int64_t file_bytes() const { return bytes + tokens * token_bytes; }

    Words words() const {
        Words words{};
        words[0] = token_bytes == 2 ? narrow_magic : wide_magic;
        words[1] = token_bytes == 2 ? narrow_version : wide_version;
        words[2] = static_cast<uint32_t>(tokens);
        return words;
    }
};

// What a file with the wrong magic number probably is.
inline std::string guess_by_magic(uint32_t magic) {
    const uint32_t swapped = magic >> 24 | (magic >> 8 & 0xff00) | (magic << 8 & 0xff0000) | magic << 24;
    if (swapped == ShardHeader::narrow_magic || swapped == ShardHeader::wide_magic)
        return "the byte order is big endian, write it little endian";
    if (magic == 20240522) return "this is a multiple-choice evaluation file of llm.c, not a stream of tokens";
    if (magic == 20240326 || magic == 20240327 || magic == 20240328)
        return "this is a model or tokenizer file of llm.c";
    if (magic / 10000 >= 2024 && magic / 10000 < 2100) return "this may be another version of the format";
    return "a raw token file without header, or no token file; build/tokenize encode writes shards";
}

// Without blocking: opening a pipe would wait for its writer.
inline File open_shard_file(const std::string& path, const char* hint = "check the path") {
    return File(path, O_RDONLY | O_NONBLOCK, hint);
}

// Checks a file's header against its size.
inline ShardHeader read_shard_header(const File& file) {
    const std::string& path = file.path();
    const int64_t size = file.size();
    if (size == 0) fail(path, "the file is empty; make it again");
    if (size < ShardHeader::bytes) {
        fail(path, "truncated: " + std::to_string(size) + " bytes, but the header alone has " +
                       std::to_string(ShardHeader::bytes) + "; copy or make it again");
    }
    ShardHeader::Words words;
    file.read(0, sizeof words, words.data());
    const auto [magic, version, count] = std::array{words[0], words[1], words[2]};
    if (magic != ShardHeader::narrow_magic && magic != ShardHeader::wide_magic) {
        fail(path, "expected magic number 20240520 (uint16 tokens) or 20240801 (uint32 tokens), found " +
                       std::to_string(magic) + ": " + guess_by_magic(magic));
    }
    const ShardHeader header{count, magic == ShardHeader::narrow_magic ? 2 : 4};
    if (const uint32_t expected = header.words()[1]; version != expected) {
        fail(path, "expected version " + std::to_string(expected) + " for magic number " + std::to_string(magic) +
                       ", found " + std::to_string(version) + ": make the shards again with build/tokenize encode");
    }
    if (const int64_t expected = header.file_bytes(); size != expected) {
        fail(path, (size < expected ? "truncated: " : "too long: ") + std::to_string(size) + " bytes, but " +
                       std::to_string(count) + " tokens need " + std::to_string(expected) + "; copy or make it again");
    }
    const auto rest = std::find_if(words.begin() + 3, words.end(), [](uint32_t word) { return word != 0; });
    if (rest != words.end()) {
        fail(path, "expected zeros in the header after its third number, found " + std::to_string(*rest) + " at byte " +
                       std::to_string((rest - words.begin()) * sizeof(uint32_t)) +
                       ": the file is damaged; copy or make it again");
    }
    return header;
}

// What is recorded of the shard's tokens; nothing for a shard that encode did not write. A shards.json that is damaged
// is an error: it must not switch the check off.
inline std::optional<uint32_t> recorded_crc32(const std::string& shard) {
    const std::filesystem::path path(shard);
    const std::string list = path.parent_path() / "shards.json", name = path.filename();
    if (struct stat status; ::stat(list.c_str(), &status) != 0 && errno == ENOENT) return std::nullopt;
    const auto damaged = [&](const std::string& what) {
        fail(list, what + "; encode the text again, or remove the file: then no checksum is compared");
    };
    const nlohmann::json root = nlohmann::json::parse(read_file(list), nullptr, false);
    if (root.is_discarded()) damaged("damaged: not valid JSON");
    if (!root.is_object() || !root.contains("shards")) return std::nullopt;  // of another program
    if (!root["shards"].is_array())
        damaged(std::string("\"shards\": expected a list, found ") + root["shards"].type_name());
    std::optional<uint32_t> found;
    for (size_t i = 0; const nlohmann::json& entry : root["shards"]) {
        const std::string where = "\"shards\", entry " + std::to_string(++i) + ": ";
        if (!entry.is_object()) damaged(where + "expected an object, found " + entry.type_name());
        const nlohmann::json crc = entry.value("crc32", nlohmann::json(0u));
        if (entry.contains("name") && !entry["name"].is_string())
            damaged(where + "\"name\": expected a string, found " + entry["name"].type_name());
        if (!crc.is_number_unsigned() || crc.get<uint64_t>() > UINT32_MAX)
            damaged(where + "\"crc32\": expected an integer from 0 to 4294967295, found " +
                    (crc.is_number() ? crc.dump() : crc.type_name()));
        if (entry.contains("crc32") && entry.value("name", "") == name) found = crc.get<uint32_t>();
    }
    return found;
}
