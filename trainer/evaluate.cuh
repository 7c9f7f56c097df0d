// How a model does on questions with choices. Part of train_gpt.cu.
#pragma once

// largest[row] = 1 where no logit of the row is larger than its target's, nor equal to it and before it; else 0. Logits
// (N, Vp), of which V count. A block of one warp owns a row. Bytes: reads e N V.
__global__ void target_is_largest_kernel(int32_t* largest, const floatX* logits, const int32_t* targets, int V,
                                         int Vp) {
    const int64_t row = blockIdx.x;
    const floatX* x = logits + row * Vp;
    const int target = targets[row];
    const float own = to_float(x[target]);
    float before = 0;
    for (int i = threadIdx.x; i < V; i += blockDim.x) {
        const float value = to_float(x[i]);
        before += value > own || (value == own && i < target) ? 1.0f : 0.0f;
    }
    before = group_sum(before);
    if (threadIdx.x == 0) largest[row] = before == 0;
}

void target_is_largest(int32_t* largest, const floatX* logits, const int32_t* targets, int64_t N, int V, int Vp) {
    launch<target_is_largest_kernel>(dim3(narrow(N)), block_threads(32), 0, largest, logits, targets, V, Vp);
}

// A token of a choice whose probability is asked for.
struct AskedToken {
    int64_t position;  // in the batch, of the token before it
    int32_t token;
    int64_t choice;
};

// Adds to `results` what the choices of `count` rows, padded to the length of the first, have. The head computes logits
// only where a choice's tokens are.
void evaluate_rows(Model& model, const TaskRow* rows, int count, std::vector<ChoiceResult>& results) {
    const ModelConfig& c = model.config;
    const Activations& a = model.acts;
    const int T = (int)rows[0].inputs.size();
    std::vector<int32_t> inputs((size_t)count * T, 0);
    std::vector<AskedToken> asked;
    for (int b = 0; b < count; b++) {
        std::copy(rows[b].inputs.begin(), rows[b].inputs.end(), inputs.begin() + (int64_t)b * T);
        for (const auto& [number, choice] : rows[b].choices) {
            const int64_t end = (int64_t)choice->tokens.size(), first = end - choice->scored;
            for (int64_t i = first; i < end; i++) asked.push_back({(int64_t)b * T + i - 1, choice->tokens[i], number});
            results[number].greedy = true;
        }
    }
    upload(a.inputs, inputs.data(), (int64_t)inputs.size());
    blocks_forward(model, count, T);
    std::vector<int32_t> targets, largest;
    std::vector<float> losses;
    for (size_t begin = 0, n; begin < asked.size(); begin += n) {
        n = std::min<size_t>(model.chunk, asked.size() - begin);
        const AskedToken* tokens = &asked[begin];
        targets.resize(n), largest.resize(n), losses.resize(n);
        for (size_t i = 0, length; i < n; i += length) {  // neighbours are copied as one
            for (length = 1; i + length < n; length++) {
                if (tokens[i + length].position != tokens[i].position + (int64_t)length) break;
            }
            CHECK_CUDA(cudaMemcpyAsync(a.din + i * c.C, a.junctions[2 * c.L].in + tokens[i].position * c.C,
                                       length * c.C * sizeof(floatX), cudaMemcpyDeviceToDevice, main_stream));
        }
        for (size_t i = 0; i < n; i++) targets[i] = tokens[i].token;
        upload(a.targets, targets.data(), (int64_t)n);
        linear_forward(a.logits, a.din, weight(model, model.table.head), nullptr, (int64_t)n, c.C, c.Vp());
        classifier(a.logits, a.losses, a.targets, (int64_t)n, c.V, c.Vp(), false);
        target_is_largest(a.token_rows, a.logits, a.targets, (int64_t)n, c.V, c.Vp());
        CHECK_CUDA(cudaMemcpyAsync(losses.data(), a.losses, n * sizeof(float), cudaMemcpyDeviceToHost, main_stream));
        CHECK_CUDA(
            cudaMemcpyAsync(largest.data(), a.token_rows, n * sizeof(int32_t), cudaMemcpyDeviceToHost, main_stream));
        CHECK_CUDA(cudaStreamSynchronize(main_stream));
        for (size_t i = 0; i < n; i++) {
            ChoiceResult& result = results[tokens[i].choice];
            result.log_probability -= losses[i];
            result.greedy = result.greedy && largest[i];
        }
    }
}

// On stderr, every ten seconds of long work: how much is done, and the time that the rest takes at that speed.
struct TaskProgress {
    using Clock = std::chrono::steady_clock;
    Clock::time_point began = Clock::now(), said = began;

    void say(int64_t choices, int64_t of_choices, double share) {
        const Clock::time_point now = Clock::now();
        if (now - said < std::chrono::seconds(10)) return;
        said = now;
        const double passed = std::chrono::duration<double>(now - began).count();
        fprintf(stderr, "evaluate %s of %s choices, %s left\n", with_commas((double)choices).c_str(),
                with_commas((double)of_choices).c_str(), duration(passed / share * (1 - share)).c_str());
    }
};

// Of each choice of all tasks, the same on all ranks. Batches are the same for any number of ranks, which take turns,
// so that the results are. All ranks call.
std::vector<ChoiceResult> evaluate(Model& model, const std::vector<Task>& tasks, const Cluster& cluster) {
    const Watchdog::Phase phase(watchdog, "evaluating");
    int64_t choices = 0, choices_done = 0;
    for (const Task& task : tasks) choices += task.choices();
    const std::vector<TaskRow> rows = make_rows(tasks);
    double tokens = 0, tokens_done = 0;
    for (const TaskRow& row : rows) tokens += (double)row.inputs.size();
    std::vector<ChoiceResult> results(choices);
    TaskProgress progress;
    int64_t batch = 0;
    for (size_t begin = 0, count; begin < rows.size(); begin += count, batch++) {
        count = std::min<size_t>(model.B, rows.size() - begin);
        if (batch % cluster.ranks == cluster.rank) evaluate_rows(model, &rows[begin], (int)count, results);
        watchdog.beat();
        for (size_t i = begin; i < begin + count; i++) {
            tokens_done += (double)rows[i].inputs.size();
            choices_done += (int64_t)rows[i].choices.size();
        }
        if (cluster.rank == 0) progress.say(choices_done, choices, tokens_done / tokens);
    }
    std::vector<double> sums(2 * choices);  // a choice is computed by one rank, and 0 on the others
    for (int64_t i = 0; i < choices; i++) sums[2 * i] = results[i].log_probability, sums[2 * i + 1] = results[i].greedy;
    const Watchdog::Phase waiting(watchdog, waiting_for_ranks);
    reduce(sums.data(), narrow(2 * choices), MPI_SUM);
    for (int64_t i = 0; i < choices; i++) {
        if (std::isnan(sums[2 * i])) throw Error("the model's log-probabilities are NaN: its weights are broken");
        results[i] = {sums[2 * i], sums[2 * i + 1] > 0};
    }
    return results;
}

std::vector<TaskScores> score_tasks(const std::vector<Task>& tasks, const std::vector<ChoiceResult>& results) {
    std::vector<TaskScores> scores;
    const ChoiceResult* result = results.data();
    for (const Task& task : tasks) {
        scores.push_back(score_task(task, result));
        result += task.choices();
    }
    return scores;
}

// The tokens that the tasks need the model to see, in whole tiles, up to what it was made for.
int tasks_seq_len(const std::vector<Task>& tasks, const ModelConfig& config) {
    size_t longest = 1;
    for (const Task& task : tasks) {
        for (const Question& question : task.questions) {
            for (const Choice& choice : question.choices) longest = std::max(longest, choice.tokens.size() - 1);
        }
    }
    return (int)std::min<int64_t>(round_up((int64_t)longest, 64), config.longest());
}

// Tasks of the settings, cut to what the model sees. All ranks call: they must have the same.
std::vector<Task> fit_tasks(std::vector<Task> tasks, const Settings& s, int V, const Cluster& cluster) {
    json shared = json::object();
    for (Task& task : tasks) {
        fit_task(task, s.seq_len, V);
        shared["evaluate " + task.name] =
            text("%zu questions, %lld choices", task.questions.size(), (long long)task.choices());
        if (task.cut > 0 && cluster.rank == 0) {
            fprintf(stderr, "evaluate %s: the contexts of %s of %s choices are cut from the left to %d tokens\n",
                    task.name.c_str(), with_commas((double)task.cut).c_str(),
                    with_commas((double)task.choices()).c_str(), s.seq_len);
        }
    }
    check_ranks_agree(cluster.rank, cluster.ranks, shared);
    return tasks;
}
