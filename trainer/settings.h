// Everything a user can set, and how what was left open is filled in.
//
//   setting_table   one row a setting. The command line, --help, config.toml, the range checks, the dimensions that
//                   override a preset's and the settings in the log all follow from it: a new setting is a member of
//                   Settings and a row
//   CommandLine     flags and config.toml, read and written
//   resolve         presets and defaults: afterwards nothing is open
//   learning_rate   the schedule
#pragma once

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <type_traits>
#include <variant>
#include <vector>

#include "dataloader.h"
#include "tokenizer/bpe.h"
#include "trainer/basics.h"
#include "trainer/huggingface.h"
#include "trainer/model_config.h"
#include "trainer/run_log.h"

// What the program was compiled for.
struct Build {
    std::string norm;       // "LNS"
    std::string precision;  // "fp32" or "bf16"
    std::string device;     // "cpu" or "cuda"
    std::string model;      // the default one
    bool norm_is_plain;     // Hugging Face's own code computes these models
    bool norm_has_own_init;
};

struct Settings {
    std::string model, train = "data/train_*.bin", val = "data/val_*.bin", tokenizer, out, prompt;
    std::string schedule = "cosine", init = "normal", pack = "stream";
    int layers = 0, hidden = 0, ffn = 0, heads = 0, kv_heads = 0, vocab = 0;  // 0: the preset's
    int batch_size = 0, seq_len = 0;                                          // 0, and -1 below: resolve() decides
    int64_t total_batch_size = 0, steps = -1, tokens = 0, warmup = -1, cooldown = -1;
    double lr = 0, min_lr_ratio = 0.1, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1, grad_clip = 1;
    uint64_t seed = 1;
    int64_t eval_every = 100, sample_every = 0, save_every = 0, probe_every = 0;
    int64_t eval_tokens = 131072, probe_tokens = 4096;
    double save_minutes = 30;
    int64_t timeout = 600;
    int keep = 0;
    int eot_token = no_document_token;
    bool doc_mask = false;
    bool resume = false, probe_only = false, dry_run = false, json = false;
};

// ---------------------------------------------------------------------------------------------------------------
// The table

using Dimension = int ModelConfig::*;

// What most settings do not have.
struct SettingTraits {
    std::optional<CLI::Validator> allowed = {};  // of the values that the type can hold
    bool show_default = false;                   // in --help, where the text does not say it
    bool logged = false;                         // in the log's start event
    Dimension dimension = nullptr;               // the one of a preset that it overrides, unless it is 0
    bool in_config = true;                       // false: says what to do with a run, and is no part of it
};

struct Setting {
    const char* name;  // kv-heads in config.toml, --kv-heads on the command line, kv_heads in the log
    std::variant<std::string Settings::*, int Settings::*, int64_t Settings::*, uint64_t Settings::*,
                 double Settings::*, bool Settings::*>
        member;
    const char* help;
    SettingTraits traits = {};
};

// Leaves what is no number to CLI11, which then says so.
inline CLI::Validator at_least(double least) {
    const auto check = [least](const std::string& value) {
        char* end = nullptr;
        const double number = std::strtod(value.c_str(), &end);
        return *end || number >= least ? "" : text("must be at least %g, not %s", least, value.c_str());
    };
    return CLI::Validator(check, "");
}

// clang-format off
inline const std::vector<Setting>& setting_table() {
    using S = Settings;
    using CLI::IsMember, CLI::NonNegativeNumber, CLI::PositiveNumber, CLI::Range;
    static const std::vector<Setting> table = {
        {"model", &S::model, "preset or Hugging Face folder (default: tiny on a CPU, llama-130m on a GPU)"},
        {"layers", &S::layers, "blocks (default: the preset's, as with the next five)",
         {.allowed = at_least(0), .dimension = &ModelConfig::L}},
        {"hidden", &S::hidden, "channels of the residual stream",
         {.allowed = at_least(0), .dimension = &ModelConfig::C}},
        {"ffn", &S::ffn, "channels inside the MLP", {.allowed = at_least(0), .dimension = &ModelConfig::F}},
        {"heads", &S::heads, "query heads", {.allowed = at_least(0), .dimension = &ModelConfig::NH}},
        {"kv-heads", &S::kv_heads, "key/value heads", {.allowed = at_least(0), .dimension = &ModelConfig::NKV}},
        {"vocab", &S::vocab, "tokens in the vocabulary (default: the tokenizer's, else the preset's)",
         {.allowed = at_least(0), .dimension = &ModelConfig::V}},
        {"train", &S::train, "training shards, a glob", {.show_default = true}},
        {"val", &S::val, "validation shards, a glob", {.show_default = true}},
        {"tokenizer", &S::tokenizer, "tokenizer.json (default: the one beside the training shards)"},
        {"pack", &S::pack, "stream: rows are windows of the text; documents: one document a row, cut or padded",
         {.allowed = IsMember({"stream", "documents"}), .show_default = true, .logged = true}},
        {"doc-mask", &S::doc_mask, "attention stays inside documents; that they end is still learned",
         {.logged = true}},
        {"eot-token", &S::eot_token, "token that starts each document (default: the tokenizer's)"},
        {"batch-size", &S::batch_size, "sequences a rank takes in one forward pass (default: up to 16)",
         {.allowed = at_least(0)}},
        {"seq-len", &S::seq_len, "tokens a sequence (default: the preset's)", {.allowed = at_least(0), .logged = true}},
        {"total-batch-size", &S::total_batch_size, "tokens an optimizer step, over all ranks (default: the preset's)",
         {.allowed = at_least(0), .logged = true}},
        {"steps", &S::steps, "optimizer steps (default: the preset's); 0 initializes, validates, saves and ends",
         {.allowed = at_least(0), .logged = true}},
        {"tokens", &S::tokens, "length of the run in tokens, instead of --steps", {.allowed = at_least(0)}},
        {"lr", &S::lr, "peak learning rate (default: the preset's)", {.allowed = at_least(0), .logged = true}},
        {"warmup", &S::warmup, "steps of linear warm-up (default: the preset's, at most a tenth of the run)",
         {.allowed = at_least(0), .logged = true}},
        {"schedule", &S::schedule, "learning rate after the warm-up",
         {.allowed = IsMember({"cosine", "linear", "constant", "wsd"}), .show_default = true, .logged = true}},
        {"min-lr-ratio", &S::min_lr_ratio, "last learning rate / peak",
         {.allowed = Range(0.0, 1.0), .show_default = true}},
        {"cooldown", &S::cooldown, "wsd: steps of linear decay at the end (default: a fifth of the run)",
         {.allowed = at_least(0)}},
        {"beta1", &S::beta1, "AdamW", {.allowed = Range(0.0, 0.9999999), .show_default = true}},
        {"beta2", &S::beta2, "AdamW", {.allowed = Range(0.0, 0.9999999), .show_default = true}},
        {"eps", &S::eps, "AdamW", {.allowed = NonNegativeNumber, .show_default = true}},
        {"weight-decay", &S::weight_decay, "AdamW, on matrices",
         {.allowed = NonNegativeNumber, .show_default = true, .logged = true}},
        {"grad-clip", &S::grad_clip, "largest gradient norm; 0: no clipping",
         {.allowed = NonNegativeNumber, .show_default = true}},
        {"init", &S::init, "normal, or scaled: residual projections divided by sqrt(2 L)",
         {.allowed = IsMember({"normal", "scaled"}), .show_default = true, .logged = true}},
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
         {.allowed = PositiveNumber, .show_default = true}},
        {"eval-tokens", &S::eval_tokens, "validation tokens; 0: all",
         {.allowed = NonNegativeNumber, .show_default = true}},
        {"prompt", &S::prompt, "start of the samples"},
        {"keep", &S::keep, "checkpoints kept; 0: all", {.allowed = NonNegativeNumber, .show_default = true}},
        {"timeout", &S::timeout, "seconds without progress after which a rank says where it hangs and ends; 0: never",
         {.allowed = at_least(0), .show_default = true}},
        {"resume", &S::resume, "go on from the newest good checkpoint in the run folder", {.in_config = false}},
        {"probe-only", &S::probe_only, "validate and probe the model, a checkpoint say, and end", {.in_config = false}},
        {"dry-run", &S::dry_run, "only print the model, its memory and its work; needs no data and no GPU",
         {.in_config = false}},
        {"json", &S::json, "print it as one line of JSON", {.in_config = false}},
    };
    return table;
}
// clang-format on

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

struct CommandLine {
    CLI::App app;
    const Settings& settings;
    const Build& build;

    CommandLine(Settings& s, const Build& build)
        : app("Trains a GPT. This program is built for NORM=" + build.norm + " " + build.precision + " on " +
              build.device + "."),
          settings(s),
          build(build) {
        app.set_config("--config", "", "TOML file with any of these flags; the command line wins");
        app.allow_config_extras(CLI::config_extras_mode::error);
        app.get_formatter()->column_width(34);
        for (const Setting& setting : setting_table()) {
            std::visit([&](auto member) { add(setting, s.*member); }, setting.member);
        }
        app.get_option("--json")->needs("--dry-run");
    }

    template <class T>
    void add(const Setting& setting, T& value) {
        const std::string flag = std::string("--") + setting.name;
        if constexpr (std::is_same_v<T, bool>) {
            app.add_flag(flag, value, setting.help);
        } else {
            CLI::Option* option = app.add_option(flag, value, setting.help);
            option->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
            if (setting.traits.allowed) option->check(*setting.traits.allowed);
            if (setting.traits.show_default) option->capture_default_str();
        }
    }

    // Fills the settings in. Returns the exit status where the program ends here: after --help, and after a mistake,
    // which it prints in one line.
    std::optional<int> parse(int argc, const char* const* argv) {
        try {
            app.parse(argc, argv);
            return {};
        } catch (const CLI::CallForHelp& help) {
            return app.exit(help);
        } catch (const CLI::ParseError& e) {
            fprintf(stderr, "train_gpt: %s; see --help\n", first_line(e.what()).c_str());
            return 2;
        }
    }

    std::string config_toml() const {
        std::string toml = "# ./train_gpt --config THIS repeats the run (NORM=" + build.norm + ", " + build.precision +
                           ", " + build.device + ")\n";
        for (const Setting& setting : setting_table()) {
            if (setting.traits.in_config) {
                toml += std::string(setting.name) + " = " + value_of(setting, settings).dump() + "\n";
            }
        }
        return toml;
    }
};

// ---------------------------------------------------------------------------------------------------------------
// What the command line left open. Each of these throws a UsageError where the settings contradict each other.

// `vocab`: the tokenizer's vocabulary, 0 without one.
inline ModelConfig resolve_model(const Settings& s, const Build& build, int vocab) {
    const Preset* preset = find_preset(s.model);
    if (!preset) {
        if (!std::filesystem::exists(s.model + "/config.json")) {
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
        return read_huggingface_config(s.model, build.norm, build.norm_is_plain);
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

// Tokens a sequence, sequences at a time, tokens a step. The model's positions grow with the sequence, but for those
// of a folder's GPT-2, which are weights.
inline void resolve_batch(Settings& s, ModelConfig& c, const Preset& recipe, int ranks) {
    if (s.seq_len == 0) s.seq_len = std::min(recipe.seq_len, c.positions);
    if (s.seq_len < 1) throw UsageError(text("--seq-len %d: must be at least 1", s.seq_len));
    if (s.seq_len > c.positions) {
        if (!c.row().rotary() && !find_preset(s.model)) {
            throw UsageError(text("--seq-len %d: the model has %d positions", s.seq_len, c.positions));
        }
        c.positions = s.seq_len;
    }
    const int64_t row = (int64_t)s.seq_len * ranks;  // one sequence a rank
    if (s.total_batch_size == 0) s.total_batch_size = round_up(recipe.total_batch, row * std::max(1, s.batch_size));
    if (s.batch_size == 0) {
        const int64_t sequences = s.total_batch_size / row;
        s.batch_size = (int)std::clamp<int64_t>(sequences, 1, 16);
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

// Length of the run and learning rate.
inline void resolve_schedule(Settings& s, const Preset& recipe) {
    if (s.tokens > 0 && s.steps >= 0) throw UsageError("--steps and --tokens: give one of them");
    if (s.tokens > 0) s.steps = ceil_div(s.tokens, s.total_batch_size);
    if (s.steps < 0) s.steps = recipe.steps;
    s.tokens = 0;  // from here on and in config.toml, --steps says it
    if (s.warmup < 0) s.warmup = std::min(recipe.warmup, s.steps / 10);
    if (s.cooldown < 0) s.cooldown = s.steps / 5;
    if (s.lr == 0) s.lr = recipe.lr;
}

// `s` as the command line gave it; afterwards every setting has the value that the run is made with. Returns the model.
inline ModelConfig resolve(Settings& s, const Build& build, int ranks, int vocab) {
    if (s.model.empty()) s.model = build.model;
    ModelConfig config = resolve_model(s, build, vocab);
    const Preset* preset = find_preset(s.model);
    const Preset& recipe = preset ? *preset : *find_preset(config.row().recipe);
    resolve_batch(s, config, recipe, ranks);
    resolve_schedule(s, recipe);
    if (s.init == "scaled" && build.norm_has_own_init) {
        throw UsageError("--init scaled: " + build.norm + " has an initialization of its own; use --init normal");
    }
    if (s.out.empty()) {
        const std::string name = std::filesystem::path(s.model + "/").parent_path().filename();
        s.out = "runs/" + name + "-" + build.norm + "-" + std::to_string(s.seed);
    }
    try {
        check_config(config);
    } catch (const Error& e) {
        throw UsageError(e.what());
    }
    return config;
}

// The token that starts each document, which --doc-mask and --pack documents need.
inline void find_document_token(Settings& s, const Tokenizer* tokenizer, int V) {
    if (!s.doc_mask && s.pack == "stream") return;
    const char* flag = s.doc_mask ? "--doc-mask" : "--pack documents";
    if (s.eot_token == no_document_token && tokenizer && tokenizer->document_start)
        s.eot_token = (int)*tokenizer->document_start;
    if (s.eot_token == no_document_token) {
        throw UsageError(
            text("%s: which token starts a document is not known, as %s: give --tokenizer FILE, or "
                 "--eot-token ID (GPT-2's is 50256)",
                 flag,
                 tokenizer ? "tokenizer.json has no end-of-text token"
                           : "there is no tokenizer.json beside the training shards"));
    }
    if (s.eot_token < 0 || s.eot_token >= V)
        throw UsageError(text("--eot-token %d: must be in the vocabulary, 0 to %d", s.eot_token, V - 1));
}

// tokenizer.json's path: --tokenizer, or the one beside the training shards if it is there; empty without one.
inline std::string find_tokenizer(const Settings& s) {
    if (!s.tokenizer.empty()) return s.tokenizer;
    const std::string beside = (std::filesystem::path(s.train).parent_path() / "tokenizer.json").string();
    return std::filesystem::exists(beside) ? beside : "";
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
