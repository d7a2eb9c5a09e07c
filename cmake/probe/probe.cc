#ifdef __HIP__
#include <hip/hip_runtime.h>
#else
#include <cuda_runtime.h>
#endif

template <typename T>
concept Number = requires(T x) { x + x; };

template <Number T>
__global__ void Twice(T* x) { x[threadIdx.x] += x[threadIdx.x]; }

extern "C" void MoriepProbe(float* x) { Twice<<<1, 32>>>(x); }
