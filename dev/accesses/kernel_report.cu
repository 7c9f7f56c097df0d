// What a training step would take on a GPU, from what its kernels move: a step of the real model at its real shapes, of
// which each launch runs a sample of its blocks under dev/accesses. Nothing is measured by a clock.
//   make kernel-report                            the models of dev/bench/README.md
//   build/accesses/.../kernel_report MODEL [B T]  one model [32 1024], with the lines of each kernel
// Fails where a kernel moves too much.
#define TESTING
#include "../../train_gpt.cu"

#include <sys/mman.h>

#include "dev/accesses/accesses.h"

namespace {

// --- Assumptions ---

// Rates that such GPUs reach, not their data sheets' peaks but for `peak`, which an MFU is a share of.
struct Gpu {
    const char* name;
    double copy;  // bytes a second of a large copy
    double l2;    // bytes of cache that all multiprocessors share
    int multiprocessors;
    double peak;                // operations a second
    double product[2];          // of large products: at 768 channels and from 4,096 on, between them by the logarithm
    double attention_forward;   // on tensor cores, of the causal half, FlashAttention-2's scheme
    double attention_backward;  // of five products
};
constexpr Gpu gpus[] = {
    {"A100", 1.6e12, 40e6, 108, 312e12, {220e12, 260e12}, 120e12, 90e12},
    {"H100", 3.0e12, 50e6, 132, 989e12, {600e12, 680e12}, 200e12, 150e12},
};
constexpr double launch_seconds = 2e-6;     // from one kernel to the next
constexpr double latency_seconds = 0.6e-6;  // of a load from memory, of which a warp has
constexpr double loads_in_flight = 4;

// What a kernel may take over its floor.
constexpr double moved_limit = 1.15, asked_limit = 1.15, time_limit = 1.3;

// Sectors that rows of so many bytes, one behind the other, touch on average: they start at every multiple of what
// their length and a sector have in common.
constexpr double sectors_touched(int64_t bytes) {
    const int64_t step = std::gcd(bytes, accesses::sector);
    double sum = 0;
    for (int64_t start = 0; start < accesses::sector; start += step)
        sum += (double)ceil_div(start + bytes, accesses::sector);
    return sum * step / accesses::sector;
}
static_assert(sectors_touched(64) == 2 && sectors_touched(48) == 2 && sectors_touched(52) == 2.5);

// rope_kernel turns half heads, which may begin in the middle of a sector. A twentieth more than they touch is allowed.
double asked_limit_of(const std::string& kernel, int HS) {
    if (kernel != "rope_kernel") return asked_limit;
    const int64_t bytes = HS / 2 * (int64_t)sizeof(floatX);
    return std::max(asked_limit, 1.05 * sectors_touched(bytes) * accesses::sector / bytes);
}

// --- Counting ---

// All launches of a kernel with one shape in a step.
struct Part {
    double times = 0, bytes = 0, moved[2] = {}, asked = 0, needed = 0, banks = 0, banks_needed = 0;
    double seconds[2] = {};  // by GPU
};
struct Counts {
    std::map<std::string, Part> kernels;
    Part products, fills;
    double operations = 0;  // of products
};

// What a launch moves between L2 and memory: each sector once, and again where the blocks that run at the same time
// touch more, until they come back to it, than the cache holds.
double moved_bytes(const accesses::Launch& launch, const Gpu& gpu) {
    const int threads = launch.block.x * launch.block.y * launch.block.z;
    const double resident = std::min<double>((double)launch.blocks, gpu.multiprocessors * std::min(32, 2048 / threads));
    double sectors = launch.sectors;
    for (size_t i = 0; i < launch.again.size(); i++) {
        if (resident * std::ldexp(1, (int)i) * accesses::sector > gpu.l2) sectors += launch.again[i];
    }
    return sectors * accesses::sector;
}

// The slowest of: memory; the L2 cache at twice its rate; the loads of a warp, one after the other, for all blocks that
// are not resident at the same time.
double seconds_of(const accesses::Launch& launch, const Gpu& gpu) {
    const int threads = launch.block.x * launch.block.y * launch.block.z;
    const double resident = gpu.multiprocessors * std::min(32, 2048 / threads);
    const double waves = std::ceil((double)launch.blocks / resident);
    const double memory = moved_bytes(launch, gpu) / gpu.copy;
    const double cache = launch.asked() * accesses::sector / (2 * gpu.copy);
    const double latency = waves * std::ceil(launch.longest_chain / loads_in_flight) * latency_seconds;
    return launch_seconds + std::max({memory, cache, latency});
}

double product_rate(const Gpu& gpu, int C) {
    const double share = std::clamp(std::log(C / 768.0) / std::log(4096 / 768.0), 0.0, 1.0);
    return gpu.product[0] + share * (gpu.product[1] - gpu.product[0]);
}

std::string name_of(const accesses::Launch& launch) { return launch.kernel.substr(0, launch.kernel.find('<')); }

Counts count_step(const ModelConfig& config, int B, int T) {
    Model model;
    plan_model(model, config, Init::NORMAL, B, T);
    // Addresses for all tensors, memory only for what the sampled blocks touch.
    void* memory =
        mmap(nullptr, model.arena.used, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw Error("no address space for the model");
    model.arena.base = (char*)memory;
    model.arena.sizing = false;
    const size_t bytes = std::exchange(model.arena.used, 0);
    lay_out(model);
    std::vector<int32_t> tokens((int64_t)B * T + 1);
    for (size_t i = 0; i < tokens.size(); i++) tokens[i] = (int32_t)(random_bits(1, i) % config.V);

    accesses::watch(accesses::Watch::traffic);
    accesses::sample(24, {"attention"});  // whose time is set by its operations
    begin_step(model);
    forward_backward(model, tokens.data(), tokens.data() + 1, B, T);
    update(model, {}, 1);
    munmap(memory, bytes);

    Counts counts;
    for (const accesses::Launch& launch : accesses::launches()) {
        if (launch.blocks_run == 0) continue;
        Part& part = counts.kernels[name_of(launch)];
        part.times++, part.bytes += launch.bytes, part.asked += launch.asked(), part.needed += launch.needed();
        part.banks += launch.shared_asked(), part.banks_needed += launch.shared_needed();
        for (int g = 0; g < 2; g++)
            part.moved[g] += moved_bytes(launch, gpus[g]), part.seconds[g] += seconds_of(launch, gpus[g]);
    }
    for (const accesses::Product& product : accesses::products()) {
        const double operations = 2.0 * product.m * product.n * product.k;
        counts.operations += operations;
        counts.products.times++, counts.products.bytes += product.bytes;
        for (int g = 0; g < 2; g++) {
            counts.products.seconds[g] +=
                launch_seconds + std::max(operations / product_rate(gpus[g], config.C), product.bytes / gpus[g].copy);
        }
    }
    counts.fills.bytes = accesses::filled_bytes();
    for (int g = 0; g < 2; g++) counts.fills.seconds[g] = counts.fills.bytes / gpus[g].copy;
    return counts;
}

// a + times * (b - a): a step is linear in its blocks, so that two small models tell the large one.
void extrapolate(Part& a, const Part& b, double times) {
    const auto line = [&](double& x, double y) { x += times * (y - x); };
    line(a.times, b.times), line(a.bytes, b.bytes), line(a.asked, b.asked), line(a.needed, b.needed);
    line(a.banks, b.banks), line(a.banks_needed, b.banks_needed);
    for (int g = 0; g < 2; g++) line(a.moved[g], b.moved[g]), line(a.seconds[g], b.seconds[g]);
}

Counts count_model(ModelConfig config, int B, int T) {
    const int L = config.L;
    config.L = 1;
    Counts counts = count_step(config, B, T);
    config.L = 2;
    const Counts two = count_step(config, B, T);
    for (auto& [name, part] : counts.kernels) extrapolate(part, two.kernels.at(name), L - 1);
    extrapolate(counts.products, two.products, L - 1);
    extrapolate(counts.fills, two.fills, L - 1);
    counts.operations += (L - 1) * (two.operations - counts.operations);
    return counts;
}

// --- The table ---

double over(double a, double b) { return b > 0 ? a / b : 1; }

// Prints a model's step; adds to `report`. Returns how many kernels are above a limit.
int report_model(const std::string& name, int B, int T, json& report) {
    const ModelConfig config = preset_config(*find_preset(name));
    const Counts counts = count_model(config, B, T);
    const double N = (double)B * T, pair = N * (T + 1) / 2 * config.NH * config.HS * 2 * config.L;  // a causal product
    Model model;
    plan_model(model, config, Init::NORMAL, B, T);
    const double useful = N * operations_per_token(model, T);

    printf("\n%s, bf16, B = %d, T = %d: milliseconds of a step\n", name.c_str(), B, T);
    printf("  %-28s %6s %9s %7s %7s %6s %9s %9s %6s\n", "", "times", "floor MB", "moved/", "asked/", "banks/",
           "A100 ms", "H100 ms", "time/");
    printf("  %-28s %6s %9s %7s %7s %6s %9s %9s %6s\n", "", "", "", "floor", "needed", "ideal", "", "", "floor");
    double total[2] = {}, floor[2] = {};
    int bad = 0;
    const auto print = [&](const std::string& title, const Part& part, const char* operations) {
        printf("  %-28s %6.0f %9s %7s %7s %6s %9.2f %9.2f\n", title.c_str(), part.times, operations, "", "", "",
               1e3 * part.seconds[0], 1e3 * part.seconds[1]);
        for (int g = 0; g < 2; g++) total[g] += part.seconds[g], floor[g] += part.seconds[g];
    };
    Part forward, backward;
    forward.times = config.L, backward.times = 2 * config.L;
    for (int g = 0; g < 2; g++) {
        forward.seconds[g] = 2 * pair / gpus[g].attention_forward;
        backward.seconds[g] = 5 * pair / gpus[g].attention_backward;
    }
    print("products", counts.products, text("%.0f TF", counts.operations * 1e-12).c_str());
    print("attention forward", forward, text("%.1f TF", 2 * pair * 1e-12).c_str());
    print("attention backward", backward, text("%.1f TF", 5 * pair * 1e-12).c_str());
    std::vector<std::pair<std::string, Part>> kernels(counts.kernels.begin(), counts.kernels.end());
    std::sort(kernels.begin(), kernels.end(),
              [](const auto& a, const auto& b) { return a.second.seconds[1] > b.second.seconds[1]; });
    for (const auto& [kernel, part] : kernels) {
        const double moved = over(std::max(part.moved[0], part.moved[1]), part.bytes),
                     asked = over(part.asked, part.needed);
        double time = 0;
        for (int g = 0; g < 2; g++)
            time = std::max(time, part.seconds[g] / (part.times * launch_seconds + part.bytes / gpus[g].copy));
        // What is small enough to cost launches, not bytes, is not bound by memory.
        const bool small = part.bytes / gpus[1].copy < part.times * launch_seconds;
        const bool above =
            (moved > moved_limit || asked > asked_limit_of(kernel, config.HS) || time > time_limit) && !small;
        bad += above;
        printf("  %-28s %6.0f %9.1f %7.2f %7.2f %6.2f %9.2f %9.2f %6s%s\n", kernel.c_str(), part.times,
               part.bytes * 1e-6, moved, asked, over(part.banks, part.banks_needed), 1e3 * part.seconds[0],
               1e3 * part.seconds[1], small ? "small" : text("%.2f", time).c_str(), above ? "  ABOVE" : "");
        for (int g = 0; g < 2; g++) total[g] += part.seconds[g], floor[g] += part.bytes / gpus[g].copy;
    }
    print("gradients set to zero", counts.fills, text("%.1f", counts.fills.bytes * 1e-6).c_str());
    printf("  %-59s %17.2f %9.2f\n", "step", 1e3 * total[0], 1e3 * total[1]);
    printf("  %-59s %17.2f %9.2f\n", "of it at floors", 1e3 * floor[0], 1e3 * floor[1]);
    printf("  %-59s %16.1f%% %8.1f%%\n", "MFU", 100 * useful / total[0] / gpus[0].peak,
           100 * useful / total[1] / gpus[1].peak);
    for (int g = 0; g < 2; g++) {
        const double mfu = useful / total[g] / gpus[g].peak;
        report["models"][name][gpus[g].name] = {{"peak_tflops", gpus[g].peak * 1e-12},
                                                {"batch_size", B},
                                                {"seq_len", T},
                                                {"step_ms", std::round(1e4 * total[g]) / 10},
                                                {"mfu", std::round(1e3 * mfu) / 1e3}};
    }
    fflush(stdout);
    return bad;
}

// Each kernel's lines, at the shapes of one block of the model.
void print_lines(const std::string& name, int B, int T) {
    ModelConfig config = preset_config(*find_preset(name));
    config.L = 1;
    count_step(config, B, T);
    std::vector<uintptr_t> code;
    for (const accesses::Launch& launch : accesses::launches()) {
        for (const auto& [address, line] : launch.lines) code.push_back(address);
    }
    const std::map<uintptr_t, std::string> where = accesses::source_lines(code);
    std::set<std::string> seen;
    for (const accesses::Launch& launch : accesses::launches()) {
        if (!seen.insert(launch.kernel).second || launch.blocks_run == 0) continue;
        printf("\n%s, %lld blocks of %u threads\n", launch.kernel.c_str(), (long long)launch.blocks, launch.block.x);
        for (const auto& [address, line] : launch.lines) {
            printf(
                "  %-28s %-6s %-5s %2d bytes a lane %12.0f warp instructions %14.0f bytes, %s %12.0f of %12.0f: %.2f\n",
                where.at(address).c_str(), line.shared ? "shared" : "global", line.write ? "write" : "read", line.size,
                line.instructions, line.bytes, line.shared ? "passes " : "sectors", line.asked, line.needed,
                over(line.asked, line.needed));
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    try {
        json report;
        int bad = 0;
        const std::string first = argc > 1 ? argv[1] : "";
        if (first == "--json" && argc == 3) {  // the shapes of scripts/table1_*.sh and pretrain_7b.sh
            for (const char* name : {"llama-130m", "llama-250m", "llama-350m", "llama-1b", "llama-7b"})
                bad += report_model(name, 64, 256, report);
            report["made by"] = "make kernel-report: estimates from counted bytes and operations, nothing measured";
            write_file(argv[2], report.dump(1) + "\n");
        } else if (!first.empty()) {
            if (!find_preset(first)) throw Error(first + ": no such preset");
            const int B = argc == 2 ? 32 : atoi(argv[2]), T = argc == 2 ? 1024 : argc == 4 ? atoi(argv[3]) : 0;
            if (B < 1 || T < 1) throw Error("MODEL [B T]: B sequences of T tokens, at least 1 of each");
            bad = report_model(first, B, T, report);
            print_lines(first, B, T);
        } else {
            bad = report_model("llama-130m", 32, 1024, report) + report_model("llama-1b", 16, 1024, report) +
                  report_model("llama-7b", 4, 1024, report);
        }
        if (bad)
            fprintf(stderr, "kernel_report: %d kernels are above %g moved, %g asked or %g in time over their floors\n",
                    bad, moved_limit, asked_limit, time_limit);
        return bad > 0;
    } catch (const std::exception& e) {
        fprintf(stderr, "kernel_report: %s\n", e.what());
        return 1;
    }
}
