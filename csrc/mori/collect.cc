// The end of every step, and what comes before it behind MORI's kernels.
#include <algorithm>

#include "gpu/kernels.h"
#include "gpu/moves.h"
#include "gpu/rows.h"
#include "gpu/step.h"
#include "kernels.h"

namespace moriep::mori {
namespace {

using gpu::kCopyWords;
using gpu::kThreads;

// The order goes on, and the watchdog need not look any more.
__device__ void leave(const gpu::Team& team, const gpu::Stepping& step, Progress* progress) {
  if (gpu::leave_step(team, step)) {
    gpu::store_release_system(&progress->left, gpu::mine(team).epoch);
  }
}

__device__ int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ int64_t num_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// Bytes of ones are NaN in every row type.
template <typename Word>
__device__ void poison(Word* at, int64_t num_words) {
  Word word;
  __builtin_memset(&word, 0xff, sizeof(word));
  for (int64_t i = thread_index(); i < num_words; i += num_threads()) at[i] = word;
}

// Whether this rank has failed, asked once for all lanes of a wave.
__device__ bool wave_sees_failure(const gpu::Team& team) {
  int32_t failed = 0;
  if (gpu::lane_id() == 0) failed = gpu::has_failed(team) ? 1 : 0;
  return gpu::uniform(failed) != 0;
}

template <typename Move>
__device__ void copy_tokens(const CollectArgs& args, int32_t count) {
  using Word = typename Move::Word;
  const int64_t row_bytes = args.sizes.row_bytes;
  const uint32_t parts = gpu::num_parts(row_bytes, sizeof(Word), kCopyWords);
  for (int64_t item = gpu::wave_index(); item < int64_t{count} * parts; item += gpu::num_waves()) {
    const int64_t row = item / parts;
    const gpu::Part part =
        gpu::part_of_row(static_cast<uint32_t>(item % parts), row_bytes, sizeof(Word));
    Move move;
    move.receive_apart(args.from_tokens + row * args.sizes.wire_bytes,
                       args.from_scales + row * args.sizes.num_scales, part);
    move.restore();
    auto* to = reinterpret_cast<Word*>(args.tokens + row * row_bytes);
#pragma unroll
    for (int i = 0; i < kCopyWords; ++i) {
      if (part.has(i)) gpu::store_streamed(to + part.word(i), move.words[i]);
    }
  }
}

// The token that MORI numbers so.
__device__ int32_t source_of(const ArrivalSizes& sizes, int32_t origin) {
  const int32_t stride = sizes.num_ranks * sizes.max_tokens;
  return origin / stride * sizes.num_tokens + origin % stride;
}

// What came along with the tokens of a send.
__device__ void copy_routing(const CollectArgs& args, int32_t count) {
  const ArrivalSizes& sizes = args.sizes;
  for (int64_t i = thread_index(); i < static_cast<int64_t>(count) * sizes.top_k;
       i += num_threads()) {
    args.ids[i] = args.from_ids[i];
    args.weights[i] = args.from_weights[i];
  }
  for (int64_t i = thread_index(); i < count; i += num_threads()) {
    const int32_t origin = args.from_origins[i];
    args.origins[i] = origin;
    args.sources[i] = source_of(sizes, origin);
  }
}

// What a combine will have to know of the tokens that came from other nodes.
__device__ void keep_flags(const BetweenArgs& between, uint64_t step) {
  if (between.words == nullptr) return;
  const uint64_t* flags = between.sets[step % 2];
  for (int64_t i = thread_index(); i < between.num_flags; i += num_threads()) {
    between.plan_flags[i] = static_cast<int32_t>(flags[i]);
  }
}

// A plan that leads nowhere: a give_back along it moves nothing and reads nothing.
template <typename Args>
__device__ void empty_plan(const Args& args) {
  const ArrivalSizes& sizes = args.sizes;
  const int32_t nowhere = sizes.num_ranks * sizes.num_ranks * sizes.max_tokens;
  for (int64_t i = thread_index(); i < static_cast<int64_t>(sizes.num_tokens) * sizes.top_k;
       i += num_threads()) {
    args.places[i] = nowhere;
  }
  if (thread_index() == 0) *args.count = -1;
}

template <typename Move>
__global__ void __launch_bounds__(kThreads) collect_kernel(const CollectArgs args) {
  using Word = typename Move::Word;
  const bool sent = args.ids != nullptr;
  if (!wave_sees_failure(args.team)) {
    const int32_t count = gpu::load_uniform(args.count);
    copy_tokens<Move>(args, count);
    if (sent) {
      copy_routing(args, count);
      keep_flags(args.between, gpu::current_step(args.team));
    }
  } else {
    const int64_t bytes = args.sizes.row_bytes * args.sizes.num_ranks * args.sizes.num_tokens;
    poison(reinterpret_cast<Word*>(args.tokens), bytes / static_cast<int64_t>(sizeof(Word)));
    if (sent) {
      empty_plan(args);
      for (int64_t i = thread_index(); i < args.between.num_words; i += num_threads()) {
        args.between.words[i] = 0;
      }
    }
  }
  leave(args.team, args.step, args.progress);
}

__global__ void __launch_bounds__(kThreads) settle_kernel(const SettleArgs args) {
  if (wave_sees_failure(args.team)) return empty_plan(args);
  const int32_t count = gpu::load_uniform(args.count);
  for (int64_t i = thread_index(); i < count; i += num_threads()) {
    args.sources[i] = source_of(args.sizes, args.origins[i]);
  }
}

__global__ void __launch_bounds__(kThreads) seal_kernel(const SealArgs args) {
  if (wave_sees_failure(args.team)) {
    poison(reinterpret_cast<uint8_t*>(args.y), args.y_bytes);
    if (args.token_scalars != nullptr) poison(args.token_scalars, args.num_scalars);
  }
  leave(args.team, args.step, args.progress);
}

template <typename Kernel>
gpuError_t preload(Kernel* kernel) {
  gpuFuncAttributes found;
  return gpuFuncGetAttributes(&found, reinterpret_cast<const void*>(kernel));
}

template <RowType kType, bool kWide>
using FromFp8 = gpu::AsFp8<kType, kWide, kWireFormat>;

// Calls f<Move>() with what moves tokens of a type, as they are or from float8. MORI has no
// float16.
template <typename F>
void with_move(RowType type, bool fp8, bool wide, F f) {
  if (!fp8) {
    if (wide) return f.template operator()<gpu::AsRows<uint4>>();
    return f.template operator()<gpu::AsRows<uint16_t>>();
  }
  if (type == RowType::kF32) {
    if (wide) return f.template operator()<FromFp8<RowType::kF32, true>>();
    return f.template operator()<FromFp8<RowType::kF32, false>>();
  }
  if (wide) return f.template operator()<FromFp8<RowType::kBF16, true>>();
  return f.template operator()<FromFp8<RowType::kBF16, false>>();
}

}  // namespace

gpuError_t launch_collect(gpuStream_t stream, int num_blocks, RowType type,
                          const CollectArgs& args) {
  // MORI's buffers begin at multiples of 256 bytes.
  const bool wide = gpu::fits_words(16, args.sizes.row_bytes, args.from_tokens, args.tokens);
  with_move(type, args.from_scales != nullptr, wide, [&]<typename Move>() {
    collect_kernel<Move><<<num_blocks, kThreads, 0, stream>>>(args);
  });
  return gpuGetLastError();
}

gpuError_t launch_settle(gpuStream_t stream, const SettleArgs& args) {
  constexpr int32_t kMaxBlocks = 16;
  const int32_t wanted = (args.sizes.num_ranks * args.sizes.num_tokens + kThreads - 1) / kThreads;
  const int blocks = std::min(wanted, kMaxBlocks);
  settle_kernel<<<blocks, kThreads, 0, stream>>>(args);
  return gpuGetLastError();
}

gpuError_t launch_seal(gpuStream_t stream, int num_blocks, const SealArgs& args) {
  seal_kernel<<<num_blocks, kThreads, 0, stream>>>(args);
  return gpuGetLastError();
}

gpuError_t preload_share();

gpuError_t preload_kernels() {
  gpuError_t first = gpu::first_error(
      {preload_share(), gpu::preload_quantise(), preload(settle_kernel), preload(seal_kernel)});
  for (const RowType type : {RowType::kF32, RowType::kBF16}) {
    for (const bool fp8 : {false, true}) {
      for (const bool wide : {false, true}) {
        with_move(type, fp8, wide, [&]<typename Move>() {
          first = gpu::first_error({first, preload(collect_kernel<Move>)});
        });
      }
    }
  }
  return first;
}

}  // namespace moriep::mori
