#include "step.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "moriep/row_type.h"

namespace moriep {
namespace {

constexpr int kSpins = 50;

std::string rank_name(int32_t rank) { return "rank " + std::to_string(rank); }

std::string seconds(std::chrono::duration<double> duration) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g s", duration.count());
  return text;
}

}  // namespace

Step::Step(LocalRank& me, Kind kind, const Shape& shape, int32_t dtype, bool with_scalars,
           int32_t order, const std::string& config)
    : me_(me), kind_(kind), step_(me.arena().control().posted.load(std::memory_order_relaxed) + 1) {
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
  header_.num_words = shape.num_words;
  copy_text(config, header_.config, kConfigChars);
}

Status Step::halves(int64_t bytes, std::vector<std::byte*>* out) {
  if (me_.arena().control().failed.load(std::memory_order_relaxed) != 0) {
    return Status(Code::kFailedPrecondition,
                  "the group failed before: " + std::string(me_.arena().control().failure) +
                      "; restart the job, or open the group again with jm.initialize");
  }
  if (Status status = me_.group().arenas(me_.rank(), &arenas_); !status.ok()) return fail(status);
  me_.arena().control().headers[step_ % kNumHalves] = header_;
  out->resize(arenas_.size());
  for (size_t r = 0; r < arenas_.size(); ++r) {
    if (Status status = arenas_[r]->half(step_, bytes, &(*out)[r]); !status.ok())
      return fail(status);
  }
  return Status();
}

Status Step::publish_and_wait() {
  Control& mine = me_.arena().control();
  mine.posted.store(step_, std::memory_order_release);
  futex_wake_all(mine.posted);
  const auto deadline =
      Clock::now() + std::chrono::duration_cast<Clock::duration>(me_.group().timeout());
  const auto num_ranks = static_cast<int32_t>(arenas_.size());
  for (int32_t i = 1; i < num_ranks; ++i) {
    const int32_t peer = (me_.rank() + i) % num_ranks;
    if (Status status = wait_for(peer, deadline); !status.ok()) return fail(status);
    if (Status status = compare_with(peer); !status.ok()) return fail(status);
  }
  return Status();
}

Status Step::wait_for(int32_t peer, Clock::time_point deadline) {
  const Arena& arena = *arenas_[static_cast<size_t>(peer)];
  const std::atomic<uint32_t>& word = arena.control().posted;
  for (int spins = 0; spins < kSpins; ++spins) {
    if (reached(word.load(std::memory_order_acquire), step_)) return Status();
  }
  auto next_look = Clock::now() + kSlice;
  while (true) {
    const uint32_t posted = word.load(std::memory_order_acquire);
    if (reached(posted, step_)) return Status();
    const auto now = Clock::now();
    // All ranks are looked at, because this one may be busy for long while another is gone already.
    for (int32_t rank = 0; rank < me_.group().num_ranks(); ++rank) {
      if (Status status = look_at(rank, now >= next_look); !status.ok()) return status;
    }
    if (now >= next_look) next_look = now + kSlice;
    if (me_.group().stopping()) return Status(Code::kFailedPrecondition, "the group is closed");
    if (now >= deadline) {
      return Status(Code::kDeadlineExceeded,
                    "waited " + seconds(me_.group().timeout()) + " for " + rank_name(peer) +
                        " (pid " + std::to_string(arena.address().pid) +
                        ", alive: stopped, or busy elsewhere); its last step was " +
                        std::to_string(posted) + "; JAX_MORIEP_TIMEOUT sets the limit");
    }
    futex_wait_slice(word, posted);
  }
}

Status Step::look_at(int32_t peer, bool at_process) {
  const Arena& arena = *arenas_[static_cast<size_t>(peer)];
  const Control& theirs = arena.control();
  if (peer == me_.rank() || reached(theirs.posted.load(std::memory_order_acquire), step_))
    return Status();
  const std::string name = rank_name(peer);
  std::string what, cure;
  if (theirs.failed.load(std::memory_order_acquire) != 0) {
    what = name + " failed: " + read_text(theirs.failure, kFailureChars);
  } else if (theirs.closed.load(std::memory_order_acquire) != 0) {
    what = name + " has left the group";
    cure = "; do all ranks run the same number of layers and steps?";
  } else if (at_process && me_.group().is_remote(peer) && has_ended(arena.address())) {
    what = "the process of " + name + " (pid " + std::to_string(arena.address().pid) + ") has died";
  } else {
    return Status();
  }
  // It may have published this step after the first look and have ended then, all in good order.
  const uint32_t posted = theirs.posted.load(std::memory_order_acquire);
  if (reached(posted, step_)) return Status();
  return Status(Code::kUnavailable, what + "; its last step was " + std::to_string(posted) + cure);
}

Status Step::compare_with(int32_t peer) {
  const StepHeader& theirs =
      arenas_[static_cast<size_t>(peer)]->control().headers[step_ % kNumHalves];
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
  compare_number("words", header_.num_words, theirs.num_words);
  compare("dtype", type_name(header_.dtype), type_name(theirs.dtype));
  compare_number("scalars carried", header_.with_scalars, theirs.with_scalars);
  compare_number("the order (which call of the program it is) has", header_.order, theirs.order);
  compare("config", header_.config, read_text(theirs.config, kConfigChars));
  if (differs.empty()) return Status();
  return Status(Code::kInvalidArgument,
                rank_name(peer) + " runs another program: " + differs +
                    "; every rank must run the same layers, in the same order, on "
                    "arrays of the same shapes");
}

Status Step::fail(const Status& why) {
  const std::string text = std::string(kind_name(kind_)) + ", " + rank_name(me_.rank()) +
                           ", step " + std::to_string(step_) + ": " + why.text();
  me_.fail(text);
  return Status(why.code(), text);
}

}  // namespace moriep
