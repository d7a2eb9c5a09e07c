#include "api.h"

#include <cstdio>

#include "graph.h"

namespace gfx942::runtime {
namespace {

thread_local hipError_t last_error = hipSuccess;

const char* name_of(hipError_t error) {
  switch (error) {
#define NAME(error) \
  case error:       \
    return #error
    NAME(hipSuccess);
    NAME(hipErrorInvalidValue);
    NAME(hipErrorOutOfMemory);
    NAME(hipErrorInvalidConfiguration);
    NAME(hipErrorInvalidMemcpyDirection);
    NAME(hipErrorInvalidDeviceFunction);
    NAME(hipErrorInvalidDevice);
    NAME(hipErrorInvalidImage);
    NAME(hipErrorInvalidContext);
    NAME(hipErrorFileNotFound);
    NAME(hipErrorInvalidHandle);
    NAME(hipErrorIllegalState);
    NAME(hipErrorNotFound);
    NAME(hipErrorNotReady);
    NAME(hipErrorIllegalAddress);
    NAME(hipErrorLaunchTimeOut);
    NAME(hipErrorPeerAccessAlreadyEnabled);
    NAME(hipErrorHostMemoryAlreadyRegistered);
    NAME(hipErrorHostMemoryNotRegistered);
    NAME(hipErrorLaunchFailure);
    NAME(hipErrorNotSupported);
    NAME(hipErrorStreamCaptureUnsupported);
    NAME(hipErrorStreamCaptureInvalidated);
    NAME(hipErrorStreamCaptureMerge);
    NAME(hipErrorStreamCaptureUnmatched);
    NAME(hipErrorStreamCaptureUnjoined);
    NAME(hipErrorStreamCaptureIsolation);
    NAME(hipErrorCapturedEvent);
    NAME(hipErrorStreamCaptureWrongThread);
#undef NAME
    default:
      return "hipErrorUnknown";
  }
}

}  // namespace

hipError_t remember(hipError_t error) {
  if (error != hipSuccess) last_error = error;
  return error;
}

hipError_t not_simulated(const char* call, const char* what) {
  std::fprintf(stderr, "rocm-sim: %s: %s is not simulated\n", call, what);
  return remember(hipErrorNotSupported);
}

std::shared_ptr<Stream> find_stream(hipStream_t handle) {
  if (handle == nullptr || handle == hipStreamLegacy) return current_device().null_stream();
  for (int ordinal = 0; ordinal < device_count(); ++ordinal) {
    if (auto stream = device(ordinal)->find_stream(reinterpret_cast<Stream*>(handle))) {
      return stream;
    }
  }
  return nullptr;
}

hipError_t submit(hipStream_t handle, Operation operation) {
  const auto stream = find_stream(handle);
  return remember(stream == nullptr ? hipErrorInvalidHandle : stream->submit(std::move(operation)));
}

hipError_t submit_and_wait(Operation operation) {
  if (const hipError_t error = check_unsafe_call(); error != hipSuccess) return remember(error);
  const auto stream = current_device().null_stream();
  const hipError_t error = stream->submit(std::move(operation));
  if (error != hipSuccess) return remember(error);
  stream->synchronize();
  return remember(current_device().error());
}

}  // namespace gfx942::runtime

using namespace gfx942::runtime;  // NOLINT: the entry points below belong to no namespace.

extern "C" {

hipError_t hipGetLastError() {
  const hipError_t error = last_error;
  last_error = hipSuccess;
  return error;
}

hipError_t hipPeekAtLastError() { return last_error; }

const char* hipGetErrorName(hipError_t error) { return name_of(error); }
const char* hipGetErrorString(hipError_t error) { return name_of(error); }

}  // extern "C"
