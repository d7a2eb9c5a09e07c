#include "launch.h"

#include <algorithm>

#include "world.h"

namespace moriep::mori {
namespace {

constexpr int32_t kMaxWaves = 16;
constexpr int64_t kLdsBytes = 65536;

// As MORI's kernels are named.
const char* suffix(Rows rows) {
  switch (rows) {
    case Rows::kF32:
      return "f32";
    case Rows::kBF16:
      return "bf16";
    case Rows::kFp8:
      return "fp8_fnuz";
  }
  return "";
}

}  // namespace

Status Launch::dispatch() {
  const HandleSizes& sizes = handle.sizes();
  const int64_t lds = (int64_t{args.config.worldSize} * num_waves +
                       int64_t{sizes.experts_per_rank} * (num_waves + 1)) *
                      4;
  const std::string type_name = suffix(rows);
  switch (sizes.kernel) {
    case KernelType::IntraNodeLL:
      // Two waves of a block plan, the others copy.
      if (num_waves < 3) break;
      return run("EpDispatchIntraNodeLLKernel_" + type_name, num_blocks, num_waves, lds);
    case KernelType::InterNodeV1:
    case KernelType::InterNodeV1LL: {
      const bool ll = sizes.kernel == KernelType::InterNodeV1LL;
      if (Status status = run("EpDispatchCopyToStaging_" + type_name,
                              blocks_for(args.curRankNumToken), num_waves, 0);
          !status.ok()) {
        return status;
      }
      return run("EpDispatchInterNodeV1Kernel" + std::string(ll ? "LowLatency_" : "_") + type_name,
                 num_blocks, num_waves, lds);
    }
    default:
      return run("EpDispatchIntraNodeKernel_" + type_name, num_blocks, num_waves, lds);
  }
  return Status(Code::kInvalidArgument, "warp_num_per_block=" + std::to_string(num_waves) +
                                            " must be at least 3 with mori_kernel='IntraNodeLL'");
}

Status Launch::replay() {
  args.replayMode = true;
  if (handle.sizes().kernel != KernelType::IntraNodeLL) return dispatch();
  // Its buffers and its plans are the same, and only the other kernel can go along one.
  const int64_t lds = (int64_t{args.config.worldSize} * num_waves +
                       int64_t{handle.sizes().experts_per_rank} * (num_waves + 1)) *
                      4;
  return run(std::string("EpDispatchIntraNodeKernel_") + suffix(rows), num_blocks, num_waves, lds);
}

Status Launch::combine() {
  const HandleSizes& sizes = handle.sizes();
  const int64_t lds = int64_t{num_waves} * sizes.top_k * 2 * 8;
  const std::string type_name = suffix(rows);
  if (sizes.kernel != KernelType::InterNodeV1 && sizes.kernel != KernelType::InterNodeV1LL) {
    return run("EpCombineIntraNodeKernel_" + type_name + "_nop2p", num_blocks, num_waves, lds);
  }
  const bool ll = sizes.kernel == KernelType::InterNodeV1LL;
  const std::string main =
      "EpCombineInterNodeV1Kernel" + std::string(ll ? "LowLatency_" : "_") + type_name;
  const int64_t most_arrivals = int64_t{args.config.worldSize} * args.curRankNumToken;
  Status status = run("EpCombineSync_" + type_name, blocks_for(most_arrivals), num_waves, 0);
  if (status.ok()) status = run("EpCombineSyncBarrier_" + type_name, 1, 1, 0);
  if (status.ok()) status = run(main, num_blocks, num_waves, lds);
  if (status.ok())
    status = run("EpCombineAll_" + type_name, blocks_for(args.curRankNumToken), num_waves, lds);
  return status;
}

int32_t Launch::blocks_for(int64_t num_rows) const {
  // A wave for each KiB of a row, until the device is full.
  const int64_t parts =
      (int64_t{args.config.hiddenDim} * handle.sizes().element_bytes + 1023) / 1024;
  const int64_t wanted = (num_rows * parts + num_waves - 1) / num_waves;
  return static_cast<int32_t>(std::clamp<int64_t>(wanted, 1, handle.processors()));
}

Status Launch::run(const std::string& kernel, int32_t blocks, int32_t waves, int64_t lds_bytes) {
  if (blocks < 1 || waves < 1 || waves > kMaxWaves || lds_bytes > kLdsBytes) {
    return Status(Code::kInvalidArgument,
                  "block_num=" + std::to_string(blocks) + " and warp_num_per_block=" +
                      std::to_string(waves) + " must be at least 1, at most " +
                      std::to_string(kMaxWaves) + " waves, and take at most 64 KiB of LDS (" +
                      std::to_string(lds_bytes) + ") with transport='mori'");
  }
  hipFunction_t function = nullptr;
  if (Status status = find_kernel(kernel, &function); !status.ok()) return status;
  size_t size = sizeof(args);
  void* extra[] = {HIP_LAUNCH_PARAM_BUFFER_POINTER, &args, HIP_LAUNCH_PARAM_BUFFER_SIZE, &size,
                   HIP_LAUNCH_PARAM_END};
  const hipError_t error = hipModuleLaunchKernel(
      function, static_cast<uint32_t>(blocks), 1, 1, static_cast<uint32_t>(waves * 64), 1, 1,
      static_cast<uint32_t>(lds_bytes), stream, nullptr, extra);
  if (error == hipSuccess) return Status();
  (void)hipGetLastError();
  return Status(Code::kInternal, kernel + " was not launched: " + hipGetErrorString(error));
}

}  // namespace moriep::mori
