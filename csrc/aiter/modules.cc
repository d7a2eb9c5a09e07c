#include "modules.h"

#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace moriep::aiter {
namespace {

struct State {
  std::mutex mutex;
  std::map<std::pair<int32_t, std::string>, hipFunction_t> functions;  // by device and name
};

// Never destroyed: threads of XLA may outlive static destruction. No module is unloaded either, for
// recorded launches name its kernels.
State& state() {
  static State* it = new State();
  return *it;
}

// Makes a device the calling thread's as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(int32_t device) {
    error_ = hipGetDevice(&before_);
    if (error_ == hipSuccess) error_ = hipSetDevice(device);
  }
  ~OnDevice() { (void)hipSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  hipError_t error() const { return error_; }

 private:
  int before_ = 0;
  hipError_t error_ = hipSuccess;
};

}  // namespace

Status load_kernel(int32_t device, std::string_view name, const void* image, const char* symbol) {
  State& here = state();
  const std::lock_guard<std::mutex> lock(here.mutex);
  const std::pair<int32_t, std::string> key(device, name);
  if (here.functions.contains(key)) return Status();
  const OnDevice on_device(device);
  hipModule_t module = nullptr;
  hipFunction_t function = nullptr;
  hipError_t error = on_device.error();
  if (error == hipSuccess) error = hipModuleLoadData(&module, image);
  if (error == hipSuccess) error = hipModuleGetFunction(&function, module, symbol);
  if (error != hipSuccess) {
    (void)hipGetLastError();
    return Status(Code::kFailedPrecondition, "device " + std::to_string(device) +
                                                 " does not load AITER's kernel " + key.second +
                                                 ": " + hipGetErrorString(error));
  }
  here.functions.emplace(key, function);
  return Status();
}

Status find_kernel(int32_t device, std::string_view name, hipFunction_t* function) {
  State& here = state();
  const std::lock_guard<std::mutex> lock(here.mutex);
  const auto found = here.functions.find({device, std::string(name)});
  if (found == here.functions.end()) {
    return Status(Code::kFailedPrecondition,
                  "AITER's kernel " + std::string(name) + " is not loaded on device " +
                      std::to_string(device) +
                      "; call jm.initialize(mesh, ep_axis, cfg=cfg) before running a deserialised "
                      "executable");
  }
  *function = found->second;
  return Status();
}

}  // namespace moriep::aiter
