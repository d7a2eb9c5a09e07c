// The intra-node kernels of the installed amd-mori, under the names that its launcher looks for. The whole
// ep_intranode.hip takes minutes to compile; these few take seconds.
#include "src/ops/kernels/ep_common.hip"

MORI_DEFINE_GPU_STATES

WRAP_ALL_TYPES_BOOL_ENTRY(EpDispatchIntraNodeKernel, , false)
WRAP_ALL_TYPES_BOOL3_ENTRY(EpCombineIntraNodeKernel, _nop2p, false, false, false)
