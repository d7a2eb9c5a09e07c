// MORI's shared memory: one world for a process, which is the EP group, and the code objects of its
// kernels.
#pragma once

#include <cstdint>
#include <string>

#include "gpu/gpu_runtime.h"
#include "moriep/status.h"

namespace moriep::mori {

inline constexpr int kUniqueIdBytes = 128;

struct World {
  std::string group;
  int32_t rank = -1;
  int32_t num_ranks = 0;
  int32_t device = -1;
  int64_t heap_bytes = 0;
};

// An id by which the processes of a new world find each other; one rank makes it.
Status make_unique_id(uint8_t* id);

// Joins the world; every rank must do so. Does nothing where this process has joined it already,
// and refuses a second one.
Status open_world(const World& wanted, const uint8_t* id);

// The world of this process. `rank` is negative where there is none.
World world();

// Waits on the host until every rank is here.
void world_barrier();

// Loads a code object of MORI's kernels; does nothing for a file that is loaded. There must be a
// world.
Status load_kernels(const std::string& path);

// A kernel of the code objects that are loaded.
Status find_kernel(const std::string& name, hipFunction_t* kernel);

}  // namespace moriep::mori
