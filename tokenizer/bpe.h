// Byte-level BPE in the format of Hugging Face's tokenizer.json: load, save, encode, decode.
//
//   text --added tokens cut out--> sections --NFC, if asked for--> --regexes--> words --merges--> ids
//
// A word (HF: pretoken) is what the regexes cut out of the text; merges never reach across its ends. Ids are those of
// HF's encode(text, add_special_tokens=False). Like HF, which sees text only once it is decoded, it reads what is not
// valid UTF-8 as U+FFFD, one for each malformed character (Python's bytes.decode(errors="replace")). Every byte has a
// token of its own, so decode(encode(text)) == text for any valid text; with the normalizer NFC (Qwen): its NFC form.
//
// Errors are std::runtime_error with one line of text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

struct Regex;  // a compiled pattern, in bpe.cpp

// Lets maps with std::string keys be searched by string_view, without building a string.
struct StringHash {
    using is_transparent = void;
    size_t operator()(std::string_view s) const { return std::hash<std::string_view>{}(s); }
};
template <class Value>
using StringMap = std::unordered_map<std::string, Value, StringHash, std::equal_to<>>;

// The ids of words met before. One for each thread that encodes; it empties itself when it has grown large.
using WordCache = StringMap<std::vector<uint32_t>>;

// Do special tokens (<|endoftext|> ...) in a text stand for themselves, or are they text like any other? In a corpus
// they are text: a web page about tokenizers must not end its document.
enum class Special { parse, as_text };

struct Tokenizer {
    struct Merge {
        uint32_t rank, id;  // lower ranks merge first; id is the merged token
    };

    std::string json;                  // the whole file, as it was read
    std::vector<std::string> tokens;   // id -> bytes
    StringMap<uint32_t> ids;           // bytes -> id, without the added tokens
    StringMap<uint32_t> added_tokens;  // content -> id
    uint32_t byte_ids[256];
    std::unordered_map<uint64_t, Merge> merges;  // left id << 32 | right id

    bool nfc = false;                                  // normalize to NFC first
    bool add_prefix_space = false;                     // a section that does not start with a space gets one
    bool ignore_merges = false;                        // a word that is a token is that token, whatever the merges say
    std::vector<std::shared_ptr<const Regex>> splits;  // each cuts what the one before left whole
    std::shared_ptr<const Regex> any_added_token, non_special_added_token;  // null where there are none

    std::optional<uint32_t> end_of_text;     // <|endoftext|>, Llama 3: <|end_of_text|>
    std::optional<uint32_t> document_start;  // the same token, but for Llama 3: <|begin_of_text|>

    static Tokenizer load(const std::string& path);
    static Tokenizer parse(std::string json, const std::string& where);  // where: for error messages
    void save(const std::string& path) const;

    size_t vocab_size() const { return tokens.size(); }  // the largest id + 1
    std::vector<uint32_t> encode(std::string_view text, Special special = Special::parse) const;
    void encode(std::string_view text, Special special, WordCache& cache, std::vector<uint32_t>& out) const;
    std::string decode(const std::vector<uint32_t>& ids) const;  // special tokens included

    // The words of a text without added tokens, in order; the last may point into `buffer`.
    void split(std::string_view section, std::string& buffer, std::vector<std::string_view>& words) const;
};

extern const char* const gpt2_pattern;

// GPT-2 writes bytes as printable characters: byte -> the character's UTF-8, and the order of the bytes' ids.
struct ByteAlphabet {
    std::string character[256];
    uint8_t order[256];
};
const ByteAlphabet& byte_alphabet();

// Reads and writes whole files; errors name the file, the reason and what to do.
std::string read_whole_file(const std::string& path);
void write_whole_file(const std::string& path, std::string_view content);
