// A call of a Python function on lent tensors. The handlers make it, Python reads it by ctypes
// (jax_moriep/interop/runner.py). No XLA and no Python here.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dlpack.h"

#define MORIEP_EXPORT extern "C" __attribute__((visibility("default")))

namespace moriep {

class Call;

// What Python sees of a call; runner.py declares the same fields.
struct CallFields {
  Call* call;
  const char* function;  // its registered name
  int64_t function_size;
  const dlpack::Tensor* tensors;  // the inputs, then the outputs
  int64_t num_inputs;
  int64_t num_tensors;
  void* stream;  // XLA's stream; null on the CPU
};

// Runs a call: gives 1, or 0 after moriep_interop_fail. 0 also if it raises: ctypes gives that
// then.
using Runner = int32_t (*)(const CallFields*);

// Tensors that are valid during the call only. What is lent is counted, so that a tensor which is
// kept longer, and would then point to memory that XLA uses for something else, is noticed.
class Call {
 public:
  Call(std::string_view function, dlpack::Device device, void* stream)
      : function_(function), device_(device), stream_(stream) {}
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // Adds a tensor, compact and row-major; the inputs come first.
  void add(void* data, dlpack::Type type, const int64_t* dims, size_t ndim, bool is_input);

  // Runs the Python function. Gives false, and error() says why, if it failed.
  bool run();

  // A managed tensor over a tensor of the call, read as `type`; its consumer deletes it.
  dlpack::Managed* lend(size_t index, dlpack::Type type) const;
  dlpack::ManagedVersioned* lend_versioned(size_t index, dlpack::Type type, bool read_only) const;

  // How many of those are not deleted yet.
  int64_t lent() const { return lent_->load(); }

  void fail(std::string text) { error_ = std::move(text); }
  const std::string& error() const { return error_; }

 private:
  std::string_view function_;
  dlpack::Device device_;
  void* stream_;
  std::vector<dlpack::Tensor> tensors_;
  std::vector<std::unique_ptr<int64_t[]>> dims_;  // of each tensor: its shape, then its strides
  int64_t num_inputs_ = 0;
  // Shared with what is lent, which may outlive the call.
  std::shared_ptr<std::atomic<int64_t>> lent_ = std::make_shared<std::atomic<int64_t>>(0);
  std::string error_;
};

}  // namespace moriep

// Sets the function that runs calls; it takes Python's lock by itself.
MORIEP_EXPORT void moriep_interop_set_runner(moriep::Runner runner);

// When Python ends: calls fail from now on. Waits for those that run, and gives 0 if some still do
// after that time. Python ends a thread that asks for its lock too late, in the middle of what
// called it, and XLA's pools wait forever for such a thread.
MORIEP_EXPORT int32_t moriep_interop_stop(double timeout_seconds);

// A DLManagedTensorVersioned, or a DLManagedTensor, over a tensor of the call.
MORIEP_EXPORT void* moriep_interop_lend(const moriep::Call* call, int64_t index, int32_t type_code,
                                        int32_t type_bits, int32_t versioned, int32_t read_only);

// Deletes a managed tensor that nobody consumed.
MORIEP_EXPORT void moriep_interop_take_back(void* managed, int32_t versioned);

MORIEP_EXPORT int64_t moriep_interop_lent(const moriep::Call* call);

// Sets the text of the call's error.
MORIEP_EXPORT void moriep_interop_fail(moriep::Call* call, const char* text, int64_t size);
