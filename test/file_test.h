// What the tests of files share: a folder of their own, and errors as text.
#pragma once
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "temporary_folder.h"

struct FileTest : testing::Test {
    const TemporaryFolder temporary;
    const std::filesystem::path& folder = temporary.path;

    std::string path(const std::string& name) const { return folder / name; }

    std::string raw_file(const std::string& name, const std::string& contents) const {
        std::ofstream(path(name), std::ios::binary) << contents;
        return path(name);
    }
};

// The message of the error that `action` must end with: one line, and a runtime_error.
inline std::string error_of(const std::function<void()>& action) {
    try {
        action();
    } catch (const std::runtime_error& error) {
        const std::string message = error.what();
        EXPECT_EQ(message.find('\n'), std::string::npos) << message;
        return message;
    }
    ADD_FAILURE() << "no error";
    return "";
}

inline void expect_contains(const std::string& message, const std::vector<std::string>& parts) {
    for (const std::string& part : parts)
        EXPECT_NE(message.find(part), std::string::npos) << message << "\nlacks " << part;
}

inline std::vector<char> random_bytes(size_t size, int seed) {
    std::mt19937 random(seed);
    std::vector<char> bytes(size);
    for (char& byte : bytes) byte = static_cast<char>(random());
    return bytes;
}
