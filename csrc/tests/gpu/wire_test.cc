// The fp8 wire on a GPU: every code, every scale and every row that arrives, against numbers found
// the slow way, in double, from the formats' definitions alone.
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>

#include "exercise.h"
#include "gpu/fp8.h"
#include "gpu/kernels.h"

namespace moriep::gpu {
namespace {

constexpr int64_t kHalfBytes = int64_t{8} << 20;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// What a format's definition says.
struct Numbers {
  explicit Numbers(Fp8Format format)
      : fnuz(format == Fp8Format::kE4M3FNUZ), bias(fnuz ? 8 : 7), most(fnuz ? 240 : 448) {}

  double value(int code) const {
    if (fnuz ? code == 0x80 : (code & 0x7f) == 0x7f) return kNan;
    const int exponent = code >> 3 & 15;
    const double fraction = (code & 7) / 8.0;
    const double magnitude =
        exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1 + fraction, exponent - bias);
    return (code & 0x80) != 0 ? -magnitude : magnitude;
  }

  // The nearest code, of two the even one.
  int nearest(double wanted) const {
    const double magnitude = std::fabs(wanted);
    int best = 0;
    for (int code = 1; value(code) <= most && code < 0x80; ++code) {
      const double closer = std::fabs(magnitude - value(code)) - std::fabs(magnitude - value(best));
      if (closer < 0 || (closer == 0 && code % 2 == 0)) best = code;
    }
    const bool negative = std::signbit(wanted) && !(fnuz && best == 0);
    return negative ? best | 0x80 : best;
  }

  // The smallest power of two that brings a group's largest value into range.
  double scale(double largest) const {
    if (!std::isfinite(largest)) return kNan;
    if (largest < std::ldexp(1.0, -100)) return 0;
    double scale = std::ldexp(1.0, -150);
    while (largest / scale > most) scale *= 2;
    return scale;
  }

  const bool fnuz;
  const int bias;
  const double most;
};

// A token on the wire.
struct Sent {
  std::vector<int> codes;
  std::vector<double> scales;

  Sent(const Numbers& numbers, RowType type, const std::vector<double>& token) {
    const double most = std::ldexp(15.0 / 16, type == RowType::kF16 ? 16 : 128);
    for (size_t first = 0; first < token.size(); first += kFp8Group) {
      const size_t end = std::min(token.size(), first + static_cast<size_t>(kFp8Group));
      double largest = 0;
      for (size_t h = first; h < end; ++h) {
        if (!(std::fabs(token[h]) <= largest)) largest = std::fabs(token[h]);
        if (std::isnan(token[h])) break;
      }
      const double scale = numbers.scale(largest);
      for (size_t h = first; h < end; ++h) {
        const double kept = std::fmin(std::fmax(token[h], -most), most);
        codes.push_back(scale > 0 ? numbers.nearest(kept / scale) : 0);
      }
      scales.push_back(scale);
    }
  }

  double arrives(const Numbers& numbers, RowType type, size_t h) const {
    const double value = numbers.value(codes[h]) * scales[h / kFp8Group];
    const double tiny = std::ldexp(1.0, -24);  // the steps between the smallest float16
    return type == RowType::kF16 && std::fabs(value) < tiny * 1024
               ? std::copysign(std::nearbyint(value / tiny) * tiny, value)
               : value;
  }
};

bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

void expect(const std::string& what, double got, double want) {
  if (same(got, want)) return;
  check::fail(__FILE__, __LINE__,
              what + " is " + check::show(got) + " and not " + check::show(want));
}

// The bits of a value that is like its group's others: zeros, numbers below the smallest normal
// one, an infinity or NaN among them, the largest that there are, or any; mostly ordinary ones.
uint32_t wild_bits(RowType type, uint64_t seed, int64_t token, int64_t h) {
  const int64_t group = h / kFp8Group;
  const int64_t kind = pick(seed, token, group, -1, 11);
  const auto random = static_cast<uint32_t>(pick(seed, token, h, 0, int64_t{1} << 32));
  const int fraction_bits = type == RowType::kF16 ? 10 : 23;
  const uint32_t top = type == RowType::kF16 ? 31 : 255;
  const uint32_t fraction = random & ((1u << fraction_bits) - 1);
  const uint32_t sign = (random >> 31) << (type == RowType::kF16 ? 15 : 31);
  const auto with = [&](uint32_t exponent) { return sign | exponent << fraction_bits | fraction; };
  uint32_t bits = 0;
  const auto any = static_cast<uint32_t>(pick(seed, token, h, 1, top));
  switch (kind) {
    case 0:
      bits = sign;
      break;
    case 1:
      bits = with(0);
      break;
    case 2:
      bits = pick(seed, token, h, 2, 20) == 0 ? with(top) : with(top / 2);
      break;
    case 3:
      bits = with(top - 1 - any % 3);
      break;
    case 4:
      bits = with(any);
      break;
    case 5:  // about as small as a group may be
      bits = with(top == 255 ? 25 + static_cast<uint32_t>(pick(seed, token, group, -2, 4)) : 1);
      break;
    default:
      bits = with(top / 2 - any % 14);
      // Halfway between two codes, often.
      if (kind > 8) bits &= ~((1u << (fraction_bits - 4)) - 1);
  }
  return type == RowType::kBF16 ? bits >> 16 : bits;
}

std::vector<std::byte> wild_tokens(RowType type, uint64_t seed, int64_t num_tokens,
                                   int64_t hidden_size) {
  std::vector<std::byte> x(static_cast<size_t>(num_tokens * hidden_size * element_bytes(type)));
  for (int64_t i = 0; i < num_tokens * hidden_size; ++i) {
    const uint32_t bits = wild_bits(type, seed, i / hidden_size, i % hidden_size);
    std::memcpy(x.data() + i * element_bytes(type), &bits,
                static_cast<size_t>(element_bytes(type)));
  }
  return x;
}

std::vector<double> token_of(RowType type, const std::vector<std::byte>& x, int64_t token,
                             int64_t hidden_size) {
  std::vector<double> values;
  for (int64_t h = 0; h < hidden_size; ++h) {
    values.push_back(get(type, x.data(), token * hidden_size + h));
  }
  return values;
}

template <Fp8Format kFormat>
__global__ void encode_kernel(const float* values, int32_t* exact, int32_t* fast, int32_t size) {
  for (int32_t i = threadIdx.x; i < size; i += blockDim.x) {
    exact[i] = static_cast<int32_t>(fp8_encode_exactly<kFormat>(values[i]));
    const float other = values[(i + 1) % size];
    fast[i] = static_cast<int32_t>(fp8_encode<kFormat>(values[i], other));
  }
}

template <Fp8Format kFormat>
__global__ void decode_kernel(float* exact, float* fast) {
  const auto code = static_cast<uint32_t>(threadIdx.x);
  exact[code] = fp8_decode_exactly<kFormat>(code);
  const float2 pair = fp8_decode<kFormat>(code | (255 - code) << 8);
  fast[2 * code] = pair.x;
  fast[2 * code + 1] = pair.y;
}

// Counts the values in range whose codes the processor finds otherwise than the integer arithmetic.
__global__ void compare_kernel(uint32_t stride, uint32_t most, uint32_t* differing) {
  const uint64_t first = (static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * stride;
  const uint64_t step = static_cast<uint64_t>(gridDim.x) * blockDim.x * stride;
  for (uint64_t bits = first; bits >> 32 == 0; bits += step) {
    if ((bits & 0x7fffffffu) > most) continue;
    const float value = __uint_as_float(static_cast<uint32_t>(bits));
    const uint32_t exact = fp8_encode_exactly<kWireFormat>(value);
    if (fp8_encode<kWireFormat>(value, value) != (exact | exact << 8)) atomicAdd(differing, 1u);
  }
}

template <Fp8Format kFormat>
void check_numbers() {
  const Numbers numbers(kFormat);
  std::vector<float> values = {0.0f, -0.0f, 1e-45f, -1e-45f, 1e-30f, -1e-30f};
  const auto add = [&](float value) {
    if (std::fabs(value) <= static_cast<float>(numbers.most)) {
      values.push_back(value);
      values.push_back(-value);
    }
  };
  for (int code = 0; numbers.value(code + 1) <= numbers.most && code < 0x7f; ++code) {
    const double middle = (numbers.value(code) + numbers.value(code + 1)) / 2;
    for (const double at : {numbers.value(code + 1), middle}) {
      const auto value = static_cast<float>(at);
      add(value);
      add(std::nextafterf(value, 0.0f));
      add(std::nextafterf(value, INFINITY));
    }
  }
  for (uint32_t bits = 0; bits < 0x7f80; ++bits) {
    add(std::bit_cast<float>(bits << 16));
  }
  const auto size = static_cast<int32_t>(values.size());
  const Array<float> in(values);
  const Array<int32_t> exact(size), fast(size);
  encode_kernel<kFormat><<<1, 512>>>(in.data(), exact.data(), fast.data(), size);
  check_gpu(gpuDeviceSynchronize(), "encode");
  const auto exactly = exact.host(), fastly = fast.host();
  for (size_t i = 0; i < values.size(); ++i) {
    const std::string name = "the code of " + check::show(values[i]);
    const int want = numbers.nearest(static_cast<double>(values[i]));
    const int beside = numbers.nearest(static_cast<double>(values[(i + 1) % values.size()]));
    expect(name, exactly[i], want);
    expect(name + " by the processor", fastly[i], want | beside << 8);
  }

  const Array<float> decoded(256), pairs(512);
  decode_kernel<kFormat><<<1, 256>>>(decoded.data(), pairs.data());
  check_gpu(gpuDeviceSynchronize(), "decode");
  const auto one = decoded.host(), two = pairs.host();
  for (int code = 0; code < 256; ++code) {
    const std::string name = "the value of code " + std::to_string(code);
    const auto at = static_cast<size_t>(code);
    expect(name, static_cast<double>(one[at]), numbers.value(code));
    expect(name + " by the processor", static_cast<double>(two[2 * at]), numbers.value(code));
    expect(name + ", second", static_cast<double>(two[2 * at + 1]), numbers.value(255 - code));
  }
}

TEST(codes_are_the_nearest, 300) {
  check_numbers<Fp8Format::kE4M3FN>();
  check_numbers<Fp8Format::kE4M3FNUZ>();
}

// All floats, but for a sample where a GPU is simulated.
TEST(the_processor_rounds_as_the_definition_does, 300) {
  const uint32_t stride = std::getenv("JAX_MORIEP_TEST_STEPS") == nullptr ? 1 : 65537;
  const auto most = static_cast<float>(Numbers(kWireFormat).most);
  const Array<uint32_t> differing(std::vector<uint32_t>{0});
  compare_kernel<<<stride == 1 ? 4096 : 16, 256>>>(stride, std::bit_cast<uint32_t>(most),
                                                   differing.data());
  check_gpu(gpuDeviceSynchronize(), "compare");
  CHECK_EQ(differing.host()[0], 0u);
}

constexpr int64_t kHiddenSizes[] = {1, 64, 100, 128, 131, 200, 7168};
constexpr RowType kTypes[] = {RowType::kF32, RowType::kBF16, RowType::kF16};

TEST(quantised_alone, 300) {
  check_gpu(preload_quantise(), "preload");
  for (const Fp8Format format : {Fp8Format::kE4M3FN, Fp8Format::kE4M3FNUZ}) {
    const Numbers numbers(format);
    for (const RowType type : kTypes) {
      for (const int64_t hidden_size : kHiddenSizes) {
        const int64_t num_tokens = hidden_size > 1000 ? 2 : 19;
        const int64_t groups = num_fp8_groups(hidden_size);
        const auto x = wild_tokens(type, 5, num_tokens, hidden_size);
        const Array<std::byte> tokens(x);
        const Array<uint8_t> codes(num_tokens * hidden_size);
        const Array<float> scales(num_tokens * groups);
        check_gpu(launch_quantise(nullptr, tokens.data(), type, num_tokens, hidden_size,
                                  codes.data(), scales.data(), format),
                  "quantise");
        check_gpu(gpuDeviceSynchronize(), "quantise");
        const auto got_codes = codes.host();
        const auto got_scales = scales.host();
        for (int64_t t = 0; t < num_tokens; ++t) {
          const Sent want(numbers, type, token_of(type, x, t, hidden_size));
          const std::string where = " of token " + std::to_string(t) + ", type " +
                                    std::to_string(static_cast<int>(type)) + ", H " +
                                    std::to_string(hidden_size);
          for (int64_t h = 0; h < hidden_size; ++h) {
            expect("code " + std::to_string(h) + where,
                   got_codes[static_cast<size_t>(t * hidden_size + h)],
                   want.codes[static_cast<size_t>(h)]);
          }
          for (int64_t g = 0; g < groups; ++g) {
            expect("scale " + std::to_string(g) + where,
                   static_cast<double>(got_scales[static_cast<size_t>(t * groups + g)]),
                   want.scales[static_cast<size_t>(g)]);
          }
        }
      }
    }
  }
}

// What a rank gives to a dispatch and gets from it.
struct Side {
  Side(const Case& test, const Oracle& routing, int32_t rank)
      : me(std::vector<int32_t>{rank}),
        order(std::vector<int32_t>{0}),
        order_out(1),
        host_x(wild_tokens(test.type, test.seed * 8 + static_cast<uint64_t>(rank),
                           test.shape.num_tokens, test.shape.hidden_size)),
        x(host_x),
        ids(routing.ids(rank)),
        weights(std::vector<float>(static_cast<size_t>(test.shape.num_routes()), 1.0f)),
        rows(test.shape.capacity * test.shape.hidden_size * element_bytes(test.type)),
        row_weights(test.shape.capacity),
        group_sizes(test.shape.num_local_experts),
        routes(test.shape.num_ranks * test.shape.num_routes()),
        places(test.shape.num_ranks * test.shape.num_tokens) {}

  Array<int32_t> me, order, order_out;
  std::vector<std::byte> host_x;
  Array<std::byte> x;
  Array<int32_t> ids;
  Array<float> weights;
  Array<std::byte> rows;
  Array<float> row_weights;
  Array<int32_t> group_sizes, routes, places;
};

void check_dispatch(Group& group, const Case& test) {
  const Shape& shape = test.shape;
  const Oracle routing(test);
  std::vector<std::unique_ptr<Side>> sides;
  for (int32_t r = 0; r < group.num_ranks(); ++r) {
    sides.push_back(std::make_unique<Side>(test, routing, r));
    // What is left in an arena must not be taken for what was sent.
    check_gpu(gpuMemset(group.local(r)->arena + kControlBytes + kWorkspaceBytes, 0xff,
                        static_cast<size_t>(2 * group.half_bytes())),
              "poison");
  }
  for (const Phase phase : {Phase::kFirst, Phase::kSecond}) {
    for (int32_t r = 0; r < group.num_ranks(); ++r) {
      const Side& side = *sides[static_cast<size_t>(r)];
      const Call call{.shape = shape,
                      .type = test.type,
                      .wire = Wire::kFp8,
                      .delivery = test.delivery,
                      .config = "test",
                      .rank = side.me.data(),
                      .order = side.order.data(),
                      .order_out = side.order_out.data(),
                      .phase = phase,
                      .stream = nullptr};
      CHECK_OK(dispatch(*group.local(r), call,
                        {side.x.data(), side.ids.data(), side.weights.data(), side.rows.data(),
                         side.row_weights.data(), side.group_sizes.data(), side.routes.data(),
                         side.places.data(), nullptr, nullptr}));
    }
  }
  check_gpu(gpuDeviceSynchronize(), "dispatch");
  CHECK_OK(group.failure());
  const Numbers numbers(kWireFormat);
  for (int32_t r = 0; r < group.num_ranks(); ++r) {
    const auto rows = sides[static_cast<size_t>(r)]->rows.host();
    for (int64_t row = 0; row < shape.capacity; ++row) {
      const Oracle::Row& owner = routing.rows(r)[static_cast<size_t>(row)];
      std::unique_ptr<Sent> sent;
      if (owner.source >= 0) {
        const auto& x = sides[static_cast<size_t>(owner.source)]->host_x;
        sent = std::make_unique<Sent>(numbers, test.type,
                                      token_of(test.type, x, owner.token, shape.hidden_size));
      }
      for (int64_t h = 0; h < shape.hidden_size; ++h) {
        expect("rank " + std::to_string(r) + " of " + std::to_string(shape.num_ranks) + ", row " +
                   std::to_string(row) + ", h " + std::to_string(h) + " of " +
                   std::to_string(shape.hidden_size) + ", type " +
                   std::to_string(static_cast<int>(test.type)) + " by " +
                   delivery_name(test.delivery),
               get(test.type, rows.data(), row * shape.hidden_size + h),
               sent ? sent->arrives(numbers, test.type, static_cast<size_t>(h)) : 0.0);
      }
    }
  }
}

TEST(rows_are_what_the_wire_makes_of_tokens, 300) {
  uint64_t seed = 0;
  for (const int32_t num_ranks : {1, 2, 3}) {
    Group group(num_ranks, std::chrono::duration<double>(20), kHalfBytes);
    for (int32_t r = 0; r < num_ranks; ++r) CHECK_OK(group.add_local(r, 0));
    CHECK_OK(group.link_locals());
    for (const RowType type : kTypes) {
      for (const int64_t hidden_size : kHiddenSizes) {
        Case test{shape_of(num_ranks, hidden_size > 1000 ? 3 : 9, 3, hidden_size, 7, 4), type};
        test.shape.num_words = 0;
        test.seed = ++seed;
        check_dispatch(group, test);
        test.delivery = Delivery::kPut;
        if (num_ranks > 1) check_dispatch(group, test);
      }
    }
  }
}

}  // namespace
}  // namespace moriep::gpu

TEST_MAIN()
