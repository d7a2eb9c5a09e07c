// The groups that a process has opened, by name; the same for every backend.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace moriep {

// The groups that a mesh axis makes, and the place of each of this process's devices in them.
template <typename Group>
struct GroupTableOf {
  std::vector<std::shared_ptr<Group>> groups;  // null where no rank lives in this process
  std::map<int64_t, std::pair<int32_t, int32_t>> place_of_device;  // device id -> (group, rank)
  // A child that fork() made has copies of the tables, but neither their threads nor their ranks.
  const pid_t owner = getpid();
};

// All tables of this process, by name.
template <typename Group>
class RegistryOf {
 public:
  using Table = std::shared_ptr<GroupTableOf<Group>>;

  static RegistryOf& get() {
    // Never destroyed: threads of XLA may outlive static destruction.
    static RegistryOf* registry = new RegistryOf();
    return *registry;
  }

  Table find(const std::string& name) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = tables_.find(name);
    return found == tables_.end() ? nullptr : found->second;
  }

  // Replaces a table. The old one is kept until the process closes: its steps may still be ending,
  // and recorded launches may name its arenas.
  void put(const std::string& name, Table table) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto& place = tables_[name];
    if (place != nullptr) replaced_.push_back(std::move(place));
    place = std::move(table);
  }

  // Forgets all tables and gives those that this process made. Its parent's, if it was forked,
  // stay: their groups go on in the parent.
  std::vector<Table> take_own() {
    std::vector<Table> own;
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [name, table] : tables_) replaced_.push_back(std::move(table));
    tables_.clear();
    const auto mine =
        std::stable_partition(replaced_.begin(), replaced_.end(),
                              [](const Table& table) { return table->owner != getpid(); });
    std::move(mine, replaced_.end(), std::back_inserter(own));
    replaced_.erase(mine, replaced_.end());
    return own;
  }

 private:
  std::mutex mutex_;
  std::map<std::string, Table> tables_;
  std::vector<Table> replaced_;
};

}  // namespace moriep
