#include "transfer.h"

#include <cstring>

namespace gfx942::collectives {
namespace {

// Copies from the sender's memory, which is mapped for as long as that takes. False when it is
// gone.
bool fetch(const Post& post, bool same_process, void* to, size_t bytes) {
  if (same_process) {
    std::memmove(to, reinterpret_cast<const void*>(post.address), bytes);
    return true;
  }
  void* from = nullptr;
  if (hipIpcOpenMemHandle(&from, post.handle, hipIpcMemLazyEnablePeerAccess) != hipSuccess) {
    return false;
  }
  std::memcpy(to, from, bytes);
  return hipIpcCloseMemHandle(from) == hipSuccess;
}

}  // namespace

bool is_device_memory(const void* first, size_t bytes) {
  if (bytes == 0) return true;
  hipPointerAttribute_t attributes;
  hipDeviceptr_t begin = nullptr;
  size_t size = 0;
  auto* address = const_cast<void*>(first);
  if (hipPointerGetAttributes(&attributes, first) != hipSuccess ||
      attributes.type != hipMemoryTypeDevice ||
      hipMemGetAddressRange(&begin, &size, address) != hipSuccess) {
    return false;
  }
  const auto offset =
      static_cast<size_t>(static_cast<std::byte*>(address) - static_cast<std::byte*>(begin));
  return bytes <= size - offset;
}

bool Transfer::advance(Communicator& communicator, Failure* failure) {
  if (done_) return true;
  return sends_ ? advance_send(communicator, failure) : advance_receive(communicator, failure);
}

bool Transfer::advance_send(Communicator& communicator, Failure* failure) {
  Mailbox& mailbox = communicator.board().mailbox(communicator.rank(), peer_);
  const uint64_t taken = mailbox.taken.load(std::memory_order_acquire);
  if (number_ != 0) {
    done_ = taken >= number_;
    return true;
  }
  const uint64_t posted = mailbox.posted.load(std::memory_order_relaxed);
  if (posted - taken == Mailbox::kDepth) return false;
  Post& post = mailbox.posts[posted % Mailbox::kDepth];
  post.call = call_;
  post.address = reinterpret_cast<uint64_t>(buffer_);
  if (bytes_ != 0 && !communicator.shares_process(peer_) &&
      hipIpcGetMemHandle(&post.handle, buffer_) != hipSuccess) {
    *failure = {ncclInvalidArgument, "what is sent must be in memory of hipMalloc"};
    return false;
  }
  number_ = posted + 1;
  mailbox.posted.store(number_, std::memory_order_release);
  communicator.board().ring();
  return true;
}

bool Transfer::advance_receive(Communicator& communicator, Failure* failure) {
  Mailbox& mailbox = communicator.board().mailbox(peer_, communicator.rank());
  const uint64_t taken = mailbox.taken.load(std::memory_order_relaxed);
  if (mailbox.posted.load(std::memory_order_acquire) == taken) return false;
  const Post& post = mailbox.posts[taken % Mailbox::kDepth];
  if (post.call != call_) {
    *failure = {ncclInvalidUsage,
                "rank " + std::to_string(communicator.rank()) + " and rank " +
                    std::to_string(peer_) +
                    " do not make the same call, of the same size, type and root"};
    return false;
  }
  // A process that ends closes its memory first, and hipFree waits for streams: it has not ended
  // yet and will have.
  if (bytes_ != 0 && !fetch(post, communicator.shares_process(peer_), buffer_, bytes_)) {
    return false;
  }
  mailbox.taken.store(taken + 1, std::memory_order_release);
  communicator.board().ring();
  done_ = true;
  return true;
}

Failure move(Communicator& communicator, const std::string& call, std::vector<Transfer> transfers) {
  const auto missing = [&] {
    std::set<int> peers;
    for (const Transfer& one : transfers) {
      if (!one.done()) peers.insert(one.peer());
    }
    return peers;
  };
  const auto advance = [&](Failure* failure) {
    std::vector<bool> blocked[2];
    for (auto& one : blocked) one.resize(static_cast<size_t>(communicator.ranks()));
    for (Transfer& transfer : transfers) {
      auto is_blocked = blocked[transfer.sends()][static_cast<size_t>(transfer.peer())];
      if (!is_blocked) is_blocked = !transfer.advance(communicator, failure);
      if (failure->code != ncclSuccess) return false;
    }
    return missing().empty();
  };
  return communicator.wait(call, advance, missing);
}

}  // namespace gfx942::collectives
