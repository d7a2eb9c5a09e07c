#include "exchange.h"

#include <algorithm>
#include <limits>
#include <string>

#include "digest.h"
#include "kernels.h"
#include "launch.h"
#include "moriep/layout.h"
#include "moriep/wire.h"
#include "rows.h"

namespace moriep::gpu {
namespace {

uint64_t digest_of(Kind kind, const Call& call, bool with_scalars) {
  Digest digest;
  const Shape& s = call.shape;
  for (const int64_t value : {static_cast<int64_t>(kind), static_cast<int64_t>(call.type),
                              static_cast<int64_t>(call.wire), int64_t{with_scalars}, s.num_ranks,
                              s.num_tokens, s.top_k, s.hidden_size, s.num_experts,
                              s.num_local_experts, s.block, s.capacity, s.num_words, s.num_nodes}) {
    digest.take(static_cast<uint64_t>(value));
  }
  digest.take(call.config);
  return digest.value() | static_cast<uint64_t>(call.delivery);
}

// One step as the kernels see it; refuses what they cannot count or hold.
struct Prepared {
  Team team;
  Sizes sizes;
  Stepping step;
  Wire wire = Wire::kRows;
  Delivery delivery = Delivery::kPull;
  HalfLayout layout;
  Chunks chunks;
  int32_t* counts = nullptr;
  uint32_t* written = nullptr;
  gpuStream_t stream = nullptr;
};

Status prepare(LocalRank& me, const Call& call, Kind kind, bool with_scalars, Prepared* out) {
  const Shape& shape = call.shape;
  if (Status status = me.group->team(me, &out->team); !status.ok()) return status;
  if (Status status = me.group->failure(); !status.ok()) return status;

  const int64_t row_bytes = shape.hidden_size * element_bytes(call.type);
  const bool fp8 = kind == Kind::kDispatch && call.wire == Wire::kFp8;
  const bool put = kind != Kind::kCombine && call.delivery == Delivery::kPut;
  out->wire = fp8 ? Wire::kFp8 : Wire::kRows;
  out->delivery = put ? Delivery::kPut : Delivery::kPull;
  if (fp8 && call.type == RowType::kU8) {
    return Status(Code::kInvalidArgument, "bytes cannot be sent as fp8; pass floating tokens");
  }
  out->layout =
      HalfLayout::of(kind, shape, fp8 ? fp8_row_bytes(shape.hidden_size) : row_bytes, with_scalars);
  // Before sizes are multiplied further.
  if (Status status = count_sizes(shape, row_bytes, &out->sizes); !status.ok()) return status;
  const int64_t peers = shape.num_ranks - 1;
  const int64_t half_bytes = out->layout.bytes * (put ? peers : 1);
  if (peers > 0 && half_bytes > me.group->half_bytes()) {
    return Status(Code::kInvalidArgument,
                  "a step needs " + std::to_string(half_bytes >> 20) +
                      " MiB in each of an arena's two " + "halves" +
                      (put ? ", a part for each of " + std::to_string(peers) + " peers" : "") +
                      ", which have " + std::to_string(me.group->half_bytes() >> 20) +
                      " MiB; set JAX_MORIEP_ARENA_MB to at least " +
                      std::to_string((2 * half_bytes >> 20) + 1) +
                      (put ? ", or JAX_MORIEP_NATIVE_DISPATCH=pull" : ""));
  }
  out->chunks = chunks_of(shape);
  if ((out->chunks.written_words + out->chunks.counts) * 4 > kWorkspaceBytes) {
    return Status(Code::kInvalidArgument,
                  "the plan of " + std::to_string(shape.num_ranks * shape.num_tokens) +
                      " tokens over " + std::to_string(shape.num_local_experts) +
                      " local experts and " + std::to_string(shape.capacity) +
                      " rows does not fit the workspace; use transport='collective'");
  }
  out->written = reinterpret_cast<uint32_t*>(me.arena + kControlBytes);
  out->counts = reinterpret_cast<int32_t*>(out->written + out->chunks.written_words);
  out->step = Stepping{.kind = kind,
                       .digest = digest_of(kind, call, with_scalars),
                       .rank = call.rank,
                       .order = call.order,
                       .order_out = call.order_out,
                       .first_rank = call.first_rank};
  out->stream = static_cast<gpuStream_t>(call.stream);
  return Status();
}

Staged staged_of(const Prepared& p, const Call& call) {
  return {.ids = p.layout.ids,
          .weights = p.layout.weights,
          .words = p.layout.words,
          .rows = p.layout.rows,
          .row_stride = p.layout.row_stride,
          .row_scales = fp8_scales_offset(call.shape.hidden_size),
          .part_bytes = p.delivery == Delivery::kPut ? p.layout.bytes : 0};
}

bool first(const Call& call) { return call.shape.num_ranks > 1 && call.phase != Phase::kSecond; }
bool second(const Call& call) { return call.phase != Phase::kFirst; }

gpuError_t enqueue_first(const LocalRank& me, const Prepared& p, const Call& call,
                         const std::byte* x, const int32_t* ids, const float* weights,
                         const int32_t* words) {
  const StageArgs args{p.team, p.sizes, p.step, staged_of(p, call), x, ids, weights, words};
  const int64_t parts = num_parts(p.sizes.row_bytes, 16, kCopyWords);
  const int64_t items = p.sizes.num_tokens * parts;
  const BlockLimits& most = me.max_blocks;
  const bool fp8 = p.wire == Wire::kFp8;
  if (p.delivery == Delivery::kPut) {
    const int blocks = num_blocks(fp8 ? most.fp8_put : most.put, items);
    return launch_put(p.stream, blocks, call.type, p.wire, args);
  }
  const int blocks = num_blocks(fp8 ? most.fp8_stage : most.stage, items);
  return launch_stage(p.stream, blocks, call.type, p.wire, args);
}

gpuError_t enqueue_pull(const LocalRank& me, const Prepared& p, const Call& call,
                        const std::byte* x, const int32_t* routes, std::byte* rows,
                        float* row_weights) {
  const PullArgs args{p.team, p.sizes,   p.step, staged_of(p, call), x,
                      routes, p.written, rows,   row_weights};
  const int64_t parts = num_parts(p.sizes.row_bytes, 16, kCopyWords);
  const int64_t pulls = int64_t{p.sizes.num_ranks} * p.sizes.num_tokens;
  const int64_t items = (pulls + p.sizes.capacity / kClearRows + 1) * parts;
  const BlockLimits& most = me.max_blocks;
  const int blocks = num_blocks(p.wire == Wire::kFp8 ? most.fp8_pull : most.pull, items);
  return launch_pull(p.stream, blocks, call.type, p.wire, args);
}

}  // namespace

Status dispatch(LocalRank& me, const Call& call, const DispatchBuffers& at) {
  Prepared p;
  if (Status status = prepare(me, call, Kind::kDispatch, false, &p); !status.ok()) {
    return status;
  }
  if (first(call)) {
    if (Status status = launched(enqueue_first(me, p, call, at.x, at.ids, at.weights, at.words));
        !status.ok())
      return status;
  }
  if (!second(call)) return Status();
  const PlanArgs plan{.team = p.team,
                      .sizes = p.sizes,
                      .step = p.step,
                      .staged = staged_of(p, call),
                      .ids = at.ids,
                      .weights = at.weights,
                      .tokens_per_chunk = p.chunks.tokens_per_chunk,
                      .chunks_per_node = p.chunks.chunks_per_node,
                      .counts = p.counts,
                      .written = p.written,
                      .routes = at.routes,
                      .places = at.places,
                      .group_sizes = at.group_sizes,
                      .row_weights = at.row_weights,
                      .words = at.words,
                      .all_words = at.all_words};
  if (Status status = launched(launch_plan(p.stream, plan)); !status.ok()) return status;
  return launched(enqueue_pull(me, p, call, at.x, at.routes, at.rows, at.row_weights));
}

Status replay(LocalRank& me, const Call& call, const ReplayBuffers& at) {
  Prepared p;
  if (Status status = prepare(me, call, Kind::kReplay, false, &p); !status.ok()) {
    return status;
  }
  if (first(call)) {
    if (Status status = launched(enqueue_first(me, p, call, at.x, at.ids, nullptr, nullptr));
        !status.ok())
      return status;
  }
  if (!second(call)) return Status();
  const auto written_bytes = static_cast<size_t>(p.chunks.written_words * 4);
  if (Status status = launched(gpuMemsetAsync(p.written, 0, written_bytes, p.stream)); !status.ok())
    return status;
  const MarkArgs mark{p.team, p.sizes, p.step, at.routes, p.written};
  if (Status status = launched(launch_mark(p.stream, mark)); !status.ok()) return status;
  return launched(enqueue_pull(me, p, call, at.x, at.routes, at.rows, nullptr));
}

Status combine(LocalRank& me, const Call& call, const CombineBuffers& at) {
  Prepared p;
  if (Status status = prepare(me, call, Kind::kCombine, at.scalars != nullptr, &p); !status.ok()) {
    return status;
  }
  const CombineArgs args{.team = p.team,
                         .sizes = p.sizes,
                         .step = p.step,
                         .pushed_rows = p.layout.rows,
                         .pushed_scalars = p.layout.scalars,
                         .row_stride = p.layout.row_stride,
                         .rows = at.rows,
                         .scalars = at.scalars,
                         .routes = at.routes,
                         .places = at.places,
                         .ids = at.ids,
                         .y = at.y,
                         .token_scalars = at.token_scalars};
  const int64_t parts = num_parts(p.sizes.row_bytes, 16, 1);
  const int64_t items = p.sizes.num_tokens * parts;
  if (first(call)) {
    const int blocks = num_blocks(me.max_blocks.push, items * (p.sizes.num_ranks - 1));
    if (Status status = launched(launch_push(p.stream, blocks, call.type, args)); !status.ok())
      return status;
  }
  if (!second(call)) return Status();
  return launched(
      launch_reduce(p.stream, num_blocks(me.max_blocks.reduce, items), call.type, args));
}

Status preload_kernels(LocalRank& me) {
  constexpr int32_t kNoLimit = std::numeric_limits<int32_t>::max();
  constexpr BlockLimits kNoLimits{kNoLimit, kNoLimit, kNoLimit, kNoLimit,
                                  kNoLimit, kNoLimit, kNoLimit, kNoLimit};
  BlockLimits most = kNoLimits;
  int processors = 0;
  for (const gpuError_t error :
       {gpuDeviceGetAttribute(&processors, gpuDevAttrMultiProcessorCount, me.device),
        preload_stage(Wire::kRows, &most.stage), preload_stage(Wire::kFp8, &most.fp8_stage),
        preload_put(Wire::kRows, &most.put), preload_put(Wire::kFp8, &most.fp8_put), preload_plan(),
        preload_pull(Wire::kRows, &most.pull), preload_pull(Wire::kFp8, &most.fp8_pull),
        preload_push(&most.push), preload_reduce(&most.reduce)}) {
    if (error != gpuSuccess) {
      return Status(Code::kFailedPrecondition,
                    std::string("this device cannot run the kernels: ") + gpuGetErrorString(error));
    }
  }
  me.max_blocks = kNoLimits;
  if (me.group->num_ranks() > 1) {
    // Each block looks for its peers and fences its own writes: no more of them than run at once.
    for (int32_t* blocks : {&most.stage, &most.pull, &most.push, &most.reduce, &most.put,
                            &most.fp8_stage, &most.fp8_pull, &most.fp8_put}) {
      *blocks = processors * std::max(1, *blocks);
    }
    me.max_blocks = most;
  }
  return Status();
}

}  // namespace moriep::gpu
