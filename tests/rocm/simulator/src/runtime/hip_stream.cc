// Streams, events and host functions.
#include "api.h"
#include "graph.h"
#include "handles.h"
#include "service.h"

using namespace gfx942::runtime;  // NOLINT: the entry points belong to no namespace.

namespace {

std::shared_ptr<Event> find_event(hipEvent_t handle) { return handles<Event>().find(handle); }

// What a call that waits answers on a stream that is being captured.
hipError_t refuse_capture(const Stream& stream) {
  const auto capture = stream.capture();
  if (capture == nullptr) return hipSuccess;
  capture->invalidate();
  return hipErrorStreamCaptureUnsupported;
}

hipError_t create_stream(hipStream_t* out, unsigned int flags) {
  if (out == nullptr) return remember(hipErrorInvalidValue);
  const bool blocking = (flags & hipStreamNonBlocking) == 0;
  *out = reinterpret_cast<hipStream_t>(current_device().create_stream(blocking).get());
  return hipSuccess;
}

}  // namespace

extern "C" {

hipError_t hipStreamCreate(hipStream_t* out) { return create_stream(out, hipStreamDefault); }

hipError_t hipStreamCreateWithFlags(hipStream_t* out, unsigned int flags) {
  return create_stream(out, flags);
}

hipError_t hipStreamCreateWithPriority(hipStream_t* out, unsigned int flags, int) {
  return create_stream(out, flags);
}

hipError_t hipStreamDestroy(hipStream_t handle) {
  for (int ordinal = 0; ordinal < device_count(); ++ordinal) {
    if (device(ordinal)->destroy_stream(reinterpret_cast<Stream*>(handle))) return hipSuccess;
  }
  return remember(hipErrorInvalidHandle);
}

hipError_t hipStreamSynchronize(hipStream_t handle) {
  const auto stream = find_stream(handle);
  if (stream == nullptr) return remember(hipErrorInvalidHandle);
  if (const hipError_t error = refuse_capture(*stream); error != hipSuccess) return remember(error);
  stream->synchronize();
  return remember(stream->device().error());
}

hipError_t hipStreamQuery(hipStream_t handle) {
  const auto stream = find_stream(handle);
  if (stream == nullptr) return remember(hipErrorInvalidHandle);
  if (const hipError_t error = refuse_capture(*stream); error != hipSuccess) return remember(error);
  if (!stream->idle()) return hipErrorNotReady;
  return remember(stream->device().error());
}

int hipGetStreamDeviceId(hipStream_t handle) {
  const auto stream = find_stream(handle);
  return stream == nullptr ? hipInvalidDeviceId : stream->device().ordinal();
}

hipError_t hipStreamWaitEvent(hipStream_t handle, hipEvent_t event_handle, unsigned int) {
  const auto stream = find_stream(handle);
  const auto event = find_event(event_handle);
  if (stream == nullptr || event == nullptr) return remember(hipErrorInvalidHandle);
  const auto capture = stream->capture();
  std::lock_guard lock(event->mutex);
  if (event->capture != nullptr) {
    if (!event->capture->valid()) return remember(hipErrorCapturedEvent);
    if (capture != nullptr && capture != event->capture) {
      return remember(hipErrorStreamCaptureMerge);
    }
    event->capture->join(stream, event->nodes);
    return hipSuccess;
  }
  if (event->signal == nullptr) return hipSuccess;  // It was never recorded.
  if (capture != nullptr) return remember(hipErrorStreamCaptureIsolation);
  stream->submit_wait(event->signal);
  return hipSuccess;
}

hipError_t hipLaunchHostFunc(hipStream_t stream, hipHostFn_t function, void* user_data) {
  if (function == nullptr) return remember(hipErrorInvalidValue);
  return submit(stream, HostOperation{function, user_data});
}

hipError_t hipSimEnqueue(hipStream_t stream, const hipSimService* service) {
  std::shared_ptr<void> data(service->data, service->release);
  return submit(stream, ServiceOperation{*service, std::move(data)});
}

hipError_t hipEventCreateWithFlags(hipEvent_t* out, unsigned int flags) {
  if ((flags & hipEventInterprocess) != 0) return not_simulated(__func__, "hipEventInterprocess");
  *out = reinterpret_cast<hipEvent_t>(handles<Event>().add(std::make_shared<Event>(flags)));
  return hipSuccess;
}

hipError_t hipEventCreate(hipEvent_t* out) { return hipEventCreateWithFlags(out, hipEventDefault); }

hipError_t hipEventDestroy(hipEvent_t handle) {
  return remember(handles<Event>().take(handle) == nullptr ? hipErrorInvalidHandle : hipSuccess);
}

hipError_t hipEventRecord(hipEvent_t handle, hipStream_t stream_handle) {
  const auto stream = find_stream(stream_handle);
  const auto event = find_event(handle);
  if (stream == nullptr || event == nullptr) return remember(hipErrorInvalidHandle);
  std::lock_guard lock(event->mutex);
  event->capture = stream->capture();
  if (event->capture != nullptr) {
    event->nodes = event->capture->last(stream.get());
    return hipSuccess;
  }
  stream->device().order(stream.get());
  event->signal = stream->mark();
  return hipSuccess;
}

hipError_t hipEventSynchronize(hipEvent_t handle) {
  const auto event = find_event(handle);
  if (event == nullptr) return remember(hipErrorInvalidHandle);
  std::unique_lock lock(event->mutex);
  if (event->capture != nullptr) return remember(hipErrorCapturedEvent);
  const auto signal = event->signal;
  lock.unlock();
  if (signal != nullptr) signal->wait();
  return remember(current_device().error());
}

hipError_t hipEventQuery(hipEvent_t handle) {
  const auto event = find_event(handle);
  if (event == nullptr) return remember(hipErrorInvalidHandle);
  std::lock_guard lock(event->mutex);
  if (event->capture != nullptr) return remember(hipErrorCapturedEvent);
  if (event->signal != nullptr && !event->signal->done()) return hipErrorNotReady;
  return remember(current_device().error());
}

hipError_t hipEventElapsedTime(float* milliseconds, hipEvent_t start, hipEvent_t stop) {
  std::shared_ptr<const Signal> signals[2];
  for (int i = 0; i < 2; ++i) {
    const auto event = find_event(i == 0 ? start : stop);
    if (event == nullptr || !event->timed) return remember(hipErrorInvalidHandle);
    std::lock_guard lock(event->mutex);
    signals[i] = event->signal;
    if (signals[i] == nullptr) return remember(hipErrorInvalidHandle);
    if (!signals[i]->done()) return hipErrorNotReady;
  }
  *milliseconds =
      std::chrono::duration<float, std::milli>(signals[1]->time() - signals[0]->time()).count();
  return hipSuccess;
}

}  // extern "C"
