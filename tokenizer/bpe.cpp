// The library: tokenizer.json in, text to ids, ids to text.
//
//   1. Files
//   2. Bytes as characters; UTF-8; NFC
//   3. Regexes (PCRE2)
//   4. tokenizer.json
//   5. Encoding: added tokens, words, merges
//   6. Decoding
#define PCRE2_CODE_UNIT_WIDTH 8
#include "bpe.h"

#include <pcre2.h>
#include <utf8proc.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <queue>
#include <sstream>
#include <stdexcept>

using nlohmann::json;

// ---------------------------------------------------------------------------------------------------------------------
// 1. Files

std::string read_whole_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::ostringstream content;
    if (!file || (file.peek() != EOF && !(content << file.rdbuf()))) {
        throw std::runtime_error("cannot read " + path + ": " + std::strerror(errno) + "; check the path");
    }
    return content.str();
}

void write_whole_file(const std::string& path, std::string_view content) {
    const std::string temporary = path + ".tmp";  // renamed when complete, so that no reader meets half a file
    std::ofstream file(temporary, std::ios::binary);
    file << content;
    file.close();
    if (!file || std::rename(temporary.c_str(), path.c_str()) != 0) {
        const std::string reason = std::strerror(errno);
        std::remove(temporary.c_str());
        throw std::runtime_error("cannot write " + path + ": " + reason +
                                 "; check the folder, its rights and its space");
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. Bytes as characters; UTF-8; NFC

static std::string utf8(uint32_t code_point) {  // below U+0800, which is all that ByteAlphabet needs
    if (code_point < 0x80) return std::string(1, char(code_point));
    return {char(0xC0 | code_point >> 6), char(0x80 | (code_point & 0x3F))};
}

// Printable characters of Latin-1 stand for themselves; the other bytes get U+0100, U+0101, ... in their order.
const ByteAlphabet& byte_alphabet() {
    static const ByteAlphabet alphabet = [] {
        const auto printable = [](int b) { return (b > 0x20 && b < 0x7F) || (b > 0xA0 && b != 0xAD); };
        ByteAlphabet a;
        int count = 0, others = 0;
        for (bool pass : {true, false}) {
            for (int b = 0; b < 256; ++b) {
                if (printable(b) != pass) continue;
                a.character[b] = utf8(pass ? b : 0x100 + others++);
                a.order[count++] = uint8_t(b);
            }
        }
        return a;
    }();
    return alphabet;
}

struct Character {
    size_t length;  // in bytes; of a malformed one: the bytes that a decoder replaces by one U+FFFD
    bool valid;
};

// The UTF-8 character at the start of s, which is not empty. A malformed one is as long as it is the beginning of some
// valid character, and at least a byte: Unicode's "maximal subpart", which Python and Rust replace as well.
static Character first_character(std::string_view s) {
    const auto byte = [&](size_t i) { return i < s.size() ? uint8_t(s[i]) : 0; };
    const auto in = [&](size_t i, int low, int high) { return byte(i) >= low && byte(i) <= high; };
    const uint8_t lead = byte(0);
    if (lead < 0x80) return {1, true};
    if (lead < 0xC2 || lead > 0xF4) return {1, false};  // a continuation, an overlong form, or above U+10FFFF
    const size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    const int low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;   // below: overlong
    const int high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;  // above: a surrogate, or above U+10FFFF
    if (!in(1, low, high)) return {1, false};
    for (size_t i = 2; i < length; ++i) {
        if (!in(i, 0x80, 0xBF)) return {i, false};
    }
    return {length, true};
}

// The length of the longest valid beginning.
static size_t valid_prefix(std::string_view text) {
    size_t i = 0;
    while (i < text.size()) {
        for (uint64_t eight; i + 8 <= text.size(); i += 8) {  // ASCII, which most texts mostly are
            std::memcpy(&eight, text.data() + i, 8);
            if (eight & 0x8080808080808080) break;
        }
        if (i == text.size()) break;
        const Character c = first_character(text.substr(i));
        if (!c.valid) break;
        i += c.length;
    }
    return i;
}

// The text with U+FFFD in place of what is not UTF-8; in `buffer`, unless there is nothing to replace.
static std::string_view to_utf8(std::string_view text, std::string& buffer) {
    size_t valid = valid_prefix(text);
    if (valid == text.size()) return text;
    buffer.clear();
    while (!text.empty()) {
        buffer += text.substr(0, valid);
        text.remove_prefix(valid);
        if (text.empty()) break;
        buffer += "\uFFFD";
        text.remove_prefix(first_character(text).length);
        valid = valid_prefix(text);
    }
    return buffer;
}

static std::string to_nfc(std::string_view text) {
    // Characters below U+0300, the first combining one, are NFC already; the lead bytes of all others are >= 0xCC.
    if (std::all_of(text.begin(), text.end(), [](char c) { return uint8_t(c) < 0xCC; })) return std::string(text);
    uint8_t* normal = nullptr;
    const auto length = utf8proc_map(reinterpret_cast<const uint8_t*>(text.data()), utf8proc_ssize_t(text.size()),
                                     &normal, utf8proc_option_t(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
    if (length < 0) throw std::runtime_error(std::string("cannot normalize to NFC: ") + utf8proc_errmsg(length));
    const std::unique_ptr<uint8_t, decltype(&std::free)> owner(normal, std::free);
    return std::string(reinterpret_cast<char*>(normal), size_t(length));
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. Regexes

const char* const gpt2_pattern = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

struct Regex {
    pcre2_code* code;
    explicit Regex(pcre2_code* code) : code(code) {}  // clang 14 has no parentheses for aggregates
    ~Regex() { pcre2_code_free(code); }
};

static std::shared_ptr<const Regex> compile(const std::string& pattern, uint32_t options, const std::string& where) {
    int error = 0;
    PCRE2_SIZE offset = 0;
    pcre2_code* code =
        pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), options, &error, &offset, nullptr);
    if (!code) {
        char reason[128];
        pcre2_get_error_message(error, reinterpret_cast<PCRE2_UCHAR*>(reason), sizeof reason);
        throw std::runtime_error(where + ": cannot compile the regex " + pattern + ": " + reason +
                                 "; use a tokenizer.json whose regex PCRE2 understands");
    }
    pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);  // where there is no JIT, the interpreter gives the same matches
    return std::make_shared<const Regex>(code);
}

// PCRE2's \s counts U+180E as a space, which Unicode and Hugging Face's engine do not. So \s is spelled out.
static std::string spell_out_spaces(const std::string& pattern) {
    std::string out;
    bool in_class = false;
    for (size_t i = 0; i < pattern.size(); ++i) {
        const char c = pattern[i];
        if (c == '\\' && i + 1 < pattern.size()) {
            const char escaped = pattern[++i];
            const std::string spaces = R"(\p{Z}\x09-\x0d\x85)";
            if (escaped == 's') out += in_class ? spaces : "[" + spaces + "]";
            else if (escaped == 'S' && !in_class) out += "[^" + spaces + "]";
            else out += {c, escaped};
            continue;
        }
        if (c == '[') in_class = true;
        if (c == ']') in_class = false;
        out += c;
    }
    return out;
}

static std::shared_ptr<const Regex> compile_split(const std::string& pattern, const std::string& where) {
    return compile(spell_out_spaces(pattern), PCRE2_UTF | PCRE2_UCP, where);
}

static std::string escaped(std::string_view literal) {
    std::string out;
    for (char c : literal) {
        if (uint8_t(c) < 0x80 && !std::isalnum(uint8_t(c))) out += '\\';
        out += c;
    }
    return out;
}

// Cuts text at its matches: visit(piece, is_match) in order, nothing left out. The text must be valid UTF-8 if the
// regex was compiled with PCRE2_UTF.
template <class Visit>
static void for_each_piece(const Regex& regex, std::string_view text, Visit visit) {
    struct Memory {
        pcre2_match_data* data = pcre2_match_data_create(1, nullptr);
        pcre2_match_context* context = pcre2_match_context_create(nullptr);
        ~Memory() { pcre2_match_data_free(data), pcre2_match_context_free(context); }
    } memory;
    pcre2_set_match_limit(memory.context, UINT32_MAX);  // a megabyte of spaces is unusual, and no error
    const PCRE2_SIZE* span = pcre2_get_ovector_pointer(memory.data);

    size_t done = 0, from = 0;
    while (from < text.size()) {
        const int found = pcre2_match(regex.code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                                      PCRE2_NO_UTF_CHECK, memory.data, memory.context);
        if (found == PCRE2_ERROR_NOMATCH) break;
        if (found < 0) {
            char reason[128];
            pcre2_get_error_message(found, reinterpret_cast<PCRE2_UCHAR*>(reason), sizeof reason);
            throw std::runtime_error(std::string("cannot split a text: ") + reason + "; shorten its longest lines");
        }
        const size_t begin = span[0], end = span[1];
        if (begin == end) {  // an empty match cuts nothing; look again one character further
            from = end + (end < text.size() ? first_character(text.substr(end)).length : 1);
            continue;
        }
        if (done < begin) visit(text.substr(done, begin - done), false);
        visit(text.substr(begin, end - begin), true);
        done = from = end;
    }
    if (done < text.size()) visit(text.substr(done), false);
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. tokenizer.json

static std::string type_of(const json& part) { return part.is_null() ? "null" : part.value("type", "null"); }

[[noreturn]] static void unsupported(const std::string& where, const std::string& what) {
    throw std::runtime_error(
        where + ": " + what +
        " is not supported; use a byte-level BPE tokenizer.json such as GPT-2's, Llama 3's or Qwen's");
}

static void read_normalizer(Tokenizer& t, const json& part, const std::string& where) {
    const std::string type = type_of(part);
    if (type == "NFC") t.nfc = true;
    else if (type == "Sequence")
        for (const json& p : part.at("normalizers")) read_normalizer(t, p, where);
    else if (type != "null") unsupported(where, "normalizer " + type);
}

static void read_pre_tokenizer(Tokenizer& t, const json& part, const std::string& where) {
    const std::string type = type_of(part);
    if (type == "ByteLevel") {
        t.add_prefix_space = part.value("add_prefix_space", true);
        if (t.add_prefix_space && !t.splits.empty()) unsupported(where, "add_prefix_space after another pre-tokenizer");
        if (part.value("use_regex", true)) t.splits.push_back(compile_split(gpt2_pattern, where));
    } else if (type == "Split") {
        const json& pattern = part.at("pattern");
        if (part.value("behavior", "") != "Isolated" || part.value("invert", false)) {
            unsupported(where, "a Split other than Isolated");
        }
        t.splits.push_back(compile_split(pattern.contains("Regex") ? pattern.at("Regex").get<std::string>()
                                                                   : escaped(pattern.at("String").get<std::string>()),
                                         where));
    } else if (type == "Digits") {
        t.splits.push_back(compile_split(part.value("individual_digits", false) ? R"(\p{N})" : R"(\p{N}+)", where));
    } else {
        unsupported(where, "pre_tokenizer " + type);
    }
}

static void read_pre_tokenizers(Tokenizer& t, const json& part, const std::string& where) {
    const json steps = type_of(part) == "Sequence" ? part.at("pretokenizers") : json::array({part});
    if (steps.empty() || type_of(steps.back()) != "ByteLevel") {
        unsupported(where, "a pre_tokenizer that does not end with ByteLevel");
    }
    for (const json& step : steps) read_pre_tokenizer(t, step, where);
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
        const size_t length = first_character(std::string_view(token).substr(i)).length;
        const auto found = byte_of.find(std::string_view(token).substr(i, length));
        if (found == byte_of.end()) return is_byte_level = false, token;
        bytes += found->second;
        i += length;
    }
    return is_byte_level = true, bytes;
}

static uint32_t checked_id(const json& id, const std::string& token, const std::string& where) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= 1 << 24) {
        throw std::runtime_error(where + ": token \"" + token + "\" has the id " + id.dump() +
                                 ", expected 0 to 16777215; get a fresh copy of the file");
    }
    return id.get<uint32_t>();
}

static void set_token(Tokenizer& t, uint32_t id, const std::string& bytes) {
    if (t.tokens.size() <= id) t.tokens.resize(id + 1);
    t.tokens[id] = bytes;
}

static void read_model(Tokenizer& t, const json& model, const std::string& where) {
    // Old files leave the type out; only BPE has merges.
    if (const std::string type = model.value("type", model.contains("merges") ? "BPE" : "none"); type != "BPE") {
        unsupported(where, "model " + type);
    }
    for (const char* option : {"continuing_subword_prefix", "end_of_word_suffix", "dropout"}) {
        if (model.contains(option) && !model[option].is_null() && model[option] != "" && model[option] != 0) {
            unsupported(where, std::string("model.") + option);
        }
    }
    t.ignore_merges = model.value("ignore_merges", false);

    const json& vocab = model.at("vocab");
    for (const auto& [token, value] : vocab.items()) {
        const uint32_t id = checked_id(value, token, where);
        bool is_byte_level;
        const std::string bytes = bytes_of(token, is_byte_level);
        set_token(t, id, bytes);
        if (is_byte_level) t.ids[bytes] = id;
    }
    for (int b = 0; b < 256; ++b) {
        const auto found = t.ids.find(std::string(1, char(b)));
        if (found == t.ids.end()) unsupported(where, "a vocabulary without the byte " + std::to_string(b));
        t.byte_ids[b] = found->second;
    }

    uint32_t rank = 0;
    for (const json& merge : model.at("merges")) {
        std::string left, right;
        if (merge.is_array()) {
            left = merge.at(0), right = merge.at(1);
        } else {
            const std::string pair = merge;
            const size_t space = pair.find(' ');
            left = pair.substr(0, space), right = space == std::string::npos ? "" : pair.substr(space + 1);
        }
        if (!vocab.contains(left) || !vocab.contains(right) || !vocab.contains(left + right)) {
            throw std::runtime_error(where + ": merge " + std::to_string(rank) + " (" + merge.dump() +
                                     ") has a token that is not in the vocabulary; get a fresh copy of the file");
        }
        const uint64_t pair = uint64_t(vocab[left].get<uint32_t>()) << 32 | vocab[right].get<uint32_t>();
        t.merges[pair] = {rank++, vocab[left + right].get<uint32_t>()};
    }
}

// One regex that finds any of the tokens, the longest where one is the beginning of another.
static std::shared_ptr<const Regex> any_of(std::vector<std::string> tokens, const std::string& where) {
    if (tokens.empty()) return nullptr;
    std::stable_sort(tokens.begin(), tokens.end(), [](auto& a, auto& b) { return a.size() > b.size(); });
    std::string pattern;
    for (const std::string& token : tokens) {
        if (!pattern.empty()) pattern += '|';
        pattern += escaped(token);
    }
    return compile(pattern, 0, where);
}

static void read_added_tokens(Tokenizer& t, const json& list, const std::string& where) {
    std::vector<std::string> all, non_special;
    for (const json& token : list) {
        const std::string content = token.at("content");
        for (const char* option : {"single_word", "lstrip", "rstrip"}) {
            if (token.value(option, false)) unsupported(where, "added token \"" + content + "\" with " + option);
        }
        if (content.empty()) continue;
        t.added_tokens[content] = checked_id(token.at("id"), content, where);
        set_token(t, t.added_tokens[content], content);
        all.push_back(content);
        if (!token.value("special", false)) non_special.push_back(content);
    }
    t.any_added_token = any_of(all, where);
    t.non_special_added_token = any_of(non_special, where);

    const auto first_of = [&](std::initializer_list<const char*> names) -> std::optional<uint32_t> {
        for (const char* name : names) {
            if (const auto found = t.added_tokens.find(name); found != t.added_tokens.end()) return found->second;
        }
        return std::nullopt;
    };
    t.end_of_text = first_of({"<|endoftext|>", "<|end_of_text|>"});
    t.document_start = first_of({"<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>"});
}

Tokenizer Tokenizer::parse(std::string text, const std::string& where) {
    Tokenizer t;
    t.json = std::move(text);
    try {
        const auto root = nlohmann::json::parse(t.json);
        const nlohmann::json none;
        const auto part = [&](const char* name) -> const nlohmann::json& {
            return root.contains(name) ? root[name] : none;
        };
        read_model(t, root.at("model"), where);
        read_normalizer(t, part("normalizer"), where);
        read_pre_tokenizers(t, part("pre_tokenizer"), where);
        read_added_tokens(t, part("added_tokens"), where);
    } catch (const nlohmann::json::exception& error) {
        throw std::runtime_error(where + ": not a tokenizer.json of byte-level BPE (" + error.what() +
                                 "); get a fresh copy or train one with `tokenize train`");
    }
    return t;
}

Tokenizer Tokenizer::load(const std::string& path) { return parse(read_whole_file(path), path); }
void Tokenizer::save(const std::string& path) const { write_whole_file(path, json); }

// ---------------------------------------------------------------------------------------------------------------------
// 5. Encoding

void Tokenizer::split(std::string_view section, std::string& buffer, std::vector<std::string_view>& words) const {
    section = to_utf8(section, buffer);
    if (nfc) section = buffer = to_nfc(section);
    if (add_prefix_space && !section.starts_with(' ')) section = buffer = std::string(" ").append(section);

    std::vector<std::string_view> pieces = {section}, finer;
    for (const auto& regex : splits) {
        finer.clear();
        for (std::string_view piece : pieces) {
            for_each_piece(*regex, piece, [&](std::string_view word, bool) { finer.push_back(word); });
        }
        pieces.swap(finer);
    }
    if (!section.empty()) words.insert(words.end(), pieces.begin(), pieces.end());
}

// Merges, as long as there is one, the leftmost pair of the lowest rank. The symbols are a linked list, the pairs that
// can merge a heap: O(n log n), so a word may be a megabyte long.
static std::vector<uint32_t> merge_word(const Tokenizer& t, std::string_view word) {
    constexpr uint32_t none = UINT32_MAX;
    struct Symbol {
        uint32_t id, previous, next;
    };
    struct Candidate {
        Tokenizer::Merge merge;
        uint32_t position, left, right;                 // of the left symbol; the ids that it was found with
        bool operator<(const Candidate& other) const {  // the top of a std::priority_queue is the largest
            if (merge.rank != other.merge.rank) return merge.rank > other.merge.rank;
            return position > other.position;
        }
    };

    const uint32_t n = uint32_t(word.size());
    std::vector<Symbol> symbols(n);
    for (uint32_t i = 0; i < n; ++i) symbols[i] = {t.byte_ids[uint8_t(word[i])], i - 1, i + 1 < n ? i + 1 : none};

    std::priority_queue<Candidate> candidates;
    const auto consider = [&](uint32_t position) {
        if (position == none || symbols[position].next == none) return;
        const uint32_t left = symbols[position].id, right = symbols[symbols[position].next].id;
        const auto found = t.merges.find(uint64_t(left) << 32 | right);
        if (found != t.merges.end()) candidates.push({found->second, position, left, right});
    };
    for (uint32_t i = 0; i < n; ++i) consider(i);

    while (!candidates.empty()) {
        const Candidate best = candidates.top();
        candidates.pop();
        Symbol& left = symbols[best.position];
        if (left.id != best.left || left.next == none || symbols[left.next].id != best.right) continue;  // merged since
        Symbol& right = symbols[left.next];
        left.id = best.merge.id;
        right.id = none;
        left.next = right.next;
        if (left.next != none) symbols[left.next].previous = best.position;
        consider(left.previous);
        consider(best.position);
    }

    std::vector<uint32_t> ids;
    for (uint32_t i = 0; i < n; i = symbols[i].next) ids.push_back(symbols[i].id);  // none ends it too: none >= n
    return ids;
}

static void encode_word(const Tokenizer& t, std::string_view word, WordCache& cache, std::vector<uint32_t>& out) {
    constexpr size_t max_words = 1 << 18, max_length = 64;  // some tens of MB; longer words hardly come again
    if (const auto found = cache.find(word); found != cache.end()) {
        out.insert(out.end(), found->second.begin(), found->second.end());
        return;
    }
    std::vector<uint32_t> ids;
    const auto whole = t.ignore_merges ? t.ids.find(word) : t.ids.end();
    if (whole != t.ids.end()) ids = {whole->second};
    else ids = merge_word(t, word);
    out.insert(out.end(), ids.begin(), ids.end());
    if (word.size() > max_length) return;
    if (cache.size() >= max_words) cache.clear();
    cache.emplace(word, std::move(ids));
}

void Tokenizer::encode(std::string_view text, Special special, WordCache& cache, std::vector<uint32_t>& out) const {
    std::string replaced, buffer;
    text = to_utf8(text, replaced);
    std::vector<std::string_view> words;
    const auto encode_section = [&](std::string_view section, bool is_added_token) {
        if (is_added_token) return out.push_back(added_tokens.find(section)->second);
        words.clear();
        split(section, buffer, words);
        for (std::string_view word : words) encode_word(*this, word, cache, out);
    };
    const Regex* added = (special == Special::parse ? any_added_token : non_special_added_token).get();
    if (added) for_each_piece(*added, text, encode_section);
    else if (!text.empty()) encode_section(text, false);
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
