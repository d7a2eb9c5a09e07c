// Memory that an adapter may read and write, and the keys that name it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "settings.h"

namespace gfx942::nic {

enum class Use { kLocalRead, kLocalWrite, kRemoteWrite, kRemoteAtomic };

// A key for memory; `access` is verbs' own.
uint32_t add_memory(void* at, size_t bytes, int access);
void remove_memory(uint32_t key);
// Whether a key allows a use of so many bytes.
bool allows(uint32_t key, const void* at, size_t bytes, Use use);

// Copies into memory that others may be reading: aligned words are whole at any time, but they
// appear one after the other, and after every few thousand bytes late, where delays are set.
void place(void* to, const void* from, size_t bytes, Delays* delays);

}  // namespace gfx942::nic
