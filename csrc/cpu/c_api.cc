#include "moriep/c_api.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include "group.h"

namespace moriep {
namespace {

int32_t report(const Status& status, char* error, int64_t error_size) {
  if (!status.ok() && error_size > 0) {
    const size_t length = std::min(status.text().size(), static_cast<size_t>(error_size) - 1);
    std::memcpy(error, status.text().data(), length);
    error[length] = '\0';
  }
  return static_cast<int32_t>(status.code());
}

std::string first_local_failure(const GroupTable& table) {
  for (const auto& group : table.groups) {
    if (group == nullptr) continue;
    if (std::string why = group->failure(); !why.empty()) return why;
  }
  return "";
}

Status find_group(const char* name, int64_t group, int64_t rank, std::shared_ptr<Group>* out) {
  const auto table = Registry::get().find(name);
  if (table == nullptr)
    return Status(Code::kFailedPrecondition, std::string("group ") + name + " is not open");
  if (group < 0 || group >= static_cast<int64_t>(table->groups.size()) ||
      table->groups[static_cast<size_t>(group)] == nullptr) {
    return Status(Code::kInvalidArgument,
                  std::string("group ") + name + " has no local group " + std::to_string(group));
  }
  *out = table->groups[static_cast<size_t>(group)];
  if (rank < 0 || rank >= (*out)->num_ranks()) {
    return Status(Code::kInvalidArgument,
                  std::string("group ") + name + " has no rank " + std::to_string(rank));
  }
  return Status();
}

Status open_table(const char* name, int64_t num_groups, int64_t num_ranks,
                  const int64_t* device_ids, const uint8_t* local, double timeout_seconds) {
  if (const auto known = Registry::get().find(name);
      known != nullptr && first_local_failure(*known).empty()) {
    return Status();
  }
  auto table = std::make_shared<GroupTable>();
  table->groups.resize(static_cast<size_t>(num_groups));
  for (int64_t i = 0; i < num_groups * num_ranks; ++i) {
    if (local[i] == 0) continue;
    const auto group = static_cast<int32_t>(i / num_ranks);
    const auto rank = static_cast<int32_t>(i % num_ranks);
    auto& place = table->groups[static_cast<size_t>(group)];
    if (place == nullptr) {
      place = std::make_shared<Group>(static_cast<int32_t>(num_ranks),
                                      std::chrono::duration<double>(timeout_seconds));
    }
    if (Status status = place->add_local(rank); !status.ok()) return status;
    table->place_of_device[device_ids[i]] = {group, rank};
  }
  Registry::get().put(name, std::move(table));
  return Status();
}

}  // namespace
}  // namespace moriep

using moriep::Group;
using moriep::Status;

int32_t moriep_group_open(const char* name, int64_t num_groups, int64_t num_ranks,
                          const int64_t* device_ids, const uint8_t* local, double timeout_seconds,
                          char* error, int64_t error_size) {
  return moriep::report(
      moriep::open_table(name, num_groups, num_ranks, device_ids, local, timeout_seconds), error,
      error_size);
}

int32_t moriep_group_address(const char* name, int64_t group, int64_t rank, int64_t address[5],
                             char* error, int64_t error_size) {
  std::shared_ptr<Group> found;
  Status status = moriep::find_group(name, group, rank, &found);
  if (status.ok() && found->is_remote(static_cast<int32_t>(rank))) {
    status = Status(moriep::Code::kInvalidArgument,
                    "rank " + std::to_string(rank) + " is another process's");
  }
  if (status.ok()) {
    const moriep::ArenaAddress& at = found->local(static_cast<int32_t>(rank))->arena().address();
    address[0] = at.pid;
    address[1] = at.start_time;
    address[2] = at.fd;
    address[3] = static_cast<int64_t>(at.nonce[0]);
    address[4] = static_cast<int64_t>(at.nonce[1]);
  }
  return moriep::report(status, error, error_size);
}

int32_t moriep_group_connect(const char* name, int64_t group, int64_t rank,
                             const int64_t address[5], char* error, int64_t error_size) {
  std::shared_ptr<Group> found;
  Status status = moriep::find_group(name, group, rank, &found);
  if (status.ok()) {
    const moriep::ArenaAddress at{
        .pid = address[0],
        .start_time = address[1],
        .fd = address[2],
        .nonce = {static_cast<uint64_t>(address[3]), static_cast<uint64_t>(address[4])},
    };
    status = found->connect(static_cast<int32_t>(rank), at);
  }
  return moriep::report(status, error, error_size);
}

void moriep_group_connect_failed(const char* name, int64_t group, const char* why) {
  std::shared_ptr<Group> found;
  if (moriep::find_group(name, group, 0, &found).ok()) found->connect_failed(why);
}

int32_t moriep_group_state(const char* name) {
  const auto table = moriep::Registry::get().find(name);
  if (table == nullptr) return MORIEP_GROUP_ABSENT;
  if (!moriep::first_local_failure(*table).empty()) return MORIEP_GROUP_FAILED;
  for (const auto& group : table->groups) {
    if (group != nullptr && !group->connected()) return MORIEP_GROUP_OPEN;
  }
  return MORIEP_GROUP_CONNECTED;
}

int32_t moriep_group_failure(const char* name, char* error, int64_t error_size) {
  const auto table = moriep::Registry::get().find(name);
  const std::string why = table == nullptr ? "" : moriep::first_local_failure(*table);
  return moriep::report(why.empty() ? Status() : Status(moriep::Code::kUnavailable, why), error,
                        error_size);
}

void moriep_close_all() { moriep::Registry::get().close_all(); }
