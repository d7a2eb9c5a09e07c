#include "handle.h"

#include <array>
#include <cstring>
#include <vector>

#include "gpu/team.h"
#include "world.h"

namespace moriep::mori {

using ::mori::application::SymmMemObj;
using ::mori::application::SymmMemObjPtr;

// What MORI's kernels know of a symmetric buffer, in a copy of ours that we may change.
struct View {
  SymmMemObj object;
  uint64_t peers[gpu::kMaxRanks];   // what object.p2pPeerPtrs points to
  uint64_t remote[gpu::kMaxRanks];  // what object.peerPtrs points to: addresses for the network
};

// Where a rank that has failed talks to itself.
struct Scratch {
  alignas(256) uint64_t meeting[gpu::kMaxRanks];
  int32_t signals[gpu::kMaxRanks];
  int32_t offset;
};

struct Views {
  View of[kNumBuffers];
  Scratch scratch;
  uint64_t combines;
  Word64 detours[kNumBuffers * (2 * gpu::kMaxRanks + 1)];
};

namespace {

// Kernels are compiled apart from this library and from MORI's: all three must mean the same bytes.
static_assert(sizeof(moe::EpDispatchCombineArgsRaw) == 744, "another amd-mori than 1.2.4");

Status failed(const std::string& what, hipError_t error) {
  (void)hipGetLastError();
  return Status(Code::kInternal, what + ": " + hipGetErrorString(error));
}

#define MORIEP_HIP_TRY(what, call) \
  if (const hipError_t error = (call); error != hipSuccess) return failed(what, error)

// Where the arguments of MORI's kernels name a buffer.
SymmMemObjPtr* named(moe::EpDispatchCombineArgsRaw& args, KernelType kernel, Buffer buffer) {
  const bool v1 = between_nodes(kernel);
  switch (buffer) {
    case Buffer::kTokens:
      return v1 ? &args.interNodeV1TokBufs.dispatchOut : &args.intraNodeTokBufs.dispatchOut;
    case Buffer::kWeights:
      return &args.shmemDispatchOutWeightsMemObj;
    case Buffer::kIds:
      return &args.shmemOutIndicesMemObj;
    case Buffer::kScales:
      return &args.shmemOutScalesMemObj;
    case Buffer::kOrigins:
      return &args.dispTokIdToSrcTokIdMemObj;
    case Buffer::kOffset:
      return &args.dispTokOffsetMemObj;
    case Buffer::kSignals:
      return &args.recvTokenNumMemObj;
    case Buffer::kReturned:
      return v1 ? &args.interNodeV1TokBufs.combineInp : &args.intraNodeTokBufs.combineInp;
    case Buffer::kMeeting:
      return &args.crossDeviceBarrierMemObj;
    case Buffer::kSums:
      return v1 ? &args.interNodeV1TokBufs.combineOut : &args.intraNodeTokBufs.combineOut;
    case Buffer::kScalars:
      return &args.shmemCombineOutWeightsMemObj;
    case Buffer::kInbox:
      return v1 ? &args.interNodeV1TokBufs.dispatchInp : nullptr;
    case Buffer::kStaging:
      return v1 ? &args.interNodeV1TokBufs.staging : nullptr;
    case Buffer::kFlags:
      return v1 ? &args.interNodeChunkFlagMemObj : nullptr;
    case Buffer::kTotals:
      return v1 ? &args.nodeRecvTokenNumMemObj : nullptr;
  }
  return nullptr;
}

moe::EpDispatchCombineConfig config_of(int32_t rank, int32_t num_ranks, const HandleSizes& sizes) {
  moe::EpDispatchCombineConfig config;
  config.rank = rank;
  config.worldSize = num_ranks;
  config.hiddenDim = sizes.hidden_size;
  config.scaleDim = sizes.num_scales;
  config.scaleTypeSize = sizes.num_scales > 0 ? 4 : 1;
  config.maxTokenTypeSize = sizes.element_bytes;
  config.maxNumInpTokenPerRank = sizes.max_tokens;
  config.numExpertPerRank = sizes.experts_per_rank;
  config.numExpertPerToken = sizes.top_k;
  config.kernelType = sizes.kernel;
  config.gpuPerNode = sizes.gpus_per_node;
  config.numQpPerPe = sizes.num_queues;
  return config;
}

bool is_power_of_two(int32_t value) { return value > 0 && (value & (value - 1)) == 0; }

Status refused(const char* name, int64_t value, const std::string& rule) {
  return Status(Code::kInvalidArgument, std::string(name) + "=" + std::to_string(value) + " must " +
                                            rule + " with transport='mori'");
}

}  // namespace

Status check_handle(const HandleSizes& sizes, int32_t num_ranks) {
  const bool low_latency = sizes.kernel == KernelType::IntraNodeLL;
  if (!between_nodes(sizes.kernel)) {
    if (sizes.kernel != KernelType::IntraNode && !low_latency) {
      return refused("mori_kernel", sizes.kernel, "be IntraNode, IntraNodeLL or InterNodeV1[LL]");
    }
    if (num_ranks > 8) return refused("num_ranks", num_ranks, "be at most 8 on one node");
  }
  const int64_t most_tokens = (int64_t{1} << 30) / num_ranks / num_ranks;
  if (sizes.max_tokens < 1 || sizes.max_tokens >= most_tokens) {
    return refused("num_tokens", sizes.max_tokens, "be from 1 to " + std::to_string(most_tokens));
  }
  if (sizes.hidden_size < 1) return refused("hidden_size", sizes.hidden_size, "be positive");
  if (sizes.top_k < 1 || sizes.top_k > (low_latency ? 8 : 63)) {
    return refused("top_k", sizes.top_k, low_latency ? "be from 1 to 8" : "be from 1 to 63");
  }
  if (sizes.experts_per_rank < 1) {
    return refused("experts_per_rank", sizes.experts_per_rank, "be positive");
  }
  if (!is_power_of_two(sizes.gpus_per_node) || num_ranks % sizes.gpus_per_node != 0) {
    return refused("gpus_per_node", sizes.gpus_per_node,
                   "be a power of two that divides the number of ranks");
  }
  return Status();
}

Status Handle::open(int32_t rank, int32_t num_ranks, int32_t number, const HandleSizes& sizes,
                    std::unique_ptr<Handle>* out) {
  if (Status status = check_handle(sizes, num_ranks); !status.ok()) return status;
  auto handle = std::unique_ptr<Handle>(new Handle());
  handle->sizes_ = sizes;
  handle->number_ = number;
  handle->rank_ = rank;
  handle->num_ranks_ = num_ranks;
  try {
    handle->handle_ =
        std::make_unique<moe::EpDispatchCombineHandle>(config_of(rank, num_ranks, sizes));
    handle->arguments_ = moe::GetEpDispatchCombineArgsRaw(*handle->handle_, 0);
  } catch (const std::exception& error) {
    return Status(Code::kInternal, std::string("MORI made no handle: ") + error.what());
  }
  if (between_nodes(sizes.kernel)) {
    if (Status status =
            FlagSets::open(rank, num_ranks, sizes.gpus_per_node, sizes.max_tokens, &handle->flags_);
        !status.ok()) {
      return status;
    }
    handle->arguments_.interNodeChunkFlagMemObj = handle->flags_->object();
    handle->arguments_.nodeRecvTokenNumMemObj = handle->flags_->object();
  }
  if (Status status = handle->make_views(); !status.ok()) return status;
  // Peers may write to the buffers from here on, once everybody is here.
  MORIEP_HIP_TRY("MORI's handle", hipDeviceSynchronize());
  *out = std::move(handle);
  return Status();
}

Handle::~Handle() {
  if (views_on_device_ != nullptr) (void)hipFree(views_on_device_);
}

Status Handle::make_views() {
  views_ = std::make_unique<Views>();
  std::memset(static_cast<void*>(views_.get()), 0, sizeof(Views));
  void* memory = nullptr;
  MORIEP_HIP_TRY("MORI's handle", hipMalloc(&memory, sizeof(Views)));
  views_on_device_ = static_cast<Views*>(memory);
  Views* device = views_on_device_;
  const auto address = [](auto* at) { return reinterpret_cast<uint64_t>(at); };

  for (int b = 0; b < kNumBuffers; ++b) {
    const auto buffer = static_cast<Buffer>(b);
    SymmMemObjPtr* name = named(arguments_, sizes_.kernel, buffer);
    if (name == nullptr || name->gpu == nullptr) continue;
    View& view = views_->of[b];
    MORIEP_HIP_TRY("MORI's handle", hipMemcpy(static_cast<void*>(&view.object), name->gpu,
                                              sizeof(SymmMemObj), hipMemcpyDeviceToHost));
    MORIEP_HIP_TRY("MORI's handle", hipMemcpy(view.peers, view.object.p2pPeerPtrs,
                                              sizeof(uint64_t) * static_cast<size_t>(num_ranks_),
                                              hipMemcpyDeviceToHost));
    view.object.p2pPeerPtrs = reinterpret_cast<uintptr_t*>(device->of[b].peers);
    const bool far = between_nodes(sizes_.kernel);
    if (far) {
      MORIEP_HIP_TRY("MORI's handle", hipMemcpy(view.remote, view.object.peerPtrs,
                                                sizeof(uint64_t) * static_cast<size_t>(num_ranks_),
                                                hipMemcpyDeviceToHost));
      view.object.peerPtrs = reinterpret_cast<uintptr_t*>(device->of[b].remote);
    }
    name->gpu = &device->of[b].object;
    if (buffer == Buffer::kFlags) {
      if (Status status = flags_->place(view.peers, view.remote); !status.ok()) return status;
    }
    if (buffer == Buffer::kFlags || buffer == Buffer::kTotals) continue;  // sets of ours lead there
    if (buffer == Buffer::kSums || buffer == Buffer::kScalars) continue;  // no peer's business

    // A payload goes to this rank's own buffer, which has room for its tokens to all ranks; what
    // is waited for goes to memory that no peer knows.
    uint64_t own = address(view.object.localPtr);
    int64_t stride = 0;  // of a sign, which a peer puts at its own rank's place
    if (buffer == Buffer::kOffset) own = address(&device->scratch.offset);
    if (buffer == Buffer::kSignals) {
      own = address(device->scratch.signals);
      stride = sizeof(int32_t);
    }
    if (buffer == Buffer::kMeeting) {
      own = address(device->scratch.meeting);
      stride = sizeof(uint64_t);
    }
    views_->detours[num_detours_++] = {local_word(buffer), own};
    for (int peer = 0; peer < num_ranks_; ++peer) {
      const uint64_t there = own + static_cast<uint64_t>((peer - rank_) * stride);
      views_->detours[num_detours_++] = {&device->of[b].peers[peer], there};
      if (far) views_->detours[num_detours_++] = {&device->of[b].remote[peer], there};
    }
  }
  return upload_views();
}

FlagArgs Handle::flags() const {
  const auto object = [this](Buffer buffer) {
    return &views_on_device_->of[static_cast<int>(buffer)].object;
  };
  FlagArgs args = flags_->args(object(Buffer::kFlags), object(Buffer::kTotals));
  args.sent_chunks = arguments_.blockFlagCounter;
  args.combines = &views_on_device_->combines;
  args.barrier = arguments_.crossDeviceBarrierFlag;
  args.own_meeting = views_on_device_->scratch.meeting;
  return args;
}

Status Handle::upload_views() {
  MORIEP_HIP_TRY("MORI's handle", hipMemcpy(static_cast<void*>(views_on_device_), views_.get(),
                                            sizeof(Views), hipMemcpyHostToDevice));
  return Status();
}

Status Handle::reset() {
  const auto n = static_cast<size_t>(num_ranks_);
  const moe::EpDispatchCombineArgsRaw& args = arguments_;
  struct Part {
    void* at;
    size_t bytes;
  };
  for (const Part& part : {Part{local(Buffer::kSignals), n * sizeof(int32_t)},
                           Part{local(Buffer::kMeeting), n * sizeof(uint64_t)},
                           Part{local(Buffer::kOffset), sizeof(int32_t)},
                           Part{args.destPeTokenCounter, n * sizeof(int32_t)},
                           Part{args.dispatchGridBarrier, sizeof(uint32_t)},
                           Part{args.combineGridBarrier, sizeof(uint32_t)}}) {
    MORIEP_HIP_TRY("MORI's handle", hipMemset(part.at, 0, part.bytes));
  }
  const uint64_t first = 1;
  MORIEP_HIP_TRY("MORI's handle", hipMemcpy(args.crossDeviceBarrierFlag, &first, sizeof(first),
                                            hipMemcpyHostToDevice));
  return upload_views();
}

const Word64* Handle::detours() const { return views_on_device_->detours; }

std::byte* Handle::local(Buffer buffer) const {
  moe::EpDispatchCombineArgsRaw args = arguments_;
  const SymmMemObjPtr* name = named(args, sizes_.kernel, buffer);
  return name->cpu == nullptr ? nullptr : static_cast<std::byte*>(name->cpu->localPtr);
}

uint64_t* Handle::local_word(Buffer buffer) const {
  return reinterpret_cast<uint64_t*>(
      &views_on_device_->of[static_cast<int>(buffer)].object.localPtr);
}

Status Handle::release(Kind kind, uint64_t step, uint64_t barrier, hipStream_t stream) const {
  const auto n = static_cast<size_t>(num_ranks_);
  const std::vector<uint64_t> met(n, barrier);
  // One more than the number of tokens that came; those that have come are overwritten, for nobody
  // will look at them any more.
  const std::vector<int32_t> none(n, 1);
  const bool combine = kind == Kind::kCombine;
  const void* from = combine ? static_cast<const void*>(met.data()) : none.data();
  const size_t bytes = n * (combine ? sizeof(uint64_t) : sizeof(int32_t));
  std::byte* to = local(combine ? Buffer::kMeeting : Buffer::kSignals);
  MORIEP_HIP_TRY("MORI's kernel", hipMemcpyAsync(to, from, bytes, hipMemcpyHostToDevice, stream));
  MORIEP_HIP_TRY("MORI's kernel", hipStreamSynchronize(stream));
  return flags_ == nullptr || combine ? Status() : flags_->release(step, stream);
}

int32_t Handle::missing_peer(Kind kind, uint64_t step, uint64_t barrier, hipStream_t stream) const {
  if (flags_ != nullptr && kind != Kind::kCombine) {
    if (const int32_t far = flags_->silent_peer(step, stream); far >= 0) return far;
  }
  const auto n = static_cast<size_t>(num_ranks_);
  const bool combine = kind == Kind::kCombine;
  std::vector<uint64_t> met(n);
  std::vector<int32_t> signals(n);
  void* to = combine ? static_cast<void*>(met.data()) : signals.data();
  const size_t bytes = n * (combine ? sizeof(uint64_t) : sizeof(int32_t));
  const std::byte* from = local(combine ? Buffer::kMeeting : Buffer::kSignals);
  if (hipMemcpyAsync(to, from, bytes, hipMemcpyDeviceToHost, stream) != hipSuccess ||
      hipStreamSynchronize(stream) != hipSuccess) {
    return -1;
  }
  for (int32_t peer = 0; peer < num_ranks_; ++peer) {
    const auto i = static_cast<size_t>(peer);
    const int32_t per_node = sizes_.gpus_per_node;
    const bool near = !between_nodes(sizes_.kernel) || peer / per_node == rank_ / per_node;
    // Between nodes a rank has to do with those in its own place only, and with them in a combine.
    if (!near && (!combine || peer % per_node != rank_ % per_node)) continue;
    if (combine ? met[i] != barrier : signals[i] == 0) return peer;
  }
  return -1;
}

}  // namespace moriep::mori
