// One kernel for each thing that the runtime hands to kernels or must notice.
#include <hip/hip_runtime.h>

__device__ int counter = 5;
extern __device__ const int table[4];  // visible, which a constant is not by itself
__device__ const int table[4] = {10, 20, 30, 40};
__device__ const int* table_pointer = table;  // needs a relocation

extern "C" __global__ void geometry(int* out) {
  if (threadIdx.x + threadIdx.y + threadIdx.z != 0) return;
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  int* to = out + 6 * block;
  to[0] = gridDim.x;
  to[1] = gridDim.y;
  to[2] = gridDim.z;
  to[3] = blockDim.x;
  to[4] = blockDim.y;
  to[5] = blockDim.z;
}

// Arguments of several sizes and alignments.
extern "C" __global__ void arguments(char a, double b, short c, float d, long long* out) {
  out[0] = a;
  out[1] = static_cast<long long>(b * 2);
  out[2] = c;
  out[3] = static_cast<long long>(d * 2);
}

// Reverses each workgroup's items through dynamic LDS.
extern "C" __global__ void reverse(const int* in, int* out) {
  extern __shared__ int shared[];
  const unsigned base = blockIdx.x * blockDim.x;
  shared[threadIdx.x] = in[base + threadIdx.x];
  __syncthreads();
  out[base + threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

// The array is too large for registers and indexed by data, so that it lies in scratch.
extern "C" __global__ void scratch(const int* index, int* out) {
  int values[64];
  for (int i = 0; i < 64; ++i) values[i] = i * i + threadIdx.x;
  out[threadIdx.x] = values[index[threadIdx.x]];
}

extern "C" __global__ void count(int* out) {
  atomicAdd(&counter, 1);
  if (threadIdx.x < 4) out[threadIdx.x] = table_pointer[threadIdx.x];
}

extern "C" __global__ void store(int* to, int value) { *to = value; }

extern "C" __global__ void wait_for(int* flag, int* out) {
  while (__hip_atomic_load(flag, __ATOMIC_ACQUIRE, __HIP_MEMORY_SCOPE_SYSTEM) == 0) {
    __builtin_amdgcn_s_sleep(1);
  }
  *out = 1;
}

extern "C" __global__ void signal(int* flag) {
  __hip_atomic_store(flag, 1, __ATOMIC_RELEASE, __HIP_MEMORY_SCOPE_SYSTEM);
}
