// The intra-node kernels of the installed amd-mori for rows of ROW_TYPE, under the names that its launcher looks
// for, of which ROW_NAME is a part. The whole ep_intranode.hip takes many times as long to compile.
#include "src/ops/kernels/ep_common.hip"

MORI_DEFINE_GPU_STATES

#define DISPATCH(name, type) WRAP_BOOL_ENTRY(EpDispatchIntraNodeKernel, name, type, false)
#define COMBINE_AS(name, type) WRAP_BOOL3_ENTRY(EpCombineIntraNodeKernel, name, type, false, false, false)
#define COMBINE(name, type) COMBINE_AS(name##_nop2p, type)
#define DEFINE(name, type) DISPATCH(name, type) COMBINE(name, type)
#define EXPAND(name, type) DEFINE(name, type)

EXPAND(ROW_NAME, ROW_TYPE)
