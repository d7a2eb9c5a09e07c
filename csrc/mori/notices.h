// How the nodes of a group meet before each step: memory for notices on MORI's heap, and the relay
// kernel that sends them (mori/relay.h).
#pragma once

#include <hip/hip_runtime.h>

#include <chrono>
#include <cstdint>
#include <memory>

#include "gpu/team.h"
#include "mori/application/application_device_types.hpp"
#include "moriep/status.h"

namespace moriep::mori {

class Notices {
 public:
  // Collective, when MORI is open.
  static Status open(int32_t rank, int32_t ranks_on_node, int32_t num_nodes,
                     std::chrono::duration<double> timeout, std::unique_ptr<Notices>* out);
  ~Notices();
  Notices(const Notices&) = delete;
  Notices& operator=(const Notices&) = delete;

  // Once MORI's kernels are loaded, and the relay with them.
  Status find_relay();
  // Sends this step's notice, of so many words of each rank, and waits for those of other nodes.
  Status relay(const gpu::Team& team, int64_t num_words, hipStream_t stream) const;
  // Whether a notice can be so long.
  Status check_words(int64_t num_words) const;

  int32_t num_nodes() const { return num_nodes_; }
  std::byte* memory() const { return static_cast<std::byte*>(object_.cpu->localPtr); }
  uint32_t* silent() const { return silent_; }
  int32_t* reach() const { return reach_; }

 private:
  Notices() = default;

  int32_t rank_ = 0;
  int32_t ranks_on_node_ = 0;
  int32_t num_nodes_ = 0;
  uint64_t timeout_ns_ = 0;
  ::mori::application::SymmMemObjPtr object_;
  uint32_t* silent_ = nullptr;  // in device memory
  int32_t* reach_ = nullptr;
  hipFunction_t relay_ = nullptr;
};

}  // namespace moriep::mori
