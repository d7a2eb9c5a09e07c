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
  // Of several nodes: this one's name, "" where there is one only, and whether a thread of MORI's
  // drives the network adapter for the GPU.
  std::string node;
  bool by_proxy = false;
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

// What MORI's kernels look at to know how a rank is reached, in device memory: [R].
Status reach_of_ranks(int32_t** kinds);
// What it is for a rank of the same node.
inline constexpr int32_t kReachByMemory = 1;

// Ends the wait of MORI's kernels for messages that its thread has not been told to be done.
Status give_up_messages(hipStream_t stream);

// A kernel of the code objects that are loaded.
Status find_kernel(const std::string& name, hipFunction_t* kernel);

}  // namespace moriep::mori
