#include "settings.h"

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>

namespace gfx942::nic {
namespace {

int64_t number_from(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  if (text == nullptr) return otherwise;
  char* end = nullptr;
  errno = 0;
  const int64_t value = std::strtoll(text, &end, 10);
  if (end == text || *end != '\0' || errno != 0 || value < 0) {
    give_up(std::string(name) + "=" + text + " must be a whole number, and not negative");
  }
  return value;
}

}  // namespace

const Settings& settings() {
  static const Settings kSettings{
      .delay_us = number_from("ROCM_SIM_NIC_DELAY_US", 200),
      .seed = static_cast<uint64_t>(number_from("ROCM_SIM_SEED", 0)),
      .atomics = number_from("ROCM_SIM_NIC_ATOMICS", 1) != 0,
      .retry_ms = number_from("ROCM_SIM_NIC_RETRY_MS", 2000),
      .failing_at = number_from("ROCM_SIM_NIC_FAIL_AT", 0),
  };
  return kSettings;
}

Delays::Delays(uint64_t stream)
    : generator_(settings().seed * 0x9e3779b97f4a7c15 + stream), longest_(settings().delay_us) {}

int64_t Delays::next() {
  return longest_ == 0 ? 0
                       : static_cast<int64_t>(generator_() % (static_cast<uint64_t>(longest_) + 1));
}

int refuse(const std::string& what, int error) {
  std::fprintf(stderr, "rocm-sim: [%d] the network adapter: %s\n", static_cast<int>(getpid()),
               what.c_str());
  errno = error;
  return error;
}

void give_up(const std::string& what) {
  refuse(what, EINVAL);
  std::_Exit(1);
}

}  // namespace gfx942::nic
