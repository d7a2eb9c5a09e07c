// What a rank does when its stream gets there.
#pragma once

#include <string>
#include <vector>

#include "communicator.h"

namespace gfx942::collectives {

enum class Kind : uint32_t { kAllReduce, kReduceScatter, kAllGather, kBroadcast, kSend, kReceive };

struct Operation {
  Kind kind = Kind::kSend;
  const void* send = nullptr;
  void* receive = nullptr;
  size_t count = 0;  // of elements, as the call has it
  ncclDataType_t type = ncclUint8;
  ncclRedOp_t reduction = ncclSum;
  int peer = 0;  // of kSend and kReceive, and the root of kBroadcast
};

const char* name_of(Kind kind);

// Runs what one group of calls asked of a rank: its collectives in their order, then all that it
// sends and receives at once. Blocks until its peers have what it sends.
Failure run(Communicator& communicator, const std::vector<Operation>& operations);

}  // namespace gfx942::collectives
