#include "group.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "handle.h"
#include "notices.h"
#include "world.h"

namespace moriep::mori {
namespace {

Status failed(const std::string& what, hipError_t error) {
  (void)hipGetLastError();
  return Status(Code::kInternal, what + ": " + hipGetErrorString(error));
}

#define MORIEP_HIP_TRY(what, call) \
  if (const hipError_t error = (call); error != hipSuccess) return failed(what, error)

}  // namespace

Group::Group(int32_t num_ranks, std::chrono::duration<double> timeout)
    : gpu::Group(num_ranks, timeout, kHalfBytes),
      timeout_(std::min(timeout, std::chrono::duration<double>(1e9))) {}

Group::~Group() { watchdog_.reset(); }

Status Group::add_local(int32_t rank, int32_t device) {
  if (rank_ >= 0) {
    return Status(Code::kFailedPrecondition,
                  "ranks " + std::to_string(rank_) + " and " + std::to_string(rank) +
                      " are devices of one process, and transport='mori' needs a process for each "
                      "device; start one for each (`jax-moriep launch`), or use "
                      "transport='native'");
  }
  if (Status status = gpu::Group::add_local(rank, device); !status.ok()) return status;
  const std::string name = "rank " + std::to_string(rank);
  MORIEP_HIP_TRY(name, hipSetDevice(device));
  MORIEP_HIP_TRY(name, preload_kernels());
  void* host = nullptr;
  void* on_device = nullptr;
  hipStream_t rescue = nullptr;
  MORIEP_HIP_TRY(
      name, hipHostMalloc(&host, sizeof(Progress), hipHostMallocMapped | hipHostMallocPortable));
  std::memset(host, 0, sizeof(Progress));
  MORIEP_HIP_TRY(name, hipHostGetDevicePointer(&on_device, host, 0));
  MORIEP_HIP_TRY(name, hipStreamCreateWithFlags(&rescue, hipStreamNonBlocking));
  rescue_ = rescue;
  progress_ = static_cast<Progress*>(host);
  progress_on_device_ = static_cast<Progress*>(on_device);
  rank_ = rank;
  device_ = device;
  if (num_ranks() > 1) watch();
  return Status();
}

void Group::watch() {
  watchdog_ = std::make_unique<Watchdog>(progress_, timeout_,
                                         [this](const Progress& seen) { stuck(seen); });
}

Status Group::connect(int32_t rank, const int64_t* words) {
  if (words[0] != 0) return gpu::Group::connect(rank, words);
  connect_far(rank);
  return Status();
}

int32_t Group::num_nodes() { return num_ranks() / num_near(*local(rank_)); }

Status Group::open_notices() {
  if (num_nodes() == 1 || notices_ != nullptr) return Status();
  MORIEP_HIP_TRY("rank " + std::to_string(rank_), hipSetDevice(device_));
  return Notices::open(rank_, num_ranks() / num_nodes(), num_nodes(), timeout_, &notices_);
}

Status Group::failure() {
  if (Status status = gpu::Group::failure(); !status.ok()) return status;
  std::lock_guard<std::mutex> lock(handles_mutex_);
  for (const auto& [key, entry] : handles_) {
    if (!entry.status.ok()) return entry.status;
  }
  return Status();
}

Status Group::open_handle(const std::string& key, const HandleSizes& sizes) {
  MORIEP_HIP_TRY("rank " + std::to_string(rank_), hipSetDevice(device_));
  int32_t number = 0;
  {
    std::lock_guard<std::mutex> lock(handles_mutex_);
    if (const auto known = handles_.find(key);
        known != handles_.end() && known->second.handle != nullptr) {
      return Status();
    }
    number = static_cast<int32_t>(numbered_.size());
  }
  std::unique_ptr<Handle> handle;
  if (Status status = Handle::open(rank_, num_ranks(), number, sizes, &handle); !status.ok()) {
    return status;
  }
  if (notices_ != nullptr) {
    if (Status status = notices_->find_relay(); !status.ok()) return status;
  }
  // Nobody dispatches into buffers that another rank still clears.
  world_barrier();
  std::lock_guard<std::mutex> lock(handles_mutex_);
  numbered_.push_back(handle.get());
  handles_[key] = Entry{std::move(handle), Status()};
  handles_changed_.notify_all();
  return Status();
}

void Group::handle_failed(const std::string& key, const Status& why) {
  std::lock_guard<std::mutex> lock(handles_mutex_);
  handles_[key].status = why;
  handles_changed_.notify_all();
}

Status Group::handle(const std::string& key, const Handle** out) {
  std::unique_lock<std::mutex> lock(handles_mutex_);
  Entry* found = nullptr;
  const bool in_time = handles_changed_.wait_for(lock, timeout_, [&] {
    const auto place = handles_.find(key);
    found = place == handles_.end() ? nullptr : &place->second;
    return found != nullptr && (found->handle != nullptr || !found->status.ok());
  });
  if (!in_time) {
    return Status(Code::kDeadlineExceeded, "rank " + std::to_string(rank_) +
                                               " has no MORI handle " + key + " after " +
                                               std::to_string(timeout_.count()) +
                                               " s; does every process run the same program?");
  }
  if (!found->status.ok()) return found->status;
  *out = found->handle.get();
  return Status();
}

Status Group::reset() {
  const std::string name = "rank " + std::to_string(rank_);
  if (notices_ != nullptr) {
    return Status(
        Code::kFailedPrecondition,
        "a group on several nodes cannot begin anew, for its network may hold messages of "
        "before; restart the job");
  }
  MORIEP_HIP_TRY(name, hipSetDevice(device_));
  watchdog_.reset();
  gpu::LocalRank& me = *local(rank_);
  MORIEP_HIP_TRY(name, hipMemset(me.arena, 0, gpu::kControlBytes));
  std::memset(me.report, 0, sizeof(*me.report));
  std::memset(progress_, 0, sizeof(*progress_));
  std::lock_guard<std::mutex> lock(handles_mutex_);
  for (auto place = handles_.begin(); place != handles_.end();) {
    if (place->second.handle == nullptr) {
      place = handles_.erase(place);
      continue;
    }
    if (Status status = place->second.handle->reset(); !status.ok()) return status;
    ++place;
  }
  MORIEP_HIP_TRY(name, hipDeviceSynchronize());
  if (num_ranks() > 1) watch();
  return Status();
}

void Group::stuck(const Progress& seen) {
  (void)hipSetDevice(device_);
  const auto rescue = static_cast<hipStream_t>(rescue_);
  const Handle* handle = nullptr;
  {
    std::lock_guard<std::mutex> lock(handles_mutex_);
    handle = numbered_[static_cast<size_t>(seen.handle)];
  }
  const auto kind = static_cast<Kind>(seen.kind);
  const int32_t peer = handle->missing_peer(kind, seen.entered, seen.barrier, rescue);
  gpu::FaultReport& report = *local(rank_)->report;
  if (__atomic_load_n(&report.set, __ATOMIC_ACQUIRE) == 0) {
    report.fault = static_cast<int32_t>(gpu::Fault::kStopped);
    report.kind = seen.kind;
    report.peer = peer < 0 ? rank_ : peer;
    report.step = seen.entered;
    report.here = static_cast<int64_t>(seen.entered);
    report.there = static_cast<int64_t>(seen.entered);
    __atomic_store_n(&report.set, uint64_t{1}, __ATOMIC_RELEASE);
  }
  // First that results are poison, then the end of the wait.
  auto* control = reinterpret_cast<gpu::Control*>(local(rank_)->arena);
  const uint32_t yes = 1;
  if (hipMemcpyAsync(&control->failed, &yes, sizeof(yes), hipMemcpyHostToDevice, rescue) !=
          hipSuccess ||
      hipStreamSynchronize(rescue) != hipSuccess) {
    return;
  }
  (void)handle->release(kind, seen.entered, seen.barrier, rescue);
  if (notices_ != nullptr) (void)give_up_messages(rescue);
}

}  // namespace moriep::mori
