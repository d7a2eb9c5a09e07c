// The part of MessagePack that code objects use for their metadata.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace gfx942::runtime {

class MsgValue {
 public:
  using Array = std::vector<MsgValue>;
  using Map = std::vector<std::pair<std::string, MsgValue>>;

  MsgValue() = default;
  explicit MsgValue(uint64_t value) : value_(value) {}
  explicit MsgValue(std::string value) : value_(std::move(value)) {}
  explicit MsgValue(Array value) : value_(std::move(value)) {}
  explicit MsgValue(Map value) : value_(std::move(value)) {}

  // A value of another type reads as empty: metadata is optional, field by field.
  uint64_t integer(uint64_t otherwise = 0) const;
  const std::string& text() const;
  const Array& array() const;
  const MsgValue& operator[](const std::string& key) const;

 private:
  std::variant<std::monostate, uint64_t, std::string, Array, Map> value_;
};

// Gives an empty value for bytes that are not MessagePack.
MsgValue parse_msgpack(std::span<const std::byte> bytes);

}  // namespace gfx942::runtime
