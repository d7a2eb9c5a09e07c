#include "operation.h"

#include <cstring>

#include "reduce.h"
#include "transfer.h"

namespace gfx942::collectives {
namespace {

bool is_collective(const Operation& operation) {
  return operation.kind != Kind::kSend && operation.kind != Kind::kReceive;
}

// What the ranks of a call must agree on. The two halves of a transfer agree on its bytes.
Call call_of(const Operation& operation) {
  Call call;
  call.count = operation.count;
  if (!is_collective(operation)) {
    call.kind = static_cast<uint32_t>(Kind::kSend);
    call.count *= size_of(operation.type);
    return call;
  }
  call.kind = static_cast<uint32_t>(operation.kind);
  call.type = static_cast<uint32_t>(operation.type);
  call.reduction = static_cast<uint32_t>(operation.reduction);
  call.root = operation.kind == Kind::kBroadcast ? operation.peer : 0;
  return call;
}

// One collective of one rank.
class Collective {
 public:
  Collective(Communicator& communicator, const Operation& operation)
      : communicator_(communicator),
        operation_(operation),
        call_(call_of(operation)),
        bytes_(operation.count * size_of(operation.type)),
        rank_(communicator.rank()),
        ranks_(communicator.ranks()) {}

  Failure run() {
    if (!is_device_memory(operation_.send, send_bytes()) ||
        !is_device_memory(operation_.receive, receive_bytes())) {
      return {ncclInvalidArgument, std::string(name_of(operation_.kind)) +
                                       ": a buffer must lie in device memory that is alive"};
    }
    switch (operation_.kind) {
      case Kind::kAllReduce:
        return reduce_all(0);
      case Kind::kReduceScatter:
        return reduce_all(bytes_);
      case Kind::kAllGather:
        return gather();
      default:
        return broadcast();
    }
  }

 private:
  size_t all_bytes() const { return bytes_ * static_cast<size_t>(ranks_); }
  size_t send_bytes() const {
    if (operation_.kind == Kind::kBroadcast && operation_.peer != rank_) return 0;
    return operation_.kind == Kind::kReduceScatter ? all_bytes() : bytes_;
  }
  size_t receive_bytes() const {
    return operation_.kind == Kind::kAllGather ? all_bytes() : bytes_;
  }

  const std::byte* sent(int rank, size_t stride) const {
    return static_cast<const std::byte*>(operation_.send) + static_cast<size_t>(rank) * stride;
  }

  Failure move(std::vector<Transfer> transfers) {
    return collectives::move(communicator_, name_of(operation_.kind), std::move(transfers));
  }

  // Every rank adds up in the ranks' order, so that all have the same bits each time. Ranks get the
  // same bytes, or each its own at a stride. Written last, for it may be what peers read.
  Failure reduce_all(size_t stride) {
    std::vector<std::byte> arrived(all_bytes());
    const auto part = [&](int rank) { return arrived.data() + static_cast<size_t>(rank) * bytes_; };
    std::vector<Transfer> transfers;
    for (int peer = 0; peer < ranks_; ++peer) {
      if (peer == rank_) continue;
      transfers.push_back(Transfer::send(call_, peer, sent(peer, stride), bytes_));
      transfers.push_back(Transfer::receive(call_, peer, part(peer), bytes_));
    }
    if (bytes_ != 0) std::memcpy(part(rank_), sent(rank_, stride), bytes_);
    Failure failure = move(std::move(transfers));
    if (failure.code != ncclSuccess || communicator_.aborted() || bytes_ == 0) return failure;
    for (int rank = 1; rank < ranks_; ++rank) {
      reduce(part(0), part(rank), operation_.count, operation_.type, operation_.reduction);
    }
    std::memcpy(operation_.receive, part(0), bytes_);
    return {};
  }

  Failure gather() {
    auto* to = static_cast<std::byte*>(operation_.receive);
    std::vector<Transfer> transfers;
    for (int peer = 0; peer < ranks_; ++peer) {
      std::byte* part = to + static_cast<size_t>(peer) * bytes_;
      if (peer == rank_) {
        if (bytes_ != 0) std::memmove(part, operation_.send, bytes_);
        continue;
      }
      transfers.push_back(Transfer::send(call_, peer, operation_.send, bytes_));
      transfers.push_back(Transfer::receive(call_, peer, part, bytes_));
    }
    return move(std::move(transfers));
  }

  Failure broadcast() {
    if (operation_.peer != rank_) {
      return move({Transfer::receive(call_, operation_.peer, operation_.receive, bytes_)});
    }
    std::vector<Transfer> transfers;
    for (int peer = 0; peer < ranks_; ++peer) {
      if (peer != rank_) {
        transfers.push_back(Transfer::send(call_, peer, operation_.send, bytes_));
      }
    }
    if (bytes_ != 0) std::memmove(operation_.receive, operation_.send, bytes_);
    return move(std::move(transfers));
  }

  Communicator& communicator_;
  const Operation& operation_;
  const Call call_;
  const size_t bytes_;  // of `count` elements
  const int rank_;
  const int ranks_;
};

Failure send_and_receive(Communicator& communicator, const std::vector<Operation>& operations) {
  std::vector<Transfer> transfers;
  for (const Operation& operation : operations) {
    if (is_collective(operation)) continue;
    const Call call = call_of(operation);
    const bool sends = operation.kind == Kind::kSend;
    if (!is_device_memory(sends ? operation.send : operation.receive, call.count)) {
      return {ncclInvalidArgument, std::string(name_of(operation.kind)) +
                                       ": a buffer must lie in device memory that is alive"};
    }
    transfers.push_back(
        sends ? Transfer::send(call, operation.peer, operation.send, call.count)
              : Transfer::receive(call, operation.peer, operation.receive, call.count));
  }
  return move(communicator, "ncclSend or ncclRecv", std::move(transfers));
}

}  // namespace

const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::kAllReduce:
      return "ncclAllReduce";
    case Kind::kReduceScatter:
      return "ncclReduceScatter";
    case Kind::kAllGather:
      return "ncclAllGather";
    case Kind::kBroadcast:
      return "ncclBroadcast";
    case Kind::kSend:
      return "ncclSend";
    case Kind::kReceive:
      return "ncclRecv";
  }
  return "";
}

Failure run(Communicator& communicator, const std::vector<Operation>& operations) {
  for (const Operation& operation : operations) {
    if (!is_collective(operation)) continue;
    const Failure failure = Collective(communicator, operation).run();
    if (failure.code != ncclSuccess || communicator.aborted()) return failure;
  }
  return send_and_receive(communicator, operations);
}

}  // namespace gfx942::collectives
