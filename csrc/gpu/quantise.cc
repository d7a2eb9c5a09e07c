// Tokens to float8 by a kernel of its own, for transports that do not send them here.
#include "kernels.h"
#include "moves.h"
#include "rows.h"

namespace moriep::gpu {
namespace {

constexpr int kMaxBlocks = 4096;

struct QuantiseArgs {
  const std::byte* x;
  int64_t num_tokens;
  int64_t row_bytes;
  uint8_t* codes;
  uint32_t* scales;
};

template <typename Move>
__global__ void __launch_bounds__(kThreads)
    quantise_kernel(const MORIEP_KERNEL_ARGUMENT QuantiseArgs args) {
  constexpr int kBytes = sizeof(typename Move::Word);
  const uint32_t parts = num_parts(args.row_bytes, kBytes, kCopyWords);
  const int64_t hidden_size = args.row_bytes / kBytes * Move::kElements;
  const int64_t groups = (hidden_size + kFp8Group - 1) / kFp8Group;
  for (int64_t item = wave_index(); item < args.num_tokens * parts; item += num_waves()) {
    const int64_t token = item / parts;
    const Part part = part_of_row(static_cast<uint32_t>(item % parts), args.row_bytes, kBytes);
    Move move;
    move.read(args.x + token * args.row_bytes, part);
    move.write(reinterpret_cast<typename Move::Codes*>(args.codes + token * hidden_size),
               args.scales + token * groups, part);
  }
}

// Calls f<Move>() with what quantises rows of a type.
template <typename F>
void with_quantiser(RowType type, bool wide, Fp8Format format, F f) {
  with_row_type(type, [&]<RowType kType>() {
    const auto with_format = [&]<bool kWide>() {
      if (format == Fp8Format::kE4M3FN) {
        f.template operator()<AsFp8<kType, kWide, Fp8Format::kE4M3FN>>();
      } else {
        f.template operator()<AsFp8<kType, kWide, Fp8Format::kE4M3FNUZ>>();
      }
    };
    if (wide) {
      with_format.template operator()<true>();
    } else {
      with_format.template operator()<false>();
    }
  });
}

}  // namespace

gpuError_t launch_quantise(gpuStream_t stream, const std::byte* x, RowType type, int64_t num_tokens,
                           int64_t hidden_size, uint8_t* codes, float* scales, Fp8Format format) {
  const int64_t row_bytes = hidden_size * element_bytes(type);
  if (num_tokens == 0 || row_bytes == 0) return gpuSuccess;
  const QuantiseArgs args{x, num_tokens, row_bytes, codes, reinterpret_cast<uint32_t*>(scales)};
  const bool wide = fits_words(16, row_bytes, x, nullptr) && fits_words(8, 0, codes, nullptr);
  constexpr int kWavesPerBlock = kThreads / kWave;
  const int64_t items = num_tokens * num_parts(row_bytes, 16, kCopyWords);
  const int64_t wanted = (items + kWavesPerBlock - 1) / kWavesPerBlock;
  const auto num_blocks = static_cast<int>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
  with_quantiser(type, wide, format, [&]<typename Move>() {
    quantise_kernel<Move><<<num_blocks, kThreads, 0, stream>>>(args);
  });
  return gpuGetLastError();
}

gpuError_t preload_quantise() {
  gpuError_t first = gpuSuccess;
  for (const RowType type : {RowType::kF32, RowType::kBF16, RowType::kF16}) {
    for (const bool wide : {true, false}) {
      for (const Fp8Format format : {Fp8Format::kE4M3FN, Fp8Format::kE4M3FNUZ}) {
        with_quantiser(type, wide, format, [&]<typename Move>() {
          gpuFuncAttributes found;
          const gpuError_t error =
              gpuFuncGetAttributes(&found, reinterpret_cast<const void*>(quantise_kernel<Move>));
          if (first == gpuSuccess) first = error;
        });
      }
    }
  }
  return first;
}

}  // namespace moriep::gpu
