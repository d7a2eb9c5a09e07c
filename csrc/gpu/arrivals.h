// What a token-major transport has brought to this rank, inside kernels. Its arrays come from
// outside this package: nothing in them is trusted as an index.
#pragma once

#include "gpu_runtime.h"
#include "team.h"

namespace moriep::gpu {

struct Arrivals {
  const int32_t* sources;  // [N]: source rank * T + source token; undefined from `count` on
  const int32_t* count;    // [1]; negative where the exchange has failed
};

__device__ inline int32_t num_group_tokens(const Sizes& sizes) {
  return sizes.num_ranks * sizes.num_tokens;
}

// Whether there is anything to expand; what is made of a failed exchange is poison.
__device__ inline bool have_come(const Arrivals& arrivals) { return arrivals.count[0] >= 0; }

// How many tokens have come.
__device__ inline int32_t num_arrivals(const Sizes& sizes, const Arrivals& arrivals) {
  return min(max(load_uniform(arrivals.count), 0), num_group_tokens(sizes));
}

// The token of the group that a source names, or -1 where there is no such token.
__device__ inline int32_t token_of(const Sizes& sizes, int32_t source) {
  return source >= 0 && source < num_group_tokens(sizes) ? source : -1;
}

// The token that came at a place.
__device__ inline int32_t token_at(const Sizes& sizes, const Arrivals& arrivals, int32_t place) {
  return token_of(sizes, arrivals.sources[place]);
}

// The same for a whole wave that asks for one place.
__device__ inline int32_t token_of_wave(const Sizes& sizes, const Arrivals& arrivals,
                                        int32_t place) {
  return token_of(sizes, load_uniform(arrivals.sources + place));
}

}  // namespace moriep::gpu
