// Modules, kernels by handle and by host address, launches.
#include <fstream>
#include <iterator>

#include "api.h"
#include "graph.h"
#include "handles.h"
#include "module.h"

using namespace gfx942::runtime;  // NOLINT: the entry points belong to no namespace.
using gfx942::Dim3;

namespace {

constexpr uint32_t kFatBinaryMagic = 0x48495046;
constexpr int kLdsBytes = 65536;
constexpr int kThreadsPerUnit = 2048;

// What the compiler puts into .hipFatBinSegment.
struct FatBinaryWrapper {
  uint32_t magic;
  uint32_t version;
  const void* binary;
  void* unused;
};

struct CallConfiguration {
  dim3 grid;
  dim3 block;
  size_t lds_bytes;
  hipStream_t stream;
};
thread_local std::vector<CallConfiguration> configurations;

Dim3 dimensions(dim3 from) { return {from.x, from.y, from.z}; }

hipError_t load(hipModule_t* out, const void* image, const std::string& name) {
  auto module = Module::load(image, name);
  if (module == nullptr) return remember(hipErrorInvalidImage);
  *out = reinterpret_cast<hipModule_t>(handles<Module>().add(std::move(module)));
  return hipSuccess;
}

hipError_t launch(const void* handle, const Geometry& geometry, hipStream_t stream_handle,
                  void** arguments, void** extra) {
  const auto stream = find_stream(stream_handle);
  if (stream == nullptr) return remember(hipErrorInvalidHandle);
  const auto function = find_function(handle, stream->device().ordinal());
  if (function == nullptr) return remember(hipErrorInvalidDeviceFunction);
  KernelOperation kernel;
  const hipError_t error = make_kernel(*function, geometry, arguments, extra, &kernel);
  return remember(error != hipSuccess ? error : stream->submit(std::move(kernel)));
}

}  // namespace

extern "C" {

hipError_t hipModuleLoad(hipModule_t* out, const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return remember(hipErrorFileNotFound);
  const std::vector<char> image(std::istreambuf_iterator<char>(file), {});
  if (image.size() < 64) return remember(hipErrorInvalidImage);
  return load(out, image.data(), path);
}

hipError_t hipModuleLoadData(hipModule_t* out, const void* image) {
  if (image == nullptr) return remember(hipErrorInvalidValue);
  return load(out, image, "a module in memory");
}

hipError_t hipModuleUnload(hipModule_t module) {
  return remember(handles<Module>().take(module) == nullptr ? hipErrorInvalidHandle : hipSuccess);
}

hipError_t hipModuleGetFunction(hipFunction_t* out, hipModule_t handle, const char* name) {
  const auto module = handles<Module>().find(handle);
  if (module == nullptr) return remember(hipErrorInvalidHandle);
  *out = reinterpret_cast<hipFunction_t>(module->function(name));
  return remember(*out == nullptr ? hipErrorNotFound : hipSuccess);
}

hipError_t hipModuleGetGlobal(hipDeviceptr_t* address, size_t* bytes, hipModule_t handle,
                              const char* name) {
  const auto module = handles<Module>().find(handle);
  if (module == nullptr) return remember(hipErrorInvalidHandle);
  const Variable* variable = module->variable(name);
  if (variable == nullptr) return remember(hipErrorNotFound);
  if (address != nullptr) *address = reinterpret_cast<hipDeviceptr_t>(variable->address);
  if (bytes != nullptr) *bytes = variable->bytes;
  return hipSuccess;
}

hipError_t hipModuleLaunchKernel(hipFunction_t function, unsigned int grid_x, unsigned int grid_y,
                                 unsigned int grid_z, unsigned int block_x, unsigned int block_y,
                                 unsigned int block_z, unsigned int lds_bytes, hipStream_t stream,
                                 void** arguments, void** extra) {
  return launch(function, {{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, lds_bytes},
                stream, arguments, extra);
}

hipError_t hipLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                           size_t lds_bytes, hipStream_t stream) {
  return launch(function, {dimensions(grid), dimensions(block), static_cast<uint32_t>(lds_bytes)},
                stream, arguments, nullptr);
}

hipError_t hipGetFuncBySymbol(hipFunction_t* out, const void* symbol) {
  *out = reinterpret_cast<hipFunction_t>(find_function(symbol, current_ordinal()).get());
  return remember(*out == nullptr ? hipErrorInvalidDeviceFunction : hipSuccess);
}

hipError_t hipFuncGetAttribute(int* value, hipFunction_attribute which, hipFunction_t handle) {
  const auto function = find_function(handle, current_ordinal());
  if (function == nullptr) return remember(hipErrorInvalidDeviceFunction);
  const KernelInfo& info = *function->info;
  switch (which) {
    case HIP_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      *value = static_cast<int>(info.max_workgroup);
      return hipSuccess;
    case HIP_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
      *value = static_cast<int>(info.lds_bytes);
      return hipSuccess;
    case HIP_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
      *value = static_cast<int>(info.scratch_bytes);
      return hipSuccess;
    case HIP_FUNC_ATTRIBUTE_NUM_REGS:
      *value = static_cast<int>(info.vector_registers);
      return hipSuccess;
    case HIP_FUNC_ATTRIBUTE_CONST_SIZE_BYTES:
      *value = 0;
      return hipSuccess;
    case HIP_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
      *value = kLdsBytes - static_cast<int>(info.lds_bytes);
      return hipSuccess;
    default:
      return not_simulated(__func__, "this attribute");
  }
}

hipError_t hipFuncGetAttributes(hipFuncAttributes* out, const void* handle) {
  const auto function = find_function(handle, current_ordinal());
  if (function == nullptr) return remember(hipErrorInvalidDeviceFunction);
  const KernelInfo& info = *function->info;
  *out = {};
  out->maxThreadsPerBlock = static_cast<int>(info.max_workgroup);
  out->sharedSizeBytes = info.lds_bytes;
  out->maxDynamicSharedSizeBytes = kLdsBytes - static_cast<int>(info.lds_bytes);
  out->localSizeBytes = info.scratch_bytes;
  out->numRegs = static_cast<int>(info.vector_registers);
  return hipSuccess;
}

hipError_t hipFuncSetAttribute(const void*, hipFuncAttribute, int value) {
  // All of a compute unit's LDS may be dynamic in any case.
  return remember(value >= 0 && value <= kLdsBytes ? hipSuccess : hipErrorInvalidValue);
}

hipError_t hipModuleOccupancyMaxActiveBlocksPerMultiprocessor(int* count, hipFunction_t handle,
                                                              int block, size_t dynamic_lds) {
  const auto function = find_function(handle, current_ordinal());
  if (function == nullptr) return remember(hipErrorInvalidDeviceFunction);
  if (block <= 0) return remember(hipErrorInvalidValue);
  const auto lds = static_cast<int>(function->info->lds_bytes + dynamic_lds);
  *count = kThreadsPerUnit / block;
  if (lds > 0) *count = std::min(*count, kLdsBytes / lds);
  return hipSuccess;
}

void** __hipRegisterFatBinary(const void* data) {
  const auto* wrapper = static_cast<const FatBinaryWrapper*>(data);
  const void* image = wrapper->magic == kFatBinaryMagic ? wrapper->binary : data;
  return reinterpret_cast<void**>(handles<FatBinary>().add(std::make_shared<FatBinary>(image)));
}

void __hipRegisterFunction(void** handle, const void* host_function, char*, const char* name,
                           unsigned int, void*, void*, void*, void*, int*) {
  register_host_function(host_function, handles<FatBinary>().find(handle), name);
}

// The host's shadow of a variable serves hipMemcpyToSymbol and the like, which are not simulated.
void __hipRegisterVar(void**, void*, char*, char*, int, size_t, int, int) {}

void __hipUnregisterFatBinary(void** handle) {
  if (const auto binary = handles<FatBinary>().take(handle)) forget_fat_binary(binary.get());
}

hipError_t __hipPushCallConfiguration(dim3 grid, dim3 block, size_t lds_bytes, hipStream_t stream) {
  configurations.push_back({grid, block, lds_bytes, stream});
  return hipSuccess;
}

hipError_t __hipPopCallConfiguration(dim3* grid, dim3* block, size_t* lds_bytes,
                                     hipStream_t* stream) {
  if (configurations.empty()) return remember(hipErrorMissingConfiguration);
  const CallConfiguration& last = configurations.back();
  *grid = last.grid;
  *block = last.block;
  *lds_bytes = last.lds_bytes;
  *stream = last.stream;
  configurations.pop_back();
  return hipSuccess;
}

}  // extern "C"
