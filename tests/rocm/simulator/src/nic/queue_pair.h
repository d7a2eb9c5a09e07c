// Queue pairs and completion queues. Each queue pair that sends has a thread, so that messages of
// one are in order and those of several are not.
#pragma once

#include <infiniband/verbs.h>

#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "board.h"
#include "settings.h"
#include "wire.h"

namespace gfx942::nic {

class CompletionQueue {
 public:
  ibv_cq verbs = {};  // first: verbs knows a queue by its address

  // Makes a completion visible to poll() from a time on.
  void add(const ibv_wc& completion, Clock::time_point when);
  int poll(int most, ibv_wc* out);

 private:
  std::mutex mutex_;
  std::multimap<Clock::time_point, ibv_wc> waiting_;
};

// A posted piece of work, with what it says about its data.
struct Work {
  ibv_send_wr verbs;
  std::vector<ibv_sge> parts;
  std::vector<std::byte> inlined;  // what was copied when it was posted
};

class QueuePair {
 public:
  ibv_qp verbs = {};  // first, likewise

  QueuePair(const ibv_qp_init_attr& wanted, uint32_t number);
  ~QueuePair();
  QueuePair(const QueuePair&) = delete;
  QueuePair& operator=(const QueuePair&) = delete;

  int modify(const ibv_qp_attr& attributes, int mask);
  int post_send(ibv_send_wr* work, ibv_send_wr** bad);
  int post_receive(ibv_recv_wr* work, ibv_recv_wr** bad);
  // A peer's SEND: waits until there is a place for it, as senders that retry do.
  ibv_wc_status take(const Request& request, const std::vector<std::byte>& data, Delays* delays);

 private:
  struct Receive {
    uint64_t id;
    ibv_sge part;
  };

  void run();
  ibv_wc_status carry_out(const Work& work, Reply* reply);
  ibv_wc_status deliver(const Request& request, const std::vector<std::byte>& data, Reply* reply);
  void count(const Work& work, uint64_t bytes);
  bool pause(int64_t microseconds);

  const ibv_qp_init_attr wanted_;
  Traffic& traffic_;
  Delays delays_;
  Connection connection_;
  Clock::time_point last_visible_{};

  std::mutex mutex_;
  std::condition_variable changed_;
  bool closing_ = false;
  Address peer_;
  uint32_t peer_number_ = 0;
  std::deque<Work> posted_;
  std::deque<Receive> receives_;
  std::thread thread_;
};

std::shared_ptr<QueuePair> create_pair(const ibv_qp_init_attr& wanted);
std::shared_ptr<QueuePair> find_pair(uint32_t number);
void destroy_pair(uint32_t number);

// What a peer asks of this process.
Reply execute(const Request& request, const std::vector<std::byte>& data, Delays* delays);

}  // namespace gfx942::nic
