// No kernel has a race: all of them run under dev/accesses, which sees every load and store.
#define TESTING
#include "../train_gpt.cu"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <regex>
#include <set>

#include "dev/accesses/accesses.h"

namespace {

// Races since accesses::watch, a line each.
std::string races() {
    std::string text;
    for (const accesses::Race& race : accesses::races())
        text += race.kernel + ": " + race.text + ", " + std::to_string(race.times) + " times\n";
    return text;
}

template <class T>
struct Zeros : DeviceArray<T> {
    explicit Zeros(int64_t count) : DeviceArray<T>(count) { CHECK_CUDA(cudaMemset(this->data, 0, count * sizeof(T))); }
    operator T*() const { return this->data; }
};

// --- Planted races, each beside its mended twin ---

// One warp writes what another reads.
template <bool mended>
__global__ void read_without_barrier_kernel(float* out) {
    dynamic_shared[threadIdx.x] = 1;
    if (mended) __syncthreads();
    out[threadIdx.x] = dynamic_shared[(threadIdx.x + 32) % blockDim.x];
}

// One lane writes what another reads.
template <bool mended>
__global__ void read_without_syncwarp_kernel(float* out) {
    __shared__ float value[64];
    value[threadIdx.x] = 1;
    if (mended) __syncwarp();
    out[threadIdx.x] = value[threadIdx.x ^ 1];
}

// A meeting of half a warp says nothing of the other half.
template <bool mended>
__global__ void syncwarp_of_half_kernel(float* out) {
    dynamic_shared[threadIdx.x] = 1;
    const unsigned half = threadIdx.x % 32 < 16 ? 0x0000ffff : 0xffff0000;
    __syncwarp(mended ? full_warp : half);
    out[threadIdx.x] = dynamic_shared[threadIdx.x ^ 16];
}

// The tile is overwritten while another warp may still read it.
template <bool mended>
__global__ void reuse_without_barrier_kernel(float* out) {
    float sum = 0;
    for (int i = 0; i < 3; i++) {
        if (mended) __syncthreads();
        dynamic_shared[threadIdx.x] = i;
        __syncthreads();
        sum += dynamic_shared[(threadIdx.x + 32) % blockDim.x];
    }
    out[threadIdx.x] = sum;
}

// Two blocks write one word.
template <bool mended>
__global__ void write_of_all_blocks_kernel(float* out) {
    if (threadIdx.x == 0) out[mended ? blockIdx.x : 0] = blockIdx.x;
}

// Global memory as a way from one warp to another.
template <bool mended>
__global__ void global_without_barrier_kernel(float* out) {
    out[threadIdx.x] = 1;
    if (mended) __syncthreads();
    out[threadIdx.x + blockDim.x] = out[(threadIdx.x + 32) % blockDim.x];
}

// A plain addition beside an atomic one.
template <bool mended>
__global__ void add_beside_atomic_kernel(float* out) {
    if (mended || threadIdx.x % 32 != 7) atomicAdd(out, 1.0f);
    else *out += 1;
}

// A shuffle carries a value, but orders no memory (CUDA C++ Programming Guide).
template <bool mended>
__global__ void read_after_shuffle_kernel(float* out) {
    dynamic_shared[threadIdx.x] = 1;
    const int other = __shfl_xor_sync(full_warp, threadIdx.x, 1);
    if (mended) __syncwarp();
    out[threadIdx.x] = dynamic_shared[other];
}

struct Planted {
    const char* name;
    void (*racy)(float*);
    void (*mended)(float*);
    const char* says;  // of the racy one
    int blocks = 1;
};
const Planted planted[] = {
    {"ReadWithoutBarrier", read_without_barrier_kernel<false>, read_without_barrier_kernel<true>,
     "read in shared memory, write by another warp of the block"},
    {"ReadWithoutSyncwarp", read_without_syncwarp_kernel<false>, read_without_syncwarp_kernel<true>,
     "read in shared memory, write by another lane of the warp"},
    {"SyncwarpOfHalf", syncwarp_of_half_kernel<false>, syncwarp_of_half_kernel<true>,
     "read in shared memory, write by another lane of the warp"},
    {"ReuseWithoutBarrier", reuse_without_barrier_kernel<false>, reuse_without_barrier_kernel<true>,
     "write in shared memory, read by another warp of the block"},
    {"WriteOfAllBlocks", write_of_all_blocks_kernel<false>, write_of_all_blocks_kernel<true>,
     "write in global memory, write by another block", 2},
    {"GlobalWithoutBarrier", global_without_barrier_kernel<false>, global_without_barrier_kernel<true>,
     "read in global memory, write by another warp of the block"},
    {"AddBesideAtomic", add_beside_atomic_kernel<false>, add_beside_atomic_kernel<true>,
     "in global memory, atomic by another"},
    {"ReadAfterShuffle", read_after_shuffle_kernel<false>, read_after_shuffle_kernel<true>,
     "read in shared memory, write by another lane of the warp"},
};

class PlantedRace : public testing::TestWithParam<Planted> {};

// In every order of threads, also those in which the kernel happens to compute what it should.
TEST_P(PlantedRace, IsFoundAndItsMendedTwinHasNone) {
    const Zeros<float> out(256);
    for (const char* order : {"forward", "reverse", "shuffle:1"}) {
        cpu_device::set_order(order);
        accesses::watch(accesses::Watch::races);
        launch(GetParam().racy, dim3(GetParam().blocks), 64, 64 * sizeof(float), out.data);
        const std::string found = races();
        EXPECT_NE(found.find(GetParam().says), std::string::npos) << order << ": " << found;
        EXPECT_NE(found.find("test_races.cu:"), std::string::npos) << found;
        accesses::watch(accesses::Watch::races);
        launch(GetParam().mended, dim3(GetParam().blocks), 64, 64 * sizeof(float), out.data);
        EXPECT_EQ(races(), "") << order;
    }
    cpu_device::set_order("forward");
}
INSTANTIATE_TEST_SUITE_P(, PlantedRace, testing::ValuesIn(planted), [](const auto& test) { return test.param.name; });

// --- Counts of patterns that can be counted by hand ---

__global__ void pattern_kernel(float* out, const float* in, int global_stride, int shared_stride) {
    dynamic_shared[threadIdx.x * shared_stride] = in[(blockIdx.x * blockDim.x + threadIdx.x) * global_stride];
    __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = dynamic_shared[(threadIdx.x ^ 1) * shared_stride];
}

TEST(Counts, AreThoseOfThePattern) {
    const Zeros<float> in(64 * 32 * 4), out(64 * 32);
    struct Case {
        int global_stride, shared_stride, sectors, passes;
    };
    // Of a warp's load: 128 bytes asked for in 4 sectors, 8, or one for each lane; passes over the 32 banks.
    for (const Case& c : {Case{1, 1, 4, 1}, Case{2, 2, 8, 2}, Case{4, 32, 16, 32}}) {
        SCOPED_TRACE(c.global_stride);
        accesses::watch(accesses::Watch::traffic);
        accesses::sample(8);
        launch(pattern_kernel, dim3(64), 32, 32 * 32 * sizeof(float), out.data, (const float*)in.data, c.global_stride,
               c.shared_stride);
        ASSERT_EQ(accesses::launches().size(), 1u);
        const accesses::Launch& seen = accesses::launches()[0];
        EXPECT_EQ(seen.kernel, "(anonymous namespace)::pattern_kernel");
        EXPECT_EQ(seen.blocks_run, 8);
        EXPECT_EQ(seen.bytes, 64 * 2 * 128);
        EXPECT_EQ(seen.sectors, 64 * (c.sectors + 4));
        EXPECT_EQ(seen.asked(), 64 * (c.sectors + 4));
        EXPECT_EQ(seen.needed(), 64 * 8);
        EXPECT_EQ(seen.shared_asked(), 64 * 2 * c.passes);
        EXPECT_EQ(seen.shared_needed(), 64 * 2);
        EXPECT_EQ(seen.longest_chain, 1);
    }
    accesses::sample(INT64_MAX);
}

// --- Ours ---

std::set<std::string> kernels_without_race;

// What ran since accesses::watch has no race.
void expect_no_race() {
    EXPECT_EQ(races(), "");
    for (const std::string& kernel : accesses::kernels())
        kernels_without_race.insert(kernel.substr(0, kernel.find('<')));
}

ModelConfig tiny(Family family) {
    ModelConfig c;
    c.family = family;
    c.L = 2, c.C = 48, c.F = 72, c.V = 133, c.NH = 2, c.NKV = family == Family::LLAMA ? 1 : 2, c.HS = 24,
    c.positions = 70;
    c.tied = family == Family::GPT2;
    c.qkv_bias = c.qk_norm = family == Family::LLAMA;
    return c;
}

void step_without_race(Family family, Norm norm) {
    SCOPED_TRACE(std::string(family_rows[(int)family].name) + " " + norm_policy(norm).name);
    const int B = 2, T = 70;
    accesses::watch(accesses::Watch::races);
    Model model;
    model.document_token = 3;
    plan_model(model, tiny(family), Init::SCALED, B, T, norm_policy(norm));
    allocate_model(model);
    initialize_parameters(model.masters, model.table, 1);
    round_weights(model);
    std::vector<int32_t> tokens(B * T + 1);
    for (size_t i = 0; i < tokens.size(); i++) tokens[i] = (int32_t)(random_bits(1, i) % (i % 2 ? 8 : model.config.V));
    std::vector<int32_t> targets(tokens.begin() + 1, tokens.end());
    targets[5] = -1;
    tokens.pop_back();
    begin_step(model);
    forward_backward(model, tokens.data(), targets.data(), B, T);
    update(model, {}, 1, family == Family::LLAMA);
    StepState state;
    CHECK_CUDA(cudaMemcpy(&state, model.state, sizeof(state), cudaMemcpyDeviceToHost));
    EXPECT_TRUE(state.applied);
    probe_model(model, tokens, targets);
    expect_no_race();
}

TEST(Step, HasNoRace) {
    step_without_race(Family::LLAMA, Norm::LNS);
    step_without_race(Family::LLAMA, Norm::PERI);
    step_without_race(Family::LLAMA, Norm::DEEPNORM);
    step_without_race(Family::GPT2, Norm::LNS);
    step_without_race(Family::GPT2, Norm::POST);
}

TEST(Attention, HasNoRaceAtAnyHeadSize) {
    accesses::watch(accesses::Watch::races);
    const int B = 1, NH = 2, NKV = 1;
    for (const int HS : {8, 32, 44, 64, 80, 96, 128}) {
        const int T = tensor_cores ? 150 : HS <= 64 ? 67 : 35;  // more rows than a tile has
        const int64_t N = B * T, q = N * NH * HS, all = N * (NH + 2 * NKV) * HS;
        const Zeros<floatX> qkv(all), dqkv(all), out(q), dout(q);
        const Zeros<float> lse(N * NH), delta(N * NH);
        const Zeros<float2> rotations(T * HS / 2);
        attention_forward(out, lse, qkv, nullptr, B, T, NH, NKV, HS);
        attention_backward(dqkv, delta, dout, out, lse, qkv, nullptr, rotations, B, T, NH, NKV, HS);
        const Zeros<floatX> cache((int64_t)T * 2 * NKV * HS);
        decode_attention(out, qkv, cache, 1, T, NH, NKV, HS);
    }
    expect_no_race();
}

// Passes over shared memory's banks beyond those that the bytes need are conflicts. Of tensor cores' loads, which move
// whole matrices, the pitch of a tile's rows is to be looked at instead.
TEST(Attention, StoresToDifferentBanks) {
    if (tensor_cores) GTEST_SKIP() << "copies and matrix loads are no plain accesses";
    for (const int HS : {64, 128}) {
        accesses::watch(accesses::Watch::traffic);
        const int B = 1, T = 96, NH = 1, NKV = 1;
        const Zeros<floatX> qkv(T * 3 * HS), dqkv(T * 3 * HS), out(T * HS), dout(T * HS);
        const Zeros<float> lse(T), delta(T);
        const Zeros<float2> rotations(T * HS / 2);
        attention_forward(out, lse, qkv, nullptr, B, T, NH, NKV, HS);
        attention_backward(dqkv, delta, dout, out, lse, qkv, nullptr, rotations, B, T, NH, NKV, HS);
        for (const accesses::Launch& launch : accesses::launches()) {
            for (const auto& [code, line] : launch.lines) {
                if (line.shared && line.asked > 1.01 * line.needed) {
                    ADD_FAILURE() << launch.kernel << (line.write ? " writes " : " reads ") << line.size
                                  << " bytes a lane in " << line.asked << " passes, " << line.needed << " needed, at "
                                  << accesses::source_lines({code}).at(code);
                }
            }
        }
    }
    accesses::watch(accesses::Watch::nothing);
}

// Where a model's step does not get to: other paths, widths with idle lanes, more blocks than one.
TEST(Kernels, HaveNoRaceAtOddShapes) {
    accesses::watch(accesses::Watch::races);
    for (const int C : {4, 20, 132, 1028, 8196}) {
        const int N = C < 8192 ? 37 : 3;  // rows of a warp's lanes, of several warps, and too wide for norms to keep
        const Zeros<floatX> x(N * 2 * C), y(N * 2 * C);
        const Zeros<float> sums(2 * C), partial(std::max(bias_partial_size(N, 2 * C), norm_partial_size(C))), z(N * C),
            dz(N * C), mean(N), rstd(N), gain(C);
        gelu_forward(y, x, N * C);
        gelu_backward(y, y, x, N * C);
        swiglu_forward(y, x, N, C);
        swiglu_backward(y, x, x, N, C);
        round_floats(y, z, N * C);
        bias_backward(sums, x, partial, N, 2 * C);
        add_up(z, y, 2, z, 1, x, 1, N * C);
        for (const bool layer_norm : {false, true}) {
            NormForward forward = {.x = z,
                                   .f = x,
                                   .beta = layer_norm ? 1.0f : 0.5f,
                                   .z = dz,
                                   .y = y,
                                   .rstd = rstd,
                                   .gain = gain,
                                   .eps = 1e-5f,
                                   .N = N,
                                   .C = C};
            NormBackward backward = {.dy = x,
                                     .dres = dz,
                                     .z = z,
                                     .rstd = rstd,
                                     .gain = gain,
                                     .dz = dz,
                                     .df = y,
                                     .dgain = sums,
                                     .partial = partial,
                                     .N = N,
                                     .C = C};
            if (layer_norm) {
                forward.mean = mean, forward.bias = gain;
                backward.mean = mean, backward.dbias = sums + C;
            }
            norm_forward(forward);
            norm_backward(backward);
        }
    }
    for (const int V : {3, 5000}) {
        const int N = 5, Vp = (int)round_up(V, 128);
        const Zeros<floatX> logits(N * Vp);
        const Zeros<float> losses(N);
        const Zeros<int32_t> targets(N);
        classifier(logits, losses, targets, N, V, Vp, true);
        const Zeros<int32_t> largest(N);
        target_is_largest(largest, logits, targets, N, V, Vp);
        launch<fill_random_kernel>(dim3(2), 256, 0, logits.data, (int64_t)300);
    }
    expect_no_race();
}

// --- The finder sees what it should ---

// Each kernel's name in the source, so that a new one is not forgotten above.
TEST(Kernels, AreAllWatched) {
    std::vector<std::string> missing;
    std::vector<std::filesystem::path> paths = {"train_gpt.cu", "lns_layers.cuh"};
    for (const auto& entry : std::filesystem::directory_iterator("trainer")) {
        if (entry.path().extension() == ".cuh") paths.push_back(entry.path());
    }
    for (const std::filesystem::path& path : paths) {
        std::ifstream file(path);
        const std::string source((std::istreambuf_iterator<char>(file)), {});
        ASSERT_FALSE(source.empty()) << path;
        const std::regex definition("__global__[^;{]*?(\\w+_kernel)\\(");
        for (std::sregex_iterator i(source.begin(), source.end(), definition), end; i != end; i++) {
            const std::string kernel = (*i)[1];
            const bool attention = kernel.starts_with("attention_");
            const bool compiled = !attention || kernel.ends_with("_mma_kernel") == tensor_cores;
            if (compiled && !kernels_without_race.contains(kernel)) missing.push_back(kernel);
        }
    }
    EXPECT_EQ(testing::PrintToString(missing), "{}") << "kernels that no test above launches: add them";
}

}  // namespace
