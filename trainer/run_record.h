// What a run is made of: recorded in every checkpoint, compared when a run goes on from one, and among the ranks.
//
//   run_record      everything that was set, the program, and what the shards hold
//   model_record    what config.json says of the model
//   differences     between two records, by name
//   check_same_run  refuses to go on with another function or other data
#pragma once

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "dataloader.h"
#include "tokenizer/shard_file.h"
#include "trainer/basics.h"
#include "trainer/files.h"
#include "trainer/huggingface.h"
#include "trainer/run_log.h"
#include "trainer/settings.h"

// Shards by what is in them, whatever they are called and wherever they lie. Without checksums in a shards.json (null,
// then) their sizes, beginnings and ends have to tell them apart: to read all of them would take hours.
inline json data_identity(const std::vector<Shard>& shards) {
    constexpr int64_t sampled = 64 << 10;  // bytes, at either end
    int64_t tokens = 0;
    uint32_t ends = 0, all = 0;
    bool recorded = true;
    json targets;  // of conversations
    for (const Shard& shard : shards) {
        const File file = open_shard_file(shard.path, shard_io::vanished);
        ends = crc32_of(ends, file, 0, std::min(sampled, shard.file_bytes()));
        ends = crc32_of(ends, file, std::max<int64_t>(0, shard.file_bytes() - sampled), shard.file_bytes());
        const uint32_t crc32 = shard.crc32.value_or(0);
        all = crc32_of(all, &crc32, sizeof crc32);
        recorded = recorded && shard.crc32;
        tokens += shard.tokens;
        if (shard.targets)
            targets = crc32_of(targets.is_null() ? 0 : targets.get<uint32_t>(), &shard.targets->crc32, 4);
    }
    json identity = {{"shards", shards.size()},
                     {"tokens", tokens},
                     {"ends", text("%08x", ends)},
                     {"checksum", recorded ? json(text("%08x", all)) : json()}};
    if (!targets.is_null()) identity["targets"] = text("%08x", targets.get<uint32_t>());
    return identity;
}

// Of a config.json that this program wrote. Dimensions have the names of their settings; what no setting says stands
// under "model". Left out is what says nothing about the function, or is said elsewhere: positions follow from
// --seq-len, or are a tensor's shape.
inline json model_record(const nlohmann::json& config) {
    json record, model;
    for (const auto& [key, value] : config.items()) {
        const auto is = [&](auto... names) { return ((key == names) || ...); };
        const auto is_dimension = [&](const char* DimensionNames::*name) {
            return is(llama_keys.names.*name, gpt2_keys.names.*name);
        };
        if (is("architectures", "torch_dtype", "dtype", "transformers_version", "initializer_range", "n_ctx",
               "auto_map", "sublayers"))
            continue;
        if (is(llama_keys.positions, gpt2_keys.positions) || key.ends_with("_token_id")) continue;
        if (is("norm")) record["norm"] = value;
        else if (is("vocab_size")) record["vocab"] = value;
        else if (is("num_key_value_heads")) record["kv-heads"] = value;
        else if (is_dimension(&DimensionNames::C)) record["hidden"] = value;
        else if (is_dimension(&DimensionNames::F)) record["ffn"] = value;
        else if (is_dimension(&DimensionNames::L)) record["layers"] = value;
        else if (is_dimension(&DimensionNames::NH)) record["heads"] = value;
        else model[key] = value;
    }
    // What follows from others is no difference of its own.
    const json head_dim = model.value("head_dim", json()), heads = record.value("heads", json());
    if (head_dim.is_number() && heads.is_number() && record.contains("hidden") &&
        head_dim.get<double>() * heads.get<double>() == record["hidden"])
        model["head_dim"] = "hidden / heads";
    if (model.contains("model_type") && model["model_type"].is_string()) {  // "llama_post" without the norm's suffix
        const std::string type = model["model_type"];
        model["model_type"] = type.substr(0, type.find('_'));
    }
    record["model"] = model;
    return record;
}

// `s` resolved. Null is what does not apply, or is not known.
inline json run_record(const Settings& s, const Build& build, int ranks, const json& train, const json& val) {
    json record = {{"precision", build.precision}, {"device", build.device}, {"ranks", ranks}};
    for (const Setting& setting : setting_table()) {
        const std::string name = setting.name;
        const bool elsewhere = setting.traits.dimension || name == "model" || name == "out";
        if (setting.traits.in_config && !elsewhere) record[name] = value_of(setting, s);
    }
    if (s.conversations || (!s.doc_mask && s.pack == "stream")) record["eot-token"] = nullptr;
    if (!s.conversations) record["train-on-prompt"] = nullptr;
    record["train"] = train;
    record["val"] = val;
    return record;
}

// ---------------------------------------------------------------------------------------------------------------
// Comparing

struct Difference {
    std::string name, before, after;
};

// A value as a message has it, in one line whatever it holds.
inline std::string in_words(const json& value) {
    const std::string line = value.dump(-1, ' ', false, json::error_handler_t::replace);
    return value.is_string() ? line.substr(1, line.size() - 2) : line;
}

// What one record lacks, or has as null, cannot be compared.
inline std::vector<Difference> differences(const json& before, const json& after) {
    std::vector<Difference> found;
    for (const auto& [name, value] : after.items()) {
        const json was = before.value(name, json());
        if (was.is_object() && value.is_object()) {
            for (const Difference& d : differences(was, value))
                found.push_back({name, d.name + " " + d.before, d.name + " " + d.after});
        } else if (!was.is_null() && !value.is_null() && was != value) {
            found.push_back({name, in_words(was), in_words(value)});
        }
    }
    return found;
}

// What makes the run another one: another function, other data, or another order of them. All else may change from one
// part of a run to the next: how fast and how long it learns, on how many ranks, in which precision it is rounded.
inline bool is_fixed(const std::string& name) {
    for (const char* fixed :
         {"norm", "model", "layers", "hidden", "ffn", "heads", "kv-heads", "vocab", "train", "val", "norm-scale",
          "pack", "doc-mask", "train-on-prompt", "eot-token", "seq-len", "total-batch-size", "seed"}) {
        if (name == fixed) return true;
    }
    return false;
}

// Whether a list a,b,c has the name.
inline bool lists(const std::string& list, const std::string& name) {
    return ("," + list + ",").find("," + name + ",") != std::string::npos;
}

// Throws, in one line, all that is fixed and differs, but for what the list `forced` names. Returns what else there is
// to say, a line each. fits: the tensors have the model's shapes, so that the difference could be meant.
inline std::vector<std::string> check_same_run(const std::string& checkpoint, const json& before, const json& after,
                                               const std::string& forced, bool fits) {
    std::string refused, names;
    std::vector<std::string> lines;
    const auto one_for_each_head = [](const json& record) {
        return record.value("kv-heads", 0) == record.value("heads", 0);
    };
    for (const Difference& d : differences(before, after)) {
        if (d.name == "kv-heads" && one_for_each_head(before) && one_for_each_head(after)) continue;
        const std::string line = d.name + ": was " + d.before + ", now " + d.after;
        if (!is_fixed(d.name) || lists(forced, d.name)) {
            lines.push_back(line);
            continue;
        }
        refused += line + "; ";
        if (!lists(names, d.name)) names += (names.empty() ? "" : ",") + d.name;
    }
    if (!refused.empty()) {
        throw Error(checkpoint + " is of another run: " + refused + "give what it was made with, or another --out" +
                    (fits ? ", or, where the difference is meant, --resume-force " + names : ""));
    }
    std::string unknown;
    for (const auto& [name, value] : after.items()) {
        if (is_fixed(name) && !value.is_null() && before.value(name, json()).is_null())
            unknown += (unknown.empty() ? "" : ", ") + name;
    }
    if (!unknown.empty()) lines.push_back("not recorded in the checkpoint, and not compared: " + unknown);
    return lines;
}
