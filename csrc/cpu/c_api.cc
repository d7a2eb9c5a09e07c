#include "moriep/c_api.h"

#include "group.h"
#include "moriep/group_api.h"

namespace moriep {
namespace {

struct CpuBackend {
  using Group = moriep::Group;

  Status prepare(int64_t) { return Status(); }
  std::shared_ptr<Group> make(int32_t num_ranks, std::chrono::duration<double> timeout) {
    return std::make_shared<Group>(num_ranks, timeout);
  }
  static Status add_local(Group& group, int32_t rank, int32_t) { return group.add_local(rank); }
  static Status link(Group&) { return Status(); }

  static Status address(Group& group, int32_t rank, int64_t* words) {
    const ArenaAddress& at = group.local(rank)->arena().address();
    words[0] = at.pid;
    words[1] = at.start_time;
    words[2] = at.fd;
    words[3] = static_cast<int64_t>(at.nonce[0]);
    words[4] = static_cast<int64_t>(at.nonce[1]);
    return Status();
  }

  static Status connect(Group& group, int32_t rank, const int64_t* words) {
    return group.connect(
        rank, {.pid = words[0],
               .start_time = words[1],
               .fd = words[2],
               .nonce = {static_cast<uint64_t>(words[3]), static_cast<uint64_t>(words[4])}});
  }

  static Status failure(Group& group) {
    std::string why = group.failure();
    return why.empty() ? Status() : Status(Code::kUnavailable, std::move(why));
  }

  // Peers learn that this process has left in good order.
  static void close_all() {
    for (const auto& table : Registry::get().take_own()) {
      for (const auto& group : table->groups) {
        if (group != nullptr) group->stop();
      }
    }
  }
};

}  // namespace
}  // namespace moriep

MORIEP_DEFINE_C_API(moriep::CpuBackend)
