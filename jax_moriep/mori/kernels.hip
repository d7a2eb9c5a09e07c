// Instantiates kernels of the installed amd-mori, under the names that its launchers look for, for one of its kernel
// types (MORIEP_KERNEL) and rows of one type (MORIEP_ROW_TYPE, of whose name MORIEP_ROW_NAME is MORI's short form).
// MORI's own files instantiate everything for all types of rows, which takes many times as long to compile.
#include "src/ops/kernels/ep_common.hip"

MORI_DEFINE_GPU_STATES

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
