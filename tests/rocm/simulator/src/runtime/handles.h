// Objects that callers hold by address. A call with an address that is no longer one of these gets
// an error and not a crash.
#pragma once

#include <memory>
#include <mutex>
#include <unordered_map>

namespace gfx942::runtime {

template <typename T>
class Handles {
 public:
  T* add(std::shared_ptr<T> object) {
    std::lock_guard lock(mutex_);
    T* handle = object.get();
    objects_[handle] = std::move(object);
    return handle;
  }

  std::shared_ptr<T> find(const void* handle) const {
    std::lock_guard lock(mutex_);
    const auto found = objects_.find(handle);
    return found == objects_.end() ? nullptr : found->second;
  }

  // Null when it is unknown; otherwise the last reference that the table held.
  std::shared_ptr<T> take(const void* handle) {
    std::lock_guard lock(mutex_);
    auto node = objects_.extract(handle);
    return node.empty() ? nullptr : std::move(node.mapped());
  }

 private:
  mutable std::mutex mutex_;
  std::unordered_map<const void*, std::shared_ptr<T>> objects_;
};

// The one table of a kind of object. Never destroyed, as streams' threads are not either.
template <typename T>
Handles<T>& handles() {
  static auto* const kHandles = new Handles<T>();
  return *kHandles;
}

}  // namespace gfx942::runtime
