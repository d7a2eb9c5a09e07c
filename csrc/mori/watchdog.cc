#include "watchdog.h"

#include <algorithm>
#include <utility>

namespace moriep::mori {
namespace {

using Clock = std::chrono::steady_clock;

uint64_t load(const uint64_t& word) { return __atomic_load_n(&word, __ATOMIC_ACQUIRE); }

}  // namespace

Watchdog::Watchdog(const Progress* progress, std::chrono::duration<double> timeout,
                   std::function<void(const Progress&)> stuck)
    : progress_(progress),
      timeout_(timeout),
      stuck_(std::move(stuck)),
      thread_([this] { watch(); }) {}

Watchdog::~Watchdog() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void Watchdog::watch() {
  // Often enough to be hardly late, seldom enough to cost nothing.
  const auto look_every = std::min(timeout_ / 8, std::chrono::duration<double>(0.25));
  uint64_t inside = 0;  // the step that was entered and not left at the last look
  auto since = Clock::now();
  std::unique_lock<std::mutex> lock(mutex_);
  while (!changed_.wait_for(lock, look_every, [this] { return closing_; })) {
    const uint64_t entered = load(progress_->entered);
    if (load(progress_->left) >= entered || entered != inside) {
      inside = entered;
      since = Clock::now();
      continue;
    }
    if (Clock::now() - since < timeout_) continue;
    const Progress seen = *progress_;
    lock.unlock();
    stuck_(seen);
    return;
  }
}

}  // namespace moriep::mori
