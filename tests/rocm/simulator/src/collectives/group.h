// Calls between ncclGroupStart and ncclGroupEnd: what needs others waits until all of them are
// made.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "operation.h"

namespace gfx942::collectives {

// What a rank must wait for before its call is done, on the caller's thread.
struct Setup {
  std::string call;  // for error texts
  // Goes on as far as it gets without waiting; true when it is done.
  std::function<bool(Failure*)> advance;
};

ncclResult_t start_group();
ncclResult_t end_group();

// At the end of the group, or at once when there is none.
ncclResult_t add(Setup setup);
ncclResult_t add(std::shared_ptr<Communicator> communicator, hipStream_t stream,
                 const Operation& operation);

}  // namespace gfx942::collectives
