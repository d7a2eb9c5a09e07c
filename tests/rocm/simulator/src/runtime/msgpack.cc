#include "msgpack.h"

#include <optional>

namespace gfx942::runtime {
namespace {

// Deeper than any metadata, and shallow enough for the stack.
constexpr int kMaxDepth = 32;

class Reader {
 public:
  explicit Reader(std::span<const std::byte> bytes) : bytes_(bytes) {}

  std::optional<MsgValue> value(int depth = 0) {
    const auto tag = number(1);
    if (!tag || depth > kMaxDepth) return std::nullopt;
    if (*tag < 0x80 || *tag >= 0xe0) return MsgValue(widen(*tag, 1));
    if (*tag < 0x90) return map(*tag & 0xf, depth);
    if (*tag < 0xa0) return array(*tag & 0xf, depth);
    if (*tag < 0xc0) return text(*tag & 0x1f);
    switch (*tag) {
      case 0xc0:
        return MsgValue();
      case 0xc2:
      case 0xc3:
        return MsgValue(*tag & 1);
      case 0xc4:
      case 0xc5:
      case 0xc6:
        return text(number(size_t{1} << (*tag - 0xc4)));
      case 0xcc:
      case 0xcd:
      case 0xce:
      case 0xcf:
        return integer(size_t{1} << (*tag - 0xcc), false);
      case 0xd0:
      case 0xd1:
      case 0xd2:
      case 0xd3:
        return integer(size_t{1} << (*tag - 0xd0), true);
      case 0xd9:
      case 0xda:
      case 0xdb:
        return text(number(size_t{1} << (*tag - 0xd9)));
      case 0xdc:
      case 0xdd:
        return array(number(size_t{2} << (*tag - 0xdc)), depth);
      case 0xde:
      case 0xdf:
        return map(number(size_t{2} << (*tag - 0xde)), depth);
      default:
        return std::nullopt;
    }
  }

 private:
  static uint64_t widen(uint64_t value, size_t bytes) {
    const size_t shift = 64 - 8 * bytes;
    return static_cast<uint64_t>(static_cast<int64_t>(value << shift) >> shift);
  }

  std::optional<uint64_t> number(size_t bytes) {
    if (bytes > bytes_.size()) return std::nullopt;
    uint64_t value = 0;
    for (size_t i = 0; i < bytes; ++i) value = value << 8 | static_cast<uint8_t>(bytes_[i]);
    bytes_ = bytes_.subspan(bytes);
    return value;
  }

  std::optional<MsgValue> integer(size_t bytes, bool is_signed) {
    const auto value = number(bytes);
    if (!value) return std::nullopt;
    return MsgValue(is_signed ? widen(*value, bytes) : *value);
  }

  std::optional<MsgValue> text(std::optional<uint64_t> size) {
    if (!size || *size > bytes_.size()) return std::nullopt;
    std::string text(reinterpret_cast<const char*>(bytes_.data()), *size);
    bytes_ = bytes_.subspan(*size);
    return MsgValue(std::move(text));
  }

  std::optional<MsgValue> array(std::optional<uint64_t> size, int depth) {
    if (!size || *size > bytes_.size()) return std::nullopt;
    MsgValue::Array values;
    for (uint64_t i = 0; i < *size; ++i) {
      auto element = value(depth + 1);
      if (!element) return std::nullopt;
      values.push_back(std::move(*element));
    }
    return MsgValue(std::move(values));
  }

  std::optional<MsgValue> map(std::optional<uint64_t> size, int depth) {
    if (!size || *size > bytes_.size()) return std::nullopt;
    MsgValue::Map values;
    for (uint64_t i = 0; i < *size; ++i) {
      const auto key = value(depth + 1);
      auto element = key ? value(depth + 1) : std::nullopt;
      if (!element) return std::nullopt;
      values.emplace_back(key->text(), std::move(*element));
    }
    return MsgValue(std::move(values));
  }

  std::span<const std::byte> bytes_;
};

}  // namespace

uint64_t MsgValue::integer(uint64_t otherwise) const {
  const auto* value = std::get_if<uint64_t>(&value_);
  return value == nullptr ? otherwise : *value;
}

const std::string& MsgValue::text() const {
  static const std::string kNone;
  const auto* value = std::get_if<std::string>(&value_);
  return value == nullptr ? kNone : *value;
}

const MsgValue::Array& MsgValue::array() const {
  static const Array kNone;
  const auto* value = std::get_if<Array>(&value_);
  return value == nullptr ? kNone : *value;
}

const MsgValue& MsgValue::operator[](const std::string& key) const {
  static const MsgValue kNone;
  if (const auto* map = std::get_if<Map>(&value_)) {
    for (const auto& [name, value] : *map) {
      if (name == key) return value;
    }
  }
  return kNone;
}

MsgValue parse_msgpack(std::span<const std::byte> bytes) {
  return Reader(bytes).value().value_or(MsgValue());
}

}  // namespace gfx942::runtime
