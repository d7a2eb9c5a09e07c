// Copies and fills.
#include "api.h"
#include "memory.h"

using namespace gfx942::runtime;  // NOLINT: the entry points belong to no namespace.

namespace {

// Whether the host may use the memory as soon as the call returns: the real runtime waits for a
// copy whose host side is not pinned.
bool is_pageable(const CopyOperation& copy) {
  return (copy.to_host && !memory().block(copy.to)) ||
         (copy.from_host && !memory().block(copy.from));
}

hipError_t make_copy(void* to, const void* from, size_t bytes, hipMemcpyKind kind,
                     CopyOperation* out) {
  *out = {to, from, bytes, false, false};
  switch (kind) {
    case hipMemcpyHostToDevice:
      out->from_host = true;
      break;
    case hipMemcpyDeviceToHost:
      out->to_host = true;
      break;
    case hipMemcpyDeviceToDevice:
    case hipMemcpyDeviceToDeviceNoCU:
      break;
    case hipMemcpyHostToHost:
    case hipMemcpyDefault:
      out->to_host = true;
      out->from_host = true;
      break;
    default:
      return hipErrorInvalidMemcpyDirection;
  }
  return check(*out);
}

hipError_t copy_async(void* to, const void* from, size_t bytes, hipMemcpyKind kind,
                      hipStream_t handle) {
  CopyOperation copy;
  const hipError_t error = make_copy(to, from, bytes, kind, &copy);
  if (error != hipSuccess || bytes == 0) return remember(error);
  const auto stream = find_stream(handle);
  if (stream == nullptr) return remember(hipErrorInvalidHandle);
  const bool wait = is_pageable(copy) && stream->capture() == nullptr;
  const hipError_t submitted = stream->submit(copy);
  if (submitted != hipSuccess || !wait) return remember(submitted);
  stream->synchronize();
  return remember(stream->device().error());
}

hipError_t copy_and_wait(void* to, const void* from, size_t bytes, hipMemcpyKind kind) {
  CopyOperation copy;
  const hipError_t error = make_copy(to, from, bytes, kind, &copy);
  if (error != hipSuccess || bytes == 0) return remember(error);
  return submit_and_wait(copy);
}

hipError_t make_fill(void* to, uint32_t value, uint32_t element_bytes, size_t count,
                     FillOperation* out) {
  *out = {to, value, element_bytes, count, 1, 0};
  return check(*out);
}

hipError_t fill_async(void* to, uint32_t value, uint32_t element_bytes, size_t count,
                      hipStream_t stream) {
  FillOperation fill;
  const hipError_t error = make_fill(to, value, element_bytes, count, &fill);
  if (error != hipSuccess || count == 0) return remember(error);
  return submit(stream, fill);
}

}  // namespace

extern "C" {

hipError_t hipMemcpy(void* to, const void* from, size_t bytes, hipMemcpyKind kind) {
  return copy_and_wait(to, from, bytes, kind);
}

hipError_t hipMemcpyAsync(void* to, const void* from, size_t bytes, hipMemcpyKind kind,
                          hipStream_t stream) {
  return copy_async(to, from, bytes, kind, stream);
}

hipError_t hipMemcpyWithStream(void* to, const void* from, size_t bytes, hipMemcpyKind kind,
                               hipStream_t handle) {
  const hipError_t error = copy_async(to, from, bytes, kind, handle);
  if (error != hipSuccess) return error;
  return hipStreamSynchronize(handle);
}

hipError_t hipMemcpyHtoD(hipDeviceptr_t to, const void* from, size_t bytes) {
  return copy_and_wait(to, from, bytes, hipMemcpyHostToDevice);
}

hipError_t hipMemcpyDtoH(void* to, hipDeviceptr_t from, size_t bytes) {
  return copy_and_wait(to, from, bytes, hipMemcpyDeviceToHost);
}

hipError_t hipMemcpyHtoDAsync(hipDeviceptr_t to, const void* from, size_t bytes,
                              hipStream_t stream) {
  return copy_async(to, from, bytes, hipMemcpyHostToDevice, stream);
}

hipError_t hipMemcpyDtoHAsync(void* to, hipDeviceptr_t from, size_t bytes, hipStream_t stream) {
  return copy_async(to, from, bytes, hipMemcpyDeviceToHost, stream);
}

hipError_t hipMemcpyDtoDAsync(hipDeviceptr_t to, hipDeviceptr_t from, size_t bytes,
                              hipStream_t stream) {
  return copy_async(to, from, bytes, hipMemcpyDeviceToDevice, stream);
}

hipError_t hipMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes,
                              hipStream_t stream) {
  return copy_async(to, from, bytes, hipMemcpyDeviceToDevice, stream);
}

hipError_t hipMemset(void* to, int value, size_t bytes) {
  FillOperation fill;
  const hipError_t error = make_fill(to, static_cast<uint8_t>(value), 1, bytes, &fill);
  if (error != hipSuccess || bytes == 0) return remember(error);
  return submit_and_wait(fill);
}

hipError_t hipMemsetAsync(void* to, int value, size_t bytes, hipStream_t stream) {
  return fill_async(to, static_cast<uint8_t>(value), 1, bytes, stream);
}

hipError_t hipMemsetD8Async(hipDeviceptr_t to, unsigned char value, size_t count,
                            hipStream_t stream) {
  return fill_async(to, value, 1, count, stream);
}

hipError_t hipMemsetD32Async(hipDeviceptr_t to, int value, size_t count, hipStream_t stream) {
  return fill_async(to, static_cast<uint32_t>(value), 4, count, stream);
}

}  // extern "C"
