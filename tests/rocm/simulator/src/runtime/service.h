// What the simulator's other libraries put on streams: functions that can fail, as kernels can.
#pragma once

#include <hip/hip_runtime_api.h>

extern "C" {

struct hipSimService {
  const char* name;               // of static storage, for ROCM_SIM_TRACE
  hipError_t (*run)(void* data);  // when the stream gets there, and again at each replay of a graph
  void (*release)(void* data);    // once nothing will run it any more
  void* data;
};

// Queues on a stream, or adds to the graph that the stream is captured into. What it returns, the
// caller has given `data` away.
hipError_t hipSimEnqueue(hipStream_t stream, const hipSimService* service);

}  // extern "C"
