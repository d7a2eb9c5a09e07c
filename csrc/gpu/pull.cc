// The rows: second phase of dispatch and replay, and of arrivals.
#include "kernels.h"
#include "moves.h"
#include "published.h"
#include "rows.h"
#include "step.h"

namespace moriep::gpu {
namespace {

template <typename Word>
__device__ Word filled(bool poison) {
  if constexpr (sizeof(Word) == 16) {
    const uint32_t part = poison ? 0xffffffffu : 0u;
    return make_uint4(part, part, part, part);
  } else {
    return static_cast<Word>(poison ? ~0u : 0u);
  }
}

// A token and the rows that it has here.
struct Found {
  const std::byte* from;
  const int32_t* routes;  // or null: none
  bool sent = false;      // through an arena
};

// One part of one token: read once, written to all rows that the token has here, unless this rank
// has failed. Its routes are read before that is known. Rows of a token that was not sent have the
// values that another rank would get.
template <typename Move, typename Args>
__device__ void pull_part(const Args& args, const Found& found, int64_t row_scales,
                          const Part& part, bool good) {
  const Sizes& sizes = args.sizes;
  Move move;
  bool read = false;
  for (int k0 = 0; k0 < sizes.top_k; k0 += kWave) {
    int32_t route = k0 + lane_id() < sizes.top_k ? found.routes[k0 + lane_id()] : -1;
    if (route >= sizes.capacity) route = -1;
    if (ballot(good && route >= 0) == 0) continue;
    if (!read) {
      read = true;
      if (found.sent) {
        move.receive(found.from, row_scales, part);
      } else {
        move.read(found.from, part);
      }
      move.restore();
    }
    const int num_routes = min(kWave, sizes.top_k - k0);
    for (int k = 0; k < num_routes; ++k) {
      const int32_t row = from_lane(route, k);
      if (row < 0) continue;
      auto* to = reinterpret_cast<typename Move::Word*>(args.rows + row * sizes.row_bytes);
#pragma unroll
      for (int i = 0; i < kCopyWords; ++i) {
        if (part.has(i)) store_streamed(to + part.word(i), move.words[i]);
      }
    }
  }
}

// One part of kClearRows rows: those without an owner are cleared; all are poisoned once this rank
// or what brought its tokens has failed.
template <typename Word, typename Args>
__device__ void clear_part(const Args& args, int32_t group, const Part& part, bool good) {
  const Sizes& sizes = args.sizes;
  constexpr uint32_t kAll = (1u << kClearRows) - 1;
  const int32_t first_row = group * kClearRows;
  const uint32_t marks = load_uniform(args.written + first_row / 32) >> (first_row % 32);
  const uint32_t written = good ? marks & kAll : 0;
  const int lane = lane_id();
  const int32_t own = first_row + lane;
  if (args.row_weights != nullptr && part.first == lane && lane < kClearRows &&
      own < sizes.capacity && (written >> lane & 1) == 0) {
    args.row_weights[own] = good ? 0.0f : __uint_as_float(0x7fffffffu);
  }
  const Word word = filled<Word>(!good);
  for (uint32_t left = ~written & kAll; left != 0; left &= left - 1) {
    const int32_t row = first_row + __ffs(static_cast<int>(left)) - 1;
    if (row >= sizes.capacity) break;
    auto* to = reinterpret_cast<Word*>(args.rows + row * sizes.row_bytes);
#pragma unroll
    for (int i = 0; i < kCopyWords; ++i) {
      if (part.has(i)) store_streamed(to + part.word(i), word);
    }
  }
}

// All rows of this rank: those of `num_tokens` tokens, each of which `find(place)` finds, and those
// that nobody owns.
template <typename Move, typename Args, typename Find>
__device__ void fill_rows(const Args& args, uint32_t num_tokens, int64_t row_scales, bool good,
                          Find find) {
  using Word = typename Move::Word;
  const Sizes& sizes = args.sizes;
  const uint32_t parts = num_parts(sizes.row_bytes, sizeof(Word), kCopyWords);
  const uint32_t num_pulls = num_tokens * parts;
  const uint32_t num_clears =
      static_cast<uint32_t>((sizes.capacity + kClearRows - 1) / kClearRows) * parts;
  // Neighbours in the order of items go to different blocks: rows that nobody owns lie together,
  // and one block alone would clear them long after the others have ended.
  const int64_t first_item =
      static_cast<int64_t>(wave_of_block()) * gridDim.x + static_cast<int64_t>(blockIdx.x);
  for (int64_t item = first_item; item < int64_t{num_pulls} + num_clears; item += num_waves()) {
    const auto index = static_cast<uint32_t>(item < num_pulls ? item : item - num_pulls);
    const Part part = part_of_row(index % parts, sizes.row_bytes, sizeof(Word));
    const uint32_t place = index / parts;
    if (item >= num_pulls) {
      clear_part<Word>(args, static_cast<int32_t>(place), part, good);
      continue;
    }
    const Found found = find(place);
    if (found.routes != nullptr) pull_part<Move>(args, found, row_scales, part, good);
  }
}

template <typename Move>
__global__ void __launch_bounds__(kThreads)
    pull_kernel(const MORIEP_KERNEL_ARGUMENT PullArgs args) {
  const Sizes& sizes = args.sizes;
  const bool good = wait_for_peers(args.team, args.step);
  const uint64_t step = current_step(args.team);
  const auto ranks = static_cast<uint32_t>(sizes.num_ranks);
  const uint32_t num_tokens = ranks * static_cast<uint32_t>(sizes.num_tokens);
  fill_rows<Move>(args, num_tokens, args.staged.row_scales, good, [&](uint32_t place) -> Found {
    // Beginning with the next rank, so that not all read the same peer at the same time.
    const uint32_t source = (static_cast<uint32_t>(args.team.rank) + 1 + place % ranks) % ranks;
    const int64_t token = place / ranks;
    const int32_t* routes = args.routes + (source * sizes.num_tokens + token) * sizes.top_k;
    if (static_cast<int32_t>(source) == args.team.rank) {
      return {args.x + token * sizes.row_bytes, routes};
    }
    const std::byte* from =
        published(args.team, args.staged, static_cast<int32_t>(source), args.team.rank, step);
    return {from + args.staged.rows + token * args.staged.row_stride, routes, true};
  });
  leave_step(args.team, args.step);
}

template <typename Move>
__global__ void __launch_bounds__(kThreads)
    expand_kernel(const MORIEP_KERNEL_ARGUMENT ExpandArgs args) {
  const Sizes& sizes = args.sizes;
  const auto count = static_cast<uint32_t>(num_arrivals(sizes, args.arrivals));
  const bool good = have_come(args.arrivals);
  fill_rows<Move>(args, count, 0, good, [&](uint32_t place) -> Found {
    const int32_t token = token_of_wave(sizes, args.arrivals, static_cast<int32_t>(place));
    const int32_t* routes = args.routes + static_cast<int64_t>(token) * sizes.top_k;
    return {args.tokens + place * sizes.row_bytes, token < 0 ? nullptr : routes};
  });
}

}  // namespace

gpuError_t launch_pull(gpuStream_t stream, int num_blocks, RowType type, Wire wire,
                       const PullArgs& args) {
  with_move(type, wire, args.sizes.row_bytes, args.x, args.rows,
            [&]<typename Move>() { pull_kernel<Move><<<num_blocks, kThreads, 0, stream>>>(args); });
  return gpuGetLastError();
}

gpuError_t launch_expand(gpuStream_t stream, int num_blocks, const ExpandArgs& args) {
  with_copy(args.sizes.row_bytes, args.tokens, args.rows, [&]<typename Move>() {
    expand_kernel<Move><<<num_blocks, kThreads, 0, stream>>>(args);
  });
  return gpuGetLastError();
}

gpuError_t preload_pull(Wire wire, int* resident) {
  return for_all_moves(
      wire, [&]<typename Move>() { return preload_rows(pull_kernel<Move>, kThreads, resident); });
}

gpuError_t preload_expand() {
  int resident = 0;  // It waits for nobody, so nothing limits its blocks.
  return for_all_copies(
      [&]<typename Move>() { return preload_rows(expand_kernel<Move>, kThreads, &resident); });
}

}  // namespace moriep::gpu
