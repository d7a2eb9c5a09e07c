// What the environment sets, read once: ROCM_SIM_* as README.md lists them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../launch.h"

namespace gfx942::runtime {

struct Settings {
  // The simulated devices that this process sees, by their numbers on the simulated machine.
  std::vector<int> devices;
  uint64_t memory_bytes = 0;  // of one device
  // Every piece of a stream's work waits up to this long first, so that a caller that forgets to
  // synchronise is seen to have forgotten.
  uint32_t delay_microseconds = 0;
  bool trace = false;
  std::string count_file;       // empty: nothing is counted
  bool cache_uncached = false;  // uncached memory is ordinary memory
  Options machine;
};

const Settings& settings();

}  // namespace gfx942::runtime
