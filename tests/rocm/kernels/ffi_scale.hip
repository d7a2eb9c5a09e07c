// An XLA FFI handler that launches a kernel on XLA's stream: y = by * x.
#include <hip/hip_runtime.h>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

__global__ void scale(const float* x, float* y, float by, size_t count) {
  const size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < count) y[i] = by * x[i];
}

static ffi::Error run(hipStream_t stream, float by, ffi::Buffer<ffi::F32> x,
                      ffi::ResultBuffer<ffi::F32> y) {
  constexpr unsigned kThreads = 256;
  const auto blocks = static_cast<unsigned>((x.element_count() + kThreads - 1) / kThreads);
  scale<<<blocks, kThreads, 0, stream>>>(x.typed_data(), y->typed_data(), by, x.element_count());
  const hipError_t error = hipGetLastError();
  return error == hipSuccess ? ffi::Error::Success() : ffi::Error::Internal(hipGetErrorName(error));
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(Scale, run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<hipStream_t>>()
                                  .Attr<float>("by")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>(),
                              {ffi::Traits::kCmdBufferCompatible});
