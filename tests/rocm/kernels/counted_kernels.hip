// Kernels whose instructions and bytes are known: none but `loop` has a branch.
#include <hip/hip_runtime.h>

using Floats = __attribute__((ext_vector_type(4))) float;

__device__ unsigned item() { return blockIdx.x * blockDim.x + threadIdx.x; }

extern "C" __global__ void copy_rows(const Floats* from, Floats* to) { to[item()] = from[item()]; }

// Each lane four bytes, of a line that no other lane reads.
extern "C" __global__ void read_far(const int* from, int* to) { to[item()] = from[16 * item()]; }

extern "C" __global__ void add(int* to) {
  __hip_atomic_fetch_add(to + item(), 1, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}

// An instruction of every kind but a branch.
extern "C" __global__ void mixed(const float* from, Floats* to, int* counts) {
  __shared__ float shared[64];
  shared[threadIdx.x] = from[threadIdx.x];
  __syncthreads();
  const float x = shared[63 - threadIdx.x];
  const Floats sum = __builtin_amdgcn_mfma_f32_4x4x1f32(x, x, Floats{0, 0, 0, 0}, 0, 0, 0);
  to[threadIdx.x] = sum;
  __hip_atomic_fetch_add(counts + threadIdx.x, 1, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
  __threadfence_system();
}

// Two vector instructions, three scalar ones and a branch for each round.
extern "C" __global__ void loop(int rounds, int* to) {
  int value = threadIdx.x;
  asm volatile(
      "1:\n"
      "v_add_u32 %0, %0, 1\n"
      "v_add_u32 %0, %0, 2\n"
      "s_nop 0\n"
      "s_sub_u32 %1, %1, 1\n"
      "s_cmp_lg_u32 %1, 0\n"
      "s_cbranch_scc1 1b\n"
      : "+v"(value), "+s"(rounds)
      :
      : "scc");
  to[threadIdx.x] = value;
}
