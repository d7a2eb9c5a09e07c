// Streams and events. A stream's work runs on the stream's own thread, after the call that queued
// it.
#pragma once

#include <hip/hip_runtime_api.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <span>
#include <thread>
#include <variant>

#include "operation.h"

namespace gfx942::runtime {

class Capture;
class Device;
struct Node;

// Something that happens once.
class Signal {
 public:
  using Time = std::chrono::steady_clock::time_point;

  void set();
  void wait() const;
  bool done() const;
  Time time() const;  // of a signal that is set

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  bool done_ = false;
  Time time_;
};

class Stream {
 public:
  Stream(Device* device, bool blocking);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  Device& device() const { return device_; }
  // Whether its work and the null stream's wait for each other.
  bool blocking() const { return blocking_; }

  // Queues work, or adds it to the graph that the stream is captured into.
  hipError_t submit(Operation operation);
  void submit_wait(std::shared_ptr<const Signal> signal);
  // A signal that is set when everything queued so far has ended.
  std::shared_ptr<const Signal> mark();
  void synchronize();
  bool idle() const;

  std::shared_ptr<Capture> capture() const;
  void set_capture(std::shared_ptr<Capture> capture);

 private:
  using Wait = std::shared_ptr<const Signal>;
  using Mark = std::shared_ptr<Signal>;
  struct Work {
    Operation operation;
    Turns turns;
  };
  using Item = std::variant<Work, Wait, Mark>;

  void push(Item item);
  void work();
  void perform(Item* item);

  Device& device_;
  const bool blocking_;
  std::span<std::byte> kernarg_;
  std::minstd_rand random_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Item> queue_;
  bool busy_ = false;
  bool ending_ = false;
  std::shared_ptr<Capture> capture_;
  std::thread thread_;
};

// What an event was last recorded into: a signal, or a captured stream's nodes.
struct Event {
  explicit Event(unsigned flags) : timed((flags & hipEventDisableTiming) == 0) {}

  const bool timed;
  std::mutex mutex;
  std::shared_ptr<const Signal> signal;
  std::shared_ptr<Capture> capture;
  std::vector<const Node*> nodes;
};

}  // namespace gfx942::runtime
