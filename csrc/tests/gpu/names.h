// What the tests use of HIP and CUDA beyond what the library does.
#pragma once

#include "gpu/gpu_runtime.h"

#if defined(__HIP__) || defined(__HIP_PLATFORM_AMD__)
#define gpuEventCreate hipEventCreate
#define gpuEventElapsedTime hipEventElapsedTime
#define gpuEventRecord hipEventRecord
#define gpuEventSynchronize hipEventSynchronize
using gpuEvent_t = hipEvent_t;
#define gpuGraphDestroy hipGraphDestroy
#define gpuGraphExecDestroy hipGraphExecDestroy
using gpuGraphExec_t = hipGraphExec_t;
#define gpuGraphInstantiate hipGraphInstantiateWithFlags
#define gpuGraphLaunch hipGraphLaunch
using gpuGraph_t = hipGraph_t;
#define gpuMalloc hipMalloc
#define gpuMemcpyAsync hipMemcpyAsync
#define gpuMemcpyDeviceToDevice hipMemcpyDeviceToDevice
#define gpuStreamBeginCapture hipStreamBeginCapture
#define gpuStreamCaptureModeRelaxed hipStreamCaptureModeRelaxed
#define gpuStreamCreate hipStreamCreate
#define gpuStreamEndCapture hipStreamEndCapture
using gpuDeviceProp_t = hipDeviceProp_t;
#define gpuGetDeviceCount hipGetDeviceCount
#define gpuGetDeviceProperties hipGetDeviceProperties
#define gpuMemcpyPeerAsync hipMemcpyPeerAsync
#define gpuStreamWaitEvent hipStreamWaitEvent
#else
#define gpuEventCreate cudaEventCreate
#define gpuEventElapsedTime cudaEventElapsedTime
#define gpuEventRecord cudaEventRecord
#define gpuEventSynchronize cudaEventSynchronize
using gpuEvent_t = cudaEvent_t;
#define gpuGraphDestroy cudaGraphDestroy
#define gpuGraphExecDestroy cudaGraphExecDestroy
using gpuGraphExec_t = cudaGraphExec_t;
#define gpuGraphInstantiate cudaGraphInstantiate
#define gpuGraphLaunch cudaGraphLaunch
using gpuGraph_t = cudaGraph_t;
#define gpuMalloc cudaMalloc
#define gpuMemcpyAsync cudaMemcpyAsync
#define gpuMemcpyDeviceToDevice cudaMemcpyDeviceToDevice
#define gpuStreamBeginCapture cudaStreamBeginCapture
#define gpuStreamCaptureModeRelaxed cudaStreamCaptureModeRelaxed
#define gpuStreamCreate cudaStreamCreate
#define gpuStreamEndCapture cudaStreamEndCapture
using gpuDeviceProp_t = cudaDeviceProp;
#define gpuGetDeviceCount cudaGetDeviceCount
#define gpuGetDeviceProperties cudaGetDeviceProperties
#define gpuMemcpyPeerAsync cudaMemcpyPeerAsync
#define gpuStreamWaitEvent cudaStreamWaitEvent
#endif
