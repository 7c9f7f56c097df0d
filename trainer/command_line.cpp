#include "trainer/command_line.h"

#include <CLI/CLI.hpp>

struct CommandLine::Parser {
    CLI::App app;
    Settings& settings;
    const Build& build;
    std::string config;

    Parser(Settings& s, const Build& build)
        : app("Trains a GPT. This program is built for NORM=" + build.norm + " " + build.precision + " on " +
              build.device + "."),
          settings(s),
          build(build) {
        app.get_formatter()->column_width(34);
        app.add_option("--config", config, "TOML file with any of these flags; the command line wins")
            ->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
        for (const Setting& setting : setting_table()) {
            std::visit([&](auto member) { add(setting, s.*member); }, setting.member);
        }
    }

    template <class T>
    void add(const Setting& setting, T& value) {
        const std::string flag = std::string("--") + setting.name;
        if constexpr (std::is_same_v<T, bool>) {
            app.add_flag(flag, value, setting.help)->check([](const std::string& word) {
                return word == "true" || word == "false" ? "" : "must be true or false, not \"" + word + "\"";
            });
        } else {
            const Allowed& allowed = setting.traits.allowed;
            const auto set = [flag, &value, &allowed](const std::string& word) {
                try {
                    value = value_from<T>(word, allowed);
                } catch (const Error& e) {
                    throw CLI::ValidationError(flag, e.what());
                }
            };
            CLI::Option* option = app.add_option_function<std::string>(flag, set, setting.help);
            option->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
            option->type_name(type_names<T>().first);
            if (setting.traits.several) option->expected(1, -1)->allow_extra_args()->join(',');
            if (!allowed.choices.empty()) option->type_name("TEXT:{" + CLI::detail::join(allowed.choices, ",") + "}");
            if (setting.traits.show_default) {
                if constexpr (std::is_same_v<T, std::string>) option->default_str(value);
                else option->default_str(text("%.15g", (double)value));
            }
        }
    }

    // Whether the command line has the flag.
    bool has(const char* name) const { return app.count(std::string("--") + name) > 0; }

    std::optional<int> parse(int argc, const char* const* argv) {
        const auto wrong = [](const std::string& why, const char* hint) {
            fprintf(stderr, "train_gpt: %s%s\n", first_line(why).c_str(), hint);
            return 2;
        };
        try {
            app.parse(argc, argv);
            if (has("config")) read_config();
            if (settings.json && !settings.dry_run) throw UsageError("--json requires --dry-run");
            if (has("template") && !settings.chat) throw UsageError("--template requires --chat");
            for (const char* name : {"prompt-file", "chat", "max-tokens", "temperature", "top-k", "top-p", "stop"}) {
                if (has(name) && !settings.generate) throw UsageError(text("--%s requires --generate", name));
            }
            return {};
        } catch (const CLI::CallForHelp& help) {
            return app.exit(help);
        } catch (const CLI::ParseError& e) {
            return wrong(e.what(), "; see --help");
        } catch (const UsageError& e) {
            return wrong(e.what(), "");
        }
    }

    // --steps, --tokens and --epochs say the same thing: each replaces the file's other ones.
    void read_config() {
        std::set<std::string> keep;
        for (const Setting& setting : setting_table()) {
            if (has(setting.name)) keep.insert(setting.name);
        }
        if (has("steps") || has("tokens") || has("epochs")) keep.insert({"steps", "tokens", "epochs"});
        set_from_toml(settings, config, keep);
    }
};

CommandLine::CommandLine(Settings& settings, const Build& build) : parser(std::make_unique<Parser>(settings, build)) {}
CommandLine::~CommandLine() = default;

std::optional<int> CommandLine::parse(int argc, const char* const* argv) { return parser->parse(argc, argv); }

std::string CommandLine::config_toml() const {
    const Build& build = parser->build;
    return "# ./train_gpt --config THIS repeats the run (NORM=" + build.norm + ", " + build.precision + ", " +
           build.device + ")\n" + to_toml(parser->settings);
}
