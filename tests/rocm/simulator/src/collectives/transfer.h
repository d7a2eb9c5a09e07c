// Bytes on their way from one rank's device memory to another's.
#pragma once

#include <string>
#include <vector>

#include "communicator.h"

namespace gfx942::collectives {

// Whether all of a range is device memory of this process that is alive.
bool is_device_memory(const void* first, size_t bytes);

// One rank's half of a transfer: the sender posts where the bytes lie, the receiver fetches them.
class Transfer {
 public:
  static Transfer send(const Call& call, int peer, const void* from, size_t bytes) {
    return {true, call, peer, const_cast<void*>(from), bytes};
  }
  static Transfer receive(const Call& call, int peer, void* to, size_t bytes) {
    return {false, call, peer, to, bytes};
  }

  bool sends() const { return sends_; }
  int peer() const { return peer_; }
  // A sender is done when the receiver is.
  bool done() const { return done_; }
  // Goes on as far as it gets without waiting. False as long as a later one of the same direction
  // and peer must not come before it.
  bool advance(Communicator& communicator, Failure* failure);

 private:
  Transfer(bool sends, const Call& call, int peer, void* buffer, size_t bytes)
      : sends_(sends), call_(call), peer_(peer), buffer_(buffer), bytes_(bytes) {}

  bool advance_send(Communicator& communicator, Failure* failure);
  bool advance_receive(Communicator& communicator, Failure* failure);

  bool sends_;
  Call call_;
  int peer_;
  void* buffer_;
  size_t bytes_;
  uint64_t number_ = 0;  // of the sender's post, from 1
  bool done_ = false;
};

// Moves all of them; blocks.
Failure move(Communicator& communicator, const std::string& call, std::vector<Transfer> transfers);

}  // namespace gfx942::collectives
