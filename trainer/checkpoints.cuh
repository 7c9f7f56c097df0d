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

// LNS's scale lives in the norm's gain and bias on disk, so that plain Hugging Face code computes the same function.
void scale_norm(std::vector<float>& values, const StoredTensor& tensor, bool fold) {
    const float scale = tensor.begin->norm_scale;
    if (scale == 1) return;
    for (float& value : values) value = fold ? value * scale : value / scale;
}

// Parameters of a Hugging Face folder into the masters.
void load_huggingface_weights(Model& model, const std::string& folder) {
    const SafetensorsReader file(folder);
    for (const StoredTensor& tensor : stored_tensors(model.table)) {
        // GPT-2's folders from the hub name tensors without "transformer.".
        const std::string bare = tensor.name.substr(tensor.name.find('.') + 1);
        const std::string& name = !file.has(tensor.name) && file.has(bare) ? bare : tensor.name;
        if (!file.has(name))
            throw Error(folder + ": no tensor " + tensor.name + ": the file does not fit its config.json");
        if (file.spec(name).shape != tensor.shape)
            throw Error(folder + ": " + name + " has another shape than config.json says");
        std::vector<float> values = file.read(name);
        scale_norm(values, tensor, false);
        write_tensor(model.masters, tensor, std::move(values));
    }
    round_weights(model);
}

// Where a run stands, besides the tensors. Random numbers all follow from seed and step.
struct Progress {
    int64_t step = 0, tokens = 0;
    int64_t rows = 0;        // of the training data, taken so far over all ranks
    int64_t skipped = 0;     // updates left out because loss or gradient norm was not finite
    int64_t epoch_rows = 0;  // in all of it: other data is noticed when the run is resumed
};

// PATH/config.json and PATH/model.safetensors, for plain Hugging Face code where that knows the variant.
void save_model(const Model& model, const std::string& path) {
    const nlohmann::json config =
        huggingface_config(model.config, model.norm.name, model.norm.plain, is_fp32 ? "float32" : "bfloat16");
    write_file(path + "/config.json", config.dump(2) + "\n");

    // fp32 tensors first, so that each starts at a multiple of its width.
    std::vector<StoredTensor> tensors = stored_tensors(model.table);
    const auto rounded = [](const StoredTensor& t) { return !is_fp32 && t.begin->matrix; };
    std::stable_partition(tensors.begin(), tensors.end(), [&](const StoredTensor& t) { return !rounded(t); });
    std::vector<TensorSpec> specs;
    for (const StoredTensor& t : tensors) specs.push_back({t.name, rounded(t) ? "BF16" : "F32", t.shape});
    SafetensorsWriter file(path + "/model.safetensors", specs);
    for (const StoredTensor& t : tensors) {
        std::vector<float> values = read_tensor(model.masters, t);
        scale_norm(values, t, true);
        if (rounded(t)) {
            std::vector<__nv_bfloat16> narrow_values(values.size());
            for (size_t i = 0; i < values.size(); i++) narrow_values[i] = __float2bfloat16(values[i]);
            file.write(narrow_values.data(), narrow_values.size() * sizeof(__nv_bfloat16));
        } else {
            file.write(values.data(), values.size() * sizeof(float));
        }
    }
    file.close();
}

constexpr const char* state_parts[] = {"master.", "exp_avg.", "exp_avg_sq."};

// PATH/state: what --resume needs besides the model's dimensions.
void save_state(const Model& model, const std::string& path, const Progress& progress, uint64_t seed) {
    const std::vector<StoredTensor> tensors = stored_tensors(model.table);
    std::filesystem::create_directory(path + "/state");
    std::vector<TensorSpec> specs;
    for (const char* part : state_parts) {
        for (const StoredTensor& t : tensors) specs.push_back({part + t.name, "F32", t.shape});
    }
    SafetensorsWriter file(path + "/state/optimizer.safetensors", specs);
    for (const float* flat : {model.masters, model.first_moment, model.second_moment}) {
        for (const StoredTensor& t : tensors) {
            const std::vector<float> values = read_tensor(flat, t);
            file.write(values.data(), values.size() * sizeof(float));
        }
    }
    file.close();
    StepState step;
    CHECK_CUDA(cudaMemcpy(&step, model.state, sizeof(step), cudaMemcpyDeviceToHost));
    const nlohmann::json trainer = {{"step", progress.step},
                                    {"tokens", progress.tokens},
                                    {"window", progress.rows},
                                    {"updates", step.update},
                                    {"seed", seed},
                                    {"norm", model.norm.name},
                                    {"skipped", progress.skipped},
                                    {"epoch_rows", progress.epoch_rows}};
    write_file(path + "/state/trainer.json", trainer.dump(2) + "\n");
}

// Writes RUN/checkpoints/step_N: a Hugging Face folder, and state/ for --resume. One rank calls. Returns the path.
// tokenizer_json: the file's text; empty without a tokenizer.
std::string save_checkpoint(const Model& model, const std::string& run_dir, const Progress& progress, uint64_t seed,
                            const std::string& tokenizer_json) {
    CheckpointFolder folder(run_dir, progress.step);
    save_model(model, folder.path());
    if (!tokenizer_json.empty()) write_file(folder.path() + "/tokenizer.json", tokenizer_json);
    save_state(model, folder.path(), progress, seed);
    return folder.publish();
}

// Goes on from a checkpoint folder. Throws when it belongs to another model or variant.
Progress load_checkpoint(Model& model, const std::string& path, uint64_t seed) {
    const nlohmann::json trainer = nlohmann::json::parse(read_file(path + "/state/trainer.json"));
    if (trainer.at("norm") != model.norm.name) {
        throw Error(path + ": a run of NORM=" + trainer.at("norm").get<std::string>() +
                    ", this program is NORM=" + model.norm.name);
    }
    if (trainer.at("seed") != seed) {
        throw Error(text("%s: a run of --seed %llu, not %llu", path.c_str(),
                         (unsigned long long)trainer.at("seed").get<uint64_t>(), (unsigned long long)seed));
    }
    const SafetensorsReader file(path + "/state/optimizer.safetensors");
    float* const flats[] = {model.masters, model.first_moment, model.second_moment};
    for (int part = 0; part < 3; part++) {
        for (const StoredTensor& t : stored_tensors(model.table)) {
            const std::string name = state_parts[part] + t.name;
            if (!file.has(name) || file.spec(name).shape != t.shape) {
                throw Error(path + ": " + name +
                            " is missing or has another shape: resume with the model the run was made with");
            }
            write_tensor(flats[part], t, file.read(name));
        }
    }
    StepState state = {};
    state.update = trainer.at("updates");
    CHECK_CUDA(cudaMemcpy(model.state, &state, sizeof(state), cudaMemcpyHostToDevice));
    round_weights(model);
    return {.step = trainer.at("step"),
            .tokens = trainer.at("tokens"),
            .rows = trainer.at("window"),
            .skipped = trainer.at("skipped"),
            .epoch_rows = trainer.value("epoch_rows", int64_t{0})};
}

// Why a checkpoint cannot be resumed from; empty when it can.
std::string checkpoint_damage(const std::string& path) {
    for (const char* file : {"/model.safetensors", "/state/optimizer.safetensors"}) {
        const std::string reason = tensors_are_whole(path + file);
        if (!reason.empty()) return reason;
    }
    try {
        const nlohmann::json trainer = nlohmann::json::parse(read_file(path + "/state/trainer.json"));
        trainer.at("step").get<int64_t>();
    } catch (const std::exception& e) {
        return e.what();
    }
    return "";
}
