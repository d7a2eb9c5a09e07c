#include "stream.h"

#include "device.h"
#include "graph.h"
#include "memory.h"
#include "settings.h"

namespace gfx942::runtime {
namespace {

// AMDGPU kernels take at most a few kilobytes of arguments.
constexpr uint64_t kKernargBytes = 65536;

}  // namespace

void Signal::set() {
  std::lock_guard lock(mutex_);
  done_ = true;
  time_ = std::chrono::steady_clock::now();
  changed_.notify_all();
}

void Signal::wait() const {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return done_; });
}

bool Signal::done() const {
  std::lock_guard lock(mutex_);
  return done_;
}

Signal::Time Signal::time() const {
  std::lock_guard lock(mutex_);
  return time_;
}

Stream::Stream(Device* device, bool blocking)
    : device_(*device),
      blocking_(blocking),
      random_(static_cast<uint32_t>(settings().machine.seed + 1)) {
  // One kernel of a stream runs at a time, so that one buffer serves them all.
  void* kernarg = memory().allocate(kKernargBytes, Owner::kHost, device->ordinal(),
                                    MemoryKind::kFineGrained, "kernel arguments");
  if (kernarg != nullptr) kernarg_ = {static_cast<std::byte*>(kernarg), kKernargBytes};
  thread_ = std::thread([this] { work(); });
}

Stream::~Stream() {
  {
    std::lock_guard lock(mutex_);
    ending_ = true;
    changed_.notify_all();
  }
  thread_.join();
  memory().release(kernarg_.data(), Owner::kHost);
}

void Stream::push(Item item) {
  std::lock_guard lock(mutex_);
  queue_.push_back(std::move(item));
  changed_.notify_all();
}

hipError_t Stream::submit(Operation operation) {
  if (const auto capture = this->capture()) return capture->add(this, std::move(operation));
  if (const hipError_t error = device_.error(); error != hipSuccess) return error;
  device_.order(this);
  Work work{std::move(operation), {}};
  std::lock_guard lock(mutex_);
  // Turns are taken in the queue's order, for what is behind cannot come first.
  take_turns(work.operation, &work.turns);
  queue_.push_back(std::move(work));
  changed_.notify_all();
  return hipSuccess;
}

void Stream::submit_wait(std::shared_ptr<const Signal> signal) { push(std::move(signal)); }

std::shared_ptr<const Signal> Stream::mark() {
  auto signal = std::make_shared<Signal>();
  push(signal);
  return signal;
}

void Stream::synchronize() { mark()->wait(); }

bool Stream::idle() const {
  std::lock_guard lock(mutex_);
  return queue_.empty() && !busy_;
}

std::shared_ptr<Capture> Stream::capture() const {
  std::lock_guard lock(mutex_);
  return capture_;
}

void Stream::set_capture(std::shared_ptr<Capture> capture) {
  std::lock_guard lock(mutex_);
  capture_ = std::move(capture);
}

void Stream::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return !queue_.empty() || ending_; });
    if (queue_.empty()) return;
    Item item = std::move(queue_.front());
    queue_.pop_front();
    busy_ = true;
    lock.unlock();
    perform(&item);
    lock.lock();
    busy_ = false;
  }
}

void Stream::perform(Item* item) {
  if (const auto* wait = std::get_if<Wait>(item)) {
    (*wait)->wait();
    return;
  }
  if (const auto* mark = std::get_if<Mark>(item)) {
    (*mark)->set();
    return;
  }
  if (const uint32_t longest = settings().delay_microseconds; longest != 0) {
    std::this_thread::sleep_for(std::chrono::microseconds(random_() % (longest + 1)));
  }
  auto& [operation, turns] = std::get<Work>(*item);
  if (device_.error() != hipSuccess && !runs_after_failure(operation)) return;
  device_.fail(execute(operation, device_.ordinal(), kernarg_, &turns));
}

}  // namespace gfx942::runtime
