#include "failure.h"

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>

namespace gfx942::collectives {
namespace {

constexpr double kDeadline = 120;

// Texts are handed out by address, so that each is kept; there are few different ones.
struct Texts {
  std::mutex mutex;
  std::set<std::string> all;
  const char* last = "";
};

Texts& texts() {
  static auto* const kTexts = new Texts();
  return *kTexts;
}

}  // namespace

ncclResult_t report(const Failure& failure) {
  std::fprintf(stderr, "rocm-sim: %s\n", failure.text.c_str());
  std::lock_guard lock(texts().mutex);
  texts().last = texts().all.insert(failure.text).first->c_str();
  return failure.code;
}

const char* last_failure() {
  std::lock_guard lock(texts().mutex);
  return texts().last;
}

double deadline_seconds() {
  const char* text = std::getenv("ROCM_SIM_COLLECTIVE_DEADLINE");
  return text == nullptr || *text == '\0' ? kDeadline : std::strtod(text, nullptr);
}

}  // namespace gfx942::collectives
