// What a model takes: operations, memory, and how fast the device is. Part of train_gpt.cu.
#pragma once

// Operations a token needs in a training step if nothing is computed twice: 6 for each weight of a product (2 forward,
// 4 backward), and attention's two products over on average T / 2 keys, each 2 operations a channel, threefold.
double operations_per_token(const Model& model, int T) {
    const ModelConfig& c = model.config;
    const double block =
        (double)c.C * c.qkv_channels() + (double)c.C * c.NH * c.HS + (double)c.C * c.F * (c.row().gated() ? 3 : 2);
    return 6 * (c.L * block + (double)c.C * c.V) + 6.0 * c.L * T * c.NH * c.HS;
}

// x (count) = uniform in [-1, 1). A thread owns an element, which it writes.
__global__ void fill_random_kernel(floatX* x, int64_t count) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) x[i] = from_float<floatX>(2 * random_uniform(random_bits(0, i)) - 1);
}

// What this device does in a large product, operations a second: the fastest of some runs, as what else runs on the
// machine only slows it. Of random numbers, since a GPU multiplies zeros at a higher clock.
double measure_peak() {
    const int64_t n = is_cpu ? 1024 : 8192;
    floatX* matrices = nullptr;
    CHECK_CUDA(cudaMalloc(&matrices, 3 * n * n * sizeof(floatX)));
    launch<fill_random_kernel>(dim3(narrow(ceil_div(3 * n * n, 256))), 256, 0, matrices, 3 * n * n);
    cudaEvent_t begin, end;
    CHECK_CUDA(cudaEventCreate(&begin));
    CHECK_CUDA(cudaEventCreate(&end));
    float fastest = INFINITY;  // milliseconds
    for (int run = 0; run < 8; run++) {
        CHECK_CUDA(cudaEventRecord(begin, main_stream));
        linear_forward(matrices, matrices + n * n, matrices + 2 * n * n, nullptr, n, (int)n, (int)n);
        CHECK_CUDA(cudaEventRecord(end, main_stream));
        CHECK_CUDA(cudaEventSynchronize(end));
        float ms;
        CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
        fastest = std::min(fastest, ms);
    }
    CHECK_CUDA(cudaEventDestroy(begin));
    CHECK_CUDA(cudaEventDestroy(end));
    CHECK_CUDA(cudaFree(matrices));
    return 2.0 * n * n * n / (fastest * 1e-3);
}

// --- Memory ---

// Of this process, as it is now.
int64_t resident_bytes() {
    long pages = 0, total = 0;
    if (FILE* f = fopen("/proc/self/statm", "r")) {
        if (fscanf(f, "%ld %ld", &total, &pages) != 2) pages = 0;
        fclose(f);
    }
    return (int64_t)pages * sysconf(_SC_PAGESIZE);
}

struct MemoryUse {
    std::string purpose;
    int64_t bytes;
};

// Of a planned model on one rank, by purpose, in the order of the table that print_memory prints.
std::vector<MemoryUse> memory_use(const Model& model) {
    std::vector<MemoryUse> uses;
    for (const auto& [purpose, bytes] : model.arena.purposes) {
        const auto same =
            std::find_if(uses.begin(), uses.end(), [&, p = purpose](auto& use) { return use.purpose == p; });
        if (same == uses.end()) uses.push_back({purpose, (int64_t)bytes});
        else same->bytes += (int64_t)bytes;
    }
    if (is_cpu) {
        int64_t largest = 0;
        for (const StoredTensor& tensor : stored_tensors(model.table)) largest = std::max(largest, tensor.count());
        uses.push_back({"tensor on its way to disk", largest * (int64_t)sizeof(float)});
        uses.push_back({"program and libraries", resident_bytes()});
    } else {
        uses.push_back({"matmul workspace", (int64_t)matmul_library.workspace_bytes});
    }
    return uses;
}

int64_t total_bytes(const std::vector<MemoryUse>& uses) {
    int64_t total = 0;
    for (const MemoryUse& use : uses) total += use.bytes;
    return total;
}

// Parameters, gradients, moments: what does not depend on the batch.
int64_t state_bytes(const std::vector<MemoryUse>& uses) {
    int64_t total = 0;
    for (const MemoryUse& use : uses) {
        for (const char* part : {"parameters", "gradients", "AdamW moments"}) {
            if (use.purpose.starts_with(part)) total += use.bytes;
        }
    }
    return total;
}

void print_memory(const Model& model) {
    const std::vector<MemoryUse> uses = memory_use(model);
    const auto print = [](const std::string& purpose, int64_t bytes) {
        printf("  %-28s %10.1f MiB\n", purpose.c_str(), (double)bytes / 1048576.0);
    };
    printf("memory a rank needs\n");
    for (const MemoryUse& use : uses) print(use.purpose, use.bytes);
    print("total", total_bytes(uses));
}

// Of a GPU's memory, which the driver and the libraries take a part of.
bool fits(const Model& model, double bytes) { return (double)total_bytes(memory_use(model)) <= 0.95 * bytes; }

// Whether a run of these settings does.
bool plan_fits(const ModelConfig& config, const Settings& s, double bytes) {
    Model model;
    plan_model(model, config, s);
    return fits(model, bytes);
}

// The most sequences of a forward pass that fit into so many bytes; 0: not even one does.
int largest_batch(const ModelConfig& config, Settings s, double bytes) {
    const auto batch_fits = [&](int64_t B) {
        s.batch_size = (int)B;
        return plan_fits(config, s, bytes);
    };
    int64_t fitting = 0, step = 1, most = most_tokens / s.seq_len;
    while (fitting + step <= most && batch_fits(fitting + step)) fitting += step, step *= 2;
    for (; step > 0; step /= 2) {
        if (fitting + step <= most && batch_fits(fitting + step)) fitting += step;
    }
    return (int)fitting;
}

constexpr int gpu_gigabytes[] = {24, 40, 80};

// By what is computed again and by the size of a GPU.
std::map<std::string, std::map<std::string, int>> largest_batches(const ModelConfig& config, Settings s) {
    std::map<std::string, std::map<std::string, int>> largest;
    for (const char* recompute : {"none", "norm", "block"}) {
        s.recompute = recompute;
        for (const int gigabytes : gpu_gigabytes)
            largest[recompute][std::to_string(gigabytes)] = largest_batch(config, s, 1e9 * gigabytes);
    }
    return largest;
}

void print_largest_batches(const ModelConfig& config, const Settings& s) {
    printf("largest --batch-size, of %d tokens each, that fits a GPU of\n%-30s", s.seq_len, "");
    for (const int gigabytes : gpu_gigabytes) printf(" %7d GB", gigabytes);
    const auto largest = largest_batches(config, s);
    for (const char* recompute : {"none", "norm", "block"}) {
        printf("\n  --recompute %-16s", recompute);
        for (const int gigabytes : gpu_gigabytes) {
            const int B = largest.at(recompute).at(std::to_string(gigabytes));
            printf(" %10s", B > 0 ? std::to_string(B).c_str() : "none");
        }
    }
    printf("\n");
}

// --- All of it, before a run or instead of one ---

void print_model(const Model& model, const std::string& name) {
    const ModelConfig& c = model.config;
    printf("model    %s: %d blocks, %d channels, MLP %d, %d heads (%d key/value) of %d, vocabulary %d; %s parameters\n",
           name.c_str(), c.L, c.C, c.F, c.NH, c.NKV, c.HS, c.V, with_commas((double)model.table.count()).c_str());
}

// For people.
void print_dry_run(const Model& model, const Settings& s, int ranks) {
    const double tokens = (double)s.steps * (double)s.total_batch_size;
    const double operations = operations_per_token(model, s.seq_len);
    print_model(model, s.model);
    printf("variant  NORM=%s, %s, %s; %d sequences x %d tokens x %d ranks at a time\n", model.norm.name, precision_name,
           device_kind, s.batch_size, s.seq_len, ranks);
    printf("work     %s steps x %s tokens = %s tokens; %.5g operations a token, %.5g in all\n",
           with_commas((double)s.steps).c_str(), with_commas((double)s.total_batch_size).c_str(),
           with_commas(tokens).c_str(), operations, operations * tokens);
    print_memory(model);
    print_largest_batches(model.config, s);
}

// For programs: memory in bytes of one rank, work of all.
json dry_run_fields(const Model& model, const Settings& s, int ranks) {
    const std::vector<MemoryUse> uses = memory_use(model);
    json memory = json::object();
    for (const MemoryUse& use : uses) memory[use.purpose] = use.bytes;
    const int64_t tokens = s.steps * s.total_batch_size;
    const double operations = operations_per_token(model, s.seq_len);
    json fields = {{"model", s.model},
                   {"norm", model.norm.name},
                   {"precision", precision_name},
                   {"device", device_kind},
                   {"family", model.config.row().name},
                   {"ranks", ranks},
                   {"params", model.table.count()}};
    fields.update(dimensions(model.config));
    fields.update({{"batch_size", s.batch_size},
                   {"seq_len", s.seq_len},
                   {"total_batch_size", s.total_batch_size},
                   {"steps", s.steps},
                   {"tokens", tokens},
                   {"operations_per_token", operations},
                   {"operations", operations * (double)tokens},
                   {"memory", memory},
                   {"memory_bytes", total_bytes(uses)},
                   {"state_bytes", state_bytes(uses)},
                   {"recompute", s.recompute},
                   {"largest_batch_size", largest_batches(model.config, s)}});
    return fields;
}

// What a run of these settings would take. Calls no CUDA function, so that a CUDA build answers without a GPU too.
void dry_run(Settings& s) {
    const auto [rank, ranks] = World();
    const std::string tokenizer = find_tokenizer(s);
    const int vocab = tokenizer.empty() ? 0 : (int)Tokenizer::load(tokenizer).vocab_size();
    // The default batch is that of a GPU of the largest of these sizes.
    const auto fits_gpu = [](const ModelConfig& c, const Settings& planned) {
        return plan_fits(c, planned, 1e9 * gpu_gigabytes[std::size(gpu_gigabytes) - 1]);
    };
    if (s.epochs > 0)
        throw UsageError("--epochs: how many steps it is follows from the data; with --dry-run give --steps");
    const ModelConfig config = resolve(s, build, ranks, vocab, fits_gpu);
    Model model;
    plan_model(model, config, s);
    if (rank != 0) return;
    if (s.json) printf("%s\n", to_line(dry_run_fields(model, s, ranks)).c_str());
    else print_dry_run(model, s, ranks);
}
