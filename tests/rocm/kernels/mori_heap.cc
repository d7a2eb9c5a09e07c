// Constructs one of amd-mori's handles in a world of one rank and says "constructed". Every value
// of the configuration that sizes a buffer is given, the number of ranks as well, for construction
// allocates only the rank's own memory.
//
// Usage: mori_heap KERNEL RANKS GPUS_PER_NODE HIDDEN ELEMENT_BYTES MAX_TOKENS EXPERTS_PER_RANK
// TOP_K SCALES SCALE_BYTES
#include <cstdio>
#include <cstdlib>

#include "mori/ops/ops.hpp"
#include "mori/shmem/shmem_api.hpp"

namespace moe = mori::moe;
namespace shmem = mori::shmem;

int main(int, char** arguments) {
  moe::EpDispatchCombineConfig config;
  int* const values[] = {&config.worldSize,
                         &config.gpuPerNode,
                         &config.hiddenDim,
                         &config.maxTokenTypeSize,
                         &config.maxNumInpTokenPerRank,
                         &config.numExpertPerRank,
                         &config.numExpertPerToken,
                         &config.scaleDim,
                         &config.scaleTypeSize};
  config.kernelType = static_cast<moe::KernelType>(std::atoi(*++arguments));
  for (int* value : values) *value = std::atoi(*++arguments);

  shmem::mori_shmem_uniqueid_t id;
  shmem::mori_shmem_init_attr_t attributes;
  if (shmem::ShmemGetUniqueId(&id) != 0) return 1;
  if (shmem::ShmemSetAttrUniqueIdArgs(0, 1, &id, &attributes) != 0) return 1;
  if (shmem::ShmemInitAttr(shmem::MORI_SHMEM_INIT_WITH_UNIQUEID, &attributes) != 0) return 1;
  std::puts("initialised");
  std::fflush(stdout);
  {
    moe::EpDispatchCombineHandle handle(config);
    std::puts("constructed");
  }
  return shmem::ShmemFinalize();
}
