// Corpus files of any bytes: the text comes out whole, or one line says which file, and which line, is wrong.
// The input's first byte chooses the kind and the compression, the rest is the file.
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "../../test/temporary_folder.h"
#include "../../tokenizer/corpus.h"
#include "../../tokenizer/json_text.h"
#include "trainer/files.h"

static void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "jsonl: %s\n", what);
    std::abort();
}

// A .txt has all its bytes in its documents, but for the separators between them and a byte order mark.
static void check_txt(std::string content, const std::vector<Part>& parts) {
    if (content.starts_with("\xEF\xBB\xBF")) content.erase(0, 3);
    const std::string separator = "<|endoftext|>";
    for (size_t at; (at = content.find(separator)) != content.npos;) content.replace(at, separator.size(), "\1\1");
    std::string text;
    for (const Part& part : parts) {
        require(part.text.find(separator) == part.text.npos, "a separator in a document");
        text += part.text;
    }
    std::erase(content, '\1');
    std::erase(text, '\1');
    require(text == content, "the parts are not the text");
}

static void check_cut(const std::string& content) {
    if (content.size() < 9) return;
    const size_t limit = 8 + uint8_t(content[0]) % (content.size() - 8), cut = cut_point(content, limit);
    require(cut == content.npos || (limit / 2 < cut && cut <= limit), "a cut out of its range");
}

// What nlohmann's parser takes, ours takes too, to the same text; not the other way round, as it has limits of its own.
static void check_json(const std::string& content) {
    const nlohmann::json expected = nlohmann::json::parse(content, nullptr, false);
    if (!expected.is_object() || !expected.contains("text") || !expected["text"].is_string()) return;
    if (content.starts_with("\xEF\xBB\xBF")) return;  // is dropped before
    if (content.find('\0') != content.npos) return;   // to nlohmann the end of the text
    require(string_field(content, "text") == expected["text"], "the text of a JSON object is another");
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static const char* const names[] = {"a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.txt.gz", "a.txt.zst"};
    if (size == 0) return 0;
    static const TemporaryFolder folder;
    const std::string name = names[data[0] % std::size(names)], path = folder / name;
    const std::string content(reinterpret_cast<const char*>(data) + 1, size - 1);
    std::ofstream(path, std::ios::binary) << content;
    check_cut(content);
    check_json(content);

    std::vector<Part> parts;
    std::string problem;
    try {
        Corpus corpus({path}, "text");
        for (Part part; corpus.next(part);) parts.push_back(part);
        require(corpus.progress() == 1, "the end is not the end");
    } catch (const std::runtime_error& error) {
        problem = error.what();
    }
    std::filesystem::remove(path);

    for (const Part& part : parts) require(!part.text.empty(), "an empty part");
    require(parts.empty() || !parts[0].continues, "the first part continues nothing");
    const bool gzip = content.starts_with("\x1f\x8b");  // is read as such whatever its name
    if (problem.empty()) {
        if (!gzip && name == "a.txt") check_txt(content, parts);
        return 0;
    }
    require(problem.find(path) != problem.npos, "an error that does not name its file");
    require(problem == printable(problem), "an error that is no line of UTF-8");
    const bool other_encoding =
        problem.find("expected; convert it: ") != problem.npos || problem.find("zstd data") != problem.npos;
    if (!gzip && !other_encoding && name == "a.jsonl") {
        const size_t number = problem.find(path + ":");
        require(number != problem.npos && std::atoi(&problem[number + path.size() + 1]) > 0,
                "an error without its line");
    }
    require(gzip || other_encoding || name != "a.txt", "an error in a plain text");
    return 0;
}
