// Which ranks a token goes to, inside kernels.
#pragma once

#include "gpu_runtime.h"
#include "team.h"

namespace moriep::gpu {

// The rank that holds an expert, or -1 for an id that is no expert.
__device__ inline int32_t rank_of(const Sizes& sizes, int32_t id) {
  return id >= 0 && id < sizes.num_experts ? id / sizes.num_local_experts : -1;
}

// The distinct ranks that a token goes to, as bits.
__device__ inline uint64_t ranks_of(const Sizes& sizes, const int32_t* ids) {
  uint64_t ranks = 0;
  for (int k = 0; k < sizes.top_k; ++k) {
    const int32_t rank = rank_of(sizes, ids[k]);
    if (rank >= 0) ranks |= uint64_t{1} << rank;
  }
  return ranks;
}

// The same for a whole wave that asks for one token: each lane looks at one route.
__device__ inline uint64_t ranks_of_wave(const Sizes& sizes, const int32_t* ids) {
  uint64_t ranks = 0;
  for (int k0 = 0; k0 < sizes.top_k; k0 += kWave) {
    const int k = k0 + lane_id();
    const int32_t rank = k < sizes.top_k ? rank_of(sizes, ids[k]) : -1;
    const int num_routes = min(kWave, sizes.top_k - k0);
    for (int j = 0; j < num_routes; ++j) {
      const int32_t one = from_lane(rank, j);
      if (one >= 0) ranks |= uint64_t{1} << one;
    }
  }
  return ranks;
}

}  // namespace moriep::gpu
