// Byte-level BPE in the format of Hugging Face's tokenizer.json: load, save, encode, decode.
//
//   text --added tokens cut out--> sections --normal form, if asked for--> --splits--> words --merges--> ids
//
// A word (HF: pretoken) is what pre-tokenization cuts out of the text; merges never reach across its ends. Ids are
// those of HF's encode(text, add_special_tokens=False). Like HF, which sees text only once it is decoded, it reads what
// is not valid UTF-8 as U+FFFD, one for each malformed character (Python's bytes.decode(errors="replace")). Where every
// byte has a token, as is usual, decode(encode(text)) == text for any valid text; with a normalizer: its normal form.
//
// A Tokenizer never changes once it is loaded: any number of threads may use it, each with a WordCache of its own.
// What a file asks for and is not implemented is refused by name. Errors are std::runtime_error with one line of text.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "pretokenize.h"
#include "unicode.h"

// Lets maps with std::string keys be searched by string_view, without building a string.
struct StringHash {
    using is_transparent = void;
    size_t operator()(std::string_view s) const { return std::hash<std::string_view>{}(s); }
};
template <class Value>
using StringMap = std::unordered_map<std::string, Value, StringHash, std::equal_to<>>;

// What two neighbours merge to: a hash table with open addressing.
struct MergeTable {
    struct Merge {
        uint32_t rank = UINT32_MAX;  // lower ranks merge first; UINT32_MAX: the pair does not merge
        uint32_t id = 0;             // the merged token
    };
    struct Entry {
        uint64_t pair = UINT64_MAX;  // left id << 32 | right id
        Merge merge;
    };
    std::vector<Entry> entries = std::vector<Entry>(2);  // a power of two, at most half of them used
    size_t count = 0;

    size_t size() const { return count; }
    Merge find(uint32_t left, uint32_t right) const { return at(uint64_t(left) << 32 | right).merge; }
    void insert(uint32_t left, uint32_t right, Merge merge);

  private:
    const Entry& at(uint64_t pair) const;  // the pair's entry, or the free one where it would be
};

// The ids of words met before. One for each thread that encodes with one tokenizer. It empties itself when it has grown
// large. Words up to 15 bytes and up to 3 ids stand in the hash table itself, half a cache line a word.
struct WordCache {
    struct Ids {
        const uint32_t* data;  // null: not met before
        size_t count;
    };
    bool empty() const { return used == 0; }
    Ids find(std::string_view word, const char* end) const;  // `end`: up to where memory may be read
    void insert(std::string_view word, const std::vector<uint32_t>& ids);

  private:
    struct Key {
        uint64_t low, high;  // the word's bytes, and its length in the last one; of a long word: its hash and length
    };
    struct Slot {
        Key key;
        uint32_t ids[3];     // or, of a long word or many ids: where they are in `more`, where it is in `text`
        uint32_t count = 0;  // of ids; 0: free
    };
    static Key key_of(std::string_view word, const char* end);
    const Slot& slot_of(std::string_view word, const Key& key) const;

    std::vector<Slot> slots;
    size_t used = 0;
    std::string text;            // long words, one after the other
    std::vector<uint32_t> more;  // ids of words that have many
};

// Do special tokens (<|endoftext|> ...) in a text stand for themselves, or are they text like any other? In a corpus
// they are text: a web page about tokenizers must not end its document. (as_text: HF's encode_special_tokens.)
enum class Special { parse, as_text };

struct AddedToken {
    uint32_t id;
    bool special;
    bool single_word;     // not within a word
    bool lstrip, rstrip;  // takes the spaces beside it
};

// Added tokens to look for: the leftmost counts, and the longest of those that start there.
struct AddedTokens {
    StringMap<AddedToken> tokens;    // by their text
    std::vector<size_t> lengths;     // that occur, in bytes, the longest first
    std::array<bool, 256> starts{};  // with this byte
    bool all_special = true;

    void add(const std::string& text, const AddedToken& token);
};

struct Tokenizer {
    std::string json;                  // the whole file, as it was read
    std::vector<std::string> tokens;   // id -> bytes
    StringMap<uint32_t> ids;           // bytes -> id, without the added tokens
    StringMap<uint32_t> added_tokens;  // content -> id
    MergeTable merges;

    // The token of each byte. Where there is none, as the file says: the fallback's tokens, else unk_id, else nothing.
    static constexpr uint32_t no_token = UINT32_MAX;
    uint32_t byte_ids[256];
    std::vector<uint32_t> fallback_ids[256];
    std::optional<uint32_t> unk_id;
    bool fuse_unk = false;  // a run of unk_id is one

    std::vector<NormalForm> normalizers;  // one after the other
    bool add_prefix_space = false;        // a section that does not start with a space gets one
    bool ignore_merges = false;           // a word that is a token is that token, whatever the merges say
    std::vector<Split> splits;            // each cuts what the one before left whole
    AddedTokens added_raw, added_normal;  // looked for before and after normalization

    std::optional<uint32_t> end_of_text;     // <|endoftext|>, Llama 3: <|end_of_text|>
    std::optional<uint32_t> document_start;  // the same token, but for Llama 3: <|begin_of_text|>

    static Tokenizer load(const std::string& path);
    static Tokenizer parse(std::string json, const std::string& where);  // where: for error messages
    void save(const std::string& path) const;

    // Whether a text that is cut between a letter or digit and a space, a line's end or a comma keeps its ids.
    bool cuttable() const;

    size_t vocab_size() const { return tokens.size(); }  // the largest id + 1
    std::vector<uint32_t> encode(std::string_view text, Special special = Special::parse) const;
    void encode(std::string_view text, Special special, WordCache& cache, std::vector<uint32_t>& out) const;
    std::string decode(const std::vector<uint32_t>& ids) const;  // special tokens included

    // The words of a text without added tokens, in order; some may point into `buffer`.
    void split(std::string_view section, std::string& buffer, std::vector<std::string_view>& words) const;
};

// GPT-2 writes bytes as printable characters: byte -> the character's UTF-8, and the order of the bytes' ids.
struct ByteAlphabet {
    std::string character[256];
    uint8_t order[256];
};
const ByteAlphabet& byte_alphabet();
