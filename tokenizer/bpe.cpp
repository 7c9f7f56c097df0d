// The library: tokenizer.json in, text to ids, ids to text.
//
//   1. Bytes as characters
//   2. Hash tables: merges, words
//   3. tokenizer.json
//   4. Merging
//   5. Encoding: added tokens, normal forms, words
//   6. Decoding
#include "bpe.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>
#include <queue>
#include <set>
#include <stdexcept>

#include "trainer/files.h"

using nlohmann::json;

// ---------------------------------------------------------------------------------------------------------------------
// 1. Bytes as characters

// Printable characters of Latin-1 stand for themselves; the other bytes get U+0100, U+0101, ... in their order.
const ByteAlphabet& byte_alphabet() {
    static const ByteAlphabet alphabet = [] {
        const auto printable = [](int b) { return (b > 0x20 && b < 0x7F) || (b > 0xA0 && b != 0xAD); };
        ByteAlphabet a;
        int count = 0, others = 0;
        for (bool pass : {true, false}) {
            for (int b = 0; b < 256; ++b) {
                if (printable(b) != pass) continue;
                append_utf8(a.character[b], uint32_t(pass ? b : 0x100 + others++));
                a.order[count++] = uint8_t(b);
            }
        }
        return a;
    }();
    return alphabet;
}

// "ĠÃ©" -> " é"; a string with a character that stands for no byte means itself.
static std::string bytes_of(const std::string& token, bool& is_byte_level) {
    static const StringMap<char> byte_of = [] {
        StringMap<char> map;
        for (int b = 0; b < 256; ++b) map[byte_alphabet().character[b]] = char(b);
        return map;
    }();
    std::string bytes;
    for (size_t i = 0; i < token.size();) {
        const size_t length = character_at(token.data() + i).length;
        const auto found = byte_of.find(std::string_view(token).substr(i, length));
        if (found == byte_of.end()) return is_byte_level = false, token;
        bytes += found->second;
        i += length;
    }
    return is_byte_level = true, bytes;
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. Hash tables

// Both halves of a product, folded: every bit of a and b moves the lower bits.
static inline uint64_t mix(uint64_t a, uint64_t b) {
    const auto product = static_cast<unsigned __int128>(a ^ 0x9E3779B97F4A7C15) * (b ^ 0xD1B54A32D192ED03);
    return uint64_t(product) ^ uint64_t(product >> 64);
}

const MergeTable::Entry& MergeTable::at(uint64_t pair) const {
    const size_t mask = entries.size() - 1;
    for (size_t i = (pair * 0x9E3779B97F4A7C15) >> 32;; ++i) {
        const Entry& entry = entries[i & mask];
        if (entry.pair == pair || entry.pair == UINT64_MAX) return entry;
    }
}

void MergeTable::insert(uint32_t left, uint32_t right, Merge merge) {
    if (2 * (count + 1) > entries.size()) {
        std::vector<Entry> old(4 * entries.size());
        old.swap(entries);
        for (const Entry& entry : old) {
            if (entry.pair != UINT64_MAX) const_cast<Entry&>(at(entry.pair)) = entry;
        }
    }
    const uint64_t pair = uint64_t(left) << 32 | right;
    Entry& entry = const_cast<Entry&>(at(pair));
    count += entry.pair != pair;
    entry = {pair, merge};
}

constexpr size_t max_short = 15, max_long = 128;          // bytes; longer words hardly come again
constexpr size_t first_slots = 256, max_slots = 1 << 18;  // 8 MB, and at most 16 MB of long words
constexpr uint64_t long_word = 0xFFull << 56;

// `end`: up to where memory may be read.
inline WordCache::Key WordCache::key_of(std::string_view word, const char* end) {
    if (word.size() > max_short) return {std::hash<std::string_view>{}(word), long_word | word.size()};
    Key key{0, 0};
    if (end - word.data() >= 16) {
        static constexpr auto masks = [] {
            std::array<Key, 16> all{};
            for (size_t i = 0; i < 16; ++i) {
                all[i] = {i >= 8 ? ~0ull : (1ull << 8 * i) - 1, i <= 8 ? 0 : (1ull << 8 * (i - 8)) - 1};
            }
            return all;
        }();
        std::memcpy(&key, word.data(), 16);
        key.low &= masks[word.size()].low;
        key.high &= masks[word.size()].high;
    } else {
        std::memcpy(&key, word.data(), word.size());
    }
    key.high |= uint64_t(word.size()) << 56;
    return key;
}

// Where the word is, or would be.
inline const WordCache::Slot& WordCache::slot_of(std::string_view word, const Key& key) const {
    for (size_t i = mix(key.low, key.high);; ++i) {
        const Slot& slot = slots[i & (slots.size() - 1)];
        if (slot.count == 0) return slot;
        if (slot.key.low != key.low || slot.key.high != key.high) continue;
        if (key.high < long_word || text.compare(slot.ids[1], word.size(), word) == 0) return slot;
    }
}

inline WordCache::Ids WordCache::find(std::string_view word, const char* end) const {
    if (slots.empty()) return {nullptr, 0};
    const Key key = key_of(word, end);
    const Slot& slot = slot_of(word, key);
    if (slot.count == 0) return {nullptr, 0};
    return {slot.count > 3 || key.high >= long_word ? &more[slot.ids[0]] : slot.ids, slot.count};
}

void WordCache::insert(std::string_view word, const std::vector<uint32_t>& ids) {
    if (word.size() > max_long || ids.empty()) return;
    if (2 * (used + 1) > slots.size()) {
        if (slots.size() == max_slots) *this = {};
        std::vector<Slot> old(slots.empty() ? first_slots : 2 * slots.size());
        old.swap(slots);
        for (const Slot& slot : old) {
            if (slot.count == 0) continue;
            const bool is_long = slot.key.high >= long_word;
            const std::string_view known =
                is_long ? std::string_view(text).substr(slot.ids[1], slot.key.high & 0xFF) : "";
            const_cast<Slot&>(slot_of(known, slot.key)) = slot;
        }
    }
    const Key key = key_of(word, word.data() + word.size());
    Slot& slot = const_cast<Slot&>(slot_of(word, key));
    slot.key = key;
    slot.count = uint32_t(ids.size());
    ++used;
    if (ids.size() <= 3 && word.size() <= max_short) {
        std::copy(ids.begin(), ids.end(), slot.ids);
        return;
    }
    slot.ids[0] = uint32_t(more.size());
    more.insert(more.end(), ids.begin(), ids.end());
    if (word.size() > max_short) {
        slot.ids[1] = uint32_t(text.size());
        text += word;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. tokenizer.json

[[noreturn]] static void unsupported(const std::string& where, const std::string& what) {
    fail(where, what + " is not supported; use a byte-level BPE tokenizer.json such as GPT-2's, Llama 3's or Qwen's");
}

// Why a file is no tokenizer.json; Tokenizer::parse adds which file.
struct Malformed : std::runtime_error {
    using std::runtime_error::runtime_error;
};

static json parse_json(const std::string& text) try {
    return json::parse(text);
} catch (const json::parse_error& error) {
    throw Malformed("not valid JSON near byte " + std::to_string(error.byte));
} catch (const json::exception&) {
    throw Malformed("a number is larger than a double can hold");
}

static const json& typed(const json& value, const std::string& name, json::value_t type) {
    if (value.type() == type) return value;
    throw Malformed("\"" + name + "\" is expected to be of type " + json(type).type_name() + ", found " +
                    (value.is_null() ? "none" : value.type_name()));
}

static const json& member(const json& object, const char* name) {
    static const json null;
    return object.contains(name) ? object.at(name) : null;
}

static const json& required(const json& object, const char* name, json::value_t type) {
    return typed(member(object, name), name, type);
}

static std::string string_of(const json& value, const std::string& name) {
    return typed(value, name, json::value_t::string);
}

static bool flag(const json& object, const char* name, bool otherwise) {
    const json& value = member(object, name);
    return value.is_null() ? otherwise : typed(value, name, json::value_t::boolean).get<bool>();
}

// Of a normalizer, a pre-tokenizer, a decoder or a model.
static std::string type_of(const json& part) {
    if (part.is_null()) return "null";
    const json& type = member(typed(part, "normalizer, pre_tokenizer, decoder", json::value_t::object), "type");
    return type.is_null() ? "null" : string_of(type, "type");
}

// The steps of a normalizer, pre-tokenizer or decoder: itself, or those of a Sequence.
static std::vector<const json*> steps_of(const json& part, const char* list) {
    std::vector<const json*> steps, open = {&part};
    while (!open.empty()) {
        const json& step = *open.back();
        open.pop_back();
        if (type_of(step) == "Sequence") {
            const json& inner = required(step, list, json::value_t::array);
            for (size_t i = inner.size(); i-- > 0;) open.push_back(&inner.at(i));
        } else if (type_of(step) != "null") {
            steps.push_back(&step);
        }
    }
    return steps;
}

static void read_normalizer(Tokenizer& t, const json& part, const std::string& where) {
    for (const json* step : steps_of(part, "normalizers")) {
        const std::string type = type_of(*step);
        if (type != "NFC" && type != "NFD" && type != "NFKC" && type != "NFKD")
            unsupported(where, "normalizer " + type);
        t.normalizers.push_back(NormalForm::named(type));
    }
}

static Split read_split(const json& step, const std::string& where) {
    static const std::pair<const char*, SplitBehavior> behaviors[] = {
        {"Removed", SplitBehavior::removed},
        {"Isolated", SplitBehavior::isolated},
        {"Contiguous", SplitBehavior::contiguous},
        {"MergedWithPrevious", SplitBehavior::merged_with_previous},
        {"MergedWithNext", SplitBehavior::merged_with_next}};
    const json& pattern = required(step, "pattern", json::value_t::object);
    Split split = Split::compile(pattern.contains("Regex") ? string_of(pattern.at("Regex"), "Regex")
                                                           : escaped(string_of(member(pattern, "String"), "String")),
                                 where);
    const std::string behavior = string_of(member(step, "behavior"), "behavior");
    const auto found = std::find_if(std::begin(behaviors), std::end(behaviors),
                                    [&](const auto& known) { return known.first == behavior; });
    if (found == std::end(behaviors)) unsupported(where, "the Split behavior " + behavior);
    split.behavior = found->second;
    split.invert = flag(step, "invert", false);
    return split;
}

static void read_pre_tokenizer(Tokenizer& t, const json& part, const std::string& where) {
    const std::vector<const json*> steps = steps_of(part, "pretokenizers");
    if (steps.empty() || type_of(*steps.back()) != "ByteLevel") {
        unsupported(where, "a pre_tokenizer that does not end with ByteLevel");
    }
    for (const json* step : steps) {
        const std::string type = type_of(*step);
        if (type == "ByteLevel") {
            if (step != steps.back()) unsupported(where, "a pre_tokenizer after ByteLevel");
            t.add_prefix_space = flag(*step, "add_prefix_space", true);
            if (t.add_prefix_space && !t.splits.empty()) {
                unsupported(where, "add_prefix_space after another pre_tokenizer");
            }
            if (flag(*step, "use_regex", true)) t.splits.push_back(Split::compile(gpt2_pattern, where));
        } else if (type == "Split") {
            t.splits.push_back(read_split(*step, where));
        } else if (type == "Digits") {
            t.splits.push_back(
                Split::compile(flag(*step, "individual_digits", false) ? R"(\p{N})" : R"(\p{N}+)", where));
        } else {
            unsupported(where, "pre_tokenizer " + type);
        }
    }
}

static uint32_t checked_id(const json& id, const std::string& token, const std::string& where) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= 1 << 24) {
        fail(where, "token \"" + token + "\" has the id " + (id.is_number() ? id.dump() : id.type_name()) +
                        ", expected 0 to 16777215; get a fresh copy of the file");
    }
    return id.get<uint32_t>();
}

static void set_token(Tokenizer& t, uint32_t id, const std::string& bytes) {
    if (t.tokens.size() <= id) t.tokens.resize(id + 1);
    t.tokens[id] = bytes;
}

using Vocabulary = StringMap<uint32_t>;  // as the file writes tokens

// What becomes of the bytes that have no token. HF looks at the characters that stand for them, so the fallback's
// tokens are those of the character's UTF-8.
static void read_byte_rules(Tokenizer& t, const json& model, const Vocabulary& vocab, const std::string& where) {
    const json& unk = member(model, "unk_token");
    const bool byte_fallback = flag(model, "byte_fallback", false);
    t.fuse_unk = flag(model, "fuse_unk", false);
    for (int b = 0; b < 256; ++b) {
        const auto found = t.ids.find(std::string(1, char(b)));
        t.byte_ids[b] = found == t.ids.end() ? Tokenizer::no_token : found->second;
        if (found != t.ids.end()) continue;
        bool complete = byte_fallback;
        for (char c : byte_alphabet().character[b]) {
            char name[8];
            std::snprintf(name, sizeof name, "<0x%02X>", uint8_t(c));
            const auto known = vocab.find(name);
            complete = complete && known != vocab.end();
            if (complete) t.fallback_ids[b].push_back(known->second);
        }
        if (complete) continue;
        t.fallback_ids[b].clear();
        if (unk.is_null()) continue;
        const auto known = vocab.find(string_of(unk, "unk_token"));
        if (known == vocab.end()) unsupported(where, "an unk_token that is not in the vocabulary");
        t.unk_id = known->second;
    }
}

static Vocabulary read_vocabulary(Tokenizer& t, const json& list, const std::string& where) {
    Vocabulary vocab;
    vocab.reserve(list.size());
    for (const auto& [token, value] : list.items()) {
        const uint32_t id = checked_id(value, token, where);
        bool is_byte_level;
        const std::string bytes = bytes_of(token, is_byte_level);
        set_token(t, id, bytes);
        if (is_byte_level) t.ids[bytes] = id;
        vocab[token] = id;
    }
    return vocab;
}

static void read_merges(Tokenizer& t, const json& list, const Vocabulary& vocab, const std::string& where) {
    uint32_t rank = 0;
    for (const json& merge : list) {
        std::string left, right;  // ["a", "b"] or, in old files, "a b"
        if (merge.is_array() && merge.size() == 2) {
            left = string_of(merge[0], "merges"), right = string_of(merge[1], "merges");
        } else {
            const std::string pair = string_of(merge, "merges");
            const size_t space = pair.find(' ');
            left = pair.substr(0, space), right = space == std::string::npos ? "" : pair.substr(space + 1);
        }
        const auto l = vocab.find(left), r = vocab.find(right), merged = vocab.find(left + right);
        if (l == vocab.end() || r == vocab.end() || merged == vocab.end()) {
            fail(where, "merge " + std::to_string(rank) + " (" + left + " " + right +
                            ") has a token that is not in the vocabulary; get a fresh copy of the file");
        }
        t.merges.insert(l->second, r->second, {rank++, merged->second});
    }
}

static void read_model(Tokenizer& t, const json& model, Vocabulary& vocab, const std::string& where) {
    // Old files leave the type out; only BPE has merges.
    if (const std::string type = type_of(model); type != "BPE" && !(type == "null" && model.contains("merges"))) {
        unsupported(where, "model " + type);
    }
    for (const char* option : {"continuing_subword_prefix", "end_of_word_suffix", "dropout"}) {
        const json& value = member(model, option);
        if (!value.is_null() && value != "" && value != 0) unsupported(where, std::string("model.") + option);
    }
    t.ignore_merges = flag(model, "ignore_merges", false);
    vocab = read_vocabulary(t, required(model, "vocab", json::value_t::object), where);
    read_byte_rules(t, model, vocab, where);
    read_merges(t, required(model, "merges", json::value_t::array), vocab, where);
}

void AddedTokens::add(const std::string& text, const AddedToken& token) {
    tokens[text] = token;
    if (std::find(lengths.begin(), lengths.end(), text.size()) == lengths.end()) lengths.push_back(text.size());
    std::sort(lengths.rbegin(), lengths.rend());
    starts[uint8_t(text[0])] = true;
    all_special = all_special && token.special;
}

// Ids as HF gives them, whatever the file says: that of the vocabulary, else the next free one.
static void read_added_tokens(Tokenizer& t, const json& list, const Vocabulary& vocab, const std::string& where) {
    uint32_t next_id = uint32_t(vocab.size());
    std::set<std::string> special;
    for (const json& token : list) {
        const std::string content = string_of(member(token, "content"), "content");
        if (content.empty()) continue;
        checked_id(member(token, "id"), content, where);
        const auto known = vocab.find(content);
        const auto again = t.added_tokens.find(content);
        const uint32_t id = again != t.added_tokens.end() ? again->second
                            : known != vocab.end()        ? known->second
                                                          : next_id++;
        t.added_tokens[content] = id;
        set_token(t, id, content);
        if (flag(token, "special", false)) special.insert(content);
        const AddedToken added{id, special.contains(content), flag(token, "single_word", false),
                               flag(token, "lstrip", false), flag(token, "rstrip", false)};
        if (!flag(token, "normalized", !added.special)) {
            t.added_raw.add(content, added);
            continue;
        }
        std::string text = content;
        for (const NormalForm& form : t.normalizers) {
            std::string buffer;
            text = form.apply(text, buffer);
        }
        t.added_normal.add(text, added);
    }

    const auto first_of = [&](std::initializer_list<const char*> names) -> std::optional<uint32_t> {
        for (const char* name : names) {
            if (const auto found = t.added_tokens.find(name); found != t.added_tokens.end()) return found->second;
        }
        return std::nullopt;
    };
    t.end_of_text = first_of({"<|endoftext|>", "<|end_of_text|>"});
    t.document_start = first_of({"<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>"});
}

static void read_fields(Tokenizer& t, const std::string& where) {
    const json root = parse_json(t.json);
    Vocabulary vocab;
    read_model(t, required(root, "model", json::value_t::object), vocab, where);
    for (const char* option : {"truncation", "padding"}) {
        if (!member(root, option).is_null()) unsupported(where, option);
    }
    for (const json* step : steps_of(member(root, "decoder"), "decoders")) {
        if (const std::string type = type_of(*step); type != "ByteLevel") unsupported(where, "decoder " + type);
    }
    read_normalizer(t, member(root, "normalizer"), where);
    read_pre_tokenizer(t, member(root, "pre_tokenizer"), where);
    read_added_tokens(t, member(root, "added_tokens"), vocab, where);
}

Tokenizer Tokenizer::parse(std::string text, const std::string& where) {
    Tokenizer t;
    t.json = std::move(text);
    try {
        read_fields(t, where);
    } catch (const Malformed& error) {
        fail(where, std::string("not a tokenizer.json of byte-level BPE: ") + error.what() +
                        "; get a fresh copy or train one with `tokenize train`");
    }
    return t;
}

Tokenizer Tokenizer::load(const std::string& path) { return parse(read_file(path), path); }

void Tokenizer::save(const std::string& path) const { replace_file(path, json); }

// ---------------------------------------------------------------------------------------------------------------------
// 4. Merging

static void append_byte_ids(const Tokenizer& t, std::string_view word, std::vector<uint32_t>& ids) {
    bool pending = false;  // an unk_id that comes before the next byte that has a token, as in HF
    for (char c : word) {
        const uint8_t byte = uint8_t(c);
        if (t.byte_ids[byte] != Tokenizer::no_token) {
            if (pending) ids.push_back(*t.unk_id);
            pending = false;
            ids.push_back(t.byte_ids[byte]);
        } else if (!t.fallback_ids[byte].empty()) {
            ids.insert(ids.end(), t.fallback_ids[byte].begin(), t.fallback_ids[byte].end());
        } else if (t.unk_id) {
            if (pending && !t.fuse_unk) ids.push_back(*t.unk_id);
            pending = true;
        }
    }
    if (pending) ids.push_back(*t.unk_id);
}

constexpr size_t few = 64;
constexpr uint32_t none = UINT32_MAX;

// Again and again the pair of the lowest rank, the leftmost of equals. Quadratic, and the fastest for a usual word.
static void merge_few(const MergeTable& merges, std::vector<uint32_t>& ids) {
    const size_t n = ids.size();
    uint32_t next[few], previous[few], merged[few];
    uint64_t
        candidates[few];  // of the id at i and the next one: rank << 32 | i; of what has gone and the last: all ones
    const auto consider = [&](uint32_t i) {
        const MergeTable::Merge merge = next[i] < n ? merges.find(ids[i], ids[next[i]]) : MergeTable::Merge{};
        candidates[i] = merge.rank == none ? UINT64_MAX : uint64_t(merge.rank) << 32 | i;
        merged[i] = merge.id;
    };
    for (uint32_t i = 0; i < n; ++i) {
        next[i] = i + 1;
        previous[i] = i - 1;
        consider(i);
    }
    for (;;) {
        uint64_t best = UINT64_MAX;
        for (size_t i = 0; i < n; ++i) best = std::min(best, candidates[i]);
        if (best == UINT64_MAX) break;
        const uint32_t i = uint32_t(best), gone = next[i];
        ids[i] = merged[i];
        ids[gone] = none;
        candidates[gone] = UINT64_MAX;
        next[i] = next[gone];
        if (next[i] < n) previous[next[i]] = i;
        consider(i);
        if (i > 0) consider(previous[i]);
    }
    std::erase(ids, none);
}

// Candidates for a merge, by rank, then from left to right. A heap of all of them would miss the caches at every step;
// here those of one rank are gathered, and sorted when it is their turn.
struct CandidateQueue {
    std::unordered_map<uint32_t, std::vector<uint32_t>> buckets;  // rank -> positions
    std::priority_queue<uint32_t, std::vector<uint32_t>, std::greater<>> ranks;
    uint32_t rank = 0;  // of the positions whose turn it is
    std::vector<uint32_t> positions;
    size_t done = 0;
    // Candidates that came after the turn of their rank had begun: rank << 32 | position. Rare, but merges may say so.
    std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> late;

    void push(uint32_t new_rank, uint32_t position) {
        if (new_rank <= rank && !positions.empty()) return late.push(uint64_t(new_rank) << 32 | position);
        std::vector<uint32_t>& bucket = buckets[new_rank];
        if (bucket.empty()) ranks.push(new_rank);
        bucket.push_back(position);
    }
    // The next one, rank << 32 | position; all ones when none is left.
    uint64_t pop() {
        if (done == positions.size() && late.empty()) {
            if (ranks.empty()) return UINT64_MAX;
            rank = ranks.top();
            ranks.pop();
            positions = std::move(buckets.extract(rank).mapped());
            std::sort(positions.begin(), positions.end());
            done = 0;
        }
        const uint64_t next = done < positions.size() ? uint64_t(rank) << 32 | positions[done] : UINT64_MAX;
        if (late.empty() || next < late.top()) return ++done, next;
        const uint64_t first = late.top();
        late.pop();
        return first;
    }
};

// The same for long words, in O(n log n), over a linked list of ids. A candidate is void when one of its two ids has
// been merged since: then the pair at its position has another rank.
static void merge_many(const MergeTable& merges, std::vector<uint32_t>& ids) {
    struct Symbol {
        uint32_t id, previous, next, rank;  // rank: of the merge with the next, or none
    };
    if (ids.size() >= none) throw std::runtime_error("a word of 4 GiB or more is too long to encode");
    const uint32_t n = uint32_t(ids.size());
    std::vector<Symbol> symbols(n);
    CandidateQueue queue;
    const auto consider = [&](uint32_t position) {
        if (position == none) return;
        Symbol& left = symbols[position];
        left.rank = left.next == none ? none : merges.find(left.id, symbols[left.next].id).rank;
        if (left.rank != none) queue.push(left.rank, position);
    };
    for (uint32_t i = 0; i < n; ++i) symbols[i] = {ids[i], i - 1, i + 1 < n ? i + 1 : none, none};
    for (uint32_t i = 0; i < n; ++i) consider(i);
    for (uint64_t best; (best = queue.pop()) != UINT64_MAX;) {
        const uint32_t position = uint32_t(best);
        Symbol& left = symbols[position];
        if (left.rank != best >> 32) continue;
        Symbol& right = symbols[left.next];
        left.id = merges.find(left.id, right.id).id;
        left.next = right.next;
        right.rank = none;
        if (left.next != none) symbols[left.next].previous = position;
        consider(left.previous);
        consider(position);
    }
    size_t count = 0;
    for (uint32_t i = 0; i != none; i = symbols[i].next) ids[count++] = symbols[i].id;
    ids.resize(count);
}

static void merge_word(const Tokenizer& t, std::string_view word, std::vector<uint32_t>& ids) {
    ids.clear();
    const auto whole = t.ignore_merges ? t.ids.find(word) : t.ids.end();
    if (whole != t.ids.end()) return ids.push_back(whole->second);
    append_byte_ids(t, word, ids);
    if (ids.size() <= few) merge_few(t.merges, ids);
    else merge_many(t.merges, ids);
}

// ---------------------------------------------------------------------------------------------------------------------
// 5. Encoding

// Cuts text at its added tokens: visit(section, null) and visit(its text, token) in order.
template <class Visit>
static void for_each_section(const AddedTokens& added, std::string_view text, Special special, Visit visit) {
    const auto none_from = [&](size_t from) {
        while (from < text.size() && !added.starts[uint8_t(text[from])]) ++from;
        return from;
    };
    const auto longest_at = [&](size_t at) {
        for (size_t length : added.lengths) {
            if (length > text.size() - at) continue;
            if (const auto found = added.tokens.find(text.substr(at, length)); found != added.tokens.end())
                return found;
        }
        return added.tokens.end();
    };
    const char* const end = text.data() + text.size();
    const auto is_space = [](const char* p) {
        return class_table()[character_at(p).code_point] == CharacterClass::space;
    };
    const auto is_word = [](const char* p) { return is_word_character(character_at(p).code_point); };

    size_t done = 0;
    const bool nothing_counts = added.tokens.empty() || (special == Special::as_text && added.all_special);
    for (size_t at = nothing_counts ? text.size() : none_from(0); at < text.size(); at = none_from(at)) {
        const auto found = longest_at(at);
        if (found == added.tokens.end()) {
            ++at;
            continue;
        }
        const AddedToken& token = found->second;
        const char* begin = text.data() + at;
        const char* stop = begin + found->first.size();
        at += found->first.size();
        if (special == Special::as_text && token.special) continue;
        if (token.single_word &&
            ((begin > text.data() && is_word(previous_character(begin))) || (stop < end && is_word(stop)))) {
            continue;
        }
        const char* const first = text.data() + done;
        while (token.lstrip && begin > first && is_space(previous_character(begin))) begin = previous_character(begin);
        while (token.rstrip && stop < end && is_space(stop)) stop += character_at(stop).length;
        if (first < begin) visit(std::string_view(first, size_t(begin - first)), nullptr);
        visit(std::string_view(begin, size_t(stop - begin)), &token);
        done = size_t(stop - text.data());
    }
    if (done < text.size()) visit(text.substr(done), nullptr);
}

// The text in its normal form; in a buffer, where it changes.
static std::string_view normalize(const Tokenizer& t, std::string_view text, std::string (&buffers)[2]) {
    for (size_t i = 0; i < t.normalizers.size(); ++i) text = t.normalizers[i].apply(text, buffers[i % 2]);
    return text;
}

static bool lacks_prefix(const Tokenizer& t, std::string_view section) {
    return t.add_prefix_space && !section.empty() && section[0] != ' ';
}

// The words of a section that is valid, normal and prefixed.
static void cut_words(const Tokenizer& t, std::string_view section, std::vector<std::string_view>& words) {
    words = {section};
    std::vector<std::string_view> whole;
    for (const Split& split : t.splits) {
        whole.swap(words);
        words.clear();
        for (std::string_view piece : whole) split.cut(piece, words);
    }
}

bool Tokenizer::cuttable() const {
    // The known patterns end a word there; what an added token takes may reach across, and a prefix would be new.
    if (splits.empty() || !splits[0].scans() || add_prefix_space) return false;
    for (const AddedTokens* added : {&added_raw, &added_normal}) {
        for (const auto& [text, token] : added->tokens) {
            if (token.special) continue;  // text like any other, in a corpus
            const bool plain = std::all_of(text.begin(), text.end(), [](char c) { return c > ' ' && c != ','; });
            if (!plain || token.lstrip || token.rstrip) return false;
        }
    }
    return true;
}

void Tokenizer::split(std::string_view section, std::string& buffer, std::vector<std::string_view>& words) const {
    std::string replaced, normal[2];
    std::string_view text = normalize(*this, to_utf8(section, replaced), normal);
    if (lacks_prefix(*this, text)) text = buffer.assign(" ").append(text);
    else if (text.data() != section.data()) text = buffer = text;
    if (text.empty()) words.clear();
    else cut_words(*this, text, words);
}

// Appends ids, by way of a small array: a word's first three are copied whether it has them or not, without a branch.
struct Output {
    std::vector<uint32_t>& out;
    uint32_t waiting[1024];
    size_t count = 0;

    void flush() {
        out.insert(out.end(), waiting, waiting + count);
        count = 0;
    }
    void append(const uint32_t* ids, size_t n, bool three_readable) {
        if (count + 3 > std::size(waiting)) flush();
        if (three_readable && n <= 3) {
            std::memcpy(waiting + count, ids, 3 * sizeof *ids);
            count += n;
        } else {
            flush();
            out.insert(out.end(), ids, ids + n);
        }
    }
};

// The words of a section of valid text to ids.
static void encode_section(const Tokenizer& t, std::string_view section, WordCache& cache, Output& output) {
    std::vector<uint32_t> ids;
    const char* end;  // of the memory that words may be read from
    const auto encode_word = [&](std::string_view word) {
        if (const WordCache::Ids known = cache.find(word, end); known.data) {
            return output.append(known.data, known.count, known.count <= 3);
        }
        merge_word(t, word, ids);
        cache.insert(word, ids);
        output.append(ids.data(), ids.size(), false);
    };

    std::string prefixed;
    if (lacks_prefix(t, section)) section = prefixed.append(" ").append(section);
    end = section.data() + section.size();
    if (t.splits.size() == 1 && t.splits[0].scans()) {
        const WordEnd word_end = t.splits[0].word_end;
        for (const char* p = section.data(); p < end;) {
            const char* const next = word_end(p, end);
            encode_word({p, size_t(next - p)});
            p = next;
        }
    } else {
        std::vector<std::string_view> words;
        cut_words(t, section, words);
        for (std::string_view word : words) encode_word(word);
    }
}

void Tokenizer::encode(std::string_view text, Special special, WordCache& cache, std::vector<uint32_t>& out) const {
    std::string replaced, normal[2];
    Output output{out, {}};
    const auto append_token = [&](const AddedToken& token) { output.append(&token.id, 1, false); };
    for_each_section(added_raw, to_utf8(text, replaced), special, [&](std::string_view raw, const AddedToken* token) {
        if (token) return append_token(*token);
        const std::string_view section = normalize(*this, raw, normal);
        for_each_section(added_normal, section, special, [&](std::string_view part, const AddedToken* normal_token) {
            if (normal_token) append_token(*normal_token);
            else encode_section(*this, part, cache, output);
        });
    });
    output.flush();
}

std::vector<uint32_t> Tokenizer::encode(std::string_view text, Special special) const {
    WordCache cache;
    std::vector<uint32_t> out;
    encode(text, special, cache, out);
    return out;
}

// ---------------------------------------------------------------------------------------------------------------------
// 6. Decoding

std::string Tokenizer::decode(const std::vector<uint32_t>& ids) const {
    std::string text;
    for (uint32_t id : ids) {
        if (id >= tokens.size()) {
            throw std::runtime_error("token " + std::to_string(id) + " is not in the tokenizer, which has " +
                                     std::to_string(tokens.size()) +
                                     "; use the tokenizer.json the tokens were made with");
        }
        text += tokens[id];
    }
    return text;
}
