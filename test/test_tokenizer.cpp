// The tokenizer against plain implementations of the same definitions.
#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <thread>

#include "sample_tokenizer.h"
#include "temporary_folder.h"
#include "trainer/files.h"

// ---------------------------------------------------------------------------------------------------------------------
// Helpers

static Strings words_of(const Tokenizer& tokenizer, const std::string& text) {
    std::string buffer;
    std::vector<std::string_view> words;
    tokenizer.split(text, buffer, words);
    return {words.begin(), words.end()};
}

// The sample tokenizer's file with some of its text replaced.
static std::string edited(const std::string& from, const std::string& to) {
    std::string json = sample_tokenizer().json;
    const size_t at = json.find(from);
    EXPECT_NE(at, json.npos) << from;
    return json.replace(at, from.size(), to);
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
    const auto cases = nlohmann::json::parse(read_file("test/fixtures/tokenizer-ids.json"));
    size_t texts = 0;
    for (const auto& one : cases) {
        const std::string path = "test/fixtures/tokenizer-" + one["file"].get<std::string>() + ".json";
        auto json = nlohmann::json::parse(read_file(path));
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
    EXPECT_EQ(read_file(folder / "a.json"), read_file(folder / "b.json"));
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
    const std::string kind = "t.json: not a tokenizer.json of byte-level BPE: ";
    const std::string model = kind + "\"model\" is expected to be of type object, found ";
    says(error(""), kind + "not valid JSON near byte 1; get a fresh copy or train one");
    says(error("{"), kind + "not valid JSON near byte 2");
    says(error("{\"author\": \"Andr\xe9\"}"), kind + "not valid JSON near byte 18");
    says(error("\xff\xfe{"), kind + "not valid JSON near byte 1");
    says(error(R"({"x": 1e400})"), kind + "a number is larger than a double can hold");
    says(error("[]"), model + "none; get a fresh copy");
    says(error("7"), model + "none");
    says(error("{}"), model + "none");
    says(error(R"({"model": [1]})"), model + "array");
    says(error(R"({"model": {"type": 7}})"), kind + "\"type\" is expected to be of type string, found number");
    says(error(R"({"model": {"type": "BPE"}})"), kind + "\"vocab\" is expected to be of type object, found none");
    says(error(R"({"model": {"vocab": {}, "merges": 5}})"), kind + "\"merges\" is expected to be of type array");
    says(error(R"({"model": {"vocab": {}, "merges": [5]}})"), kind + "\"merges\" is expected to be of type string");
    says(error(R"({"model": {"vocab": {}, "merges": [["a", 5]]}})"),
         kind + "\"merges\" is expected to be of type string");
    says(error(edited(R"("ignore_merges": false)", R"("ignore_merges": "no")")),
         "\"ignore_merges\" is expected to be of type boolean");
    says(error(edited(R"("added_tokens": [)", R"("added_tokens": [5, )")),
         "\"content\" is expected to be of type string, found none");
    says(error(edited(R"("added_tokens": [)", R"("added_tokens": [{"content": "x"}, )")),
         "\"x\" has the id null, expected 0 to 16777215");
    says(error(edited(R"("normalizer": null)", R"("normalizer": "NFC")")),
         "is expected to be of type object, found string");
    says(error(edited(R"("normalizer": null)", R"("normalizer": {"type": "Sequence"})")),
         "\"normalizers\" is expected to be of type array, found none");
    const auto split_error = [&](const std::string& split) {
        return error(
            edited(byte_level, R"({"type": "Sequence", "pretokenizers": [)" + split + ", " + byte_level + "]}"));
    };
    says(split_error(R"({"type": "Split"})"), "\"pattern\" is expected to be of type object, found none");
    says(split_error(R"({"type": "Split", "pattern": {}})"), "\"String\" is expected to be of type string, found none");
    says(split_error(R"({"type": "Split", "pattern": {"Regex": 5}})"),
         "\"Regex\" is expected to be of type string, found number");
    says(split_error(R"({"type": "Split", "pattern": {"Regex": "a"}})"),
         "\"behavior\" is expected to be of type string");
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
        return split_error(split.dump());
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
