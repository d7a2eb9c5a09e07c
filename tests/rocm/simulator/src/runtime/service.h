// What the simulator's other libraries put on streams: functions that can fail, as kernels can.
#pragma once

#include <hip/hip_runtime_api.h>

#include <cstdint>

extern "C" {

struct hipSimService {
  const char* name;  // of static storage, for ROCM_SIM_TRACE
  // When it is queued, and again when a graph is launched that has it: the number of its turn.
  uint64_t (*take_turn)(void* data);
  hipError_t (*run)(void* data, uint64_t turn);  // when the stream gets there
  void (*leave)(void* data, uint64_t turn);      // once it has run, or will not
  void (*release)(void* data);                   // once nothing will run it any more
  void* data;
};

// Queues on a stream, or adds to the graph that the stream is captured into. What it returns, the
// caller has given `data` away.
hipError_t hipSimEnqueue(hipStream_t stream, const hipSimService* service);

}  // extern "C"
