// The whole test framework: CHECK macros that print both values and end the program, and TEST, a
// function that runs under a deadline of its own.
#pragma once

#include <signal.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "moriep/status.h"

#if defined(__SANITIZE_THREAD__)
inline constexpr bool kSanitizedThreads = true;
#else
inline constexpr bool kSanitizedThreads = false;
#endif
#if defined(__SANITIZE_ADDRESS__)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = kSanitizedThreads;
#endif

namespace moriep {

inline std::ostream& operator<<(std::ostream& out, const Status& status) {
  return out << "Status(" << static_cast<int32_t>(status.code()) << ", \"" << status.text()
             << "\")";
}

inline std::ostream& operator<<(std::ostream& out, Code code) {
  return out << static_cast<int32_t>(code);
}

}  // namespace moriep

namespace check {

// Not exit(): other threads of the program may be in the middle of a step.
[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  std::fprintf(stderr, "[%d] %s:%d: %s\n", static_cast<int>(getpid()), file, line, what.c_str());
  std::_Exit(1);
}

template <typename T>
std::string show(const T& value) {
  std::ostringstream out;
  out.precision(17);
  out << value;
  return out.str();
}

template <typename A, typename B>
void equal(const char* file, int line, const char* text, const A& a, const B& b) {
  if (!(a == b)) fail(file, line, std::string(text) + ": " + show(a) + " is not " + show(b));
}

inline void contains(const char* file, int line, const std::string& text, const std::string& part) {
  if (text.find(part) == std::string::npos) {
    fail(file, line, "\"" + text + "\" does not contain \"" + part + "\"");
  }
}

struct Test {
  const char* name;
  unsigned seconds;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

inline bool add(const char* name, unsigned seconds, void (*body)()) {
  tests().push_back({name, seconds, body});
  return true;
}

inline const char* running = "no test";

// Ends this process, and says where it was, unless it ends by itself in time. A forked child calls
// it too, because alarms are not inherited.
inline void set_deadline(unsigned seconds) {
  signal(SIGALRM, [](int) {
    constexpr std::string_view text = "the deadline has passed in ";
    (void)!write(STDERR_FILENO, text.data(), text.size());
    (void)!write(STDERR_FILENO, running, std::strlen(running));
    (void)!write(STDERR_FILENO, "\n", 1);
    _exit(124);
  });
  alarm(seconds);
}

// Runs the tests whose names contain the first argument, all of them without one.
inline int run_all(int argc, char** argv) {
  int ran = 0;
  for (const Test& test : tests()) {
    if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) continue;
    running = test.name;
    set_deadline(test.seconds);
    test.body();
    alarm(0);
    std::printf("ok %s\n", test.name);
    std::fflush(stdout);
    ++ran;
  }
  return ran > 0 ? 0 : 1;
}

}  // namespace check

#define CHECK(condition) \
  ((condition) ? void() : ::check::fail(__FILE__, __LINE__, #condition " is false"))
#define CHECK_EQ(a, b) ::check::equal(__FILE__, __LINE__, #a " == " #b, a, b)
#define CHECK_CONTAINS(text, part) ::check::contains(__FILE__, __LINE__, text, part)
#define CHECK_OK(status) ::check::equal(__FILE__, __LINE__, #status, (status).text(), "")

#define TEST(name, seconds)                                            \
  static void name();                                                  \
  static const bool name##_added = ::check::add(#name, seconds, name); \
  static void name()

#define TEST_MAIN() \
  int main(int argc, char** argv) { return ::check::run_all(argc, argv); }
