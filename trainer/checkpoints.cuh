// Checkpoints: what of a model is written to disk, and how it comes back. Part of train_gpt.cu.
#pragma once

// A tensor as Hugging Face has it: one parameter, or neighbours of one name stacked; Conv1D turned; no padding.
struct StoredTensor {
    std::string name;
    std::vector<int64_t> shape;
    const Parameter *begin, *end;

    int64_t rows() const { return begin->matrix ? shape[begin->transposed ? 1 : 0] : 1; }
    int64_t count() const { return std::accumulate(shape.begin(), shape.end(), (int64_t)1, std::multiplies<>()); }
};

std::vector<StoredTensor> stored_tensors(const ParameterTable& table) {
    std::vector<StoredTensor> tensors;
    const Parameter* const last = table.parameters.data() + table.parameters.size();
    for (const Parameter *begin = table.parameters.data(), *end; begin < last; begin = end) {
        int64_t rows = 0, cols = 0;
        for (end = begin; end < last && end->name == begin->name; end++) rows += end->rows, cols += end->cols;
        std::vector<int64_t> shape = {cols};
        if (begin->matrix) shape = {rows, begin->cols};
        if (begin->transposed) std::swap(shape[0], shape[1]);
        tensors.push_back({begin->name, shape, begin, end});
    }
    return tensors;
}

std::vector<float> transposed(const std::vector<float>& matrix, int64_t rows, int64_t cols) {
    std::vector<float> result(matrix.size());
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < cols; c++) result[c * rows + r] = matrix[r * cols + c];
    }
    return result;
}

// A tensor out of `flat`: parameters, gradients or moments on the device, laid out as the table says.
std::vector<float> read_tensor(const float* flat, const StoredTensor& tensor) {
    std::vector<float> values(tensor.count());
    float* at = values.data();
    watchdog.beat();
    for (const Parameter* p = tensor.begin; p < tensor.end; at += p->count(), p++) {
        CHECK_CUDA(cudaMemcpy2D(at, p->cols * sizeof(float), flat + p->offset, p->padded_cols * sizeof(float),
                                p->cols * sizeof(float), p->rows, cudaMemcpyDeviceToHost));
    }
    if (tensor.begin->transposed) values = transposed(values, tensor.shape[1], tensor.shape[0]);
    return values;
}

void write_tensor(float* flat, const StoredTensor& tensor, std::vector<float> values) {
    if (tensor.begin->transposed) values = transposed(values, tensor.shape[0], tensor.shape[1]);
    const float* at = values.data();
    for (const Parameter* p = tensor.begin; p < tensor.end; at += p->count(), p++) {
        CHECK_CUDA(cudaMemcpy2D(flat + p->offset, p->padded_cols * sizeof(float), at, p->cols * sizeof(float),
                                p->cols * sizeof(float), p->rows, cudaMemcpyHostToDevice));
    }
}

// The factors of a plain model live in its tensors on disk, so that plain Hugging Face code computes the same function:
// a norm's scale (LNS) in its gain and bias, that of a branch (RES_SQRT; PRORES, as it is at the step) in the last
// matrix and bias of the branch.
void fold_factor(std::vector<float>& values, const Model& model, const StoredTensor& tensor, bool fold) {
    const int k = tensor.begin->output_of;
    const bool of_branch = model.norm.plain && k >= 0;
    const float factor = of_branch ? model.acts.junctions[k + 1].beta : tensor.begin->norm_scale;
    if (factor == 1) return;
    for (float& value : values) value = fold ? value * factor : value / factor;
}

// A model folder that was a checkpoint must be what was saved.
void check_model_folder(const std::string& folder) {
    const std::string reason = changed_file(folder, false);
    if (!reason.empty()) throw Error(reason + "; copy it again, or remove that list where the change is meant");
}

// What older folders keep beside the parameters: tables that follow from config.json.
bool is_made_table(const std::string& name) {
    return name.ends_with("rotary_emb.inv_freq") || name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias");
}

// Whoever saved a tensor that this model does not have computed something else with it. Of tied weights the head may be
// there once more, the same: of another, one version of transformers takes the embedding and the next one the head.
void refuse_other_tensors(const SafetensorsReader& file, const std::string& folder, const std::string& embedding,
                          const std::set<std::string>& used) {
    for (const std::string& name : file.names()) {
        if (used.contains(name) || is_made_table(name)) continue;
        if (name != "lm_head.weight") {
            throw Error(printable(folder + ": the model that config.json describes has no tensor " + name +
                                  "; remove it, or say in config.json what it is"));
        }
        if (file.read(name) != file.read(embedding)) {
            throw Error(folder + ": " + name + " differs from " + embedding +
                        ", and config.json says that they are tied; remove the wrong one, or say that they are not");
        }
    }
}

// Parameters of a Hugging Face folder into the masters.
void load_huggingface_weights(Model& model, const std::string& folder) {
    const SafetensorsReader file(folder);
    std::set<std::string> used;
    std::string embedding;
    for (const StoredTensor& tensor : stored_tensors(model.table)) {
        // GPT-2's folders from the hub name tensors without "transformer.".
        const std::string bare = tensor.name.substr(tensor.name.find('.') + 1);
        const std::string& name = !file.has(tensor.name) && file.has(bare) ? bare : tensor.name;
        if (!file.has(name))
            throw Error(folder + ": no tensor " + tensor.name + ": the file does not fit its config.json");
        if (file.spec(name).shape != tensor.shape)
            throw Error(folder + ": " + name + " has another shape than config.json says");
        used.insert(name);
        if (tensor.begin->offset == model.table.embedding) embedding = name;
        std::vector<float> values = file.read(name);
        fold_factor(values, model, tensor, false);
        write_tensor(model.masters, tensor, std::move(values));
    }
    refuse_other_tensors(file, folder, embedding, used);
    round_weights(model);
}

// Where a run stands, besides the tensors. Random numbers all follow from seed and step.
struct Progress {
    int64_t step = 0, tokens = 0;
    int64_t rows = 0;        // of the training data, taken so far over all ranks
    int64_t skipped = 0;     // updates left out because loss or gradient norm was not finite
    int64_t epoch_rows = 0;  // in all of it
};

// A training step that was not finite leaves the parameters as they were, but there are other ways to a NaN (--eps 0).
// No checkpoint holds one: whoever resumed from it could only fail.
template <class T>
void check_finite(const std::vector<T>& values, const std::string& name) {
    if (std::all_of(values.begin(), values.end(), [](T value) { return std::isfinite((float)value); })) return;
    throw Error(name +
                " is not finite: no checkpoint is saved; go on from the one before with --resume, and a lower "
                "--lr or a larger --eps");
}

// What surrounds each sublayer, for modeling_norms.py. The scale of its input is in the norm's gain.
nlohmann::json sublayers_json(const Model& model) {
    const FamilyRow& family = model.config.row();
    const int L = model.config.L;
    nlohmann::json list;
    for (int k = 0; k < 2 * L; k++) {
        const bool mlp = k % 2 == 1;
        const Sublayer sublayer = mlp ? Sublayer::MLP : Sublayer::ATTENTION;
        const SublayerPolicy p = model.norm.around(sublayer, k / 2 + 1, L);
        const NormNames names = norm_names(p, sublayer, mlp ? family.mlp_norm : family.attention_norm);
        const auto name = [](bool is_there, const std::string& name) { return is_there ? json(name) : json(); };
        list.push_back({{"input_norm", name(p.norm_input, names.input)},
                        {"output_norm", name(p.norm_output, names.output)},
                        {"sum_norm", name(p.norm_sum, names.sum)},
                        {"input_eps", model.acts.junctions[k].input_norm.eps},
                        {"alpha", model.acts.junctions[k + 1].alpha},
                        {"beta", model.acts.junctions[k + 1].beta}});
    }
    return list;
}

nlohmann::json config_json(const Model& model) {
    nlohmann::json config =
        huggingface_config(model.config, model.norm.name, model.norm.plain, is_fp32 ? "float32" : "bfloat16");
    if (!model.norm.plain) config["sublayers"] = sublayers_json(model);
    return config;
}

bool is_rounded(const StoredTensor& t) { return !is_fp32 && t.begin->matrix; }
int64_t saved_bytes(const StoredTensor& t) { return t.count() * (int64_t)(is_rounded(t) ? 2 : 4); }

void save_tensors(const Model& model, CheckpointFolder& folder, const std::string& name,
                  std::vector<StoredTensor> tensors) {
    // fp32 tensors first, so that each starts at a multiple of its width.
    std::stable_partition(tensors.begin(), tensors.end(), [](const StoredTensor& t) { return !is_rounded(t); });
    std::vector<TensorSpec> specs;
    for (const StoredTensor& t : tensors) specs.push_back({t.name, is_rounded(t) ? "BF16" : "F32", t.shape});
    SafetensorsWriter file(folder.path() + "/" + name, specs);
    for (const StoredTensor& t : tensors) {
        std::vector<float> values = read_tensor(model.masters, t);
        fold_factor(values, model, t, true);
        if (is_rounded(t)) {
            std::vector<__nv_bfloat16> narrow_values(values.size());
            for (size_t i = 0; i < values.size(); i++) narrow_values[i] = __float2bfloat16(values[i]);
            check_finite(narrow_values, t.name);
            file.write(narrow_values.data(), narrow_values.size() * sizeof(__nv_bfloat16));
        } else {
            check_finite(values, t.name);
            file.write(values.data(), values.size() * sizeof(float));
        }
    }
    file.close();
    folder.record_crc32(name, file.crc32());
}

constexpr int64_t most_file_bytes = 5'000'000'000;  // of tensors in a file; a larger tensor has a file of its own

// config.json, generation_config.json and model.safetensors, for plain Hugging Face code where that knows the variant.
// Above `most_bytes`: model-00001-of-00002.safetensors and so on, and model.safetensors.index.json.
void save_model(const Model& model, CheckpointFolder& folder, int64_t most_bytes = most_file_bytes) {
    folder.write("config.json", config_json(model).dump(2) + "\n");
    folder.write("generation_config.json", token_ids(model.config).dump(2) + "\n");
    if (!model.norm.plain) folder.write("modeling_norms.py", modeling_norms_py);
    std::vector<std::vector<StoredTensor>> files(1);
    int64_t bytes = 0, all_bytes = 0;  // of the last file, of all
    for (const StoredTensor& t : stored_tensors(model.table)) {
        if (bytes > 0 && bytes + saved_bytes(t) > most_bytes) files.emplace_back(), bytes = 0;
        files.back().push_back(t);
        bytes += saved_bytes(t), all_bytes += saved_bytes(t);
    }
    if (files.size() == 1) return save_tensors(model, folder, "model.safetensors", files[0]);
    json places;
    for (size_t i = 0; i < files.size(); i++) {
        const std::string name = text("model-%05zu-of-%05zu.safetensors", i + 1, files.size());
        for (const StoredTensor& t : files[i]) places[t.name] = name;
        save_tensors(model, folder, name, std::move(files[i]));
    }
    const json index = {{"metadata", {{"total_size", all_bytes}}}, {"weight_map", places}};
    folder.write("model.safetensors.index.json", index.dump(2) + "\n");
}

constexpr const char* state_parts[] = {"master.", "exp_avg.", "exp_avg_sq."};

// Where the parts are on the device.
std::array<float*, 3> state_buffers(const Model& model) {
    return {model.masters, model.first_moment, model.second_moment};
}

// Of all that is on the device: tells ranks apart that loaded different files.
uint32_t state_crc32(const Model& model) {
    uint32_t crc32 = 0;
    for (const float* flat : state_buffers(model)) {
        for (const StoredTensor& t : stored_tensors(model.table)) {
            const std::vector<float> values = read_tensor(flat, t);
            crc32 = crc32_of(crc32, values.data(), values.size() * sizeof(float));
        }
    }
    return crc32;
}

// state/: what --resume needs besides the model's dimensions. `run` is the run_record.
void save_state(const Model& model, CheckpointFolder& folder, const Progress& progress, const json& run) {
    const std::vector<StoredTensor> tensors = stored_tensors(model.table);
    std::filesystem::create_directory(folder.path() + "/state");
    std::vector<TensorSpec> specs;
    for (const char* part : state_parts) {
        for (const StoredTensor& t : tensors) specs.push_back({part + t.name, "F32", t.shape});
    }
    SafetensorsWriter file(folder.path() + "/state/optimizer.safetensors", specs);
    auto spec = specs.begin();
    for (const float* flat : state_buffers(model)) {
        for (const StoredTensor& t : tensors) {
            const std::vector<float> values = read_tensor(flat, t);
            check_finite(values, (spec++)->name);
            file.write(values.data(), values.size() * sizeof(float));
        }
    }
    file.close();
    folder.record_crc32("state/optimizer.safetensors", file.crc32());
    StepState step;
    CHECK_CUDA(cudaMemcpy(&step, model.state, sizeof(step), cudaMemcpyDeviceToHost));
    const json trainer = {{"step", progress.step},  {"tokens", progress.tokens},   {"window", progress.rows},
                          {"updates", step.update}, {"skipped", progress.skipped}, {"epoch_rows", progress.epoch_rows},
                          {"seed", run.at("seed")}, {"norm", model.norm.name},     {"run", run}};
    folder.write("state/trainer.json", trainer.dump(2, ' ', false, json::error_handler_t::replace) + "\n");
}

// Texts of files, by their names.
using Files = std::map<std::string, std::string>;

// Those of the tokenizer that stand in each checkpoint. Where the model came from `folder` (or "") with this tokenizer,
// what that says of it besides goes along. chat_template: of the conversations that it is tuned on, or "".
Files tokenizer_files(const Tokenizer& tokenizer, const ModelConfig& config, const std::string& folder,
                      const std::string& chat_template) {
    const auto has = [&folder](const std::string& name) {
        return !folder.empty() && std::filesystem::exists(folder + "/" + name);
    };
    Files files = {{"tokenizer.json", tokenizer.json}};
    const std::string name = "tokenizer_config.json";
    nlohmann::json own = tokenizer_config(config, tokenizer);
    if (has("tokenizer.json") && has(name) && read_file(folder + "/tokenizer.json") == tokenizer.json) {
        for (const std::string& other :
             {name, std::string("special_tokens_map.json"), std::string("chat_template.jinja")}) {
            if (has(other)) files[other] = read_file(folder + "/" + other);
        }
        if (!chat_template.empty()) own.update(read_json_object(folder + "/" + name));
    }
    if (!chat_template.empty()) {
        own["chat_template"] = chat_jinja(chat_template, tokenizer);
        own["conversation_template"] = chat_template;  // its name, for --chat
        own["eos_token"] = answer_end(chat_template, tokenizer);
        files.erase("chat_template.jinja"), files.erase("special_tokens_map.json");
    }
    if (!chat_template.empty() || !files.contains(name)) files[name] = own.dump(2) + "\n";
    return files;
}

// Writes RUN/checkpoints/step_N: a Hugging Face folder, with `files` in it, and state/ for --resume. One rank calls.
// Returns the path.
std::string save_checkpoint(const Model& model, const std::string& run_dir, const Progress& progress, const json& run,
                            const Files& files) {
    CheckpointFolder folder(run_dir, progress.step);
    save_model(model, folder);
    for (const auto& [name, contents] : files) folder.write(name, contents);
    save_state(model, folder, progress, run);
    return folder.publish();
}

// --- Going on from one ---

// A checkpoint's state/trainer.json, every number in its range; else throws, in one line.
json read_trainer_json(const std::string& checkpoint) {
    const std::string path = checkpoint + "/state/trainer.json";
    const json trainer = json::parse(read_file(path), nullptr, false);
    if (!trainer.is_object()) throw Error(path + ": damaged: expected a JSON object");
    const auto check = [&](const char* name, int64_t least, int64_t most) {
        const json value = trainer.value(name, json());
        if (!value.is_number_unsigned() || value < least || value > most) {
            throw Error(path +
                        text(": damaged: %s: expected a whole number from %lld to %lld, found ", name, (long long)least,
                             (long long)most) +
                        in_words(value));
        }
        return (int64_t)value;
    };
    constexpr int64_t any = int64_t{1} << 62;
    const int64_t step = check("step", 0, any);
    if (std::filesystem::path(checkpoint).filename() != checkpoint_name(step))
        throw Error(path + text(": damaged: step %lld is not its folder's", (long long)step));
    check("tokens", 0, any);
    check("window", 0, any);
    check("updates", 0, std::min<int64_t>(step, std::numeric_limits<int>::max()));
    check("skipped", 0, step);
    if (trainer.contains("epoch_rows")) check("epoch_rows", 0, any);
    if (trainer.contains("run") && !trainer["run"].is_object()) throw Error(path + ": damaged: run is no object");
    return trainer;
}

// What the run that saved the checkpoint was made of. Those of older programs say little of it.
json checkpoint_record(const std::string& path) {
    const json trainer = read_trainer_json(path);
    const nlohmann::json config = nlohmann::json::parse(read_file(path + "/config.json"), nullptr, false);
    if (!config.is_object()) throw Error(path + "/config.json: damaged: not a JSON object");
    json record = model_record(config);
    if (trainer.contains("run")) {
        record.update(trainer["run"]);
    } else {
        record["seed"] = trainer.value("seed", json());
        record["train"] = {{"rows", trainer.value("epoch_rows", json())}};
    }
    return record;
}

// Why a checkpoint cannot be resumed from, in one line; empty when it can. Reads all of it.
std::string checkpoint_damage(const std::string& path) {
    try {
        for (const char* tensors : {"", "/state/optimizer.safetensors"}) {
            const std::string reason = tensors_are_whole(path + tensors);
            if (!reason.empty()) return reason;
        }
        const std::string changed = changed_file(path, true);
        if (!changed.empty()) return changed;
        checkpoint_record(path);
        return "";
    } catch (const std::exception& e) {
        const std::string reason = first_line(e.what());
        return reason.starts_with(path) ? reason : path + ": " + reason;
    }
}

struct DamagedCheckpoint {
    std::string path, damage;
};

// The newest checkpoint of a run that is whole, and those above it that are not.
struct NewestCheckpoint {
    std::string path;  // empty: there is none at all
    std::vector<DamagedCheckpoint> damaged;
};

// Throws where there are some and none is whole: to start anew would be to lose them.
NewestCheckpoint newest_checkpoint(const std::string& run_dir) {
    NewestCheckpoint newest;
    const auto checkpoints = list_checkpoints(run_dir);
    for (auto entry = checkpoints.rbegin(); entry != checkpoints.rend(); entry++) {
        const std::string damage = checkpoint_damage(entry->second);
        if (damage.empty()) {
            newest.path = entry->second;
            return newest;
        }
        newest.damaged.push_back({entry->second, damage});
    }
    if (!newest.damaged.empty()) {
        throw Error(text("none of the %zu checkpoints in %s is whole (the newest: ", newest.damaged.size(),
                         checkpoint_folder::checkpoints_folder(run_dir).c_str()) +
                    newest.damaged[0].damage + "): copy one back, or train anew without --resume");
    }
    return newest;
}

// What ranks that have a checkpoint by this name must have in common.
std::string checkpoint_identity(const std::string& path) {
    for (const std::string& file : {path + "/state/checksums.json", path + "/state/trainer.json"}) {
        if (!std::filesystem::exists(file)) continue;
        const std::string contents = read_file(file);
        return path + text(" %08x", crc32_of(0, contents.data(), contents.size()));
    }
    return "none";
}

// What of the optimizer's state has not the model's shapes, in one line; empty when all has.
std::string state_misfit(const Model& model, const std::string& path) {
    const SafetensorsReader file(path + "/state/optimizer.safetensors");
    for (const char* part : state_parts) {
        for (const StoredTensor& t : stored_tensors(model.table)) {
            const std::string name = part + t.name;
            if (!file.has(name) || file.spec(name).shape != t.shape)
                return path + ": " + name + " is missing or has another shape: give the model the run was made with";
        }
    }
    return "";
}

// Of a checkpoint that fits.
Progress load_checkpoint(Model& model, const std::string& path) {
    const json trainer = read_trainer_json(path);
    const SafetensorsReader file(path + "/state/optimizer.safetensors");
    const std::array<float*, 3> buffers = state_buffers(model);
    for (size_t part = 0; part < buffers.size(); part++) {
        for (const StoredTensor& t : stored_tensors(model.table))
            write_tensor(buffers[part], t, file.read(state_parts[part] + t.name));
    }
    StepState state = {};
    state.update = trainer.at("updates");
    CHECK_CUDA(cudaMemcpy(model.state, &state, sizeof(state), cudaMemcpyHostToDevice));
    round_weights(model);
    return {.step = trainer.at("step"),
            .tokens = trainer.at("tokens"),
            .rows = trainer.at("window"),
            .skipped = trainer.at("skipped")};
}
