// Damaged targets beside a good shard of conversations: the loaders refuse them in one line, or train on tokens of
// answers only.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <numeric>

#include "../../test/temporary_folder.h"
#include "dataloader.h"

namespace {

constexpr int tokens = 32, vocab_size = tokens, B = 2, T = 5;

void require(bool holds) {
    if (!holds) abort();
}

void write(const std::string& path, const void* header, size_t header_size, const void* data, size_t size) {
    std::ofstream file(path, std::ios::binary);
    file.write(static_cast<const char*>(header), std::streamsize(header_size));
    file.write(static_cast<const char*>(data), std::streamsize(size));
}

// The shard's tokens are their own places, so a target tells which token it is.
void check(const Batch& batch, const std::vector<Answer>& answers) {
    for (int i = 0; i < B * T; i++) {
        const int target = batch.targets[i];
        require(batch.inputs[i] >= 0 && batch.inputs[i] < tokens && target >= -1 && target < tokens);
        if (target < 0) continue;
        require(batch.inputs[i] == target - 1);
        require(std::any_of(answers.begin(), answers.end(),
                            [&](const Answer& a) { return target >= int(a.begin) && target < int(a.end); }));
    }
}

// `whole`: all of the targets' file, or only the answers in it.
void read(const std::string& shard, uint32_t tokens_crc32, const uint8_t* data, size_t size, bool whole) {
    const size_t count = size / sizeof(Answer);
    TargetsHeader header{.tokens = tokens, .tokens_crc32 = tokens_crc32, .answers = uint32_t(count)};
    header.crc32 = crc32_of(0, data, count * sizeof(Answer));
    if (whole) write(targets_path(shard), nullptr, 0, data, size);
    else write(targets_path(shard), &header, sizeof header, data, count * sizeof(Answer));
    for (const RowFormat::Rows rows : {RowFormat::documents, RowFormat::packed}) {
        try {
            const std::vector<Answer> answers = read_targets(shard, tokens)->answers;
            const RowFormat format(rows, no_document_token);
            TrainLoader train(shard, B, T, 0, 1, 1, vocab_size, format);
            for (int64_t i = 0; i <= train.rows() / B; i++) check(train.next(), answers);
            const ValLoader val(shard, B, T, 0, vocab_size, format);
            Batch batch;
            for (int64_t i = 0; i <= val.batches(); i++) {
                val.read(i, batch);
                check(batch, answers);
            }
        } catch (const std::runtime_error& error) {
            require(error.what() == printable(error.what()));
        }
    }
}

}  // namespace

// The input as a whole file, and as answers behind a good header.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static const TemporaryFolder folder;
    const std::string shard = folder / "a.bin";
    std::array<uint16_t, tokens> all;
    std::iota(all.begin(), all.end(), 0);
    const ShardHeader::Words header = ShardHeader{tokens, sizeof all[0]}.words();
    write(shard, header.data(), sizeof header, all.data(), sizeof all);
    for (const bool whole : {true, false}) read(shard, crc32_of(0, all.data(), sizeof all), data, size, whole);
    return 0;
}
