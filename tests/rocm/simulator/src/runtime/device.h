// A simulated MI300X as one process sees it.
#pragma once

#include <hip/hip_runtime_api.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "stream.h"

namespace gfx942::runtime {

class Device {
 public:
  Device(int ordinal, int number) : ordinal_(ordinal), number_(number) {}

  int ordinal() const { return ordinal_; }  // in this process
  int number() const { return number_; }    // on the simulated machine

  // The first failure stays: nothing that was queued after it means anything.
  hipError_t error() const { return error_.load(); }
  void fail(hipError_t error);

  std::shared_ptr<Stream> null_stream();
  std::shared_ptr<Stream> create_stream(bool blocking);
  // Waits for the stream's work and forgets the stream.
  bool destroy_stream(Stream* stream);
  std::shared_ptr<Stream> find_stream(Stream* stream) const;
  // Until everything queued so far has ended, well or not.
  void wait();

  // Called before work is queued: blocking streams and the null stream wait for each other.
  void order(Stream* stream);

  // False when it was enabled before.
  bool enable_peer(int ordinal);

 private:
  std::vector<std::shared_ptr<Stream>> streams() const;

  const int ordinal_;
  const int number_;
  std::atomic<hipError_t> error_{hipSuccess};
  mutable std::mutex mutex_;
  std::shared_ptr<Stream> null_stream_;
  std::vector<std::shared_ptr<Stream>> streams_;
  std::set<int> peers_;
};

int device_count();
// Null unless the ordinal is one of the device_count().
Device* device(int ordinal);

// The calling thread's device.
int current_ordinal();
Device& current_device();
bool set_current_device(int ordinal);

void fill_properties(int ordinal, hipDeviceProp_tR0600* properties);
// False for an attribute that the simulator does not know.
bool attribute(int ordinal, hipDeviceAttribute_t which, int* value);

}  // namespace gfx942::runtime
