// What a run is made of: which differences there are between two, and which of them make it another run.
#include "trainer/run_record.h"

#include <array>

#include "file_test.h"

namespace {

struct RunRecords : FileTest {
    // A shard of the tokens 0, 1, 2 ... with one changed.
    Shard shard(const std::string& name, int64_t tokens, int64_t changed = -1) const {
        std::vector<uint16_t> values(tokens);
        for (int64_t i = 0; i < tokens; i++) values[i] = static_cast<uint16_t>(i % 1000);
        if (changed >= 0) values[changed] ^= 1;
        const std::array<int32_t, 256> header = {20240520, 1, static_cast<int32_t>(tokens)};
        std::string bytes(reinterpret_cast<const char*>(header.data()), sizeof header);
        bytes.append(reinterpret_cast<const char*>(values.data()), 2 * tokens);
        return shard_io::open_shard(raw_file(name, bytes));
    }
};

std::string listed(const json& before, const json& after) {
    std::string list;
    for (const Difference& d : differences(before, after)) list += d.name + ": " + d.before + " -> " + d.after + "\n";
    return list;
}

TEST_F(RunRecords, DifferInWhatBothHave) {
    const json before = {
        {"lr", 0.003}, {"norm", "LNS"}, {"gone", 1}, {"null", nullptr}, {"train", {{"shards", 2}, {"checksum", "a"}}}};
    json after = {
        {"lr", 0.003}, {"norm", "LNS"}, {"new", 1}, {"null", 1}, {"train", {{"shards", 2}, {"checksum", nullptr}}}};
    EXPECT_EQ(listed(before, after), "");
    after["lr"] = 1e-3, after["norm"] = "a\nb\xff", after["train"]["shards"] = 3, after["train"]["checksum"] = "b";
    EXPECT_EQ(listed(before, after),
              "lr: 0.003 -> 0.001\nnorm: LNS -> a\\nb\xEF\xBF\xBD\ntrain: shards 2 -> shards 3\ntrain: checksum a -> "
              "checksum b\n");
    EXPECT_EQ(listed({{"train", "a"}}, after), "train: a -> " + in_words(after["train"]) + "\n");
}

TEST_F(RunRecords, RefuseAnotherRun) {
    const json before = {{"lr", 1}, {"seed", 1}, {"heads", 4}, {"kv-heads", 4}};
    const auto check = [&](const json& after, const std::string& forced, bool fits = true) {
        return check_same_run("step", before, after, forced, fits);
    };
    using Lines = std::vector<std::string>;
    EXPECT_EQ(check(before, ""), Lines{});
    EXPECT_EQ(check({{"lr", 2}}, ""), Lines{"lr: was 1, now 2"});
    const json other = {{"lr", 1}, {"seed", 2}, {"heads", 2}, {"kv-heads", 2}};
    expect_contains(
        error_of([&] { check(other, ""); }),
        {"step is of another run: seed: was 1, now 2; heads: was 4, now 2; give", "--resume-force seed,heads"});
    expect_contains(error_of([&] { check(other, "seed,head,s"); }), {"run: heads: was 4, now 2; give", "force heads"});
    EXPECT_EQ(error_of([&] { check(other, "", false); }).find("--resume-force"), std::string::npos);
    EXPECT_EQ(check(other, "heads,seed"), (Lines{"seed: was 1, now 2", "heads: was 4, now 2"}));
    expect_contains(error_of([&] { check({{"heads", 4}, {"kv-heads", 2}}, "heads"); }), {"kv-heads: was 4, now 2"});
    EXPECT_EQ(check({{"seed", 1}, {"pack", "stream"}, {"keep", 1}, {"val", nullptr}}, ""),
              Lines{"not recorded in the checkpoint, and not compared: pack"});
}

TEST_F(RunRecords, NameEveryPresetsDimensions) {
    for (const Preset& preset : presets) {
        for (const bool plain : {true, false}) {
            const ModelConfig config = preset_config(preset);
            const json record = model_record(huggingface_config(config, "POST", plain, "float32"));
            const json expected = dimensions(config);  // kv_heads where a record has kv-heads; GPT-2's are its heads
            for (const char* name : {"layers", "hidden", "ffn", "heads", "vocab"})
                EXPECT_EQ(record.at(name), expected.at(name));
            EXPECT_EQ(record.value("kv-heads", config.NH), config.NKV);
            EXPECT_EQ(record.at("norm"), "POST");
            EXPECT_EQ(record.at("model").at("model_type"), config.row().name);
            EXPECT_EQ(record.at("model").value("head_dim", "hidden / heads"), "hidden / heads");
        }
    }
    ModelConfig config = preset_config(presets[0]);
    const auto record = [&] { return model_record(huggingface_config(config, "LNS", true, "float32")); };
    const json before = record();
    config.positions *= 2;
    EXPECT_EQ(listed(before, record()), "");
    config.HS *= 2, config.eps = 1e-5f, config.qkv_bias = true;
    const std::string list = listed(before, record());
    expect_contains(
        list, {"rms_norm_eps 9.99", "model_type llama -> model_type qwen2", "head_dim hidden / heads -> head_dim 64"});
}

TEST_F(RunRecords, KnowDataByWhatIsInIt) {
    const json data = data_identity({shard("a", 100000), shard("b", 2000)});
    EXPECT_EQ(listed(data, data_identity({shard("x", 100000), shard("y", 2000)})), "") << "other names";
    const auto other = [&](const std::vector<Shard>& shards) { return listed(data, data_identity(shards)); };
    EXPECT_EQ(other({shard("x", 100000)}).substr(0, 12), "shards: 2 ->");
    for (const int64_t changed : {0, 30000, 70000, 99999})
        EXPECT_EQ(other({shard("x", 100000, changed), shard("y", 2000)}).substr(0, 6), "ends: ") << changed;
    EXPECT_EQ(other({shard("y", 2000), shard("x", 100000)}).substr(0, 6), "ends: ") << "another order";

    // Far from the ends only a checksum tells; one without is compared by its ends.
    EXPECT_EQ(other({shard("x", 100000, 50000), shard("y", 2000)}), "");
    std::vector<Shard> shards = {shard("x", 100000), shard("y", 2000)};
    shards[0].crc32 = 1, shards[1].crc32 = 2;
    const json known = data_identity(shards);
    EXPECT_EQ(listed(data, known), "");
    shards[1].crc32 = 3;
    EXPECT_EQ(listed(known, data_identity(shards)).substr(0, 10), "checksum: ");
}

}  // namespace
