// The plan of a dispatch, or of arrivals: a stable counting sort of the group's routes by local
// expert. Chunks of routes are counted, then each chunk places its own behind those of the chunks
// before it; no order depends on which block or wave comes first, nor on the order of arrivals.
#include "plan.h"

#include "kernels.h"
#include "published.h"
#include "rows.h"
#include "step.h"

namespace moriep::gpu {
namespace {

inline constexpr int kPlanThreads = 512;      // a thread for each route of a chunk
inline constexpr int kWidePlanThreads = 256;  // with many experts, whose counters need the room
inline constexpr int kNarrowExperts = 256;

struct Chunk {
  int32_t source;
  int32_t first_token;
  int32_t num_tokens;
};

// Chunks follow each other as their rows do: by node, rank and token.
template <typename Args>
__device__ Chunk chunk_of_block(const Args& args) {
  const Sizes& sizes = args.sizes;
  const int32_t of_node = static_cast<int32_t>(blockIdx.x) / args.chunks_per_node;
  const int32_t node = of_node / sizes.num_ranks;
  const int32_t tokens = sizes.num_tokens / sizes.num_nodes;
  const int32_t first =
      static_cast<int32_t>(blockIdx.x) % args.chunks_per_node * args.tokens_per_chunk;
  return {of_node % sizes.num_ranks, node * tokens + first,
          min(args.tokens_per_chunk, tokens - first)};
}

__device__ const std::byte* routing_of(const PlanArgs& args, int32_t source) {
  return published(args.team, args.staged, source, args.team.rank, current_step(args.team));
}

// Where the sort finds a group's routing: as the ranks have staged it...
__device__ bool begin(const PlanArgs& args) { return wait_for_peers(args.team, args.step); }
__device__ int32_t rank_here(const PlanArgs& args) { return args.team.rank; }
__device__ int32_t id_at(const PlanArgs& args, int32_t source, int64_t route) {
  const auto* ids =
      source == args.team.rank
          ? args.ids
          : reinterpret_cast<const int32_t*>(routing_of(args, source) + args.staged.ids);
  return ids[route];
}
__device__ float weight_at(const PlanArgs& args, int32_t source, int64_t route) {
  const auto* weights =
      source == args.team.rank
          ? args.weights
          : reinterpret_cast<const float*>(routing_of(args, source) + args.staged.weights);
  return weights[route];
}

// ...or beside the tokens that have arrived.
__device__ bool begin(const ArrivalPlanArgs&) { return true; }
__device__ int32_t rank_here(const ArrivalPlanArgs& args) { return load_uniform(args.rank); }
__device__ int64_t arrival_at(const ArrivalPlanArgs& args, int32_t source, int64_t route) {
  const int32_t top_k = args.sizes.top_k;
  const int64_t token = static_cast<int64_t>(source) * args.sizes.num_tokens + route / top_k;
  const int32_t place = args.places[token];
  return place < 0 ? -1 : static_cast<int64_t>(place) * top_k + route % top_k;
}
__device__ int32_t id_at(const ArrivalPlanArgs& args, int32_t source, int64_t route) {
  const int64_t at = arrival_at(args, source, route);
  return at < 0 ? -1 : args.ids[at];
}
__device__ float weight_at(const ArrivalPlanArgs& args, int32_t source, int64_t route) {
  return args.weights[arrival_at(args, source, route)];
}

// Where this rank's sums of a chunk's tokens go in their owner's arena.
__device__ void find_places(const PlanArgs& args, const Chunk& chunk, const int32_t* ids) {
  const Sizes& sizes = args.sizes;
  for (int32_t t = threadIdx.x; t < chunk.num_tokens; t += blockDim.x) {
    const uint64_t ranks = ranks_of(sizes, ids + t * sizes.top_k);
    const bool goes_here = (ranks >> args.team.rank & 1) != 0;
    const int32_t token = chunk.first_token + t;
    args.places[static_cast<int64_t>(chunk.source) * sizes.num_tokens + token] =
        goes_here ? token * sizes.fanout + count_bits(ranks & lanes_below(args.team.rank)) : -1;
  }
}
// Arrivals are given back in the order in which they came.
__device__ void find_places(const ArrivalPlanArgs&, const Chunk&, const int32_t*) {}

// Every rank's words come to this rank.
__device__ void collect_words(const PlanArgs& args, bool good) {
  const Sizes& sizes = args.sizes;
  const int64_t num_threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t num_words = static_cast<int64_t>(sizes.num_ranks) * sizes.num_words;
  for (int64_t i = thread; i < num_words; i += num_threads) {
    const auto source = static_cast<int32_t>(i / sizes.num_words);
    const auto* words =
        source == args.team.rank
            ? args.words
            : reinterpret_cast<const int32_t*>(routing_of(args, source) + args.staged.words);
    args.all_words[i] = good ? words[i % sizes.num_words] : kPoisonWord;
  }
}
// Those of arrivals are the transport's.
__device__ void collect_words(const ArrivalPlanArgs&, bool) {}

__device__ void check_program(const PlanArgs& args) {
  if (args.team.num_ranks == 1) check_rank(args.team, args.step);
}
__device__ void check_program(const ArrivalPlanArgs&) {}

template <typename Args>
__global__ void __launch_bounds__(kPlanThreads)
    count_kernel(const MORIEP_KERNEL_ARGUMENT Args args) {
  extern __shared__ int32_t shared[];
  const Sizes& sizes = args.sizes;
  check_program(args);
  const bool good = begin(args);

  // The rows that have an owner are marked by the launch that follows.
  const int64_t num_threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = thread; i < (sizes.capacity + 31) / 32; i += num_threads) args.written[i] = 0;

  collect_words(args, good);

  int32_t* counts = shared;
  int32_t* ids = shared + sizes.num_local_experts;
  for (int32_t e = threadIdx.x; e < sizes.num_local_experts; e += blockDim.x) counts[e] = 0;
  __syncthreads();

  const Chunk chunk = chunk_of_block(args);
  const int64_t first_route = static_cast<int64_t>(chunk.first_token) * sizes.top_k;
  int32_t* routes = args.routes +
                    static_cast<int64_t>(chunk.source) * sizes.num_tokens * sizes.top_k +
                    first_route;
  const int32_t rank = rank_here(args);
  const int32_t first_expert = rank * sizes.num_local_experts;
  const int32_t i = threadIdx.x;
  if (i < chunk.num_tokens * sizes.top_k) {
    const int32_t id = good ? id_at(args, chunk.source, first_route + i) : -1;
    ids[i] = id;
    const int32_t owner = rank_of(sizes, id);
    const bool here = owner >= 0 && owner == rank;
    // The local expert stands in for the row until the next launch.
    routes[i] = here ? id - first_expert : kNotHere;
    if (here) atomicAdd(&counts[id - first_expert], 1);
  }
  __syncthreads();

  for (int32_t e = threadIdx.x; e < sizes.num_local_experts; e += blockDim.x) {
    args.counts[static_cast<int64_t>(blockIdx.x) * sizes.num_local_experts + e] = counts[e];
  }
  find_places(args, chunk, ids);
}

// Where the runs of all experts start, for one wave: an exclusive sum of the aligned totals.
__device__ void start_runs(const Sizes& sizes, const int32_t* totals, int32_t* starts) {
  int32_t next = 0;
  for (int32_t first = 0; first < sizes.num_local_experts; first += kWave) {
    const int32_t e = first + lane_id();
    const int32_t total = e < sizes.num_local_experts ? totals[e] : 0;
    const int32_t aligned = (total + sizes.block - 1) / sizes.block * sizes.block;
    int32_t sum = aligned;
    for (int reach = 1; reach < kWave; reach *= 2) {
      const int32_t below = from_below(sum, reach);
      if (lane_id() >= reach) sum += below;
    }
    if (e < sizes.num_local_experts) starts[e] = next + sum - aligned;
    next += from_lane(sum, kWave - 1);
  }
}

// Marks the rows of the experts' runs, one or more waves for each. Runs that share a word of the
// marks belong to several waves: hence the atomic, whose order does not matter.
template <typename Args>
__device__ void mark_runs(const Args& args, const int32_t* totals, const int32_t* starts) {
  const Sizes& sizes = args.sizes;
  const auto waves = static_cast<int32_t>(num_waves());
  const int32_t pieces = max(1, waves / sizes.num_local_experts);
  for (auto i = static_cast<int32_t>(wave_index()); i < sizes.num_local_experts * pieces;
       i += waves) {
    const int32_t e = i / pieces;
    const int32_t first = starts[e];
    const int32_t end = min(first + totals[e], sizes.capacity);
    for (int32_t w = first / 32 + i % pieces * kWave + lane_id(); w * 32 < end;
         w += pieces * kWave) {
      const int32_t low = max(first - w * 32, 0);
      const int32_t high = min(end - w * 32, 32);
      const uint32_t below_high = high == 32 ? ~0u : (1u << high) - 1;
      atomicOr(&args.written[w], below_high & ~((1u << low) - 1));
    }
  }
}

// Adds up what the chunks have for each expert: all of them, and those before this block's.
template <typename Args>
__device__ void sum_chunks(const Args& args, int32_t* totals, int32_t* before) {
  const Sizes& sizes = args.sizes;
  const int32_t num_experts = sizes.num_local_experts;
  const int32_t num_chunks = args.chunks_per_node * sizes.num_nodes * sizes.num_ranks;
  for (int32_t i = threadIdx.x; i < num_chunks * num_experts; i += blockDim.x) {
    const int32_t count = args.counts[i];
    if (count == 0) continue;
    atomicAdd(&totals[i % num_experts], count);
    if (i / num_experts < static_cast<int32_t>(blockIdx.x)) {
      atomicAdd(&before[i % num_experts], count);
    }
  }
}

// The lanes of a wave that have this lane's expert: they find each other bit by bit.
__device__ uint64_t lanes_alike(int32_t expert, int32_t num_experts) {
  uint64_t same = ballot(expert >= 0);
  for (int32_t bit = 1; bit < num_experts; bit *= 2) {
    const bool set = (expert & bit) != 0;
    const uint64_t with = ballot(set);
    same &= set ? with : ~with;
  }
  return same;
}

// Makes of each wave's count of each expert, [waves, L], the sum of those of the waves before it.
__device__ void sum_waves(uint16_t* in_wave, int32_t waves, int32_t num_experts) {
  for (int32_t e = threadIdx.x; e < num_experts; e += blockDim.x) {
    uint16_t next = 0;
    for (int32_t w = 0; w < waves; ++w) {
      const uint16_t count = in_wave[w * num_experts + e];
      in_wave[w * num_experts + e] = next;
      next += count;
    }
  }
}

template <typename Args>
__global__ void __launch_bounds__(kPlanThreads)
    place_kernel(const MORIEP_KERNEL_ARGUMENT Args args) {
  extern __shared__ int32_t shared[];
  const Sizes& sizes = args.sizes;
  const bool good = begin(args);
  const int32_t num_experts = sizes.num_local_experts;
  const int32_t waves = static_cast<int32_t>(blockDim.x) / kWave;

  int32_t* totals = shared;                // of all chunks
  int32_t* before = totals + num_experts;  // of the chunks before this one
  int32_t* starts = before + num_experts;
  auto* in_wave = reinterpret_cast<uint16_t*>(starts + num_experts);  // [waves, L]
  for (int32_t e = threadIdx.x; e < num_experts; e += blockDim.x) totals[e] = before[e] = 0;
  for (int32_t i = threadIdx.x; i < waves * num_experts; i += blockDim.x) in_wave[i] = 0;
  __syncthreads();
  sum_chunks(args, totals, before);

  const Chunk chunk = chunk_of_block(args);
  const int64_t first_route = static_cast<int64_t>(chunk.first_token) * sizes.top_k;
  int32_t* routes = args.routes +
                    static_cast<int64_t>(chunk.source) * sizes.num_tokens * sizes.top_k +
                    first_route;
  const int32_t i = threadIdx.x;
  const int32_t wave = i / kWave;
  const int32_t expert = i < chunk.num_tokens * sizes.top_k ? routes[i] : kNotHere;
  // Of the lanes with the same expert each knows its place among them.
  const uint64_t same = lanes_alike(expert, num_experts);
  const int32_t in_front = count_bits(same & lanes_below(lane_id()));
  if (expert >= 0 && in_front == 0) {
    in_wave[wave * num_experts + expert] = static_cast<uint16_t>(count_bits(same));
  }
  __syncthreads();
  if (threadIdx.x < kWave) start_runs(sizes, totals, starts);
  sum_waves(in_wave, waves, num_experts);
  __syncthreads();

  if (expert >= 0) {
    const int32_t row =
        starts[expert] + before[expert] + in_wave[wave * num_experts + expert] + in_front;
    if (row < sizes.capacity) {
      args.row_weights[row] = weight_at(args, chunk.source, first_route + i);
      routes[i] = row;
    } else {
      routes[i] = kDropped;
    }
  }
  mark_runs(args, totals, starts);
  if (blockIdx.x == 0) {
    for (int32_t e = threadIdx.x; e < num_experts; e += blockDim.x) {
      args.group_sizes[e] = good ? max(0, min(sizes.capacity - starts[e], totals[e])) : 0;
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    mark_kernel(const MORIEP_KERNEL_ARGUMENT MarkArgs args) {
  const Sizes& sizes = args.sizes;
  if (args.team.num_ranks == 1) check_rank(args.team, args.step);
  const int64_t num_routes = static_cast<int64_t>(sizes.num_ranks) * sizes.num_tokens * sizes.top_k;
  const int64_t num_threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < num_routes;
       i += num_threads) {
    const int32_t row = args.routes[i];
    if (row >= sizes.capacity) {
      // A plan is the user's array by the time it comes back: nothing in it is trusted as an index.
      fail(args.team, args.step, Fault::kBadPlan, args.team.rank, row, sizes.capacity);
    } else if (row >= 0) {
      atomicOr(&args.written[row / 32], 1u << (row % 32));
    }
  }
}

// Where each token of the group has come to.
__global__ void __launch_bounds__(kThreads)
    arrive_kernel(const MORIEP_KERNEL_ARGUMENT ArrivalPlanArgs args) {
  const int32_t count = num_arrivals(args.sizes, args.arrivals);
  const auto num_threads = static_cast<int32_t>(gridDim.x * blockDim.x);
  for (auto i = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x); i < count;
       i += num_threads) {
    const int32_t token = token_at(args.sizes, args.arrivals, i);
    if (token >= 0) args.places[token] = i;
  }
}

__global__ void __launch_bounds__(kThreads)
    mark_arrivals_kernel(const MORIEP_KERNEL_ARGUMENT ExpandArgs args) {
  const Sizes& sizes = args.sizes;
  const int64_t num_routes = static_cast<int64_t>(num_arrivals(sizes, args.arrivals)) * sizes.top_k;
  const int64_t num_threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < num_routes;
       i += num_threads) {
    const int32_t token = token_at(sizes, args.arrivals, static_cast<int32_t>(i / sizes.top_k));
    if (token < 0) continue;
    const int32_t row = args.routes[static_cast<int64_t>(token) * sizes.top_k + i % sizes.top_k];
    if (row >= 0 && row < sizes.capacity) atomicOr(&args.written[row / 32], 1u << (row % 32));
  }
}

int num_plan_threads(int num_local_experts) {
  return num_local_experts <= kNarrowExperts ? kPlanThreads : kWidePlanThreads;
}

template <typename Args>
gpuError_t sort(gpuStream_t stream, const Args& args) {
  const int num_experts = args.sizes.num_local_experts;
  const int threads = num_plan_threads(num_experts);
  const int num_chunks = args.chunks_per_node * args.sizes.num_nodes * args.sizes.num_ranks;
  const size_t count_bytes = sizeof(int32_t) * static_cast<size_t>(num_experts + threads);
  const size_t place_bytes = static_cast<size_t>(num_experts) *
                             (3 * sizeof(int32_t) + sizeof(uint16_t) * (threads / kWave));
  count_kernel<Args><<<num_chunks, threads, count_bytes, stream>>>(args);
  place_kernel<Args><<<num_chunks, threads, place_bytes, stream>>>(args);
  return gpuGetLastError();
}

// Blocks of a kernel with little to do for each of so many items.
int num_thread_blocks(int64_t num_items) {
  return static_cast<int>(num_items < kThreads * 256 ? (num_items + kThreads - 1) / kThreads + 1
                                                     : 256);
}

template <typename... Kernel>
gpuError_t preload_all(Kernel*... kernel) {
  gpuFuncAttributes found;
  for (const void* entry : {reinterpret_cast<const void*>(kernel)...}) {
    const gpuError_t error = gpuFuncGetAttributes(&found, entry);
    if (error != gpuSuccess) return error;
  }
  return gpuSuccess;
}

}  // namespace

int plan_chunk_routes(int num_local_experts) { return num_plan_threads(num_local_experts); }

gpuError_t launch_plan(gpuStream_t stream, const PlanArgs& args) { return sort(stream, args); }

gpuError_t launch_arrival_plan(gpuStream_t stream, const ArrivalPlanArgs& args) {
  const int64_t num_tokens = int64_t{args.sizes.num_ranks} * args.sizes.num_tokens;
  if (num_tokens > 0) {
    const gpuError_t error =
        gpuMemsetAsync(args.places, 0xff, static_cast<size_t>(num_tokens) * 4, stream);
    if (error != gpuSuccess) return error;
  }
  arrive_kernel<<<num_thread_blocks(num_tokens), kThreads, 0, stream>>>(args);
  return sort(stream, args);
}

gpuError_t launch_mark(gpuStream_t stream, const MarkArgs& args) {
  const int64_t num_routes =
      static_cast<int64_t>(args.sizes.num_ranks) * args.sizes.num_tokens * args.sizes.top_k;
  mark_kernel<<<num_thread_blocks(num_routes), kThreads, 0, stream>>>(args);
  return gpuGetLastError();
}

gpuError_t launch_mark_arrivals(gpuStream_t stream, const ExpandArgs& args) {
  const int64_t num_routes =
      static_cast<int64_t>(args.sizes.num_ranks) * args.sizes.num_tokens * args.sizes.top_k;
  mark_arrivals_kernel<<<num_thread_blocks(num_routes), kThreads, 0, stream>>>(args);
  return gpuGetLastError();
}

gpuError_t preload_plan() {
  return preload_all(count_kernel<PlanArgs>, place_kernel<PlanArgs>, mark_kernel);
}

gpuError_t preload_arrival_plan() {
  return preload_all(arrive_kernel, count_kernel<ArrivalPlanArgs>, place_kernel<ArrivalPlanArgs>,
                     mark_arrivals_kernel);
}

}  // namespace moriep::gpu
