#include "prepare.h"

#include <string>

#include "gpu/digest.h"
#include "gpu/kernels.h"
#include "notices.h"
#include "world.h"

namespace moriep::mori {
namespace {

bool is_fp8(const Call& call, Kind kind) {
  return kind == Kind::kDispatch && call.wire == Wire::kFp8;
}

Status check_sizes(const Group& group, const Call& call, Kind kind, const Handle& handle) {
  const HandleSizes& has = handle.sizes();
  if (call.num_tokens <= has.max_tokens && call.top_k == has.top_k &&
      call.num_local_experts == has.experts_per_rank && call.hidden_size == has.hidden_size &&
      element_bytes(call.type) <= has.element_bytes &&
      (!is_fp8(call, kind) || has.num_scales == num_fp8_groups(call.hidden_size))) {
    return Status();
  }
  return Status(Code::kInvalidArgument, "MORI's handle " + std::string(call.handle) +
                                            " was made for another exchange over " +
                                            std::to_string(group.num_ranks()) + " ranks");
}

}  // namespace

Status launched(hipError_t error) {
  if (error == hipSuccess) return Status();
  return Status(Code::kInternal,
                std::string("a kernel was not launched: ") + hipGetErrorString(error));
}

Status prepare(Group& group, const Call& call, Kind kind, int64_t num_words, bool with_scalars,
               Prepared* out) {
  const gpu::LocalRank& me = *group.local(group.rank());
  if (Status status = group.team(me, &out->team); !status.ok()) return status;
  if (call.num_nodes != group.num_nodes()) {
    return Status(Code::kFailedPrecondition,
                  "the program was traced for ranks on " + std::to_string(call.num_nodes) +
                      " nodes, and they are on " + std::to_string(group.num_nodes()));
  }
  out->moves = call.num_tokens > 0;
  if (out->moves || group.num_nodes() > 1) {
    if (Status status = group.handle(std::string(call.handle), &out->handle); !status.ok()) {
      return status;
    }
    if (Status status = check_sizes(group, call, kind, *out->handle); !status.ok()) return status;
  }
  if (Status status = group.failure(); !status.ok()) return status;
  if (num_words * group.num_ranks() * static_cast<int64_t>(sizeof(int32_t)) > kHalfBytes) {
    return Status(Code::kInvalidArgument,
                  std::to_string(num_words) + " words of " + std::to_string(group.num_ranks()) +
                      " ranks are more than the " + std::to_string(kHalfBytes) +
                      " bytes that a step shares; use transport='native'");
  }
  if (group.notices() != nullptr) {
    if (Status status = group.notices()->check_words(num_words); !status.ok()) return status;
  }
  gpu::Digest digest;
  for (const int64_t value :
       {static_cast<int64_t>(kind), static_cast<int64_t>(call.type),
        static_cast<int64_t>(call.wire), int64_t{with_scalars}, int64_t{group.num_ranks()},
        call.num_tokens, call.top_k, call.hidden_size, call.num_experts, call.num_local_experts,
        num_words}) {
    digest.take(static_cast<uint64_t>(value));
  }
  digest.take(call.config);
  digest.take(call.handle);
  out->step = gpu::Stepping{.kind = kind,
                            .digest = digest.value(),
                            .rank = call.rank,
                            .order = call.order,
                            .order_out = call.order_out};
  out->row_bytes = call.hidden_size * element_bytes(call.type);
  const bool fp8 = is_fp8(call, kind);
  out->sizes =
      ArrivalSizes{.num_ranks = group.num_ranks(),
                   .num_tokens = static_cast<int32_t>(call.num_tokens),
                   .max_tokens = out->handle == nullptr ? 0 : out->handle->sizes().max_tokens,
                   .top_k = static_cast<int32_t>(call.top_k),
                   .row_bytes = out->row_bytes,
                   .wire_bytes = fp8 ? call.hidden_size : out->row_bytes,
                   .num_scales = fp8 ? num_fp8_groups(call.hidden_size) : 0};
  return Status();
}

ShareArgs share_args(const Group& group, const Prepared& p) {
  ShareArgs args{};
  args.team = p.team;
  args.step = p.step;
  args.progress = group.progress_on_device();
  args.num_nodes = 1;
  if (const Notices* notices = group.notices(); notices != nullptr) {
    args.notices = notices->memory();
    args.num_nodes = notices->num_nodes();
  }
  if (p.handle != nullptr && p.moves) {
    args.detours = p.handle->detours();
    args.num_detours = p.handle->num_detours();
    args.barrier = p.handle->arguments().crossDeviceBarrierFlag;
    args.handle = p.handle->number();
  }
  return args;
}

Status begin_step(const Group& group, const Call& call, const Prepared& p, const ShareArgs& share,
                  const int32_t* plan_flags) {
  if (Status status = launched(launch_share(stream_of(call), share)); !status.ok()) return status;
  const Notices* notices = group.notices();
  if (notices == nullptr) return Status();
  if (Status status = notices->relay(p.team, share.num_words, stream_of(call)); !status.ok()) {
    return status;
  }
  const EnterArgs enter{.share = share,
                        .flags = p.handle->flags(),
                        .plan_flags = plan_flags,
                        .reach = notices->reach(),
                        .silent = notices->silent(),
                        .moves = p.moves};
  return launched(launch_enter(stream_of(call), enter));
}

BetweenPlan between_plan(const Prepared& p, const Call& call, const Routing& routing) {
  if (routing.between == nullptr) return {};
  const int64_t nodes = p.handle->num_nodes();
  int32_t* const sent = routing.between + nodes * call.num_tokens * call.top_k;
  return {.relayed = routing.between, .sent = sent, .flags = sent + nodes * call.num_tokens};
}

BetweenArgs between_args(const Prepared& p, const Call& call, const Routing& routing) {
  if (routing.between == nullptr) return {};
  const FlagArgs flags = p.handle->flags();
  return {.words = routing.between,
          .num_words = between_words(flags.num_nodes, call.num_tokens, call.top_k),
          .plan_flags = between_plan(p, call, routing).flags,
          .num_flags = flags.num_nodes * flags.num_chunks,
          .sets = {flags.sets[0], flags.sets[1]}};
}

Launch launch_of(const Call& call, const Prepared& p, const Routing& routing) {
  Launch launch{*p.handle,      rows_of(call.type), call.num_blocks,
                call.num_waves, stream_of(call),    p.handle->arguments()};
  launch.args.rdmaBlockNum = call.num_rdma_blocks;
  launch.args.config.hiddenDim = static_cast<int>(call.hidden_size);
  launch.args.curRankNumToken = static_cast<int32_t>(call.num_tokens);
  // MORI writes nothing through these in the calls that only read them.
  launch.args.tokenIndices = const_cast<int32_t*>(routing.ids);
  launch.args.dispDestTokIdMap = routing.places;
  launch.args.totalRecvTokenNum = routing.count;
  launch.args.dispTokIdToSrcTokIdLocal = routing.origins;
  if (const BetweenPlan plan = between_plan(p, call, routing); plan.relayed != nullptr) {
    launch.args.interNodeDispDestTokIdMap = plan.relayed;
    launch.args.interNodeDispSendMap = plan.sent;
  }
  return launch;
}

Status dispatch(Group& group, const Call& call, const Routing& routing, const DispatchBuffers& at,
                Prepared* out) {
  if (Status status = prepare(group, call, Kind::kDispatch, at.num_words, false, out);
      !status.ok()) {
    return status;
  }
  const Prepared& p = *out;
  const bool fp8 = call.wire == Wire::kFp8;
  ShareArgs share = share_args(group, p);
  share.words = at.words;
  share.num_words = static_cast<int32_t>(at.num_words);
  share.all_words = at.all_words;
  share.count = routing.count;
  if (Status status = begin_step(group, call, p, share, nullptr); !status.ok()) return status;
  if (!p.moves) return Status();

  Launch launch = launch_of(call, p, routing);
  launch.args.inpTokenBuf = const_cast<std::byte*>(at.x);
  launch.args.weightsBuf = const_cast<float*>(at.weights);
  if (fp8) {
    launch.rows = Rows::kFp8;
    launch.args.inpTokenBuf = at.codes;
    launch.args.scalesBuf = reinterpret_cast<uint8_t*>(at.scales);
  }
  return launch.dispatch();
}

Status end_step(const Group& group, const Call& call, const Prepared& p) {
  const SealArgs args{.team = p.team,
                      .step = p.step,
                      .progress = group.progress_on_device(),
                      .y = nullptr,
                      .y_bytes = 0,
                      .token_scalars = nullptr,
                      .num_scalars = 0};
  return launched(launch_seal(stream_of(call), 1, args));
}

}  // namespace moriep::mori
