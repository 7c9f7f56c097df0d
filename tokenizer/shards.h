// Token shards, written so that an interruption may come anywhere, and read from start to end.
#pragma once

#include <dirent.h>

#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "conversation.h"

struct FileCloser {
    void operator()(std::FILE* file) const { std::fclose(file); }
    void operator()(DIR* folder) const { closedir(folder); }
};

struct WrittenShard {
    std::string name;
    int64_t tokens = 0;
    uint32_t crc32 = 0;  // of the file without its header
    // Of conversations, what is beside it:
    int64_t answers = 0, targets = 0;
    uint32_t targets_crc32 = 0;
};

// Writes the shards of one job (any JSON that tells it from others) to a folder:
//   NAME.bin.tmp   until commit(), which takes away the shards of earlier jobs and then renames its own, so that shards
//                  of two jobs never stand together, and a NAME.bin is always whole. So with NAME.targets of
//                  conversations
//   resume.json    what checkpoint() saved: after an interruption, a writer of the same job goes on from there
//   shards.json    of what is complete: the job, its summary, and each shard's tokens and checksum
// An interruption may come anywhere, within commit() too. A second writer in the folder is refused.
struct ShardWriter {
    enum Split { train, val };
    struct Stream {
        std::unique_ptr<std::FILE, FileCloser> file;
        std::unique_ptr<std::FILE, FileCloser> targets;  // the open file's; null where no conversation is in it
        std::vector<WrittenShard> shards;                // the last is being written while `file` is open

        int64_t tokens() const;
    };

    std::string folder;
    bool wide;  // uint32 tokens
    int64_t shard_tokens;
    nlohmann::json job;
    nlohmann::json resumed;  // the position that the last checkpoint() was given, or null: start from the beginning
    bool discarded = false;  // an interrupted job was another, or damaged, and is lost
    Stream streams[2];
    std::unique_ptr<DIR, FileCloser> lock;

    ShardWriter(std::string folder, size_t vocab_size, int64_t shard_tokens, nlohmann::json job = {});
    ~ShardWriter();
    void write(Split split, const std::vector<uint32_t>& tokens);
    void write(Split split, const EncodedConversation& conversation);  // whole, into one shard
    void checkpoint(const nlohmann::json& position);
    void commit(const nlohmann::json& position, const nlohmann::json& summary);

    std::string path(const WrittenShard& shard) const { return folder + "/" + shard.name; }
    std::vector<std::string> files() const;    // of all shards
    std::vector<WrittenShard> shards() const;  // of both streams
    void open(Split split);
    void append(Split split, const uint32_t* tokens, size_t count);
    void close(Split split);
    void save(const char* name, nlohmann::json content) const;
    bool restore(const nlohmann::json& saved);
};

// Reads a shard from start to end in chunks; returns the checksum of its tokens.
uint32_t read_shard(const std::string& path, const std::function<void(const std::vector<uint32_t>&)>& visit);
