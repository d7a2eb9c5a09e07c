#include "flag_sets.h"

#include <algorithm>
#include <string>

#include "symmetric.h"

namespace moriep::mori {

using ::mori::application::SymmMemObj;

namespace {

#define MORIEP_HIP_TRY(call)                                                                  \
  if (const hipError_t error = (call); error != hipSuccess) {                                 \
    (void)hipGetLastError();                                                                  \
    return Status(Code::kInternal, std::string("MORI's flags: ") + hipGetErrorString(error)); \
  }

uint64_t address(const void* at) { return reinterpret_cast<uint64_t>(at); }

}  // namespace

Status FlagSets::open(int32_t rank, int32_t num_ranks, int32_t ranks_on_node, int32_t max_tokens,
                      std::unique_ptr<FlagSets>* out) {
  auto made = std::unique_ptr<FlagSets>(new FlagSets());
  made->rank_ = rank;
  made->num_ranks_ = num_ranks;
  made->ranks_on_node_ = ranks_on_node;
  made->num_nodes_ = num_ranks / ranks_on_node;
  made->num_chunks_ = num_chunks(max_tokens);
  made->flag_bytes_ =
      static_cast<size_t>(made->num_nodes_) * static_cast<size_t>(made->num_chunks_) * 8;
  const size_t bytes = kFlagSets * made->set_bytes();
  if (Status status = allocate_symmetric(bytes, &made->object_); !status.ok()) return status;
  void* memory = nullptr;
  MORIEP_HIP_TRY(hipMalloc(&memory, sizeof(Tables)));
  made->tables_ = static_cast<Tables*>(memory);
  *out = std::move(made);
  return Status();
}

FlagSets::~FlagSets() {
  if (tables_ != nullptr) (void)hipFree(tables_);
}

std::byte* FlagSets::set(uint64_t number) const {
  return static_cast<std::byte*>(object_.cpu->localPtr) + number * set_bytes();
}

Status FlagSets::place(const uint64_t* peers, const uint64_t* remote) {
  auto tables = std::make_unique<Tables>();
  for (uint64_t number = 0; number < kFlagSets; ++number) {
    const bool detour = number == kDetourSet;
    const uint64_t offset = number * set_bytes();
    for (int32_t rank = 0; rank < num_ranks_; ++rank) {
      const uint64_t near = detour ? address(set(number)) : peers[rank] + offset;
      const uint64_t far = detour ? address(set(number)) : remote[rank] + offset;
      tables->flags[number].peers[rank] = near;
      tables->flags[number].remote[rank] = far;
      tables->totals[number].peers[rank] = near + flag_bytes_;
      tables->totals[number].remote[rank] = far + flag_bytes_;
    }
  }
  MORIEP_HIP_TRY(hipMemcpy(tables_, tables.get(), sizeof(Tables), hipMemcpyHostToDevice));
  return Status();
}

FlagArgs FlagSets::args(SymmMemObj* flags, SymmMemObj* totals) const {
  const auto word = [](auto* at) { return reinterpret_cast<uint64_t*>(at); };
  const auto names_of = [&](SymmMemObj* object, const Addresses* addresses, size_t behind) {
    FlagNames names{{word(&object->localPtr), word(&object->peerPtrs), word(&object->p2pPeerPtrs)},
                    {}};
    for (uint64_t number = 0; number < kFlagSets; ++number) {
      names.of[number][0] = address(set(number)) + behind;
      names.of[number][1] = address(addresses[number].remote);
      names.of[number][2] = address(addresses[number].peers);
    }
    return names;
  };
  FlagArgs args{};
  args.flags = names_of(flags, tables_->flags, 0);
  args.totals = names_of(totals, tables_->totals, flag_bytes_);
  for (uint64_t number = 0; number < kFlagSets; ++number) args.sets[number] = word(set(number));
  args.num_nodes = num_nodes_;
  args.num_chunks = num_chunks_;
  return args;
}

Status FlagSets::read(uint64_t step, hipStream_t stream, std::vector<uint64_t>* out) const {
  out->resize(set_bytes() / sizeof(uint64_t));
  MORIEP_HIP_TRY(
      hipMemcpyAsync(out->data(), set(step % 2), set_bytes(), hipMemcpyDeviceToHost, stream));
  MORIEP_HIP_TRY(hipStreamSynchronize(stream));
  return Status();
}

Status FlagSets::release(uint64_t step, hipStream_t stream) const {
  std::vector<uint64_t> words;
  if (Status status = read(step, stream, &words); !status.ok()) return status;
  for (uint64_t& word : words) word = std::max<uint64_t>(word, 1);
  MORIEP_HIP_TRY(
      hipMemcpyAsync(set(step % 2), words.data(), set_bytes(), hipMemcpyHostToDevice, stream));
  MORIEP_HIP_TRY(hipStreamSynchronize(stream));
  return Status();
}

int32_t FlagSets::silent_peer(uint64_t step, hipStream_t stream) const {
  std::vector<uint64_t> words;
  if (!read(step, stream, &words).ok()) return -1;
  for (int32_t node = 0; node < num_nodes_; ++node) {
    const int32_t peer = node * ranks_on_node_ + rank_ % ranks_on_node_;
    if (peer == rank_) continue;
    const auto first = words.begin() + node * num_chunks_;
    const auto come = static_cast<uint64_t>(
        std::count_if(first, first + num_chunks_, [](uint64_t flag) { return flag > 0; }));
    const uint64_t total = words[static_cast<size_t>(num_nodes_ * num_chunks_ + node)];
    const bool full = come == static_cast<uint64_t>(num_chunks_);
    if (!full && (total == 0 || come * kChunk + 1 < total)) return peer;
  }
  return -1;
}

}  // namespace moriep::mori
