// Questions with choices: how they are read, tokenized, laid out in rows for the model, and scored. Rules are those of
// lm-evaluation-harness, so that its results can be compared. Host only.
//
//   JSONL   a question a line: {"context", "choices", "gold", "id"}. "context" is a text, or one for each choice where
//           only those differ (WinoGrande); "id" may be missing, as may "gold" where there is one choice. A choice
//           follows its context behind "delimiter" (default: a blank), unless it begins with it.
//   .bin    llm.c's: 256 int32 of header (magic 20240522, version 1, questions), then of each question as uint16:
//           65535, its bytes, its number, the right choice, how many choices, and length and tokens of the context and
//           of each choice
//
// One choice alone is a text to be completed (LAMBADA): acc counts where each of its tokens is the most probable one.
#pragma once

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tokenizer/bpe.h"
#include "tokenizer/json_text.h"
#include "trainer/basics.h"
#include "trainer/files.h"
#include "trainer/run_log.h"

struct Choice {
    std::vector<int32_t> tokens;        // those of the context, and behind them its own
    int64_t scored = 0;                 // how many are its own
    int64_t characters = 0, bytes = 0;  // of its text, without the delimiter; 0: not known
};

struct Question {
    std::string id;
    std::string where;  // file:line, for messages
    int gold = 0;
    std::vector<Choice> choices;
};

struct Task {
    std::string name;  // the file's, without its ending
    std::vector<Question> questions;
    int64_t cut = 0;  // choices whose context did not fit

    int64_t choices() const {
        int64_t count = 0;
        for (const Question& q : questions) count += (int64_t)q.choices.size();
        return count;
    }
    bool one_choice() const {
        return std::all_of(questions.begin(), questions.end(), [](const Question& q) { return q.choices.size() == 1; });
    }
};

// ---------------------------------------------------------------------------------------------------------------
// Tokens

inline int64_t count_characters(std::string_view text) {
    return std::count_if(text.begin(), text.end(), [](char c) { return ((unsigned char)c & 0xC0) != 0x80; });
}

// Whether transformers puts the tokenizer's start token before every text: Llama 3's does, GPT-2's does not.
inline bool adds_document_start(const Tokenizer& tokenizer) {
    const json file = json::parse(tokenizer.json, nullptr, false);
    const auto adds = [](const auto& self, const json& processor) -> bool {
        if (!processor.is_object()) return false;
        const json kind = processor.value("type", json());
        if (kind == "Sequence") {
            const json all = processor.value("processors", json::array());
            return std::any_of(all.begin(), all.end(), [&](const json& one) { return self(self, one); });
        }
        const json single = kind == "TemplateProcessing" ? processor.value("single", json()) : json();
        return single.is_array() && !single.empty() && single[0].is_object() && single[0].contains("SpecialToken");
    };
    return file.is_object() && tokenizer.document_start && adds(adds, file.value("post_processor", json()));
}

// Tokens of questions.
struct QuestionEncoder {
    const Tokenizer& tokenizer;
    bool adds_start = adds_document_start(tokenizer);

    std::vector<int32_t> encode(std::string_view text, bool with_start) const {
        std::vector<int32_t> ids;
        if (with_start) ids.push_back((int32_t)*tokenizer.document_start);
        for (const uint32_t id : tokenizer.encode(text)) ids.push_back((int32_t)id);
        return ids;
    }

    // As lm-evaluation-harness does it: blanks at the context's end belong to the choice; both are encoded as one text,
    // whose tokens behind as many as the context has alone are the choice's. Without a context the document's start
    // stands there. Throws why that is not possible.
    Choice choice(const std::string& context, const std::string& delimiter, const std::string& text) const {
        Choice choice;
        const bool delimited = !delimiter.empty() && text.starts_with(delimiter);
        const std::string_view own = std::string_view(text).substr(delimited ? delimiter.size() : 0);
        choice.characters = count_characters(own), choice.bytes = (int64_t)own.size();
        const std::string whole = context + delimiter + std::string(own);
        const size_t kept = strip_end(context).size();
        size_t before = 0;
        if (kept > 0) {
            choice.tokens = encode(whole, adds_start);
            before = encode(std::string_view(context).substr(0, kept), adds_start).size();
        } else {
            if (!tokenizer.document_start) throw Error("no context, and the tokenizer has no token to stand for it");
            choice.tokens = encode(whole, false);
            before = 1;
            const auto start = (int32_t)*tokenizer.document_start;
            if (choice.tokens.empty() || choice.tokens[0] != start) choice.tokens.insert(choice.tokens.begin(), start);
        }
        choice.scored = (int64_t)choice.tokens.size() - (int64_t)before;
        if (own.empty() || choice.scored <= 0) throw Error("a choice without any token");
        return choice;
    }
};

// ---------------------------------------------------------------------------------------------------------------
// Files. Errors name file and line.

// `line`: of the file at `where`.
inline Question parse_question(std::string_view line, const std::string& where, const QuestionEncoder& encoder) try {
    const JsonFields fields = json_fields(line);
    const auto field = [&](const char* name, std::string_view otherwise = "null") {
        return find_field(fields, name).value_or(otherwise);
    };
    const auto texts = [&](const char* name) {
        std::vector<std::string> list;
        for (const std::string_view element : json_elements(field(name), text("\"%s\"", name)))
            list.push_back(json_string(element, text("\"%s\", entry %zu", name, list.size() + 1)));
        return list;
    };
    const std::vector<std::string> choices = texts("choices");
    if (choices.empty()) throw Error("\"choices\" is empty");
    const std::vector<std::string> contexts =
        field("context").starts_with('[') ? texts("context")
                                          : std::vector(choices.size(), json_string(field("context"), "\"context\""));
    if (contexts.size() != choices.size())
        throw Error(text("%zu choices, and %zu entries in \"context\"", choices.size(), contexts.size()));
    const std::string delimiter = json_string(field("delimiter", "\" \""), "\"delimiter\"");

    Question question;
    question.where = where;
    if (const std::string_view gold = field("gold"); gold != "null" || choices.size() > 1) {
        const char* end = gold.data() + gold.size();
        const auto [behind, error] = std::from_chars(gold.data(), end, question.gold);
        if (error != std::errc() || behind != end || question.gold < 0 || (size_t)question.gold >= choices.size())
            throw Error(text("\"gold\" is none of 0 to %zu", choices.size() - 1));
    }
    const std::string_view id = field("id");
    question.id = id.starts_with('"') ? json_string(id, "\"id\"") : id == "null" ? "" : std::string(id);
    for (size_t i = 0; i < choices.size(); i++) {
        try {
            question.choices.push_back(encoder.choice(contexts[i], delimiter, choices[i]));
        } catch (const Error& e) {
            throw Error(text("choice %zu: ", i) + e.what());
        }
    }
    return question;
} catch (const std::runtime_error& e) {
    throw Error(where + ": " + e.what() +
                "; a question is {\"context\": text, or list of one for each choice, \"choices\": [text, ...], "
                "\"gold\": number of the right one, from 0, \"id\": name}");
}

inline void read_jsonl(Task& task, const std::string& path, const std::string& contents, const Tokenizer* tokenizer) {
    if (!tokenizer) throw Error(path + ": there is no tokenizer.json for its texts: give --tokenizer FILE");
    const QuestionEncoder encoder{*tokenizer};
    int64_t number = 0;
    for (size_t begin = 0, end; begin < contents.size(); begin = end + 1) {
        end = std::min(contents.find('\n', begin), contents.size());
        std::string_view line = strip_end(std::string_view(contents).substr(begin, end - begin));
        if (line.starts_with("\xEF\xBB\xBF")) line.remove_prefix(3);  // a byte order mark
        const std::string where = path + ":" + std::to_string(++number);
        if (line.empty()) continue;
        task.questions.push_back(parse_question(line, where, encoder));
        if (task.questions.back().id.empty()) task.questions.back().id = std::to_string(number);
    }
}

constexpr int32_t task_magic = 20240522;

// Lengths of the choices' texts are known where there is a tokenizer.
inline void read_llmc(Task& task, const std::string& path, const std::string& contents, const Tokenizer* tokenizer) {
    int32_t header[256];
    if (contents.size() < sizeof(header)) throw Error(path + ": ends within its header");
    std::memcpy(header, contents.data(), sizeof(header));
    if (header[1] != 1) throw Error(text("%s: version %d; expected 1", path.c_str(), header[1]));
    size_t at = sizeof(header);
    std::string where;
    const auto next = [&] {
        uint16_t value;
        if (contents.size() - at < sizeof(value)) throw Error(where + ": the file ends within it");
        std::memcpy(&value, &contents[at], sizeof(value));
        at += sizeof(value);
        return value;
    };
    for (int32_t i = 0; i < header[2]; i++) {
        where = text("%s: question %d", path.c_str(), i);
        const size_t begin = at;
        if (next() != 65535) throw Error(where + ": does not begin with 65535: the file is damaged");
        Question question;
        const int bytes = next();
        question.id = std::to_string(next()), question.where = where;
        question.gold = next();
        const int choices = next();
        if (question.gold >= choices)
            throw Error(text("%s: the right one of %d choices is %d", where.c_str(), choices, question.gold));
        std::vector<int32_t> context(next());
        for (int32_t& token : context) token = next();
        if (context.empty()) throw Error(where + ": has no context");
        for (int c = 0; c < choices; c++) {
            Choice choice;
            choice.scored = next();
            if (choice.scored == 0) throw Error(text("%s: choice %d has no token", where.c_str(), c));
            std::vector<uint32_t> own(choice.scored);
            for (uint32_t& token : own) token = next();
            choice.tokens = context;
            choice.tokens.insert(choice.tokens.end(), own.begin(), own.end());
            const auto known = [&](uint32_t token) { return tokenizer && token < tokenizer->vocab_size(); };
            if (std::all_of(own.begin(), own.end(), known)) {
                std::string said = tokenizer->decode(own);
                if (said.starts_with(' ')) said.erase(0, 1);
                choice.characters = count_characters(said), choice.bytes = (int64_t)said.size();
            }
            question.choices.push_back(std::move(choice));
        }
        if (at - begin != (size_t)bytes)
            throw Error(
                text("%s: has %zu bytes, not %d as it says: the file is damaged", where.c_str(), at - begin, bytes));
        task.questions.push_back(std::move(question));
    }
}

// A file's questions. `tokenizer` may be null for llm.c's.
inline Task read_task(const std::string& path, const Tokenizer* tokenizer) {
    Task task;
    task.name = std::filesystem::path(path).stem();
    const std::string contents = read_file(path);
    int32_t magic = 0;
    if (contents.size() >= sizeof(magic)) std::memcpy(&magic, contents.data(), sizeof(magic));
    if (magic == task_magic) read_llmc(task, path, contents, tokenizer);
    else read_jsonl(task, path, contents, tokenizer);
    if (task.questions.empty()) throw Error(path + ": there is no question in it");
    return task;
}

// Those of a list a,b,c of files, each of which may be a glob. Two of one name are called by their paths.
inline std::vector<Task> read_tasks(const std::string& list, const Tokenizer* tokenizer) {
    std::vector<Task> tasks;
    std::vector<std::string> paths;
    for (size_t begin = 0, end; begin <= list.size(); begin = end + 1) {
        end = std::min(list.find(',', begin), list.size());
        const std::string pattern = list.substr(begin, end - begin);
        const std::vector<std::string> found = find_paths(pattern);
        if (found.empty()) throw Error("--evaluate " + pattern + ": no such file");
        paths.insert(paths.end(), found.begin(), found.end());
    }
    for (const std::string& path : paths) {
        tasks.push_back(read_task(path, tokenizer));
        const auto same = [&](const std::string& other) {
            return std::filesystem::path(other).stem() == std::filesystem::path(path).stem();
        };
        if (std::count_if(paths.begin(), paths.end(), same) > 1) tasks.back().name = path;
    }
    return tasks;
}

// Cuts what is before the last T tokens that the model sees, from the left, and counts it. V: the model's vocabulary.
inline void fit_task(Task& task, int T, int V) {
    for (Question& question : task.questions) {
        for (Choice& choice : question.choices) {
            std::vector<int32_t>& tokens = choice.tokens;
            if (choice.scored > T) {
                throw Error(text("%s: a choice of %lld tokens, where the model sees %d: raise --seq-len",
                                 question.where.c_str(), (long long)choice.scored, T));
            }
            const int32_t largest = *std::max_element(tokens.begin(), tokens.end());
            if (largest >= V) {
                throw Error(
                    text("%s: token %d is outside the model's vocabulary of %d", question.where.c_str(), largest, V));
            }
            if ((int64_t)tokens.size() <= T + 1) continue;
            tokens.erase(tokens.begin(), tokens.end() - (T + 1));
            task.cut++;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Rows

// What the model reads in one row. Choices that differ in nothing but their last token share it: those of one token
// behind one context.
struct TaskRow {
    std::vector<int32_t> inputs;
    std::vector<std::pair<int64_t, const Choice*>> choices;  // numbered over all tasks
};

// The longest first: what does not fit into memory shows at once, and the time left is not underestimated.
inline std::vector<TaskRow> make_rows(const std::vector<Task>& tasks) {
    std::map<std::vector<int32_t>, size_t> known;
    std::vector<TaskRow> rows;
    int64_t number = 0;
    for (const Task& task : tasks) {
        for (const Question& question : task.questions) {
            for (const Choice& choice : question.choices) {
                std::vector<int32_t> inputs(choice.tokens.begin(), choice.tokens.end() - 1);
                const auto [found, added] = known.try_emplace(inputs, rows.size());
                if (added) rows.push_back({std::move(inputs), {}});
                rows[found->second].choices.emplace_back(number++, &choice);
            }
        }
    }
    std::stable_sort(rows.begin(), rows.end(),
                     [](const TaskRow& a, const TaskRow& b) { return a.inputs.size() > b.inputs.size(); });
    return rows;
}

// ---------------------------------------------------------------------------------------------------------------
// Scores

// Of a choice, by its number over all tasks.
struct ChoiceResult {
    double log_probability = 0;  // nats, the sum over its tokens
    bool greedy = false;         // each of them is the most probable one
};

// A mean of a task's questions and its standard error: the deviation of a sample (n - 1) over sqrt(n). NaN: there is
// none.
struct Estimate {
    double value = NAN, error = NAN;
};

inline Estimate mean_of(const std::vector<double>& values) {
    const double n = (double)values.size();
    double sum = 0, square = 0;
    for (const double value : values) sum += value;
    for (const double value : values) square += (value - sum / n) * (value - sum / n);
    return {sum / n, n > 1 ? std::sqrt(square / (n - 1) / n) : NAN};
}

struct TaskScores {
    std::string task;
    int64_t n = 0, cut = 0;
    Estimate acc, acc_norm, acc_bytes, acc_tokens;  // the largest sum; by character, byte, token
    Estimate bits_per_byte;                         // of the right choices
    Estimate perplexity;  // of one choice: exp(-mean log-probability), its error to first order
};

// `results`: of the task's choices, in order.
inline TaskScores score_task(const Task& task, const ChoiceResult* results) {
    TaskScores scores;
    scores.task = task.name, scores.n = (int64_t)task.questions.size(), scores.cut = task.cut;
    std::vector<double> acc, norm, bytes, tokens, bits, sums;
    bool texts_known = true;
    const bool one_choice = task.one_choice();
    for (const Question& question : task.questions) {
        // The first of those that are equal, as numpy's argmax.
        const auto right = [&](auto length) {
            size_t best = 0;
            double largest = -INFINITY;
            for (size_t i = 0; i < question.choices.size(); i++) {
                const double score = results[i].log_probability / (double)length(question.choices[i]);
                if (score > largest) largest = score, best = i;
            }
            return (double)(best == (size_t)question.gold);
        };
        const Choice& gold = question.choices[question.gold];
        const ChoiceResult& result = results[question.gold];
        for (const Choice& choice : question.choices) texts_known = texts_known && choice.bytes > 0;
        acc.push_back(one_choice ? (double)result.greedy : right([](const Choice&) { return 1; }));
        norm.push_back(right([](const Choice& c) { return c.characters; }));
        bytes.push_back(right([](const Choice& c) { return c.bytes; }));
        tokens.push_back(right([](const Choice& c) { return c.scored; }));
        bits.push_back(-result.log_probability / M_LN2 / (double)gold.bytes);
        sums.push_back(result.log_probability);
        results += question.choices.size();
    }
    scores.acc = mean_of(acc);
    if (!one_choice) scores.acc_tokens = mean_of(tokens);
    if (!one_choice && texts_known) scores.acc_norm = mean_of(norm), scores.acc_bytes = mean_of(bytes);
    if (texts_known) scores.bits_per_byte = mean_of(bits);
    if (one_choice) {
        const Estimate sum = mean_of(sums);
        scores.perplexity = {std::exp(-sum.value), std::exp(-sum.value) * sum.error};
    }
    return scores;
}

// For the log; what a task does not have is left out.
inline json fields_of(const TaskScores& scores) {
    json fields = {{"task", scores.task}, {"n", scores.n}};
    const auto add = [&](const std::string& name, const Estimate& mean) {
        if (std::isnan(mean.value) && std::isnan(mean.error)) return;
        fields[name] = mean.value;
        fields[name + "_stderr"] = mean.error;
    };
    add("acc", scores.acc), add("acc_norm", scores.acc_norm), add("acc_bytes", scores.acc_bytes);
    add("acc_tokens", scores.acc_tokens), add("bits_per_byte", scores.bits_per_byte), add("ppl", scores.perplexity);
    fields["cut"] = scores.cut;
    return fields;
}

// For people: a heading, then a line a task; each score with its standard error.
inline std::string scores_table(const std::vector<TaskScores>& all) {
    size_t width = 4;
    for (const TaskScores& scores : all) width = std::max(width, scores.task.size());
    const auto pad = [&](std::string name) { return name.append(width - name.size(), ' '); };
    std::string table = pad("task") + "       n  acc    stderr  acc_norm stderr  acc_bytes stderr  acc_tokens stderr" +
                        "  bits/byte stderr       ppl stderr\n";
    const auto cell = [](const Estimate& mean, int value_width, const char* format) {
        const auto number = [&](double value) { return std::isnan(value) ? std::string("-") : text(format, value); };
        return text("  %-*s %-6s", value_width, number(mean.value).c_str(), number(mean.error).c_str());
    };
    for (const TaskScores& s : all) {
        std::string line = pad(s.task) + text(" %7lld", (long long)s.n);
        line += cell(s.acc, 6, "%.4f") + cell(s.acc_norm, 8, "%.4f") + cell(s.acc_bytes, 9, "%.4f");
        line += cell(s.acc_tokens, 10, "%.4f") + cell(s.bits_per_byte, 9, "%.4f") + cell(s.perplexity, 8, "%.4g");
        line.erase(line.find_last_not_of(' ') + 1);
        table += line + "\n";
    }
    return table;
}

// A line for each question: what --evaluate-out keeps.
inline std::string results_jsonl(const std::vector<Task>& tasks, const std::vector<ChoiceResult>& results) {
    std::string lines;
    const ChoiceResult* result = results.data();
    for (const Task& task : tasks) {
        for (const Question& question : task.questions) {
            json sums = json::array(), tokens = json::array(), greedy = json::array();
            for (const Choice& choice : question.choices) {
                sums.push_back(result->log_probability), greedy.push_back(result->greedy);
                tokens.push_back(choice.scored);
                result++;
            }
            lines += to_line({{"task", task.name},
                              {"id", question.id},
                              {"gold", question.gold},
                              {"log_probabilities", sums},
                              {"tokens", tokens},
                              {"greedy", greedy}}) +
                     "\n";
        }
    }
    return lines;
}
