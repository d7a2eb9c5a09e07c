// Times of work on one device or several, and a report of them as JSON.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "exercise.h"
#include "names.h"

namespace moriep::gpu {

struct Time {
  double best_us = 0;
  double median_us = 0;
};

// Holds a stream back until all that shall be timed is queued behind it.
static __global__ void delay_kernel(uint64_t ns) {
  const uint64_t begin = nanoseconds();
  while (nanoseconds() - begin < ns) pause();
}

// A stream on each of the first devices. The current device is changed freely.
class Lanes {
 public:
  explicit Lanes(int num_lanes) : lanes_(static_cast<size_t>(num_lanes)) {
    for (int i = 0; i < size(); ++i) {
      Lane& lane = use(i);
      check_gpu(gpuStreamCreate(&lane.stream), "stream");
      check_gpu(gpuEventCreate(&lane.begin), "event");
      check_gpu(gpuEventCreate(&lane.end), "event");
    }
    use(0);
    check_gpu(gpuEventCreate(&gate_), "event");
  }
  Lanes(const Lanes&) = delete;
  Lanes& operator=(const Lanes&) = delete;

  int size() const { return static_cast<int>(lanes_.size()); }
  gpuStream_t stream(int lane) const { return lanes_[static_cast<size_t>(lane)].stream; }

  // work(lane) queues something on the lane's stream, with the lane's device current; its time is
  // that of the slowest lane. All lanes begin together.
  Time queued(int repeats, const std::function<void(int)>& work) {
    return timed(repeats, [&](int lane) {
      for (int i = 0; i < repeats; ++i) work(lane);
    });
  }

  // The same, with the work recorded once and then replayed.
  Time recorded(int repeats, const std::function<void(int)>& work) {
    std::vector<gpuGraph_t> graphs(lanes_.size());
    std::vector<gpuGraphExec_t> recordings(lanes_.size());
    for (int i = 0; i < size(); ++i) {
      const auto at = static_cast<size_t>(i);
      const Lane& lane = use(i);
      check_gpu(gpuStreamBeginCapture(lane.stream, gpuStreamCaptureModeRelaxed), "capture");
      for (int j = 0; j < repeats; ++j) work(i);
      check_gpu(gpuStreamEndCapture(lane.stream, &graphs[at]), "capture");
      check_gpu(gpuGraphInstantiate(&recordings[at], graphs[at], 0), "instantiate");
    }
    const Time time = timed(repeats, [&](int lane) {
      check_gpu(gpuGraphLaunch(recordings[static_cast<size_t>(lane)], stream(lane)), "launch");
    });
    for (int i = 0; i < size(); ++i) {
      use(i);
      check_gpu(gpuGraphExecDestroy(recordings[static_cast<size_t>(i)]), "destroy");
      check_gpu(gpuGraphDestroy(graphs[static_cast<size_t>(i)]), "destroy");
    }
    return time;
  }

 private:
  static constexpr int kBatches = 8;  // the first of which warms up
  static constexpr uint64_t kDelayNs = 1000000;

  struct Lane {
    gpuStream_t stream = nullptr;
    gpuEvent_t begin = nullptr;
    gpuEvent_t end = nullptr;
  };

  Lane& use(int lane) {
    check_gpu(gpuSetDevice(lane), "device");
    return lanes_[static_cast<size_t>(lane)];
  }

  Time timed(int repeats, const std::function<void(int)>& enqueue) {
    std::vector<double> times;
    for (int batch = 0; batch < kBatches; ++batch) {
      const double time = slowest(enqueue) * 1e3 / repeats;
      if (batch > 0) times.push_back(time);
    }
    std::sort(times.begin(), times.end());
    return {times.front(), times[times.size() / 2]};
  }

  double slowest(const std::function<void(int)>& enqueue) {
    for (int i = 0; i < size(); ++i) {
      const Lane& lane = use(i);
      if (i == 0) {
        delay_kernel<<<1, 1, 0, lane.stream>>>(kDelayNs);
        check_gpu(gpuGetLastError(), "delay");
        check_gpu(gpuEventRecord(gate_, lane.stream), "event");
      } else {
        check_gpu(gpuStreamWaitEvent(lane.stream, gate_, 0), "gate");
      }
      check_gpu(gpuEventRecord(lane.begin, lane.stream), "event");
      enqueue(i);
      check_gpu(gpuEventRecord(lane.end, lane.stream), "event");
    }
    double most = 0;
    for (int i = 0; i < size(); ++i) {
      const Lane& lane = use(i);
      check_gpu(gpuEventSynchronize(lane.end), "wait");
      float time = 0;
      check_gpu(gpuEventElapsedTime(&time, lane.begin, lane.end), "time");
      most = std::max(most, static_cast<double>(time));
    }
    use(0);
    return most;
  }

  std::vector<Lane> lanes_;
  gpuEvent_t gate_ = nullptr;
};

// Keys and values of a JSON object.
class Fields {
 public:
  Fields& text(const char* key, const std::string& value) {
    std::string quoted = "\"";
    for (const char letter : value) {
      if (letter == '"' || letter == '\\') quoted += '\\';
      if (static_cast<unsigned char>(letter) >= ' ') quoted += letter;
    }
    return put(key, quoted + "\"");
  }
  Fields& integer(const char* key, int64_t value) { return put(key, std::to_string(value)); }
  Fields& number(const char* key, double value) {
    char digits[64];
    std::snprintf(digits, sizeof(digits), "%.6g", value);
    return put(key, std::isfinite(value) ? digits : "null");
  }
  Fields& flag(const char* key, bool value) { return put(key, value ? "true" : "false"); }
  Fields& time(const Time& time) {
    return number("best_us", time.best_us).number("median_us", time.median_us);
  }
  const std::string& str() const { return text_; }

 private:
  Fields& put(const char* key, const std::string& value) {
    text_ += (text_.empty() ? "\"" : ", \"") + std::string(key) + "\": " + value;
    return *this;
  }
  std::string text_;
};

// The results so far, written anew with each of them, so that a run which is cut short leaves what
// it had. Without a path nothing is written.
class Report {
 public:
  Report(const char* path, Fields head) : path_(path == nullptr ? "" : path), head_(head) {
    write(false);
  }

  void add(const Fields& fields, bool right) {
    wrong_ += right ? 0 : 1;
    results_.push_back(Fields(fields).flag("right", right).str());
    write(false);
  }

  // The program's exit code.
  int finish() {
    write(true);
    if (wrong_ > 0) std::fprintf(stderr, "%d results are wrong\n", wrong_);
    return wrong_ > 0 ? 1 : 0;
  }

 private:
  void write(bool complete) const {
    std::fflush(stdout);
    if (path_.empty()) return;
    FILE* file = std::fopen(path_.c_str(), "w");
    if (file == nullptr) check::fail(__FILE__, __LINE__, path_ + " cannot be written");
    std::fprintf(file, "{%s,\n \"complete\": %s, \"wrong\": %d,\n \"results\": [",
                 head_.str().c_str(), complete ? "true" : "false", wrong_);
    for (size_t i = 0; i < results_.size(); ++i) {
      std::fprintf(file, "%s\n  {%s}", i == 0 ? "" : ",", results_[i].c_str());
    }
    std::fprintf(file, "\n ]}\n");
    std::fclose(file);
  }

  const std::string path_;
  const Fields head_;
  std::vector<std::string> results_;
  int wrong_ = 0;
};

inline std::string device_name() {
  gpuDeviceProp_t found;
  check_gpu(gpuGetDeviceProperties(&found, 0), "properties");
  return found.name;
}

}  // namespace moriep::gpu
