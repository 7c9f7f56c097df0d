// Normalization: the variants that NORM selects, and the kernels they all share.
//
//   1. Policy     what each NORM does around a sublayer; nothing else in the program tests NORM (which one a program
//                 has, -DNORM=LNS, is trainer/norm.cpp: kernels are the same in all)
//   2. Forward    residual sum + RMSNorm or LayerNorm + output scale, one kernel
//   3. Backward   the same, reversed
//
// N(z) = gain * zhat + bias, with zhat = (z - mean(z)) * rstd for LayerNorm (GPT-2 family) and zhat = z * rstd, without
// bias, for RMSNorm (LLaMA family). F is a sublayer: attention, then MLP. Blocks count from l = 1.
#pragma once
#include <cmath>
#include <string>

#include "trainer/device.cuh"
#include "trainer/norm.h"

// ---------------------------------------------------------------------------------------------------------------
// 1. Policy
//
// A sublayer F of block l reads the residual stream x and adds to it; N? is a norm, or nothing:
//
//   in = s N?(x)      F = F(in)      z = alpha x + beta N?(F)      x = N?(z)
//
// A variant says where the norms stand and what the factors are. Adding one: dev/README.md.

enum class Sublayer { ATTENTION, MLP };

// The formulas above for one sublayer of one block.
struct SublayerPolicy {
    bool norm_input = false;   // in = s N(x); else in = x
    bool norm_output = false;  // z = alpha x + beta N(F)
    bool norm_sum = false;     // x = N(z)
    float scale = 1;           // s: a constant of the launch, neither parameter nor state
    float input_factor = 1;    // in = s N(input_factor x), which is N with eps / input_factor^2
    float alpha = 1;
    float beta = 1;
    float (*beta_at)(int l, int64_t step) = nullptr;  // beta, where it changes with the step (from 1)
    float gain = 1;                                   // what norm_input's gain starts from
    // Matrices start Xavier-normal with this gain, query and key with 1; 0: they start N(0, 0.02).
    float xavier_gain = 0;
};

struct NormPolicy {
    const char* name;
    // Plain Hugging Face code computes the model, once s is folded into gains and biases, and beta into F's last matrix
    // and bias. One that it does not compute carries a type of its own on disk, so that loading it as the plain family
    // fails.
    bool plain;
    SublayerPolicy (*around)(Sublayer sublayer, int l, int L);  // l = 1 .. L
};

inline float prores_beta(int l, int64_t step) { return (float)std::min(step / (1000.0 * l), 1.0); }

inline NormPolicy norm_policy(Norm norm) {
    constexpr bool plain = true, own = false;
    switch (norm) {
        case Norm::PRE:  // x = x + F(N(x))
            return {"PRE", plain, [](Sublayer, int, int) -> SublayerPolicy { return {.norm_input = true}; }};
        case Norm::LNS:  // x = x + F(N(x) / sqrt(l)), arXiv 2502.05795
            return {"LNS", plain, [](Sublayer, int l, int) -> SublayerPolicy {
                        return {.norm_input = true, .scale = (float)(1 / std::sqrt((double)l))};
                    }};
        case Norm::POST:  // x = N(x + F(x))
            return {"POST", own, [](Sublayer, int, int) -> SublayerPolicy { return {.norm_sum = true}; }};
        case Norm::DEEPNORM:  // x = N(alpha x + F(x)), 2203.00555: alpha = (2L)^(1/4), Xavier gain (8L)^(-1/4)
            return {"DEEPNORM", own, [](Sublayer, int, int L) -> SublayerPolicy {
                        return {.norm_sum = true,
                                .alpha = (float)std::pow(2.0 * L, 0.25),
                                .xavier_gain = (float)std::pow(8.0 * L, -0.25)};
                    }};
        case Norm::MIX:  // POST in the first quarter of the blocks, PRE in the rest, 2412.13795
            return {"MIX", own, [](Sublayer, int l, int L) -> SublayerPolicy {
                        const bool post = l <= L / 4;
                        return {.norm_input = !post, .norm_sum = post};
                    }};
        case Norm::PERI:  // x = x + N(F(N(x))), 2502.02732
            return {"PERI", own,
                    [](Sublayer, int, int) -> SublayerPolicy { return {.norm_input = true, .norm_output = true}; }};
        case Norm::LNS_INIT:  // as PRE, but the gains start at 1/sqrt(l): what 2603.05369's released code calls LNS
            return {"LNS_INIT", plain, [](Sublayer, int l, int) -> SublayerPolicy {
                        return {.norm_input = true, .gain = (float)(1 / std::sqrt((double)l))};
                    }};
        case Norm::RES_SQRT:  // x = x + F(N(x)) / sqrt(l), a control in 2603.05369
            return {"RES_SQRT", plain, [](Sublayer, int l, int) -> SublayerPolicy {
                        return {.norm_input = true, .beta = (float)(1 / std::sqrt((double)l))};
                    }};
        case Norm::PRORES:  // x = x + min(t / (1000 l), 1) F(N(x)) in step t, 2603.05369
            return {"PRORES", plain,
                    [](Sublayer, int, int) -> SublayerPolicy { return {.norm_input = true, .beta_at = prores_beta}; }};
        // x = N(alpha x + F(N(x))), 2601.19895: alpha is the number of sublayers, 2L. Block 1 is PRE: its exception as
        // it is understood here, without the authors' code at hand.
        case Norm::KEEL:
            return {"KEEL", own, [](Sublayer, int l, int L) -> SublayerPolicy {
                        if (l == 1) return {.norm_input = true};
                        return {.norm_input = true, .norm_sum = true, .alpha = 2.0f * L};
                    }};
        case Norm::REORDERED:  // x = x + N(F(x)), OLMo 2, 2501.00656
            return {"REORDERED", own, [](Sublayer, int, int) -> SublayerPolicy { return {.norm_output = true}; }};
    }
    throw Error("no policy for this NORM");
}

// What a sublayer's norms are called on disk: a norm before F alone has the family's own name, other places have those
// of Gemma 2 and OLMo 2.
struct NormNames {
    std::string input, output, sum;
};

inline NormNames norm_names(const SublayerPolicy& policy, Sublayer sublayer, const char* family_name) {
    const bool attention = sublayer == Sublayer::ATTENTION, behind = policy.norm_output || policy.norm_sum;
    const std::string what = attention ? "attention" : "feedforward";
    const std::string after = "post_" + what + "_layernorm";
    return {.input = !behind     ? family_name
                     : attention ? "input_layernorm"
                                 : "pre_feedforward_layernorm",
            .output = after,
            .sum = policy.norm_output ? what + "_sum_layernorm" : after};
}

// ---------------------------------------------------------------------------------------------------------------
// 2. Forward
//
//   z = alpha x + beta f        y = scale * N(z)
//
// x, f (N, C); a null operand is no term, a null result is not written. Bytes: 4 + e for x and f, 4 + e for z and y an
// element, e being that of floatX. y from the stored z has the bits that it had with the sum: fmaf is written where a
// compiler could fuse a sum of a product in one case and not in the other.
//
// A row is read once: the threads that share it keep it in registers between the moments and the output, 16 elements
// each. So a narrow row has a group of a warp's lanes, a wide one several warps. Rows too wide for a block are read
// again, as all are in the CPU build for speed, where a row is one thread's and stays in the core's cache.

constexpr int norm_threads = 128;                              // of a block, at least
constexpr int norm_most_lanes = is_fast_cpu ? 1 : 512;         // of a row: a block's registers are not enough for more
constexpr int norm_kept = 4, norm_kept_width = 4 * norm_kept;  // vectors that a thread keeps of a row; their elements

// Threads that share a row: as few as can keep it, a power of two.
__host__ __device__ inline int norm_lanes(int C) {
    int lanes = 1;
    while (lanes < norm_most_lanes && C > lanes * norm_kept_width) lanes *= 2;
    return lanes;
}

inline int norm_block(int C) { return block_threads(std::max(norm_threads, norm_lanes(C))); }

// Calls function(n, kept) with the width of a vector, and how many of them a thread keeps: 0 if it reads them again.
template <class Function>
void with_norm_width(int C, Function function) {
    with_width<float>(C, [&](auto n) {
        if constexpr (!is_fast_cpu) {
            if (C <= norm_most_lanes * norm_kept_width) return function(n, std::integral_constant<int, norm_kept>());
        }
        function(n, std::integral_constant<int, 0>());
    });
}

// visit(i, c) for each vector of a row that this thread owns: the i-th that it keeps, which begins at column c.
template <int kept, class Visit>
__device__ __forceinline__ void for_columns(int first, int stride, int C, Visit visit) {
    if constexpr (kept > 0) {
        UNROLL
        for (int i = 0; i < kept; i++) {
            if (first + i * stride < C) visit(i, first + i * stride);
        }
    } else {
        for (int c = first; c < C; c += stride) visit(0, c);
    }
}

// The sum of x over the threads that share a row; all threads of the block must call.
__device__ inline float row_sum(float x, int lanes) {
    if (lanes <= warp_size) return group_sum(x, lanes);
    __shared__ float sums[32];
    const int warps = lanes / warp_size, warp = threadIdx.x / warp_size;
    x = group_sum(x);
    __syncthreads();  // the last call's sums are read
    if (threadIdx.x % warp_size == 0) sums[warp] = x;
    __syncthreads();
    x = 0;
    for (int w = 0; w < warps; w++) x += sums[warp / warps * warps + w];
    return x;
}

struct NormForward {
    const float* x = nullptr;  // (N, C) residual stream, or null
    float alpha = 1;
    const floatX* f = nullptr;  // (N, C) output of the sublayer before, or null
    float beta = 1;
    float* z = nullptr;           // (N, C) out: the sum; null only when x, or f with beta 1, is the norm's input
    floatX* y = nullptr;          // (N, C) out: the norm's output, for the matmul that follows; may be null
    float* y32 = nullptr;         // (N, C) out: the same in fp32, where it is the residual stream; may be null
    float* mean = nullptr;        // (N) out: LayerNorm only
    float* rstd = nullptr;        // (N) out
    const float* gain = nullptr;  // (C)
    const float* bias = nullptr;  // (C) LayerNorm only
    float scale = 1;
    float eps = 0;
    int64_t N = 0;
    int C = 0;
};

constexpr int norm_rounds = is_fast_cpu ? 16 : 1;  // rows of a group

// What is fused is said with fma, not left to the compiler: a norm computed again from the z that was stored gives the
// same bits, whichever kernel that is.
template <int n, int kept, bool layer_norm, bool scaled>  // scaled: beta is not 1
__global__ void norm_forward_kernel(NormForward p) {
    const int lanes = norm_lanes(p.C), lane = threadIdx.x % lanes, stride = lanes * n, groups = blockDim.x / lanes;
    const auto forward_row = [&](int64_t row) {
        const bool active = row < p.N;  // idle groups still join the sums
        const int first = active ? lane * n : p.C;
        const int64_t base = row * p.C;

        Floats<n> row_kept[kept + 1], sums = 0.0f, squares = 0.0f;
        for_columns<kept>(first, stride, p.C, [&](int i, int c) {
            Floats<n> z = 0.0f;
            if (p.f) z = load<n>(p.f + base + c);
            if (scaled) z *= p.beta;
            if (p.x) z = fma(p.alpha, load<n>(p.x + base + c), z);
            if (p.z) store(p.z + base + c, z);
            if (kept > 0) row_kept[i] = z;
            if (layer_norm) sums += z;
            else squares = fma(z, z, squares);
        });
        const auto input = [&](int i, int c) {
            if (kept > 0) return row_kept[i];
            if (p.z) return load<n>(p.z + base + c);
            if (p.f) return load<n>(p.f + base + c);
            return p.alpha * load<n>(p.x + base + c);
        };
        float mean = 0;
        if (layer_norm) {
            mean = row_sum(sum_of(sums), lanes) / p.C;
            // The variance around the mean in a second pass: E[z^2] - mean^2 would cancel where |mean| is large.
            for_columns<kept>(first, stride, p.C, [&](int i, int c) {
                const Floats<n> distance = input(i, c) - mean;
                squares = fma(distance, distance, squares);
            });
        }
        const float rstd = 1.0f / sqrtf(row_sum(sum_of(squares), lanes) / p.C + p.eps);
        for_columns<kept>(first, stride, p.C, [&](int i, int c) {
            const Floats<n> zhat = (input(i, c) - mean) * rstd, gain = load<n>(p.gain + c);
            Floats<n> y = gain * zhat;
            if (layer_norm) y = fma(gain, zhat, load<n>(p.bias + c));
            y *= p.scale;
            if (p.y) store(p.y + base + c, y);
            if (p.y32) store(p.y32 + base + c, y);
        });
        if (active && lane == 0) {
            if (layer_norm) p.mean[row] = mean;
            p.rstd[row] = rstd;
        }
    };
    for (int round = 0; round < norm_rounds; round++)
        forward_row(((int64_t)blockIdx.x * norm_rounds + round) * groups + threadIdx.x / lanes);
}

inline void norm_forward(const NormForward& p) {
    const int threads = norm_block(p.C), rows = threads / norm_lanes(p.C) * norm_rounds;
    const dim3 grid(narrow(ceil_div(p.N, rows)));
    with_norm_width(p.C, [&](auto n, auto kept) {
        if (p.bias && p.beta == 1) launch<norm_forward_kernel<n, kept, true, false>>(grid, threads, 0, p);
        else if (p.bias) launch<norm_forward_kernel<n, kept, true, true>>(grid, threads, 0, p);
        else if (p.beta == 1) launch<norm_forward_kernel<n, kept, false, false>>(grid, threads, 0, p);
        else launch<norm_forward_kernel<n, kept, false, true>>(grid, threads, 0, p);
    });
}

// ---------------------------------------------------------------------------------------------------------------
// 3. Backward
//
// With dy the gradient of y, and g = scale * gain * dy:
//   dz    = rstd * (g - mean(g) - zhat * mean(g * zhat)) + dres      (RMSNorm: without mean(g))
//   df    = beta * dz
//   dgain += sum over rows of scale * dy * zhat                        dbias += sum over rows of scale * dy
// Derivation: zhat has zero mean and unit square, so dzhat/dz = rstd * (I - 1 1^T / C - zhat zhat^T / C).
//
// dy comes from up to two readers of y (dy from a matmul, dy_scale * dy32 from the residual stream), and dz joins the
// gradient that passed the norm by (dres), so that no separate kernel adds gradients. A row is shared as in the forward
// pass. Sums over rows have a fixed order: each thread keeps those of its columns, each block adds up its groups' in
// shared memory and writes one partial row, a second kernel adds those.
// Bytes: 4 + e for z and dy, 4 for dres, 4 for dz, e for df an element, of those that are given.

struct NormBackward {
    const floatX* dy = nullptr;   // (N, C) or null
    const float* dy32 = nullptr;  // (N, C) or null
    float dy_scale = 1;           // factor on dy32
    const float* dres = nullptr;  // (N, C) or null; may be the same memory as dz
    float dres_scale = 1;         // factor on dres
    const float* z = nullptr;     // (N, C) the norm's input: z, or f where it was kept as floatX
    const floatX* f = nullptr;    //
    const float* mean = nullptr;  // (N) LayerNorm only
    const float* rstd = nullptr;  // (N)
    const float* gain = nullptr;  // (C)
    float scale = 1;
    float* dz = nullptr;   // (N, C) out, or null
    floatX* df = nullptr;  // (N, C) out, or null
    float beta = 1;
    float* dgain = nullptr;    // (C) out
    float* dbias = nullptr;    // (C) out; null selects RMSNorm
    bool accumulate = true;    // dgain and dbias +=; else they are overwritten
    float* partial = nullptr;  // scratch of norm_partial_size(C) floats
    int64_t N = 0;
    int C = 0;
};

// Blocks of a multiprocessor: 512 threads of it, which have room for what they keep.
constexpr int norm_blocks_each(int threads) { return std::max(1, 512 / std::max(threads, norm_threads)); }
constexpr int norm_max_blocks = 640;
constexpr int norm_backward_rows = is_fast_cpu ? 64 : 4;  // of a group, at least: few rows make many partial rows
constexpr int64_t norm_partial_size(int C) { return (int64_t)norm_max_blocks * 2 * C; }

template <int n, int kept, bool layer_norm>
__global__ void norm_backward_kernel(NormBackward p) {
    // dynamic_shared holds the groups' sums of dgain, and of dbias for LayerNorm: (groups, 1 or 2, C)
    const int lanes = norm_lanes(p.C), lane = threadIdx.x % lanes;
    const int groups = blockDim.x / lanes, group = threadIdx.x / lanes;
    const int sums = layer_norm ? 2 : 1;
    float* dgain = dynamic_shared + (int64_t)group * sums * p.C;
    float* dbias = dgain + p.C;
    const int stride = lanes * n;
    // A thread touches only its own columns of its group's sums, so these need no barrier before the last row.
    const auto own_columns = [&](auto visit) { for_columns<kept>(lane * n, stride, p.C, visit); };
    Floats<n> dgain_kept[kept + 1], dbias_kept[kept + 1];
    own_columns([&](int i, int c) {
        dgain_kept[i] = dbias_kept[i] = 0.0f;
        if (kept > 0) return;
        store_shared(dgain + c, Floats<n>(0.0f));
        if (layer_norm) store_shared(dbias + c, Floats<n>(0.0f));
    });
    const auto add = [](Floats<n>& sum, float* memory, Floats<n> x) {
        if (kept > 0) sum += x;
        else store_shared(memory, load<n>(memory) + x);
    };
    const int64_t rounds = ceil_div(p.N, (int64_t)gridDim.x * groups);
    for (int64_t round = 0; round < rounds; round++) {
        const int64_t row = (round * gridDim.x + blockIdx.x) * groups + group;
        const bool active = row < p.N;
        const int first = active ? lane * n : p.C;
        const int64_t base = row * p.C;
        const float rstd = active ? p.rstd[row] : 0, mean = layer_norm && active ? p.mean[row] : 0;
        const auto scaled_gradient = [&](int c) {  // scale * dy
            Floats<n> dy = 0.0f;
            if (p.dy) dy = load<n>(p.dy + base + c);
            if (p.dy32) dy += p.dy_scale * load<n>(p.dy32 + base + c);
            return p.scale * dy;
        };
        const auto normalized = [&](int c) {
            const Floats<n> z = p.z ? load<n>(p.z + base + c) : load<n>(p.f + base + c);
            return (z - mean) * rstd;
        };
        const auto passed_by = [&](int c) { return p.dres ? load<n>(p.dres + base + c) : Floats<n>(0.0f); };
        // All loads of a row before its first store, behind which none could move.
        Floats<n> dy_kept[kept + 1], zhat_kept[kept + 1], dres_kept[kept + 1];
        if (kept > 0) {
            for_columns<kept>(first, stride, p.C, [&](int i, int c) {
                dy_kept[i] = scaled_gradient(c), zhat_kept[i] = normalized(c), dres_kept[i] = passed_by(c);
            });
        }
        const auto zhat_of = [&](int i, int c) { return kept > 0 ? zhat_kept[i] : normalized(c); };
        Floats<n> g_sum = 0.0f, gz_sum = 0.0f;
        for_columns<kept>(first, stride, p.C, [&](int i, int c) {
            const Floats<n> dy = kept > 0 ? dy_kept[i] : scaled_gradient(c), zhat = zhat_of(i, c);
            const Floats<n> g = load<n>(p.gain + c) * dy;
            if (kept > 0) dy_kept[i] = g;  // which the second pass needs, instead of dy
            if (layer_norm) g_sum += g;
            gz_sum += g * zhat;
            add(dgain_kept[i], dgain + c, dy * zhat);
            if (layer_norm) add(dbias_kept[i], dbias + c, dy);
        });
        const float g_mean = layer_norm ? row_sum(sum_of(g_sum), lanes) / p.C : 0;
        const float gz_mean = row_sum(sum_of(gz_sum), lanes) / p.C;
        for_columns<kept>(first, stride, p.C, [&](int i, int c) {
            const Floats<n> g = kept > 0 ? dy_kept[i] : load<n>(p.gain + c) * scaled_gradient(c);
            Floats<n> dz = rstd * (g - g_mean - zhat_of(i, c) * gz_mean);
            if (p.dres) dz += p.dres_scale * (kept > 0 ? dres_kept[i] : passed_by(c));
            if (p.dz) store(p.dz + base + c, dz);
            if (p.df) store(p.df + base + c, p.beta * dz);
        });
    }
    own_columns([&](int i, int c) {
        if (kept == 0) return;
        store_shared(dgain + c, dgain_kept[i]);
        if (layer_norm) store_shared(dbias + c, dbias_kept[i]);
    });
    __syncthreads();
    float* partial = p.partial + (int64_t)blockIdx.x * sums * p.C;
    for (int c = threadIdx.x * n; c < sums * p.C; c += blockDim.x * n) {
        Floats<n> sum = load<n>(dynamic_shared + c);
        for (int g = 1; g < groups; g++) sum += load<n>(dynamic_shared + (int64_t)g * sums * p.C + c);
        store(partial + c, sum);
    }
}

inline void norm_backward(const NormBackward& p) {
    const bool layer_norm = p.dbias != nullptr;
    const int threads = norm_block(p.C), groups = threads / norm_lanes(p.C);
    const int most = std::min(norm_max_blocks, multiprocessors() * norm_blocks_each(threads));
    const int blocks = (int)std::min<int64_t>(most, ceil_div(p.N, norm_backward_rows * groups));
    const size_t shared_bytes = (size_t)groups * (layer_norm ? 2 : 1) * p.C * sizeof(float);
    with_norm_width(p.C, [&](auto n, auto kept) {
        if (layer_norm) launch<norm_backward_kernel<n, kept, true>>(dim3(blocks), threads, shared_bytes, p);
        else launch<norm_backward_kernel<n, kept, false>>(dim3(blocks), threads, shared_bytes, p);
    });
    add_partial_rows(p.dgain, p.dbias, p.partial, blocks, p.C, p.accumulate);
}
