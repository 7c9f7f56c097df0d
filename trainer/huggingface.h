// config.json, the dimensions of a model as Hugging Face has them: written and read. LLaMA, Mistral, Qwen2,
// Qwen3, GPT-2.
//
// A model is `plain` if Hugging Face's own code computes it. The others carry a model_type and an architecture of their
// own, named after the norm's variant ("llama_post", "POSTLlamaForCausalLM"), so that loading them as the plain family
// fails instead of computing something else; transformers computes them by modeling_norms.py in their folders.
//
// For the same reason a config.json is read whole: each of its keys is used, or can have one value only, or is known to
// change nothing here. Any other stops the program.
//
// generation_config.json and tokenizer_config.json stand beside it: which tokens begin, end and pad a text.
#pragma once

#include <algorithm>
#include <cctype>
#include <cmath>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>

#include "tokenizer/bpe.h"
#include "trainer/basics.h"
#include "trainer/files.h"
#include "trainer/model_config.h"

// What each family calls the same things, and what it means where a key is missing.
struct HuggingFaceKeys {
    DimensionNames names;
    const char *positions, *eps, *activation;
    const char* only_activation;  // that is supported
    float default_eps;
    bool default_tied;
};

// clang-format off
constexpr HuggingFaceKeys llama_keys = {
    {"num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"},
    "max_position_embeddings", "rms_norm_eps", "hidden_act", "silu", 1e-6f, false};
constexpr HuggingFaceKeys gpt2_keys = {
    {"n_layer", "n_embd", "n_inner", "n_head", "n_head", "vocab_size"},
    "n_positions", "layer_norm_epsilon", "activation_function", "gelu_new", 1e-5f, true};
// clang-format on

// What differs between the model_types of a family: the values of missing keys, and biases.
struct ModelType {
    const char* name;
    Family family;
    int kv_heads;  // 0: as many as heads
    int positions, window;
    bool window_is_used;  // where use_sliding_window is missing
    int head_dim;         // 0: hidden_size / heads
    bool qkv_bias, qk_norm;
};

constexpr ModelType model_types[] = {
    {"llama", Family::LLAMA, 0, 2048, 0, false, 0, false, false},
    {"mistral", Family::LLAMA, 8, 131072, 4096, true, 0, false, false},
    {"qwen2", Family::LLAMA, 32, 32768, 4096, false, 0, true, false},
    {"qwen3", Family::LLAMA, 32, 32768, 4096, false, 128, false, true},
    {"gpt2", Family::GPT2, 0, 1024, 0, false, 0, false, false},
};

// Keys that change nothing that is computed here: where the file comes from, how text is generated, dropout (there is
// none here), initialization, heads for other tasks. Of transformers 4 and 5, and of models published for them.
// clang-format off
inline const std::set<std::string> harmless_keys = {
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "_num_labels", "architectures",
    "attention_dropout", "attn_pdrop", "bad_words_ids", "begin_suppress_tokens",
    "chunk_size_feed_forward", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
    "embd_pdrop", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label",
    "initializer_range", "is_decoder", "is_llama_config", "label2id", "length_penalty", "max_length", "min_length",
    "n_ctx", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_scores", "prefix", "problem_type",
    "remove_invalid_values", "repetition_penalty", "resid_pdrop", "return_dict", "return_dict_in_generate",
    "sep_token_id", "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type",
    "summary_use_proj", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tokenizer_class",
    "top_k", "top_p", "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "typical_p",
    "use_bfloat16", "use_cache"};
// clang-format on

// "_post" for POST: what the model_type of a variant that is not plain ends with.
inline std::string model_type_suffix(std::string norm) {
    for (char& letter : norm) letter = (char)std::tolower(letter);
    return "_" + norm;
}

// The form of transformers 4, rope_theta beside it: transformers 5 and others read it too.
inline nlohmann::json rope_scaling_keys(const RopeScaling& scaling) {
    if (scaling.type == RopeScaling::LINEAR) return {{"rope_type", "linear"}, {"factor", scaling.factor}};
    return {{"rope_type", "llama3"},
            {"factor", scaling.factor},
            {"low_freq_factor", scaling.low},
            {"high_freq_factor", scaling.high},
            {"original_max_position_embeddings", scaling.positions}};
}

// The ids of the tokens that begin, end and pad a text. Null where there is none: a missing key would mean Hugging
// Face's default, some other token.
inline nlohmann::json token_ids(const ModelConfig& c) {
    const auto token = [](int id) { return id < 0 ? nlohmann::json() : nlohmann::json(id); };
    nlohmann::json eos;
    if (c.eos_tokens.size() == 1) eos = c.eos_tokens[0];
    else if (!c.eos_tokens.empty()) eos = c.eos_tokens;
    return {{"bos_token_id", token(c.bos_token)}, {"eos_token_id", eos}, {"pad_token_id", token(c.pad_token)}};
}

// dtype: of the matrices in model.safetensors, "float32" or "bfloat16". transformers 4 calls it torch_dtype.
inline nlohmann::json huggingface_config(const ModelConfig& c, const std::string& norm, bool plain,
                                         const std::string& dtype) {
    const HuggingFaceKeys& keys = c.family == Family::LLAMA ? llama_keys : gpt2_keys;
    nlohmann::json j = {{"tie_word_embeddings", c.tied},
                        {"initializer_range", 0.02},
                        {"torch_dtype", dtype},
                        {"dtype", dtype},
                        {"norm", norm},
                        {keys.names.V, c.V},
                        {keys.names.C, c.C},
                        {keys.names.F, c.F},
                        {keys.names.L, c.L},
                        {keys.names.NH, c.NH},
                        {keys.names.NKV, c.NKV},
                        {keys.positions, c.positions},
                        {keys.eps, c.eps},
                        {keys.activation, keys.only_activation}};
    j.update(token_ids(c));
    std::string type = "gpt2", architecture = "GPT2LMHeadModel";
    if (c.family == Family::LLAMA) {
        const auto choose = [&](const char* qwen3, const char* qwen2, const char* mistral, const char* llama) {
            return c.qk_norm ? qwen3 : c.qkv_bias ? qwen2 : c.window > 0 ? mistral : llama;
        };
        type = choose("qwen3", "qwen2", "mistral", "llama");
        architecture = choose("Qwen3ForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM", "LlamaForCausalLM");
        j.update({{"head_dim", c.HS}, {"rope_theta", c.rope_theta}, {"attention_bias", false}, {"mlp_bias", false}});
        if (c.rope_scaling.type != RopeScaling::NONE) j["rope_scaling"] = rope_scaling_keys(c.rope_scaling);
        if (c.window > 0) j.update(nlohmann::json::parse(c.window_keys));
    } else {
        j.update({{"n_ctx", c.positions}, {"attn_pdrop", 0.0}, {"embd_pdrop", 0.0}, {"resid_pdrop", 0.0}});
    }
    j["model_type"] = plain ? type : type + model_type_suffix(norm);
    j["architectures"] = {plain ? architecture : norm + architecture};
    if (!plain) {
        const auto place = [&](const std::string& name) { return "modeling_norms." + norm + name; };
        const std::string family = architecture.substr(0, architecture.find(c.family == Family::GPT2 ? "LM" : "For"));
        j["auto_map"] = {{"AutoConfig", place(family + "Config")}, {"AutoModelForCausalLM", place(architecture)}};
    }
    return j;
}

// --- Tokens that begin, end and pad a text ---

// One more that ends a text, where the model has it.
inline void add_eos_token(ModelConfig& c, int64_t id) {
    const bool is_there = std::ranges::find(c.eos_tokens, id) != c.eos_tokens.end();
    if (id >= 0 && id < c.V && !is_there) c.eos_tokens.push_back((int)id);
}

// What ends an answer by a template of tokenizer/conversation.h.
inline std::string answer_end(const std::string& chat_template, const Tokenizer& tokenizer) {
    if (chat_template == "chatml") return "<|im_end|>";
    if (chat_template == "llama3") return "<|eot_id|>";
    return tokenizer.end_of_text ? tokenizer.tokens[*tokenizer.end_of_text] : "";
}

// Those of a model trained with `tokenizer`, on conversations written out by chat_template (or ""). Of what the folder
// that the model came from names, what the tokenizer has as an added token stays.
inline void name_special_tokens(ModelConfig& c, const Tokenizer& tokenizer, const std::string& chat_template = "") {
    std::set<int> added;
    for (const auto& [content, id] : tokenizer.added_tokens) {
        if ((int64_t)id < c.V) added.insert((int)id);
    }
    const auto known = [&added](std::optional<uint32_t> id) { return id && added.contains((int)*id) ? (int)*id : -1; };
    const int end = known(tokenizer.end_of_text);
    const std::vector<int> before = std::exchange(c.eos_tokens, {});
    const auto answers_end = tokenizer.added_tokens.find(answer_end(chat_template, tokenizer));
    if (!chat_template.empty() && answers_end != tokenizer.added_tokens.end()) add_eos_token(c, answers_end->second);
    for (const int id : before) {
        if (added.contains(id)) add_eos_token(c, id);
    }
    add_eos_token(c, end);
    c.bos_token = known(tokenizer.document_start);
    if (!added.contains(c.pad_token)) c.pad_token = end;
}

// The template in the language of tokenizer_config.json, which transformers' apply_chat_template() reads.
inline std::string chat_jinja(const std::string& chat_template, const Tokenizer& tokenizer) {
    const std::string start = tokenizer.document_start ? tokenizer.tokens[*tokenizer.document_start] : "";
    const std::string end = answer_end(chat_template, tokenizer), content = "message['content']";
    const auto quoted = [](const std::string& text) { return nlohmann::json(text).dump(); };
    const auto when = [](const std::string& condition) { return "{% if " + condition + " %}"; };
    const std::string answers = when("message['role'] == 'assistant'");
    std::string message, prompt;  // of each; behind the last, where an answer is asked for
    if (chat_template == "chatml") {
        message = R"({{ "<|im_start|>" + message['role'] + "\n" + message['content'] + "<|im_end|>\n" }})";
        prompt = R"({{ "<|im_start|>assistant\n" }})";
    } else if (chat_template == "llama3") {
        message = R"({{ "<|start_header_id|>" + message['role'] + "<|end_header_id|>\n\n" }})"
                  R"({{ message['content'] | trim + "<|eot_id|>" }})";
        prompt = R"({{ "<|start_header_id|>assistant<|end_header_id|>\n\n" }})";
    } else if (chat_template == "alpaca") {
        message = answers + R"({{ "### Response:\n" + message['content'] + )" + quoted(end) + " }}" +
                  "{% elif message['role'] == 'system' %}" + R"({{ message['content'] + "\n\n" }}{% else %})" +
                  when("loop.first") + R"({{ "Below is an instruction that describes a task. )" +
                  R"(Write a response that appropriately completes the request.\n\n" }})" +
                  R"({% elif loop.previtem['role'] == 'assistant' %}{{ "\n\n" }}{% endif %})" +
                  R"({{ "### Instruction:\n" + message['content'] + "\n\n" }}{% endif %})";
        prompt = R"({{ "### Response:\n" }})";
    } else {
        message = answers + "{{ " + content + " + " + quoted(end) + " }}{% else %}{{ " + content + R"( + "\n" }})" +
                  "{% endif %}";
    }
    return "{{ " + quoted(start) + " }}{% for message in messages %}" + message + "{% endfor %}" +
           (prompt.empty() ? "" : when("add_generation_prompt") + prompt + "{% endif %}");
}

// tokenizer_config.json for tokenizer.json as it stands. Without it transformers takes the model_type's own class,
// which for LLaMA changes the ids and begins each text with a token that the vocabulary does not have.
inline nlohmann::json tokenizer_config(const ModelConfig& c, const Tokenizer& tokenizer) {
    nlohmann::json j = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                        {"clean_up_tokenization_spaces", false},
                        {"model_input_names", {"input_ids", "attention_mask"}},
                        {"model_max_length", c.positions}};
    const auto name = [&](const char* key, int id) {
        if (id >= 0) j[key] = tokenizer.tokens[id];
    };
    name("bos_token", c.bos_token);
    name("eos_token", c.eos_tokens.empty() ? -1 : c.eos_tokens[0]);
    name("pad_token", c.pad_token);
    return j;
}

// --- Reading ---

// Takes values out of a config.json. A key that is missing or null has the value `otherwise`. Throws, in one line, what
// is not of the kind expected, and finally what nobody asked for.
struct KeyReader {
    std::string path;
    nlohmann::json values;
    std::string prefix = {};  // of keys in messages: where `values` lies within the file
    std::set<std::string> asked = {};

    [[noreturn]] void refuse(const std::string& key, const std::string& why) const {
        std::string value = values.contains(key) ? values[key].dump() : "missing";
        if (value.size() > 80) value = value.substr(0, 77) + "...";
        throw Error(printable(path + ": \"" + prefix + key + "\" is " + value + ": " + why));
    }
    void require(bool ok, const std::string& key, const std::string& why) const {
        if (!ok) refuse(key, why);
    }

    // Null where there is no value.
    const nlohmann::json* find(const std::string& key) {
        asked.insert(key);
        const auto value = values.find(key);
        return value == values.end() || value->is_null() ? nullptr : &*value;
    }

    int integer(const std::string& key) {
        constexpr int most = std::numeric_limits<int>::max();
        const nlohmann::json* value = find(key);
        require(value && value->is_number_integer() && *value >= 1 && *value <= most, key,
                text("expected a whole number from 1 to %d", most));
        return value->get<int>();
    }
    int integer(const std::string& key, int otherwise) { return find(key) ? integer(key) : otherwise; }

    // A positive one, in fp32 too.
    double number(const std::string& key, double otherwise) {
        const nlohmann::json* value = find(key);
        if (!value) return otherwise;
        const double found = value->is_number() ? value->get<double>() : 0;
        require((float)found > 0 && std::isfinite((float)found), key, "expected a positive number");
        return found;
    }

    bool flag(const std::string& key, bool otherwise) {
        const nlohmann::json* value = find(key);
        if (!value) return otherwise;
        require(value->is_boolean(), key, "expected true or false");
        return value->get<bool>();
    }

    // Of one token or a list of them, those from 0 to V - 1: folders say -1 where they mean none.
    std::vector<int> tokens(const std::string& key, int V) {
        const nlohmann::json* value = find(key);
        std::vector<int> ids;
        if (!value) return ids;
        for (const nlohmann::json& id : value->is_array() ? *value : nlohmann::json::array({*value})) {
            require(id.is_number_integer(), key, "expected a token's number, or a list of them");
            if (id >= 0 && id < V) ids.push_back(id.get<int>());
        }
        return ids;
    }

    std::string string(const std::string& key) {
        const nlohmann::json* value = find(key);
        require(value && value->is_string(), key, "expected text");
        return value->get<std::string>();
    }

    // The one value that is supported, and what a missing key means.
    void only(const std::string& key, const nlohmann::json& supported) {
        const nlohmann::json* value = find(key);
        require(!value || *value == supported, key, "only " + supported.dump() + " is supported");
    }

    void refuse_the_rest(const std::set<std::string>& harmless) const {
        for (const auto& [key, value] : values.items()) {
            require(value.is_null() || asked.contains(key) || harmless.contains(key), key,
                    "a key that is not known here may change what the model computes; remove it if it does not");
        }
    }
};

inline RopeScaling read_rope_scaling(KeyReader& rope) {
    const char* key = rope.find("rope_type") ? "rope_type" : "type";  // the older spelling
    const std::string type = rope.find(key) ? rope.string(key) : "default";
    if (rope.find("type") && rope.find("rope_type")) rope.only("type", type);
    if (type == "default") return {};
    rope.require(type == "linear" || type == "llama3", key,
                 "only \"default\", \"linear\" and \"llama3\" are supported");
    const auto positive = [&rope](const char* name) {
        rope.require(rope.find(name), name, "expected a positive number");
        return rope.number(name, 0);
    };
    RopeScaling scaling = {.type = RopeScaling::LINEAR, .factor = positive("factor")};
    if (type == "linear") return scaling;
    scaling.type = RopeScaling::LLAMA3;
    scaling.low = positive("low_freq_factor"), scaling.high = positive("high_freq_factor");
    rope.require(scaling.high > scaling.low, "high_freq_factor", text("must be above low_freq_factor %g", scaling.low));
    scaling.positions = rope.integer("original_max_position_embeddings");
    return scaling;
}

// Of the rotary positions. transformers 4 has rope_theta beside rope_scaling, transformers 5 within rope_parameters.
inline void read_rope(ModelConfig& c, KeyReader& config) {
    const double beside = config.number("rope_theta", 10000);
    double theta = beside;
    bool read = false;
    for (const char* key : {"rope_scaling", "rope_parameters"}) {
        const nlohmann::json* found = config.find(key);
        if (!found) continue;
        config.require(found->is_object(), key, "expected an object");
        KeyReader rope{config.path, *found, std::string(key) + "."};
        const RopeScaling scaling = read_rope_scaling(rope);
        config.require(!read || scaling == c.rope_scaling, key, "rope_scaling beside it says otherwise");
        c.rope_scaling = scaling, read = true;
        rope.only("partial_rotary_factor", 1);
        theta = rope.number("rope_theta", theta);
        rope.require(!config.find("rope_theta") || theta == beside, "rope_theta",
                     text("\"rope_theta\" beside it is %g", beside));
        rope.refuse_the_rest({});
    }
    c.rope_theta = theta;
}

// The window that attention looks back through, 0 without one. Sequences trained on fit into it, but code that loads
// the checkpoint may be given longer ones.
inline void read_window(ModelConfig& c, KeyReader& config, const ModelType& type) {
    if (type.window == 0) return;
    config.find("max_window_layers");  // the first blocks see everything: no matter in sequences that fit the window
    const bool used = config.flag("use_sliding_window", type.window_is_used);
    const int window = config.integer("sliding_window", config.values.contains("sliding_window") ? 0 : type.window);
    if (const nlohmann::json* layers = config.find("layer_types")) {
        config.require(layers->is_array(), "layer_types", "expected a list");
        for (const nlohmann::json& layer : *layers) {
            const bool windowed = layer == "sliding_attention" && used && window > 0;
            config.require(windowed || layer == "full_attention", "layer_types",
                           "only \"full_attention\", and \"sliding_attention\" with a window, are supported");
        }
    }
    if (!used || window == 0) return;
    nlohmann::json keys = {{"sliding_window", window}};
    for (const char* key : {"use_sliding_window", "max_window_layers", "layer_types"}) {
        if (const nlohmann::json* value = config.find(key)) keys[key] = *value;
    }
    c.window = window, c.window_keys = keys.dump();
    c.fixed_positions = true;
}

inline ModelConfig read_llama_config(KeyReader& config, const ModelType& type) {
    ModelConfig c;
    c.C = config.integer(llama_keys.names.C), c.NH = config.integer(llama_keys.names.NH);
    c.F = config.integer(llama_keys.names.F);
    const bool kv_heads_missing = !config.values.contains(llama_keys.names.NKV) && type.kv_heads > 0;
    c.NKV = config.integer(llama_keys.names.NKV, kv_heads_missing ? type.kv_heads : c.NH);
    const int head_dim = config.values.contains("head_dim") ? 0 : type.head_dim;
    config.require(config.find("head_dim") || head_dim > 0 || c.C % c.NH == 0, llama_keys.names.C,
                   text("must be a multiple of %s %d where there is no head_dim", llama_keys.names.NH, c.NH));
    c.HS = config.integer("head_dim", head_dim > 0 ? head_dim : c.C / c.NH);
    c.positions = config.integer(llama_keys.positions, type.positions);
    read_window(c, config, type);
    read_rope(c, config);
    c.qkv_bias = type.qkv_bias, c.qk_norm = type.qk_norm;
    for (const char* key : {"attention_bias", "mlp_bias", "rope_interleaved", "use_mrope"}) config.only(key, false);
    for (const char* key : {"pretraining_tp", "partial_rotary_factor"}) config.only(key, 1);
    return c;
}

inline ModelConfig read_gpt2_config(KeyReader& config) {
    ModelConfig c;
    c.C = config.integer(gpt2_keys.names.C), c.NH = c.NKV = config.integer(gpt2_keys.names.NH);
    c.F = config.integer(gpt2_keys.names.F, (int)std::min<int64_t>(4 * (int64_t)c.C, std::numeric_limits<int>::max()));
    config.require(c.C % c.NH == 0, gpt2_keys.names.C, text("must be a multiple of %s %d", gpt2_keys.names.NH, c.NH));
    c.HS = c.C / c.NH;
    c.positions = config.integer(gpt2_keys.positions);
    c.fixed_positions = true;
    config.only("tie_word_embeddings", true);
    config.only("scale_attn_weights", true);
    for (const char* key : {"scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"}) {
        config.only(key, false);
    }
    return c;
}

inline nlohmann::json read_json_object(const std::string& path) {
    if (!std::filesystem::is_regular_file(path)) throw Error(path + ": not a file");  // a pipe would be waited for
    nlohmann::json values;
    try {
        values = nlohmann::json::parse(read_file(path));
    } catch (const nlohmann::json::parse_error& e) {
        throw Error(text("%s: not valid JSON near byte %zu: copy it again", path.c_str(), e.byte));
    } catch (const nlohmann::json::exception&) {
        throw Error(path + ": a number is larger than a double can hold: copy the file again");
    }
    if (!values.is_object()) throw Error(path + ": expected a JSON object");
    return values;
}

// Of config.json, and the ends of generation_config.json beside it.
inline void read_special_tokens(ModelConfig& c, KeyReader& config, const std::string& folder) {
    const auto first = [](const std::vector<int>& ids) { return ids.empty() ? -1 : ids[0]; };
    c.bos_token = first(config.tokens("bos_token_id", c.V)), c.pad_token = first(config.tokens("pad_token_id", c.V));
    c.eos_tokens = config.tokens("eos_token_id", c.V);
    const std::string path = folder + "/generation_config.json";
    if (!std::filesystem::exists(path)) return;
    for (const int id : KeyReader{path, read_json_object(path)}.tokens("eos_token_id", c.V)) add_eos_token(c, id);
}

// The row of `name`, which ends in the norm's suffix unless the models of this program are plain.
inline const ModelType& find_model_type(const KeyReader& config, const std::string& name, const std::string& norm,
                                        bool plain) {
    const std::string suffix = plain ? "" : model_type_suffix(norm);
    for (const ModelType& type : model_types) {
        config.require(plain || name != type.name, "model_type",
                       "such a model is Pre-LN: load it with a program made by `make NORM=PRE` or `NORM=LNS`");
        if (name == type.name + suffix) return type;
    }
    config.refuse("model_type", "NORM=" + norm + " can load llama, mistral, qwen2, qwen3, gpt2" +
                                    (plain ? "" : ", each with " + suffix + " behind it"));
}

// The dimensions that FOLDER/config.json gives. Throws, in one line, on what would compute something else than the
// folder's own code, and on a model_type that a program of this norm cannot load.
inline ModelConfig read_huggingface_config(const std::string& folder, const std::string& norm, bool plain) {
    const std::string path = folder + "/config.json";
    KeyReader config{path, read_json_object(path)};
    const ModelType& type = find_model_type(config, config.string("model_type"), norm, plain);
    const bool llama = type.family == Family::LLAMA;
    const HuggingFaceKeys& keys = llama ? llama_keys : gpt2_keys;

    ModelConfig c = llama ? read_llama_config(config, type) : read_gpt2_config(config);
    c.family = type.family;
    c.warmed_up = true;
    c.L = config.integer(keys.names.L), c.V = config.integer(keys.names.V);
    c.eps = (float)config.number(keys.eps, keys.default_eps);
    read_special_tokens(c, config, folder);
    c.tied = config.flag("tie_word_embeddings", keys.default_tied);
    config.only(keys.activation, keys.only_activation);
    config.only("is_encoder_decoder", false);
    config.only("tie_encoder_decoder", false);
    config.only("pruned_heads", nlohmann::json::object());
    config.find("norm");
    // Of a plain model, the norm only says which program wrote it; of another, it says all that code for transformers
    // is told besides.
    if (!plain) config.only("norm", norm), config.find("auto_map"), config.find("sublayers");
    config.refuse_the_rest(harmless_keys);
    try {
        check_config(c, keys.names);
    } catch (const Error& e) {
        throw Error(path + ": " + e.what());
    }
    return c;
}
