// What libraries leave a CPU waiting for: in sampling a token, products of few rows and the draw; in training, the
// gradients of matrices.
// Built and described by kernels.py. Each has a plain way in Python, to which tests/test_kernels.py holds it.

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "tiles.h"

namespace {

using namespace tandem;

// ---- Products ----------------------------------------------------------------------------------------------------

// Rows that one pass over the matrix serves, and up to how many the units are better fed from here than by oneDNN.
constexpr int64_t kRowsAPass = 4 * kTile, kFewRows = 128;
// Of a matrix: fewer are multiplied sooner than another thread is woken.
constexpr int64_t kNumbersAThread = 1 << 15;

// [outputs, inputs] -> [outputs / 16, inputs / depth, depth / 2, 16, 2], a depth being 32 or all inputs if fewer: pairs
// of inputs beside each other, as the units read them.
Tensor pack(const Tensor& weight) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1), depth = std::min(kDepth, inputs);
  TORCH_CHECK(outputs % kTile == 0 && inputs % depth == 0 && depth % 2 == 0, "no whole tiles");
  const Tensor given = weight.contiguous();
  Tensor packed = at::empty({outputs / kTile, inputs / depth, depth / 2, kTile, 2}, weight.options());
  const auto* from = reinterpret_cast<const int32_t*>(given.const_data_ptr<BFloat16>());
  auto* to = reinterpret_cast<int32_t*>(packed.mutable_data_ptr<BFloat16>());
  const int64_t pairs = inputs / 2;
  at::parallel_for(0, outputs / kTile, 1, [&](int64_t first, int64_t end) {
    for (int64_t block = first; block < end; block++)
      for (int64_t pair = 0; pair < pairs; pair++)
        for (int64_t n = 0; n < kTile; n++)
          to[(block * pairs + pair) * kTile + n] = from[(block * kTile + n) * pairs + pair];
  });
  return packed;
}

#ifdef TANDEM_HAS_MATRIX_UNITS

// The sums of `kTiles` tiles of rows with 16 outputs, left in tiles 0 to 3. Tile 4 holds the matrix, 5 rows, and 6 the
// last of the rows, which may be fewer than 16.
template <int kTiles>
inline void multiply_tiles(const BFloat16* rows, int64_t inputs, const BFloat16* matrix, int64_t depth) {
  const int64_t bytes = inputs * int64_t(sizeof(BFloat16));
  _tile_zero(0);
  if constexpr (kTiles > 1) _tile_zero(1);
  if constexpr (kTiles > 2) _tile_zero(2);
  if constexpr (kTiles > 3) _tile_zero(3);
  for (int64_t k = 0; k < inputs; k += depth, matrix += depth * kTile) {
    fetch_ahead<3>(matrix + 16 * kTileNumbers, kTileNumbers);
    _tile_loadd(4, matrix, 64);
    const BFloat16* last = rows + (kTiles - 1) * kTile * inputs + k;
    if constexpr (kTiles > 1) {
      _tile_loadd(5, rows + k, bytes);
      _tile_dpbf16ps(0, 5, 4);
    }
    if constexpr (kTiles > 2) {
      _tile_loadd(5, rows + kTile * inputs + k, bytes);
      _tile_dpbf16ps(1, 5, 4);
    }
    if constexpr (kTiles > 3) {
      _tile_loadd(5, rows + 2 * kTile * inputs + k, bytes);
      _tile_dpbf16ps(2, 5, 4);
    }
    _tile_loadd(6, last, bytes);
    if constexpr (kTiles == 1) _tile_dpbf16ps(0, 6, 4);
    if constexpr (kTiles == 2) _tile_dpbf16ps(1, 6, 4);
    if constexpr (kTiles == 3) _tile_dpbf16ps(2, 6, 4);
    if constexpr (kTiles == 4) _tile_dpbf16ps(3, 6, 4);
  }
}

void multiply_few(const BFloat16* rows, int64_t count, int64_t inputs, const Tensor& packed, const BFloat16* bias,
                  BFloat16* out) {
  const int64_t blocks = packed.size(0), depth = 2 * packed.size(2), outputs = blocks * kTile;
  const BFloat16* matrix = packed.const_data_ptr<BFloat16>();
  const int64_t worth_a_thread = std::max<int64_t>(1, kNumbersAThread / (inputs * kTile));
  at::parallel_for(0, blocks, worth_a_thread, [&](int64_t first, int64_t end) {
    Tiles shaped;
    alignas(64) float sums[kRowsAPass * kTile];
    for (int64_t from = 0; from < count; from += kRowsAPass) {
      const int64_t here = std::min(kRowsAPass, count - from), tiles = (here + kTile - 1) / kTile;
      const uint8_t in_last = here - (tiles - 1) * kTile;
      TileShapes& shapes = shaped.shapes;
      for (int i = 0; i < 4; i++) shapes.rows[i] = kTile;
      shapes.rows[4] = depth / 2;
      shapes.bytes_a_row[5] = shapes.bytes_a_row[6] = 2 * depth;
      shapes.rows[6] = shapes.rows[tiles - 1] = in_last;
      shaped.take_shape();
      for (int64_t block = first; block < end; block++) {
        const BFloat16 *x = rows + from * inputs, *w = matrix + block * inputs * kTile;
        switch (tiles) {
          case 1: multiply_tiles<1>(x, inputs, w, depth); break;
          case 2: multiply_tiles<2>(x, inputs, w, depth); break;
          case 3: multiply_tiles<3>(x, inputs, w, depth); break;
          default: multiply_tiles<4>(x, inputs, w, depth);
        }
        _tile_stored(0, sums, 64);
        if (tiles > 1) _tile_stored(1, sums + kTile * kTile, 64);
        if (tiles > 2) _tile_stored(2, sums + 2 * kTile * kTile, 64);
        if (tiles > 3) _tile_stored(3, sums + 3 * kTile * kTile, 64);
        const __m512 shift = bias ? __m512(load(bias + block * kTile)) : _mm512_setzero_ps();
        for (int64_t i = 0; i < here; i++) {
          const __m512 sum = _mm512_add_ps(_mm512_load_ps(sums + i * kTile), shift);
          auto* to = reinterpret_cast<__m256i*>(out + (from + i) * outputs + block * kTile);
          _mm256_storeu_si256(to, (__m256i)_mm512_cvtneps_pbh(sum));
        }
      }
    }
  });
}

// The sums [kDown][kAcross] of one or two tiles a step of each side, whose second ones lie `steps` tiles behind.
template <int kDown, int kAcross>
inline void multiply_square(const BFloat16* down, const BFloat16* across, int64_t steps, float* sums) {
  const int64_t next = steps * kTileNumbers;
  _tile_zero(0);
  if constexpr (kAcross > 1) _tile_zero(1);
  if constexpr (kDown > 1) _tile_zero(2);
  if constexpr (kDown > 1 && kAcross > 1) _tile_zero(3);
  for (int64_t k = 0; k < next; k += kTileNumbers) {
    fetch_ahead<3>(across + k + 2 * kTileNumbers, kTileNumbers);
    _tile_loadd(4, down + k, 64);
    _tile_loadd(6, across + k, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kAcross > 1) {
      fetch_ahead<3>(across + next + k + 2 * kTileNumbers, kTileNumbers);
      _tile_loadd(7, across + next + k, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kDown > 1) {
      _tile_loadd(5, down + next + k, 64);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kDown > 1 && kAcross > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  if constexpr (kAcross > 1) _tile_stored(1, sums + kTile * kTile, 64);
  if constexpr (kDown > 1) _tile_stored(2, sums + 2 * kTile * kTile, 64);
  if constexpr (kDown > 1 && kAcross > 1) _tile_stored(3, sums + 3 * kTile * kTile, 64);
}

inline void round_tile(const float* sums, BFloat16* to, int64_t stride) {
  for (int64_t i = 0; i < kTile; i++)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * stride),
                        (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(sums + i * kTile)));
}

// One or two tiles of outputs of a matrix's gradient [outputs, inputs], from `down`, laid out for it, and `across`.
void multiply_strip(const BFloat16* down, int64_t tiles, const BFloat16* across, int64_t inputs, int64_t steps,
                    BFloat16* out) {
  alignas(64) float sums[4 * kTile * kTile];
  for (int64_t n = 0; n < inputs; n += 2 * kTile, across += 2 * steps * kTileNumbers) {
    const bool both = n + kTile < inputs;
    if (tiles == 2 && both) multiply_square<2, 2>(down, across, steps, sums);
    else if (tiles == 2) multiply_square<2, 1>(down, across, steps, sums);
    else if (both) multiply_square<1, 2>(down, across, steps, sums);
    else multiply_square<1, 1>(down, across, steps, sums);
    for (int64_t m = 0; m < tiles; m++)
      for (int64_t side = 0; side < 1 + both; side++)
        round_tile(sums + (2 * m + side) * kTile * kTile, out + m * kTile * inputs + n + side * kTile, inputs);
  }
}

// Of rows that met several matrices, and the upstream gradients of what came of it: the matrices' gradients. Both are
// laid out as the units read them, the rows once for all.
void multiply_upstream(const std::vector<Tensor>& upstream, const Tensor& rows, const std::vector<Tensor>& out) {
  const int64_t count = rows.size(0), inputs = rows.size(1), steps = (count + kDepth - 1) / kDepth;
  const BFloat16* x = rows.const_data_ptr<BFloat16>();
  Tensor laid_out = at::empty({inputs / kTile * steps * kTileNumbers}, rows.options());
  BFloat16* across = laid_out.mutable_data_ptr<BFloat16>();
  at::parallel_for(0, steps, 1, [&](int64_t first, int64_t end) {
    for (int64_t k = first; k < end; k++)
      for (int64_t n = 0; n < inputs; n += 2 * kTile)
        pair_rows(x + k * kDepth * inputs + n, inputs, count - k * kDepth, inputs - n,
                  across + (n / kTile * steps + k) * kTileNumbers, steps * kTileNumbers);
  });
  std::vector<std::pair<size_t, int64_t>> strips;
  for (size_t i = 0; i < upstream.size(); i++)
    for (int64_t m = 0; m < upstream[i].size(1); m += 2 * kTile) strips.emplace_back(i, m);
  at::parallel_for(0, strips.size(), 1, [&](int64_t first, int64_t end) {
    const Tiles whole;
    const std::unique_ptr<BFloat16[]> down(new BFloat16[2 * steps * kTileNumbers]);
    alignas(64) BFloat16 pairs[2 * kTileNumbers];
    for (int64_t strip = first; strip < end; strip++) {
      const auto [i, m] = strips[strip];
      const int64_t outputs = upstream[i].size(1), tiles = std::min<int64_t>(2, (outputs - m) / kTile);
      const BFloat16* g = upstream[i].const_data_ptr<BFloat16>() + m;
      for (int64_t k = 0; k < steps; k++) {
        pair_rows(g + k * kDepth * outputs, outputs, count - k * kDepth, tiles * kTile, pairs, kTileNumbers);
        for (int64_t tile = 0; tile < tiles; tile++)
          turn_pairs(pairs + tile * kTileNumbers, kTile, down.get() + (tile * steps + k) * kTileNumbers);
      }
      multiply_strip(down.get(), tiles, across, inputs, steps, out[i].mutable_data_ptr<BFloat16>() + m * inputs);
    }
  });
}

#else

void multiply_few(const BFloat16*, int64_t, int64_t, const Tensor&, const BFloat16*, BFloat16*) {}

void multiply_upstream(const std::vector<Tensor>&, const Tensor&, const std::vector<Tensor>&) {}

#endif

// rows [..., inputs] times weight^T, plus the bias: from `packed` where the rows are few, from `weight` otherwise.
Tensor multiply_packed(const Tensor& rows, const Tensor& packed, const Tensor& weight,
                       const std::optional<Tensor>& bias) {
  TORCH_CHECK(has_matrix_units(), "there are no matrix units for bfloat16");
  const int64_t inputs = weight.size(1), count = rows.numel() / inputs;
  if (count > kFewRows) return at::linear(rows, weight, bias);
  const Tensor x = rows.contiguous();
  auto sizes = x.sizes().vec();
  sizes.back() = weight.size(0);
  Tensor out = at::empty(sizes, x.options());
  multiply_few(x.const_data_ptr<BFloat16>(), count, inputs, packed,
               bias.has_value() ? bias->const_data_ptr<BFloat16>() : nullptr, out.mutable_data_ptr<BFloat16>());
  return out;
}

// Of upstream gradients [N, outputs] and rows [N, inputs] of whole tiles: upstream^T rows, [outputs, inputs] each.
std::vector<Tensor> weight_gradients(at::TensorList upstream, const Tensor& rows) {
  TORCH_CHECK(has_matrix_units(), "there are no matrix units for bfloat16");
  std::vector<Tensor> given, out;
  for (const Tensor& gradient : upstream) {
    TORCH_CHECK(gradient.size(1) % kTile == 0 && rows.size(1) % kTile == 0, "no whole tiles");
    given.push_back(gradient.contiguous());
    out.push_back(at::empty({gradient.size(1), rows.size(1)}, rows.options()));
  }
  multiply_upstream(given, rows.contiguous(), out);
  return out;
}

// ---- The draw of a token -----------------------------------------------------------------------------------------

constexpr int64_t kBlock = 256;

// The first weight with which their sum exceeds `quantile`, or else the last above zero; and what is left of it there.
std::pair<int64_t, float> invert(const float* weights, int64_t count, float quantile) {
  float before = 0, before_last = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < count; i++) {
    if (weights[i] > 0) last = i, before_last = before;
    if (before + weights[i] > quantile) return {i, std::max(quantile - before, 0.f)};
    before += weights[i];
  }
  return {last, std::max(quantile - before_last, 0.f)};
}

template <typename T>
void draw_rows(const Tensor& logits, const Tensor& uniform, Tensor& tokens, Tensor& logprobs) {
  const int64_t vocabulary = logits.size(1), blocks = (vocabulary + kBlock - 1) / kBlock;
  const T* z = logits.const_data_ptr<T>();
  const float* chance = uniform.const_data_ptr<float>();
  int64_t* token = tokens.mutable_data_ptr<int64_t>();
  float* logprob = logprobs.mutable_data_ptr<float>();
  at::parallel_for(0, logits.size(0), 1, [&](int64_t first, int64_t end) {
    std::vector<float> sums(blocks);
    float weights[kBlock];
    for (int64_t row = first; row < end; row++) {
      const T* of_row = z + row * vocabulary;
      Vec most(-std::numeric_limits<float>::infinity());
      for (int64_t i = 0; i < vocabulary; i += kLanes) most = at::vec::maximum(most, load(of_row + i, vocabulary - i));
      const float greatest = greatest_of(most);
      float total = 0;
      for (int64_t block = 0; block < blocks; block++) {
        Vec sum(0.f);
        const int64_t stop = std::min((block + 1) * kBlock, vocabulary);
        for (int64_t i = block * kBlock; i < stop; i += kLanes)
          sum = sum + (load(of_row + i, stop - i) - Vec(greatest)).exp_u20();
        total += sums[block] = sum_of(sum);
      }
      const auto [block, left] = invert(sums.data(), blocks, chance[row] * total);
      const int64_t start = block * kBlock, count = std::min(kBlock, vocabulary - start);
      for (int64_t i = 0; i < count; i += kLanes)
        (load(of_row + start + i, count - i) - Vec(greatest)).exp_u20().store(weights + i);
      token[row] = start + invert(weights, count, left).first;
      logprob[row] = float(of_row[token[row]]) - greatest - std::log(total);
    }
  });
}

// Of logits [N, V] and numbers [N] from [0, 1): tokens [N] and their log-probabilities [N], as `tandem.algo.sample`.
std::tuple<Tensor, Tensor> draw(const Tensor& logits, const Tensor& uniform) {
  const Tensor z = logits.contiguous(), chance = uniform.contiguous();
  Tensor tokens = at::empty({z.size(0)}, z.options().dtype(at::kLong));
  Tensor logprobs = at::empty({z.size(0)}, z.options().dtype(at::kFloat));
  if (z.scalar_type() == at::kFloat) draw_rows<float>(z, chance, tokens, logprobs);
  else draw_rows<BFloat16>(z, chance, tokens, logprobs);
  return {tokens, logprobs};
}

}  // namespace

TORCH_LIBRARY(tandem_cpu, library) {
  library.def("has_matrix_units() -> bool", &has_matrix_units);
  library.def("pack(Tensor weight) -> Tensor");
  library.def("multiply_packed(Tensor rows, Tensor packed, Tensor weight, Tensor? bias) -> Tensor");
  library.def("weight_gradients(Tensor[] upstream, Tensor rows) -> Tensor[]");
  library.def("draw(Tensor logits, Tensor uniform) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(tandem_cpu, CPU, library) {
  library.impl("pack", &pack);
  library.impl("multiply_packed", &multiply_packed);
  library.impl("weight_gradients", &weight_gradients);
  library.impl("draw", &draw);
}
