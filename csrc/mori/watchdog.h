// Notices that a rank's device has been inside MORI's kernels for too long: a peer died there, and
// MORI's kernels wait without an end.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

#include "progress.h"

namespace moriep::mori {

class Watchdog {
 public:
  // Calls `stuck` once, from a thread of its own, with what `progress` said when a step had taken
  // longer than the timeout.
  Watchdog(const Progress* progress, std::chrono::duration<double> timeout,
           std::function<void(const Progress&)> stuck);
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

 private:
  void watch();

  const Progress* const progress_;
  const std::chrono::duration<double> timeout_;
  const std::function<void(const Progress&)> stuck_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool closing_ = false;
  std::thread thread_;
};

}  // namespace moriep::mori
