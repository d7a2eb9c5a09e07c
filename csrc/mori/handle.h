// MORI's handle for one shape, and what its kernels are launched with.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "flag_sets.h"
#include "flags.h"
#include "gpu/group.h"
#include "kernels.h"
#include "mori/ops/dispatch_combine/dispatch_combine.hpp"
#include "moriep/layout.h"
#include "moriep/status.h"

namespace moriep::mori {

namespace moe = ::mori::moe;

using moe::KernelType;

// What every rank makes its handle with, in numbers that Python passes.
struct HandleSizes {
  KernelType kernel = KernelType::IntraNode;
  int32_t max_tokens = 0;        // M: tokens of a rank
  int32_t hidden_size = 0;       // H
  int32_t top_k = 0;             // K
  int32_t experts_per_rank = 0;  // L
  int32_t element_bytes = 0;     // of the widest row type
  int32_t num_scales = 0;        // f32 scales of a row, 0 without the fp8 wire
  int32_t gpus_per_node = 0;
  int32_t num_queues = 1;  // queue pairs to a peer on another node
};
inline constexpr int kNumHandleSizes = 9;

// Refuses what MORI would answer by ending the process, or by writing where it must not.
Status check_handle(const HandleSizes& sizes, int32_t num_ranks);

// Which buffers MORI's kernels are to take for theirs.
enum class Buffer {
  kTokens,    // dispatchOut: what arrives
  kWeights,   // shmemDispatchOutWeights
  kIds,       // shmemOutIndices
  kScales,    // shmemOutScales
  kOrigins,   // dispTokIdToSrcTokId
  kOffset,    // dispTokOffset: the next free place of each rank
  kSignals,   // recvTokenNum: what a dispatch waits for
  kReturned,  // combineInp: rows on their way back
  kMeeting,   // crossDeviceBarrier: what a combine waits for
  kSums,      // combineOut: the result
  kScalars,   // shmemCombineOutWeights: the other result
  // Between nodes only.
  kInbox,    // dispatchInp: tokens from other nodes
  kStaging,  // staging: sums on their way back, and those that have come
  kFlags,    // interNodeChunkFlag: how many tokens have come in each chunk of 64, and one more
  kTotals,   // nodeRecvTokenNum: how many may come from each node, and one more
};
inline constexpr int kNumBuffers = 15;

inline bool between_nodes(KernelType kernel) {
  return kernel == KernelType::InterNodeV1 || kernel == KernelType::InterNodeV1LL;
}

struct Views;

class Handle {
 public:
  // Collective: all ranks make the same handles in the same order, and meet in world_barrier after.
  static Status open(int32_t rank, int32_t num_ranks, int32_t number, const HandleSizes& sizes,
                     std::unique_ptr<Handle>* out);
  ~Handle();
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;

  const HandleSizes& sizes() const { return sizes_; }
  // Among the handles of its group.
  int32_t number() const { return number_; }
  int32_t processors() const { return handle_->multiProcessorCount; }
  // What a launch begins with; everything of a single call in it is empty.
  const moe::EpDispatchCombineArgsRaw& arguments() const { return arguments_; }
  // This rank's part of a buffer.
  std::byte* local(Buffer buffer) const;
  // The word that says where a buffer's local part is, for kernels.
  uint64_t* local_word(Buffer buffer) const;

  const Word64* detours() const;
  int32_t num_detours() const { return num_detours_; }

  int32_t num_nodes() const { return num_ranks_ / sizes_.gpus_per_node; }
  // Between nodes: MORI's flags and totals, of which each step has its own.
  FlagArgs flags() const;

  // The host's way to let MORI's running kernels of a step end: what a dispatch waits for, or a
  // combine. Copies run on `stream`.
  Status release(Kind kind, uint64_t step, uint64_t barrier, hipStream_t stream) const;
  // The first rank whose sign is missing in a step, or -1.
  int32_t missing_peer(Kind kind, uint64_t step, uint64_t barrier, hipStream_t stream) const;
  // Makes it as it was when it was opened.
  Status reset();

 private:
  Handle() = default;
  Status make_views();
  Status upload_views();

  HandleSizes sizes_;
  int32_t number_ = 0;
  int32_t rank_ = 0;
  int32_t num_ranks_ = 0;
  std::unique_ptr<moe::EpDispatchCombineHandle> handle_;
  moe::EpDispatchCombineArgsRaw arguments_;
  std::unique_ptr<Views> views_;      // as they shall be
  Views* views_on_device_ = nullptr;  // as they are, in device memory
  std::unique_ptr<FlagSets> flags_;   // between nodes
  int32_t num_detours_ = 0;
};

}  // namespace moriep::mori
