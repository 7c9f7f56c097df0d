// Checkpoint folders, RUN/checkpoints/step_00000100: each is there as a whole or not at all, whenever a run is killed.
// Names that begin with a dot are not checkpoints: one still being written (.step_00000100.tmp), or on its way out
// (.step_00000100.old).
//   CheckpointFolder         a checkpoint being written
//   list_checkpoints         those of a run
//   remove_old_checkpoints   all but the newest
// Errors are std::runtime_error, one line that names the file.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "trainer/files.h"

inline std::string checkpoint_name(int64_t step) {
    char name[32];
    std::snprintf(name, sizeof name, "step_%08lld", (long long)step);
    return name;
}

namespace checkpoint_folder {

inline std::string checkpoints_folder(const std::string& run_dir) { return run_dir + "/checkpoints"; }
inline std::string hidden(const std::string& folder, int64_t step, const char* suffix) {
    return folder + "/." + checkpoint_name(step) + suffix;
}

// A new name is on disk only when the folder that holds it is.
inline void sync(const std::string& path) { File(path).sync(); }

inline void sync_tree(const std::string& folder) {
    for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) sync(entry.path());
    sync(folder);
}

inline void remove_hidden(const std::string& folder, const std::string& suffix) {
    std::vector<std::filesystem::path> paths;
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
        const std::string name = entry.path().filename();
        if (name.starts_with(".step_") && name.ends_with(suffix)) paths.push_back(entry.path());
    }
    for (const auto& path : paths) std::filesystem::remove_all(path);
}

// It loses its name first, so that it is never seen half removed.
inline void remove(const std::string& folder, int64_t step) {
    const std::string old = hidden(folder, step, ".old");
    std::filesystem::remove_all(old);
    std::filesystem::rename(folder + "/" + checkpoint_name(step), old);
    std::filesystem::remove_all(old);
}

// Moves a folder to a name that may be taken, and what had the name to `aside`. Most file systems exchange two names
// in one step; on the others (NFS), a crash between the two renames leaves the former folder whole, but aside.
inline void replace_folder(const std::string& from, const std::string& to, const std::string& aside,
                           unsigned flags = RENAME_EXCHANGE) {
    if (!std::filesystem::exists(to)) {
        std::filesystem::rename(from, to);
        return;
    }
    std::filesystem::remove_all(aside);
    if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), flags) == 0) {
        std::filesystem::rename(from, aside);
    } else {
        std::filesystem::rename(to, aside);
        std::filesystem::rename(from, to);
    }
}

}  // namespace checkpoint_folder

// A checkpoint being written. One process has it, one at a time; others may write files below path() too (and sync
// them, as the writers above do), if all are done before publish().
class CheckpointFolder {
  public:
    CheckpointFolder(const std::string& run_dir, int64_t step)
        : folder_(checkpoint_folder::checkpoints_folder(run_dir)),
          step_(step),
          path_(checkpoint_folder::hidden(folder_, step, ".tmp")) {
        std::filesystem::create_directories(folder_);
        checkpoint_folder::sync(run_dir);
        checkpoint_folder::remove_hidden(folder_, ".tmp");  // of killed runs
        std::filesystem::create_directory(path_);
    }
    CheckpointFolder(const CheckpointFolder&) = delete;
    ~CheckpointFolder() {
        std::error_code ignored;
        if (!published_) std::filesystem::remove_all(path_, ignored);
    }

    // Where to write.
    const std::string& path() const { return path_; }

    // Puts all on disk, then under its final name, which it returns.
    std::string publish() {
        std::string final_path = folder_ + "/" + checkpoint_name(step_);
        checkpoint_folder::sync_tree(path_);
        checkpoint_folder::replace_folder(path_, final_path, checkpoint_folder::hidden(folder_, step_, ".old"));
        published_ = true;
        checkpoint_folder::sync(folder_);  // the new name must be on disk before the old contents go
        checkpoint_folder::remove_hidden(folder_, ".old");
        return final_path;
    }

  private:
    std::string folder_;
    int64_t step_;
    std::string path_;
    bool published_ = false;
};

// The published ones, by step.
inline std::vector<std::pair<int64_t, std::string>> list_checkpoints(const std::string& run_dir) {
    const std::string folder = checkpoint_folder::checkpoints_folder(run_dir);
    std::vector<std::pair<int64_t, std::string>> checkpoints;
    if (!std::filesystem::exists(folder)) return checkpoints;
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
        const std::string name = entry.path().filename();
        long long step = 0;
        const bool matches = std::sscanf(name.c_str(), "step_%lld", &step) == 1 && name == checkpoint_name(step);
        if (matches && step >= 0 && entry.is_directory()) checkpoints.emplace_back(step, entry.path());
    }
    std::sort(checkpoints.begin(), checkpoints.end());
    return checkpoints;
}

// Keeps the newest `keep`; all if it is 0 or less.
inline void remove_old_checkpoints(const std::string& run_dir, int keep) {
    const auto checkpoints = list_checkpoints(run_dir);
    if (keep <= 0) return;
    for (size_t i = 0; i + keep < checkpoints.size(); i++) {
        checkpoint_folder::remove(checkpoint_folder::checkpoints_folder(run_dir), checkpoints[i].first);
    }
}
