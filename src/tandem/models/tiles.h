// The matrix units of x86 processors (AMX) for bfloat16: tiles, and how matrices are laid out for them.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "vectors.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define TANDEM_HAS_MATRIX_UNITS
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tandem {

// A tile of the matrix units holds 16 rows of 32 numbers in bfloat16; a tile of sums 16 rows of 16 in float32.
constexpr int64_t kTile = 16, kDepth = 32, kTileNumbers = kTile * kDepth, kTileSums = kTile * kTile;
// So many numbers has a square of 32 x 32: two tiles, or the sums of four.
constexpr int64_t kSquare = kDepth * kDepth;

#ifdef TANDEM_HAS_MATRIX_UNITS

struct __attribute__((packed)) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {0};
  uint16_t bytes_a_row[16] = {0};
  uint8_t rows[16] = {0};
};

// The tiles of this thread while it lives. oneDNN looks at how they are shaped, and must find them as it left them.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(&before_);
    for (int i = 0; i < 8; i++) shapes.bytes_a_row[i] = 64, shapes.rows[i] = kTile;
    take_shape();
  }
  ~Tiles() {
    if (before_.palette) _tile_loadconfig(&before_);
    else _tile_release();
  }
  Tiles(const Tiles&) = delete;

  // Give the tiles the shapes that are set; at first all are whole.
  void take_shape() { _tile_loadconfig(&shapes); }

  alignas(64) TileShapes shapes;

 private:
  alignas(64) TileShapes before_;
};

// A process must ask Linux once before it touches the units.
inline bool has_matrix_units() {
  constexpr int kAskForPermission = 0x1023, kTileData = 18;
  static const bool allowed = syscall(SYS_arch_prctl, kAskForPermission, kTileData) == 0;
  return allowed;
}

// 32 rows of 32 columns, or of 16, as blocks [16 pairs of rows][16 columns][2], the second one `next` behind the first;
// zeros where there are fewer rows.
inline void pair_rows(const BFloat16* from, int64_t stride, int64_t rows, int64_t columns, BFloat16* to, int64_t next) {
  alignas(64) uint16_t left[kDepth], right[kDepth];
  for (int i = 0; i < kDepth; i++) left[i] = i / 2 + i % 2 * kDepth, right[i] = left[i] + kTile;
  const __m512i to_left = _mm512_load_si512(left), to_right = _mm512_load_si512(right);
  const __mmask32 there = columns > kTile ? ~0u : 0xffffu;
  for (int64_t pair = 0; pair < kTile; pair++) {
    const auto row = [&](int64_t n) {
      return n < rows ? _mm512_maskz_loadu_epi16(there, from + n * stride) : _mm512_setzero_si512();
    };
    const __m512i first = row(2 * pair), second = row(2 * pair + 1);
    BFloat16* here = to + pair * kDepth;
    _mm512_storeu_si512(here, _mm512_permutex2var_epi16(first, to_left, second));
    if (columns > kTile) _mm512_storeu_si512(here + next, _mm512_permutex2var_epi16(first, to_right, second));
  }
}

// A tile the other way round: 16 rows of 16 pairs, `stride` pairs apart, as [16 pairs][16 rows][2], or back.
inline void turn_pairs(const BFloat16* from, int64_t stride, BFloat16* to) {
  const float* pairs = reinterpret_cast<const float*>(from);
  at::vec::transpose_mxn<float, kTile, kTile>(pairs, stride, reinterpret_cast<float*>(to), kTile);
}

// Tiles 0 to 3 are the sums of a square of 32 x 32: of tiles 4 and 5, which lie down its side, with 6 and 7 across.
inline void clear_square() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

inline void load_square(const float* sums) {
  _tile_loadd(0, sums, 64);
  _tile_loadd(1, sums + kTileSums, 64);
  _tile_loadd(2, sums + 2 * kTileSums, 64);
  _tile_loadd(3, sums + 3 * kTileSums, 64);
}

inline void store_square(float* sums) {
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kTileSums, 64);
  _tile_stored(2, sums + 2 * kTileSums, 64);
  _tile_stored(3, sums + 3 * kTileSums, 64);
}

// Add the products of two tiles of each side, the first of which are given; the second ones lie `further` behind them.
// Rows of those down the side are `bytes` apart.
inline void add_to_square(const BFloat16* down, int64_t bytes, int64_t down_further, const BFloat16* across,
                          int64_t across_further) {
  _tile_loadd(4, down, bytes);
  _tile_loadd(6, across, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, across + across_further, 64);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, down + down_further, bytes);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

inline int64_t squares_of(int64_t count) { return (count + kDepth - 1) / kDepth; }

inline Vec widened(__m256i numbers) {
  return Vec(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16)));
}
inline Vec low(__m512i numbers) { return widened(_mm512_castsi512_si256(numbers)); }
inline Vec high(__m512i numbers) { return widened(_mm512_extracti64x4_epi64(numbers, 1)); }
inline __m512i rounded(Vec low, Vec high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

constexpr float kLog2E = 1.4426950408889634f;

// 2^x to 2e-7 of it; a polynomial between whole numbers.
inline Vec power_of_two(Vec x) {
  constexpr int kFromBelow = 0x09;
  const __m512 part = _mm512_reduce_ps(x, kFromBelow);
  __m512 found = _mm512_set1_ps(0.0018671302f);
  for (const float next : {0.0090170298f, 0.0557999127f, 0.2401644439f, 0.6931512952f, 1.f})
    found = _mm512_fmadd_ps(found, part, _mm512_set1_ps(next));
  return Vec(_mm512_scalef_ps(found, x));
}

// e^(x - y), given y log2(e).
inline Vec exp_of_difference(Vec x, Vec y_in_bits) {
  return power_of_two(Vec(_mm512_fmsub_ps(x, _mm512_set1_ps(kLog2E), y_in_bits)));
}

// The first half of row `i` of 32 of a square's sums; the other one is a tile further.
template <typename T>
inline T* low_row(T* sums, int64_t i) {
  return sums + i / kTile * 2 * kTileSums + i % kTile * kTile;
}

// Such a row, rounded.
inline __m512i rounded_row(const float* sums, int64_t i) {
  const float* left = low_row(sums, i);
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(left + kTileSums), _mm512_load_ps(left));
}

// 32 rows of a matrix [N, H], or as many as there are, as the side across of a product: [H / 32, 2, 16 pairs of H, 16
// of the rows, 2], with zeros for rows that are not there.
inline void lay_down(const BFloat16* from, int64_t rows, int64_t width, BFloat16* to) {
  alignas(64) BFloat16 last[kTileNumbers];
  for (int64_t half = 0; half < 2; half++, from += kTile * width, rows -= kTile)
    for (int64_t k = 0; k < width; k += kDepth) {
      BFloat16* there = to + k * kDepth + half * kTileNumbers;
      for (int64_t i = 0; rows < kTile && i < kTile; i++) {
        const __m512i row = i < rows ? _mm512_loadu_si512(from + i * width + k) : _mm512_setzero_si512();
        _mm512_store_si512(last + i * kDepth, row);
      }
      if (rows < kTile) turn_pairs(last, kTile, there);
      else turn_pairs(from + k, width / 2, there);
    }
}

// The rows of a matrix [N, H] as the side across of a product over them: [H / 32, N / 32, 2, 16 pairs of N, 16 of H,
// 2], with zeros for rows that are not there.
inline Tensor lay_across(const Tensor& matrix) {
  const int64_t count = matrix.size(0), width = matrix.size(1), squares = squares_of(count);
  Tensor laid_out = at::empty({squares * kDepth * width}, matrix.options());
  const BFloat16* from = matrix.const_data_ptr<BFloat16>();
  BFloat16* to = laid_out.mutable_data_ptr<BFloat16>();
  at::parallel_for(0, squares, 1, [&](int64_t first, int64_t end) {
    for (int64_t n = first; n < end; n++)
      for (int64_t k = 0; k < width; k += kDepth)
        pair_rows(from + n * kDepth * width + k, width, count - n * kDepth, kDepth,
                  to + (k / kDepth * squares + n) * kSquare, kTileNumbers);
  });
  return laid_out;
}

// Two rows of 32 numbers, in two vectors each, as pairs: those of the first 16 columns, and those of the others `next`
// behind them.
inline void store_pairs(Vec low_even, Vec high_even, Vec low_odd, Vec high_odd, BFloat16* to, int64_t next) {
  alignas(64) static constexpr uint16_t kOrder[kDepth] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(kOrder);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, rounded(low_even, low_odd)));
  _mm512_storeu_si512(to + next, _mm512_permutexvar_epi16(order, rounded(high_even, high_odd)));
}

// A square of sums the other way round, as rows of bfloat16 a stride apart: at most 32, and of 16 or 32 columns.
inline void round_turned(const float* sums, int64_t rows, int64_t columns, BFloat16* to, int64_t stride) {
  alignas(64) float turned[kTileSums];
  for (int64_t tile = 0; tile < 4 && tile / 2 * kTile < columns; tile++, sums += kTileSums) {
    const int64_t first = tile % 2 * kTile;
    at::vec::transpose_mxn<float, kTile, kTile>(sums, kTile, turned, kTile);
    BFloat16* here = to + first * stride + tile / 2 * kTile;
    for (int64_t i = 0; i < std::min(kTile, rows - first); i++, here += stride)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(here),
                          (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(turned + i * kTile)));
  }
}

#else

inline bool has_matrix_units() { return false; }

#endif

}  // namespace tandem
