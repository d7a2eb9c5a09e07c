// Reads LLVM's assembly text. The text names operands and modifiers the same way for every
// encoding, which is why it is parsed instead of the encodings.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string_view>
#include <vector>

#include "convert.h"
#include "decode.h"
#include "dpp.h"
#include "semantics.h"

namespace gfx942 {
namespace {

std::vector<std::string_view> split(std::string_view text) {
  std::vector<std::string_view> tokens;
  int depth = 0;
  size_t start = 0;
  const auto end_token = [&](size_t end) {
    if (end > start) tokens.push_back(text.substr(start, end - start));
    start = end + 1;
  };
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '[' || c == '(') ++depth;
    if (c == ']' || c == ')') --depth;
    if (depth == 0 && (c == ' ' || c == ',' || c == '\t')) end_token(i);
  }
  end_token(text.size());
  return tokens;
}

bool consume(std::string_view* text, std::string_view prefix) {
  if (!text->starts_with(prefix)) return false;
  text->remove_prefix(prefix.size());
  return true;
}

bool parse_integer(std::string_view text, int64_t* out) {
  const bool negative = consume(&text, "-");
  const int base = consume(&text, "0x") ? 16 : 10;
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, base);
  if (error != std::errc() || end != text.data() + text.size()) return false;
  *out = static_cast<int64_t>(negative ? -value : value);
  return true;
}

void set_integer(int64_t value, bool literal, Operand* out) {
  out->bank = Bank::kConstant;
  out->literal = literal;
  out->half = static_cast<uint16_t>(value);
  out->word = static_cast<uint32_t>(value);
  out->quad = literal ? static_cast<uint32_t>(value) : static_cast<uint64_t>(value);
}

bool parse_constant(std::string_view text, Operand* out) {
  int64_t integer = 0;
  if (parse_integer(text, &integer)) {
    // Only literals are printed in hexadecimal beyond the range of the inline integers.
    set_integer(integer, integer < -16 || integer > 64, out);
    return true;
  }
  char* end = nullptr;
  const std::string copy(text);
  const double value = std::strtod(copy.c_str(), &end);
  if (copy.empty() || end != copy.c_str() + copy.size()) return false;
  out->bank = Bank::kConstant;
  const bool inverse_two_pi = std::fabs(value - 0.15915494309189532) < 1e-3;
  out->half = inverse_two_pi ? 0x3118 : float_to_half(static_cast<float>(value));
  const float single = static_cast<float>(value);
  std::memcpy(&out->word, &single, 4);
  const double exact = inverse_two_pi ? 0.15915494309189532 : value;
  std::memcpy(&out->quad, &exact, 8);
  return true;
}

struct Named {
  uint16_t index;
  uint8_t dwords;
};

const std::map<std::string_view, Named>& named_registers() {
  static const std::map<std::string_view, Named> names = {
      {"vcc", {kVcc, 2}},
      {"vcc_lo", {kVcc, 1}},
      {"vcc_hi", {kVcc + 1, 1}},
      {"exec", {kExec, 2}},
      {"exec_lo", {kExec, 1}},
      {"exec_hi", {kExec + 1, 1}},
      {"m0", {kM0, 1}},
      {"flat_scratch", {kFlatScratch, 2}},
      {"flat_scratch_lo", {kFlatScratch, 1}},
      {"flat_scratch_hi", {kFlatScratch + 1, 1}},
      {"xnack_mask", {kXnackMask, 2}},
      {"xnack_mask_lo", {kXnackMask, 1}},
      {"xnack_mask_hi", {kXnackMask + 1, 1}},
      {"src_shared_base", {kSharedBase, 2}},
      {"src_shared_limit", {kSharedLimit, 2}},
      {"src_private_base", {kPrivateBase, 2}},
      {"src_private_limit", {kPrivateLimit, 2}},
      {"src_vccz", {kVccIsZero, 1}},
      {"vccz", {kVccIsZero, 1}},
      {"src_execz", {kExecIsZero, 1}},
      {"execz", {kExecIsZero, 1}},
      {"src_scc", {kScc, 1}},
      {"scc", {kScc, 1}},
  };
  return names;
}

// v5, a[0:3], s7, ttmp[4:5].
bool parse_numbered_register(std::string_view text, Operand* out) {
  uint16_t base = 0;
  if (consume(&text, "ttmp")) {
    out->bank = Bank::kScalar;
    base = kTrapTemporary;
  } else if (consume(&text, "v")) {
    out->bank = Bank::kVector;
  } else if (consume(&text, "a")) {
    out->bank = Bank::kVector;
    base = kFirstAccumulator;
  } else if (consume(&text, "s")) {
    out->bank = Bank::kScalar;
  } else {
    return false;
  }
  int64_t first = 0;
  int64_t last = 0;
  if (consume(&text, "[")) {
    if (!text.ends_with("]")) return false;
    text.remove_suffix(1);
    const size_t colon = text.find(':');
    if (!parse_integer(text.substr(0, colon), &first)) return false;
    last = first;
    if (colon != text.npos && !parse_integer(text.substr(colon + 1), &last)) return false;
  } else {
    if (!parse_integer(text, &first)) return false;
    last = first;
  }
  out->index = static_cast<uint16_t>(base + first);
  out->dwords = static_cast<uint8_t>(last - first + 1);
  return true;
}

bool parse_operand(std::string_view text, Operand* out) {
  if (text == "off") {
    out->bank = Bank::kOff;
    return true;
  }
  Operand operand;
  if (parse_constant(text, &operand)) {
    *out = operand;
    return true;
  }
  operand.negate = consume(&text, "-");
  if (text.starts_with("|") && text.ends_with("|")) {
    operand.absolute = true;
    text = text.substr(1, text.size() - 2);
  }
  if (text.starts_with("sext(") && text.ends_with(")")) {
    operand.sign_extend = true;
    text = text.substr(5, text.size() - 6);
  }
  const auto& names = named_registers();
  if (const auto named = names.find(text); named != names.end()) {
    operand.bank = Bank::kScalar;
    operand.index = named->second.index;
    operand.dwords = named->second.dwords;
  } else if (!parse_numbered_register(text, &operand) && !parse_constant(text, &operand)) {
    return false;
  }
  *out = operand;
  return true;
}

bool parse_select(std::string_view text, Select* out) {
  static const std::map<std::string_view, Select> names = {
      {"BYTE_0", Select::kByte0}, {"BYTE_1", Select::kByte1}, {"BYTE_2", Select::kByte2},
      {"BYTE_3", Select::kByte3}, {"WORD_0", Select::kWord0}, {"WORD_1", Select::kWord1},
      {"DWORD", Select::kDword}};
  const auto found = names.find(text);
  if (found == names.end()) return false;
  *out = found->second;
  return true;
}

// [0,1,1] as the bits 0b110.
bool parse_bits(std::string_view list, uint8_t* out) {
  if (!list.starts_with("[") || !list.ends_with("]")) return false;
  uint8_t bits = 0;
  int position = 0;
  for (const char c : list) {
    if (c == '0' || c == '1') bits |= static_cast<uint8_t>((c - '0') << position++);
  }
  *out = bits;
  return true;
}

struct Modifiers {
  Instruction* out;
  LaneMoveText lanes;

  bool flag(std::string_view name) {
    Instruction& i = *out;
    if (name == "sc0" || name == "glc") return i.sc0 = true;
    if (name == "sc1" || name == "scc") return i.sc1 = true;
    if (name == "nt" || name == "slc") return i.nt = true;
    if (name == "offen") return i.offen = true;
    if (name == "idxen") return i.idxen = true;
    if (name == "lds") return i.lds = true;
    if (name == "clamp") return i.clamp = true;
    return lanes.control(name, "");
  }

  bool number(std::string_view name, int64_t value) {
    Instruction& i = *out;
    if (name == "offset") return i.offset = static_cast<int32_t>(value), true;
    if (name == "offset0") return i.offset0 = static_cast<uint8_t>(value), true;
    if (name == "offset1") return i.offset1 = static_cast<uint8_t>(value), true;
    if (name == "cbsz") return i.cbsz = static_cast<uint8_t>(value), true;
    if (name == "abid") return i.abid = static_cast<uint8_t>(value), true;
    if (name == "blgp") return i.blgp = static_cast<uint8_t>(value), true;
    if (name == "mul") return i.multiplier = static_cast<float>(value), true;
    if (name == "div") return i.multiplier = 1.0f / static_cast<float>(value), true;
    return false;
  }

  bool named(std::string_view name, std::string_view value) {
    Instruction& i = *out;
    int64_t integer = 0;
    if (parse_integer(value, &integer) && number(name, integer)) return true;
    if (name == "op_sel") return parse_bits(value, &i.op_sel);
    if (name == "op_sel_hi") return parse_bits(value, &i.op_sel_hi);
    if (name == "neg_lo") return parse_bits(value, &i.neg_lo);
    if (name == "neg_hi") return parse_bits(value, &i.neg_hi);
    if (name == "neg") return parse_bits(value, &i.blgp);
    if (name == "offset" && value.starts_with("swizzle")) {
      return i.offset = static_cast<int32_t>(i.raw[0] & 0xffff), true;
    }
    if (name == "dst_sel") return i.sdwa = parse_select(value, &i.destination_select);
    if (name == "src0_sel") return i.sdwa = parse_select(value, &first_select);
    if (name == "src1_sel") return i.sdwa = parse_select(value, &second_select);
    if (name == "dst_unused") {
      i.destination_unused = value == "UNUSED_PAD"    ? Unused::kPad
                             : value == "UNUSED_SEXT" ? Unused::kSext
                                                      : Unused::kPreserve;
      return true;
    }
    return lanes.control(name, value);
  }

  Select first_select = Select::kDword;
  Select second_select = Select::kDword;
};

// A modifier is "name:value"; a register range has its colon inside brackets.
size_t modifier_colon(std::string_view token) {
  const size_t colon = token.find(':');
  return colon != token.npos && token.find('[') > colon ? colon : token.npos;
}

bool known_flag(std::string_view token) {
  static constexpr std::string_view kFlags[] = {"sc0",
                                                "sc1",
                                                "nt",
                                                "glc",
                                                "slc",
                                                "offen",
                                                "idxen",
                                                "lds",
                                                "clamp",
                                                "row_mirror",
                                                "row_half_mirror",
                                                "gds",
                                                "tfe"};
  return std::find(std::begin(kFlags), std::end(kFlags), token) != std::end(kFlags);
}

std::string without_encoding(std::string_view mnemonic) {
  for (const std::string_view suffix : {"_e32", "_e64", "_sdwa", "_dpp"}) {
    if (mnemonic.ends_with(suffix)) mnemonic.remove_suffix(suffix.size());
  }
  return std::string(mnemonic);
}

// Scalar program control states names and sums that its 16-bit immediate holds already.
bool is_scalar_control(std::string_view mnemonic) {
  for (const std::string_view prefix :
       {"s_waitcnt", "s_branch", "s_cbranch", "s_sendmsg", "s_getreg", "s_setreg", "s_call",
        "s_nop", "s_sleep", "s_trap", "s_set_gpr_idx_on", "s_set_gpr_idx_mode"}) {
    if (mnemonic.starts_with(prefix)) return true;
  }
  return false;
}

}  // namespace

void parse_instruction(const std::string& text, Instruction* out) {
  const std::vector<std::string_view> tokens = split(text);
  out->text = text.substr(std::min(text.find_first_not_of(" \t"), text.size()));
  if (tokens.empty()) return;
  out->mnemonic = without_encoding(tokens[0]);
  out->is_vector = !out->mnemonic.starts_with("s_");
  const bool control = is_scalar_control(out->mnemonic);
  // Mixed instructions take floats unless told otherwise; packed ones take their upper halves.
  if (out->mnemonic.find("_mix") != std::string::npos) out->op_sel_hi = 0;
  Modifiers modifiers{out, LaneMoveText(), Select::kDword, Select::kDword};
  bool understood = true;
  for (size_t k = 1; k < tokens.size(); ++k) {
    const std::string_view token = tokens[k];
    Operand operand;
    if (const size_t colon = modifier_colon(token); colon != token.npos) {
      understood &= modifiers.named(token.substr(0, colon), token.substr(colon + 1));
    } else if (known_flag(token)) {
      understood &= modifiers.flag(token);
    } else if (parse_operand(token, &operand) && out->num_operands < out->operand.size()) {
      out->operand[out->num_operands++] = operand;
    } else {
      understood &= control;
    }
  }
  // Additions with carry have two destinations before the sources.
  const size_t source = out->mnemonic.find("_co_") != std::string::npos ? 2 : 1;
  if (out->sdwa) {
    out->operand[source].select = modifiers.first_select;
    if (out->num_operands > source + 1) out->operand[source + 1].select = modifiers.second_select;
  }
  out->lane_move = modifiers.lanes.finish();
  if (out->lane_move != nullptr) out->operand[source].moved = true;
  if (understood) bind(out);
}

}  // namespace gfx942
