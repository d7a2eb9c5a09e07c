#include "group.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "exchange.h"
#include "gpu_runtime.h"

namespace moriep::gpu {
namespace {

// Raised by whoever changes what an arena holds.
constexpr int64_t kLayoutVersion = 2;

Status failed(const std::string& what, gpuError_t error) {
  return Status(Code::kInternal, what + ": " + gpuGetErrorString(error));
}

#define MORIEP_GPU_TRY(what, call)                            \
  if (const gpuError_t error = (call); error != gpuSuccess) { \
    (void)gpuGetLastError();                                  \
    return failed(what, error);                               \
  }

// Makes a device current and puts back the one that was.
class OnDevice {
 public:
  explicit OnDevice(int32_t device) {
    if (gpuGetDevice(&before_) != gpuSuccess) before_ = -1;
    (void)gpuSetDevice(device);
  }
  ~OnDevice() {
    if (before_ >= 0) (void)gpuSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = -1;
};

// `num_near` ranks are on each node.
Status describe(const FaultReport& report, int32_t rank, int32_t num_ranks, int32_t num_near,
                double timeout) {
  std::string peer = "rank " + std::to_string(report.peer);
  if (num_near < num_ranks) peer += " on node " + std::to_string(report.peer / num_near);
  const std::string here = std::to_string(report.here);
  const std::string there = std::to_string(report.there);
  const std::string where = std::string(kind_name(static_cast<Kind>(report.kind))) + ", rank " +
                            std::to_string(rank) + ", step " + std::to_string(report.step) + ": ";
  const std::string cure = "; restart the job, or call jm.initialize in every process";
  switch (static_cast<Fault>(report.fault)) {
    case Fault::kDeadline:
      return Status(Code::kDeadlineExceeded, where + peer + " did not arrive within " +
                                                 std::to_string(timeout) +
                                                 " s; its last step was " + there + cure);
    case Fault::kPeerFailed:
      return Status(Code::kUnavailable, where + peer + " has failed" + cure);
    case Fault::kDiffers:
      return Status(Code::kInvalidArgument,
                    where + peer + " runs another program: the call's position in the program is " +
                        here + " here and " + there +
                        " there, or the kind of exchange, its sizes, dtype or config differ; every "
                        "rank must run the same layers, in the same order, on arrays of the same "
                        "shapes");
    case Fault::kWrongRank:
      return Status(Code::kFailedPrecondition,
                    where + "this device is rank " + there +
                        " of the running mesh, which is not its place in the group; before the "
                        "program is traced, set the mesh with jax.set_mesh or open it with "
                        "jm.initialize(mesh, ep_axis)");
    case Fault::kBadPlan:
      return Status(Code::kInvalidArgument,
                    where + "plan names row or place " + here + " but there are " + there +
                        "; pass combine the plan of the dispatch that brought its rows, unchanged");
    case Fault::kStopped:
      return Status(Code::kDeadlineExceeded, where + peer + " came and did not go on within " +
                                                 std::to_string(timeout) + " s" + cure);
    case Fault::kDelivery:
      return Status(
          Code::kInvalidArgument,
          where + "this rank delivers by " + delivery_name(static_cast<Delivery>(report.here)) +
              " and " + peer + " by " + delivery_name(static_cast<Delivery>(report.there)) +
              "; set one JAX_MORIEP_NATIVE_DISPATCH, and one Tuning.native_dispatch, everywhere");
    case Fault::kNone:
      break;
  }
  return Status(Code::kInternal, where + "unknown fault");
}

}  // namespace

Group::Group(int32_t num_ranks, std::chrono::duration<double> timeout, int64_t half_bytes)
    : num_ranks_(num_ranks),
      timeout_(std::min(timeout, std::chrono::duration<double>(1e9))),
      half_bytes_(num_ranks > 1 ? half_bytes : 0),
      locals_(static_cast<size_t>(num_ranks)),
      connected_(static_cast<size_t>(num_ranks)) {}

Status Group::add_local(int32_t rank, int32_t device) {
  const OnDevice on(device);
  auto local = std::make_unique<LocalRank>();
  local->group = this;
  local->rank = rank;
  local->device = device;
  local->arenas.resize(static_cast<size_t>(num_ranks_));
  const std::string name = "rank " + std::to_string(rank) + " on device " + std::to_string(device);
  const int64_t bytes = kControlBytes + kWorkspaceBytes + 2 * half_bytes_;
  void* arena = nullptr;
  MORIEP_GPU_TRY(name + " got no arena of " + std::to_string(bytes >> 20) +
                     " MiB (set XLA_PYTHON_CLIENT_MEM_FRACTION or JAX_MORIEP_ARENA_MB lower)",
                 gpu_malloc_shared(&arena, static_cast<size_t>(bytes)));
  local->arena = static_cast<std::byte*>(arena);
  MORIEP_GPU_TRY(name, gpuMemset(arena, 0, kControlBytes));
  void* report = nullptr;
  MORIEP_GPU_TRY(
      name, gpuHostAlloc(&report, sizeof(FaultReport), gpuHostAllocMapped | gpuHostAllocPortable));
  std::memset(report, 0, sizeof(FaultReport));
  void* on_device = nullptr;
  MORIEP_GPU_TRY(name, gpuHostGetDevicePointer(&on_device, report, 0));
  local->report = static_cast<FaultReport*>(report);
  local->report_on_device = static_cast<FaultReport*>(on_device);
  if (Status status = preload_kernels(*local); !status.ok()) return status;
  MORIEP_GPU_TRY(name, gpuDeviceSynchronize());
  local->arenas[static_cast<size_t>(rank)] = local->arena;
  locals_[static_cast<size_t>(rank)] = std::move(local);
  connected_[static_cast<size_t>(rank)] = true;
  return Status();
}

Status Group::link_locals() {
  for (const auto& one : locals_) {
    for (const auto& other : locals_) {
      if (one == nullptr || other == nullptr || one == other) continue;
      const std::string names = "device " + std::to_string(one->device) + " cannot reach device " +
                                std::to_string(other->device) + "'s memory";
      if (one->device != other->device) {
        const OnDevice on(one->device);
        int can = 0;
        MORIEP_GPU_TRY(names, gpuDeviceCanAccessPeer(&can, one->device, other->device));
        if (can == 0) {
          return Status(Code::kFailedPrecondition, names + "; use transport='collective'");
        }
        const gpuError_t error = gpuDeviceEnablePeerAccess(other->device, 0);
        if (error == gpuErrorPeerAccessAlreadyEnabled) {
          (void)gpuGetLastError();
        } else if (error != gpuSuccess) {
          return failed(names, error);
        }
      }
      one->arenas[static_cast<size_t>(other->rank)] = other->arena;
    }
  }
  return Status();
}

Status Group::address(int32_t rank, int64_t* words) {
  const LocalRank* local = locals_[static_cast<size_t>(rank)].get();
  static_assert(sizeof(gpuIpcHandle_t) == 64);
  const OnDevice on(local->device);
  gpuIpcHandle_t handle;
  MORIEP_GPU_TRY("rank " + std::to_string(rank) + " cannot share its arena",
                 gpuIpcGetMemHandle(&handle, local->arena));
  std::memset(words, 0, sizeof(int64_t) * kAddressWords);
  words[0] = getpid();
  words[1] = kLayoutVersion;
  words[2] = half_bytes_;
  std::memcpy(words + 4, &handle, sizeof(handle));
  return Status();
}

Status Group::connect(int32_t rank, const int64_t* words) {
  const std::string name = "rank " + std::to_string(rank);
  if (words[1] != kLayoutVersion || words[2] != half_bytes_) {
    return Status(Code::kFailedPrecondition,
                  name + " has an arena of another layout or size (" + std::to_string(words[1]) +
                      ", " + std::to_string(words[2]) + " bytes a half; here " +
                      std::to_string(kLayoutVersion) + ", " + std::to_string(half_bytes_) +
                      "); install one version and set one JAX_MORIEP_ARENA_MB everywhere");
  }
  gpuIpcHandle_t handle;
  std::memcpy(&handle, words + 4, sizeof(handle));
  for (const auto& local : locals_) {
    if (local == nullptr) continue;
    const OnDevice on(local->device);
    void* arena = nullptr;
    MORIEP_GPU_TRY("device " + std::to_string(local->device) + " cannot open the arena of " + name +
                       " (use transport='collective' where the devices have no peer access)",
                   gpuIpcOpenMemHandle(&arena, handle, gpuIpcLazyPeerAccess));
    local->arenas[static_cast<size_t>(rank)] = static_cast<std::byte*>(arena);
  }
  std::lock_guard<std::mutex> lock(mutex_);
  connected_[static_cast<size_t>(rank)] = true;
  changed_.notify_all();
  return Status();
}

void Group::connect_far(int32_t rank) {
  std::lock_guard<std::mutex> lock(mutex_);
  connected_[static_cast<size_t>(rank)] = true;
  changed_.notify_all();
}

void Group::connect_failed(const std::string& why) {
  std::lock_guard<std::mutex> lock(mutex_);
  connect_error_ = why;
  changed_.notify_all();
}

bool Group::connected() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const bool connected : connected_) {
    if (!connected) return false;
  }
  return true;
}

Status Group::team(const LocalRank& me, Team* out) {
  std::unique_lock<std::mutex> lock(mutex_);
  size_t missing = 0;
  const bool in_time = changed_.wait_for(lock, timeout_, [this, &missing] {
    missing = 0;
    while (missing < connected_.size() && connected_[missing]) ++missing;
    return missing == connected_.size() || !connect_error_.empty();
  });
  if (missing < connected_.size()) {
    const std::string lacking =
        "rank " + std::to_string(me.rank) + " has no connection to rank " + std::to_string(missing);
    if (in_time) return Status(Code::kUnavailable, lacking + ": " + connect_error_);
    return Status(Code::kDeadlineExceeded, lacking + " after " + std::to_string(timeout_.count()) +
                                               " s; does every process run the same program?");
  }
  *out = Team{};
  for (size_t r = 0; r < me.arenas.size(); ++r) {
    out->control[r] = reinterpret_cast<Control*>(me.arenas[r]);
  }
  out->report = me.report_on_device;
  out->timeout_ns = static_cast<uint64_t>(timeout_.count() * 1e9);
  out->half_bytes = half_bytes_;
  out->rank = me.rank;
  out->num_ranks = num_ranks_;
  out->first_near = me.rank;
  while (out->first_near > 0 && out->control[out->first_near - 1] != nullptr) --out->first_near;
  out->num_near = num_near(me);
  return Status();
}

int32_t Group::num_near(const LocalRank& me) {
  return static_cast<int32_t>(std::count_if(me.arenas.begin(), me.arenas.end(),
                                            [](auto* arena) { return arena != nullptr; }));
}

Status Group::failure() {
  for (const auto& local : locals_) {
    if (local == nullptr) continue;
    // The device writes `set` last.
    if (__atomic_load_n(&local->report->set, __ATOMIC_ACQUIRE) == 0) continue;
    return describe(*local->report, local->rank, num_ranks_, num_near(*local), timeout_.count());
  }
  std::lock_guard<std::mutex> lock(mutex_);
  return connect_error_.empty() ? Status() : Status(Code::kUnavailable, connect_error_);
}

}  // namespace moriep::gpu
