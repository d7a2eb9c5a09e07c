// AITER's code objects on this process's devices. They are loaded ahead of the programs that use
// them: inside a recording nothing may be loaded.
#pragma once

#include <hip/hip_runtime.h>

#include <cstdint>
#include <string_view>

#include "moriep/status.h"

namespace moriep::aiter {

// Loads the kernel `symbol` of a code object, for launches that ask for it as `name`; does nothing
// where that is done already.
Status load_kernel(int32_t device, std::string_view name, const void* image, const char* symbol);

Status find_kernel(int32_t device, std::string_view name, hipFunction_t* function);

}  // namespace moriep::aiter
