// Groups of a process on GPUs: which device is which rank, and the arenas of all ranks. No header
// of a GPU runtime is included here, so that the handlers need none.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "moriep/registry.h"
#include "moriep/status.h"
#include "team.h"

namespace moriep::gpu {

// Enough for what a peer must know to open an arena: process, layout, size, and the IPC handle.
inline constexpr int kAddressWords = 12;

class Group;

// The most blocks of each kernel that moves rows.
struct BlockLimits {
  int32_t stage = 0;
  int32_t pull = 0;
  int32_t push = 0;
  int32_t reduce = 0;
  int32_t put = 0;
  int32_t fp8_stage = 0;
  int32_t fp8_pull = 0;
  int32_t fp8_put = 0;
};

// A rank whose device this process drives.
struct LocalRank {
  Group* group = nullptr;
  int32_t rank = 0;
  int32_t device = 0;
  BlockLimits max_blocks;
  std::byte* arena = nullptr;
  FaultReport* report = nullptr;            // in host memory
  FaultReport* report_on_device = nullptr;  // the same, as the device addresses it
  std::vector<std::byte*> arenas;           // of all ranks, as this device addresses them
};

class Group {
 public:
  Group(int32_t num_ranks, std::chrono::duration<double> timeout, int64_t half_bytes);

  // Allocates a local rank's arena. All are added before any step.
  Status add_local(int32_t rank, int32_t device);
  // Lets the local ranks' devices reach each other's arenas.
  Status link_locals();
  // Of a local rank.
  Status address(int32_t rank, int64_t* words);
  Status connect(int32_t rank, const int64_t* words);
  // For a rank of another node, whose arena nobody here reaches.
  void connect_far(int32_t rank);
  void connect_failed(const std::string& why);
  bool connected();

  // What kernels of a local rank are told; waits until every peer is connected.
  Status team(const LocalRank& me, Team* out);

  int32_t num_ranks() const { return num_ranks_; }
  int64_t half_bytes() const { return half_bytes_; }
  LocalRank* local(int32_t rank) { return locals_[static_cast<size_t>(rank)].get(); }
  // What went wrong on one of this process's ranks, or ok.
  Status failure();

  // How many ranks are on a rank's node, once all are connected.
  static int32_t num_near(const LocalRank& me);

 private:
  const int32_t num_ranks_;
  const std::chrono::duration<double> timeout_;
  const int64_t half_bytes_;
  std::vector<std::unique_ptr<LocalRank>> locals_;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<bool> connected_;
  std::string connect_error_;
};

using GroupTable = GroupTableOf<Group>;
using Registry = RegistryOf<Group>;

}  // namespace moriep::gpu
