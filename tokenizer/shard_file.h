// What stands in a shard's header, and what shards.json says of it: for those who write shards and those who read them.
//
// A shard is a file of llm.c: 256 int32 (magic, version, number of tokens, zeros), then the tokens, little endian.
//   vocabulary up to 65,536   magic 20240520, version 1, uint16
//   larger                    magic 20240801, version 7, uint32
//
// What tells a damaged shard from a whole one of the same size is the CRC-32 of its tokens, which `tokenize encode`
// records in the shards.json beside the shards. Errors are std::runtime_error, one line that names the file.
//
// A shard of conversations, NAME.bin, has its targets beside it, NAME.targets: where its conversations and their
// answers are. All are uint32, little endian:
//   header     magic 20261126, version 1; of the shard: tokens, and their CRC-32; answers, and the CRC-32 of what
//              follows here; two zeros
//   answer     where its conversation begins in the shard, where it begins itself, and where it ends, all counted in
//              tokens, the end being that behind the token that ends the answer
// Answers are in their order. A conversation is whole in its shard, and reaches to the next one, or the shard's end.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

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

// What is recorded of the shard under this name; nothing for a shard that encode did not write. A shards.json that is
// damaged is an error: it must not switch the check off.
inline std::optional<uint32_t> recorded_checksum(const std::string& shard, const char* checksum) {
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
        const nlohmann::json crc = entry.value(checksum, nlohmann::json(0u));
        if (entry.contains("name") && !entry["name"].is_string())
            damaged(where + "\"name\": expected a string, found " + entry["name"].type_name());
        if (!crc.is_number_unsigned() || crc.get<uint64_t>() > UINT32_MAX)
            damaged(where + "\"" + checksum + "\": expected an integer from 0 to 4294967295, found " +
                    (crc.is_number() ? crc.dump() : crc.type_name()));
        if (entry.contains(checksum) && entry.value("name", "") == name) found = crc.get<uint32_t>();
    }
    return found;
}

inline std::optional<uint32_t> recorded_crc32(const std::string& shard) { return recorded_checksum(shard, "crc32"); }

// ---------------------------------------------------------------------------------------------------------------------
// Targets

struct Answer {
    uint32_t conversation, begin, end;  // tokens of the shard
};
static_assert(sizeof(Answer) == 3 * sizeof(uint32_t));

struct TargetsHeader {
    static constexpr uint32_t magic_number = 20261126, version_number = 1;
    uint32_t magic = magic_number, version = version_number, tokens = 0, tokens_crc32 = 0, answers = 0, crc32 = 0;
    uint32_t zeros[2] = {};
};

struct Targets {
    uint32_t tokens_crc32;  // of the shard that they belong to
    uint32_t crc32;         // of the answers
    std::vector<Answer> answers;
};

inline std::string targets_path(const std::string& shard) {
    return std::filesystem::path(shard).replace_extension(".targets");
}

// The targets beside a shard of so many tokens; nothing where it is no shard of conversations.
inline std::optional<Targets> read_targets(const std::string& shard, int64_t tokens) {
    const std::string path = targets_path(shard);
    const std::optional<uint32_t> recorded = recorded_checksum(shard, "targets_crc32");
    const char* again = "; copy it again, or encode the conversations again";
    if (struct stat status; ::stat(path.c_str(), &status) != 0 && errno == ENOENT) {
        if (!recorded) return std::nullopt;
        fail(path, "missing: shards.json says that " + shard +
                       " holds conversations, and it would say which tokens are trained on" + again);
    }
    const File file = open_shard_file(path);
    const auto expect = [&](const char* what, uint32_t expected, uint32_t found) {
        if (found == expected) return;
        fail(path, std::string("expected ") + what + " " + std::to_string(expected) + ", found " +
                       std::to_string(found) + again);
    };
    TargetsHeader header;
    const int64_t size = file.size(), header_bytes = sizeof header;
    if (size < header_bytes) fail(path, "truncated: no whole header" + std::string(again));
    file.read(0, header_bytes, &header);
    expect("magic number", TargetsHeader::magic_number, header.magic);
    expect("version", TargetsHeader::version_number, header.version);
    if (header.tokens != tokens) {
        fail(path, "belongs to another shard: one of " + std::to_string(header.tokens) + " tokens, while " + shard +
                       " has " + std::to_string(tokens) + again);
    }
    if (const int64_t expected = header_bytes + int64_t(header.answers) * int64_t(sizeof(Answer)); size != expected) {
        fail(path, (size < expected ? "truncated: " : "too long: ") + std::to_string(size) + " bytes, but " +
                       std::to_string(header.answers) + " answers need " + std::to_string(expected) + again);
    }
    Targets targets{header.tokens_crc32, header.crc32, std::vector<Answer>(header.answers)};
    const int64_t bytes = size - header_bytes;
    file.read(header_bytes, bytes, targets.answers.data());
    const char* damaged = "damaged: the checksum of its answers is not ";
    if (crc32_of(0, targets.answers.data(), size_t(bytes)) != header.crc32)
        fail(path, damaged + std::string("that in its header") + again);
    if (recorded.value_or(header.crc32) != header.crc32)
        fail(path, damaged + std::string("that in the shards.json beside it") + again);
    if (targets.answers.empty()) fail(path, "holds no answer" + std::string(again));
    Answer before = {0, 0, 0};
    for (const Answer& a : targets.answers) {
        const bool follows = a.conversation == before.conversation || a.conversation >= before.end;
        if (!follows || a.conversation >= a.begin || a.begin < before.end || a.begin >= a.end || a.end > tokens) {
            fail(path, "damaged: no answer can be tokens " + std::to_string(a.begin) + " to " + std::to_string(a.end) +
                           " of the conversation at token " + std::to_string(a.conversation) + again);
        }
        before = a;
    }
    return targets;
}
