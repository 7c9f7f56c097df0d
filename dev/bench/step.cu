// How fast a training step is, and where its time goes. For each part: how often a step does it, its time, and its
// floor: the larger of operations / rate of a large product and bytes / rate of a large copy, both measured here.
//   build/cpu-fp32-LNS/step                 the works below, each with a table of its parts
//   build/cpu-fp32-LNS/step MODEL B T       one: a preset, demo or depth-study
//   build/cpu-fp32-LNS/step MODEL B T SECONDS   only the median time of the steps that fit into SECONDS, in ms
#define TESTING
#include "../../train_gpt.cu"

namespace {

double seconds_of(const std::function<void()>& work, int runs = 5) {
    cudaEvent_t begin, end;
    CHECK_CUDA(cudaEventCreate(&begin));
    CHECK_CUDA(cudaEventCreate(&end));
    std::vector<float> times;
    for (int run = 0; run <= runs; run++) {
        CHECK_CUDA(cudaEventRecord(begin, main_stream));
        work();
        CHECK_CUDA(cudaEventRecord(end, main_stream));
        CHECK_CUDA(cudaEventSynchronize(end));
        float ms;
        CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
        if (run > 0) times.push_back(ms);  // the first warms up
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2] * 1e-3;
}

// Bytes a second of a copy much larger than the caches, read and written bytes counted.
double measure_bandwidth() {
    const int64_t bytes = 256 << 20;
    char* buffers = nullptr;
    CHECK_CUDA(cudaMalloc(&buffers, 2 * bytes));
    CHECK_CUDA(cudaMemset(buffers, 0, 2 * bytes));
    const double seconds = seconds_of(
        [&] { CHECK_CUDA(cudaMemcpyAsync(buffers + bytes, buffers, bytes, cudaMemcpyDeviceToDevice, main_stream)); });
    CHECK_CUDA(cudaFree(buffers));
    return 2.0 * bytes / seconds;
}

// The demo's and the depth study's models are none of the presets.
ModelConfig config_of(const std::string& name) {
    if (name == "demo") return {.L = 24, .C = 96, .F = 256, .NH = 4, .NKV = 4, .HS = 24, .V = 4096};
    if (name == "depth-study") return {.L = 24, .C = 64, .F = 176, .NH = 2, .NKV = 2, .HS = 32, .V = 256};
    const Preset* preset = find_preset(name);
    if (!preset) throw Error(name + ": no such preset");
    return preset_config(*preset);
}

// A table of the parts, or if `budget`, in seconds, is not 0, the time of a step alone.
void bench(const std::string& name, int B, int T, double budget = 0) {
    const ModelConfig config = config_of(name);
    Model model;
    plan_model(model, config, Init::NORMAL, B, T);
    allocate_model(model);
    initialize_parameters(model.masters, model.table, 1);
    round_weights(model);
    const ModelConfig& c = model.config;
    const int64_t N = (int64_t)B * T;
    const Activations& a = model.acts;
    std::vector<int32_t> tokens(N + 1);
    for (int64_t i = 0; i <= N; i++) tokens[i] = (int32_t)(random_bits(1, i) % c.V);
    const auto step = [&] {
        begin_step(model);
        forward_backward(model, tokens.data(), tokens.data() + 1, B, T);
        update(model, {}, 1);
    };
    step();
    if (budget > 0) {
        const double once = seconds_of(step, 1);
        printf("%.2f\n", seconds_of(step, std::max(3, (int)(budget / once))) * 1e3);
        return;
    }
    const double peak = measure_peak(), bandwidth = measure_bandwidth();
    const double step_seconds = seconds_of(step, 9);

    struct Part {
        const char* name;
        double times, operations, bytes;
        std::function<void()> work;
    };
    const int qkv = c.qkv_channels(), q = c.NH * c.HS, Fp = c.Fp(), up = c.up_channels(), L = c.L;
    const double X = sizeof(floatX), row = (double)N * c.C;
    const double pairs = (double)B * c.NH * T * (T + 1) / 2 * c.HS * 2;  // operations of one causal T x T x HS product
    const Junction& j = a.junctions[1];
    const PlannedNorm& norm = a.junctions[2 * L].input_norm;
    const auto products = [&](int in, int out, const floatX* x, floatX* y, floatX* dx) {
        return [=, &model] {
            const floatX* w = weight(model, model.table.sublayers[0].in);
            float* dw = gradient(model, model.table.sublayers[0].in);
            linear_forward(y, x, w, nullptr, N, in, out);
            linear_backward_input(dx, y, w, N, in, out);
            linear_backward_weight(dw, nullptr, x, y, nullptr, N, in, out);
        };
    };
    const auto product_operations = [&](double in, double out) { return 6.0 * N * in * out; };
    // On tensor cores the backward kernels of attention turn positions back themselves.
    const float2* turn_back = tensor_cores && c.row().rotary() ? a.rotations : nullptr;
    std::vector<Part> parts = {
        {"products query, key, value", (double)L, product_operations(c.C, qkv), 0,
         products(c.C, qkv, j.in, a.dqkv, a.din)},
        {"products attention output", (double)L, product_operations(q, c.C), 0,
         products(q, c.C, a.dattention, a.din, a.dattention)},
        {"products MLP in", (double)L, product_operations(c.C, up), 0, products(c.C, up, j.in, a.dup, a.din)},
        {"products MLP out", (double)L, product_operations(Fp, c.C), 0, products(Fp, c.C, a.dhidden, a.din, a.dhidden)},
        {"head and classifier", 1, product_operations(c.C, c.Vp()), 0, [&] { head_loss(model, N, true); }},
        {"attention forward", (double)L, 2 * pairs, X * N * (qkv + q),
         [&] { attention_forward(a.attention[0], a.lse[0], a.qkv[0], nullptr, B, T, c.NH, c.NKV, c.HS); }},
        {"attention backward", (double)L, 5 * pairs, X * N * (2 * qkv + 2 * q),
         [&] {
             attention_backward(a.dqkv, a.delta, a.dattention, a.attention[0], a.lse[0], a.qkv[0], nullptr, turn_back,
                                B, T, c.NH, c.NKV, c.HS);
         }},
        {"norm forward, with sum", 2.0 * L, 0, row * (8 + 2 * X),
         [&] { normalize(model, norm, {.x = a.junctions[0].x, .f = a.f, .z = j.z, .y = j.in}, N); }},
        {"norm backward, with sum", 2.0 * L, 0, row * (12 + X),
         [&] { normalize_backward(model, norm, {.dy = a.din, .dres = a.dstream, .z = j.z, .dz = a.dstream}, N); }},
        {"AdamW and gradient norm", 1, 0, model.table.size * (32.0 + (is_fp32 ? 0 : 2)), [&] { update(model, {}, 1); }},
    };
    if (c.row().rotary()) {
        parts.push_back({"rotary positions", (tensor_cores ? 1.0 : 2.0) * L, 0, X * 2 * N * (c.NH + c.NKV) * c.HS,
                         [&] { rope(a.dqkv, a.rotations, B, T, c.NH, c.NKV, c.HS, 1); }});
        parts.push_back(
            {"SwiGLU forward", (double)L, 0, X * 3 * N * Fp, [&] { swiglu_forward(a.dhidden, a.up[0], N, Fp); }});
        parts.push_back({"SwiGLU backward", (double)L, 0, X * 5 * N * Fp,
                         [&] { swiglu_backward(a.dup, a.dhidden, a.up[0], N, Fp); }});
    }
    cudaDeviceProp properties;
    CHECK_CUDA(cudaGetDeviceProperties(&properties, 0));
    const double limit = N * operations_per_token(model, T) / peak;
    printf("\n%s, B = %d, T = %d, NORM=%s, %s on %s, %d multiprocessors (CPU: threads)\n", name.c_str(), B, T,
           model.norm.name, precision_name, properties.name, properties.multiProcessorCount);
    printf("  large product %.1f GFLOP/s, large copy %.1f GB/s\n", peak * 1e-9, bandwidth * 1e-9);
    printf("  step %.1f ms, %.0f tokens/s; limit of the products and attention %.1f ms: %.1f %% of it\n",
           step_seconds * 1e3, N / step_seconds, limit * 1e3, 100 * limit / step_seconds);
    printf("  %-28s %6s %10s %10s %9s %8s\n", "part", "times", "ms a step", "floor ms", "of floor", "of step");
    double sum = 0;
    for (const Part& part : parts) {
        const double seconds = part.times * seconds_of(part.work);
        const double floor = part.times * std::max(part.operations / peak, part.bytes / bandwidth);
        sum += seconds;
        printf("  %-28s %6.0f %10.1f %10.1f %8.0f%% %7.1f%%\n", part.name, part.times, seconds * 1e3, floor * 1e3,
               100 * floor / seconds, 100 * seconds / step_seconds);
    }
    printf("  %-28s %6s %10.1f %30.1f%%\n", "sum", "", sum * 1e3, 100 * sum / step_seconds);
}

}  // namespace

int main(int argc, char** argv) {
    try {
        if (argc >= 4) {
            bench(argv[1], atoi(argv[2]), atoi(argv[3]), argc > 4 ? atof(argv[4]) : 0);
        } else {
            bench("demo", 16, 128);
            bench("depth-study", 16, 128);
            bench("llama-130m", 4, 256);
            bench("gpt2-124m", 4, 64);
        }
    } catch (const std::exception& e) {
        fprintf(stderr, "step: %s\n", e.what());
        return 1;
    }
}
