// The wire between two processes of a machine: an abstract socket for each that listens, which ends
// with its process, and a connection for each queue pair that sends.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace gfx942::nic {

using Clock = std::chrono::steady_clock;

// Where a process listens, as its adapter's GID says it.
struct Address {
  int32_t pid = 0;
  uint32_t nonce = 0;  // a process that has a dead one's number is not taken for it
};
std::array<uint8_t, 16> gid_of(const Address& address);
Address address_in(const uint8_t* gid);

struct Request {
  uint32_t opcode;  // verbs' own
  uint32_t queue_pair;
  uint32_t key;
  uint32_t immediate;
  uint64_t at;
  uint64_t bytes;  // that follow
  uint64_t operand;
  uint64_t swap;
};

struct Reply {
  uint32_t status;  // of a completion, verbs' own
  uint32_t pad;
  uint64_t before;  // what an atomic found
};

// Begins to listen and to serve, once; gives where.
Address listen_here();

class Connection {
 public:
  Connection() = default;
  ~Connection() { close(); }
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  // Connects if there is no connection.
  bool open(const Address& peer);
  // Sends a request and waits for its answer; nothing when there is none in time, or nobody to
  // give it.
  std::optional<Reply> ask(const Request& request, const std::vector<std::byte>& data,
                           std::optional<Clock::time_point> deadline);
  void close();

 private:
  int fd_ = -1;
};

}  // namespace gfx942::nic
