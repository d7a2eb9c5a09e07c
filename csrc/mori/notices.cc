#include "notices.h"

#include <string>

#include "relay.h"
#include "symmetric.h"
#include "world.h"

namespace moriep::mori {
namespace {

// A node that waits for another learns who is missing there from those who wait for it themselves:
// they are heard of when their own time is over.
constexpr double kPatience = 1.5;

int64_t notice_bytes(int64_t num_words, int32_t ranks_on_node) {
  return static_cast<int64_t>(sizeof(Notice)) +
         num_words * ranks_on_node * static_cast<int64_t>(sizeof(int32_t));
}

}  // namespace

Status Notices::open(int32_t rank, int32_t ranks_on_node, int32_t num_nodes,
                     std::chrono::duration<double> timeout, std::unique_ptr<Notices>* out) {
  auto made = std::unique_ptr<Notices>(new Notices());
  made->rank_ = rank;
  made->ranks_on_node_ = ranks_on_node;
  made->num_nodes_ = num_nodes;
  made->timeout_ns_ = static_cast<uint64_t>(timeout.count() * kPatience * 1e9);
  if (Status status = allocate_symmetric(notices_bytes(num_nodes), &made->object_); !status.ok()) {
    return status;
  }
  void* memory = nullptr;
  hipError_t error = hipMalloc(&memory, sizeof(uint32_t));
  if (error == hipSuccess) error = hipMemset(memory, 0, sizeof(uint32_t));
  if (error == hipSuccess) error = hipDeviceSynchronize();
  if (error != hipSuccess) {
    return Status(Code::kInternal, std::string("notices: ") + hipGetErrorString(error));
  }
  made->silent_ = static_cast<uint32_t*>(memory);
  *out = std::move(made);
  return Status();
}

Notices::~Notices() {
  if (silent_ != nullptr) (void)hipFree(silent_);
}

Status Notices::find_relay() {
  if (Status status = find_kernel("MoriepRelay", &relay_); !status.ok()) return status;
  return reach_of_ranks(&reach_);
}

Status Notices::check_words(int64_t num_words) const {
  const int64_t bytes = notice_bytes(num_words, ranks_on_node_);
  if (bytes <= static_cast<int64_t>(kNoticeBytes)) return Status();
  return Status(Code::kInvalidArgument,
                std::to_string(num_words) + " words of " + std::to_string(ranks_on_node_) +
                    " ranks are more than the " + std::to_string(kNoticeBytes) +
                    " bytes that nodes tell each other in a step; use transport='two_level'");
}

Status Notices::relay(const gpu::Team& team, int64_t num_words, hipStream_t stream) const {
  if (relay_ == nullptr) {
    return Status(Code::kFailedPrecondition, "MORI's kernels between nodes are not loaded");
  }
  const gpu::Control* control = team.control[team.rank];
  RelayArgs args{.memory = object_.gpu,
                 .epoch = &control->epoch,
                 .failed = &control->failed,
                 .silent = silent_,
                 .timeout_ns = timeout_ns_,
                 .bytes = static_cast<uint64_t>(notice_bytes(num_words, ranks_on_node_)),
                 .rank = rank_,
                 .ranks_on_node = ranks_on_node_,
                 .num_nodes = num_nodes_};
  size_t size = sizeof(args);
  void* extra[] = {HIP_LAUNCH_PARAM_BUFFER_POINTER, &args, HIP_LAUNCH_PARAM_BUFFER_SIZE, &size,
                   HIP_LAUNCH_PARAM_END};
  const hipError_t error =
      hipModuleLaunchKernel(relay_, 1, 1, 1, 64, 1, 1, 0, stream, nullptr, extra);
  if (error == hipSuccess) return Status();
  (void)hipGetLastError();
  return Status(Code::kInternal,
                std::string("the relay was not launched: ") + hipGetErrorString(error));
}

}  // namespace moriep::mori
