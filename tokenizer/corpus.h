// Streams the documents of .txt and .jsonl files, plain, .gz or .zst; memory does not grow with the corpus.
//
// .txt    the whole file is a document; a literal <|endoftext|> separates documents (as in TinyStories)
// .jsonl  each line is an object whose field "text" is a document
// Empty documents are left out.
//
// Long documents come in parts, so that every thread has work, a huge file fits in memory, and a corpus of one file has
// something to validate on. A cut changes no token: it is after an ASCII letter or digit that ends a line, or before
// the last space in front of a visible ASCII character, where GPT-2's, Llama 3's and Qwen's regexes cut anyway; only a
// text without such a place in half a part (base64, say, or Chinese) is cut at any character. A part of a .txt has at
// most 1/64 of the bytes read before it, but at least 64 KiB (16 KiB if the corpus is one file) and at most 1 MiB; one
// of a .jsonl has at most 1 MiB.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

struct Part {
    std::string text;
    bool continues = false;  // the document that the part before belongs to
};

struct Input;  // an open file, in corpus.cpp

struct Corpus {
    std::vector<std::string> files;
    std::string field;  // of a .jsonl's objects

    size_t next_file = 0;
    std::shared_ptr<Input> input;
    std::string document;  // of a .jsonl, the current one; `document_at` bytes of it have been handed out
    size_t document_at = 0;
    bool inside = false;                                // of a .txt: the last part did not end its document
    int64_t text_bytes = 0;                             // handed out so far
    int64_t file_bytes_total = 0, file_bytes_done = 0;  // as on disk; done: without the open file

    // Folders are searched for files of the four kinds, recursively, in the order of their paths.
    Corpus(const std::vector<std::string>& paths, std::string field);
    bool next(Part& part);    // false at the end
    double progress() const;  // 0 to 1

    bool next_of_txt(Part& part);
    bool next_of_jsonl(Part& part);
};

// Where to cut a text that is longer than limit: in (limit / 2, limit], for limit >= 8.
size_t cut_point(std::string_view text, size_t limit);
