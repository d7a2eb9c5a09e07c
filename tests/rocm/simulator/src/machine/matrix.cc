// MFMA: products of small matrices whose elements are spread over the lanes of a wave. EXEC does
// not matter.
#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>

#include "semantics.h"
#include "vector.h"

namespace gfx942 {
namespace {

enum class Element : uint8_t { kF32, kXf32, kF16, kBf16, kFp8, kBf8, kI8, kF64 };

// D = A * B + C for `blocks` independent products of rows x depth and depth x rows matrices.
struct Product {
  int rows;
  int depth;
  int blocks;
  Element a;
  Element b;
};

// Every lane holds at most eight elements of an input.
constexpr int kMostElements = 8 * kLanes;

int bytes_of(Element element) {
  switch (element) {
    case Element::kF64:
      return 8;
    case Element::kF32:
    case Element::kXf32:
      return 4;
    case Element::kF16:
    case Element::kBf16:
      return 2;
    default:
      return 1;
  }
}

// The reduced format has 10 bits of mantissa.
float reduced(uint32_t bits) {
  if ((bits & 0x7f800000) == 0x7f800000) return std::bit_cast<float>(bits);
  return std::bit_cast<float>((bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu);
}

template <class T>
T convert(Element element, const std::byte* at) {
  uint64_t raw = 0;
  std::memcpy(&raw, at, static_cast<size_t>(bytes_of(element)));
  switch (element) {
    case Element::kF64:
      return static_cast<T>(std::bit_cast<double>(raw));
    case Element::kF32:
      return static_cast<T>(std::bit_cast<float>(static_cast<uint32_t>(raw)));
    case Element::kXf32:
      return static_cast<T>(reduced(static_cast<uint32_t>(raw)));
    case Element::kF16:
      return static_cast<T>(half_to_float(static_cast<uint16_t>(raw)));
    case Element::kBf16:
      return static_cast<T>(bf16_to_float(static_cast<uint16_t>(raw)));
    case Element::kFp8:
      return static_cast<T>(small_to_float(Small::kFp8, static_cast<uint8_t>(raw)));
    case Element::kBf8:
      return static_cast<T>(small_to_float(Small::kBf8, static_cast<uint8_t>(raw)));
    case Element::kI8:
      break;
  }
  return static_cast<T>(static_cast<int8_t>(raw));
}

// Which lane B's elements come from, instead of lane n.
int group_pattern(int n, int pattern) {
  switch (pattern) {
    case 0:
      return n;
    case 1:
      return n % 32;
    case 2:
      return 32 + n % 32;
    case 3:
      return (n + 16) % 64;
    default:
      return 16 * (pattern - 4) + n % 16;
  }
}

// One input, unpacked as [block][depth][row].
template <class T>
struct Input {
  alignas(64) T values[kMostElements];

  Input(Wave& wave, const Product& p, Element element, const Operand& operand, int pattern,
        bool negative) {
    const int bytes = bytes_of(element);
    // A lane holds consecutive elements of the depth; lanes go through rows, then blocks, then
    // depth.
    const int per_lane = std::max(1, p.rows * p.depth * p.blocks / kLanes);
    const uint32_t dwords = static_cast<uint32_t>(std::max(1, per_lane * bytes / 4));
    const Lanes* words = wave.vector(operand.index, dwords);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int from = group_pattern(lane, pattern);
      uint32_t held[4] = {};
      for (uint32_t k = 0; k < dwords; ++k) held[k] = words[k][from];
      const auto* at = reinterpret_cast<const std::byte*>(held);
      const int row = lane % p.rows;
      const int block = lane / p.rows % p.blocks;
      const int depth = lane / p.rows / p.blocks * per_lane;
      for (int k = 0; k < per_lane; ++k) {
        const T value = convert<T>(element, at + k * bytes);
        values[(block * p.depth + depth + k) * p.rows + row] = negative ? T(0) - value : value;
      }
    }
  }
};

// Where D[row][column] of a block stands: its lane, and which of the lane's values it is.
struct Position {
  int lane;
  int value;
};
template <class T>
Position position_of(const Product& p, int block, int row, int column) {
  if constexpr (std::is_same_v<T, double>) {
    if (p.rows == 4) return {column + 4 * block + 16 * row, 0};
    return {column + 16 * (row % 4), row / 4};
  } else {
    if (p.rows == 4) return {column + 4 * block, row};
    const int groups =
        kLanes / p.rows;  // of four consecutive rows that lie beside each other in lanes
    return {column + p.rows * (row / 4 % groups),
            row % 4 + row / (4 * groups) * 4 + block * p.rows * p.rows / kLanes};
  }
}

template <class T>
T multiply_add(T a, T b, T c) {
  if constexpr (std::is_same_v<T, uint32_t>) {
    return a * b + c;
  } else {
    return std::fma(a, b, c);
  }
}

template <class T, class Visit>
void visit_outputs(const Product& p, Visit visit) {
  for (int block = 0; block < p.blocks; ++block) {
    for (int row = 0; row < p.rows; ++row) {
      for (int column = 0; column < p.rows; ++column) {
        visit((block * p.rows + row) * p.rows + column, position_of<T>(p, block, row, column));
      }
    }
  }
}

template <class T, Product p>
void multiply(Wave& wave, const Instruction& i) {
  // For doubles, the field holds sign bits instead of a pattern.
  constexpr bool kIsDouble = std::is_same_v<T, double>;
  const int signs = kIsDouble ? i.blgp : 0;
  const Input<T> a(wave, p, p.a, i.operand[1], 0, (signs & 1) != 0);
  const Input<T> b(wave, p, p.b, i.operand[2], kIsDouble ? 0 : i.blgp, (signs & 2) != 0);
  constexpr int kValues = p.blocks * p.rows * p.rows / kLanes;
  constexpr uint32_t kDwords = kValues * sizeof(T) / 4;

  alignas(64) T sums[p.blocks * p.rows * p.rows];
  const Operand& c = i.operand[3];
  if (c.is_vector()) {
    const Lanes* words = wave.vector(c.index, kDwords);
    visit_outputs<T>(p, [&](int index, Position at) {
      uint32_t held[sizeof(T) / 4];
      for (size_t k = 0; k < sizeof(T) / 4; ++k) {
        held[k] = words[static_cast<size_t>(at.value) * sizeof(T) / 4 + k][at.lane];
      }
      std::memcpy(&sums[index], held, sizeof(T));
    });
  } else {
    T constant;
    std::memcpy(&constant, sizeof(T) == 8 ? static_cast<const void*>(&c.quad) : &c.word, sizeof(T));
    std::fill(std::begin(sums), std::end(sums), constant);
  }
  if ((signs & 4) != 0) {
    for (T& sum : sums) sum = T(0) - sum;
  }

  for (int block = 0; block < p.blocks; ++block) {
    // Groups of blocks may share the A of one of them.
    const int group = 1 << i.cbsz;
    const int source = i.cbsz == 0 ? block : block / group * group + i.abid % group;
    T* sum = sums + block * p.rows * p.rows;
    for (int k = 0; k < p.depth; ++k) {
      const T* from_a = a.values + (source * p.depth + k) * p.rows;
      const T* from_b = b.values + (block * p.depth + k) * p.rows;
      for (int row = 0; row < p.rows; ++row) {
        for (int column = 0; column < p.rows; ++column) {
          sum[row * p.rows + column] =
              multiply_add(from_a[row], from_b[column], sum[row * p.rows + column]);
        }
      }
    }
  }

  Lanes* words = wave.vector(i.operand[0].index, kDwords);
  visit_outputs<T>(p, [&](int index, Position at) {
    uint32_t held[sizeof(T) / 4];
    std::memcpy(held, &sums[index], sizeof(T));
    for (size_t k = 0; k < sizeof(T) / 4; ++k) {
      words[static_cast<size_t>(at.value) * sizeof(T) / 4 + k][at.lane] = held[k];
    }
  });
}

template <int rows, int depth, int blocks, Element a, Element b = a>
constexpr Handler kFloatProduct = multiply<float, Product{rows, depth, blocks, a, b}>;
template <int rows, int depth, int blocks>
constexpr Handler kIntegerProduct =
    multiply<uint32_t, Product{rows, depth, blocks, Element::kI8, Element::kI8}>;
template <int rows, int blocks>
constexpr Handler kDoubleProduct =
    multiply<double, Product{rows, 4, blocks, Element::kF64, Element::kF64}>;

constexpr Semantics kTable[] = {
    {"v_mfma_f32_32x32x1_2b_f32", kFloatProduct<32, 1, 2, Element::kF32>},
    {"v_mfma_f32_16x16x1_4b_f32", kFloatProduct<16, 1, 4, Element::kF32>},
    {"v_mfma_f32_4x4x1_16b_f32", kFloatProduct<4, 1, 16, Element::kF32>},
    {"v_mfma_f32_32x32x2_f32", kFloatProduct<32, 2, 1, Element::kF32>},
    {"v_mfma_f32_16x16x4_f32", kFloatProduct<16, 4, 1, Element::kF32>},
    {"v_mfma_f32_16x16x8_xf32", kFloatProduct<16, 8, 1, Element::kXf32>},
    {"v_mfma_f32_32x32x4_xf32", kFloatProduct<32, 4, 1, Element::kXf32>},
    {"v_mfma_f32_32x32x4_2b_f16", kFloatProduct<32, 4, 2, Element::kF16>},
    {"v_mfma_f32_16x16x4_4b_f16", kFloatProduct<16, 4, 4, Element::kF16>},
    {"v_mfma_f32_4x4x4_16b_f16", kFloatProduct<4, 4, 16, Element::kF16>},
    {"v_mfma_f32_32x32x8_f16", kFloatProduct<32, 8, 1, Element::kF16>},
    {"v_mfma_f32_16x16x16_f16", kFloatProduct<16, 16, 1, Element::kF16>},
    {"v_mfma_f32_32x32x4_2b_bf16", kFloatProduct<32, 4, 2, Element::kBf16>},
    {"v_mfma_f32_16x16x4_4b_bf16", kFloatProduct<16, 4, 4, Element::kBf16>},
    {"v_mfma_f32_4x4x4_16b_bf16", kFloatProduct<4, 4, 16, Element::kBf16>},
    {"v_mfma_f32_32x32x8_bf16", kFloatProduct<32, 8, 1, Element::kBf16>},
    {"v_mfma_f32_16x16x16_bf16", kFloatProduct<16, 16, 1, Element::kBf16>},
    {"v_mfma_f32_16x16x32_fp8_fp8", kFloatProduct<16, 32, 1, Element::kFp8>},
    {"v_mfma_f32_16x16x32_fp8_bf8", kFloatProduct<16, 32, 1, Element::kFp8, Element::kBf8>},
    {"v_mfma_f32_16x16x32_bf8_fp8", kFloatProduct<16, 32, 1, Element::kBf8, Element::kFp8>},
    {"v_mfma_f32_16x16x32_bf8_bf8", kFloatProduct<16, 32, 1, Element::kBf8>},
    {"v_mfma_f32_32x32x16_fp8_fp8", kFloatProduct<32, 16, 1, Element::kFp8>},
    {"v_mfma_f32_32x32x16_fp8_bf8", kFloatProduct<32, 16, 1, Element::kFp8, Element::kBf8>},
    {"v_mfma_f32_32x32x16_bf8_fp8", kFloatProduct<32, 16, 1, Element::kBf8, Element::kFp8>},
    {"v_mfma_f32_32x32x16_bf8_bf8", kFloatProduct<32, 16, 1, Element::kBf8>},
    {"v_mfma_i32_32x32x4_2b_i8", kIntegerProduct<32, 4, 2>},
    {"v_mfma_i32_16x16x4_4b_i8", kIntegerProduct<16, 4, 4>},
    {"v_mfma_i32_4x4x4_16b_i8", kIntegerProduct<4, 4, 16>},
    {"v_mfma_i32_32x32x16_i8", kIntegerProduct<32, 16, 1>},
    {"v_mfma_i32_16x16x32_i8", kIntegerProduct<16, 32, 1>},
    {"v_mfma_f64_16x16x4_f64", kDoubleProduct<16, 1>},
    {"v_mfma_f64_4x4x4_4b_f64", kDoubleProduct<4, 4>},
};

}  // namespace

Table matrix_table() { return kTable; }

}  // namespace gfx942
