// The tokenizer against plain implementations of the same definitions.
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <random>

#include "../tokenizer/train_bpe.h"
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
        const auto found = tokenizer.merges.find(uint64_t(expected[rank].first) << 32 | expected[rank].second);
        ASSERT_NE(found, tokenizer.merges.end()) << "merge " << rank;
        EXPECT_EQ(found->second.rank, rank);
        EXPECT_EQ(found->second.id, 256 + rank);
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
                const auto found = tokenizer.merges.find(uint64_t(ids[i]) << 32 | ids[i + 1]);
                if (found != tokenizer.merges.end() && found->second.rank < rank) {
                    rank = found->second.rank, merged = found->second.id, at = i;
                }
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
        edited("\"added_tokens\": [", R"("added_tokens": [{"id": 500, "content": "<x>", "special": false},
               {"id": 501, "content": "<x>.", "special": false}, {"id": 502, "content": "<|begin_of_text|>", "special": true},)"),
        "test");
    EXPECT_EQ(tokenizer.vocab_size(), 503u);
    EXPECT_EQ(tokenizer.encode("<x>.<x>"), (Ids{501, 500}));
    EXPECT_EQ(tokenizer.encode("<x>.<x>", Special::as_text), (Ids{501, 500}));
    EXPECT_EQ(tokenizer.decode({501, 502}), "<x>.<|begin_of_text|>");
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
    says(error(edited(R"("normalizer": null)", R"("normalizer": {"type": "NFKC"})")), "normalizer NFKC");
    says(error(edited(byte_level, R"({"type": "Metaspace"})")), "ByteLevel");
    says(error(edited(byte_level, "null")), "ByteLevel");
    says(error(edited(byte_level, R"({"type": "Sequence", "pretokenizers": [{"type": "Bert"}, )" + byte_level + "]}")),
         "pre_tokenizer Bert");
    says(error(edited(R"("end_of_word_suffix": null)", R"("end_of_word_suffix": "</w>")")), "end_of_word_suffix");
    says(error(edited(R"("lstrip": false)", R"("lstrip": true)")), "lstrip");
    says(error(edited("\"!\": 0,", "")), "without the byte 33");
    says(error(edited("\"!\": 0,", "\"!\": 4000000000,")), "id 4000000000");
    says(error(edited("\"merges\": [", R"("merges": [["zz", "zz"],)")), "not in the vocabulary");
    const auto bad_regex = R"({"type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Isolated", "invert": false})";
    says(error(edited(byte_level, R"({"type": "Sequence", "pretokenizers": [)" + std::string(bad_regex) + ", " +
                                      byte_level + "]}")),
         "cannot compile the regex");
    EXPECT_NE(error_of([] { Tokenizer::load("/nowhere/t.json"); }).find("/nowhere/t.json"), std::string::npos);
}

TEST(File, DecodingAnUnknownTokenIsSaid) {
    EXPECT_NE(error_of([] { sample_tokenizer().decode({400}); }).find("token 400"), std::string::npos);
}
