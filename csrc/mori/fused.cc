#include "fused.h"

#include "handle.h"
#include "kernels.h"
#include "prepare.h"

namespace moriep::mori {

// Places [T, K], sources [N], the count, the order between the two steps, and the experts'.
int64_t fused_words(const Shape& shape) {
  return shape.num_tokens * shape.top_k + shape.num_ranks * shape.num_tokens + 2 +
         aiter::arrival_words(shape);
}

Status run_fused(Group& group, const FusedCall& call, const FusedBuffers& at) {
  const Shape& shape = call.shape;
  int32_t* const places = at.workspace;
  int32_t* const sources = places + shape.num_tokens * shape.top_k;
  int32_t* const count = sources + shape.num_ranks * shape.num_tokens;
  int32_t* const between = count + 1;
  Call there = call.dispatch;
  there.order_out = between;
  Call back = call.combine;
  back.order = between;

  // On one node only: a plan between nodes would have to keep more.
  Routing routing{
      .ids = at.ids, .places = places, .origins = nullptr, .count = count, .between = nullptr};
  if (there.wire == Wire::kFp8) {
    // Before the ranks meet: it waits for nobody.
    if (Status status = aiter::quantise_for_wire(there.stream, {.x = at.x,
                                                                .num_tokens = there.num_tokens,
                                                                .hidden_size = there.hidden_size,
                                                                .codes = at.wire_codes,
                                                                .scales = at.wire_scales});
        !status.ok()) {
      return status;
    }
  }
  Prepared p;
  if (Status status = dispatch(group, there, routing,
                               {.x = at.x,
                                .weights = at.weights,
                                .words = at.words,
                                .num_words = at.num_words,
                                .all_words = at.all_words,
                                .codes = at.wire_codes,
                                .scales = at.wire_scales},
                               &p);
      !status.ok()) {
    return status;
  }
  if (p.moves) {
    // Nothing comes between the two steps, so MORI's own notes of what is from where still hold.
    routing.origins = reinterpret_cast<int32_t*>(p.handle->local(Buffer::kOrigins));
    const SettleArgs settle{.team = p.team,
                            .sizes = p.sizes,
                            .origins = routing.origins,
                            .sources = sources,
                            .count = count,
                            .places = places};
    if (Status status = launched(launch_settle(stream_of(there), settle)); !status.ok()) {
      return status;
    }
    const bool fp8 = there.wire == Wire::kFp8;
    const auto* scales = reinterpret_cast<const float*>(p.handle->local(Buffer::kScales));
    const aiter::ArrivalBuffers came{
        .tokens = p.handle->local(Buffer::kTokens),
        .token_scales = fp8 ? scales : nullptr,
        .ids = reinterpret_cast<const int32_t*>(p.handle->local(Buffer::kIds)),
        .weights = reinterpret_cast<const float*>(p.handle->local(Buffer::kWeights)),
        .sources = sources,
        .count = count,
        .rank = there.rank,
        .out = at.sums,
        .codes = at.codes,
        .scales = at.scales,
        .words = between + 1};
    if (Status status = aiter::run_arrivals(call.device, there.stream, call.layer, shape, came);
        !status.ok()) {
      return status;
    }
  }
  // MORI's buffers are read: the first step ends here.
  if (Status status = end_step(group, there, p); !status.ok()) return status;
  return give_back(group, back, routing,
                   {.tokens = at.sums, .scalars = nullptr, .y = at.y, .token_scalars = nullptr});
}

}  // namespace moriep::mori
