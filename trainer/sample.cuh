// Text that the model writes. Part of train_gpt.cu.
#pragma once

// Goes on from the prompt, up to T tokens in all, at temperature 0.8. Each token costs a forward pass of one sequence.
// Only what the tokenizer has is drawn: a model's vocabulary may be larger (Qwen2's is), or have gaps.
std::string sample_text(Model& model, const Tokenizer& tokenizer, const std::string& prompt, int length,
                        uint64_t stream) {
    const ModelConfig& c = model.config;
    std::vector<uint32_t> ids;
    if (tokenizer.document_start) ids.push_back(*tokenizer.document_start);
    for (const uint32_t id : tokenizer.encode(prompt)) ids.push_back(id);
    if (ids.empty()) ids.push_back(0);
    for (const uint32_t id : ids) {
        if (id >= (uint32_t)c.V)
            throw Error(text("--prompt: token %u is outside the model's vocabulary of %d", id, c.V));
    }
    const int choices = (int)std::min<size_t>(c.V, tokenizer.vocab_size());
    const size_t start = ids.size(), last = std::min<size_t>(model.T, start + length);
    std::vector<floatX> logits(c.Vp());
    std::vector<double> cumulative(choices);
    while (ids.size() < last) {
        const int T = (int)ids.size();
        upload(model.acts.inputs, (const int32_t*)ids.data(), T);
        blocks_forward(model, 1, T);
        linear_forward(model.acts.logits, model.acts.junctions[2 * c.L].in + (int64_t)(T - 1) * c.C,
                       weight(model, model.table.head), nullptr, 1, c.C, c.Vp());
        CHECK_CUDA(cudaMemcpyAsync(logits.data(), model.acts.logits, c.Vp() * sizeof(floatX), cudaMemcpyDeviceToHost,
                                   main_stream));
        CHECK_CUDA(cudaStreamSynchronize(main_stream));
        double maximum = -INFINITY, sum = 0;
        for (int i = 0; i < choices; i++) maximum = std::max(maximum, (double)to_float(logits[i]));
        for (int i = 0; i < choices; i++) {
            if (!tokenizer.tokens[i].empty()) sum += std::exp((to_float(logits[i]) - maximum) / 0.8);
            cumulative[i] = sum;
        }
        const double pick = random_uniform(random_bits(stream, T)) * sum;
        const auto chosen = std::lower_bound(cumulative.begin(), cumulative.end(), pick);
        const uint32_t id = (uint32_t)std::min<int64_t>(chosen - cumulative.begin(), choices - 1);
        if (tokenizer.end_of_text && id == *tokenizer.end_of_text) break;
        ids.push_back(id);
    }
    if (tokenizer.document_start) ids.erase(ids.begin());
    return tokenizer.decode(ids);
}
