// Instantiates kernels of the installed amd-mori, under the names that its launchers look for, for one of its kernel
// types (MORIEP_KERNEL) and rows of one type (MORIEP_ROW_TYPE, of whose name MORIEP_ROW_NAME is MORI's short form).
// MORI's own files instantiate everything for all types of rows, which takes many times as long to compile.
#include "src/ops/kernels/ep_common.hip"

#include "relay.h"

MORI_DEFINE_GPU_STATES

// Tells the ranks in this one's place on the other nodes that it has come to a step, and waits for them, with a
// deadline. One wave; a lane for each node. Who has not come is noticed by who looks at the counts afterwards.
inline __device__ void relay(const moriep::mori::RelayArgs& args) {
  namespace mine = moriep::mori;
  auto* object = static_cast<mori::application::SymmMemObj*>(args.memory);
  const mori::application::SymmMemObjPtr memory{nullptr, object};
  const int node = threadIdx.x;
  const int own_node = args.rank / args.ranks_on_node;
  const int peer = node * args.ranks_on_node + args.rank % args.ranks_on_node;
  const bool far = node < args.num_nodes && node != own_node;
  const uint64_t step = *args.epoch + 1;
  const bool failed = *args.failed != 0;
  if (far && *args.silent == 0) {
    mori::shmem::ShmemPutMemNbiThread(memory, mine::notice_in_at(step, args.num_nodes, own_node), memory,
                                      mine::notice_out_at(step, args.num_nodes), args.bytes, peer);
    mori::shmem::ShmemAtomicTypeNonFetchThread<uint64_t>(memory, mine::count_at(own_node), 1, mori::core::AMO_ADD,
                                                         peer);
  }
  if (failed) {
    if (threadIdx.x == 0) *args.silent = 1;
    return;
  }
  auto* counts = reinterpret_cast<uint64_t*>(object->localPtr);
  const uint64_t begin = wall_clock64();
  while (far && mori::core::AtomicLoadRelaxedSystem(counts + node) < step) {
    __builtin_amdgcn_s_sleep(2);
    if ((wall_clock64() - begin) * 10 > args.timeout_ns) break;  // it ticks at 100 MHz
  }
  __threadfence_system();
}

#ifdef MORI_PROXY_ENABLED
#define MORIEP_BY_PROXY 1
#else
#define MORIEP_BY_PROXY 0
#endif
#define RELAY                                                                                      \
  extern "C" __device__ __attribute__((used)) int32_t moriep_by_proxy = MORIEP_BY_PROXY;           \
  extern "C" __global__ void MoriepRelay(moriep::mori::RelayArgs args) { relay(args); }

// The rows that combine reads lie anywhere (nop2p: each rank sends them) or in MORI's own buffer (p2p: peers fetch).
#define COMBINE_INTRA_NODE(name, type)                                                \
  WRAP_BOOL3_ENTRY(EpCombineIntraNodeKernel, name##_nop2p, type, false, false, false) \
  WRAP_BOOL3_ENTRY(EpCombineIntraNodeKernel, name##_p2p, type, true, false, false)

#define KERNELS_OF_IntraNode(name, type)                        \
  WRAP_BOOL_ENTRY(EpDispatchIntraNodeKernel, name, type, false) \
  COMBINE_INTRA_NODE(name, type)

#define KERNELS_OF_IntraNodeLL(name, type)                  \
  WRAP_BOOL(EpDispatchIntraNodeLLKernel, name, type, false) \
  COMBINE_INTRA_NODE(name, type)

#define KERNELS_OF_InterNode(name, type)      \
  WRAP(EpDispatchInterNodeKernel, name, type) \
  WRAP(EpCombineInterNodeKernel, name, type)

#define AROUND_INTER_NODE_V1(name, type)    \
  RELAY                                     \
  WRAP(EpDispatchCopyToStaging, name, type) \
  WRAP(EpCombineSync, name, type)           \
  WRAP(EpCombineSyncBarrier, name, type)    \
  WRAP(EpCombineAll, name, type)

#define KERNELS_OF_InterNodeV1(name, type)      \
  AROUND_INTER_NODE_V1(name, type)              \
  WRAP(EpDispatchInterNodeV1Kernel, name, type) \
  WRAP(EpCombineInterNodeV1Kernel, name, type)

#define KERNELS_OF_InterNodeV1LL(name, type)                            \
  AROUND_INTER_NODE_V1(name, type)                                      \
  WRAP_BOOL(EpDispatchInterNodeV1KernelLowLatency, name, type, false)   \
  WRAP_BOOL(EpCombineInterNodeV1KernelLowLatency, name, type, false)

#define KERNELS_OF_AsyncLL(name, type)                              \
  WRAP(EpDispatchLowLatencyAsyncSendCopySlotAssign, name, type)     \
  WRAP(EpDispatchLowLatencyAsyncSendCopyMultiBlock, name, type)     \
  WRAP(EpDispatchLowLatencyAsyncSendTransfer, name, type)           \
  WRAP(EpDispatchLowLatencyAsyncRecvTransfer, name, type)           \
  WRAP(EpDispatchLowLatencyAsyncRecvCopyMultiBlock, name, type)     \
  WRAP_BOOL(EpCombineLowLatencyAsyncSendCopy, name, type, false)     \
  WRAP_BOOL(EpCombineLowLatencyAsyncSendTransfer, name, type, false) \
  WRAP_BOOL(EpCombineLowLatencyAsyncRecvTransfer, name, type, false) \
  WRAP_BOOL(EpCombineLowLatencyAsyncRecvCopy, name, type, false)

// Two steps, because what is joined by ## is not expanded first.
#define DEFINE(kernel, name, type) KERNELS_OF_##kernel(name, type)
#define EXPAND(kernel, name, type) DEFINE(kernel, name, type)

EXPAND(MORIEP_KERNEL, MORIEP_ROW_NAME, MORIEP_ROW_TYPE)
