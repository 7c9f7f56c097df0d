// The loaders against shards written here: each token tells its own place, so that every window can be recognized.
#include "dataloader.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <memory>
#include <numeric>
#include <set>

#include "file_test.h"

namespace {

namespace fs = std::filesystem;

using Tokens = std::pmr::vector<int32_t>;

constexpr int vocab = 60000;

struct DataLoader : FileTest {
    std::string glob() const { return path("*.bin"); }

    template <class Token>
    void write(const std::string& name, const std::vector<Token>& tokens, std::array<int32_t, 3> header) {
        std::ofstream file(path(name), std::ios::binary);
        std::vector<int32_t> whole(256, 0);
        std::copy(header.begin(), header.end(), whole.begin());
        file.write(reinterpret_cast<const char*>(whole.data()), 1024);
        file.write(reinterpret_cast<const char*>(tokens.data()), tokens.size() * sizeof(Token));
    }

    void write16(const std::string& name, const std::vector<uint16_t>& tokens) {
        write(name, tokens, {20240520, 1, static_cast<int32_t>(tokens.size())});
    }
    void write32(const std::string& name, const std::vector<uint32_t>& tokens) {
        write(name, tokens, {20240801, 7, static_cast<int32_t>(tokens.size())});
    }

    // Tokens first, first + 1, ...
    void write_count(const std::string& name, int first, int count) {
        std::vector<uint16_t> tokens(count);
        std::iota(tokens.begin(), tokens.end(), first);
        write16(name, tokens);
    }

    // Four shards of 8, 25, 1 and 16 windows of 4; the tokens 1000 s + 0, 1, 2, ... tell shard and position.
    void write_four() {
        write_count("a.bin", 1000, 33);
        write_count("b.bin", 2000, 104);
        write_count("c.bin", 3000, 8);
        write_count("d.bin", 4000, 66);
    }
    static constexpr int T = 4, all_windows = 8 + 25 + 1 + 16;
};

// The rows of a batch, told by their first token; checks on the way that each row is a window and its targets follow
// it.
std::vector<int> windows_of(const Batch& batch, int T) {
    std::vector<int> firsts;
    EXPECT_EQ(batch.inputs.size(), batch.targets.size());
    for (size_t row = 0; row < batch.inputs.size(); row += T) {
        firsts.push_back(batch.inputs[row]);
        EXPECT_EQ(firsts.back() % 1000 % T, 0);
        for (int t = 0; t < T; t++) {
            EXPECT_EQ(batch.inputs[row + t], firsts.back() + t);
            EXPECT_EQ(batch.targets[row + t], firsts.back() + t + 1);
        }
    }
    return firsts;
}

std::vector<int> take(TrainLoader& loader, int T, int batches) {
    std::vector<int> all;
    for (int i = 0; i < batches; i++) {
        for (int first : windows_of(loader.next(), T)) all.push_back(first);
    }
    return all;
}

std::vector<int> slice(const std::vector<int>& v, size_t begin, size_t count) {
    return {v.begin() + begin, v.begin() + begin + count};
}

std::vector<int> sorted(std::vector<int> v) {
    std::sort(v.begin(), v.end());
    return v;
}

// ---------------------------------------------------------------------------------------------------------------------
// The order

TEST(Permutation, MapsOneToOne) {
    for (uint64_t n : {1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097}) {
        for (uint64_t key : {0, 1, 12345}) {
            std::vector<int> seen(n, 0);
            for (uint64_t i = 0; i < n; i++) {
                const uint64_t j = Permutation{n, key}(i);
                ASSERT_LT(j, n);
                seen[j]++;
            }
            EXPECT_EQ(seen, std::vector<int>(n, 1)) << n;
        }
    }
}

// Each number is equally likely at each place: with 2000 keys and 10 x 10 cells, chi-square has 81 degrees of freedom;
// 200 lies more than nine standard deviations (sqrt(2 * 81) = 12.7) above its mean.
TEST(Permutation, IsUniformOverKeys) {
    constexpr int n = 10, keys = 2000;
    std::array<std::array<int, n>, n> count{};
    for (uint64_t key = 0; key < keys; key++) {
        for (uint64_t i = 0; i < n; i++) count[i][Permutation{n, mix64(key)}(i)]++;
    }
    double chi_square = 0;
    for (const auto& row : count) {
        for (int c : row) chi_square += (c - keys / n) * (c - keys / n) / double(keys / n);
    }
    EXPECT_LT(chi_square, 200);
    EXPECT_GT(chi_square, 20);
}

TEST(Permutation, LeavesNeighboursApart) {
    constexpr uint64_t n = 10000;
    int together = 0;
    for (uint64_t i = 0; i + 1 < n; i++) {
        const Permutation permutation{n, 7};
        together += permutation(i + 1) - permutation(i) == 1;
    }
    EXPECT_LT(together, 10);  // 1 is expected
}

TEST(RowOrder, KnowsTheNextShard) {
    const std::vector<int64_t> rows = {3, 1, 4, 1, 5};
    RowOrder order(rows, 1), ahead(rows, 1);
    for (int64_t g = 0; g < 10 * (3 + 1 + 4 + 1 + 5); g++) {
        const RowOrder::Place place = order(g);
        EXPECT_EQ(ahead(g - place.used).shard, place.shard);
        EXPECT_EQ(ahead(g - place.used + rows[place.shard]).shard, place.next_shard) << g;
    }
}

TEST_F(DataLoader, TakesEveryWindowOnceAnEpoch) {
    write_four();
    TrainLoader loader(glob(), 5, T, 0, 1, 1, vocab);
    EXPECT_EQ(loader.tokens(), 33 + 104 + 8 + 66);
    EXPECT_EQ(loader.rows(), all_windows);
    std::vector<int> expected;
    for (int shard = 0; shard < 4; shard++) {
        const int windows[] = {8, 25, 1, 16};
        for (int i = 0; i < windows[shard]; i++) expected.push_back(1000 * (shard + 1) + i * T);
    }
    std::set<std::vector<int>> orders;
    for (int epoch = 0; epoch < 4; epoch++) {
        const std::vector<int> order = take(loader, T, all_windows / 5);
        EXPECT_EQ(sorted(order), expected);
        EXPECT_NE(order, expected);
        orders.insert(order);
    }
    EXPECT_EQ(orders.size(), 4u) << "two epochs have the same order";
}

TEST_F(DataLoader, KeepsTheWindowsOfAShardTogetherAndPermutesTheShards) {
    write_four();
    TrainLoader loader(glob(), all_windows, T, 0, 1, 1, vocab);
    std::set<std::vector<int>> shard_orders;
    for (int epoch = 0; epoch < 20; epoch++) {
        std::vector<int> shards;
        for (int first : take(loader, T, 1)) {
            if (shards.empty() || shards.back() != first / 1000) shards.push_back(first / 1000);
        }
        EXPECT_EQ(sorted(shards), (std::vector<int>{1, 2, 3, 4}));
        shard_orders.insert(shards);
    }
    EXPECT_GT(shard_orders.size(), 5u);
}

TEST_F(DataLoader, OrdersTheSameForAnyBatchSize) {
    write_four();
    TrainLoader one(glob(), 1, T, 0, 1, 9, vocab);
    const std::vector<int> order = take(one, T, 420);
    for (int B : {2, 3, 7, 60}) {
        TrainLoader loader(glob(), B, T, 0, 1, 9, vocab);
        EXPECT_EQ(take(loader, T, 420 / B), order) << B;
    }
}

TEST_F(DataLoader, DependsOnTheSeed) {
    write_four();
    TrainLoader a(glob(), 10, T, 0, 1, 1, vocab), same(glob(), 10, T, 0, 1, 1, vocab), b(glob(), 10, T, 0, 1, 2, vocab);
    const std::vector<int> order = take(a, T, 5);
    EXPECT_EQ(take(same, T, 5), order);
    EXPECT_NE(take(b, T, 5), order);
}

TEST_F(DataLoader, SlicesEachMicroBatchOverTheRanks) {
    write_four();
    TrainLoader alone(glob(), 1, T, 0, 1, 3, vocab);
    const std::vector<int> order = take(alone, T, 120);
    for (int ranks : {2, 3, 4}) {
        for (int rank = 0; rank < ranks; rank++) {
            TrainLoader loader(glob(), 2, T, rank, ranks, 3, vocab);
            for (int m = 0; m < 10; m++) {
                EXPECT_EQ(take(loader, T, 1), slice(order, (m * ranks + rank) * 2, 2)) << m << " of " << rank;
            }
            EXPECT_EQ(loader.position(), 10 * ranks * 2);
        }
    }
}

TEST_F(DataLoader, GivesAStepTheSameWindowsOnAnyNumberOfRanks) {
    write_four();
    constexpr int step_windows = 8;
    std::vector<std::vector<int>> expected;
    for (auto [ranks, B, micro_batches] :
         {std::array{1, 8, 1}, {1, 2, 4}, {2, 4, 1}, {2, 1, 4}, {4, 2, 1}, {4, 1, 2}}) {
        std::vector<std::vector<int>> all(20);
        for (int rank = 0; rank < ranks; rank++) {
            TrainLoader loader(glob(), B, T, rank, ranks, 5, vocab);
            for (auto& step : all) {
                for (int first : take(loader, T, micro_batches)) step.push_back(first);
            }
        }
        for (auto& step : all) {
            EXPECT_EQ(step.size(), size_t{step_windows});
            step = sorted(step);
        }
        if (expected.empty()) expected = all;
        EXPECT_EQ(all, expected) << ranks << " ranks, B " << B;
    }
}

TEST_F(DataLoader, SeeksToWhereRunningLeads) {
    write_four();
    TrainLoader running(glob(), 3, T, 0, 1, 4, vocab);
    const std::vector<int> order = take(running, T, 80);
    EXPECT_EQ(running.position(), 240);
    for (int64_t position : {0, 1, 3, 49, 50, 51, 137}) {
        TrainLoader loader(glob(), 3, T, 0, 1, 4, vocab);
        loader.seek(position);
        EXPECT_EQ(loader.position(), position);
        EXPECT_EQ(take(loader, T, 10), slice(order, position, 30));
        EXPECT_EQ(loader.position(), position + 30);
        loader.seek(6);  // back, while the thread reads ahead
        EXPECT_EQ(take(loader, T, 2), slice(order, 6, 6));
    }
    expect_contains(error_of([&] { running.seek(-1); }), {"-1", "negative"});
}

TEST_F(DataLoader, ResumesOnAnotherNumberOfRanks) {
    write_four();
    TrainLoader alone(glob(), 1, T, 0, 1, 6, vocab);
    const std::vector<int> order = take(alone, T, 100);
    TrainLoader before(glob(), 4, T, 1, 2, 6, vocab);
    take(before, T, 5);
    std::vector<int> after;
    for (int rank = 0; rank < 4; rank++) {
        TrainLoader loader(glob(), 3, T, rank, 4, 6, vocab);
        loader.seek(before.position());
        for (int first : take(loader, T, 1)) after.push_back(first);
    }
    EXPECT_EQ(after, slice(order, 40, 12));
}

TEST_F(DataLoader, SeeksFar) {
    write_four();
    TrainLoader loader(glob(), 1, T, 0, 1, 1, vocab);
    loader.seek(int64_t{1} << 50);
    take(loader, T, 100);
    EXPECT_EQ(loader.position(), (int64_t{1} << 50) + 100);
}

TEST_F(DataLoader, SkipsShardsShorterThanAWindow) {
    write_count("a.bin", 1000, 4);  // T tokens: one too few
    write_count("b.bin", 2000, 5);
    TrainLoader loader(glob(), 1, T, 0, 1, 1, vocab);
    EXPECT_EQ(loader.tokens(), 9);
    EXPECT_EQ(loader.rows(), 1);
    EXPECT_EQ(take(loader, T, 3), (std::vector<int>{2000, 2000, 2000}));
    expect_contains(error_of([&] { TrainLoader(glob(), 1, 5, 0, 1, 1, vocab); }), {"*.bin", "6 tokens", "--seq-len"});
}

TEST_F(DataLoader, ReadsBothFormatsSideBySide) {
    write_count("a.bin", 1000, 9);
    write32("b.bin", {100000, 100001, 100002, 100003, 100004, 100005, 100006, 100007, 100008});
    TrainLoader loader(glob(), 4, T, 0, 1, 1, 200000);
    EXPECT_EQ(sorted(take(loader, T, 1)), (std::vector<int>{1000, 1004, 100000, 100004}));
}

TEST_F(DataLoader, KeepsTheLastBatches) {
    write_four();
    TrainLoader loader(glob(), 2, T, 0, 1, 1, vocab);
    std::vector<std::pair<const Batch*, Batch>> last;  // the batch, and what it held
    for (int i = 0; i < 50; i++) {
        const Batch& batch = loader.next();
        last.push_back({&batch, batch});
        if (last.size() > TrainLoader::kept) last.erase(last.begin());
        if (i % 10 == 9) std::this_thread::sleep_for(std::chrono::milliseconds(5));  // time to overwrite them
        for (const auto& [kept, copy] : last) {
            EXPECT_EQ(kept->inputs, copy.inputs);
            EXPECT_EQ(kept->targets, copy.targets);
        }
    }
}

// The memory is taken once, from where the caller says: on a GPU it must be page-locked.
TEST_F(DataLoader, KeepsItsBatchesInTheMemoryItIsGiven) {
    write_four();
    constexpr int B = 3;
    std::array<std::byte, 1 << 12> memory;
    std::pmr::monotonic_buffer_resource resource(memory.data(), memory.size(), std::pmr::null_memory_resource());
    TrainLoader loader(glob(), B, T, 0, 1, 1, vocab, no_document_token, &resource);
    for (int i = 0; i < 50; i++) {
        const Batch& batch = loader.next();
        for (const Tokens* tokens : {&batch.inputs, &batch.targets}) {
            EXPECT_EQ(tokens->size(), size_t{B * T});
            EXPECT_GE((const void*)tokens->data(), (const void*)memory.data());
            EXPECT_LE((const void*)(tokens->data() + tokens->size()), (const void*)(memory.data() + memory.size()));
        }
    }
}

TEST_F(DataLoader, CountsTheTimeItWaits) {
    write_count("a.bin", 1000, 33);
    TrainLoader slow(glob(), 1 << 18, T, 0, 1, 1, vocab);
    slow.next();
    EXPECT_GT(slow.waited_ms(), 0);

    TrainLoader ready(glob(), 2, T, 0, 1, 1, vocab);
    ready.seek(0);
    for (int i = 0; i < 20; i++) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));  // a training step
        ready.next();
    }
    EXPECT_EQ(ready.waited_ms(), 0);
}

TEST_F(DataLoader, EndsPromptly) {
    write_four();
    const auto now = std::chrono::steady_clock::now;
    auto loader = std::make_unique<TrainLoader>(glob(), 1 << 18, T, 0, 1, 1, vocab);
    const auto start = now();
    loader->next();
    const auto batch_read = now();  // the thread is at the beginning of the next one
    loader.reset();
    EXPECT_LT(now() - batch_read, (batch_read - start) / 2) << "it finished the batch";

    TrainLoader never_used(glob(), 1, T, 0, 1, 1, vocab);
    TrainLoader waiting(glob(), 1, T, 0, 1, 1, vocab);  // its ring will be full
    waiting.next();
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
}

// ---------------------------------------------------------------------------------------------------------------------
// Documents

// E is the document token. Rows of T = 4, by shard:
constexpr int E = 7;
struct Documents : DataLoader {
    struct Row {
        std::vector<int32_t> inputs, targets;
        auto operator<=>(const Row&) const = default;
    };

    void write_documents() {
        // The end of a document that began elsewhere; one of 2 tokens; an empty one; one of exactly T; a long one; an
        // empty one; one that the shard's end cuts.
        write16("a.bin", {90, 91, E, 11, E, E, 21, 22, 23, E, 31, 32, 33, 34, 35, E, E, 41});
        write32("b.bin", {E, 51, 52, E});  // nothing is known of what follows the last token
        write16("c.bin", {95, 96});        // no document starts
    }
    const std::vector<Row> rows = {{{E, 11, E, E}, {11, E, -1, -1}},
                                   {{E, 21, 22, 23}, {21, 22, 23, E}},
                                   {{E, 31, 32, 33}, {31, 32, 33, 34}},
                                   {{E, E, E, E}, {41, -1, -1, -1}},
                                   {{E, 51, 52, E}, {51, 52, E, -1}}};

    static std::vector<Row> rows_of(const Batch& batch) {
        std::vector<Row> rows;
        for (size_t at = 0; at < batch.inputs.size(); at += T) {
            rows.push_back({{batch.inputs.begin() + at, batch.inputs.begin() + at + T},
                            {batch.targets.begin() + at, batch.targets.begin() + at + T}});
        }
        return rows;
    }

    static std::vector<Row> take(TrainLoader& loader, int batches) {
        std::vector<Row> all;
        for (int i = 0; i < batches; i++) {
            for (const Row& row : rows_of(loader.next())) all.push_back(row);
        }
        return all;
    }
};

TEST_F(Documents, FillARowEachOnceAnEpoch) {
    write_documents();
    TrainLoader loader(glob(), 5, T, 0, 1, 1, vocab, E);
    EXPECT_EQ(loader.tokens(), 18 + 4 + 2);
    EXPECT_EQ(loader.rows(), 5);
    std::vector<Row> expected = rows;
    std::sort(expected.begin(), expected.end());
    std::set<std::vector<Row>> orders;
    for (int epoch = 0; epoch < 8; epoch++) {
        std::vector<Row> order = take(loader, 1);
        orders.insert(order);
        std::sort(order.begin(), order.end());
        EXPECT_EQ(order, expected);
    }
    EXPECT_GT(orders.size(), 4u);
}

TEST_F(Documents, AreOrderedTheSameForAnyBatchSizeAndRanks) {
    write_documents();
    TrainLoader alone(glob(), 1, T, 0, 1, 3, vocab, E);
    const std::vector<Row> order = take(alone, 24);
    for (auto [ranks, B] : {std::array{1, 3}, {2, 2}, {4, 1}, {3, 4}}) {
        for (int rank = 0; rank < ranks; rank++) {
            TrainLoader loader(glob(), B, T, rank, ranks, 3, vocab, E);
            loader.seek(4);
            const std::vector<Row> mine = take(loader, 1);
            const auto expected = order.begin() + 4 + rank * B;
            EXPECT_EQ(mine, (std::vector<Row>{expected, expected + B})) << ranks << " ranks, B " << B;
            EXPECT_EQ(loader.position(), 4 + ranks * B);
        }
    }
}

// Documents that lie across the pieces in which a shard is searched, in more shards than there are threads.
TEST_F(Documents, AreFoundInLargeShards) {
    constexpr int shards = 20, length = 1000;
    for (int s = 0; s < shards; s++) {
        std::vector<uint16_t> tokens(600 * length + s);
        for (size_t i = 0; i < tokens.size(); i++) tokens[i] = (i + s) % length == 0 ? E : 100 + s;
        write16(std::to_string(s) + ".bin", tokens);
    }
    TrainLoader loader(glob(), 1, T, 0, 1, 1, vocab, E);
    EXPECT_EQ(loader.rows(), shards * 600);
    for (int i = 0; i < 600; i++) {
        const Batch& batch = loader.next();
        const int token = batch.targets[0];
        EXPECT_EQ(batch.inputs, (Tokens{E, token, token, token}));
        EXPECT_EQ(batch.targets, Tokens(T, token));
    }
}

TEST_F(Documents, AreValidatedInOrder) {
    write_documents();
    // A document counts if it begins among the first `limit` tokens; targets are counted whole.
    for (auto [limit, documents, targets] : {std::array{0, 5, 14},
                                             {2, 0, 0},
                                             {3, 1, 2},
                                             {5, 1, 2},
                                             {6, 2, 6},
                                             {10, 3, 10},
                                             {16, 3, 10},
                                             {17, 4, 11},
                                             {18, 4, 11},
                                             {19, 5, 14}}) {
        if (documents == 0) {
            expect_contains(error_of([&, limit = limit] { ValLoader(glob(), 1, T, limit, vocab, E); }),
                            {"*.bin", "--eval-tokens", "--eot-token"});
            continue;
        }
        for (int B : {1, 2, 5, 8}) {
            const ValLoader loader(glob(), B, T, limit, vocab, E);
            EXPECT_EQ(loader.predicted_tokens(), targets) << limit;
            EXPECT_EQ(loader.batches(), (documents + B - 1) / B) << limit;
            Batch batch;
            for (int64_t i = 0; i < loader.batches() + 1; i++) {
                loader.read(i, batch);
                const std::vector<Row> found = rows_of(batch);
                for (int b = 0; b < B; b++) {
                    const int document = int(i) * B + b;
                    if (document < documents) EXPECT_EQ(found[b], rows[document]) << limit;
                    else EXPECT_EQ(found[b].targets, std::vector<int32_t>(T, -1)) << limit;
                }
            }
        }
    }
}

TEST_F(Documents, AreSearchedBeforeTraining) {
    write_documents();
    expect_contains(error_of([&] { TrainLoader(glob(), 1, T, 0, 1, 1, vocab, 8); }),
                    {"*.bin", "no document", "24 tokens is 8", "--eot-token"});
    write16("d.bin", std::vector<uint16_t>(5000, 12));
    const std::string message = error_of([&] { TrainLoader(glob(), 1, T, 0, 1, 1, 96, E); });
    expect_contains(message, {path("c.bin"), "token 96", "vocabulary of 96"});
}

// ---------------------------------------------------------------------------------------------------------------------
// Conversations

struct Conversations : Documents {
    void write_targets(const std::string& name, const std::vector<uint16_t>& tokens,
                       const std::vector<Answer>& answers) {
        write16(name + ".bin", tokens);
        TargetsHeader header;
        header.tokens = static_cast<uint32_t>(tokens.size());
        header.tokens_crc32 = crc32_of(0, tokens.data(), 2 * tokens.size());
        header.answers = static_cast<uint32_t>(answers.size());
        header.crc32 = crc32_of(0, answers.data(), answers.size() * sizeof(Answer));
        std::ofstream file(path(name + ".targets"), std::ios::binary);
        file.write(reinterpret_cast<const char*>(&header), sizeof header);
        file.write(reinterpret_cast<const char*>(answers.data()), answers.size() * sizeof(Answer));
    }

    // One whose answer ends with the document token; one of two answers, with that token inside and a token behind the
    // last; one that is cut; one that is cut before its answer begins.
    void write_conversations() {
        write_targets("a", {E, 11, 12, E, E, 21, 22, E, 23, 24, 25}, {{0, 2, 4}, {4, 6, 8}, {4, 9, 10}});
        write_targets("b", {E, 31, 32, 33, 34, 35, 36, 37, 38, E, 41, 42, 43, 44, 45, 46, 47, 48},
                      {{0, 3, 9}, {9, 16, 18}});
    }
    static constexpr int T = 6;
    const std::vector<Row> rows = {{{E, 11, 12, 0, 0, 0}, {-1, 12, E, -1, -1, -1}},
                                   {{E, 21, 22, E, 23, 0}, {-1, 22, E, -1, 24, -1}},
                                   {{E, 31, 32, 33, 34, 35}, {-1, -1, 33, 34, 35, 36}}};
    const std::vector<Row> rows_with_prompts = {{{E, 11, 12, 0, 0, 0}, {11, 12, E, -1, -1, -1}},
                                                {{E, 21, 22, E, 23, 24}, {21, 22, E, 23, 24, 25}},
                                                {{E, 31, 32, 33, 34, 35}, {31, 32, 33, 34, 35, 36}},
                                                {{E, 41, 42, 43, 44, 45}, {41, 42, 43, 44, 45, 46}}};

    static std::vector<Row> rows_of(const Batch& batch, int T) {
        std::vector<Row> rows;
        for (size_t at = 0; at < batch.inputs.size(); at += T) {
            rows.push_back({{batch.inputs.begin() + at, batch.inputs.begin() + at + T},
                            {batch.targets.begin() + at, batch.targets.begin() + at + T}});
        }
        return rows;
    }
};

TEST_F(Conversations, AreRowsWhoseTargetsAreTheirAnswers) {
    write_conversations();
    for (const bool prompts : {false, true}) {
        const RowFormat format(RowFormat::documents, no_document_token, prompts);
        std::vector<Row> expected = prompts ? rows_with_prompts : rows;
        const int n = static_cast<int>(expected.size());
        TrainLoader loader(glob(), n, T, 0, 1, 1, vocab, format);
        EXPECT_EQ(loader.rows(), n);
        EXPECT_EQ(loader.documents(), n);
        EXPECT_EQ(loader.cut(), prompts ? 2 : 1);
        EXPECT_EQ(loader.left_out(), prompts ? 0 : 1);
        const ValLoader val(glob(), n, T, 0, vocab, format);
        Batch batch;
        val.read(0, batch);
        EXPECT_EQ(rows_of(batch, T), expected);
        EXPECT_EQ(val.predicted_tokens(), prompts ? 21 : 9);
        std::sort(expected.begin(), expected.end());
        std::vector<Row> found = rows_of(loader.next(), T);
        std::sort(found.begin(), found.end());
        EXPECT_EQ(found, expected);
    }
    // Those that begin among the first tokens.
    for (const auto& [limit, n] : {std::pair{4, 1}, {5, 2}, {11, 2}, {12, 3}}) {
        const ValLoader val(glob(), 1, T, limit, vocab, RowFormat(RowFormat::documents, no_document_token));
        EXPECT_EQ(val.batches(), n) << limit;
    }
}

// Any rows are those documents, one behind the other, each once; and the same for any batch size.
TEST_F(Conversations, ShareRowsWhenPacked) {
    std::vector<uint16_t> tokens;
    std::vector<Answer> answers;
    std::mt19937 random(1);
    constexpr int T = 16, count = 200;
    int64_t inputs = 0;
    for (int i = 0; i < count; i++) {
        const uint32_t begin = static_cast<uint32_t>(tokens.size()), length = 2 + random() % 14,
                       answer = 1 + random() % (length - 1);
        for (uint32_t k = 0; k < length; k++) tokens.push_back(static_cast<uint16_t>(100 + 100 * i + k));
        answers.push_back({begin, begin + answer, begin + length});
        inputs += length - 1;
    }
    write_targets("a", tokens, answers);
    const RowFormat format(RowFormat::packed, no_document_token);
    TrainLoader loader(glob(), 1, T, 0, 1, 1, vocab, format);
    EXPECT_EQ(loader.documents(), count);
    EXPECT_EQ(loader.cut(), 0);
    EXPECT_LE(loader.rows(), inputs / T * 1.08);
    std::set<int> seen;
    std::vector<Batch> order;
    for (int64_t r = 0; r < loader.rows(); r++) {
        const Batch& batch = loader.next();
        order.push_back(batch);
        int at = 0;
        while (at < T && batch.inputs[at] > 0) {
            const int document = (batch.inputs[at] - 100) / 100;
            EXPECT_TRUE(seen.insert(document).second) << document;
            const Answer& answer = answers[document];
            for (uint32_t k = 0; k < answer.end - answer.conversation - 1; k++, at++) {
                ASSERT_LT(at, T);
                const int token = 100 + 100 * document + static_cast<int>(k);
                EXPECT_EQ(batch.inputs[at], token);
                EXPECT_EQ(batch.positions[at], k);
                EXPECT_EQ(batch.targets[at], answer.conversation + k + 1 >= answer.begin ? token + 1 : -1);
            }
        }
        for (; at < T; at++) {
            EXPECT_EQ(batch.positions[at], 0);
            EXPECT_EQ(batch.targets[at], -1);
        }
    }
    EXPECT_EQ(seen.size(), size_t(count));
    TrainLoader second_of_two(glob(), 3, T, 1, 2, 1, vocab, format);
    second_of_two.seek(6);
    const Batch& batch = second_of_two.next();
    for (int b = 0; b < 3; b++) {
        const Batch& alone = order[6 + 3 + b];
        EXPECT_TRUE(std::equal(alone.inputs.begin(), alone.inputs.end(), batch.inputs.begin() + b * T));
        EXPECT_TRUE(std::equal(alone.targets.begin(), alone.targets.end(), batch.targets.begin() + b * T));
        EXPECT_TRUE(std::equal(alone.positions.begin(), alone.positions.end(), batch.positions.begin() + b * T));
    }
    int64_t targets = 0;
    for (const Answer& answer : answers) targets += answer.end - answer.begin;
    EXPECT_EQ(ValLoader(glob(), 4, T, 0, vocab, format).predicted_tokens(), targets);
}

// Documents without targets can share rows too.
TEST_F(Documents, ShareRowsWhenPacked) {
    write16("a.bin", {E, 11, E, 21, E, 31, 32, 33, 34, E});
    TrainLoader loader(glob(), 2, T, 0, 1, 1, vocab, RowFormat(RowFormat::packed, E));
    EXPECT_EQ(loader.rows(), 2);
    EXPECT_EQ(loader.documents(), 3);
    EXPECT_EQ(loader.cut(), 1);
    const Batch& batch = loader.next();
    std::vector<Row> found = rows_of(batch);
    std::sort(found.begin(), found.end());
    EXPECT_EQ(found, (std::vector<Row>{{{E, 11, E, 21}, {11, E, 21, E}}, {{E, 31, 32, 33}, {31, 32, 33, 34}}}));
    const int two = batch.inputs[1] == 11 ? 0 : T;
    EXPECT_EQ(Tokens(batch.positions.begin() + two, batch.positions.begin() + two + T), (Tokens{0, 1, 0, 1}));
}

TEST_F(Conversations, AreRefusedWithoutTheirTargets) {
    write_conversations();
    const RowFormat format(RowFormat::documents, no_document_token);
    const auto says = [&](int T, const std::vector<std::string>& parts) {
        expect_contains(error_of([&] { TrainLoader(glob(), 1, T, 0, 1, 1, vocab, format).next(); }), parts);
    };
    EXPECT_EQ(TrainLoader(glob(), 1, 8, 0, 1, 1, vocab, format).left_out(), 0);
    says(1, {"*.bin", "none of 4 conversations", "first 2 tokens", "--seq-len"});
    fs::remove(path("b.targets"));
    says(T, {path("b.targets"), "missing, while " + path("a.bin")});
    fs::rename(path("a.targets"), path("b.targets"));
    says(T, {path("b.targets"), "another shard", "11 tokens"});
    fs::remove(path("b.bin"));
    // Tokens that are not those the targets were made for.
    write_targets("a", {E, 11, 12, E}, {{0, 2, 4}});
    write16("a.bin", {E, 11, 13, E});
    says(T, {path("a.bin"), "damaged", "targets beside it"});
}

// ---------------------------------------------------------------------------------------------------------------------
// Validation

TEST_F(DataLoader, ValidatesEachTokenOnceInOrder) {
    write_count("b.bin", 17, 3);  // the order of the names counts, not that of the writing
    write_count("a.bin", 0, 17);
    write32("c.bin", {20, 21, 22, 23, 24, 25, 26, 27, 28, 29});
    // 30 tokens: predicted are 1 .. limit, with limit from 1 to 29 and beyond.
    for (int limit : {0, 1, 3, 4, 5, 12, 16, 19, 24, 28, 29, 30, 1000}) {
        for (int B : {1, 2, 3, 100}) {
            const ValLoader loader(glob(), B, T, limit, vocab);
            const int predicted = limit == 0 ? 29 : std::min(limit, 29);
            EXPECT_EQ(loader.predicted_tokens(), predicted);
            EXPECT_EQ(loader.batches(), (predicted + B * T - 1) / (B * T));
            Batch batch;
            for (int64_t i = loader.batches() - 1; i >= 0; i--) {  // any order will do
                loader.read(i, batch);
                ASSERT_EQ(batch.inputs.size(), size_t(B * T));
                ASSERT_EQ(batch.targets.size(), size_t(B * T));
                for (int k = 0; k < B * T; k++) {
                    const int place = int(i) * B * T + k;
                    EXPECT_EQ(batch.inputs[k], place < predicted ? place : 0);
                    EXPECT_EQ(batch.targets[k], place < predicted ? place + 1 : -1);
                }
            }
            loader.read(loader.batches(), batch);
            EXPECT_EQ(batch.targets, Tokens(B * T, -1));
        }
    }
}

TEST_F(DataLoader, ValidatesShardsShorterThanAWindow) {
    for (int i = 0; i < 10; i++) write_count(std::string(1, static_cast<char>('0' + i)) + ".bin", i, 1);
    Batch batch;
    ValLoader(glob(), 2, T, 0, vocab).read(0, batch);
    EXPECT_EQ(batch.inputs, (Tokens{0, 1, 2, 3, 4, 5, 6, 7}));
    EXPECT_EQ(batch.targets, (Tokens{1, 2, 3, 4, 5, 6, 7, 8}));
}

TEST_F(DataLoader, CannotValidateOnOneToken) {
    write_count("a.bin", 0, 1);
    expect_contains(error_of([&] { ValLoader(glob(), 1, T, 0, vocab); }), {"*.bin", "one token"});
}

// ---------------------------------------------------------------------------------------------------------------------
// Files

TEST_F(DataLoader, SortsShardsByName) {
    for (const char* name : {"x_2.bin", "x_10.bin", "X_1.bin", "x_1.bin"}) write_count(name, 0, 9);
    EXPECT_EQ(find_shards(glob()),
              (std::vector<std::string>{path("X_1.bin"), path("x_1.bin"), path("x_10.bin"), path("x_2.bin")}));
}

TEST_F(DataLoader, SaysWhatToDoWithoutShards) {
    const std::string missing = "/nowhere/train_*.bin";
    const std::string message = "no shards match " + missing + ": run `make data` (or --train GLOB)";
    EXPECT_EQ(error_of([&] { find_shards(missing); }), message);
    EXPECT_EQ(error_of([&] { TrainLoader(missing, 1, T, 0, 1, 1, vocab); }), message);
    expect_contains(error_of([&] { ValLoader(missing, 1, T, 0, vocab); }), {missing, "--val GLOB"});
    expect_contains(error_of([&] { find_shards(""); }), {"no shards match"});
    write_four();
    for (const char* slash : {"", "/"}) {
        expect_contains(error_of([&] { find_shards(folder.string() + slash); }),
                        {folder.string() + slash + ": a folder", "--train '" + path("train_*.bin") + "'"});
        expect_contains(error_of([&] { ValLoader(folder.string() + slash, 1, T, 0, vocab); }),
                        {": a folder", "--val '" + path("val_*.bin") + "'"});
    }
    expect_contains(error_of([&] { find_shards(path("a.bin/")); }), {"no shards match " + path("a.bin/")});
    expect_contains(error_of([&] { find_shards(path("caf\xe9_*.bin")); }), {"caf\\xe9_*.bin"});
}

// From folder to folder.
TEST_F(DataLoader, TakesANameLiterallyBeforeAsAPattern) {
    for (const char* name : {"run[1]", "run1", "run[1]/sub*", "run[1]/subs"}) fs::create_directory(path(name));
    for (const char* name : {"run[1]/a.bin", "run1/a.bin", "run[1]/data[0].bin", "run[1]/data0.bin",
                             "run[1]/sub*/x.bin", "run[1]/subs/x.bin", "run1/data0.bin", "run[1]/b\\.bin"})
        write_count(name, 0, 9);
    const auto found = [&](const std::string& pattern) {
        std::vector<std::string> names;
        for (const std::string& file : find_shards(path(pattern))) names.push_back(file.substr(path("").size()));
        return names;
    };
    using Names = std::vector<std::string>;
    EXPECT_EQ(found("run[1]/a.bin"), Names{"run[1]/a.bin"});
    EXPECT_EQ(found("run[1]/a*"), Names{"run[1]/a.bin"});
    EXPECT_EQ(found("run[1]/data[0].bin"), Names{"run[1]/data[0].bin"});
    EXPECT_EQ(found("run[1]//data*.bin"), (Names{"run[1]//data0.bin", "run[1]//data[0].bin"}));
    EXPECT_EQ(found("run1/data[0].bin"), Names{"run1/data0.bin"});
    EXPECT_EQ(found("run[12]/a.bin"), Names{"run1/a.bin"});
    EXPECT_EQ(found("run*/a.bin"), (Names{"run1/a.bin", "run[1]/a.bin"}));
    EXPECT_EQ(found("run*/data[0].bin"), (Names{"run1/data0.bin", "run[1]/data[0].bin"}));
    EXPECT_EQ(found("run\\[1]/sub*/*"), Names{"run[1]/sub*/x.bin"});
    EXPECT_EQ(found("run[1]/b\\.bin"), Names{"run[1]/b\\.bin"});
}

TEST_F(DataLoader, ChecksEachHeader) {
    const std::vector<uint16_t> ten(10, 1);
    const auto message = [&](std::array<int32_t, 3> header) {
        write("bad.bin", ten, header);
        const std::string train = error_of([&] { TrainLoader(glob(), 1, T, 0, 1, 1, vocab); });
        EXPECT_EQ(error_of([&] { ValLoader(glob(), 1, T, 0, vocab); }), train);
        expect_contains(train, {path("bad.bin") + ": "});
        return train;
    };
    const auto swapped = [](uint32_t x) { return static_cast<int32_t>(__builtin_bswap32(x)); };
    expect_contains(message({12345, 1, 10}), {"20240520", "20240801", "found 12345"});
    expect_contains(message({swapped(20240520), swapped(1), swapped(10)}), {"20240520", "byte order"});
    expect_contains(message({swapped(20240801), swapped(7), swapped(10)}), {"20240520", "byte order"});
    expect_contains(message({20240522, 1, 10}), {"found 20240522", "multiple-choice"});
    expect_contains(message({20240326, 1, 10}), {"found 20240326", "model"});
    expect_contains(message({20250101, 1, 10}), {"found 20250101", "another version"});
    expect_contains(message({20240520, 2, 10}), {"expected version 1", "found 2"});
    expect_contains(message({20240520, 7, 10}), {"expected version 1", "found 7"});
    expect_contains(message({20240801, 1, 5}), {"expected version 7", "found 1"});
    expect_contains(message({20240520, 1, 11}), {"truncated", "1044 bytes", "11 tokens", "1046"});
    expect_contains(message({20240520, 1, 9}), {"too long", "1044 bytes", "9 tokens", "1042"});
    expect_contains(message({20240801, 7, 10}), {"truncated", "1064"});
    expect_contains(message({20240520, 1, -1}), {"truncated", "4294967295 tokens"});
    expect_contains(message({20240801, 7, -1}), {"truncated", "4294967295 tokens need 17179870204"});
    expect_contains(message({20240801, 7, 0x40000005}),
                    {"truncated", "1073741829 tokens need 4294968340"});  // 1044 + 2^32
    expect_contains(message({20240520, 1, int(0x80000000)}), {"truncated", "2147483648 tokens"});
    expect_contains(message({20240520, 0, 10}), {"expected version 1", "found 0"});
    expect_contains(message({20240520, -1, 10}), {"expected version 1", "found 4294967295"});
    expect_contains(message({0, 0, 0}), {"found 0"});
    write16("bad.bin", ten);
    for (const int odd : {1043, 1045}) {
        fs::resize_file(path("bad.bin"), odd);
        expect_contains(error_of([&] { ValLoader(glob(), 1, T, 0, vocab); }),
                        {path("bad.bin"), std::to_string(odd) + " bytes", "10 tokens need 1044"});
    }
    for (const int place : {3, 4, 100, 255}) {
        write("bad.bin", ten, {20240520, 1, 10});
        std::fstream(path("bad.bin"), std::ios::binary | std::ios::in | std::ios::out).seekp(place * 4 + 3).put('\x80');
        expect_contains(error_of([&] { ValLoader(glob(), 1, T, 0, vocab); }),
                        {path("bad.bin"), "zeros", "found 2147483648 at byte " + std::to_string(place * 4), "damaged"});
    }
}

TEST_F(DataLoader, ChecksFilesWithoutContent) {
    write16("empty.bin", {});
    expect_contains(error_of([&] { TrainLoader(glob(), 1, T, 0, 1, 1, vocab); }), {path("empty.bin"), "no tokens"});
    std::ofstream(path("empty.bin")).close();
    expect_contains(error_of([&] { ValLoader(glob(), 1, T, 0, vocab); }), {path("empty.bin"), "the file is empty"});
    std::ofstream(path("empty.bin")) << "short";
    expect_contains(error_of([&] { ValLoader(glob(), 1, T, 0, vocab); }), {path("empty.bin"), "truncated", "5 bytes"});
    fs::remove(path("empty.bin"));
    fs::create_directory(path("empty.bin"));
    expect_contains(error_of([&] { ValLoader(glob(), 1, T, 0, vocab); }), {path("empty.bin"), "a folder"});
    fs::remove(path("empty.bin"));
    ASSERT_EQ(mkfifo(path("empty.bin").c_str(), 0600), 0);  // opening it must not wait for a writer
    expect_contains(error_of([&] { ValLoader(glob(), 1, T, 0, vocab); }), {path("empty.bin"), "not a regular file"});
    fs::remove(path("empty.bin"));
    fs::create_symlink("nowhere", path("empty.bin"));
    expect_contains(error_of([&] { TrainLoader(glob(), 1, T, 0, 1, 1, vocab); }), {path("empty.bin"), "No such file"});
}

TEST_F(DataLoader, ChecksPermissions) {
    write_four();
    fs::permissions(path("b.bin"), fs::perms::none);
    // Root reads everything: become nobody, for this thread alone.
    const bool root = geteuid() == 0;
    chmod(folder.c_str(), 0755);
    ASSERT_TRUE(!root || syscall(SYS_setresuid, -1, 65534, -1) == 0);
    const std::string message = error_of([&] { TrainLoader(glob(), 1, T, 0, 1, 1, vocab); });
    ASSERT_TRUE(!root || syscall(SYS_setresuid, -1, 0, -1) == 0);
    expect_contains(message, {"cannot open " + path("b.bin"), "Permission denied"});
}

TEST_F(DataLoader, KeepsValidationFilesOutOfTraining) {
    write_four();
    fs::create_directory(path("val"));
    write_count("val/x.bin", 1000, 33);  // the same content is not the same file
    const auto check = [&](const std::string& val) {
        check_apart(TrainLoader(glob(), 1, T, 0, 1, 1, vocab).shards(), ValLoader(val, 1, T, 0, vocab).shards());
    };
    check(path("val/*.bin"));
    expect_contains(error_of([&] { check(path("c.bin")); }), {path("c.bin") + " is among", "--train", "--val"});
    expect_contains(error_of([&] { check(path("val/../b.bin")); }),
                    {path("val/../b.bin"), "same file as " + path("b.bin")});
    fs::create_symlink("../a.bin", path("val/y.bin"));
    expect_contains(error_of([&] { check(path("val/*.bin")); }), {path("val/y.bin"), "same file as " + path("a.bin")});
    fs::remove(path("val/y.bin"));
    fs::create_hard_link(path("d.bin"), path("val/z.bin"));
    expect_contains(error_of([&] { check(path("val/*.bin")); }), {path("val/z.bin"), "same file as " + path("d.bin")});
}

TEST_F(DataLoader, NamesTheTokenOutsideTheVocabulary) {
    std::vector<uint16_t> tokens(40, 5);
    tokens[26] = 99;
    write16("a.bin", tokens);
    const auto train = [&](int vocab_size) {
        TrainLoader loader(glob(), 1, T, 0, 1, 1, vocab_size);
        for (int i = 0; i < 9; i++) loader.next();
    };
    train(100);
    const std::string message = error_of([&] { train(99); });
    expect_contains(message, {path("a.bin"), "token 99", "position 26", "vocabulary of 99", "--vocab", "--tokenizer"});

    EXPECT_EQ(error_of([&] { TrainLoader(glob(), 1, T, 0, 1, 1, 99); }), message) << "found before training";

    Batch batch;
    ValLoader(glob(), 1, T, 0, 99).read(0, batch);
    EXPECT_EQ(error_of([&] { ValLoader(glob(), 1, T, 0, 99).read(6, batch); }), message);
    ValLoader(glob(), 1, T, 0, 100).read(6, batch);

    // Far from a shard's beginning it shows when it is read: it is never handed out.
    tokens.resize(8000, 5);
    std::swap(tokens[26], tokens[7000]);
    write16("a.bin", tokens);
    TrainLoader late(glob(), 1, T, 0, 1, 1, 99);
    expect_contains(error_of([&] {
                        for (int i = 0; i < 2000; i++) EXPECT_EQ(late.next().targets, Tokens(T, 5));
                    }),
                    {path("a.bin"), "token 99", "position 7000"});

    fs::remove(path("a.bin"));
    write32("b.bin", {1, 2, 0xffffffff, 4, 5, 6});  // must not pass as -1
    expect_contains(error_of([&] { train(1 << 30); }), {path("b.bin"), "token 4294967295", "position 2"});
}

TEST_F(DataLoader, HandsOutWhatWasReadBeforeAnError) {
    write_count("a.bin", 1000, 4001);
    TrainLoader whole(glob(), 1, T, 0, 1, 1, vocab),
        broken(glob(), 1, T, 0, 1, 1, 4990);  // the last windows are too high
    const std::vector<int> order = take(whole, T, 1000);
    const size_t good =
        std::find_if(order.begin(), order.end(), [](int first) { return first + T >= 4990; }) - order.begin();
    EXPECT_EQ(take(broken, T, int(good)), slice(order, 0, good));
    const std::string message = error_of([&] { broken.next(); });
    expect_contains(message, {"token 49", "vocabulary of 4990"});
    EXPECT_EQ(error_of([&] { broken.next(); }), message);  // and again
    broken.seek(0);
    EXPECT_EQ(take(broken, T, 1), slice(order, 0, 1));
}

// Damage that no size and no vocabulary shows. The checksums are those of Python's zlib.crc32.
TEST_F(DataLoader, HandsOutNoRowOfADamagedShard) {
    write_four();
    const auto record = [&](const std::string& content) { std::ofstream(path("shards.json")) << content; };
    record(R"({"shards": [{"name": "a.bin", "crc32": 2259524571}, {"name": "b.bin", "crc32": 1873118023},
                          {"name": "d.bin", "crc32": 156367351}]})");  // c.bin came from elsewhere
    TrainLoader whole(glob(), 1, T, 0, 1, 1, vocab);
    const std::vector<int> order = take(whole, T, 2 * all_windows);
    ValLoader(glob(), 1, T, 0, vocab);

    std::fstream(path("b.bin"), std::ios::binary | std::ios::in | std::ios::out).seekp(1024 + 206).put('\x01');
    for (const int ranks : {1, 2}) {
        TrainLoader damaged(glob(), 1, T, 0, ranks, 1, vocab);
        std::vector<int> before;
        for (int i = 0; i < all_windows && order[i] / 1000 != 2; i += ranks) before.push_back(order[i]);
        EXPECT_EQ(take(damaged, T, int(before.size())), before);
        const std::string message = error_of([&] { damaged.next(); });
        expect_contains(message, {path("b.bin"), "damaged", "checksum", "shards.json"});
        damaged.seek(all_windows - 1);  // elsewhere, and from there on into it
        expect_contains(error_of([&] { take(damaged, T, all_windows); }), {path("b.bin"), "checksum"});
    }
    expect_contains(error_of([&] { ValLoader(glob(), 1, T, 0, vocab); }), {path("b.bin"), "checksum"});
    ValLoader(glob(), 1, T, 32, vocab);  // ends before it
    expect_contains(error_of([&] { ValLoader(glob(), 1, T, 33, vocab); }), {path("b.bin"), "checksum"});
}

// A shards.json that is damaged must not switch the check off; one that says nothing of a shard is no matter.
TEST_F(DataLoader, StopsAtADamagedListOfChecksums) {
    write_four();
    const auto record = [&](const std::string& content) { std::ofstream(path("shards.json")) << content; };
    for (const char* other : {"[]", "[7]", "{}", R"({"summary": 7})", R"({"shards": []})", R"({"shards": [{}]})",
                              R"({"shards": [{"name": "b.bin"}]})", R"({"shards": [{"crc32": 5}]})",
                              R"({"shards": [{"name": "e.bin", "crc32": 5}]})",
                              R"({"shards": [{"name": "b.bin", "crc32": 1873118023, "tokens": "many"}]})"}) {
        record(other);
        TrainLoader loader(glob(), 1, T, 0, 1, 1, vocab);
        for (int i = 0; i < all_windows; i++) loader.next();
        ValLoader(glob(), 1, T, 0, vocab);
    }
    const std::string file = path("shards.json") + ": ";
    const auto refuses = [&](const std::string& content, const std::vector<std::string>& parts) {
        record(content);
        const std::string message = error_of([&] { TrainLoader(glob(), 1, T, 0, 1, 1, vocab); });
        EXPECT_EQ(message, error_of([&] { ValLoader(glob(), 1, T, 0, vocab); }));
        expect_contains(message, {file, "encode the text again, or remove the file"});
        expect_contains(message, parts);
    };
    const std::string good = R"({"shards": [{"name": "b.bin", "crc32": 1873118023}]})";
    for (size_t cut = 0; cut < good.size(); cut++) refuses(good.substr(0, cut), {"not valid JSON"});
    refuses(good + "x", {"not valid JSON"});
    refuses("{\"shards\": [{\"name\": \"\xff\"}]}", {"not valid JSON"});
    refuses(R"({"shards": 7})", {"\"shards\"", "expected a list, found number"});
    refuses(R"({"shards": {"b.bin": 5}})", {"expected a list, found object"});
    refuses(R"({"shards": null})", {"expected a list, found null"});
    refuses(R"({"shards": [{"name": "a.bin"}, 7]})", {"entry 2", "expected an object, found number"});
    refuses(R"({"shards": ["b.bin"]})", {"entry 1", "expected an object, found string"});
    refuses(R"({"shards": [{"name": 7, "crc32": 5}]})", {"\"name\"", "expected a string, found number"});
    for (const char* crc : {"\"5\"", "null", "true", "[5]", "{}"})
        refuses(R"({"shards": [{"name": "b.bin", "crc32": )" + std::string(crc) + "}]}",
                {"entry 1", "\"crc32\"", "integer"});
    for (const char* crc : {"-1", "5.5", "1873118023.0", "4294967296", "99999999999999999999"})
        refuses(R"({"shards": [{"name": "b.bin", "crc32": )" + std::string(crc) + "}]}",
                {"\"crc32\"", "0 to 4294967295, found "});
    refuses(R"({"shards": [{"name": "b.bin", "crc32": 1e400}]})", {"not valid JSON"});

    fs::remove(path("shards.json"));
    fs::create_directory(path("shards.json"));
    expect_contains(error_of([&] { ValLoader(glob(), 1, T, 0, vocab); }), {path("shards.json"), "Is a directory"});
}

TEST_F(DataLoader, NoticesAFileThatShrinksOrVanishes) {
    write_count("a.bin", 1000, 4001);
    const auto read = [&](TrainLoader& loader) {
        for (int i = 0; i < 1000; i++) loader.next();
    };
    TrainLoader shrinks(glob(), 1, T, 0, 1, 1, vocab), vanishes(glob(), 1, T, 0, 1, 1, vocab);
    fs::resize_file(path("a.bin"), 2000);  // behind the loader's back
    expect_contains(error_of([&] { read(shrinks); }), {path("a.bin"), "ends at byte ", "was longer"});
    fs::remove(path("a.bin"));
    expect_contains(error_of([&] { read(vanishes); }), {"cannot open " + path("a.bin"), "No such file"});

    write_count("a.bin", 1000, 4001);
    write_count("b.bin", 1000, 4001);
    TrainLoader loader(glob(), 1, T, 0, 1, 1, vocab);
    for (const char* name : {"a.bin", "b.bin"}) fs::remove(path(name));
    expect_contains(error_of([&] {
                        for (int i = 0; i < 2000; i++) loader.next();
                    }),
                    {"cannot open ", ".bin: No such file", "put it back", "--resume"});
}

// A sparse file of 4.4 GiB: the positions do not fit into 32 bits, the file would not fit into the memory we allow.
TEST_F(DataLoader, ReadsFarBeyondFourGiB) {
    constexpr int64_t tokens = 1'180'000'001, wide_T = 1000, windows = tokens / wide_T;
    write("big.bin", std::vector<uint32_t>(), {20240801, 7, static_cast<int32_t>(tokens)});
    fs::resize_file(path("big.bin"), 1024 + tokens * 4);
    std::fstream file(path("big.bin"), std::ios::binary | std::ios::in | std::ios::out);
    for (int64_t w = 0; w < windows; w += 1000) {  // marks every thousandth window
        const int32_t mark = static_cast<int32_t>(w + 1);
        file.seekp(1024 + w * wide_T * 4).write(reinterpret_cast<const char*>(&mark), 4);
    }
    file.close();

    struct rusage before, after;
    getrusage(RUSAGE_SELF, &before);
    TrainLoader loader(glob(), 16, wide_T, 0, 1, 1, 1 << 30);
    EXPECT_EQ(loader.rows(), windows);
    int marked = 0, far = 0;
    // Where the loader will read is known: look at the marked windows only.
    RowOrder order({windows}, 1);
    for (int64_t g = 0; g < 40000; g++) {
        const int64_t window = order(g).row;
        if (window % 1000 != 0) continue;
        loader.seek(g);
        EXPECT_EQ(loader.next().inputs[0], window + 1);
        marked++;
        far += window * wide_T * 4 > int64_t{1} << 32;
    }
    EXPECT_GT(marked, 10);
    EXPECT_GT(far, 0);

    const ValLoader val(glob(), 16, wide_T, 0, 1 << 30);
    Batch batch;
    val.read((windows - 1) / 1000 * 1000 / 16, batch);
    EXPECT_EQ(std::accumulate(batch.inputs.begin(), batch.inputs.end(), int64_t{0}), (windows - 1) / 1000 * 1000 + 1);
    getrusage(RUSAGE_SELF, &after);
    EXPECT_LT(after.ru_maxrss - before.ru_maxrss, 64 * 1024);  // KiB
}

}  // namespace
