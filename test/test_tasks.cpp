// Questions: tokens as lm-evaluation-harness has them, rows that choices share, scores.
#include <gtest/gtest.h>

#include "../trainer/tasks.h"

// Bytes are tokens 0 to 255 in the alphabet's order; " a", "ab" and "b " are merged; then the end of text.
static std::string tokenizer_json(const std::string& post_processor) {
    const ByteAlphabet& alphabet = byte_alphabet();
    json vocab = json::object();
    for (int i = 0; i < 256; i++) vocab[alphabet.character[alphabet.order[i]]] = i;
    const std::string blank = alphabet.character[(unsigned char)' '];
    vocab[blank + "a"] = 256, vocab["ab"] = 257;
    json file = {{"version", "1.0"},
                 {"added_tokens", json::array({{{"id", 258},
                                                {"content", "<|endoftext|>"},
                                                {"single_word", false},
                                                {"lstrip", false},
                                                {"rstrip", false},
                                                {"normalized", false},
                                                {"special", true}}})},
                 {"normalizer", json()},
                 {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}}},
                 {"post_processor", json::parse(post_processor)},
                 {"decoder", {{"type", "ByteLevel"}}},
                 {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", json::array({blank + " a", "a b"})}}}};
    return file.dump();
}

static Tokenizer tokenizer(const std::string& post_processor = "null") {
    return Tokenizer::parse(tokenizer_json(post_processor), "test");
}

// The tokens' texts, the choice's behind a bar.
static std::string tokens_of(const Tokenizer& t, const Choice& choice) {
    std::string line;
    for (size_t i = 0; i < choice.tokens.size(); i++) {
        if (i + choice.scored == choice.tokens.size()) line += "|";
        line += "[" + t.tokens[choice.tokens[i]] + "]";
    }
    return line;
}

TEST(Questions, AreTokenizedAsOneTextAndCutWhereTheContextEnds) {
    const Tokenizer t = tokenizer();
    const QuestionEncoder encoder{t};
    const auto said = [&](const char* context, const char* delimiter, const char* choice) {
        return tokens_of(t, encoder.choice(context, delimiter, choice));
    };
    EXPECT_EQ(said("c", " ", "ac"), "[c]|[ a][c]");
    EXPECT_EQ(said("c", " ", " ac"), "[c]|[ a][c]");  // a choice that begins with its blank
    EXPECT_EQ(said("c ", "", "ac"), "[c]|[ a][c]");   // the context's blank is the choice's
    EXPECT_EQ(said("c\xC2\xA0\t", "", "c"), "[c]|[\xC2][\xA0][\t][c]");
    EXPECT_EQ(said("ca", "", "bc"), "[c][ab]|[c]");             // a token across the boundary counts to the context
    EXPECT_EQ(said("", " ", "ac"), "[<|endoftext|>]|[ a][c]");  // nothing before it
    EXPECT_EQ(said("", "", "<|endoftext|>c"), "[<|endoftext|>]|[c]");
    const Choice choice = encoder.choice("c", " ", " éa");
    EXPECT_EQ(choice.characters, 2);
    EXPECT_EQ(choice.bytes, 3);
    EXPECT_THROW(encoder.choice("c", " ", ""), Error);
    EXPECT_THROW(encoder.choice("ca", "", "b"), Error);  // nothing is left of it
}

TEST(Questions, BeginWithTheStartTokenWhereTheTokenizerAddsOne) {
    const Tokenizer t = tokenizer(
        R"({"type":"Sequence","processors":[{"type":"ByteLevel"},{"type":"TemplateProcessing","single":[
            {"SpecialToken":{"id":"<|endoftext|>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}]}]})");
    EXPECT_EQ(tokens_of(t, QuestionEncoder{t}.choice("c", " ", "c")), "[<|endoftext|>][c]|[ ][c]");
    EXPECT_EQ(tokens_of(t, QuestionEncoder{t}.choice("", " ", "c")), "[<|endoftext|>]|[ ][c]");
}

// As the tokenizer reads training text: half of a surrogate pair is U+FFFD, of a field that comes twice the last
// counts.
TEST(Questions, AreReadFromAnyJson) {
    const Tokenizer t = tokenizer();
    const QuestionEncoder encoder{t};
    const auto read = [&](const char* line) { return parse_question(line, "here:1", encoder); };
    const Question cut =
        read(R"({"context": "c", "choices": ["\ud83d", "\ud83d\ude00"], "gold": 1, "id": 17, "x": 1e999})");
    EXPECT_EQ(tokens_of(t, cut.choices[0]), "[c]|[ ][\xEF][\xBF][\xBD]");
    EXPECT_EQ(tokens_of(t, cut.choices[1]), "[c]|[ ][\xF0][\x9F][\x98][\x80]");
    EXPECT_EQ(cut.gold, 1);
    EXPECT_EQ(cut.id, "17");
    const Question twice =
        read(R"({"choices": ["d"], "context": ["b"], "context": ["c"], "delimiter": "", "id": "é"})");
    EXPECT_EQ(tokens_of(t, twice.choices[0]), "[c]|[d]");
    EXPECT_EQ(twice.id, "é");
    EXPECT_THROW(read("{\"context\": \"\xff\", \"choices\": [\"d\"]}"), Error);
}

TEST(Questions, MayBeginWithAByteOrderMark) {
    const Tokenizer t = tokenizer();
    Task task;
    read_jsonl(
        task, "here",
        "\xEF\xBB\xBF{\"context\": \"c\", \"choices\": [\"d\"]}\r\n \n{\"context\": \"c\", \"choices\": [\"e\"]}", &t);
    ASSERT_EQ(task.questions.size(), 2u);
    EXPECT_EQ(task.questions[0].where, "here:1");
    EXPECT_EQ(task.questions[1].where, "here:3");
    EXPECT_EQ(task.questions[1].id, "3");
}

TEST(Questions, AreCutFromTheLeft) {
    const Tokenizer t = tokenizer();
    Task task;
    task.questions.push_back({.id = "1", .where = "here:1", .choices = {QuestionEncoder{t}.choice("cdefg", "", "hi")}});
    fit_task(task, 7, 259);
    EXPECT_EQ(task.cut, 0);
    fit_task(task, 4, 259);
    EXPECT_EQ(task.cut, 1);
    EXPECT_EQ(tokens_of(t, task.questions[0].choices[0]), "[e][f][g]|[h][i]");  // 4 are read, and the last is not
    EXPECT_THROW(fit_task(task, 1, 259), Error);
    EXPECT_THROW(fit_task(task, 4, 20), Error);
}

TEST(Questions, ShareARowWhereOnlyTheLastTokenDiffers) {
    const Tokenizer t = tokenizer();
    const QuestionEncoder encoder{t};
    Task task;
    Question question;
    for (const char* choice : {"c", "d", "cd", "e"}) question.choices.push_back(encoder.choice("cc", "", choice));
    task.questions = {question, question};
    const std::vector<TaskRow> rows = make_rows({task});
    ASSERT_EQ(rows.size(), 2u);
    EXPECT_EQ(rows[0].inputs.size(), 3u);
    EXPECT_EQ(rows[1].inputs.size(), 2u);
    const auto numbers = [](const TaskRow& row) {
        std::vector<int64_t> result;
        for (const auto& [number, choice] : row.choices) result.push_back(number);
        return result;
    };
    EXPECT_EQ(numbers(rows[0]), (std::vector<int64_t>{2, 6}));
    EXPECT_EQ(numbers(rows[1]), (std::vector<int64_t>{0, 1, 3, 4, 5, 7}));
}

// Two questions of two choices: by the sum, by characters, by bytes and by tokens another one is the best.
TEST(Scores, DivideByWhatTheySay) {
    Task task;
    const auto choice = [](int64_t scored, int64_t characters, int64_t bytes) {
        Choice result;
        result.scored = scored, result.characters = characters, result.bytes = bytes;
        return result;
    };
    task.questions = {{.id = "1", .where = "", .gold = 0, .choices = {choice(1, 4, 4), choice(8, 4, 8)}},
                      {.id = "2", .where = "", .gold = 1, .choices = {choice(1, 4, 4), choice(8, 4, 8)}}};
    const ChoiceResult results[] = {{-4, false}, {-6, false}, {-4, false}, {-6, true}};
    const TaskScores scores = score_task(task, results);
    EXPECT_EQ(scores.acc.value, 0.5);
    EXPECT_EQ(scores.acc.error, 0.5);  // deviation sqrt(1/2), over sqrt(2)
    EXPECT_EQ(scores.acc_norm.value, 0.5);
    EXPECT_EQ(scores.acc_bytes.value, 0.5);
    EXPECT_NEAR(scores.bits_per_byte.value, (4 / 4.0 + 6 / 8.0) / 2 / M_LN2, 1e-12);
    EXPECT_TRUE(std::isnan(scores.perplexity.value));
    task.questions[0].gold = 1;
    const TaskScores second = score_task(task, results);
    EXPECT_EQ(second.acc.value, 0);
    EXPECT_EQ(second.acc_norm.value, 0);
    EXPECT_EQ(second.acc_bytes.value, 1);
    EXPECT_EQ(second.acc_tokens.value, 1);
}

TEST(Scores, OfOneChoiceAreGreedyAndPerplexity) {
    Task task;
    Choice choice;
    choice.scored = 2, choice.characters = choice.bytes = 3;
    task.questions = {{.id = "1", .where = "", .choices = {choice}}, {.id = "2", .where = "", .choices = {choice}}};
    const ChoiceResult results[] = {{-1, true}, {-3, false}};
    const TaskScores scores = score_task(task, results);
    EXPECT_EQ(scores.acc.value, 0.5);
    EXPECT_NEAR(scores.perplexity.value, std::exp(2), 1e-12);
    EXPECT_NEAR(scores.perplexity.error, std::exp(2), 1e-12);  // the mean's error is 1
    EXPECT_TRUE(std::isnan(scores.acc_norm.value));
}
