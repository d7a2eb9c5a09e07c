// Rows between devices: reading a peer's memory against writing it, by the number of blocks, and
// beside them the link's peak. Rows are those of DeepSeek-V3 in bfloat16, moved as pull and push
// move them: a wave takes 2048 consecutive bytes of a row, and the rows of the local side lie in a
// random order. With one device all stays within it.
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>

#include "timing.h"

namespace moriep::gpu {
namespace {

constexpr int kMaxDevices = 8;
constexpr int kBlockThreads = 256;
constexpr int kWords = 4;  // that a lane has on the way
constexpr int64_t kRowWords = 14336 / 16;
constexpr int64_t kPeakBytes = int64_t{256} << 20;

__device__ uint32_t scrambled(uint32_t bits) {
  bits = (bits ^ bits >> 16) * 0x7feb352du;
  bits = (bits ^ bits >> 15) * 0x846ca68bu;
  return bits ^ bits >> 16;
}

// What a word of a device's row holds.
__device__ uint4 pattern(int device, int64_t row, int64_t word) {
  const uint32_t first =
      scrambled(static_cast<uint32_t>(row * kRowWords + word) * 8 + static_cast<uint32_t>(device));
  return make_uint4(first, first ^ 0x9e3779b9u, ~first, first + 0x12345u);
}

// How the rows of one device travel.
struct Moves {
  uint4* local;                // this device's rows
  uint4* remote[kMaxDevices];  // where this device finds, or leaves, each peer's
  const int32_t* local_row;    // a random order
  int64_t num_rows;
  int32_t device;
  int32_t first;  // the first peer; the rows go round `peers` of them
  int32_t peers;
  int32_t devices;
};

__device__ int32_t peer_of(const Moves& moves, int64_t row) {
  return (moves.first + static_cast<int32_t>(row % moves.peers)) % moves.devices;
}

template <bool kWrite>
__global__ void __launch_bounds__(kBlockThreads)
    move_kernel(const MORIEP_KERNEL_ARGUMENT Moves moves) {
  constexpr int64_t kPart = int64_t{kWave} * kWords;
  constexpr int64_t kParts = (kRowWords + kPart - 1) / kPart;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t waves = static_cast<int64_t>(gridDim.x) * blockDim.x / kWave;
  for (int64_t item = thread / kWave; item < moves.num_rows * kParts; item += waves) {
    const int64_t row = item / kParts;
    const int64_t first = item % kParts * kPart + lane_id();
    uint4* local = moves.local + moves.local_row[row] * kRowWords;
    uint4* remote = moves.remote[peer_of(moves, row)] + row * kRowWords;
    const uint4* from = kWrite ? local : remote;
    uint4* to = kWrite ? remote : local;
    uint4 words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (first + i * kWave < kRowWords) words[i] = from[first + i * kWave];
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (first + i * kWave < kRowWords) to[first + i * kWave] = words[i];
    }
  }
}

__global__ void fill_kernel(uint4* rows, int device) {
  const auto row = static_cast<int64_t>(blockIdx.x);
  for (int64_t word = threadIdx.x; word < kRowWords; word += blockDim.x) {
    rows[row * kRowWords + word] = pattern(device, row, word);
  }
}

// Counts the words of what came that are not what was sent: for reads in this device's rows, for
// writes in what `moves.device`'s peer `here` got from it.
__global__ void check_kernel(const MORIEP_KERNEL_ARGUMENT Moves moves, bool write, int here,
                             const uint4* landed, uint32_t* wrong) {
  const auto row = static_cast<int64_t>(blockIdx.x);
  const int64_t local = moves.local_row[row];
  if (write && peer_of(moves, row) != here) return;
  for (int64_t word = threadIdx.x; word < kRowWords; word += blockDim.x) {
    const uint4 want =
        write ? pattern(moves.device, local, word) : pattern(peer_of(moves, row), row, word);
    const uint4 got = landed[(write ? row : local) * kRowWords + word];
    if (got.x != want.x || got.y != want.y || got.z != want.z || got.w != want.w) {
      atomicAdd(wrong, 1u);
    }
  }
}

// What one device has: rows to send, rows where those arrive that it reads, and for each other
// device a region where that one writes.
struct Site {
  Site(int64_t num_rows, int num_devices, const std::vector<int32_t>& order)
      : sent(num_rows * kRowWords),
        read(num_rows * kRowWords),
        written(num_rows * kRowWords * num_devices),
        local_row(order),
        wrong(1) {}
  Array<uint4> sent, read, written;
  Array<int32_t> local_row;
  Array<uint32_t> wrong;
};

void use(int device) { check_gpu(gpuSetDevice(device), "device"); }

class Bench {
 public:
  Bench(int num_devices, const char* path)
      : devices_(num_devices),
        one_(1),
        all_(num_devices),
        report_(path, Fields()
                          .text("program", "peer")
                          .text("device", device_name())
                          .integer("devices", num_devices)
                          .integer("row_bytes", kRowWords * 16)) {}

  int run() {
    std::printf("%d x %s%s\n", devices_, device_name().c_str(),
                devices_ == 1 ? ": no peer, all of it within the device" : "");
    peak();
    for (const int64_t num_rows : {128, 4096}) {
      std::printf("\n%lld rows of %lld bytes, GB/s that a device moves, best (median)\n%6s",
                  static_cast<long long>(num_rows), static_cast<long long>(kRowWords * 16),
                  "blocks");
      for (const char* title : {"read, one", "write, one", "read, all", "write, all"}) {
        std::printf(" %18s", title);
      }
      std::printf("\n");
      make_sites(num_rows);
      for (const int blocks : {8, 16, 32, 64, 128, 264, 528, 1056}) {
        std::printf("%6d", blocks);
        for (const bool all : {false, true}) {
          for (const bool write : {false, true}) measure(num_rows, blocks, all, write);
        }
        std::printf("\n");
        std::fflush(stdout);
      }
    }
    return report_.finish();
  }

 private:
  // Copies by the runtime, from each device to the next.
  void peak() {
    std::vector<std::unique_ptr<Array<std::byte>>> from, to;
    for (int d = 0; d < devices_; ++d) {
      use(d);
      from.push_back(std::make_unique<Array<std::byte>>(kPeakBytes));
      to.push_back(std::make_unique<Array<std::byte>>(kPeakBytes));
      check_gpu(gpuMemset(from.back()->data(), d + 1, kPeakBytes), "fill");
      check_gpu(gpuDeviceSynchronize(), "fill");
    }
    for (const bool all : {false, true}) {
      for (int d = 0; d < devices_; ++d) {
        use(d);
        to[static_cast<size_t>(d)]->poison();
        check_gpu(gpuDeviceSynchronize(), "poison");
      }
      Lanes& lanes = all ? all_ : one_;
      const Time time = lanes.queued(4, [&](int d) {
        const int next = (d + 1) % devices_;
        check_gpu(gpuMemcpyPeerAsync(to[static_cast<size_t>(next)]->data(), next,
                                     from[static_cast<size_t>(d)]->data(), d, kPeakBytes,
                                     lanes.stream(d)),
                  "peer copy");
      });
      bool right = true;
      for (int d = 0; d < lanes.size(); ++d) {
        const auto got = to[static_cast<size_t>((d + 1) % devices_)]->host();
        right &= std::all_of(got.begin(), got.end(),
                             [&](std::byte byte) { return byte == static_cast<std::byte>(d + 1); });
      }
      std::printf("peer copy of 256 MiB, %s: %.1f (%.1f) GB/s%s\n",
                  all ? "every device to the next" : "device 0 to the next",
                  rate(kPeakBytes, time.best_us), rate(kPeakBytes, time.median_us),
                  right ? "" : " WRONG");
      report_.add(fields("copy", all, kPeakBytes, time), right);
    }
  }

  void make_sites(int64_t num_rows) {
    std::vector<int32_t> order(static_cast<size_t>(num_rows));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(1));
    sites_.clear();
    for (int d = 0; d < devices_; ++d) {
      use(d);
      sites_.push_back(std::make_unique<Site>(num_rows, devices_, order));
      fill_kernel<<<static_cast<int>(num_rows), kBlockThreads>>>(sites_.back()->sent.data(), d);
      check_gpu(gpuGetLastError(), "fill");
      check_gpu(gpuDeviceSynchronize(), "fill");
    }
  }

  Moves moves(int64_t num_rows, int d, bool all, bool write) const {
    const Site& mine = *sites_[static_cast<size_t>(d)];
    Moves moves{.local = write ? mine.sent.data() : mine.read.data(),
                .remote = {},
                .local_row = mine.local_row.data(),
                .num_rows = num_rows,
                .device = d,
                .first = (d + 1) % devices_,
                .peers = all && devices_ > 1 ? devices_ - 1 : 1,
                .devices = devices_};
    for (int other = 0; other < devices_; ++other) {
      const Site& site = *sites_[static_cast<size_t>(other)];
      moves.remote[other] =
          write ? site.written.data() + d * num_rows * kRowWords : site.sent.data();
    }
    return moves;
  }

  void measure(int64_t num_rows, int blocks, bool all, bool write) {
    for (int d = 0; d < devices_; ++d) {
      use(d);
      const auto& site = sites_[static_cast<size_t>(d)];
      site->read.poison();
      site->written.poison();
      check_gpu(gpuDeviceSynchronize(), "poison");
    }
    Lanes& lanes = all ? all_ : one_;
    const Time time = lanes.recorded(num_rows < 1000 ? 50 : 10, [&](int d) {
      const Moves todo = moves(num_rows, d, all, write);
      if (write) {
        move_kernel<true><<<blocks, kBlockThreads, 0, lanes.stream(d)>>>(todo);
      } else {
        move_kernel<false><<<blocks, kBlockThreads, 0, lanes.stream(d)>>>(todo);
      }
      check_gpu(gpuGetLastError(), "move");
    });
    int64_t wrong = 0;
    for (int d = 0; d < lanes.size(); ++d) wrong += count_wrong(num_rows, d, all, write);
    const int64_t bytes = num_rows * kRowWords * 16;
    char text[64];
    std::snprintf(text, sizeof(text), "%.1f (%.1f)%s", rate(bytes, time.best_us),
                  rate(bytes, time.median_us), wrong == 0 ? "" : " WRONG");
    std::printf(" %18s", text);
    report_.add(fields(write ? "write" : "read", all, bytes, time)
                    .integer("tokens", num_rows)
                    .integer("blocks", blocks)
                    .integer("wrong_words", wrong),
                wrong == 0);
  }

  // Of what a device read, or of what its peers got from it.
  int64_t count_wrong(int64_t num_rows, int d, bool all, bool write) {
    const Moves done = moves(num_rows, d, all, write);
    int64_t wrong = 0;
    for (int here = 0; here < devices_; ++here) {
      if (!write && here != d) continue;
      use(here);
      const Site& site = *sites_[static_cast<size_t>(here)];
      check_gpu(gpuMemset(site.wrong.data(), 0, sizeof(uint32_t)), "count");
      const uint4* landed =
          write ? site.written.data() + d * num_rows * kRowWords : site.read.data();
      Moves seen = done;
      seen.local_row = site.local_row.data();
      check_kernel<<<static_cast<int>(num_rows), kBlockThreads>>>(seen, write, here, landed,
                                                                  site.wrong.data());
      check_gpu(gpuGetLastError(), "check");
      check_gpu(gpuDeviceSynchronize(), "check");
      wrong += site.wrong.host()[0];
    }
    return wrong;
  }

  Fields fields(const char* op, bool all, int64_t bytes, const Time& time) const {
    return Fields()
        .text("op", op)
        .text("devices_at_once", all ? "all" : "one")
        .integer("bytes", bytes)
        .time(time)
        .number("best_gb_s", rate(bytes, time.best_us))
        .number("median_gb_s", rate(bytes, time.median_us));
  }

  static double rate(int64_t bytes, double us) { return static_cast<double>(bytes) / us * 1e-3; }

  const int devices_;
  Lanes one_, all_;
  Report report_;
  std::vector<std::unique_ptr<Site>> sites_;
};

// The devices that all reach each other, or else the first alone.
int connected_devices() {
  int count = 0;
  check_gpu(gpuGetDeviceCount(&count), "devices");
  count = std::min(count, kMaxDevices);
  for (int a = 0; a < count; ++a) {
    for (int b = 0; b < count; ++b) {
      if (a == b) continue;
      int can = 0;
      check_gpu(gpuDeviceCanAccessPeer(&can, a, b), "peer access");
      if (can == 0) {
        std::printf("device %d cannot reach device %d's memory: only device 0 is used\n", a, b);
        return 1;
      }
      use(a);
      check_gpu(gpuDeviceEnablePeerAccess(b, 0), "peer access");
    }
  }
  return count;
}

}  // namespace
}  // namespace moriep::gpu

// Argument: a file for the results as JSON.
int main(int argc, char** argv) {
  const int devices = moriep::gpu::connected_devices();
  return moriep::gpu::Bench(devices, argc > 1 ? argv[1] : nullptr).run();
}
