// A GPT trainer in one file: LLaMA- and GPT-2-style transformers, written to show and to cure the curse of depth.
//
// Read it from top to bottom; each section needs only those above it.
//    1. Configuration      model presets, dimensions
//    2. Parameters         one table generates allocation, initialization, checkpoint names and weight decay
//    3. Matmul             cuBLASLt: y = x W^T and its two gradients
//    4. Embedding          token and position vectors, rotary positions
//    5. Attention          flash attention in fp32, forward and backward
//    6. MLP                SwiGLU, GELU, bias gradients
//    7. Classifier         softmax cross entropy and its gradient, in place on the logits
//    8. Optimizer          global gradient norm, clipping, AdamW
//    9. Model              memory, forward, backward, update
//   10. Data parallelism   MPI starts the ranks, NCCL sums the gradients
//   11. Checkpoints        Hugging Face folders, exact resume
//   12. Training           settings, schedule, validation, samples, log, main loop
//
// Letters, everywhere: B sequences, T tokens a sequence, N = B * T tokens, L blocks, C channels (hidden size),
// F channels inside the MLP, NH query heads, NKV key/value heads, HS channels a head, V vocabulary, Vp V padded.
// Tensors are row-major, and a weight W is (out, in). Backward functions add to the gradients of parameters and
// overwrite the gradients of activations. Gradients of parameters are sums over tokens; the optimizer divides.
#include <cublasLt.h>
#include <fcntl.h>
#include <mpi.h>
#include <nccl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "checkpoint.h"
#include "dataloader.h"
#include "dev/device.cuh"
#include "lns_layers.cuh"
#include "tokenizer/bpe.h"

// ---------------------------------------------------------------------------------------------------------------
// 1. Configuration

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

const Preset* find_preset(const std::string& name) {
    for (const Preset& preset : presets) {
        if (name == preset.name) return &preset;
    }
    return nullptr;
}

ModelConfig preset_config(const Preset& preset) {
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
void check_config(const ModelConfig& config) {
    const auto require = [](bool ok, const std::string& message) {
        if (!ok) throw Error(message);
    };
    require(config.L > 0 && config.C > 0 && config.F > 0 && config.V > 1, "--layers, --hidden, --ffn must be positive, "
                                                                          "--vocab at least 2");
    require(config.NH > 0 && config.NKV > 0 && config.NH % config.NKV == 0,
            text("--heads %d must be a multiple of --kv-heads %d", config.NH, config.NKV));
    require(config.C % 4 == 0, text("--hidden %d must be a multiple of 4", config.C));
    require(config.HS % 4 == 0 && config.HS >= 4 && config.HS <= 128,
            text("a head of %d channels: allowed are multiples of 4 up to 128 (change --heads or --hidden)", config.HS));
    require(config.llama() || (config.NKV == config.NH && config.NH * config.HS == config.C),
            "GPT-2 models have as many --kv-heads as --heads, and --hidden divides by them");
}

// ---------------------------------------------------------------------------------------------------------------
// 2. Parameters
//
// All parameters stand in one flat buffer: embeddings; block 1 .. L; final norm and head. Gradients and optimizer
// state use the same offsets. Inside a block the matrices come first, then the vectors, so that a block's gradients
// are one range, and weight decay (matrices only) is one range a block. Query, key and value stand together and act as
// one matrix, as do gate and up.

struct Parameter {
    std::string name;              // as Hugging Face has it; neighbours of one name are stacked to one tensor there
    int64_t rows = 1, cols = 1;    // the tensor's own shape; vectors have rows = 1
    int64_t padded_rows = 1, padded_cols = 1;
    bool matrix = false;           // two dimensions: decayed
    bool transposed = false;       // on disk (in, out): GPT-2's Conv1D
    float fill = 0;                // initial value, where std is 0
    float std = 0;                 // standard deviation of the initial normal distribution
    float norm_scale = 0;          // not 0: gain or bias of a norm whose output is multiplied by this
    int64_t offset = 0;

    int64_t count() const { return rows * cols; }
    int64_t padded_count() const { return padded_rows * padded_cols; }
};

// Where a norm's parameters are; -1 where there is no such norm, or no bias.
struct NormOffsets {
    int64_t gain = -1, bias = -1;
};

struct SublayerOffsets {
    int64_t in = -1, in_bias = -1;    // attention: query, key, value; MLP: gate and up
    int64_t out = -1, out_bias = -1;  // attention: output projection; MLP: down
    NormOffsets before, after;        // after: on the sublayer's output or on the sum, as the policy says
};

struct Range {
    int64_t begin = 0, end = 0;
    bool decayed = false;
};

struct ParameterTable {
    std::vector<Parameter> parameters;
    int64_t embedding = 0, positions = -1, head = 0;
    NormOffsets final_norm;
    std::vector<SublayerOffsets> sublayers;  // 2 L: attention, MLP, attention, ...
    std::vector<Range> blocks;               // L + 2: embeddings, block 1 .. L, final norm and head
    int64_t size = 0;                        // of the flat buffer, with padding

    int64_t count() const {
        int64_t sum = 0;
        for (const Parameter& p : parameters) sum += p.count();
        return sum;
    }

    // Neighbours that are decayed alike, merged.
    std::vector<Range> decay_ranges() const {
        std::vector<Range> ranges;
        for (const Parameter& p : parameters) {
            if (!ranges.empty() && ranges.back().decayed == p.matrix) ranges.back().end = p.offset + p.padded_count();
            else ranges.push_back({p.offset, p.offset + p.padded_count(), p.matrix});
        }
        return ranges;
    }
};

enum class Init { NORMAL, SCALED };  // SCALED: residual projections divided by sqrt(2 L)

ParameterTable make_parameter_table(const ModelConfig& config, Init init) {
    constexpr float base_std = 0.02f;
    const int L = config.L, C = config.C, F = config.F, Fp = config.Fp(), V = config.V, Vp = config.Vp();
    const int q_channels = config.NH * config.HS, kv_channels = config.NKV * config.HS;
    const float residual_std = init == Init::SCALED ? base_std / std::sqrt(2.0f * L) : base_std;
    ParameterTable table;

    constexpr int64_t alignment = 128;  // elements: 256 bytes of bf16, so that cuBLASLt may use any algorithm
    const auto align = [&] { table.size = round_up(table.size, alignment); };
    const auto add = [&](Parameter p) {
        p.padded_rows = std::max(p.padded_rows, p.rows);
        p.padded_cols = std::max(p.padded_cols, p.cols);
        p.offset = table.size;
        table.size += p.padded_count();
        table.parameters.push_back(p);
        return p.offset;
    };
    const auto add_vector = [&](const std::string& name, int64_t count, int64_t padded = 1, float fill = 0) {
        return add({.name = name, .cols = count, .padded_cols = padded, .fill = fill});
    };
    const auto add_norm = [&](const std::string& name, float scale) {
        align();
        NormOffsets norm;
        norm.gain = add({.name = name + ".weight", .cols = C, .fill = 1, .norm_scale = scale});
        align();
        if (config.biased()) norm.bias = add({.name = name + ".bias", .cols = C, .norm_scale = scale});
        return norm;
    };
    const auto begin_block = [&] {
        align();
        if (!table.blocks.empty()) table.blocks.back().end = table.size;
        table.blocks.push_back({table.size, table.size});
    };

    const bool llama = config.llama();
    const std::string root = llama ? "model." : "transformer.";
    begin_block();
    table.embedding = add({.name = root + (llama ? "embed_tokens.weight" : "wte.weight"), .rows = V, .cols = C,
                           .padded_rows = Vp, .matrix = true, .std = base_std});
    align();
    if (!llama) {
        table.positions = add({.name = root + "wpe.weight", .rows = config.positions, .cols = C, .matrix = true,
                               .std = base_std});
    }
    table.sublayers.resize(2 * L);
    for (int l = 1; l <= L; l++) {
        begin_block();
        const BlockPolicy policy = block_policy(l, L);
        const std::string block = root + (llama ? "layers." : "h.") + std::to_string(l - 1) + ".";
        SublayerOffsets &attention = table.sublayers[2 * l - 2], &mlp = table.sublayers[2 * l - 1];
        // A matrix (out, in) of this block. Xavier-normal: std = gain * sqrt(2 / (in + out)).
        const auto add_matrix = [&](const std::string& name, int64_t rows, int64_t cols, float std, float xavier_gain,
                                    int64_t padded_rows = 1, int64_t padded_cols = 1) {
            if (policy.xavier) std = xavier_gain * std::sqrt(2.0f / (rows + cols));
            return add({.name = block + name + ".weight", .rows = rows, .cols = cols, .padded_rows = padded_rows,
                        .padded_cols = padded_cols, .matrix = true, .transposed = !llama, .std = std});
        };
        const float gain = policy.xavier_gain;
        const std::string q = llama ? "self_attn.q_proj" : "attn.c_attn", k = llama ? "self_attn.k_proj" : q;
        const std::string v = llama ? "self_attn.v_proj" : q, o = llama ? "self_attn.o_proj" : "attn.c_proj";
        const std::string up = llama ? "mlp.up_proj" : "mlp.c_fc", down = llama ? "mlp.down_proj" : "mlp.c_proj";
        attention.in = add_matrix(q, q_channels, C, base_std, 1);
        add_matrix(k, kv_channels, C, base_std, 1);
        add_matrix(v, kv_channels, C, base_std, gain);
        align();
        attention.out = add_matrix(o, C, q_channels, residual_std, gain);
        align();
        if (llama) mlp.in = add_matrix("mlp.gate_proj", F, C, base_std, gain, Fp);
        const int64_t up_offset = add_matrix(up, F, C, base_std, gain, Fp);
        if (!llama) mlp.in = up_offset;
        align();
        mlp.out = add_matrix(down, C, F, residual_std, gain, 1, Fp);
        align();
        if (config.biased() || config.qkv_bias) {
            attention.in_bias = add_vector(block + q + ".bias", q_channels);
            add_vector(block + k + ".bias", kv_channels);
            add_vector(block + v + ".bias", kv_channels);
        }
        if (config.biased()) {
            align();
            attention.out_bias = add_vector(block + o + ".bias", C);
            align();
            mlp.in_bias = add_vector(block + up + ".bias", F, Fp);
            align();
            mlp.out_bias = add_vector(block + down + ".bias", C);
        }
        // Names: Hugging Face's where it has a model with these norms, else those of INTERFACE (Gemma 2's for PERI).
        const bool peri = policy.norm_after_sublayer, after = peri || policy.norm_after_sum;
        const std::string before_attention = llama || peri ? "input_layernorm" : "ln_1";
        const std::string before_mlp =
            peri ? "pre_feedforward_layernorm" : llama ? "post_attention_layernorm" : "ln_2";
        if (policy.norm_before) attention.before = add_norm(block + before_attention, policy.scale);
        if (after) attention.after = add_norm(block + "post_attention_layernorm", 1);
        if (policy.norm_before) mlp.before = add_norm(block + before_mlp, policy.scale);
        if (after) mlp.after = add_norm(block + "post_feedforward_layernorm", 1);
    }
    begin_block();
    table.head = table.embedding;
    if (!config.tied) {
        table.head = add({.name = "lm_head.weight", .rows = V, .cols = C, .padded_rows = Vp, .matrix = true,
                          .std = base_std});
    }
    table.final_norm = add_norm(root + (llama ? "norm" : "ln_f"), 1);
    align();
    table.blocks.back().end = table.size;
    return table;
}

// Random bits from a counter (SplitMix64's finalizer): element i of stream s is the same wherever it is computed.
__host__ __device__ inline uint64_t random_bits(uint64_t stream, uint64_t i) {
    uint64_t x = stream + (i + 1) * 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// Uniform in (0, 1], 24 bits.
__host__ __device__ inline float random_uniform(uint64_t bits) { return ((bits >> 40) + 1) * 0x1p-24f; }

// parameter[row, col] = fill + std * normal(stream, row * cols + col), padding 0. Box-Muller, one thread an element.
__global__ void initialize_kernel(float* parameter, int64_t rows, int64_t cols, int64_t padded_cols, float fill,
                                  float std, uint64_t stream) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows * cols) return;
    float value = fill;
    if (std > 0) {
        const float radius = sqrtf(-2.0f * logf(random_uniform(random_bits(stream, 2 * i))));
        value += std * radius * cosf(6.28318530718f * random_uniform(random_bits(stream, 2 * i + 1)));
    }
    parameter[i / cols * padded_cols + i % cols] = value;
}

// A parameter's random stream depends on its name and the seed alone, so variants of one model start alike.
uint64_t parameter_stream(const Parameter& p, const ParameterTable& table, uint64_t seed) {
    uint64_t hash = random_bits(0x6c6e73, seed);
    for (const char c : p.name) hash = random_bits(hash, (unsigned char)c);
    int64_t part = 0;  // query, key and value of GPT-2 share a name
    for (const Parameter& other : table.parameters) part += other.name == p.name && other.offset < p.offset;
    return random_bits(hash, part);
}

void initialize_parameters(float* parameters, const ParameterTable& table, uint64_t seed) {
    CHECK_CUDA(cudaMemsetAsync(parameters, 0, table.size * sizeof(float), main_stream));
    for (const Parameter& p : table.parameters) {
        launch(initialize_kernel, dim3(narrow(ceil_div(p.count(), 256))), 256, 0, parameters + p.offset, p.rows, p.cols,
               p.padded_cols, p.fill, p.std, parameter_stream(p, table, seed));
    }
}

// ---------------------------------------------------------------------------------------------------------------
// 3. Matmul
//
// cuBLASLt counts in columns: our row-major (rows, cols) is its (cols x rows), transposed for free. With W (OC, C),
// x (N, C), y (N, OC), each of the three products of a linear layer is 2 * N * OC * C operations:
//   forward   y = x W^T       m = OC  n = N   k = C    A = W transposed, B = x
//   input     dx = dy W       m = C   n = N   k = OC   A = W,            B = dy
//   weight    dW += dy^T x    m = C   n = OC  k = N    A = x,            B = dy transposed

void cublas_check(cublasStatus_t status, const char* call, const char* file, int line) {
    if (status != CUBLAS_STATUS_SUCCESS) {
        throw Error(text("%s:%d: %s: %s", file, line, call, cublasLtGetStatusString(status)));
    }
}
#define CHECK_CUBLAS(call) cublas_check((call), #call, __FILE__, __LINE__)

struct Matmul {
    floatX* d = nullptr;   // (n, m) out, in the build's precision; or
    float* d32 = nullptr;  // (n, m) out, in fp32
    const floatX* a = nullptr;
    const floatX* b = nullptr;
    int64_t m = 0, n = 0, k = 0;
    bool transpose_a = false, transpose_b = false;
    bool accumulate = false;            // d += instead of d =
    const floatX* bias = nullptr;       // (m) added to each row of d
    floatX* pre_gelu = nullptr;         // (n, m) out: d before GELU; GELU is applied to d
    const floatX* gelu_input = nullptr;  // (n, m) d is multiplied by GELU'(gelu_input)
};

// What cuBLASLt must know of a product; prepared once for each kind and shape.
struct MatmulKey {
    int64_t m, n, k;
    bool transpose_a, transpose_b, accumulate, fp32_out;
    cublasLtEpilogue_t epilogue;
    auto operator<=>(const MatmulKey&) const = default;
};

struct MatmulPlan {
    cublasLtMatmulDesc_t operation = nullptr;
    cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;
    cublasLtMatmulAlgo_t algorithm = {};
    bool available = false;  // false: cuBLASLt has no algorithm for this epilogue here
};

struct MatmulLibrary {
    cublasLtHandle_t handle = nullptr;
    void* workspace = nullptr;
    size_t workspace_bytes = 32 << 20;  // what NVIDIA recommends for Hopper
    std::map<MatmulKey, MatmulPlan> plans;

    void open() {
        if (handle) return;
        CHECK_CUBLAS(cublasLtCreate(&handle));
        CHECK_CUDA(cudaMalloc(&workspace, workspace_bytes));
    }
};
MatmulLibrary matmul_library;

constexpr cudaDataType_t data_type_X = is_fp32 ? CUDA_R_32F : CUDA_R_16BF;

MatmulPlan make_matmul_plan(const MatmulKey& key) {
    MatmulPlan plan;
    const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
        CHECK_CUBLAS(cublasLtMatmulDescSetAttribute(plan.operation, attribute, &value, sizeof(value)));
    };
    CHECK_CUBLAS(cublasLtMatmulDescCreate(&plan.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    set(CUBLASLT_MATMUL_DESC_TRANSA, key.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_TRANSB, key.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, key.epilogue);
    if (key.epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS || key.epilogue == CUBLASLT_EPILOGUE_DGELU) {
        set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, key.m);
    }
    const auto layout = [](cublasLtMatrixLayout_t* layout, cudaDataType_t type, int64_t rows, int64_t cols) {
        CHECK_CUBLAS(cublasLtMatrixLayoutCreate(layout, type, rows, cols, rows));
    };
    layout(&plan.a, data_type_X, key.transpose_a ? key.k : key.m, key.transpose_a ? key.m : key.k);
    layout(&plan.b, data_type_X, key.transpose_b ? key.n : key.k, key.transpose_b ? key.k : key.n);
    layout(&plan.d, key.fp32_out ? CUDA_R_32F : data_type_X, key.m, key.n);

    cublasLtMatmulPreference_t preference;
    CHECK_CUBLAS(cublasLtMatmulPreferenceCreate(&preference));
    CHECK_CUBLAS(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                      &matmul_library.workspace_bytes, sizeof(size_t)));
    cublasLtMatmulHeuristicResult_t result = {};
    int found = 0;
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(matmul_library.handle, plan.operation, plan.a, plan.b,
                                                                 plan.d, plan.d, preference, 1, &result, &found);
    CHECK_CUBLAS(cublasLtMatmulPreferenceDestroy(preference));
    plan.available = status == CUBLAS_STATUS_SUCCESS && found > 0;
    plan.algorithm = result.algo;
    return plan;
}

// Returns false, with nothing done, when cuBLASLt has no algorithm for an epilogue with GELU.
bool matmul(const Matmul& p) {
    matmul_library.open();
    MatmulKey key = {p.m, p.n, p.k, p.transpose_a, p.transpose_b, p.accumulate, p.d32 != nullptr,
                     CUBLASLT_EPILOGUE_DEFAULT};
    if (p.pre_gelu) key.epilogue = CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
    else if (p.gelu_input) key.epilogue = CUBLASLT_EPILOGUE_DGELU;
    else if (p.bias) key.epilogue = CUBLASLT_EPILOGUE_BIAS;
    auto found = matmul_library.plans.find(key);
    if (found == matmul_library.plans.end()) found = matmul_library.plans.emplace(key, make_matmul_plan(key)).first;
    const MatmulPlan& plan = found->second;
    if (!plan.available) {
        if (p.pre_gelu || p.gelu_input) return false;
        throw Error(text("cuBLASLt has no algorithm for a %s product with m = %lld, n = %lld, k = %lld", precision_name,
                         (long long)p.m, (long long)p.n, (long long)p.k));
    }
    if (p.bias) {
        CHECK_CUBLAS(cublasLtMatmulDescSetAttribute(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p.bias,
                                                    sizeof(p.bias)));
    }
    const void* auxiliary = p.pre_gelu ? p.pre_gelu : p.gelu_input;
    if (auxiliary) {
        CHECK_CUBLAS(cublasLtMatmulDescSetAttribute(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER,
                                                    &auxiliary, sizeof(auxiliary)));
    }
    const float alpha = 1, beta = p.accumulate ? 1 : 0;
    void* d = p.d32 ? (void*)p.d32 : (void*)p.d;
    CHECK_CUBLAS(cublasLtMatmul(matmul_library.handle, plan.operation, &alpha, p.a, plan.a, p.b, plan.b, &beta, d, plan.d,
                                d, plan.d, &plan.algorithm, matmul_library.workspace, matmul_library.workspace_bytes,
                                main_stream));
    return true;
}

// y (N, OC) = x (N, C) W (OC, C)^T + bias
void linear_forward(floatX* y, const floatX* x, const floatX* weight, const floatX* bias, int64_t N, int C, int OC) {
    matmul({.d = y, .a = weight, .b = x, .m = OC, .n = N, .k = C, .transpose_a = true, .bias = bias});
}

// dx (N, C) = dy (N, OC) W (OC, C)
void linear_backward_input(floatX* dx, const floatX* dy, const floatX* weight, int64_t N, int C, int OC) {
    matmul({.d = dx, .a = weight, .b = dy, .m = C, .n = N, .k = OC});
}

// partial (chunks, C) = sums of dy (N, C) over chunks of rows. A thread owns 4 columns of a chunk. Reads dy once.
constexpr int bias_chunk_rows = 64;
__global__ void bias_backward_kernel(float* partial, const floatX* dy, int64_t N, int C) {
    const int c = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (c >= C) return;
    const int64_t first = (int64_t)blockIdx.y * bias_chunk_rows, last = min(N, first + bias_chunk_rows);
    Float4 sum = {};
    for (int64_t row = first; row < last; row++) {
        const Float4 x = load4(dy + row * C + c);
        for (int i = 0; i < 4; i++) sum[i] += x[i];
    }
    store4(partial + (int64_t)blockIdx.y * C + c, sum);
}

constexpr int64_t bias_partial_size(int64_t N, int C) { return ceil_div(N, bias_chunk_rows) * C; }

// dbias (C) += column sums of dy (N, C), in a fixed order; partial: bias_partial_size(N, C) floats of scratch.
void bias_backward(float* dbias, const floatX* dy, float* partial, int64_t N, int C) {
    const int chunks = narrow(ceil_div(N, bias_chunk_rows));
    launch(bias_backward_kernel, dim3(ceil_div(C, 4 * 64), chunks), 64, 0, partial, dy, N, C);
    launch(norm_reduce_kernel, dim3(ceil_div(C, 128)), 128, 0, dbias, (float*)nullptr, (const float*)partial, chunks, C);
}

// dW (OC, C) += dy (N, OC)^T x (N, C), and dbias (OC) += column sums of dy where there is a bias.
void linear_backward_weight(float* dweight, float* dbias, const floatX* x, const floatX* dy, float* partial, int64_t N,
                            int C, int OC) {
    matmul({.d32 = dweight, .a = x, .b = dy, .m = C, .n = OC, .k = N, .transpose_b = true, .accumulate = true});
    if (dbias) bias_backward(dbias, dy, partial, N, OC);
}

// ---------------------------------------------------------------------------------------------------------------
// 4. Embedding

// x (N, C) = wte[token] (+ wpe[t]); x_operand: the same as matmul operand, or null. One thread 4 channels.
__global__ void embedding_forward_kernel(float* x, floatX* x_operand, const int32_t* tokens, const floatX* wte,
                                         const floatX* wpe, int64_t N, int T, int C) {
    const int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= N * C) return;
    const int64_t row = i / C;
    const int c = i % C;
    Float4 sum = load4(wte + (int64_t)tokens[row] * C + c);
    if (wpe) {
        const Float4 position = load4(wpe + row % T * C + c);
        for (int k = 0; k < 4; k++) sum[k] += position[k];
    }
    store4(x + i, sum);
    if (x_operand) store4(x_operand + i, sum);
}

void embedding_forward(float* x, floatX* x_operand, const int32_t* tokens, const floatX* wte, const floatX* wpe,
                       int64_t N, int T, int C) {
    launch(embedding_forward_kernel, dim3(narrow(ceil_div(N * C, 4 * 256))), 256, 0, x, x_operand, tokens, wte, wpe, N, T,
           C);
}

// The rows of a batch sorted by token: rows[starts[u] .. starts[u + 1]) hold the u-th token that occurs. With it, each
// row of the embedding's gradient has one owner that adds in a fixed order; atomics would add in any order.
struct TokenRows {
    std::vector<int32_t> rows, starts, tokens;

    void sort(const int32_t* batch, int64_t N) {
        rows.resize(N);
        std::iota(rows.begin(), rows.end(), 0);
        std::stable_sort(rows.begin(), rows.end(), [&](int a, int b) { return batch[a] < batch[b]; });
        starts.clear();
        tokens.clear();
        for (int64_t i = 0; i < N; i++) {
            if (i > 0 && batch[rows[i]] == batch[rows[i - 1]]) continue;
            starts.push_back((int32_t)i);
            tokens.push_back(batch[rows[i]]);
        }
        starts.push_back((int32_t)N);
    }
};

// dwte[token] += sum of dx over the rows that hold the token. Block y: one token; thread: 4 channels. Reads dx once.
__global__ void embedding_backward_kernel(float* dwte, const float* dx, const int32_t* rows, const int32_t* starts,
                                          const int32_t* tokens, int C) {
    const int c = (blockIdx.y * blockDim.x + threadIdx.x) * 4;
    if (c >= C) return;
    Float4 sum = {};
    for (int i = starts[blockIdx.x]; i < starts[blockIdx.x + 1]; i++) {
        const Float4 x = load4(dx + (int64_t)rows[i] * C + c);
        for (int k = 0; k < 4; k++) sum[k] += x[k];
    }
    float* gradient = dwte + (int64_t)tokens[blockIdx.x] * C + c;
    for (int k = 0; k < 4; k++) gradient[k] += sum[k];
}

// dwpe[t] += sum of dx[b, t] over the sequences b.
__global__ void position_backward_kernel(float* dwpe, const float* dx, int B, int T, int C) {
    const int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= (int64_t)T * C) return;
    Float4 sum = load4(dwpe + i);
    for (int b = 0; b < B; b++) {
        const Float4 x = load4(dx + (int64_t)b * T * C + i);
        for (int k = 0; k < 4; k++) sum[k] += x[k];
    }
    store4(dwpe + i, sum);
}

void embedding_backward(float* dwte, float* dwpe, const float* dx, const int32_t* rows, const int32_t* starts,
                        const int32_t* tokens, int distinct, int B, int T, int C) {
    launch(embedding_backward_kernel, dim3(distinct, ceil_div(C, 4 * 64)), 64, 0, dwte, dx, rows, starts, tokens, C);
    if (dwpe) launch(position_backward_kernel, dim3(narrow(ceil_div((int64_t)T * C, 4 * 64))), 64, 0, dwpe, dx, B, T, C);
}

// Rotary positions, Hugging Face's rotate-half form: channel i < HS/2 of a head pairs with channel i + HS/2, and the
// pair is turned by t * theta^(-2 i / HS). The gradient turns back. In place on the query and key heads of
// qkv (B, T, NH + 2 NKV, HS); rotations (T, HS/2) of (cos, sin). One thread a pair.
__global__ void rope_kernel(floatX* qkv, const float2* rotations, int64_t N, int T, int heads, int row_channels, int HS,
                            float direction) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    const int half = HS / 2;
    if (i >= N * heads * half) return;
    const int pair = i % half, head = i / half % heads;
    const int64_t row = i / half / heads;
    const float2 turn = rotations[row % T * half + pair];
    floatX* first = qkv + row * row_channels + head * HS + pair;
    const float x = to_float(first[0]), y = to_float(first[half]), sine = direction * turn.y;
    first[0] = from_float<floatX>(x * turn.x - y * sine);
    first[half] = from_float<floatX>(y * turn.x + x * sine);
}

// direction: 1 forward, -1 backward
void rope(floatX* qkv, const float2* rotations, int B, int T, int NH, int NKV, int HS, float direction) {
    const int64_t N = (int64_t)B * T;
    launch(rope_kernel, dim3(narrow(ceil_div(N * (NH + NKV) * HS / 2, 256))), 256, 0, qkv, rotations, N, T, NH + NKV,
           (NH + 2 * NKV) * HS, HS, direction);
}

std::vector<float2> make_rotations(int T, int HS, double theta) {
    std::vector<float2> rotations((size_t)T * HS / 2);
    for (int t = 0; t < T; t++) {
        for (int i = 0; i < HS / 2; i++) {
            const double angle = t * std::pow(theta, -2.0 * i / HS);
            rotations[(size_t)t * HS / 2 + i] = {(float)std::cos(angle), (float)std::sin(angle)};
        }
    }
    return rotations;
}

// ---------------------------------------------------------------------------------------------------------------
// 5. Attention
//
// Per head, with q, k, v (T, HS), causal:
//   s_ij = q_i . k_j / sqrt(HS), j <= i      p = softmax_j(s)      o_i = sum_j p_ij v_j
// and backwards, with delta_i = do_i . o_i:
//   dv_j = sum_i p_ij do_i     dp_ij = do_i . v_j     ds_ij = p_ij (dp_ij - delta_i)
//   dq_i = sum_j ds_ij k_j / sqrt(HS)                 dk_j = sum_i ds_ij q_i / sqrt(HS)
// The T x T matrices are never stored: the softmax is computed online, tile after tile, and the backward pass computes p
// again from the row's log-sum-exp. One thread owns one row: a query's o or dq, a key's dk and dv. Tiles of the other
// side stand in shared memory; dot products run over a tile transposed, (D, tile), so that neighbours are different
// keys and each thread does tile-many multiply-adds for one element of its own row.
//
// D is HS padded to a compiled size; padded channels are zero. Query head h reads key/value head h / (NH / NKV).
// Operations forward 2 T^2 HS a head (causal half of 4), backward 7/2 of that: the scores are computed twice.

constexpr int attention_tile = 32;
constexpr int attention_rows(int D) { return D <= 64 ? 64 : 32; }

// Row `row` of a (T, HS) matrix with a row stride, for the caller's column `column` of a transposed tile.
template <int D>
__device__ void load_own_row(float* tile, int columns, int column, const floatX* matrix, int64_t stride, int row, int T,
                             int HS, float factor) {
    for (int d = 0; d < D; d += 4) {
        Float4 x = {};
        if (row < T && d < HS) x = load4(matrix + row * stride + d);
        for (int i = 0; i < 4; i++) tile[(d + i) * columns + column] = factor * x[i];
    }
}

// Rows first .. first + attention_tile - 1, by all threads of the block: as (tile, D), as (D, tile), or both.
template <int D>
__device__ void load_tile(float* rows, float* columns, const floatX* matrix, int64_t stride, int first, int T, int HS,
                          float factor) {
    for (int i = threadIdx.x; i < attention_tile * (D / 4); i += blockDim.x) {
        const int row = i / (D / 4), d = i % (D / 4) * 4;
        Float4 x = {};
        if (first + row < T && d < HS) x = load4(matrix + (first + row) * stride + d);
        for (int k = 0; k < 4; k++) x[k] *= factor;
        if (rows) store4(rows + row * D + d, x);
        if (columns) {
            for (int k = 0; k < 4; k++) columns[(d + k) * attention_tile + row] = x[k];
        }
    }
}

// s[j] = sum over d of own[d, column] * tile[d, j]
template <int D>
__device__ __forceinline__ void dot_products(float (&s)[attention_tile], const float* own, int columns, int column,
                                             const float* tile) {
#pragma unroll
    for (int j = 0; j < attention_tile; j++) s[j] = 0;
    for (int d = 0; d < D; d++) {
        const float x = own[d * columns + column];
#pragma unroll
        for (int j = 0; j < attention_tile; j++) s[j] += x * tile[d * attention_tile + j];
    }
}

// sum[d] += sum over j of p[j] * tile[j, d]; `stride` channels a row of the tile
template <int D>
__device__ __forceinline__ void add_weighted_rows(float (&sum)[D], const float (&p)[attention_tile], const float* tile,
                                                  int stride) {
#pragma unroll
    for (int j = 0; j < attention_tile; j++) {
#pragma unroll
        for (int d = 0; d < D; d++) sum[d] += p[j] * tile[j * stride + d];
    }
}

// Grid (row tiles, NH, B). out (B, T, NH, HS), lse (B, NH, T).
template <int D>
__global__ void __launch_bounds__(attention_rows(D))
    attention_forward_kernel(floatX* out, float* lse, const floatX* qkv, int T, int NH, int NKV, int HS) {
    constexpr int rows = attention_rows(D);
    float* q_columns = dynamic_shared;               // (D, rows)
    float* k_columns = q_columns + D * rows;         // (D, tile)
    float* v_rows = k_columns + D * attention_tile;  // (tile, D)

    const int head = blockIdx.y, kv_head = head / (NH / NKV), own = threadIdx.x;
    const int first_row = (gridDim.x - 1 - blockIdx.x) * rows, t = first_row + own;  // the longest rows first
    const int64_t stride = (int64_t)(NH + 2 * NKV) * HS;
    const floatX* sequence = qkv + blockIdx.z * T * stride;
    load_own_row<D>(q_columns, rows, own, sequence + head * HS, stride, t, T, HS, 1.0f / sqrtf((float)HS));

    float o[D], s[attention_tile];
    float maximum = -INFINITY, sum = 0;
#pragma unroll
    for (int d = 0; d < D; d++) o[d] = 0;
    for (int first = 0; first < min(T, first_row + rows); first += attention_tile) {
        __syncthreads();
        load_tile<D>(nullptr, k_columns, sequence + (NH + kv_head) * HS, stride, first, T, HS, 1);
        load_tile<D>(v_rows, nullptr, sequence + (NH + NKV + kv_head) * HS, stride, first, T, HS, 1);
        __syncthreads();
        dot_products<D>(s, q_columns, rows, own, k_columns);
        float new_maximum = maximum;
#pragma unroll
        for (int j = 0; j < attention_tile; j++) {
            if (first + j > t) s[j] = -INFINITY;
            new_maximum = fmaxf(new_maximum, s[j]);
        }
        const float correction = __expf(maximum - new_maximum);
        float tile_sum = 0;
#pragma unroll
        for (int j = 0; j < attention_tile; j++) {
            s[j] = __expf(s[j] - new_maximum);
            tile_sum += s[j];
        }
        sum = sum * correction + tile_sum;
        maximum = new_maximum;
#pragma unroll
        for (int d = 0; d < D; d++) o[d] *= correction;
        add_weighted_rows<D>(o, s, v_rows, D);
    }
    if (t >= T) return;
    floatX* o_row = out + ((blockIdx.z * (int64_t)T + t) * NH + head) * HS;
#pragma unroll
    for (int d = 0; d < D; d++) {
        if (d < HS) o_row[d] = from_float<floatX>(o[d] / sum);
    }
    lse[(blockIdx.z * (int64_t)NH + head) * T + t] = maximum + logf(sum);
}

// Grid (row tiles, NH, B). Writes delta (B, NH, T) and the query part of dqkv.
template <int D>
__global__ void __launch_bounds__(attention_rows(D))
    attention_backward_query_kernel(floatX* dqkv, float* delta, const floatX* dout, const floatX* out, const float* lse,
                                    const floatX* qkv, int T, int NH, int NKV, int HS) {
    constexpr int rows = attention_rows(D);
    float* q_columns = dynamic_shared;                  // (D, rows)
    float* do_columns = q_columns + D * rows;           // (D, rows)
    float* k_columns = do_columns + D * rows;           // (D, tile)
    float* v_columns = k_columns + D * attention_tile;  // (D, tile)
    float* k_rows = v_columns + D * attention_tile;     // (tile, D)

    const int head = blockIdx.y, kv_head = head / (NH / NKV), own = threadIdx.x;
    const int first_row = (gridDim.x - 1 - blockIdx.x) * rows, t = first_row + own;
    const int64_t stride = (int64_t)(NH + 2 * NKV) * HS, out_stride = (int64_t)NH * HS;
    const floatX* sequence = qkv + blockIdx.z * T * stride;
    const int64_t out_offset = blockIdx.z * T * out_stride + head * HS;
    const int64_t statistic = (blockIdx.z * (int64_t)NH + head) * T + t;
    const float factor = 1.0f / sqrtf((float)HS);
    load_own_row<D>(q_columns, rows, own, sequence + head * HS, stride, t, T, HS, factor);
    load_own_row<D>(do_columns, rows, own, dout + out_offset, out_stride, t, T, HS, 1);

    float delta_row = 0, lse_row = 0;
    if (t < T) {
        for (int d = 0; d < HS; d++) {
            delta_row += do_columns[d * rows + own] * to_float(out[out_offset + t * out_stride + d]);
        }
        delta[statistic] = delta_row;
        lse_row = lse[statistic];
    }
    float dq[D], s[attention_tile], dp[attention_tile];
#pragma unroll
    for (int d = 0; d < D; d++) dq[d] = 0;
    for (int first = 0; first < min(T, first_row + rows); first += attention_tile) {
        __syncthreads();
        load_tile<D>(k_rows, k_columns, sequence + (NH + kv_head) * HS, stride, first, T, HS, 1);
        load_tile<D>(nullptr, v_columns, sequence + (NH + NKV + kv_head) * HS, stride, first, T, HS, 1);
        __syncthreads();
        dot_products<D>(s, q_columns, rows, own, k_columns);
        dot_products<D>(dp, do_columns, rows, own, v_columns);
#pragma unroll
        for (int j = 0; j < attention_tile; j++) {
            const float p = first + j <= t ? __expf(s[j] - lse_row) : 0.0f;
            s[j] = p * (dp[j] - delta_row);
        }
        add_weighted_rows<D>(dq, s, k_rows, D);
    }
    if (t >= T) return;
    floatX* dq_row = dqkv + (blockIdx.z * (int64_t)T + t) * stride + head * HS;
#pragma unroll
    for (int d = 0; d < D; d++) {
        if (d < HS) dq_row[d] = from_float<floatX>(factor * dq[d]);
    }
}

// A thread holds dk and dv of a chunk of the channels; for D > 64 two blocks share a key tile, as registers would spill.
constexpr int attention_chunk(int D) { return D <= 64 ? D : D / 2; }

// Grid (key tiles * D / chunk, NKV, B). Writes the key and value parts of dqkv, summed over the query heads of a group.
template <int D>
__global__ void __launch_bounds__(attention_rows(D))
    attention_backward_key_kernel(floatX* dqkv, const float* delta, const floatX* dout, const float* lse,
                                  const floatX* qkv, int T, int NH, int NKV, int HS) {
    constexpr int rows = attention_rows(D), chunk = attention_chunk(D);
    float* k_columns = dynamic_shared;                   // (D, rows)
    float* v_columns = k_columns + D * rows;             // (D, rows)
    float* q_columns = v_columns + D * rows;             // (D, tile)
    float* do_columns = q_columns + D * attention_tile;  // (D, tile)
    float* q_rows = do_columns + D * attention_tile;     // (tile, D)
    float* do_rows = q_rows + D * attention_tile;        // (tile, D)

    const int kv_head = blockIdx.y, group = NH / NKV, own = threadIdx.x;
    const int first_channel = blockIdx.x % (D / chunk) * chunk;
    const int first_row = blockIdx.x / (D / chunk) * rows, t = first_row + own;
    const int64_t stride = (int64_t)(NH + 2 * NKV) * HS, out_stride = (int64_t)NH * HS;
    const floatX* sequence = qkv + blockIdx.z * T * stride;
    load_own_row<D>(k_columns, rows, own, sequence + (NH + kv_head) * HS, stride, t, T, HS, 1);
    load_own_row<D>(v_columns, rows, own, sequence + (NH + NKV + kv_head) * HS, stride, t, T, HS, 1);

    float dk[chunk], dv[chunk], s[attention_tile], dp[attention_tile];
#pragma unroll
    for (int d = 0; d < chunk; d++) dk[d] = dv[d] = 0;
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
        const float* lse_head = lse + (blockIdx.z * (int64_t)NH + head) * T;
        const float* delta_head = delta + (blockIdx.z * (int64_t)NH + head) * T;
        for (int first = first_row / attention_tile * attention_tile; first < T; first += attention_tile) {
            __syncthreads();
            load_tile<D>(q_rows, q_columns, sequence + head * HS, stride, first, T, HS, 1.0f / sqrtf((float)HS));
            load_tile<D>(do_rows, do_columns, dout + blockIdx.z * T * out_stride + head * HS, out_stride, first, T, HS, 1);
            __syncthreads();
            dot_products<D>(s, k_columns, rows, own, q_columns);
            dot_products<D>(dp, v_columns, rows, own, do_columns);
#pragma unroll
            for (int j = 0; j < attention_tile; j++) {
                const bool counted = first + j >= t && first + j < T;
                const int query = counted ? first + j : 0;
                s[j] = counted ? __expf(s[j] - lse_head[query]) : 0.0f;
                dp[j] = s[j] * (dp[j] - delta_head[query]);
            }
            add_weighted_rows<chunk>(dv, s, do_rows + first_channel, D);
            add_weighted_rows<chunk>(dk, dp, q_rows + first_channel, D);
        }
    }
    if (t >= T) return;
    floatX* dk_row = dqkv + (blockIdx.z * (int64_t)T + t) * stride + (NH + kv_head) * HS + first_channel;
    floatX* dv_row = dk_row + NKV * HS;
#pragma unroll
    for (int d = 0; d < chunk; d++) {
        if (first_channel + d < HS) {
            dk_row[d] = from_float<floatX>(dk[d]);
            dv_row[d] = from_float<floatX>(dv[d]);
        }
    }
}

// Calls `function` with the smallest compiled head size that holds HS, as a compile-time constant.
template <class Function>
void with_head_size(int HS, Function function) {
    if (HS <= 32) function(std::integral_constant<int, 32>());
    else if (HS <= 48) function(std::integral_constant<int, 48>());
    else if (HS <= 64) function(std::integral_constant<int, 64>());
    else if (HS <= 80) function(std::integral_constant<int, 80>());
    else if (HS <= 96) function(std::integral_constant<int, 96>());
    else function(std::integral_constant<int, 128>());
}

// out (B, T, NH, HS), lse (B, NH, T) from qkv (B, T, NH + 2 NKV, HS), positions already rotated in.
void attention_forward(floatX* out, float* lse, const floatX* qkv, int B, int T, int NH, int NKV, int HS) {
    with_head_size(HS, [&](auto size) {
        constexpr int D = size, rows = attention_rows(D);
        const size_t shared_bytes = sizeof(float) * D * (rows + 2 * attention_tile);
        launch(attention_forward_kernel<D>, dim3(ceil_div(T, rows), NH, B), rows, shared_bytes, out, lse, qkv, T, NH, NKV,
               HS);
    });
}

// dqkv (B, T, NH + 2 NKV, HS) from dout, out (B, T, NH, HS); delta (B, NH, T) is scratch.
void attention_backward(floatX* dqkv, float* delta, const floatX* dout, const floatX* out, const float* lse,
                        const floatX* qkv, int B, int T, int NH, int NKV, int HS) {
    with_head_size(HS, [&](auto size) {
        constexpr int D = size, rows = attention_rows(D);
        const int tiles = (int)ceil_div(T, rows);
        launch(attention_backward_query_kernel<D>, dim3(tiles, NH, B), rows,
               sizeof(float) * D * (2 * rows + 3 * attention_tile), dqkv, delta, dout, out, lse, qkv, T, NH, NKV, HS);
        launch(attention_backward_key_kernel<D>, dim3(tiles * (D / attention_chunk(D)), NKV, B), rows,
               sizeof(float) * D * (2 * rows + 4 * attention_tile), dqkv, delta, dout, lse, qkv, T, NH, NKV, HS);
    });
}

// ---------------------------------------------------------------------------------------------------------------
// 6. MLP

// SwiGLU: y = silu(gate) * up, silu(g) = g * sigmoid(g). gate_up (N, 2, F), y (N, F). One thread 4 channels.
__global__ void swiglu_forward_kernel(floatX* y, const floatX* gate_up, int64_t N, int F) {
    const int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= N * F) return;
    const floatX* gate_row = gate_up + i / F * 2 * F + i % F;
    const Float4 gate = load4(gate_row), up = load4(gate_row + F);
    Float4 result;
    for (int k = 0; k < 4; k++) result[k] = gate[k] / (1.0f + __expf(-gate[k])) * up[k];
    store4(y + i, result);
}

// dup = dy * silu(gate), dgate = dy * up * silu'(gate), silu'(g) = sigmoid(g) * (1 + g * (1 - sigmoid(g))).
__global__ void swiglu_backward_kernel(floatX* dgate_up, const floatX* dy, const floatX* gate_up, int64_t N, int F) {
    const int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= N * F) return;
    const int64_t gate_offset = i / F * 2 * F + i % F;
    const Float4 gate = load4(gate_up + gate_offset), up = load4(gate_up + gate_offset + F), gradient = load4(dy + i);
    Float4 dgate, dup;
    for (int k = 0; k < 4; k++) {
        const float sigmoid = 1.0f / (1.0f + __expf(-gate[k]));
        dup[k] = gradient[k] * gate[k] * sigmoid;
        dgate[k] = gradient[k] * up[k] * sigmoid * (1.0f + gate[k] * (1.0f - sigmoid));
    }
    store4(dgate_up + gate_offset, dgate);
    store4(dgate_up + gate_offset + F, dup);
}

void swiglu_forward(floatX* y, const floatX* gate_up, int64_t N, int F) {
    launch(swiglu_forward_kernel, dim3(narrow(ceil_div(N * F, 4 * 128))), 128, 0, y, gate_up, N, F);
}

void swiglu_backward(floatX* dgate_up, const floatX* dy, const floatX* gate_up, int64_t N, int F) {
    launch(swiglu_backward_kernel, dim3(narrow(ceil_div(N * F, 4 * 128))), 128, 0, dgate_up, dy, gate_up, N, F);
}

// GELU in GPT-2's form: y = x/2 (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3); 1/2 (1 + tanh(u)) = sigmoid(2 u).
// Used where cuBLASLt cannot fuse it with the product before. In place where y is x.
__global__ void gelu_forward_kernel(floatX* y, const floatX* x, int64_t count) {
    const int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= count) return;
    Float4 value = load4(x + i);
    for (int k = 0; k < 4; k++) {
        const float v = value[k], u2 = 1.5957691216f * (v + 0.044715f * v * v * v);
        value[k] = v / (1.0f + __expf(-u2));
    }
    store4(y + i, value);
}

// dx = dy * GELU'(x) with GELU'(x) = s + x * s * (1 - s) * du2/dx, s = sigmoid(u2).
__global__ void gelu_backward_kernel(floatX* dx, const floatX* dy, const floatX* x, int64_t count) {
    const int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= count) return;
    const Float4 value = load4(x + i);
    Float4 gradient = load4(dy + i);
    for (int k = 0; k < 4; k++) {
        const float v = value[k], u2 = 1.5957691216f * (v + 0.044715f * v * v * v);
        const float s = 1.0f / (1.0f + __expf(-u2)), slope = 1.5957691216f * (1.0f + 3 * 0.044715f * v * v);
        gradient[k] *= s + v * s * (1.0f - s) * slope;
    }
    store4(dx + i, gradient);
}

void gelu_forward(floatX* y, const floatX* x, int64_t count) {
    launch(gelu_forward_kernel, dim3(narrow(ceil_div(count, 4 * 128))), 128, 0, y, x, count);
}

void gelu_backward(floatX* dx, const floatX* dy, const floatX* x, int64_t count) {
    launch(gelu_backward_kernel, dim3(narrow(ceil_div(count, 4 * 128))), 128, 0, dx, dy, x, count);
}

// y = GELU(pre), pre = x W^T + bias; both are kept for the backward pass.
void linear_gelu_forward(floatX* y, floatX* pre, const floatX* x, const floatX* weight, const floatX* bias, int64_t N,
                         int C, int OC) {
    const bool fused = matmul({.d = y, .a = weight, .b = x, .m = OC, .n = N, .k = C, .transpose_a = true, .bias = bias,
                               .pre_gelu = pre});
    if (fused) return;
    linear_forward(pre, x, weight, bias, N, C, OC);
    gelu_forward(y, pre, N * OC);
}

// dpre = (dy W) * GELU'(pre), for the y of GELU(pre) W^T.
void linear_gelu_backward_input(floatX* dpre, const floatX* dy, const floatX* weight, const floatX* pre, int64_t N,
                                int C, int OC) {
    if (matmul({.d = dpre, .a = weight, .b = dy, .m = C, .n = N, .k = OC, .gelu_input = pre})) return;
    linear_backward_input(dpre, dy, weight, N, C, OC);
    gelu_backward(dpre, dpre, pre, N * C);
}

// ---------------------------------------------------------------------------------------------------------------
// 7. Classifier
//
// loss = logsumexp(logits) - logits[target], in nats; dlogits = softmax(logits) - onehot(target), in place.
// One block a token. A pass over the row for the maximum and the sum, online, then one that writes the gradient:
// reads the row twice (the second time mostly from the cache), writes it once.

__global__ void classifier_kernel(floatX* logits, float* losses, const int32_t* targets, int V, int Vp,
                                  bool write_gradient) {
    __shared__ float maxima[warp_size], sums[warp_size];
    const int64_t row = blockIdx.x;
    const int target = targets[row];
    floatX* x = logits + row * Vp;
    if (target < 0) {  // not counted: no loss, no gradient
        if (threadIdx.x == 0) losses[row] = 0;
        for (int i = threadIdx.x * 4; write_gradient && i < Vp; i += blockDim.x * 4) store4(x + i, Float4{});
        return;
    }
    float maximum = -INFINITY, sum = 0;
    for (int i = threadIdx.x * 4; i < V; i += blockDim.x * 4) {
        Float4 value = load4(x + i);
        for (int k = 0; k < 4; k++) value[k] = i + k < V ? value[k] : -INFINITY;
        const float new_maximum = fmaxf(maximum, fmaxf(fmaxf(value[0], value[1]), fmaxf(value[2], value[3])));
        float terms = 0;
        for (int k = 0; k < 4; k++) terms += __expf(value[k] - new_maximum);
        sum = (maximum == new_maximum ? sum : sum * __expf(maximum - new_maximum)) + terms;
        maximum = new_maximum;
    }
    const float warp_maximum = group_max(maximum);
    const float warp_sum = group_sum(sum > 0 ? sum * __expf(maximum - warp_maximum) : sum);  // idle threads have sum 0
    const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size, warps = blockDim.x / warp_size;
    if (lane == 0) {
        maxima[warp] = warp_maximum;
        sums[warp] = warp_sum;
    }
    __syncthreads();
    float row_maximum = maxima[0], row_sum = 0;
    for (int w = 1; w < warps; w++) row_maximum = fmaxf(row_maximum, maxima[w]);
    for (int w = 0; w < warps; w++) row_sum += sums[w] == 0 ? 0 : sums[w] * __expf(maxima[w] - row_maximum);
    if (threadIdx.x == 0) losses[row] = row_maximum + logf(row_sum) - to_float(x[target]);
    if (!write_gradient) return;
    __syncthreads();  // x[target] is read above
    const float inverse = 1.0f / row_sum;
    for (int i = threadIdx.x * 4; i < Vp; i += blockDim.x * 4) {
        Float4 value = load4(x + i);
        for (int k = 0; k < 4; k++) {
            const float probability = i + k < V ? __expf(value[k] - row_maximum) * inverse : 0.0f;
            value[k] = probability - (i + k == target ? 1.0f : 0.0f);
        }
        store4(x + i, value);
    }
}

// losses (N), 0 where the target is -1; logits (N, Vp) become their gradients if write_gradient.
void classifier(floatX* logits, float* losses, const int32_t* targets, int64_t N, int V, int Vp, bool write_gradient) {
    int threads = warp_size;
    while (threads < 1024 && threads * 64 < V) threads *= 2;
    launch(classifier_kernel, dim3(narrow(N)), threads, 0, logits, losses, targets, V, Vp, write_gradient);
}

// sums[0] += losses, sums[1] += counted targets. One warp, in double: exact enough for any number of tokens.
__global__ void sum_losses_kernel(double* sums, const float* losses, const int32_t* targets, int64_t N) {
    double loss = 0, counted = 0;
    for (int64_t i = threadIdx.x; i < N; i += warp_size) {
        loss += losses[i];
        counted += targets[i] >= 0;
    }
    for (int offset = warp_size / 2; offset > 0; offset /= 2) {
        loss += __shfl_xor_sync(full_warp, loss, offset);
        counted += __shfl_xor_sync(full_warp, counted, offset);
    }
    if (threadIdx.x == 0) {
        sums[0] += loss;
        sums[1] += counted;
    }
}

void sum_losses(double* sums, const float* losses, const int32_t* targets, int64_t N) {
    launch(sum_losses_kernel, dim3(1), warp_size, 0, sums, losses, targets, N);
}

// ---------------------------------------------------------------------------------------------------------------
// 8. Optimizer

// What a step knows of itself, on the device: no kernel waits for the host to read it.
struct StepState {
    double sums[2];       // loss in nats and counted tokens, over all micro-batches and ranks
    float gradient_norm;  // of the mean gradient, before clipping
    float factor;         // gradient sums to clipped mean gradient
    int update;           // number of updates made, this one included
    int applied;          // 0: loss or norm was not finite, the update is skipped
};

constexpr int norm_blocks = 256;

// partial[block] = sum of squares of the block's share. Reads the gradients once.
__global__ void square_sum_kernel(double* partial, const float* gradients, int64_t count) {
    __shared__ double sums[8];
    // Rows of 4 in fp32, rows in double: neither overflow of the count nor cancellation to fear.
    double sum = 0;
    const int64_t stride = (int64_t)gridDim.x * blockDim.x * 4;
    for (int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 4; i < count; i += stride) {
        const Float4 g = load4(gradients + i);
        sum += (double)(g[0] * g[0] + g[1] * g[1] + g[2] * g[2] + g[3] * g[3]);
    }
    for (int offset = warp_size / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(full_warp, sum, offset);
    if (threadIdx.x % warp_size == 0) sums[threadIdx.x / warp_size] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int warp = 1; warp < (int)blockDim.x / warp_size; warp++) sum += sums[warp];
    partial[blockIdx.x] = sum;
}

// Mean gradient's norm, clipping factor min(1, clip / norm), and whether this update happens at all.
__global__ void prepare_update_kernel(StepState* state, const double* partial, int blocks, float clip) {
    double sum = 0;
    for (int i = 0; i < blocks; i++) sum += partial[i];
    const double tokens = fmax(state->sums[1], 1.0);
    const float norm = (float)(sqrt(sum) / tokens);
    state->gradient_norm = norm;
    state->applied = isfinite(norm) && isfinite(state->sums[0]);
    state->update += state->applied;
    const double clipping = clip > 0 && norm > clip ? clip / norm : 1.0;
    state->factor = (float)(clipping / tokens);
}

struct AdamW {
    float lr = 1e-3f, beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f, weight_decay = 0.1f;
};

// With g the clipped mean gradient and t the number of the update (Loshchilov and Hutter, arXiv 1711.05101):
//   m = beta1 m + (1 - beta1) g     v = beta2 v + (1 - beta2) g^2
//   p -= lr (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + decay p)
// Reads p, g, m, v, writes p, m, v: 28 bytes a parameter, and 2 more for the bf16 working copy.
__global__ void adamw_kernel(float* masters, floatX* weights, const float* gradients, float* first, float* second,
                             const StepState* state, AdamW adam, float decay, int64_t count) {
    const int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= count || !state->applied) return;
    const float correction1 = 1.0f / (1.0f - powf(adam.beta1, (float)state->update));
    const float correction2 = 1.0f / (1.0f - powf(adam.beta2, (float)state->update));
    const float factor = state->factor;
    Float4 p = load4(masters + i), m = load4(first + i), v = load4(second + i);
    const Float4 g_sum = load4(gradients + i);
    for (int k = 0; k < 4; k++) {
        const float g = factor * g_sum[k];
        m[k] = adam.beta1 * m[k] + (1.0f - adam.beta1) * g;
        v[k] = adam.beta2 * v[k] + (1.0f - adam.beta2) * g * g;
        p[k] -= adam.lr * (m[k] * correction1 / (sqrtf(v[k] * correction2) + adam.eps) + decay * p[k]);
    }
    store4(first + i, m);
    store4(second + i, v);
    store4(masters + i, p);
    if constexpr (!is_fp32) store4(weights + i, p);
}

// weights = masters, rounded.
__global__ void round_weights_kernel(floatX* weights, const float* masters, int64_t count) {
    const int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i < count) store4(weights + i, load4(masters + i));
}

// ---------------------------------------------------------------------------------------------------------------
// 9. Model

// Hands out device memory. Laid out twice: once without memory, to know the sizes, then for real. DEBUG builds give
// each tensor its own allocation, so that AddressSanitizer sees a kernel that leaves its tensor.
struct Arena {
    char* base = nullptr;
    size_t used = 0;
    bool sizing = true;
    std::vector<std::pair<std::string, size_t>> purposes;  // for the memory table
    std::vector<void*> allocations;

    template <class T>
    T* take(const char* purpose, int64_t count) {
        constexpr size_t alignment = 256;
        const size_t bytes = round_up(std::max<int64_t>(count, 1) * sizeof(T), alignment);
        const size_t offset = used;
        used += bytes;
        if (sizing) {
            if (purposes.empty() || purposes.back().first != purpose) purposes.push_back({purpose, 0});
            purposes.back().second += bytes;
            return nullptr;
        }
#ifdef DEBUG
        (void)offset;
        void* tensor = nullptr;
        CHECK_CUDA(cudaMalloc(&tensor, std::max<int64_t>(count, 1) * sizeof(T)));
        allocations.push_back(tensor);
        return (T*)tensor;
#else
        return reinterpret_cast<T*>(base + offset);
#endif
    }

    void allocate() {
        sizing = false;
#ifndef DEBUG
        CHECK_CUDA(cudaMalloc(&base, used));
        allocations.push_back(base);
#endif
        used = 0;
    }

    void release() {
        for (void* allocation : allocations) cudaFree(allocation);
        allocations.clear();
    }
};

struct NormMoments {
    float *mean, *rstd;  // (N)
};

// Between two sublayers lies a junction: the residual sum, and the norms before and behind it. Junction k stands before
// sublayer k; junction 2 L before the head.
struct Junction {
    float* sum;      // (N, C) z = alpha * x + F, the embedding at junction 0
    float* stream;   // (N, C) x, the residual stream from here on: the sum, or its norm
    floatX* input;   // (N, C) what sublayer k reads
    floatX* output;  // (N, C) F of the sublayer before, kept only where a norm stands behind it
    NormMoments after, before;
};

struct Activations {
    std::vector<Junction> junctions;      // 2 L + 1
    std::vector<floatX*> qkv, attention;  // per block (N, qkv_channels), (N, NH * HS)
    std::vector<float*> lse;              // per block (B, NH, T)
    std::vector<floatX*> up, hidden;      // per block (N, up_channels) before and (N, Fp) after the nonlinearity
    // Shared by all blocks.
    floatX* sublayer_output;  // (N, C)
    floatX* normed_output;    // (N, C) norm of a sublayer's output, on its way to the sum
    float* dstream;           // (N, C) gradient of the residual stream
    floatX* doutput;          // (N, C) gradient of a sublayer's output
    floatX* dinput;           // (N, C) gradient of a sublayer's input
    floatX *dqkv, *dattention, *dup, *dhidden;
    float* delta;    // (B, NH, T)
    float* partial;  // sums over rows on their way to a gradient
    floatX* logits;  // (chunk, Vp)
    float* losses;   // (N)
    int32_t *inputs, *targets, *token_rows, *token_starts, *token_ids;
    float2* rotations;  // (T, HS / 2)
};

struct Model {
    ModelConfig config;
    ParameterTable table;
    int B = 0, T = 0;      // the largest batch
    int chunk = 0;         // tokens whose logits exist at the same time
    bool training = true;  // false: no memory for the backward pass and the optimizer
    Arena arena;
    float* masters = nullptr;    // fp32 parameters
    floatX* weights = nullptr;   // what the kernels read; the masters themselves in fp32 builds
    float* gradients = nullptr;  // sums over the tokens of a step
    float *first_moment = nullptr, *second_moment = nullptr;
    double* norm_partial = nullptr;
    StepState* state = nullptr;
    Activations acts = {};
    TokenRows token_rows;
    std::function<void(int)> on_block_gradients;  // called when block b of table.blocks has all its gradients

    ~Model() { arena.release(); }
};

BlockPolicy sublayer_policy(const Model& model, int k) { return block_policy(k / 2 + 1, model.config.L); }

void lay_out(Model& model) {
    const ModelConfig& c = model.config;
    const int64_t N = (int64_t)model.B * model.T, size = model.table.size;
    const int L = c.L, q_channels = c.NH * c.HS;
    Arena& arena = model.arena;
    Activations& a = model.acts;
    model.masters = arena.take<float>("parameters (fp32 masters)", size);
    model.weights = is_fp32 ? (floatX*)model.masters : arena.take<floatX>("parameters (working copy)", size);
    if (model.training) {
        model.gradients = arena.take<float>("gradients", size);
        model.first_moment = arena.take<float>("AdamW moments", size);
        model.second_moment = arena.take<float>("AdamW moments", size);
    }
    const char* kept = "activations";
    const auto moments = [&](bool needed) {
        NormMoments m = {nullptr, nullptr};
        if (!needed) return m;
        if (c.biased()) m.mean = arena.take<float>(kept, N);
        m.rstd = arena.take<float>(kept, N);
        return m;
    };
    a.junctions.assign(2 * L + 1, {});
    for (int k = 0; k <= 2 * L; k++) {
        Junction& j = a.junctions[k];
        const bool head = k == 2 * L, first = k == 0;
        const BlockPolicy before = first ? BlockPolicy() : sublayer_policy(model, k - 1);
        const bool norm_before = head || sublayer_policy(model, k).norm_before;
        j.sum = j.stream = arena.take<float>(kept, N * c.C);
        if (before.norm_after_sublayer) j.output = arena.take<floatX>(kept, N * c.C);
        if (before.norm_after_sum) j.stream = arena.take<float>(kept, N * c.C);
        j.input = is_fp32 && !norm_before ? (floatX*)j.stream : arena.take<floatX>(kept, N * c.C);
        j.after = moments(before.norm_after_sublayer || before.norm_after_sum);
        j.before = moments(norm_before);
    }
    a.qkv.assign(L, nullptr), a.attention = a.up = a.hidden = a.qkv;
    a.lse.assign(L, nullptr);
    for (int l = 0; l < L; l++) {
        a.qkv[l] = arena.take<floatX>(kept, N * c.qkv_channels());
        a.attention[l] = arena.take<floatX>(kept, N * q_channels);
        a.lse[l] = arena.take<float>(kept, N * c.NH);
        a.up[l] = arena.take<floatX>(kept, N * c.up_channels());
        a.hidden[l] = arena.take<floatX>(kept, N * c.Fp());
    }
    a.sublayer_output = arena.take<floatX>("scratch", N * c.C);
    a.normed_output = arena.take<floatX>("scratch", N * c.C);
    a.losses = arena.take<float>("scratch", N);
    a.inputs = arena.take<int32_t>("scratch", N);
    a.targets = arena.take<int32_t>("scratch", N);
    a.rotations = arena.take<float2>("scratch", (int64_t)model.T * c.HS / 2);
    model.norm_partial = arena.take<double>("scratch", norm_blocks);
    model.state = arena.take<StepState>("scratch", 1);
    if (model.training) {
        a.dstream = arena.take<float>("scratch", N * c.C);
        a.doutput = is_fp32 ? (floatX*)a.dstream : arena.take<floatX>("scratch", N * c.C);
        a.dinput = arena.take<floatX>("scratch", N * c.C);
        a.dqkv = arena.take<floatX>("scratch", N * c.qkv_channels());
        a.dattention = arena.take<floatX>("scratch", N * q_channels);
        a.dup = arena.take<floatX>("scratch", N * c.up_channels());
        a.dhidden = arena.take<floatX>("scratch", N * c.Fp());
        a.delta = arena.take<float>("scratch", N * c.NH);
        const int widest = std::max({c.C, c.qkv_channels(), c.up_channels()});
        a.partial = arena.take<float>("scratch", std::max(norm_partial_size(c.C), bias_partial_size(N, widest)));
        a.token_rows = arena.take<int32_t>("scratch", N);
        a.token_starts = arena.take<int32_t>("scratch", N + 1);
        a.token_ids = arena.take<int32_t>("scratch", N);
    }
    a.logits = arena.take<floatX>("logits", (int64_t)model.chunk * c.Vp());
}

// Plans `model` for batches of up to (B, T): afterwards arena.purposes says what allocate_model will take.
void plan_model(Model& model, const ModelConfig& config, Init init, int B, int T, bool training = true) {
    check_config(config);
    model.config = config;
    model.table = make_parameter_table(config, init);
    model.B = B, model.T = T;
    model.training = training;
    // Logits of 64 MB at a time: large enough for full speed of the products, small beside everything else.
    const int64_t N = (int64_t)B * T;
    model.chunk = (int)std::clamp<int64_t>((64 << 20) / (config.Vp() * (int64_t)sizeof(floatX)), std::min<int64_t>(N, 128), N);
    lay_out(model);
}

// Takes the memory; the parameters are not yet set.
void allocate_model(Model& model) {
    const ModelConfig& config = model.config;
    model.arena.allocate();
    lay_out(model);
    const std::vector<float2> rotations = make_rotations(model.T, config.HS, config.rope_theta);
    CHECK_CUDA(cudaMemcpy(model.acts.rotations, rotations.data(), rotations.size() * sizeof(float2),
                          cudaMemcpyHostToDevice));
    CHECK_CUDA(cudaMemset(model.state, 0, sizeof(StepState)));
    if (!model.training) return;
    CHECK_CUDA(cudaMemset(model.first_moment, 0, model.table.size * sizeof(float)));
    CHECK_CUDA(cudaMemset(model.second_moment, 0, model.table.size * sizeof(float)));
}

// --- Forward ---

const float* parameter(const Model& model, int64_t offset) { return offset < 0 ? nullptr : model.masters + offset; }
const floatX* weight(const Model& model, int64_t offset) { return offset < 0 ? nullptr : model.weights + offset; }
float* gradient(const Model& model, int64_t offset) { return offset < 0 ? nullptr : model.gradients + offset; }

// The arguments of a norm that do not depend on what it reads.
NormForward norm_of(const Model& model, const NormOffsets& norm, const NormMoments& moments, float scale, int64_t N) {
    return {.mean = moments.mean, .rstd = moments.rstd, .gain = parameter(model, norm.gain),
            .bias = parameter(model, norm.bias), .scale = scale, .eps = model.config.eps, .N = N, .C = model.config.C};
}

// Where sublayer k writes its output: kept when a norm stands behind it, for the backward pass of that norm.
floatX* sublayer_output(Model& model, int k) {
    floatX* kept = model.acts.junctions[k + 1].output;
    return kept ? kept : model.acts.sublayer_output;
}

// Junction k: from the residual stream before sublayer k - 1 and that sublayer's output to the stream from there on and
// the input of sublayer k. The sum is always part of the norm that follows it.
void junction_forward(Model& model, int k, int64_t N) {
    Junction& j = model.acts.junctions[k];
    const bool head = k == 2 * model.config.L;
    const NormOffsets& before = head ? model.table.final_norm : model.table.sublayers[k].before;
    const float scale = head ? 1 : sublayer_policy(model, k).scale;
    const bool norm_before = before.gain >= 0;
    bool summed = k == 0;  // the embedding is already in j.sum
    const float* stream = summed ? j.sum : model.acts.junctions[k - 1].stream;
    const floatX* output = summed ? nullptr : sublayer_output(model, k - 1);
    const BlockPolicy policy = summed ? BlockPolicy() : sublayer_policy(model, k - 1);

    if (policy.norm_after_sublayer) {
        NormForward norm = norm_of(model, model.table.sublayers[k - 1].after, j.after, 1, N);
        norm.f = output;
        norm.y = model.acts.normed_output;
        norm_forward(norm);
        output = model.acts.normed_output;
    }
    if (policy.norm_after_sum) {
        NormForward norm = norm_of(model, model.table.sublayers[k - 1].after, j.after, 1, N);
        norm.x = stream, norm.alpha = policy.residual, norm.f = output;
        norm.z = j.sum;
        norm.y32 = j.stream;
        norm.y = is_fp32 || norm_before ? nullptr : j.input;
        norm_forward(norm);
        stream = j.stream;
        summed = true;
    }
    if (norm_before) {
        NormForward norm = norm_of(model, before, j.before, scale, N);
        norm.x = stream;
        norm.y = j.input;
        if (!summed) norm.alpha = policy.residual, norm.f = output, norm.z = j.sum;
        norm_forward(norm);
    }
}

void attention_sublayer_forward(Model& model, int l, int B, int T) {
    const ModelConfig& c = model.config;
    const int64_t N = (int64_t)B * T;
    const SublayerOffsets& w = model.table.sublayers[2 * l - 2];
    Activations& a = model.acts;
    floatX *qkv = a.qkv[l - 1], *attention = a.attention[l - 1];
    linear_forward(qkv, a.junctions[2 * l - 2].input, weight(model, w.in), weight(model, w.in_bias), N, c.C,
                   c.qkv_channels());
    if (c.llama()) rope(qkv, a.rotations, B, T, c.NH, c.NKV, c.HS, 1);
    attention_forward(attention, a.lse[l - 1], qkv, B, T, c.NH, c.NKV, c.HS);
    linear_forward(sublayer_output(model, 2 * l - 2), attention, weight(model, w.out), weight(model, w.out_bias), N,
                   c.NH * c.HS, c.C);
}

void mlp_sublayer_forward(Model& model, int l, int64_t N) {
    const ModelConfig& c = model.config;
    const SublayerOffsets& w = model.table.sublayers[2 * l - 1];
    Activations& a = model.acts;
    const floatX* input = a.junctions[2 * l - 1].input;
    floatX *up = a.up[l - 1], *hidden = a.hidden[l - 1];
    if (c.llama()) {
        linear_forward(up, input, weight(model, w.in), nullptr, N, c.C, 2 * c.Fp());
        swiglu_forward(hidden, up, N, c.Fp());
    } else {
        linear_gelu_forward(hidden, up, input, weight(model, w.in), weight(model, w.in_bias), N, c.C, c.Fp());
    }
    linear_forward(sublayer_output(model, 2 * l - 1), hidden, weight(model, w.out), weight(model, w.out_bias), N, c.Fp(),
                   c.C);
}

// From tokens in acts.inputs to the head's input in the last junction.
void blocks_forward(Model& model, int B, int T) {
    const ModelConfig& c = model.config;
    const int64_t N = (int64_t)B * T;
    Activations& a = model.acts;
    Junction& first = a.junctions[0];
    floatX* operand = !is_fp32 && model.table.sublayers[0].before.gain < 0 ? first.input : nullptr;
    embedding_forward(first.sum, operand, a.inputs, weight(model, model.table.embedding),
                      weight(model, model.table.positions), N, T, c.C);
    junction_forward(model, 0, N);
    for (int l = 1; l <= c.L; l++) {
        attention_sublayer_forward(model, l, B, T);
        junction_forward(model, 2 * l - 1, N);
        mlp_sublayer_forward(model, l, N);
        junction_forward(model, 2 * l, N);
    }
}

// Losses of acts.targets into acts.losses and state.sums, chunk after chunk of logits. With `backward` the gradients of
// the head and of its input follow at once, before a chunk's logits are overwritten.
void head(Model& model, int64_t N, bool backward) {
    const ModelConfig& c = model.config;
    Activations& a = model.acts;
    const floatX* input = a.junctions[2 * c.L].input;
    const floatX* w = weight(model, model.table.head);
    for (int64_t first = 0; first < N; first += model.chunk) {
        const int64_t rows = std::min<int64_t>(model.chunk, N - first);
        const floatX* x = input + first * c.C;
        linear_forward(a.logits, x, w, nullptr, rows, c.C, c.Vp());
        classifier(a.logits, a.losses + first, a.targets + first, rows, c.V, c.Vp(), backward);
        if (!backward) continue;
        linear_backward_weight(gradient(model, model.table.head), nullptr, x, a.logits, nullptr, rows, c.C, c.Vp());
        linear_backward_input(a.dinput + first * c.C, a.logits, w, rows, c.C, c.Vp());
    }
    sum_losses(model.state->sums, a.losses, a.targets, N);
}

// --- Backward ---

NormBackward norm_gradient_of(const Model& model, const NormOffsets& norm, const NormMoments& moments, float scale,
                              int64_t N) {
    return {.mean = moments.mean, .rstd = moments.rstd, .gain = parameter(model, norm.gain), .scale = scale,
            .dgain = gradient(model, norm.gain), .dbias = gradient(model, norm.bias),
            .partial = model.acts.partial, .N = N, .C = model.config.C};
}

// dstream = alpha * dstream + dinput: where sublayer 0 reads the embedding without a norm.
__global__ void add_gradients_kernel(float* dstream, const floatX* dinput, float alpha, int64_t count) {
    const int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= count) return;
    Float4 sum = load4(dstream + i);
    const Float4 dx = load4(dinput + i);
    for (int k = 0; k < 4; k++) sum[k] = alpha * sum[k] + dx[k];
    store4(dstream + i, sum);
}

// Junction k backwards: from dinput (gradient of sublayer k's input) and dstream (gradient of the sum after sublayer k)
// to dstream (gradient of this junction's sum) and doutput (gradient of sublayer k - 1's output).
void junction_backward(Model& model, int k, int64_t N) {
    Activations& a = model.acts;
    Junction& j = a.junctions[k];
    const bool head = k == 2 * model.config.L;
    const NormOffsets& before = head ? model.table.final_norm : model.table.sublayers[k].before;
    const BlockPolicy next = head ? BlockPolicy() : sublayer_policy(model, k);
    const BlockPolicy policy = k == 0 ? BlockPolicy() : sublayer_policy(model, k - 1);
    const float* dstream = head ? nullptr : a.dstream;  // nothing reads the stream behind the head's norm
    // In fp32 builds doutput is dstream itself.
    floatX* doutput = is_fp32 || k == 0 || policy.norm_after_sublayer ? nullptr : a.doutput;

    const bool norm_before = before.gain >= 0;
    if (norm_before) {
        NormBackward norm = norm_gradient_of(model, before, j.before, next.scale, N);
        norm.dy = a.dinput;
        norm.dres = dstream, norm.dres_scale = next.residual;
        norm.z = j.stream;
        norm.dz = a.dstream;
        norm.df = policy.norm_after_sum ? nullptr : doutput;
        norm_backward(norm);
    }
    if (policy.norm_after_sum) {
        NormBackward norm = norm_gradient_of(model, model.table.sublayers[k - 1].after, j.after, 1, N);
        norm.dy32 = a.dstream;
        if (!norm_before) norm.dy = a.dinput, norm.dy_scale = next.residual;
        norm.z = j.sum;
        norm.dz = a.dstream;
        norm.df = doutput;
        norm_backward(norm);
    }
    if (!norm_before && k == 0) {
        launch(add_gradients_kernel, dim3(narrow(ceil_div(N * model.config.C, 4 * 128))), 128, 0, a.dstream,
               (const floatX*)a.dinput, next.residual, N * model.config.C);
    }
    if (policy.norm_after_sublayer) {
        NormBackward norm = norm_gradient_of(model, model.table.sublayers[k - 1].after, j.after, 1, N);
        norm.dy32 = a.dstream;
        norm.f = j.output;
        norm.df = a.doutput;
        norm_backward(norm);
    }
}

void attention_sublayer_backward(Model& model, int l, int B, int T) {
    const ModelConfig& c = model.config;
    const int64_t N = (int64_t)B * T;
    const SublayerOffsets& w = model.table.sublayers[2 * l - 2];
    Activations& a = model.acts;
    const floatX *qkv = a.qkv[l - 1], *attention = a.attention[l - 1];
    linear_backward_weight(gradient(model, w.out), gradient(model, w.out_bias), attention, a.doutput, a.partial, N,
                           c.NH * c.HS, c.C);
    linear_backward_input(a.dattention, a.doutput, weight(model, w.out), N, c.NH * c.HS, c.C);
    attention_backward(a.dqkv, a.delta, a.dattention, attention, a.lse[l - 1], qkv, B, T, c.NH, c.NKV, c.HS);
    if (c.llama()) rope(a.dqkv, a.rotations, B, T, c.NH, c.NKV, c.HS, -1);
    linear_backward_weight(gradient(model, w.in), gradient(model, w.in_bias), a.junctions[2 * l - 2].input, a.dqkv,
                           a.partial, N, c.C, c.qkv_channels());
    linear_backward_input(a.dinput, a.dqkv, weight(model, w.in), N, c.C, c.qkv_channels());
}

void mlp_sublayer_backward(Model& model, int l, int64_t N) {
    const ModelConfig& c = model.config;
    const SublayerOffsets& w = model.table.sublayers[2 * l - 1];
    Activations& a = model.acts;
    const floatX *up = a.up[l - 1], *hidden = a.hidden[l - 1];
    linear_backward_weight(gradient(model, w.out), gradient(model, w.out_bias), hidden, a.doutput, a.partial, N, c.Fp(),
                           c.C);
    if (c.llama()) {
        linear_backward_input(a.dhidden, a.doutput, weight(model, w.out), N, c.Fp(), c.C);
        swiglu_backward(a.dup, a.dhidden, up, N, c.Fp());
    } else {
        linear_gelu_backward_input(a.dup, a.doutput, weight(model, w.out), up, N, c.Fp(), c.C);
    }
    linear_backward_weight(gradient(model, w.in), gradient(model, w.in_bias), a.junctions[2 * l - 1].input, a.dup,
                           a.partial, N, c.C, c.up_channels());
    linear_backward_input(a.dinput, a.dup, weight(model, w.in), N, c.C, c.up_channels());
}

// From dinput of the head to all gradients.
void blocks_backward(Model& model, int B, int T, bool last_micro_batch) {
    const ModelConfig& c = model.config;
    const int64_t N = (int64_t)B * T;
    Activations& a = model.acts;
    const auto finished = [&](int block) {
        if (last_micro_batch && model.on_block_gradients) model.on_block_gradients(block);
    };
    for (int l = c.L; l >= 1; l--) {
        junction_backward(model, 2 * l, N);
        if (l == c.L) finished(c.L + 1);
        else finished(l + 1);
        mlp_sublayer_backward(model, l, N);
        junction_backward(model, 2 * l - 1, N);
        attention_sublayer_backward(model, l, B, T);
    }
    junction_backward(model, 0, N);
    finished(1);
    embedding_backward(gradient(model, model.table.embedding), gradient(model, model.table.positions), a.dstream,
                       a.token_rows, a.token_starts, a.token_ids, (int)model.token_rows.tokens.size(), B, T, c.C);
    finished(0);
}

// --- The steps of training, as the main loop and the tests call them ---

template <class T>
void upload(T* device, const T* host, int64_t count) {
    CHECK_CUDA(cudaMemcpyAsync(device, host, count * sizeof(T), cudaMemcpyHostToDevice, main_stream));
}

void upload_batch(Model& model, const int32_t* inputs, const int32_t* targets, int64_t N) {
    upload(model.acts.inputs, inputs, N);
    upload(model.acts.targets, targets, N);
}

// Clears gradients, loss and count before the first micro-batch of a step.
void begin_step(Model& model) {
    CHECK_CUDA(cudaMemsetAsync(model.gradients, 0, model.table.size * sizeof(float), main_stream));
    CHECK_CUDA(cudaMemsetAsync(model.state, 0, sizeof(StepState::sums), main_stream));
}

// Adds the loss (nats, summed) and the gradients of one micro-batch (B, T).
void forward_backward(Model& model, const int32_t* inputs, const int32_t* targets, int B, int T,
                      bool last_micro_batch = true) {
    const int64_t N = (int64_t)B * T;
    upload_batch(model, inputs, targets, N);
    blocks_forward(model, B, T);
    head(model, N, true);
    TokenRows& rows = model.token_rows;
    rows.sort(inputs, N);
    upload(model.acts.token_rows, rows.rows.data(), N);
    upload(model.acts.token_starts, rows.starts.data(), (int64_t)rows.starts.size());
    upload(model.acts.token_ids, rows.tokens.data(), (int64_t)rows.tokens.size());
    blocks_backward(model, B, T, last_micro_batch);
}

// Adds the loss of one batch without gradients.
void forward_loss(Model& model, const int32_t* inputs, const int32_t* targets, int B, int T) {
    upload_batch(model, inputs, targets, (int64_t)B * T);
    blocks_forward(model, B, T);
    head(model, (int64_t)B * T, false);
}

// Norm, clipping, AdamW; or nothing, where loss or norm is not finite.
void update(Model& model, const AdamW& adam, float clip) {
    launch(square_sum_kernel, dim3(norm_blocks), 256, 0, model.norm_partial, (const float*)model.gradients,
           model.table.size);
    launch(prepare_update_kernel, dim3(1), 1, 0, model.state, (const double*)model.norm_partial, norm_blocks, clip);
    for (const Range& range : model.table.decay_ranges()) {
        const int64_t count = range.end - range.begin, at = range.begin;
        launch(adamw_kernel, dim3(narrow(ceil_div(count, 4 * 256))), 256, 0, model.masters + at, model.weights + at,
               (const float*)model.gradients + at, model.first_moment + at, model.second_moment + at,
               (const StepState*)model.state, adam, range.decayed ? adam.weight_decay : 0.0f, count);
    }
}

// After the masters were set by anything but update().
void round_weights(Model& model) {
    if constexpr (!is_fp32) {
        launch(round_weights_kernel, dim3(narrow(ceil_div(model.table.size, 4 * 256))), 256, 0, model.weights,
               (const float*)model.masters, model.table.size);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// 11. Checkpoints

// Calls use(name, shape, values) for each tensor of Hugging Face's layout, with the values of `flat` (parameters,
// gradients or moments, laid out as the table says): stacked parts joined, padding gone, Conv1D turned.
void export_tensors(
    const Model& model, const float* flat,
    const std::function<void(const std::string&, const std::vector<int64_t>&, std::vector<float>)>& use) {
    const std::vector<Parameter>& parameters = model.table.parameters;
    for (size_t begin = 0, end; begin < parameters.size(); begin = end) {
        for (end = begin; end < parameters.size() && parameters[end].name == parameters[begin].name;) end++;
        const Parameter& p = parameters[begin];
        std::vector<float> tensor;
        int64_t rows = 0;
        for (size_t part = begin; part < end; part++) {
            const Parameter& q = parameters[part];
            const size_t at = tensor.size();
            tensor.resize(at + q.count());
            CHECK_CUDA(cudaMemcpy2D(&tensor[at], q.cols * sizeof(float), flat + q.offset, q.padded_cols * sizeof(float),
                                    q.cols * sizeof(float), q.rows, cudaMemcpyDeviceToHost));
            rows += q.matrix ? q.rows : q.cols;
        }
        std::vector<int64_t> shape = p.matrix ? std::vector<int64_t>{rows, p.cols} : std::vector<int64_t>{rows};
        if (p.transposed) {
            std::vector<float> turned(tensor.size());
            for (int64_t r = 0; r < rows; r++) {
                for (int64_t c = 0; c < p.cols; c++) turned[c * rows + r] = tensor[r * p.cols + c];
            }
            tensor.swap(turned);
            std::swap(shape[0], shape[1]);
        }
        use(p.name, shape, std::move(tensor));
    }
}

// The reverse: fills `flat` from read(name).
void import_tensors(Model& model, float* flat, const std::function<std::vector<float>(const std::string&)>& read) {
    const std::vector<Parameter>& parameters = model.table.parameters;
    for (size_t begin = 0, end; begin < parameters.size(); begin = end) {
        int64_t count = 0, rows = 0;
        for (end = begin; end < parameters.size() && parameters[end].name == parameters[begin].name; end++) {
            count += parameters[end].count();
            rows += parameters[end].rows;
        }
        const Parameter& p = parameters[begin];
        std::vector<float> tensor = read(p.name);
        if ((int64_t)tensor.size() != count) {
            throw Error(text("%s: %lld numbers expected, %zu found: the model's configuration does not fit",
                             p.name.c_str(), (long long)count, tensor.size()));
        }
        if (p.transposed) {
            std::vector<float> turned(tensor.size());
            for (int64_t r = 0; r < rows; r++) {
                for (int64_t c = 0; c < p.cols; c++) turned[r * p.cols + c] = tensor[c * rows + r];
            }
            tensor.swap(turned);
        }
        for (size_t part = begin, at = 0; part < end; at += parameters[part].count(), part++) {
            const Parameter& q = parameters[part];
            CHECK_CUDA(cudaMemcpy2D(flat + q.offset, q.padded_cols * sizeof(float), &tensor[at], q.cols * sizeof(float),
                                    q.cols * sizeof(float), q.rows, cudaMemcpyHostToDevice));
        }
    }
}
