#include "module.h"

#include <cstdio>

#include "bundle.h"
#include "handles.h"
#include "memory.h"

namespace gfx942::runtime {
namespace {

Owner owner_of(const Segment& segment) {
  return segment.writable || segment.executable ? Owner::kCode : Owner::kConstants;
}

struct HostFunction {
  std::shared_ptr<FatBinary> binary;
  std::string name;
};

struct HostFunctions {
  std::mutex mutex;
  std::map<const void*, HostFunction> by_address;
};

HostFunctions& host_functions() {
  static auto* const kFunctions = new HostFunctions();
  return *kFunctions;
}

// Kernels may touch a code object's segments as long as anybody holds the code object.
std::shared_ptr<const CodeObject> load_code(const void* image, const std::string& name,
                                            std::string* why) {
  const auto elf = extract_code_object(image, why);
  if (!elf) return nullptr;
  auto code = CodeObject::load(*elf, why);
  if (code == nullptr) return nullptr;
  for (const Segment& segment : code->segments()) {
    memory().enter({segment.first, segment.bytes, MemoryKind::kOrdinary, segment.writable,
                    (segment.executable ? "code of " : "data of ") + name},
                   owner_of(segment), 0);
  }
  return {code.release(), [](const CodeObject* object) {
            for (const Segment& segment : object->segments()) {
              memory().remove(reinterpret_cast<const void*>(segment.first), owner_of(segment));
            }
            delete object;
          }};
}

}  // namespace

std::shared_ptr<Module> Module::load(const void* image, const std::string& name) {
  auto module = std::make_shared<Module>();
  std::string why;
  module->code_ = load_code(image, name, &why);
  if (module->code_ != nullptr) return module;
  std::fprintf(stderr, "rocm-sim: %s cannot be loaded: %s\n", name.c_str(), why.c_str());
  return nullptr;
}

Module::~Module() {
  for (const auto& [name, function] : functions_) handles<Function>().take(function.get());
}

Function* Module::function(const std::string& name) {
  const auto info = code_->kernels().find(name);
  if (info == code_->kernels().end()) return nullptr;
  std::lock_guard lock(mutex_);
  auto& function = functions_[name];
  if (function == nullptr) {
    function = std::make_shared<Function>(Function{code_, &info->second});
    handles<Function>().add(function);
  }
  return function.get();
}

const Variable* Module::variable(const std::string& name) const {
  const auto found = code_->variables().find(name);
  return found == code_->variables().end() ? nullptr : &found->second;
}

Function* FatBinary::function(const std::string& name, int device) {
  std::lock_guard lock(mutex_);
  auto found = modules_.find(device);
  if (found == modules_.end()) {
    auto module = Module::load(image_, "the fat binary with the kernel " + name);
    found = modules_.emplace(device, std::move(module)).first;
  }
  return found->second == nullptr ? nullptr : found->second->function(name);
}

void register_host_function(const void* host_function, std::shared_ptr<FatBinary> binary,
                            const std::string& name) {
  auto& table = host_functions();
  std::lock_guard lock(table.mutex);
  table.by_address[host_function] = {std::move(binary), name};
}

void forget_fat_binary(const FatBinary* binary) {
  auto& table = host_functions();
  std::lock_guard lock(table.mutex);
  std::erase_if(table.by_address, [&](const auto& e) { return e.second.binary.get() == binary; });
}

std::shared_ptr<Function> find_function(const void* function, int device) {
  HostFunction host;
  {
    auto& table = host_functions();
    std::lock_guard lock(table.mutex);
    const auto found = table.by_address.find(function);
    if (found != table.by_address.end()) host = found->second;
  }
  if (host.binary != nullptr) function = host.binary->function(host.name, device);
  return handles<Function>().find(function);
}

}  // namespace gfx942::runtime
