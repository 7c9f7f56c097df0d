// Corpora, shards, training and the command from its arguments to its files.
// The command is included, so that the tests run the code that ships, without a binary to find.
#define main tokenize_main
#include "../tokenizer/tokenize.cpp"
#undef main

#include <gtest/gtest.h>
#include <zlib.h>
#include <zstd.h>

#include <cmath>
#include <fstream>
#include <map>
#include <random>
#include <set>

#include "sample_tokenizer.h"
#include "temporary_folder.h"

// ---------------------------------------------------------------------------------------------------------------------
// Helpers

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
    write_file(path, packed);
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
    const Strings documents = {sample_text(300000, 7), "x", R"("]}, {\" \\)", sample_text(1000, 8)};
    std::string jsonl, txt;
    nlohmann::json list;
    for (const std::string& document : documents) {
        list.push_back({{"id", {1}}, {"text", document}, {"other", {{"é", "}"}}}});
        jsonl += list.back().dump() + "\n";
        txt += (txt.empty() ? "" : "<|endoftext|>") + std::string(document);
    }
    jsonl.insert(jsonl.find('\n') + 1, "\r\n{\"text\": \"\"}\r\n");  // empty lines and documents are left out
    jsonl.pop_back();                                                // the last line's end may be missing
    for (const auto& [name, text] : {std::pair{"a.jsonl", jsonl},
                                     {"b.txt", txt},
                                     {"c.json", jsonl},
                                     {"d.json", "\n" + list.dump(2) + "\n"},
                                     {"e.json", list.dump()}}) {
        const std::string path = folder / name;
        write_file(path, text);
        write_gz(path + ".gz", text);
        write_zst(path + ".zst", text);
        for (const char* packed : {"", ".gz", ".zst"})
            EXPECT_EQ(documents_of({path + packed}), documents) << path << packed;
    }
}

TEST(CorpusTest, FoldersAreReadInTheOrderOfPaths) {
    const TemporaryFolder folder;
    fs::create_directories(folder / "sub/deep");
    write_file(folder / "b.txt", "2");
    write_file(folder / "a.jsonl", R"({"text": "1"})");
    write_gz(folder / "sub/deep/c.txt.gz", "33");
    write_file(folder / "other.md", "no");
    EXPECT_EQ(documents_of({folder.path}), (Strings{"1", "2", "33"}));
    EXPECT_EQ(documents_of({folder / "b.txt", folder / "a.jsonl"}), (Strings{"2", "1"}));
    EXPECT_EQ(documents_of({folder / "sub/", folder / "*.txt"}), (Strings{"33", "2"}));
    EXPECT_EQ(documents_of({folder / "[ab].*"}), (Strings{"1", "2"}));
    write_file(folder / "[ab].txt", "literally");
    EXPECT_EQ(documents_of({folder / "[ab].txt"}), Strings{"literally"});
}

// The sample tokenizer with Llama 3's regex.
static Tokenizer with_llama3_pattern() {
    auto json = nlohmann::json::parse(sample_tokenizer().json);
    const char* const pattern =
        R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
    const nlohmann::json split = {
        {"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Isolated"}, {"invert", false}};
    json["pre_tokenizer"]["use_regex"] = false;
    json["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", {split, json["pre_tokenizer"]}}};
    return Tokenizer::parse(json.dump(), "test");
}

TEST(CorpusTest, CutsChangeNoToken) {
    const TemporaryFolder folder;
    std::mt19937 random(9);
    std::string text = "x = [\n";
    const auto until = [&](size_t size, const Strings& pieces) {
        while (text.size() < size) text += pieces[random() % pieces.size()];
    };
    while (text.size() < 2200000) text += "        " + std::to_string(random() % 10000) + ",\n";
    until(4400000, {"word,", "\n\n  ", "another", " ", "12", "  ", "\n\n\n", "don't"});
    until(6600000, {"世界", "，", "好", "。", "\n", "12", "他说：“", "？”"});
    until(8800000, {"привет", " ", "мир", ", ", ".\n", "e\u0301 ", " \u00a0"});
    write_file(folder / "a.txt", text);
    const std::vector<Part> parts = parts_of({folder / "a.txt"});
    EXPECT_GT(parts.size(), 8u);
    for (const Tokenizer& tokenizer : {sample_tokenizer(), with_llama3_pattern()}) {
        Ids ids;
        for (const Part& part : parts) {
            EXPECT_LE(part.text.size(), size_t(1) << 20);
            EXPECT_EQ(part.continues, &part != &parts[0]);
            const Ids more = tokenizer.encode(part.text);
            ids.insert(ids.end(), more.begin(), more.end());
        }
        EXPECT_TRUE(ids == tokenizer.encode(text));
    }
}

TEST(CorpusTest, APartGrowsUntilThereIsAPlaceToCut) {
    const TemporaryFolder folder;
    std::string text;
    while (text.size() < 3000000) text += "世界";
    text += " 好";
    const size_t first = text.size() - std::strlen(" 好");
    while (text.size() < 5000000) text += " ab";
    write_file(folder / "a.txt", text + "<|endoftext|>b");
    write_file(folder / "b.jsonl", nlohmann::json{{"text", text}}.dump());
    for (const char* name : {"a.txt", "b.jsonl"}) {
        const std::vector<Part> parts = parts_of({folder / name});
        ASSERT_GE(parts.size(), 2u);
        EXPECT_GE(parts[0].text.size(), first);
        EXPECT_LE(parts[1].text.size(), size_t(1) << 20);
        EXPECT_EQ(documents_of({folder / name})[0], text);
        Corpus corpus({folder / name}, "text");
        corpus.whole = true;
        Part part;
        ASSERT_TRUE(corpus.next(part));
        EXPECT_EQ(part.text, text);
    }
}

// A tokenizer whose words may reach across the places gets documents whole.
TEST(CorpusTest, CuttableIsWhatKeepsItsIds) {
    EXPECT_TRUE(sample_tokenizer().cuttable());
    EXPECT_TRUE(with_llama3_pattern().cuttable());
    const auto changed = [](const std::string& from, const std::string& to) {
        std::string json = sample_tokenizer().json;
        EXPECT_NE(json.find(from), json.npos);
        return Tokenizer::parse(json.replace(json.find(from), from.size(), to), "test");
    };
    EXPECT_FALSE(changed("\"use_regex\": true", "\"use_regex\": false").cuttable());
    EXPECT_FALSE(changed("\"add_prefix_space\": false", "\"add_prefix_space\": true").cuttable());
    const std::string special = "\"normalized\": false, \"special\": true}";
    const std::string two_words = R"(, {"id": 400, "content": "a b", "single_word": false, "lstrip": false, )";
    EXPECT_FALSE(changed(special, special + two_words + R"("rstrip": false, "normalized": false, "special": false})")
                     .cuttable());
}

TEST(CorpusTest, SkippingLeadsToTheSameParts) {
    const TemporaryFolder folder;
    write_file(folder / "a.txt", sample_text(2500000, 20) + "<|endoftext|>b<|endoftext|>" + sample_text(10, 21));
    write_gz(folder / "b.jsonl.gz",
             "{\"text\": \"c\"}\n\n" + nlohmann::json{{"text", sample_text(2500000, 22)}}.dump());
    write_zst(folder / "c.txt.zst", "d<|endoftext|>e");
    Corpus whole({folder.path}, "text");
    for (Part expected;;) {
        Corpus skipped({folder.path}, "text");
        skipped.skip_to(whole.file, whole.part);
        Part part;
        const bool more = whole.next(expected);
        ASSERT_EQ(skipped.next(part), more);
        if (!more) break;
        EXPECT_TRUE(part.text == expected.text && part.continues == expected.continues);
        EXPECT_EQ(skipped.progress(), whole.progress());
    }
}

TEST(CorpusTest, ErrorsNameFileAndLine) {
    const TemporaryFolder folder;
    const auto error = [&](const std::string& name, const std::string& content) {
        write_file(folder / name, content);
        return error_of([&] { documents_of({folder / name}); });
    };
    const auto has = [](const std::string& text, const std::string& what) {
        EXPECT_NE(text.find(what), text.npos) << text;
        EXPECT_EQ(text.find('\n'), text.npos) << text;
    };
    has(error("a.jsonl", "{\"text\": \"a\"}\n\n{\"text\": \"b\"\n"),
        "a.jsonl:3: not valid JSON: expected ',' or '}' at byte 13, found the end");
    has(error("a.jsonl", "{\"txt\": \"a\"}"), "a.jsonl:1: no field \"text\"");
    has(error("a.jsonl", "{\"text\": 5}"), "a.jsonl:1: the field \"text\" is not a string");
    has(error("a.jsonl", "[1]"), "a.jsonl:1: not a JSON object");
    has(error("a.jsonl", "\r\n{\"text\": \"é\xff\"}"),
        "a.jsonl:2: not valid JSON: expected UTF-8 at byte 13, found '\\xff'");
    has(error("a.json", "[{\"text\": \"a\"},\n{\"text\": 5}]"), "a.json:2: the field \"text\" is not a string");
    for (const char* rest : {"\n{}]", ",\n]", "\n]]", ",\n[]]", ",\n5]"})
        has(error("a.json", R"([{"text": "a"})" + std::string(rest)), "a.json:2: expected a list of objects");
    has(error("a.json", "[{\"text\": \"a\"},\n{\"text\": \"b\""), "a.json:2: the file ends within its list");
    has(error("a.txt.gz", "plain text"), "a.txt.gz: cannot be decompressed: not in gzip format");
    has(error("a.txt.zst", "plain text"), "a.txt.zst: cannot be decompressed: not in zstd format");
    has(error("a.txt", "\x28\xB5\x2F\xFDx"), "a.txt: zstd data");

    const std::string text = random_bytes(100000, 11);
    write_gz(folder / "b.txt.gz", text);
    write_zst(folder / "b.txt.zst", text);
    for (const char* name : {"b.txt.gz", "b.txt.zst"}) {
        const std::string whole = read_file(folder / name);
        for (const size_t size : {whole.size() / 3, whole.size() - 1})
            has(error(name, whole.substr(0, size)), std::string(name) + ": cannot be decompressed: it ends too early");
    }
    for (const char* name : {"c.txt.gz", "c.txt.zst"}) {
        (std::string(name).ends_with("gz") ? write_gz : write_zst)(folder / name, sample_text(100000, 12));
        std::string damaged = read_file(folder / name);
        damaged[damaged.size() / 3] ^= 0x55;
        has(error(name, damaged), std::string(name) + ": cannot be decompressed: damaged before byte ");
    }

    has(error("d.txt.gz", ""), "it is empty");
    has(error("d.jsonl.zst", ""), "it is empty");
    has(error_of([&] { documents_of({folder / "missing.txt"}); }), folder / "missing.txt: no such file");
    has(error_of([&] { documents_of({folder / "none*.txt"}); }), folder / "none*.txt: no such file");
    has(error("a.pdf", "x"), "a.pdf: unknown kind of file");
    fs::create_directories(folder / "empty");
    has(error_of([&] { documents_of({folder / "empty"}); }), "no text in the folder " + (folder / "empty"));
    fs::create_directories(folder / "empty/a.txt");
    has(error_of([&] { documents_of({folder / "empty"}); }), "no text in the folder");
    ASSERT_EQ(mkfifo((folder / "pipe.txt").c_str(), 0600), 0);
    has(error_of([&] { documents_of({folder / "pipe.txt"}); }), "pipe.txt: a pipe or device");
    fs::create_symlink("nowhere", folder / "link.txt");
    has(error_of([&] { documents_of({folder / "link.txt"}); }), "link.txt: No such file or directory");
    has(error("caf\xe9.jsonl", "x"), "caf\\xe9.jsonl:1: not valid JSON");
    write_file(folder / "good.txt", "good");
    EXPECT_EQ(error_of([&] {
                  documents_of({folder / "good.txt", folder / "c.txt.gz", folder / "caf\xe9.jsonl"});
              }).find(folder / "c.txt.gz: "),
              0u);
}

// Valid by RFC 8259: what Python's json reads, to the same text.
TEST(CorpusTest, ARecordIsValidIfJsonSaysSo) {
    const TemporaryFolder folder;
    const auto documents = [&](const std::string& lines) {
        write_file(folder / "a.jsonl", lines);
        return documents_of({folder / "a.jsonl"});
    };
    const std::string deep(100000, '['), closed(100000, ']');
    for (const std::string& other :
         {std::string("123456789012345678901234567890"), std::string("-9223372036854775809"), std::string("1e400"),
          std::string("-1E-400"), "1" + std::string(5000, '0'), std::string("0.5e+7"), deep + closed,
          deep + "1" + closed, std::string("{\"text\": \"b\", \"x\": [true, false, null, {}, [], \"\", {\"y\": 0}]}"),
          std::string("\"\\ud800\""), std::string(" \t\r[ ] ")}) {
        const std::string line = "{\"id\": " + other + ", \"text\": \"a\", \"id\":" + other + "}";
        EXPECT_EQ(documents(line), Strings{"a"}) << line.substr(0, 200);
    }
    EXPECT_EQ(documents(R"({"text":"\u0041\u00e9\u4E16\ud83d\uDC4d\"\\\/\b\f\n\r\t"})"),
              Strings{"Aé世👍\"\\/\b\f\n\r\t"});
    EXPECT_EQ(documents(R"({"text":"a\u0000b"})"), Strings{std::string("a\0b", 3)});
    EXPECT_EQ(documents(R"({"text":"cut off \ud83d"})"), Strings{"cut off \uFFFD"});
    EXPECT_EQ(documents(R"({"text":"\ud83d\ud83d\udc4d\udc4d\ud83dx\ud83d\n\ud83d\u0041"})"),
              Strings{"\uFFFD👍\uFFFD\uFFFDx\uFFFD\n\uFFFDA"});
    EXPECT_EQ(documents(R"({"te\u0078t": "last", "Text": "no"})"), Strings{"last"});
    EXPECT_EQ(documents(R"({"text": 5, "text": "first", "text": "last"})"), Strings{"last"});
    EXPECT_EQ(documents("\xEF\xBB\xBF{\"text\": \"a\"}\r\n\r\n \t\n\xEF\xBB\xBF\n\xEF\xBB\xBF{\"text\": \"b\"}"),
              (Strings{"a", "b"}));
    const std::string large = sample_text(5000000, 40);
    EXPECT_TRUE(documents(nlohmann::json{{"text", large}}.dump() + "\n{\"text\": \"b\"}") == (Strings{large, "b"}));

    for (const char* const broken : {"{\"text\": \"a\"",
                                     "{\"text\": \"a\",}",
                                     "{\"text\": \"a\"} x",
                                     "{\"text\": \"a\"}{}",
                                     "{\"text\": \"a}",
                                     "{\"text\" \"a\"}",
                                     "{text: \"a\"}",
                                     "{'text': 'a'}",
                                     "{\"text\": \"a\", \"x\": 01}",
                                     "{\"text\": \"a\", \"x\": 1.}",
                                     "{\"text\": \"a\", \"x\": .5}",
                                     "{\"text\": \"a\", \"x\": +1}",
                                     "{\"text\": \"a\", \"x\": 1e}",
                                     "{\"text\": \"a\", \"x\": -}",
                                     "{\"text\": \"a\", \"x\": tru}",
                                     "{\"text\": \"a\", \"x\": nulll}",
                                     "{\"text\": \"a\", \"x\": NaN}",
                                     "{\"text\": \"a\", \"x\": [1,]}",
                                     "{\"text\": \"a\", \"x\": [,]}",
                                     "{\"text\": \"a\", \"x\": [1 2]}",
                                     "{\"text\": \"a\", \"x\": [1}}",
                                     "{\"text\": \"a\", \"x\": {1: 2}}",
                                     "{\"text\": \"a\", \"x\": {\"y\"}}",
                                     "{\"text\": \"a\", \"x\": ]}",
                                     "{\"text\": \"a\tb\"}",
                                     "{\"text\": \"\\x41\"}",
                                     "{\"text\": \"\\u00g0\"}",
                                     "{\"text\": \"\\ud83d\\u1\"}",
                                     "{\"text\": \"\\",
                                     "{\"text\": \"\\u00",
                                     "{",
                                     "\"",
                                     "\xEF\xBB",
                                     "x",
                                     "{\"text\": \"a\", \"x\": \"\xc3\"}",
                                     "{\"text\": \"a\", \"x\": \"\xed\xa0\x80\"}"}) {
        const std::string message = error_of([&] { documents("{\"text\": \"good\"}\n" + std::string(broken) + "\n"); });
        EXPECT_NE(message.find("a.jsonl:2: not valid JSON: expected "), message.npos) << broken << ": " << message;
    }
}

TEST(CorpusTest, TextInAnotherEncodingIsNoticed) {
    const TemporaryFolder folder;
    const auto wide = [](const std::string& text, bool big_endian) {  // UTF-16 of characters below U+10000
        std::string out;
        for (size_t i = 0; i < text.size(); i += character_at(&text[i]).length) {
            const uint32_t c = character_at(&text[i]).code_point;
            for (const uint32_t byte : {big_endian ? c >> 8 : c & 0xFF, big_endian ? c & 0xFF : c >> 8})
                out += char(byte);
        }
        return out;
    };
    const auto open = [&](const std::string& name, const std::string& content) {
        const auto write = name.ends_with(".gz") ? write_gz
                           : name.ends_with(".zst")
                               ? write_zst
                               : [](const std::string& path, const std::string& text) { write_file(path, text); };
        write(folder / name, content);
        return error_of([&] { Corpus({folder / name}, "text"); });
    };
    std::string russian = "Все счастливые семьи похожи друг на друга, ", chinese;
    for (int i = 0; i < 60; ++i) chinese += "世界上有很多不同的文字他们都很美丽。\n";
    for (const std::string& text :
         {std::string("hi"), std::string("A first line.\nAnd a second.\n"), russian, chinese}) {
        for (const bool big : {false, true}) {
            const std::string content = wide(text, big), mark = wide("\uFEFF", big), order = big ? "BE" : "LE";
            EXPECT_EQ(open("a.txt", content),
                      folder / "a.txt: text in UTF-16" + order + ", where UTF-8 is expected; convert it: cat '" +
                          folder.path.string() + "/a.txt' | iconv -f UTF-16" + order + " -t UTF-8 > utf8.txt");
            EXPECT_NE(open("a.txt", mark + content).find("| iconv -f UTF-16 -t"), std::string::npos);
            EXPECT_NE(
                open("b.jsonl.gz", content).find("zcat '" + (folder / "b.jsonl.gz") + "' | iconv -f UTF-16" + order),
                std::string::npos);
            EXPECT_NE(open("c.txt.zst", content).find("zstdcat '"), std::string::npos);
        }
    }
    EXPECT_NE(open("a.txt", std::string("\xFF\xFE\0\0h\0\0\0", 8)).find("iconv -f UTF-32 "), std::string::npos);
    // The bytes that malformed or zero-separated text may have.
    for (const std::string& text : {std::string("\xff"), std::string("a\0b\0", 4) + sample_text(2000, 41),
                                    random_bytes(10000, 42), std::string(100, '\0'), std::string("a")}) {
        write_file(folder / "a.txt", text);
        EXPECT_EQ(documents_of({folder / "a.txt"}), Strings{text});
    }
    // A byte order mark of UTF-8 is no text; elsewhere in a file it is a character like any other.
    const std::string mark = "\uFEFF";
    for (const char* name : {"a.txt", "a.txt.gz", "a.txt.zst"}) {
        open(name, mark + "a" + mark + "<|endoftext|>" + mark + "b");
        EXPECT_EQ(documents_of({folder / name}), (Strings{"a" + mark, mark + "b"}));
    }
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
        writer.commit({}, {});
        const std::string bytes = read_file(folder / "train_000000.bin");
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
    writer.commit({}, {});
    EXPECT_EQ(read_tokens(folder / "train_000000.bin"), (Ids{1, 2, 3, 4}));
    EXPECT_EQ(read_tokens(folder / "train_000001.bin"), (Ids{5, 6, 7, 8}));
    EXPECT_EQ(read_tokens(folder / "train_000002.bin"), (Ids{9, 10, 11, 12}));
    EXPECT_EQ(read_tokens(folder / "val_000000.bin"), (Ids{9}));
    EXPECT_FALSE(fs::exists(folder / "train_000003.bin"));
}

TEST(Shards, EarlierOnesGoOnlyAfterSuccess) {
    const TemporaryFolder folder;
    for (const char* name : {"train_000000.bin", "train_000005.bin", "val_000001.bin", "train_notes.bin"})
        write_file(folder / name, "old");
    {
        ShardWriter abandoned(folder.path, 1000, 4);
        abandoned.write(ShardWriter::train, {1, 2, 3, 4, 5});
    }
    EXPECT_EQ(read_file(folder / "train_000000.bin"), "old");
    EXPECT_EQ(read_file(folder / "train_000005.bin"), "old");
    EXPECT_FALSE(fs::exists(folder / "train_000000.bin.tmp"));
    ShardWriter writer(folder.path, 1000, 4);
    writer.write(ShardWriter::train, {1});
    writer.commit({}, {});
    EXPECT_EQ(read_tokens(folder / "train_000000.bin"), (Ids{1}));
    EXPECT_FALSE(fs::exists(folder / "train_000005.bin") || fs::exists(folder / "val_000001.bin"));
    EXPECT_TRUE(fs::exists(folder / "train_notes.bin"));
}

TEST(Shards, AnInterruptedJobGoesOnAtItsCheckpoint) {
    const TemporaryFolder folder;
    for (const size_t vocab_size : {1000, 100000}) {
        const auto interrupt = [&] {
            ShardWriter writer(folder.path, vocab_size, 4, "job");
            writer.write(ShardWriter::train, {1, 2, 3, 4, 5});
            writer.write(ShardWriter::val, {100});
            writer.checkpoint(17);
            writer.write(ShardWriter::train, {8, 8, 8, 8, 8});  // what comes after the checkpoint is forgotten
            writer.write(ShardWriter::val, {800});
        };
        interrupt();
        EXPECT_FALSE(fs::exists(folder / "train_000000.bin") && vocab_size == 1000);
        EXPECT_TRUE(fs::exists(folder / "train_000002.bin.tmp"));
        {
            ShardWriter writer(folder.path, vocab_size, 4, "job");
            EXPECT_EQ(writer.resumed, 17);
            EXPECT_FALSE(fs::exists(folder / "train_000002.bin.tmp"));
            writer.write(ShardWriter::train, {6, 7, 8, 9});
            writer.write(ShardWriter::val, {101});
            writer.commit(18, {});
        }
        EXPECT_EQ(read_tokens(folder / "train_000000.bin"), (Ids{1, 2, 3, 4}));
        EXPECT_EQ(read_tokens(folder / "train_000001.bin"), (Ids{5, 6, 7, 8}));
        EXPECT_EQ(read_tokens(folder / "train_000002.bin"), (Ids{9}));
        EXPECT_EQ(read_tokens(folder / "val_000000.bin"), (Ids{100, 101}));
        for (const char* name : {"train_000000.bin", "train_000001.bin", "val_000000.bin"})
            EXPECT_EQ(recorded_crc32(folder / name), read_shard(folder / name, [](const Ids&) {})) << name;

        // Another job, or files that are not what the checkpoint says: from the start.
        const auto starts_over = [&](const std::string& job) {
            ShardWriter writer(folder.path, vocab_size, 4, job);
            EXPECT_TRUE(writer.resumed.is_null());
            EXPECT_TRUE(writer.discarded);
            EXPECT_FALSE(fs::exists(folder / "train_000001.bin.tmp"));
            EXPECT_FALSE(fs::exists(folder / "resume.json"));
        };
        interrupt();
        starts_over("another job");
        interrupt();
        fs::resize_file(folder / "train_000000.bin.tmp", 1025);
        starts_over("job");
        interrupt();
        fs::remove(folder / "val_000000.bin.tmp");
        starts_over("job");
        interrupt();
        std::string damaged = read_file(folder / "train_000001.bin.tmp");
        damaged[1024] ^= 1;
        write_file(folder / "train_000001.bin.tmp", damaged);
        starts_over("job");
        interrupt();
        write_file(folder / "resume.json", "{\"job\": \"job\"}");
        starts_over("job");
    }
}

TEST(Shards, AnInterruptedCommitIsCompleted) {
    for (int renamed = 0; renamed <= 3; ++renamed) {
        const TemporaryFolder folder;
        const Strings names = {"train_000000.bin", "train_000001.bin", "val_000000.bin"};
        {
            ShardWriter writer(folder.path, 1000, 4, "job");
            writer.write(ShardWriter::train, {1, 2, 3, 4, 5});
            writer.write(ShardWriter::val, {100});
            writer.close(ShardWriter::train);
            writer.close(ShardWriter::val);
            writer.checkpoint(17);
        }
        // Either some of the old shards are still there, or some of the new ones are renamed.
        for (const char* old : {"train_000001.bin", "train_000002.bin"}) {
            if (renamed == 0) std::ofstream(folder / old) << std::string(1026, 'o');
        }
        for (int i = 0; i < renamed; ++i) fs::rename(folder / (names[i] + ".tmp"), folder / names[i]);
        ShardWriter writer(folder.path, 1000, 4, "job");
        EXPECT_EQ(writer.resumed, 17);
        writer.commit(17, {});
        EXPECT_EQ(read_tokens(folder / names[0]), (Ids{1, 2, 3, 4}));
        EXPECT_EQ(read_tokens(folder / names[1]), (Ids{5}));
        EXPECT_EQ(read_tokens(folder / names[2]), (Ids{100}));
        Strings left;
        for (const auto& entry : fs::directory_iterator(folder.path)) left.push_back(entry.path().filename());
        std::sort(left.begin(), left.end());
        EXPECT_EQ(left, (Strings{"shards.json", names[0], names[1], names[2]}));
    }
}

TEST(Shards, TwoWritersInOneFolderAreRefused) {
    const TemporaryFolder folder;
    ShardWriter first(folder.path, 1000, 4);
    EXPECT_NE(error_of([&] { ShardWriter second(folder.path, 1000, 4); }).find("another tokenize is writing"),
              std::string::npos);
    EXPECT_TRUE(fs::exists(folder / "train_000000.bin.tmp"));
}

TEST(Shards, ForeignAndShortFilesAreSaid) {
    const TemporaryFolder folder;
    write_file(folder / "a.bin", "hello");
    EXPECT_NE(error_of([&] { read_tokens(folder / "a.bin"); }).find("a.bin: "), std::string::npos);
    ShardWriter writer(folder.path, 1000, 4);
    writer.write(ShardWriter::train, {1, 2});
    writer.commit({}, {});
    fs::resize_file(folder / "train_000000.bin", 1026);
    EXPECT_NE(error_of([&] { read_tokens(folder / "train_000000.bin"); }).find("2 tokens need 1028"),
              std::string::npos);
}

// ---------------------------------------------------------------------------------------------------------------------
// Conversations

static const Tokenizer& chat_tokenizer() {
    static const Tokenizer tokenizer = [] {
        WordCounts counts;
        count_words(untrained_tokenizer(), sample_text(20000, 1), counts);
        return train_bpe(
            counts, 400,
            {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"});
    }();
    return tokenizer;
}

// The text of a conversation's tokens, [] around the answers.
static std::string marked(const EncodedConversation& conversation, const Tokenizer& tokenizer) {
    std::string text;
    size_t at = 0;
    const auto write_to = [&](size_t end) {
        text += tokenizer.decode({conversation.tokens.begin() + at, conversation.tokens.begin() + end});
        at = end;
    };
    for (const auto& [begin, end] : conversation.answers) {
        write_to(begin);
        text += "[";
        write_to(end);
        text += "]";
    }
    write_to(conversation.tokens.size());
    return text;
}

static std::string written(const std::string& json, const std::string& name) {
    WordCache cache;
    return marked(ChatTemplate(name, chat_tokenizer(), "t.json").encode(read_conversation(json), cache),
                  chat_tokenizer());
}

TEST(Conversations, AreWrittenOutByTheirTemplate) {
    const std::string talk =
        R"({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi\n"},
        {"role": "assistant", "content": " Ho "}, {"role": "user", "content": "<|im_end|>"}, {"content": "", "role": "assistant"}]})";
    EXPECT_EQ(written(talk, "chatml"),
              "<|endoftext|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi\n<|im_end|>\n"
              "<|im_start|>assistant\n[ Ho <|im_end|>]\n<|im_start|>user\n<|im_end|><|im_end|>\n"
              "<|im_start|>assistant\n[<|im_end|>]\n");
    EXPECT_EQ(written(talk, "llama3"),
              "<|endoftext|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
              "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n[Ho<|eot_id|>]"
              "<|start_header_id|>user<|end_header_id|>\n\n<|im_end|><|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n[<|eot_id|>]");
    EXPECT_EQ(written(R"({"question": "\u00a0 Who\u2003?\n\u3000", "answer": "\u2028"})", "llama3"),
              "<|endoftext|><|start_header_id|>user<|end_header_id|>\n\nWho\u2003?<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n[<|eot_id|>]")
        << "the blanks are Python's";
    EXPECT_EQ(written(talk, "alpaca"),
              "<|endoftext|>Be brief.\n\n### Instruction:\n Hi\n\n\n### Response:\n[ Ho <|endoftext|>]"
              "\n\n### Instruction:\n<|im_end|>\n\n### Response:\n[<|endoftext|>]");
    EXPECT_EQ(written(talk, "plain"), "<|endoftext|>Be brief.\n Hi\n\n[ Ho <|endoftext|>]<|im_end|>\n[<|endoftext|>]");

    const std::string task = R"({"instruction": "Add", "input": "2, 3", "output": "5", "answer": "no"})";
    EXPECT_EQ(written(task, "alpaca"),
              "<|endoftext|>Below is an instruction that describes a task, paired with an input that provides further "
              "context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd\n\n"
              "### Input:\n2, 3\n\n### Response:\n[5<|endoftext|>]");
    EXPECT_EQ(written(task, "plain"), "<|endoftext|>Add\n2, 3\n[5<|endoftext|>]");
    EXPECT_EQ(
        written(R"({"instruction": "Sing", "input": null, "output": "la"})", "alpaca"),
        "<|endoftext|>Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\nSing\n\n### Response:\n[la<|endoftext|>]");
    EXPECT_EQ(written(R"({"question": "Who?", "answer": "Me", "id": 1e999})", "plain"),
              "<|endoftext|>Who?\n[Me<|endoftext|>]");
    EXPECT_EQ(written(R"({"prompt": "The sky is", "completion": " blue"})", "plain"),
              "<|endoftext|>The sky is[ blue<|endoftext|>]");
    EXPECT_EQ(written(R"({"prompt": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"},
                          {"role": "user", "content": "3"}], "completion": [{"role": "assistant", "content": "4"}]})",
                      "plain"),
              "<|endoftext|>1\n2<|endoftext|>3\n[4<|endoftext|>]");
}

// A text has the ids that it has alone, and no special token that it only names.
TEST(Conversations, HaveTheIdsOfTheirTexts) {
    const Tokenizer& tokenizer = chat_tokenizer();
    const std::string question = sample_text(300, 51) + "<|im_end|>", answer = sample_text(200, 52);
    WordCache cache;
    const EncodedConversation found =
        ChatTemplate("chatml", tokenizer, "t.json")
            .encode(read_conversation(nlohmann::json{{"question", question}, {"answer", answer}}.dump()), cache);
    Ids expected = {tokenizer.added_tokens.at("<|endoftext|>")};
    const auto add = [&](const std::string& text, Special special) {
        tokenizer.encode(text, special, cache, expected);
    };
    add("<|im_start|>", Special::parse);
    add("user\n" + question, Special::as_text);
    add("<|im_end|>\n<|im_start|>assistant\n", Special::parse);
    const size_t begin = expected.size();
    add(answer, Special::as_text);
    add("<|im_end|>\n", Special::parse);
    EXPECT_EQ(found.tokens, expected);
    ASSERT_EQ(found.answers.size(), 1u);
    EXPECT_EQ(found.answers[0].begin, begin);
    EXPECT_EQ(found.answers[0].end, expected.size() - 1);
}

TEST(Conversations, WhatIsNoneIsRefused) {
    const auto says = [](const std::string& json, const std::string& name = "plain") {
        return error_of([&] { written(json, name); });
    };
    EXPECT_EQ(says(R"({"query": "a", "reply": "b"})"),
              "no conversation: expected \"messages\", or \"prompt\" and \"completion\", or \"instruction\" and "
              "\"output\", or \"question\" and \"answer\", found \"query\", \"reply\"");
    EXPECT_NE(says("[]").find("not a JSON object"), std::string::npos);
    EXPECT_NE(says(R"({"question": "a", "answer": )").find("not valid JSON"), std::string::npos);
    EXPECT_EQ(says(R"({"question": "a", "answer": 5})"), "\"answer\": expected a string, found a number");
    EXPECT_EQ(says(R"({"prompt": "a", "completion": null})"), "\"completion\": expected a string, found null");
    EXPECT_EQ(says(R"({"messages": "hi"})"), "\"messages\": expected a list, found a string");
    EXPECT_EQ(says(R"({"messages": [{"role": "user", "content": "a"}, {"content": "b"}]})"),
              "\"messages\", entry 2: no field \"role\"");
    EXPECT_EQ(says(R"({"messages": [{"role": "user", "content": ["a"]}]})"),
              "\"messages\", entry 1: \"content\": expected a string, found a list");
    EXPECT_NE(says(R"({"messages": [{"role": "tool", "content": "a"}]})", "alpaca").find("\"tool\" has no place"),
              std::string::npos);
    for (const auto& [name, token] : {std::pair{"chatml", "<|im_start|>"}, {"llama3", "<|start_header_id|>"}}) {
        EXPECT_NE(error_of([&] {
                      ChatTemplate(name, sample_tokenizer(), "t.json");
                  }).find(std::string("t.json: no token ") + token),
                  std::string::npos);
    }
    EXPECT_EQ(ChatTemplate::usual(sample_tokenizer()), "plain");
    EXPECT_EQ(ChatTemplate::usual(chat_tokenizer()), "chatml");
}

static std::vector<Answer> answers_of(const std::string& shard) {
    const auto targets = read_targets(shard, read_shard_header(open_shard_file(shard)).tokens);
    return targets ? targets->answers : std::vector<Answer>();
}

static std::vector<std::array<uint32_t, 3>> words_of(const std::vector<Answer>& answers) {
    std::vector<std::array<uint32_t, 3>> words;
    for (const Answer& a : answers) words.push_back({a.conversation, a.begin, a.end});
    return words;
}

TEST(Conversations, StayWholeInTheirShards) {
    using Words = std::vector<std::array<uint32_t, 3>>;
    for (const bool interrupted : {false, true}) {
        const TemporaryFolder folder;
        const auto open = [&] { return std::make_unique<ShardWriter>(folder.path, 1000, 8, "job"); };
        auto writer = open();
        writer->write(ShardWriter::train, EncodedConversation{{0, 1, 2, 3, 4}, {{1, 2}, {3, 5}}});
        writer->write(ShardWriter::train, EncodedConversation{{0, 1, 2}, {{2, 3}}});
        if (interrupted) {
            writer->checkpoint(17);
            writer->write(ShardWriter::train, EncodedConversation{{0, 9, 9}, {{1, 2}}});  // is forgotten
            writer.reset();
            writer = open();
            EXPECT_EQ(writer->resumed, 17);
        }
        writer->write(ShardWriter::train, EncodedConversation{{0, 7, 8}, {{1, 3}}});
        writer->write(ShardWriter::train, EncodedConversation{Ids(20, 5), {{1, 20}}});  // longer than a shard
        writer->commit(18, {});
        EXPECT_EQ(read_tokens(folder / "train_000000.bin"), (Ids{0, 1, 2, 3, 4, 0, 1, 2}));
        EXPECT_EQ(read_tokens(folder / "train_000001.bin"), (Ids{0, 7, 8}));
        EXPECT_EQ(read_tokens(folder / "train_000002.bin"), Ids(20, 5));
        EXPECT_EQ(words_of(answers_of(folder / "train_000000.bin")), (Words{{0, 1, 2}, {0, 3, 5}, {5, 7, 8}}));
        EXPECT_EQ(words_of(answers_of(folder / "train_000001.bin")), (Words{{0, 1, 3}}));
        EXPECT_EQ(words_of(answers_of(folder / "train_000002.bin")), (Words{{0, 1, 20}}));
        EXPECT_FALSE(fs::exists(folder / "train_000002.targets.tmp"));
        // Documents that take their place take the targets away.
        writer.reset();
        writer = open();
        writer->write(ShardWriter::train, {1, 2, 3});
        writer->commit({}, {});
        EXPECT_FALSE(fs::exists(folder / "train_000000.targets") || fs::exists(folder / "train_000002.targets"));
        EXPECT_FALSE(read_targets(folder / "train_000000.bin", 3));
    }
}

TEST(Conversations, DamagedTargetsAreRefused) {
    const TemporaryFolder folder;
    {
        ShardWriter writer(folder.path, 1000, 100);
        for (const uint32_t token : {7, 8}) writer.write(ShardWriter::train, {{0, 1, 2, token}, {{2, 4}}});
        writer.commit({}, {});
    }
    const std::string shard = folder / "train_000000.bin", path = folder / "train_000000.targets";
    const std::string good = read_file(path), list = read_file(folder / "shards.json");
    ASSERT_EQ(good.size(), 32 + 2 * 12u);
    const auto says = [&](const std::string& bytes, const std::string& what) {
        write_file(path, bytes);
        const std::string error = error_of([&] { read_targets(shard, 8); });
        EXPECT_TRUE(error.starts_with(path + ": " + what)) << error;
    };
    // `answer`: a number of an answer, under a checksum that is right.
    const auto changed = [&](size_t word, uint32_t value, bool answer = false) {
        std::string bytes = good;
        std::memcpy(&bytes[4 * word], &value, 4);
        const uint32_t crc = crc32_of(0, &bytes[32], bytes.size() - 32);
        if (answer) std::memcpy(&bytes[4 * 5], &crc, 4);
        return bytes;
    };
    EXPECT_EQ(answers_of(shard).size(), 2u);
    says(good.substr(0, 31), "truncated");
    says(good.substr(0, 55), "truncated: 55 bytes, but 2 answers need 56");
    says(good + "x", "too long: 57 bytes");
    says(changed(0, 20240520), "expected magic number 20261126, found 20240520");
    says(changed(1, 2), "expected version 1, found 2");
    says(changed(2, 9), "belongs to another shard: one of 9 tokens");
    says(changed(4, 0xFFFFFFFF), "truncated");
    says(changed(9, 1), "damaged: the checksum of its answers is not that in its header");
    says(changed(9, 1, true), "damaged: the checksum of its answers is not that in the shards.json");
    fs::remove(path);
    EXPECT_TRUE(error_of([&] { read_targets(shard, 8); }).starts_with(path + ": missing"));
    fs::remove(folder / "shards.json");
    EXPECT_FALSE(read_targets(shard, 8));
    for (const auto& [word, value] : {std::pair{8, 2}, {9, 5}, {10, 2}, {10, 9}, {11, 3}, {12, 4}, {13, 9}, {8, 3}})
        says(changed(word, value, true), "damaged: no answer can be");
    write_file(path, changed(3, 5));  // another checksum of the tokens
    sample_tokenizer().save(folder / "t.json");
    EXPECT_NE(tokenize({"stats", "--tokenizer", folder / "t.json", shard}).err.find("belongs to another shard"),
              std::string::npos);
}

TEST(Conversations, AreEncodedByTheCommand) {
    const TemporaryFolder folder;
    chat_tokenizer().save(folder / "t.json");
    const std::string t = folder / "t.json", out = folder / "out", file = folder / "a.jsonl";
    std::string lines = R"({"messages": [{"role": "user", "content": "nobody answers"}]})"
                        "\n\n";
    int64_t targets = 0;
    WordCache cache;
    const ChatTemplate chatml("chatml", chat_tokenizer(), t);
    for (int i = 0; i < 40; ++i) {
        const std::string line =
            nlohmann::json{{"question", sample_text(5000, 60)}, {"answer", sample_text(i, i)}}.dump();
        lines += line + "\n";
        for (const auto& [begin, end] : chatml.encode(read_conversation(line), cache).answers)
            targets += int64_t(end - begin);
    }
    write_file(file, lines);
    const Strings arguments = {"encode", "--tokenizer", t, "--out", out, "--val-fraction", "0.2", file};
    const Outcome outcome = tokenize(arguments);
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    for (const char* what : {"by --template chatml", "40 conversations", "left out 1 conversations"})
        EXPECT_NE(outcome.err.find(what), std::string::npos) << outcome.err;
    // Questions that all begin with the same text are still divided.
    EXPECT_GT(answers_of(out + "/val_000000.bin").size(), 1u);
    EXPECT_EQ(answers_of(out + "/val_000000.bin").size() + answers_of(out + "/train_000000.bin").size(), 40u);

    testing::internal::CaptureStdout();
    std::vector<std::string> words = {
        "tokenize", "stats", "--tokenizer", t, out + "/train_000000.bin", out + "/val_000000.bin"};
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    EXPECT_EQ(tokenize_main(int(argv.size()), argv.data()), 0);
    const std::string table = testing::internal::GetCapturedStdout();
    long long tokens, conversations, counted;
    const size_t total = table.rfind('\n', table.find("  all\n"));
    ASSERT_EQ(std::sscanf(&table[total], " %lld %lld %lld", &tokens, &conversations, &counted), 3) << table;
    EXPECT_EQ(conversations, 40);
    EXPECT_EQ(counted, targets);

    const auto refused = [&](const std::string& text, const std::string& name, const std::string& what) {
        write_file(folder / name, text);
        const Outcome outcome =
            tokenize({"encode", "--tokenizer", t, "--out", folder / "other", "--template", "plain", folder / name});
        EXPECT_EQ(outcome.code, 1);
        EXPECT_NE(outcome.err.find(folder / name + what), std::string::npos) << outcome.err;
    };
    refused("a text", "a.txt", ": text, where conversations are expected");
    refused(lines + "{}\n", "b.jsonl", ":43: no conversation");
    refused(R"({"question": "a", "answer": "b"})", "c.jsonl", ": one conversation");
    write_file(folder / "d.jsonl",
               R"({"messages": [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]})");
    const Outcome unanswered = tokenize({"encode", "--tokenizer", t, "--out", folder / "other", "--template", "plain",
                                         "--val-fraction", "0", folder / "d.jsonl"});
    EXPECT_EQ(unanswered.code, 1);
    EXPECT_NE(unanswered.err.find("d.jsonl: no conversation has an answer"), std::string::npos) << unanswered.err;
    EXPECT_EQ(tokenize({"encode", "--tokenizer", t, "--out", out, "--template", "zephyr", file}).code, 2);
}

// ---------------------------------------------------------------------------------------------------------------------
// The command

TEST(Command, TrainsEncodesAndDecodes) {
    const TemporaryFolder folder;
    const Strings documents = {sample_text(3000, 13), sample_text(2000, 14), sample_text(4000, 15)};
    std::string jsonl;
    for (const std::string& document : documents) jsonl += nlohmann::json{{"body", document}}.dump() + "\n";
    write_file(folder / "a.jsonl", jsonl);
    const std::string tokenizer_path = folder / "new/t.json", out = folder / "out";
    ASSERT_EQ(
        tokenize({"train", "--vocab-size", "300", "--field", "body", "--out", tokenizer_path, folder / "a.jsonl"}).code,
        0);
    ASSERT_EQ(
        tokenize({"encode", "--tokenizer", tokenizer_path, "--field", "body", "--out", out, folder / "a.jsonl"}).code,
        0);
    EXPECT_EQ(read_file(out + "/tokenizer.json"), read_file(tokenizer_path));

    const Tokenizer tokenizer = Tokenizer::load(tokenizer_path);
    EXPECT_EQ(tokenizer.vocab_size(), 300u);
    const std::string start = "<|endoftext|>";
    const std::string train = tokenizer.decode(read_tokens(out + "/train_000000.bin")),
                      val = tokenizer.decode(read_tokens(out + "/val_000000.bin"));
    const auto at = std::find(documents.begin(), documents.end(), val.substr(start.size()));
    ASSERT_NE(at, documents.end());
    std::string rest;
    for (const std::string& document : documents) rest += document == *at ? "" : start + document;
    EXPECT_EQ(train, rest);

    testing::internal::CaptureStdout();
    decode(tokenizer_path, {out + "/val_000000.bin", out + "/train_000000.bin"});
    EXPECT_EQ(testing::internal::GetCapturedStdout(), val + train);
}

// The documents of a split, each of which begins with the start token.
static Strings documents_in(const std::string& shard) {
    const std::string text = sample_tokenizer().decode(read_tokens(shard)), start = "<|endoftext|>";
    EXPECT_TRUE(text.starts_with(start));
    Strings documents;
    for (size_t at = 0; at < text.size();) {
        const size_t begin = at + start.size();
        at = std::min(text.find(start, begin), text.size());
        documents.push_back(text.substr(begin, at - begin));
    }
    return documents;
}

struct Sides {
    Strings train, val;
};

static Sides split(const TemporaryFolder& folder, const Strings& documents, const Strings& options) {
    std::string jsonl;
    for (const std::string& document : documents) jsonl += nlohmann::json{{"text", document}}.dump() + "\n";
    write_file(folder / "split.jsonl", jsonl);
    sample_tokenizer().save(folder / "t.json");
    Strings arguments = {"encode", "--tokenizer", folder / "t.json", "--out", folder / "split"};
    arguments.insert(arguments.end(), options.begin(), options.end());
    arguments.push_back(folder / "split.jsonl");
    const Outcome outcome = tokenize(arguments);
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    return {documents_in(folder / "split/train_000000.bin"), documents_in(folder / "split/val_000000.bin")};
}

TEST(Command, AHashOfSeedAndDocumentChoosesValidationText) {
    const TemporaryFolder folder;
    Strings documents;
    for (int i = 0; i < 2000; ++i) documents.push_back(std::to_string(i) + " " + sample_text(i % 40, i));
    documents[77] = sample_text(3000000, 23);  // of several parts
    const Sides sides = split(folder, documents, {"--val-fraction", "0.1"});
    EXPECT_NEAR(double(sides.val.size()), 200, 4 * std::sqrt(2000 * 0.1 * 0.9));
    Strings merged;  // each document is on one side, in order
    for (size_t t = 0, v = 0; const std::string& document : documents) {
        const bool is_val = v < sides.val.size() && sides.val[v] == document;
        merged.push_back(is_val ? sides.val[v++] : t < sides.train.size() ? sides.train[t++] : "");
    }
    EXPECT_TRUE(merged == documents);
    EXPECT_EQ(sides.train.size() + sides.val.size(), documents.size());

    EXPECT_TRUE(split(folder, documents, {"--val-fraction", "0.1", "--seed", "1"}).val == sides.val);
    const Strings other = split(folder, documents, {"--val-fraction", "0.1", "--seed", "2"}).val;
    const std::set<std::string> known(sides.val.begin(), sides.val.end());
    const auto common = std::count_if(other.begin(), other.end(), [&](auto& d) { return known.contains(d); });
    EXPECT_NEAR(double(common), 20, 4 * std::sqrt(20.0));

    std::reverse(documents.begin(), documents.end());  // and where a document stands does not matter
    Strings reversed = split(folder, documents, {"--val-fraction", "0.1"}).val;
    std::reverse(reversed.begin(), reversed.end());
    EXPECT_TRUE(reversed == sides.val);
}

TEST(Command, AFewDocumentsAreDividedWhole) {
    const TemporaryFolder folder;
    for (int i = 0; i < 40; ++i) {
        const Strings documents = {"a" + std::to_string(i), "b", "c"};
        for (const char* fraction : {"0.0001", "0.5"}) {
            const Sides sides = split(folder, documents, {"--val-fraction", fraction});
            EXPECT_GE(sides.train.size(), 1u);
            EXPECT_GE(sides.val.size(), 1u);
            EXPECT_EQ(sides.train.size() + sides.val.size(), 3u);
        }
    }
}

TEST(Command, ASingleDocumentGivesItsEnd) {
    const TemporaryFolder folder;
    sample_tokenizer().save(folder / "t.json");
    const Strings encode = {"encode", "--tokenizer", folder / "t.json", "--out", folder / "out", folder / "a.txt"};
    const auto with = [&](Strings options) {
        options.insert(options.begin(), encode.begin(), encode.end());
        return tokenize(options);
    };
    for (const size_t size : {16, 100, 10000, 100000, 4000000}) {
        const std::string text = sample_text(size, 16);
        write_file(folder / "a.txt", text);
        const Outcome outcome = with({"--val-fraction", "0.02"});
        ASSERT_EQ(outcome.code, 0) << outcome.err;
        EXPECT_NE(outcome.err.find("single document"), std::string::npos) << outcome.err;
        const Strings train = documents_in(folder / "out/train_000000.bin"),
                      val = documents_in(folder / "out/val_000000.bin");
        ASSERT_EQ(train.size(), 1u);
        ASSERT_EQ(val.size(), 1u);
        EXPECT_EQ(train[0] + val[0], text);
        const double expected = std::max({0.02 * double(size), std::min(double(size) / 10, 16384.0), 1.0});
        EXPECT_NEAR(double(val[0].size()), expected, size < 1000 ? double(size) / 2 : 40);
    }
    ASSERT_EQ(with({"--val-fraction", "0"}).code, 0);
    EXPECT_FALSE(fs::exists(folder / "out/val_000000.bin"));
    // The same document many times over is no choice either.
    write_file(folder / "a.txt",
               "ab<|endoftext|>ab<|endoftext|>ab<|endoftext|>ab<|endoftext|>ab<|endoftext|>ab"
               "<|endoftext|>ab<|endoftext|>ab<|endoftext|>ab<|endoftext|>ab");
    ASSERT_EQ(with({"--val-fraction", "0.2"}).code, 0);
    EXPECT_EQ(documents_in(folder / "out/train_000000.bin"), Strings(8, "ab"));
    EXPECT_EQ(documents_in(folder / "out/val_000000.bin"), Strings(2, "ab"));
}

// However long it is, and wherever it may be cut for threads.
TEST(Command, ADocumentHasTheIdsOfItsText) {
    const TemporaryFolder folder;
    const std::string text = "a " + std::string(1500000, 'a') + sample_text(1500000, 30);
    write_file(folder / "a.txt", text);
    for (const bool cuttable : {true, false}) {
        std::string json = sample_tokenizer().json;
        const std::string regex = "\"use_regex\": true";
        if (!cuttable) json.replace(json.find(regex), regex.size(), "\"use_regex\": false");
        const std::string out = folder / (cuttable ? "cut" : "whole");
        write_file(folder / "tokenizer.json", json);
        ASSERT_EQ(tokenize({"encode", "--tokenizer", folder / "tokenizer.json", "--out", out, "--val-fraction", "0",
                            folder / "a.txt"})
                      .code,
                  0);
        const Tokenizer tokenizer = Tokenizer::parse(json, "test");
        Ids expected = tokenizer.encode(text, Special::as_text);
        expected.insert(expected.begin(), *tokenizer.document_start);
        EXPECT_TRUE(read_tokens(out + "/train_000000.bin") == expected) << cuttable;
    }
}

TEST(Command, SpecialTokensInJsonAreText) {
    const TemporaryFolder folder;
    sample_tokenizer().save(folder / "t.json");
    write_file(folder / "a.jsonl", R"({"text": "a<|endoftext|>b"})");
    ASSERT_EQ(tokenize({"encode", "--tokenizer", folder / "t.json", "--val-fraction", "0", "--out", folder / "o",
                        folder / "a.jsonl"})
                  .code,
              0);
    const Ids tokens = read_tokens(folder / "o/train_000000.bin");
    EXPECT_EQ(std::count(tokens.begin(), tokens.end(), *sample_tokenizer().end_of_text), 1);
}

TEST(Command, SpecialTokensAreLastInTheVocabulary) {
    const TemporaryFolder folder;
    write_file(folder / "a.txt", sample_text(5000, 24));
    const Strings special = {"<|endoftext|>", "<|user|>", "é \"x\""};
    const std::string path = folder / "t.json";
    ASSERT_EQ(tokenize({"train", "--vocab-size", "300", "--out", path, "--special", special[1], "--special", special[2],
                        "--special", special[0], folder / "a.txt"})
                  .code,
              0);
    const Tokenizer tokenizer = Tokenizer::load(path);
    EXPECT_EQ(tokenizer.vocab_size(), 300u);
    for (uint32_t i = 0; i < special.size(); ++i) EXPECT_EQ(tokenizer.added_tokens.find(special[i])->second, 297 + i);
    EXPECT_EQ(tokenizer.end_of_text, 297u);
    EXPECT_EQ(tokenizer.encode("<|user|>é \"x\"<|endoftext|>"), (Ids{298, 299, 297}));
    const Outcome taken =
        tokenize({"train", "--vocab-size", "300", "--out", path, "--special", "aa", folder / "a.txt"});
    EXPECT_EQ(taken.code, 1);
    EXPECT_NE(taken.err.find("special token aa is a word"), std::string::npos) << taken.err;
    EXPECT_EQ(Tokenizer::load(path).json, tokenizer.json);
}

TEST(Command, StatsCountWhatTheShardsHold) {
    const TemporaryFolder folder;
    Strings documents;
    for (int i = 0; i < 50; ++i) documents.push_back(std::to_string(i) + sample_text(200, i));
    documents[3] = "zzzzz\n\x01";
    split(folder, documents, {"--val-fraction", "0.2", "--shard-tokens", "1k"});
    Strings arguments = {"stats", "--tokenizer", folder / "t.json", "--top", "1000"};
    Ids tokens;
    size_t bytes = 0;
    for (const std::string& document : documents) bytes += document.size();
    for (const auto& entry : fs::directory_iterator(folder / "split")) {
        if (entry.path().extension() != ".bin") continue;
        arguments.push_back(entry.path());
        const Ids more = read_tokens(entry.path());
        tokens.insert(tokens.end(), more.begin(), more.end());
    }
    ASSERT_GT(arguments.size(), 7u);

    const auto output_of = [&](int code) {
        testing::internal::CaptureStdout();
        testing::internal::CaptureStderr();
        std::vector<char*> argv = {const_cast<char*>("tokenize")};
        for (std::string& argument : arguments) argv.push_back(argument.data());
        EXPECT_EQ(tokenize_main(int(argv.size()), argv.data()), code);
        const std::string err = testing::internal::GetCapturedStderr();
        return testing::internal::GetCapturedStdout() + err;
    };
    std::istringstream lines(output_of(0));
    std::map<uint32_t, int64_t> counts;
    bool total_seen = false;
    int64_t last = INT64_MAX;
    for (std::string line; std::getline(lines, line);) {
        long long n, docs, size;
        double ratio;
        unsigned id;
        char name[300];
        if (std::sscanf(line.c_str(), " %lld %lld %lld %lf %299s", &n, &docs, &size, &ratio, name) == 5) {
            if (std::string(name) != "all") continue;
            total_seen = true;
            EXPECT_EQ(size_t(n), tokens.size());
            EXPECT_EQ(size_t(docs), documents.size());
            EXPECT_EQ(size_t(size), bytes);
            EXPECT_NEAR(ratio, double(bytes) / double(tokens.size()), 0.001);
        } else if (std::sscanf(line.c_str(), " %lld %lf%% %u", &n, &ratio, &id) == 3) {
            EXPECT_LE(n, last);
            last = n;
            counts[id] = n;
        }
    }
    EXPECT_TRUE(total_seen);
    std::map<uint32_t, int64_t> expected;
    for (uint32_t id : tokens) ++expected[id];
    EXPECT_EQ(counts, expected);

    std::string damaged = read_file(arguments.back());
    damaged[1030] ^= 1;
    write_file(arguments.back(), damaged);
    EXPECT_NE(output_of(1).find(arguments.back() + ": damaged"), std::string::npos);
}

// Names of files are any bytes; resume.json and shards.json hold UTF-8 alone.
TEST(Command, NamesThatAreNotUtf8AreNames) {
    const TemporaryFolder folder;
    sample_tokenizer().save(folder / "t.json");
    fs::create_directories(folder / "caf\xe9");
    const std::string text = folder / "caf\xe9/a\nb\xff.txt", out = folder / "out\xe9";
    write_file(text, sample_text(100000, 50));
    const Outcome outcome =
        tokenize({"encode", "--tokenizer", folder / "t.json", "--out", out, "--val-fraction", "0", text});
    ASSERT_EQ(outcome.code, 0) << outcome.err;
    EXPECT_EQ(documents_in(out + "/train_000000.bin"), Strings{sample_text(100000, 50)});
    const auto job = nlohmann::json::parse(read_file(out + "/shards.json"))["job"];
    EXPECT_EQ(job["files"][0][0], folder / "caf\\xe9/a b\\xff.txt");
    EXPECT_EQ(tokenize({"stats", "--tokenizer", folder / "t.json", out + "/*.bin"}).code, 0);
    // The checkpoint of an interrupted encode is found to be of the same job.
    Corpus corpus({text}, "text");
    EncodeOptions options;
    options.val_fraction = 0;
    const auto writer = [&] { return ShardWriter(out, 400, 100, job_of(options, 100, sample_tokenizer(), corpus)); };
    {
        ShardWriter first = writer();
        first.write(ShardWriter::train, {1, 2, 3});
        first.checkpoint(Position{0, 1, 3, 1, false});
    }
    const ShardWriter second = writer();
    EXPECT_FALSE(second.discarded);
    EXPECT_EQ(position_in(second, corpus).part, 1);
}

TEST(Command, ADamagedCheckpointIsSaid) {
    const TemporaryFolder folder;
    write_file(folder / "a.txt", "a");
    const Corpus corpus({folder / "a.txt"}, "text");
    for (const char* position :
         {"7", "[]", "{}", R"({"file": "x", "part": 0, "bytes": 0, "documents": 0, "in_val": false})",
          R"({"file": 2, "part": 0, "bytes": 0, "documents": 0, "in_val": false})",
          R"({"file": -1, "part": 0, "bytes": 0, "documents": 0, "in_val": false})",
          R"({"file": 0, "part": -1, "bytes": 0, "documents": 0, "in_val": false})"}) {
        ShardWriter writer(folder / "out", 400, 100);
        writer.checkpoint(nlohmann::json::parse(position));
        const std::string message = error_of([&] { position_in(writer, corpus); });
        EXPECT_EQ(message.find(folder / "out/resume.json: damaged"), 0u) << position << message;
    }
}

// Whatever goes wrong with a shard, stats and decode name it, and say it as the trainer does.
TEST(Command, DamagedShardsAreNamed) {
    const TemporaryFolder folder;
    sample_tokenizer().save(folder / "t.json");
    {
        ShardWriter writer(folder.path, 400, 100);
        writer.write(ShardWriter::train, {1, 2, 3});
        writer.commit({}, {});
    }
    const std::string shard = folder / "train_000000.bin", good = read_file(shard),
                      list = read_file(folder / "shards.json");
    const auto says = [&](const std::string& command, const std::string& what) {
        const Outcome outcome = tokenize({command, "--tokenizer", folder / "t.json", shard});
        EXPECT_EQ(outcome.code, 1) << command << what;
        EXPECT_TRUE(outcome.err.starts_with("tokenize: " + what)) << command << outcome.err;
        EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
    };
    EXPECT_EQ(tokenize({"stats", "--tokenizer", folder / "t.json", shard}).code, 0);
    const auto changed = [&](size_t word, uint32_t value) {
        std::string bytes = good;
        std::memcpy(&bytes[4 * word], &value, 4);
        return bytes;
    };
    for (const char* command : {"stats", "decode"}) {
        for (const auto& [bytes, what] :
             {std::pair{changed(2, 0xFFFFFFFF), "truncated: 1030 bytes, but 4294967295 tokens"},
              {changed(2, 2), "too long: 1030 bytes, but 2 tokens need 1028"},
              {changed(2, 0), "too long"},
              {changed(0, 5), "expected magic number"},
              {changed(1, 7), "expected version 1"},
              {changed(9, 7), "expected zeros in the header"},
              {good + "x", "too long: 1031 bytes"},
              {good.substr(0, 1029), "truncated: 1029 bytes"},
              {good.substr(0, 1023), "truncated: 1023 bytes, but the header"},
              {std::string(), "the file is empty"}}) {
            write_file(shard, bytes);
            says(command, shard + ": " + what);
        }
        std::string bytes = good;
        bytes[1025] = '\x7F';
        write_file(shard, bytes);
        says(command, shard + ": token 32513 is not in " + (folder / "t.json"));
        fs::remove(shard);
        ASSERT_EQ(mkfifo(shard.c_str(), 0600), 0);
        says(command, shard + ": not a regular file");
        fs::remove(shard);
    }
    write_file(shard, good);
    for (const std::string& bad : {std::string("{"), list.substr(0, list.size() / 2), std::string(R"({"shards": [5]})"),
                                   std::string(R"({"shards": [{"name": "train_000000.bin", "crc32": "5"}]})")}) {
        write_file(folder / "shards.json", bad);
        says("stats", folder / "shards.json: ");
        EXPECT_EQ(tokenize({"decode", "--tokenizer", folder / "t.json", shard}).code, 0);
    }
}

// A regex that takes exponential time ends in an error, which tells in which file.
TEST(Command, AnErrorWithinATextNamesItsFile) {
    const TemporaryFolder folder;
    auto json = nlohmann::json::parse(sample_tokenizer().json);
    const nlohmann::json split = {
        {"type", "Split"}, {"pattern", {{"Regex", "(a|aa|aaa)+b"}}}, {"behavior", "Isolated"}};
    json["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", {split, json["pre_tokenizer"]}}};
    write_file(folder / "t.json", json.dump());
    write_file(folder / "a.txt", "good");
    write_file(folder / "b.txt", std::string(200, 'a') + "cb");
    const Outcome outcome = tokenize({"encode", "--tokenizer", folder / "t.json", "--out", folder / "out",
                                      "--val-fraction", "0", folder / "a.txt", folder / "b.txt"});
    EXPECT_EQ(outcome.code, 1);
    EXPECT_TRUE(outcome.err.starts_with("tokenize: " + (folder / "b.txt: cannot split a text"))) << outcome.err;
}

TEST(Command, ExitCodesAndOneLine) {
    const TemporaryFolder folder;
    sample_tokenizer().save(folder / "t.json");
    write_file(folder / "a.txt", "a text of more than a few bytes");
    write_file(folder / "short.txt", "text");
    write_file(folder / "empty.txt", "");
    write_file(folder / "bad.json", "{}");
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
    expect(2, "--special", {"train", "--special", "", "--out", out, a});
    expect(2, "--special", {"train", "--special", "\xff", "--out", out, a});
    expect(2, "--vocab-size", {"train", "--vocab-size", "257", "--special", "<x>", "--out", out, a});
    expect(2, "--seed", {"encode", "--tokenizer", t, "--seed", "x", "--out", out, a});
    expect(2, "SHARD", {"stats", "--tokenizer", t});
    expect(1, "too short", {"encode", "--tokenizer", t, "--out", out, folder / "short.txt"});
    expect(1, "none.bin", {"stats", "--tokenizer", t, folder / "none.bin"});
    expect(1, a + ": truncated: 31 bytes, but the header alone has 1024", {"stats", "--tokenizer", t, a});
    expect(1, folder / "no*.bin: no such file", {"stats", "--tokenizer", t, folder / "no*.bin"});
    expect(1, folder.path.string() + ": a folder", {"decode", "--tokenizer", t, folder.path});
    expect(2, "--field: expected UTF-8, found \"caf\\xe9\"", {"train", "--field", "caf\xe9", "--out", out, a});
    expect(2, "--field: expected UTF-8", {"encode", "--tokenizer", t, "--field", "\xff", "--out", out, a});
    EXPECT_FALSE(fs::exists(out));
    expect(1, "missing.json", {"encode", "--tokenizer", folder / "missing.json", "--out", out, a});
    expect(1, "bad.json", {"encode", "--tokenizer", folder / "bad.json", "--out", out, a});
    expect(1, folder / "empty.txt: the corpus has no text",
           {"encode", "--tokenizer", t, "--out", out, folder / "empty.txt"});
    expect(
        1, folder / "empty.txt and 1 more: the corpus has no text",
        {"encode", "--tokenizer", t, "--val-fraction", "0", "--out", out, folder / "empty.txt", folder / "empty.txt"});
    expect(1, "the corpus has no text", {"train", "--out", folder / "n.json", folder / "empty.txt"});
    expect(1, "/a.txt", {"encode", "--tokenizer", t, "--out", a + "/out", a});  // a file where a folder is needed
    expect(1, "/a.txt", {"train", "--out", a + "/n.json", a});
    fs::create_directories(out);
    write_file(out + "/tokenizer.json", "another");
    expect(1, "another tokenizer", {"encode", "--tokenizer", t, "--out", out, a});
    EXPECT_EQ(parse_count("100M"), 100000000);
    EXPECT_EQ(parse_count("1.5k"), 1500);
    EXPECT_EQ(parse_count("2G"), 2000000000);
}
