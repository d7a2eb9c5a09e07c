#include "board.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>

#include "settings.h"

namespace gfx942::nic {
namespace {

Board* map_board() {
  const char* path = std::getenv("ROCM_SIM_NIC_BOARD");
  if (path == nullptr) {
    void* own =
        mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (own == MAP_FAILED) give_up("there is no memory for a board");
    return static_cast<Board*>(own);
  }
  const int fd = open(path, O_RDWR | O_CLOEXEC);
  struct stat found = {};
  if (fd < 0 || fstat(fd, &found) != 0 || found.st_size < static_cast<off_t>(sizeof(Board))) {
    give_up("ROCM_SIM_NIC_BOARD must name a file of 65536 bytes");
  }
  void* shared = mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (shared == MAP_FAILED) give_up("ROCM_SIM_NIC_BOARD cannot be mapped");
  return static_cast<Board*>(shared);
}

}  // namespace

Board& board() {
  static Board* const kBoard = map_board();
  return *kBoard;
}

Traffic& add_pair(uint32_t number) {
  const uint32_t line = board().num_pairs.fetch_add(1);
  if (line >= Board::kMaxPairs) give_up("there are more queue pairs than a board has lines");
  Traffic& traffic = board().pairs[line];
  traffic.number = number;
  traffic.pid = getpid();
  return traffic;
}

}  // namespace gfx942::nic
