// Modules and their kernels, and the fat binaries that compilers register with the program.
#pragma once

#include <hip/hip_runtime_api.h>

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "code_object.h"
#include "operation.h"

namespace gfx942::runtime {

// What a hipFunction_t names.
struct Function {
  std::shared_ptr<const CodeObject> code;
  const KernelInfo* info = nullptr;
};

class Module {
 public:
  // `name` is for error texts. Null, with a line on stderr, when the image cannot be loaded.
  static std::shared_ptr<Module> load(const void* image, const std::string& name);
  ~Module();

  // Null when the module has no such kernel. The function lives as long as the module.
  Function* function(const std::string& name);
  const Variable* variable(const std::string& name) const;

 private:
  std::shared_ptr<const CodeObject> code_;
  std::mutex mutex_;
  std::map<std::string, std::shared_ptr<Function>> functions_;
};

// A fat binary of this program. Each device gets its own copy when it first launches from it.
class FatBinary {
 public:
  explicit FatBinary(const void* image) : image_(image) {}
  Function* function(const std::string& name, int device);

 private:
  const void* const image_;
  std::mutex mutex_;
  std::map<int, std::shared_ptr<Module>> modules_;
};

// Connects the address by which host code knows a kernel with the kernel.
void register_host_function(const void* host_function, std::shared_ptr<FatBinary> binary,
                            const std::string& name);
void forget_fat_binary(const FatBinary* binary);
// The kernel by its host address, or by its hipFunction_t; null when it is neither.
std::shared_ptr<Function> find_function(const void* function, int device);

struct Geometry {
  Dim3 num_workgroups;
  Dim3 workgroup_size;
  uint32_t dynamic_lds_bytes = 0;
};

// Checks a launch and packs its arguments, given one by one or as a buffer (HIP_LAUNCH_PARAM_*).
hipError_t make_kernel(const Function& function, const Geometry& geometry, void** arguments,
                       void** extra, KernelOperation* out);

}  // namespace gfx942::runtime
