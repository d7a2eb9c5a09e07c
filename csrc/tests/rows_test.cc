// Rows: sums against the rounding rules as IEEE 754 states them, copies and zeros against their
// bounds.
#include "cpu/rows.h"

#include <sys/mman.h>

#include <algorithm>
#include <fstream>
#include <random>

#include "check.h"
#include "oracle.h"

namespace moriep {
namespace {

constexpr std::byte kSentinel{0xc3};
constexpr int64_t kMargin = 128;
constexpr Store kStores[] = {Store::kCached, Store::kStreamed};

// A range at a chosen distance from an aligned address, with sentinels before and behind it.
class Guarded {
 public:
  Guarded(int64_t bytes, int64_t shift)
      : bytes_(bytes), memory_(static_cast<size_t>(bytes + shift + 3 * kMargin), kSentinel) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data() + kMargin);
    start_ = kMargin + static_cast<int64_t>((64 - address % 64) % 64) + shift;
  }

  std::byte* data() { return memory_.data() + start_; }

  void expect_sentinels() const {
    for (size_t i = 0; i < memory_.size(); ++i) {
      const auto at = static_cast<int64_t>(i);
      if (at < start_ || at >= start_ + bytes_)
        CHECK_EQ(static_cast<int>(memory_[i]), static_cast<int>(kSentinel));
    }
  }

 private:
  int64_t bytes_;
  std::vector<std::byte> memory_;
  int64_t start_;
};

// The 16-bit number nearest to a value, ties to the even one, found among all of them.
class Nearest {
 public:
  explicit Nearest(RowType type) {
    for (uint32_t bits = 0; bits < 0x8000; ++bits) {
      const double value = decode_half(type, static_cast<uint16_t>(bits));
      if (std::isinf(value)) break;
      values_.push_back(value);
    }
    // What rounds to infinity lies as far above the largest number as the next one would.
    values_.push_back(2 * values_.back() - values_[values_.size() - 2]);
  }

  uint16_t operator()(double value) const {
    const auto sign = static_cast<uint16_t>(std::signbit(value) ? 0x8000 : 0);
    const double size = std::fabs(value);
    const auto above = std::lower_bound(values_.begin(), values_.end(), size);
    auto bits = static_cast<size_t>(above - values_.begin());
    if (above == values_.end()) {
      bits = values_.size() - 1;
    } else if (bits > 0) {
      const double up = *above - size, down = size - values_[bits - 1];
      if (down < up || (down == up && bits % 2 == 1)) --bits;
    }
    return static_cast<uint16_t>(sign | bits);
  }

 private:
  std::vector<double> values_;  // by their bits; the last one stands for infinity
};

// Adds from left to right, each sum rounded to float. A double holds the sum of two floats well
// enough for that.
float sum_of(RowType type, const std::vector<const std::byte*>& rows, int64_t i) {
  auto sum = static_cast<float>(get(type, rows[0], i));
  for (size_t row = 1; row < rows.size(); ++row) {
    sum = static_cast<float>(static_cast<double>(sum) + get(type, rows[row], i));
  }
  return sum;
}

void expect_sum_of_halves(RowType type, const Nearest& nearest,
                          const std::vector<std::vector<uint16_t>>& rows) {
  std::vector<const std::byte*> terms;
  for (const auto& row : rows) terms.push_back(reinterpret_cast<const std::byte*>(row.data()));
  const auto size = static_cast<int64_t>(rows[0].size());
  for (Store store : kStores) {
    Guarded out(size * 2, 0);
    sum_rows(type, terms.data(), static_cast<int64_t>(terms.size()), out.data(), size, store);
    out.expect_sentinels();
    for (int64_t i = 0; i < size; ++i) {
      uint16_t got = 0;
      std::memcpy(&got, out.data() + 2 * i, 2);
      const float want = sum_of(type, terms, i);
      if (std::isnan(want)) {
        CHECK(std::isnan(decode_half(type, got)));
      } else {
        CHECK_EQ(got, nearest(static_cast<double>(want)));
      }
    }
  }
}

// Every 16-bit pattern takes part: NaN, infinities, denormals, both zeros, and ties of all
// magnitudes.
TEST(sums_of_16_bit_rows_round_once_to_nearest_even, 60) {
  for (RowType type : {RowType::kBF16, RowType::kF16}) {
    const Nearest nearest(type);
    std::vector<uint16_t> all(65536);
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
    for (size_t n = 2; n <= 6; ++n) {
      std::mt19937 random(static_cast<uint32_t>(n));
      std::vector<std::vector<uint16_t>> rows(n, all);
      for (size_t row = 1; row < n; ++row) std::shuffle(rows[row].begin(), rows[row].end(), random);
      expect_sum_of_halves(type, nearest, rows);
    }
    // Neighbours of each number: sums that fall between two numbers, and on the middle between
    // them.
    for (int distance : {-1, 0, 1, 2}) {
      std::vector<uint16_t> other(all);
      for (uint16_t& bits : other) bits = static_cast<uint16_t>(bits + distance);
      expect_sum_of_halves(type, nearest, {all, other});
    }
    for (int shift = 1; shift <= 12; ++shift) {
      // 2^-shift of the number itself, a tie in many cases.
      std::vector<uint16_t> other(all);
      for (uint16_t& bits : other) bits = nearest(std::ldexp(decode_half(type, bits), -shift));
      expect_sum_of_halves(type, nearest, {all, other});
    }
  }
}

TEST(sums_of_f32_rows_are_those_of_float_addition, 20) {
  std::mt19937 random(1);
  const uint32_t special[] = {0,          0x80000000, 0x7f800000, 0xff800000,
                              0x7fc00000, 1,          0x80000001, 0x007fffff,
                              0x00800000, 0x7f7fffff, 0xff7fffff, 0x3f800000};
  for (int64_t n = 2; n <= 9; ++n) {
    const int64_t size = 3001;
    std::vector<std::vector<uint32_t>> rows(static_cast<size_t>(n), std::vector<uint32_t>(size));
    std::vector<const std::byte*> terms;
    for (auto& row : rows) {
      for (size_t i = 0; i < row.size(); ++i) {
        row[i] = i % 3 == 0 ? special[random() % std::size(special)] : random();
        // Numbers of similar size, so that low bits matter.
        if (i % 3 == 1) row[i] = (row[i] & 0x81ffffff) | 0x3e000000;
      }
      terms.push_back(reinterpret_cast<const std::byte*>(row.data()));
    }
    for (Store store : kStores) {
      Guarded out(size * 4, 0);
      sum_rows(RowType::kF32, terms.data(), n, out.data(), size, store);
      out.expect_sentinels();
      for (int64_t i = 0; i < size; ++i) {
        float got = 0;
        std::memcpy(&got, out.data() + 4 * i, 4);
        const float want = sum_of(RowType::kF32, terms, i);
        if (std::isnan(want)) {
          CHECK(std::isnan(got));
        } else {
          CHECK_EQ(std::bit_cast<uint32_t>(got), std::bit_cast<uint32_t>(want));
        }
      }
    }
  }
}

// The order of the terms is part of the contract: another one gives another result here.
TEST(terms_are_added_from_left_to_right, 10) {
  const float big = 1e8f, small = 3.0f, minus = -1e8f;
  const auto sum = [](std::vector<float> values) {
    std::vector<const std::byte*> terms;
    for (const float& value : values) terms.push_back(reinterpret_cast<const std::byte*>(&value));
    float out = 0;
    sum_rows(RowType::kF32, terms.data(), static_cast<int64_t>(terms.size()),
             reinterpret_cast<std::byte*>(&out), 1, Store::kCached);
    return out;
  };
  CHECK_EQ(sum({big, minus, small}), 3.0f);
  CHECK_EQ(sum({big, small, minus}), 0.0f);
  CHECK_EQ(sum({big, minus, small, small}), 6.0f);
  CHECK_EQ(sum({big, small, minus, small}), 3.0f);
  CHECK_EQ(sum({big, minus, small, small, small}), 9.0f);
  CHECK_EQ(sum({big, small, small, minus, small}), 3.0f);
}

TEST(no_rows_give_zeros_and_one_row_is_copied_as_it_is, 10) {
  for (RowType type : {RowType::kF32, RowType::kBF16, RowType::kF16, RowType::kU8}) {
    const int64_t size = 77;
    const int64_t bytes = size * element_bytes(type);
    std::vector<std::byte> row(static_cast<size_t>(bytes));
    for (size_t i = 0; i < row.size(); ++i)
      row[i] = static_cast<std::byte>(pick(3, static_cast<int64_t>(i), 0, 0, 256));
    const std::byte* terms[] = {row.data()};
    for (Store store : kStores) {
      Guarded out(bytes, 0);
      sum_rows(type, terms, 1, out.data(), size, store);
      CHECK(std::equal(row.begin(), row.end(), out.data()));
      sum_rows(type, terms, 0, out.data(), size, store);
      for (int64_t i = 0; i < bytes; ++i) CHECK_EQ(static_cast<int>(out.data()[i]), 0);
      out.expect_sentinels();
    }
  }
}

TEST(rows_of_any_length_at_any_place_stay_in_their_bounds, 20) {
  std::vector<int64_t> sizes;
  for (int64_t size = 0; size <= 70; ++size) sizes.push_back(size);
  for (int64_t size : {1023, 1024, 1025, 2047, 2048, 2049, 3000}) sizes.push_back(size);
  for (RowType type : {RowType::kF32, RowType::kBF16, RowType::kF16}) {
    const int64_t width = element_bytes(type);
    for (int64_t size : sizes) {
      for (int64_t shift : {int64_t{0}, width, int64_t{64} - width}) {
        for (int64_t n : {2, 3, 4, 5}) {
          // Rows of exactly their size: AddressSanitizer sees a read beyond them.
          std::vector<std::vector<std::byte>> rows(
              static_cast<size_t>(n), std::vector<std::byte>(static_cast<size_t>(size * width)));
          std::vector<const std::byte*> terms;
          for (size_t r = 0; r < rows.size(); ++r) {
            for (int64_t i = 0; i < size; ++i)
              put(type, rows[r].data(), i, static_cast<double>(pick(r, i, n, 0, 9)));
            terms.push_back(rows[r].data());
          }
          for (Store store : kStores) {
            Guarded out(size * width, shift);
            sum_rows(type, terms.data(), n, out.data(), size, store);
            finish_stores();
            out.expect_sentinels();
            for (int64_t i = 0; i < size; ++i) {
              double want = 0;
              for (const auto& row : rows) want += get(type, row.data(), i);
              CHECK_EQ(get(type, out.data(), i), want);
            }
          }
        }
      }
    }
  }
}

TEST(copies_stay_in_their_bounds, 20) {
  for (int64_t bytes : {0, 1, 2, 63, 64, 65, 127, 128, 129, 1000, 4096, 4099}) {
    for (int64_t from_shift : {0, 1, 2, 4, 16, 63}) {
      for (int64_t to_shift : {0, 1, 2, 4, 16, 32, 63}) {
        Guarded from(bytes, from_shift);
        for (int64_t i = 0; i < bytes; ++i)
          from.data()[i] = static_cast<std::byte>(pick(5, i, bytes, 0, 256));
        for (Store store : kStores) {
          Guarded to(bytes, to_shift);
          copy_row(from.data(), to.data(), bytes, store);
          finish_stores();
          to.expect_sentinels();
          CHECK(std::equal(from.data(), from.data() + bytes, to.data()));
        }
        from.expect_sentinels();
      }
    }
  }
  CHECK(store_for(kStreamBytes) == Store::kStreamed);
  CHECK(store_for(kStreamBytes - 1) == Store::kCached);
}

void expect_zeros(const std::byte* data, int64_t bytes) {
  const auto* found =
      std::find_if(data, data + bytes, [](std::byte value) { return value != std::byte{0}; });
  if (found != data + bytes) CHECK_EQ(found - data, bytes);
}

TEST(zeros_fill_a_range_and_nothing_else, 40) {
  const int64_t page = sysconf(_SC_PAGESIZE);
  const int64_t million = int64_t{1} << 20;
  for (int64_t bytes :
       {int64_t{0}, int64_t{1}, int64_t{7}, page - 1, page, page + 1, million - 1, million,
        million + 1, million + page - 1, million + page, million + page + 1, 3 * million + 12345}) {
    for (int64_t shift :
         {int64_t{0}, int64_t{1}, int64_t{8}, int64_t{64}, page - 64, page, page + 4}) {
      Guarded range(bytes, shift);
      std::fill_n(range.data(), bytes, std::byte{0xff});
      zero_fill(range.data(), bytes);
      expect_zeros(range.data(), bytes);
      range.expect_sentinels();
    }
  }
}

// Dropping pages does not clear memory that lies in a file, or that must stay in memory: that has
// to be written.
TEST(zeros_fill_memory_whose_pages_do_not_go, 20) {
  const int64_t bytes = int64_t{3} << 20;
  for (int flags : {MAP_SHARED | MAP_ANONYMOUS, MAP_PRIVATE | MAP_ANONYMOUS | MAP_LOCKED,
                    MAP_PRIVATE | MAP_ANONYMOUS}) {
    void* memory = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, flags, -1, 0);
    CHECK(memory != MAP_FAILED);
    auto* data = static_cast<std::byte*>(memory);
    std::fill_n(data, bytes, std::byte{0xff});
    zero_fill(data + 100, bytes - 200);
    expect_zeros(data + 100, bytes - 200);
    for (int64_t i = 0; i < 100; ++i) {
      CHECK_EQ(static_cast<int>(data[i]), 0xff);
      CHECK_EQ(static_cast<int>(data[bytes - 1 - i]), 0xff);
    }
    CHECK_EQ(munmap(memory, static_cast<size_t>(bytes)), 0);
  }
}

int64_t resident_bytes() {
  std::ifstream file("/proc/self/statm");
  int64_t total = 0, resident = 0;
  file >> total >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

TEST(zeros_take_no_memory, 20) {
  const int64_t bytes = int64_t{64} << 20;
  std::vector<std::byte> range(static_cast<size_t>(bytes), std::byte{0xff});
  const int64_t before = resident_bytes();
  zero_fill(range.data(), bytes);
  CHECK(before - resident_bytes() > bytes * 3 / 4);
  expect_zeros(range.data(), bytes);
}

TEST(asking_for_large_pages_changes_no_byte, 20) {
  for (int64_t bytes : {int64_t{0}, int64_t{100}, int64_t{2} << 20, int64_t{9} << 20}) {
    for (int64_t shift : {0, 1, 64, 5000}) {
      Guarded range(bytes, shift);
      std::fill_n(range.data(), bytes, std::byte{0x5a});
      prefer_large_pages(range.data(), bytes);
      for (int64_t i = 0; i < bytes; i += 61) CHECK_EQ(static_cast<int>(range.data()[i]), 0x5a);
      range.expect_sentinels();
    }
  }
}

}  // namespace
}  // namespace moriep

TEST_MAIN()
