// Streams the documents of .txt, .jsonl and .json files, plain, .gz or .zst; memory does not grow with the corpus.
//
// .txt    the whole file is a document; a literal <|endoftext|> separates documents (as in TinyStories)
// .jsonl  each line is an object whose field "text" is a document; or a conversation, where those are asked for
// .json   a list of such objects, or lines of them
// Empty documents are left out, and so is a byte order mark. Text in UTF-16 is refused.
//
// Long documents come in parts of about 1 MiB, so that every thread has work and a huge document fits in memory. A cut
// changes no token: it is after a letter or digit and before a space, or else before a line's end or a comma, where
// GPT-2's, Llama 3's and Qwen's regexes cut anyway. A part grows until it has such a place: base64 stays whole.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "conversation.h"

struct Part {
    std::string text;
    bool continues = false;          // the document that the part before belongs to
    size_t file = 0;                 // of Corpus::files
    Conversation conversation = {};  // where the corpus is of those: the text is its messages'
};

// The paths that patterns stand for (find_paths); an error, if one stands for none.
std::vector<std::string> paths_of(const std::vector<std::string>& patterns);

struct Input;  // an open file, in corpus.cpp

struct Corpus {
    struct File {
        std::string path;
        int64_t bytes, modified;  // as on disk; nanoseconds since 1970
    };

    std::vector<File> files;
    std::string field;           // of an object
    bool whole = false;          // documents are never cut: see Tokenizer::cuttable
    bool conversations = false;  // is what the lines are, never cut

    size_t file = 0;   // the next part's
    int64_t part = 0;  // its number in the file
    std::shared_ptr<Input> input;
    std::string document;  // of a .jsonl, the current one; `document_at` bytes of it have been handed out
    size_t document_at = 0;
    bool inside = false;                         // of a .txt: the last part did not end its document
    int64_t bytes_total = 0, bytes_of_done = 0;  // of the files; done: without the open one

    // Files, folders, or patterns of either. Folders are searched for .txt and .jsonl, recursively, in the order of
    // their paths.
    Corpus(const std::vector<std::string>& patterns, std::string field);
    bool next(Part& part);                    // false at the end
    void skip_to(size_t file, int64_t part);  // from the start
    double progress() const;                  // 0 to 1
    bool begins_with_conversation() const;    // the first object, as far as it can be told

    bool next_of_txt(Part& part);
    bool next_of_jsonl(Part& part);
};

// Where to cut a text that is longer than limit: in (limit / 2, limit], or npos where there is no place.
size_t cut_point(std::string_view text, size_t limit);
