#include "c_api.h"

#include <memory>
#include <string>

#include "group.h"
#include "handle.h"
#include "moriep/group_api.h"
#include "world.h"

namespace moriep::mori {
namespace {

class MoriBackend {
 public:
  using Group = mori::Group;

  static Status prepare(int64_t num_ranks) {
    if (num_ranks <= gpu::kMaxRanks) return Status();
    return Status(Code::kInvalidArgument, std::to_string(num_ranks) + " ranks are more than the " +
                                              std::to_string(gpu::kMaxRanks) +
                                              " of transport='mori'; use transport='two_level'");
  }
  static std::shared_ptr<Group> make(int32_t num_ranks, std::chrono::duration<double> timeout) {
    return std::make_shared<Group>(num_ranks, timeout);
  }
  static Status add_local(Group& group, int32_t rank, int32_t device) {
    return group.add_local(rank, device);
  }
  static Status link(Group& group) { return group.link_locals(); }
  static Status address(Group& group, int32_t rank, int64_t* words) {
    return group.address(rank, words);
  }
  static Status connect(Group& group, int32_t rank, const int64_t* words) {
    return group.connect(rank, words);
  }
  static Status failure(Group& group) { return group.failure(); }
  // The process simply leaves, and its memory with it. Programs may still run here, and peers read
  // this rank's buffers to the end of theirs: what keeps the buffers until then is jax, which at
  // exit waits for this process's programs and then meets the other processes in
  // jax.distributed.shutdown, with a deadline. MORI's own way out, ShmemFinalize, meets them in a
  // barrier that waits for ever for a rank that was killed.
  static void close_all() {}
};

// The group of a table that this process has its rank in.
Status find_group(const char* name, std::shared_ptr<Group>* out) {
  const auto table = Registry::get().find(name);
  if (table != nullptr) {
    for (const auto& group : table->groups) {
      if (group == nullptr) continue;
      *out = group;
      return Status();
    }
  }
  return Status(Code::kFailedPrecondition, std::string("group ") + name + " is not open");
}

HandleSizes sizes_of(const int64_t* numbers) {
  const auto at = [numbers](int i) { return static_cast<int32_t>(numbers[i]); };
  static_assert(kNumHandleSizes == 9);
  return HandleSizes{.kernel = static_cast<KernelType>(at(0)),
                     .max_tokens = at(1),
                     .hidden_size = at(2),
                     .top_k = at(3),
                     .experts_per_rank = at(4),
                     .element_bytes = at(5),
                     .num_scales = at(6),
                     .gpus_per_node = at(7),
                     .num_queues = at(8)};
}

}  // namespace
}  // namespace moriep::mori

MORIEP_DEFINE_C_API(moriep::mori::MoriBackend)

namespace api = moriep::api;
namespace mine = moriep::mori;

const char* moriep_mori_version() { return MORIEP_MORI_VERSION; }

int32_t moriep_mori_unique_id(uint8_t* id, char* error, int64_t error_size) {
  return api::report(mine::make_unique_id(id), error, error_size);
}

int32_t moriep_mori_open_world(const char* group, int64_t heap_bytes, const uint8_t* id,
                               const char* node, int32_t by_proxy, char* error,
                               int64_t error_size) {
  std::shared_ptr<mine::Group> found;
  moriep::Status status = mine::find_group(group, &found);
  if (status.ok()) {
    status = mine::open_world({.group = group,
                               .rank = found->rank(),
                               .num_ranks = found->num_ranks(),
                               .device = found->device(),
                               .heap_bytes = heap_bytes,
                               .node = node,
                               .by_proxy = by_proxy != 0},
                              id);
  }
  if (status.ok()) status = found->open_notices();
  return api::report(status, error, error_size);
}

int64_t moriep_mori_heap_bytes() { return mine::world().heap_bytes; }

int32_t moriep_mori_load_kernels(const char* path, char* error, int64_t error_size) {
  return api::report(mine::load_kernels(path), error, error_size);
}

int32_t moriep_mori_open_handle(const char* group, const char* key, const int64_t* sizes,
                                char* error, int64_t error_size) {
  std::shared_ptr<mine::Group> found;
  moriep::Status status = mine::find_group(group, &found);
  if (status.ok()) status = found->open_handle(key, mine::sizes_of(sizes));
  return api::report(status, error, error_size);
}

void moriep_mori_handle_failed(const char* group, const char* key, const char* why) {
  std::shared_ptr<mine::Group> found;
  if (!mine::find_group(group, &found).ok()) return;
  found->handle_failed(key, moriep::Status(moriep::Code::kUnavailable, why));
}

int32_t moriep_mori_reset(const char* group, char* error, int64_t error_size) {
  std::shared_ptr<mine::Group> found;
  moriep::Status status = mine::find_group(group, &found);
  if (status.ok()) status = found->reset();
  return api::report(status, error, error_size);
}
