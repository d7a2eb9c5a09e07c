#include "queue_pair.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <optional>
#include <string>

#include "memory.h"

namespace gfx942::nic {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr auto kLook = milliseconds(1);

struct Pairs {
  std::mutex mutex;
  std::map<uint32_t, std::shared_ptr<QueuePair>> by_number;
  uint32_t next = 1;
};

Pairs& pairs() {
  static auto* const kPairs = new Pairs();
  return *kPairs;
}

bool is_atomic(ibv_wr_opcode opcode) {
  return opcode == IBV_WR_ATOMIC_FETCH_AND_ADD || opcode == IBV_WR_ATOMIC_CMP_AND_SWP;
}
bool is_send(ibv_wr_opcode opcode) {
  return opcode == IBV_WR_SEND || opcode == IBV_WR_SEND_WITH_IMM;
}

ibv_wc_opcode completed(ibv_wr_opcode opcode) {
  if (opcode == IBV_WR_RDMA_WRITE) return IBV_WC_RDMA_WRITE;
  if (opcode == IBV_WR_ATOMIC_FETCH_AND_ADD) return IBV_WC_FETCH_ADD;
  return opcode == IBV_WR_ATOMIC_CMP_AND_SWP ? IBV_WC_COMP_SWAP : IBV_WC_SEND;
}

// When a peer that stays silent is given up.
std::optional<Clock::time_point> retry_deadline() {
  if (settings().retry_ms == 0) return {};
  return Clock::now() + milliseconds(settings().retry_ms);
}

bool is_over(const std::optional<Clock::time_point>& deadline) {
  return deadline.has_value() && Clock::now() >= *deadline;
}

// Whether the message that goes now is the one that shall fail.
bool fails_here() {
  static std::atomic<int64_t> sent{0};
  return ++sent == settings().failing_at;
}

uint64_t execute_atomic(const Request& request) {
  auto* word = reinterpret_cast<uint64_t*>(request.at);
  if (request.opcode == IBV_WR_ATOMIC_FETCH_AND_ADD) {
    return __atomic_fetch_add(word, request.operand, __ATOMIC_SEQ_CST);
  }
  uint64_t found = request.operand;
  __atomic_compare_exchange_n(word, &found, request.swap, false, __ATOMIC_SEQ_CST,
                              __ATOMIC_SEQ_CST);
  return found;
}

}  // namespace

void CompletionQueue::add(const ibv_wc& completion, Clock::time_point when) {
  std::lock_guard lock(mutex_);
  waiting_.emplace(when, completion);
}

int CompletionQueue::poll(int most, ibv_wc* out) {
  std::lock_guard lock(mutex_);
  int found = 0;
  while (found < most && !waiting_.empty() && waiting_.begin()->first <= Clock::now()) {
    out[found++] = waiting_.begin()->second;
    waiting_.erase(waiting_.begin());
  }
  return found;
}

QueuePair::QueuePair(const ibv_qp_init_attr& wanted, uint32_t number)
    : wanted_(wanted), traffic_(add_pair(number)), delays_(number) {
  verbs.qp_num = number;
  verbs.state = IBV_QPS_RESET;
  verbs.qp_type = wanted.qp_type;
  verbs.send_cq = wanted.send_cq;
  verbs.recv_cq = wanted.recv_cq;
}

QueuePair::~QueuePair() {
  {
    std::lock_guard lock(mutex_);
    closing_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

int QueuePair::modify(const ibv_qp_attr& attributes, int mask) {
  std::lock_guard lock(mutex_);
  if ((mask & IBV_QP_AV) != 0) {
    peer_ = address_in(attributes.ah_attr.grh.dgid.raw);
    traffic_.peer_pid = peer_.pid;
  }
  if ((mask & IBV_QP_DEST_QPN) != 0) peer_number_ = attributes.dest_qp_num;
  if ((mask & IBV_QP_STATE) == 0) return 0;
  const ibv_qp_state from = verbs.state;
  const ibv_qp_state to = attributes.qp_state;
  const bool next = (from == IBV_QPS_RESET && to == IBV_QPS_INIT) ||
                    (from == IBV_QPS_INIT && to == IBV_QPS_RTR && peer_number_ != 0) ||
                    (from == IBV_QPS_RTR && to == IBV_QPS_RTS) || to == IBV_QPS_ERR;
  if (!next) {
    return refuse("queue pair " + std::to_string(verbs.qp_num) + " cannot go from state " +
                      std::to_string(from) + " to " + std::to_string(to),
                  EINVAL);
  }
  verbs.state = to;
  if (to == IBV_QPS_RTS) thread_ = std::thread([this] { run(); });
  changed_.notify_all();
  return 0;
}

int QueuePair::post_send(ibv_send_wr* work, ibv_send_wr** bad) {
  std::lock_guard lock(mutex_);
  for (; work != nullptr; work = work->next) {
    *bad = work;
    if (verbs.state != IBV_QPS_RTS && verbs.state != IBV_QPS_ERR) {
      return refuse("work is posted to a queue pair that is not ready", EINVAL);
    }
    if (work->opcode != IBV_WR_RDMA_WRITE && !is_send(work->opcode) && !is_atomic(work->opcode)) {
      return refuse("nobody simulates opcode " + std::to_string(work->opcode), EINVAL);
    }
    if (posted_.size() >= wanted_.cap.max_send_wr) return ENOMEM;
    Work taken{*work, {work->sg_list, work->sg_list + work->num_sge}, {}};
    taken.verbs.next = nullptr;
    if ((work->send_flags & IBV_SEND_INLINE) != 0) {
      for (const ibv_sge& part : taken.parts) {
        const auto* from = reinterpret_cast<const std::byte*>(part.addr);
        taken.inlined.insert(taken.inlined.end(), from, from + part.length);
      }
      if (taken.inlined.size() > wanted_.cap.max_inline_data) {
        return refuse(std::to_string(taken.inlined.size()) +
                          " bytes are inlined, more than the queue pair was made for",
                      EINVAL);
      }
    }
    posted_.push_back(std::move(taken));
  }
  *bad = nullptr;
  changed_.notify_all();
  return 0;
}

int QueuePair::post_receive(ibv_recv_wr* work, ibv_recv_wr** bad) {
  std::lock_guard lock(mutex_);
  for (; work != nullptr; work = work->next) {
    *bad = work;
    if (work->num_sge > 1) return refuse("a receive must have one part", EINVAL);
    if (receives_.size() >= wanted_.cap.max_recv_wr) return ENOMEM;
    receives_.push_back({work->wr_id, work->num_sge == 1 ? work->sg_list[0] : ibv_sge{}});
  }
  *bad = nullptr;
  changed_.notify_all();
  return 0;
}

bool QueuePair::pause(int64_t microseconds_) {
  std::unique_lock lock(mutex_);
  return !changed_.wait_for(lock, microseconds(microseconds_), [this] { return closing_; });
}

void QueuePair::run() {
  for (;;) {
    Work work;
    bool failed = false;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return closing_ || !posted_.empty(); });
      if (closing_) return;
      // It keeps its place among what is posted until it has completed.
      work = posted_.front();
      failed = verbs.state == IBV_QPS_ERR;
    }
    Reply reply{};
    ibv_wc_status status = IBV_WC_WR_FLUSH_ERR;
    if (!failed) {
      if (!pause(delays_.next())) return;
      status = carry_out(work, &reply);
    }
    {
      std::lock_guard lock(mutex_);
      if (closing_) return;
      posted_.pop_front();
      if (status != IBV_WC_SUCCESS) verbs.state = IBV_QPS_ERR;
    }
    if (status != IBV_WC_SUCCESS) ++traffic_.errors;
    const bool wanted = wanted_.sq_sig_all != 0 || (work.verbs.send_flags & IBV_SEND_SIGNALED) != 0;
    if (!wanted && status == IBV_WC_SUCCESS) continue;
    ibv_wc completion{};
    completion.wr_id = work.verbs.wr_id;
    completion.status = status;
    completion.opcode = completed(work.verbs.opcode);
    completion.qp_num = verbs.qp_num;
    // Late, but behind the one before.
    last_visible_ = std::max(last_visible_, Clock::now() + microseconds(delays_.next()));
    reinterpret_cast<CompletionQueue*>(wanted_.send_cq)->add(completion, last_visible_);
  }
}

ibv_wc_status QueuePair::carry_out(const Work& work, Reply* reply) {
  const ibv_send_wr& verb = work.verbs;
  Request request{};
  request.opcode = verb.opcode;
  request.queue_pair = peer_number_;
  request.immediate = verb.imm_data;
  std::vector<std::byte> data = work.inlined;
  if (is_atomic(verb.opcode)) {
    request.at = verb.wr.atomic.remote_addr;
    request.key = verb.wr.atomic.rkey;
    request.operand = verb.wr.atomic.compare_add;
    request.swap = verb.wr.atomic.swap;
  } else {
    request.at = verb.wr.rdma.remote_addr;
    request.key = verb.wr.rdma.rkey;
    for (const ibv_sge& part : work.parts) {
      if ((verb.send_flags & IBV_SEND_INLINE) != 0) break;
      const auto* from = reinterpret_cast<const std::byte*>(part.addr);
      if (!allows(part.lkey, from, part.length, Use::kLocalRead)) return IBV_WC_LOC_PROT_ERR;
      data.insert(data.end(), from, from + part.length);
    }
  }
  request.bytes = data.size();
  if (fails_here()) return IBV_WC_REM_OP_ERR;
  const ibv_wc_status status = deliver(request, data, reply);
  if (status != IBV_WC_SUCCESS) return status;
  if (is_atomic(verb.opcode)) {
    const ibv_sge& part = work.parts.at(0);
    auto* to = reinterpret_cast<void*>(part.addr);
    if (part.length < 8 || !allows(part.lkey, to, 8, Use::kLocalWrite)) return IBV_WC_LOC_PROT_ERR;
    place(to, &reply->before, 8, &delays_);
  }
  count(work, is_atomic(verb.opcode) ? 8 : data.size());
  return IBV_WC_SUCCESS;
}

ibv_wc_status QueuePair::deliver(const Request& request, const std::vector<std::byte>& data,
                                 Reply* reply) {
  const auto deadline = retry_deadline();
  while (board().stopped != 0 || !connection_.open(peer_)) {
    if (is_over(deadline)) return IBV_WC_RETRY_EXC_ERR;
    if (!pause(microseconds(kLook).count())) return IBV_WC_WR_FLUSH_ERR;
  }
  const std::optional<Reply> answer = connection_.ask(request, data, deadline);
  if (answer.has_value()) {
    *reply = *answer;
    return static_cast<ibv_wc_status>(answer->status);
  }
  // A peer that is gone looks like one that is silent, until the retries are over.
  while (!is_over(deadline)) {
    if (!pause(microseconds(kLook).count())) return IBV_WC_WR_FLUSH_ERR;
  }
  return IBV_WC_RETRY_EXC_ERR;
}

void QueuePair::count(const Work& work, uint64_t bytes) {
  if (is_atomic(work.verbs.opcode)) {
    ++traffic_.atomics;
    traffic_.atomic_bytes += bytes;
  } else if (is_send(work.verbs.opcode)) {
    ++traffic_.sends;
    traffic_.send_bytes += bytes;
  } else {
    ++traffic_.writes;
    traffic_.write_bytes += bytes;
  }
}

ibv_wc_status QueuePair::take(const Request& request, const std::vector<std::byte>& data,
                              Delays* delays) {
  Receive receive{};
  {
    std::unique_lock lock(mutex_);
    const auto ready = [this] { return closing_ || !receives_.empty(); };
    const auto longest = milliseconds(settings().retry_ms == 0 ? 1 << 30 : settings().retry_ms);
    if (!changed_.wait_for(lock, longest, ready)) return IBV_WC_RNR_RETRY_EXC_ERR;
    if (closing_) return IBV_WC_REM_OP_ERR;
    receive = receives_.front();
    receives_.pop_front();
  }
  auto* to = reinterpret_cast<void*>(receive.part.addr);
  if (data.size() > receive.part.length ||
      !allows(receive.part.lkey, to, data.size(), Use::kLocalWrite)) {
    return IBV_WC_REM_OP_ERR;
  }
  place(to, data.data(), data.size(), delays);
  ibv_wc completion{};
  completion.wr_id = receive.id;
  completion.status = IBV_WC_SUCCESS;
  completion.opcode = IBV_WC_RECV;
  completion.byte_len = static_cast<uint32_t>(data.size());
  completion.qp_num = verbs.qp_num;
  if (request.opcode == IBV_WR_SEND_WITH_IMM) {
    completion.wc_flags = IBV_WC_WITH_IMM;
    completion.imm_data = request.immediate;
  }
  reinterpret_cast<CompletionQueue*>(wanted_.recv_cq)->add(completion, Clock::now());
  return IBV_WC_SUCCESS;
}

std::shared_ptr<QueuePair> create_pair(const ibv_qp_init_attr& wanted) {
  Pairs& all = pairs();
  std::lock_guard lock(all.mutex);
  const uint32_t number = all.next++;
  return all.by_number[number] = std::make_shared<QueuePair>(wanted, number);
}

std::shared_ptr<QueuePair> find_pair(uint32_t number) {
  Pairs& all = pairs();
  std::lock_guard lock(all.mutex);
  const auto found = all.by_number.find(number);
  return found == all.by_number.end() ? nullptr : found->second;
}

void destroy_pair(uint32_t number) {
  std::shared_ptr<QueuePair> last;
  Pairs& all = pairs();
  std::lock_guard lock(all.mutex);
  const auto found = all.by_number.find(number);
  if (found == all.by_number.end()) return;
  last = std::move(found->second);
  all.by_number.erase(found);
}

Reply execute(const Request& request, const std::vector<std::byte>& data, Delays* delays) {
  const auto pair = find_pair(request.queue_pair);
  if (pair == nullptr) return {IBV_WC_REM_INV_REQ_ERR, 0, 0};
  const auto opcode = static_cast<ibv_wr_opcode>(request.opcode);
  if (is_send(opcode)) return {static_cast<uint32_t>(pair->take(request, data, delays)), 0, 0};
  auto* to = reinterpret_cast<void*>(request.at);
  if (is_atomic(opcode)) {
    if (!settings().atomics || request.at % 8 != 0) return {IBV_WC_REM_INV_REQ_ERR, 0, 0};
    if (!allows(request.key, to, 8, Use::kRemoteAtomic)) return {IBV_WC_REM_ACCESS_ERR, 0, 0};
    return {IBV_WC_SUCCESS, 0, execute_atomic(request)};
  }
  if (!allows(request.key, to, data.size(), Use::kRemoteWrite)) {
    return {IBV_WC_REM_ACCESS_ERR, 0, 0};
  }
  place(to, data.data(), data.size(), delays);
  return {IBV_WC_SUCCESS, 0, 0};
}

}  // namespace gfx942::nic
