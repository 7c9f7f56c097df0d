// The tokenizer against plain implementations of the same definitions, and the command from its arguments to its files.
// The command is included, so that the tests run the code that ships, without a binary to find.
#define main tokenize_main
#include "../tokenizer/tokenize.cpp"
#undef main

#include <gtest/gtest.h>
#include <zlib.h>
#include <zstd.h>

#include <chrono>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>

#include "temporary_folder.h"

using Ids = std::vector<uint32_t>;
using Strings = std::vector<std::string>;

// ---------------------------------------------------------------------------------------------------------------------
// Helpers

static std::string error_of(const std::function<void()>& action) {
    try {
        action();
    } catch (const std::runtime_error& error) {
        return error.what();
    }
    return "no error";
}

struct Outcome {
    int code;
    std::string err;
};

static Outcome tokenize(const Strings& arguments) {
    Strings all = {"tokenize"};
    all.insert(all.end(), arguments.begin(), arguments.end());
    std::vector<char*> argv;
    for (std::string& argument : all) argv.push_back(argument.data());
    testing::internal::CaptureStderr();
    testing::internal::CaptureStdout();
    const int code = tokenize_main(int(argv.size()), argv.data());
    testing::internal::GetCapturedStdout();
    return {code, testing::internal::GetCapturedStderr()};
}

static Strings words_of(const Tokenizer& tokenizer, const std::string& text) {
    std::string buffer;
    std::vector<std::string_view> words;
    tokenizer.split(text, buffer, words);
    return {words.begin(), words.end()};
}

// Pseudo-English: words of few letters, so that pairs repeat and tie often; runs of one letter, so that pairs overlap.
static std::string sample_text(size_t length, unsigned seed) {
    const Strings pieces = {"aa", "a",  "b",  "ab", "the", "then", "tt",   " ", " ",
                            " ",  "\n", "12", "  ", "--",  "é",    "世界", "👍"};
    std::mt19937 random(seed);
    std::string text;
    while (text.size() < length) text += pieces[random() % pieces.size()];
    return text;
}

static std::string random_bytes(size_t length, unsigned seed) {
    std::mt19937 random(seed);
    std::string bytes(length, 0);
    for (char& byte : bytes) byte = char(random());
    return bytes;
}

static Tokenizer trained(const std::string& text, size_t vocab_size) {
    WordCounts counts;
    count_words(untrained_tokenizer(), text, counts);
    return train_bpe(counts, vocab_size);
}

static const Tokenizer& sample_tokenizer() {
    static const Tokenizer tokenizer = trained(sample_text(20000, 1), 400);
    return tokenizer;
}

// The sample tokenizer's file with some of its text replaced.
static std::string edited(const std::string& from, const std::string& to) {
    std::string json = sample_tokenizer().json;
    const size_t at = json.find(from);
    EXPECT_NE(at, json.npos) << from;
    return json.replace(at, from.size(), to);
}

static Ids read_tokens(const std::string& path) {
    Ids all;
    read_shard(path, [&](const Ids& tokens) { all.insert(all.end(), tokens.begin(), tokens.end()); });
    return all;
}

static void write_gz(const std::string& path, const std::string& text) {  // two members
    for (size_t i = 0; i < 2; ++i) {
        const std::string half = i == 0 ? text.substr(0, text.size() / 2) : text.substr(text.size() / 2);
        gzFile file = gzopen(path.c_str(), i == 0 ? "wb" : "ab");
        gzwrite(file, half.data(), unsigned(half.size()));
        gzclose(file);
    }
}

static void write_zst(const std::string& path, const std::string& text) {
    std::string packed(ZSTD_compressBound(text.size()), 0);
    packed.resize(ZSTD_compress(packed.data(), packed.size(), text.data(), text.size(), 3));
    write_whole_file(path, packed);
}

// ---------------------------------------------------------------------------------------------------------------------
// Words

TEST(Words, Gpt2Pattern) {
    const Tokenizer tokenizer = untrained_tokenizer();
    const std::vector<std::pair<std::string, Strings>> cases = {
        {"Hello world", {"Hello", " world"}},
        {"I'm we've DON'T", {"I", "'m", " we", "'ve", " DON", "'", "T"}},
        {"a  b", {"a", " ", " b"}},
        {"a \n\n b ", {"a", " \n\n", " b", " "}},
        {"x1 23y?! .", {"x", "1", " 23", "y", "?!", " ."}},
        {"\n\nx", {"\n", "\n", "x"}},
        {"naïve Straße", {"naïve", " Straße"}},
        {"你好，世界", {"你好", "，", "世界"}},
        {"ok👍🏽", {"ok", "👍🏽"}},
        {"a\u00a0b", {"a", "\u00a0", "b"}},
        {"a\u180eb", {"a", "\u180e", "b"}},
        {"a\u180e\u180e!", {"a", "\u180e\u180e!"}},  // U+180E is no space, so it may stand beside the mark
        {"", {}},
    };
    for (const auto& [text, words] : cases) EXPECT_EQ(words_of(tokenizer, text), words) << text;
}

// Expected: Python's bytes.decode("utf-8", errors="replace"), one U+FFFD for each maximal subpart.
TEST(Words, InvalidBytesAreReplaced) {
    const Tokenizer tokenizer = untrained_tokenizer();
    const std::string r = "\uFFFD";
    const std::vector<std::pair<std::string, std::string>> cases = {
        {"ab\xff\xfe cd", "ab" + r + r + " cd"},
        {"\xe4\xbd", r},                                // cut short
        {"\xe4\xbd \xf0\x9f\x91!", r + " " + r + "!"},  // cut short by what follows
        {"a\xed\xa0\x80!", "a" + r + r + r + "!"},      // a surrogate
        {"a\xc0\xaf", "a" + r + r},                     // overlong
        {"\xe0\x80\x80", r + r + r},                    // overlong
        {"\xf4\x90\x80\x80", r + r + r + r},            // above U+10FFFF
        {"\xf5\x80", r + r},
        {"12345678\x80", "12345678" + r},
        {"12345678\xf4\x8f\xbf\xbf", "12345678\U0010FFFF"},
    };
    for (const auto& [text, replaced] : cases) {
        std::string joined;
        for (const std::string& word : words_of(tokenizer, text)) joined += word;
        EXPECT_EQ(joined, replaced) << testing::PrintToString(text);
        EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), replaced) << testing::PrintToString(text);
    }
    EXPECT_EQ(words_of(tokenizer, "ab\xff\xfe cd"), (Strings{"ab", r + r, " cd"}));
}

// Llama 3's and Qwen's way: a Split regex, then ByteLevel without its own.
static const std::string byte_level =
    R"({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true})";
static const std::string llama3_sequence =
    R"({"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"}, "behavior": "Isolated", "invert": false}, {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]})";

TEST(Words, Llama3Pattern) {
    const Tokenizer tokenizer = Tokenizer::parse(edited(byte_level, llama3_sequence), "test");
    EXPECT_EQ(words_of(tokenizer, "DON'T (stop) 12345.\n\nNow  go\n"),
              (Strings{"DON", "'T", " (", "stop", ")", " ", "123", "45", ".\n\n", "Now", " ", " go", "\n"}));
}

static const std::string other_sequence =
    R"({"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "[tb]+|\\p{N}"}, "behavior": "MergedWithNext", "invert": false}, {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]})";

// Characters of all classes and lengths, and what the patterns name.
static std::string random_characters(size_t count, unsigned seed) {
    const Strings pieces = {" ",      " ",       "  ",     "\n",     "\r", "\r\n",       "\t",      "'",      "'s",
                            "'LL",    "'\u017f", "'rE",    "a",      "B",  "x",          "é",       "世",     "ǅ",
                            "1",      "٣",       "Ⅷ",      "½",      "!",  "-",          "\u0301",  "\u00a0", "\u3000",
                            "\u2028", "\u0085",  "\u180e", "\u200b", "👍",  "\U00011F50", "letters", "1234567"};
    std::mt19937 random(seed);
    std::string text;
    while (count-- > 0) text += pieces[random() % pieces.size()];
    return text;
}

TEST(Words, ScannersCutAsTheirRegexesDo) {
    for (const char* pattern : {gpt2_pattern, llama3_pattern, qwen2_pattern}) {
        const Split scanner = Split::compile(pattern, "test"), regex = Split::compile(pattern, "test", false);
        ASSERT_TRUE(scanner.word_end && !regex.word_end);
        for (unsigned seed = 0; seed < 4000; ++seed) {
            const std::string text = random_characters(seed % 40, seed);
            std::vector<std::string_view> scanned, matched;
            scanner.cut(text, scanned);
            regex.cut(text, matched);
            ASSERT_EQ(scanned, matched) << pattern << "\n" << text;
        }
    }
}

// PCRE2 with its own Unicode tables must agree on the characters that it knows.
TEST(Words, ClassesAreThoseOfUnicode) {
    using enum CharacterClass;
    for (const auto& [c, expected] : std::vector<std::pair<uint32_t, CharacterClass>>{{'a', letter},
                                                                                      {0xAA, letter},
                                                                                      {0x4E16, letter},
                                                                                      {0x10FFFF, other},
                                                                                      {0x2EBF0, letter},
                                                                                      {0x16D70, number},
                                                                                      {0x11BC0, letter},
                                                                                      {'7', number},
                                                                                      {0xBD, number},
                                                                                      {0x2167, number},
                                                                                      {0x0663, number},
                                                                                      {' ', space},
                                                                                      {0x85, space},
                                                                                      {0x1680, space},
                                                                                      {0x3000, space},
                                                                                      {0x1C, other},
                                                                                      {0x180E, other},
                                                                                      {0x200B, other},
                                                                                      {0x301, other}}) {
        EXPECT_EQ(class_table()[c], expected) << std::hex << c;
    }
    EXPECT_EQ(general_category(0x1C89), "Lu");
    EXPECT_EQ(general_category(0x1C8A), "Ll");
    EXPECT_EQ(general_category('a'), "Ll");
}

TEST(Words, PrefixSpaceNfcAndDigits) {
    const auto prefixed = R"({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true})";
    EXPECT_EQ(words_of(Tokenizer::parse(edited(byte_level, prefixed), "test"), "a b"), (Strings{" a", " b"}));

    const Tokenizer nfc = Tokenizer::parse(edited(R"("normalizer": null)", R"("normalizer": {"type": "NFC"})"), "test");
    EXPECT_EQ(words_of(nfc, "e\u0301\xff ab"), (Strings{"\u00e9", "\uFFFD", " ab"}));

    const auto digits =
        R"({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, )" + byte_level + "]}";
    EXPECT_EQ(words_of(Tokenizer::parse(edited(byte_level, digits), "test"), "a 12"), (Strings{"a", " ", "1", "2"}));
}

// ---------------------------------------------------------------------------------------------------------------------
// Training

using NaivePair = std::pair<uint32_t, uint32_t>;

// Counts all pairs anew before each merge.
static std::vector<NaivePair> naive_merges(const WordCounts& counts, size_t merges) {
    uint32_t id_of_byte[256];
    for (uint32_t id = 0; id < 256; ++id) id_of_byte[byte_alphabet().order[id]] = id;
    std::vector<std::pair<Ids, int64_t>> words;
    for (const auto& [text, count] : counts) {
        Ids ids;
        for (char c : text) ids.push_back(id_of_byte[uint8_t(c)]);
        words.push_back({ids, count});
    }
    std::vector<NaivePair> result;
    while (result.size() < merges) {
        std::map<NaivePair, int64_t> pairs;
        for (const auto& [ids, count] : words) {
            for (size_t i = 0; i + 1 < ids.size(); ++i) pairs[{ids[i], ids[i + 1]}] += count;
        }
        if (pairs.empty()) break;
        auto best = pairs.begin();  // in the order of their ids, so the first of the most frequent is the lowest
        for (auto it = pairs.begin(); it != pairs.end(); ++it) {
            if (it->second > best->second) best = it;
        }
        const auto [left, right] = best->first;
        const uint32_t merged = uint32_t(256 + result.size());
        for (auto& [ids, count] : words) {
            Ids out;
            for (size_t i = 0; i < ids.size(); ++i) {
                const bool here = i + 1 < ids.size() && ids[i] == left && ids[i + 1] == right;
                out.push_back(here ? merged : ids[i]);
                i += here;
            }
            ids = out;
        }
        result.push_back(best->first);
    }
    return result;
}

TEST(Training, MergesAreThoseOfTheNaiveTrainer) {
    WordCounts counts;
    count_words(untrained_tokenizer(), sample_text(6000, 2), counts);
    const std::vector<NaivePair> expected = naive_merges(counts, 150);
    const Tokenizer tokenizer = train_bpe(counts, 256 + expected.size() + 1);
    ASSERT_EQ(tokenizer.merges.size(), expected.size());
    for (uint32_t rank = 0; rank < expected.size(); ++rank) {
        const auto found = tokenizer.merges.find(expected[rank].first, expected[rank].second);
        EXPECT_EQ(found.rank, rank);
        EXPECT_EQ(found.id, 256 + rank);
    }
}

TEST(Training, AmongEqualPairsTheLowerIdsWin) {
    const Tokenizer tokenizer = train_bpe({{"cd", 2}, {"ab", 2}, {"xy", 3}}, 260);
    EXPECT_EQ(tokenizer.tokens[256], "xy");
    EXPECT_EQ(tokenizer.tokens[257], "ab");
    EXPECT_EQ(tokenizer.tokens[258], "cd");
}

TEST(Training, BytesFirstInGpt2OrderAndEndOfTextLast) {
    const Tokenizer& tokenizer = sample_tokenizer();
    EXPECT_EQ(tokenizer.vocab_size(), 400u);
    EXPECT_EQ(tokenizer.byte_ids[uint8_t('!')], 0u);
    EXPECT_EQ(tokenizer.byte_ids[uint8_t('~')], 93u);
    EXPECT_EQ(tokenizer.byte_ids[0xA1], 94u);
    EXPECT_EQ(tokenizer.byte_ids[0xFF], 187u);
    EXPECT_EQ(tokenizer.byte_ids[0], 188u);
    EXPECT_EQ(tokenizer.byte_ids[uint8_t(' ')], 220u);
    EXPECT_EQ(tokenizer.byte_ids[0xAD], 255u);
    EXPECT_EQ(tokenizer.end_of_text, 399u);
    EXPECT_EQ(tokenizer.document_start, 399u);
}

TEST(Training, StopsWhereNothingIsLeftToMerge) { EXPECT_EQ(train_bpe({{"ab", 1}}, 1000).vocab_size(), 258u); }

// ---------------------------------------------------------------------------------------------------------------------
// Encoding

// Looks for the leftmost pair of the lowest rank from the start, each time.
static Ids naive_encode(const Tokenizer& tokenizer, const std::string& text) {
    Ids all;
    for (const std::string& word : words_of(tokenizer, text)) {
        Ids ids;
        for (char c : word) ids.push_back(tokenizer.byte_ids[uint8_t(c)]);
        for (;;) {
            uint32_t rank = UINT32_MAX, merged = 0;
            size_t at = 0;
            for (size_t i = 0; i + 1 < ids.size(); ++i) {
                const auto found = tokenizer.merges.find(ids[i], ids[i + 1]);
                if (found.rank < rank) rank = found.rank, merged = found.id, at = i;
            }
            if (rank == UINT32_MAX) break;
            ids[at] = merged;
            ids.erase(ids.begin() + long(at) + 1);
        }
        all.insert(all.end(), ids.begin(), ids.end());
    }
    return all;
}

TEST(Encoding, IdsAreThoseOfTheNaiveLoop) {
    const Tokenizer& tokenizer = sample_tokenizer();
    for (unsigned seed = 10; seed < 30; ++seed) {
        const std::string text = sample_text(500, seed) + std::string(seed, 'a') + random_bytes(50, seed);
        EXPECT_EQ(tokenizer.encode(text), naive_encode(tokenizer, text)) << text;
    }
}

// Merges in no order that training would give: later tokens merge first, and their parts compete.
TEST(Encoding, RankDecidesNotTheOrderOfIds) {
    auto json = nlohmann::json::parse(sample_tokenizer().json);
    auto& merges = json["model"]["merges"];
    std::shuffle(merges.begin(), merges.end(), std::mt19937(3));
    const Tokenizer tokenizer = Tokenizer::parse(json.dump(), "test");
    const std::string text = sample_text(3000, 4);
    EXPECT_EQ(tokenizer.encode(text), naive_encode(tokenizer, text));
    EXPECT_NE(tokenizer.encode(text), sample_tokenizer().encode(text));
}

TEST(Encoding, DecodeGivesTheTextBack) {
    const Tokenizer& tokenizer = sample_tokenizer();
    Strings texts = {"",
                     "\n",
                     "<|endoftext|>",
                     "a<|endoftext|><|endoftext|> b",
                     "<|endof",
                     "naïve 你好 👨‍👩‍👧 e\u0301",
                     std::string(3, '\0'),
                     std::string(100000, 'a'),
                     std::string(100000, ' ') + "x"};
    for (unsigned seed = 0; seed < 50; ++seed) texts.push_back(sample_text(seed * 7, seed));
    for (const std::string& text : texts) {
        EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
        EXPECT_EQ(tokenizer.decode(tokenizer.encode(text, Special::as_text)), text);
    }
}

TEST(Encoding, SpecialTokensAreParsedOrText) {
    const Tokenizer& tokenizer = sample_tokenizer();
    const uint32_t end = *tokenizer.end_of_text;
    Ids expected = tokenizer.encode("ab");
    expected.push_back(end);
    for (uint32_t id : tokenizer.encode(" then")) expected.push_back(id);
    EXPECT_EQ(tokenizer.encode("ab<|endoftext|> then"), expected);
    for (uint32_t id : tokenizer.encode("ab<|endoftext|> then", Special::as_text)) EXPECT_NE(id, end);
}

TEST(Encoding, LongestAddedTokenWinsAndOrdinaryOnesAlwaysCount) {
    const Tokenizer tokenizer = Tokenizer::parse(
        edited("\"added_tokens\": [", R"("added_tokens": [{"id": 400, "content": "<x>", "special": false},
               {"id": 401, "content": "<x>.", "special": false}, {"id": 402, "content": "<|begin_of_text|>", "special": true},)"),
        "test");
    EXPECT_EQ(tokenizer.vocab_size(), 403u);
    EXPECT_EQ(tokenizer.encode("<x>.<x>"), (Ids{401, 400}));
    EXPECT_EQ(tokenizer.encode("<x>.<x>", Special::as_text), (Ids{401, 400}));
    EXPECT_EQ(tokenizer.decode({401, 402}), "<x>.<|begin_of_text|>");
}

// A special token is passed over as text with all that it covers, as HF's encode_special_tokens does.
TEST(Encoding, ASpecialTokenAsTextHidesWhatLiesWithin) {
    const Tokenizer tokenizer = Tokenizer::parse(
        edited("\"added_tokens\": [",
               R"("added_tokens": [{"id": 400, "content": "endof", "special": false, "normalized": false},)"),
        "test");
    EXPECT_EQ(tokenizer.encode("endof", Special::as_text), Ids{400});
    const Ids ids = tokenizer.encode("<|endoftext|>", Special::as_text);
    EXPECT_EQ(std::count(ids.begin(), ids.end(), 400u), 0);
    EXPECT_EQ(tokenizer.decode(ids), "<|endoftext|>");
}

TEST(Encoding, AddedTokensAreNumberedAsInTheOriginal) {
    const Tokenizer tokenizer = Tokenizer::parse(
        edited(
            "\"added_tokens\": [",
            R"("added_tokens": [{"id": 7, "content": "<x>"}, {"id": 9, "content": "a"}, {"id": 9, "content": "<y>"},)"),
        "test");
    const uint32_t a = tokenizer.byte_ids[uint8_t('a')];
    EXPECT_EQ(tokenizer.encode("<x>a<y>"), (Ids{400, a, 401}));  // after the 400 of the vocabulary
}

TEST(Encoding, VocabulariesOver65536WithHoles) {
    auto json = nlohmann::json::parse(sample_tokenizer().json);
    for (auto& [token, id] : json["model"]["vocab"].items()) id = id.get<uint32_t>() * 300 + 11;
    const Tokenizer tokenizer = Tokenizer::parse(json.dump(), "test");
    EXPECT_EQ(tokenizer.vocab_size(), 399u * 300 + 12);
    Ids expected = sample_tokenizer().encode(sample_text(3000, 3));
    for (uint32_t& id : expected) id = id * 300 + 11;
    EXPECT_EQ(tokenizer.encode(sample_text(3000, 3)), expected);
    EXPECT_EQ(tokenizer.decode(expected), sample_text(3000, 3));
}

// Words around the bounds of the merge loops and of the cache: 15 bytes, 64 ids, 128 bytes; and one of 3 MB.
TEST(Encoding, WordsOfAnyLength) {
    const Tokenizer& tokenizer = sample_tokenizer();
    std::mt19937 random(7);
    for (size_t length : {1, 2, 3, 7, 8, 9, 14, 15, 16, 17, 63, 64, 65, 66, 127, 128, 129, 600}) {
        WordCache cache;
        for (int i = 0; i < 3; ++i) {
            std::string word(length, 'a');
            if (i == 1) std::generate(word.begin(), word.end(), [&] { return "abthen"[random() % 6]; });
            Ids ids;
            tokenizer.encode(word + " " + word, Special::parse, cache, ids);
            EXPECT_EQ(ids, naive_encode(tokenizer, word + " " + word)) << word;
        }
    }
    auto json = nlohmann::json::parse(tokenizer.json);
    auto& merges = json["model"]["merges"];
    for (unsigned seed = 0; seed < 5; ++seed) {  // merges in an order that training would not give
        std::shuffle(merges.begin(), merges.end(), std::mt19937(seed));
        const Tokenizer shuffled = Tokenizer::parse(json.dump(), "test");
        std::string word(2000, 0);
        std::generate(word.begin(), word.end(), [&] { return "abthen"[random() % 6]; });
        EXPECT_EQ(shuffled.encode(word), naive_encode(shuffled, word));
        EXPECT_EQ(tokenizer.encode(word), naive_encode(tokenizer, word));
    }
    const std::string run(3'000'000, 'a');
    const auto start = std::chrono::steady_clock::now();
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(run)), run);
    // A second or so; what is quadratic would take hours.
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::minutes(2));
}

TEST(Encoding, ThreadsShareATokenizer) {
    const Tokenizer tokenizer = Tokenizer::parse(edited(byte_level, other_sequence), "test");
    const std::string text = sample_text(50000, 12);
    const Ids expected = tokenizer.encode(text);
    std::vector<Ids> ids(4);
    std::vector<std::thread> threads;
    for (Ids& out : ids) threads.emplace_back([&] { out = tokenizer.encode(text); });
    for (std::thread& thread : threads) thread.join();
    for (const Ids& out : ids) EXPECT_TRUE(out == expected);
}

TEST(Encoding, TheCacheChangesNothing) {
    const Tokenizer& tokenizer = sample_tokenizer();
    WordCache cache;
    for (unsigned seed = 0; seed < 5; ++seed) {
        const std::string text = sample_text(2000, seed);
        Ids ids;
        tokenizer.encode(text, Special::parse, cache, ids);
        EXPECT_EQ(ids, tokenizer.encode(text));
    }
    EXPECT_FALSE(cache.empty());
}

// More words than a cache holds, short and long.
TEST(Encoding, AFullCacheStartsAgain) {
    const Tokenizer& tokenizer = sample_tokenizer();
    WordCache cache;
    for (int round = 0; round < 2; ++round) {
        std::string text;
        for (int i = 0; i < 200'000; ++i) {
            text += " a" + std::to_string(i);
            if (i % 3 == 0)
                text += " abthenabthenabthen" + std::string(1, char('a' + i % 26)) + std::string(size_t(i % 50), 'b');
        }
        Ids ids;
        tokenizer.encode(text, Special::parse, cache, ids);
        EXPECT_EQ(tokenizer.decode(ids), text);
        EXPECT_TRUE(ids == tokenizer.encode(text));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Hugging Face's ids (made by dev/reference/make_tokenizer_fixtures.py)

TEST(Original, GivesTheSameIds) {
    const auto cases = nlohmann::json::parse(read_whole_file("test/fixtures/tokenizer-ids.json"));
    size_t texts = 0;
    for (const auto& one : cases) {
        const std::string path = "test/fixtures/tokenizer-" + one["file"].get<std::string>() + ".json";
        auto json = nlohmann::json::parse(read_whole_file(path));
        for (const auto& [pointer, value] : one["change"].items()) json[nlohmann::json::json_pointer(pointer)] = value;
        const Tokenizer tokenizer = Tokenizer::parse(json.dump(), path);
        for (const auto& result : one["results"]) {
            const std::string text = result["text"];
            EXPECT_EQ(tokenizer.encode(text), result["ids"].get<Ids>()) << path << one["change"] << "\n"
                                                                        << result["text"];
            ++texts;
        }
    }
    EXPECT_GT(texts, 100u);
}

// ---------------------------------------------------------------------------------------------------------------------
// tokenizer.json

TEST(File, SaveAndLoadAreTheIdentity) {
    const TemporaryFolder folder;
    const Tokenizer& tokenizer = sample_tokenizer();
    tokenizer.save(folder / "a.json");
    const Tokenizer loaded = Tokenizer::load(folder / "a.json");
    loaded.save(folder / "b.json");
    EXPECT_EQ(read_whole_file(folder / "a.json"), read_whole_file(folder / "b.json"));
    EXPECT_EQ(loaded.tokens, tokenizer.tokens);
    EXPECT_EQ(loaded.encode(sample_text(1000, 5)), tokenizer.encode(sample_text(1000, 5)));
}

TEST(File, MergesAsStringsAndAsPairsAreTheSame) {
    auto json = nlohmann::json::parse(sample_tokenizer().json);
    for (auto& merge : json["model"]["merges"]) {
        merge = merge[0].get<std::string>() + " " + merge[1].get<std::string>();
    }
    const Tokenizer strings = Tokenizer::parse(json.dump(), "test");
    EXPECT_EQ(strings.encode(sample_text(1000, 6)), sample_tokenizer().encode(sample_text(1000, 6)));
}

TEST(File, IgnoreMergesTakesAWholeWordFromTheVocabulary) {
    auto json = nlohmann::json::parse(sample_tokenizer().json);
    json["model"]["vocab"]["qq"] = 400;
    EXPECT_EQ(Tokenizer::parse(json.dump(), "test").encode("qq").size(), 2u);
    json["model"]["ignore_merges"] = true;
    EXPECT_EQ(Tokenizer::parse(json.dump(), "test").encode("qq"), (Ids{400}));
}

TEST(File, DocumentsStartAsLlama3WantsThem) {
    auto json = nlohmann::json::parse(sample_tokenizer().json);
    json["added_tokens"] = {{{"id", 400}, {"content", "<|begin_of_text|>"}, {"special", true}},
                            {{"id", 401}, {"content", "<|end_of_text|>"}, {"special", true}}};
    const Tokenizer tokenizer = Tokenizer::parse(json.dump(), "test");
    EXPECT_EQ(tokenizer.document_start, 400u);
    EXPECT_EQ(tokenizer.end_of_text, 401u);
}

TEST(File, WhatIsNotSupportedIsSaid) {
    const auto error = [](const std::string& json) { return error_of([&] { Tokenizer::parse(json, "t.json"); }); };
    const auto says = [](const std::string& text, const std::string& what) {
        EXPECT_NE(text.find(what), text.npos) << text;
        EXPECT_EQ(text.find('\n'), text.npos) << text;
        EXPECT_TRUE(text.starts_with("t.json: ")) << text;
    };
    says(error("{"), "not a tokenizer.json");
    says(error("[]"), "not a tokenizer.json");
    says(error("{}"), "not a tokenizer.json");
    says(error(edited(R"("type": "BPE")", R"("type": "Unigram")")), "model Unigram");
    says(error(edited(R"("type": "BPE")", R"("type": "WordPiece")")), "model WordPiece");
    says(error(edited(R"("normalizer": null)", R"("normalizer": {"type": "Lowercase"})")), "normalizer Lowercase");
    says(error(edited(R"("truncation": null)", R"("truncation": {"max_length": 5})")), "truncation");
    says(error(edited(R"("padding": null)", R"("padding": {})")), "padding");
    says(error(edited(R"("dropout": null)", R"("dropout": 0.1)")), "dropout");
    says(error(edited(R"("type": "BPE")", "\"type\": \"B\\nPE\"")), "model B PE");
    says(error(edited(byte_level, R"({"type": "Metaspace"})")), "ByteLevel");
    says(error(edited(byte_level, "null")), "ByteLevel");
    says(error(edited(byte_level, R"({"type": "Sequence", "pretokenizers": [{"type": "Bert"}, )" + byte_level + "]}")),
         "pre_tokenizer Bert");
    says(error(edited(R"("end_of_word_suffix": null)", R"("end_of_word_suffix": "</w>")")), "end_of_word_suffix");
    says(error(edited(R"("decoder": {"type": "ByteLevel")", R"("decoder": {"type": "WordPiece")")),
         "decoder WordPiece");
    says(error(edited("\"!\": 0,", "\"!\": 4000000000,")), "id 4000000000");
    says(error(edited("\"merges\": [", R"("merges": [["zz", "zz"],)")), "not in the vocabulary");
    const auto regex_error = [&](const std::string& pattern) {
        const nlohmann::json split = {{"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Isolated"}};
        return error(
            edited(byte_level, R"({"type": "Sequence", "pretokenizers": [)" + split.dump() + ", " + byte_level + "]}"));
    };
    says(regex_error("(a"), "cannot compile the regex");
    for (const std::string construct : {"\\h", "\\w", "\\b", "^", "$"})
        says(regex_error(construct + "a"), construct + " in the regex");
    says(regex_error("\n("), "cannot compile the regex");
    says(regex_error("a{1,3}+"), "{}+ in the regex");
    says(regex_error("(?m:a)"), "(?m in the regex");
    says(regex_error("[a&&b]"), "&& in [ ]");
    says(regex_error("[a[^b]]"), "[^ in [ ]");
    EXPECT_NE(error_of([] { Tokenizer::load("/nowhere/t.json"); }).find("/nowhere/t.json"), std::string::npos);
}

TEST(File, DecodingAnUnknownTokenIsSaid) {
    EXPECT_NE(error_of([] { sample_tokenizer().decode({400}); }).find("token 400"), std::string::npos);
}

// ---------------------------------------------------------------------------------------------------------------------
// Corpus

static std::vector<Part> parts_of(const Strings& paths, const std::string& field = "text") {
    Corpus corpus(paths, field);
    std::vector<Part> parts;
    for (Part part; corpus.next(part);) parts.push_back(part);
    return parts;
}

static Strings documents_of(const Strings& paths, const std::string& field = "text") {
    Strings documents;
    for (const Part& part : parts_of(paths, field)) {
        if (part.continues) documents.back() += part.text;
        else documents.push_back(part.text);
    }
    return documents;
}

TEST(CorpusTest, KindsAndCompressionsGiveTheSameDocuments) {
    const TemporaryFolder folder;
    const Strings documents = {sample_text(300000, 7), "x", sample_text(1000, 8)};
    std::string jsonl, txt;
    for (const std::string& document : documents) {
        jsonl += nlohmann::json{{"id", 1}, {"text", document}, {"other", "é"}}.dump() + "\n";
        txt += (txt.empty() ? "" : "<|endoftext|>") + std::string(document);
    }
    jsonl.insert(jsonl.find('\n') + 1, "\r\n{\"text\": \"\"}\r\n");  // empty lines and documents are left out
    jsonl.pop_back();                                                // the last line's end may be missing
    for (const auto& [name, text] : {std::pair{"a.jsonl", jsonl}, {"b.txt", txt}}) {
        const std::string path = folder / name;
        write_whole_file(path, text);
        write_gz(path + ".gz", text);
        write_zst(path + ".zst", text);
        for (const char* packed : {"", ".gz", ".zst"})
            EXPECT_EQ(documents_of({path + packed}), documents) << path << packed;
    }
}

TEST(CorpusTest, FoldersAreReadInTheOrderOfPaths) {
    const TemporaryFolder folder;
    fs::create_directories(folder / "sub/deep");
    write_whole_file(folder / "b.txt", "2");
    write_whole_file(folder / "a.jsonl", R"({"text": "1"})");
    write_gz(folder / "sub/deep/c.txt.gz", "33");
    write_whole_file(folder / "other.md", "no");
    EXPECT_EQ(documents_of({folder.path}), (Strings{"1", "2", "33"}));
    EXPECT_EQ(documents_of({folder / "b.txt", folder / "a.jsonl"}), (Strings{"2", "1"}));
}

TEST(CorpusTest, CutsChangeNoToken) {
    const TemporaryFolder folder;
    std::string text = "x = [\n";
    std::mt19937 random(9);
    while (text.size() < 200000) text += "        " + std::to_string(random() % 10000) + ",\n";
    while (text.size() < 400000) text += "word,\n\n  another " + std::to_string(random() % 10000) + "\n\n\n";
    text += sample_text(400000, 10);
    write_whole_file(folder / "a.txt", text);
    for (const std::string& json : {sample_tokenizer().json, edited(byte_level, llama3_sequence)}) {
        const Tokenizer tokenizer = Tokenizer::parse(json, "test");
        Ids ids;
        size_t count = 0;
        for (const Part& part : parts_of({folder / "a.txt"})) {
            EXPECT_LE(part.text.size(), std::max<size_t>(text.size() / 64, 16384));
            EXPECT_EQ(part.continues, count++ > 0);
            const Ids more = tokenizer.encode(part.text);
            ids.insert(ids.end(), more.begin(), more.end());
        }
        EXPECT_GT(count, 20u);
        EXPECT_TRUE(ids == tokenizer.encode(text));
    }
}

TEST(CorpusTest, ATextWithoutSpacesIsCutBetweenCharacters) {
    const TemporaryFolder folder;
    std::string text;
    while (text.size() < 100000) text += "世界";
    write_whole_file(folder / "a.txt", text);
    for (const Part& part : parts_of({folder / "a.txt"})) EXPECT_EQ(part.text.size() % 3, 0u);
    EXPECT_EQ(documents_of({folder / "a.txt"}), Strings{text});
}

TEST(CorpusTest, ErrorsNameFileAndLine) {
    const TemporaryFolder folder;
    const auto error = [&](const std::string& name, const std::string& content) {
        write_whole_file(folder / name, content);
        return error_of([&] { documents_of({folder / name}); });
    };
    const auto has = [](const std::string& text, const std::string& what) {
        EXPECT_NE(text.find(what), text.npos) << text;
        EXPECT_EQ(text.find('\n'), text.npos) << text;
    };
    has(error("a.jsonl", "{\"text\": \"a\"}\n\n{\"text\": \"b\"\n"), "a.jsonl:3: not valid JSON");
    has(error("a.jsonl", "{\"txt\": \"a\"}"), "a.jsonl:1: no field \"text\"");
    has(error("a.jsonl", "{\"text\": 5}"), "a.jsonl:1: the field \"text\" is not a string");
    has(error("a.jsonl", "[1]"), "a.jsonl:1: not a JSON object");
    has(error("a.jsonl", "{\"text\": \"\xff\"}"), "a.jsonl:1: not valid JSON");
    has(error("a.txt.gz", "plain text"), "a.txt.gz: not in gzip format");
    has(error("a.txt.zst", "plain text"), "cannot decompress");

    const std::string text = random_bytes(100000, 11);
    write_gz(folder / "b.txt.gz", text);
    write_zst(folder / "b.txt.zst", text);
    for (const char* name : {"b.txt.gz", "b.txt.zst"}) {
        const std::string whole = read_whole_file(folder / name);
        has(error(name, whole.substr(0, whole.size() / 3)), "it ends too early");
    }
    std::string damaged = read_whole_file(folder / "b.txt.gz");
    write_gz(folder / "c.txt.gz", sample_text(100000, 12));
    damaged = read_whole_file(folder / "c.txt.gz");
    damaged[damaged.size() / 3] ^= 0x55;
    has(error("c.txt.gz", damaged), "cannot decompress");

    has(error_of([&] { documents_of({folder / "missing.txt"}); }), "no such file");
    has(error("a.pdf", "x"), "cannot tell what");
    fs::create_directories(folder / "empty");
    has(error_of([&] { documents_of({folder / "empty"}); }), "no text in the folder");
}

// ---------------------------------------------------------------------------------------------------------------------
// Shards

TEST(Shards, HeaderAndTokens) {
    const TemporaryFolder folder;
    for (const bool wide : {false, true}) {
        const Ids tokens = wide ? Ids{1, 70000, 3} : Ids{1, 65535, 3};
        ShardWriter writer(folder.path, wide ? 65537 : 65536, 100);
        writer.write(ShardWriter::train, tokens);
        EXPECT_FALSE(fs::exists(folder / "train_000000.bin") && !wide);  // only when all are complete
        writer.commit();
        const std::string bytes = read_whole_file(folder / "train_000000.bin");
        int32_t header[256];
        ASSERT_EQ(bytes.size(), sizeof header + 3 * (wide ? 4 : 2));
        std::memcpy(header, bytes.data(), sizeof header);
        EXPECT_EQ(header[0], wide ? 20240801 : 20240520);
        EXPECT_EQ(header[1], wide ? 7 : 1);
        EXPECT_EQ(header[2], 3);
        EXPECT_TRUE(std::all_of(header + 3, header + 256, [](int32_t word) { return word == 0; }));
        EXPECT_EQ(read_tokens(folder / "train_000000.bin"), tokens);
    }
}

TEST(Shards, FullShardsAreFollowedByTheNext) {
    const TemporaryFolder folder;
    ShardWriter writer(folder.path, 1000, 4);
    writer.write(ShardWriter::train, {1, 2, 3});
    writer.write(ShardWriter::val, {9});
    writer.write(ShardWriter::train, {4, 5, 6, 7, 8, 9, 10, 11, 12});
    writer.commit();
    EXPECT_EQ(read_tokens(folder / "train_000000.bin"), (Ids{1, 2, 3, 4}));
    EXPECT_EQ(read_tokens(folder / "train_000001.bin"), (Ids{5, 6, 7, 8}));
    EXPECT_EQ(read_tokens(folder / "train_000002.bin"), (Ids{9, 10, 11, 12}));
    EXPECT_EQ(read_tokens(folder / "val_000000.bin"), (Ids{9}));
    EXPECT_FALSE(fs::exists(folder / "train_000003.bin"));
}

TEST(Shards, EarlierOnesGoOnlyAfterSuccess) {
    const TemporaryFolder folder;
    for (const char* name : {"train_000000.bin", "train_000005.bin", "val_000001.bin", "train_notes.bin"})
        write_whole_file(folder / name, "old");
    { ShardWriter abandoned(folder.path, 1000, 4); }
    EXPECT_EQ(read_whole_file(folder / "train_000000.bin"), "old");
    EXPECT_EQ(read_whole_file(folder / "train_000005.bin"), "old");
    EXPECT_FALSE(fs::exists(folder / "train_000000.bin.tmp"));
    ShardWriter writer(folder.path, 1000, 4);
    writer.write(ShardWriter::train, {1});
    writer.commit();
    EXPECT_EQ(read_tokens(folder / "train_000000.bin"), (Ids{1}));
    EXPECT_FALSE(fs::exists(folder / "train_000005.bin") || fs::exists(folder / "val_000001.bin"));
    EXPECT_TRUE(fs::exists(folder / "train_notes.bin"));
}

TEST(Shards, ForeignAndShortFilesAreSaid) {
    const TemporaryFolder folder;
    write_whole_file(folder / "a.bin", "hello");
    EXPECT_NE(error_of([&] { read_tokens(folder / "a.bin"); }).find("not a token shard"), std::string::npos);
    ShardWriter writer(folder.path, 1000, 4);
    writer.write(ShardWriter::train, {1, 2});
    writer.commit();
    fs::resize_file(folder / "train_000000.bin", 1026);
    EXPECT_NE(error_of([&] { read_tokens(folder / "train_000000.bin"); }).find("ends before its 2 tokens"),
              std::string::npos);
}

// ---------------------------------------------------------------------------------------------------------------------
// The command

TEST(Command, TrainsEncodesAndDecodes) {
    const TemporaryFolder folder;
    const Strings documents = {sample_text(3000, 13), sample_text(2000, 14), sample_text(4000, 15)};
    std::string jsonl;
    for (const std::string& document : documents) jsonl += nlohmann::json{{"body", document}}.dump() + "\n";
    write_whole_file(folder / "a.jsonl", jsonl);
    const std::string tokenizer_path = folder / "new/t.json", out = folder / "out";
    ASSERT_EQ(
        tokenize({"train", "--vocab-size", "300", "--field", "body", "--out", tokenizer_path, folder / "a.jsonl"}).code,
        0);
    ASSERT_EQ(
        tokenize({"encode", "--tokenizer", tokenizer_path, "--field", "body", "--out", out, folder / "a.jsonl"}).code,
        0);
    EXPECT_EQ(read_whole_file(out + "/tokenizer.json"), read_whole_file(tokenizer_path));

    const Tokenizer tokenizer = Tokenizer::load(tokenizer_path);
    EXPECT_EQ(tokenizer.vocab_size(), 300u);
    const std::string start = "<|endoftext|>";
    EXPECT_EQ(tokenizer.decode(read_tokens(out + "/train_000000.bin")), start + documents[0] + start + documents[2]);
    EXPECT_EQ(tokenizer.decode(read_tokens(out + "/val_000000.bin")), start + documents[1]);

    testing::internal::CaptureStdout();
    decode(tokenizer_path, out + "/val_000000.bin");
    EXPECT_EQ(testing::internal::GetCapturedStdout(), start + documents[1]);
}

TEST(Command, EveryCorpusGetsTrainingAndValidationText) {
    const TemporaryFolder folder;
    sample_tokenizer().save(folder / "t.json");
    for (const size_t size : {100, 10000, 100000, 2000000}) {
        const std::string text = sample_text(size, 16);
        write_whole_file(folder / "a.txt", text);
        const Outcome outcome = tokenize({"encode", "--tokenizer", folder / "t.json", "--val-fraction", "0.02", "--out",
                                          folder / "out", folder / "a.txt"});
        ASSERT_EQ(outcome.code, 0) << outcome.err;
        const auto bytes = [&](const char* name) {
            std::string decoded = sample_tokenizer().decode(read_tokens(folder / "out/" + name)),
                        start = "<|endoftext|>";
            EXPECT_TRUE(decoded.starts_with(start));
            for (size_t at; (at = decoded.find(start)) != decoded.npos;) decoded.erase(at, start.size());
            return decoded.size();
        };
        const size_t train = bytes("train_000000.bin"), val = bytes("val_000000.bin");
        EXPECT_EQ(train + val, text.size());
        EXPECT_GT(val, 0u);
        EXPECT_LE(double(val), std::max(0.02 * double(size) + 32768, 1.0));
        EXPECT_GT(train, size / 2);
    }
    ASSERT_EQ(tokenize({"encode", "--tokenizer", folder / "t.json", "--val-fraction", "0", "--out", folder / "out",
                        folder / "a.txt"})
                  .code,
              0);
    EXPECT_FALSE(fs::exists(folder / "out/val_000000.bin"));
}

TEST(Command, ValidationHasItsShareOfTheBytes) {
    ValidationChooser chooser{0.05};
    std::mt19937 random(17);
    int64_t longest_gap = 0, gap = 0;
    for (int i = 0; i < 10000; ++i) {
        const size_t size = random() % 1000;
        gap = chooser.choose(size) ? 0 : gap + int64_t(size);
        longest_gap = std::max(longest_gap, gap);
    }
    EXPECT_NEAR(double(chooser.val_bytes) / double(chooser.bytes), 0.05, 0.001);
    EXPECT_LT(longest_gap, 2 * 1000 / 0.05);
}

TEST(Command, SpecialTokensInJsonAreText) {
    const TemporaryFolder folder;
    sample_tokenizer().save(folder / "t.json");
    write_whole_file(folder / "a.jsonl", R"({"text": "a<|endoftext|>b"})");
    ASSERT_EQ(tokenize({"encode", "--tokenizer", folder / "t.json", "--val-fraction", "0", "--out", folder / "o",
                        folder / "a.jsonl"})
                  .code,
              0);
    const Ids tokens = read_tokens(folder / "o/train_000000.bin");
    EXPECT_EQ(std::count(tokens.begin(), tokens.end(), *sample_tokenizer().end_of_text), 1);
}

TEST(Command, ExitCodesAndOneLine) {
    const TemporaryFolder folder;
    sample_tokenizer().save(folder / "t.json");
    write_whole_file(folder / "a.txt", "text");
    write_whole_file(folder / "empty.txt", "");
    write_whole_file(folder / "bad.json", "{}");
    const std::string t = folder / "t.json", a = folder / "a.txt", out = folder / "out";
    const auto expect = [&](int code, const std::string& what, const Strings& arguments) {
        const Outcome outcome = tokenize(arguments);
        EXPECT_EQ(outcome.code, code) << outcome.err;
        EXPECT_NE(outcome.err.find(what), std::string::npos) << outcome.err;
        EXPECT_TRUE(outcome.err.starts_with("tokenize: ")) << outcome.err;
        EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
    };
    expect(2, "", {});
    expect(2, "", {"frobnicate"});
    expect(2, "--vocab-size", {"train", "--vocab-size", "100", "--out", out, a});
    expect(2, "--shard-tokens", {"encode", "--tokenizer", t, "--shard-tokens", "3X", "--out", out, a});
    expect(2, "--shard-tokens", {"encode", "--tokenizer", t, "--shard-tokens", "9G", "--out", out, a});
    expect(2, "--tokenizer", {"encode", "--out", out, a});
    expect(2, "--val-fraction", {"encode", "--tokenizer", t, "--val-fraction", "2", "--out", out, a});
    expect(1, "missing.json", {"encode", "--tokenizer", folder / "missing.json", "--out", out, a});
    expect(1, "bad.json", {"encode", "--tokenizer", folder / "bad.json", "--out", out, a});
    expect(1, "the corpus has no text", {"encode", "--tokenizer", t, "--out", out, folder / "empty.txt"});
    expect(1, "the corpus has no text", {"train", "--out", folder / "n.json", folder / "empty.txt"});
    expect(1, "/a.txt", {"encode", "--tokenizer", t, "--out", a + "/out", a});  // a file where a folder is needed
    expect(1, "/a.txt", {"train", "--out", a + "/n.json", a});
    fs::create_directories(out);
    write_whole_file(out + "/tokenizer.json", "another");
    expect(1, "another tokenizer", {"encode", "--tokenizer", t, "--out", out, a});
    EXPECT_EQ(parse_count("100M"), 100000000);
    EXPECT_EQ(parse_count("1.5k"), 1500);
    EXPECT_EQ(parse_count("2G"), 2000000000);
}
