// What Python calls by ctypes (jax_moriep/aiter/kernels.py).
#pragma once

#include <cstdint>

#include "moriep/export.h"

// Loads the kernel `symbol` of a code object on a device, for custom calls that name it `name`.
// Gives 0, or a status code with its text in `error`.
MORIEP_EXPORT int32_t moriep_aiter_load(int32_t device, const char* name, const uint8_t* image,
                                        const char* symbol, char* error, int64_t error_size);
