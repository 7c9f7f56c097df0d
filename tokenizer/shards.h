// llm.c's token shards: 256 int32 (magic, version, number of tokens, zeros), then the tokens, little endian.
//   vocabulary up to 65,536   magic 20240520, version 1, uint16
//   larger                    magic 20240801, version 7, uint32
#pragma once

#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <vector>

struct FileCloser {
    void operator()(std::FILE* file) const { std::fclose(file); }
};

// One run's shards of one folder. They are written as NAME.bin.tmp; commit() takes away the shards of earlier runs and
// then renames, so that shards of two runs never stand together. Without commit() the folder stays as it was.
struct ShardWriter {
    enum Split { train, val };
    struct Stream {
        std::unique_ptr<std::FILE, FileCloser> file;
        int64_t in_file = 0, total = 0;  // tokens
        int files = 0;
    };

    std::string folder;
    bool wide;  // uint32 tokens
    int64_t shard_tokens;
    Stream streams[2];
    std::vector<std::string> names;  // without .tmp

    ShardWriter(std::string folder, size_t vocab_size, int64_t shard_tokens);
    ~ShardWriter();
    void write(Split split, const std::vector<uint32_t>& tokens);
    void commit();

    void open(Split split);
    void close(Split split);
};

// Reads a shard from start to end in chunks.
void read_shard(const std::string& path, const std::function<void(const std::vector<uint32_t>&)>& visit);
