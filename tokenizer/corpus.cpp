#include "corpus.h"

#include <utf8proc.h>
#include <zlib.h>
#include <zstd.h>
#include <zstd_errors.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <stdexcept>

#include "json_text.h"
#include "trainer/files.h"

namespace fs = std::filesystem;

// ---------------------------------------------------------------------------------------------------------------------
// Bytes of a file, decompressed. zlib reads plain files too.

struct Input {
    std::string path;
    gzFile gz = nullptr;
    ZSTD_DStream* zstd = nullptr;  // decompresses what gz reads as plain bytes
    std::vector<char> packed;
    ZSTD_inBuffer waiting = {};
    bool frame_open = true;  // the compressed data so far ends within a frame; no data do, too

    std::string bytes;  // read, and from `at` on not used yet
    size_t at = 0;
    bool at_end = false;
    int64_t line = 0;
    bool is_list = false, in_list = false, list_ended = false;  // of .json: [object, ...]; past its first; past its end

    explicit Input(const std::string& path) : path(path), gz(gzopen(path.c_str(), "rb")) {
        if (!gz) fail_errno("cannot read", path, "check the path");
        gzbuffer(gz, 1 << 17);
        if (path.ends_with(".zst")) zstd = ZSTD_createDStream(), packed.resize(ZSTD_DStreamInSize());
    }
    Input(const Input&) = delete;
    ~Input() { gzclose_r(gz), ZSTD_freeDStream(zstd); }

    [[noreturn]] void corrupt(const std::string& reason) const {
        ::fail(path, "cannot be decompressed: " + reason + "; get a fresh copy of the file");
    }
    [[noreturn]] void damaged() const { corrupt("damaged before byte " + std::to_string(gzoffset(gz))); }

    size_t read_gz(char* out, size_t size) {
        const int count = gzread(gz, out, unsigned(size));
        int code = Z_OK;
        gzerror(gz, &code);
        if (code == Z_ERRNO) fail_errno("cannot read", path, "check the disk");
        if (code == Z_BUF_ERROR) corrupt("it ends too early");
        if (count < 0) damaged();
        if (path.ends_with(".gz") && gzdirect(gz)) corrupt(count ? "not in gzip format" : "it is empty");
        return size_t(count);
    }

    size_t read_zstd(char* out, size_t size) {
        ZSTD_outBuffer target = {out, size, 0};
        while (target.pos == 0) {
            if (waiting.pos == waiting.size) {
                waiting = {packed.data(), read_gz(packed.data(), packed.size()), 0};
                if (waiting.size == 0 && frame_open) corrupt(gzoffset(gz) ? "it ends too early" : "it is empty");
                if (waiting.size == 0) return 0;
            }
            const size_t result = ZSTD_decompressStream(zstd, &target, &waiting);
            if (ZSTD_getErrorCode(result) == ZSTD_error_prefix_unknown) corrupt("not in zstd format");
            if (ZSTD_isError(result)) damaged();
            frame_open = result != 0;
        }
        return target.pos;
    }

    // Reads until `size` unused bytes are there, or the file ends.
    void fill(size_t size) {
        constexpr size_t chunk = 1 << 16;
        if (bytes.size() - at >= size || at_end) return;
        bytes.erase(0, at);
        at = 0;
        while (bytes.size() < size && !at_end) {
            const size_t before = bytes.size();
            bytes.resize(before + chunk);
            const size_t count = zstd ? read_zstd(&bytes[before], chunk) : read_gz(&bytes[before], chunk);
            bytes.resize(before + count);
            at_end = count == 0;
        }
    }

    // The next line without its end; valid until the next call.
    bool read_line(std::string_view& result) {
        size_t searched = 0, end;
        for (size_t wanted = 1;; wanted = 2 * searched) {
            fill(wanted);
            end = bytes.find('\n', at + searched);
            searched = bytes.size() - at;
            if (end != std::string::npos || at_end) break;
        }
        if (searched == 0) return false;
        result = std::string_view(bytes).substr(at, end == std::string::npos ? end : end - at);
        at += std::min(result.size() + 1, searched);
        ++line;
        return true;
    }

    // The next object of a list; valid until the next call. What it holds is not checked, but for where it ends.
    bool read_element(std::string_view& result) {
        const auto refuse = [&](const char* what) { ::fail(path + ":" + std::to_string(line), what); };
        bool in_string = false, escaped = false, comma = false;
        int depth = 0;
        size_t begin = 0;
        for (size_t i = 0;; ++i) {
            fill(i + 1);
            if (at + i == bytes.size()) {
                if (!list_ended) refuse("the file ends within its list; copy it again");
                return false;
            }
            const char c = bytes[at + i];
            line += c == '\n';
            if (in_string) {
                in_string = c != '"' || escaped;
                escaped = c == '\\' && !escaped;
            } else if (depth > 0) {
                in_string = c == '"';
                depth += (c == '{' || c == '[') - (c == '}' || c == ']');
                if (depth > 0) continue;
                result = std::string_view(bytes).substr(at + begin, i + 1 - begin);
                at += i + 1;
                in_list = true;
                return true;
            } else if (c == '{' && !list_ended && comma == in_list) {
                begin = i, depth = 1;
            } else if (c == ',' && in_list && !comma) {
                comma = true;
            } else if (c == ']' && !list_ended && !comma) {
                list_ended = true;
            } else if (c != ' ' && c != '\t' && c != '\r' && c != '\n') {
                refuse("expected a list of objects: [{...}, {...}]");
            }
        }
    }

    // A line, or an object of a list.
    bool read_record(std::string_view& result) { return is_list ? read_element(result) : read_line(result); }
};

// ---------------------------------------------------------------------------------------------------------------------
// What is no text in UTF-8

static std::string kind_of(std::string path) {  // ".txt", ".jsonl", or what else the name ends with
    for (const char* packed : {".gz", ".zst"}) {
        if (path.ends_with(packed)) path.resize(path.size() - std::strlen(packed));
    }
    return fs::path(path).extension();
}

// UTF-16 without a byte order mark: "LE" or "BE"; else "". Spaces, line ends and Latin letters have a zero byte there,
// on the same side of each pair; in other text zeros are rare, and on either side.
static std::string utf16_order(std::string_view text) {
    const size_t pairs = text.size() / 2, enough = std::max({pairs / 64, std::min<size_t>(pairs, 8), size_t(1)});
    size_t zeros[2] = {};
    for (size_t i = 0; i < 2 * pairs; ++i) zeros[i % 2] += text[i] == 0;
    const auto is_high = [&](int side) { return zeros[side] >= enough && zeros[1 - side] <= zeros[side] / 16; };
    return is_high(1) ? "LE" : is_high(0) ? "BE" : "";
}

// Passes over a byte order mark of UTF-8 at the start of a file. Refuses text in another encoding, which would be
// trained on as what it is not: bytes with zeros between them.
static void begin_text(Input& input) {
    using namespace std::string_view_literals;
    input.fill(4096);
    const std::string_view text = std::string_view(input.bytes).substr(0, 4096);
    const std::string& path = input.path;
    if (text.starts_with("\x28\xB5\x2F\xFD"sv))
        fail(path, "zstd data, where text is expected; decompress it, or let its name end with .zst");
    std::string encoding;
    if (text.starts_with("\xFF\xFE\0\0"sv) || text.starts_with("\0\0\xFE\xFF"sv)) encoding = "UTF-32";
    else if (text.starts_with("\xFF\xFE"sv) || text.starts_with("\xFE\xFF"sv)) encoding = "UTF-16";
    else if (const std::string order = utf16_order(text); !order.empty()) encoding = "UTF-16" + order;
    if (!encoding.empty()) {
        const std::string unpack = input.zstd ? "zstdcat" : gzdirect(input.gz) ? "cat" : "zcat";
        fail(path, "text in " + encoding + ", where UTF-8 is expected; convert it: " + unpack + " '" + path +
                       "' | iconv -f " + encoding + " -t UTF-8 > utf8" + kind_of(path));
    }
    if (text.starts_with("\xEF\xBB\xBF"sv)) input.at += 3;
    const size_t first = input.bytes.find_first_not_of(" \t\r\n", input.at);
    if (kind_of(path) == ".json" && first != text.npos && input.bytes[first] == '[') {
        input.line = 1 + std::count(input.bytes.begin(), input.bytes.begin() + ptrdiff_t(first), '\n');
        input.is_list = true, input.at = first + 1;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Files to documents

static const char* const kinds = ".txt, .jsonl or .json, plain or with .gz or .zst";
static bool holds_objects(const std::string& path) { return kind_of(path) == ".jsonl" || kind_of(path) == ".json"; }

// The corpus files below a folder, in the order of their paths.
static std::vector<std::string> search(const std::string& folder) {
    std::vector<std::string> found;
    try {
        for (const fs::directory_entry& entry : fs::recursive_directory_iterator(folder)) {
            const std::string kind = kind_of(entry.path());  // not .json: tokenizers, settings
            if (entry.is_regular_file() && (kind == ".txt" || kind == ".jsonl")) found.push_back(entry.path());
        }
    } catch (const fs::filesystem_error& error) {
        fail("cannot read the folder " + folder + ": " + error.code().message() +
             "; check its rights and those of the folders in it");
    }
    if (found.empty())
        fail("no text in the folder " + folder + "; expected files .txt or .jsonl, plain or with .gz or .zst");
    std::sort(found.begin(), found.end());
    return found;
}

std::vector<std::string> paths_of(const std::vector<std::string>& patterns) {
    std::vector<std::string> all;
    for (const std::string& pattern : patterns) {
        const std::vector<std::string> paths = find_paths(pattern);
        if (paths.empty()) fail(pattern, "no such file, and none that it matches as a pattern; check the path");
        all.insert(all.end(), paths.begin(), paths.end());
    }
    return all;
}

Corpus::Corpus(const std::vector<std::string>& patterns, std::string field) : field(std::move(field)) {
    std::vector<std::string> found;
    for (const std::string& path : paths_of(patterns)) {
        std::error_code ignored;
        if (fs::is_directory(path, ignored)) {
            const std::vector<std::string> more = search(path);
            found.insert(found.end(), more.begin(), more.end());
        } else {
            if (kind_of(path) != ".txt" && !holds_objects(path))
                fail(path, std::string("unknown kind of file; expected ") + kinds);
            found.push_back(path);
        }
    }
    for (const std::string& path : found) {  // finds out now, not after an hour, what cannot be read
        const struct stat status = ::File(path, O_RDONLY | O_NONBLOCK).status();
        if (!S_ISREG(status.st_mode)) fail(path, "a pipe or device, which cannot be read twice; write it to a file");
        files.push_back({path, status.st_size, status.st_mtim.tv_sec * 1'000'000'000 + status.st_mtim.tv_nsec});
        bytes_total += status.st_size;
        Input input(path);
        begin_text(input);
    }
}

double Corpus::progress() const {
    const int64_t done = bytes_of_done + (input ? gzoffset(input->gz) : 0);
    return bytes_total ? double(done) / double(bytes_total) : 1;
}

// Is the character that ends before text[i] a letter or a digit? No, if it is not UTF-8.
static bool follows_word(std::string_view text, size_t i) {
    size_t begin = i - 1;
    while (begin > 0 && i - begin < 4 && (uint8_t(text[begin]) & 0xC0) == 0x80) --begin;
    utf8proc_int32_t character;
    const auto length =
        utf8proc_iterate(reinterpret_cast<const uint8_t*>(&text[begin]), utf8proc_ssize_t(i - begin), &character);
    if (length != utf8proc_ssize_t(i - begin)) return false;
    const utf8proc_category_t category = utf8proc_category(character);
    return (category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_LO) || category == UTF8PROC_CATEGORY_ND;
}

size_t cut_point(std::string_view text, size_t limit) {
    // A space first: a line's end often has others behind it, which belong together.
    for (size_t i = limit; i > limit / 2; --i) {
        if (text[i] == ' ' && follows_word(text, i)) return i;
    }
    for (size_t i = limit; i > limit / 2; --i) {
        const std::string_view rest = text.substr(i);
        for (const char* mark : {"\n", ",", "，", "。", "、"}) {
            if (rest.starts_with(mark) && follows_word(text, i)) return i;
        }
    }
    return text.npos;
}

static constexpr size_t usual_part = 1 << 20;

bool Corpus::next_of_txt(Part& part) {
    static constexpr std::string_view separator = "<|endoftext|>";
    std::string_view rest;
    size_t end = rest.npos;
    bool separated = false;
    for (size_t limit = usual_part; end == rest.npos; limit *= 2) {
        input->fill(limit + separator.size());
        rest = std::string_view(input->bytes).substr(input->at);
        if (rest.empty()) return false;
        end = rest.substr(0, limit + separator.size()).find(separator);
        separated = end != rest.npos;
        if (!separated) end = rest.size() <= limit ? rest.size() : whole ? rest.npos : cut_point(rest, limit);
    }
    part.text = rest.substr(0, end);
    part.continues = inside;
    inside = !separated;
    input->at += end + (separated ? separator.size() : 0);
    return true;
}

bool Corpus::next_of_jsonl(Part& part) {
    if (document_at == document.size()) {
        std::string_view line;
        if (!input->read_record(line)) return false;
        if (line.starts_with("\xEF\xBB\xBF")) line.remove_prefix(3);  // of a file that was appended to another
        document.clear();
        document_at = 0;
        try {
            if (line.find_first_not_of(" \t\r") == line.npos) return part.text.clear(), true;
            if (conversations) {
                part.conversation = read_conversation(line);
                part.text = part.conversation.text();
                part.continues = false;
                return true;
            }
            document = string_field(line, field);
        } catch (const JsonError& error) {
            fail(input->path + ":" + std::to_string(input->line), error.what());
        }
    }
    const std::string_view rest = std::string_view(document).substr(document_at);
    size_t end = rest.npos;
    for (size_t limit = usual_part; !whole && end == rest.npos && limit < rest.size(); limit *= 2) {
        end = cut_point(rest, limit);
    }
    part.text = rest.substr(0, end);
    part.continues = document_at > 0;
    document_at += part.text.size();
    return true;
}

bool Corpus::begins_with_conversation() const {
    for (const File& file : files) {
        if (!holds_objects(file.path)) continue;
        Input input(file.path);
        begin_text(input);
        for (std::string_view line; input.read_record(line);) {
            if (line.find_first_not_of(" \t\r") != line.npos) return is_conversation(line, field);
        }
    }
    return false;
}

bool Corpus::next(Part& result) {
    for (;;) {
        if (!input) {
            if (file == files.size()) return false;
            if (conversations && !holds_objects(files[file].path))
                fail(files[file].path, "text, where conversations are expected; give .jsonl files alone");
            input = std::make_shared<Input>(files[file].path);
            begin_text(*input);
            inside = false;
        }
        if (kind_of(files[file].path) == ".txt" ? next_of_txt(result) : next_of_jsonl(result)) {
            if (result.text.empty()) continue;
            result.file = file;
            ++part;
            return true;
        }
        input.reset();
        bytes_of_done += files[file++].bytes;
        part = 0;
    }
}

void Corpus::skip_to(size_t to_file, int64_t to_part) {
    for (; file < to_file; ++file) bytes_of_done += files[file].bytes;
    for (Part skipped; part < to_part && next(skipped);) {
    }
}
