// What Python calls by ctypes (jax_moriep/runtime/native_api.py): opening and connecting groups. No
// XLA here.
#pragma once

#include <cstdint>

#include "moriep/export.h"

// State of a group table, as moriep_group_state gives it.
enum MoriepGroupState : int32_t {
  MORIEP_GROUP_ABSENT = 0,
  MORIEP_GROUP_OPEN = 1,  // local ranks have arenas, some peers are not connected yet
  MORIEP_GROUP_CONNECTED = 2,
  MORIEP_GROUP_FAILED = 3,
};

// Opens a table of num_groups x num_ranks devices; local[i] != 0 marks the devices of this process,
// whose arenas are made now. A table that is open already is kept unless it has failed. Gives 0, or
// a status code with its text in `error`.
MORIEP_EXPORT int32_t moriep_group_open(const char* name, int64_t num_groups, int64_t num_ranks,
                                        const int64_t* device_ids, const uint8_t* local,
                                        double timeout_seconds, char* error, int64_t error_size);

// Writes the address of a local rank's arena, 12 numbers: on the CPU pid, start time, fd and the
// two halves of the nonce, and no more; on a GPU what opens its memory.
MORIEP_EXPORT int32_t moriep_group_address(const char* name, int64_t group, int64_t rank,
                                           int64_t* address, char* error, int64_t error_size);

// Opens another process's arena from its address.
MORIEP_EXPORT int32_t moriep_group_connect(const char* name, int64_t group, int64_t rank,
                                           const int64_t* address, char* error, int64_t error_size);

// Tells those who wait for the group's connections why there will be none.
MORIEP_EXPORT void moriep_group_connect_failed(const char* name, int64_t group, const char* why);

MORIEP_EXPORT int32_t moriep_group_state(const char* name);

// Why a group of this process has failed, in `error`, and its code; 0 if none has.
MORIEP_EXPORT int32_t moriep_group_failure(const char* name, char* error, int64_t error_size);

// Ends all groups of this process; peers learn that it left in good order.
MORIEP_EXPORT void moriep_close_all();
