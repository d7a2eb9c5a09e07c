// One rank of amd-mori's dispatch and combine for ctypes: the library's own C++ interface,
// flattened.
#include <cstdint>
#include <cstdio>
#include <exception>
#include <string>

#include "mori/ops/dispatch_combine/launch.hpp"
#include "mori/ops/ops.hpp"
#include "mori/shmem/shmem_api.hpp"

namespace moe = mori::moe;
namespace shmem = mori::shmem;

namespace {

// Exceptions must not leave a C function.
template <typename Call>
int guarded(Call call) {
  try {
    call();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "mori: %s\n", error.what());
    return 1;
  }
}

// MORI's C++ launchers do not know the low-latency kernel; its Python launches it by name.
void launch_by_name(moe::EpDispatchCombineHandle& handle, const std::string& name, const char* end,
                    void* tokens, void* weights, void* indices, int64_t count, int type,
                    hipStream_t stream, int lds) {
  handle.PrepareInference(static_cast<hipDataType>(type), tokens, nullptr,
                          static_cast<float*>(weights), static_cast<int32_t*>(indices),
                          static_cast<int32_t>(count));
  auto arguments = moe::GetEpDispatchCombineArgsRaw(handle, 0);
  const char* rows = type == HIP_R_32F ? "f32" : type == HIP_R_16BF ? "bf16" : "fp8_fnuz";
  moe::KernelRegistry::Instance().Launch(name + rows + end, handle.config.blockNum,
                                         64 * handle.config.warpNumPerBlock, lds, stream,
                                         &arguments, sizeof(arguments));
}

}  // namespace

extern "C" {

// Where a call leaves its results, on the device.
struct Results {
  void* tokens;
  void* weights;
  void* indices;
  void* count;
  void* sources;
  // Where combine takes its rows when peers fetch them.
  void* fetched;
  void* combined;
  void* combined_weights;
};

int mori_rank_unique_id(shmem::mori_shmem_uniqueid_t* id) { return shmem::ShmemGetUniqueId(id); }

int mori_rank_init(int rank, int ranks, shmem::mori_shmem_uniqueid_t* id, const char* kernels) {
  shmem::mori_shmem_init_attr_t attributes;
  if (shmem::ShmemSetAttrUniqueIdArgs(rank, ranks, id, &attributes) != 0) return 1;
  if (shmem::ShmemInitAttr(shmem::MORI_SHMEM_INIT_WITH_UNIQUEID, &attributes) != 0) return 1;
  return guarded([&] { moe::KernelRegistry::Instance().LoadFromDirectory(kernels); });
}

moe::EpDispatchCombineHandle* mori_rank_handle(int rank, int ranks, int hidden, int element_bytes,
                                               int max_tokens, int experts_per_rank, int top_k,
                                               int blocks, int waves, int low_latency, int fetch) {
  moe::EpDispatchCombineConfig config;
  config.kernelType = low_latency ? moe::KernelType::IntraNodeLL : moe::KernelType::IntraNode;
  config.useExternalInpBuffer = !fetch;
  config.rank = rank;
  config.worldSize = ranks;
  config.hiddenDim = hidden;
  config.scaleDim = 0;
  config.maxTokenTypeSize = element_bytes;
  config.maxNumInpTokenPerRank = max_tokens;
  config.numExpertPerRank = experts_per_rank;
  config.numExpertPerToken = top_k;
  config.blockNum = blocks;
  config.warpNumPerBlock = waves;
  // The largest power of two that divides the ranks: MORI takes no other, and its kernels for one
  // machine do not care.
  config.gpuPerNode = ranks & -ranks;
  moe::EpDispatchCombineHandle* handle = nullptr;
  guarded([&] { handle = new moe::EpDispatchCombineHandle(config); });
  return handle;
}

void mori_rank_results(moe::EpDispatchCombineHandle* handle, Results* out) {
  out->tokens = handle->GetShmemDispatchOutTokMemObj()->Get();
  out->weights = handle->shmemDispatchOutWeightsMemObj->Get();
  out->indices = handle->shmemOutIndicesMemObj->Get();
  out->count = handle->totalRecvTokenNum;
  out->sources = handle->dispTokIdToSrcTokIdMemObj->Get();
  out->fetched = handle->GetShmemCombineInpTokMemObj()->Get();
  out->combined = handle->GetShmemCombineOutTokMemObj()->Get();
  out->combined_weights = handle->shmemCombineOutWeightsMemObj->Get();
}

int mori_rank_dispatch(moe::EpDispatchCombineHandle* handle, void* tokens, void* weights,
                       void* indices, int64_t count, int type, hipStream_t stream) {
  return guarded([&] {
    if (handle->config.kernelType == moe::KernelType::IntraNodeLL) {
      const auto& config = handle->config;
      const int waves = config.warpNumPerBlock, experts = config.numExpertPerRank;
      launch_by_name(*handle, "EpDispatchIntraNodeLLKernel_", "", tokens, weights, indices, count,
                     type, stream, (config.worldSize * waves + experts * waves + experts) * 4);
      return;
    }
    moe::LaunchDispatch(*handle, tokens, weights, nullptr, indices, count,
                        static_cast<hipDataType>(type), -1, -1, -1, stream);
  });
}

int mori_rank_combine(moe::EpDispatchCombineHandle* handle, void* tokens, void* weights,
                      void* indices, int64_t count, int type, hipStream_t stream) {
  return guarded([&] {
    if (handle->config.kernelType == moe::KernelType::IntraNodeLL) {
      const auto& config = handle->config;
      launch_by_name(*handle, "EpCombineIntraNodeKernel_",
                     config.useExternalInpBuffer ? "_nop2p" : "_p2p", tokens, weights, indices,
                     count, type, stream, config.warpNumPerBlock * config.numExpertPerToken * 16);
      return;
    }
    moe::LaunchCombine(*handle, tokens, weights, indices, count, static_cast<hipDataType>(type), -1,
                       -1, -1, -1, stream);
  });
}

void mori_rank_barrier() { shmem::ShmemBarrierAll(); }

int mori_rank_finish(moe::EpDispatchCombineHandle* handle) {
  delete handle;
  return shmem::ShmemFinalize();
}

}  // extern "C"
