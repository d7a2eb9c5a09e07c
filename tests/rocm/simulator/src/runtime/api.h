// What the HIP entry points (hip_*.cc) share.
#pragma once

#include <hip/hip_runtime_api.h>

#include <memory>

#include "device.h"
#include "stream.h"

namespace gfx942::runtime {

// Makes an error the one that hipGetLastError gives, and returns it.
hipError_t remember(hipError_t error);

// One line on stderr with the call's name, for what is not simulated.
hipError_t not_simulated(const char* call, const char* what);

// The stream that a handle names: null is the current device's null stream. Null when there is
// none.
std::shared_ptr<Stream> find_stream(hipStream_t handle);

// Queues on a stream, whatever state its handle is in.
hipError_t submit(hipStream_t handle, Operation operation);
// Queues on the current device's null stream and waits, as calls without a stream do.
hipError_t submit_and_wait(Operation operation);

}  // namespace gfx942::runtime
