// Where the data of a dispatch's or a replay's first phase lie, inside kernels.
#pragma once

#include "kernels.h"
#include "step.h"

namespace moriep::gpu {

// Where `reader` finds what another rank, `owner`, has published for it in a step.
__device__ inline std::byte* published(const Team& team, const Staged& staged, int32_t owner,
                                       int32_t reader, uint64_t step) {
  if (staged.part_bytes == 0) return half_of(team, owner, step);
  // A reader has a part for each rank but itself, in their order from the next one on.
  const int32_t ahead = owner - reader - 1;
  const int32_t part = ahead < 0 ? ahead + team.num_ranks : ahead;
  return half_of(team, reader, step) + part * staged.part_bytes;
}

}  // namespace moriep::gpu
