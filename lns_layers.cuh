// Normalization: the variants that NORM selects, and the kernels they all share.
//
//   1. Policy     what each NORM does around a sublayer; nothing else in the program tests NORM
//   2. Forward    residual sum + RMSNorm or LayerNorm + output scale, one kernel
//   3. Backward   the same, reversed
//
// N(z) = gain * zhat + bias, with zhat = (z - mean(z)) * rstd for LayerNorm (GPT-2 family) and zhat = z * rstd, without
// bias, for RMSNorm (LLaMA family). F is a sublayer: attention, then MLP. Blocks count from l = 1.
#pragma once
#include <cmath>
#include <string>

#include "trainer/device.cuh"

#ifndef NORM
#error "compile with -DNORM=LNS, or another name of enum Norm"
#endif

// ---------------------------------------------------------------------------------------------------------------
// 1. Policy
//
// A sublayer F of block l reads the residual stream x and adds to it; N? is a norm, or nothing:
//
//   in = s N?(x)      F = F(in)      z = alpha x + beta N?(F)      x = N?(z)
//
// A variant says where the norms stand and what the factors are. Adding one: dev/README.md.

enum class Norm { PRE, LNS, POST, DEEPNORM, MIX, PERI };  // make takes the names from this line

constexpr Norm compiled_norm = Norm::NORM;  // a mis-spelled NORM stops the compiler here

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
    // Plain Hugging Face code computes the model, once s is folded into gains and biases. One that it does not compute
    // carries a type of its own on disk, so that loading it as the plain family fails.
    bool plain;
    SublayerPolicy (*around)(Sublayer sublayer, int l, int L);  // l = 1 .. L
};

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
// x, f (N, C); a null operand is no term, a null result is not written. A group of 1 to 32 lanes owns a row, so that a
// lane has about 16 elements of a narrow row. Bytes: 4 + e for x and f, 4 + e for z and y an element, e being that of
// floatX; the passes for the moments hit the cache. y from the stored z has the bits that it had with the sum: fmaf is
// written where a compiler could fuse a sum of a product in one case and not in the other.

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

constexpr int norm_threads = 128;

// Lanes for a row: as few as leave a lane 16 elements, at most a warp.
__host__ __device__ inline int norm_lanes(int C) {
    int lanes = 1;
    while (lanes < warp_size && C > 16 * lanes) lanes *= 2;
    return lanes;
}

template <bool layer_norm, bool scaled>  // scaled: beta is not 1
__global__ void norm_forward_kernel(NormForward p) {
    const int lanes = norm_lanes(p.C), lane = threadIdx.x % lanes;
    const int64_t row = (int64_t)blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes;
    const bool active = row < p.N;  // idle groups still join the warp's shuffles
    const int first = active ? lane * 4 : p.C, stride = lanes * 4;
    const int64_t base = row * p.C;

    float sum = 0, square_sum = 0;
    for (int c = first; c < p.C; c += stride) {
        Float4 z = {};
        if (p.f) z = load4(p.f + base + c);
        for (int i = 0; scaled && i < 4; i++) z[i] *= p.beta;
        if (p.x) {
            const Float4 x = load4(p.x + base + c);
            for (int i = 0; i < 4; i++) z[i] = fmaf(p.alpha, x[i], z[i]);
        }
        if (p.z) store4(p.z + base + c, z);
        for (int i = 0; i < 4; i++) layer_norm ? sum += z[i] : square_sum = fmaf(z[i], z[i], square_sum);
    }
    const auto input = [&](int c) {
        if (p.z) return load4(p.z + base + c);
        if (p.f) return load4(p.f + base + c);
        Float4 z = load4(p.x + base + c);
        for (int i = 0; i < 4; i++) z[i] *= p.alpha;
        return z;
    };
    float mean = 0;
    if (layer_norm) {
        mean = group_sum(sum, lanes) / p.C;
        // The variance around the mean in a second pass: E[z^2] - mean^2 would cancel where |mean| is large.
        for (int c = first; c < p.C; c += stride) {
            const Float4 z = input(c);
            for (int i = 0; i < 4; i++) square_sum = fmaf(z[i] - mean, z[i] - mean, square_sum);
        }
    }
    const float rstd = 1.0f / sqrtf(group_sum(square_sum, lanes) / p.C + p.eps);
    for (int c = first; c < p.C; c += stride) {
        const Float4 z = input(c), gain = load4(p.gain + c);
        Float4 y;
        for (int i = 0; i < 4; i++) y[i] = (z[i] - mean) * rstd;
        if (layer_norm) {
            const Float4 bias = load4(p.bias + c);
            for (int i = 0; i < 4; i++) y[i] = fmaf(gain[i], y[i], bias[i]);
        } else {
            for (int i = 0; i < 4; i++) y[i] *= gain[i];
        }
        for (int i = 0; i < 4; i++) y[i] *= p.scale;
        if (p.y) store4(p.y + base + c, y);
        if (p.y32) store4(p.y32 + base + c, y);
    }
    if (active && lane == 0) {
        if (layer_norm) p.mean[row] = mean;
        p.rstd[row] = rstd;
    }
}

inline void norm_forward(const NormForward& p) {
    const int rows_per_block = norm_threads / norm_lanes(p.C);
    const dim3 grid(narrow(ceil_div(p.N, rows_per_block)));
    const auto kernel = p.bias ? (p.beta == 1 ? norm_forward_kernel<true, false> : norm_forward_kernel<true, true>)
                               : (p.beta == 1 ? norm_forward_kernel<false, false> : norm_forward_kernel<false, true>);
    launch(kernel, grid, norm_threads, 0, p);
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
// gradient that passed the norm by (dres), so that no separate kernel adds gradients. Sums over rows have a fixed
// order: each group keeps its own row of shared memory, each block writes one partial row, a second kernel adds those.
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

constexpr int norm_max_blocks = 256;
constexpr int64_t norm_partial_size(int C) { return (int64_t)norm_max_blocks * 2 * C; }

// Threads of a backward block: as many groups as have room for their sums in 48 KB, at least one warp.
inline int norm_backward_threads(int C, bool layer_norm) {
    int threads = norm_threads;
    while (threads > warp_size && (int64_t)threads / norm_lanes(C) * C * (layer_norm ? 8 : 4) > 48 * 1024) threads /= 2;
    return threads;
}

template <bool layer_norm>
__global__ void norm_backward_kernel(NormBackward p) {
    // dynamic_shared holds the groups' sums of dgain, and of dbias for LayerNorm: (groups, 1 or 2, C)
    const int lanes = norm_lanes(p.C), lane = threadIdx.x % lanes;
    const int groups = blockDim.x / lanes, group = threadIdx.x / lanes;
    const int sums = layer_norm ? 2 : 1;
    float* dgain = dynamic_shared + (int64_t)group * sums * p.C;
    float* dbias = dgain + p.C;
    const int stride = lanes * 4;
    // A lane touches only its own columns of its group's sums, so the loop over rows needs no barrier.
    for (int c = lane * 4; c < p.C; c += stride) {
        store4(dgain + c, Float4{});
        if (layer_norm) store4(dbias + c, Float4{});
    }
    const int64_t rounds = ceil_div(p.N, (int64_t)gridDim.x * groups);
    for (int64_t round = 0; round < rounds; round++) {
        const int64_t row = (round * gridDim.x + blockIdx.x) * groups + group;
        const bool active = row < p.N;
        const int first = active ? lane * 4 : p.C;
        const int64_t base = row * p.C;
        const float rstd = active ? p.rstd[row] : 0, mean = layer_norm && active ? p.mean[row] : 0;
        const auto gradient = [&](int c) {  // of y
            Float4 dy = {};
            if (p.dy) dy = load4(p.dy + base + c);
            if (p.dy32) {
                const Float4 dy32 = load4(p.dy32 + base + c);
                for (int i = 0; i < 4; i++) dy[i] += p.dy_scale * dy32[i];
            }
            return dy;
        };
        const auto normalized = [&](int c) {
            Float4 z = p.z ? load4(p.z + base + c) : load4(p.f + base + c);
            for (int i = 0; i < 4; i++) z[i] = (z[i] - mean) * rstd;
            return z;
        };
        float g_sum = 0, gz_sum = 0;
        for (int c = first; c < p.C; c += stride) {
            const Float4 dy = gradient(c), zhat = normalized(c), gain = load4(p.gain + c);
            Float4 sum = load4(dgain + c);
            for (int i = 0; i < 4; i++) {
                const float g = p.scale * gain[i] * dy[i];
                if (layer_norm) g_sum += g;
                gz_sum += g * zhat[i];
                sum[i] += p.scale * dy[i] * zhat[i];
            }
            store4(dgain + c, sum);
            if (layer_norm) {
                Float4 bias_sum = load4(dbias + c);
                for (int i = 0; i < 4; i++) bias_sum[i] += p.scale * dy[i];
                store4(dbias + c, bias_sum);
            }
        }
        const float g_mean = layer_norm ? group_sum(g_sum, lanes) / p.C : 0;
        const float gz_mean = group_sum(gz_sum, lanes) / p.C;
        for (int c = first; c < p.C; c += stride) {
            const Float4 dy = gradient(c), zhat = normalized(c), gain = load4(p.gain + c);
            Float4 dz;
            for (int i = 0; i < 4; i++) dz[i] = rstd * (p.scale * gain[i] * dy[i] - g_mean - zhat[i] * gz_mean);
            if (p.dres) {
                const Float4 dres = load4(p.dres + base + c);
                for (int i = 0; i < 4; i++) dz[i] += p.dres_scale * dres[i];
            }
            if (p.dz) store4(p.dz + base + c, dz);
            if (!p.df) continue;
            for (int i = 0; i < 4; i++) dz[i] *= p.beta;
            store4(p.df + base + c, dz);
        }
    }
    __syncthreads();
    float* partial = p.partial + (int64_t)blockIdx.x * sums * p.C;
    for (int c = threadIdx.x; c < sums * p.C; c += blockDim.x) {
        float sum = 0;
        for (int g = 0; g < groups; g++) sum += dynamic_shared[(int64_t)g * sums * p.C + c];
        partial[c] = sum;
    }
}

inline void norm_backward(const NormBackward& p) {
    const bool layer_norm = p.dbias != nullptr;
    const int threads = norm_backward_threads(p.C, layer_norm), groups = threads / norm_lanes(p.C);
    const int sums = layer_norm ? 2 : 1;
    // Few rows a block keep every multiprocessor busy; many keep the partial rows few.
    const int blocks = (int)std::min<int64_t>(norm_max_blocks, ceil_div(p.N, 4 * groups));
    const size_t shared_bytes = (size_t)groups * sums * p.C * sizeof(float);
    launch(layer_norm ? norm_backward_kernel<true> : norm_backward_kernel<false>, dim3(blocks), threads, shared_bytes,
           p);
    add_partial_rows(p.dgain, p.dbias, p.partial, blocks, p.C, p.accumulate);
}
