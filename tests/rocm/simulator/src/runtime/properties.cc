// What a simulated device says of itself: an MI300X's public figures, except for the memory, of
// which the environment says how much there is.
#include <cstdio>
#include <cstring>

#include "device.h"
#include "settings.h"

namespace gfx942::runtime {
namespace {

constexpr int kComputeUnits = 304;
constexpr int kWave = 64;
constexpr int kMaxWorkgroup = 1024;
constexpr int kLdsBytes = 65536;
constexpr int kRegisters = 65536;
constexpr int kMaxGrid = 2147483647;
constexpr int kMaxGridYz = 65536;
constexpr int kThreadsPerUnit = 2048;
constexpr int kWorkgroupsPerUnit = 32;
constexpr int kClockKhz = 2100000;
constexpr int kWallClockKhz = 100000;
constexpr int kMemoryClockKhz = 1300000;
constexpr int kMemoryBusBits = 8192;
constexpr int kL2Bytes = 4 << 20;

}  // namespace

void fill_properties(int ordinal, hipDeviceProp_tR0600* out) {
  std::memset(out, 0, sizeof(*out));
  std::snprintf(out->name, sizeof(out->name), "Simulated AMD Instinct MI300X");
  std::snprintf(out->gcnArchName, sizeof(out->gcnArchName), "gfx942:sramecc+:xnack-");
  const int number = device(ordinal)->number();
  std::snprintf(out->uuid.bytes, sizeof(out->uuid.bytes), "simulated%d", number);
  out->pciBusID = number + 1;
  out->totalGlobalMem = settings().memory_bytes;
  out->totalConstMem = kMaxGrid;
  out->sharedMemPerBlock = kLdsBytes;
  out->sharedMemPerMultiprocessor = kLdsBytes;
  out->maxSharedMemoryPerMultiProcessor = kLdsBytes;
  out->sharedMemPerBlockOptin = kLdsBytes;
  out->regsPerBlock = kRegisters;
  out->regsPerMultiprocessor = kRegisters;
  out->warpSize = kWave;
  out->maxThreadsPerBlock = kMaxWorkgroup;
  for (int& limit : out->maxThreadsDim) limit = kMaxWorkgroup;
  out->maxGridSize[0] = kMaxGrid;
  out->maxGridSize[1] = kMaxGridYz;
  out->maxGridSize[2] = kMaxGridYz;
  out->clockRate = kClockKhz;
  out->clockInstructionRate = kWallClockKhz;
  out->memoryClockRate = kMemoryClockKhz;
  out->memoryBusWidth = kMemoryBusBits;
  out->major = 9;
  out->minor = 4;
  out->multiProcessorCount = kComputeUnits;
  out->l2CacheSize = kL2Bytes;
  out->maxThreadsPerMultiProcessor = kThreadsPerUnit;
  out->maxBlocksPerMultiProcessor = kWorkgroupsPerUnit;
  out->canMapHostMemory = 1;
  out->unifiedAddressing = 1;
  out->concurrentKernels = 1;
  out->asyncEngineCount = 2;
  out->cooperativeLaunch = 1;
  out->isLargeBar = 1;
  out->ECCEnabled = 1;
  out->arch.hasGlobalInt32Atomics = 1;
  out->arch.hasGlobalFloatAtomicExch = 1;
  out->arch.hasSharedInt32Atomics = 1;
  out->arch.hasFloatAtomicAdd = 1;
  out->arch.hasGlobalInt64Atomics = 1;
  out->arch.hasDoubles = 1;
  out->arch.hasWarpVote = 1;
  out->arch.hasWarpBallot = 1;
  out->arch.hasWarpShuffle = 1;
  out->arch.hasThreadFenceSystem = 1;
}

bool attribute(int ordinal, hipDeviceAttribute_t which, int* value) {
  hipDeviceProp_tR0600 is;
  fill_properties(ordinal, &is);
  switch (which) {
    case hipDeviceAttributeEccEnabled:
      *value = is.ECCEnabled;
      return true;
    case hipDeviceAttributeCanMapHostMemory:
    case hipDeviceAttributeUnifiedAddressing:
    case hipDeviceAttributeConcurrentKernels:
    case hipDeviceAttributeCooperativeLaunch:
    case hipDeviceAttributeIsLargeBar:
    case hipDeviceAttributeFineGrainSupport:
      *value = 1;
      return true;
    case hipDeviceAttributeManagedMemory:
    case hipDeviceAttributePageableMemoryAccess:
    case hipDeviceAttributeConcurrentManagedAccess:
    case hipDeviceAttributeVirtualMemoryManagementSupported:
    case hipDeviceAttributeMemoryPoolsSupported:
    case hipDeviceAttributeIntegrated:
    case hipDeviceAttributeComputeMode:
    case hipDeviceAttributePciDomainId:
    case hipDeviceAttributePciDeviceId:
      *value = 0;
      return true;
    case hipDeviceAttributePciBusId:
      *value = is.pciBusID;
      return true;
    case hipDeviceAttributeClockRate:
      *value = is.clockRate;
      return true;
    case hipDeviceAttributeWallClockRate:
      *value = kWallClockKhz;
      return true;
    case hipDeviceAttributeMemoryClockRate:
      *value = is.memoryClockRate;
      return true;
    case hipDeviceAttributeMemoryBusWidth:
      *value = is.memoryBusWidth;
      return true;
    case hipDeviceAttributeComputeCapabilityMajor:
      *value = is.major;
      return true;
    case hipDeviceAttributeComputeCapabilityMinor:
      *value = is.minor;
      return true;
    case hipDeviceAttributeMultiprocessorCount:
      *value = is.multiProcessorCount;
      return true;
    case hipDeviceAttributeWarpSize:
      *value = is.warpSize;
      return true;
    case hipDeviceAttributeL2CacheSize:
      *value = is.l2CacheSize;
      return true;
    case hipDeviceAttributeMaxThreadsPerBlock:
    case hipDeviceAttributeMaxBlockDimX:
    case hipDeviceAttributeMaxBlockDimY:
    case hipDeviceAttributeMaxBlockDimZ:
      *value = is.maxThreadsPerBlock;
      return true;
    case hipDeviceAttributeMaxGridDimX:
      *value = is.maxGridSize[0];
      return true;
    case hipDeviceAttributeMaxGridDimY:
    case hipDeviceAttributeMaxGridDimZ:
      *value = is.maxGridSize[1];
      return true;
    case hipDeviceAttributeMaxThreadsPerMultiProcessor:
      *value = is.maxThreadsPerMultiProcessor;
      return true;
    case hipDeviceAttributeMaxBlocksPerMultiProcessor:
      *value = is.maxBlocksPerMultiProcessor;
      return true;
    case hipDeviceAttributeMaxRegistersPerBlock:
    case hipDeviceAttributeMaxRegistersPerMultiprocessor:
      *value = is.regsPerBlock;
      return true;
    case hipDeviceAttributeMaxSharedMemoryPerBlock:
    case hipDeviceAttributeMaxSharedMemoryPerMultiprocessor:
    case hipDeviceAttributeSharedMemPerBlockOptin:
    case hipDeviceAttributeSharedMemPerMultiprocessor:
      *value = kLdsBytes;
      return true;
    default:
      return false;
  }
}

}  // namespace gfx942::runtime
