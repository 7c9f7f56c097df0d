// The dimensions of a model, and the presets: models and recipes that --model knows by name.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numbers>
#include <string>
#include <vector>

#include "trainer/basics.h"

enum class Family { LLAMA, GPT2 };

// What differs between the families, a row each. Tensors have Hugging Face's names; null: there is no such tensor.
struct FamilyRow {
    const char* name;
    const char *root, *embedding, *positions, *blocks, *final_norm;
    const char *q, *k, *v, *o, *gate, *up, *down;  // those of one name are stacked to one tensor
    const char *attention_norm, *mlp_norm;
    bool biased;         // every linear layer and norm has a bias: the norms are LayerNorm, else RMSNorm
    bool transposed;     // matrices are (in, out) on disk
    bool grouped;        // key/value heads may be fewer than heads, and heads of any size
    float eps;           // of the norms, and
    bool tied;           // whether the head is the embedding, in the presets
    const char* recipe;  // the preset whose recipe a model folder is trained by

    bool rotary() const { return !positions; }  // else learned positions
    bool gated() const { return gate; }         // SwiGLU, else GELU
};

constexpr FamilyRow family_rows[] = {
    {.name = "llama",
     .root = "model.",
     .embedding = "embed_tokens.weight",
     .positions = nullptr,
     .blocks = "layers.",
     .final_norm = "norm",
     .q = "self_attn.q_proj",
     .k = "self_attn.k_proj",
     .v = "self_attn.v_proj",
     .o = "self_attn.o_proj",
     .gate = "mlp.gate_proj",
     .up = "mlp.up_proj",
     .down = "mlp.down_proj",
     .attention_norm = "input_layernorm",
     .mlp_norm = "post_attention_layernorm",
     .biased = false,
     .transposed = false,
     .grouped = true,
     .eps = 1e-6f,
     .tied = false,
     .recipe = "llama-130m"},
    {.name = "gpt2",
     .root = "transformer.",
     .embedding = "wte.weight",
     .positions = "wpe.weight",
     .blocks = "h.",
     .final_norm = "ln_f",
     .q = "attn.c_attn",
     .k = "attn.c_attn",
     .v = "attn.c_attn",
     .o = "attn.c_proj",
     .gate = nullptr,
     .up = "mlp.c_fc",
     .down = "mlp.c_proj",
     .attention_norm = "ln_1",
     .mlp_norm = "ln_2",
     .biased = true,
     .transposed = true,
     .grouped = false,
     .eps = 1e-5f,
     .tied = true,
     .recipe = "gpt2-124m"},
};

// How a model made for short sequences was stretched over longer ones: rotary frequencies f, in radians a position, are
// divided by `factor`. LLAMA3 (Llama 3.1's config.json) divides only those that turn fewer than `low` times in
// `positions`, leaves those that turn more than `high` times, and goes from one to the other linearly in the turns.
struct RopeScaling {
    enum Type { NONE, LINEAR, LLAMA3 } type = NONE;
    double factor = 1, low = 1, high = 4;
    int positions = 8192;

    double operator()(double f) const {
        if (type == NONE) return f;
        if (type == LINEAR) return f / factor;
        const double turns = positions * f / (2 * std::numbers::pi);
        const double kept = std::clamp((turns - low) / (high - low), 0.0, 1.0);
        return kept * f + (1 - kept) * f / factor;
    }
    bool operator==(const RopeScaling&) const = default;
};

struct ModelConfig {
    Family family = Family::LLAMA;
    int L = 24, C = 128, F = 352, NH = 4, NKV = 4, HS = 32, V = 32000;
    int positions = 1024;            // GPT-2: rows of the position table. LLaMA: the longest sequence it was made for
    float eps = 1e-6f;               // of the norms
    bool norm_scale_folded = false;  // the norms' factors (LNS's) stand in their gains, as on disk
    bool warmed_up = false;          // factors that rise over steps (PRORES's) have done so: the weights are trained
    double rope_theta = 10000;
    RopeScaling rope_scaling = {};
    bool qk_norm = false;          // Qwen3: a norm over each head's query and key
    bool qkv_bias = false;         // Qwen2
    bool tied = false;             // the head is the token embedding
    bool fixed_positions = false;  // longer sequences than `positions` would compute something else
    int window = 0;                // attention looks back no further, at most through it here; 0: no such limit
    std::string window_keys = {};  // config.json's about it, to be written again as they were read
    // For code that generates text; -1: none. Each of the last ends a text.
    int bos_token = -1, pad_token = -1;
    std::vector<int> eos_tokens = {};

    const FamilyRow& row() const { return family_rows[(int)family]; }
    // Padding for the tensor cores. It holds zeros, which stay zeros: a padded MLP channel has output 0 and gradient 0,
    // a padded token is left out of the softmax.
    int Vp() const { return (int)round_up(V, 128); }
    int Fp() const { return (int)round_up(F, 16); }
    int longest() const { return window > 0 ? std::min(positions, window) : positions; }
    int qkv_channels() const { return (NH + 2 * NKV) * HS; }
    int up_channels() const { return row().gated() ? 2 * Fp() : Fp(); }
};

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
    config.eps = config.row().eps;
    config.tied = config.row().tied;
    return config;
}

// What the user calls the dimensions: flags here, keys in a config.json.
struct DimensionNames {
    const char *L = "--layers", *C = "--hidden", *F = "--ffn", *NH = "--heads", *NKV = "--kv-heads", *V = "--vocab";
};

// Far above any model's; up to them, bytes of parameters fit into 64 bits, and channels of stacked matrices into 32.
constexpr int most_blocks = 1 << 14, most_channels = 1 << 20, most_tokens = 1 << 24;

// Throws, in one line, what the kernels cannot do.
inline void check_config(const ModelConfig& config, const DimensionNames& names = {}) {
    const auto require = [](bool ok, const std::string& message) {
        if (!ok) throw Error(message);
    };
    const auto between = [&](int least, int value, int most, const char* name) {
        require(least <= value && value <= most, text("%s %d: must be from %d to %d", name, value, least, most));
    };
    between(1, config.L, most_blocks, names.L);
    between(1, config.C, most_channels, names.C);
    between(1, config.F, most_channels, names.F);
    between(1, config.NH, most_channels / 128, names.NH);
    between(1, config.NKV, most_channels / 128, names.NKV);
    between(2, config.V, most_tokens, names.V);
    require(config.NH % config.NKV == 0,
            text("%s %d must be a multiple of %s %d", names.NH, config.NH, names.NKV, config.NKV));
    require(config.C % 4 == 0, text("%s %d must be a multiple of 4", names.C, config.C));
    require(config.HS % 4 == 0 && config.HS >= 4 && config.HS <= 128,
            text("a head of %d channels: allowed are multiples of 4 up to 128 (change %s or %s)", config.HS, names.NH,
                 names.C));
    require(config.row().grouped || (config.NKV == config.NH && config.NH * config.HS == config.C),
            text("GPT-2 models have as many %s as %s, and %s divides by them", names.NKV, names.NH, names.C));
}

// Tensor cores take rows of bf16 in words of 16 bytes.
inline void check_bf16_rows(const ModelConfig& config, const DimensionNames& names = {}) {
    const auto require = [](int channels, const std::string& name) {
        if (channels % 8 == 0) return;
        throw Error(text("%s %d must be a multiple of 8 in bf16; change it, or build with PRECISION=fp32", name.c_str(),
                         channels));
    };
    require(config.C, names.C);
    require(config.NH * config.HS, text("%s x channels a head", names.NH));
}
