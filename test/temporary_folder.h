// A folder that is gone, with all that is in it, when the test ends.
#pragma once
#include <stdlib.h>

#include <filesystem>
#include <stdexcept>
#include <string>

struct TemporaryFolder {
    std::filesystem::path path;

    TemporaryFolder() {
        std::string name = std::filesystem::temp_directory_path() / "lns_test_XXXXXX";
        if (!mkdtemp(name.data())) throw std::runtime_error("no temporary folder " + name);
        path = name;
    }
    TemporaryFolder(const TemporaryFolder&) = delete;
    ~TemporaryFolder() { std::filesystem::remove_all(path); }
    std::string operator/(const std::string& name) const { return path / name; }
};
