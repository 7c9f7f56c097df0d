// Which algorithm is fastest for each matrix product on this device, as --autotune has measured it: a file for each
// model of GPU, kept between runs, so that they compute the same bits. What it says holds for one version of cuBLASLt.
#pragma once

#include <array>
#include <cctype>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "trainer/files.h"

struct TunedProducts {
    using Algorithm = std::array<uint64_t, 8>;  // what cuBLASLt writes into a cublasLtMatmulAlgo_t
    std::string path;
    uint64_t version = 0;  // of cuBLASLt
    std::map<std::string, Algorithm> algorithms = {};

    // Products of another version, or a file that is not ours, are measured anew.
    void read() {
        algorithms.clear();
        if (!std::filesystem::exists(path)) return;
        try {
            const nlohmann::json file = nlohmann::json::parse(read_file(path));
            if (file.at("cublaslt") == version) file.at("algorithms").get_to(algorithms);
        } catch (const nlohmann::json::exception&) {
            algorithms.clear();
        }
    }

    void write() const {
        std::filesystem::create_directories(std::filesystem::path(path).parent_path());
        replace_file(path, nlohmann::json{{"cublaslt", version}, {"algorithms", algorithms}}.dump(1) + "\n");
    }
};

// $XDG_CACHE_HOME or ~/.cache, /train_gpt/NVIDIA_H100.json
inline std::string tuned_products_path(const std::string& device) {
    const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    std::string name = device;
    for (char& c : name) {
        if (!isalnum((unsigned char)c)) c = '_';
    }
    const std::string folder = cache && *cache ? cache : home && *home ? std::string(home) + "/.cache" : "build";
    return folder + "/train_gpt/" + name + ".json";
}
