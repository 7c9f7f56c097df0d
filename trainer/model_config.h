// The dimensions of a model, and the presets: models and recipes that --model knows by name.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "trainer/basics.h"

enum class Family { LLAMA, GPT2 };

struct ModelConfig {
    Family family = Family::LLAMA;
    int L = 24, C = 128, F = 352, NH = 4, NKV = 4, HS = 32, V = 32000;
    int positions = 1024;  // GPT-2: rows of the position table. LLaMA: the longest sequence it was made for
    float eps = 1e-6f;     // of the norms
    double rope_theta = 10000;
    bool qkv_bias = false;  // Qwen2
    bool tied = false;      // the head is the token embedding

    bool llama() const { return family == Family::LLAMA; }
    bool biased() const { return family == Family::GPT2; }  // every linear layer and norm has a bias
    // Padding for the tensor cores. It holds zeros, which stay zeros: a padded MLP channel has output 0 and gradient 0,
    // a padded token is left out of the softmax.
    int Vp() const { return (int)round_up(V, 128); }
    int Fp() const { return (int)round_up(F, 16); }
    int qkv_channels() const { return (NH + 2 * NKV) * HS; }
    int up_channels() const { return llama() ? 2 * Fp() : Fp(); }
};

inline const char* family_name(Family family) { return family == Family::LLAMA ? "llama" : "gpt2"; }

// What a preset is called, its dimensions, and the recipe used where the command line says nothing. LLaMA rows with
// a published recipe (arXiv 2502.05795, released scripts) carry its learning rate, steps and warm-up.
struct Preset {
    const char* name;
    Family family;
    int L, C, F, NH, V;
    double lr;
    int64_t steps, warmup, total_batch;  // total_batch: tokens an optimizer step
    int seq_len;
};

constexpr Preset presets[] = {
    {"tiny", Family::LLAMA, 24, 128, 352, 4, 32000, 2e-3, 500, 50, 4096, 128},
    {"llama-9m", Family::LLAMA, 4, 128, 352, 4, 32000, 1e-3, 10000, 1000, 131072, 256},
    {"llama-20m", Family::LLAMA, 4, 256, 688, 4, 32000, 1e-3, 10000, 1000, 131072, 256},
    {"llama-35m", Family::LLAMA, 6, 384, 1024, 8, 32000, 1e-3, 10000, 1000, 131072, 256},
    {"llama-40m", Family::LLAMA, 8, 416, 1024, 8, 32000, 1e-3, 10000, 1000, 131072, 256},
    {"llama-60m", Family::LLAMA, 8, 512, 1376, 8, 32000, 1e-3, 10000, 1000, 131072, 256},
    {"llama-71m", Family::LLAMA, 12, 512, 1368, 8, 32000, 1e-3, 10000, 1000, 131072, 256},
    {"llama-130m", Family::LLAMA, 12, 768, 2048, 12, 32000, 1e-3, 20000, 2000, 131072, 256},
    {"llama-250m", Family::LLAMA, 24, 768, 2560, 16, 32000, 1e-3, 40000, 4000, 131072, 256},
    {"llama-350m", Family::LLAMA, 24, 1024, 2736, 16, 32000, 5e-4, 60000, 6000, 131072, 256},
    {"llama-1b", Family::LLAMA, 24, 2048, 5461, 32, 32000, 5e-4, 100000, 1000, 131072, 256},
    {"llama-3b", Family::LLAMA, 32, 2560, 6848, 32, 32000, 3e-4, 100000, 2000, 131072, 256},
    {"llama-7b", Family::LLAMA, 32, 4096, 11008, 32, 32000, 3e-4, 100000, 2000, 131072, 256},
    {"gpt2-124m", Family::GPT2, 12, 768, 3072, 12, 50257, 6e-4, 20000, 700, 524288, 1024},
    {"gpt2-355m", Family::GPT2, 24, 1024, 4096, 16, 50257, 3e-4, 20000, 700, 524288, 1024},
    {"gpt2-774m", Family::GPT2, 36, 1280, 5120, 20, 50257, 2.5e-4, 20000, 700, 524288, 1024},
    {"gpt2-1558m", Family::GPT2, 48, 1600, 6400, 25, 50257, 2e-4, 20000, 700, 524288, 1024},
};

// Null where no preset has the name.
inline const Preset* find_preset(const std::string& name) {
    for (const Preset& preset : presets) {
        if (name == preset.name) return &preset;
    }
    return nullptr;
}

inline ModelConfig preset_config(const Preset& preset) {
    ModelConfig config;
    config.family = preset.family;
    config.L = preset.L, config.C = preset.C, config.F = preset.F, config.V = preset.V;
    config.NH = config.NKV = preset.NH;
    config.HS = preset.C / preset.NH;
    config.positions = std::max(1024, preset.seq_len);
    if (preset.family == Family::GPT2) {
        config.eps = 1e-5f;
        config.tied = true;
    }
    return config;
}

// Throws, in one line, what the kernels cannot do.
inline void check_config(const ModelConfig& config) {
    const auto require = [](bool ok, const std::string& message) {
        if (!ok) throw Error(message);
    };
    require(config.L > 0 && config.C > 0 && config.F > 0 && config.V > 1,
            "--layers, --hidden, --ffn must be positive, --vocab at least 2");
    require(config.NH > 0 && config.NKV > 0 && config.NH % config.NKV == 0,
            text("--heads %d must be a multiple of --kv-heads %d", config.NH, config.NKV));
    require(config.C % 4 == 0, text("--hidden %d must be a multiple of 4", config.C));
    require(
        config.HS % 4 == 0 && config.HS >= 4 && config.HS <= 128,
        text("a head of %d channels: allowed are multiples of 4 up to 128 (change --heads or --hidden)", config.HS));
    require(config.llama() || (config.NKV == config.NH && config.NH * config.HS == config.C),
            "GPT-2 models have as many --kv-heads as --heads, and --hidden divides by them");
}
