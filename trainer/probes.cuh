// Probes: what arXiv 2502.05795 measures of each block, on a fixed held-out batch. Part of train_gpt.cu.
//
// h_l is the residual stream after block l (h_0: the embeddings), x the stream a sublayer finds, F what it adds to it
// (PERI: after its second norm). Means are over the batch's tokens.
//   variance, mean, |h|   of h_l over the channels; the variance of the sequences' first tokens, the largest of a
//                         token, and the largest |h| over channels and tokens ("massive activations")
//   ratio, cosine         |F| / |x| and <F, x> / (|F| |x|), of attention and MLP
//   angular distance      arccos(<h_l, h_m> / (|h_l| |h_m|)) / pi, of every pair of depths
//   lens                  what the head reads from h_l, through the last norm, against the model's output: KL(output,
//                         lens) in nats, and the share of tokens for which both find the same token likeliest
//   gradients             norm of the mean loss's gradient with respect to block l's parameters, and to h_l
//   update                |dW| / |W| of the optimizer's last step, as it recorded it
//   Jacobian              |J^T v - v| / |v| for random v, J = dh_l / dh_(l-1) over the batch; by the backward pass. Its
//                         mean square over v is |J - I|_F^2 / n, as that of |J v - v| / |v| is, and unlike a finite
//                         difference it is as exact as the gradients, in bf16 too
//   pruning               the loss with block l, or the last k blocks, left out; the others keep their own l
//   prune_effect          |d' - d| / |d| of d = h_m - h_(m-1), what block m does to the stream, and d' without a block
//                         l < m
// Nothing here changes what training computes: parameters, moments and the data's position are only read.
#pragma once

constexpr int probe_directions = 4;       // random v a block; the spread over them is the Jacobian's error bar
constexpr double effective_share = 0.01;  // a block counts if its removal costs this share of removing all of them

struct Probe {
    int L = 0;
    int64_t tokens = 0;
    double loss = 0;
    std::vector<double> variance, mean, mean_abs, max_abs, grad_norm_stream;       // h_0 .. h_L
    std::vector<double> variance_first, variance_largest;                          // h_0 .. h_L
    std::vector<double> lens_kl, lens_top;                                         // h_0 .. h_L
    std::vector<std::vector<double>> angular;                                      // (L + 1, L + 1)
    std::vector<double> variance_attention;                                        // between the sublayers
    std::vector<double> attention_ratio, attention_cosine, mlp_ratio, mlp_cosine;  // block 1 .. L, as the rest
    std::vector<double> grad_norm_weights, jacobian, jacobian_error, prune_loss;
    std::vector<double> prune_last_loss;                               // k = 1 .. L / 2
    double prune_all_loss = 0;                                         // the head reads h_0
    std::vector<std::vector<double>> prune_effect;                     // (L, L): of block l on block m
    std::vector<double> update_ratio;                                  // empty without a recorded update
    std::map<std::string, std::vector<double>> update_ratio_matrices;  // the same, each matrix
    int effective_depth = 0;
};

enum class Mean { NONE, TOKENS, TARGETS, SEQUENCES };  // what a sum over the batch is divided by

// Every field with its name in the log, its length, and how a sum over the batch becomes a mean: the one list from
// which a probe is sized, averaged and logged.
template <class P, class Visit>
void for_each_field(P& p, Visit visit) {
    const int L = p.L;
    visit("probe_tokens", p.tokens, 0, Mean::NONE);
    visit("loss", p.loss, 0, Mean::TARGETS);
    visit("variance", p.variance, L + 1, Mean::TOKENS);
    visit("variance_first", p.variance_first, L + 1, Mean::SEQUENCES);
    visit("variance_largest", p.variance_largest, L + 1, Mean::NONE);
    visit("variance_attention", p.variance_attention, L, Mean::TOKENS);
    visit("mean", p.mean, L + 1, Mean::TOKENS);
    visit("mean_abs", p.mean_abs, L + 1, Mean::TOKENS);
    visit("max_abs", p.max_abs, L + 1, Mean::NONE);
    visit("lens_kl", p.lens_kl, L + 1, Mean::TOKENS);
    visit("lens_top", p.lens_top, L + 1, Mean::TOKENS);
    visit("attention_ratio", p.attention_ratio, L, Mean::TOKENS);
    visit("attention_cosine", p.attention_cosine, L, Mean::TOKENS);
    visit("mlp_ratio", p.mlp_ratio, L, Mean::TOKENS);
    visit("mlp_cosine", p.mlp_cosine, L, Mean::TOKENS);
    visit("grad_norm_weights", p.grad_norm_weights, L, Mean::TARGETS);
    visit("grad_norm_stream", p.grad_norm_stream, L + 1, Mean::TARGETS);
    visit("update_ratio", p.update_ratio, 0, Mean::NONE);
    visit("update_ratio_matrices", p.update_ratio_matrices, 0, Mean::NONE);
    visit("angular", p.angular, L + 1, Mean::TOKENS);
    visit("jacobian", p.jacobian, L, Mean::NONE);
    visit("jacobian_error", p.jacobian_error, L, Mean::NONE);
    visit("prune_loss", p.prune_loss, L, Mean::TARGETS);
    visit("prune_last_loss", p.prune_last_loss, L / 2, Mean::TARGETS);
    visit("prune_all_loss", p.prune_all_loss, 0, Mean::TARGETS);
    visit("prune_effect", p.prune_effect, L, Mean::TOKENS);
    visit("effective_depth", p.effective_depth, 0, Mean::NONE);
}

json fields_of(const Probe& probe) {
    json fields;
    for_each_field(probe, [&](const char* name, const auto& value, int, Mean) { fields[name] = value; });
    fields["effective_share"] = effective_share;
    return fields;
}

// A probe of L blocks, all sums zero.
Probe empty_probe(int L) {
    Probe probe;
    probe.L = L;
    for_each_field(probe, [](const char*, auto& value, int size, Mean) {
        using Field = std::decay_t<decltype(value)>;
        if constexpr (std::is_same_v<Field, std::vector<double>>) value.assign(size, 0.0);
        if constexpr (std::is_same_v<Field, std::vector<std::vector<double>>>)
            value.assign(size, std::vector<double>(size));
    });
    return probe;
}

void divide(double& value, double by) { value /= by; }
template <class T>
void divide(std::vector<T>& values, double by) {
    for (T& value : values) divide(value, by);
}

void sums_to_means(Probe& probe, double tokens, double targets, double sequences) {
    for_each_field(probe, [&](const char*, auto& value, int, Mean mean) {
        if constexpr (requires { divide(value, 1.0); }) {
            if (mean == Mean::NONE) return;
            divide(value, mean == Mean::TOKENS ? tokens : mean == Mean::TARGETS ? targets : sequences);
        }
    });
}

// --- Kernels: one thread a token, or an element. They run once in many steps: plain before fast. Each must read its
// inputs once, 4 bytes an element, and write its results; a row is read again from the cache. ---

// out (N, 4): mean, variance, mean |x| and largest |x| of a row of x (N, C).
__global__ void stream_moments_kernel(float* out, const float* x, int64_t N, int C) {
    const int64_t row = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= N) return;
    float sum = 0, absolute = 0, largest = 0, squares = 0;
    for (int c = 0; c < C; c++) {
        const float value = x[row * C + c];
        sum += value;
        absolute += fabsf(value);
        largest = fmaxf(largest, fabsf(value));
    }
    const float mean = sum / C;
    for (int c = 0; c < C; c++) squares += (x[row * C + c] - mean) * (x[row * C + c] - mean);
    out += row * 4;
    out[0] = mean, out[1] = squares / C, out[2] = absolute / C, out[3] = largest;
}

// out (N, 2): |F| / |x| and <F, x> / (|F| |x|) of a sublayer's F = z - alpha x, rows of (N, C).
__global__ void sublayer_moments_kernel(float* out, const float* x, const float* z, float alpha, int64_t N, int C) {
    const int64_t row = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= N) return;
    float xx = 0, ff = 0, xf = 0;
    for (int c = 0; c < C; c++) {
        const float before = x[row * C + c], added = z[row * C + c] - alpha * before;
        xx += before * before, ff += added * added, xf += before * added;
    }
    out[row * 2] = sqrtf(ff / xx);
    out[row * 2 + 1] = ff > 0 ? xf / sqrtf(ff * xx) : 0;
}

// out (N): the angle between rows of a and b (N, C), over pi. As 2 atan(|a' - b'| / |a' + b'|) of the unit vectors a',
// b', which is exact for small angles, where arccos is not.
__global__ void angle_kernel(float* out, const float* a, const float* b, int64_t N, int C) {
    const int64_t row = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= N) return;
    float aa = 0, bb = 0, difference = 0, sum = 0;
    for (int c = 0; c < C; c++) {
        aa += a[row * C + c] * a[row * C + c];
        bb += b[row * C + c] * b[row * C + c];
    }
    const float a_scale = 1 / sqrtf(aa), b_scale = 1 / sqrtf(bb);
    for (int c = 0; c < C; c++) {
        const float u = a_scale * a[row * C + c], v = b_scale * b[row * C + c];
        difference += (u - v) * (u - v), sum += (u + v) * (u + v);
    }
    out[row] = 2 / 3.14159265f * atan2f(sqrtf(difference), sqrtf(sum));
}

// out (N): |d' - d| / |d|, rows of (N, C), with d = h - before and d' the same of another stream.
__global__ void effect_kernel(float* out, const float* before, const float* h, const float* other_before,
                              const float* other, int64_t N, int C) {
    const int64_t row = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= N) return;
    float squares = 0, difference = 0;
    for (int64_t i = row * C; i < (row + 1) * C; i++) {
        const float d = h[i] - before[i], change = other[i] - other_before[i] - d;
        squares += d * d, difference += change * change;
    }
    out[row] = sqrtf(difference / squares);
}

// out (N, 2): KL(p || q) of the distributions over V tokens that rows of the logits p and q (N, Vp) give, and 1 where
// the likeliest token of both is the same one, of several the first. A warp owns a row.
__global__ void lens_kernel(float* out, const floatX* p, const floatX* q, int V, int Vp) {
    p += (int64_t)blockIdx.x * Vp, q += (int64_t)blockIdx.x * Vp;
    float p_max = -INFINITY, q_max = -INFINITY;
    for (int i = threadIdx.x; i < V; i += blockDim.x) {
        p_max = fmaxf(p_max, to_float(p[i])), q_max = fmaxf(q_max, to_float(q[i]));
    }
    p_max = group_max(p_max), q_max = group_max(q_max);
    float p_sum = 0, q_sum = 0, distance = 0, p_top = -INFINITY, q_top = -INFINITY;  // top: the token, below zero
    for (int i = threadIdx.x; i < V; i += blockDim.x) {
        const float a = to_float(p[i]) - p_max, b = to_float(q[i]) - q_max, e = expf(a);
        p_sum += e, q_sum += expf(b), distance += e * (a - b);
        if (a == 0) p_top = fmaxf(p_top, -i);
        if (b == 0) q_top = fmaxf(q_top, -i);
    }
    p_sum = group_sum(p_sum), q_sum = group_sum(q_sum), distance = group_sum(distance);
    p_top = group_max(p_top), q_top = group_max(q_top);
    if (threadIdx.x > 0) return;
    out += (int64_t)blockIdx.x * 2;
    out[0] = distance / p_sum + logf(q_sum) - logf(p_sum), out[1] = p_top == q_top;
}

// x = v, or x - v, with v_i = +-1 drawn by `direction`.
__global__ void direction_kernel(float* x, uint64_t direction, bool subtract, int64_t count) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const float v = random_bits(direction, i) & 1 ? 1.0f : -1.0f;
    x[i] = subtract ? x[i] - v : v;
}

// --- Their results on the host ---

double square_sum(const float* x, int64_t count) {
    DeviceArray<double> partial(square_sum_partials(count));
    square_sums(partial.data, x, count);
    const std::vector<double> sums = partial.read();
    return std::accumulate(sums.begin(), sums.end(), 0.0);
}

// The summed loss since the last call, and back to zero.
double take_loss(Model& model) {
    double loss;
    CHECK_CUDA(cudaMemcpyAsync(&loss, model.state->sums, sizeof(loss), cudaMemcpyDeviceToHost, main_stream));
    CHECK_CUDA(cudaMemsetAsync(model.state, 0, sizeof(StepState::sums), main_stream));
    CHECK_CUDA(cudaStreamSynchronize(main_stream));
    return loss;
}

// Sums over the tokens of the batch whose activations the model holds, or computes again.
void add_stream_moments(Probe& probe, Model& model, int B, int T) {
    const int64_t N = (int64_t)B * T;
    const int C = model.config.C, L = probe.L;
    const dim3 grid(narrow(ceil_div(N, 64)));
    const std::vector<Junction>& junctions = model.acts.junctions;
    for (int k = 0; k <= 2 * L; k++) {
        const Junction& j = junctions[k];
        const int l = (k + 1) / 2;  // the block in question
        if (k % 2) rebuild_block(model, l, B, T);
        else rebuild_stream(model, k, N);
        DeviceArray<float> rows(4 * N);
        launch<stream_moments_kernel>(grid, 64, 0, rows.data, (const float*)j.x, N, C);
        const std::vector<float> moments = rows.read();
        for (int64_t n = 0; n < N; n++) {
            const float* row = &moments[4 * n];
            if (k % 2) {
                probe.variance_attention[l - 1] += row[1];
            } else {
                probe.mean[l] += row[0], probe.variance[l] += row[1], probe.mean_abs[l] += row[2];
                probe.max_abs[l] = std::max(probe.max_abs[l], (double)row[3]);
                probe.variance_largest[l] = std::max(probe.variance_largest[l], (double)row[1]);
                if (n % T == 0) probe.variance_first[l] += row[1];
            }
        }
        if (k == 0) continue;
        DeviceArray<float> pairs(2 * N);
        launch<sublayer_moments_kernel>(grid, 64, 0, pairs.data, j.before, (const float*)j.z, j.alpha, N, C);
        const std::vector<float> added = pairs.read();
        double& ratio = (k % 2 ? probe.attention_ratio : probe.mlp_ratio)[l - 1];
        double& cosine = (k % 2 ? probe.attention_cosine : probe.mlp_cosine)[l - 1];
        for (int64_t n = 0; n < N; n++) ratio += added[2 * n], cosine += added[2 * n + 1];
    }
    DeviceArray<float> angles(N), h(N * C);
    for (int l = 0; l <= L; l++) {
        rebuild_stream(model, 2 * l, N);
        CHECK_CUDA(cudaMemcpyAsync(h.data, junctions[2 * l].x, h.count * sizeof(float), cudaMemcpyDeviceToDevice,
                                   main_stream));
        for (int m = l + 1; m <= L; m++) {
            rebuild_stream(model, 2 * m, N);
            launch<angle_kernel>(grid, 64, 0, angles.data, (const float*)h.data, (const float*)junctions[2 * m].x, N,
                                 C);
            for (const float angle : angles.read()) probe.angular[l][m] += angle;
        }
    }
}

// Overwrites the head's input. Half of the logits' memory is the output's, half the lens's.
void add_lenses(Probe& probe, Model& model, int64_t N) {
    const ModelConfig& c = model.config;
    const std::vector<Junction>& junctions = model.acts.junctions;
    const Junction& head = junctions[2 * c.L];
    const int64_t most = std::max(model.chunk / 2, 1);
    floatX *output = model.acts.logits, *lens = output + most * c.Vp();
    DeviceArray<float> pairs(2 * most);
    for (int64_t first = 0; first < N; first += most) {
        const int64_t rows = std::min(most, N - first);
        for (int l = c.L; l >= 0; l--) {
            rebuild_stream(model, 2 * l, N);
            floatX* logits = l == c.L ? output : lens;
            normalize(model, head.input_norm, {.x = junctions[2 * l].x + first * c.C, .y = head.in}, rows);
            linear_forward(logits, head.in, weight(model, model.table.head), nullptr, rows, c.C, c.Vp());
            launch<lens_kernel>(dim3(narrow(rows)), block_threads(32), 0, pairs.data, (const floatX*)output,
                                (const floatX*)logits, c.V, c.Vp());
            const std::vector<float> found = pairs.read();
            for (int64_t n = 0; n < rows; n++) probe.lens_kl[l] += found[2 * n], probe.lens_top[l] += found[2 * n + 1];
        }
    }
}

// Leaves out blocks from + 1 .. to: the stream after block `from` goes on behind block `to`.
void skip_blocks(Model& model, int from, int to, int64_t N) {
    const Junction &before = model.acts.junctions[2 * from], &behind = model.acts.junctions[2 * to];
    rebuild_stream(model, 2 * from, N);
    if (behind.x != before.x) {
        CHECK_CUDA(cudaMemcpyAsync(behind.x, before.x, N * model.config.C * sizeof(float), cudaMemcpyDeviceToDevice,
                                   main_stream));
    }
    input_forward(model, behind, N);
}

// Overwrites the activations from the back to the front: what is in front of a removed block is computed once. The
// stream of the whole model waits in the host's memory.
void add_pruned_losses(Probe& probe, Model& model, int B, int T) {
    const int64_t N = (int64_t)B * T;
    const int L = probe.L;
    const auto loss = [&] {
        head_loss(model, N, false);
        return take_loss(model);
    };
    const int64_t count = N * model.config.C;
    std::vector<std::vector<float>> whole(L + 1, std::vector<float>(count));
    DeviceArray<float> before(count), h(count), pruned_before(count), effects(N);
    for (int l = 0; l <= L; l++) {
        rebuild_stream(model, 2 * l, N);
        CHECK_CUDA(cudaMemcpyAsync(whole[l].data(), model.acts.junctions[2 * l].x, count * sizeof(float),
                                   cudaMemcpyDeviceToHost, main_stream));
    }
    const auto upload = [&](float* to, const std::vector<float>& from) {
        CHECK_CUDA(cudaMemcpyAsync(to, from.data(), count * sizeof(float), cudaMemcpyHostToDevice, main_stream));
    };
    take_loss(model);
    for (int k = 1; k <= L; k++) {
        if (k > L / 2 && k < L) continue;
        skip_blocks(model, L - k, L, N);
        (k == L ? probe.prune_all_loss : probe.prune_last_loss[k - 1]) += loss();
    }
    for (int l = L; l >= 1; l--) {
        skip_blocks(model, l - 1, l, N);
        for (int m = l + 1; m <= L; m++) {
            const Junction &in = model.acts.junctions[2 * m - 2], &out = model.acts.junctions[2 * m];
            CHECK_CUDA(cudaMemcpyAsync(pruned_before.data, in.x, count * sizeof(float), cudaMemcpyDeviceToDevice,
                                       main_stream));
            block_forward(model, m, B, T);
            upload(before.data, whole[m - 1]), upload(h.data, whole[m]);
            launch<effect_kernel>(dim3(narrow(ceil_div(N, 64))), 64, 0, effects.data, (const float*)before.data,
                                  (const float*)h.data, (const float*)pruned_before.data, (const float*)out.x, N,
                                  model.config.C);
            for (const float effect : effects.read()) probe.prune_effect[l - 1][m - 1] += effect;
        }
        probe.prune_loss[l - 1] += loss();
    }
}

// From the gradient of the head's input to those of the blocks' parameters. visit(l), for l = L .. 0, finds the
// gradient of h_l in acts.dstream; what it leaves there is handed on.
template <class Visit>
void backward_with_visits(Model& model, int B, int T, Visit visit) {
    const int64_t N = (int64_t)B * T, count = N * model.config.C;
    float* dstream = model.acts.dstream;
    for (int l = model.config.L; l >= 0; l--) {
        const Junction& j = model.acts.junctions[2 * l];
        const StreamGradient dx = stream_backward(model, j, N);
        add_up(dstream, nullptr, 1, dx.sum, dx.factor, dx.sublayer, 1, count);
        visit(l);
        if (!j.sum_norm && j.beta_dz) add_up(dstream, j.beta_dz, j.beta, dstream, 1, nullptr, 1, count);
        if (l > 0) block_backward(model, l, {dstream, 1, nullptr}, B, T);
        else sum_backward(model, j, {dstream, 1, nullptr}, N);
    }
}

// squares[l - 1] += |J^T v - v|^2 of block l: a backward pass in which each block is handed a fresh v.
void add_jacobian_squares(std::vector<double>& squares, Model& model, int B, int T, uint64_t seed) {
    const int L = model.config.L;
    const int64_t count = (int64_t)B * T * model.config.C;
    const auto direction = [&](int l, bool subtract) {
        launch<direction_kernel>(dim3(narrow(ceil_div(count, 256))), 256, 0, model.acts.dstream, random_bits(seed, l),
                                 subtract, count);
    };
    backward_with_visits(model, B, T, [&](int l) {
        if (l < L) {
            direction(l + 1, true);
            squares[l] += square_sum(model.acts.dstream, count);
        }
        if (l > 0) direction(l, false);
    });
}

// The last step's |dW| / |W|, of each kind of matrix and of all together.
void set_update_ratios(Probe& probe, const Model& model) {
    const ParameterTable& table = model.table;
    std::map<std::string, std::vector<UpdateSquares>> kinds;
    std::vector<UpdateSquares> all(probe.L);
    for (size_t i = 0; i < model.last_update.size(); i++) {
        const Parameter& p = table.parameters[i];
        const auto behind = std::find_if(table.blocks.begin(), table.blocks.end(),
                                         [&](const Range& block) { return p.offset < block.end; });
        const int l = (int)(behind - table.blocks.begin());
        if (!p.matrix || l < 1 || l > probe.L) continue;
        // "model.layers.3.mlp.up_proj.weight" is of the kind "mlp.up_proj"
        std::string kind = p.name.substr(p.name.find("." + std::to_string(l - 1) + ".") + 1);
        kind = kind.substr(kind.find('.') + 1, kind.rfind('.') - kind.find('.') - 1);
        kinds[kind].resize(probe.L);
        for (UpdateSquares* sum : {&kinds[kind][l - 1], &all[l - 1]}) {
            sum->change += model.last_update[i].change, sum->size += model.last_update[i].size;
        }
    }
    const auto ratios = [](const std::vector<UpdateSquares>& blocks) {
        std::vector<double> result;
        for (const UpdateSquares& s : blocks) result.push_back(std::sqrt(s.change / s.size));
        return result;
    };
    if (!kinds.empty()) probe.update_ratio = ratios(all);
    for (const auto& [kind, blocks] : kinds) probe.update_ratio_matrices[kind] = ratios(blocks);
}

// inputs, targets: whole sequences of model.T tokens, any number. directions: random v a block. The update's size is
// there if the last one was recorded. Overwrites the model's gradients and activations.
Probe probe_model(Model& model, const std::vector<int32_t>& inputs, const std::vector<int32_t>& targets,
                  int directions = probe_directions) {
    const int L = model.config.L, T = model.T, C = model.config.C;
    const int64_t tokens = (int64_t)inputs.size();
    const double counted =
        (double)std::count_if(targets.begin(), targets.end(), [](int target) { return target >= 0; });
    Probe probe = empty_probe(L);
    probe.tokens = tokens;
    const auto for_each_batch = [&](auto visit) {
        for (int64_t first = 0; first < tokens; first += (int64_t)model.B * T) {
            visit(first, (int)std::min<int64_t>(model.B, (tokens - first) / T));
        }
    };

    begin_step(model);
    for_each_batch([&](int64_t first, int B) {
        const int64_t N = (int64_t)B * T;
        upload_batch(model, &inputs[first], &targets[first], N);
        blocks_forward(model, B, T);
        head_loss(model, N, true);
        probe.loss += take_loss(model);
        backward_with_visits(model, B, T,
                             [&](int l) { probe.grad_norm_stream[l] += square_sum(model.acts.dstream, N * C); });
        model.accumulate = true;
        add_stream_moments(probe, model, B, T);
        add_lenses(probe, model, N);
        add_pruned_losses(probe, model, B, T);
    });
    for (double& norm : probe.grad_norm_stream) norm = std::sqrt(norm);
    for (int l = 1; l <= L; l++) {
        const Range& block = model.table.blocks[l];
        probe.grad_norm_weights[l - 1] = std::sqrt(square_sum(model.gradients + block.begin, block.end - block.begin));
    }
    set_update_ratios(probe, model);

    std::vector<std::vector<double>> squares(directions, std::vector<double>(L, 0.0));
    for_each_batch([&](int64_t first, int B) {
        forward_loss(model, &inputs[first], &targets[first], B, T);
        for (int d = 0; d < directions; d++) {
            add_jacobian_squares(squares[d], model, B, T, random_bits(first, d));
        }
    });
    for (int l = 0; l < L; l++) {
        double sum = 0, square = 0;
        for (int d = 0; d < directions; d++) {
            const double distance = std::sqrt(squares[d][l] / (tokens * C));  // |v|^2 = tokens * C
            sum += distance, square += distance * distance;
        }
        const double mean = sum / directions;
        const double variance = std::max(0.0, square - directions * mean * mean) / (directions - 1);
        probe.jacobian[l] = mean, probe.jacobian_error[l] = std::sqrt(variance / directions);
    }

    sums_to_means(probe, (double)tokens, counted, (double)tokens / T);
    for (int l = 0; l <= L; l++) {
        for (int m = l + 1; m <= L; m++) probe.angular[m][l] = probe.angular[l][m];
    }
    for (const double loss : probe.prune_loss) {
        probe.effective_depth += loss - probe.loss > effective_share * (probe.prune_all_loss - probe.loss);
    }
    return probe;
}

// A row a block; of a very deep model, every second, third ...
void print_probe(const Probe& p, int64_t step) {
    printf("probe at step %lld, %lld tokens, loss %.4f; without any block %.4f\n", (long long)step, (long long)p.tokens,
           p.loss, p.prune_all_loss);
    printf(
        "block  variance   max |h|  attention: |F|/|x|  cos   MLP: |F|/|x|  cos   |grad W|  |grad h|   |dW|/|W|  "
        "|J'v-v|/|v|  lens KL  loss if removed\n");
    const int every = (int)ceil_div(p.L, 24);
    for (int l = 0; l <= p.L; l++) {
        if (l % every && l != p.L) continue;
        printf("%5d %9.3g %9.3g", l, p.variance[l], p.max_abs[l]);
        if (l > 0) {
            const int i = l - 1;
            printf("          %9.3g %5.2f     %9.3g %5.2f  %9.3g %9.3g  %9s    %9.3g %8.3g        %+9.4f",
                   p.attention_ratio[i], p.attention_cosine[i], p.mlp_ratio[i], p.mlp_cosine[i], p.grad_norm_weights[i],
                   p.grad_norm_stream[l], p.update_ratio.empty() ? "" : text("%.3g", p.update_ratio[i]).c_str(),
                   p.jacobian[i], p.lens_kl[l], p.prune_loss[i] - p.loss);
        }
        printf("\n");
    }
    printf("effective depth %d of %d: blocks whose removal costs over %g %% of what removing all of them does\n",
           p.effective_depth, p.L, 100 * effective_share);
    fflush(stdout);
}
