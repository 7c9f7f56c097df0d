// Text that the model writes: in samples during training, and by --generate. Part of train_gpt.cu.
#pragma once

// Keys (rotated) and values of the tokens so far, so that the next one costs the work of one token.
struct KeyValueCache {
    int length;  // tokens that there is room for
    int64_t row;
    DeviceArray<floatX> memory;  // (L, length, 2 NKV, HS)

    KeyValueCache(const ModelConfig& c, int length)
        : length(length), row(2 * (int64_t)c.NKV * c.HS), memory(c.L * length * row) {}

    floatX* block(int l) const { return memory.data + (l - 1) * length * row; }

    // The last part of each row of qkv (count, NH + 2 NKV, HS), which are tokens first .. first + count - 1.
    void append(int l, const floatX* qkv, int64_t qkv_row, int first, int count) const {
        const size_t bytes = row * sizeof(floatX);
        CHECK_CUDA(cudaMemcpy2DAsync(block(l) + first * row, bytes, qkv + qkv_row - row, qkv_row * sizeof(floatX),
                                     bytes, count, cudaMemcpyDeviceToDevice, main_stream));
    }
};

// Attention of one token: out (NH, HS) from query (NH, HS) and rows begin .. end - 1 of cache (length, 2 NKV, HS), keys
// before values. A warp owns a head, its lanes neighbouring channels; the softmax is computed online, key after key.
// Bytes: reads e (end - begin) 2 NH HS, all but the first NKV / NH of it from a cache, and e NH HS; writes e NH HS.
template <int D>
__global__ void decode_attention_kernel(floatX* out, const floatX* query, const floatX* cache, int begin, int end,
                                        int NH, int NKV, int HS) {
    constexpr int W = attention_wide, n = (D + W * warp_size - 1) / (W * warp_size);
    const int head = blockIdx.x, lane = threadIdx.x;
    const int64_t row = 2 * (int64_t)NKV * HS;
    const floatX* keys = cache + head / (NH / NKV) * HS;
    const floatX* values = keys + NKV * HS;
    AttentionFloats q[n], o[n];
    UNROLL
    for (int i = 0; i < n; i++) {
        const int d = (i * warp_size + lane) * W;
        q[i] = 1.0f / sqrtf((float)HS) * load_first<W>(query + head * HS + d, HS - d);
        o[i] = 0.0f;
    }
    float maximum = unseen_score, sum = 0;
    for (int t = begin; t < end; t++) {
        AttentionFloats products = 0.0f;
        UNROLL
        for (int i = 0; i < n; i++) {
            const int d = (i * warp_size + lane) * W;
            products += q[i] * load_first<W>(keys + t * row + d, HS - d);
        }
        const float s = group_sum(sum_of(products)), larger = fmaxf(s, maximum);
        const float correction = __expf(maximum - larger), weight = __expf(s - larger);
        maximum = larger;
        sum = sum * correction + weight;
        UNROLL
        for (int i = 0; i < n; i++) {
            const int d = (i * warp_size + lane) * W;
            o[i] = correction * o[i] + weight * load_first<W>(values + t * row + d, HS - d);
        }
    }
    UNROLL
    for (int i = 0; i < n; i++) {
        const int d = (i * warp_size + lane) * W;
        store_first(out + head * HS + d, o[i] / sum, HS - d);
    }
}

void decode_attention(floatX* out, const floatX* query, const floatX* cache, int begin, int end, int NH, int NKV,
                      int HS) {
    with_head_size(HS, [&](auto size) {
        launch<decode_attention_kernel<size>>(dim3(NH), block_threads(32), 0, out, query, cache, begin, end, NH, NKV,
                                              HS);
    });
}

// One sequence, token after token. It overwrites the model's activations.
struct Decoder {
    Model& model;
    KeyValueCache cache;
    int count = 0, document_begin = 0;

    // For up to `length` tokens, at most model.T.
    Decoder(Model& model, int length) : model(model), cache(model.config, length) {}

    // Logits (V) of the token behind row `row` of the last junction.
    std::vector<float> logits(int row) const {
        const ModelConfig& c = model.config;
        linear_forward(model.acts.logits, model.acts.junctions[2 * c.L].in + (int64_t)row * c.C,
                       weight(model, model.table.head), nullptr, 1, c.C, c.Vp());
        std::vector<floatX> read(c.V);
        CHECK_CUDA(
            cudaMemcpyAsync(read.data(), model.acts.logits, c.V * sizeof(floatX), cudaMemcpyDeviceToHost, main_stream));
        CHECK_CUDA(cudaStreamSynchronize(main_stream));
        std::vector<float> values(c.V);
        for (int i = 0; i < c.V; i++) values[i] = to_float(read[i]);
        return values;
    }

    // With --doc-mask, attention goes back to here.
    void find_document(const std::vector<uint32_t>& ids) {
        for (size_t i = 0; i < ids.size(); i++) {
            if ((int64_t)ids[i] == model.document_token) document_begin = count + (int)i;
        }
    }

    // The first tokens, all at once, as in training.
    std::vector<float> start(const std::vector<uint32_t>& ids) {
        const ModelConfig& c = model.config;
        const int T = (int)ids.size();
        count = document_begin = 0;
        find_document(ids);
        upload(model.acts.inputs, (const int32_t*)ids.data(), T);
        blocks_forward(model, 1, T, [&](int l) { cache.append(l, model.acts.qkv[l - 1], c.qkv_channels(), 0, T); });
        count = T;
        return logits(T - 1);
    }

    // One more.
    std::vector<float> next(uint32_t id) {
        const ModelConfig& c = model.config;
        Activations& a = model.acts;
        find_document({id});
        upload(a.inputs, (const int32_t*)&id, 1);
        const floatX* positions = weight(model, model.table.positions);
        embedding_forward(a.junctions[0].z, a.inputs, weight(model, model.table.embedding),
                          positions ? positions + (int64_t)count * c.C : nullptr, 1, 1, c.C);
        input_forward(model, a.junctions[0], 1);
        for (int l = 1; l <= c.L; l++) {
            attention_sublayer_next(l);
            junction_forward(model, 2 * l - 1, 1);
            mlp_hidden_forward(model, l, 1);
            mlp_output_forward(model, l, 1);
            junction_forward(model, 2 * l, 1);
        }
        count++;
        return logits(0);
    }

    // attention_sublayer_forward of token `count`.
    void attention_sublayer_next(int l) const {
        const ModelConfig& c = model.config;
        const SublayerOffsets& w = model.table.sublayers[2 * l - 2];
        Activations& a = model.acts;
        floatX *qkv = a.qkv[l - 1], *attention = a.attention[l - 1];
        qkv_forward(model, l, 1, 1, a.rotations + (int64_t)count * c.HS / 2);
        cache.append(l, qkv, c.qkv_channels(), count, 1);
        decode_attention(attention, qkv, cache.block(l), document_begin, count + 1, c.NH, c.NKV, c.HS);
        linear_forward(a.junctions[2 * l - 1].f, attention, weight(model, w.out), weight(model, w.out_bias), 1,
                       c.NH * c.HS, c.C);
    }
};

// Throws where the model does not have one of a prompt's tokens.
void check_prompt(const std::vector<uint32_t>& ids, int V) {
    for (const uint32_t id : ids) {
        if (id >= (uint32_t)V) {
            throw Error(text("--prompt: token %u is outside the model's vocabulary of %d", id, V));
        }
    }
}

// A prompt's tokens, behind the one that starts a document if `with_start` or if there is no other.
std::vector<uint32_t> encode_prompt(const Tokenizer& tokenizer, const std::string& prompt, int V, bool with_start) {
    std::vector<uint32_t> ids = tokenizer.encode(prompt);
    const auto& start = tokenizer.document_start;
    if (start && (ids.empty() || (with_start && ids.front() != *start))) ids.insert(ids.begin(), *start);
    if (ids.empty()) ids.push_back(0);
    check_prompt(ids, V);
    return ids;
}

// How a text ended, and what it took.
struct Generated {
    int prompt_tokens = 0, tokens = 0;
    double prompt_seconds = 0, seconds = 0;
    bool is_full = false;  // the model takes no longer text
};

// Goes on behind the tokens `ids` until the text ends by one of the model's eos_tokens, `max_tokens` are drawn, stop
// has come, or the decoder is full; print(token's id) says whether to go on. Only what the tokenizer has is drawn: a
// model's vocabulary may be larger (Qwen2's is), or have gaps. The stream and a token's place decide what is drawn.
template <class Print>
Generated generate_tokens(Decoder& decoder, const Tokenizer& tokenizer, const std::vector<uint32_t>& ids,
                          int max_tokens, const Sampling& sampling, uint64_t stream, Print print) {
    using Clock = std::chrono::steady_clock;
    const auto seconds = [](Clock::duration time) { return std::chrono::duration<double>(time).count(); };
    const auto start = Clock::now();
    std::vector<float> logits = decoder.start(ids);
    const auto prompt_end = Clock::now();
    Generated g = {.prompt_tokens = (int)ids.size(), .prompt_seconds = seconds(prompt_end - start)};
    const std::vector<int>& ends = decoder.model.config.eos_tokens;
    uint32_t id = 0;
    while (g.tokens < max_tokens) {
        g.is_full = g.prompt_tokens + g.tokens == decoder.cache.length;
        if (g.is_full) break;
        if (g.tokens > 0) logits = decoder.next(id);
        for (size_t i = 0; i < logits.size(); i++) {
            if (std::isnan(logits[i])) throw Error("the model's logits are NaN: its weights are broken");
            if (i >= tokenizer.vocab_size() || tokenizer.tokens[i].empty()) logits[i] = -INFINITY;
        }
        id = draw_token(logits, sampling, random_uniform(random_bits(stream, decoder.count)));
        if (std::ranges::find(ends, (int)id) != ends.end()) break;
        g.tokens++;
        if (!print(id)) break;
    }
    g.seconds = seconds(Clock::now() - prompt_end);
    return g;
}

// The prompt and up to `length` tokens more, T in all.
std::string sample_text(Model& model, const Tokenizer& tokenizer, const std::string& prompt, int length,
                        uint64_t stream) {
    const std::vector<uint32_t> ids = encode_prompt(tokenizer, prompt, model.config.V, true);
    if ((int)ids.size() > model.T) {
        throw Error(text("--prompt: %zu tokens are more than --seq-len %d", ids.size(), model.T));
    }
    Decoder decoder(model, std::min(model.T, (int)ids.size() + length));
    TextStream out;
    std::string sample = prompt;
    generate_tokens(decoder, tokenizer, ids, length, Sampling(), stream,
                    [&](uint32_t id) { return sample += out.add(tokenizer.tokens[id]), true; });
    return sample + out.finish();
}

// --- --generate ---

std::vector<std::string> read_prompts(const Settings& s) {
    if (s.prompt_file.empty()) return {s.prompt};
    std::istringstream file(read_file(s.prompt_file));
    std::vector<std::string> prompts;
    for (std::string line; std::getline(file, line);) {
        if (line.ends_with('\r')) line.pop_back();
        prompts.push_back(line);
    }
    if (prompts.empty()) throw Error(s.prompt_file + ": no prompts; expected one a line");
    return prompts;
}

std::string find_generating_tokenizer(const Settings& s) {
    const std::string path = find_tokenizer(s, s.model);
    if (!path.empty()) return path;
    throw Error(s.model +
                "/tokenizer.json: no such file, and text cannot be generated without a tokenizer; give "
                "--tokenizer FILE");
}

// --template, else what the model was tuned by, as its tokenizer_config.json says, else what the vocabulary is made
// for.
std::string find_chat_template(const Settings& s, const Tokenizer& tokenizer) {
    if (!s.chat_template.empty()) return s.chat_template;
    const std::string path = s.model + "/tokenizer_config.json";
    if (!std::filesystem::exists(path)) return ChatTemplate::usual(tokenizer);
    return read_json_object(path).value("conversation_template", ChatTemplate::usual(tokenizer));
}

// The template that transformers writes conversations out by, or "": its own language, which is not understood here.
std::string own_chat_template(const std::string& folder) {
    const std::string file = folder + "/chat_template.jinja", config = folder + "/tokenizer_config.json";
    if (std::filesystem::exists(file)) return read_file(file);
    const json found =
        std::filesystem::exists(config) ? read_json_object(config).value("chat_template", json()) : json();
    return found.is_null() ? "" : found.dump();
}

// Whether the token that starts a document stands before a prompt: as in training here, and for a model of others where
// transformers puts it.
bool prompts_have_start(const Settings& s, const Tokenizer& tokenizer) {
    if (read_json_object(s.model + "/config.json").contains("norm")) return true;
    if (!s.chat) return adds_document_start(tokenizer);
    const std::string own = own_chat_template(s.model);
    const std::string start = tokenizer.document_start ? tokenizer.tokens[*tokenizer.document_start] : "";
    return own.empty() || own.find("bos_token") != own.npos || own.find(start) != own.npos;
}

// A conversation up to where its answer begins. Its end is added to those of the model.
std::vector<uint32_t> encode_question(const ChatTemplate& chat, const std::string& question, ModelConfig& config,
                                      bool with_start) {
    WordCache cache;
    const EncodedConversation all = chat.encode(
        {.messages = {{.role = "user", .content = question}, {.role = "assistant", .content = "", .is_answer = true}}},
        cache);
    check_prompt(all.tokens, config.V);
    add_eos_token(config, all.tokens[all.answers[0].end - 1]);
    return {all.tokens.begin() + (with_start ? 0 : 1), all.tokens.begin() + (ptrdiff_t)all.answers[0].begin};
}

// Texts on stdout as they come, each with its prompt (answers of --chat: without) and a line's end; all else on stderr.
// Errors are one line: a wrong combination of flags, a folder without weights or tokenizer, a prompt that is too long.
void generate(const Settings& s) {
    if (World().ranks > 1) throw UsageError("--generate takes one process");
    if (s.resume || s.probe_only || s.dry_run) {
        throw UsageError("--generate takes neither --resume nor --probe-only nor --dry-run");
    }
    if (!s.prompt.empty() && !s.prompt_file.empty()) throw UsageError("--prompt and --prompt-file: give one of them");
    if (s.model.empty() || find_preset(s.model)) {
        throw UsageError("--generate needs --model FOLDER with weights: a checkpoint, or a model of Hugging Face's");
    }
    ModelConfig config = resolve_model(s, build, 0);
    check_config(config);
    if (!is_fp32) check_bf16_rows(config);
    const std::string tokenizer_path = find_generating_tokenizer(s);
    const Tokenizer tokenizer = Tokenizer::load(tokenizer_path);
    add_eos_token(config, tokenizer.end_of_text ? (int64_t)*tokenizer.end_of_text : -1);
    std::optional<ChatTemplate> chat;
    if (s.chat) {
        chat.emplace(find_chat_template(s, tokenizer), tokenizer, tokenizer_path);
    }
    check_model_folder(s.model);
    const bool with_start = prompts_have_start(s, tokenizer);
    std::vector<std::vector<uint32_t>> prompts;
    const std::vector<std::string> texts = read_prompts(s);
    int longest = 0;
    for (const std::string& prompt : texts) {
        prompts.push_back(chat ? encode_question(*chat, prompt, config, with_start)
                               : encode_prompt(tokenizer, prompt, config.V, with_start));
        const size_t tokens = prompts.back().size();
        if (tokens > (size_t)config.longest()) {
            throw Error(text("prompt %zu: %zu tokens are more than the model takes, %d", prompts.size(), tokens,
                             config.longest()));
        }
        longest = std::max(longest, (int)tokens);
    }
    Model model;
    model.trains = false;
    model.recompute = Recompute::BLOCK;  // keeps least
    const int length = (int)std::min<int64_t>(config.longest(), (int64_t)longest + s.max_tokens);
    plan_model(model, config, Init::NORMAL, 1, length);
    matmul_library.open();
    allocate_model(model);
    load_huggingface_weights(model, s.model);
    Decoder decoder(model, length);
    const Sampling sampling = {s.temperature, s.top_k, s.top_p};
    const auto print = [](const std::string& piece) {
        fwrite(piece.data(), 1, piece.size(), stdout);
        fflush(stdout);
    };
    for (size_t i = 0; i < prompts.size(); i++) {
        TextStream out(s.stop);
        if (!chat) print(texts[i]);
        const Generated g = generate_tokens(decoder, tokenizer, prompts[i], s.max_tokens, sampling,
                                            random_bits(s.seed, i), [&](uint32_t id) {
                                                print(out.add(tokenizer.tokens[id]));
                                                return !out.stopped();
                                            });
        print(out.finish() + "\n");
        if (g.is_full) fprintf(stderr, "stopped at %d tokens, the most that the model takes\n", length);
        fprintf(stderr, "prompt %d tokens, %.1f tokens/s; generated %d tokens, %.1f tokens/s\n", g.prompt_tokens,
                g.prompt_tokens / g.prompt_seconds, g.tokens, g.tokens / g.seconds);
    }
}
