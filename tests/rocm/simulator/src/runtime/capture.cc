#include <algorithm>

#include "graph.h"
#include "stream.h"

namespace gfx942::runtime {
namespace {

struct Captures {
  std::mutex mutex;
  std::vector<std::weak_ptr<Capture>> all;
};

Captures& captures() {
  static auto* const kCaptures = new Captures();
  return *kCaptures;
}

}  // namespace

Capture::Capture(const std::shared_ptr<Stream>& origin, hipStreamCaptureMode mode)
    : origin_(origin.get()), mode_(mode), thread_(std::this_thread::get_id()) {
  branches_[origin.get()].stream = origin;
}

hipError_t Capture::add(Stream* stream, Operation operation) {
  std::lock_guard lock(mutex_);
  if (!valid_) return hipErrorStreamCaptureInvalidated;
  auto& last = branches_[stream].last;
  last = {graph_->add(std::move(operation), last)};
  return hipSuccess;
}

void Capture::join(const std::shared_ptr<Stream>& stream, const Graph::Nodes& nodes) {
  {
    std::lock_guard lock(mutex_);
    auto& branch = branches_[stream.get()];
    branch.stream = stream;
    for (const Node* node : nodes) {
      if (std::find(branch.last.begin(), branch.last.end(), node) == branch.last.end()) {
        branch.last.push_back(node);
      }
    }
  }
  stream->set_capture(shared_from_this());
}

Graph::Nodes Capture::last(const Stream* stream) const {
  std::lock_guard lock(mutex_);
  const auto found = branches_.find(stream);
  return found == branches_.end() ? Graph::Nodes() : found->second.last;
}

void Capture::release_streams() {
  for (const auto& [address, branch] : branches_) {
    if (const auto stream = branch.stream.lock()) stream->set_capture(nullptr);
  }
}

hipError_t Capture::end(const Stream* stream, std::shared_ptr<Graph>* graph) {
  std::lock_guard lock(mutex_);
  if (stream != origin_) return hipErrorStreamCaptureUnmatched;
  if (mode_ != hipStreamCaptureModeRelaxed && thread_ != std::this_thread::get_id()) {
    return hipErrorStreamCaptureWrongThread;
  }
  release_streams();
  if (!valid_) return hipErrorStreamCaptureInvalidated;
  valid_ = false;
  const auto& joined = branches_[stream].last;
  for (const Node* leaf : graph_->leaves()) {
    if (std::find(joined.begin(), joined.end(), leaf) == joined.end()) {
      return hipErrorStreamCaptureUnjoined;
    }
  }
  *graph = graph_;
  return hipSuccess;
}

void Capture::invalidate() {
  std::lock_guard lock(mutex_);
  valid_ = false;
}

bool Capture::valid() const {
  std::lock_guard lock(mutex_);
  return valid_;
}

bool Capture::forbids_unsafe_calls() const {
  if (!valid() || mode_ == hipStreamCaptureModeRelaxed) return false;
  return mode_ == hipStreamCaptureModeGlobal || thread_ == std::this_thread::get_id();
}

hipError_t begin_capture(const std::shared_ptr<Stream>& stream, hipStreamCaptureMode mode) {
  if (stream->capture() != nullptr) return hipErrorIllegalState;
  auto capture = std::make_shared<Capture>(stream, mode);
  {
    auto& table = captures();
    std::lock_guard lock(table.mutex);
    std::erase_if(table.all, [](const auto& one) { return one.expired(); });
    table.all.push_back(capture);
  }
  stream->set_capture(std::move(capture));
  return hipSuccess;
}

hipError_t end_capture(const std::shared_ptr<Stream>& stream, std::shared_ptr<Graph>* graph) {
  const auto capture = stream->capture();
  return capture == nullptr ? hipErrorIllegalState : capture->end(stream.get(), graph);
}

hipError_t check_unsafe_call() {
  hipError_t error = hipSuccess;
  auto& table = captures();
  std::lock_guard lock(table.mutex);
  for (const auto& one : table.all) {
    const auto capture = one.lock();
    if (capture == nullptr || !capture->forbids_unsafe_calls()) continue;
    capture->invalidate();
    error = hipErrorStreamCaptureUnsupported;
  }
  return error;
}

}  // namespace gfx942::runtime
