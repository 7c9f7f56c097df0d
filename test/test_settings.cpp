// What a user can set, on the host alone: the table of settings, the command line, config.toml, defaults, the schedule;
// presets, Hugging Face's config.json, and the numbers in the log.
#include "trainer/command_line.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <random>

#include "temporary_folder.h"

namespace {

const Build lns_on_cpu = {"LNS", "fp32", "cpu", "tiny", true, false};
const Build lns_on_gpu = {"LNS", "bf16", "cuda", "llama-130m", true, false};
const Build deepnorm = {"DEEPNORM", "fp32", "cpu", "tiny", false, true};

// The settings of a command line; its exit status where it ends the program.
struct Parsed {
    Settings settings;
    CommandLine command_line{settings, lns_on_cpu};
    std::optional<int> status;
    std::string error;

    explicit Parsed(const std::vector<std::string>& arguments) {
        std::vector<const char*> argv = {"train_gpt"};
        for (const std::string& argument : arguments) argv.push_back(argument.c_str());
        testing::internal::CaptureStderr();
        status = command_line.parse((int)argv.size(), argv.data());
        error = testing::internal::GetCapturedStderr();
    }
};

// Another value than the default, for every setting.
struct OtherValue {
    const std::string name;

    void operator()(std::string& value) const {
        static const std::map<std::string, std::string> choices = {
            {"pack", "documents"},          {"schedule", "wsd"},       {"init", "scaled"},
            {"recompute", "block"},         {"norm-scale", "folded"},  {"template", "llama3"},
            {"resume-force", "heads,norm"}, {"freeze", "embeddings,4"}};
        value = choices.contains(name) ? choices.at(name) : "some text of " + name;
    }
    void operator()(int& value) const { value += 12; }
    void operator()(int64_t& value) const { value += 5'000'000'000; }
    void operator()(uint64_t& value) const { value = 9'223'372'036'854'775'807u; }
    void operator()(double& value) const { value = value == 0.3 ? 0.7 : 0.3; }
    void operator()(bool& value) const { value = !value; }
};

Settings other_settings() {
    Settings s;
    for (const Setting& setting : setting_table()) {
        std::visit([&](auto member) { OtherValue{setting.name}(s.*member); }, setting.member);
    }
    return s;
}

template <class Function>
std::string error_of(const Function& function) {
    try {
        function();
    } catch (const UsageError& e) {
        return e.what();
    }
    return "no error";
}

// ---------------------------------------------------------------------------------------------------------------
// The table

TEST(SettingTable, ConfigTomlHoldsEverySettingAndIsReadBack) {
    const TemporaryFolder folder;
    Settings written = other_settings();
    const std::string toml = CommandLine(written, lns_on_cpu).config_toml(), path = folder / "config.toml";
    write_file(path, toml);
    const Parsed read({"--config", path});
    ASSERT_FALSE(read.status) << read.error;
    for (const Setting& setting : setting_table()) {
        const json value = value_of(setting, written);
        ASSERT_NE(value, value_of(setting, Settings())) << setting.name;
        const bool in_file = toml.find("\n" + std::string(setting.name) + " = " + value.dump() + "\n") != toml.npos;
        EXPECT_EQ(in_file, setting.traits.in_config) << setting.name;
        EXPECT_EQ(value_of(setting, read.settings), value_of(setting, in_file ? written : Settings())) << setting.name;
    }
}

TEST(SettingTable, EverySettingIsAFlag) {
    const Settings wanted = other_settings();
    std::vector<std::string> arguments;
    for (const Setting& setting : setting_table()) {
        arguments.push_back("--" + std::string(setting.name));
        const json value = value_of(setting, wanted);
        if (!value.is_boolean()) arguments.push_back(value.is_string() ? value.get<std::string>() : value.dump());
    }
    const Parsed read(arguments);
    ASSERT_FALSE(read.status) << read.error;
    for (const Setting& setting : setting_table()) {
        EXPECT_EQ(value_of(setting, read.settings), value_of(setting, wanted)) << setting.name;
    }
}

TEST(SettingTable, EverySettingHasAMemberOfItsOwn) {
    for (const Setting& a : setting_table()) {
        for (const Setting& b : setting_table()) EXPECT_EQ(a.member == b.member, &a == &b) << a.name << " " << b.name;
    }
}

TEST(SettingTable, AListOfSettingsHasKnownNames) {
    for (const char* good : {"heads", "heads,norm", "doc-mask,lr"})
        EXPECT_FALSE(Parsed({"--resume-force", good}).status);
    for (const char* bad : {"", "head", "heads,", ",heads", "heads, norm", "resume"}) {
        EXPECT_EQ(Parsed({"--resume-force", bad}).status, 2) << bad;
    }
}

TEST(SettingTable, WhatIsFrozenIsAListOfTwoThings) {
    for (const auto& [list, embeddings, blocks] :
         {std::tuple{"embeddings", true, 0}, {"4", false, 4}, {"embeddings,4", true, 4}, {"4,embeddings", true, 4}}) {
        const Parsed parsed({"--freeze", list});
        EXPECT_FALSE(parsed.status) << parsed.error;
        const Frozen frozen = read_frozen(parsed.settings.freeze).value();
        EXPECT_EQ(frozen.embeddings, embeddings);
        EXPECT_EQ(frozen.blocks, blocks);
    }
    for (const char* bad : {"head", "0", "-1", "4,4", "embeddings,embeddings", "4x"}) {
        EXPECT_EQ(Parsed({std::string("--freeze=") + bad}).status, 2) << bad;
    }
}

// Characters that a format may treat in a way of its own, and any others.
std::string hostile_text(std::mt19937& random) {
    static const std::vector<std::string> pieces = {
        "\"",   "\\",   "'", "#",      "\n",     "\r",     "\t",      " ",    "  ",   "=",  "[",
        "]",    "{",    "}", ",",      "\"\"\"", "'''",    "\\u0041", "\x01", "\b",   "\f", "\x1b",
        "\x1f", "\x7f", "é", "\u0085", "\u2028", "\ufeff", "\ufffd",  "😀",    "true", "1",  "-"};
    std::string made;
    for (int left = (int)(random() % 12); left > 0; left--) {
        if (random() % 4 > 0) made += pieces[random() % pieces.size()];
        else append_utf8(made, 1 + random() % 0xD7FF);
    }
    return made;
}

// A value of the setting, drawn from all that it allows.
struct RandomValue {
    const Allowed& allowed;
    std::mt19937& random;

    template <class T>
    void operator()(T& value) const {
        const auto& choices = allowed.choices;
        if constexpr (std::is_same_v<T, std::string>) {
            value = choices.empty() ? hostile_text(random) : choices[random() % choices.size()];
            if (allowed.complaint && !allowed.complaint(value).empty()) value = "embeddings,4";  // that of --freeze
        } else if constexpr (std::is_same_v<T, bool>) {
            value = random() % 2;
        } else if constexpr (std::is_same_v<T, double>) {
            value = std::ldexp((double)random() * 0x1p32 + random(), -(int)(random() % 150));
            value = std::clamp(value, allowed.least, allowed.most);
        } else {
            value = (T)((((uint64_t)random() << 32) + random()) & (uint64_t)std::numeric_limits<T>::max() & INT64_MAX);
            value = std::max(value, (T)allowed.least);
        }
    }
};

TEST(SettingTable, WhateverIsWrittenIsReadBack) {
    const TemporaryFolder folder;
    std::mt19937 random(1);
    for (int round = 0; round < 200; round++) {
        Settings written;
        for (const Setting& setting : setting_table()) {
            if (!setting.traits.in_config) continue;
            std::visit(
                [&](auto member) {
                    RandomValue{setting.traits.allowed, random}(written.*member);
                },
                setting.member);
        }
        const std::string toml = CommandLine(written, lns_on_cpu).config_toml();
        write_file(folder / "config.toml", toml);
        const Parsed read({"--config", folder / "config.toml"});
        ASSERT_FALSE(read.status) << read.error << toml;
        for (const Setting& setting : setting_table()) {
            ASSERT_EQ(value_of(setting, read.settings), value_of(setting, written)) << setting.name << "\n" << toml;
        }
    }
}

TEST(SettingTable, WhatIsOpenIsNotInTheFile) {
    Settings s;
    const std::string toml = CommandLine(s, lns_on_cpu).config_toml();
    for (const char* open : {"layers", "hidden", "ffn", "heads", "kv-heads", "vocab", "batch-size", "seq-len",
                             "total-batch-size", "steps", "tokens", "lr", "warmup", "cooldown", "eot-token"}) {
        EXPECT_EQ(toml.find(std::string("\n") + open + " = "), toml.npos) << open;
    }
    EXPECT_NE(toml.find("\nkeep = 0\n"), toml.npos);
}

TEST(SettingTable, TheCommandLineWinsOverTheFile) {
    const TemporaryFolder folder;
    write_file(folder / "config.toml", "steps = 7\nseed = 3\ndoc-mask = true\nprompt = \" # \\\\ \"\n");
    const Parsed read({"--config", folder / "config.toml", "--steps", "9", "--doc-mask=false"});
    EXPECT_EQ(read.settings.steps, 9);
    EXPECT_EQ(read.settings.seed, 3u);
    EXPECT_FALSE(read.settings.doc_mask);
    EXPECT_EQ(read.settings.prompt, " # \\ ");
}

TEST(SettingTable, StepsAndTokensReplaceEachOther) {
    const TemporaryFolder folder;
    const auto length = [&](const char* file, const std::vector<std::string>& flags) {
        write_file(folder / "config.toml", file);
        std::vector<std::string> arguments = {"--config", folder / "config.toml"};
        arguments.insert(arguments.end(), flags.begin(), flags.end());
        const Parsed read(arguments);
        EXPECT_FALSE(read.status) << read.error;
        return std::pair(read.settings.steps, read.settings.tokens);
    };
    using Length = std::pair<int64_t, int64_t>;
    EXPECT_EQ(length("steps = 7\n", {}), Length(7, 0));
    EXPECT_EQ(length("steps = 7\n", {"--tokens", "512"}), Length(-1, 512));
    EXPECT_EQ(length("tokens = 512\n", {"--steps", "7"}), Length(7, 0));
    EXPECT_EQ(length("tokens = 512\n", {"--steps", "0"}), Length(0, 0));
    EXPECT_EQ(length("tokens = 512\n", {"--tokens", "1024"}), Length(-1, 1024));
}

TEST(SettingTable, WhatIsWrongInTheFileIsSaidInOneLine) {
    const TemporaryFolder folder;
    const std::string path = folder / "config.toml";
    const auto error = [&](const std::string& contents) {
        write_file(path, contents);
        const Parsed parsed({"--config", path});
        EXPECT_EQ(parsed.status, 2) << contents;
        EXPECT_EQ(std::count(parsed.error.begin(), parsed.error.end(), '\n'), 1) << parsed.error;
        const std::string start = "train_gpt: " + path + ":";
        EXPECT_TRUE(parsed.error.starts_with(start)) << parsed.error;
        return parsed.error.substr(std::min(start.size(), parsed.error.size()));
    };
    EXPECT_EQ(error("seed = 1\nstepz = 3\n"), "2: stepz: no such setting; see --help\n");
    EXPECT_EQ(error("kv_heads = 3\n"), "1: kv_heads: no such setting; see --help\n");
    EXPECT_EQ(error("[model]\nlr = 1\n"), "1: model: must be a single value, and is of type table\n");
    EXPECT_EQ(error("lr = [0.1, 0.2]\n"), "1: lr: must be a single value, and is of type array\n");
    EXPECT_EQ(error("lr = \"0.1\"\n"), "1: lr: must be a number, not text in quotes\n");
    EXPECT_EQ(error("steps = 5.0\n"), "1: steps: must be a whole number, not a number with a point\n");
    EXPECT_EQ(error("steps = true\n"), "1: steps: must be a whole number, not true or false\n");
    EXPECT_EQ(error("doc-mask = 1\n"), "1: doc-mask: must be true or false, not a whole number\n");
    EXPECT_EQ(error("prompt = 5\n"), "1: prompt: must be text in quotes, not a whole number\n");
    EXPECT_EQ(error("\n\nlayers = 4294967298\n"), "3: layers: must fit into 32 bits, not be 4294967298\n");
    EXPECT_EQ(error("heads = 0\n"), "1: heads: must be at least 1, not 0\n");
    EXPECT_EQ(error("beta1 = 1\n"), "1: beta1: must be at most 0.9999999, not 1\n");
    EXPECT_EQ(error("lr = nan\n"), "1: lr: must be a finite number in fp32, not nan\n");
    EXPECT_EQ(error("schedule = \"cosin\"\n"),
              "1: schedule: must be one of cosine, linear, constant, wsd, not \"cosin\"\n");
    EXPECT_EQ(error("out = \"a\\u0000b\"\n"), "1: out: must not hold the character 0\n");
    for (const char* no_toml : {"\nlr = 0,001\n", "\nschedule = cosine\n", "lr = 1\nlr = 2\n", "\nlr 1\n",
                                "\nprompt = \"a\n", "\nout = \"\xff\"\n", "\nseed = 9223372036854775808\n"}) {
        EXPECT_TRUE(error(no_toml).starts_with("2: ")) << no_toml;
    }
    EXPECT_EQ(Parsed({"--config", folder / "none.toml"}).status, 2);
    EXPECT_EQ(Parsed({"--config", folder.path}).status, 2);
    EXPECT_EQ(Parsed({"--config", ""}).status, 2);
}

TEST(SettingTable, ValuesOutsideTheRangeAreRefusedInOneLine) {
    std::vector<std::pair<std::string, std::string>> wrong = {{"lr", "-1e-3"},
                                                              {"lr", "0"},
                                                              {"lr", "fast"},
                                                              {"lr", "0,001"},
                                                              {"lr", ""},
                                                              {"beta1", "1"},
                                                              {"beta2", "-0.1"},
                                                              {"eps", "0"},
                                                              {"pack", "rows"},
                                                              {"min-lr-ratio", "1.5"},
                                                              {"init", "xavier"},
                                                              {"schedule", "cosin"},
                                                              {"layers", "2.5"},
                                                              {"steps", "1e3"},
                                                              {"steps", "true"},
                                                              {"steps", " 5"},
                                                              {"seq-len", "long"},
                                                              {"probe-tokens", "0"},
                                                              {"tokens", "9223372036854775808"},
                                                              {"seed", "18446744073709551615"}};
    for (const Setting& setting : setting_table()) {
        if (std::holds_alternative<int Settings::*>(setting.member)) wrong.push_back({setting.name, "4294967298"});
        if (setting.traits.dimension) wrong.push_back({setting.name, "0"});
        if (std::holds_alternative<std::string Settings::*>(setting.member)) continue;
        if (std::holds_alternative<bool Settings::*>(setting.member)) continue;
        for (const char* value :
             {"-1", "nan", "-nan", "inf", "-infinity", "1e999", "99999999999999999999999999999999"}) {
            const bool fits_a_double = std::string(value).starts_with("999") && setting.traits.allowed.most > 1;
            if (fits_a_double && std::holds_alternative<double Settings::*>(setting.member)) continue;
            wrong.push_back({setting.name, value});
        }
    }
    for (const auto& [name, value] : wrong) {
        const Parsed parsed(value.starts_with("-") ? std::vector<std::string>{"--" + name + "=" + value}
                                                   : std::vector<std::string>{"--" + name, value});
        EXPECT_EQ(parsed.status, 2) << name << " " << value;
        EXPECT_TRUE(parsed.error.starts_with("train_gpt: --" + name + ": ")) << parsed.error;
        EXPECT_EQ(std::count(parsed.error.begin(), parsed.error.end(), '\n'), 1) << parsed.error;
        EXPECT_LT(parsed.error.size(), 140u) << parsed.error;
    }
    EXPECT_EQ(Parsed({"--warmup", "-3"}).error, "train_gpt: --warmup: must be at least 0, not -3; see --help\n");
    EXPECT_EQ(Parsed({"--steps", "010"}).settings.steps, 10) << "not octal";
    EXPECT_EQ(Parsed({"--doc-mask=3"}).error, "train_gpt: --doc-mask: must be true or false, not \"3\"; see --help\n");
}

TEST(SettingTable, TextIsTakenAsItIs) {
    for (const char* value : {"", "[a,b]", "{}", "%%", "-x", "a=b", "a\nb", " a "}) {
        const Parsed parsed({"--prompt=x", "--prompt", value, "--model", value});
        ASSERT_FALSE(parsed.status) << parsed.error;
        EXPECT_EQ(parsed.settings.prompt, value);
        EXPECT_EQ(parsed.settings.model, value);
    }
}

TEST(SettingTable, JsonNeedsDryRun) {
    EXPECT_EQ(Parsed({"--json"}).status, 2);
    EXPECT_FALSE(Parsed({"--json", "--dry-run"}).status);
}

TEST(SettingTable, WhatTheLogHolds) {
    Settings s;
    s.seq_len = 64, s.doc_mask = true, s.schedule = "wsd";
    EXPECT_EQ(to_line(logged_settings(s)),
              R"({"pack":"stream","doc_mask":true,"seq_len":64,"total_batch_size":0,"steps":-1,"lr":0,"warmup":-1,)"
              R"("schedule":"wsd","weight_decay":0.1,"init":"normal","seed":1})");
    EXPECT_EQ(to_line(dimensions({.L = 1, .C = 2, .F = 3, .NH = 4, .NKV = 5, .HS = 6, .V = 7})),
              R"({"layers":1,"hidden":2,"ffn":3,"heads":4,"kv_heads":5,"vocab":7})");
}

// ---------------------------------------------------------------------------------------------------------------
// Defaults

TEST(Resolve, ThePresetsRecipe) {
    Settings s;
    const ModelConfig c = resolve(s, lns_on_cpu, 1, 0);
    EXPECT_EQ(s.model, "tiny");
    EXPECT_EQ(c.L, 24);
    EXPECT_EQ(c.C, 128);
    EXPECT_EQ(c.NH, 4);
    EXPECT_EQ(c.HS, 32);
    EXPECT_EQ(c.V, 32000);
    EXPECT_EQ(s.seq_len, 128);
    EXPECT_EQ(s.total_batch_size, 4096);
    EXPECT_EQ(s.batch_size, 16);
    EXPECT_EQ(s.steps, 500);
    EXPECT_EQ(s.warmup, 50);
    EXPECT_EQ(s.cooldown, 100);
    EXPECT_EQ(s.lr, 2e-3);
    EXPECT_EQ(s.out, "runs/tiny-LNS-1");

    Settings gpu;
    resolve(gpu, lns_on_gpu, 1, 0);
    EXPECT_EQ(gpu.model, "llama-130m");
    EXPECT_EQ(gpu.batch_size, 128) << "32768 tokens of 256 a sequence";

    // No more than fits, in whole micro-batches; what is given is not asked.
    const auto fits = [](const ModelConfig&, const Settings& planned) { return planned.batch_size <= 50; };
    for (const auto& [build, batch_size, expected] :
         {std::tuple(lns_on_gpu, 0, 32), {lns_on_gpu, 64, 64}, {lns_on_cpu, 0, 16}}) {
        Settings planned;
        planned.model = "llama-130m", planned.batch_size = batch_size;
        resolve(planned, build, 1, 0, fits);
        EXPECT_EQ(planned.batch_size, expected);
    }
}

// A folder that is tuned on conversations: small steps, and their number follows from the rows that there are.
TEST(Resolve, Tuning) {
    const TemporaryFolder folder;
    write_file(
        folder / "config.json",
        R"({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 100, "n_embd": 32, "n_layer": 4,
                   "n_head": 4, "n_positions": 64, "norm": "LNS"})");
    const auto tuned = [&](const std::vector<std::string>& flags) {
        Settings s = Parsed(flags).settings;
        s.conversations = true;
        if (s.pack == "stream") s.pack = "packed";
        if (s.model.empty()) s.model = folder.path;
        const ModelConfig config = resolve(s, lns_on_cpu, 1, 0);
        resolve_epochs(s, config, 1000);
        EXPECT_EQ(s.epochs, 0);
        return s;
    };
    const Settings usual = tuned({});
    EXPECT_EQ(usual.total_batch_size, 32 * 64);
    EXPECT_EQ(usual.steps, 94);  // 3 epochs of 1000 rows, 32 a step
    EXPECT_EQ(usual.warmup, 3);
    EXPECT_EQ(usual.lr, 2e-5);
    EXPECT_EQ(tuned({"--epochs", "0.5"}).steps, 16);
    EXPECT_EQ(tuned({"--steps", "7", "--lr", "1e-3"}).steps, 7);
    EXPECT_EQ(tuned({"--steps", "7", "--lr", "1e-3"}).lr, 1e-3);
    EXPECT_EQ(tuned({"--tokens", "4096"}).steps, 2);
    EXPECT_NE(tuned({"--model", "tiny", "--steps", "7"}).lr, 2e-5);
    const auto says = [&](const std::vector<std::string>& flags, bool conversations = true) {
        Settings s = Parsed(flags).settings;
        s.model = folder.path;
        s.conversations = conversations;
        return error_of([&] { resolve(s, lns_on_cpu, 1, 0); });
    };
    EXPECT_NE(says({}).find("hold conversations: give --pack documents or --pack packed"), std::string::npos);
    EXPECT_NE(says({"--pack", "packed", "--doc-mask"}).find("--doc-mask is for documents"), std::string::npos);
    EXPECT_NE(says({"--train-on-prompt"}, false).find("hold no conversations"), std::string::npos);
    EXPECT_NE(says({"--freeze", "5", "--steps", "1"}, false).find("the model has 4 blocks"), std::string::npos);
    EXPECT_EQ(says({"--epochs", "1", "--steps", "1"}, false), "--steps and --epochs: give one of them");
    EXPECT_EQ(says({"--epochs", "1", "--tokens", "1"}, false), "--epochs and --tokens: give one of them");
}

TEST(Resolve, WhatIsGivenStays) {
    Settings s;
    s.model = "llama-9m", s.layers = 3, s.hidden = 96, s.ffn = 100, s.heads = 6, s.kv_heads = 2, s.vocab = 300;
    s.seq_len = 2048, s.batch_size = 3, s.total_batch_size = 12288, s.steps = 40, s.warmup = 0, s.cooldown = 1;
    s.lr = 0.5, s.out = "elsewhere";
    const ModelConfig c = resolve(s, lns_on_cpu, 2, 512);
    EXPECT_EQ(to_line(dimensions(c)), R"({"layers":3,"hidden":96,"ffn":100,"heads":6,"kv_heads":2,"vocab":300})");
    EXPECT_EQ(c.HS, 16);
    EXPECT_EQ(c.positions, 2048);
    EXPECT_EQ(s.batch_size, 3);
    EXPECT_EQ(s.total_batch_size, 12288);
    EXPECT_EQ(s.steps, 40);
    EXPECT_EQ(s.warmup, 0);
    EXPECT_EQ(s.cooldown, 1);
    EXPECT_EQ(s.lr, 0.5);
    EXPECT_EQ(s.out, "elsewhere");
}

TEST(Resolve, FollowsFromWhatIsGiven) {
    Settings s;
    s.heads = 8, s.tokens = 4097, s.total_batch_size = 6 * 128 * 2;
    const ModelConfig c = resolve(s, lns_on_cpu, 2, 512);
    EXPECT_EQ(c.NKV, 8) << "as many key/value heads as heads";
    EXPECT_EQ(c.V, 512) << "the tokenizer's vocabulary";
    EXPECT_EQ(s.batch_size, 6) << "the largest that divides a rank's share";
    EXPECT_EQ(s.steps, 3) << "tokens, rounded up to whole steps";
    EXPECT_EQ(s.tokens, 0) << "what --steps says is not said twice in config.toml";
    EXPECT_EQ(s.warmup, 0) << "at most a tenth of the run";

    Settings odd;
    odd.seq_len = 100, odd.batch_size = 7;
    resolve(odd, lns_on_cpu, 1, 0);
    EXPECT_EQ(odd.total_batch_size, 4200) << "the preset's 4096, rounded up to whole micro-batches";
}

TEST(Resolve, AResolvedConfigIsResolved) {
    const TemporaryFolder folder;
    Settings first;
    first.kv_heads = 1, first.tokens = 100'000;
    resolve(first, lns_on_cpu, 1, 0);
    const std::string toml = CommandLine(first, lns_on_cpu).config_toml();
    write_file(folder / "config.toml", toml);
    Parsed again({"--config", folder / "config.toml"});
    ASSERT_FALSE(again.status) << again.error;
    resolve(again.settings, lns_on_cpu, 1, 0);
    EXPECT_EQ(again.command_line.config_toml(), toml);
}

TEST(Resolve, Contradictions) {
    const auto error = [](auto change, const Build& build = lns_on_cpu) {
        Settings s;
        change(s);
        return error_of([&] { resolve(s, build, 2, 0); });
    };
    EXPECT_EQ(error([](Settings&) {}), "no error");
    EXPECT_EQ(error([](Settings& s) { s.steps = 1, s.tokens = 1; }), "--steps and --tokens: give one of them");
    EXPECT_EQ(error([](Settings& s) { s.heads = 3; }), "--hidden 128 must be a multiple of --heads 3");
    const Build in_bf16 = {"LNS", "bf16", "cuda", "tiny", true, false};
    const auto narrow = [](Settings& s) { s.hidden = 100, s.heads = 5; };
    EXPECT_EQ(error(narrow), "no error");
    EXPECT_EQ(error(narrow, in_bf16),
              "--hidden 100 must be a multiple of 8 in bf16; change it, or build with PRECISION=fp32");
    EXPECT_EQ(error([](Settings& s) { s.hidden = 112; }, in_bf16), "no error");
    EXPECT_EQ(error([](Settings& s) { s.kv_heads = 3; }), "--heads 4 must be a multiple of --kv-heads 3");
    EXPECT_EQ(error([](Settings& s) { s.total_batch_size = 500; }),
              "--total-batch-size 500 must be a multiple of batch size x sequence length x ranks = 1 x 128 x 2 = 256");
    EXPECT_EQ(error([](Settings& s) { s.init = "scaled"; }), "no error");
    EXPECT_EQ(error([](Settings& s) { s.init = "scaled"; }, deepnorm),
              "--init scaled: DEEPNORM has an initialization of its own; use --init normal");
    EXPECT_NE(error([](Settings& s) { s.model = "lama"; }).find("--model lama is neither a preset (tiny, llama-9m"),
              std::string::npos);
}

TEST(Resolve, WhatCannotBeCountedIsRefused) {
    const auto error = [](auto change) {
        Settings s;
        change(s);
        return error_of([&] { resolve(s, lns_on_cpu, 1, 0); });
    };
    constexpr int64_t most = std::numeric_limits<int64_t>::max();
    constexpr int most_int = std::numeric_limits<int>::max();
    EXPECT_TRUE(error([](Settings& s) { s.tokens = most; }).starts_with("--tokens 9223372036854775807: "));
    EXPECT_TRUE(error([](Settings& s) { s.steps = most; }).starts_with("--steps 9223372036854775807: "));
    EXPECT_TRUE(error([](Settings& s) { s.batch_size = most_int; }).starts_with("--batch-size 2147483647 x --seq-len"));
    EXPECT_TRUE(error([](Settings& s) { s.layers = most_int; }).starts_with("--layers 2147483647: must be from 1 to "));
    EXPECT_TRUE(error([](Settings& s) { s.hidden = 2147483644; }).starts_with("--hidden 2147483644: must be from 1 "));
    EXPECT_TRUE(error([](Settings& s) { s.ffn = most_int; }).starts_with("--ffn 2147483647: must be from 1 to "));
    EXPECT_TRUE(error([](Settings& s) { s.vocab = most_int; }).starts_with("--vocab 2147483647: must be from 2 to "));
    EXPECT_NE(error([](Settings& s) { s.layers = 16384, s.ffn = 1 << 20, s.seq_len = most_int; }), "no error");

    Settings large;
    large.tokens = most / 2;
    resolve(large, lns_on_cpu, 1, 0);
    EXPECT_EQ(large.steps, (int64_t)1 << 50) << "2^62 - 1 tokens in steps of 4096, rounded up";
}

TEST(Resolve, WarmUpAndCooldown) {
    const auto error = [](const char* schedule, int64_t warmup, int64_t cooldown) {
        Settings s;
        s.schedule = schedule, s.steps = 10, s.warmup = warmup, s.cooldown = cooldown;
        return error_of([&] { resolve(s, lns_on_cpu, 1, 0); });
    };
    EXPECT_EQ(error("wsd", 4, 7), "--warmup 4 and --cooldown 7 are longer together than the run's 10 steps");
    EXPECT_EQ(error("wsd", std::numeric_limits<int64_t>::max(), 1).substr(0, 10), "--warmup 9");
    EXPECT_EQ(error("wsd", 0, std::numeric_limits<int64_t>::max()).substr(0, 10), "--warmup 0");
    EXPECT_EQ(error("wsd", 4, 6), "no error");
    EXPECT_EQ(error("wsd", 20, -1), "no error") << "a run may end within its warm-up";
    for (const char* schedule : {"cosine", "linear", "constant"}) EXPECT_EQ(error(schedule, 20, 100), "no error");

    Settings s;
    s.steps = 10, s.warmup = 9;
    resolve(s, lns_on_cpu, 1, 0);
    EXPECT_EQ(s.cooldown, 1) << "what the warm-up leaves of a fifth";
}

TEST(Resolve, AFolderWithThePresetsName) {
    const TemporaryFolder folder;
    const std::filesystem::path before = std::filesystem::current_path();
    std::filesystem::current_path(folder.path);
    ModelConfig config = preset_config(*find_preset("llama-9m"));
    for (const char* name : {"tiny", "a[b]*"}) {
        std::filesystem::create_directory(name);
        write_file(std::string(name) + "/config.json", huggingface_config(config, "LNS", true, "float32").dump());
    }
    const auto blocks = [](const char* model) {
        Settings s;
        s.model = model;
        const ModelConfig c = resolve(s, lns_on_cpu, 1, 0);
        return std::to_string(c.L) + " " + s.out;
    };
    EXPECT_EQ(error_of([&] { blocks("tiny"); }),
              "--model tiny is a preset and a folder here: --model ./tiny takes the folder, from elsewhere tiny is the "
              "preset");
    for (const char* model : {"./tiny", "tiny/", "./tiny//"}) EXPECT_EQ(blocks(model), "4 runs/tiny-LNS-1") << model;
    EXPECT_EQ(blocks("a[b]*/"), "4 runs/a[b]*-LNS-1");
    std::filesystem::current_path("tiny");
    EXPECT_EQ(blocks("."), "4 runs/tiny-LNS-1");
    std::filesystem::current_path(before);
}

TEST(Resolve, ModelFolders) {
    const TemporaryFolder folder;
    ModelConfig config = preset_config(*find_preset("gpt2-124m"));
    write_file(folder / "config.json", huggingface_config(config, "LNS", true, "float32").dump());
    Settings s;
    s.model = folder.path;
    const ModelConfig read = resolve(s, lns_on_cpu, 1, 300);
    EXPECT_EQ(read.V, 50257) << "the folder's, whatever the tokenizer says";
    EXPECT_EQ(s.seq_len, 1024);
    EXPECT_EQ(s.lr, 6e-4) << "gpt2-124m's recipe";
    EXPECT_EQ(s.out, "runs/" + folder.path.filename().string() + "-LNS-1");

    const auto error = [&](auto change) {
        Settings changed;
        changed.model = folder.path;
        change(changed);
        return error_of([&] { resolve(changed, lns_on_cpu, 1, 0); });
    };
    EXPECT_EQ(error([](Settings& t) { t.seq_len = 1025; }), "--seq-len 1025: the model has 1024 positions");
    EXPECT_EQ(error([](Settings& t) { t.kv_heads = 12; }),
              "--model " + folder.path.string() + " is a folder with weights: its dimensions cannot be overridden");
}

TEST(Resolve, TheTokenThatStartsADocument) {
    Tokenizer tokenizer;
    const auto find = [&](Settings s, const Tokenizer* known) {
        find_document_token(s, known, 300);
        return s.eot_token;
    };
    Settings s;
    EXPECT_EQ(find(s, nullptr), no_document_token) << "not needed";
    s.doc_mask = true;
    EXPECT_NE(error_of([&] { find(s, nullptr); }).find("no tokenizer.json beside"), std::string::npos);
    EXPECT_NE(error_of([&] { find(s, &tokenizer); }).find("has no end-of-text token"), std::string::npos);
    tokenizer.document_start = 7;
    EXPECT_EQ(find(s, &tokenizer), 7);
    s.eot_token = 299;
    EXPECT_EQ(find(s, &tokenizer), 299);
    s.eot_token = 300;
    EXPECT_EQ(error_of([&] { find(s, nullptr); }), "--eot-token 300: must be in the vocabulary, 0 to 299");
    s.doc_mask = false, s.pack = "documents", s.eot_token = -2;
    EXPECT_EQ(error_of([&] { find(s, nullptr); }), "--eot-token -2: must be in the vocabulary, 0 to 299");
}

// ---------------------------------------------------------------------------------------------------------------
// Schedule: N = 10 steps, W = 2, from a peak of 1 to r = 0.1

double rate(const std::string& schedule, int64_t step) {
    Settings s;
    s.schedule = schedule, s.steps = 10, s.warmup = 2, s.cooldown = 4, s.lr = 1;
    return learning_rate(s, step);
}

TEST(LearningRate, WarmUp) {
    for (const char* schedule : {"cosine", "linear", "constant", "wsd"}) {
        EXPECT_DOUBLE_EQ(rate(schedule, 1), 0.5) << schedule;
        EXPECT_DOUBLE_EQ(rate(schedule, 2), 1) << schedule;
    }
}

TEST(LearningRate, Cosine) {
    EXPECT_NEAR(rate("cosine", 3), 0.9657457896, 1e-10);  // 0.1 + 0.9 (1 + cos(pi / 8)) / 2
    EXPECT_DOUBLE_EQ(rate("cosine", 6), 0.55);            // half way
    EXPECT_DOUBLE_EQ(rate("cosine", 10), 0.1);
}

TEST(LearningRate, Linear) {
    EXPECT_DOUBLE_EQ(rate("linear", 3), 0.8875);  // 1 - 0.9 / 8
    EXPECT_DOUBLE_EQ(rate("linear", 10), 0.1);
}

TEST(LearningRate, Constant) {
    EXPECT_DOUBLE_EQ(rate("constant", 3), 1);
    EXPECT_DOUBLE_EQ(rate("constant", 10), 1);
}

TEST(LearningRate, WarmUpStableDecay) {
    EXPECT_DOUBLE_EQ(rate("wsd", 3), 1);
    EXPECT_DOUBLE_EQ(rate("wsd", 6), 1);
    EXPECT_DOUBLE_EQ(rate("wsd", 7), 0.775);  // 1 - 0.9 / 4
    EXPECT_DOUBLE_EQ(rate("wsd", 10), 0.1);
}

// ---------------------------------------------------------------------------------------------------------------
// Models

TEST(Presets, AreModelsThatCanBeTrained) {
    for (const Preset& preset : presets) {
        const ModelConfig c = preset_config(preset);
        EXPECT_NO_THROW(check_config(c)) << preset.name;
        EXPECT_EQ(c.HS * c.NH, c.C) << preset.name;
        EXPECT_GE(c.positions, preset.seq_len) << preset.name;
        EXPECT_EQ(preset.total_batch % preset.seq_len, 0) << preset.name;
        EXPECT_EQ(find_preset(preset.name), &preset);
        const bool gpt2 = std::string(preset.name).starts_with("gpt2");
        EXPECT_EQ(c.row().biased, gpt2);
        EXPECT_EQ(c.tied, gpt2);
        EXPECT_EQ(c.eps, gpt2 ? 1e-5f : 1e-6f);
    }
    EXPECT_EQ(find_preset("llama"), nullptr);
}

TEST(Presets, WhatTheKernelsCannotDoIsRefused) {
    const auto throws = [](auto change, const char* name = "tiny") {
        ModelConfig c = preset_config(*find_preset(name));
        change(c);
        try {
            check_config(c);
        } catch (const Error&) {
            return true;
        }
        return false;
    };
    EXPECT_FALSE(throws([](ModelConfig&) {}));
    EXPECT_TRUE(throws([](ModelConfig& c) { c.L = 0; }));
    EXPECT_TRUE(throws([](ModelConfig& c) { c.V = 1; }));
    EXPECT_TRUE(throws([](ModelConfig& c) { c.NKV = 3; }));
    EXPECT_TRUE(throws([](ModelConfig& c) { c.C = 130; }));
    EXPECT_TRUE(throws([](ModelConfig& c) { c.HS = 132; }));
    EXPECT_TRUE(throws([](ModelConfig& c) { c.HS = 6; }));
    EXPECT_FALSE(throws([](ModelConfig& c) { c.NKV = 2; }));
    EXPECT_TRUE(throws([](ModelConfig& c) { c.NKV = 6; }, "gpt2-124m"));
}

ModelConfig example(Family family) {
    const bool llama = family == Family::LLAMA;
    return {.family = family,
            .L = 3,
            .C = 48,
            .F = 100,
            .NH = 6,
            .NKV = llama ? 2 : 6,
            .HS = llama ? 12 : 8,
            .V = 300,
            .positions = 77,
            .eps = 3e-5f,
            .rope_theta = llama ? 5000.0 : 10000.0,
            .qkv_bias = false,
            .tied = !llama};
}

void expect_same(const ModelConfig& a, const ModelConfig& b) {
    EXPECT_EQ(a.family, b.family);
    EXPECT_EQ(to_line(dimensions(a)), to_line(dimensions(b)));
    EXPECT_EQ(a.HS, b.HS);
    EXPECT_EQ(a.positions, b.positions);
    EXPECT_EQ(a.eps, b.eps);
    EXPECT_EQ(a.rope_theta, b.rope_theta);
    EXPECT_TRUE(a.rope_scaling == b.rope_scaling);
    EXPECT_EQ(a.qkv_bias, b.qkv_bias);
    EXPECT_EQ(a.qk_norm, b.qk_norm);
    EXPECT_EQ(a.tied, b.tied);
}

struct HuggingFace : testing::Test {
    const TemporaryFolder folder;

    ModelConfig read(const nlohmann::json& config, const std::string& norm, bool plain) const {
        write_file(folder / "config.json", config.dump());
        return read_huggingface_config(folder.path, norm, plain);
    }
    std::string error(const nlohmann::json& config, const std::string& norm, bool plain) const {
        try {
            read(config, norm, plain);
        } catch (const Error& e) {
            return e.what();
        }
        return "no error";
    }
};

TEST_F(HuggingFace, WhatIsWrittenIsReadBack) {
    for (const Family family : {Family::LLAMA, Family::GPT2}) {
        for (const auto& [norm, plain] : {std::pair("LNS", true), std::pair("POST", false)}) {
            const ModelConfig c = example(family);
            expect_same(read(huggingface_config(c, norm, plain, "float32"), norm, plain), c);
        }
    }
    ModelConfig qwen = example(Family::LLAMA);
    qwen.qkv_bias = qwen.tied = true;
    expect_same(read(huggingface_config(qwen, "PRE", true, "float32"), "PRE", true), qwen);
    qwen.qkv_bias = false, qwen.qk_norm = true;
    expect_same(read(huggingface_config(qwen, "PRE", true, "float32"), "PRE", true), qwen);
}

TEST_F(HuggingFace, NamesSayWhoCanComputeTheModel) {
    const auto names = [](const ModelConfig& c, const std::string& norm, bool plain) {
        const nlohmann::json j = huggingface_config(c, norm, plain, "bfloat16");
        return j["model_type"].get<std::string>() + " " + j["architectures"].dump() + " " +
               j["norm"].get<std::string>();
    };
    ModelConfig qwen = example(Family::LLAMA);
    qwen.qkv_bias = true;
    EXPECT_EQ(names(example(Family::LLAMA), "LNS", true), R"(llama ["LlamaForCausalLM"] LNS)");
    EXPECT_EQ(names(qwen, "PRE", true), R"(qwen2 ["Qwen2ForCausalLM"] PRE)");
    EXPECT_EQ(names(example(Family::GPT2), "PRE", true), R"(gpt2 ["GPT2LMHeadModel"] PRE)");
    EXPECT_EQ(names(example(Family::LLAMA), "POST", false), R"(llama_post ["POSTLlamaForCausalLM"] POST)");
    EXPECT_EQ(names(example(Family::GPT2), "PERI", false), R"(gpt2_peri ["PERIGPT2LMHeadModel"] PERI)");
    EXPECT_EQ(huggingface_config(example(Family::LLAMA), "POST", false, "float32").at("auto_map"),
              nlohmann::json::parse(R"({"AutoConfig": "modeling_norms.POSTLlamaConfig",
                                        "AutoModelForCausalLM": "modeling_norms.POSTLlamaForCausalLM"})"));
    EXPECT_EQ(huggingface_config(example(Family::GPT2), "PERI", false, "float32").at("auto_map"),
              nlohmann::json::parse(R"({"AutoConfig": "modeling_norms.PERIGPT2Config",
                                        "AutoModelForCausalLM": "modeling_norms.PERIGPT2LMHeadModel"})"));
    EXPECT_FALSE(huggingface_config(example(Family::GPT2), "PRE", true, "float32").contains("auto_map"));
}

TEST_F(HuggingFace, WhatWouldComputeSomethingElseIsRefused) {
    const nlohmann::json llama = huggingface_config(example(Family::LLAMA), "LNS", true, "float32");
    const nlohmann::json gpt2 = huggingface_config(example(Family::GPT2), "LNS", true, "float32");
    const nlohmann::json post = huggingface_config(example(Family::LLAMA), "POST", false, "float32");
    const auto with = [](nlohmann::json config, const char* key, const nlohmann::json& value) {
        config[key] = value;
        return config;
    };
    const std::string start = folder / "config.json: ";
    EXPECT_EQ(error(llama, "LNS", true), "no error");
    EXPECT_EQ(error(llama, "PRE", true), "no error") << "LNS is folded into the gains";
    EXPECT_EQ(error(post, "LNS", true),
              start + "\"model_type\" is \"llama_post\": NORM=LNS can load llama, mistral, qwen2, qwen3, gpt2");
    EXPECT_NE(error(post, "MIX", false).find("NORM=MIX"), std::string::npos);
    EXPECT_NE(error(llama, "POST", false).find("such a model is Pre-LN"), std::string::npos);
    EXPECT_NE(error(with(post, "model_type", "llama_post_"), "POST", false), "no error");
    EXPECT_EQ(error(with(post, "norm", "MIX"), "POST", false),
              start + "\"norm\" is \"MIX\": only \"POST\" is supported");

    const auto refused = [&](const nlohmann::json& config, const char* key, const nlohmann::json& value) {
        const std::string found = error(with(config, key, value), "LNS", true);
        EXPECT_TRUE(found.starts_with(start + "\"" + key)) << key << ": " << found;
        EXPECT_EQ(found.find('\n'), found.npos) << found;
        EXPECT_LT(found.size(), start.size() + 220);
    };
    for (const auto& [key, value] : std::map<const char*, nlohmann::json>{{"hidden_act", "gelu"},
                                                                          {"attention_bias", true},
                                                                          {"mlp_bias", true},
                                                                          {"pretraining_tp", 2},
                                                                          {"partial_rotary_factor", 0.5},
                                                                          {"rope_interleaved", true},
                                                                          {"is_encoder_decoder", true},
                                                                          {"pruned_heads", {{"1", {0}}}},
                                                                          {"tie_encoder_decoder", true},
                                                                          {"use_qk_norm", true},
                                                                          {"sliding_window", 4},
                                                                          {"quantization_config", {{"bits", 4}}},
                                                                          {"logit_scale", 0.5},
                                                                          {"tie_word_embeddings", "yes"},
                                                                          {"tie_word_embeddings", 1},
                                                                          {"rope_theta", 0},
                                                                          {"rope_theta", -1},
                                                                          {"rope_theta", "10000"},
                                                                          {"rope_theta", 1e300},
                                                                          {"rms_norm_eps", 0},
                                                                          {"rms_norm_eps", -1e-6},
                                                                          {"rms_norm_eps", 1e-60},
                                                                          {"model_type", 3},
                                                                          {"model_type", nullptr},
                                                                          {"model_type", "gemma"},
                                                                          {"auto_map", {{"AutoModel", "its_own.Code"}}},
                                                                          {"n_embd", 64}}) {
        refused(llama, key, value);
    }
    for (const auto& [key, value] : std::map<const char*, nlohmann::json>{{"activation_function", "relu"},
                                                                          {"tie_word_embeddings", false},
                                                                          {"scale_attn_weights", false},
                                                                          {"scale_attn_by_inverse_layer_idx", true},
                                                                          {"reorder_and_upcast_attn", true},
                                                                          {"add_cross_attention", true},
                                                                          {"rope_theta", 10000},
                                                                          {"n_embd", 50}}) {
        refused(gpt2, key, value);
    }
    EXPECT_EQ(error(with(llama, "use_qk_norm", true), "LNS", true),
              start +
                  "\"use_qk_norm\" is true: a key that is not known here may change what the model computes; "
                  "remove it if it does not");
    EXPECT_EQ(error(with(llama, "use_qk_norm", nullptr), "LNS", true), "no error");
}

TEST_F(HuggingFace, DimensionsAreWholeNumbersThatFit) {
    for (const Family family : {Family::LLAMA, Family::GPT2}) {
        const nlohmann::json good = huggingface_config(example(family), "LNS", true, "float32");
        const HuggingFaceKeys& keys = family == Family::LLAMA ? llama_keys : gpt2_keys;
        std::set<std::string> integers = {keys.positions};
        for (const char* name : {keys.names.L, keys.names.C, keys.names.F, keys.names.NH, keys.names.NKV, keys.names.V})
            integers.insert(name);
        if (family == Family::LLAMA) integers.insert("head_dim");
        for (const std::string& key : integers) {
            for (const char* value : {"0", "-1", "32.9", "32.0", "\"32\"", "true", "[32]", "4294967298", "1e300",
                                      "2147483648", "18446744073709551617"}) {
                nlohmann::json config = good;
                config[key] = nlohmann::json::parse(value);
                EXPECT_EQ(error(config, "LNS", true).find(folder / "config.json: \"" + key + "\" is "), 0u)
                    << key << " " << value;
            }
        }
        for (const char* key : {keys.names.L, keys.names.C, keys.names.F, keys.names.V}) {
            nlohmann::json config = good;
            config[key] = 2147483640;
            EXPECT_NE(error(config, "LNS", true).find(key), std::string::npos) << key;
        }
    }
    nlohmann::json config = huggingface_config(example(Family::LLAMA), "LNS", true, "float32");
    config["head_dim"] = 256;
    EXPECT_EQ(error(config, "LNS", true), folder /
                                              "config.json: a head of 256 channels: allowed are multiples of 4 up "
                                              "to 128 (change num_attention_heads or hidden_size)");
    config["head_dim"] = nullptr, config["num_attention_heads"] = 7, config["num_key_value_heads"] = 7;
    EXPECT_EQ(error(config, "LNS", true), folder /
                                              "config.json: \"hidden_size\" is 48: must be a multiple of "
                                              "num_attention_heads 7 where there is no head_dim");
}

TEST_F(HuggingFace, NoJson) {
    for (const char* contents :
         {"", "{", "[]", "3", "null", "{\"vocab_size\": NaN}", "{\"rope_theta\": 1e400}", "\xff"}) {
        write_file(folder / "config.json", contents);
        EXPECT_THROW(read_huggingface_config(folder.path, "LNS", true), Error) << contents;
    }
    std::filesystem::remove(folder / "config.json");
    ASSERT_EQ(mkfifo((folder / "config.json").c_str(), 0600), 0);
    EXPECT_THROW(read_huggingface_config(folder.path, "LNS", true), Error) << "nobody writes into it";
}

TEST_F(HuggingFace, RotaryPositions) {
    const auto theta = [&](const nlohmann::json& keys) {
        nlohmann::json config = huggingface_config(example(Family::LLAMA), "LNS", true, "float32");
        config.erase("rope_theta");
        config.update(keys);
        try {
            return text("%g", read(config, "LNS", true).rope_theta);
        } catch (const Error& e) {
            return std::string(e.what()).substr((folder / "config.json: ").size());
        }
    };
    EXPECT_EQ(theta(nlohmann::json::object()), "10000");
    EXPECT_EQ(theta({{"rope_theta", 5e5}}), "500000");
    EXPECT_EQ(theta({{"rope_theta", 1000000}, {"rope_scaling", nullptr}}), "1e+06");
    EXPECT_EQ(theta({{"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 5e5}}}}), "500000");
    EXPECT_EQ(theta({{"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 5e5}}}, {"rope_theta", 5e5}}),
              "500000");
    EXPECT_EQ(theta({{"rope_scaling", {{"type", "default"}}}, {"rope_theta", 3e4}}), "30000");
    EXPECT_EQ(theta({{"rope_scaling", {{"rope_type", "default"}, {"partial_rotary_factor", 1.0}}}}), "10000");
    EXPECT_EQ(theta({{"rope_parameters", {{"rope_theta", 5e5}}}, {"rope_theta", 1e4}}),
              "\"rope_parameters.rope_theta\" is 500000.0: \"rope_theta\" beside it is 10000");
    for (const char* type : {"dynamic", "yarn", "longrope", "mrope"}) {
        const std::string expected = text("is \"%s\": only \"default\", \"linear\" and \"llama3\" are supported", type);
        EXPECT_EQ(theta({{"rope_scaling", {{"rope_type", type}, {"factor", 2}}}}),
                  "\"rope_scaling.rope_type\" " + expected);
        EXPECT_EQ(theta({{"rope_scaling", {{"type", type}, {"factor", 2}}}}), "\"rope_scaling.type\" " + expected);
        EXPECT_EQ(theta({{"rope_parameters", {{"rope_type", type}}}}), "\"rope_parameters.rope_type\" " + expected);
    }
    for (const nlohmann::json& other :
         {nlohmann::json{{"factor", 2}}, nlohmann::json{{"partial_rotary_factor", 0.5}},
          nlohmann::json{{"full_attention", {{"rope_type", "default"}}}}, nlohmann::json{{"rope_theta", "big"}},
          nlohmann::json("yarn"), nlohmann::json(2)}) {
        EXPECT_TRUE(theta({{"rope_parameters", other}}).starts_with("\"rope_parameters")) << other;
        EXPECT_TRUE(theta({{"rope_scaling", other}}).starts_with("\"rope_scaling")) << other;
    }
}

// Both spellings, and what is written again. The frequencies are worked out by hand.
TEST_F(HuggingFace, StretchedRotaryPositions) {
    const nlohmann::json linear = {{"rope_type", "linear"}, {"factor", 4.0}};
    const nlohmann::json llama3 = {{"rope_type", "llama3"},
                                   {"factor", 8.0},
                                   {"low_freq_factor", 1.0},
                                   {"high_freq_factor", 4.0},
                                   {"original_max_position_embeddings", 32}};
    for (const nlohmann::json& scaling : {linear, llama3}) {
        nlohmann::json older = scaling, newer = scaling;
        older.erase("rope_type"), older["type"] = scaling["rope_type"];
        newer["rope_theta"] = 5000.0;
        for (const nlohmann::json& keys :
             {nlohmann::json{{"rope_scaling", scaling}}, nlohmann::json{{"rope_scaling", older}},
              nlohmann::json{{"rope_parameters", newer}}}) {
            nlohmann::json config = huggingface_config(example(Family::LLAMA), "LNS", true, "float32");
            config.update(keys);
            const ModelConfig c = read(config, "LNS", true);
            const nlohmann::json written = huggingface_config(c, "LNS", true, "float32");
            EXPECT_EQ(written["rope_scaling"], scaling);
            EXPECT_EQ(written["rope_theta"], 5000.0);
            expect_same(read(written, "LNS", true), c);
            if (scaling == linear) {
                EXPECT_EQ(c.rope_scaling(0.5), 0.125);
                continue;
            }
            const double turn = 2 * std::acos(-1.0) / 32;  // radians a position: one turn in 32
            EXPECT_EQ(c.rope_scaling(5 * turn), 5 * turn);
            EXPECT_EQ(c.rope_scaling(0.5 * turn), 0.5 * turn / 8);
            EXPECT_NEAR(c.rope_scaling(2.5 * turn), 2.5 * turn * (0.5 + 0.5 / 8), 1e-12);
        }
    }
    for (const char* key : {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}) {
        for (const nlohmann::json& bad : {nlohmann::json(), nlohmann::json(-1), nlohmann::json("8")}) {
            nlohmann::json config = huggingface_config(example(Family::LLAMA), "LNS", true, "float32");
            config["rope_scaling"] = llama3, config["rope_scaling"][key] = bad;
            EXPECT_THROW(read(config, "LNS", true), Error) << key << bad;
        }
    }
}

TEST_F(HuggingFace, Windows) {
    const auto longest = [&](const char* type, const nlohmann::json& keys) {
        nlohmann::json config = {{"model_type", type},       {"vocab_size", 300},
                                 {"hidden_size", 64},        {"intermediate_size", 96},
                                 {"num_hidden_layers", 2},   {"num_attention_heads", 4},
                                 {"num_key_value_heads", 4}, {"max_position_embeddings", 1024}};
        config.update(keys);
        try {
            const ModelConfig c = read(config, "LNS", true);
            return std::to_string(c.longest()) + (c.fixed_positions ? " at most" : "");
        } catch (const Error& e) {
            return std::string(e.what()).substr((folder / "config.json: ").size());
        }
    };
    EXPECT_EQ(longest("llama", nlohmann::json::object()), "1024");
    EXPECT_EQ(longest("mistral", {{"sliding_window", 512}}), "512 at most");
    EXPECT_EQ(longest("mistral", {{"sliding_window", nullptr}}), "1024");
    EXPECT_EQ(longest("mistral", {{"max_position_embeddings", 32768}}), "4096 at most") << "Hugging Face's default";
    EXPECT_EQ(longest("qwen2", {{"sliding_window", 512}}), "1024");
    EXPECT_EQ(longest("qwen2", {{"sliding_window", 512}, {"use_sliding_window", false}, {"max_window_layers", 1}}),
              "1024");
    EXPECT_EQ(longest("qwen2", {{"sliding_window", 512}, {"use_sliding_window", true}, {"max_window_layers", 1}}),
              "512 at most");
    EXPECT_EQ(longest("qwen2", {{"layer_types", {"full_attention", "full_attention"}}}), "1024");
    EXPECT_EQ(longest("qwen2", {{"use_sliding_window", true},
                                {"sliding_window", 512},
                                {"layer_types", {"full_attention", "sliding_attention"}}}),
              "512 at most");
    EXPECT_TRUE(
        longest("qwen2", {{"layer_types", {"full_attention", "sliding_attention"}}}).starts_with("\"layer_types\""));
    EXPECT_TRUE(longest("qwen2", {{"layer_types", {"linear_attention"}}}).starts_with("\"layer_types\" is "));
    EXPECT_TRUE(longest("mistral", {{"sliding_window", 0}}).starts_with("\"sliding_window\" is 0"));

    // What is written is as what was read, to code that gives it longer sequences.
    const auto written = [&](bool plain) {
        return huggingface_config(read_huggingface_config(folder.path, "LNS", true), "LNS", plain, "float32");
    };
    longest("qwen2", {{"use_sliding_window", true},
                      {"sliding_window", 512},
                      {"max_window_layers", 1},
                      {"layer_types", {"full_attention", "sliding_attention"}}});
    EXPECT_EQ(written(true)["model_type"], "qwen2");
    EXPECT_EQ(written(true)["max_window_layers"], 1);
    EXPECT_EQ(written(true)["layer_types"], nlohmann::json({"full_attention", "sliding_attention"}));
    longest("qwen2", {{"sliding_window", 512}});
    EXPECT_FALSE(written(true).contains("sliding_window")) << "is not used";
    longest("mistral", {{"max_position_embeddings", 32768}});
    EXPECT_EQ(written(true)["sliding_window"], 4096);
    EXPECT_EQ(longest("mistral", written(true)), "4096 at most");
    EXPECT_EQ(longest("mistral", {{"sliding_window", nullptr}}), "1024");
    EXPECT_EQ(written(true)["model_type"], "llama") << "computes the same";

    EXPECT_EQ(longest("mistral", {{"sliding_window", 64}}), "64 at most");
    EXPECT_EQ(written(true)["model_type"], "mistral");
    EXPECT_EQ(written(true)["architectures"], nlohmann::json({"MistralForCausalLM"}));
    EXPECT_EQ(written(true)["max_position_embeddings"], 1024);
    EXPECT_EQ(written(true)["sliding_window"], 64);
    EXPECT_EQ(written(false)["model_type"], "mistral_lns");
    Settings s;
    s.model = folder.path, s.seq_len = 65;
    EXPECT_EQ(error_of([&] { resolve(s, lns_on_cpu, 1, 0); }),
              "--seq-len 65: the model has 64 positions within the window of its attention");
}

TEST_F(HuggingFace, WhatIsMissingHasHuggingFacesDefault) {
    nlohmann::json llama = {{"model_type", "llama"},   {"vocab_size", 300},      {"hidden_size", 64},
                            {"intermediate_size", 96}, {"num_hidden_layers", 2}, {"num_attention_heads", 16}};
    ModelConfig c = read(llama, "PRE", true);
    EXPECT_EQ(c.NKV, 16);
    EXPECT_EQ(c.HS, 4);
    EXPECT_EQ(c.eps, 1e-6f);
    EXPECT_EQ(c.positions, 2048);
    EXPECT_EQ(c.rope_theta, 10000);
    EXPECT_FALSE(c.tied);
    EXPECT_FALSE(c.qkv_bias);
    llama["model_type"] = "mistral";
    EXPECT_EQ(read(llama, "PRE", true).NKV, 8);
    llama["num_key_value_heads"] = nullptr;
    EXPECT_EQ(read(llama, "PRE", true).NKV, 16);
    llama["model_type"] = "qwen2";
    c = read(llama, "PRE", true);
    EXPECT_EQ(c.positions, 32768);
    EXPECT_TRUE(c.qkv_bias);
    llama["model_type"] = "qwen3";
    c = read(llama, "PRE", true);
    EXPECT_EQ(c.HS, 128);
    EXPECT_TRUE(c.qk_norm && !c.qkv_bias);
    for (const char* key :
         {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}) {
        nlohmann::json without = llama;
        without.erase(key);
        EXPECT_NE(error(without, "PRE", true).find(text("\"%s\" is missing", key)), std::string::npos);
    }
    c = read({{"model_type", "gpt2"},
              {"vocab_size", 9},
              {"n_embd", 64},
              {"n_layer", 1},
              {"n_head", 2},
              {"n_positions", 32},
              {"n_inner", nullptr}},
             "PRE", true);
    EXPECT_EQ(c.F, 256);
    EXPECT_EQ(c.HS, 32);
    EXPECT_EQ(c.NKV, 2);
    EXPECT_EQ(c.eps, 1e-5f);
    EXPECT_TRUE(c.tied);
}

TEST_F(HuggingFace, ScaleOfANormIsFoldedWhereThereIsOne) {
    write_file(folder / "config.json", huggingface_config(example(Family::LLAMA), "LNS", true, "float32").dump());
    Build lns = lns_on_cpu, pre = lns_on_cpu;
    lns.norm_has_scale = true, pre.norm = "PRE";
    Settings s;
    s.model = folder.path;
    EXPECT_FALSE(resolve_model(s, lns, 0).norm_scale_folded);
    s.norm_scale = "folded";
    EXPECT_TRUE(resolve_model(s, lns, 0).norm_scale_folded);
    const std::string refused = "--norm-scale folded: needs --model FOLDER, and a norm with a scale";
    EXPECT_EQ(error_of([&] { resolve_model(s, pre, 0); }).substr(0, refused.size()), refused);
    s.model = "tiny";
    EXPECT_EQ(error_of([&] { resolve_model(s, lns, 0); }).substr(0, refused.size()), refused);
}

// As published or as transformers writes them, with the keys that change nothing here.
TEST_F(HuggingFace, PublishedModelsAreRead) {
    const char* published[] = {
        // GPT-2
        R"({"activation_function":"gelu_new","architectures":["GPT2LMHeadModel"],"attn_pdrop":0.1,"bos_token_id":50256,
            "embd_pdrop":0.1,"eos_token_id":50256,"initializer_range":0.02,"layer_norm_epsilon":1e-05,"model_type":"gpt2",
            "n_ctx":1024,"n_embd":768,"n_head":12,"n_layer":12,"n_positions":1024,"resid_pdrop":0.1,
            "summary_activation":null,"summary_first_dropout":0.1,"summary_proj_to_labels":true,
            "summary_type":"cls_index","summary_use_proj":true,
            "task_specific_params":{"text-generation":{"do_sample":true,"max_length":50}},"vocab_size":50257})",
        // GPT-2 of transformers 5
        R"({"activation_function":"gelu_new","add_cross_attention":false,"architectures":["GPT2LMHeadModel"],
            "attn_pdrop":0.1,"bos_token_id":50256,"dtype":"float32","embd_pdrop":0.1,"eos_token_id":50256,
            "initializer_range":0.02,"layer_norm_epsilon":1e-05,"model_type":"gpt2","n_embd":64,"n_head":4,"n_inner":null,
            "n_layer":2,"n_positions":128,"pad_token_id":null,"reorder_and_upcast_attn":false,"resid_pdrop":0.1,
            "scale_attn_by_inverse_layer_idx":false,"scale_attn_weights":true,"summary_activation":null,
            "summary_first_dropout":0.1,"summary_proj_to_labels":true,"summary_type":"cls_index","summary_use_proj":true,
            "tie_word_embeddings":true,"transformers_version":"5.0.0","use_cache":true,"vocab_size":300})",
        // SmolLM2
        R"({"architectures":["LlamaForCausalLM"],"attention_bias":false,"attention_dropout":0.0,"bos_token_id":0,
            "eos_token_id":0,"hidden_act":"silu","hidden_size":576,"initializer_range":0.041666666666666664,
            "intermediate_size":1536,"is_llama_config":true,"max_position_embeddings":8192,"model_type":"llama",
            "num_attention_heads":9,"num_hidden_layers":30,"num_key_value_heads":3,"pretraining_tp":1,
            "rms_norm_eps":1e-05,"rope_interleaved":false,"rope_scaling":null,"rope_theta":100000,
            "tie_word_embeddings":true,"torch_dtype":"bfloat16","transformers_version":"4.40.1","use_cache":true,
            "vocab_size":49152})",
        // LLaMA of transformers 5
        R"({"architectures":["LlamaForCausalLM"],"attention_bias":false,"attention_dropout":0.0,"bos_token_id":1,
            "dtype":"float32","eos_token_id":2,"head_dim":16,"hidden_act":"silu","hidden_size":64,
            "initializer_range":0.02,"intermediate_size":128,"max_position_embeddings":256,"mlp_bias":false,
            "model_type":"llama","num_attention_heads":4,"num_hidden_layers":2,"num_key_value_heads":2,
            "pad_token_id":null,"pretraining_tp":1,"rms_norm_eps":1e-06,
            "rope_parameters":{"rope_theta":500000.0,"rope_type":"default"},"tie_word_embeddings":false,
            "transformers_version":"5.0.0","use_cache":true,"vocab_size":300})",
        // Mistral
        R"({"architectures":["MistralForCausalLM"],"bos_token_id":1,"eos_token_id":2,"hidden_act":"silu",
            "hidden_size":4096,"initializer_range":0.02,"intermediate_size":14336,"max_position_embeddings":32768,
            "model_type":"mistral","num_attention_heads":32,"num_hidden_layers":32,"num_key_value_heads":8,
            "rms_norm_eps":1e-05,"rope_theta":10000.0,"sliding_window":4096,"tie_word_embeddings":false,
            "torch_dtype":"bfloat16","transformers_version":"4.34.0.dev0","use_cache":true,"vocab_size":32000})",
        // Qwen2.5
        R"({"architectures":["Qwen2ForCausalLM"],"attention_dropout":0.0,"bos_token_id":151643,"eos_token_id":151643,
            "hidden_act":"silu","hidden_size":896,"initializer_range":0.02,"intermediate_size":4864,
            "max_position_embeddings":32768,"max_window_layers":24,"model_type":"qwen2","num_attention_heads":14,
            "num_hidden_layers":24,"num_key_value_heads":2,"rms_norm_eps":1e-06,"rope_theta":1000000.0,
            "sliding_window":32768,"tie_word_embeddings":true,"torch_dtype":"bfloat16","transformers_version":"4.40.1",
            "use_cache":true,"use_mrope":false,"use_sliding_window":false,"vocab_size":151936})",
        // Qwen3
        R"({"architectures":["Qwen3ForCausalLM"],"attention_bias":false,"attention_dropout":0.0,"bos_token_id":151643,
            "eos_token_id":151645,"head_dim":128,"hidden_act":"silu","hidden_size":1024,"initializer_range":0.02,
            "intermediate_size":3072,"max_position_embeddings":40960,"max_window_layers":28,"model_type":"qwen3",
            "num_attention_heads":16,"num_hidden_layers":28,"num_key_value_heads":8,"rms_norm_eps":1e-06,
            "rope_scaling":null,"rope_theta":1000000,"sliding_window":null,"tie_word_embeddings":true,
            "torch_dtype":"bfloat16","transformers_version":"4.51.0","use_cache":true,"use_sliding_window":false,
            "vocab_size":151936})"};
    const std::pair<int, double> expected[] = {{1024, 10000}, {128, 10000},     {8192, 100000},  {256, 500000},
                                               {4096, 10000}, {32768, 1000000}, {40960, 1000000}};
    for (size_t i = 0; i < std::size(published); i++) {
        ModelConfig c;
        ASSERT_NO_THROW(c = read(nlohmann::json::parse(published[i]), "LNS", true)) << published[i];
        EXPECT_EQ(c.longest(), expected[i].first) << published[i];
        EXPECT_EQ(c.rope_theta, expected[i].second) << published[i];
    }
}

TEST_F(HuggingFace, TokensThatEndATextAreReadAndWritten) {
    nlohmann::json config = huggingface_config(example(Family::LLAMA), "LNS", true, "float32");
    for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"}) EXPECT_TRUE(config.at(key).is_null());
    config.update({{"bos_token_id", 1}, {"eos_token_id", {2, 300}}, {"pad_token_id", -1}});
    write_file(folder / "generation_config.json", R"({"temperature": 0.6, "eos_token_id": [7, 2]})");
    ModelConfig c = read(config, "LNS", true);
    EXPECT_EQ(c.bos_token, 1);
    EXPECT_EQ(c.pad_token, -1);
    EXPECT_EQ(c.eos_tokens, (std::vector<int>{2, 7})) << "300 is no token of the model's";
    EXPECT_EQ(token_ids(c), nlohmann::json::parse(R"({"bos_token_id":1,"eos_token_id":[2,7],"pad_token_id":null})"));
    EXPECT_EQ(huggingface_config(c, "LNS", true, "bfloat16").at("eos_token_id"), nlohmann::json({2, 7}));
    config["eos_token_id"] = "the end";
    EXPECT_EQ(error(config, "LNS", true), folder / "config.json" +
                                              ": \"eos_token_id\" is \"the end\": expected a token's number, or a list "
                                              "of them");
}

// Those of the tokenizer, and of the model's own those that are tokens of their own there.
TEST_F(HuggingFace, TokensAreTheTokenizers) {
    const Tokenizer llama3 = Tokenizer::load("test/fixtures/tokenizer-llama3.json");  // 503 begins, 504 ends a text
    ModelConfig c = example(Family::LLAMA);
    c.V = 600, c.eos_tokens = {2};
    name_special_tokens(c, llama3);
    EXPECT_EQ(token_ids(c), nlohmann::json::parse(R"({"bos_token_id":503,"eos_token_id":504,"pad_token_id":504})"));
    EXPECT_EQ(tokenizer_config(c, llama3), nlohmann::json::parse(R"({
        "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|end_of_text|>",
        "clean_up_tokenization_spaces": false, "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 77, "tokenizer_class": "PreTrainedTokenizerFast"})"));

    const Tokenizer qwen2 =
        Tokenizer::load("test/fixtures/tokenizer-qwen2.json");  // 500 <|endoftext|>, 501 <|im_start|>
    c.eos_tokens = {501}, c.pad_token = 501;
    name_special_tokens(c, qwen2);
    EXPECT_EQ(token_ids(c),
              nlohmann::json::parse(R"({"bos_token_id":500,"eos_token_id":[501,500],"pad_token_id":501})"));
    EXPECT_EQ(tokenizer_config(c, qwen2).at("eos_token"), "<|im_start|>");
    c.V = 400;
    name_special_tokens(c, qwen2);
    EXPECT_EQ(token_ids(c), nlohmann::json::parse(R"({"bos_token_id":null,"eos_token_id":null,"pad_token_id":null})"))
        << "the model does not have them";
}

// What ends an answer comes first: it is the eos_token of tokenizer_config.json.
TEST_F(HuggingFace, AnswersEndAsTheirTemplateSays) {
    Tokenizer tokenizer;
    tokenizer.tokens.assign(10, "x");
    tokenizer.tokens[3] = "<|endoftext|>", tokenizer.tokens[7] = "<|im_end|>";
    tokenizer.added_tokens = {{"<|endoftext|>", 3}, {"<|im_end|>", 7}};
    tokenizer.end_of_text = tokenizer.document_start = 3;
    ModelConfig c = example(Family::LLAMA);
    for (const auto& [name, ends] : {std::pair("chatml", std::vector<int>{7, 3}), std::pair("plain", std::vector{3})}) {
        c.eos_tokens.clear();
        for (int again = 0; again < 2; again++) name_special_tokens(c, tokenizer, name);
        EXPECT_EQ(c.eos_tokens, ends) << name;
        EXPECT_EQ(tokenizer_config(c, tokenizer).at("eos_token"), answer_end(name, tokenizer));
        EXPECT_NE(chat_jinja(name, tokenizer).find(answer_end(name, tokenizer)), std::string::npos) << name;
        EXPECT_EQ(chat_jinja(name, tokenizer).find("{{ \"<|endoftext|>\" }}"), 0u) << name;
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Log

TEST(RunLog, Numbers) {
    constexpr double nan = std::numeric_limits<double>::quiet_NaN(), infinity = INFINITY;
    EXPECT_EQ(to_line({nan, -nan, infinity, -infinity}), "[null,null,null,null]");
    EXPECT_EQ(to_line({1.0 / 3, 1e-5, 0.001, 1000.0, 1e9, 1234567890.0, -0.0, 1e300}),
              "[0.333333333,1e-05,0.001,1000,1e+09,1.23456789e+09,-0,1e+300]");
    EXPECT_EQ(to_line({0.1f}), "[0.100000001]");
    EXPECT_EQ(to_line({1234567890123, -1, true}), "[1234567890123,-1,true]");
    EXPECT_EQ(to_line({18446744073709551615u}), "[18446744073709551615]");
}

TEST(RunLog, StructureAndText) {
    const json fields = {{"z", std::map<std::string, std::vector<double>>{{"b", {1.5}}, {"a", {}}}},
                         {"a", std::vector<std::vector<double>>{{1, NAN}, {}}},
                         {"text", "line\n\"quoted\""},
                         {"empty", json::object()}};
    EXPECT_EQ(to_line(fields), R"({"z":{"a":[],"b":[1.5]},"a":[[1,null],[]],"text":"line\n\"quoted\"","empty":{}})");
    EXPECT_EQ(to_line("\xff"), "\"\xef\xbf\xbd\"") << "a path may be no UTF-8";
}

TEST(RunLog, ALineAnEvent) {
    const TemporaryFolder folder;
    const std::string path = folder / "log.jsonl";
    RunLog().write("train", {{"step", 1}});  // not open: another rank
    {
        RunLog log;
        log.open(path);
        log.write("val", {{"step", 1}, {"loss", NAN}});
        EXPECT_EQ(read_file(path), "{\"event\":\"val\",\"step\":1,\"loss\":null}\n") << "before it is closed";
    }
    RunLog log;
    log.open(path);
    log.write("end", {{"reason", "done"}});
    EXPECT_EQ(read_file(path),
              "{\"event\":\"val\",\"step\":1,\"loss\":null}\n{\"event\":\"end\",\"reason\":\"done\"}\n");
    EXPECT_THROW(log.open(folder / "no/such/folder"), std::runtime_error);
}

TEST(Text, ForPeople) {
    EXPECT_EQ(with_commas(0), "0");
    EXPECT_EQ(with_commas(999), "999");
    EXPECT_EQ(with_commas(1234567), "1,234,567");
    EXPECT_EQ(duration(-1), "0s");
    EXPECT_EQ(duration(59), "59s");
    EXPECT_EQ(duration(125), "2m 05s");
    EXPECT_EQ(duration(11225), "3h 07m");
}

}  // namespace
