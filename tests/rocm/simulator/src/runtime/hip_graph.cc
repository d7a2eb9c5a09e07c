// Graphs, and streams captured into graphs.
#include <cstdio>

#include "api.h"
#include "graph.h"
#include "handles.h"
#include "module.h"
#include "settings.h"

using namespace gfx942::runtime;  // NOLINT: the entry points belong to no namespace.

namespace {

std::shared_ptr<Graph> find_graph(hipGraph_t handle) { return handles<Graph>().find(handle); }
const Node* node_of(hipGraphNode_t handle) { return reinterpret_cast<const Node*>(handle); }
hipGraphNode_t handle_of(const Node* node) {
  return reinterpret_cast<hipGraphNode_t>(const_cast<Node*>(node));
}

hipError_t add(hipGraphNode_t* out, hipGraph_t handle, const hipGraphNode_t* dependencies,
               size_t count, Operation operation) {
  const auto graph = find_graph(handle);
  if (graph == nullptr || out == nullptr) return remember(hipErrorInvalidValue);
  Graph::Nodes nodes;
  for (size_t i = 0; i < count; ++i) {
    if (!graph->holds(node_of(dependencies[i]))) return remember(hipErrorInvalidValue);
    nodes.push_back(node_of(dependencies[i]));
  }
  *out = handle_of(graph->add(std::move(operation), nodes));
  return hipSuccess;
}

// Replaces a node of an instantiated graph by another of its kind.
template <typename Kind>
hipError_t replace(hipGraphExec_t handle, hipGraphNode_t node, Kind operation) {
  const auto exec = handles<GraphExec>().find(handle);
  if (exec == nullptr) return remember(hipErrorInvalidValue);
  const Operation* before = exec->operation(node_of(node));
  if (before == nullptr || !std::holds_alternative<Kind>(*before)) {
    return remember(hipErrorInvalidValue);
  }
  exec->replace(node_of(node), std::move(operation));
  return hipSuccess;
}

hipError_t make_kernel(const hipKernelNodeParams* from, KernelOperation* out) {
  const auto function = find_function(from->func, current_ordinal());
  if (function == nullptr) return hipErrorInvalidDeviceFunction;
  const Geometry geometry{{from->gridDim.x, from->gridDim.y, from->gridDim.z},
                          {from->blockDim.x, from->blockDim.y, from->blockDim.z},
                          from->sharedMemBytes};
  return gfx942::runtime::make_kernel(*function, geometry, from->kernelParams, from->extra, out);
}

hipError_t make_copy(void* to, const void* from, size_t bytes, hipMemcpyKind kind,
                     CopyOperation* out) {
  const bool any = kind == hipMemcpyDefault || kind == hipMemcpyHostToHost;
  *out = {to, from, bytes, any || kind == hipMemcpyDeviceToHost,
          any || kind == hipMemcpyHostToDevice};
  return check(*out);
}

hipError_t make_fill(const hipMemsetParams* from, FillOperation* out) {
  *out = {from->dst, from->value, from->elementSize, from->width, from->height, from->pitch};
  return check(*out);
}

hipError_t list(const Graph::Nodes& nodes, hipGraphNode_t* out, size_t* count) {
  if (out != nullptr) {
    for (size_t i = 0; i < *count; ++i) out[i] = i < nodes.size() ? handle_of(nodes[i]) : nullptr;
    *count = std::min(*count, nodes.size());
  } else {
    *count = nodes.size();
  }
  return hipSuccess;
}

}  // namespace

extern "C" {

hipError_t hipStreamBeginCapture(hipStream_t handle, hipStreamCaptureMode mode) {
  const auto stream = find_stream(handle);
  if (stream == nullptr) return remember(hipErrorInvalidHandle);
  // The null stream has no beginning: everything waits for it.
  if (handle == nullptr || handle == hipStreamLegacy) {
    return remember(hipErrorStreamCaptureUnsupported);
  }
  return remember(begin_capture(stream, mode));
}

hipError_t hipStreamEndCapture(hipStream_t handle, hipGraph_t* out) {
  const auto stream = find_stream(handle);
  if (stream == nullptr || out == nullptr) return remember(hipErrorInvalidHandle);
  *out = nullptr;
  std::shared_ptr<Graph> graph;
  const hipError_t error = end_capture(stream, &graph);
  if (error == hipSuccess) *out = reinterpret_cast<hipGraph_t>(handles<Graph>().add(graph));
  return remember(error);
}

hipError_t hipStreamIsCapturing(hipStream_t handle, hipStreamCaptureStatus* status) {
  const auto stream = find_stream(handle);
  if (stream == nullptr) return remember(hipErrorInvalidHandle);
  const auto capture = stream->capture();
  *status = hipStreamCaptureStatusNone;
  if (capture != nullptr) {
    *status = capture->valid() ? hipStreamCaptureStatusActive : hipStreamCaptureStatusInvalidated;
  }
  return hipSuccess;
}

hipError_t hipGraphCreate(hipGraph_t* out, unsigned int) {
  *out = reinterpret_cast<hipGraph_t>(handles<Graph>().add(std::make_shared<Graph>()));
  return hipSuccess;
}

hipError_t hipGraphDestroy(hipGraph_t graph) {
  return remember(handles<Graph>().take(graph) == nullptr ? hipErrorInvalidValue : hipSuccess);
}

hipError_t hipGraphAddEmptyNode(hipGraphNode_t* out, hipGraph_t graph,
                                const hipGraphNode_t* dependencies, size_t count) {
  return add(out, graph, dependencies, count, EmptyOperation());
}

hipError_t hipGraphAddKernelNode(hipGraphNode_t* out, hipGraph_t graph,
                                 const hipGraphNode_t* dependencies, size_t count,
                                 const hipKernelNodeParams* parameters) {
  KernelOperation kernel;
  const hipError_t error = make_kernel(parameters, &kernel);
  if (error != hipSuccess) return remember(error);
  return add(out, graph, dependencies, count, std::move(kernel));
}

hipError_t hipGraphAddMemcpyNode1D(hipGraphNode_t* out, hipGraph_t graph,
                                   const hipGraphNode_t* dependencies, size_t count, void* to,
                                   const void* from, size_t bytes, hipMemcpyKind kind) {
  CopyOperation copy;
  const hipError_t error = make_copy(to, from, bytes, kind, &copy);
  if (error != hipSuccess) return remember(error);
  return add(out, graph, dependencies, count, copy);
}

hipError_t hipGraphAddMemsetNode(hipGraphNode_t* out, hipGraph_t graph,
                                 const hipGraphNode_t* dependencies, size_t count,
                                 const hipMemsetParams* parameters) {
  FillOperation fill;
  const hipError_t error = make_fill(parameters, &fill);
  if (error != hipSuccess) return remember(error);
  return add(out, graph, dependencies, count, fill);
}

hipError_t hipGraphAddChildGraphNode(hipGraphNode_t* out, hipGraph_t graph,
                                     const hipGraphNode_t* dependencies, size_t count,
                                     hipGraph_t child) {
  const auto found = find_graph(child);
  if (found == nullptr) return remember(hipErrorInvalidValue);
  return add(out, graph, dependencies, count, ChildOperation{found->clone()});
}

hipError_t hipGraphGetNodes(hipGraph_t handle, hipGraphNode_t* out, size_t* count) {
  const auto graph = find_graph(handle);
  if (graph == nullptr) return remember(hipErrorInvalidValue);
  return list(graph->nodes(), out, count);
}

hipError_t hipGraphGetRootNodes(hipGraph_t handle, hipGraphNode_t* out, size_t* count) {
  const auto graph = find_graph(handle);
  if (graph == nullptr) return remember(hipErrorInvalidValue);
  return list(graph->roots(), out, count);
}

hipError_t hipGraphInstantiate(hipGraphExec_t* out, hipGraph_t handle, hipGraphNode_t*, char*,
                               size_t) {
  const auto graph = find_graph(handle);
  if (graph == nullptr) return remember(hipErrorInvalidValue);
  *out = reinterpret_cast<hipGraphExec_t>(
      handles<GraphExec>().add(std::make_shared<GraphExec>(graph)));
  return hipSuccess;
}

hipError_t hipGraphInstantiateWithFlags(hipGraphExec_t* out, hipGraph_t handle,
                                        unsigned long long flags) {
  if (flags != 0) return not_simulated(__func__, "a flag");
  return hipGraphInstantiate(out, handle, nullptr, nullptr, 0);
}

hipError_t hipGraphExecDestroy(hipGraphExec_t exec) {
  return remember(handles<GraphExec>().take(exec) == nullptr ? hipErrorInvalidValue : hipSuccess);
}

hipError_t hipGraphExecKernelNodeSetParams(hipGraphExec_t exec, hipGraphNode_t node,
                                           const hipKernelNodeParams* parameters) {
  KernelOperation kernel;
  const hipError_t error = make_kernel(parameters, &kernel);
  if (error != hipSuccess) return remember(error);
  return replace(exec, node, std::move(kernel));
}

hipError_t hipGraphExecMemcpyNodeSetParams1D(hipGraphExec_t exec, hipGraphNode_t node, void* to,
                                             const void* from, size_t bytes, hipMemcpyKind kind) {
  CopyOperation copy;
  const hipError_t error = make_copy(to, from, bytes, kind, &copy);
  if (error != hipSuccess) return remember(error);
  return replace(exec, node, copy);
}

hipError_t hipGraphExecMemsetNodeSetParams(hipGraphExec_t exec, hipGraphNode_t node,
                                           const hipMemsetParams* parameters) {
  FillOperation fill;
  const hipError_t error = make_fill(parameters, &fill);
  if (error != hipSuccess) return remember(error);
  return replace(exec, node, fill);
}

hipError_t hipGraphExecChildGraphNodeSetParams(hipGraphExec_t exec, hipGraphNode_t node,
                                               hipGraph_t child) {
  const auto graph = find_graph(child);
  if (graph == nullptr) return remember(hipErrorInvalidValue);
  return replace(exec, node, ChildOperation{graph->clone()});
}

hipError_t hipGraphLaunch(hipGraphExec_t handle, hipStream_t stream) {
  const auto exec = handles<GraphExec>().find(handle);
  if (exec == nullptr) return remember(hipErrorInvalidValue);
  if (settings().trace) std::fprintf(stderr, "rocm-sim: a graph is launched\n");
  return submit(stream, ChildOperation{exec->snapshot()});
}

}  // extern "C"
