// The C API (c_api.h) over a backend's groups. A backend's c_api.cc states a class with
//   using Group                    the backend's groups
//   Status prepare(num_ranks)      whether it can have groups of that size; called first
//   make(num_ranks, timeout)       a new group
//   add_local(group, rank, device) makes a rank of this process
//   link(group)                    called when all ranks of this process are made
//   address, connect, failure      of a group, with addresses as numbers
//   close_all()
// and MORIEP_DEFINE_C_API(class) defines the functions.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "moriep/c_api.h"
#include "moriep/registry.h"
#include "moriep/status.h"

namespace moriep::api {

inline int32_t report(const Status& status, char* error, int64_t error_size) {
  if (!status.ok() && error_size > 0) {
    const size_t length = std::min(status.text().size(), static_cast<size_t>(error_size) - 1);
    std::memcpy(error, status.text().data(), length);
    error[length] = '\0';
  }
  return static_cast<int32_t>(status.code());
}

template <typename Backend>
using Registry = RegistryOf<typename Backend::Group>;

template <typename Backend>
Status failure_of(const GroupTableOf<typename Backend::Group>& table) {
  for (const auto& group : table.groups) {
    if (group == nullptr) continue;
    if (Status status = Backend::failure(*group); !status.ok()) return status;
  }
  return Status();
}

template <typename Backend>
Status find(const char* name, int64_t group, int64_t rank,
            std::shared_ptr<typename Backend::Group>* out) {
  const auto table = Registry<Backend>::get().find(name);
  if (table == nullptr) {
    return Status(Code::kFailedPrecondition, std::string("group ") + name + " is not open");
  }
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

template <typename Backend>
Status open(const char* name, int64_t num_groups, int64_t num_ranks, const int64_t* device_ids,
            const uint8_t* local, double timeout_seconds) {
  if (const auto known = Registry<Backend>::get().find(name);
      known != nullptr && failure_of<Backend>(*known).ok()) {
    return Status();
  }
  Backend backend;
  if (Status status = backend.prepare(num_ranks); !status.ok()) return status;
  auto table = std::make_shared<GroupTableOf<typename Backend::Group>>();
  table->groups.resize(static_cast<size_t>(num_groups));
  for (int64_t i = 0; i < num_groups * num_ranks; ++i) {
    if (local[i] == 0) continue;
    const auto group = static_cast<int32_t>(i / num_ranks);
    const auto rank = static_cast<int32_t>(i % num_ranks);
    auto& place = table->groups[static_cast<size_t>(group)];
    if (place == nullptr) {
      place = backend.make(static_cast<int32_t>(num_ranks),
                           std::chrono::duration<double>(timeout_seconds));
    }
    if (Status status = Backend::add_local(*place, rank, static_cast<int32_t>(device_ids[i]));
        !status.ok()) {
      return status;
    }
    table->place_of_device[device_ids[i]] = {group, rank};
  }
  for (const auto& group : table->groups) {
    if (group == nullptr) continue;
    if (Status status = Backend::link(*group); !status.ok()) return status;
  }
  Registry<Backend>::get().put(name, std::move(table));
  return Status();
}

template <typename Backend>
Status address(const char* name, int64_t group, int64_t rank, int64_t* words) {
  std::shared_ptr<typename Backend::Group> found;
  if (Status status = find<Backend>(name, group, rank, &found); !status.ok()) return status;
  if (found->local(static_cast<int32_t>(rank)) == nullptr) {
    return Status(Code::kInvalidArgument, "rank " + std::to_string(rank) + " is another process's");
  }
  return Backend::address(*found, static_cast<int32_t>(rank), words);
}

template <typename Backend>
Status connect(const char* name, int64_t group, int64_t rank, const int64_t* words) {
  std::shared_ptr<typename Backend::Group> found;
  if (Status status = find<Backend>(name, group, rank, &found); !status.ok()) return status;
  return Backend::connect(*found, static_cast<int32_t>(rank), words);
}

template <typename Backend>
void connect_failed(const char* name, int64_t group, const char* why) {
  std::shared_ptr<typename Backend::Group> found;
  if (find<Backend>(name, group, 0, &found).ok()) found->connect_failed(why);
}

template <typename Backend>
int32_t state(const char* name) {
  const auto table = Registry<Backend>::get().find(name);
  if (table == nullptr) return MORIEP_GROUP_ABSENT;
  if (!failure_of<Backend>(*table).ok()) return MORIEP_GROUP_FAILED;
  for (const auto& group : table->groups) {
    if (group != nullptr && !group->connected()) return MORIEP_GROUP_OPEN;
  }
  return MORIEP_GROUP_CONNECTED;
}

template <typename Backend>
Status failure(const char* name) {
  const auto table = Registry<Backend>::get().find(name);
  return table == nullptr ? Status() : failure_of<Backend>(*table);
}

}  // namespace moriep::api

#define MORIEP_DEFINE_C_API(Backend)                                                               \
  int32_t moriep_group_open(const char* name, int64_t num_groups, int64_t num_ranks,               \
                            const int64_t* device_ids, const uint8_t* local,                       \
                            double timeout_seconds, char* error, int64_t error_size) {             \
    return moriep::api::report(moriep::api::open<Backend>(name, num_groups, num_ranks, device_ids, \
                                                          local, timeout_seconds),                 \
                               error, error_size);                                                 \
  }                                                                                                \
  int32_t moriep_group_address(const char* name, int64_t group, int64_t rank, int64_t* address,    \
                               char* error, int64_t error_size) {                                  \
    return moriep::api::report(moriep::api::address<Backend>(name, group, rank, address), error,   \
                               error_size);                                                        \
  }                                                                                                \
  int32_t moriep_group_connect(const char* name, int64_t group, int64_t rank,                      \
                               const int64_t* address, char* error, int64_t error_size) {          \
    return moriep::api::report(moriep::api::connect<Backend>(name, group, rank, address), error,   \
                               error_size);                                                        \
  }                                                                                                \
  void moriep_group_connect_failed(const char* name, int64_t group, const char* why) {             \
    moriep::api::connect_failed<Backend>(name, group, why);                                        \
  }                                                                                                \
  int32_t moriep_group_state(const char* name) { return moriep::api::state<Backend>(name); }       \
  int32_t moriep_group_failure(const char* name, char* error, int64_t error_size) {                \
    return moriep::api::report(moriep::api::failure<Backend>(name), error, error_size);            \
  }                                                                                                \
  void moriep_close_all() { Backend::close_all(); }
