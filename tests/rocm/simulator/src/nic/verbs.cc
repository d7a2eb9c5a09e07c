// The calls of libibverbs that amd-mori's host proxy makes, on one adapter for each process. What
// it does not make is refused, with a line on stderr.
#include <infiniband/verbs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "memory.h"
#include "queue_pair.h"
#include "settings.h"
#include "wire.h"

// The header's inline functions of these names call these.
#undef ibv_get_device_list
#undef ibv_query_port
#undef ibv_reg_mr

namespace gfx942::nic {
namespace {

constexpr char kName[] = "rocmsim_0";
constexpr uint32_t kLeastInline = 64;
constexpr uint32_t kVendor = 0x02c9;
// A maker whose adapters have no atomics, which amd-mori knows by its number.
constexpr uint32_t kVendorWithoutAtomics = 0x1dd8;

ibv_device* device() {
  static ibv_device* const kDevice = [] {
    auto* made = new ibv_device();
    made->node_type = IBV_NODE_CA;
    made->transport_type = IBV_TRANSPORT_IB;
    std::strcpy(made->name, kName);
    std::strcpy(made->dev_name, kName);
    return made;
  }();
  return kDevice;
}

QueuePair* pair_of(ibv_qp* pair) { return reinterpret_cast<QueuePair*>(pair); }
CompletionQueue* queue_of(ibv_cq* queue) { return reinterpret_cast<CompletionQueue*>(queue); }

int post_send(ibv_qp* pair, ibv_send_wr* work, ibv_send_wr** bad) {
  return pair_of(pair)->post_send(work, bad);
}
int post_receive(ibv_qp* pair, ibv_recv_wr* work, ibv_recv_wr** bad) {
  return pair_of(pair)->post_receive(work, bad);
}
int poll_queue(ibv_cq* queue, int most, ibv_wc* out) { return queue_of(queue)->poll(most, out); }

ibv_mr* register_memory(ibv_pd* domain, void* at, size_t bytes, int access) {
  auto* region = new ibv_mr();
  region->context = domain->context;
  region->pd = domain;
  region->addr = at;
  region->length = bytes;
  region->lkey = region->rkey = add_memory(at, bytes, access);
  return region;
}

template <typename Result>
Result* unsimulated(const char* call) {
  refuse(std::string("nobody simulates ") + call, EOPNOTSUPP);
  return nullptr;
}

}  // namespace
}  // namespace gfx942::nic

namespace nic = gfx942::nic;

// NOLINTBEGIN: the names and the types are verbs'.
extern "C" {

ibv_device** ibv_get_device_list(int* count) {
  auto** list = static_cast<ibv_device**>(std::calloc(2, sizeof(ibv_device*)));
  list[0] = nic::device();
  if (count != nullptr) *count = 1;
  return list;
}

void ibv_free_device_list(ibv_device** list) { std::free(list); }

const char* ibv_get_device_name(ibv_device* device) { return device->name; }

ibv_context* ibv_open_device(ibv_device* device) {
  nic::listen_here();
  auto* context = new ibv_context();
  context->device = device;
  context->ops.poll_cq = nic::poll_queue;
  context->ops.post_send = nic::post_send;
  context->ops.post_recv = nic::post_receive;
  context->cmd_fd = context->async_fd = -1;
  context->num_comp_vectors = 1;
  return context;
}

int ibv_close_device(ibv_context* context) {
  delete context;
  return 0;
}

int ibv_query_device(ibv_context*, ibv_device_attr* found) {
  *found = {};
  const bool atomics = nic::settings().atomics;
  found->vendor_id = atomics ? nic::kVendor : nic::kVendorWithoutAtomics;
  found->atomic_cap = atomics ? IBV_ATOMIC_GLOB : IBV_ATOMIC_NONE;
  found->max_mr_size = ~uint64_t{0};
  found->max_qp = 512;
  found->max_qp_wr = 16384;
  found->max_sge = 4;
  found->max_cq = 1024;
  found->max_cqe = 1 << 17;
  found->max_mr = 1024;
  found->max_pd = 16;
  found->max_qp_rd_atom = found->max_qp_init_rd_atom = 16;
  found->phys_port_cnt = 1;
  return 0;
}

// The older of two structs, whose fields are a part of what the caller has room for.
int ibv_query_port(ibv_context*, uint8_t, struct _compat_ibv_port_attr* room) {
  auto* found = reinterpret_cast<ibv_port_attr*>(room);
  found->state = IBV_PORT_ACTIVE;
  found->max_mtu = found->active_mtu = IBV_MTU_4096;
  found->gid_tbl_len = 1;
  found->pkey_tbl_len = 1;
  found->max_msg_sz = 1u << 31;
  found->active_width = 2;
  found->active_speed = 32;
  found->phys_state = 5;
  found->link_layer = IBV_LINK_LAYER_ETHERNET;
  return 0;
}

int ibv_query_gid(ibv_context*, uint8_t, int index, ibv_gid* gid) {
  if (index != 0) return nic::refuse("there is one GID", EINVAL);
  const auto bytes = nic::gid_of(nic::listen_here());
  std::memcpy(gid->raw, bytes.data(), bytes.size());
  return 0;
}

int _ibv_query_gid_ex(ibv_context* context, uint32_t port, uint32_t index, ibv_gid_entry* entry,
                      uint32_t, size_t) {
  *entry = {};
  entry->port_num = port;
  entry->gid_index = index;
  entry->gid_type = IBV_GID_TYPE_ROCE_V2;
  return ibv_query_gid(context, static_cast<uint8_t>(port), static_cast<int>(index), &entry->gid);
}

ibv_pd* ibv_alloc_pd(ibv_context* context) {
  auto* domain = new ibv_pd();
  domain->context = context;
  return domain;
}

int ibv_dealloc_pd(ibv_pd* domain) {
  delete domain;
  return 0;
}

ibv_mr* ibv_reg_mr(ibv_pd* domain, void* at, size_t bytes, int access) {
  return nic::register_memory(domain, at, bytes, access);
}

ibv_mr* ibv_reg_mr_iova2(ibv_pd* domain, void* at, size_t bytes, uint64_t iova, unsigned access) {
  if (iova != reinterpret_cast<uint64_t>(at)) {
    nic::refuse("peers must know memory by its address", EOPNOTSUPP);
    return nullptr;
  }
  return nic::register_memory(domain, at, bytes, static_cast<int>(access));
}

int ibv_dereg_mr(ibv_mr* region) {
  nic::remove_memory(region->lkey);
  delete region;
  return 0;
}

ibv_cq* ibv_create_cq(ibv_context* context, int entries, void* user, ibv_comp_channel* channel,
                      int) {
  if (channel != nullptr) return nic::unsimulated<ibv_cq>("completion channels");
  auto* queue = new nic::CompletionQueue();
  queue->verbs.context = context;
  queue->verbs.cqe = entries;
  queue->verbs.cq_context = user;
  return &queue->verbs;
}

int ibv_destroy_cq(ibv_cq* queue) {
  delete nic::queue_of(queue);
  return 0;
}

ibv_qp* ibv_create_qp(ibv_pd* domain, ibv_qp_init_attr* wanted) {
  if (wanted->qp_type != IBV_QPT_RC || wanted->srq != nullptr) {
    return nic::unsimulated<ibv_qp>("queue pairs but reliable ones with receives of their own");
  }
  // Real adapters give more than they are asked for, and say so.
  wanted->cap.max_inline_data = std::max(wanted->cap.max_inline_data, nic::kLeastInline);
  const auto made = nic::create_pair(*wanted);
  made->verbs.context = domain->context;
  made->verbs.pd = domain;
  return &made->verbs;
}

int ibv_modify_qp(ibv_qp* pair, ibv_qp_attr* attributes, int mask) {
  return nic::pair_of(pair)->modify(*attributes, mask);
}

int ibv_destroy_qp(ibv_qp* pair) {
  nic::destroy_pair(pair->qp_num);
  return 0;
}

const char* ibv_wc_status_str(ibv_wc_status status) {
  switch (status) {
    case IBV_WC_SUCCESS:
      return "success";
    case IBV_WC_LOC_PROT_ERR:
      return "local memory that no key allows";
    case IBV_WC_WR_FLUSH_ERR:
      return "flushed, the queue pair has failed before";
    case IBV_WC_REM_ACCESS_ERR:
      return "the peer's memory that no key allows";
    case IBV_WC_REM_INV_REQ_ERR:
      return "nothing that the peer can do";
    case IBV_WC_REM_OP_ERR:
      return "the peer failed";
    case IBV_WC_RETRY_EXC_ERR:
      return "the peer is silent";
    case IBV_WC_RNR_RETRY_EXC_ERR:
      return "the peer expects no message";
    default:
      return "another failure";
  }
}

ibv_mr* ibv_reg_dmabuf_mr(ibv_pd*, uint64_t, size_t, uint64_t, int, int) {
  return nic::unsimulated<ibv_mr>("ibv_reg_dmabuf_mr");
}
ibv_comp_channel* ibv_create_comp_channel(ibv_context*) {
  return nic::unsimulated<ibv_comp_channel>("ibv_create_comp_channel");
}
int ibv_destroy_comp_channel(ibv_comp_channel*) {
  return nic::refuse("nobody simulates ibv_destroy_comp_channel", EOPNOTSUPP);
}
ibv_srq* ibv_create_srq(ibv_pd*, ibv_srq_init_attr*) {
  return nic::unsimulated<ibv_srq>("ibv_create_srq");
}
int ibv_destroy_srq(ibv_srq*) {
  return nic::refuse("nobody simulates ibv_destroy_srq", EOPNOTSUPP);
}
int ibv_get_cq_event(ibv_comp_channel*, ibv_cq**, void**) {
  nic::refuse("nobody simulates ibv_get_cq_event", EOPNOTSUPP);
  return -1;
}
void ibv_ack_cq_events(ibv_cq*, unsigned) {
  nic::refuse("nobody simulates ibv_ack_cq_events", EOPNOTSUPP);
}
int ibv_get_async_event(ibv_context*, ibv_async_event*) {
  nic::refuse("nobody simulates ibv_get_async_event", EOPNOTSUPP);
  return -1;
}
void ibv_ack_async_event(ibv_async_event*) {
  nic::refuse("nobody simulates ibv_ack_async_event", EOPNOTSUPP);
}

}  // extern "C"
// NOLINTEND
