// Checkpoint folders, RUN/checkpoints/step_00000100: each is there as a whole or not at all, whenever a run is killed.
// Names that begin with a dot are not checkpoints: one still being written (.step_00000100.tmp), or on its way out
// (.step_00000100.old). One found to be damaged is set aside under a name that is not listed (step_00000100.damaged),
// and never removed.
//   CheckpointFolder         a checkpoint being written
//   changed_file             looks for damage: each file's checksum is in state/checksums.json
//   list_checkpoints         those of a run
//   set_aside                a damaged one
//   remove_old_checkpoints   all but the newest
// Errors are std::runtime_error, one line that names the file.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "trainer/crc32.h"
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

    // A small file below it; its checksum is recorded.
    void write(const std::string& name, const std::string& contents) {
        write_file(path_ + "/" + name, contents);
        record_crc32(name, crc32_of(0, contents.data(), contents.size()));
    }

    // Of a file below path(), as it was written: read again, what the disk made of it would count as right.
    void record_crc32(const std::string& name, uint32_t crc32) { crc32_[name] = crc32; }

    // Puts all on disk, then under its final name, which it returns.
    std::string publish() {
        if (!crc32_.empty()) {
            std::filesystem::create_directories(path_ + "/state");
            write_file(path_ + "/state/checksums.json", nlohmann::json{{"crc32", crc32_}}.dump(2) + "\n");
        }
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
    std::map<std::string, uint32_t> crc32_;
    bool published_ = false;
};

// Which file of a checkpoint is not what was saved, in one line; empty when all are, and where no checksums are
// recorded: folders from elsewhere have none. Without `state`, the model's own files only.
inline std::string changed_file(const std::string& checkpoint, bool state) {
    const std::string list = checkpoint + "/state/checksums.json";
    if (!std::filesystem::exists(list)) return "";
    const nlohmann::json json = nlohmann::json::parse(read_file(list), nullptr, false);
    const nlohmann::json sums = json.is_object() ? json.value("crc32", nlohmann::json()) : json;
    if (!sums.is_object()) return list + ": damaged: expected {\"crc32\": {file: checksum}}";
    for (const auto& [name, expected] : sums.items()) {
        if (!state && name.starts_with("state/")) continue;
        const std::string path = checkpoint + "/" + name;
        if (!std::filesystem::exists(path)) return path + ": missing, and named in state/checksums.json";
        const File file(path);
        if (expected != crc32_of(0, file, 0, file.size()))
            return file.path() + ": damaged: its checksum is not that in state/checksums.json";
    }
    return "";
}

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

// Renames a damaged checkpoint, and returns the new name: step_00000100.damaged, .damaged-2 if there is one.
inline std::string set_aside(const std::string& checkpoint) {
    const std::string damaged = checkpoint + ".damaged";
    std::string name = damaged;
    for (int n = 2; std::filesystem::exists(name); n++) name = damaged + "-" + std::to_string(n);
    std::filesystem::rename(checkpoint, name);
    return name;
}

// Keeps the newest `keep` that are whole, and those of `needed`; all if `keep` is 0 or less. Sets aside the others that
// are not whole. Each loses its name before it is removed, so that none is seen half removed.
inline void remove_old_checkpoints(const std::string& run_dir, int keep, const std::set<std::string>& needed,
                                   const std::function<bool(const std::string& checkpoint)>& is_whole) {
    if (keep <= 0) return;
    auto checkpoints = list_checkpoints(run_dir);
    int kept = 0;
    for (auto newest = checkpoints.rbegin(); newest != checkpoints.rend(); newest++) {
        const auto& [step, path] = *newest;
        if (!is_whole(path)) {
            set_aside(path);
        } else if (kept < keep || needed.contains(path)) {
            kept++;
        } else {
            checkpoint_folder::remove(checkpoint_folder::checkpoints_folder(run_dir), step);
        }
    }
}
