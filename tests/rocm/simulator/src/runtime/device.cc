#include "device.h"

#include <algorithm>

#include "settings.h"

namespace gfx942::runtime {
namespace {

thread_local int current = 0;

const std::vector<std::unique_ptr<Device>>& devices() {
  // Never destroyed: streams' threads may still run while the process ends.
  static const auto* const kDevices = [] {
    auto* all = new std::vector<std::unique_ptr<Device>>();
    for (const int number : settings().devices) {
      all->push_back(std::make_unique<Device>(static_cast<int>(all->size()), number));
    }
    return all;
  }();
  return *kDevices;
}

}  // namespace

int device_count() { return static_cast<int>(devices().size()); }

Device* device(int ordinal) {
  return ordinal >= 0 && ordinal < device_count() ? devices()[static_cast<size_t>(ordinal)].get()
                                                  : nullptr;
}

int current_ordinal() { return current; }
Device& current_device() { return *device(current); }

bool set_current_device(int ordinal) {
  if (device(ordinal) == nullptr) return false;
  current = ordinal;
  return true;
}

void Device::fail(hipError_t error) {
  hipError_t none = hipSuccess;
  error_.compare_exchange_strong(none, error);
}

std::shared_ptr<Stream> Device::null_stream() {
  std::lock_guard lock(mutex_);
  if (null_stream_ == nullptr) null_stream_ = std::make_shared<Stream>(this, true);
  return null_stream_;
}

std::shared_ptr<Stream> Device::create_stream(bool blocking) {
  auto stream = std::make_shared<Stream>(this, blocking);
  std::lock_guard lock(mutex_);
  streams_.push_back(stream);
  return stream;
}

bool Device::destroy_stream(Stream* stream) {
  std::shared_ptr<Stream> kept;  // outlives the lock, for its end waits for its work
  std::lock_guard lock(mutex_);
  const auto found = std::find_if(streams_.begin(), streams_.end(),
                                  [&](const auto& one) { return one.get() == stream; });
  if (found == streams_.end()) return false;
  kept = *found;
  streams_.erase(found);
  return true;
}

std::shared_ptr<Stream> Device::find_stream(Stream* stream) const {
  std::lock_guard lock(mutex_);
  for (const auto& one : streams_) {
    if (one.get() == stream) return one;
  }
  return nullptr;
}

std::vector<std::shared_ptr<Stream>> Device::streams() const {
  std::lock_guard lock(mutex_);
  auto all = streams_;
  if (null_stream_ != nullptr) all.push_back(null_stream_);
  return all;
}

void Device::wait() {
  for (const auto& stream : streams()) stream->synchronize();
}

void Device::order(Stream* stream) {
  if (!stream->blocking()) return;
  for (const auto& other : streams()) {
    if (other.get() == stream || !other->blocking() || other->idle()) continue;
    bool either_is_null;
    {
      std::lock_guard lock(mutex_);
      either_is_null = other == null_stream_ || stream == null_stream_.get();
    }
    if (either_is_null) stream->submit_wait(other->mark());
  }
}

bool Device::enable_peer(int ordinal) {
  std::lock_guard lock(mutex_);
  return peers_.insert(ordinal).second;
}

}  // namespace gfx942::runtime
