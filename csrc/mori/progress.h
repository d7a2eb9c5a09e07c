// How far a rank's device is with its steps.
#pragma once

#include <cstdint>

namespace moriep::mori {

// In host memory, where the watchdog looks and the device writes.
struct Progress {
  uint64_t entered;  // the last step in which MORI's kernels were let run
  uint64_t left;     // the last step that is over
  uint64_t barrier;  // what MORI's combine of the step entered waits for in its peers' places
  int32_t kind;      // of the step entered
  int32_t handle;    // whose kernels it runs
};

}  // namespace moriep::mori
