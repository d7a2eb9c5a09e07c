// The gfx942 code object of what compilers hand over: a plain ELF file, or a clang offload bundle
// of code objects for several targets, compressed or not.
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace gfx942::runtime {

// The image ends where its own headers say, for callers give no size. Says why there is none.
std::optional<std::vector<std::byte>> extract_code_object(const void* image, std::string* why);

}  // namespace gfx942::runtime
