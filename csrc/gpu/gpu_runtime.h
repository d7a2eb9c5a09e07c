// The names of HIP and CUDA under one roof, and the few device operations that the two spell
// differently. Everything else in this folder is written once.
#pragma once

#include <cstdint>

#if defined(__HIP__) || defined(__HIP_PLATFORM_AMD__)
#include <hip/hip_runtime.h>

using gpuError_t = hipError_t;
using gpuStream_t = hipStream_t;
using gpuIpcHandle_t = hipIpcMemHandle_t;
#define gpuSuccess hipSuccess
#define gpuErrorPeerAccessAlreadyEnabled hipErrorPeerAccessAlreadyEnabled
#define gpuGetErrorString hipGetErrorString
#define gpuGetLastError hipGetLastError
#define gpuGetDevice hipGetDevice
#define gpuSetDevice hipSetDevice
#define gpuFree hipFree
#define gpuMemset hipMemset
#define gpuMemcpy hipMemcpy
#define gpuMemcpyDefault hipMemcpyDefault
#define gpuMemsetAsync hipMemsetAsync
#define gpuDeviceSynchronize hipDeviceSynchronize
#define gpuDeviceCanAccessPeer hipDeviceCanAccessPeer
#define gpuDeviceEnablePeerAccess hipDeviceEnablePeerAccess
#define gpuDeviceGetAttribute hipDeviceGetAttribute
#define gpuDevAttrMultiProcessorCount hipDeviceAttributeMultiprocessorCount
#define gpuHostAlloc hipHostMalloc
#define gpuHostAllocMapped hipHostMallocMapped
#define gpuHostAllocPortable hipHostMallocPortable
#define gpuHostGetDevicePointer hipHostGetDevicePointer
#define gpuIpcGetMemHandle hipIpcGetMemHandle
#define gpuIpcOpenMemHandle hipIpcOpenMemHandle
#define gpuIpcLazyPeerAccess hipIpcMemLazyEnablePeerAccess
#define gpuFuncAttributes hipFuncAttributes
#define gpuFuncGetAttributes hipFuncGetAttributes
#define MORIEP_KERNEL_ARGUMENT
// Peers poll and read an arena while its owner writes it: on AMD only uncached memory promises
// that.
inline gpuError_t gpu_malloc_shared(void** data, size_t bytes) {
  return hipExtMallocWithFlags(data, bytes, hipDeviceMallocUncached);
}
// Blocks of a kernel that a processor holds at once: on the MI300 series four vector units, each
// with 512 registers a lane and room for eight waves.
inline gpuError_t gpu_resident_blocks(int* blocks, const void* kernel, int threads) {
  hipFuncAttributes found;
  const gpuError_t error = hipFuncGetAttributes(&found, kernel);
  if (error != hipSuccess) return error;
  const int registers = (found.numRegs + 7) / 8 * 8;
  const int waves = registers > 64 ? 512 / registers : 8;
  *blocks = waves * 4 * 64 / threads;
  return hipSuccess;
}
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>

using gpuError_t = cudaError_t;
using gpuStream_t = cudaStream_t;
using gpuIpcHandle_t = cudaIpcMemHandle_t;
#define gpuSuccess cudaSuccess
#define gpuErrorPeerAccessAlreadyEnabled cudaErrorPeerAccessAlreadyEnabled
#define gpuGetErrorString cudaGetErrorString
#define gpuGetLastError cudaGetLastError
#define gpuGetDevice cudaGetDevice
#define gpuSetDevice cudaSetDevice
#define gpuFree cudaFree
#define gpuMemset cudaMemset
#define gpuMemcpy cudaMemcpy
#define gpuMemcpyDefault cudaMemcpyDefault
#define gpuMemsetAsync cudaMemsetAsync
#define gpuDeviceSynchronize cudaDeviceSynchronize
#define gpuDeviceCanAccessPeer cudaDeviceCanAccessPeer
#define gpuDeviceEnablePeerAccess cudaDeviceEnablePeerAccess
#define gpuDeviceGetAttribute cudaDeviceGetAttribute
#define gpuDevAttrMultiProcessorCount cudaDevAttrMultiProcessorCount
#define gpuHostAlloc cudaHostAlloc
#define gpuHostAllocMapped cudaHostAllocMapped
#define gpuHostAllocPortable cudaHostAllocPortable
#define gpuHostGetDevicePointer cudaHostGetDevicePointer
#define gpuIpcGetMemHandle cudaIpcGetMemHandle
#define gpuIpcOpenMemHandle cudaIpcOpenMemHandle
#define gpuIpcLazyPeerAccess cudaIpcMemLazyEnablePeerAccess
#define gpuFuncAttributes cudaFuncAttributes
#define gpuFuncGetAttributes cudaFuncGetAttributes
// A kernel's argument is read where it lies, also by reference.
#define MORIEP_KERNEL_ARGUMENT __grid_constant__
inline gpuError_t gpu_malloc_shared(void** data, size_t bytes) { return cudaMalloc(data, bytes); }
// Blocks of a kernel that a processor holds at once.
inline gpuError_t gpu_resident_blocks(int* blocks, const void* kernel, int threads) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, 0);
}
#endif

namespace moriep::gpu {

#if defined(__HIP__) || defined(__HIP_PLATFORM_AMD__)

inline constexpr int kWave = 64;

#if defined(__HIP_DEVICE_COMPILE__)
// A workgroup barrier does not wait for the stores of the other waves, so each wave waits for its
// own.
__device__ inline void drain_stores() { asm volatile("s_waitcnt vmcnt(0)" ::: "memory"); }
#else
__device__ inline void drain_stores() {}
#endif
__device__ inline void fence_system() { __threadfence_system(); }
__device__ inline uint64_t load_acquire_system(const uint64_t* at) {
  return __hip_atomic_load(at, __ATOMIC_ACQUIRE, __HIP_MEMORY_SCOPE_SYSTEM);
}
__device__ inline void store_release_system(uint64_t* at, uint64_t value) {
  __hip_atomic_store(at, value, __ATOMIC_RELEASE, __HIP_MEMORY_SCOPE_SYSTEM);
}
__device__ inline uint64_t ballot(bool bit) { return __ballot(bit); }
__device__ inline int32_t from_lane(int32_t value, int lane) { return __shfl(value, lane); }
__device__ inline int32_t from_below(int32_t value, int lanes) { return __shfl_up(value, lanes); }
__device__ inline int count_bits(uint64_t bits) { return __popcll(bits); }
// A value that is the same in all lanes of a wave, which the compiler cannot see.
__device__ inline int32_t uniform(int32_t value) { return __builtin_amdgcn_readfirstlane(value); }
// What all lanes of a wave read at one address, and nobody writes while the kernel runs: the scalar
// unit reads it once, where each lane would ask for it by itself.
template <typename T>
__device__ inline T load_uniform(const T* at) {
  return *(const __attribute__((address_space(4))) T*)at;
}
// wall_clock64 ticks at 100 MHz on the MI300 series.
__device__ inline uint64_t nanoseconds() { return static_cast<uint64_t>(wall_clock64()) * 10; }
__device__ inline void pause() { __builtin_amdgcn_s_sleep(2); }
__device__ inline float half_to_float(uint16_t bits) {
  return static_cast<float>(__builtin_bit_cast(_Float16, bits));
}
__device__ inline uint16_t float_to_half(float value) {
  return __builtin_bit_cast(uint16_t, static_cast<_Float16>(value));
}
template <typename Word>
__device__ inline void store_streamed(Word* at, Word value) {
  *at = value;
}

#else

inline constexpr int kWave = 32;

__device__ inline void drain_stores() {}
__device__ inline void fence_system() { __threadfence_system(); }
__device__ inline uint64_t load_acquire_system(const uint64_t* at) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
}
__device__ inline void store_release_system(uint64_t* at, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}
__device__ inline uint64_t ballot(bool bit) { return __ballot_sync(0xffffffffu, bit); }
__device__ inline int32_t from_lane(int32_t value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
__device__ inline int32_t from_below(int32_t value, int lanes) {
  return __shfl_up_sync(0xffffffffu, value, lanes);
}
__device__ inline int count_bits(uint64_t bits) { return __popcll(bits); }
// There are no scalar registers to gain, and lanes that read one address make one request.
__device__ inline int32_t uniform(int32_t value) { return value; }
template <typename T>
__device__ inline T load_uniform(const T* at) {
  return *at;
}
__device__ inline uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}
__device__ inline void pause() { __nanosleep(100); }
__device__ inline float half_to_float(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
__device__ inline uint16_t float_to_half(float value) {
  return __half_as_ushort(__float2half_rn(value));
}
// Results are read by another kernel, later: they need not push out what this one still reads.
template <typename Word>
__device__ inline void store_streamed(Word* at, Word value) {
  __stcs(at, value);
}

#endif

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % kWave; }
__device__ inline uint64_t lanes_below(int lane) { return (uint64_t{1} << lane) - 1; }

}  // namespace moriep::gpu
