// Everything a user can set, and how what was left open is filled in.
//
//   setting_table   one row a setting. The command line, --help, config.toml, the range checks, the dimensions that
//                   override a preset's and the settings in the log all follow from it: a new setting is a member of
//                   Settings and a row
//   value_from      a value from a word of the command line or a line of config.toml, checked
//   to_toml         config.toml, and set_from_toml, which reads it; flags: command_line.h
//   resolve         presets and defaults: afterwards nothing is open
//   learning_rate   the schedule
#pragma once

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "dataloader.h"
#include "tokenizer/bpe.h"
#include "tokenizer/unicode.h"
#include "trainer/basics.h"
#include "trainer/huggingface.h"
#include "trainer/model_config.h"
#include "trainer/run_log.h"
#include "trainer/toml.h"

// What the program was compiled for.
struct Build {
    std::string norm;       // "LNS"
    std::string precision;  // "fp32" or "bf16"
    std::string device;     // "cpu" or "cuda"
    std::string model;      // the default one
    bool norm_is_plain;     // Hugging Face's own code computes these models
    bool norm_has_own_init;
    bool norm_has_scale = false;  // as LNS: it can stand in the gains
};

// What is left open has a value that no user can give: 0 where at least 1 is allowed, -1 where at least 0 is, no text.
struct Settings {
    std::string model, train = "data/train_*.bin", val = "data/val_*.bin", tokenizer, out, prompt;
    std::string schedule = "cosine", init = "normal", pack = "stream", recompute = "none", norm_scale = "unfolded";
    int layers = 0, hidden = 0, ffn = 0, heads = 0, kv_heads = 0, vocab = 0;
    int batch_size = 0, seq_len = 0;
    int64_t total_batch_size = 0, steps = -1, tokens = 0, warmup = -1, cooldown = -1;
    double lr = 0, min_lr_ratio = 0.1, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1, grad_clip = 1;
    uint64_t seed = 1;
    int64_t eval_every = 100, sample_every = 0, save_every = 0, probe_every = 0;
    int64_t eval_tokens = 131072, probe_tokens = 4096;
    double save_minutes = 30;
    int64_t timeout = 600;
    int keep = 0;
    int eot_token = no_document_token;
    bool doc_mask = false, train_on_prompt = false;
    double epochs = 0;
    std::string freeze;
    std::string evaluate, evaluate_out;
    int64_t evaluate_every = 0;
    std::string resume_force;
    bool resume = false, probe_only = false, dry_run = false, json = false, autotune = false;
    bool generate = false, chat = false;
    std::string prompt_file, chat_template, stop;
    double temperature = 0.8, top_p = 1;
    int top_k = 0, max_tokens = 256;

    // Found, and not set: the training shards hold conversations.
    bool conversations = false;

    // Questions are asked of the model as it is, and nothing is trained.
    bool evaluates_only() const { return !evaluate.empty() && evaluate_every == 0; }
};

// ---------------------------------------------------------------------------------------------------------------
// The table

using Dimension = int ModelConfig::*;

// The values that a setting takes, of those that its type can hold.
struct Allowed {
    double least = -std::numeric_limits<double>::infinity(), most = std::numeric_limits<double>::infinity();
    std::vector<std::string> choices = {};                         // of text; none: any
    std::string (*complaint)(const std::string& value) = nullptr;  // of text: what is wrong with it
};

inline Allowed at_least(double least) { return {.least = least}; }
inline Allowed between(double least, double most) { return {.least = least, .most = most}; }
inline Allowed one_of(std::vector<std::string> choices) { return {.choices = std::move(choices)}; }
// Smaller ones are 0 in fp32, which is what the kernels compute in, or are on the way there.
inline Allowed positive() { return at_least(1e-30); }

// What most settings do not have.
struct SettingTraits {
    Allowed allowed = {};
    bool show_default = false;      // in --help, where the text does not say it
    bool logged = false;            // in the log's start event
    Dimension dimension = nullptr;  // the one of a preset that it overrides, unless it is 0
    bool in_config = true;          // false: says what to do with a run, and is no part of it
    bool several = false;           // of text: one or more words on the command line, which make a list a,b,c
};

struct Setting {
    const char* name;  // kv-heads in config.toml, --kv-heads on the command line, kv_heads in the log
    std::variant<std::string Settings::*, int Settings::*, int64_t Settings::*, uint64_t Settings::*,
                 double Settings::*, bool Settings::*>
        member;
    const char* help;
    SettingTraits traits = {};
};

inline const std::vector<Setting>& setting_table();

// What --freeze says.
struct Frozen {
    bool embeddings = false;
    int blocks = 0;
};

// A list of one or both: embeddings, and a number of blocks. Nothing, where it is no such list.
inline std::optional<Frozen> read_frozen(const std::string& list) {
    Frozen frozen;
    for (size_t begin = 0, end; begin <= list.size() && !list.empty(); begin = end + 1) {
        end = std::min(list.find(',', begin), list.size());
        const char *word = &list[begin], *behind = list.data() + end;
        if (list.compare(begin, end - begin, "embeddings") == 0 && !frozen.embeddings) {
            frozen.embeddings = true;
        } else {
            if (frozen.blocks > 0) return {};
            const auto [stop, error] = std::from_chars(word, behind, frozen.blocks);
            if (error != std::errc() || stop != behind || frozen.blocks < 1) return {};
        }
    }
    return frozen;
}

inline std::string freeze_complaint(const std::string& list) {
    if (read_frozen(list)) return "";
    return "must be embeddings, a number of blocks, or both, as in embeddings,4, not \"" + list + "\"";
}

// What is wrong with a list a,b,c of settings' names, or of norm, which make sets; empty: nothing.
inline std::string setting_names(const std::string& list) {
    for (size_t begin = 0, end; begin <= list.size(); begin = end + 1) {
        end = std::min(list.find(',', begin), list.size());
        const std::string name = list.substr(begin, end - begin);
        const auto& table = setting_table();
        const auto has_name = [&](const Setting& s) { return s.traits.in_config && s.name == name; };
        if (name != "norm" && std::none_of(table.begin(), table.end(), has_name))
            return "\"" + name + "\" is no setting; expected names from config.toml or norm, as in heads,doc-mask";
    }
    return "";
}

// clang-format off
inline const std::vector<Setting>& setting_table() {
    using S = Settings;
    static const std::vector<Setting> table = {
        {"model", &S::model, "preset or Hugging Face folder (default: tiny on a CPU, llama-130m on a GPU)"},
        {"layers", &S::layers, "blocks (default: the preset's, as with the next five)",
         {.allowed = at_least(1), .dimension = &ModelConfig::L}},
        {"hidden", &S::hidden, "channels of the residual stream",
         {.allowed = at_least(1), .dimension = &ModelConfig::C}},
        {"ffn", &S::ffn, "channels inside the MLP", {.allowed = at_least(1), .dimension = &ModelConfig::F}},
        {"heads", &S::heads, "query heads", {.allowed = at_least(1), .dimension = &ModelConfig::NH}},
        {"kv-heads", &S::kv_heads, "key/value heads", {.allowed = at_least(1), .dimension = &ModelConfig::NKV}},
        {"vocab", &S::vocab, "tokens in the vocabulary (default: the tokenizer's, else the preset's)",
         {.allowed = at_least(1), .dimension = &ModelConfig::V}},
        {"train", &S::train, "training shards, a glob", {.show_default = true}},
        {"val", &S::val, "validation shards, a glob", {.show_default = true}},
        {"tokenizer", &S::tokenizer, "tokenizer.json (default: the one beside the training shards)"},
        {"pack", &S::pack,
         "stream: rows are windows of the text; documents: one document or conversation a row, cut or padded; packed: "
         "several, masked from each other",
         {.allowed = one_of({"stream", "documents", "packed"}), .show_default = true, .logged = true}},
        {"doc-mask", &S::doc_mask, "attention stays inside documents; that they end is still learned",
         {.logged = true}},
        {"train-on-prompt", &S::train_on_prompt, "conversations: predict all of their tokens, not the answers alone"},
        {"eot-token", &S::eot_token, "token that starts each document (default: the tokenizer's)",
         {.allowed = at_least(0)}},
        {"batch-size", &S::batch_size,
         "sequences a rank takes in one forward pass (default: up to 16, on a GPU up to 32768 tokens if they fit)",
         {.allowed = at_least(1)}},
        {"recompute", &S::recompute, "what the backward pass computes again instead of keeping it: norms, or blocks",
         {.allowed = one_of({"none", "norm", "block"}), .show_default = true}},
        {"norm-scale", &S::norm_scale,
         "of a --model FOLDER: folded leaves a norm's factor (LNS's 1/sqrt(l)) in its gain; the same function, tuned otherwise",
         {.allowed = one_of({"unfolded", "folded"}), .show_default = true}},
        {"seq-len", &S::seq_len, "tokens a sequence (default: the preset's)", {.allowed = at_least(1), .logged = true}},
        {"total-batch-size", &S::total_batch_size, "tokens an optimizer step, over all ranks (default: the preset's)",
         {.allowed = at_least(1), .logged = true}},
        {"steps", &S::steps, "optimizer steps (default: the preset's); 0 initializes, validates, saves and ends",
         {.allowed = at_least(0), .logged = true}},
        {"tokens", &S::tokens, "length of the run in tokens, instead of --steps", {.allowed = at_least(1)}},
        {"epochs", &S::epochs, "length of the run in epochs, instead of --steps (default, of tuning on conversations: 3)",
         {.allowed = positive()}},
        {"lr", &S::lr, "peak learning rate (default: the preset's; of tuning a model's folder on conversations: 2e-5)",
         {.allowed = positive(), .logged = true}},
        {"warmup", &S::warmup, "steps of linear warm-up (default: the preset's, at most a tenth of the run)",
         {.allowed = at_least(0), .logged = true}},
        {"schedule", &S::schedule, "learning rate after the warm-up",
         {.allowed = one_of({"cosine", "linear", "constant", "wsd"}), .show_default = true, .logged = true}},
        {"min-lr-ratio", &S::min_lr_ratio, "last learning rate / peak",
         {.allowed = between(0, 1), .show_default = true}},
        {"cooldown", &S::cooldown, "wsd: steps of linear decay at the end (default: a fifth of the run)",
         {.allowed = at_least(0)}},
        {"beta1", &S::beta1, "AdamW", {.allowed = between(0, 0.9999999), .show_default = true}},
        {"beta2", &S::beta2, "AdamW", {.allowed = between(0, 0.9999999), .show_default = true}},
        {"eps", &S::eps, "AdamW", {.allowed = positive(), .show_default = true}},
        {"weight-decay", &S::weight_decay, "AdamW, on matrices",
         {.allowed = at_least(0), .show_default = true, .logged = true}},
        {"grad-clip", &S::grad_clip, "largest gradient norm; 0: no clipping",
         {.allowed = at_least(0), .show_default = true}},
        {"freeze", &S::freeze, "what stays as it is: embeddings, the first N blocks, or both",
         {.allowed = {.complaint = freeze_complaint}, .several = true}},
        {"init", &S::init, "normal, or scaled: residual projections divided by sqrt(2 L)",
         {.allowed = one_of({"normal", "scaled"}), .show_default = true, .logged = true}},
        {"seed", &S::seed, "everything random follows from it",
         {.allowed = at_least(0), .show_default = true, .logged = true}},
        {"out", &S::out, "run folder (default: runs/MODEL-NORM-SEED)"},
        {"eval-every", &S::eval_every, "steps between validations; 0: only at start and end",
         {.allowed = at_least(0), .show_default = true}},
        {"sample-every", &S::sample_every, "steps between samples of text; 0: none",
         {.allowed = at_least(0), .show_default = true}},
        {"save-every", &S::save_every, "steps between checkpoints; 0: only at the end, and as the next one says",
         {.allowed = at_least(0), .show_default = true}},
        {"save-minutes", &S::save_minutes, "a checkpoint when the last is that old; the next replaces it; 0: none",
         {.allowed = at_least(0), .show_default = true}},
        {"probe-every", &S::probe_every, "steps between probes of all blocks, the first at the start; 0: none",
         {.allowed = at_least(0), .show_default = true}},
        {"probe-tokens", &S::probe_tokens, "validation tokens a probe looks at, whole sequences",
         {.allowed = at_least(1), .show_default = true}},
        {"eval-tokens", &S::eval_tokens, "validation tokens; 0: all",
         {.allowed = at_least(0), .show_default = true}},
        {"evaluate", &S::evaluate,
         "files of questions (JSONL, or llm.c's .bin): how --model FOLDER does on them, and end; in training: the next",
         {.several = true}},
        {"evaluate-every", &S::evaluate_every, "train; steps between evaluations, the last at the end; 0: none",
         {.allowed = at_least(0), .show_default = true}},
        {"evaluate-out", &S::evaluate_out, "with --evaluate alone: JSONL to write, each choice's log-probability",
         {.in_config = false}},
        {"prompt", &S::prompt, "start of the samples, and of what --generate writes"},
        {"keep", &S::keep, "checkpoints kept; 0: all", {.allowed = at_least(0), .show_default = true}},
        {"timeout", &S::timeout, "seconds without progress after which a rank says where it hangs and ends; 0: never",
         {.allowed = at_least(0), .show_default = true}},
        {"autotune", &S::autotune, "GPU: take each matrix product's fastest algorithm, measured once and kept in ~/.cache"},
        {"resume", &S::resume, "go on from the newest good checkpoint in the run folder", {.in_config = false}},
        {"resume-force", &S::resume_force,
         "with --resume: settings that may differ from the checkpoint's though they make it another run, a,b,c",
         {.allowed = {.complaint = setting_names}, .in_config = false}},
        {"probe-only", &S::probe_only, "validate and probe the model, a checkpoint say, and end", {.in_config = false}},
        {"generate", &S::generate, "write text with the model in --model FOLDER, on stdout, and end; needs no data",
         {.in_config = false}},
        {"prompt-file", &S::prompt_file, "--generate: prompts, a line each", {.in_config = false}},
        {"chat", &S::chat, "--generate: a prompt is what a user says, and the text an answer", {.in_config = false}},
        {"template", &S::chat_template,
         "--chat: how a conversation is written out (default: as the model was tuned, or has tokens for it, else plain)",
         {.allowed = one_of({"chatml", "llama3", "alpaca", "plain"}), .in_config = false}},
        {"max-tokens", &S::max_tokens, "--generate: tokens behind the prompt, at most",
         {.allowed = at_least(1), .show_default = true, .in_config = false}},
        {"temperature", &S::temperature, "--generate: divides the logits; 0: always the most likely token",
         {.allowed = at_least(0), .show_default = true, .in_config = false}},
        {"top-k", &S::top_k, "--generate: draw one of the k most likely tokens; 0: of all",
         {.allowed = at_least(0), .show_default = true, .in_config = false}},
        {"top-p", &S::top_p, "--generate: draw one of the most likely tokens that reach this probability together",
         {.allowed = between(0, 1), .show_default = true, .in_config = false}},
        {"stop", &S::stop, "--generate: end before this text", {.in_config = false}},
        {"dry-run", &S::dry_run, "only print the model, its memory and its work; needs no data and no GPU",
         {.in_config = false}},
        {"json", &S::json, "print it as one line of JSON", {.in_config = false}},
    };
    return table;
}
// clang-format on

// ---------------------------------------------------------------------------------------------------------------
// Values

// In --help, and in messages.
template <class T>
constexpr std::pair<const char*, const char*> type_names() {
    if constexpr (std::is_same_v<T, std::string>) return {"TEXT", "text in quotes"};
    else if constexpr (std::is_same_v<T, bool>) return {"", "true or false"};
    else if constexpr (std::is_integral_v<T>) return {"INT", "a whole number"};
    else return {"FLOAT", "a number"};
}

// What a number of type T is read as.
template <class T>
using Wide = std::conditional_t<std::is_integral_v<T>, int64_t, double>;

// `value` as a T. Throws why it is not allowed; `given` is how the user wrote it.
template <class T>
T checked(const Allowed& allowed, Wide<T> value, const std::string& given) {
    const auto require = [&](bool ok, const char* relation, double bound) {
        if (!ok) throw Error(text("must be %s %.15g, not %s", relation, bound, given.c_str()));
    };
    if (!std::isfinite((float)value)) throw Error("must be a finite number in fp32, not " + given);
    require((double)value >= allowed.least, "at least", allowed.least);
    require((double)value <= allowed.most, "at most", allowed.most);
    if constexpr (std::is_integral_v<T>) {
        if (!std::in_range<T>(value)) {
            throw Error(text("must fit into %zu bits, not be %s", 8 * sizeof(T), given.c_str()));
        }
    }
    return (T)value;
}

// File names cannot hold every text.
inline std::string checked(const Allowed& allowed, const std::string& value) {
    const std::vector<std::string>& choices = allowed.choices;
    if (!choices.empty() && std::find(choices.begin(), choices.end(), value) == choices.end()) {
        std::string list;
        for (const std::string& choice : choices) list += (list.empty() ? "" : ", ") + choice;
        throw Error("must be one of " + list + ", not \"" + value + "\"");
    }
    if (const std::string why = allowed.complaint ? allowed.complaint(value) : ""; !why.empty()) throw Error(why);
    if (value.find('\0') != value.npos) throw Error("must not hold the character 0");
    return value;
}

// From a word of the command line. Throws why there is none.
template <class T>
T value_from(const std::string& word, const Allowed& allowed) {
    if constexpr (std::is_same_v<T, std::string>) {
        return checked(allowed, word);
    } else {
        Wide<T> number = 0;
        const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), number);
        if (error == std::errc::result_out_of_range) throw Error("out of range: " + word);
        if (error != std::errc() || end != word.data() + word.size()) {
            throw Error(text("must be %s, not \"%s\"", type_names<T>().second, word.c_str()));
        }
        return checked<T>(allowed, number, word);
    }
}

// From a TOML file. Throws why there is none.
template <class T>
T value_from(const TomlValue& value, const Allowed& allowed) {
    if constexpr (std::is_same_v<T, bool>) {
        if (const bool* found = std::get_if<bool>(&value)) return *found;
    } else if constexpr (std::is_same_v<T, std::string>) {
        if (const std::string* found = std::get_if<std::string>(&value)) return checked(allowed, *found);
    } else {
        if (const int64_t* found = std::get_if<int64_t>(&value)) {
            return checked<T>(allowed, (Wide<T>)*found, std::to_string(*found));
        }
        const double* found = std::get_if<double>(&value);
        if (found && std::is_same_v<T, double>) return checked<T>(allowed, (Wide<T>)*found, text("%g", *found));
    }
    constexpr const char* kinds[] = {"text in quotes", "a whole number", "a number with a point", "true or false"};
    throw Error(text("must be %s, not %s", type_names<T>().second, kinds[value.index()]));
}

// Whether the setting still waits for resolve().
inline bool is_open(const Setting& setting, const Settings& s) {
    return std::visit(
        [&](auto member) {
            const auto& value = s.*member;
            if constexpr (std::is_arithmetic_v<std::remove_cvref_t<decltype(value)>>) {
                return (double)value < setting.traits.allowed.least;
            } else {
                return false;
            }
        },
        setting.member);
}

inline json value_of(const Setting& setting, const Settings& s) {
    return std::visit([&](auto member) { return json(s.*member); }, setting.member);
}

// The name in the log: kv_heads.
inline std::string log_key(const Setting& setting) {
    std::string key = setting.name;
    std::replace(key.begin(), key.end(), '-', '_');
    return key;
}

// What a dimension's setting says; 0: the preset's.
inline int override_of(const Setting& setting, const Settings& s) {
    return s.*std::get<int Settings::*>(setting.member);
}

inline json logged_settings(const Settings& s) {
    json fields = json::object();
    for (const Setting& setting : setting_table()) {
        if (setting.traits.logged) fields[log_key(setting)] = value_of(setting, s);
    }
    return fields;
}

// The model's dimensions under the names of their settings: layers, hidden, ...
inline json dimensions(const ModelConfig& config) {
    json fields = json::object();
    for (const Setting& setting : setting_table()) {
        if (setting.traits.dimension) fields[log_key(setting)] = config.*setting.traits.dimension;
    }
    return fields;
}

// ---------------------------------------------------------------------------------------------------------------
// Command line and config.toml

// Every setting that is part of a run and not open. A string of JSON is one of TOML, if it has no raw DEL.
// A text of several lines stands on as many; the first line end, behind the quotes, is not part of it. Else TOML's
// strings are JSON's, but for DEL.
inline std::string to_toml(const json& value) {
    if (value.is_string() && value.get_ref<const std::string&>().find('\n') != std::string::npos) {
        std::istringstream text(value.get_ref<const std::string&>() + "\n");
        std::string lines, line;
        while (std::getline(text, line)) {
            const std::string quoted = to_toml(json(line));
            lines += "\n" + quoted.substr(1, quoted.size() - 2);
        }
        return "\"\"\"" + lines + "\"\"\"";
    }
    std::string toml;
    for (const char letter : value.dump()) toml += letter == '\x7f' ? "\\u007f" : std::string(1, letter);
    return toml;
}

inline std::string to_toml(const Settings& s) {
    std::string toml;
    for (const Setting& setting : setting_table()) {
        if (!setting.traits.in_config || is_open(setting, s)) continue;
        toml += std::string(setting.name) + " = " + to_toml(value_of(setting, s)) + "\n";
    }
    return toml;
}

// Sets what the file says, but for the settings that `keep` names. Throws a UsageError that names file, line and key.
inline void set_from_toml(Settings& s, const std::string& path, const std::set<std::string>& keep) {
    for (const TomlEntry& entry : read_toml(path)) {
        const auto refuse = [&](const std::string& why) {
            throw UsageError(text("%s:%d: %s: %s", path.c_str(), entry.line, entry.name.c_str(), why.c_str()));
        };
        const auto setting = std::find_if(setting_table().begin(), setting_table().end(),
                                          [&](const Setting& known) { return entry.name == known.name; });
        if (setting == setting_table().end()) refuse("no such setting; see --help");
        const auto set = [&]<class T>(T Settings::*member) {
            const T value = value_from<T>(entry.value, setting->traits.allowed);
            if (!keep.contains(entry.name)) s.*member = value;
        };
        try {
            std::visit(set, setting->member);
        } catch (const Error& e) {
            refuse(e.what());
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// What the command line left open. Each of these throws a UsageError where the settings contradict each other.

// `vocab`: the tokenizer's vocabulary, 0 without one.
inline ModelConfig resolve_model(const Settings& s, const Build& build, int vocab) {
    const Preset* preset = find_preset(s.model);
    const bool is_folder = std::filesystem::exists(s.model + "/config.json");
    if (preset && is_folder) {
        throw UsageError("--model " + s.model + " is a preset and a folder here: --model ./" + s.model +
                         " takes the folder, from elsewhere " + s.model + " is the preset");
    }
    if (s.norm_scale == "folded" && (preset || !build.norm_has_scale)) {
        throw UsageError(
            "--norm-scale folded: needs --model FOLDER, and a norm with a scale, as a program made by `make "
            "NORM=LNS` has it");
    }
    if (!preset) {
        if (!is_folder) {
            std::string names;
            for (const Preset& known : presets) names += (names.empty() ? "" : ", ") + std::string(known.name);
            throw UsageError("--model " + s.model + " is neither a preset (" + names +
                             ") nor a folder with a config.json");
        }
        for (const Setting& setting : setting_table()) {
            if (setting.traits.dimension && override_of(setting, s) != 0) {
                throw UsageError("--model " + s.model +
                                 " is a folder with weights: its dimensions cannot be overridden");
            }
        }
        ModelConfig c = read_huggingface_config(s.model, build.norm, build.norm_is_plain);
        c.norm_scale_folded = s.norm_scale == "folded";
        return c;
    }
    ModelConfig c = preset_config(*preset);
    if (vocab > 0) c.V = vocab;
    if (s.heads > 0) c.NKV = s.heads;
    for (const Setting& setting : setting_table()) {
        if (!setting.traits.dimension) continue;
        if (const int value = override_of(setting, s)) c.*setting.traits.dimension = value;
    }
    if (c.C % c.NH != 0) throw UsageError(text("--hidden %d must be a multiple of --heads %d", c.C, c.NH));
    c.HS = c.C / c.NH;
    return c;
}

// What is usual where a model's folder is tuned on conversations, in place of a preset's: small steps, and few.
constexpr struct {
    double lr = 2e-5, epochs = 3, warmup = 0.03;  // of the steps
    int sequences = 32;                           // a step
} tuning;

inline bool tunes(const Settings& s) { return s.conversations && !find_preset(s.model); }

// Tokens a sequence, sequences at a time, tokens a step. The model's positions grow with the sequence where they can.
inline void resolve_batch(Settings& s, ModelConfig& c, const Build& build, const Preset& recipe, int ranks) {
    if (s.seq_len == 0) s.seq_len = std::min(recipe.seq_len, c.longest());
    if (s.seq_len > c.longest() && c.fixed_positions) {
        throw UsageError(text("--seq-len %d: the model has %d positions%s", s.seq_len, c.longest(),
                              c.row().rotary() ? " within the window of its attention" : ""));
    }
    c.positions = std::max(c.positions, s.seq_len);
    const int most = std::numeric_limits<int>::max() / s.seq_len;  // sequences in a forward pass
    if (s.batch_size > most) {
        throw UsageError(
            text("--batch-size %d x --seq-len %d tokens do not fit into 32 bits", s.batch_size, s.seq_len));
    }
    const int64_t row = (int64_t)s.seq_len * ranks;  // one sequence a rank
    const int64_t usual_batch = s.conversations ? (int64_t)tuning.sequences * s.seq_len : recipe.total_batch;
    if (s.total_batch_size == 0) s.total_batch_size = round_up(usual_batch, row * std::max(1, s.batch_size));
    if (s.batch_size == 0) {
        const int64_t sequences = s.total_batch_size / row;
        // On a GPU enough tokens that products are large, and kernels longer than their launches.
        const int usual = build.device == "cuda" ? std::max(16, (int)ceil_div(32768, s.seq_len)) : 16;
        s.batch_size = (int)std::clamp<int64_t>(sequences, 1, std::min(usual, most));
        while (sequences % s.batch_size != 0) s.batch_size--;
    }
    const int64_t unit = row * s.batch_size;
    if (s.total_batch_size % unit != 0) {
        throw UsageError(
            text("--total-batch-size %lld must be a multiple of batch size x sequence length x ranks = %d x %d x %d "
                 "= %lld",
                 (long long)s.total_batch_size, s.batch_size, s.seq_len, ranks, (long long)unit));
    }
}

// Length of the run and learning rate. A run may end within its warm-up, as in llm.c and nanoGPT; wsd's decay has to
// fit.
inline void resolve_schedule(Settings& s, const Preset& recipe) {
    const bool by_tokens = s.tokens > 0;
    if (by_tokens) s.steps = s.tokens / s.total_batch_size + (s.tokens % s.total_batch_size > 0);
    if (s.steps < 0) s.steps = recipe.steps;
    if (s.steps > std::numeric_limits<int64_t>::max() / s.total_batch_size) {
        throw UsageError(
            text("--%s %lld: a run of so many steps of --total-batch-size %lld tokens cannot be counted in 64 bits",
                 by_tokens ? "tokens" : "steps", (long long)(by_tokens ? s.tokens : s.steps),
                 (long long)s.total_batch_size));
    }
    s.tokens = 0;  // from here on and in config.toml, --steps says it
    if (s.warmup < 0) {
        s.warmup =
            tunes(s) ? (int64_t)std::ceil(tuning.warmup * (double)s.steps) : std::min(recipe.warmup, s.steps / 10);
    }
    if (s.cooldown < 0) s.cooldown = std::clamp<int64_t>(s.steps - s.warmup, 0, s.steps / 5);
    if (s.schedule == "wsd" && s.steps > 0 && s.cooldown > 0 && s.warmup > s.steps - s.cooldown) {
        throw UsageError(text("--warmup %lld and --cooldown %lld are longer together than the run's %lld steps",
                              (long long)s.warmup, (long long)s.cooldown, (long long)s.steps));
    }
    if (s.lr == 0) s.lr = tunes(s) ? tuning.lr : recipe.lr;
}

inline const Preset& recipe_of(const Settings& s, const ModelConfig& config) {
    const Preset* preset = find_preset(s.model);
    return preset ? *preset : *find_preset(config.row().recipe);
}

// What resolve() leaves open where the run is so many epochs long, once it is known how many rows that is.
inline void resolve_epochs(Settings& s, const ModelConfig& config, int64_t rows) {
    if (s.epochs == 0) return;
    const double steps = std::ceil(s.epochs * (double)rows * s.seq_len / (double)s.total_batch_size);
    if (steps > 0x1p50) throw UsageError(text("--epochs %g: too many steps", s.epochs));
    s.steps = (int64_t)steps;
    s.epochs = 0;  // from here on and in config.toml, --steps says it
    resolve_schedule(s, recipe_of(s, config));
}

// What belongs to conversations, and what does not.
inline void check_tuning(const Settings& s, const ModelConfig& config) {
    const std::string shards = s.train + ": the shards hold conversations: ";
    if (s.conversations && s.pack == "stream") throw UsageError(shards + "give --pack documents or --pack packed");
    if (s.conversations && s.doc_mask) {
        throw UsageError(shards + "--doc-mask is for documents; --pack packed masks conversations from each other");
    }
    if (!s.conversations && s.train_on_prompt)
        throw UsageError("--train-on-prompt: the shards in --train hold no conversations, which have prompts");
    const Frozen frozen = read_frozen(s.freeze).value_or(Frozen());
    if (frozen.blocks > config.L)
        throw UsageError(text("--freeze %d: the model has %d blocks", frozen.blocks, config.L));
}

inline void check_evaluation(const Settings& s) {
    if (s.evaluate_every > 0 && s.evaluate.empty()) throw UsageError("--evaluate-every requires --evaluate FILE...");
    if (!s.evaluate_out.empty() && !s.evaluates_only())
        throw UsageError("--evaluate-out requires --evaluate FILE..., without --evaluate-every");
}

// A plan's sizes are int64_t: what is no memory of any machine is refused before it is added up.
inline void check_size(const Settings& s, const ModelConfig& c) {
    const double bytes = 64.0 * s.batch_size * s.seq_len * c.L * (c.C + c.F);
    if (bytes > 0x1p60) {
        throw UsageError(
            text("--batch-size %d x --seq-len %d tokens of a model of %d blocks, %d channels, MLP %d: too large for "
                 "any memory",
                 s.batch_size, s.seq_len, c.L, c.C, c.F));
    }
}

// `s` as the command line gave it; afterwards every setting has the value that the run is made with. Returns the model.
// `fits`: whether the memory of a rank's GPU holds what these settings take; not asked on a CPU, nor of a given batch.
inline ModelConfig resolve(Settings& s, const Build& build, int ranks, int vocab,
                           const std::function<bool(const ModelConfig&, const Settings&)>& fits = {}) {
    const bool batch_is_open = s.batch_size == 0;
    if (s.model.empty()) s.model = build.model;
    ModelConfig config = resolve_model(s, build, vocab);
    const Preset& recipe = recipe_of(s, config);
    resolve_batch(s, config, build, recipe, ranks);
    if ((s.tokens > 0) + (s.steps >= 0) + (s.epochs > 0) > 1) {
        throw UsageError(text("--%s and --%s: give one of them", s.steps >= 0 ? "steps" : "epochs",
                              s.tokens > 0 ? "tokens" : "epochs"));
    }
    if (tunes(s) && s.steps < 0 && s.tokens == 0 && s.epochs == 0) s.epochs = tuning.epochs;
    if (s.epochs == 0) resolve_schedule(s, recipe);
    check_evaluation(s);
    check_tuning(s, config);
    if (s.init == "scaled" && build.norm_has_own_init) {
        throw UsageError("--init scaled: " + build.norm + " has an initialization of its own; use --init normal");
    }
    if (s.out.empty()) {
        const std::string name = std::filesystem::absolute(s.model + "/").lexically_normal().parent_path().filename();
        s.out = "runs/" + name + "-" + build.norm + "-" + std::to_string(s.seed);
    }
    while (s.out.size() > 1 && s.out.ends_with('/')) s.out.pop_back();  // RUN.old-1 stands beside RUN, not within
    try {
        check_config(config);
        if (build.precision == "bf16") check_bf16_rows(config);
    } catch (const Error& e) {
        throw UsageError(e.what());
    }
    check_size(s, config);
    if (batch_is_open && build.device == "cuda" && fits) {
        const int64_t sequences = s.total_batch_size / ((int64_t)s.seq_len * ranks);
        while (s.batch_size > 1 && (sequences % s.batch_size != 0 || !fits(config, s))) s.batch_size--;
    }
    return config;
}

// The token that starts each document, which --doc-mask and --pack documents need.
inline void find_document_token(Settings& s, const Tokenizer* tokenizer, int V) {
    if (s.conversations || (!s.doc_mask && s.pack == "stream")) return;
    const std::string flag = s.doc_mask ? "--doc-mask" : "--pack " + s.pack;
    if (s.eot_token == no_document_token && tokenizer && tokenizer->document_start)
        s.eot_token = (int)*tokenizer->document_start;
    if (s.eot_token == no_document_token) {
        throw UsageError(
            text("%s: which token starts a document is not known, as %s: give --tokenizer FILE, or "
                 "--eot-token ID (GPT-2's is 50256)",
                 flag.c_str(),
                 tokenizer ? "tokenizer.json has no end-of-text token"
                           : "there is no tokenizer.json beside the training shards"));
    }
    if (s.eot_token < 0 || s.eot_token >= V)
        throw UsageError(text("--eot-token %d: must be in the vocabulary, 0 to %d", s.eot_token, V - 1));
}

// tokenizer.json's path: --tokenizer, or the one in `folder` if it is there; empty without one.
inline std::string find_tokenizer(const Settings& s, const std::filesystem::path& folder) {
    if (!s.tokenizer.empty()) return s.tokenizer;
    const std::string beside = (folder / "tokenizer.json").string();
    return std::filesystem::exists(beside) ? beside : "";
}
// Of the training shards.
inline std::string find_tokenizer(const Settings& s) {
    return find_tokenizer(s, std::filesystem::path(s.train).parent_path());
}

// ---------------------------------------------------------------------------------------------------------------

// Learning rate of step s of N = --steps, s from 1: linear up to step W = --warmup, then what --schedule says.
inline double learning_rate(const Settings& s, int64_t step) {
    const double N = (double)s.steps, W = (double)s.warmup, r = s.min_lr_ratio;
    if (step <= s.warmup) return s.lr * (double)step / W;
    const double done = N > W ? ((double)step - W) / (N - W) : 1;
    if (s.schedule == "cosine") return s.lr * (r + (1 - r) * (1 + std::cos(M_PI * done)) / 2);
    if (s.schedule == "linear") return s.lr * (1 - (1 - r) * done);
    if (s.schedule == "wsd" && step > s.steps - s.cooldown) {
        return s.lr * (1 - (1 - r) * (double)(step - (s.steps - s.cooldown)) / (double)s.cooldown);
    }
    return s.lr;
}
