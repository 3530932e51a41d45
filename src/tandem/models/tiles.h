// The matrix units of x86 processors (AMX) for bfloat16: tiles, and how matrices are laid out for them.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define TANDEM_HAS_MATRIX_UNITS
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tandem {

using at::BFloat16;
using at::Tensor;
using Vec = at::vec::Vectorized<float>;

// A tile of the matrix units holds 16 rows of 32 numbers in bfloat16; a tile of sums 16 rows of 16 in float32.
constexpr int64_t kTile = 16, kDepth = 32, kTileNumbers = kTile * kDepth, kTileSums = kTile * kTile;
// So many numbers has a square of 32 x 32: two tiles, or the sums of four.
constexpr int64_t kSquare = kDepth * kDepth;

// Into the nearest cache (3), or the next one (2), from which more can be on its way at once.
template <int kNearness, typename T>
inline void fetch_ahead(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + i, 0, kNearness);
}

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

// Row `i` of 32 of a square's sums, rounded.
inline __m512i rounded_row(const float* sums, int64_t i) {
  const float* left = sums + i / kTile * 2 * kTileSums + i % kTile * kTile;
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(left + kTileSums), _mm512_load_ps(left));
}

#else

inline bool has_matrix_units() { return false; }

#endif

}  // namespace tandem
