#include "step.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace moriep {
namespace {

constexpr int kSpins = 50;

std::string rank_name(int32_t rank) { return "rank " + std::to_string(rank); }

void copy_text(const std::string& from, char* to, int64_t size) {
  const size_t length = std::min(from.size(), static_cast<size_t>(size) - 1);
  std::memcpy(to, from.data(), length);
  to[length] = '\0';
}

std::string seconds(std::chrono::duration<double> duration) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g s", duration.count());
  return text;
}

}  // namespace

Step::Step(LocalRank& me, Kind kind, const Shape& shape, int32_t dtype, bool with_scalars, int32_t order,
           const std::string& config)
    : me_(me),
      kind_(kind),
      step_(me.arena().control().posted.load(std::memory_order_relaxed) + 1),
      header_(me.arena().control().headers[step_ % kNumSlots]) {
  header_.kind = static_cast<int32_t>(kind);
  header_.order = order;
  header_.dtype = dtype;
  header_.with_scalars = with_scalars;
  header_.num_ranks = shape.num_ranks;
  header_.num_tokens = shape.num_tokens;
  header_.top_k = shape.top_k;
  header_.hidden_size = shape.hidden_size;
  header_.num_experts = shape.num_experts;
  header_.num_local_experts = shape.num_local_experts;
  header_.block = shape.block;
  header_.capacity = shape.capacity;
  copy_text(config, header_.config, kConfigChars);
}

Status Step::slots(int64_t bytes, std::vector<std::byte*>* out) {
  if (me_.arena().control().failed.load(std::memory_order_relaxed) != 0) {
    return Status(Code::kFailedPrecondition, "the group failed before: " + std::string(me_.arena().control().failure) +
                                                 "; restart the job, or open the group again with jm.initialize");
  }
  if (Status status = me_.group().arenas(me_.rank(), &arenas_); !status.ok()) return fail(status);
  out->resize(arenas_.size());
  for (size_t r = 0; r < arenas_.size(); ++r) {
    if (Status status = arenas_[r]->slot(step_, bytes, &(*out)[r]); !status.ok()) return fail(status);
  }
  return Status();
}

Status Step::publish_and_wait() {
  Control& mine = me_.arena().control();
  mine.posted.store(step_, std::memory_order_release);
  futex_wake_all(mine.posted);
  const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(me_.group().timeout());
  const auto num_ranks = static_cast<int32_t>(arenas_.size());
  for (int32_t i = 1; i < num_ranks; ++i) {
    const int32_t peer = (me_.rank() + i) % num_ranks;
    if (Status status = wait_for(peer, deadline); !status.ok()) return fail(status);
    if (Status status = compare_with(peer); !status.ok()) return fail(status);
  }
  return Status();
}

Status Step::wait_for(int32_t peer, Clock::time_point deadline) {
  Arena& arena = *arenas_[static_cast<size_t>(peer)];
  Control& theirs = arena.control();
  for (int spins = 0;; ++spins) {
    const uint32_t posted = theirs.posted.load(std::memory_order_acquire);
    if (reached(posted, step_)) return Status();
    if (spins < kSpins) continue;
    const std::string last = "; its last step was " + std::to_string(posted);
    if (theirs.failed.load(std::memory_order_acquire) != 0) {
      char text[kFailureChars];
      copy_text(std::string(theirs.failure, strnlen(theirs.failure, kFailureChars)), text, kFailureChars);
      return Status(Code::kUnavailable, rank_name(peer) + " failed: " + text);
    }
    if (theirs.closed.load(std::memory_order_acquire) != 0) {
      return Status(Code::kUnavailable,
                    rank_name(peer) + " has left the group" + last +
                        "; do all ranks run the same number of layers and steps?");
    }
    if (me_.group().stopping()) return Status(Code::kFailedPrecondition, "the group is closed");
    const int64_t pid = arena.address().pid;
    if (me_.group().is_remote(peer) && process_start_time(pid) != arena.address().start_time) {
      return Status(Code::kUnavailable,
                    "the process of " + rank_name(peer) + " (pid " + std::to_string(pid) + ") has died" + last);
    }
    if (Clock::now() >= deadline) {
      return Status(Code::kDeadlineExceeded,
                    "waited " + seconds(me_.group().timeout()) + " for " + rank_name(peer) + " (pid " +
                        std::to_string(pid) + ", alive: stopped, or busy elsewhere)" + last +
                        "; JAX_MORIEP_TIMEOUT sets the limit");
    }
    futex_wait_slice(theirs.posted, posted);
  }
}

Status Step::compare_with(int32_t peer) {
  const StepHeader& theirs = arenas_[static_cast<size_t>(peer)]->control().headers[step_ % kNumSlots];
  std::string differs;
  const auto compare = [&](const char* what, const std::string& mine, const std::string& other) {
    if (mine == other) return;
    if (!differs.empty()) differs += ", ";
    differs += std::string(what) + " " + mine + " here and " + other + " there";
  };
  const auto compare_number = [&](const char* what, int64_t mine, int64_t other) {
    compare(what, std::to_string(mine), std::to_string(other));
  };
  compare("the exchange is", kind_name(kind_), kind_name(static_cast<Kind>(theirs.kind)));
  compare_number("tokens per rank", header_.num_tokens, theirs.num_tokens);
  compare_number("hidden_size", header_.hidden_size, theirs.hidden_size);
  compare_number("top_k", header_.top_k, theirs.top_k);
  compare_number("num_experts", header_.num_experts, theirs.num_experts);
  compare_number("experts per rank", header_.num_local_experts, theirs.num_local_experts);
  compare_number("block", header_.block, theirs.block);
  compare_number("capacity", header_.capacity, theirs.capacity);
  compare_number("dtype code", header_.dtype, theirs.dtype);
  compare_number("scalars carried", header_.with_scalars, theirs.with_scalars);
  compare_number("the call's position in the program is", header_.order, theirs.order);
  compare("config", header_.config, std::string(theirs.config, strnlen(theirs.config, kConfigChars)));
  if (differs.empty()) return Status();
  return Status(Code::kInvalidArgument, rank_name(peer) + " runs another program: " + differs +
                                            "; every rank must run the same layers, in the same order, on "
                                            "arrays of the same shapes");
}

Status Step::fail(const Status& why) {
  const std::string text = std::string(kind_name(kind_)) + ", " + rank_name(me_.rank()) + ", step " +
                           std::to_string(step_) + ": " + why.text();
  Control& mine = me_.arena().control();
  copy_text(text, mine.failure, kFailureChars);
  mine.failed.store(1, std::memory_order_release);
  futex_wake_all(mine.posted);
  return Status(why.code(), text);
}

}  // namespace moriep
