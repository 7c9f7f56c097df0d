// A folder that one process at a time may write to.
#pragma once

#include <sys/file.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>

#include "trainer/basics.h"
#include "trainer/files.h"

// FOLDER/.lock, locked as long as this lives. The system unlocks it when the process ends, in whatever way.
class FolderLock {
  public:
    FolderLock() = default;  // of nothing

    // Throws when another process has it; or waits for its end.
    explicit FolderLock(const std::string& folder, bool wait = false) {
        const std::string path = folder + "/.lock";
        while (!names(path)) {  // between opening and locking, the folder may have been moved aside
            file_ = File(path, O_RDWR | O_CREAT, "check the folder and its rights");
            if (::flock(file_.descriptor(), wait ? LOCK_EX : LOCK_EX | LOCK_NB) == 0) continue;
            if (errno == EWOULDBLOCK) {
                throw Error(folder + ": in use by another run (" + read_file(path) +
                            "): wait until it ends, or give --out another folder");
            }
            fprintf(stderr, "train_gpt: cannot lock %s: %s; see to it that no second run uses the folder\n",
                    path.c_str(), strerror(errno));
            return;
        }
    }

    // Says in the file who has it. Not before it is sure that the folder is used: a run that is refused changes
    // nothing.
    void sign() {
        char host[256] = "";
        gethostname(host, sizeof host - 1);
        const std::string holder = text("process %d on %s", (int)getpid(), host);
        signed_ = ftruncate(file_.descriptor(), 0) == 0;
        if (signed_) file_.write(holder.data(), holder.size());
    }

    ~FolderLock() {
        if (signed_ && ftruncate(file_.descriptor(), 0) != 0) return;  // says an old name until the next run
    }

    FolderLock(FolderLock&& other) noexcept
        : file_(std::move(other.file_)), signed_(std::exchange(other.signed_, false)) {}
    FolderLock& operator=(FolderLock&& other) noexcept {
        std::swap(file_, other.file_), std::swap(signed_, other.signed_);
        return *this;
    }

  private:
    // Whether `path` is the file that is open.
    bool names(const std::string& path) const {
        if (file_.descriptor() < 0) return false;
        struct stat there {};
        const struct stat ours = file_.status();
        return ::stat(path.c_str(), &there) == 0 && there.st_dev == ours.st_dev && there.st_ino == ours.st_ino;
    }

    File file_;
    bool signed_ = false;
};
