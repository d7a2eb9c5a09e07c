// RCCL's calls, as librccl.so.1 has them.
#include <cstring>

#include "../runtime/handles.h"
#include "group.h"
#include "reduce.h"

using namespace gfx942::collectives;  // NOLINT: the entry points belong to no namespace.

namespace {

auto& communicators() { return gfx942::runtime::handles<ncclComm>(); }

ncclResult_t no_communicator(const char* call) {
  return report({ncclInvalidArgument, std::string(call) + ": the communicator is none, or gone"});
}

// Joins as a rank of the board, and gives the communicator once all have.
Setup join(std::shared_ptr<ncclComm> communicator, ncclComm_t* out) {
  const std::string call = "joining as rank " + std::to_string(communicator->rank()) + " of " +
                           std::to_string(communicator->ranks());
  *out = nullptr;
  return {call, [communicator, out](Failure* failure) {
            if (!communicator->complete(failure)) return false;
            *out = communicators().add(communicator);
            return true;
          }};
}

Failure make(const BoardId& id, int rank, int ranks, std::shared_ptr<ncclComm>* out) {
  if (ranks < 1 || ranks > kMaxRanks || rank < 0 || rank >= ranks) {
    return {ncclInvalidArgument, "rank=" + std::to_string(rank) +
                                     " and ranks=" + std::to_string(ranks) +
                                     " must be a rank of 1 to " + std::to_string(kMaxRanks)};
  }
  auto board = Board::open(id);
  if (board == nullptr) {
    return {ncclInvalidArgument, "the unique id is none, or the process that made it has ended"};
  }
  *out = std::make_shared<ncclComm>(std::move(board), rank, ranks);
  return (*out)->enter();
}

ncclResult_t enqueue(ncclComm_t handle, hipStream_t stream, const Operation& operation) {
  const auto communicator = communicators().find(handle);
  const std::string call = name_of(operation.kind);
  if (communicator == nullptr) return no_communicator(call.c_str());
  if (communicator->error() != ncclSuccess) return communicator->error();
  if (size_of(operation.type) == 0) {
    return report({ncclInvalidArgument, call + ": there is no type " +
                                            std::to_string(static_cast<int>(operation.type))});
  }
  if (operation.peer < 0 || operation.peer >= communicator->ranks()) {
    return report({ncclInvalidArgument, call + ": rank " + std::to_string(operation.peer) +
                                            " must be below " +
                                            std::to_string(communicator->ranks())});
  }
  const bool reduces = operation.kind == Kind::kAllReduce || operation.kind == Kind::kReduceScatter;
  if (reduces && !can_reduce(operation.type, operation.reduction)) {
    return report({ncclInvalidArgument,
                   call + ": the reduction " +
                       std::to_string(static_cast<int>(operation.reduction)) + " of type " +
                       std::to_string(static_cast<int>(operation.type)) + " is not simulated"});
  }
  return add(communicator, stream, operation);
}

}  // namespace

extern "C" {

ncclResult_t ncclGetVersion(int* version) {
  *version = 22707;
  return ncclSuccess;
}

const char* ncclGetErrorString(ncclResult_t result) {
  switch (result) {
    case ncclSuccess:
      return "no error";
    case ncclUnhandledCudaError:
      return "a call of HIP failed";
    case ncclSystemError:
      return "a call of the system failed";
    case ncclInternalError:
      return "what was called is not simulated";
    case ncclInvalidArgument:
      return "invalid argument";
    case ncclInvalidUsage:
      return "invalid usage";
    case ncclRemoteError:
      return "another rank has failed or is late";
    case ncclInProgress:
      return "in progress";
  }
  return "unknown result";
}

const char* ncclGetLastError(ncclComm_t) { return last_failure(); }

ncclResult_t ncclGetUniqueId(ncclUniqueId* out) {
  const auto id = Board::create();
  if (!id) return report({ncclSystemError, "ncclGetUniqueId: there is no memory for it"});
  static_assert(sizeof(*id) <= sizeof(out->internal));
  std::memset(out, 0, sizeof(*out));
  std::memcpy(out->internal, &*id, sizeof(*id));
  return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* out, int ranks, ncclUniqueId unique, int rank,
                                    ncclConfig_t*) {
  BoardId id;
  std::memcpy(&id, unique.internal, sizeof(id));
  std::shared_ptr<ncclComm> communicator;
  Failure failure = make(id, rank, ranks, &communicator);
  if (failure.code != ncclSuccess) {
    failure.text = "ncclCommInitRankConfig: " + failure.text;
    return report(failure);
  }
  return add(join(std::move(communicator), out));
}

ncclResult_t ncclCommSplit(ncclComm_t handle, int color, int key, ncclComm_t* out, ncclConfig_t*) {
  const auto parent = communicators().find(handle);
  if (parent == nullptr) return no_communicator(__func__);
  *out = nullptr;
  const uint64_t split = parent->vote(color, key);
  auto joining = std::make_shared<Setup>();
  return add({__func__, [=](Failure* failure) {
                if (joining->advance == nullptr) {
                  const auto part = parent->part(split);
                  if (!part) return false;
                  if (part->ranks == 0) return true;
                  std::shared_ptr<ncclComm> child;
                  *failure = make(part->id, part->rank, part->ranks, &child);
                  if (failure->code != ncclSuccess) return false;
                  *joining = join(std::move(child), out);
                }
                return joining->advance(failure);
              }});
}

ncclResult_t ncclCommDestroy(ncclComm_t handle) {
  return communicators().take(handle) == nullptr ? no_communicator(__func__) : ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t handle) {
  const auto communicator = communicators().take(handle);
  if (communicator == nullptr) return no_communicator(__func__);
  communicator->abort();
  return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t handle, ncclResult_t* error) {
  const auto communicator = communicators().find(handle);
  if (communicator == nullptr) return no_communicator(__func__);
  *error = communicator->error();
  return ncclSuccess;
}

ncclResult_t ncclCommCount(ncclComm_t handle, int* ranks) {
  const auto communicator = communicators().find(handle);
  if (communicator == nullptr) return no_communicator(__func__);
  *ranks = communicator->ranks();
  return ncclSuccess;
}

ncclResult_t ncclGroupStart() { return start_group(); }
ncclResult_t ncclGroupEnd() { return end_group(); }

ncclResult_t ncclAllReduce(const void* send, void* receive, size_t count, ncclDataType_t type,
                           ncclRedOp_t reduction, ncclComm_t comm, hipStream_t stream) {
  return enqueue(comm, stream, {Kind::kAllReduce, send, receive, count, type, reduction, 0});
}

ncclResult_t ncclReduceScatter(const void* send, void* receive, size_t count, ncclDataType_t type,
                               ncclRedOp_t reduction, ncclComm_t comm, hipStream_t stream) {
  return enqueue(comm, stream, {Kind::kReduceScatter, send, receive, count, type, reduction, 0});
}

ncclResult_t ncclAllGather(const void* send, void* receive, size_t count, ncclDataType_t type,
                           ncclComm_t comm, hipStream_t stream) {
  return enqueue(comm, stream, {Kind::kAllGather, send, receive, count, type, ncclSum, 0});
}

ncclResult_t ncclBroadcast(const void* send, void* receive, size_t count, ncclDataType_t type,
                           int root, ncclComm_t comm, hipStream_t stream) {
  return enqueue(comm, stream, {Kind::kBroadcast, send, receive, count, type, ncclSum, root});
}

ncclResult_t ncclSend(const void* send, size_t count, ncclDataType_t type, int peer,
                      ncclComm_t comm, hipStream_t stream) {
  return enqueue(comm, stream, {Kind::kSend, send, nullptr, count, type, ncclSum, peer});
}

ncclResult_t ncclRecv(void* receive, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      hipStream_t stream) {
  return enqueue(comm, stream, {Kind::kReceive, nullptr, receive, count, type, ncclSum, peer});
}

ncclResult_t ncclMemAlloc(void** address, size_t bytes) {
  return hipMalloc(address, bytes) == hipSuccess ? ncclSuccess : ncclUnhandledCudaError;
}

ncclResult_t ncclMemFree(void* address) {
  return hipFree(address) == hipSuccess ? ncclSuccess : ncclUnhandledCudaError;
}

}  // extern "C"
