// The adapter between processes: order, atomics, receives, and what goes wrong. It calls verbs as
// amd-mori's host proxy does. Every case runs in processes of its own, which are killed at the end.
#include <infiniband/verbs.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "board.h"

namespace {

using gfx942::nic::Board;
using Clock = std::chrono::steady_clock;

constexpr int kPairs = 4;
constexpr size_t kBytes = 65536;
constexpr double kDeadline = 20;

void require(bool good, const char* what, int line) {
  if (good) return;
  std::fprintf(stderr, "[%d] line %d: %s\n", static_cast<int>(getpid()), line, what);
  std::_Exit(1);
}
#define CHECK(condition) require(condition, #condition, __LINE__)

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// What two sides of a case tell each other, in memory that both have.
struct Side {
  uint8_t gid[16];
  uint32_t numbers[kPairs];
  uint64_t memory;
  uint32_t key;
  uint64_t said;  // how far it is
};

struct Shared {
  Side sides[2];
};

void say(Side& side, uint64_t what) { __atomic_store_n(&side.said, what, __ATOMIC_RELEASE); }
void await(const Side& side, uint64_t what) {
  const auto begin = Clock::now();
  while (__atomic_load_n(&side.said, __ATOMIC_ACQUIRE) < what) {
    CHECK(seconds_since(begin) < kDeadline);
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
}

// One side: an adapter, four queue pairs to the other side, and memory that it may write.
class Node {
 public:
  Node(Shared& shared, int number)
      : mine_(shared.sides[number]), theirs_(shared.sides[1 - number]) {
    int count = 0;
    ibv_device** list = ibv_get_device_list(&count);
    CHECK(count == 1);
    context_ = ibv_open_device(list[0]);
    ibv_free_device_list(list);
    domain_ = ibv_alloc_pd(context_);
    queue_ = ibv_create_cq(context_, 4096, nullptr, nullptr, 0);
    memory_ = static_cast<std::byte*>(std::aligned_alloc(4096, kBytes));
    std::memset(memory_, 0, kBytes);
    region_ =
        ibv_reg_mr(domain_, memory_, kBytes,
                   IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC);
    ibv_gid gid{};
    CHECK(ibv_query_gid(context_, 1, 0, &gid) == 0);
    std::memcpy(mine_.gid, gid.raw, sizeof(mine_.gid));
    for (int i = 0; i < kPairs; ++i) {
      ibv_qp_init_attr wanted{};
      wanted.send_cq = wanted.recv_cq = queue_;
      wanted.cap = {.max_send_wr = 256,
                    .max_recv_wr = 16,
                    .max_send_sge = 1,
                    .max_recv_sge = 1,
                    .max_inline_data = 32};
      wanted.qp_type = IBV_QPT_RC;
      pairs_.push_back(ibv_create_qp(domain_, &wanted));
      mine_.numbers[i] = pairs_.back()->qp_num;
    }
    mine_.memory = reinterpret_cast<uint64_t>(memory_);
    mine_.key = region_->rkey;
    say(mine_, 1);
    await(theirs_, 1);
    for (int i = 0; i < kPairs; ++i) connect(i);
    say(mine_, 2);
    await(theirs_, 2);
  }

  ~Node() {
    for (ibv_qp* pair : pairs_) ibv_destroy_qp(pair);
    ibv_dereg_mr(region_);
    ibv_destroy_cq(queue_);
    ibv_dealloc_pd(domain_);
    ibv_close_device(context_);
    std::free(memory_);
  }
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;

  Side& mine() { return mine_; }
  Side& theirs() { return theirs_; }

  uint64_t word(size_t index) const {
    return __atomic_load_n(reinterpret_cast<uint64_t*>(memory_) + index, __ATOMIC_ACQUIRE);
  }
  void set(size_t index, uint64_t value) {
    __atomic_store_n(reinterpret_cast<uint64_t*>(memory_) + index, value, __ATOMIC_RELEASE);
  }
  void await_word(size_t index, uint64_t value) const {
    const auto begin = Clock::now();
    while (word(index) != value) {
      CHECK(seconds_since(begin) < kDeadline);
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }

  // Words from and to the same places of both sides.
  void write(int pair, size_t from, size_t to, size_t words, uint64_t id, uint32_t beyond = 0) {
    ibv_send_wr work = start(IBV_WR_RDMA_WRITE, id);
    work.wr.rdma.remote_addr = theirs_.memory + to * 8 + beyond;
    work.wr.rdma.rkey = theirs_.key;
    post(pair, work, from, static_cast<uint32_t>(words * 8));
  }
  void write_inline(int pair, uint64_t value, size_t to, uint64_t id) {
    ibv_send_wr work = start(IBV_WR_RDMA_WRITE, id);
    work.send_flags |= IBV_SEND_INLINE;
    work.wr.rdma.remote_addr = theirs_.memory + to * 8;
    work.wr.rdma.rkey = theirs_.key;
    ibv_sge part{reinterpret_cast<uint64_t>(&value), 8, 0};
    work.sg_list = &part;
    work.num_sge = 1;
    ibv_send_wr* bad = nullptr;
    CHECK(ibv_post_send(pairs_[static_cast<size_t>(pair)], &work, &bad) == 0);
    value = 0;  // it was copied
  }
  void atomic(ibv_wr_opcode opcode, size_t to, uint64_t operand, uint64_t swap, size_t found,
              uint64_t id) {
    ibv_send_wr work = start(opcode, id);
    work.wr.atomic = {theirs_.memory + to * 8, operand, swap, theirs_.key};
    post(0, work, found, 8);
  }
  void send(int pair, size_t from, size_t words, uint32_t immediate, uint64_t id) {
    ibv_send_wr work = start(IBV_WR_SEND_WITH_IMM, id);
    work.imm_data = immediate;
    post(pair, work, from, static_cast<uint32_t>(words * 8));
  }
  void receive(int pair, size_t to, size_t words, uint64_t id) {
    ibv_sge part = part_of(to, static_cast<uint32_t>(words * 8));
    ibv_recv_wr work{};
    work.wr_id = id;
    work.sg_list = &part;
    work.num_sge = 1;
    ibv_recv_wr* bad = nullptr;
    CHECK(ibv_post_recv(pairs_[static_cast<size_t>(pair)], &work, &bad) == 0);
  }

  std::vector<ibv_wc> complete(size_t count) {
    const auto begin = Clock::now();
    std::vector<ibv_wc> done;
    while (done.size() < count) {
      ibv_wc one{};
      const int got = ibv_poll_cq(queue_, 1, &one);
      CHECK(got >= 0);
      if (got == 1) done.push_back(one);
      CHECK(seconds_since(begin) < kDeadline);
      if (got == 0) std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
    return done;
  }
  ibv_wc complete_one() { return complete(1).front(); }
  bool nothing_completes(double seconds) {
    std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
    ibv_wc one{};
    return ibv_poll_cq(queue_, 1, &one) == 0;
  }

 private:
  ibv_send_wr start(ibv_wr_opcode opcode, uint64_t id) {
    ibv_send_wr work{};
    work.wr_id = id;
    work.opcode = opcode;
    work.send_flags = IBV_SEND_SIGNALED;
    return work;
  }
  ibv_sge part_of(size_t index, uint32_t bytes) {
    return {reinterpret_cast<uint64_t>(memory_) + index * 8, bytes, region_->lkey};
  }
  void post(int pair, ibv_send_wr work, size_t from, uint32_t bytes) {
    ibv_sge part = part_of(from, bytes);
    work.sg_list = &part;
    work.num_sge = 1;
    ibv_send_wr* bad = nullptr;
    CHECK(ibv_post_send(pairs_[static_cast<size_t>(pair)], &work, &bad) == 0);
  }
  void connect(int i) {
    ibv_qp* pair = pairs_[static_cast<size_t>(i)];
    ibv_qp_attr attributes{};
    attributes.qp_state = IBV_QPS_INIT;
    CHECK(ibv_modify_qp(pair, &attributes, IBV_QP_STATE) == 0);
    attributes.qp_state = IBV_QPS_RTR;
    attributes.dest_qp_num = theirs_.numbers[i];
    std::memcpy(attributes.ah_attr.grh.dgid.raw, theirs_.gid, sizeof(theirs_.gid));
    CHECK(ibv_modify_qp(pair, &attributes, IBV_QP_STATE | IBV_QP_AV | IBV_QP_DEST_QPN) == 0);
    attributes.qp_state = IBV_QPS_RTS;
    CHECK(ibv_modify_qp(pair, &attributes, IBV_QP_STATE) == 0);
  }

  Side& mine_;
  Side& theirs_;
  ibv_context* context_ = nullptr;
  ibv_pd* domain_ = nullptr;
  ibv_cq* queue_ = nullptr;
  std::byte* memory_ = nullptr;
  ibv_mr* region_ = nullptr;
  std::vector<ibv_qp*> pairs_;
};

using Part = std::function<void(Node&)>;

void run_case(const char* name, const Part& first, const Part& second,
              bool second_is_killed = false) {
  auto* shared =
      new (mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0))
          Shared();
  pid_t pids[2];
  const Part* parts[2] = {&first, &second};
  for (int number = 0; number < 2; ++number) {
    pids[number] = fork();
    if (pids[number] != 0) continue;
    alarm(60);
    {
      Node node(*shared, number);
      (*parts[number])(node);
      say(node.mine(), 100);
      if (!second_is_killed) await(node.theirs(), 100);
    }
    std::exit(0);  // with the sanitizer's search for leaks
  }
  int status[2];
  for (int number = 0; number < 2; ++number) waitpid(pids[number], &status[number], 0);
  const bool good = status[0] == 0 && (second_is_killed ? WIFSIGNALED(status[1]) : status[1] == 0);
  munmap(shared, sizeof(Shared));
  std::printf("%s: %s\n", name, good ? "ok" : "failed");
  std::fflush(stdout);
  if (!good) std::_Exit(1);
}

constexpr size_t kFlag = 2000;
constexpr int kRounds = 40;

// A flag behind data in one queue pair says that the data is there.
void test_order_in_a_pair() {
  run_case(
      "order in a pair",
      [](Node& node) {
        for (uint64_t round = 1; round <= kRounds; ++round) {
          for (size_t i = 0; i < 1024; ++i) node.set(i, round * 1000 + i);
          node.write(0, 0, 0, 1024, round);
          node.write_inline(0, round, kFlag, round);
          for (const ibv_wc& done : node.complete(2)) CHECK(done.status == IBV_WC_SUCCESS);
          await(node.theirs(), 2 + round);
        }
      },
      [](Node& node) {
        for (uint64_t round = 1; round <= kRounds; ++round) {
          node.await_word(kFlag, round);
          for (size_t i = 0; i < 1024; ++i) CHECK(node.word(i) == round * 1000 + i);
          say(node.mine(), 2 + round);
        }
      });
}

// Completions of one pair are in order; those of several are not, sooner or later.
void test_order_between_pairs() {
  run_case(
      "order between pairs",
      [](Node& node) {
        bool mixed = false;
        for (uint64_t round = 0; round < kRounds; ++round) {
          for (uint64_t i = 0; i < 8; ++i) node.write(static_cast<int>(i % kPairs), 0, 8 * i, 1, i);
          const auto done = node.complete(8);
          for (size_t i = 1; i < done.size(); ++i) mixed |= done[i].wr_id < done[i - 1].wr_id;
          std::vector<uint64_t> last(kPairs, 0);
          for (const ibv_wc& one : done) {
            CHECK(one.wr_id >= last[one.wr_id % kPairs]);
            last[one.wr_id % kPairs] = one.wr_id;
          }
        }
        CHECK(mixed);
      },
      [](Node&) {});
}

void test_atomics() {
  run_case(
      "atomics",
      [](Node& node) {
        for (uint64_t i = 0; i < 10; ++i) {
          node.atomic(IBV_WR_ATOMIC_FETCH_AND_ADD, 5, 3, 0, 0, i);
          CHECK(node.complete_one().status == IBV_WC_SUCCESS);
          CHECK(node.word(0) == 3 * i);
        }
        node.atomic(IBV_WR_ATOMIC_CMP_AND_SWP, 5, 30, 7, 0, 11);
        CHECK(node.complete_one().opcode == IBV_WC_COMP_SWAP);
        node.atomic(IBV_WR_ATOMIC_CMP_AND_SWP, 5, 30, 8, 0, 12);
        node.complete_one();
        CHECK(node.word(0) == 7);
      },
      [](Node& node) { node.await_word(5, 7); });
}

void test_sends() {
  run_case(
      "sends",
      [](Node& node) {
        node.set(0, 41);
        node.set(1, 42);
        node.send(1, 0, 2, 0xa70c, 9);  // may come before there is a place for it
        const ibv_wc done = node.complete_one();
        CHECK(done.status == IBV_WC_SUCCESS && done.wr_id == 9);
      },
      [](Node& node) {
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
        node.receive(1, 100, 8, 77);
        const ibv_wc came = node.complete_one();
        CHECK(came.wr_id == 77 && came.opcode == IBV_WC_RECV && came.byte_len == 16);
        CHECK(came.imm_data == 0xa70c && (came.wc_flags & IBV_WC_WITH_IMM) != 0);
        CHECK(node.word(100) == 41 && node.word(101) == 42);
      });
}

void test_memory_that_no_key_allows() {
  run_case(
      "memory that no key allows",
      [](Node& node) {
        node.write(2, 0, kBytes / 8 - 1, 2, 1);  // ends behind the peer's memory
        CHECK(node.complete_one().status == IBV_WC_REM_ACCESS_ERR);
        node.write(2, 0, 0, 1, 2);
        CHECK(node.complete_one().status == IBV_WC_WR_FLUSH_ERR);
        node.write(3, 0, 0, 1, 3);  // another pair goes on
        CHECK(node.complete_one().status == IBV_WC_SUCCESS);
      },
      [](Node&) {});
}

void test_a_message_that_fails() {
  setenv("ROCM_SIM_NIC_FAIL_AT", "3", 1);
  run_case(
      "a message that fails",
      [](Node& node) {
        for (uint64_t i = 1; i <= 4; ++i) {
          node.set(0, i);
          node.write(0, 0, 0, 1, i);
          const ibv_wc_status want = i < 3    ? IBV_WC_SUCCESS
                                     : i == 3 ? IBV_WC_REM_OP_ERR
                                              : IBV_WC_WR_FLUSH_ERR;
          CHECK(node.complete_one().status == want);
        }
      },
      [](Node& node) {
        await(node.theirs(), 100);
        CHECK(node.word(0) == 2);
      });
  unsetenv("ROCM_SIM_NIC_FAIL_AT");
}

void test_a_killed_peer() {
  run_case(
      "a killed peer",
      [](Node& node) {
        node.write(0, 0, 0, 1, 1);
        CHECK(node.complete_one().status == IBV_WC_SUCCESS);
        say(node.mine(), 3);
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
        const auto begin = Clock::now();
        node.write(0, 0, 0, 1, 2);  // there was a connection
        node.write(1, 0, 0, 1, 3);  // and there was none
        for (const ibv_wc& done : node.complete(2)) CHECK(done.status == IBV_WC_RETRY_EXC_ERR);
        CHECK(seconds_since(begin) > 0.9 && seconds_since(begin) < 10);
      },
      [](Node& node) {
        await(node.theirs(), 3);
        kill(getpid(), SIGKILL);
      },
      true);
}

void test_no_atomics() {
  setenv("ROCM_SIM_NIC_ATOMICS", "0", 1);
  run_case(
      "no atomics",
      [](Node& node) {
        node.atomic(IBV_WR_ATOMIC_FETCH_AND_ADD, 5, 3, 0, 0, 1);
        CHECK(node.complete_one().status == IBV_WC_REM_INV_REQ_ERR);
      },
      [](Node&) {});
  unsetenv("ROCM_SIM_NIC_ATOMICS");
}

// A link that stops loses nothing when it goes on in time, and is an error when it does not.
void test_a_link_that_stops(Board& board) {
  run_case(
      "a link that stops",
      [&board](Node& node) {
        board.stopped = 1;
        node.set(0, 5);
        node.write(0, 0, 0, 1, 1);
        CHECK(node.nothing_completes(0.3));
        board.stopped = 0;
        CHECK(node.complete_one().status == IBV_WC_SUCCESS);
        board.stopped = 1;
        node.write(0, 0, 0, 1, 2);
        CHECK(node.complete_one().status == IBV_WC_RETRY_EXC_ERR);
        board.stopped = 0;
      },
      [](Node& node) { node.await_word(0, 5); });
}

// The board says what each queue pair has sent.
void check_counts(const Board& board) {
  uint64_t atomics = 0;
  uint64_t sends = 0;
  uint64_t most = 0;
  for (uint32_t i = 0; i < board.num_pairs; ++i) {
    const auto& pair = board.pairs[i];
    CHECK(pair.pid != 0 && pair.peer_pid != 0);
    CHECK(pair.atomic_bytes == 8 * pair.atomics);
    atomics += pair.atomics;
    sends += pair.sends;
    most = std::max<uint64_t>(most, pair.write_bytes);
  }
  CHECK(atomics == 12 && sends == 1);
  CHECK(most == kRounds * (1024 * 8 + 8));
}

// A file without a name, which forked processes have too.
Board& share_board() {
  const int fd = memfd_create("nic-board", 0);
  CHECK(fd >= 0 && ftruncate(fd, sizeof(Board)) == 0);
  void* mapped = mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  CHECK(mapped != MAP_FAILED);
  setenv("ROCM_SIM_NIC_BOARD", ("/proc/self/fd/" + std::to_string(fd)).c_str(), 1);
  return *static_cast<Board*>(mapped);
}

}  // namespace

int main() {
  Board& board = share_board();
  test_order_in_a_pair();
  test_order_between_pairs();
  test_atomics();
  test_sends();
  test_memory_that_no_key_allows();
  test_a_message_that_fails();
  test_a_killed_peer();
  test_no_atomics();
  test_a_link_that_stops(board);
  check_counts(board);
  return 0;
}
