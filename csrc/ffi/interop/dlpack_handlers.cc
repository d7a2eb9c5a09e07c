// The XLA custom call that runs a Python function on DLPack tensors, for every platform: a stream
// is only a pointer here, so no platform's headers are needed.
#include <optional>

#include "interop/call.h"
#include "xla/ffi/api/ffi.h"

namespace moriep {
namespace {

namespace ffi = ::xla::ffi;

std::optional<dlpack::Type> type_of(ffi::DataType type) {
  const auto make = [](uint8_t code, uint8_t bits) {
    return dlpack::Type{.code = code, .bits = bits, .lanes = 1};
  };
  switch (type) {
    case ffi::PRED:
      return make(dlpack::kBool, 8);
    case ffi::S8:
      return make(dlpack::kInt, 8);
    case ffi::S16:
      return make(dlpack::kInt, 16);
    case ffi::S32:
      return make(dlpack::kInt, 32);
    case ffi::S64:
      return make(dlpack::kInt, 64);
    case ffi::U8:
      return make(dlpack::kUInt, 8);
    case ffi::U16:
      return make(dlpack::kUInt, 16);
    case ffi::U32:
      return make(dlpack::kUInt, 32);
    case ffi::U64:
      return make(dlpack::kUInt, 64);
    case ffi::F16:
      return make(dlpack::kFloat, 16);
    case ffi::F32:
      return make(dlpack::kFloat, 32);
    case ffi::F64:
      return make(dlpack::kFloat, 64);
    case ffi::BF16:
      return make(dlpack::kBfloat, 16);
    case ffi::C64:
      return make(dlpack::kComplex, 64);
    case ffi::C128:
      return make(dlpack::kComplex, 128);
    case ffi::F8E3M4:
      return make(dlpack::kFloat8E3M4, 8);
    case ffi::F8E4M3:
      return make(dlpack::kFloat8E4M3, 8);
    case ffi::F8E4M3B11FNUZ:
      return make(dlpack::kFloat8E4M3B11Fnuz, 8);
    case ffi::F8E4M3FN:
      return make(dlpack::kFloat8E4M3Fn, 8);
    case ffi::F8E4M3FNUZ:
      return make(dlpack::kFloat8E4M3Fnuz, 8);
    case ffi::F8E5M2:
      return make(dlpack::kFloat8E5M2, 8);
    case ffi::F8E5M2FNUZ:
      return make(dlpack::kFloat8E5M2Fnuz, 8);
    case ffi::F8E8M0FNU:
      return make(dlpack::kFloat8E8M0Fnu, 8);
    default:
      return std::nullopt;  // Python refuses such arrays when the program is traced.
  }
}

bool add(Call* call, ffi::AnyBuffer buffer, bool is_input) {
  const auto type = type_of(buffer.element_type());
  if (!type) return false;
  const auto dims = buffer.dimensions();
  call->add(buffer.untyped_data(), *type, dims.begin(), dims.size(), is_input);
  return true;
}

ffi::Error run(dlpack::Device device, void* stream, ffi::RemainingArgs inputs,
               ffi::RemainingRets outputs, std::string_view function) {
  const std::string name = "dlpack_call of " + std::string(function) + ": ";
  Call call(function, device, stream);
  for (size_t i = 0; i < inputs.size(); ++i) {
    const auto buffer = inputs.get<ffi::AnyBuffer>(i);
    if (!buffer) return buffer.error();
    if (!add(&call, *buffer, true))
      return ffi::Error::InvalidArgument(name + "an input's dtype has no DLPack code");
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    auto buffer = outputs.get<ffi::AnyBuffer>(i);
    if (!buffer) return buffer.error();
    if (!add(&call, **buffer, false))
      return ffi::Error::InvalidArgument(name + "an output's dtype has no DLPack code");
  }
  if (!call.run()) return ffi::Error::Internal(name + call.error());
  return ffi::Error::Success();
}

// XLA numbers the CPU's devices over all processes; in DLPack the CPU is device 0.
ffi::Error run_on_cpu(ffi::RemainingArgs inputs, ffi::RemainingRets outputs,
                      std::string_view function) {
  return run({.type = dlpack::kCpu, .id = 0}, nullptr, inputs, outputs, function);
}

template <dlpack::DeviceType kType>
ffi::Error run_on_gpu(void* stream, int32_t device, ffi::RemainingArgs inputs,
                      ffi::RemainingRets outputs, std::string_view function) {
  return run({.type = kType, .id = device}, stream, inputs, outputs, function);
}

auto bind_gpu() {
  return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>().Ctx<ffi::DeviceOrdinal>();
}

}  // namespace

#define MORIEP_HANDLER __attribute__((visibility("default"))) XLA_FFI_Error*

extern "C" {
MORIEP_HANDLER MoriepDlpackCpu(XLA_FFI_CallFrame*);
MORIEP_HANDLER MoriepDlpackCuda(XLA_FFI_CallFrame*);
MORIEP_HANDLER MoriepDlpackRocm(XLA_FFI_CallFrame*);
}

// No command-buffer trait: a capture would record what one run of the function did on the device
// and never run the function again.
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    MoriepDlpackCpu, run_on_cpu,
    ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attr<std::string_view>("function"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    MoriepDlpackCuda, run_on_gpu<dlpack::kCuda>,
    bind_gpu().RemainingArgs().RemainingRets().Attr<std::string_view>("function"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    MoriepDlpackRocm, run_on_gpu<dlpack::kRocm>,
    bind_gpu().RemainingArgs().RemainingRets().Attr<std::string_view>("function"));

}  // namespace moriep

// major * 1000 + minor of the FFI API that this library was built with.
extern "C" __attribute__((visibility("default"))) int moriep_ffi_api_version() {
  return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR;
}
