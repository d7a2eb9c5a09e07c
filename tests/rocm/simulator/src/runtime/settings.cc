#include "settings.h"

#include <algorithm>
#include <cstdlib>
#include <sstream>
#include <string>

namespace gfx942::runtime {
namespace {

double number(const char* name, double otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr || *text == '\0' ? otherwise : std::strtod(text, nullptr);
}

// HIP_VISIBLE_DEVICES is a list of ordinals that ends at the first one that does not exist.
std::vector<int> visible_devices(int count) {
  std::vector<int> devices;
  const char* text = std::getenv("HIP_VISIBLE_DEVICES");
  if (text == nullptr) {
    for (int i = 0; i < count; ++i) devices.push_back(i);
    return devices;
  }
  std::istringstream list(text);
  for (std::string item; std::getline(list, item, ',');) {
    char* end = nullptr;
    const long device = std::strtol(item.c_str(), &end, 10);
    if (end == item.c_str() || device < 0 || device >= count) break;
    devices.push_back(static_cast<int>(device));
  }
  return devices;
}

Settings read() {
  Settings settings;
  settings.devices = visible_devices(static_cast<int>(number("ROCM_SIM_DEVICES", 1)));
  settings.memory_bytes = static_cast<uint64_t>(number("ROCM_SIM_MEMORY_GIB", 16)) << 30;
  settings.delay_microseconds = static_cast<uint32_t>(number("ROCM_SIM_DELAY_US", 100));
  settings.trace = number("ROCM_SIM_TRACE", 0) != 0;
  if (const char* file = std::getenv("ROCM_SIM_COUNT")) settings.count_file = file;
  settings.cache_uncached = number("ROCM_SIM_CACHE_UNCACHED", 0) != 0;
  Options& machine = settings.machine;
  machine.deadline_seconds = number("ROCM_SIM_DEADLINE", machine.deadline_seconds);
  machine.adversarial_memory = number("ROCM_SIM_ADVERSARIAL_MEMORY", 0) != 0;
  machine.check_uninitialised = number("ROCM_SIM_CHECK_UNINITIALISED", 0) != 0;
  machine.check_barriers = number("ROCM_SIM_CHECK_BARRIERS", 0) != 0;
  machine.check_races = number("ROCM_SIM_CHECK_RACES", 0) != 0;
  machine.longest_turn =
      std::max(1U, static_cast<uint32_t>(number("ROCM_SIM_TURN", machine.longest_turn)));
  machine.seed = static_cast<uint64_t>(number("ROCM_SIM_SEED", 0));
  return settings;
}

}  // namespace

const Settings& settings() {
  static const Settings* const kSettings = new Settings(read());
  return *kSettings;
}

}  // namespace gfx942::runtime
