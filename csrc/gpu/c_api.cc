#include "moriep/c_api.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "group.h"

namespace moriep::gpu {
namespace {

constexpr int64_t kDefaultArenaMb = 1024;

int32_t report(const Status& status, char* error, int64_t error_size) {
  if (!status.ok() && error_size > 0) {
    const size_t length = std::min(status.text().size(), static_cast<size_t>(error_size) - 1);
    std::memcpy(error, status.text().data(), length);
    error[length] = '\0';
  }
  return static_cast<int32_t>(status.code());
}

Status failure_of(const GroupTable& table) {
  for (const auto& group : table.groups) {
    if (group == nullptr) continue;
    if (Status status = group->failure(); !status.ok()) return status;
  }
  return Status();
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

// Bytes of one slot. Unlike shared memory on the CPU, device memory is taken when it is asked for,
// so the user says how much.
Status slot_bytes(int64_t* out) {
  int64_t megabytes = kDefaultArenaMb;
  if (const char* text = std::getenv("JAX_MORIEP_ARENA_MB"); text != nullptr) {
    char* end = nullptr;
    errno = 0;
    megabytes = std::strtoll(text, &end, 10);
    if (errno != 0 || end == text || *end != '\0' || megabytes < 1 || megabytes > (1 << 20)) {
      return Status(Code::kInvalidArgument,
                    std::string("JAX_MORIEP_ARENA_MB=") + text +
                        " must be a whole number of MiB from 1 to 1048576; unset it or fix it");
    }
  }
  *out = (megabytes << 20) / 2;
  return Status();
}

Status open_table(const char* name, int64_t num_groups, int64_t num_ranks,
                  const int64_t* device_ids, const uint8_t* local, double timeout_seconds) {
  if (const auto known = Registry::get().find(name); known != nullptr && failure_of(*known).ok()) {
    return Status();
  }
  if (num_ranks > kMaxRanks) {
    return Status(Code::kInvalidArgument, std::to_string(num_ranks) + " ranks are more than the " +
                                              std::to_string(kMaxRanks) +
                                              " of this backend; use transport='collective'");
  }
  int64_t bytes = 0;
  if (Status status = slot_bytes(&bytes); !status.ok()) return status;
  auto table = std::make_shared<GroupTable>();
  table->groups.resize(static_cast<size_t>(num_groups));
  for (int64_t i = 0; i < num_groups * num_ranks; ++i) {
    if (local[i] == 0) continue;
    const auto group = static_cast<int32_t>(i / num_ranks);
    const auto rank = static_cast<int32_t>(i % num_ranks);
    auto& place = table->groups[static_cast<size_t>(group)];
    if (place == nullptr) {
      place = std::make_shared<Group>(static_cast<int32_t>(num_ranks),
                                      std::chrono::duration<double>(timeout_seconds), bytes);
    }
    if (Status status = place->add_local(rank, static_cast<int32_t>(device_ids[i])); !status.ok())
      return status;
    table->place_of_device[device_ids[i]] = {group, rank};
  }
  for (const auto& group : table->groups) {
    if (group == nullptr) continue;
    if (Status status = group->link_locals(); !status.ok()) return status;
  }
  Registry::get().put(name, std::move(table));
  return Status();
}

}  // namespace
}  // namespace moriep::gpu

using moriep::Status;
using moriep::gpu::Group;

int32_t moriep_group_open(const char* name, int64_t num_groups, int64_t num_ranks,
                          const int64_t* device_ids, const uint8_t* local, double timeout_seconds,
                          char* error, int64_t error_size) {
  return moriep::gpu::report(
      moriep::gpu::open_table(name, num_groups, num_ranks, device_ids, local, timeout_seconds),
      error, error_size);
}

int32_t moriep_group_address(const char* name, int64_t group, int64_t rank, int64_t* address,
                             char* error, int64_t error_size) {
  std::shared_ptr<Group> found;
  Status status = moriep::gpu::find_group(name, group, rank, &found);
  if (status.ok()) status = found->address(static_cast<int32_t>(rank), address);
  return moriep::gpu::report(status, error, error_size);
}

int32_t moriep_group_connect(const char* name, int64_t group, int64_t rank, const int64_t* address,
                             char* error, int64_t error_size) {
  std::shared_ptr<Group> found;
  Status status = moriep::gpu::find_group(name, group, rank, &found);
  if (status.ok()) status = found->connect(static_cast<int32_t>(rank), address);
  return moriep::gpu::report(status, error, error_size);
}

void moriep_group_connect_failed(const char* name, int64_t group, const char* why) {
  std::shared_ptr<Group> found;
  if (moriep::gpu::find_group(name, group, 0, &found).ok()) found->connect_failed(why);
}

int32_t moriep_group_state(const char* name) {
  const auto table = moriep::gpu::Registry::get().find(name);
  if (table == nullptr) return MORIEP_GROUP_ABSENT;
  if (!moriep::gpu::failure_of(*table).ok()) return MORIEP_GROUP_FAILED;
  for (const auto& group : table->groups) {
    if (group != nullptr && !group->connected()) return MORIEP_GROUP_OPEN;
  }
  return MORIEP_GROUP_CONNECTED;
}

int32_t moriep_group_failure(const char* name, char* error, int64_t error_size) {
  const auto table = moriep::gpu::Registry::get().find(name);
  if (table == nullptr) return 0;
  return moriep::gpu::report(moriep::gpu::failure_of(*table), error, error_size);
}

// Device memory goes with the process; a peer that still waits finds out at its deadline.
void moriep_close_all() {}
