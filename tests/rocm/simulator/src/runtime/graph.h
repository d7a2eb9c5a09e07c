// Graphs, their captured making and their replay.
#pragma once

#include <hip/hip_runtime_api.h>

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <thread>
#include <vector>

#include "operation.h"

namespace gfx942::runtime {

class Stream;

// What a hipGraphNode_t points at. A node comes after those it depends on.
struct Node {
  size_t index = 0;
  Operation operation;
  std::vector<size_t> dependencies;
};

class Graph {
 public:
  using Nodes = std::vector<const Node*>;

  std::shared_ptr<Graph> clone() const;

  const Node* add(Operation operation, const Nodes& dependencies);
  bool holds(const Node* node) const;
  // The nodes that no other depends on.
  Nodes leaves() const;
  Nodes roots() const;
  Nodes nodes() const;
  const Node& node(size_t index) const { return *nodes_[index]; }
  void replace(size_t index, Operation operation);

  // Runs every node once, in one of the orders that the dependencies allow, always the same.
  hipError_t execute(int device, std::span<std::byte> kernarg, Turns* turns) const;
  // The turns of the nodes, as they run.
  void take_turns(Turns* turns) const;

 private:
  std::vector<size_t> order() const;

  std::vector<std::unique_ptr<Node>> nodes_;
};

// What hipGraphInstantiate gives: a copy that can be changed node by node, by the source's nodes.
class GraphExec {
 public:
  explicit GraphExec(std::shared_ptr<const Graph> source)
      : source_(std::move(source)), graph_(source_->clone()) {}

  // Null when the node is not the source's.
  const Operation* operation(const Node* node) const;
  void replace(const Node* node, Operation operation);
  // The graph as it is now; later changes do not reach it.
  std::shared_ptr<const Graph> snapshot() const { return graph_; }

 private:
  std::shared_ptr<const Graph> source_;
  std::shared_ptr<Graph> graph_;
};

// The streams that are being captured into one graph, and the last nodes of each.
class Capture : public std::enable_shared_from_this<Capture> {
 public:
  Capture(const std::shared_ptr<Stream>& origin, hipStreamCaptureMode mode);

  hipError_t add(Stream* stream, Operation operation);
  // Makes what the stream does next depend on these nodes.
  void join(const std::shared_ptr<Stream>& stream, const Graph::Nodes& nodes);
  Graph::Nodes last(const Stream* stream) const;

  hipError_t end(const Stream* stream, std::shared_ptr<Graph>* graph);
  void invalidate();
  bool valid() const;
  // Whether this thread may not make calls that wait for the device.
  bool forbids_unsafe_calls() const;

 private:
  void release_streams();

  const Stream* const origin_;
  const hipStreamCaptureMode mode_;
  const std::thread::id thread_;
  mutable std::mutex mutex_;
  std::shared_ptr<Graph> graph_ = std::make_shared<Graph>();
  struct Branch {
    std::weak_ptr<Stream> stream;
    Graph::Nodes last;
  };
  std::map<const Stream*, Branch> branches_;
  bool valid_ = true;
};

hipError_t begin_capture(const std::shared_ptr<Stream>& stream, hipStreamCaptureMode mode);
hipError_t end_capture(const std::shared_ptr<Stream>& stream, std::shared_ptr<Graph>* graph);
// An error, which invalidates the captures that forbid it, when a call waits for the device.
hipError_t check_unsafe_call();

}  // namespace gfx942::runtime
