// Files: opened, read and written as wholes or in pieces. Errors are std::runtime_error: one line that names the file,
// what failed and why. Depends on nothing of the project, so that tokenizer/ may use it too.
#pragma once

#include <fcntl.h>
#include <glob.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utf8proc.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

// One line of UTF-8, whatever a name or a damaged file put into it: control characters become spaces, bytes that are
// not UTF-8 are written out ("caf\xe9"). The log and shards.json are JSON, which can hold nothing else.
inline std::string printable(std::string_view text) {
    std::string line;
    for (size_t at = 0, length; at < text.size(); at += length) {
        utf8proc_int32_t character;
        const auto found = utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(&text[at]),
                                            utf8proc_ssize_t(text.size() - at), &character);
        length = found > 0 ? size_t(found) : 1;
        if (found <= 0) {
            char hex[8];
            std::snprintf(hex, sizeof hex, "\\x%02x", unsigned{static_cast<unsigned char>(text[at])});
            line += hex;
        } else if (utf8proc_category(character) == UTF8PROC_CATEGORY_CC) {
            line += ' ';
        } else {
            line += text.substr(at, length);
        }
    }
    return line;
}

[[noreturn]] inline void fail(const std::string& line) { throw std::runtime_error(printable(line)); }
[[noreturn]] inline void fail(const std::string& path, const std::string& what) { fail(path + ": " + what); }

// "cannot open PATH: No such file or directory; HINT". Reads errno, so it comes right after the call that failed.
[[noreturn]] inline void fail_errno(const std::string& action, const std::string& path, const std::string& hint = "") {
    fail(action + " " + path + ": " + std::strerror(errno) + (hint.empty() ? "" : "; " + hint));
}

// An open file, closed when it goes out of scope.
class File {
  public:
    File() = default;
    explicit File(std::string path, int flags = O_RDONLY, const std::string& hint = "check the path")
        : path_(std::move(path)), fd_(::open(path_.c_str(), flags | O_CLOEXEC, 0666)) {
        if (fd_ < 0) fail_errno(flags & O_CREAT ? "cannot create" : "cannot open", path_, hint);
    }
    static File create(std::string path) {
        return File(std::move(path), O_WRONLY | O_CREAT | O_TRUNC, "check the folder and its rights");
    }
    File(File&& other) noexcept : path_(std::move(other.path_)), fd_(std::exchange(other.fd_, -1)) {}
    File& operator=(File&& other) noexcept {
        std::swap(path_, other.path_);
        std::swap(fd_, other.fd_);
        return *this;
    }
    ~File() {
        if (fd_ >= 0) ::close(fd_);
    }

    const std::string& path() const { return path_; }
    int descriptor() const { return fd_; }

    struct stat status() const {
        struct stat result {};
        if (::fstat(fd_, &result) != 0) fail_errno("cannot stat", path_);
        return result;
    }

    int64_t size() const {
        const struct stat found = status();
        if (S_ISDIR(found.st_mode)) fail(path_, "a folder, where a file is expected");
        if (!S_ISREG(found.st_mode)) fail(path_, "not a regular file");
        return found.st_size;
    }

    // All of `bytes` from `offset`, or an error. Safe to call from several threads.
    void read(int64_t offset, int64_t bytes, void* out) const {
        for (int64_t done = 0; done < bytes;) {
            const ssize_t n = ::pread(fd_, static_cast<char*>(out) + done, bytes - done, offset + done);
            if (n < 0 && errno == EINTR) continue;
            if (n < 0) fail_errno("cannot read byte " + std::to_string(offset + done) + " of", path_);
            if (n == 0)
                fail(path_, "ends at byte " + std::to_string(offset + done) + ", and was longer when it was opened");
            done += n;
        }
    }

    // From where the last such call ended, to the end of the file or pipe.
    std::string read_rest() const {
        std::string contents;
        char piece[1 << 16];
        for (;;) {
            const ssize_t n = ::read(fd_, piece, sizeof piece);
            if (n < 0 && errno == EINTR) continue;
            if (n < 0) fail_errno("cannot read", path_);
            if (n == 0) return contents;
            contents.append(piece, n);
        }
    }

    void write(const void* data, size_t bytes) {
        for (size_t done = 0; done < bytes;) {
            const ssize_t n = ::write(fd_, static_cast<const char*>(data) + done, bytes - done);
            if (n < 0 && errno == EINTR) continue;
            if (n < 0) fail_errno("cannot write", path_);
            done += n;
        }
    }

    // EINVAL: there is nothing to sync, as with pipes, and with folders on some network file systems.
    void sync() {
        if (::fsync(fd_) != 0 && errno != EINVAL) fail_errno("cannot write to disk", path_);
    }

    // Network file systems report a full disk as late as here.
    void close() {
        if (::close(std::exchange(fd_, -1)) != 0) fail_errno("cannot close", path_);
    }

    // Asks the system to fetch these bytes; advice it may ignore. Linux cuts a request to its read-ahead size.
    void prefetch(int64_t offset, int64_t bytes) const {
        constexpr int64_t piece = 128 << 10;
        for (int64_t done = 0; done < bytes; done += piece)
            ::posix_fadvise(fd_, offset + done, std::min(piece, bytes - done), POSIX_FADV_WILLNEED);
    }

  private:
    std::string path_;
    int fd_ = -1;
};

// What a path with * ? [] stands for, sorted byte by byte: the order must not depend on the locale. From folder to
// folder, what has this very name comes before what matches it, so that run[1]/*.bin finds the files in "run[1]".
inline std::vector<std::string> find_paths(const std::string& pattern) {
    std::vector<std::string> found(pattern.empty() ? 0 : 1);
    for (size_t begin = 0, end; begin < pattern.size(); begin = end) {
        end = std::min(pattern.find('/', begin), pattern.size());
        end = std::min(pattern.find_first_not_of('/', end), pattern.size());
        const std::string name = pattern.substr(begin, end - begin);  // with the slashes behind it
        for (const std::string& folder : std::exchange(found, {})) {
            struct stat status;
            if (::lstat((folder + name).c_str(), &status) == 0) {
                found.push_back(folder + name);
                continue;
            }
            std::string escaped;
            for (const char c : folder) escaped.append(std::strchr("*?[\\", c) ? "\\" : "").push_back(c);
            glob_t matches{};
            const int failed = ::glob((escaped + name).c_str(), GLOB_NOSORT | GLOB_ERR, nullptr, &matches);
            const bool forbidden = failed == GLOB_ABORTED && errno == EACCES;
            for (size_t i = 0; !failed && i < matches.gl_pathc; i++) {
                const std::string_view path = matches.gl_pathv[i];
                if (name.back() != '/' || path.back() == '/') found.emplace_back(path);  // x/ is no file x
            }
            ::globfree(&matches);
            if (forbidden) fail("cannot search " + folder + " for " + name + ": Permission denied; check its rights");
        }
    }
    std::sort(found.begin(), found.end());
    return found;
}

inline std::string read_file(const std::string& path) { return File(path).read_rest(); }

// On disk when it returns. A reader may meet a part of it: see replace_file.
inline void write_file(const std::string& path, std::string_view contents) {
    File file = File::create(path);
    file.write(contents.data(), contents.size());
    file.sync();
    file.close();
}

// Renamed when complete: a reader meets the former contents or the new ones, never a part.
inline void replace_file(const std::string& path, std::string_view contents) {
    const std::string temporary = path + ".tmp";
    try {
        write_file(temporary, contents);
        if (std::rename(temporary.c_str(), path.c_str()) != 0) fail_errno("cannot write", path);
    } catch (...) {
        std::remove(temporary.c_str());
        throw;
    }
}
