#include "bundle.h"

#include <elf.h>
#include <zstd.h>

#include <cstdint>
#include <cstring>
#include <string_view>

#include "code_object.h"

namespace gfx942::runtime {
namespace {

constexpr std::string_view kBundleMagic = "__CLANG_OFFLOAD_BUNDLE__";
constexpr std::string_view kCompressedMagic = "CCOB";
constexpr uint16_t kMethodZstd = 1;

using Bytes = std::vector<std::byte>;

template <typename T>
T read(const std::byte** at) {
  T value;
  std::memcpy(&value, *at, sizeof(value));
  *at += sizeof(value);
  return value;
}

bool begins_with(const std::byte* image, std::string_view magic) {
  return std::memcmp(image, magic.data(), magic.size()) == 0;
}

// A target is written as kind-triple--processor:feature:feature.
bool is_for_gfx942(std::string_view target) {
  const size_t at = target.rfind("--");
  if (!target.starts_with("hip") || at == std::string_view::npos) return false;
  const std::string_view processor = target.substr(at + 2);
  if (!processor.starts_with("gfx942") && !processor.starts_with("gfx9-4-generic")) return false;
  // The simulated device has xnack off and sramecc on.
  return processor.find("xnack+") == std::string_view::npos &&
         processor.find("sramecc-") == std::string_view::npos;
}

std::optional<Bytes> from_bundle(const std::byte* bundle, std::string* why) {
  const std::byte* at = bundle + kBundleMagic.size();
  const auto count = read<uint64_t>(&at);
  std::string others;
  for (uint64_t i = 0; i < count; ++i) {
    const auto offset = read<uint64_t>(&at);
    const auto bytes = read<uint64_t>(&at);
    const auto name_bytes = read<uint64_t>(&at);
    const std::string_view target(reinterpret_cast<const char*>(at), name_bytes);
    at += name_bytes;
    if (is_for_gfx942(target)) return Bytes(bundle + offset, bundle + offset + bytes);
    others.append(" ").append(target);
  }
  *why = "its targets are" + others + ", and none is gfx942";
  return std::nullopt;
}

std::optional<Bytes> decompress(const std::byte* image, std::string* why) {
  const std::byte* at = image + kCompressedMagic.size();
  const auto version = read<uint16_t>(&at);
  const auto method = read<uint16_t>(&at);
  uint64_t file_bytes = 0;
  uint64_t bytes = 0;
  if (version == 2) {
    file_bytes = read<uint32_t>(&at);
    bytes = read<uint32_t>(&at);
  } else if (version == 3) {
    file_bytes = read<uint64_t>(&at);
    bytes = read<uint64_t>(&at);
  } else {
    *why = "it is a compressed bundle of the unknown version " + std::to_string(version);
    return std::nullopt;
  }
  if (method != kMethodZstd) {
    *why = "it is compressed by the unknown method " + std::to_string(method);
    return std::nullopt;
  }
  at += sizeof(uint64_t);  // a hash
  const auto header_bytes = static_cast<uint64_t>(at - image);
  Bytes bundle(bytes);
  const size_t got = ZSTD_decompress(bundle.data(), bundle.size(), at, file_bytes - header_bytes);
  if (ZSTD_isError(got) != 0 || got != bytes) {
    *why = "it does not decompress";
    return std::nullopt;
  }
  return bundle;
}

}  // namespace

std::optional<Bytes> extract_code_object(const void* image, std::string* why) {
  const auto* bytes = static_cast<const std::byte*>(image);
  if (begins_with(bytes, ELFMAG)) {
    const size_t size = elf_bytes({bytes, sizeof(Elf64_Ehdr)});
    return Bytes(bytes, bytes + size);
  }
  if (begins_with(bytes, kBundleMagic)) return from_bundle(bytes, why);
  if (begins_with(bytes, kCompressedMagic)) {
    const auto bundle = decompress(bytes, why);
    if (!bundle) return std::nullopt;
    if (begins_with(bundle->data(), kBundleMagic)) return from_bundle(bundle->data(), why);
  }
  *why = "it is neither an ELF file nor an offload bundle";
  return std::nullopt;
}

}  // namespace gfx942::runtime
