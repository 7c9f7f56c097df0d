#include "shards.h"

#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <stdexcept>

#include "shard_file.h"
#include "trainer/files.h"

namespace fs = std::filesystem;
using nlohmann::json;

static constexpr size_t header_bytes = ShardHeader::bytes;

[[noreturn]] static void fail_to_write(const std::string& path) {
    fail_errno("cannot write", path, "check the folder, its rights and its space");
}

// Removes the files train_NNNNNN and val_NNNNNN with this extension, but for the paths to keep.
static void remove_shards(const std::string& folder, const std::string& extension,
                          const std::vector<std::string>& keep) {
    const auto kept = [&](const std::string& name) {
        return std::find(keep.begin(), keep.end(), folder + "/" + name) != keep.end();
    };
    std::vector<fs::path> found;
    for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
        const std::string name = entry.path().filename();
        for (const std::string prefix : {"train_", "val_"}) {
            if (name.size() != prefix.size() + 6 + extension.size() || !name.starts_with(prefix)) continue;
            if (!name.ends_with(extension)) continue;
            const std::string number = name.substr(prefix.size(), 6);
            if (number.find_first_not_of("0123456789") == number.npos && !kept(name)) found.push_back(entry.path());
        }
    }
    for (const fs::path& path : found) fs::remove(path);
}

static void write_header(std::FILE* file, bool wide, int64_t tokens) {
    const ShardHeader::Words words = ShardHeader{tokens, wide ? 4 : 2}.words();
    std::fwrite(words.data(), sizeof words, 1, file);  // errors stay with the file until they are asked for
}

static void flush_to_disk(std::FILE* file, const std::string& path) {
    if (std::fflush(file) != 0 || std::ferror(file) || fdatasync(fileno(file)) != 0) fail_to_write(path);
}

// ---------------------------------------------------------------------------------------------------------------------
// Writing

static void to_json(json& out, const WrittenShard& shard) {
    out = {{"name", shard.name}, {"tokens", shard.tokens}, {"crc32", shard.crc32}};
    if (shard.answers == 0) return;
    out.update({{"answers", shard.answers}, {"targets", shard.targets}, {"targets_crc32", shard.targets_crc32}});
}

static void from_json(const json& in, WrittenShard& shard) {
    shard = {in.at("name"), in.at("tokens"), in.at("crc32")};
    if (!in.contains("answers")) return;
    shard.answers = in.at("answers"), shard.targets = in.at("targets"), shard.targets_crc32 = in.at("targets_crc32");
}

int64_t ShardWriter::Stream::tokens() const {
    int64_t sum = 0;
    for (const WrittenShard& shard : shards) sum += shard.tokens;
    return sum;
}

ShardWriter::ShardWriter(std::string folder_, size_t vocab_size, int64_t shard_tokens, json job)
    : folder(std::move(folder_)), wide(vocab_size > 65536), shard_tokens(shard_tokens), job(std::move(job)) {
    std::error_code error;
    fs::create_directories(folder, error);
    if (error) fail("cannot make the folder " + folder + ": " + error.message() + "; choose another --out");
    lock.reset(opendir(folder.c_str()));
    if (!lock) fail_errno("cannot read", folder, "check its rights");
    if (flock(dirfd(lock.get()), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
        fail("another tokenize is writing to " + folder + "; wait for it or choose another --out");

    const std::string resume = folder + "/resume.json";
    if (fs::exists(resume)) {
        const json saved = json::parse(read_file(resume), nullptr, false);
        if (!restore(saved)) {
            discarded = true;
            for (Stream& stream : streams) stream = {};
        }
    }
    std::vector<std::string> ours = files();
    for (std::string& file : ours) file += ".tmp";
    remove_shards(folder, ".bin.tmp", ours);
    remove_shards(folder, ".targets.tmp", ours);
    if (resumed.is_null()) {
        fs::remove(resume);
        open(train);  // finds out now, not after an hour, that the folder cannot be written
    }
}

// What nobody can resume goes away.
ShardWriter::~ShardWriter() {
    if (!resumed.is_null()) return;
    std::error_code ignored;
    for (const std::string& file : files()) fs::remove(file + ".tmp", ignored);
}

std::vector<WrittenShard> ShardWriter::shards() const {
    std::vector<WrittenShard> all = streams[train].shards;
    all.insert(all.end(), streams[val].shards.begin(), streams[val].shards.end());
    return all;
}

std::vector<std::string> ShardWriter::files() const {
    std::vector<std::string> all;
    for (const WrittenShard& shard : shards()) {
        if (shard.answers > 0) all.push_back(targets_path(path(shard)));
        all.push_back(path(shard));
    }
    return all;
}

void ShardWriter::open(Split split) {
    Stream& stream = streams[split];
    char name[32];
    std::snprintf(name, sizeof name, "%s_%06zu.bin", split == train ? "train" : "val", stream.shards.size());
    stream.shards.push_back({name});
    const std::string temporary = path(stream.shards.back()) + ".tmp";
    stream.file.reset(std::fopen(temporary.c_str(), "wb"));
    if (!stream.file) fail_to_write(temporary);
    write_header(stream.file.get(), wide, 0);
}

void ShardWriter::close(Split split) {
    Stream& stream = streams[split];
    if (!stream.file) return;
    const WrittenShard& shard = stream.shards.back();
    const auto finish = [&](std::unique_ptr<std::FILE, FileCloser>& file, const std::string& path, auto write) {
        if (std::fseek(file.get(), 0, SEEK_SET) != 0) fail_to_write(path);
        write(file.get());
        flush_to_disk(file.get(), path);
        file.reset();
    };
    finish(stream.file, path(shard), [&](std::FILE* file) { write_header(file, wide, shard.tokens); });
    if (!stream.targets) return;
    const TargetsHeader header = {.tokens = uint32_t(shard.tokens),
                                  .tokens_crc32 = shard.crc32,
                                  .answers = uint32_t(shard.answers),
                                  .crc32 = shard.targets_crc32};
    finish(stream.targets, targets_path(path(shard)),
           [&](std::FILE* file) { std::fwrite(&header, sizeof header, 1, file); });
}

// To the shard that is open.
void ShardWriter::append(Split split, const uint32_t* tokens, size_t count) {
    Stream& stream = streams[split];
    WrittenShard& shard = stream.shards.back();
    std::vector<uint16_t> narrow;
    if (!wide) narrow.assign(tokens, tokens + count);
    const void* data = wide ? static_cast<const void*>(tokens) : narrow.data();
    const size_t bytes = count * (wide ? sizeof(uint32_t) : sizeof(uint16_t));
    if (std::fwrite(data, 1, bytes, stream.file.get()) != bytes) fail_to_write(path(shard));
    shard.crc32 = crc32_of(shard.crc32, data, bytes);
    shard.tokens += int64_t(count);
}

void ShardWriter::write(Split split, const std::vector<uint32_t>& tokens) {
    Stream& stream = streams[split];
    for (size_t begin = 0, count; begin < tokens.size(); begin += count) {
        if (stream.file && stream.shards.back().tokens == shard_tokens) close(split);
        if (!stream.file) open(split);
        count = std::min(tokens.size() - begin, size_t(shard_tokens - stream.shards.back().tokens));
        append(split, &tokens[begin], count);
    }
}

void ShardWriter::write(Split split, const EncodedConversation& conversation) {
    Stream& stream = streams[split];
    const std::vector<uint32_t>& tokens = conversation.tokens;
    const auto is_full = [&](const WrittenShard& shard) {
        return shard.tokens > 0 && shard.tokens + int64_t(tokens.size()) > shard_tokens;
    };
    if (stream.file && is_full(stream.shards.back())) close(split);
    if (!stream.file) open(split);
    WrittenShard& shard = stream.shards.back();
    const std::string beside = targets_path(path(shard)) + ".tmp";
    if (!stream.targets) {
        stream.targets.reset(std::fopen(beside.c_str(), "wb"));
        const TargetsHeader header;
        if (!stream.targets || std::fwrite(&header, sizeof header, 1, stream.targets.get()) != 1) fail_to_write(beside);
    }
    const auto start = uint32_t(shard.tokens);
    std::vector<Answer> answers;
    for (const auto& [begin, end] : conversation.answers) {
        answers.push_back({start, start + uint32_t(begin), start + uint32_t(end)});
        shard.targets += int64_t(end - begin);
    }
    const size_t bytes = answers.size() * sizeof(Answer);
    if (std::fwrite(answers.data(), 1, bytes, stream.targets.get()) != bytes) fail_to_write(beside);
    shard.targets_crc32 = crc32_of(shard.targets_crc32, answers.data(), bytes);
    shard.answers += int64_t(answers.size());
    append(split, tokens.data(), tokens.size());
}

void ShardWriter::save(const char* name, json content) const {
    content["job"] = job;
    replace_file(folder + "/" + name, content.dump(1) + "\n");
}

void ShardWriter::checkpoint(const json& position) {
    json saved = {{"position", position}, {"open", json::array()}};
    for (const Stream& stream : streams) {
        if (stream.file) flush_to_disk(stream.file.get(), path(stream.shards.back()));
        if (stream.targets) flush_to_disk(stream.targets.get(), targets_path(path(stream.shards.back())));
        saved["streams"].push_back(stream.shards);
        saved["open"].push_back(stream.file != nullptr);
    }
    save("resume.json", saved);
    resumed = position;
}

// Opens a file that was being written, cut back to what it had at the checkpoint; null if that is not there any more.
static std::unique_ptr<std::FILE, FileCloser> reopen(const std::string& path, size_t header_bytes, size_t bytes,
                                                     uint32_t crc32) {
    if (fs::file_size(path) < header_bytes + bytes) return nullptr;
    fs::resize_file(path, header_bytes + bytes);
    std::unique_ptr<std::FILE, FileCloser> file(std::fopen(path.c_str(), "rb+"));
    if (!file) fail_to_write(path);
    std::fseek(file.get(), header_bytes, SEEK_SET);
    std::vector<char> chunk(1 << 20);
    uint32_t crc = 0;
    while (const size_t count = std::fread(chunk.data(), 1, chunk.size(), file.get())) {
        crc = crc32_of(crc, chunk.data(), count);
    }
    std::fseek(file.get(), 0, SEEK_END);  // C wants a seek between reading and writing
    return crc == crc32 ? std::move(file) : nullptr;
}

// Takes over the files of an interrupted job; false if they are of another job, or not what it says.
bool ShardWriter::restore(const json& saved) try {
    if (saved.at("job") != job) return false;
    const auto open = saved.at("open").get<std::vector<bool>>();
    const bool committing = !open.at(train) && !open.at(val);
    for (Split split : {train, val}) {
        Stream& stream = streams[split];
        stream.shards = saved.at("streams").at(split).get<std::vector<WrittenShard>>();
        for (const WrittenShard& shard : stream.shards) {
            const bool is_open = open.at(split) && &shard == &stream.shards.back();
            const auto take_over = [&](const std::string& path, size_t header, size_t bytes, uint32_t crc32,
                                       auto& file) {
                const std::string temporary = path + ".tmp";
                if (is_open) return bool(file = reopen(temporary, header, bytes, crc32));
                const bool renamed = committing && !fs::exists(temporary);
                return fs::file_size(renamed ? path : temporary) == header + bytes;
            };
            const size_t token_bytes = wide ? sizeof(uint32_t) : sizeof(uint16_t);
            if (!take_over(path(shard), header_bytes, size_t(shard.tokens) * token_bytes, shard.crc32, stream.file))
                return false;
            if (shard.answers == 0) continue;
            if (!take_over(targets_path(path(shard)), sizeof(TargetsHeader), size_t(shard.answers) * sizeof(Answer),
                           shard.targets_crc32, stream.targets))
                return false;
        }
    }
    resumed = saved.at("position");
    return true;
} catch (const json::exception&) {
    return false;
} catch (const fs::filesystem_error&) {
    return false;
}

void ShardWriter::commit(const json& position, const json& summary) {
    close(train);
    close(val);
    checkpoint(position);
    // First all that is old, then all that is new: at no moment do both have names.
    std::vector<std::string> waiting, already_there;
    for (const std::string& file : files()) (fs::exists(file + ".tmp") ? waiting : already_there).push_back(file);
    fs::remove(folder + "/shards.json");
    remove_shards(folder, ".bin", already_there);
    remove_shards(folder, ".targets", already_there);
    for (const std::string& file : waiting) fs::rename(file + ".tmp", file);
    save("shards.json", {{"summary", summary}, {"shards", shards()}});
    fs::remove(folder + "/resume.json");
    fsync(dirfd(lock.get()));
}

// ---------------------------------------------------------------------------------------------------------------------
// Reading

uint32_t read_shard(const std::string& path, const std::function<void(const std::vector<uint32_t>&)>& visit) {
    const File file = open_shard_file(path);
    const ShardHeader header = read_shard_header(file);
    uint32_t crc = 0;
    std::vector<uint32_t> tokens;
    std::vector<uint16_t> halves;
    const bool narrow = header.token_bytes == 2;
    for (int64_t done = 0; done < header.tokens; done += int64_t(tokens.size())) {
        tokens.resize(size_t(std::min<int64_t>(header.tokens - done, 1 << 20)));
        halves.resize(narrow ? tokens.size() : 0);
        void* data = narrow ? static_cast<void*>(halves.data()) : tokens.data();
        const int64_t bytes = int64_t(tokens.size()) * header.token_bytes;
        file.read(ShardHeader::bytes + done * header.token_bytes, bytes, data);
        crc = crc32_of(crc, data, size_t(bytes));
        if (narrow) tokens.assign(halves.begin(), halves.end());
        visit(tokens);
    }
    return crc;
}
