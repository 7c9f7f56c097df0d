// Everything before the first step: data, memory, the run's folder, the checkpoint to go on from. Part of train_gpt.cu.
#pragma once

// That shards which lack their targets are refused later is enough here.
bool hold_conversations(const std::vector<std::string>& shards) {
    return std::filesystem::exists(targets_path(shards[0])) || recorded_checksum(shards[0], "targets_crc32");
}

// Both data sets, checked as far as can be before training. Documents are found by reading all of them once.
void open_data(Trainer& t, int V) {
    const Settings& s = t.settings;
    const RowFormat format(s.pack == "stream"      ? RowFormat::stream
                           : s.pack == "documents" ? RowFormat::documents
                                                   : RowFormat::packed,
                           s.eot_token, s.train_on_prompt);
    if (format.has_documents() && !s.conversations && t.first_rank())
        printf("data     finding the documents in %s\n", s.train.c_str());
    if (!s.probe_only && hold_conversations(find_shards(s.val, "--val")) != s.conversations) {
        const auto hold = [](bool conversations) { return conversations ? " hold conversations" : " hold documents"; };
        throw Error(s.train + hold(s.conversations) + ", and " + s.val + hold(!s.conversations) +
                    ": set --val to shards of the same kind");
    }
    t.val = std::make_unique<ValLoader>(s.val, s.batch_size, s.seq_len, s.eval_tokens, V, format);
    if (s.probe_only || s.probe_every > 0) open_probe_tokens(s, V);  // that there are some, before there is a run
    if (s.probe_only) return;
    t.data.loader = std::make_unique<TrainLoader>(s.train, s.batch_size, s.seq_len, t.cluster.rank, t.cluster.ranks,
                                                  s.seed, V, format, &t.data.memory);
    check_apart(t.data.loader->shards(), t.val->shards());
}

std::string device_name() {
    cudaDeviceProp properties;
    CHECK_CUDA(cudaGetDeviceProperties(&properties, 0));
    return properties.name;
}

// What rows of documents are, and what of these is not trained on.
void print_rows(const TrainLoader& loader, const Settings& s) {
    const char* kind = loader.conversations() ? "conversation" : "document";
    const auto count = [](int64_t number) { return with_commas((double)number); };
    if (s.pack == "documents") {
        printf("         one %s a row, %s of them", kind, count(loader.rows()).c_str());
    } else {
        printf("         %s %ss in %s rows, %.2f a row", count(loader.documents()).c_str(), kind,
               count(loader.rows()).c_str(), (double)loader.documents() / (double)loader.rows());
    }
    if (loader.cut() > 0) printf("; %s longer than --seq-len, and cut", count(loader.cut()).c_str());
    if (loader.left_out() > 0)
        printf("; %s left out, whose first %d tokens hold no answer", count(loader.left_out()).c_str(), s.seq_len + 1);
    printf("\n");
    if (loader.conversations())
        printf("         targets are %s\n", s.train_on_prompt ? "all tokens" : "the answers' tokens");
}

void print_plan(const Trainer& t) {
    const Settings& s = t.settings;
    print_model(t.model, s.model);
    printf("variant  NORM=%s, %s, on %s (%s)%s\n", t.model.norm.name, precision_name, device_kind,
           device_name().c_str(), is_cpu ? ": built without a GPU, so the default model is tiny" : "");
    printf(
        "data     %s tokens in %zu shards, %s validated; %s tokens a step = %d sequences x %d tokens x %d ranks x "
        "%lld\n",
        with_commas((double)t.data.tokens()).c_str(), t.data.shard_count,
        with_commas((double)t.val->predicted_tokens()).c_str(), with_commas((double)s.total_batch_size).c_str(),
        s.batch_size, s.seq_len, t.cluster.ranks, (long long)t.micro_batches());
    if (s.pack != "stream" && t.data.loader) print_rows(*t.data.loader, s);
}

// Before the folder is read, moved or written.
void lock_run_folder(Trainer& t) {
    std::filesystem::create_directories(t.settings.out);
    t.lock = FolderLock(t.settings.out);
}

// With its config.toml and log. An earlier run there is moved aside: nothing is lost, and logs do not mix.
void open_run_folder(Trainer& t, const CommandLine& command_line) {
    namespace fs = std::filesystem;
    const std::string& out = t.settings.out;
    if (!t.settings.resume && fs::exists(out + "/log.jsonl")) {
        int n = 1;
        while (fs::exists(out + ".old-" + std::to_string(n))) n++;
        std::error_code error;
        fs::rename(out, out + ".old-" + std::to_string(n), error);
        if (error) {
            throw Error(out + ": the earlier run there cannot be moved aside: " + error.message() +
                        "; go on from it with --resume, or give --out another folder");
        }
        printf("moved the earlier run in %s to %s.old-%d\n", out.c_str(), out.c_str(), n);
        lock_run_folder(t);
    }
    // What no checkpoint could be written to is found now, and not when there is something to lose.
    if (!t.settings.probe_only) CheckpointFolder(out, t.progress.step);
    const std::string toml = command_line.config_toml(), path = out + "/config.toml";
    t.same_settings = t.settings.resume && fs::exists(path) && read_file(path) == toml;
    if (!t.same_settings) replace_file(path, toml);
    t.log.open(out + "/log.jsonl");
    t.lock.sign();
}

void tune_products(const Trainer& t) {
    if (is_cpu) {
        if (t.first_rank()) printf("--autotune does nothing on a CPU, where oneDNN chooses for itself\n");
        return;
    }
    TunedProducts& tuned = matmul_library.tuned;
    tuned.path = tuned_products_path(device_name());
    tuned.version = cublasLtGetVersion();
    tuned.read();
    matmul_library.autotune = true;
    matmul_library.keeps_tuned = t.first_rank();
    if (t.first_rank()) printf("matrix products as measured in %s\n", tuned.path.c_str());
}

// Memory, the matrix library, events, and how fast the device is.
void take_device(Trainer& t) {
    matmul_library.open();
    if (t.settings.autotune) tune_products(t);
    t.peak = measure_peak() * t.cluster.ranks;
    if (t.first_rank()) print_memory(t.model);
    allocate_model(t.model);
    share_gradients(t.model, t.cluster);
    for (cudaEvent_t& used : t.data.used) CHECK_CUDA(cudaEventCreateWithFlags(&used, cudaEventDisableTiming));
    for (StepReport& report : t.reports) {
        CHECK_CUDA(cudaMallocHost(&report.state, sizeof(StepState)));
        CHECK_CUDA(cudaEventCreate(&report.begin));
        CHECK_CUDA(cudaEventCreate(&report.end));
    }
}

// With --resume, the newest checkpoint that is whole, as the first rank finds it: all ranks must have that one, and the
// same settings and data. Whatever speaks against the run does so here, before anything in its folder is touched.
// Returns the damaged ones, on the first rank.
std::vector<DamagedCheckpoint> choose_checkpoint(Trainer& t) {
    const Settings& s = t.settings;
    t.record = model_record(config_json(t.model));
    t.record.update(run_record(s, build, t.cluster.ranks,
                               t.data.loader ? data_identity(t.data.loader->shards()) : json(),
                               data_identity(t.val->shards())));
    NewestCheckpoint newest;
    if (s.resume && t.first_rank()) newest = newest_checkpoint(s.out);
    const std::string name = broadcast(std::filesystem::path(newest.path).filename(), 0);
    if (!name.empty()) t.resumed_from = checkpoint_folder::checkpoints_folder(s.out) + "/" + name;

    json shared = t.record;
    shared.update(
        {{"out", s.out}, {"resume", s.resume}, {"probe-only", s.probe_only}, {"resume-force", s.resume_force}});
    shared["checkpoint"] = name.empty() ? "none" : checkpoint_identity(t.resumed_from);
    check_ranks_agree(t.cluster.rank, t.cluster.ranks, shared);
    if (name.empty()) return {};

    t.whole_checkpoints.insert(t.resumed_from);
    const json before = checkpoint_record(t.resumed_from);
    json after = t.record;
    if (t.data.loader) after["train"]["rows"] = t.data.rows();  // all that older programs recorded of the data
    const std::string misfit = state_misfit(t.model, t.resumed_from);
    const std::vector<std::string> lines =
        check_same_run(t.resumed_from, before, after, s.resume_force, misfit.empty());
    if (!misfit.empty()) throw Error(misfit);
    if (t.first_rank()) {
        printf("resume   %s\n", t.resumed_from.c_str());
        for (const std::string& line : lines) printf("resume   %s\n", line.c_str());
    }
    return newest.damaged;
}

// Parameters, and with --resume the rest of where the run stood.
void load_or_initialize(Trainer& t) {
    const Settings& s = t.settings;
    if (!t.resumed_from.empty()) {
        t.progress = load_checkpoint(t.model, t.resumed_from);
    } else {
        initialize_parameters(t.model.masters, t.model.table, s.seed);
        round_weights(t.model);
        if (!find_preset(s.model)) load_huggingface_weights(t.model, s.model);
    }
    set_step(t.model, t.progress.step);
    t.progress.epoch_rows = t.data.rows();
    if (t.resumed_from.empty() && find_preset(s.model)) return;
    const uint32_t loaded = t.cluster.ranks == 1 ? 0 : state_crc32(t.model);
    check_ranks_agree(t.cluster.rank, t.cluster.ranks, {{"checksum of what was loaded", text("%08x", loaded)}});
}

void print_start(const Trainer& t) {
    const Settings& s = t.settings;
    if (s.resume && t.resumed_from.empty()) printf("resume   no checkpoint in %s: starting at step 1\n", s.out.c_str());
    printf("run      %s, %lld steps; the device does %.3g TFLOP/s in a large product\n", s.out.c_str(),
           (long long)s.steps, t.peak / t.cluster.ranks * 1e-12);
    fflush(stdout);
}

void log_start(Trainer& t) {
    const Settings& s = t.settings;
    json fields = {{"norm", t.model.norm.name},
                   {"model", s.model},
                   {"family", t.model.config.row().name},
                   {"precision", precision_name},
                   {"device", device_kind},
                   {"device_name", device_name()},
                   {"ranks", t.cluster.ranks},
                   {"params", t.model.table.count()}};
    fields.update(dimensions(t.model.config));
    // Lines are compared as text, so a field keeps its place; settings that are not named here come last.
    const json setting;  // null until logged_settings() fills it in
    fields.update({{"init", setting},
                   {"lr", setting},
                   {"warmup", setting},
                   {"schedule", setting},
                   {"weight_decay", setting},
                   {"seed", setting},
                   {"steps", setting},
                   {"step", t.progress.step},
                   {"total_batch_size", setting},
                   {"seq_len", setting},
                   {"train_tokens", t.data.tokens()},
                   {"val_tokens", t.val->predicted_tokens()},
                   {"doc_mask", setting},
                   {"pack", setting},
                   {"peak_flops", t.peak},
                   {"log_version", 1}});
    fields.update(logged_settings(s));
    if (!t.log.write("start", fields)) throw Error(t.log.error);
}

// config.toml and the log are UTF-8, and would not hold them.
void check_texts(const Settings& s) {
    for (const Setting& setting : setting_table()) {
        const auto* member = std::get_if<std::string Settings::*>(&setting.member);
        std::string buffer;
        if (member && to_utf8(s.**member, buffer) != s.**member) {
            throw Error(text("--%s %s: is not UTF-8: write it so, or rename the file or folder", setting.name,
                             printable(s.**member).c_str()));
        }
    }
}

// Bytes of memory of the smallest device of a rank.
double smallest_memory() {
    size_t available = 0, total = 0;
    CHECK_CUDA(cudaMemGetInfo(&available, &total));
    double smallest = (double)total;
    reduce(&smallest, 1, MPI_MIN);
    return smallest;
}

// By which template the conversations were written out that the training shards hold; empty where they hold none.
std::string trained_template(const Settings& s) {
    const std::string list = std::filesystem::path(s.train).parent_path() / "shards.json";
    if (s.probe_only || !std::filesystem::exists(list)) return "";
    const json shards = json::parse(read_file(list), nullptr, false);
    const json::json_pointer name("/job/template");
    return shards.is_object() && shards.contains(name) && shards.at(name).is_string() ? (std::string)shards.at(name)
                                                                                      : "";
}

// Everything before the first step: settings, data, memory, parameters.
void prepare(Trainer& t, const CommandLine& command_line) {
    Settings& s = t.settings;
    check_texts(s);
    // Data first: without it nothing else is worth waiting for. A probe alone needs none.
    if (!s.probe_only) {
        const std::vector<std::string> shards = find_shards(s.train);
        t.data.shard_count = shards.size();
        s.conversations = hold_conversations(shards);
    }
    const std::string tokenizer = find_tokenizer(s);
    if (!tokenizer.empty()) t.tokenizer = std::make_unique<Tokenizer>(Tokenizer::load(tokenizer));
    const int vocab = t.tokenizer ? (int)t.tokenizer->vocab_size() : 0;
    const double memory = smallest_memory();
    const auto fits_here = [&](const ModelConfig& c, const Settings& planned) { return plan_fits(c, planned, memory); };
    ModelConfig config = resolve(s, build, t.cluster.ranks, vocab, fits_here);
    find_document_token(s, t.tokenizer.get(), config.V);
    open_data(t, config.V);
    resolve_epochs(s, config, t.data.rows());
    if (!s.evaluate.empty()) t.tasks = fit_tasks(read_tasks(s.evaluate, t.tokenizer.get()), s, config.V, t.cluster);
    if (s.doc_mask) t.model.document_token = s.eot_token;
    if (t.tokenizer) {
        const std::string chat_template = trained_template(s);
        name_special_tokens(config, *t.tokenizer, chat_template);
        t.tokenizer_files = tokenizer_files(*t.tokenizer, config, find_preset(s.model) ? "" : s.model, chat_template);
    }
    plan_model(t.model, config, s);
    if (const auto frozen = read_frozen(s.freeze)) freeze(t.model, frozen->embeddings, frozen->blocks);
    if (t.first_rank()) {
        print_plan(t);
        lock_run_folder(t);
    }
    wait_for_world();
    const std::vector<DamagedCheckpoint> damaged = choose_checkpoint(t);
    const bool model_folder = t.resumed_from.empty() && !find_preset(s.model);
    if (model_folder && t.first_rank()) check_model_folder(s.model);
    take_device(t);
    load_or_initialize(t);
    wait_for_world();  // --model may be in the folder that is moved aside
    if (t.first_rank()) {
        open_run_folder(t, command_line);
        for (const auto& [path, damage] : damaged) {
            set_aside(path);
            say_set_aside(damage);
        }
        print_start(t);
        log_start(t);
    }
    wait_for_world();
    t.first_step = t.saved_step = t.progress.step;
    t.can_save = !s.probe_only;
}

// For --evaluate alone: a model's folder, its tokenizer and the tasks. No data, and no folder for a run.
void prepare_evaluation(Trainer& t) {
    Settings& s = t.settings;
    check_texts(s);
    if (s.model.empty() || (find_preset(s.model) && !std::filesystem::exists(s.model + "/config.json")))
        throw UsageError(
            "--evaluate: which model? give --model FOLDER, a checkpoint say; in training, --evaluate-every N");
    const std::string tokenizer = find_tokenizer(s, s.model);
    if (!tokenizer.empty()) t.tokenizer = std::make_unique<Tokenizer>(Tokenizer::load(tokenizer));
    std::vector<Task> tasks = read_tasks(s.evaluate, t.tokenizer.get());
    if (s.seq_len == 0) s.seq_len = tasks_seq_len(tasks, resolve_model(s, build, 0));
    const double memory = smallest_memory();
    const auto fits_here = [&](const ModelConfig& c, const Settings& planned) { return plan_fits(c, planned, memory); };
    const ModelConfig config = resolve(s, build, t.cluster.ranks, 0, fits_here);
    check_ranks_agree(t.cluster.rank, t.cluster.ranks, {{"batch-size", s.batch_size}, {"seq-len", s.seq_len}});
    t.tasks = fit_tasks(std::move(tasks), s, config.V, t.cluster);
    plan_model(t.model, config, s);
    matmul_library.open();
    allocate_model(t.model);
    if (t.first_rank()) check_model_folder(s.model);
    load_huggingface_weights(t.model, s.model);
}
