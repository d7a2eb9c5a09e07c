#include "world.h"

#include <sched.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <vector>

#include "mori/core/transport/rdma/proxy/proxy_types.hpp"
#include "mori/shmem/internal.hpp"
#include "mori/shmem/shmem_api.hpp"
#include "symmetric.h"

namespace moriep::mori {
namespace {

namespace shmem = ::mori::shmem;

static_assert(kUniqueIdBytes == MORI_SHMEM_UNIQUE_ID_BYTES);

struct State {
  std::mutex mutex;
  World world;
  std::map<std::string, hipModule_t> modules;      // by file
  std::map<std::string, hipFunction_t> functions;  // by name
  shmem::GpuStates known{};                        // to kernels, once some are loaded
};

// Never destroyed: threads of XLA may outlive static destruction.
State& state() {
  static State* it = new State();
  return *it;
}

// MORI pins the thread that starts it to the processors near the GPU, and threads that it starts
// later inherit that.
class KeepAffinity {
 public:
  KeepAffinity() { known_ = sched_getaffinity(0, sizeof(set_), &set_) == 0; }
  ~KeepAffinity() {
    if (known_) (void)sched_setaffinity(0, sizeof(set_), &set_);
  }
  KeepAffinity(const KeepAffinity&) = delete;
  KeepAffinity& operator=(const KeepAffinity&) = delete;

 private:
  cpu_set_t set_;
  bool known_ = false;
};

// Sets an environment variable as long as it lives: MORI takes some of its settings from nowhere
// else.
class Setting {
 public:
  Setting(const char* name, const std::string& value, bool wanted = true)
      : name_(name), wanted_(wanted) {
    if (!wanted) return;
    if (const char* old = std::getenv(name); old != nullptr) {
      old_ = old;
      had_ = true;
    }
    (void)setenv(name, value.c_str(), 1);
  }
  ~Setting() {
    if (!wanted_) return;
    if (had_) {
      (void)setenv(name_, old_.c_str(), 1);
    } else {
      (void)unsetenv(name_);
    }
  }
  Setting(const Setting&) = delete;
  Setting& operator=(const Setting&) = delete;

 private:
  const char* name_;
  const bool wanted_;
  std::string old_;
  bool had_ = false;
};

Status no_world() { return Status(Code::kFailedPrecondition, "MORI is not open in this process"); }

}  // namespace

Status make_unique_id(uint8_t* id) {
  shmem::mori_shmem_uniqueid_t made;
  if (shmem::ShmemGetUniqueId(&made) != 0) {
    return Status(Code::kUnavailable,
                  "MORI found no network interface for its rendezvous; name one with "
                  "MORI_SOCKET_IFNAME (lo on a single machine)");
  }
  std::copy(made.begin(), made.end(), id);
  return Status();
}

Status open_world(const World& wanted, const uint8_t* id) {
  State& here = state();
  std::lock_guard<std::mutex> lock(here.mutex);
  const World& open = here.world;
  if (open.rank >= 0) {
    if (open.group == wanted.group) return Status();
    return Status(Code::kFailedPrecondition,
                  "group " + wanted.group + " cannot be opened beside group " + open.group +
                      ": MORI keeps one group for a process; use one expert-parallel group, or "
                      "transport='native' for the other");
  }
  if (const hipError_t error = hipSetDevice(wanted.device); error != hipSuccess) {
    return Status(Code::kInternal,
                  "device " + std::to_string(wanted.device) + ": " + hipGetErrorString(error));
  }
  const KeepAffinity keep;
  const Setting heap("MORI_SHMEM_HEAP_SIZE", std::to_string(wanted.heap_bytes >> 20) + "M");
  const Setting mode("MORI_SHMEM_MODE", "static_heap");
  // What MORI takes for nodes must be what we do.
  const bool several = !wanted.node.empty();
  const Setting node("MORI_NODE_ID", wanted.node, several);
  const Setting proxy("MORI_ENABLE_HOST_PROXY", wanted.by_proxy ? "1" : "0", several);
  // One queue pair to a peer, so that all that a rank sends to it comes in order.
  const Setting pairs("MORI_NUM_QP_PER_PE", "1", several);
  shmem::mori_shmem_uniqueid_t given;
  std::copy(id, id + kUniqueIdBytes, given.begin());
  shmem::mori_shmem_init_attr_t attributes;
  if (shmem::ShmemSetAttrUniqueIdArgs(wanted.rank, wanted.num_ranks, &given, &attributes) != 0 ||
      shmem::ShmemInitAttr(shmem::MORI_SHMEM_INIT_WITH_UNIQUEID, &attributes) != 0) {
    return Status(Code::kUnavailable,
                  "MORI's ranks did not find each other; name the network interface with "
                  "MORI_SOCKET_IFNAME (lo on a single machine)");
  }
  here.world = wanted;
  here.world.rank = shmem::ShmemMyPe();
  if (here.world.rank != wanted.rank || shmem::ShmemNPes() != wanted.num_ranks) {
    return Status(Code::kInternal, "MORI says rank " + std::to_string(here.world.rank) + " of " +
                                       std::to_string(shmem::ShmemNPes()) + ", the mesh rank " +
                                       std::to_string(wanted.rank) + " of " +
                                       std::to_string(wanted.num_ranks));
  }
  return Status();
}

World world() {
  State& here = state();
  std::lock_guard<std::mutex> lock(here.mutex);
  return here.world;
}

Status allocate_symmetric(size_t bytes, ::mori::application::SymmMemObjPtr* out) {
  void* memory = shmem::ShmemMalloc(bytes);
  if (memory == nullptr) {
    return Status(Code::kInternal, "MORI's heap has no " + std::to_string(bytes) + " bytes left");
  }
  if (const hipError_t error = hipMemset(memory, 0, bytes); error != hipSuccess) {
    return Status(Code::kInternal, std::string("MORI's heap: ") + hipGetErrorString(error));
  }
  *out = shmem::ShmemQueryMemObjPtr(memory);
  if (out->IsValid()) return Status();
  return Status(Code::kInternal, "MORI does not know its own memory");
}

namespace {

template <typename T>
bool read_global(hipModule_t module, const char* name, T* out) {
  hipDeviceptr_t at = nullptr;
  size_t bytes = 0;
  if (hipModuleGetGlobal(&at, &bytes, module, name) != hipSuccess) {
    (void)hipGetLastError();
    return false;
  }
  return bytes == sizeof(T) && hipMemcpy(static_cast<void*>(out), reinterpret_cast<void*>(at),
                                         bytes, hipMemcpyDeviceToHost) == hipSuccess;
}

}  // namespace

Status reach_of_ranks(int32_t** kinds) {
  State& here = state();
  std::lock_guard<std::mutex> lock(here.mutex);
  static_assert(sizeof(*here.known.transportTypes) == sizeof(int32_t) &&
                ::mori::application::TransportType::P2P == kReachByMemory);
  if (here.known.transportTypes == nullptr) return no_world();
  *kinds = reinterpret_cast<int32_t*>(here.known.transportTypes);
  return Status();
}

Status give_up_messages(hipStream_t stream) {
  namespace core = ::mori::core;
  State& here = state();
  std::lock_guard<std::mutex> lock(here.mutex);
  const auto copy = [stream](void* to, const void* from, size_t bytes) {
    hipError_t error = hipMemcpyAsync(to, from, bytes, hipMemcpyDefault, stream);
    if (error == hipSuccess) error = hipStreamSynchronize(stream);
    if (error == hipSuccess) return Status();
    return Status(Code::kInternal, std::string("MORI's messages: ") + hipGetErrorString(error));
  };
  std::vector<core::ProxyCmd> messages(core::PROXY_RING_SIZE);
  for (int i = 0; i < here.known.numProxyRings; ++i) {
    core::ProxyRing* ring = here.known.proxyRings[i];
    if (ring == nullptr) continue;
    const size_t bytes = messages.size() * sizeof(messages[0]);
    if (Status status = copy(static_cast<void*>(messages.data()), ring->cmds, bytes);
        !status.ok()) {
      return status;
    }
    const uint32_t failed = core::PROXY_ERROR;
    for (size_t j = 0; j < messages.size(); ++j) {
      const uint32_t status = messages[j].status;
      if (status == core::PROXY_FREE || status == core::PROXY_COMPLETED) continue;
      auto* at = const_cast<uint32_t*>(&ring->cmds[j].status);
      if (Status status = copy(at, &failed, sizeof(failed)); !status.ok()) return status;
    }
  }
  return Status();
}

void world_barrier() { shmem::ShmemBarrierAll(); }

Status load_kernels(const std::string& path) {
  State& here = state();
  std::lock_guard<std::mutex> lock(here.mutex);
  if (here.world.rank < 0) return no_world();
  if (here.modules.count(path) != 0) return Status();
  hipModule_t module = nullptr;
  if (const hipError_t error = hipModuleLoad(&module, path.c_str()); error != hipSuccess) {
    (void)hipGetLastError();
    return Status(Code::kFailedPrecondition, "MORI's kernels in " + path +
                                                 " do not load: " + hipGetErrorString(error) +
                                                 "; remove the file, so that it is made again");
  }
  if (shmem::ShmemModuleInit(module) != 0) {
    (void)hipModuleUnload(module);
    return Status(Code::kFailedPrecondition,
                  path + " holds no kernels of MORI; remove it, so that it is made again");
  }
  int32_t by_proxy = 0;
  if (!here.world.node.empty() && read_global(module, "moriep_by_proxy", &by_proxy)) {
    shmem::GpuStates known{};
    if (!read_global(module, "_ZN4mori5shmem15globalGpuStatesE", &known)) {
      return Status(Code::kInternal, path + " does not say what MORI has told its kernels");
    }
    if ((known.numProxyRings > 0) != (by_proxy != 0)) {
      (void)hipModuleUnload(module);
      const auto way = [](bool proxy) { return proxy ? "MORI's host proxy" : "the GPU itself"; };
      return Status(
          Code::kFailedPrecondition,
          path + " was compiled to send by " + way(by_proxy != 0) +
              ", and MORI was opened to send by " + way(known.numProxyRings > 0) +
              "; set MORI_ENABLE_HOST_PROXY to one value, before the kernels are compiled "
              "and in every process");
    }
    here.known = known;
  }
  here.modules[path] = module;
  return Status();
}

Status find_kernel(const std::string& name, hipFunction_t* kernel) {
  State& here = state();
  std::lock_guard<std::mutex> lock(here.mutex);
  if (const auto known = here.functions.find(name); known != here.functions.end()) {
    *kernel = known->second;
    return Status();
  }
  for (const auto& [path, module] : here.modules) {
    if (hipModuleGetFunction(kernel, module, name.c_str()) == hipSuccess) {
      here.functions[name] = *kernel;
      return Status();
    }
    (void)hipGetLastError();
  }
  return Status(Code::kFailedPrecondition,
                "no kernel " + name + " is loaded; it was not compiled when the group opened");
}

}  // namespace moriep::mori
