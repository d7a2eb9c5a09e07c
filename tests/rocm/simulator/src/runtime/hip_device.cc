// Devices, contexts and versions.
#include <cstdio>
#include <cstring>

#include "api.h"
#include "graph.h"
#include "memory.h"
#include "settings.h"

using namespace gfx942::runtime;  // NOLINT: the entry points belong to no namespace.

namespace {

// ROCm 7.2.4, which amd-mori 1.2.4 was built for.
constexpr int kVersion = 70253211;

// A context is a device's primary one, and its handle says which.
hipCtx_t context_of(int ordinal) {
  return reinterpret_cast<hipCtx_t>(static_cast<uintptr_t>(ordinal) + 1);
}
int ordinal_of(hipCtx_t context) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(context)) - 1;
}

}  // namespace

extern "C" {

hipError_t hipInit(unsigned int) { return hipSuccess; }

hipError_t hipRuntimeGetVersion(int* version) {
  *version = kVersion;
  return hipSuccess;
}

hipError_t hipDriverGetVersion(int* version) {
  *version = kVersion;
  return hipSuccess;
}

hipError_t hipGetDeviceCount(int* count) {
  *count = device_count();
  return remember(*count == 0 ? hipErrorNoDevice : hipSuccess);
}

hipError_t hipGetDevice(int* ordinal) {
  *ordinal = current_ordinal();
  return hipSuccess;
}

hipError_t hipSetDevice(int ordinal) {
  return remember(set_current_device(ordinal) ? hipSuccess : hipErrorInvalidDevice);
}

hipError_t hipDeviceGet(hipDevice_t* out, int ordinal) {
  if (device(ordinal) == nullptr) return remember(hipErrorInvalidDevice);
  *out = ordinal;
  return hipSuccess;
}

hipError_t hipGetDevicePropertiesR0600(hipDeviceProp_tR0600* properties, int ordinal) {
  if (device(ordinal) == nullptr) return remember(hipErrorInvalidDevice);
  fill_properties(ordinal, properties);
  return hipSuccess;
}

hipError_t hipDeviceGetAttribute(int* value, hipDeviceAttribute_t which, int ordinal) {
  if (device(ordinal) == nullptr) return remember(hipErrorInvalidDevice);
  if (attribute(ordinal, which, value)) return hipSuccess;
  std::fprintf(stderr, "rocm-sim: hipDeviceGetAttribute: the attribute %d is not simulated\n",
               static_cast<int>(which));
  return remember(hipErrorInvalidValue);
}

hipError_t hipDeviceGetName(char* name, int bytes, hipDevice_t ordinal) {
  if (device(ordinal) == nullptr) return remember(hipErrorInvalidDevice);
  hipDeviceProp_tR0600 properties;
  fill_properties(ordinal, &properties);
  std::snprintf(name, static_cast<size_t>(bytes), "%s", properties.name);
  return hipSuccess;
}

hipError_t hipDeviceGetPCIBusId(char* id, int bytes, int ordinal) {
  if (device(ordinal) == nullptr) return remember(hipErrorInvalidDevice);
  std::snprintf(id, static_cast<size_t>(bytes), "0000:%02x:00.0", device(ordinal)->number() + 1);
  return hipSuccess;
}

hipError_t hipDeviceTotalMem(size_t* bytes, hipDevice_t ordinal) {
  if (device(ordinal) == nullptr) return remember(hipErrorInvalidDevice);
  *bytes = settings().memory_bytes;
  return hipSuccess;
}

hipError_t hipMemGetInfo(size_t* free, size_t* total) {
  *total = settings().memory_bytes;
  *free = *total - memory().used(current_ordinal());
  return hipSuccess;
}

hipError_t hipDeviceSynchronize() {
  if (const hipError_t error = check_unsafe_call(); error != hipSuccess) return remember(error);
  current_device().wait();
  return remember(current_device().error());
}

hipError_t hipDeviceCanAccessPeer(int* can, int ordinal, int peer) {
  if (device(ordinal) == nullptr || device(peer) == nullptr) return remember(hipErrorInvalidDevice);
  *can = ordinal != peer;
  return hipSuccess;
}

hipError_t hipDeviceEnablePeerAccess(int peer, unsigned int flags) {
  if (flags != 0) return remember(hipErrorInvalidValue);
  if (device(peer) == nullptr || peer == current_ordinal()) return remember(hipErrorInvalidDevice);
  return remember(current_device().enable_peer(peer) ? hipSuccess
                                                     : hipErrorPeerAccessAlreadyEnabled);
}

hipError_t hipDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = 0;
  return hipSuccess;
}

hipError_t hipDevicePrimaryCtxRetain(hipCtx_t* context, hipDevice_t ordinal) {
  if (device(ordinal) == nullptr) return remember(hipErrorInvalidDevice);
  *context = context_of(ordinal);
  return hipSuccess;
}

hipError_t hipCtxGetDevice(hipDevice_t* ordinal) {
  *ordinal = current_ordinal();
  return hipSuccess;
}

namespace {
thread_local std::vector<int> pushed;
}

hipError_t hipCtxPushCurrent(hipCtx_t context) {
  const int before = current_ordinal();
  if (!set_current_device(ordinal_of(context))) return remember(hipErrorInvalidContext);
  pushed.push_back(before);
  return hipSuccess;
}

hipError_t hipCtxPopCurrent(hipCtx_t* context) {
  if (pushed.empty()) return remember(hipErrorInvalidContext);
  if (context != nullptr) *context = context_of(current_ordinal());
  set_current_device(pushed.back());
  pushed.pop_back();
  return hipSuccess;
}

}  // extern "C"
