// A GPT trainer in one file: LLaMA- and GPT-2-style transformers, written to show and to cure the curse of depth.
//
// Read it from top to bottom; each section needs only those above it. Leaves, which do not know Model, are included
// before the first section; chapters stand in files of their own and are included in their place.
//
// The leaves
//       trainer/device.cuh         number types of the build, launches, what the lanes of a warp do together
//       trainer/tensor_core.cuh    the tensor core's instructions, for attention
//       trainer/matmul.cuh         products by cuBLASLt
//       trainer/world.h            the processes: a launcher starts them, MPI joins them, one alone needs neither
//       trainer/cluster.cuh        the ranks: NCCL sums over them
//       lns_layers.cuh             the norms: what each NORM does around a sublayer of block l; forward, backward
//       trainer/norm.cpp           which NORM this program is: the only file that is compiled for each
//       trainer/model_config.h     dimensions of a model, what its family is made of, presets
//       trainer/settings.h         every flag in one table, defaults, the learning rate's schedule; command_line.h
//       trainer/watchdog.h         ends a run that hangs
//       dataloader.h, tokenizer/   token shards streamed from disk; text to tokens and back
//       trainer/run_record.h       what a run is made of: compared by --resume, and among the ranks by agreement.h
//       trainer/                   files, tensor files, checkpoint folders, config.json, log.jsonl, random numbers
// The parts of a model
//    1. Configuration              what this program was compiled for
//    2. Parameters                 one table generates allocation, initialization, checkpoint names and weight decay
//    3. Linear layers              y = x W^T + bias and its gradients
//    4. Embedding                  token and position vectors, rotary positions, norms of query and key
//    5. Attention                  flash attention, forward and backward: in fp32, and in bf16 on tensor cores
//    6. MLP                        SwiGLU, GELU
//    7. Classifier                 softmax cross entropy and its gradient, in place on the logits
//    8. Optimizer                  global gradient norm, clipping, AdamW
// The model
//    9. Model                      the plan, memory, forward, backward, update
//   10. Data parallelism           a block's gradients are summed while those before it are computed
//   11. Checkpoints                Hugging Face folders, exact resume: trainer/checkpoints.cuh
//   12. Probes                     how deep blocks behave: trainer/probes.cuh
//   13. Cost                       operations, memory, the device's speed, --dry-run: trainer/cost.cuh
//   14. Generation, questions      text that the model writes, tasks that it is asked: trainer/{generate,evaluate}.cuh
// The run
//   15. Step                       data, micro-batches, the update, the report that follows it
//   16. Between steps              validation, probes, questions, samples, checkpoints
//   17. Preparation                data, memory, the run's folder, --resume: trainer/prepare.cuh
//   18. Training                   main loop, what ends it, main
//
// Letters, everywhere: B sequences, T tokens a sequence, N = B * T tokens, L blocks, C channels (hidden size),
// F channels inside the MLP, NH query heads, NKV key/value heads, HS channels a head, V vocabulary, Vp V padded.
// Tensors are row-major, and a weight W is (out, in). Backward functions add to the gradients of parameters (in a
// step's first micro-batch they overwrite them: += is = where `accumulate` is false) and overwrite the gradients of
// activations. Gradients of parameters are sums over tokens; the optimizer divides.
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "dataloader.h"
#include "lns_layers.cuh"
#include "tokenizer/bpe.h"
#include "tokenizer/conversation.h"
#include "trainer/agreement.h"
#include "trainer/basics.h"
#include "trainer/checkpoint_folder.h"
#include "trainer/cluster.cuh"
#include "trainer/command_line.h"
#include "trainer/device.cuh"
#include "trainer/folder_lock.h"
#include "trainer/huggingface.h"
#include "trainer/matmul.cuh"
#include "trainer/model_config.h"
#include "trainer/modeling_norms.h"
#include "trainer/random.h"
#include "trainer/run_log.h"
#include "trainer/run_record.h"
#include "trainer/safetensors.h"
#include "trainer/sampling.h"
#include "trainer/settings.h"
#include "trainer/tasks.h"
#include "trainer/tensor_core.cuh"
#include "trainer/watchdog.h"

// ---------------------------------------------------------------------------------------------------------------
// 1. Configuration

const Build build = [] {
    const NormPolicy norm = norm_policy(compiled_norm);
    const bool own_init = norm.around(Sublayer::ATTENTION, 1, 1).xavier_gain > 0;
    const bool has_scale = norm.around(Sublayer::ATTENTION, 2, 2).scale != 1;
    return Build{norm.name,  precision_name, device_kind, is_cpu ? "tiny" : "llama-130m",
                 norm.plain, own_init,       has_scale};
}();

// ---------------------------------------------------------------------------------------------------------------
// 2. Parameters
//
// All parameters stand in one flat buffer: embeddings; block 1 .. L; final norm and head. Gradients and optimizer
// state use the same offsets. Inside a block the matrices come first, then the vectors, so that a block's gradients
// are one range, and weight decay (matrices only) is one range a block. Query, key and value stand together and act as
// one matrix, as do gate and up.

struct Parameter {
    std::string name;            // as Hugging Face has it; neighbours of one name are stacked to one tensor there
    int64_t rows = 1, cols = 1;  // the tensor's own shape; vectors have rows = 1
    int64_t padded_rows = 1, padded_cols = 1;
    bool matrix = false;      // two dimensions: decayed
    bool transposed = false;  // on disk (in, out): GPT-2's Conv1D
    float fill = 0;           // initial value, where std is 0
    float std = 0;            // standard deviation of the initial normal distribution
    float norm_scale = 1;     // of gain and bias of a norm: its output is multiplied by this
    int output_of = -1;       // the sublayer, 0 .. 2 L - 1, whose last matrix or bias this is
    int64_t offset = 0;

    int64_t count() const { return rows * cols; }
    int64_t padded_count() const { return padded_rows * padded_cols; }
};

// Where a norm's parameters are; -1 where there is no such norm, or no bias.
struct NormOffsets {
    int64_t gain = -1, bias = -1;
};

struct SublayerOffsets {
    int64_t in = -1, in_bias = -1;           // attention: query, key, value; MLP: gate and up
    int64_t out = -1, out_bias = -1;         // attention: output projection; MLP: down
    int64_t query_gain = -1, key_gain = -1;  // of the heads' norms
    NormOffsets input_norm, output_norm, sum_norm;
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

    // Neighbours that are decayed alike, merged; without what is frozen.
    std::vector<Range> decay_ranges(const std::vector<Range>& frozen = {}) const {
        std::vector<Range> ranges;
        bool joined = false;  // to the one before
        for (const Parameter& p : parameters) {
            const bool trained = std::none_of(frozen.begin(), frozen.end(),
                                              [&](const Range& r) { return r.begin <= p.offset && p.offset < r.end; });
            if (trained && joined && ranges.back().decayed == p.matrix) ranges.back().end = p.offset + p.padded_count();
            else if (trained) ranges.push_back({p.offset, p.offset + p.padded_count(), p.matrix});
            joined = trained;
        }
        return ranges;
    }
};

enum class Init { NORMAL, SCALED };  // SCALED: residual projections divided by sqrt(2 L)

ParameterTable make_parameter_table(const ModelConfig& config, Init init, const NormPolicy& norm) {
    constexpr float base_std = 0.02f;
    const int L = config.L, C = config.C, F = config.F, Fp = config.Fp(), V = config.V, Vp = config.Vp();
    const int q_channels = config.NH * config.HS, kv_channels = config.NKV * config.HS;
    const float residual_std = init == Init::SCALED ? base_std / std::sqrt(2.0f * L) : base_std;
    const FamilyRow& family = config.row();
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
    // Tensors of vocabulary or positions, and vectors, by their whole names.
    const auto add_table = [&](const std::string& name, int64_t rows, int64_t padded_rows) {
        return add(
            {.name = name, .rows = rows, .cols = C, .padded_rows = padded_rows, .matrix = true, .std = base_std});
    };
    const auto add_bias = [&](const std::string& name, int64_t count, int64_t padded = 1) {
        return add({.name = name + ".bias", .cols = count, .padded_cols = padded});
    };
    const auto add_output = [&](int sublayer, int64_t offset) {
        table.parameters.back().output_of = sublayer;
        return offset;
    };
    const auto add_norm = [&](const std::string& name, float gain, float scale) {
        align();
        NormOffsets offsets;
        offsets.gain = add({.name = name + ".weight", .cols = C, .fill = gain, .norm_scale = scale});
        align();
        if (family.biased) offsets.bias = add({.name = name + ".bias", .cols = C, .norm_scale = scale});
        return offsets;
    };
    const auto begin_block = [&] {
        align();
        if (!table.blocks.empty()) table.blocks.back().end = table.size;
        table.blocks.push_back({table.size, table.size});
    };

    const std::string root = family.root;
    begin_block();
    table.embedding = add_table(root + family.embedding, V, Vp);
    align();
    if (family.positions) table.positions = add_table(root + family.positions, config.positions, 1);
    table.sublayers.resize(2 * L);
    for (int l = 1; l <= L; l++) {
        begin_block();
        const std::string block = root + family.blocks + std::to_string(l - 1) + ".";
        const SublayerPolicy around_attention = norm.around(Sublayer::ATTENTION, l, L);
        const SublayerPolicy around_mlp = norm.around(Sublayer::MLP, l, L);
        SublayerOffsets &attention = table.sublayers[2 * l - 2], &mlp = table.sublayers[2 * l - 1];
        // A matrix (out, in) of this block; xavier_gain 0: N(0, std).
        const auto add_matrix = [&](const char* name, int64_t rows, int64_t cols, float std, float xavier_gain,
                                    int64_t padded_rows = 1, int64_t padded_cols = 1) {
            if (xavier_gain > 0) std = xavier_gain * std::sqrt(2.0f / (rows + cols));
            return add({.name = block + name + ".weight",
                        .rows = rows,
                        .cols = cols,
                        .padded_rows = padded_rows,
                        .padded_cols = padded_cols,
                        .matrix = true,
                        .transposed = family.transposed,
                        .std = std});
        };
        const auto add_norms = [&](SublayerOffsets& offsets, const SublayerPolicy& around, Sublayer sublayer,
                                   const char* family_name) {
            const NormNames names = norm_names(around, sublayer, family_name);
            const float scale = config.norm_scale_folded ? 1 : around.scale;
            if (around.norm_input) offsets.input_norm = add_norm(block + names.input, around.gain, scale);
            if (around.norm_output) offsets.output_norm = add_norm(block + names.output, 1, 1);
            if (around.norm_sum) offsets.sum_norm = add_norm(block + names.sum, 1, 1);
        };
        const float attention_gain = around_attention.xavier_gain, mlp_gain = around_mlp.xavier_gain;
        const float query_key_gain = attention_gain > 0 ? 1 : 0;
        attention.in = add_matrix(family.q, q_channels, C, base_std, query_key_gain);
        add_matrix(family.k, kv_channels, C, base_std, query_key_gain);
        add_matrix(family.v, kv_channels, C, base_std, attention_gain);
        align();
        attention.out = add_output(2 * l - 2, add_matrix(family.o, C, q_channels, residual_std, attention_gain));
        align();
        if (family.gate) mlp.in = add_matrix(family.gate, F, C, base_std, mlp_gain, Fp);
        const int64_t up = add_matrix(family.up, F, C, base_std, mlp_gain, Fp);
        if (!family.gate) mlp.in = up;
        align();
        mlp.out = add_output(2 * l - 1, add_matrix(family.down, C, F, residual_std, mlp_gain, 1, Fp));
        align();
        if (family.biased || config.qkv_bias) {
            attention.in_bias = add_bias(block + family.q, q_channels);
            add_bias(block + family.k, kv_channels);
            add_bias(block + family.v, kv_channels);
        }
        if (family.biased) {
            align();
            attention.out_bias = add_output(2 * l - 2, add_bias(block + family.o, C));
            align();
            mlp.in_bias = add_bias(block + family.up, F, Fp);
            align();
            mlp.out_bias = add_output(2 * l - 1, add_bias(block + family.down, C));
        }
        if (config.qk_norm) {
            const auto add_gain = [&](const char* name) {
                align();
                return add({.name = block + name + ".weight", .cols = config.HS, .fill = 1});
            };
            attention.query_gain = add_gain("self_attn.q_norm"), attention.key_gain = add_gain("self_attn.k_norm");
        }
        add_norms(attention, around_attention, Sublayer::ATTENTION, family.attention_norm);
        add_norms(mlp, around_mlp, Sublayer::MLP, family.mlp_norm);
    }
    begin_block();
    table.head = config.tied ? table.embedding : add_table("lm_head.weight", V, Vp);
    table.final_norm = add_norm(root + family.final_norm, 1, 1);
    align();
    table.blocks.back().end = table.size;
    return table;
}

// parameter[row, col] = fill + std * normal(stream, row * cols + col), padding 0. Box-Muller, one thread an element,
// which writes 4 bytes.
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
        launch<initialize_kernel>(dim3(narrow(ceil_div(p.count(), 256))), 256, 0, parameters + p.offset, p.rows, p.cols,
                                  p.padded_cols, p.fill, p.std, parameter_stream(p, table, seed));
    }
}

// ---------------------------------------------------------------------------------------------------------------
// 3. Linear layers
//
// From here on, above each kernel: what it computes, forward and backward side by side; who owns which elements; and
// the bytes it must move, with e = sizeof(floatX). These count a tensor once: what is read again comes from a cache.
// But for matmul and attention there are so few operations a byte that a kernel's bytes set its time.
//
// cuBLASLt counts in columns: our row-major (rows, cols) is its (cols x rows), transposed for free. With W (OC, C),
// x (N, C), y (N, OC), each of the three products of a linear layer is 2 * N * OC * C operations:
//   forward   y = x W^T       m = OC  n = N   k = C    A = W transposed, B = x
//   input     dx = dy W       m = C   n = N   k = OC   A = W,            B = dy
//   weight    dW += dy^T x    m = C   n = OC  k = N    A = x,            B = dy transposed
// Bytes: e N C + e N OC for x and y or their gradients, e OC C for W, 8 OC C to read and write dW, which is fp32 (4 to
// write it first).

// y (N, OC) = x (N, C) W (OC, C)^T + bias
void linear_forward(floatX* y, const floatX* x, const floatX* weight, const floatX* bias, int64_t N, int C, int OC) {
    matmul({.d = y, .a = weight, .b = x, .m = OC, .n = N, .k = C, .transpose_a = true, .bias = bias});
}

// dx (N, C) = dy (N, OC) W (OC, C)
void linear_backward_input(floatX* dx, const floatX* dy, const floatX* weight, int64_t N, int C, int OC) {
    matmul({.d = dx, .a = weight, .b = dy, .m = C, .n = N, .k = OC});
}

// Forward: y = x W^T + bias, in matmul     Backward: dbias += sum over rows of dy
//
// partial (chunks, C) = sums of dy (N, C) over chunks of rows; add_partial_rows adds those. A block owns some columns
// of a chunk, a group of a warp's lanes every so many-th row of it. Bytes: reads e N C, writes 4 chunks C.
constexpr int bias_chunk_rows = 64, bias_threads = 256;
template <int n>
__global__ void bias_backward_kernel(float* partial, const floatX* dy, int64_t N, int C) {
    __shared__ float sums[bias_threads * n];
    const int lane = threadIdx.x % warp_size, group = threadIdx.x / warp_size, groups = blockDim.x / warp_size;
    const int c = (blockIdx.y * warp_size + lane) * n;
    const int64_t first = (int64_t)blockIdx.x * bias_chunk_rows, last = min(N, first + bias_chunk_rows);
    Floats<n> sum = 0.0f;
    for (int64_t row = first + group; c < C && row < last; row += groups) sum += load<n>(dy + row * C + c);
    store_shared(sums + threadIdx.x * n, sum);
    __syncthreads();
    if (c >= C || group > 0) return;
    for (int g = 1; g < groups; g++) sum += load<n>(sums + (g * warp_size + lane) * n);
    store(partial + (int64_t)blockIdx.x * C + c, sum);
}

constexpr int64_t bias_partial_size(int64_t N, int C) { return ceil_div(N, bias_chunk_rows) * C; }

// dbias (C) += column sums of dy (N, C), in a fixed order; partial: bias_partial_size(N, C) floats of scratch.
void bias_backward(float* dbias, const floatX* dy, float* partial, int64_t N, int C, bool accumulate = true) {
    const int chunks = narrow(ceil_div(N, bias_chunk_rows));
    with_width<floatX>(C, [&](auto n) {
        launch<bias_backward_kernel<n>>(dim3(chunks, ceil_div(C, warp_size * n)), block_threads(bias_threads), 0,
                                        partial, dy, N, C);
    });
    add_partial_rows(dbias, nullptr, partial, chunks, C, accumulate);
}

// dW (OC, C) += dy (N, OC)^T x (N, C), and dbias (OC) += column sums of dy where there is a bias.
void linear_backward_weight(float* dweight, float* dbias, const floatX* x, const floatX* dy, float* partial, int64_t N,
                            int C, int OC, bool accumulate = true) {
    matmul({.d32 = dweight, .a = x, .b = dy, .m = C, .n = OC, .k = N, .transpose_b = true, .accumulate = accumulate});
    if (dbias) bias_backward(dbias, dy, partial, N, OC, accumulate);
}

// ---------------------------------------------------------------------------------------------------------------
// 4. Embedding
//
// Forward: x[b, t] = wte[token[b, t]] + wpe[t]     Backward: dwte[v] += sum over the (b, t) with token v of dx[b, t]
//                                                            dwpe[t] += sum over b of dx[b, t]
// wte (Vp, C), of which U tokens occur in a batch; wpe (positions, C) in GPT-2 only. In packed rows wpe is read, and
// its gradient written, like wte: by positions (N), which start anew in each document, instead of t.

// x (N, C). A block owns a token, a thread neighbouring channels of it.
// Bytes: reads 4 N of tokens, e U C of wte, e T C of wpe; writes 4 N C.
template <int n>
__global__ void embedding_forward_kernel(float* x, const int32_t* tokens, const floatX* wte, const floatX* wpe,
                                         const int32_t* positions, int T, int C) {
    const int64_t row = blockIdx.x, token = tokens[row], position = positions ? positions[row] : row % T;
    for (int c = threadIdx.x * n; c < C; c += blockDim.x * n) {
        Floats<n> sum = load<n>(wte + token * C + c);
        if (wpe) sum += load<n>(wpe + position * C + c);
        store(x + row * C + c, sum);
    }
}

void embedding_forward(float* x, const int32_t* tokens, const floatX* wte, const floatX* wpe, int64_t N, int T, int C,
                       const int32_t* positions = nullptr) {
    with_width<float>(C, [&](auto n) {
        launch<embedding_forward_kernel<n>>(dim3(narrow(N)), row_threads(C, n), 0, x, tokens, wte, wpe, positions, T,
                                            C);
    });
}

// The rows of a batch sorted by token: rows[starts[u] .. starts[u + 1]) hold the u-th token that occurs. With it, each
// row of the embedding's gradient has one owner that adds in a fixed order; atomics would add in any order.
struct TokenRows {
    PinnedMemory memory;
    std::pmr::vector<int32_t> rows{&memory}, starts{&memory}, tokens{&memory};
    std::vector<int32_t> next;       // of each token of the vocabulary, where its next row goes
    cudaEvent_t uploaded = nullptr;  // from here to the device, so that they may change

    TokenRows() { CHECK_CUDA(cudaEventCreateWithFlags(&uploaded, cudaEventDisableTiming)); }
    TokenRows(const TokenRows&) = delete;
    ~TokenRows() { cudaEventDestroy(uploaded); }

    // By counting.
    void sort(const int32_t* batch, int64_t N) {
        next.assign(*std::max_element(batch, batch + N) + 1, 0);
        for (int64_t i = 0; i < N; i++) next[batch[i]]++;
        starts.clear(), tokens.clear();
        starts.reserve(N + 1), tokens.reserve(N);
        int32_t start = 0;
        for (int32_t token = 0; token < (int32_t)next.size(); token++) {
            const int32_t count = next[token];
            next[token] = start;
            if (count > 0) starts.push_back(start), tokens.push_back(token);
            start += count;
        }
        starts.push_back(start);
        rows.resize(N);
        for (int64_t i = 0; i < N; i++) rows[next[batch[i]]++] = (int32_t)i;
    }
};

// dwte[token] += sum of dx (N, C) over the rows that hold it. Block x owns the x-th token that occurs, a thread
// neighbouring channels of its row. Bytes: reads 4 N C of dx and 4 N of rows, reads and writes 4 U C of dwte.
template <int n>
__global__ void embedding_backward_kernel(float* dwte, const float* dx, const int32_t* rows, const int32_t* starts,
                                          const int32_t* tokens, int C) {
    float* gradient = dwte + (int64_t)tokens[blockIdx.x] * C;
    for (int c = threadIdx.x * n; c < C; c += blockDim.x * n) {
        Floats<n> sum = 0.0f;
        for (int i = starts[blockIdx.x]; i < starts[blockIdx.x + 1]; i++) sum += load<n>(dx + (int64_t)rows[i] * C + c);
        store(gradient + c, load<n>(gradient + c) + sum);
    }
}

// dwpe (positions, C) += sum of dx (B, T, C) over b, and 0 behind T. A block owns a share of all of it or, where it
// accumulates, of T positions. Bytes: reads 4 N C of dx, reads and writes 4 T C of dwpe.
template <int n>
__global__ void position_backward_kernel(float* dwpe, const float* dx, int B, int64_t row, bool accumulate,
                                         int64_t count) {
    for_share<n>(count, [&](int64_t i) {
        Floats<n> sum = 0.0f;
        if (accumulate) sum = load<n>(dwpe + i);
        for (int b = 0; b < B && i < row; b++) sum += load<n>(dx + b * row + i);
        store(dwpe + i, sum);
    });
}

// dwte accumulates always: most rows of it are none of the batch's.
void embedding_backward(float* dwte, const float* dx, const int32_t* rows, const int32_t* starts, const int32_t* tokens,
                        int distinct, int C) {
    with_width<float>(C, [&](auto n) {
        launch<embedding_backward_kernel<n>>(dim3(distinct), row_threads(C, n), 0, dwte, dx, rows, starts, tokens, C);
    });
}

void position_backward(float* dwpe, const float* dx, int B, int T, int C, int positions, bool accumulate = true) {
    const int64_t row = (int64_t)T * C, count = accumulate ? row : (int64_t)positions * C;
    with_width<float>(
        C, [&](auto n) { launch_shares<position_backward_kernel<n>, n>(count, dwpe, dx, B, row, accumulate); });
}

// Rotary positions, Hugging Face's rotate-half form: channel i < HS/2 of a head pairs with channel i + HS/2, and the
// pair (x, y) is turned by a = t * theta^(-2 i / HS). A rotation's transpose is its inverse: the gradient turns back.
// Forward: (x cos a - y sin a, y cos a + x sin a)     Backward: (dx cos a + dy sin a, dy cos a - dx sin a)
//
// In place on the query and key heads of qkv (B, T, NH + 2 NKV, HS); rotations (T, HS/2) of (cos, sin). A block owns a
// token, a thread neighbouring pairs of a head.
// Bytes: reads and writes e N (NH + NKV) HS, reads 4 T HS of rotations.
template <int n>
__global__ void rope_kernel(floatX* qkv, const float2* rotations, int T, int heads, int row_channels, int HS,
                            float direction) {
    const int half = HS / 2;
    floatX* row = qkv + (int64_t)blockIdx.x * row_channels;
    const float* turns = &rotations[(int64_t)(blockIdx.x % T) * half].x;
    for (int i = threadIdx.x * n; i < heads * half; i += blockDim.x * n) {
        const int pair = i % half;
        floatX* first = row + i / half * HS + pair;
        const Floats<n> x = load<n>(first), y = load<n>(first + half);
        const Floats<2 * n> turn = load<2 * n>(turns + 2 * pair);
        const Floats<n> cosine = evens(turn), sine = direction * odds(turn);
        store(first, x * cosine - y * sine);
        store(first + half, y * cosine + x * sine);
    }
}

// direction: 1 forward, -1 backward
void rope(floatX* qkv, const float2* rotations, int B, int T, int NH, int NKV, int HS, float direction) {
    const int heads = NH + NKV;
    with_width<floatX, 2>(HS / 2, [&](auto n) {
        launch<rope_kernel<n>>(dim3(narrow((int64_t)B * T)), row_threads(heads * HS / 2, n), 0, qkv, rotations, T,
                               heads, (NH + 2 * NKV) * HS, HS, direction);
    });
}

std::vector<float2> make_rotations(int T, int HS, double theta, const RopeScaling& scaling = {}) {
    std::vector<float2> rotations((size_t)T * HS / 2);
    for (int t = 0; t < T; t++) {
        for (int i = 0; i < HS / 2; i++) {
            const double angle = t * scaling(std::pow(theta, -2.0 * i / HS));
            rotations[(size_t)t * HS / 2 + i] = {(float)std::cos(angle), (float)std::sin(angle)};
        }
    }
    return rotations;
}

// Norms of query and key (Qwen3), before the positions are rotated in: an RMSNorm over the HS channels z of each head,
// with a gain (HS) that the query heads share, and one that the key heads share. With g = gain * dy, as in
// lns_layers.cuh:
// Forward: y = gain * z * rstd     Backward: dz = rstd * (g - zhat * mean(g * zhat)), zhat = z * rstd
//                                            dgain += sum over tokens and heads of dy * zhat
struct HeadNorm {
    const float *query_gain, *key_gain;  // (HS)
    float eps;
    int64_t N;
    int NH, NKV, HS;

    __host__ __device__ int heads() const { return NH + NKV; }
    __host__ __device__ int64_t rows() const { return N * heads(); }
    __device__ bool is_query(int64_t row) const { return row % heads() < NH; }
    __device__ const float* gain(int64_t row) const { return is_query(row) ? query_gain : key_gain; }
    // Of the row'th head that has a norm, in qkv (N, NH + 2 NKV, HS).
    __device__ int64_t place(int64_t row) const { return (row / heads() * (heads() + NKV) + row % heads()) * HS; }
};

// In place on the query and key heads of qkv; z (N, NH + NKV, HS) keeps what they were. A group of lanes owns a head.
// Bytes: reads e N (NH + NKV) HS, writes twice as many.
template <int n>
__global__ void head_norm_kernel(floatX* qkv, floatX* z, HeadNorm p) {
    const int lanes = norm_lanes(p.HS), lane = threadIdx.x % lanes;
    const int64_t row = (int64_t)blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes;
    const int first = row < p.rows() ? lane * n : p.HS;  // idle groups still join the warp's shuffles
    floatX *head = qkv + p.place(row), *kept = z + row * p.HS;
    Floats<n> squares = 0.0f;
    for (int c = first; c < p.HS; c += lanes * n) {
        const Floats<n> x = load<n>(head + c);
        squares += x * x;
        store(kept + c, x);
    }
    const float rstd = 1.0f / sqrtf(group_sum(sum_of(squares), lanes) / p.HS + p.eps);
    for (int c = first; c < p.HS; c += lanes * n)
        store(head + c, load<n>(p.gain(row) + c) * (load<n>(kept + c) * rstd));
}

void head_norm(floatX* qkv, floatX* z, const HeadNorm& p) {
    const int threads = block_threads(norm_threads), groups = threads / norm_lanes(p.HS);
    with_width<floatX>(p.HS, [&](auto n) {
        launch<head_norm_kernel<n>>(dim3(narrow(ceil_div(p.rows(), groups))), threads, 0, qkv, z, p);
    });
}

// In place on the query and key heads of dqkv; partial (blocks, 2, HS): each block's sums for the gains' gradients.
// Bytes: reads 2 e N (NH + NKV) HS, writes half of that.
template <int n>
__global__ void head_norm_backward_kernel(floatX* dqkv, float* partial, const floatX* z, HeadNorm p) {
    // dynamic_shared holds the groups' sums: (groups, 2, HS). A lane touches its own columns only.
    const int lanes = norm_lanes(p.HS), lane = threadIdx.x % lanes, stride = lanes * n;
    const int groups = blockDim.x / lanes, group = threadIdx.x / lanes;
    float* sums = dynamic_shared + group * 2 * p.HS;
    for (int c = lane * n; c < p.HS; c += stride) {
        store_shared(sums + c, Floats<n>(0.0f));
        store_shared(sums + p.HS + c, Floats<n>(0.0f));
    }
    const int64_t rounds = ceil_div(p.rows(), (int64_t)gridDim.x * groups);
    for (int64_t round = 0; round < rounds; round++) {
        const int64_t row = (round * gridDim.x + blockIdx.x) * groups + group;
        const int first = row < p.rows() ? lane * n : p.HS;
        floatX* dy = dqkv + p.place(row);
        const floatX* head = z + row * p.HS;
        const float* gain = p.gain(row);
        float* dgain = p.is_query(row) ? sums : sums + p.HS;
        Floats<n> squares = 0.0f, products = 0.0f;
        for (int c = first; c < p.HS; c += stride) {
            const Floats<n> x = load<n>(head + c);
            squares += x * x;
            products += load<n>(gain + c) * load<n>(dy + c) * x;
        }
        const float rstd = 1.0f / sqrtf(group_sum(sum_of(squares), lanes) / p.HS + p.eps);
        const float mean = group_sum(sum_of(products), lanes) * rstd / p.HS;
        for (int c = first; c < p.HS; c += stride) {
            const Floats<n> d = load<n>(dy + c), zhat = load<n>(head + c) * rstd;
            store_shared(dgain + c, load<n>(dgain + c) + d * zhat);
            store(dy + c, rstd * (load<n>(gain + c) * d - zhat * mean));
        }
    }
    __syncthreads();
    for (int c = threadIdx.x * n; c < 2 * p.HS; c += blockDim.x * n) {
        Floats<n> sum = load<n>(dynamic_shared + c);
        for (int g = 1; g < groups; g++) sum += load<n>(dynamic_shared + g * 2 * p.HS + c);
        store(partial + (int64_t)blockIdx.x * 2 * p.HS + c, sum);
    }
}

// dquery_gain and dkey_gain (HS); partial: norm_partial_size(HS) floats of scratch.
void head_norm_backward(floatX* dqkv, float* dquery_gain, float* dkey_gain, const floatX* z, float* partial,
                        const HeadNorm& p, bool accumulate = true) {
    const int threads = block_threads(norm_threads), groups = threads / norm_lanes(p.HS);
    const int most = std::min(norm_max_blocks, multiprocessors() * norm_blocks_each(threads));
    const int blocks = (int)std::min<int64_t>(most, ceil_div(p.rows(), norm_backward_rows * groups));
    const size_t shared_bytes = (size_t)groups * 2 * p.HS * sizeof(float);
    with_width<floatX>(p.HS, [&](auto n) {
        launch<head_norm_backward_kernel<n>>(dim3(blocks), threads, shared_bytes, dqkv, partial, z, p);
    });
    add_partial_rows(dquery_gain, dkey_gain, partial, blocks, p.HS, accumulate);
}

// ---------------------------------------------------------------------------------------------------------------
// 5. Attention
//
// Per head, with q, k, v (T, HS), causal:
//   s_ij = q_i . k_j / sqrt(HS), j <= i      p = softmax_j(s)      o_i = sum_j p_ij v_j
// and backwards, with delta_i = do_i . o_i:
//   dv_j = sum_i p_ij do_i     dp_ij = do_i . v_j     ds_ij = p_ij (dp_ij - delta_i)
//   dq_i = sum_j ds_ij k_j / sqrt(HS)                 dk_j = sum_i ds_ij q_i / sqrt(HS)
// since the softmax's Jacobian is p_ij ([j = k] - p_ik): ds_ij = p_ij (dp_ij - sum_k p_ik dp_ik), and that sum is
// do_i . sum_k p_ik v_k = do_i . o_i = delta_i, known before the row's p are.
// The T x T matrices are never stored: the softmax is computed online, tile after tile, and the backward pass computes
// p again from the row's log-sum-exp (lse). One thread owns one row: a query's o or dq, a key's dk and dv. Tiles of the
// other side stand in shared memory; dot products run over a tile transposed, (D, tile), so that neighbours are
// different keys and each thread does tile-many multiply-adds for one element of its own row.
//
// With documents (--doc-mask) a query sees the keys of its own document only: document (B, T) holds each token's
// (begin, end) inside its row. A key's document ends where its queries do, so both sides need one comparison of
// unsigned numbers, as without: begin <= j <= i, and j <= i < end. Tiles outside are not even loaded.
//
// Two sets of kernels: these in fp32, one thread a row, which show the algorithm plainly; and below them those for
// tensor cores. A GPU's bf16 build runs the latter, and so do its tests on a CPU; its fp32 build and a CPU's trainer
// the former.
//
// D is HS padded to a compiled size; padded channels are zero. Query head h reads key/value head h / (NH / NKV).
//
// Operations a sequence and query head: 2 T^2 HS forward, the causal half of 4; 7 T^2 HS backward, since s and dp are
// computed for the queries and again for the keys (9 for D > 64: see attention_chunk). They bound the kernels, not
// memory: a tile that is loaded serves all rows of a block, 2 rows / e = 32 operations a byte in fp32 for D <= 64.

// The CPU build for speed has one thread a block, which takes the rows a few at a time: what it loads of a tile then
// serves all of these. The state of the others waits in memory.

constexpr int attention_tile = is_fast_cpu ? 64 : 32;  // keys (or queries) in shared memory at a time
constexpr int attention_step = is_fast_cpu ? 32 : 16;  // of them, scores a thread holds in registers at a time
constexpr int attention_wide = wide<float>;
using AttentionFloats = Floats<attention_wide>;
__host__ __device__ constexpr int attention_rows(int D) { return (is_fast_cpu ? 128 : 64) / (D <= 64 ? 1 : 2); }
// Rows a thread takes together, and how often it does: their sums fill the registers that a CPU has.
__host__ __device__ constexpr int attention_together(int D) {
    return !is_fast_cpu ? 1 : D / attention_wide <= 6 ? 4 : 2;
}
__host__ __device__ constexpr int attention_groups(int D) {
    return is_fast_cpu ? attention_rows(D) / attention_together(D) : 1;
}
__host__ __device__ constexpr int attention_threads(int D) { return block_threads(attention_rows(D)); }

// Floats from one of a thread's own rows in shared memory to the next row. All threads of a warp read the same place of
// their rows; with one float of padding those lie in different banks.
constexpr int own_padding = is_fast_cpu ? 0 : 1;
__host__ __device__ constexpr int own_stride(int length) { return length + own_padding; }

// Of a step on the diagonal, all that a group's rows need to add up where `seen` are not behind it. The lanes of a GPU
// go through all of it together.
__device__ inline int attention_seen(int seen) { return is_fast_cpu ? min(attention_step, seen) : attention_step; }

// Behind a score: no key that is seen has one so low. Not infinite, as a row may see none of a step's keys.
constexpr float unseen_score = -1e30f;

// document (B, T): the first token and the one behind the last of the document each token belongs to, cut to its row. A
// document starts with `start_token`, or with the row. A warp owns a row, and goes through it once from each side.
// Bytes: reads 4 N of tokens from each side, writes 8 N.
constexpr int document_lanes = 32;  // of a warp, also where kernels that do not ballot make do with one
__global__ void document_spans_kernel(int2* document, const int32_t* tokens, int32_t start_token, int T) {
    const int lane = threadIdx.x;
    const unsigned up_to_here = full_warp >> (document_lanes - 1 - lane);
    document += (int64_t)blockIdx.x * T;
    tokens += (int64_t)blockIdx.x * T;
    int begin = 0, end = T;  // of the document that reaches into these tokens from the left, or from the right
    for (int first = 0; first < T; first += document_lanes) {
        const int t = first + lane;
        const unsigned starts = __ballot_sync(full_warp, t < T && tokens[t] == start_token), mine = starts & up_to_here;
        if (t < T) document[t].x = mine ? first + document_lanes - 1 - __clz(mine) : begin;
        if (starts) begin = first + document_lanes - 1 - __clz(starts);
    }
    for (int first = (T - 1) / document_lanes * document_lanes; first >= 0; first -= document_lanes) {
        const int t = first + lane;
        const unsigned starts = __ballot_sync(full_warp, t < T && tokens[t] == start_token),
                       mine = starts & ~up_to_here;
        if (t < T) document[t].y = mine ? first + __ffs(mine) - 1 : end;
        if (starts) end = first + __ffs(starts) - 1;
    }
}

void document_spans(int2* document, const int32_t* tokens, int32_t start_token, int B, int T) {
    launch<document_spans_kernel>(dim3(B), document_lanes, 0, document, tokens, start_token, T);
}

// Where the document of token t of this block's sequence begins or ends; without documents the row does.
__device__ int document_begin(const int2* document, int t, int T) {
    return document && t < T ? document[blockIdx.z * (int64_t)T + t].x : 0;
}
__device__ int document_end(const int2* document, int t, int T) {
    return document && t < T ? document[blockIdx.z * (int64_t)T + t].y : T;
}

// Neighbours in an own row, whose padding leaves it without words.
__device__ inline AttentionFloats load_own(const float* own) {
    if constexpr (own_padding == 0) return load<attention_wide>(own);
    else return AttentionFloats::each([&](int i) { return own[i]; });
}
__device__ inline void store_own(float* own, AttentionFloats x) {
    if constexpr (own_padding == 0) return store_shared(own, x);
    for (int i = 0; i < attention_wide; i++) own[i] = x[i];
}

// own (D) = factor * row `row` of a (T, HS) matrix with a row stride
template <int D>
__device__ void load_own_row(float* own, const floatX* matrix, int64_t stride, int row, int T, int HS, float factor) {
    constexpr int W = attention_wide;
    for (int d = 0; d < D; d += W)
        store_own(own + d, factor * load_first<W>(matrix + row * stride + d, row < T ? HS - d : 0));
}

// Rows first .. first + attention_tile - 1, by all threads of the block: as (tile, D), as (D, tile), or both. A thread
// moves a square at a time, which it turns in its registers. Where columns are wanted, neighbouring lanes take squares
// along a diagonal, so that both a row's part and a column's part of them are stored to different banks.
template <int D>
__device__ void load_tile(float* rows, float* columns, const floatX* matrix, int64_t stride, int first, int T, int HS,
                          float factor) {
    constexpr int W = attention_wide, down = attention_tile / W, across = D / W;
    for (int i = threadIdx.x; i < down * across; i += blockDim.x) {
        const int row = (columns ? i % down : i / across) * W;
        const int d = (columns ? i / down + i % down : i) % across * W;
        AttentionFloats square[W];
        UNROLL
        for (int k = 0; k < W; k++) {
            const int from = first + row + k;
            square[k] = factor * load_first<W>(matrix + from * stride + d, from < T ? HS - d : 0);
            if (rows) store_shared(rows + (row + k) * D + d, square[k]);
        }
        if (!columns) continue;
        transpose(square);
        UNROLL
        for (int k = 0; k < W; k++) store_shared(columns + (d + k) * attention_tile + row, square[k]);
    }
}

// Vectors of sums that a loop over products has registers for, beside what it loads: without AVX-512 a CPU has 16.
constexpr int attention_sums = is_fast_cpu && attention_wide <= 8 ? 10 : 256;
// How many of a row's n vectors a pass of such a loop takes, for R rows: the most that fit and leave no rest.
__host__ __device__ constexpr int attention_columns(int R, int n) {
    int columns = n;
    while (n % columns != 0 || R * columns > attention_sums) columns--;
    return columns;
}

// sum[r] += weights[r] (count) times rows (count, n * wide): a product of small matrices, its sums in registers, those
// of a few columns at a time where not all fit. The weights come from memory because a loop cannot index registers, and
// `count` is too large to unroll.
template <int R, int n>
__device__ __forceinline__ void add_products(AttentionFloats (&sum)[R][n], const float* weights, int weights_stride,
                                             const float* rows, int stride, int count) {
    constexpr int columns = attention_columns(R, n);
    UNROLL
    for (int first = 0; first < n; first += columns) {
#pragma unroll 2
        for (int k = 0; k < count; k++) {
            AttentionFloats row[columns];
            UNROLL
            for (int i = 0; i < columns; i++)
                row[i] = in_register(load<attention_wide>(rows + k * stride + (first + i) * attention_wide));
            UNROLL
            for (int r = 0; r < R; r++) {
                UNROLL
                for (int i = 0; i < columns; i++) sum[r][first + i] += weights[r * weights_stride + k] * row[i];
            }
        }
    }
}

// visit(r, i) for each vector of R rows of n
template <int R, int n, class Visit>
__device__ __forceinline__ void for_vectors(Visit visit) {
    UNROLL
    for (int r = 0; r < R; r++) {
        UNROLL
        for (int i = 0; i < n; i++) visit(r, i);
    }
}

template <int R, int n>
__device__ __forceinline__ void clear(AttentionFloats (&sum)[R][n]) {
    for_vectors<R, n>([&](int r, int i) { sum[r][i] = 0.0f; });
}

// s[r][j] = sum over d < HS of own[r][d] * columns[d][j]; `columns` may start in the middle of a tile's rows
template <int D, int R, int n>
__device__ __forceinline__ void dot_products(AttentionFloats (&s)[R][n], const float* own, const float* columns,
                                             int HS) {
    clear(s);
    add_products(s, own, own_stride(D), columns, attention_tile, HS);
}

// A group of queries, the first of them t, and what it has seen so far.
template <int D>
struct AttentionQueries {
    static constexpr int R = attention_together(D), n = D / attention_wide;
    AttentionFloats o[R][n];
    Floats<R> maximum = unseen_score, sum = 0.0f;
    int begin[R];  // of their documents, never decreasing
};

// out (B, T, NH, HS), lse (B, NH, T) from qkv (B, T, NH + 2 NKV, HS). Grid (row tiles, NH, B): a block owns `rows`
// queries of a head, a thread one of them.
// Bytes: reads e N NH HS of queries, writes e N NH HS of out and 4 N NH of lse. A block reads the keys and values of
// the tiles up to its own: e HS T (T / rows + 1) a sequence and head, all but the first 2 e N NKV HS from a cache.
template <int D>
__global__ void __launch_bounds__(attention_threads(D), 1)
    attention_forward_kernel(floatX* out, float* lse, const floatX* qkv, const int2* document, int T, int NH, int NKV,
                             int HS) {
    using Queries = AttentionQueries<D>;
    constexpr int rows = attention_rows(D), R = Queries::R, n = Queries::n, groups = attention_groups(D);
    constexpr int S = attention_step, W = attention_wide;
    float* k_columns = dynamic_shared;               // (D, tile)
    float* v_rows = k_columns + D * attention_tile;  // (tile, D)
    float* own_rows = v_rows + D * attention_tile;
    float* q = own_rows + threadIdx.x * groups * R * own_stride(D);                // (groups, R, D)
    float* p = own_rows + rows * own_stride(D) + threadIdx.x * R * own_stride(S);  // (R, step)

    const int head = blockIdx.y, kv_head = head / (NH / NKV);
    const int first_row = (gridDim.x - 1 - blockIdx.x) * rows;  // the longest rows first
    const int own_row = first_row + threadIdx.x * groups * R;
    const int64_t stride = (int64_t)(NH + 2 * NKV) * HS;
    const floatX* sequence = qkv + blockIdx.z * T * stride;
    Queries all[groups];
    for (int g = 0; g < groups && own_row + g * R < T; g++) {
        clear(all[g].o);
        for (int r = 0; r < R; r++) {
            const int t = own_row + g * R + r;
            load_own_row<D>(q + (g * R + r) * own_stride(D), sequence + head * HS, stride, t, T, HS,
                            1.0f / sqrtf((float)HS));
            all[g].begin[r] = document_begin(document, min(t, T - 1), T);
        }
    }
    const int first_key = document_begin(document, first_row, T) / attention_tile * attention_tile;
    for (int first = first_key; first < min(T, first_row + rows); first += attention_tile) {
        __syncthreads();
        load_tile<D>(nullptr, k_columns, sequence + (NH + kv_head) * HS, stride, first, T, HS, 1);
        load_tile<D>(v_rows, nullptr, sequence + (NH + NKV + kv_head) * HS, stride, first, T, HS, 1);
        __syncthreads();
        for (int g = 0; g < groups; g++) {
            const int t = own_row + g * R;
            if (t >= T || first >= t + R) continue;
            Queries now = all[g];
#pragma unroll 1
            for (int step = 0; step < attention_tile && first + step < t + R; step += S) {
                const int key = first + step;
                if (key + S <= now.begin[0]) continue;
                AttentionFloats s[R][S / W];
                dot_products<D>(s, q + g * R * own_stride(D), k_columns + step, HS);
                if (key + S > t + 1 || key < now.begin[R - 1]) {
                    for_vectors<R, S / W>([&](int r, int i) {
                        const int here = key + i * W;
                        s[r][i] = keep(s[r][i], now.begin[r] - here, t + r + 1 - here, unseen_score);
                    });
                }
                const Floats<R> highest = Floats<R>::each([&](int r) {
                    AttentionFloats largest = s[r][0];
                    UNROLL
                    for (int i = 1; i < S / W; i++) largest = larger(largest, s[r][i]);
                    return max_of(largest);
                });
                const Floats<R> maximum = larger(highest, now.maximum), correction = exp(now.maximum - maximum);
                AttentionFloats terms[R][1];
                clear(terms);
                for_vectors<R, S / W>([&](int r, int i) {
                    const AttentionFloats weight = exp(s[r][i] - maximum[r]);
                    terms[r][0] += weight;
                    store_own(p + r * own_stride(S) + i * W, weight);
                });
                now.maximum = maximum;
                now.sum = now.sum * correction + Floats<R>::each([&](int r) { return sum_of(terms[r][0]); });
                for_vectors<R, n>([&](int r, int i) { now.o[r][i] *= correction[r]; });
                add_products(now.o, p, own_stride(S), v_rows + step * D, D, attention_seen(t + R - key));
            }
            all[g] = now;
        }
    }
    for (int g = 0; g < groups; g++) {
        for (int r = 0; r < R; r++) {
            const int t = own_row + g * R + r;
            if (t >= T) return;
            floatX* o_row = out + ((blockIdx.z * (int64_t)T + t) * NH + head) * HS;
            UNROLL
            for (int i = 0; i < n; i++) store_first(o_row + i * W, all[g].o[r][i] / all[g].sum[r], HS - i * W);
            lse[(blockIdx.z * (int64_t)NH + head) * T + t] = all[g].maximum[r] + logf(all[g].sum[r]);
        }
    }
}

template <int D>
struct AttentionQueryGradients {
    static constexpr int R = attention_together(D), n = D / attention_wide;
    AttentionFloats dq[R][n];
    float delta[R], lse[R];
    int begin[R];  // of their documents, never decreasing
};

// The query part of dqkv, and delta (B, NH, T), from dout, out, lse and qkv. Owners as in the forward pass.
// Bytes: reads 3 e N NH HS of queries, dout and out, 4 N NH of lse; writes e N NH HS of dq, 4 N NH of delta. Reads keys
// and values as the forward pass does.
template <int D>
__global__ void __launch_bounds__(attention_threads(D), 1)
    attention_backward_query_kernel(floatX* dqkv, float* delta, const floatX* dout, const floatX* out, const float* lse,
                                    const floatX* qkv, const int2* document, int T, int NH, int NKV, int HS) {
    using Queries = AttentionQueryGradients<D>;
    constexpr int rows = attention_rows(D), R = Queries::R, n = Queries::n, groups = attention_groups(D);
    constexpr int S = attention_step, W = attention_wide;
    float* k_columns = dynamic_shared;                  // (D, tile)
    float* v_columns = k_columns + D * attention_tile;  // (D, tile)
    float* k_rows = v_columns + D * attention_tile;     // (tile, D)
    float* own_rows = k_rows + D * attention_tile;
    float* q = own_rows + threadIdx.x * groups * R * own_stride(D);                     // (groups, R, D)
    float* d_out = q + rows * own_stride(D);                                            // (groups, R, D)
    float* ds = own_rows + 2 * rows * own_stride(D) + threadIdx.x * R * own_stride(S);  // (R, step)

    const int head = blockIdx.y, kv_head = head / (NH / NKV);
    const int first_row = (gridDim.x - 1 - blockIdx.x) * rows, own_row = first_row + threadIdx.x * groups * R;
    const int64_t stride = (int64_t)(NH + 2 * NKV) * HS, out_stride = (int64_t)NH * HS;
    const floatX* sequence = qkv + blockIdx.z * T * stride;
    const int64_t out_offset = blockIdx.z * T * out_stride + head * HS;
    const int64_t statistics = (blockIdx.z * (int64_t)NH + head) * T;
    const float factor = 1.0f / sqrtf((float)HS);
    Queries all[groups];
    for (int g = 0; g < groups && own_row + g * R < T; g++) {
        clear(all[g].dq);
        for (int r = 0; r < R; r++) {
            const int t = own_row + g * R + r;
            float *own_q = q + (g * R + r) * own_stride(D), *own_d_out = d_out + (g * R + r) * own_stride(D);
            load_own_row<D>(own_q, sequence + head * HS, stride, t, T, HS, factor);
            load_own_row<D>(own_d_out, dout + out_offset, out_stride, t, T, HS, 1);
            AttentionFloats sum = 0.0f;
            for (int d = 0; d < D; d += W)
                sum +=
                    load_own(own_d_out + d) * load_first<W>(out + out_offset + t * out_stride + d, t < T ? HS - d : 0);
            all[g].delta[r] = sum_of(sum);
            all[g].lse[r] = t < T ? lse[statistics + t] : 0;
            all[g].begin[r] = document_begin(document, min(t, T - 1), T);
            if (t < T) delta[statistics + t] = all[g].delta[r];
        }
    }
    const int first_key = document_begin(document, first_row, T) / attention_tile * attention_tile;
    for (int first = first_key; first < min(T, first_row + rows); first += attention_tile) {
        __syncthreads();
        load_tile<D>(k_rows, k_columns, sequence + (NH + kv_head) * HS, stride, first, T, HS, 1);
        load_tile<D>(nullptr, v_columns, sequence + (NH + NKV + kv_head) * HS, stride, first, T, HS, 1);
        __syncthreads();
        for (int g = 0; g < groups; g++) {
            const int t = own_row + g * R;
            if (t >= T || first >= t + R) continue;
            Queries now = all[g];
#pragma unroll 1
            for (int step = 0; step < attention_tile && first + step < t + R; step += S) {
                const int key = first + step;
                if (key + S <= now.begin[0]) continue;
                const bool all_seen = key + S <= t + 1 && key >= now.begin[R - 1];
                AttentionFloats s[R][S / W], dp[R][S / W];
                dot_products<D>(s, q + g * R * own_stride(D), k_columns + step, HS);
                dot_products<D>(dp, d_out + g * R * own_stride(D), v_columns + step, HS);
                for_vectors<R, S / W>([&](int r, int i) {
                    const int here = key + i * W;
                    AttentionFloats p = exp(s[r][i] - now.lse[r]);
                    if (!all_seen) p = keep(p, now.begin[r] - here, t + r + 1 - here, 0.0f);
                    store_own(ds + r * own_stride(S) + i * W, p * (dp[r][i] - now.delta[r]));
                });
                add_products(now.dq, ds, own_stride(S), k_rows + step * D, D, attention_seen(t + R - key));
            }
            all[g] = now;
        }
    }
    for (int g = 0; g < groups; g++) {
        for (int r = 0; r < R; r++) {
            const int t = own_row + g * R + r;
            if (t >= T) return;
            floatX* dq_row = dqkv + (blockIdx.z * (int64_t)T + t) * stride + head * HS;
            UNROLL
            for (int i = 0; i < n; i++) store_first(dq_row + i * W, factor * all[g].dq[r][i], HS - i * W);
        }
    }
}

// A thread holds dk and dv of a chunk of the channels; on a GPU two blocks share a key tile for D > 64, as registers
// would spill, and both compute its s and dp.
__host__ __device__ constexpr int attention_chunk(int D) { return is_fast_cpu || D <= 64 ? D : D / 2; }

template <int D>
struct AttentionKeyGradients {
    static constexpr int R = attention_together(D), n = attention_chunk(D) / attention_wide;
    AttentionFloats dk[R][n], dv[R][n];
    int end[R];  // of their documents
};

// The key and value parts of dqkv, summed over the query heads of a group. Grid (key tiles * D / chunk, NKV, B): a
// block owns a chunk of the channels of `rows` keys of a head, a thread one key's.
// Bytes: reads e N NKV HS of keys and of values, writes as much of dk and of dv. A block reads queries, dout, lse and
// delta of the tiles from its own on: (e HS + 4) T (T / rows + 1) D / chunk a sequence and query head, all but the
// first (2 e HS + 8) N NH from a cache.
template <int D>
__global__ void __launch_bounds__(attention_threads(D), 1)
    attention_backward_key_kernel(floatX* dqkv, const float* delta, const floatX* dout, const float* lse,
                                  const floatX* qkv, const int2* document, int T, int NH, int NKV, int HS) {
    using Keys = AttentionKeyGradients<D>;
    constexpr int rows = attention_rows(D), chunk = attention_chunk(D), R = Keys::R, n = Keys::n;
    constexpr int groups = attention_groups(D), S = attention_step, W = attention_wide;
    float* q_columns = dynamic_shared;                   // (D, tile)
    float* do_columns = q_columns + D * attention_tile;  // (D, tile)
    float* q_rows = do_columns + D * attention_tile;     // (tile, D)
    float* do_rows = q_rows + D * attention_tile;        // (tile, D)
    float* lse_tile = do_rows + D * attention_tile;      // (tile)
    float* delta_tile = lse_tile + attention_tile;       // (tile)
    float* own_rows = delta_tile + attention_tile;
    float* k = own_rows + threadIdx.x * groups * R * own_stride(D);                          // (groups, R, D)
    float* v = k + rows * own_stride(D);                                                     // (groups, R, D)
    float* weights = own_rows + 2 * rows * own_stride(D) + threadIdx.x * R * own_stride(S);  // (R, step)

    const int kv_head = blockIdx.y, head_group = NH / NKV;
    const int first_channel = blockIdx.x % (D / chunk) * chunk;
    const int first_row = blockIdx.x / (D / chunk) * rows, own_row = first_row + threadIdx.x * groups * R;
    const int stride = (NH + 2 * NKV) * HS, out_stride = NH * HS;
    const floatX* sequence = qkv + (int64_t)blockIdx.z * T * stride;
    Keys all[groups];
    for (int g = 0; g < groups && own_row + g * R < T; g++) {
        clear(all[g].dk), clear(all[g].dv);
        for (int r = 0; r < R; r++) {
            const int t = own_row + g * R + r, own = (g * R + r) * own_stride(D);
            load_own_row<D>(k + own, sequence + (NH + kv_head) * HS, stride, t, T, HS, 1);
            load_own_row<D>(v + own, sequence + (NH + NKV + kv_head) * HS, stride, t, T, HS, 1);
            all[g].end[r] = document_end(document, t, T);
        }
    }
    const int last_query = document_end(document, first_row + rows - 1, T);
    for (int head = kv_head * head_group; head < (kv_head + 1) * head_group; head++) {
        const int64_t statistics = (blockIdx.z * (int64_t)NH + head) * T;
        for (int first = first_row / attention_tile * attention_tile; first < last_query; first += attention_tile) {
            __syncthreads();
            load_tile<D>(q_rows, q_columns, sequence + head * HS, stride, first, T, HS, 1.0f / sqrtf((float)HS));
            load_tile<D>(do_rows, do_columns, dout + (int64_t)blockIdx.z * T * out_stride + head * HS, out_stride,
                         first, T, HS, 1);
            for (int i = threadIdx.x; i < attention_tile; i += blockDim.x) {
                const int query = first + i;
                lse_tile[i] = query < T ? lse[statistics + query] : INFINITY;  // p = 0 behind the end
                delta_tile[i] = query < T ? delta[statistics + query] : 0;
            }
            __syncthreads();
            for (int g = 0; g < groups; g++) {
                const int t = own_row + g * R;
                if (t >= T || first + attention_tile <= t) continue;
                Keys now = all[g];
#pragma unroll 1
                for (int step = 0; step < attention_tile; step += S) {
                    const int query = first + step;
                    if (query + S <= t || query >= now.end[R - 1]) continue;
                    const bool all_see = query >= t + R - 1 && query + S <= now.end[0];
                    AttentionFloats s[R][S / W], dp[R][S / W];
                    dot_products<D>(s, k + g * R * own_stride(D), q_columns + step, HS);
                    for_vectors<R, S / W>([&](int r, int i) {
                        const int here = query + i * W;
                        s[r][i] = exp(s[r][i] - load<W>(lse_tile + step + i * W));
                        if (!all_see) s[r][i] = keep(s[r][i], t + r - here, now.end[r] - here, 0.0f);
                        store_own(weights + r * own_stride(S) + i * W, s[r][i]);
                    });
                    const int blind = S - attention_seen(query + S - t), seeing = step + blind;
                    add_products(now.dv, weights + blind, own_stride(S), do_rows + seeing * D + first_channel, D,
                                 S - blind);
                    dot_products<D>(dp, v + g * R * own_stride(D), do_columns + step, HS);
                    for_vectors<R, S / W>([&](int r, int i) {
                        store_own(weights + r * own_stride(S) + i * W,
                                  s[r][i] * (dp[r][i] - load<W>(delta_tile + step + i * W)));
                    });
                    add_products(now.dk, weights + blind, own_stride(S), q_rows + seeing * D + first_channel, D,
                                 S - blind);
                }
                all[g] = now;
            }
        }
    }
    for (int g = 0; g < groups; g++) {
        for (int r = 0; r < R; r++) {
            const int t = own_row + g * R + r;
            if (t >= T) return;
            floatX* dk_row = dqkv + (blockIdx.z * (int64_t)T + t) * stride + (NH + kv_head) * HS + first_channel;
            floatX* dv_row = dk_row + NKV * HS;
            UNROLL
            for (int i = 0; i < n; i++) {
                const int count = HS - first_channel - i * W;
                store_first(dk_row + i * W, all[g].dk[r][i], count);
                store_first(dv_row + i * W, all[g].dv[r][i], count);
            }
        }
    }
}

// --- Attention on tensor cores: bf16 on a GPU
//
// The same formulas, cut for a unit that multiplies 16 x 16 by 16 x 8 (tensor_core.cuh). A block owns rows of one side,
// queries or keys, and walks through tiles of the other side in shared memory; of its rows a warp owns 16 or 32, and
// everything that belongs to them stays in its registers (FlashAttention-2's division of the work):
//   s = own rows x others^T    fp32 fragments; a row lies in four lanes: two shuffles for its maximum or sum
//   p, ds                      in place
//   sums += p x others         p, rounded to bf16, is the left operand as it lies: s never passes through memory
// Where keys are the own rows s is transposed, and dk and dv are such sums as well; that costs 7 products instead of 5,
// but each number has one owner, who adds in a fixed order: no atomics, the same bits every time.
//
// Copies to shared memory run while the warps multiply what came before. A tile's rows lie D + 8 elements apart, an odd
// number of 16-byte words, so the 8 rows that a matrix load reads at a time lie in different banks for every D.
// Exponentials are powers of 2: exp(s / sqrt(HS) - lse) = 2^(scale s - lse log2(e)), one multiply-add and one exp2.

struct MmaTile {
    int warps, warp_rows;  // a block owns warps * warp_rows rows,
    int others;            // and holds as many of the other side at a time
    __host__ __device__ constexpr int rows() const { return warps * warp_rows; }
    __host__ __device__ constexpr int threads() const { return warps * warp_size; }
};

// As large as 255 registers a thread allow; 8 warps and 16 rows each where two sums of D channels a row leave no room.
__host__ __device__ constexpr MmaTile mma_forward_tile(int D) { return {4, 32, D <= 96 ? 64 : 32}; }
__host__ __device__ constexpr MmaTile mma_query_tile(int D) {
    return D <= 96 ? MmaTile{4, 32, 32} : MmaTile{4, 16, 64};
}
__host__ __device__ constexpr MmaTile mma_key_tile(int D) { return D <= 64 ? MmaTile{4, 16, 64} : MmaTile{8, 16, 32}; }
__host__ __device__ constexpr int mma_pitch(int D) { return D + 8; }

constexpr bool tensor_cores = !is_fp32 && !is_fast_cpu;  // what attention_forward and attention_backward run
inline constexpr float log2_e = 1.44269504f;

// The others that row t meets, from .x to .y: a query the keys of its document up to itself, a key the queries from
// itself to its document's end. Both grow with t, so the first and the last of some rows tell what all of them meet.
__device__ int2 keys_of_query(const int2* document, int t, int T) {
    return make_int2(document_begin(document, t, T), t);
}
__device__ int2 queries_of_key(const int2* document, int t, int T) {
    return make_int2(t, document_end(document, t, T) - 1);
}
// Of others first .. first + count - 1: whether some row between two meets any, or each of the rows meets all.
__device__ bool meet_any(int2 first_row, int2 last_row, int first, int count) {
    return first <= last_row.y && first + count > first_row.x;
}
__device__ bool meet_all(int2 first_row, int2 last_row, int first, int count) {
    return first >= last_row.x && first + count - 1 <= first_row.y;
}

// Starts to copy rows first .. first + rows - 1 of a (T, HS) matrix with a row stride, by all threads of the block, to
// (rows, pitch). Rows behind T and channels behind HS come as zeros. `width` elements a copy: HS is a multiple.
// Unrolled no further than the registers that the sums leave allow.
template <int rows, int D, int threads, int width>
__device__ __forceinline__ void copy_rows(floatX* to, const floatX* matrix, int64_t stride, int first, int T, int HS) {
    constexpr int words = D / width, step = threads / words;  // in a row; rows at a time
    const int d = threadIdx.x % words * width;
    if (threadIdx.x >= step * words) return;
#pragma unroll(D <= 64 ? 4 : 1)
    for (int row = threadIdx.x / words; row < rows; row += step) {
        const bool valid = first + row < T && d < HS;
        copy_async<width * sizeof(floatX)>(to + row * mma_pitch(D) + d,
                                           matrix + (valid ? (first + row) * stride + d : 0), valid);
    }
}
template <int rows, int D, int threads>
__device__ __forceinline__ void copy_rows(floatX* to, const floatX* matrix, int64_t stride, int first, int T, int HS) {
    if (HS % 8 == 0) copy_rows<rows, D, threads, 8>(to, matrix, stride, first, T, HS);
    else copy_rows<rows, D, threads, 4>(to, matrix, stride, first, T, HS);
}

// s (16 M, N) += own (16 M, D) x others (N, D)^T, both in shared memory
template <int M, int N, int D>
__device__ __forceinline__ void mma_dot_products(float (&s)[M][N / 8][4], const floatX* own, const floatX* others) {
    const int lane = threadIdx.x % warp_size;
    own += lane % 16 * mma_pitch(D) + lane / 16 * 8;  // parts: rows 0-7 and 8-15 of channels 0-7, then of 8-15
    others += (lane % 8 + lane / 16 * 8) * mma_pitch(D) + lane / 8 % 2 * 8;  // rows 0-7, channels 0-7, 8-15; rows 8-15
#pragma unroll
    for (int d = 0; d < D; d += 16) {
        uint32_t a[M][4], b[4];
#pragma unroll
        for (int m = 0; m < M; m++) load_matrices(a[m], own + m * 16 * mma_pitch(D) + d);
#pragma unroll
        for (int n = 0; n < N / 8; n += 2) {
            load_matrices(b, others + n * 8 * mma_pitch(D) + d);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma(s[m][n], a[m], b[0], b[1]);
                mma(s[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// sums (16 M, D) += weights (16 M, N), rounded to bf16, x others (N, D) in shared memory
template <int M, int N, int D>
__device__ __forceinline__ void mma_add_weighted_rows(float (&sums)[M][D / 8][4], const float (&weights)[M][N / 8][4],
                                                      const floatX* others) {
    const int lane = threadIdx.x % warp_size;
    others += lane % 16 * mma_pitch(D) + lane / 16 * 8;
#pragma unroll
    for (int n = 0; n < N / 8; n += 2) {
        uint32_t a[M][4], b[4];
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* pair = &weights[m][n + i / 2][i % 2 * 2];
                a[m][i] = bf16_pair(pair[0], pair[1]);
            }
        }
#pragma unroll
        for (int d = 0; d < D / 8; d += 2) {
            load_transposed(b, others + n * 8 * mma_pitch(D) + d * 8);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma(sums[m][d], a[m], b[0], b[1]);
                mma(sums[m][d + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// The lane's rows of a warp's fragments: m * 16 + half * 8 + lane / 4; of element i of a fragment, half is i / 2.
__device__ int mma_row(int m, int half) { return m * 16 + half * 8 + threadIdx.x % warp_size / 4; }
__device__ int mma_column(int n, int i) { return n * 8 + threadIdx.x % 4 * 2 + i % 2; }

// s = -infinity where a row does not meet the other: 2^s is 0 there.
template <int M, int N>
__device__ __forceinline__ void hide_unmet(float (&s)[M][N / 8][4], const int2 (&meets)[M][2], int first) {
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int2 range = meets[m][i / 2];
                if ((unsigned)(first + mma_column(n, i) - range.x) > (unsigned)(range.y - range.x))
                    s[m][n][i] = -INFINITY;
            }
        }
    }
}

// Rows of a (T, HS) matrix with a row stride = factor * sums (16 M, D), turned back by the rotations of their tokens
// where there are any: the backward pass of rope_kernel, before the sums are rounded. A fragment's row lies in four
// lanes, two channels here and there, and the partner of a channel HS / 2 further in any of them. So eight rows at a
// time pass through shared memory in fp32, and leave in neighbouring words. `scratch`: 16 rows of a tile that are the
// warp's own, and that it needs no more; 8 rows in fp32 take as much.
template <int M, int D>
__device__ __forceinline__ void mma_store_rows(floatX* matrix, int64_t stride, const float (&sums)[M][D / 8][4],
                                               float factor, const float2* rotations, floatX* scratch, int first, int T,
                                               int HS) {
    const int lane = threadIdx.x % warp_size, half_HS = HS / 2, words = HS / 4;
    float* rows = reinterpret_cast<float*>(scratch);
#pragma unroll
    for (int part = 0; part < 2 * M; part++) {
        __syncwarp();
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            const float* pair = &sums[part / 2][n][part % 2 * 2];
            float* to = rows + lane / 4 * mma_pitch(D) + mma_column(n, 0);
            to[0] = factor * pair[0], to[1] = factor * pair[1];
        }
        __syncwarp();
#pragma unroll 1
        for (int i = lane; i < 8 * words; i += warp_size) {
            const int t = first + part * 8 + i / words, channel = i % words * 4;
            if (t >= T) break;
            const float* row = rows + i / words * mma_pitch(D);
            Floats<4> x = load<4>(row + channel);
            for (int k = 0; rotations && k < 4; k++) {
                const int d = channel + k, pair = d < half_HS ? d : d - half_HS;
                const float2 turn = rotations[(int64_t)t * half_HS + pair];
                x[k] = d < half_HS ? x[k] * turn.x + row[d + half_HS] * turn.y : x[k] * turn.x - row[pair] * turn.y;
            }
            store(matrix + t * stride + channel, x);
        }
    }
}

// out (B, T, NH, HS), lse (B, NH, T) from qkv (B, T, NH + 2 NKV, HS). Grid (row tiles, NH, B), as in
// attention_forward_kernel, with the same bytes.
template <int D>
__global__ void __launch_bounds__(mma_forward_tile(D).threads(), 1)
    attention_forward_mma_kernel(floatX* out, float* lse, const floatX* qkv, const int2* document, int T, int NH,
                                 int NKV, int HS) {
    constexpr MmaTile tile = mma_forward_tile(D);
    constexpr int rows = tile.rows(), threads = tile.threads(), M = tile.warp_rows / 16, N = tile.others;
    floatX* q = reinterpret_cast<floatX*>(dynamic_shared);  // (rows, pitch)
    floatX* k = q + rows * mma_pitch(D);                    // (N, pitch)
    floatX* v = k + N * mma_pitch(D);                       // (N, pitch)

    const int head = blockIdx.y, kv_head = head / (NH / NKV);
    const int first_row = (gridDim.x - 1 - blockIdx.x) * rows;  // the longest rows first
    const int warp_rows_before = threadIdx.x / warp_size * tile.warp_rows, warp_row = first_row + warp_rows_before;
    const int64_t stride = (int64_t)(NH + 2 * NKV) * HS;
    const floatX* sequence = qkv + blockIdx.z * T * stride;
    const floatX *keys = sequence + (NH + kv_head) * HS, *values = keys + NKV * HS;
    floatX* own = q + warp_rows_before * mma_pitch(D);

    const int first_key = keys_of_query(document, first_row, T).x / N * N, end_key = min(T, first_row + rows);
    copy_rows<rows, D, threads>(q, sequence + head * HS, stride, first_row, T, HS);
    copy_rows<N, D, threads>(k, keys, stride, first_key, T, HS);
    copies_commit();

    // Scores are kept as they come, q . k; the maximum too. It starts so low that any score is above, and not at
    // -infinity, from which a hidden score's distance would be NaN.
    const float scale = log2_e / sqrtf((float)HS);
    float o[M][D / 8][4] = {}, maximum[M][2], sum[M][2];
    int2 meets[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            maximum[m][half] = unseen_score, sum[m][half] = 0;
            meets[m][half] = keys_of_query(document, warp_row + mma_row(m, half), T);
        }
    }
    const int2 first_meets = keys_of_query(document, warp_row, T),
               last_meets = keys_of_query(document, min(T, warp_row + tile.warp_rows) - 1, T);
#pragma unroll 1
    for (int first = first_key; first < end_key; first += N) {
        const bool works = warp_row < T && meet_any(first_meets, last_meets, first, N);
        float s[M][N / 8][4] = {};
        copies_wait<0>();
        __syncthreads();  // k is here, and no warp reads v any more
        copy_rows<N, D, threads>(v, values, stride, first, T, HS);
        copies_commit();
        if (works) mma_dot_products<M, N, D>(s, own, k);
        copies_wait<0>();
        __syncthreads();  // v is here, and no warp reads k any more
        if (first + N < end_key) copy_rows<N, D, threads>(k, keys, stride, first + N, T, HS);
        copies_commit();
        if (!works) continue;
        // One comparison a score: only tiles that the diagonal or a document's border crosses pay it.
        if (!meet_all(first_meets, last_meets, first, N)) hide_unmet<M, N>(s, meets, first);
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float new_maximum = maximum[m][half], tile_sum = 0;
#pragma unroll
                for (int n = 0; n < N / 8; n++)
                    new_maximum = fmaxf(new_maximum, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                new_maximum = group_max(new_maximum, 4);
                const float correction = exp2_approx(scale * (maximum[m][half] - new_maximum));
                const float offset = scale * new_maximum;
#pragma unroll
                for (int n = 0; n < N / 8; n++) {
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; i++) {
                        s[m][n][i] = exp2_approx(scale * s[m][n][i] - offset);
                        tile_sum += s[m][n][i];
                    }
                }
                maximum[m][half] = new_maximum;
                sum[m][half] = sum[m][half] * correction + tile_sum;  // over the lane's columns
#pragma unroll
                for (int d = 0; d < D / 8; d++) o[m][d][2 * half] *= correction, o[m][d][2 * half + 1] *= correction;
            }
        }
        mma_add_weighted_rows<M, N, D>(o, s, v);
    }
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int t = warp_row + mma_row(m, half);
            const float total = group_sum(sum[m][half], 4), inverse = 1 / total;
            if (t < T && threadIdx.x % 4 == 0)
                lse[(blockIdx.z * (int64_t)NH + head) * T + t] = scale / log2_e * maximum[m][half] + logf(total);
#pragma unroll
            for (int d = 0; d < D / 8; d++) o[m][d][2 * half] *= inverse, o[m][d][2 * half + 1] *= inverse;
        }
    }
    const int64_t out_stride = (int64_t)NH * HS;
    mma_store_rows<M, D>(out + blockIdx.z * T * out_stride + head * HS, out_stride, o, 1, nullptr, own, warp_row, T,
                         HS);
}

// The query part of dqkv, and delta (B, NH, T), from dout, out, lse and qkv; owners as in the forward pass. rotations:
// see mma_store_rows. Bytes: those of attention_backward_query_kernel; dqkv has then passed rope_kernel too.
template <int D>
__global__ void __launch_bounds__(mma_query_tile(D).threads(), 1)
    attention_backward_query_mma_kernel(floatX* dqkv, float* delta, const floatX* dout, const floatX* out,
                                        const float* lse, const floatX* qkv, const int2* document,
                                        const float2* rotations, int T, int NH, int NKV, int HS) {
    constexpr MmaTile tile = mma_query_tile(D);
    constexpr int rows = tile.rows(), threads = tile.threads(), M = tile.warp_rows / 16, N = tile.others;
    floatX* q = reinterpret_cast<floatX*>(dynamic_shared);  // (rows, pitch)
    floatX* d_out = q + rows * mma_pitch(D);                // (rows, pitch)
    floatX* k = d_out + rows * mma_pitch(D);                // (2, N, pitch): read until the tile's end, next one beside
    floatX* v = k + 2 * N * mma_pitch(D);                   // (N, pitch)

    const int head = blockIdx.y, kv_head = head / (NH / NKV);
    const int first_row = (gridDim.x - 1 - blockIdx.x) * rows;
    const int warp_rows_before = threadIdx.x / warp_size * tile.warp_rows, warp_row = first_row + warp_rows_before;
    const int64_t stride = (int64_t)(NH + 2 * NKV) * HS, out_stride = (int64_t)NH * HS;
    const floatX* sequence = qkv + blockIdx.z * T * stride;
    const floatX *keys = sequence + (NH + kv_head) * HS, *values = keys + NKV * HS;
    const int64_t out_offset = blockIdx.z * T * out_stride + head * HS;
    floatX *own_q = q + warp_rows_before * mma_pitch(D), *own_d_out = d_out + warp_rows_before * mma_pitch(D);

    const int first_key = keys_of_query(document, first_row, T).x / N * N, end_key = min(T, first_row + rows);
    copy_rows<rows, D, threads>(q, sequence + head * HS, stride, first_row, T, HS);
    copy_rows<rows, D, threads>(d_out, dout + out_offset, out_stride, first_row, T, HS);
    copy_rows<N, D, threads>(k, keys, stride, first_key, T, HS);
    copy_rows<N, D, threads>(v, values, stride, first_key, T, HS);
    copies_commit();

    const float scale = log2_e / sqrtf((float)HS);
    float dq[M][D / 8][4] = {}, lse_row[M][2], delta_row[M][2];
    int2 meets[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int t = warp_row + mma_row(m, half);
            const int64_t statistic = (blockIdx.z * (int64_t)NH + head) * T + t;
            meets[m][half] = keys_of_query(document, t, T);
            float product = 0;  // the lane's share of dout . out
            for (int d = threadIdx.x % 4 * 4; t < T && d < HS; d += 16) {
                const int64_t at = out_offset + t * out_stride + d;
                product += sum_of(load<4>(dout + at) * load<4>(out + at));
            }
            delta_row[m][half] = group_sum(product, 4);
            if (t < T && threadIdx.x % 4 == 0) delta[statistic] = delta_row[m][half];
            lse_row[m][half] = t < T ? log2_e * lse[statistic] : 0;
        }
    }
    const int2 first_meets = keys_of_query(document, warp_row, T),
               last_meets = keys_of_query(document, min(T, warp_row + tile.warp_rows) - 1, T);
    int stage = 0;
#pragma unroll 1
    for (int first = first_key; first < end_key; first += N, stage ^= 1) {
        const bool works = warp_row < T && meet_any(first_meets, last_meets, first, N), more = first + N < end_key;
        const floatX* k_tile = k + stage * N * mma_pitch(D);
        float s[M][N / 8][4] = {}, dp[M][N / 8][4] = {};
        copies_wait<0>();
        __syncthreads();  // this tile is here, and no warp reads the last one any more
        if (more) copy_rows<N, D, threads>(k + (stage ^ 1) * N * mma_pitch(D), keys, stride, first + N, T, HS);
        copies_commit();
        if (works) {
            mma_dot_products<M, N, D>(s, own_q, k_tile);
            mma_dot_products<M, N, D>(dp, own_d_out, v);
        }
        __syncthreads();  // no warp reads v any more
        if (more) copy_rows<N, D, threads>(v, values, stride, first + N, T, HS);
        copies_commit();
        if (!works) continue;
        if (!meet_all(first_meets, last_meets, first, N)) hide_unmet<M, N>(s, meets, first);
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int n = 0; n < N / 8; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float p = exp2_approx(scale * s[m][n][i] - lse_row[m][i / 2]);
                    s[m][n][i] = p * (dp[m][n][i] - delta_row[m][i / 2]);
                }
            }
        }
        mma_add_weighted_rows<M, N, D>(dq, s, k_tile);
    }
    mma_store_rows<M, D>(dqkv + blockIdx.z * T * stride + head * HS, stride, dq, scale / log2_e, rotations, own_q,
                         warp_row, T, HS);
}

// The key and value parts of dqkv, summed over the query heads of a group. Grid (key tiles, NKV, B): a block owns
// `rows` keys of a head, with all channels. Bytes: those of attention_backward_key_kernel with D / chunk = 1.
template <int D>
__global__ void __launch_bounds__(mma_key_tile(D).threads(), 1)
    attention_backward_key_mma_kernel(floatX* dqkv, const float* delta, const floatX* dout, const float* lse,
                                      const floatX* qkv, const int2* document, const float2* rotations, int T, int NH,
                                      int NKV, int HS) {
    constexpr MmaTile tile = mma_key_tile(D);
    constexpr int rows = tile.rows(), threads = tile.threads(), M = tile.warp_rows / 16, N = tile.others;
    floatX* k = reinterpret_cast<floatX*>(dynamic_shared);                 // (rows, pitch)
    floatX* v = k + rows * mma_pitch(D);                                   // (rows, pitch)
    floatX* q = v + rows * mma_pitch(D);                                   // (2, N, pitch), as k above
    floatX* d_out = q + 2 * N * mma_pitch(D);                              // (N, pitch)
    float* lse_tile = reinterpret_cast<float*>(d_out + N * mma_pitch(D));  // (2, N)
    float* delta_tile = lse_tile + 2 * N;                                  // (2, N)

    const int kv_head = blockIdx.y, group = NH / NKV;
    const int first_row = blockIdx.x * rows;
    const int warp_rows_before = threadIdx.x / warp_size * tile.warp_rows, warp_row = first_row + warp_rows_before;
    const int64_t stride = (int64_t)(NH + 2 * NKV) * HS, out_stride = (int64_t)NH * HS;
    const floatX* sequence = qkv + blockIdx.z * T * stride;
    floatX *own_k = k + warp_rows_before * mma_pitch(D), *own_v = v + warp_rows_before * mma_pitch(D);

    // Tile i of all that the block walks through: the tiles of one query head, then those of the next.
    const int first_query = first_row / N * N;
    const int end_query = queries_of_key(document, min(T, first_row + rows) - 1, T).y + 1;
    const int head_tiles = (end_query - first_query + N - 1) / N, tiles = group * head_tiles;
    const auto head_of = [&](int i) { return kv_head * group + i / head_tiles; };
    const auto query_of = [&](int i) { return first_query + i % head_tiles * N; };
    const auto copy_queries = [&](int i, int stage) {
        const int first = query_of(i);
        copy_rows<N, D, threads>(q + stage * N * mma_pitch(D), sequence + head_of(i) * HS, stride, first, T, HS);
        const int64_t head = (blockIdx.z * (int64_t)NH + head_of(i)) * T;
        for (int j = threadIdx.x; j < N; j += threads) {
            const bool valid = first + j < T;
            const int64_t statistic = valid ? head + first + j : 0;
            copy_async<4>(lse_tile + stage * N + j, lse + statistic, valid);
            copy_async<4>(delta_tile + stage * N + j, delta + statistic, valid);
        }
    };
    const auto copy_d_out = [&](int i) {
        copy_rows<N, D, threads>(d_out, dout + blockIdx.z * T * out_stride + head_of(i) * HS, out_stride, query_of(i),
                                 T, HS);
    };
    copy_rows<rows, D, threads>(k, sequence + (NH + kv_head) * HS, stride, first_row, T, HS);
    copy_rows<rows, D, threads>(v, sequence + (NH + NKV + kv_head) * HS, stride, first_row, T, HS);
    copy_queries(0, 0);
    copy_d_out(0);
    copies_commit();

    const float scale = log2_e / sqrtf((float)HS);
    float dk[M][D / 8][4] = {}, dv[M][D / 8][4] = {};
    int2 meets[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) meets[m][half] = queries_of_key(document, warp_row + mma_row(m, half), T);
    }
    const int2 first_meets = queries_of_key(document, warp_row, T),
               last_meets = queries_of_key(document, min(T, warp_row + tile.warp_rows) - 1, T);
    int stage = 0;
#pragma unroll 1
    for (int i_tile = 0; i_tile < tiles; i_tile++, stage ^= 1) {
        const int first = query_of(i_tile);
        const bool works = warp_row < T && meet_any(first_meets, last_meets, first, N), more = i_tile + 1 < tiles;
        const floatX* q_tile = q + stage * N * mma_pitch(D);
        float s[M][N / 8][4] = {}, dp[M][N / 8][4] = {};
        copies_wait<0>();
        __syncthreads();  // this tile is here, and no warp reads the last one any more
        if (more) copy_queries(i_tile + 1, stage ^ 1);
        copies_commit();
        if (works) {
            mma_dot_products<M, N, D>(s, own_k, q_tile);
            if (!meet_all(first_meets, last_meets, first, N)) hide_unmet<M, N>(s, meets, first);
#pragma unroll
            for (int n = 0; n < N / 8; n++) {
                const float* lse_pair = lse_tile + stage * N + mma_column(n, 0);
                const float offset[2] = {log2_e * lse_pair[0], log2_e * lse_pair[1]};
#pragma unroll
                for (int m = 0; m < M; m++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) s[m][n][i] = exp2_approx(scale * s[m][n][i] - offset[i % 2]);
                }
            }
            mma_add_weighted_rows<M, N, D>(dv, s, d_out);
            mma_dot_products<M, N, D>(dp, own_v, d_out);
        }
        __syncthreads();  // no warp reads d_out any more
        if (more) copy_d_out(i_tile + 1);
        copies_commit();
        if (!works) continue;
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
            const float* delta_pair = delta_tile + stage * N + mma_column(n, 0);
            const float offset[2] = {delta_pair[0], delta_pair[1]};
#pragma unroll
            for (int m = 0; m < M; m++) {
#pragma unroll
                for (int i = 0; i < 4; i++) s[m][n][i] *= dp[m][n][i] - offset[i % 2];
            }
        }
        mma_add_weighted_rows<M, N, D>(dk, s, q_tile);
    }
    floatX* dk_rows = dqkv + blockIdx.z * T * stride + (NH + kv_head) * HS;
    mma_store_rows<M, D>(dk_rows, stride, dk, scale / log2_e, rotations, own_k, warp_row, T, HS);
    mma_store_rows<M, D>(dk_rows + NKV * HS, stride, dv, 1, nullptr, own_v, warp_row, T, HS);
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

// Templates, so that only a build that calls them compiles the kernels.
template <class X>
void attention_forward_mma(X* out, float* lse, const X* qkv, const int2* document, int B, int T, int NH, int NKV,
                           int HS) {
    with_head_size(HS, [&](auto size) {
        constexpr int D = size;
        constexpr MmaTile tile = mma_forward_tile(D);
        constexpr size_t bytes = (tile.rows() + 2 * tile.others) * mma_pitch(D) * sizeof(X);
        static_assert(bytes <= 99 * 1024);  // what a block may have on compute capability 8.6
        launch<attention_forward_mma_kernel<D>>(dim3(ceil_div(T, tile.rows()), NH, B), tile.threads(), bytes, out, lse,
                                                qkv, document, T, NH, NKV, HS);
    });
}

template <class X>
void attention_backward_mma(X* dqkv, float* delta, const X* dout, const X* out, const float* lse, const X* qkv,
                            const int2* document, const float2* rotations, int B, int T, int NH, int NKV, int HS) {
    with_head_size(HS, [&](auto size) {
        constexpr int D = size;
        constexpr MmaTile query = mma_query_tile(D), key = mma_key_tile(D);
        constexpr size_t query_bytes = (2 * query.rows() + 3 * query.others) * mma_pitch(D) * sizeof(X);
        constexpr size_t key_bytes =
            (2 * key.rows() + 3 * key.others) * mma_pitch(D) * sizeof(X) + 4 * key.others * sizeof(float);
        static_assert(query_bytes <= 99 * 1024 && key_bytes <= 99 * 1024);
        launch<attention_backward_query_mma_kernel<D>>(dim3(ceil_div(T, query.rows()), NH, B), query.threads(),
                                                       query_bytes, dqkv, delta, dout, out, lse, qkv, document,
                                                       rotations, T, NH, NKV, HS);
        launch<attention_backward_key_mma_kernel<D>>(dim3(ceil_div(T, key.rows()), NKV, B), key.threads(), key_bytes,
                                                     dqkv, delta, dout, lse, qkv, document, rotations, T, NH, NKV, HS);
    });
}

// out (B, T, NH, HS), lse (B, NH, T) from qkv (B, T, NH + 2 NKV, HS), positions already rotated in. document (B, T), or
// null: each row is one.
void attention_forward(floatX* out, float* lse, const floatX* qkv, const int2* document, int B, int T, int NH, int NKV,
                       int HS) {
    if constexpr (tensor_cores) {
        attention_forward_mma(out, lse, qkv, document, B, T, NH, NKV, HS);
    } else {
        with_head_size(HS, [&](auto size) {
            constexpr int D = size, rows = attention_rows(D);
            constexpr int threads = attention_threads(D), taken = threads * attention_together(D);
            constexpr size_t own_floats = rows * own_stride(D) + taken * own_stride(attention_step);
            constexpr size_t shared_floats = 2 * D * attention_tile + own_floats;
            launch<attention_forward_kernel<D>>(dim3(ceil_div(T, rows), NH, B), threads, shared_floats * sizeof(float),
                                                out, lse, qkv, document, T, NH, NKV, HS);
        });
    }
}

// dqkv (B, T, NH + 2 NKV, HS) from dout, out (B, T, NH, HS); delta (B, NH, T) is scratch. rotations: those by which the
// forward pass turned qkv, or null where it did not; dq and dk are turned back.
void attention_backward(floatX* dqkv, float* delta, const floatX* dout, const floatX* out, const float* lse,
                        const floatX* qkv, const int2* document, const float2* rotations, int B, int T, int NH, int NKV,
                        int HS) {
    if constexpr (tensor_cores) {
        attention_backward_mma(dqkv, delta, dout, out, lse, qkv, document, rotations, B, T, NH, NKV, HS);
    } else {
        with_head_size(HS, [&](auto size) {
            constexpr int D = size, rows = attention_rows(D);
            constexpr int threads = attention_threads(D), taken = threads * attention_together(D);
            const int tiles = (int)ceil_div(T, rows);
            constexpr size_t own_floats = 2 * rows * own_stride(D) + taken * own_stride(attention_step);
            constexpr size_t query_floats = 3 * D * attention_tile + own_floats;
            constexpr size_t key_floats = (4 * D + 2) * attention_tile + own_floats;
            // What a block may have on compute capability 8.6, and on the CPU.
            static_assert(key_floats * sizeof(float) <= (is_fast_cpu ? 227 : 99) * 1024);
            launch<attention_backward_query_kernel<D>>(dim3(tiles, NH, B), threads, query_floats * sizeof(float), dqkv,
                                                       delta, dout, out, lse, qkv, document, T, NH, NKV, HS);
            launch<attention_backward_key_kernel<D>>(dim3(tiles * (D / attention_chunk(D)), NKV, B), threads,
                                                     key_floats * sizeof(float), dqkv, delta, dout, lse, qkv, document,
                                                     T, NH, NKV, HS);
        });
        if (rotations) rope(dqkv, rotations, B, T, NH, NKV, HS, -1);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// 6. MLP

// SwiGLU, with s = sigmoid(gate), silu(gate) = gate * s; s' = s (1 - s) gives silu'(gate) = s (1 + gate (1 - s)).
// Forward: y = silu(gate) * up     Backward: dup = dy * silu(gate), dgate = dy * up * silu'(gate)
//
// gate_up (N, 2, F), y (N, F). A block owns a token, a thread neighbouring channels. Bytes: reads 2 e N F, writes e N
// F.
template <int n>
__global__ void swiglu_forward_kernel(floatX* y, const floatX* gate_up, int F) {
    const int64_t row = blockIdx.x;
    for (int c = threadIdx.x * n; c < F; c += blockDim.x * n) {
        const Floats<n> gate = load<n>(gate_up + row * 2 * F + c), up = load<n>(gate_up + (row * 2 + 1) * F + c);
        store(y + row * F + c, gate / (1.0f + exp(-gate)) * up);
    }
}

// Owners as in the forward pass. Bytes: reads 3 e N F, writes 2 e N F.
template <int n>
__global__ void swiglu_backward_kernel(floatX* dgate_up, const floatX* dy, const floatX* gate_up, int F) {
    const int64_t row = blockIdx.x;
    for (int c = threadIdx.x * n; c < F; c += blockDim.x * n) {
        const int64_t at_gate = row * 2 * F + c, at_up = at_gate + F;
        const Floats<n> gate = load<n>(gate_up + at_gate), up = load<n>(gate_up + at_up);
        const Floats<n> gradient = load<n>(dy + row * F + c), sigmoid = 1.0f / (1.0f + exp(-gate));
        store(dgate_up + at_gate, gradient * up * sigmoid * (1.0f + gate * (1.0f - sigmoid)));
        store(dgate_up + at_up, gradient * gate * sigmoid);
    }
}

void swiglu_forward(floatX* y, const floatX* gate_up, int64_t N, int F) {
    with_width<floatX>(
        F, [&](auto n) { launch<swiglu_forward_kernel<n>>(dim3(narrow(N)), row_threads(F, n), 0, y, gate_up, F); });
}

void swiglu_backward(floatX* dgate_up, const floatX* dy, const floatX* gate_up, int64_t N, int F) {
    with_width<floatX>(F, [&](auto n) {
        launch<swiglu_backward_kernel<n>>(dim3(narrow(N)), row_threads(F, n), 0, dgate_up, dy, gate_up, F);
    });
}

// GELU in GPT-2's form: x/2 (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3); 1/2 (1 + tanh(u)) = sigmoid(2 u) = s.
// Forward: y = x s     Backward: dx = dy (s + x s (1 - s) 2 u'), since s' = s (1 - s) 2 u'
template <int n>
__device__ inline Floats<n> gelu_sigmoid(Floats<n> x) {
    return 1.0f / (1.0f + exp(-1.5957691216f * (x + 0.044715f * x * x * x)));
}

// Used where cuBLASLt cannot fuse it with the product before. In place where y is x. A block owns a share of the
// `count` elements. Bytes: reads e count, writes e count.
template <int n>
__global__ void gelu_forward_kernel(floatX* y, const floatX* x, int64_t count) {
    for_share<n>(count, [&](int64_t i) {
        const Floats<n> value = load<n>(x + i);
        store(y + i, value * gelu_sigmoid(value));
    });
}

// In place where dx is dy. Owners as in the forward pass. Bytes: reads 2 e count, writes e count.
template <int n>
__global__ void gelu_backward_kernel(floatX* dx, const floatX* dy, const floatX* x, int64_t count) {
    for_share<n>(count, [&](int64_t i) {
        const Floats<n> value = load<n>(x + i), s = gelu_sigmoid(value);
        const Floats<n> slope = 1.5957691216f * (1.0f + 3 * 0.044715f * value * value);
        store(dx + i, load<n>(dy + i) * (s + value * s * (1.0f - s) * slope));
    });
}

void gelu_forward(floatX* y, const floatX* x, int64_t count) {
    with_width<floatX>(count, [&](auto n) { launch_shares<gelu_forward_kernel<n>, n>(count, y, x); });
}

void gelu_backward(floatX* dx, const floatX* dy, const floatX* x, int64_t count) {
    with_width<floatX>(count, [&](auto n) { launch_shares<gelu_backward_kernel<n>, n>(count, dx, dy, x); });
}

// y = GELU(pre), pre = x W^T + bias; both are kept for the backward pass.
void linear_gelu_forward(floatX* y, floatX* pre, const floatX* x, const floatX* weight, const floatX* bias, int64_t N,
                         int C, int OC) {
    const bool fused = matmul(
        {.d = y, .a = weight, .b = x, .m = OC, .n = N, .k = C, .transpose_a = true, .bias = bias, .pre_gelu = pre});
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
// Forward: loss = logsumexp(x) - x[target], in nats     Backward: dx = softmax(x) - onehot(target)
// since d logsumexp(x)/dx_i = exp(x_i) / sum_j exp(x_j). The logits x (N, Vp), of which V count; dx takes their place.
//
// A block owns a token: a pass over its row for the maximum and the sum, online, then one that writes the gradient.
// Bytes: reads e N V, and again for the gradient, mostly from a cache; writes e N Vp of it.

template <int n>
__global__ void classifier_kernel(floatX* logits, float* losses, const int32_t* targets, int V, int Vp,
                                  bool write_gradient) {
    __shared__ float maxima[32], sums[32];
    const int64_t row = blockIdx.x;
    const int target = targets[row], first = threadIdx.x * n, stride = blockDim.x * n;
    floatX* x = logits + row * Vp;
    if (target < 0) {  // not counted: no loss, no gradient
        if (threadIdx.x == 0) losses[row] = 0;
        for (int i = first; write_gradient && i < Vp; i += stride) store(x + i, Floats<n>(0.0f));
        return;
    }
    float maximum = -INFINITY, sum = 0;
    for (int i = first; i < V; i += stride) {
        const Floats<n> value = keep(load<n>(x + i), 0, V - i, -INFINITY);
        const float here = max_of(value), new_maximum = here > maximum ? here : maximum;
        const float terms = sum_of(exp(value - new_maximum));
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
    if (threadIdx.x == 0) losses[row] = (row_maximum - to_float(x[target])) + logf(row_sum);
    if (!write_gradient) return;
    __syncthreads();  // x[target] is read above
    const float inverse = 1.0f / row_sum;
    for (int i = first; i < Vp; i += stride) {
        const Floats<n> probability = keep(exp(load<n>(x + i) - row_maximum) * inverse, 0, V - i, 0.0f);
        store(x + i, probability - keep(Floats<n>(1.0f), target - i, target - i + 1, 0.0f));
    }
}

// losses (N), 0 where the target is -1; logits (N, Vp) become their gradients if write_gradient.
void classifier(floatX* logits, float* losses, const int32_t* targets, int64_t N, int V, int Vp, bool write_gradient) {
    with_width<floatX>(Vp, [&](auto n) {
        int threads = 32;
        while (threads < 1024 && threads * 4 * n < V) threads *= 2;
        launch<classifier_kernel<n>>(dim3(narrow(N)), block_threads(threads), 0, logits, losses, targets, V, Vp,
                                     write_gradient);
    });
}

// sums[0] += sum of losses (N), sums[1] += number of counted targets (N). One block owns all, in double: exact enough
// for any number of tokens. Bytes: reads 8 N.
__global__ void sum_losses_kernel(double* sums, const float* losses, const int32_t* targets, int64_t N) {
    double loss = 0, counted = 0;
    for (int64_t i = threadIdx.x; i < N; i += blockDim.x) {
        loss += losses[i];
        counted += targets[i] >= 0;
    }
    loss = block_sum(loss), counted = block_sum(counted);
    if (threadIdx.x == 0) {
        sums[0] += loss;
        sums[1] += counted;
    }
}

void sum_losses(double* sums, const float* losses, const int32_t* targets, int64_t N) {
    const int threads = (int)std::min<int64_t>(1024, round_up(N, 32));
    launch<sum_losses_kernel>(dim3(1), block_threads(threads), 0, sums, losses, targets, N);
}

// ---------------------------------------------------------------------------------------------------------------
// 8. Optimizer

// What a step knows of itself, on the device: no kernel waits for the host to read it.
struct StepState {
    double sums[2];       // loss in nats and counted tokens, over all micro-batches and ranks
    float gradient_norm;  // of the mean gradient, before clipping
    float factor;         // gradient sums to clipped mean gradient
    float correction1;    // 1 / (1 - beta1^update)
    float correction2;    // 1 / (1 - beta2^update)
    int update;           // number of updates made, this one included
    int applied;          // 0: loss or norm was not finite, the update is skipped
};

struct AdamW {
    float lr = 1e-3f, beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f, weight_decay = 0.1f;
};

// A block's share. Its size is a compromise: small shares cost reductions, and large ones leave a GPU idle.
constexpr int64_t square_sum_share = 1 << 16;
constexpr int square_sum_piece = 8192;  // is added up in fp32, all else in double

// partial[block] = sum of squares of the block's share of gradients (count). Bytes: reads 4 count, writes 8 a share.
template <int n>
__global__ void square_sum_kernel(double* partial, const float* gradients, int64_t count) {
    const int64_t begin = blockIdx.x * square_sum_share, end = min(count, begin + square_sum_share);
    double total = 0;
    for (int64_t first = begin; first < end; first += square_sum_piece) {
        Floats<n> sum = 0.0f;
        for (int64_t i = first + threadIdx.x * n; i < min(end, first + square_sum_piece); i += blockDim.x * n) {
            const Floats<n> g = load<n>(gradients + i);
            sum = fma(g, g, sum);
        }
        total += sum_of(sum);
    }
    total = block_sum(total);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

int square_sum_partials(int64_t count) { return narrow(ceil_div(count, square_sum_share)); }

// partial (square_sum_partials(count)): what is left to add up
void square_sums(double* partial, const float* x, int64_t count) {
    with_width<float>(count, [&](auto n) {
        launch<square_sum_kernel<n>>(dim3(square_sum_partials(count)), block_threads(256), 0, partial, x, count);
    });
}

// What all parameters share: the mean gradient's norm, the clipping factor min(1, clip / norm), AdamW's corrections
// of bias, and whether this update happens at all. One block. Bytes: reads 8 a partial sum.
__global__ void prepare_update_kernel(StepState* state, const double* partial, int partials, AdamW adam, float clip) {
    double sum = 0;
    for (int i = threadIdx.x; i < partials; i += blockDim.x) sum += partial[i];
    sum = block_sum(sum);
    if (threadIdx.x != 0) return;
    const double tokens = fmax(state->sums[1], 1.0);
    const float norm = (float)(sqrt(sum) / tokens);
    state->gradient_norm = norm;
    state->applied = isfinite(norm) && isfinite(state->sums[0]);
    state->update += state->applied;
    const double clipping = clip > 0 && norm > clip ? clip / norm : 1.0;
    state->factor = (float)(clipping / tokens);
    state->correction1 = (float)(1 / (1 - pow((double)adam.beta1, state->update)));
    state->correction2 = (float)(1 / (1 - pow((double)adam.beta2, state->update)));
}

// With g the clipped mean gradient and t the number of the update (Loshchilov and Hutter, arXiv 1711.05101):
//   m = beta1 m + (1 - beta1) g     v = beta2 v + (1 - beta2) g^2
//   p -= lr (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + decay p)
// A block owns a share. Bytes: reads p, g, m, v, writes p, m, v: 28 count, and 2 count more for the bf16 working copy.
template <int n>
__global__ void adamw_kernel(float* masters, floatX* weights, const float* gradients, float* first, float* second,
                             const StepState* state, AdamW adam, float decay, int64_t count) {
    if (!state->applied) return;
    const float factor = state->factor, correction1 = state->correction1, correction2 = state->correction2;
    for_share<n>(count, [&](int64_t i) {
        const Floats<n> g = factor * load<n>(gradients + i);
        const Floats<n> m = adam.beta1 * load<n>(first + i) + (1.0f - adam.beta1) * g;
        const Floats<n> v = adam.beta2 * load<n>(second + i) + (1.0f - adam.beta2) * g * g;
        Floats<n> p = load<n>(masters + i);
        p -= adam.lr * (m * correction1 / (sqrt(v * correction2) + adam.eps) + decay * p);
        store(first + i, m);
        store(second + i, v);
        store(masters + i, p);
        if constexpr (!is_fp32) store(weights + i, p);
    });
}

// How far an update moved a parameter: |dW|^2, and |W|^2 before it.
struct UpdateSquares {
    double change = 0, size = 0;
};

// partial[block] = the two sums over the block's share, in double. Reads before and after once.
__global__ void update_squares_kernel(UpdateSquares* partial, const float* before, const float* after, int64_t count) {
    const int64_t begin = blockIdx.x * square_sum_share, end = min(count, begin + square_sum_share);
    double change = 0, size = 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
        const double moved = (double)after[i] - before[i];
        change += moved * moved, size += (double)before[i] * before[i];
    }
    change = block_sum(change), size = block_sum(size);
    if (threadIdx.x == 0) partial[blockIdx.x] = {change, size};
}

UpdateSquares update_squares(const float* before, const float* after, int64_t count) {
    DeviceArray<UpdateSquares> partial(square_sum_partials(count));
    launch<update_squares_kernel>(dim3(narrow(partial.count)), block_threads(256), 0, partial.data, before, after,
                                  count);
    UpdateSquares sum;
    for (const UpdateSquares& share : partial.read()) sum.change += share.change, sum.size += share.size;
    return sum;
}

// y = x, rounded. A block owns a share. Bytes: reads 4 count, writes e count.
template <int n>
__global__ void round_kernel(floatX* y, const float* x, int64_t count) {
    for_share<n>(count, [&](int64_t i) { store(y + i, load<n>(x + i)); });
}

void round_floats(floatX* y, const float* x, int64_t count) {
    with_width<float>(count, [&](auto n) { launch_shares<round_kernel<n>, n>(count, y, x); });
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
        allocations.push_back(allocate_on_device<T>(std::max<int64_t>(count, 1) * sizeof(T)));
        return (T*)allocations.back();
#else
        return reinterpret_cast<T*>(base + offset);
#endif
    }

    void allocate() {
        sizing = false;
#ifndef DEBUG
        base = allocate_on_device<char>(used);
        allocations.push_back(base);
#endif
        used = 0;
    }

    void release() {
        for (void* allocation : allocations) cudaFree(allocation);
        allocations.clear();
    }
};

// --- The plan ---
//
// Between two sublayers lies a junction, which is where the variants differ. Junction k stands behind sublayer k - 1
// (F) and before sublayer k; junction 0 behind the embedding, junction 2 L before the head. N? is a norm or nothing:
//
//   forward                       backward, d: the gradient of
//     F  = N?(F)                    dx = alpha' dz' + s N?'(din)      z' = alpha' x + ..., the next junction's sum
//     z  = alpha x + beta F         dz = N?'(dx)
//     x  = N?(z)                    dF = N?'(beta dz)
//     in = s N?(x)
//
//   PRE       z = x + F            in = N(x)
//   LNS       z = x + F            in = N(x) / sqrt(l)
//   POST      z = x + F            x = N(z)
//   DEEPNORM  z = alpha x + F      x = N(z)
//   MIX       POST, then PRE
//   PERI      z = x + N(F)         in = N(x)
//   LNS_INIT  PRE, with gains that start at 1/sqrt(l)
//   RES_SQRT  z = x + F / sqrt(l)  in = N(x)
//   PRORES    z = x + beta(t) F    in = N(x)
//   KEEL      z = alpha x + F      x = N(z)     in = N(x)    from block 2 on, block 1 as PRE
//   REORDERED z = x + N(F)         in = x
//
// plan_model turns NORM, family and l into this data once; lay_out_junctions decides what memory serves for two of its
// tensors. Forward and backward execute the plan and ask neither.

// A norm of a junction. Without parameters it is not there, and what it would read passes as it is.
struct PlannedNorm {
    NormOffsets parameters;
    float scale = 1, eps = 0;
    float* mean = nullptr;  // (N) of its input's rows, kept for the backward pass; LayerNorm only
    float* rstd = nullptr;  // (N)

    explicit operator bool() const { return parameters.gain >= 0; }
};

// What is not kept for the backward pass, which computes it again, to the same bits.
//   NORM    what follows from a junction's z by norms, x and in; from `up` by SwiGLU, hidden
//   BLOCK   those, and all of a block that follows from the z before it
enum class Recompute { NONE, NORM, BLOCK };

struct Junction {
    int l = 0;  // the block of F
    float alpha = 1, beta = 1;
    float (*beta_at)(int l, int64_t step) = nullptr;  // where beta changes with the step
    PlannedNorm output_norm, sum_norm, input_norm;    // of F, of z, of x
    float next_alpha = 0;                             // alpha'

    const float* before = nullptr;  // (N, C) x before the sum
    floatX* f = nullptr;            // (N, C) F, where sublayer k - 1 writes it; kept where output_norm reads it
    floatX* normed_f = nullptr;     // (N, C) N(F); f itself without output_norm
    float* z = nullptr;             // (N, C) the sum; at junction 0 the embedding
    float* x = nullptr;             // (N, C) the stream from here on; z itself without sum_norm
    floatX* in = nullptr;           // (N, C) what sublayer k reads; x itself in fp32 builds without input_norm
    floatX* rounded_x = nullptr;    // in, where it is a copy of x
    float* next_dz = nullptr;       // (N, C) dz'; null before the head, behind which nothing reads the stream
    floatX* df = nullptr;           // (N, C) what sublayer k - 1's backward reads
    floatX* beta_dz = nullptr;      // df, where it is a copy of beta dz
};

struct Activations {
    std::vector<Junction> junctions;      // 2 L + 1
    std::vector<floatX*> qkv, attention;  // per block (N, qkv_channels), (N, NH * HS)
    std::vector<floatX*> unnormed;        // per block (N, NH + NKV, HS): query and key before their norms, if any
    std::vector<float*> lse;              // per block (B, NH, T)
    std::vector<floatX*> up, hidden;      // per block (N, up_channels) before and (N, Fp) after the nonlinearity
    // Shared by all blocks.
    floatX *f, *normed_f;  // (N, C) of the junctions that do not keep them
    float* dstream;        // (N, C) dx, dz: gradient of the residual stream
    floatX* df;            // (N, C) of the junctions where it is not dstream itself
    floatX* din;           // (N, C) gradient of a sublayer's input
    floatX *dqkv, *dattention, *dup, *dhidden;
    float* delta;    // (B, NH, T)
    float* partial;  // sums over rows on their way to a gradient
    floatX* logits;  // (chunk, Vp)
    float* losses;   // (N)
    int32_t *inputs, *targets, *token_rows, *token_starts, *token_ids;
    float2* rotations;   // (T, HS / 2)
    int2* document;      // (B, T) where each token's document begins and ends; null: attention spans the row
    int32_t* positions;  // (N) of packed rows, and for a learned position's gradient the rows that hold it
    int32_t *position_rows, *position_starts, *position_ids;
};

struct Model {
    NormPolicy norm = norm_policy(compiled_norm);
    ModelConfig config;
    ParameterTable table;
    int B = 0, T = 0;  // the largest batch
    int chunk = 0;     // tokens whose logits exist at the same time
    // Set before plan_model. document_token: attention stays inside documents, which this token starts.
    int32_t document_token = no_document_token;
    bool packs = false;  // rows may be packed, with positions beside their tokens
    Recompute recompute = Recompute::NONE;
    bool trains = true;         // false: no memory for gradients and moments
    std::vector<Range> frozen;  // of table.blocks: no update changes them
    int frozen_blocks = 0;      // so many of them from the first on: the backward pass ends before
    Arena arena;
    float* masters = nullptr;    // fp32 parameters
    floatX* weights = nullptr;   // what the kernels read; the masters themselves in fp32 builds
    float* gradients = nullptr;  // sums over the tokens of a step; zeros between the parameters
    bool accumulate = false;     // the next backward pass adds to the gradients: they are those of this step
    float *first_moment = nullptr, *second_moment = nullptr;
    double* norm_partial = nullptr;
    StepState* state = nullptr;
    Activations acts = {};
    bool rows_are_packed = false;                 // those of the batch on the device
    std::optional<TokenRows> token_rows[2];       // of a micro-batch and the one before, on their way to the device
    std::optional<TokenRows> position_rows[2];    // with the rows sorted by position
    int64_t micro_batch = 0;                      // that token_rows is next for
    std::vector<UpdateSquares> last_update;       // of each parameter of the table, if update() was asked to record it
    std::function<void(int)> on_block_gradients;  // called when block b of table.blocks has all its gradients

    ~Model() { arena.release(); }
};

// The junctions as data, their memory still missing.
void plan_junctions(Model& model) {
    const int L = model.config.L;
    const float eps = model.config.eps;
    const auto around = [&](int k) {
        return model.norm.around(k % 2 ? Sublayer::MLP : Sublayer::ATTENTION, k / 2 + 1, L);
    };
    std::vector<Junction>& junctions = model.acts.junctions;
    junctions.assign(2 * L + 1, {});
    for (int k = 0; k < 2 * L; k++) {
        const SublayerPolicy p = around(k);
        const SublayerOffsets& offsets = model.table.sublayers[k];
        Junction &ahead = junctions[k], &behind = junctions[k + 1];
        const float scale = model.config.norm_scale_folded ? 1 : p.scale;
        ahead.input_norm = {offsets.input_norm, scale, eps / (p.input_factor * p.input_factor)};
        ahead.next_alpha = p.alpha;
        behind.l = k / 2 + 1;
        behind.alpha = p.alpha, behind.beta = p.beta;
        behind.beta_at = model.config.warmed_up ? nullptr : p.beta_at;
        behind.output_norm = {offsets.output_norm, 1, eps};
        behind.sum_norm = {offsets.sum_norm, 1, eps};
    }
    junctions[2 * L].input_norm = {model.table.final_norm, 1, eps};
}

// Where everything lies. Called twice, as the arena says: without memory, then with it.

void lay_out_parameters(Model& model) {
    Arena& arena = model.arena;
    const int64_t size = model.table.size;
    model.masters = arena.take<float>("parameters (fp32 masters)", size);
    model.weights = is_fp32 ? (floatX*)model.masters : arena.take<floatX>("parameters (working copy)", size);
    if (model.trains) {
        model.gradients = arena.take<float>("gradients", size);
        model.first_moment = arena.take<float>("AdamW moments", size);
        model.second_moment = arena.take<float>("AdamW moments", size);
    }
    model.norm_partial = arena.take<double>("scratch", square_sum_partials(size));
    model.state = arena.take<StepState>("scratch", 1);
}

// What rebuild_block computes again, and all junctions before a sublayer of one kind therefore share, once one of them
// has taken it.
struct SharedJunction {
    std::optional<float*> z, x;
    std::optional<floatX*> in, f;
};

// Nothing but this function decides which tensors of a junction are one, and which junctions share them. The last one
// keeps what the head reads.
void lay_out_junctions(Model& model) {
    Activations& a = model.acts;
    const int64_t N = (int64_t)model.B * model.T, count = N * model.config.C;
    const auto floats = [&](const char* purpose) { return model.arena.take<float>(purpose, count); };
    const auto operands = [&](const char* purpose) { return model.arena.take<floatX>(purpose, count); };
    const char *kept = "activations", *scratch = "scratch";
    // An fp32 gradient of z is that of F where nothing is between.
    const auto own_df = [](const Junction& j) { return !is_fp32 || j.output_norm || j.beta != 1 || j.beta_at; };
    const auto has_output_norm = [](const Junction& j) { return (bool)j.output_norm; };
    a.f = operands(scratch);
    a.normed_f = std::ranges::any_of(a.junctions, has_output_norm) ? operands(scratch) : nullptr;
    a.dstream = floats(scratch);
    a.df = std::ranges::any_of(a.junctions, own_df) ? operands(scratch) : nullptr;
    a.din = operands(scratch);

    SharedJunction before_attention, before_mlp;
    const auto take = [&](bool again, auto& shared, auto take_new) {
        if (!again) return take_new(kept);
        if (!shared) shared = take_new(scratch);
        return *shared;
    };

    const Junction* previous = nullptr;
    for (Junction& j : a.junctions) {
        const bool inside = (&j - a.junctions.data()) % 2 == 1, last = &j == &a.junctions.back();  // inside: of a block
        const bool norms_again = model.recompute != Recompute::NONE && !last;
        const bool block_again = model.recompute == Recompute::BLOCK;
        SharedJunction& shared = inside ? before_mlp : before_attention;
        j.z = take(block_again && inside, shared.z, floats);
        j.x = j.sum_norm ? take(norms_again, shared.x, floats) : j.z;
        j.in = is_fp32 && !j.input_norm ? (floatX*)j.x : take(norms_again, shared.in, operands);
        j.rounded_x = !is_fp32 && !j.input_norm ? j.in : nullptr;
        j.next_dz = last ? nullptr : a.dstream;
        for (PlannedNorm* norm : {&j.output_norm, &j.sum_norm, &j.input_norm}) {
            if (*norm && model.config.row().biased) norm->mean = model.arena.take<float>(kept, N);
            if (*norm) norm->rstd = model.arena.take<float>(kept, N);
        }
        if (previous) {
            j.before = previous->x;
            j.f = j.output_norm ? take(block_again, shared.f, operands) : a.f;
            j.normed_f = j.output_norm ? a.normed_f : j.f;
            j.df = own_df(j) ? a.df : (floatX*)a.dstream;
            j.beta_dz = own_df(j) && !j.output_norm ? j.df : nullptr;
        }
        previous = &j;
    }
}

void lay_out_sublayers(Model& model) {
    const ModelConfig& c = model.config;
    const int64_t N = (int64_t)model.B * model.T;
    const int L = c.L, q_channels = c.NH * c.HS;
    Arena& arena = model.arena;
    Activations& a = model.acts;
    a.qkv.assign(L, nullptr), a.unnormed = a.attention = a.up = a.hidden = a.qkv;
    a.lse.assign(L, nullptr);
    const bool block_again = model.recompute == Recompute::BLOCK;
    const bool hidden_again = block_again || (model.recompute == Recompute::NORM && c.row().gated());
    const auto take = [&](bool again, auto& blocks, int l, int64_t count) {
        using T = std::remove_pointer_t<std::remove_cvref_t<decltype(blocks[l])>>;
        blocks[l] = again && l > 0 ? blocks[0] : arena.take<T>(again ? "scratch" : "activations", count);
    };
    for (int l = 0; l < L; l++) {
        take(block_again, a.qkv, l, N * c.qkv_channels());
        if (c.qk_norm) take(block_again, a.unnormed, l, N * (c.NH + c.NKV) * c.HS);
        take(block_again, a.attention, l, N * q_channels);
        take(block_again, a.lse, l, N * c.NH);
        take(block_again, a.up, l, N * c.up_channels());
        take(hidden_again, a.hidden, l, N * c.Fp());
    }
    a.rotations = arena.take<float2>("scratch", (int64_t)model.T * c.HS / 2);
    if (model.document_token != no_document_token || model.packs) a.document = arena.take<int2>("scratch", N);
    a.dqkv = arena.take<floatX>("scratch", N * c.qkv_channels());
    a.dattention = arena.take<floatX>("scratch", N * q_channels);
    a.dup = arena.take<floatX>("scratch", N * c.up_channels());
    a.dhidden = arena.take<floatX>("scratch", N * c.Fp());
    a.delta = arena.take<float>("scratch", N * c.NH);
    const int widest = std::max({c.C, c.qkv_channels(), c.up_channels()});
    a.partial =
        arena.take<float>("scratch", std::max(norm_partial_size(std::max(c.C, c.HS)), bias_partial_size(N, widest)));
}

void lay_out_batch(Model& model) {
    const int64_t N = (int64_t)model.B * model.T;
    Arena& arena = model.arena;
    Activations& a = model.acts;
    a.losses = arena.take<float>("scratch", N);
    a.inputs = arena.take<int32_t>("scratch", N);
    a.targets = arena.take<int32_t>("scratch", N);
    a.token_rows = arena.take<int32_t>("scratch", N);
    a.token_starts = arena.take<int32_t>("scratch", N + 1);
    a.token_ids = arena.take<int32_t>("scratch", N);
    if (model.packs) a.positions = arena.take<int32_t>("scratch", N);
    if (model.packs && model.table.positions >= 0) {
        a.position_rows = arena.take<int32_t>("scratch", N);
        a.position_starts = arena.take<int32_t>("scratch", N + 1);
        a.position_ids = arena.take<int32_t>("scratch", N);
    }
    a.logits = arena.take<floatX>("logits", (int64_t)std::max(model.chunk, 2) * model.config.Vp());
}

void lay_out(Model& model) {
    lay_out_parameters(model);
    lay_out_junctions(model);
    lay_out_sublayers(model);
    lay_out_batch(model);
}

// Plans `model` for batches of up to (B, T): afterwards arena.purposes says what allocate_model will take.
void plan_model(Model& model, const ModelConfig& config, Init init, int B, int T,
                NormPolicy norm = norm_policy(compiled_norm)) {
    check_config(config);
    model.norm = norm;
    model.config = config;
    model.table = make_parameter_table(config, init, norm);
    model.B = B, model.T = T;
    // Logits of 64 MB at a time, of 256 MB on a GPU: large enough for full speed of the products, small beside
    // everything else. Whole tiles of a product.
    const int64_t N = (int64_t)B * T, bytes = is_cpu ? 64 << 20 : 256 << 20;
    const int64_t rows = bytes / (config.Vp() * (int64_t)sizeof(floatX)) / 128 * 128;
    model.chunk = (int)std::clamp<int64_t>(rows, std::min<int64_t>(N, 128), N);
    plan_junctions(model);
    lay_out(model);
}

// As the settings say.
void plan_model(Model& model, const ModelConfig& config, const Settings& s) {
    model.recompute = s.recompute == "block"  ? Recompute::BLOCK
                      : s.recompute == "norm" ? Recompute::NORM
                                              : Recompute::NONE;
    model.packs = s.pack == "packed";
    plan_model(model, config, s.init == "scaled" ? Init::SCALED : Init::NORMAL, s.batch_size, s.seq_len);
}

// Before a step, and before its checkpoint is evaluated: the factors that change with the step. Before step 1 they are
// those that it will have.
void set_step(Model& model, int64_t step) {
    for (Junction& j : model.acts.junctions) {
        if (j.beta_at) j.beta = j.beta_at(j.l, std::max<int64_t>(step, 1));
    }
}

// Takes the memory. Parameters and gradients are zeros, so that what is between them is, whoever sets them.
void allocate_model(Model& model) {
    const ModelConfig& config = model.config;
    model.arena.allocate();
    lay_out(model);
    const std::vector<float2> rotations = make_rotations(model.T, config.HS, config.rope_theta, config.rope_scaling);
    CHECK_CUDA(
        cudaMemcpy(model.acts.rotations, rotations.data(), rotations.size() * sizeof(float2), cudaMemcpyHostToDevice));
    CHECK_CUDA(cudaMemset(model.state, 0, sizeof(StepState)));
    CHECK_CUDA(cudaMemset(model.masters, 0, model.table.size * sizeof(float)));
    if (!model.trains) return;
    CHECK_CUDA(cudaMemset(model.gradients, 0, model.table.size * sizeof(float)));
    CHECK_CUDA(cudaMemset(model.first_moment, 0, model.table.size * sizeof(float)));
    CHECK_CUDA(cudaMemset(model.second_moment, 0, model.table.size * sizeof(float)));
}

// --- Forward ---

const float* parameter(const Model& model, int64_t offset) { return offset < 0 ? nullptr : model.masters + offset; }
const floatX* weight(const Model& model, int64_t offset) { return offset < 0 ? nullptr : model.weights + offset; }
float* gradient(const Model& model, int64_t offset) { return offset < 0 ? nullptr : model.gradients + offset; }
// Null where attention spans the row.
const int2* documents(const Model& model) {
    return model.rows_are_packed || model.document_token != no_document_token ? model.acts.document : nullptr;
}

// `operands` through a norm of the plan.
void normalize(const Model& model, const PlannedNorm& norm, NormForward operands, int64_t N) {
    operands.mean = norm.mean, operands.rstd = norm.rstd;
    operands.gain = parameter(model, norm.parameters.gain), operands.bias = parameter(model, norm.parameters.bias);
    operands.scale = norm.scale, operands.eps = norm.eps;
    operands.N = N, operands.C = model.config.C;
    norm_forward(operands);
}

// sum = alpha x + beta f, and copy = gamma sum as matmul operand: the sum where no norm is there to compute it. f and
// copy may be null, sum may be x. A block owns a share. Bytes an element: 8 + e, and e for the copy.
template <int n>
__global__ void sum_kernel(float* sum, floatX* copy, float gamma, const float* x, float alpha, const floatX* f,
                           float beta, int64_t count) {
    for_share<n>(count, [&](int64_t i) {
        Floats<n> z = 0.0f;
        if (f) z = beta * load<n>(f + i);
        z = fma(alpha, load<n>(x + i), z);
        store(sum + i, z);
        if (copy) store(copy + i, gamma * z);
    });
}

void add_up(float* sum, floatX* copy, float gamma, const float* x, float alpha, const floatX* f, float beta,
            int64_t count) {
    with_width<float>(count,
                      [&](auto n) { launch_shares<sum_kernel<n>, n>(count, sum, copy, gamma, x, alpha, f, beta); });
}

// in = s N?(x), where the stream is there already: behind the embedding, and where a probe has set it.
void input_forward(const Model& model, const Junction& j, int64_t N) {
    if (j.input_norm) normalize(model, j.input_norm, {.x = j.x, .y = j.in}, N);
    else if (j.rounded_x) round_floats(j.rounded_x, j.x, N * model.config.C);
}

// F = N?(F)     z = alpha x + beta F     x = N?(z)     in = s N?(x)
// The norm that reads the sum computes it.
void junction_forward(const Model& model, int k, int64_t N) {
    const Junction& j = model.acts.junctions[k];
    if (j.output_norm) normalize(model, j.output_norm, {.f = j.f, .y = j.normed_f}, N);
    NormForward sum = {.x = j.before, .alpha = j.alpha, .f = j.normed_f, .beta = j.beta, .z = j.z};
    if (j.sum_norm) {
        sum.y32 = j.x, sum.y = j.rounded_x;
        normalize(model, j.sum_norm, sum, N);
        if (j.input_norm) normalize(model, j.input_norm, {.x = j.x, .y = j.in}, N);
    } else if (j.input_norm) {
        sum.y = j.in;
        normalize(model, j.input_norm, sum, N);
    } else {
        add_up(j.z, j.rounded_x, 1, j.before, j.alpha, j.normed_f, j.beta, N * model.config.C);
    }
}

HeadNorm head_norm_of(const Model& model, int l, int64_t N) {
    const ModelConfig& c = model.config;
    const SublayerOffsets& w = model.table.sublayers[2 * l - 2];
    return {parameter(model, w.query_gain), parameter(model, w.key_gain), c.eps, N, c.NH, c.NKV, c.HS};
}

// Query, key and value of N tokens as attention reads them, the first token's position being that of `rotations`.
void qkv_forward(Model& model, int l, int B, int T, const float2* rotations) {
    const ModelConfig& c = model.config;
    const int64_t N = (int64_t)B * T;
    const SublayerOffsets& w = model.table.sublayers[2 * l - 2];
    Activations& a = model.acts;
    floatX* qkv = a.qkv[l - 1];
    linear_forward(qkv, a.junctions[2 * l - 2].in, weight(model, w.in), weight(model, w.in_bias), N, c.C,
                   c.qkv_channels());
    if (c.qk_norm) head_norm(qkv, a.unnormed[l - 1], head_norm_of(model, l, N));
    if (c.row().rotary()) rope(qkv, rotations, B, T, c.NH, c.NKV, c.HS, 1);
}

void attention_sublayer_forward(Model& model, int l, int B, int T) {
    const ModelConfig& c = model.config;
    const int64_t N = (int64_t)B * T;
    const SublayerOffsets& w = model.table.sublayers[2 * l - 2];
    Activations& a = model.acts;
    floatX *qkv = a.qkv[l - 1], *attention = a.attention[l - 1];
    qkv_forward(model, l, B, T, a.rotations);
    attention_forward(attention, a.lse[l - 1], qkv, documents(model), B, T, c.NH, c.NKV, c.HS);
    linear_forward(a.junctions[2 * l - 1].f, attention, weight(model, w.out), weight(model, w.out_bias), N, c.NH * c.HS,
                   c.C);
}

// Up to the nonlinearity's output.
void mlp_hidden_forward(Model& model, int l, int64_t N) {
    const ModelConfig& c = model.config;
    const SublayerOffsets& w = model.table.sublayers[2 * l - 1];
    Activations& a = model.acts;
    const floatX* input = a.junctions[2 * l - 1].in;
    floatX *up = a.up[l - 1], *hidden = a.hidden[l - 1];
    if (c.row().gated()) {
        linear_forward(up, input, weight(model, w.in), nullptr, N, c.C, c.up_channels());
        swiglu_forward(hidden, up, N, c.Fp());
    } else {
        linear_gelu_forward(hidden, up, input, weight(model, w.in), weight(model, w.in_bias), N, c.C, c.Fp());
    }
}

void mlp_output_forward(Model& model, int l, int64_t N) {
    const ModelConfig& c = model.config;
    const SublayerOffsets& w = model.table.sublayers[2 * l - 1];
    linear_forward(model.acts.junctions[2 * l].f, model.acts.hidden[l - 1], weight(model, w.out),
                   weight(model, w.out_bias), N, c.Fp(), c.C);
}

void block_forward(Model& model, int l, int B, int T) {
    const int64_t N = (int64_t)B * T;
    attention_sublayer_forward(model, l, B, T);
    junction_forward(model, 2 * l - 1, N);
    mlp_hidden_forward(model, l, N);
    mlp_output_forward(model, l, N);
    junction_forward(model, 2 * l, N);
}

// From tokens in acts.inputs to the head's input in the last junction. after_block(l) is called behind each block. In
// packed rows a document starts where a position is 0. Rotary positions go on to the row's end: attention stays inside
// documents, where it depends on their differences alone.
void blocks_forward(Model& model, int B, int T, const std::function<void(int)>& after_block = {}) {
    const ModelConfig& c = model.config;
    const int64_t N = (int64_t)B * T;
    Activations& a = model.acts;
    embedding_forward(a.junctions[0].z, a.inputs, weight(model, model.table.embedding),
                      weight(model, model.table.positions), N, T, c.C, model.rows_are_packed ? a.positions : nullptr);
    if (model.rows_are_packed) document_spans(a.document, a.positions, 0, B, T);
    else if (documents(model)) document_spans(a.document, a.inputs, model.document_token, B, T);
    input_forward(model, a.junctions[0], N);
    for (int l = 1; l <= c.L; l++) {
        block_forward(model, l, B, T);
        if (after_block) after_block(l);
    }
}

// Losses of acts.targets into acts.losses and state.sums, chunk after chunk of logits. With `backward` the gradients of
// the head and of its input follow at once, before a chunk's logits are overwritten.
void head_loss(Model& model, int64_t N, bool backward) {
    const ModelConfig& c = model.config;
    Activations& a = model.acts;
    const floatX* input = a.junctions[2 * c.L].in;
    const floatX* w = weight(model, model.table.head);
    for (int64_t first = 0; first < N; first += model.chunk) {
        const int64_t rows = std::min<int64_t>(model.chunk, N - first);
        const floatX* x = input + first * c.C;
        linear_forward(a.logits, x, w, nullptr, rows, c.C, c.Vp());
        classifier(a.logits, a.losses + first, a.targets + first, rows, c.V, c.Vp(), backward);
        if (!backward) continue;
        linear_backward_weight(gradient(model, model.table.head), nullptr, x, a.logits, nullptr, rows, c.C, c.Vp(),
                               model.accumulate || first > 0);
        linear_backward_input(a.din + first * c.C, a.logits, w, rows, c.C, c.Vp());
    }
    sum_losses(model.state->sums, a.losses, a.targets, N);
}

// --- Backward ---

// `operands` back through a norm of the plan.
void normalize_backward(const Model& model, const PlannedNorm& norm, NormBackward operands, int64_t N) {
    operands.mean = norm.mean, operands.rstd = norm.rstd;
    operands.gain = parameter(model, norm.parameters.gain);
    operands.scale = norm.scale;
    operands.dgain = gradient(model, norm.parameters.gain), operands.dbias = gradient(model, norm.parameters.bias);
    operands.accumulate = model.accumulate;
    operands.partial = model.acts.partial;
    operands.N = N, operands.C = model.config.C;
    norm_backward(operands);
}

// dx, the gradient of a stream that the next sum and the next sublayer read: factor * sum + sublayer. The norm that
// reads dx adds the two on its way; a null sublayer means that it is done.
struct StreamGradient {
    const float* sum;  // (N, C)
    float factor;
    const floatX* sublayer;  // (N, C) or null
};

// dx = alpha' dz' + s N?'(din), in dstream if there is a norm. Then beta dx too, where F takes it as it is.
StreamGradient stream_backward(const Model& model, const Junction& j, int64_t N) {
    const Activations& a = model.acts;
    if (!j.input_norm) return {j.next_dz, j.next_alpha, a.din};
    normalize_backward(model, j.input_norm,
                       {.dy = a.din,
                        .dres = j.next_dz,
                        .dres_scale = j.next_alpha,
                        .z = j.x,
                        .dz = a.dstream,
                        .df = j.sum_norm ? nullptr : j.beta_dz,
                        .beta = j.beta},
                       N);
    return {a.dstream, 1, nullptr};
}

// dz = N?'(dx)     dF = N?'(beta dz)
void sum_backward(const Model& model, const Junction& j, const StreamGradient& dx, int64_t N) {
    const Activations& a = model.acts;
    if (j.sum_norm) {
        normalize_backward(model, j.sum_norm,
                           {.dy = dx.sublayer,
                            .dy32 = dx.sum,
                            .dy_scale = dx.factor,
                            .z = j.z,
                            .dz = a.dstream,
                            .df = j.beta_dz,
                            .beta = j.beta},
                           N);
    } else if (dx.sublayer) {
        add_up(a.dstream, j.beta_dz, j.beta, dx.sum, dx.factor, dx.sublayer, 1, N * model.config.C);
    }
    if (j.output_norm) {
        normalize_backward(model, j.output_norm, {.dy32 = a.dstream, .dy_scale = j.beta, .f = j.f, .df = j.df}, N);
    }
}

// x and in of junction k, from its z, where they share their memory with other junctions'.
void rebuild_stream(const Model& model, int k, int64_t N) {
    const Junction& j = model.acts.junctions[k];
    if (model.recompute == Recompute::NONE) return;
    if (j.sum_norm) normalize(model, j.sum_norm, {.x = j.z, .y = j.rounded_x, .y32 = j.x}, N);
    if (j.input_norm || !j.sum_norm) input_forward(model, j, N);
}

// All that the backward pass of block l reads and that is not kept, up to F of its MLP where a norm reads that.
void rebuild_block(Model& model, int l, int B, int T) {
    const int64_t N = (int64_t)B * T;
    if (model.recompute == Recompute::NONE) return;
    rebuild_stream(model, 2 * l - 2, N);
    if (model.recompute == Recompute::BLOCK) {
        attention_sublayer_forward(model, l, B, T);
        junction_forward(model, 2 * l - 1, N);
        mlp_hidden_forward(model, l, N);
        if (model.acts.junctions[2 * l].output_norm) mlp_output_forward(model, l, N);
    } else {
        rebuild_stream(model, 2 * l - 1, N);
        if (model.config.row().gated())
            swiglu_forward(model.acts.hidden[l - 1], model.acts.up[l - 1], N, model.config.Fp());
    }
}

void attention_sublayer_backward(Model& model, int l, int B, int T) {
    const ModelConfig& c = model.config;
    const int64_t N = (int64_t)B * T;
    const SublayerOffsets& w = model.table.sublayers[2 * l - 2];
    Activations& a = model.acts;
    const floatX *df = a.junctions[2 * l - 1].df, *qkv = a.qkv[l - 1], *attention = a.attention[l - 1];
    linear_backward_weight(gradient(model, w.out), gradient(model, w.out_bias), attention, df, a.partial, N,
                           c.NH * c.HS, c.C, model.accumulate);
    linear_backward_input(a.dattention, df, weight(model, w.out), N, c.NH * c.HS, c.C);
    attention_backward(a.dqkv, a.delta, a.dattention, attention, a.lse[l - 1], qkv, documents(model),
                       c.row().rotary() ? a.rotations : nullptr, B, T, c.NH, c.NKV, c.HS);
    if (c.qk_norm) {
        head_norm_backward(a.dqkv, gradient(model, w.query_gain), gradient(model, w.key_gain), a.unnormed[l - 1],
                           a.partial, head_norm_of(model, l, N), model.accumulate);
    }
    linear_backward_weight(gradient(model, w.in), gradient(model, w.in_bias), a.junctions[2 * l - 2].in, a.dqkv,
                           a.partial, N, c.C, c.qkv_channels(), model.accumulate);
    linear_backward_input(a.din, a.dqkv, weight(model, w.in), N, c.C, c.qkv_channels());
}

void mlp_sublayer_backward(Model& model, int l, int64_t N) {
    const ModelConfig& c = model.config;
    const SublayerOffsets& w = model.table.sublayers[2 * l - 1];
    Activations& a = model.acts;
    const floatX *df = a.junctions[2 * l].df, *up = a.up[l - 1], *hidden = a.hidden[l - 1];
    linear_backward_weight(gradient(model, w.out), gradient(model, w.out_bias), hidden, df, a.partial, N, c.Fp(), c.C,
                           model.accumulate);
    if (c.row().gated()) {
        linear_backward_input(a.dhidden, df, weight(model, w.out), N, c.Fp(), c.C);
        swiglu_backward(a.dup, a.dhidden, up, N, c.Fp());
    } else {
        linear_gelu_backward_input(a.dup, df, weight(model, w.out), up, N, c.Fp(), c.C);
    }
    linear_backward_weight(gradient(model, w.in), gradient(model, w.in_bias), a.junctions[2 * l - 1].in, a.dup,
                           a.partial, N, c.C, c.up_channels(), model.accumulate);
    linear_backward_input(a.din, a.dup, weight(model, w.in), N, c.C, c.up_channels());
}

// From dx behind block l to the gradient of its input, in acts.din. What is before the sum reads the x behind the
// block, in the memory that is then the x before it.
void block_backward(Model& model, int l, const StreamGradient& dx, int B, int T) {
    const int64_t N = (int64_t)B * T;
    const Junction &inside = model.acts.junctions[2 * l - 1], &behind = model.acts.junctions[2 * l];
    rebuild_block(model, l, B, T);
    sum_backward(model, behind, dx, N);
    mlp_sublayer_backward(model, l, N);
    sum_backward(model, inside, stream_backward(model, inside, N), N);
    attention_sublayer_backward(model, l, B, T);
}

// How many different tokens, and positions of packed rows, are in a batch.
struct Distinct {
    int tokens = 0, positions = 0;
};

// From the gradient of the head's input, in acts.din, to all gradients, but for those of blocks that are frozen from
// the first one on.
void blocks_backward(Model& model, int B, int T, const Distinct& distinct, bool last_micro_batch) {
    const ModelConfig& c = model.config;
    const int64_t N = (int64_t)B * T;
    Activations& a = model.acts;
    const auto finished = [&](int block) {
        if (last_micro_batch && model.on_block_gradients) model.on_block_gradients(block);
    };
    for (int l = c.L; l >= 0; l--) {
        const Junction& j = a.junctions[2 * l];
        const StreamGradient dx = stream_backward(model, j, N);
        finished(l + 1);
        if (l < model.frozen_blocks) {
            model.accumulate = true;
            return;
        }
        if (l > 0) block_backward(model, l, dx, B, T);
        else sum_backward(model, j, dx, N);
    }
    float *dwte = gradient(model, model.table.embedding), *dwpe = gradient(model, model.table.positions);
    // A tied embedding has the head's gradient by now.
    if (!model.accumulate && !c.tied)
        CHECK_CUDA(cudaMemsetAsync(dwte, 0, (int64_t)c.Vp() * c.C * sizeof(float), main_stream));
    embedding_backward(dwte, a.dstream, a.token_rows, a.token_starts, a.token_ids, distinct.tokens, c.C);
    if (dwpe && model.rows_are_packed) {
        if (!model.accumulate)
            CHECK_CUDA(cudaMemsetAsync(dwpe, 0, (int64_t)c.positions * c.C * sizeof(float), main_stream));
        embedding_backward(dwpe, a.dstream, a.position_rows, a.position_starts, a.position_ids, distinct.positions,
                           c.C);
    } else if (dwpe) {
        position_backward(dwpe, a.dstream, B, T, c.C, c.positions, model.accumulate);
    }
    finished(0);
    model.accumulate = true;
}

// --- The steps of training, as the main loop and the tests call them ---

template <class T>
void upload(T* device, const T* host, int64_t count) {
    CHECK_CUDA(cudaMemcpyAsync(device, host, count * sizeof(T), cudaMemcpyHostToDevice, main_stream));
}

// positions: of packed rows, (N); else null.
void upload_batch(Model& model, const int32_t* inputs, const int32_t* targets, int64_t N,
                  const int32_t* positions = nullptr) {
    upload(model.acts.inputs, inputs, N);
    upload(model.acts.targets, targets, N);
    if (positions) upload(model.acts.positions, positions, N);
    model.rows_are_packed = positions != nullptr;
}

// What embedding_backward needs of a batch: its rows sorted by their tokens, or positions. Returns how many of these
// occur. The host sorts while the device is still busy with the micro-batch before, and waits only for its copy of the
// last but one.
int upload_sorted_rows(std::optional<TokenRows>& slot, const int32_t* tokens, int64_t N, int32_t* sorted,
                       int32_t* starts, int32_t* ids) {
    TokenRows& rows = slot ? *slot : slot.emplace();
    CHECK_CUDA(cudaEventSynchronize(rows.uploaded));
    rows.sort(tokens, N);
    upload(sorted, rows.rows.data(), N);
    upload(starts, rows.starts.data(), (int64_t)rows.starts.size());
    upload(ids, rows.tokens.data(), (int64_t)rows.tokens.size());
    CHECK_CUDA(cudaEventRecord(rows.uploaded, main_stream));
    return (int)rows.tokens.size();
}

Distinct upload_token_rows(Model& model, const int32_t* inputs, const int32_t* positions, int64_t N) {
    const Activations& a = model.acts;
    const int slot = (int)(model.micro_batch++ % 2);
    Distinct distinct;
    distinct.tokens = upload_sorted_rows(model.token_rows[slot], inputs, N, a.token_rows, a.token_starts, a.token_ids);
    if (positions && model.table.positions >= 0) {
        distinct.positions = upload_sorted_rows(model.position_rows[slot], positions, N, a.position_rows,
                                                a.position_starts, a.position_ids);
    }
    return distinct;
}

// Before the first micro-batch of a step, which overwrites the gradients: clears loss and count.
void begin_step(Model& model) {
    model.accumulate = false;
    CHECK_CUDA(cudaMemsetAsync(model.state, 0, sizeof(StepState::sums), main_stream));
}

// Adds the loss (nats, summed) and the gradients of one micro-batch (B, T); positions as for upload_batch.
void forward_backward(Model& model, const int32_t* inputs, const int32_t* targets, int B, int T,
                      bool last_micro_batch = true, const int32_t* positions = nullptr) {
    const int64_t N = (int64_t)B * T;
    upload_batch(model, inputs, targets, N, positions);
    const Distinct distinct = upload_token_rows(model, inputs, positions, N);
    blocks_forward(model, B, T);
    head_loss(model, N, true);
    blocks_backward(model, B, T, distinct, last_micro_batch);
    model.rows_are_packed = false;  // what follows may bring its own inputs
}

// Adds the loss of one batch without gradients.
void forward_loss(Model& model, const int32_t* inputs, const int32_t* targets, int B, int T,
                  const int32_t* positions = nullptr) {
    upload_batch(model, inputs, targets, (int64_t)B * T, positions);
    blocks_forward(model, B, T);
    head_loss(model, (int64_t)B * T, false);
    model.rows_are_packed = false;
}

// Freezes the embeddings, the first `blocks` blocks, or both.
void freeze(Model& model, bool embeddings, int blocks) {
    model.frozen.clear();
    for (int b = embeddings ? 0 : 1; b <= blocks; b++) model.frozen.push_back(model.table.blocks[b]);
    model.frozen_blocks = embeddings ? (int)model.frozen.size() : 0;
}

// Norm, clipping, AdamW; or nothing, where loss or norm is not finite. `record`: last_update gets the update's size.
void update(Model& model, const AdamW& adam, float clip, bool record = false) {
    for (const Range& r : model.frozen)  // it does not count to the norm either
        CHECK_CUDA(cudaMemsetAsync(model.gradients + r.begin, 0, (r.end - r.begin) * sizeof(float), main_stream));
    const int partials = square_sum_partials(model.table.size);
    square_sums(model.norm_partial, model.gradients, model.table.size);
    launch<prepare_update_kernel>(dim3(1), block_threads(256), 0, model.state, model.norm_partial, partials, adam,
                                  clip);
    const auto adamw = [&](int64_t at, int64_t count, bool decayed) {
        with_width<float>(count, [&](auto n) {
            launch_shares<adamw_kernel<n>, n>(count, model.masters + at, model.weights + at, model.gradients + at,
                                              model.first_moment + at, model.second_moment + at, model.state, adam,
                                              decayed ? adam.weight_decay : 0.0f);
        });
    };
    model.last_update.clear();
    if (!record) {
        for (const Range& r : model.table.decay_ranges(model.frozen)) adamw(r.begin, r.end - r.begin, r.decayed);
        return;
    }
    for (const Parameter& p : model.table.parameters) {
        const float* parameter = model.masters + p.offset;
        const DeviceArray<float> before(p.padded_count());
        CHECK_CUDA(cudaMemcpyAsync(before.data, parameter, before.count * sizeof(float), cudaMemcpyDeviceToDevice,
                                   main_stream));
        const auto holds = [&](const Range& r) { return r.begin <= p.offset && p.offset < r.end; };
        if (std::none_of(model.frozen.begin(), model.frozen.end(), holds)) adamw(p.offset, p.padded_count(), p.matrix);
        model.last_update.push_back(update_squares(before.data, parameter, p.padded_count()));
    }
}

// After the masters were set by anything but update().
void round_weights(Model& model) {
    if constexpr (!is_fp32) round_floats(model.weights, model.masters, model.table.size);
}

// ---------------------------------------------------------------------------------------------------------------
// 10. Data parallelism
//
// Each rank has the whole model and its own share of the batch. A block's gradients are summed over the ranks as soon
// as its backward pass is done, in NCCL's own stream, while the blocks before it are still computing.

void share_gradients(Model& model, const Cluster& cluster) {
    if (cluster.ranks == 1) return;
    model.on_block_gradients = [&model, cluster](int block) {
        const Range& range = model.table.blocks[block];
        sum_over_ranks(cluster, model.gradients + range.begin, range.end - range.begin);
    };
}

// ---------------------------------------------------------------------------------------------------------------
// 11. Checkpoints: Hugging Face folders, exact resume

#include "trainer/checkpoints.cuh"

// ---------------------------------------------------------------------------------------------------------------
// 12. Probes: what a block does to the residual stream, and what the loss would be without it

#include "trainer/probes.cuh"

// ---------------------------------------------------------------------------------------------------------------
// 13. Cost: operations, memory, the device's speed, --dry-run

#include "trainer/cost.cuh"

// ---------------------------------------------------------------------------------------------------------------
// 14. Generation, questions: text that the model writes, tasks that it is asked

#include "trainer/evaluate.cuh"
#include "trainer/generate.cuh"

// ---------------------------------------------------------------------------------------------------------------
// 15. Step

// Micro-batches in pinned memory, and for each that the loader still keeps an event behind its last use.
struct TrainData {
    PinnedMemory memory;
    std::unique_ptr<TrainLoader> loader;  // null: nothing is trained
    size_t shard_count = 0;
    cudaEvent_t used[TrainLoader::kept];
    int64_t taken = 0;

    int64_t tokens() const { return loader ? loader->tokens() : 0; }
    int64_t rows() const { return loader ? loader->rows() : 0; }
};

// next() gives the oldest kept batch back to the reading thread: the device must be done with it, which it long is
// unless it is that many micro-batches behind.
const Batch& next_batch(TrainData& data) {
    const Watchdog::Phase phase(watchdog, "waiting for data, or for the device to have used it");
    CHECK_CUDA(cudaEventSynchronize(data.used[data.taken % TrainLoader::kept]));
    return data.loader->next();
}

// After the device was given all work that reads the batch.
void batch_is_used(TrainData& data) {
    CHECK_CUDA(cudaEventRecord(data.used[data.taken++ % TrainLoader::kept], main_stream));
}

// One training step's numbers on their way to the host, and what belongs to them.
struct StepReport {
    StepState* state = nullptr;  // pinned
    cudaEvent_t begin, end;
    int64_t step = 0, tokens = 0;  // tokens: trained on so far, this step's included
    double lr = 0;
    double data_wait_ms = 0;  // of this rank: the disk was too slow
    bool pending = false;
};

struct Trainer {
    Settings settings;
    Cluster cluster;
    Model model;
    FolderLock lock;  // of the run's folder, on the first rank
    RunLog log;
    Progress progress;
    json record;                              // of the run, for its checkpoints
    std::string resumed_from;                 // a checkpoint's path; empty: none
    std::string unsaid;                       // the path of one that was saved, until the console says so
    std::set<std::string> whole_checkpoints;  // that this process wrote or has read to check them
    std::unique_ptr<Tokenizer> tokenizer;     // null without a tokenizer.json
    Files tokenizer_files;                    // that go into each checkpoint
    TrainData data;
    std::unique_ptr<ValLoader> val;
    std::vector<Task> tasks;  // of --evaluate
    StepReport reports[2];
    double peak = 0;  // operations a second, all ranks
    std::chrono::steady_clock::time_point started, last_save;
    int64_t first_step = 0;
    int64_t saved_step = 0;      // of the newest checkpoint, or where there is nothing to save yet
    int64_t replaced_step = -1;  // of the checkpoint that the next one replaces
    bool can_save = false;       // parameters, moments and progress are those of one step, and worth keeping
    bool save_by_clock = false;  // the first rank's, --save-minutes having passed
    std::string save_error;      // why the last checkpoint could not be written; empty when it was
    bool same_settings = false;  // as those of the run that is resumed
    int skipped_in_a_row = 0;
    int stop_signal = 0;  // that any rank was sent: save and end

    bool first_rank() const { return cluster.rank == 0; }
    // That a rank computes one after the other for a step.
    int64_t micro_batches() const {
        return settings.total_batch_size / ((int64_t)settings.batch_size * settings.seq_len * cluster.ranks);
    }
};

constexpr int max_skipped_in_a_row = 10;

// SIGTERM, SIGINT, SIGUSR1 (what Slurm sends before time is up), SIGHUP (a terminal that closes; not under nohup) and
// SIGPIPE (nobody reads what is printed): the step is finished, a checkpoint saved, exit 3. A second one has its usual
// effect, but for SIGPIPE, which each line printed from then on would raise.
volatile sig_atomic_t signal_received = 0;

void catch_signals() {
    struct sigaction action = {}, before;
    action.sa_handler = [](int signal) { signal_received = signal; };
    for (const int signal : {SIGTERM, SIGINT, SIGUSR1, SIGHUP, SIGPIPE}) {
        action.sa_flags = SA_RESTART | (signal == SIGPIPE ? 0 : SA_RESETHAND);
        sigaction(signal, &action, &before);
        if (signal == SIGHUP && before.sa_handler == SIG_IGN) sigaction(signal, &before, nullptr);
    }
}

// Whether any rank was sent a signal, before the first step: later the report of a step says so.
bool stopped_by_signal(Trainer& t) {
    int signal = signal_received;
    const Watchdog::Phase phase(watchdog, waiting_for_ranks);
    reduce(&signal, 1, MPI_MAX);
    t.stop_signal = signal;
    return signal != 0;
}

bool save_minutes_passed(const Trainer& t) {
    const std::chrono::duration<double, std::ratio<60>> passed = std::chrono::steady_clock::now() - t.last_save;
    return t.settings.save_minutes > 0 && passed.count() >= t.settings.save_minutes;
}

// What was thrown here or by a library, in a line for people.
std::string one_line(const std::exception& error) {
    if (const auto* file = dynamic_cast<const std::filesystem::filesystem_error*>(&error))
        return first_line(file->path1().string() + ": " + file->code().message());
    if (dynamic_cast<const std::bad_alloc*>(&error))
        return "out of memory on the host: lower --batch-size or --seq-len, or start fewer ranks here";
    return first_line(error.what());
}

// A fault that training survives: said in a line.
void report_fault(const std::string& fault) {
    fprintf(stderr, "train_gpt: %s; training goes on\n", first_line(fault).c_str());
}

// A full disk does not end a run: its lines wait until there is room.
void log_event(Trainer& t, const char* event, const json& fields) {
    const bool known = !t.log.error.empty();
    if (!t.log.write(event, fields) && !known) report_fault(t.log.error + ": its lines wait until there is room");
}

// log.jsonl for programs, a line on the console for people.
void write_step(Trainer& t, const StepReport& report, double step_ms, double data_wait_ms) {
    const Settings& s = t.settings;
    const StepState& state = *report.state;
    const double loss = state.sums[0] / state.sums[1];
    const double tokens_per_s = s.total_batch_size / (step_ms * 1e-3);
    const double mfu = tokens_per_s * operations_per_token(t.model, s.seq_len) / t.peak;
    json fields = {{"step", report.step},
                   {"tokens", report.tokens},
                   {"loss", loss},
                   {"lr", report.lr},
                   {"grad_norm", state.gradient_norm},
                   {"step_ms", step_ms},
                   {"tokens_per_s", tokens_per_s},
                   {"mfu", mfu},
                   {"data_wait_ms", data_wait_ms}};
    if (!state.applied) fields["skipped"] = t.progress.skipped;
    const bool padded = s.pack != "stream";  // so that not every token is trained on
    if (padded) fields["targets"] = (int64_t)state.sums[1];
    log_event(t, "train", fields);
    const double elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - t.started).count();
    const double left = elapsed / (double)(report.step - t.first_step) * (double)(s.steps - report.step);
    printf(
        "step %lld/%lld | loss %.4f | lr %.2e | grad norm %.3f | %.0f ms | %s tokens/s | MFU %.1f%% | %s left%s%s%s\n",
        (long long)report.step, (long long)s.steps, loss, report.lr, state.gradient_norm, step_ms,
        with_commas(tokens_per_s).c_str(), 100 * mfu, duration(left).c_str(),
        padded ? (" | " + with_commas(state.sums[1]) + " targets").c_str() : "",
        data_wait_ms > 0 ? text(" | waited %.1f ms for data", data_wait_ms).c_str() : "",
        state.applied ? "" : " | not finite: update skipped");
    fflush(stdout);
}

// Waits for the step's end and writes its numbers down. All ranks call, as they do train_step; or, after an error, one
// alone.
void finish_report(Trainer& t, StepReport& report, bool alone = false) {
    if (!report.pending) return;
    report.pending = false;
    const Watchdog::Phase phase(watchdog, "waiting for the device to finish the step");
    CHECK_CUDA(cudaEventSynchronize(report.end));
    float ms = 0;
    CHECK_CUDA(cudaEventElapsedTime(&ms, report.begin, report.end));
    const bool applied = report.state->applied;
    t.skipped_in_a_row = applied ? 0 : t.skipped_in_a_row + 1;
    t.progress.skipped += !applied;
    // The largest of all ranks: the others wait for the slowest, and all must save and stop after the same step.
    const bool minutes_passed = t.first_rank() && save_minutes_passed(t);
    double largest[3] = {report.data_wait_ms, (double)signal_received, (double)minutes_passed};
    if (!alone) {
        const Watchdog::Phase reduction(watchdog, waiting_for_ranks);
        reduce(largest, 3, MPI_MAX);
    }
    t.stop_signal = (int)largest[1];
    t.save_by_clock = largest[2] > 0;
    if (t.first_rank() || alone) write_step(t, report, ms, largest[0]);
    if (t.skipped_in_a_row >= max_skipped_in_a_row) {
        t.can_save = false;  // what diverged is not to be resumed from
        throw Error(
            text("loss or gradient norm was not finite in %d steps in a row, up to step %lld: lower --lr (now %g) or "
                 "lengthen --warmup",
                 max_skipped_in_a_row, (long long)report.step, t.settings.lr));
    }
}

bool probe_follows(const Settings& s, int64_t step) {
    return s.probe_every > 0 && (step % s.probe_every == 0 || step == s.steps);
}

// One optimizer step: micro-batches, sum over ranks, update; its numbers follow in a report.
void train_step(Trainer& t) {
    const Settings& s = t.settings;
    const int64_t step = t.progress.step + 1, micro_batches = t.micro_batches();
    StepReport& report = t.reports[step % 2];
    watchdog.at_step(step);
    const Watchdog::Phase phase(watchdog, "computing");
    CHECK_CUDA(cudaEventRecord(report.begin, main_stream));
    set_step(t.model, step);
    begin_step(t.model);
    const double waited_before = t.data.loader->waited_ms();
    for (int64_t m = 0; m < micro_batches; m++) {
        const Batch& batch = next_batch(t.data);
        forward_backward(t.model, batch.inputs.data(), batch.targets.data(), s.batch_size, s.seq_len,
                         m == micro_batches - 1, batch.positions.empty() ? nullptr : batch.positions.data());
        batch_is_used(t.data);
    }
    report.data_wait_ms = t.data.loader->waited_ms() - waited_before;
    sum_over_ranks(t.cluster, t.model.state->sums, 2);
    wait_for_sums(t.cluster);
    const double lr = learning_rate(s, step);
    const AdamW adam = {(float)lr, (float)s.beta1, (float)s.beta2, (float)s.eps, (float)s.weight_decay};
    t.can_save = false;
    update(t.model, adam, (float)s.grad_clip, probe_follows(s, step));
    CHECK_CUDA(cudaMemcpyAsync(report.state, t.model.state, sizeof(StepState), cudaMemcpyDeviceToHost, main_stream));
    CHECK_CUDA(cudaEventRecord(report.end, main_stream));
    t.progress.step = step;
    t.progress.tokens += s.total_batch_size;
    report.step = step, report.tokens = t.progress.tokens, report.lr = lr, report.pending = true;
    t.progress.rows = t.data.loader->position();
    t.can_save = true;
    finish_report(t, t.reports[(step - 1) % 2]);  // last step's: this one is still running
}

// ---------------------------------------------------------------------------------------------------------------
// 16. Between steps: validation, probes, questions, samples, checkpoints

// What the first rank does alone, for as long as it takes: the others wait, and do not take it for a rank that hangs.
// work() returns whether it succeeded, which all ranks then know.
template <class Work>
bool on_first_rank(const Trainer& t, const char* name, Work work) {
    int succeeded = 0;
    if (t.first_rank()) {
        const Watchdog::Phase phase(watchdog, name);
        succeeded = work();
    }
    const Watchdog::Phase phase(watchdog, t.first_rank() ? waiting_for_ranks : Watchdog::unwatched);
    broadcast_bytes(&succeeded, sizeof(succeeded), 0);
    return succeeded;
}

// Mean loss in nats over the validation tokens, the same for any batch size and any number of ranks.
double validate(Model& model, const ValLoader& loader, const Cluster& cluster) {
    const Watchdog::Phase phase(watchdog, "validating");
    CHECK_CUDA(cudaMemsetAsync(model.state, 0, sizeof(StepState::sums), main_stream));
    Batch batch;
    const int64_t rounds = ceil_div(loader.batches(), cluster.ranks);
    for (int64_t round = 0; round < rounds; round++) {
        loader.read(round * cluster.ranks + cluster.rank, batch);  // past the last batch nothing counts
        forward_loss(model, batch.inputs.data(), batch.targets.data(), model.B, model.T,
                     batch.positions.empty() ? nullptr : batch.positions.data());
        CHECK_CUDA(cudaStreamSynchronize(main_stream));  // the batch's memory is read until here
    }
    sum_over_ranks(cluster, model.state->sums, 2);
    wait_for_sums(cluster);
    double sums[2];
    CHECK_CUDA(cudaMemcpyAsync(sums, model.state->sums, sizeof(sums), cudaMemcpyDeviceToHost, main_stream));
    CHECK_CUDA(cudaStreamSynchronize(main_stream));
    return sums[0] / sums[1];
}

void run_validation(Trainer& t) {
    const double loss = validate(t.model, *t.val, t.cluster);
    if (!t.first_rank()) return;
    log_event(t, "val", {{"step", t.progress.step}, {"loss", loss}, {"ppl", std::exp(loss)}});
    printf("step %lld | validation loss %.4f | perplexity %.2f\n", (long long)t.progress.step, loss, std::exp(loss));
    fflush(stdout);
}

// The same batch each time: the first --probe-tokens validation tokens in whole sequences, as a stream whatever --pack
// says, since padding is no text.
ValLoader open_probe_tokens(const Settings& s, int V) {
    ValLoader loader(s.val, 1, s.seq_len, s.probe_tokens, V);
    if (loader.predicted_tokens() < s.seq_len) {
        throw Error(text("--probe-tokens: %lld validation tokens are no whole sequence of %d",
                         (long long)loader.predicted_tokens(), s.seq_len));
    }
    return loader;
}

void probe_first_tokens(Trainer& t) {
    const ValLoader loader = open_probe_tokens(t.settings, t.model.config.V);
    const int64_t sequences = loader.predicted_tokens() / t.settings.seq_len;
    std::vector<int32_t> inputs, targets;
    Batch sequence;
    for (int64_t i = 0; i < sequences; i++) {
        loader.read(i, sequence);
        inputs.insert(inputs.end(), sequence.inputs.begin(), sequence.inputs.end());
        targets.insert(targets.end(), sequence.targets.begin(), sequence.targets.end());
    }
    const Probe probe = probe_model(t.model, inputs, targets);
    json fields = {{"step", t.progress.step}, {"tokens", t.progress.tokens}};
    fields.update(fields_of(probe));
    log_event(t, "probe", fields);
    print_probe(probe, t.progress.step);
}

void run_probe(Trainer& t) {
    on_first_rank(t, "probing", [&] { return probe_first_tokens(t), true; });
}

void run_evaluation(Trainer& t) {
    const std::vector<ChoiceResult> results = evaluate(t.model, t.tasks, t.cluster);
    if (!t.first_rank()) return;
    const std::vector<TaskScores> all = score_tasks(t.tasks, results);
    for (const TaskScores& scores : all) {
        json fields = {{"step", t.progress.step}};
        fields.update(fields_of(scores));
        log_event(t, "eval", fields);
    }
    printf("%s", scores_table(all).c_str());
    fflush(stdout);
    if (!t.settings.evaluate_out.empty()) replace_file(t.settings.evaluate_out, results_jsonl(t.tasks, results));
}

// Nobody waits for a sample as for a validation: one that fails costs no more than itself.
void print_sample(Trainer& t) {
    if (!t.tokenizer) return;
    on_first_rank(t, "sampling", [&] {
        try {
            const uint64_t stream = random_bits(t.settings.seed, t.progress.step);
            const std::string sample = sample_text(t.model, *t.tokenizer, t.settings.prompt, 64, stream);
            printf("sample: %s\n", sample.c_str());
            fflush(stdout);
            return true;
        } catch (const std::exception& e) {
            report_fault(text("no sample at step %lld: ", (long long)t.progress.step) + one_line(e));
            return false;
        }
    });
}

// A checkpoint of the step that is done, by this rank.
void write_checkpoint(Trainer& t) {
    const std::string path = save_checkpoint(t.model, t.settings.out, t.progress, t.record, t.tokenizer_files);
    t.whole_checkpoints.insert(path);
    t.unsaid = path;
}

// On the console, after all else of the step: what was saved is the last thing that a run says.
void say_saved(Trainer& t) {
    if (t.unsaid.empty()) return;
    printf("saved %s\n", t.unsaid.c_str());
    fflush(stdout);
    t.unsaid.clear();
}

void say_set_aside(const std::string& damage) {
    fprintf(stderr, "train_gpt: a damaged checkpoint is set aside: %s\n", damage.c_str());
}

// `by_clock`: for nothing but --save-minutes, so that the next one replaces it.
void remove_checkpoints(Trainer& t, bool by_clock) {
    const std::string folder = checkpoint_folder::checkpoints_folder(t.settings.out);
    if (std::filesystem::exists(folder + "/" + checkpoint_name(t.replaced_step)))
        checkpoint_folder::remove(folder, t.replaced_step);
    t.replaced_step = by_clock ? t.progress.step : -1;
    const std::string saved = folder + "/" + checkpoint_name(t.progress.step);
    remove_old_checkpoints(t.settings.out, t.settings.keep, {saved, t.resumed_from}, [&](const std::string& other) {
        if (t.whole_checkpoints.contains(other)) return true;
        const std::string damage = checkpoint_damage(other);
        if (damage.empty()) t.whole_checkpoints.insert(other);
        else say_set_aside(damage);
        return damage.empty();
    });
}

// Where the checkpoint cannot be written, t.save_error says why.
void save(Trainer& t, bool by_clock = false) {
    t.save_error.clear();
    const bool saved = on_first_rank(t, "saving a checkpoint", [&] {
        try {
            write_checkpoint(t);
        } catch (const std::exception& e) {
            t.save_error = text("step %lld is not saved: ", (long long)t.progress.step) + one_line(e);
            return false;
        }
        try {
            remove_checkpoints(t, by_clock);
        } catch (const std::exception& e) {
            report_fault("cannot remove an old checkpoint: " + one_line(e));
        }
        return true;
    });
    if (saved) t.saved_step = t.progress.step;
    else if (!t.first_rank()) t.save_error = "the first rank could not save";
    t.last_save = std::chrono::steady_clock::now();
    t.save_by_clock = false;
}

// After an error between two updates, when parameters, moments and progress of this rank belong together: since every
// rank has them whole, it is the one that met the error that saves. The others may wait for it in vain.
void save_after_error(Trainer& t) {
    if (!t.can_save || t.saved_step == t.progress.step) return;
    t.can_save = false;
    const std::string& out = t.settings.out;
    try {
        const std::string folder = checkpoint_folder::checkpoints_folder(out);
        const FolderLock turn(folder, true);  // several ranks may have met the error
        if (std::filesystem::exists(folder + "/" + checkpoint_name(t.progress.step))) {
            sleep(5);  // the rank that saved it is about to end them all
            return;
        }
        if (!t.log.file) t.log.open(out + "/log.jsonl");
        finish_report(t, t.reports[t.progress.step % 2], true);
        CHECK_CUDA(cudaDeviceSynchronize());
        write_checkpoint(t);
    } catch (const std::exception& e) {
        fprintf(stderr, "train_gpt: step %lld is not saved: %s\n", (long long)t.progress.step, one_line(e).c_str());
    }
}

// ---------------------------------------------------------------------------------------------------------------
// 17. Preparation: data, memory, the run's folder, the checkpoint to go on from

#include "trainer/prepare.cuh"

// ---------------------------------------------------------------------------------------------------------------
// 18. Training

// To the last step; false when a signal ended it before.
bool train(Trainer& t) {
    const Settings& s = t.settings;
    t.data.loader->seek(t.progress.rows);
    watchdog.at_step(t.progress.step);
    t.last_save = std::chrono::steady_clock::now();
    if (stopped_by_signal(t)) return false;
    if (s.steps == 0 && t.progress.step == 0) save(t);
    // What a resumed run has done for this step is not done again.
    const auto done = [&](const char* event, size_t events = 1) {
        return on_first_rank(t, "reading the log", [&] {
            return t.same_settings && count_events(s.out + "/log.jsonl", event, t.progress.step) >= events;
        });
    };
    if (!done("val")) run_validation(t);
    if (s.probe_every > 0 && !done("probe")) run_probe(t);
    // Not at the start, but where a stop came between the step and its evaluation.
    const bool evaluation_due = s.evaluate_every > 0 && t.progress.step > 0 &&
                                (t.progress.step == s.steps || t.progress.step % s.evaluate_every == 0);
    if (evaluation_due && !done("eval", t.tasks.size())) run_evaluation(t);
    if (stopped_by_signal(t)) return false;
    t.started = std::chrono::steady_clock::now();
    const auto due = [&](int64_t every) { return every > 0 && t.progress.step % every == 0; };
    while (t.progress.step < s.steps) {
        train_step(t);
        const bool last = t.progress.step == s.steps, stopped = t.stop_signal && !last;
        const bool validation_due = !stopped && (last || due(s.eval_every));
        const bool probe_due = !stopped && probe_follows(s, t.progress.step);
        const bool evaluation_due = !stopped && s.evaluate_every > 0 && (last || due(s.evaluate_every));
        const bool sample_due = !stopped && due(s.sample_every);
        const bool by_clock = t.save_by_clock && !stopped && !last && !due(s.save_every);
        const bool save_due = stopped || last || by_clock || due(s.save_every);
        if (!validation_due && !probe_due && !evaluation_due && !sample_due && !save_due) continue;
        finish_report(t, t.reports[t.progress.step % 2]);
        // First, so that nothing is lost when what follows fails.
        if (save_due) save(t, by_clock);
        if (stopped) return false;
        if (save_due && !t.save_error.empty() && !last && t.first_rank()) report_fault(t.save_error);
        if (validation_due) run_validation(t);
        if (probe_due) run_probe(t);
        if (evaluation_due) run_evaluation(t);
        if (sample_due) print_sample(t);
        say_saved(t);
    }
    return true;
}

// A prepared run, to its end. Returns the exit status.
int run(Trainer& t) {
    bool stopped = false;
    if (t.settings.probe_only) {
        run_validation(t);
        run_probe(t);
    } else {
        stopped = !train(t);
        say_saved(t);
    }
    if (!t.save_error.empty()) {  // the last checkpoint, without which the run was in vain
        t.can_save = false;
        throw Error(t.save_error);
    }
    const std::string reason = stopped ? text("stopped by SIG%s", sigabbrev_np(t.stop_signal)) : "done";
    if (!t.log.write("end", {{"reason", reason}})) throw Error(t.log.error);
    if (stopped && t.first_rank()) printf("%s: the same command with --resume goes on\n", reason.c_str());
    return stopped ? 3 : 0;
}

// "rank 1: reason", on stderr.
void say_failure(const std::string& reason) {
    const auto [rank, ranks] = World();
    fprintf(stderr, "train_gpt: %s%s\n", ranks > 1 ? text("rank %d: ", rank).c_str() : "", reason.c_str());
}

// Says why, in one line, saves what would be lost, and takes the other ranks down. Returns the exit status.
int fail(Trainer& t, const std::exception& error, int exit_status) {
    const int rank = World().rank;
    // What stops all ranks is said once: by the first, while the others wait to be taken down, which takes mpirun a
    // second.
    if (rank != 0) std::this_thread::sleep_for(std::chrono::seconds(3));
    const std::string reason = one_line(error);
    if (rank == 0) say_failure(reason);
    save_after_error(t);
    say_saved(t);
    if (rank != 0) say_failure(reason);
    t.log.write("end", {{"reason", reason}});
    abort_world(exit_status);
    return exit_status;
}

// The main thread gets on no more, so that this one says what is known, and ends all ranks.
void end_hung_run(const std::string& where) {
    say_failure(where + ": look for what this or another rank waits for; --resume goes on from the last checkpoint, " +
                "--timeout says how long to wait");
    alarm(10);  // in case that MPI hangs as well
    abort_world(1);
    _exit(1);
}

// A rank that ended before (--help) or means something else (--dry-run) would be waited for.
void join_world(const Settings& s, int* argc, char*** argv) {
    const Watchdog::Phase phase(watchdog, "waiting for all ranks to start");
    enter_world(argc, argv);
    const auto [rank, ranks] = World();
    check_ranks_agree(rank, ranks, {{"dry-run", s.dry_run}, {"generate", s.generate}});
}

// Where a shell closed one of them (>&-), the next file that is opened would get its number, and what is printed: the
// log, say.
void open_standard_streams() {
    int opened;
    do opened = open("/dev/null", O_RDWR);
    while (opened >= 0 && opened <= STDERR_FILENO);
    close(opened);
}

#ifndef TESTING
int main(int argc, char** argv) {
    open_standard_streams();
    Trainer trainer;
    CommandLine command_line(trainer.settings, build);
    setvbuf(stdout, nullptr, _IOLBF, 0);
    if (const std::optional<int> status = command_line.parse(argc, argv)) return *status;
    Settings& s = trainer.settings;
    const bool trains = !s.dry_run && !s.probe_only && !s.generate && !s.evaluates_only();
    if (trains) catch_signals();
    watchdog.start(s.timeout, end_hung_run);
    int status = 0;
    try {
        join_world(s, &argc, &argv);
        if (s.generate) {
            check_texts(s);
            generate(s);
        } else if (s.dry_run) {
            dry_run(s);
        } else if (s.evaluates_only()) {
            trainer.cluster = join_cluster();
            prepare_evaluation(trainer);
            run_evaluation(trainer);
        } else {
            trainer.cluster = join_cluster();
            prepare(trainer, command_line);
            status = run(trainer);
        }
    } catch (const UsageError& e) {
        status = fail(trainer, e, 2);
    } catch (const std::exception& e) {
        status = fail(trainer, e, 1);
    }
    watchdog.stop();
    leave_world();
    return status;
}
#endif
