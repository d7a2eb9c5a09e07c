#include "wire.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>

#include "queue_pair.h"
#include "settings.h"

namespace gfx942::nic {
namespace {

// A name in the abstract space begins with a zero.
sockaddr_un name_of(const Address& address, socklen_t* length) {
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  const int used = std::snprintf(name.sun_path + 1, sizeof(name.sun_path) - 1, "rocm-sim-nic-%d-%u",
                                 address.pid, address.nonce);
  *length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + static_cast<size_t>(used));
  return name;
}

bool receive(int fd, void* to, size_t bytes, std::optional<Clock::time_point> deadline) {
  auto* at = static_cast<char*>(to);
  while (bytes > 0) {
    int wait_ms = -1;
    if (deadline.has_value()) {
      const auto left =
          std::chrono::duration_cast<std::chrono::milliseconds>(*deadline - Clock::now());
      wait_ms = static_cast<int>(std::max<int64_t>(left.count(), 0));
    }
    pollfd waiting{fd, POLLIN, 0};
    const int ready = poll(&waiting, 1, wait_ms);
    if (ready == 0) return false;
    if (ready < 0) {
      if (errno == EINTR) continue;
      return false;
    }
    const ssize_t got = recv(fd, at, bytes, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    at += got;
    bytes -= static_cast<size_t>(got);
  }
  return true;
}

bool transmit(int fd, const void* from, size_t bytes) {
  const auto* at = static_cast<const char*>(from);
  while (bytes > 0) {
    const ssize_t sent = send(fd, at, bytes, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) return false;
    at += sent;
    bytes -= static_cast<size_t>(sent);
  }
  return true;
}

// One sender's requests, in their order.
void serve(int fd, uint64_t stream) {
  Delays delays(stream);
  Request request{};
  std::vector<std::byte> data;
  while (receive(fd, &request, sizeof(request), {})) {
    data.resize(request.bytes);
    if (!receive(fd, data.data(), data.size(), {})) break;
    const Reply reply = execute(request, data, &delays);
    if (!transmit(fd, &reply, sizeof(reply))) break;
  }
  close(fd);
}

Address start() {
  const Address here{getpid(), std::random_device()()};
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  socklen_t length = 0;
  const sockaddr_un name = name_of(here, &length);
  if (fd < 0 || bind(fd, reinterpret_cast<const sockaddr*>(&name), length) != 0 ||
      listen(fd, SOMAXCONN) != 0) {
    give_up(std::string("it cannot listen: ") + std::strerror(errno));
  }
  std::thread([fd] {
    for (uint64_t stream = 1;; ++stream) {
      const int taken = accept4(fd, nullptr, nullptr, SOCK_CLOEXEC);
      if (taken < 0) {
        if (errno == EINTR || errno == ECONNABORTED) continue;
        return;
      }
      std::thread(serve, taken, stream << 32).detach();
    }
  }).detach();
  return here;
}

}  // namespace

std::array<uint8_t, 16> gid_of(const Address& address) {
  std::array<uint8_t, 16> gid{0xfe, 0x80};
  std::memcpy(gid.data() + 8, &address.pid, 4);
  std::memcpy(gid.data() + 12, &address.nonce, 4);
  return gid;
}

Address address_in(const uint8_t* gid) {
  Address address;
  std::memcpy(&address.pid, gid + 8, 4);
  std::memcpy(&address.nonce, gid + 12, 4);
  return address;
}

Address listen_here() {
  static const Address kHere = start();
  return kHere;
}

bool Connection::open(const Address& peer) {
  if (fd_ >= 0) return true;
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return false;
  socklen_t length = 0;
  const sockaddr_un name = name_of(peer, &length);
  if (connect(fd, reinterpret_cast<const sockaddr*>(&name), length) != 0) {
    ::close(fd);
    return false;
  }
  fd_ = fd;
  return true;
}

std::optional<Reply> Connection::ask(const Request& request, const std::vector<std::byte>& data,
                                     std::optional<Clock::time_point> deadline) {
  Reply reply{};
  if (transmit(fd_, &request, sizeof(request)) && transmit(fd_, data.data(), data.size()) &&
      receive(fd_, &reply, sizeof(reply), deadline)) {
    return reply;
  }
  // What was asked may have happened or not: nobody asks here again.
  close();
  return {};
}

void Connection::close() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

}  // namespace gfx942::nic
