// A group of ranks on MORI: an arena per rank for the steps' beginnings, as native's groups have,
// and MORI's handles, one for each shape of an exchange. No header of HIP's or of MORI's is
// included here, so that the handlers need none.
#pragma once

#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "gpu/group.h"
#include "moriep/registry.h"
#include "progress.h"
#include "watchdog.h"

namespace moriep::mori {

class Handle;
class Notices;
struct HandleSizes;

// Of each half of an arena: the words of all ranks.
inline constexpr int64_t kHalfBytes = int64_t{1} << 20;

class Group : public gpu::Group {
 public:
  Group(int32_t num_ranks, std::chrono::duration<double> timeout);
  ~Group();

  // As gpu::Group's. A process has one device, and so one rank. A rank of another node has an
  // address of zeros.
  Status add_local(int32_t rank, int32_t device);
  Status connect(int32_t rank, const int64_t* words);
  Status failure();

  // Once all are connected. Ranks of a node are next to each other, and as many on each.
  int32_t num_nodes();
  // Makes what the nodes need to meet; collective, when MORI is open.
  Status open_notices();
  Notices* notices() const { return notices_.get(); }

  // Makes a handle that exchanges ask for by its key. Collective, as Handle::open is.
  Status open_handle(const std::string& key, const HandleSizes& sizes);
  // Tells the exchanges that wait for a handle why there will be none.
  void handle_failed(const std::string& key, const Status& why);
  // Waits for a handle until the deadline.
  Status handle(const std::string& key, const Handle** out);
  // Makes the group as it was before its first step, after it has failed. All ranks do so between
  // two meetings on the host, and none of them runs anything then.
  Status reset();

  int32_t rank() const { return rank_; }
  int32_t device() const { return device_; }
  // Where the device tells how far it is, as it addresses it itself.
  Progress* progress_on_device() const { return progress_on_device_; }

 private:
  void stuck(const Progress& seen);
  void watch();

  struct Entry {
    std::unique_ptr<Handle> handle;
    Status status;
  };

  const std::chrono::duration<double> timeout_;
  int32_t rank_ = -1;
  int32_t device_ = -1;
  Progress* progress_ = nullptr;  // in host memory
  Progress* progress_on_device_ = nullptr;
  void* rescue_ = nullptr;  // the watchdog's stream
  std::unique_ptr<Notices> notices_;

  std::mutex handles_mutex_;
  std::condition_variable handles_changed_;
  std::map<std::string, Entry> handles_;  // none is taken out
  std::vector<const Handle*> numbered_;
  std::unique_ptr<Watchdog> watchdog_;
};

using Registry = RegistryOf<Group>;

}  // namespace moriep::mori
