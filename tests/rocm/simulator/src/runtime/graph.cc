#include "graph.h"

#include <algorithm>
#include <random>

#include "settings.h"

namespace gfx942::runtime {

std::shared_ptr<Graph> Graph::clone() const {
  auto copy = std::make_shared<Graph>();
  for (const auto& node : nodes_) copy->nodes_.push_back(std::make_unique<Node>(*node));
  return copy;
}

const Node* Graph::add(Operation operation, const Nodes& dependencies) {
  auto node = std::make_unique<Node>();
  node->index = nodes_.size();
  node->operation = std::move(operation);
  for (const Node* dependency : dependencies) node->dependencies.push_back(dependency->index);
  nodes_.push_back(std::move(node));
  return nodes_.back().get();
}

bool Graph::holds(const Node* node) const {
  return std::any_of(nodes_.begin(), nodes_.end(), [&](const auto& n) { return n.get() == node; });
}

Graph::Nodes Graph::leaves() const {
  std::vector<bool> needed(nodes_.size(), false);
  for (const auto& node : nodes_) {
    for (const size_t dependency : node->dependencies) needed[dependency] = true;
  }
  Nodes leaves;
  for (const auto& node : nodes_) {
    if (!needed[node->index]) leaves.push_back(node.get());
  }
  return leaves;
}

Graph::Nodes Graph::roots() const {
  Nodes roots;
  for (const auto& node : nodes_) {
    if (node->dependencies.empty()) roots.push_back(node.get());
  }
  return roots;
}

Graph::Nodes Graph::nodes() const {
  Nodes all;
  for (const auto& node : nodes_) all.push_back(node.get());
  return all;
}

void Graph::replace(size_t index, Operation operation) {
  nodes_[index]->operation = std::move(operation);
}

std::vector<size_t> Graph::order() const {
  std::vector<size_t> order;
  std::vector<size_t> waits_for(nodes_.size());
  std::vector<std::vector<size_t>> dependents(nodes_.size());
  std::vector<size_t> ready;
  for (const auto& node : nodes_) {
    waits_for[node->index] = node->dependencies.size();
    for (const size_t dependency : node->dependencies) {
      dependents[dependency].push_back(node->index);
    }
    if (node->dependencies.empty()) ready.push_back(node->index);
  }
  // Any ready node may come next. The choice is random, so that a missing dependency shows.
  std::minstd_rand random(static_cast<uint32_t>(settings().machine.seed + 1));
  while (!ready.empty()) {
    std::swap(ready[random() % ready.size()], ready.back());
    const size_t index = ready.back();
    ready.pop_back();
    order.push_back(index);
    for (const size_t dependent : dependents[index]) {
      if (--waits_for[dependent] == 0) ready.push_back(dependent);
    }
  }
  return order;
}

void Graph::take_turns(Turns* turns) const {
  for (const size_t index : order()) runtime::take_turns(nodes_[index]->operation, turns);
}

hipError_t Graph::execute(int device, std::span<std::byte> kernarg, Turns* turns) const {
  for (const size_t index : order()) {
    const hipError_t error = runtime::execute(nodes_[index]->operation, device, kernarg, turns);
    if (error != hipSuccess) return error;
  }
  return hipSuccess;
}

const Operation* GraphExec::operation(const Node* node) const {
  return source_->holds(node) ? &graph_->node(node->index).operation : nullptr;
}

void GraphExec::replace(const Node* node, Operation operation) {
  // A launch that is under way keeps the graph that it was given.
  if (graph_.use_count() > 1) graph_ = graph_->clone();
  graph_->replace(node->index, std::move(operation));
}

}  // namespace gfx942::runtime
