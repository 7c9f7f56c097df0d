// The whole model against the PyTorch fixtures, finite differences, and itself. Compiled once for each NORM.
#define TESTING
#include "../train_gpt.cu"

#include <gtest/gtest.h>

#include <random>

using json = nlohmann::json;

namespace {

// --- Fixtures of dev/reference: parameters, batches, and what PyTorch made of them in double precision ---

struct Fixture {
    ModelConfig config;
    AdamW adam;
    float clip = 0;
    int B = 0, T = 0;
    std::vector<int32_t> inputs, targets;  // (10, B, T)
    std::vector<double> losses, grad_norms, residual_variance;
    std::unique_ptr<SafetensorsReader> file;
};

template <class T>
std::vector<T> read_as(const SafetensorsReader& file, const std::string& name) {
    const std::vector<char> bytes = file.read_bytes(name);
    std::vector<T> values(bytes.size() / sizeof(T));
    memcpy(values.data(), bytes.data(), bytes.size());
    return values;
}

Fixture load_fixture(const std::string& name) {
    Fixture f;
    f.file = std::make_unique<SafetensorsReader>("test/fixtures/" + name + ".safetensors");
    const json c = json::parse(f.file->metadata().at("config")), o = json::parse(f.file->metadata().at("optimizer"));
    f.config.family = c["family"] == "llama" ? Family::LLAMA : Family::GPT2;
    f.config.L = c["layers"], f.config.C = c["hidden"], f.config.F = c["ffn"], f.config.V = c["vocab"];
    f.config.NH = c["heads"], f.config.NKV = c["kv_heads"], f.config.HS = c["head_dim"];
    f.config.positions = c["max_seq_len"], f.config.eps = c["eps"], f.config.rope_theta = c["rope_theta"];
    f.config.tied = c["tied"];
    f.config.qkv_bias = f.config.llama() && c["qkv_bias"];
    f.adam = {o["lr"], o["beta1"], o["beta2"], o["eps"], o["weight_decay"]};
    f.clip = o["grad_clip"];
    f.B = (int)f.file->spec("inputs").shape[1], f.T = (int)f.file->spec("inputs").shape[2];
    f.inputs = read_as<int32_t>(*f.file, "inputs"), f.targets = read_as<int32_t>(*f.file, "targets");
    f.losses = read_as<double>(*f.file, "losses"), f.grad_norms = read_as<double>(*f.file, "grad_norms");
    f.residual_variance = read_as<double>(*f.file, "residual_variance");
    return f;
}

void load_parameters(Model& model, const Fixture& f) {
    import_tensors(model, model.masters, [&](const std::string& name) { return f.file->read("param." + name); });
    round_weights(model);
}

void make_model(Model& model, const ModelConfig& config, int B, int T, uint64_t seed = 1) {
    plan_model(model, config, Init::NORMAL, B, T);
    allocate_model(model);
    initialize_parameters(model.masters, model.table, seed);
    round_weights(model);
}

StepState read_state(const Model& model) {
    StepState state;
    CHECK_CUDA(cudaMemcpy(&state, model.state, sizeof(state), cudaMemcpyDeviceToHost));
    return state;
}

double mean_loss(const Model& model) {
    const StepState state = read_state(model);
    return state.sums[0] / state.sums[1];
}

std::vector<float> read_gradients(const Model& model) {
    std::vector<float> g(model.table.size);
    CHECK_CUDA(cudaMemcpy(g.data(), model.gradients, g.size() * sizeof(float), cudaMemcpyDeviceToHost));
    return g;
}

// |a - b| / |b|
double relative_error(const std::vector<float>& a, const std::vector<float>& b) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < b.size(); i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        size += (double)b[i] * b[i];
    }
    return std::sqrt(difference / size);
}

std::string lower(std::string s) {
    for (char& c : s) c = (char)tolower(c);
    return s;
}

class Parity : public testing::TestWithParam<std::string> {};

TEST_P(Parity, LossAndGradients) {
    const Fixture f = load_fixture(GetParam());
    Model model;
    make_model(model, f.config, f.B, f.T);
    load_parameters(model, f);
    begin_step(model);
    forward_backward(model, f.inputs.data(), f.targets.data(), f.B, f.T);
    const StepState state = read_state(model);
    EXPECT_NEAR(state.sums[0] / state.sums[1], f.losses[0], 1e-5 * f.losses[0]);
    int compared = 0;
    export_tensors(model, model.gradients, [&](const std::string& name, const std::vector<int64_t>&, std::vector<float> g) {
        for (float& x : g) x /= (float)state.sums[1];
        EXPECT_LT(relative_error(g, f.file->read("grad." + name)), 1e-5) << name;
        compared++;
    });
    int expected = 0;
    for (const std::string& name : f.file->names()) expected += name.rfind("grad.", 0) == 0;
    EXPECT_EQ(compared, expected);
}

TEST_P(Parity, TenSteps) {
    const Fixture f = load_fixture(GetParam());
    Model model;
    make_model(model, f.config, f.B, f.T);
    load_parameters(model, f);
    const int64_t N = (int64_t)f.B * f.T;
    for (int step = 0; step < 10; step++) {
        begin_step(model);
        forward_backward(model, &f.inputs[step * N], &f.targets[step * N], f.B, f.T);
        update(model, f.adam, f.clip);
        const StepState state = read_state(model);
        EXPECT_NEAR(state.sums[0] / state.sums[1], f.losses[step], 1e-4 * f.losses[step]) << "step " << step + 1;
        EXPECT_NEAR(state.gradient_norm, f.grad_norms[step], 1e-4 * f.grad_norms[step]) << "step " << step + 1;
    }
}

std::vector<std::string> fixture_names() {
    std::vector<std::string> names = {"llama-" + lower(norm_name), "gpt2-" + lower(norm_name)};
    if (norm_variant == Norm::LNS) names.push_back("llama-lns-bias-tied");
    return names;
}

INSTANTIATE_TEST_SUITE_P(Fixtures, Parity, testing::ValuesIn(fixture_names()), [](const auto& info) {
    std::string name = info.param;
    std::replace(name.begin(), name.end(), '-', '_');
    return name;
});

}  // namespace
