// config.json, the dimensions of a model as Hugging Face has them: written and read. LLaMA, Mistral, Qwen2, GPT-2.
//
// A model is `plain` if Hugging Face's own code computes it. The others carry a model_type and an architecture of their
// own, named after the norm's variant ("llama_post", "POSTLlamaForCausalLM"), so that loading them as the plain family
// fails instead of computing something else.
#pragma once

#include <algorithm>
#include <cctype>
#include <nlohmann/json.hpp>
#include <string>

#include "trainer/basics.h"
#include "trainer/files.h"
#include "trainer/model_config.h"

// What each family calls the same things, and what it means where a key is missing.
struct HuggingFaceKeys {
    const char *C, *F, *L, *NH, *positions, *eps, *activation;
    const char* only_activation;  // that is supported
    float default_eps;
    bool default_tied;
};

// clang-format off
constexpr HuggingFaceKeys llama_keys = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
    "rms_norm_eps", "hidden_act", "silu", 1e-6f, false};
constexpr HuggingFaceKeys gpt2_keys = {
    "n_embd", "n_inner", "n_layer", "n_head", "n_positions",
    "layer_norm_epsilon", "activation_function", "gelu_new", 1e-5f, true};
// clang-format on

// "_post" for POST: what the model_type of a variant that is not plain ends with.
inline std::string model_type_suffix(std::string norm) {
    for (char& letter : norm) letter = (char)std::tolower(letter);
    return "_" + norm;
}

// torch_dtype: of the matrices in model.safetensors, "float32" or "bfloat16".
inline nlohmann::json huggingface_config(const ModelConfig& c, const std::string& norm, bool plain,
                                         const std::string& torch_dtype) {
    const HuggingFaceKeys& keys = c.family == Family::LLAMA ? llama_keys : gpt2_keys;
    nlohmann::json j = {{"vocab_size", c.V},
                        {"tie_word_embeddings", c.tied},
                        {"initializer_range", 0.02},
                        {"torch_dtype", torch_dtype},
                        {"norm", norm},
                        {keys.C, c.C},
                        {keys.F, c.F},
                        {keys.L, c.L},
                        {keys.NH, c.NH},
                        {keys.positions, c.positions},
                        {keys.eps, c.eps},
                        {keys.activation, keys.only_activation}};
    // Null where there is none: a missing key would mean Hugging Face's default, some other token.
    const auto token = [](int id) { return id < 0 ? nlohmann::json() : nlohmann::json(id); };
    j.update({{"bos_token_id", token(c.bos_token)}, {"eos_token_id", token(c.eos_token)}});
    std::string type = "gpt2", architecture = "GPT2LMHeadModel";
    if (c.family == Family::LLAMA) {
        type = c.qkv_bias ? "qwen2" : "llama";
        architecture = c.qkv_bias ? "Qwen2ForCausalLM" : "LlamaForCausalLM";
        j.update({{"num_key_value_heads", c.NKV},
                  {"head_dim", c.HS},
                  {"rope_theta", c.rope_theta},
                  {"attention_bias", false},
                  {"mlp_bias", false}});
    } else {
        j.update({{"n_ctx", c.positions}, {"attn_pdrop", 0.0}, {"embd_pdrop", 0.0}, {"resid_pdrop", 0.0}});
    }
    j["model_type"] = plain ? type : type + model_type_suffix(norm);
    j["architectures"] = {plain ? architecture : norm + architecture};
    return j;
}

// The dimensions that FOLDER/config.json gives. Throws, in one line, on what would compute something else than the
// folder's own code, and on a model_type that a program of this norm cannot load.
inline ModelConfig read_huggingface_config(const std::string& folder, const std::string& norm, bool plain) {
    const std::string path = folder + "/config.json";
    const auto require = [&](bool ok, const std::string& why) {
        if (!ok) throw Error(path + ": " + why);
    };
    nlohmann::json j;
    try {
        j = nlohmann::json::parse(read_file(path));
    } catch (const nlohmann::json::exception& e) {
        throw Error(path + ": not valid JSON (" + e.what() + ")");
    }
    const auto given = [&](const char* key) { return j.contains(key) && !j[key].is_null(); };
    try {
        const std::string type = j.value("model_type", "");
        const std::string family = plain ? type : type.substr(0, type.rfind(model_type_suffix(norm)));
        require(family == "llama" || family == "mistral" || family == "qwen2" || family == "gpt2",
                "model_type \"" + type + "\" is not one that NORM=" + norm + " can load (llama, mistral, qwen2, gpt2)");
        require(plain || family != type,
                "a plain \"" + type + "\" is Pre-LN: load it with a program made by `make NORM=PRE` or `NORM=LNS`");
        ModelConfig c;
        c.family = family == "gpt2" ? Family::GPT2 : Family::LLAMA;
        const HuggingFaceKeys& keys = c.family == Family::LLAMA ? llama_keys : gpt2_keys;
        c.V = j.at("vocab_size"), c.C = j.at(keys.C), c.L = j.at(keys.L), c.NH = j.at(keys.NH);
        c.eps = j.value(keys.eps, keys.default_eps);
        c.tied = j.value("tie_word_embeddings", keys.default_tied);
        require(j.value(keys.activation, keys.only_activation) == std::string(keys.only_activation),
                text("only %s %s is supported", keys.activation, keys.only_activation));
        if (c.family == Family::GPT2) {
            c.F = given(keys.F) ? j[keys.F].get<int>() : 4 * c.C;
            c.positions = j.at(keys.positions);
            c.NKV = c.NH;
            c.HS = c.C / c.NH;
            require(c.tied, "an untied GPT-2 head is not supported");
            return c;
        }
        c.F = j.at(keys.F);
        c.positions = j.value(keys.positions, 2048);
        c.NKV = j.value("num_key_value_heads", c.NH);
        c.HS = given("head_dim") ? j["head_dim"].get<int>() : c.C / c.NH;
        c.rope_theta = j.value("rope_theta", 10000.0);
        c.qkv_bias = family == "qwen2";
        require(!given("rope_scaling"), "rope_scaling is not supported");
        require(!j.value("attention_bias", false) && !j.value("mlp_bias", false),
                "attention_bias and mlp_bias are not supported");
        if (given("sliding_window") && j.value("use_sliding_window", true)) {
            c.positions = std::min(c.positions, j["sliding_window"].get<int>());  // shorter sequences never meet it
        }
        return c;
    } catch (const nlohmann::json::exception& e) {
        throw Error(path + ": " + e.what());
    }
}
