#include "moriep/c_api.h"

#include <cerrno>
#include <cstdlib>

#include "group.h"
#include "moriep/group_api.h"

namespace moriep::gpu {
namespace {

constexpr int64_t kDefaultArenaMb = 1024;

class GpuBackend {
 public:
  using Group = gpu::Group;

  // Unlike shared memory on the CPU, device memory is taken when it is asked for, so the user says
  // how much.
  Status prepare(int64_t num_ranks) {
    if (num_ranks > kMaxRanks) {
      return Status(Code::kInvalidArgument,
                    std::to_string(num_ranks) + " ranks are more than the " +
                        std::to_string(kMaxRanks) + " of this backend; use transport='collective'");
    }
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
    half_bytes_ = (megabytes << 20) / 2;
    return Status();
  }

  std::shared_ptr<Group> make(int32_t num_ranks, std::chrono::duration<double> timeout) {
    return std::make_shared<Group>(num_ranks, timeout, half_bytes_);
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
  // Device memory goes with the process; a peer that still waits finds out at its deadline.
  static void close_all() {}

 private:
  int64_t half_bytes_ = 0;  // of one of an arena's two halves
};

}  // namespace
}  // namespace moriep::gpu

MORIEP_DEFINE_C_API(moriep::gpu::GpuBackend)
