#include "exchange.h"

#include <algorithm>

#include "gpu/kernels.h"
#include "gpu/rows.h"
#include "handle.h"
#include "kernels.h"
#include "prepare.h"

namespace moriep::mori {
namespace {

// Enough to keep a memory system busy; each block waits for the others at the end.
constexpr int kMaxCopyBlocks = 608;

int num_blocks(int64_t num_items, int64_t items_per_block) {
  return static_cast<int>(
      std::clamp<int64_t>((num_items + items_per_block - 1) / items_per_block, 1, kMaxCopyBlocks));
}

CollectArgs collect_args(const Group& group, const Prepared& p, const Routing& routing,
                         std::byte* tokens) {
  CollectArgs args{};
  args.team = p.team;
  args.step = p.step;
  args.sizes = p.sizes;
  args.progress = group.progress_on_device();
  args.from_tokens = p.handle->local(Buffer::kTokens);
  args.tokens = tokens;
  args.count = routing.count;
  return args;
}

Status collect(const Call& call, const CollectArgs& args) {
  const int64_t parts = gpu::num_parts(args.sizes.row_bytes, 16, gpu::kCopyWords);
  const int64_t items = int64_t{args.sizes.num_ranks} * args.sizes.num_tokens * parts;
  const int blocks = num_blocks(items, gpu::kThreads / gpu::kWave);
  return launched(launch_collect(stream_of(call), blocks, call.type, args));
}

}  // namespace

Status send(Group& group, const Call& call, const Routing& routing, const SendBuffers& at) {
  if (call.wire == Wire::kFp8) {
    // Before the ranks meet: it waits for nobody.
    const gpuError_t error =
        gpu::launch_quantise(stream_of(call), at.x, call.type, call.num_tokens, call.hidden_size,
                             at.codes, at.scales, kWireFormat);
    if (Status status = launched(error); !status.ok()) return status;
  }
  Prepared p;
  if (Status status = dispatch(group, call, routing,
                               {.x = at.x,
                                .weights = at.weights,
                                .words = at.words,
                                .num_words = at.num_words,
                                .all_words = at.all_words,
                                .codes = at.codes,
                                .scales = at.scales},
                               &p);
      !status.ok()) {
    return status;
  }
  if (!p.moves) return end_step(group, call, p);
  CollectArgs args = collect_args(group, p, routing, at.tokens);
  if (call.wire == Wire::kFp8) {
    args.from_scales = reinterpret_cast<const float*>(p.handle->local(Buffer::kScales));
  }
  args.from_ids = reinterpret_cast<const int32_t*>(p.handle->local(Buffer::kIds));
  args.from_weights = reinterpret_cast<const float*>(p.handle->local(Buffer::kWeights));
  args.from_origins = reinterpret_cast<const int32_t*>(p.handle->local(Buffer::kOrigins));
  args.ids = at.out_ids;
  args.weights = at.out_weights;
  args.sources = at.sources;
  args.origins = routing.origins;
  args.places = routing.places;
  args.between = between_args(p, call, routing);
  return collect(call, args);
}

Status resend(Group& group, const Call& call, const Routing& routing, const std::byte* x,
              std::byte* tokens) {
  Prepared p;
  if (Status status = prepare(group, call, Kind::kReplay, 0, false, &p); !status.ok()) {
    return status;
  }
  if (Status status = begin_step(group, call, p, share_args(group, p), nullptr); !status.ok()) {
    return status;
  }
  if (!p.moves) return end_step(group, call, p);
  Launch launch = launch_of(call, p, routing);
  launch.args.inpTokenBuf = const_cast<std::byte*>(x);
  if (routing.between != nullptr) {
    // Kernels between nodes carry weights beside every token. Nobody looks at those of a resend, so
    // any numbers do.
    launch.args.weightsBuf = reinterpret_cast<float*>(const_cast<int32_t*>(routing.ids));
  }
  // It would add the number of tokens that came, which is 0 on the way along a known plan.
  launch.args.totalRecvTokenNum = p.handle->arguments().totalRecvTokenNum;
  if (Status status = launch.replay(); !status.ok()) return status;
  return collect(call, collect_args(group, p, routing, tokens));
}

Status give_back(Group& group, const Call& call, const Routing& routing,
                 const GiveBackBuffers& at) {
  Prepared p;
  if (Status status = prepare(group, call, Kind::kCombine, 0, at.scalars != nullptr, &p);
      !status.ok()) {
    return status;
  }
  ShareArgs share = share_args(group, p);
  if (p.moves) {
    // MORI adds up into these, and no peer reads or writes them.
    share.redirects[share.num_redirects++] = {p.handle->local_word(Buffer::kSums),
                                              reinterpret_cast<uint64_t>(at.y)};
    if (at.scalars != nullptr) {
      share.redirects[share.num_redirects++] = {p.handle->local_word(Buffer::kScalars),
                                                reinterpret_cast<uint64_t>(at.token_scalars)};
    }
  }
  const BetweenPlan plan = between_plan(p, call, routing);
  if (Status status = begin_step(group, call, p, share, plan.flags); !status.ok()) return status;
  if (!p.moves) return end_step(group, call, p);
  Launch launch = launch_of(call, p, routing);
  launch.args.inpTokenBuf = const_cast<std::byte*>(at.tokens);
  launch.args.weightsBuf = const_cast<float*>(at.scalars);
  if (Status status = launch.combine(); !status.ok()) return status;

  const SealArgs args{.team = p.team,
                      .step = p.step,
                      .progress = group.progress_on_device(),
                      .y = at.y,
                      .y_bytes = call.num_tokens * p.row_bytes,
                      .token_scalars = at.token_scalars,
                      .num_scalars = at.scalars == nullptr ? 0 : call.num_tokens * call.top_k};
  return launched(launch_seal(stream_of(call), 8, args));
}

}  // namespace moriep::mori
