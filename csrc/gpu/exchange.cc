#include "exchange.h"

#include <algorithm>
#include <limits>
#include <string>

#include "kernels.h"
#include "moriep/layout.h"
#include "rows.h"

namespace moriep::gpu {
namespace {

// Blocks that move rows: a wave for each item, within the kernel's limit.
int num_blocks(int32_t max_blocks, int64_t num_items) {
  constexpr int64_t kWavesPerBlock = kThreads / kWave;
  const int64_t wanted = (num_items + kWavesPerBlock - 1) / kWavesPerBlock;
  return static_cast<int>(std::clamp<int64_t>(wanted, 1, max_blocks));
}

Status launched(gpuError_t error) {
  if (error == gpuSuccess) return Status();
  return Status(Code::kInternal,
                std::string("a kernel was not launched: ") + gpuGetErrorString(error));
}

// A digest of everything that must be alike on all ranks; only its equality means anything.
uint64_t digest_of(Kind kind, const Call& call, bool with_scalars) {
  uint64_t digest = 0xcbf29ce484222325;
  const auto take = [&digest](uint64_t value) {
    digest = (digest ^ value) * 0x100000001b3;
    digest ^= digest >> 29;
  };
  const Shape& s = call.shape;
  take(static_cast<uint64_t>(kind));
  take(static_cast<uint64_t>(call.type));
  take(with_scalars ? 1 : 0);
  for (const int64_t size : {s.num_ranks, s.num_tokens, s.top_k, s.hidden_size, s.num_experts,
                             s.num_local_experts, s.block, s.capacity, s.num_words}) {
    take(static_cast<uint64_t>(size));
  }
  for (const char letter : call.config) take(static_cast<unsigned char>(letter));
  return digest;
}

// One step as the kernels see it; refuses what they cannot count or hold.
struct Prepared {
  Team team;
  Sizes sizes;
  Stepping step;
  SlotLayout layout;
  int32_t tokens_per_chunk = 1;
  int32_t chunks_per_rank = 1;
  int32_t* counts = nullptr;
  uint32_t* written = nullptr;
  gpuStream_t stream = nullptr;
};

Status prepare(LocalRank& me, const Call& call, Kind kind, bool with_scalars, Prepared* out) {
  const Shape& shape = call.shape;
  if (Status status = me.group->team(me, &out->team); !status.ok()) return status;
  if (Status status = me.group->failure(); !status.ok()) return status;

  const int64_t row_bytes = shape.hidden_size * element_bytes(call.type);
  out->layout = SlotLayout::of(kind, shape, row_bytes, with_scalars);
  if (shape.num_ranks > 1 && out->layout.bytes > me.group->slot_bytes()) {
    return Status(Code::kInvalidArgument, "a step needs " +
                                              std::to_string(out->layout.bytes >> 20) +
                                              " MiB in each of an arena's two halves, which have " +
                                              std::to_string(me.group->slot_bytes() >> 20) +
                                              " MiB; set JAX_MORIEP_ARENA_MB to at least " +
                                              std::to_string((2 * out->layout.bytes >> 20) + 1));
  }
  constexpr int64_t kMaxItems = std::numeric_limits<int32_t>::max();
  const int64_t parts = row_bytes / 32 + 1;  // of the narrowest words
  const int64_t all_tokens = shape.num_ranks * shape.num_tokens;
  if (shape.num_local_experts > kMaxLocalExperts || shape.top_k > kMaxTopK ||
      all_tokens * shape.top_k > kMaxItems || all_tokens * parts > kMaxItems ||
      (shape.capacity / kClearRows + 1) * parts > kMaxItems ||
      shape.num_tokens > kMaxItems / kMaxRanks) {
    return Status(Code::kInvalidArgument,
                  "num_local_experts=" + std::to_string(shape.num_local_experts) + ", top_k=" +
                      std::to_string(shape.top_k) + ", capacity=" + std::to_string(shape.capacity) +
                      " and " + std::to_string(shape.num_tokens) +
                      " tokens per rank are more than the GPU kernels count (1024 experts per "
                      "rank, top_k 256); use transport='collective'");
  }
  out->tokens_per_chunk = static_cast<int32_t>(std::max<int64_t>(
      1, plan_chunk_routes(static_cast<int>(shape.num_local_experts)) / shape.top_k));
  out->chunks_per_rank = static_cast<int32_t>(
      std::max<int64_t>(1, (shape.num_tokens + out->tokens_per_chunk - 1) / out->tokens_per_chunk));
  const int64_t written_words = (shape.capacity + 31) / 32;
  const int64_t num_counts = shape.num_ranks * out->chunks_per_rank * shape.num_local_experts;
  if ((written_words + num_counts) * 4 > kWorkspaceBytes) {
    return Status(Code::kInvalidArgument,
                  "the plan of " + std::to_string(all_tokens) + " tokens over " +
                      std::to_string(shape.num_local_experts) + " local experts and " +
                      std::to_string(shape.capacity) +
                      " rows does not fit the workspace; use transport='collective'");
  }
  out->written = reinterpret_cast<uint32_t*>(me.arena + kControlBytes);
  out->counts = reinterpret_cast<int32_t*>(out->written + written_words);
  out->sizes = Sizes{.num_ranks = static_cast<int32_t>(shape.num_ranks),
                     .num_tokens = static_cast<int32_t>(shape.num_tokens),
                     .top_k = static_cast<int32_t>(shape.top_k),
                     .num_experts = static_cast<int32_t>(shape.num_experts),
                     .num_local_experts = static_cast<int32_t>(shape.num_local_experts),
                     .block = static_cast<int32_t>(shape.block),
                     .capacity = static_cast<int32_t>(shape.capacity),
                     .fanout = static_cast<int32_t>(std::min(shape.top_k, shape.num_ranks)),
                     .num_words = static_cast<int32_t>(shape.num_words),
                     .row_bytes = row_bytes};
  out->step = Stepping{.kind = kind,
                       .digest = digest_of(kind, call, with_scalars),
                       .rank = call.rank,
                       .order = call.order,
                       .order_out = call.order_out};
  out->stream = static_cast<gpuStream_t>(call.stream);
  return Status();
}

Staged staged_of(const SlotLayout& layout) {
  return {layout.ids, layout.weights, layout.words, layout.rows, layout.row_stride};
}

bool first(const Call& call) { return call.shape.num_ranks > 1 && call.half != Half::kSecond; }
bool second(const Call& call) { return call.half != Half::kFirst; }

gpuError_t enqueue_stage(const LocalRank& me, const Prepared& p, const std::byte* x,
                         const int32_t* ids, const float* weights, const int32_t* words) {
  const StageArgs args{p.team, p.sizes, p.step, staged_of(p.layout), x, ids, weights, words};
  const int64_t parts = num_parts(p.sizes.row_bytes, 16, kCopyWords);
  return launch_stage(p.stream, num_blocks(me.max_blocks.stage, p.sizes.num_tokens * parts), args);
}

gpuError_t enqueue_pull(const LocalRank& me, const Prepared& p, const std::byte* x,
                        const int32_t* routes, std::byte* rows, float* row_weights) {
  const PullArgs args{p.team, p.sizes,   p.step, staged_of(p.layout), x,
                      routes, p.written, rows,   row_weights};
  const int64_t parts = num_parts(p.sizes.row_bytes, 16, kCopyWords);
  const int64_t pulls = int64_t{p.sizes.num_ranks} * p.sizes.num_tokens;
  const int64_t items = (pulls + p.sizes.capacity / kClearRows + 1) * parts;
  return launch_pull(p.stream, num_blocks(me.max_blocks.pull, items), args);
}

}  // namespace

Status dispatch(LocalRank& me, const Call& call, const DispatchBuffers& at) {
  Prepared p;
  if (Status status = prepare(me, call, Kind::kDispatch, false, &p); !status.ok()) {
    return status;
  }
  if (first(call)) {
    if (Status status = launched(enqueue_stage(me, p, at.x, at.ids, at.weights, at.words));
        !status.ok())
      return status;
  }
  if (!second(call)) return Status();
  const PlanArgs plan{.team = p.team,
                      .sizes = p.sizes,
                      .step = p.step,
                      .staged = staged_of(p.layout),
                      .ids = at.ids,
                      .weights = at.weights,
                      .tokens_per_chunk = p.tokens_per_chunk,
                      .chunks_per_rank = p.chunks_per_rank,
                      .counts = p.counts,
                      .written = p.written,
                      .routes = at.routes,
                      .slots = at.slots,
                      .group_sizes = at.group_sizes,
                      .row_weights = at.row_weights,
                      .words = at.words,
                      .all_words = at.all_words};
  if (Status status = launched(launch_plan(p.stream, plan)); !status.ok()) return status;
  return launched(enqueue_pull(me, p, at.x, at.routes, at.rows, at.row_weights));
}

Status replay(LocalRank& me, const Call& call, const ReplayBuffers& at) {
  Prepared p;
  if (Status status = prepare(me, call, Kind::kReplay, false, &p); !status.ok()) {
    return status;
  }
  if (first(call)) {
    if (Status status = launched(enqueue_stage(me, p, at.x, at.ids, nullptr, nullptr));
        !status.ok())
      return status;
  }
  if (!second(call)) return Status();
  const auto written_bytes = static_cast<size_t>((call.shape.capacity + 31) / 32 * 4);
  if (Status status = launched(gpuMemsetAsync(p.written, 0, written_bytes, p.stream)); !status.ok())
    return status;
  const MarkArgs mark{p.team, p.sizes, p.step, at.routes, p.written};
  if (Status status = launched(launch_mark(p.stream, mark)); !status.ok()) return status;
  return launched(enqueue_pull(me, p, at.x, at.routes, at.rows, nullptr));
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
                         .slots = at.slots,
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
  BlockLimits resident{kNoLimit, kNoLimit, kNoLimit, kNoLimit};
  int processors = 0;
  for (const gpuError_t error :
       {gpuDeviceGetAttribute(&processors, gpuDevAttrMultiProcessorCount, me.device),
        preload_stage(&resident.stage), preload_plan(), preload_pull(&resident.pull),
        preload_push(&resident.push), preload_reduce(&resident.reduce)}) {
    if (error != gpuSuccess) {
      return Status(Code::kFailedPrecondition,
                    std::string("this device cannot run the kernels: ") + gpuGetErrorString(error));
    }
  }
  me.max_blocks = {kNoLimit, kNoLimit, kNoLimit, kNoLimit};
  if (me.group->num_ranks() > 1) {
    // Each block looks for its peers and fences its own writes: no more of them than run at once.
    me.max_blocks = {
        processors * std::max(1, resident.stage), processors * std::max(1, resident.pull),
        processors * std::max(1, resident.push), processors * std::max(1, resident.reduce)};
  }
  return Status();
}

}  // namespace moriep::gpu
