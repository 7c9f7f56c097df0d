// Flags and config.toml: the settings as a user gives them, and as a run writes them down. CLI11 stays in the .cpp: a
// compiler needs seconds for it.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "trainer/settings.h"

class CommandLine {
  public:
    // Both must outlive it.
    CommandLine(Settings& settings, const Build& build);
    ~CommandLine();

    // Fills the settings in. Returns the exit status where the program ends here: after --help, and after a mistake,
    // which it prints in one line.
    std::optional<int> parse(int argc, const char* const* argv);

    // The text of config.toml: every setting, with the values they have now.
    std::string config_toml() const;

  private:
    struct Parser;
    std::unique_ptr<Parser> parser;
};
