// Memory that every rank has a part of and MORI's kernels reach.
#pragma once

#include <cstddef>

#include "mori/application/application_device_types.hpp"
#include "moriep/status.h"

namespace moriep::mori {

// Collective: all ranks allocate the same in the same order. The memory is zero.
Status allocate_symmetric(size_t bytes, ::mori::application::SymmMemObjPtr* out);

}  // namespace moriep::mori
