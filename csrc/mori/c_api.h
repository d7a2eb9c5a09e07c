// What Python calls by ctypes (jax_moriep/mori/world.py) beside the groups' own functions of
// moriep/c_api.h: opening MORI's world and handles. Functions give 0, or a status code with its
// text in `error`.
#pragma once

#include <cstdint>

#include "moriep/c_api.h"

// The amd-mori that the library was compiled for.
MORIEP_EXPORT const char* moriep_mori_version();

// Writes 128 bytes by which the processes of a new world find each other.
MORIEP_EXPORT int32_t moriep_mori_unique_id(uint8_t* id, char* error, int64_t error_size);

// Joins the world of a group that is open; all its ranks must do so. Collective, and it may wait
// for long. `node` names this machine where there are several, else it is "".
MORIEP_EXPORT int32_t moriep_mori_open_world(const char* group, int64_t heap_bytes,
                                             const uint8_t* id, const char* node, int32_t by_proxy,
                                             char* error, int64_t error_size);

// Bytes of the heap of this process's world; 0 where there is none.
MORIEP_EXPORT int64_t moriep_mori_heap_bytes();

// Loads MORI's kernels from a code object.
MORIEP_EXPORT int32_t moriep_mori_load_kernels(const char* path, char* error, int64_t error_size);

// Makes the handle `key` of a group from its nine sizes (mori/handle.h). Collective.
MORIEP_EXPORT int32_t moriep_mori_open_handle(const char* group, const char* key,
                                              const int64_t* sizes, char* error,
                                              int64_t error_size);

// Tells the exchanges that wait for a handle why there will be none.
MORIEP_EXPORT void moriep_mori_handle_failed(const char* group, const char* key, const char* why);

// Whether a group has failed in a way that moriep_mori_reset cures, and makes it anew. All ranks
// call it between two meetings, and run nothing then.
MORIEP_EXPORT int32_t moriep_mori_reset(const char* group, char* error, int64_t error_size);
