#include "call.h"

#include <algorithm>
#include <chrono>
#include <thread>

namespace moriep {
namespace {

std::atomic<Runner> g_runner{nullptr};
std::atomic<int64_t> g_running{0};

// Counts the calls that run, also those that are about to find that there is no runner.
struct Running {
  Running() { g_running.fetch_add(1); }
  ~Running() { g_running.fetch_sub(1); }
};

// A managed tensor with what it needs after the call is gone.
template <typename Managed>
struct Loan {
  Managed managed{};
  std::unique_ptr<int64_t[]> dims;
  std::shared_ptr<std::atomic<int64_t>> lent;

  static void end(Managed* managed) {
    auto* loan = static_cast<Loan*>(managed->context);
    loan->lent->fetch_sub(1);
    delete loan;
  }
};

template <typename Managed>
Managed* make_loan(const dlpack::Tensor& tensor, dlpack::Type type,
                   std::shared_ptr<std::atomic<int64_t>> lent) {
  auto loan = std::make_unique<Loan<Managed>>();
  const auto ndim = static_cast<size_t>(tensor.ndim);
  loan->dims = std::make_unique<int64_t[]>(2 * ndim + 1);
  std::copy_n(tensor.shape, 2 * ndim, loan->dims.get());
  loan->lent = std::move(lent);
  loan->lent->fetch_add(1);
  Managed& managed = loan->managed;
  managed.tensor = tensor;
  managed.tensor.type = type;
  managed.tensor.shape = loan->dims.get();
  managed.tensor.strides = loan->dims.get() + ndim;
  managed.context = loan.get();
  managed.deleter = Loan<Managed>::end;
  return &loan.release()->managed;
}

}  // namespace

void Call::add(void* data, dlpack::Type type, const int64_t* dims, size_t ndim, bool is_input) {
  // One more, so that a scalar's pointers are good too: some consumers refuse null.
  auto shape = std::make_unique<int64_t[]>(2 * ndim + 1);
  int64_t* strides = shape.get() + ndim;
  int64_t stride = 1;
  for (size_t i = ndim; i-- > 0;) {
    shape[i] = dims[i];
    strides[i] = stride;
    stride *= dims[i];
  }
  tensors_.push_back(dlpack::Tensor{.data = data,
                                    .device = device_,
                                    .ndim = static_cast<int32_t>(ndim),
                                    .type = type,
                                    .shape = shape.get(),
                                    .strides = strides,
                                    .byte_offset = 0});
  dims_.push_back(std::move(shape));
  if (is_input) ++num_inputs_;
}

bool Call::run() {
  const Running running;
  const Runner runner = g_runner.load();
  if (runner == nullptr) {
    fail("Python is ending, or jax_moriep.interop was not used in this process");
    return false;
  }
  const CallFields fields{.call = this,
                          .function = function_.data(),
                          .function_size = static_cast<int64_t>(function_.size()),
                          .tensors = tensors_.data(),
                          .num_inputs = num_inputs_,
                          .num_tensors = static_cast<int64_t>(tensors_.size()),
                          .stream = stream_};
  error_ = "the Python side raised an exception of its own; its standard error tells more";
  if (runner(&fields) == 0) return false;
  error_.clear();
  return true;
}

dlpack::Managed* Call::lend(size_t index, dlpack::Type type) const {
  return make_loan<dlpack::Managed>(tensors_[index], type, lent_);
}

dlpack::ManagedVersioned* Call::lend_versioned(size_t index, dlpack::Type type,
                                               bool read_only) const {
  auto* managed = make_loan<dlpack::ManagedVersioned>(tensors_[index], type, lent_);
  managed->version = dlpack::Version{.major = 1, .minor = 1};
  managed->flags = read_only ? dlpack::kReadOnly : 0;
  return managed;
}

}  // namespace moriep

void moriep_interop_set_runner(moriep::Runner runner) { moriep::g_runner.store(runner); }

int32_t moriep_interop_stop(double timeout_seconds) {
  using Clock = std::chrono::steady_clock;
  moriep::g_runner.store(nullptr);
  const auto end = Clock::now() + std::chrono::duration<double>(timeout_seconds);
  while (moriep::g_running.load() > 0) {
    if (Clock::now() > end) return 0;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return 1;
}

void* moriep_interop_lend(const moriep::Call* call, int64_t index, int32_t type_code,
                          int32_t type_bits, int32_t versioned, int32_t read_only) {
  const moriep::dlpack::Type type{
      .code = static_cast<uint8_t>(type_code), .bits = static_cast<uint8_t>(type_bits), .lanes = 1};
  const auto at = static_cast<size_t>(index);
  if (versioned != 0) return call->lend_versioned(at, type, read_only != 0);
  return call->lend(at, type);
}

void moriep_interop_take_back(void* managed, int32_t versioned) {
  if (versioned != 0) {
    auto* tensor = static_cast<moriep::dlpack::ManagedVersioned*>(managed);
    tensor->deleter(tensor);
  } else {
    auto* tensor = static_cast<moriep::dlpack::Managed*>(managed);
    tensor->deleter(tensor);
  }
}

int64_t moriep_interop_lent(const moriep::Call* call) { return call->lent(); }

void moriep_interop_fail(moriep::Call* call, const char* text, int64_t size) {
  call->fail(std::string(text, static_cast<size_t>(size)));
}
