// The sets of flags of a handle between nodes (flags.h): their memory on MORI's heap, and what
// MORI's kernels must be told to take one of them for theirs.
#pragma once

#include <hip/hip_runtime.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "flags.h"
#include "gpu/team.h"
#include "mori/application/application_device_types.hpp"
#include "moriep/status.h"

namespace moriep::mori {

class FlagSets {
 public:
  // Collective, as Handle::open is.
  static Status open(int32_t rank, int32_t num_ranks, int32_t ranks_on_node, int32_t max_tokens,
                     std::unique_ptr<FlagSets>* out);
  ~FlagSets();
  FlagSets(const FlagSets&) = delete;
  FlagSets& operator=(const FlagSets&) = delete;

  // MORI's name of the memory.
  const ::mori::application::SymmMemObjPtr& object() const { return object_; }
  // Says where each rank has the memory, as kernels and as the network address it: [R] each.
  Status place(const uint64_t* peers, const uint64_t* remote);
  // What kernels need to change the set that MORI's names for flags and for totals lead to.
  FlagArgs args(::mori::application::SymmMemObj* flags,
                ::mori::application::SymmMemObj* totals) const;

  // The host's way to let a dispatch end: nothing more comes in any chunk, and from no node.
  Status release(uint64_t step, hipStream_t stream) const;
  // The rank of another node from which not all has come that a dispatch waits for, or -1.
  int32_t silent_peer(uint64_t step, hipStream_t stream) const;

 private:
  // Where the ranks have the flags of a set, or its totals.
  struct Addresses {
    uint64_t peers[gpu::kMaxRanks];
    uint64_t remote[gpu::kMaxRanks];
  };
  struct Tables {
    Addresses flags[kFlagSets];
    Addresses totals[kFlagSets];
  };

  FlagSets() = default;
  size_t set_bytes() const { return flag_bytes_ + static_cast<size_t>(num_nodes_) * 8; }
  std::byte* set(uint64_t number) const;
  Status read(uint64_t step, hipStream_t stream, std::vector<uint64_t>* out) const;

  int32_t rank_ = 0;
  int32_t num_ranks_ = 0;
  int32_t ranks_on_node_ = 0;
  int32_t num_nodes_ = 0;
  int32_t num_chunks_ = 0;
  size_t flag_bytes_ = 0;  // of a set; totals lie behind
  ::mori::application::SymmMemObjPtr object_;
  Tables* tables_ = nullptr;  // in device memory
};

}  // namespace moriep::mori
