// The trainer: again and again the most frequent pair of neighbours becomes a token. Among equals the pair with the
// lower ids wins, as in Hugging Face's `tokenizers`.
//
// Pair counts are kept, not recounted: a merge visits only the words that have the pair. The queue holds a count as it
// was when it was pushed; counts of waiting pairs only fall, so a stale one is pushed again with its true count.
#include "train_bpe.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <queue>
#include <stdexcept>

namespace {

using Pair = std::pair<uint32_t, uint32_t>;

struct PairHash {
    size_t operator()(Pair p) const {
        return std::hash<uint64_t>{}((uint64_t(p.first) << 32 | p.second) * 0x9E3779B97F4A7C15);
    }
};

struct Word {
    std::vector<uint32_t> ids;
    int64_t count;
};

struct Candidate {
    int64_t count;
    Pair pair;
    std::vector<uint32_t> words;  // indices of words that have, or had, the pair
    bool operator<(const Candidate& other) const {
        return count != other.count ? count < other.count : pair > other.pair;
    }
};

struct PairTable {
    std::unordered_map<Pair, int64_t, PairHash> counts;
    std::unordered_map<Pair, std::vector<uint32_t>, PairHash> places;  // of pairs that appeared since the last flush
    std::priority_queue<Candidate> queue;

    void add(Pair pair, int64_t count, uint32_t word) {
        counts[pair] += count;
        if (count < 0) return;
        std::vector<uint32_t>& words = places[pair];
        if (words.empty() || words.back() != word) words.push_back(word);
    }
    void flush() {
        for (auto& [pair, words] : places) {
            if (counts[pair] > 0) queue.push({counts[pair], pair, std::move(words)});
        }
        places.clear();
    }
    // The most frequent pair, its count up to date; false when none is left.
    bool pop(Candidate& best) {
        while (!queue.empty()) {
            best = std::move(const_cast<Candidate&>(queue.top()));  // moves only `words`, which the order ignores
            queue.pop();
            const int64_t count = counts[best.pair];
            if (count == best.count) return count > 0;
            best.count = count;
            if (count > 0) queue.push(std::move(best));
        }
        return false;
    }
};

// Replaces the pair by `merged` from left to right, and corrects the counts of the pairs beside it.
void merge_in_word(Word& word, uint32_t index, Pair pair, uint32_t merged, PairTable& pairs) {
    std::vector<uint32_t>& ids = word.ids;
    size_t out = 0;
    for (size_t i = 0; i < ids.size(); ++i, ++out) {
        if (i + 1 == ids.size() || Pair{ids[i], ids[i + 1]} != pair) {
            ids[out] = ids[i];
            continue;
        }
        if (out > 0) {
            pairs.add({ids[out - 1], pair.first}, -word.count, index);
            pairs.add({ids[out - 1], merged}, word.count, index);
        }
        if (i + 2 < ids.size()) {
            pairs.add({pair.second, ids[i + 2]}, -word.count, index);
            pairs.add({merged, ids[i + 2]}, word.count, index);
        }
        ids[out] = merged;
        ++i;
    }
    ids.resize(out);
}

std::string quoted(const std::string& text) { return nlohmann::json(text).dump(); }

std::string characters(const std::string& bytes) {
    std::string characters;
    for (char c : bytes) characters += byte_alphabet().character[uint8_t(c)];
    return characters;
}

std::vector<std::string> byte_tokens() {
    std::vector<std::string> tokens;
    for (uint8_t byte : byte_alphabet().order) tokens.emplace_back(1, char(byte));
    return tokens;
}

std::string tokenizer_json(const std::vector<std::string>& tokens, const std::vector<Pair>& merges,
                           const std::vector<std::string>& special_tokens) {
    std::string out =
        "{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n  \"added_tokens\": [";
    std::string vocab;
    for (size_t id = 0; id < tokens.size(); ++id) {
        vocab += (id ? ",\n      " : "\n      ") + quoted(characters(tokens[id])) + ": " + std::to_string(id);
    }
    for (size_t i = 0; i < special_tokens.size(); ++i) {
        const std::string id = std::to_string(tokens.size() + i), content = quoted(special_tokens[i]);
        out += (i ? ",\n    {\"id\": " : "\n    {\"id\": ") + id + ", \"content\": " + content +
               R"(, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})";
        vocab += ",\n      " + content + ": " + id;
    }
    out += special_tokens.empty() ? "" : "\n  ";
    out += R"(],
  "normalizer": null,
  "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
  "post_processor": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true},
  "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
  "model": {
    "type": "BPE",
    "dropout": null,
    "unk_token": null,
    "continuing_subword_prefix": null,
    "end_of_word_suffix": null,
    "fuse_unk": false,
    "byte_fallback": false,
    "ignore_merges": false,
    "vocab": {)";
    out += vocab;
    out += "\n    },\n    \"merges\": [";
    for (size_t i = 0; i < merges.size(); ++i) {
        const auto [left, right] = merges[i];
        out += (i ? ",\n      [" : "\n      [") + quoted(characters(tokens[left])) + ", " +
               quoted(characters(tokens[right])) + "]";
    }
    return out + "\n    ]\n  }\n}\n";
}

}  // namespace

Tokenizer untrained_tokenizer() { return Tokenizer::parse(tokenizer_json(byte_tokens(), {}, {}), "no tokenizer"); }

void count_words(const Tokenizer& tokenizer, std::string_view text, WordCounts& counts) {
    std::string buffer;
    std::vector<std::string_view> words;
    tokenizer.split(text, buffer, words);
    for (std::string_view word : words) {
        if (const auto found = counts.find(word); found != counts.end()) ++found->second;
        else counts.emplace(word, 1);
    }
}

Tokenizer train_bpe(const WordCounts& counts, size_t vocab_size, const std::vector<std::string>& special_tokens) {
    std::vector<std::string> tokens = byte_tokens();
    StringMap<uint32_t> id_of;
    for (uint32_t id = 0; id < tokens.size(); ++id) id_of[tokens[id]] = id;

    std::vector<Word> words;
    PairTable pairs;
    for (const auto& [text, count] : counts) {
        Word word{{}, count};
        for (char c : text) word.ids.push_back(id_of.find(std::string_view(&c, 1))->second);
        for (size_t i = 0; i + 1 < word.ids.size(); ++i) {
            pairs.add({word.ids[i], word.ids[i + 1]}, count, uint32_t(words.size()));
        }
        if (word.ids.size() > 1) words.push_back(std::move(word));
    }
    pairs.flush();

    std::vector<Pair> merges;
    Candidate best;
    while (tokens.size() + special_tokens.size() < vocab_size && pairs.pop(best)) {
        // Two ways to put together the same bytes share one token.
        const std::string bytes = tokens[best.pair.first] + tokens[best.pair.second];
        const auto [token, is_new] = id_of.emplace(bytes, uint32_t(tokens.size()));
        if (is_new) tokens.push_back(bytes);
        merges.push_back(best.pair);
        for (uint32_t index : best.words) merge_in_word(words[index], index, best.pair, token->second, pairs);
        pairs.flush();
    }
    for (const std::string& token : tokens) {
        const auto same = std::find(special_tokens.begin(), special_tokens.end(), characters(token));
        if (same != special_tokens.end()) {
            throw std::runtime_error("the special token " + *same +
                                     " is a word of the text too; choose one that no text has, such as <|" + *same +
                                     "|>");
        }
    }
    return Tokenizer::parse(tokenizer_json(tokens, merges, special_tokens), "the trained tokenizer");
}
