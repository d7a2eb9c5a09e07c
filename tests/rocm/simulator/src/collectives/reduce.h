// Arithmetic of collectives.
#pragma once

#include <cstddef>

#include "nccl.h"

namespace gfx942::collectives {

// Bytes of an element; 0 when there is no such type.
size_t size_of(ncclDataType_t type);
// False for types that are only moved, and for what is not simulated.
bool can_reduce(ncclDataType_t type, ncclRedOp_t reduction);
// total[i] = total[i] op next[i], rounded to the type each time, as every hop of a real ring does.
void reduce(void* total, const void* next, size_t count, ncclDataType_t type,
            ncclRedOp_t reduction);

}  // namespace gfx942::collectives
