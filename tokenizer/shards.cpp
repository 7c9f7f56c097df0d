#include "shards.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <stdexcept>

namespace fs = std::filesystem;

static_assert(std::endian::native == std::endian::little,
              "shards are little endian, and written as they lie in memory");

static constexpr size_t header_words = 256;
static constexpr int32_t narrow_magic = 20240520, narrow_version = 1, wide_magic = 20240801, wide_version = 7;

[[noreturn]] static void fail(const std::string& verb, const std::string& path, const std::string& hint) {
    throw std::runtime_error("cannot " + verb + " " + path + ": " + std::strerror(errno) + "; " + hint);
}

[[noreturn]] static void fail_to_write(const std::string& path) {
    fail("write", path, "check the folder, its rights and its space");
}

// Removes all train_NNNNNN and val_NNNNNN that end with extension, and nothing else.
static void remove_shards(const std::string& folder, const std::string& extension) {
    std::vector<fs::path> found;
    for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
        const std::string name = entry.path().filename();
        for (const std::string prefix : {"train_", "val_"}) {
            if (name.size() != prefix.size() + 6 + extension.size() || !name.starts_with(prefix)) continue;
            if (!name.ends_with(extension)) continue;
            const std::string number = name.substr(prefix.size(), 6);
            if (number.find_first_not_of("0123456789") == number.npos) found.push_back(entry.path());
        }
    }
    for (const fs::path& path : found) fs::remove(path);
}

static void write_header(std::FILE* file, bool wide, int64_t tokens) {
    int32_t header[header_words] = {wide ? wide_magic : narrow_magic, wide ? wide_version : narrow_version,
                                    int32_t(tokens)};
    std::fwrite(header, sizeof header, 1, file);  // errors stay with the file until close() asks for them
}

ShardWriter::ShardWriter(std::string folder_, size_t vocab_size, int64_t shard_tokens)
    : folder(std::move(folder_)), wide(vocab_size > 65536), shard_tokens(shard_tokens) {
    std::error_code error;
    fs::create_directories(folder, error);
    if (error)
        throw std::runtime_error("cannot make the folder " + folder + ": " + error.message() +
                                 "; choose another --out");
    remove_shards(folder, ".bin.tmp");  // of a run that was killed
    open(train);                        // finds out now, not after an hour, that the folder cannot be written
}

ShardWriter::~ShardWriter() {
    std::error_code ignored;
    for (const std::string& name : names) fs::remove(folder + "/" + name + ".tmp", ignored);
}

void ShardWriter::open(Split split) {
    Stream& stream = streams[split];
    char name[32];
    std::snprintf(name, sizeof name, "%s_%06d.bin", split == train ? "train" : "val", stream.files++);
    names.push_back(name);
    const std::string path = folder + "/" + name + ".tmp";
    stream.file.reset(std::fopen(path.c_str(), "wb"));
    if (!stream.file) fail_to_write(path);
    stream.in_file = 0;
    write_header(stream.file.get(), wide, 0);
}

void ShardWriter::close(Split split) {
    Stream& stream = streams[split];
    if (!stream.file) return;
    std::FILE* file = stream.file.get();
    const bool sought = std::fseek(file, 0, SEEK_SET) == 0;
    if (sought) write_header(file, wide, stream.in_file);
    if (!sought || std::fflush(file) != 0 || std::ferror(file)) fail_to_write(folder);
    stream.file.reset();
}

void ShardWriter::write(Split split, const std::vector<uint32_t>& tokens) {
    Stream& stream = streams[split];
    for (size_t begin = 0; begin < tokens.size();) {
        if (stream.file && stream.in_file == shard_tokens) close(split);
        if (!stream.file) open(split);
        const size_t count = std::min(tokens.size() - begin, size_t(shard_tokens - stream.in_file));
        size_t written;
        if (wide) {
            written = std::fwrite(&tokens[begin], sizeof(uint32_t), count, stream.file.get());
        } else {
            const std::vector<uint16_t> narrow(tokens.begin() + begin, tokens.begin() + begin + count);
            written = std::fwrite(narrow.data(), sizeof(uint16_t), count, stream.file.get());
        }
        if (written != count) fail_to_write(folder + "/" + names.back());
        stream.in_file += count;
        stream.total += count;
        begin += count;
    }
}

void ShardWriter::commit() {
    close(train);
    close(val);
    remove_shards(folder, ".bin");
    for (const std::string& name : names) fs::rename(folder + "/" + name + ".tmp", folder + "/" + name);
    names.clear();
}

void read_shard(const std::string& path, const std::function<void(const std::vector<uint32_t>&)>& visit) {
    const std::unique_ptr<std::FILE, FileCloser> file(std::fopen(path.c_str(), "rb"));
    if (!file) fail("read", path, "check the path");
    int32_t header[header_words];
    const bool complete = std::fread(header, sizeof header, 1, file.get()) == 1;
    const bool narrow = complete && header[0] == narrow_magic && header[1] == narrow_version;
    const bool wide = complete && header[0] == wide_magic && header[1] == wide_version;
    if (!narrow && !wide) {
        throw std::runtime_error(path +
                                 ": not a token shard (no magic 20240520 or 20240801); give a file that `tokenize "
                                 "encode` wrote");
    }
    std::vector<uint32_t> tokens;
    std::vector<uint16_t> halves;
    for (int64_t left = header[2]; left > 0; left -= int64_t(tokens.size())) {
        tokens.resize(size_t(std::min<int64_t>(left, 1 << 20)));
        size_t count;
        if (wide) {
            count = std::fread(tokens.data(), sizeof(uint32_t), tokens.size(), file.get());
        } else {
            halves.resize(tokens.size());
            count = std::fread(halves.data(), sizeof(uint16_t), halves.size(), file.get());
            tokens.assign(halves.begin(), halves.end());
        }
        if (count != tokens.size()) {
            throw std::runtime_error(path + ": ends before its " + std::to_string(header[2]) +
                                     " tokens; get a fresh copy or encode the corpus again");
        }
        visit(tokens);
    }
}
