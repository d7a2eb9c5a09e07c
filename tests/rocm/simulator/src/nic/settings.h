// How the adapter behaves, from the environment, and how it says that it cannot go on.
#pragma once

#include <cstdint>
#include <random>
#include <string>

namespace gfx942::nic {

struct Settings {
  int64_t delay_us;    // ROCM_SIM_NIC_DELAY_US: what each message and each completion may wait
  uint64_t seed;       // ROCM_SIM_SEED
  bool atomics;        // ROCM_SIM_NIC_ATOMICS: 0 makes an adapter of a maker that has none
  int64_t retry_ms;    // ROCM_SIM_NIC_RETRY_MS: how long a peer may be silent; 0: for ever
  int64_t failing_at;  // ROCM_SIM_NIC_FAIL_AT: this process's message that fails, from 1; 0: none
};

const Settings& settings();

// Times to wait, from 0 to the longest, in microseconds. Every queue pair has its own.
class Delays {
 public:
  explicit Delays(uint64_t stream);
  int64_t next();

 private:
  std::mt19937_64 generator_;
  int64_t longest_;
};

// Says on stderr what nobody simulates or what cannot be, and gives an errno.
int refuse(const std::string& what, int error);
[[noreturn]] void give_up(const std::string& what);

}  // namespace gfx942::nic
