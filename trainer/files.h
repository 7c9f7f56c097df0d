// Files: opened, read and written as wholes or in pieces. Errors are std::runtime_error: one line that names the file,
// what failed and why. Depends on nothing of the project, so that tokenizer/ may use it too.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

// One line, whatever a damaged file put into the message.
[[noreturn]] inline void fail(const std::string& path, const std::string& what) {
    std::string line = path + ": " + what;
    std::replace_if(
        line.begin(), line.end(), [](unsigned char c) { return c < ' ' || c == 0x7F; }, ' ');
    throw std::runtime_error(line);
}

// "cannot open PATH: No such file or directory; HINT". Reads errno, so it comes right after the call that failed.
[[noreturn]] inline void fail_errno(const std::string& action, const std::string& path, const std::string& hint = "") {
    throw std::runtime_error(action + " " + path + ": " + std::strerror(errno) + (hint.empty() ? "" : "; " + hint));
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
