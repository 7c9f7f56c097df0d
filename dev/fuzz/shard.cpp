// Damaged shards: whatever a file holds, the loaders refuse it in one line or hand out tokens of the vocabulary only.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "dataloader.h"
#include "tokenizer/shards.h"

namespace {

constexpr int vocab_size = 1000, B = 2, T = 4, document_token = 0;

void require(bool holds) {
    if (!holds) abort();
}

// Tokens of the vocabulary, each the target of the one before, up to the row's padding.
void check(const Batch& batch) {
    for (int i = 0; i < B * T; i++) {
        const int input = batch.inputs[i], target = batch.targets[i];
        require(input >= 0 && input < vocab_size && target >= -1 && target < vocab_size);
        if (target >= 0 && i % T < T - 1 && batch.targets[i + 1] >= 0) require(batch.inputs[i + 1] == target);
    }
}

void read(const std::string& path, int32_t token) {
    TrainLoader train(path, B, T, 0, 1, 1, vocab_size, token);
    for (int64_t i = 0; i <= train.rows() / B; i++) check(train.next());
    const ValLoader val(path, B, T, 0, vocab_size, token);
    Batch batch;
    for (int64_t i = 0; i <= val.batches(); i++) {
        val.read(i, batch);
        check(batch);
    }
}

// In memory: a file with a path, but not on disk.
void read_file(const void* header, size_t header_size, const uint8_t* data, size_t size) {
    const int file = memfd_create("shard", MFD_CLOEXEC);
    require(file >= 0 && write(file, header, header_size) == (ssize_t)header_size);
    require(write(file, data, size) == (ssize_t)size);
    const std::string path = "/proc/self/fd/" + std::to_string(file);
    for (const int32_t token : {no_document_token, document_token}) {
        try {
            read(path, token);
        } catch (const std::runtime_error& error) {
            require(error.what() == printable(error.what()));
        }
    }
    try {
        int64_t tokens = 0;
        read_shard(path, [&](const std::vector<uint32_t>& some) { tokens += (int64_t)some.size(); });
        require(tokens == read_shard_header(open_shard_file(path)).tokens);
    } catch (const std::runtime_error& error) {
        require(error.what() == printable(error.what()));
    }
    close(file);
}

}  // namespace

// The input as a whole file, and as the tokens behind a good header, which random changes seldom leave good.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    read_file(nullptr, 0, data, size);
    const uint32_t narrow[256] = {20240520, 1, (uint32_t)(size / 2)}, wide[256] = {20240801, 7, (uint32_t)(size / 4)};
    read_file(narrow, sizeof narrow, data, size / 2 * 2);
    read_file(wide, sizeof wide, data, size / 4 * 4);
    return 0;
}
