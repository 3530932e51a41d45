// A layer's rotary embedding and its attention, over whole texts with their gradients, and of a single query.
// Built and described by kernels.py.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "tiles.h"

namespace {

using namespace tandem;

// ---- Rotary embedding --------------------------------------------------------------------------------------------

// A head of two halves (x, y) as (x cos - y sin, y cos + x sin), where cos and sin have two halves too; or the gradient
// of (x, y) given that of what came of it.
template <bool kBack, typename T>
inline void rotate_head(const T* from, const T* cos, const T* sin, int64_t half, T* to) {
  const auto rotate = [&](auto x, auto y, auto cos_x, auto cos_y, auto sin_x, auto sin_y) {
    if constexpr (kBack) return std::pair{x * cos_x + y * sin_y, y * cos_y - x * sin_x};
    else return std::pair{x * cos_x - y * sin_x, y * cos_y + x * sin_y};
  };
  if (half < kLanes) {
    for (int64_t i = 0, j = half; i < half; i++, j++) {
      const auto [x, y] =
          rotate(float(from[i]), float(from[j]), float(cos[i]), float(cos[j]), float(sin[i]), float(sin[j]));
      to[i] = T(x), to[j] = T(y);
    }
    return;
  }
  for (int64_t next = 0; next < half; next += kLanes) {
    // The last vector begins earlier where it is not a whole one.
    const int64_t i = std::min(next, half - kLanes), j = i + half;
    const auto [x, y] =
        rotate(load(from + i), load(from + j), load(cos + i), load(cos + j), load(sin + i), load(sin + j));
    store(x, to + i), store(y, to + j);
  }
}

template <typename T>
void rotate_rows(const Tensor& given, const Tensor& cos, const Tensor& sin, bool back, Tensor& out) {
  const int64_t heads = given.size(1), length = given.size(2), width = given.size(3);
  const auto from_by = given.strides(), cos_by = cos.strides(), sin_by = sin.strides(), to_by = out.strides();
  const int64_t cos_row = cos.size(0) > 1 ? cos_by[0] : 0, sin_row = sin.size(0) > 1 ? sin_by[0] : 0;
  const T *from = given.const_data_ptr<T>(), *c = cos.const_data_ptr<T>(), *s = sin.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  at::parallel_for(0, given.size(0) * length, 64, [&](int64_t first, int64_t end) {
    for (int64_t n = first; n < end; n++) {
      const int64_t row = n / length, place = n % length;
      const T *cos_here = c + row * cos_row + place * cos_by[2], *sin_here = s + row * sin_row + place * sin_by[2];
      for (int64_t head = 0; head < heads; head++) {
        const T* x = from + row * from_by[0] + head * from_by[1] + place * from_by[2];
        T* there = to + row * to_by[0] + head * to_by[1] + place * to_by[2];
        if (back) rotate_head<true>(x, cos_here, sin_here, width / 2, there);
        else rotate_head<false>(x, cos_here, sin_here, width / 2, there);
      }
    }
  });
}

Tensor with_numbers_in_line(const Tensor& given) { return given.stride(-1) == 1 ? given : given.contiguous(); }

// Heads [B, heads, T, D] by cos and sin [1 or B, 1, T, D]. What comes of it lies as [B, heads, T, D], and its gradient
// as [B, T, heads, D], which is where heads come from.
Tensor rotate(const Tensor& heads, const Tensor& cos, const Tensor& sin, bool back) {
  Tensor out =
      back ? at::empty({heads.size(0), heads.size(2), heads.size(1), heads.size(3)}, heads.options()).transpose(1, 2)
           : at::empty(heads.sizes(), heads.options());
  const Tensor x = with_numbers_in_line(heads), c = with_numbers_in_line(cos), s = with_numbers_in_line(sin);
  if (heads.scalar_type() == at::kFloat) rotate_rows<float>(x, c, s, back, out);
  else rotate_rows<BFloat16>(x, c, s, back, out);
  return out;
}

// ---- Attention over whole texts ----------------------------------------------------------------------------------
//
// A square of scores has 32 keys down its side and 32 queries across, so that what is summed over keys is summed lane
// by lane. Squares whose keys all come after their queries are never made.

#ifdef TANDEM_HAS_MATRIX_UNITS

struct Attending {
  int64_t texts, heads, sets, length, width;
  // Query heads that share a set of keys and values; squares of tokens, and of a head's width, the last filled up.
  int64_t group, squares, steps;
  float scaling;

  Attending(const Tensor& query, const Tensor& key, double scaling)
      : texts(query.size(0)),
        heads(query.size(1)),
        sets(key.size(1)),
        length(query.size(2)),
        width(query.size(3)),
        group(heads / sets),
        squares(squares_of(length)),
        steps(squares_of(width)),
        scaling(scaling) {}

  int64_t padded() const { return steps * kDepth; }
  int64_t rows_of(int64_t square) const { return std::min(kDepth, length - square * kDepth); }
};

// One head's rows of a text.
struct Rows {
  const BFloat16* from;
  int64_t stride;

  Rows(const Tensor& heads, int64_t text, int64_t head)
      : from(heads.const_data_ptr<BFloat16>() + text * heads.stride(0) + head * heads.stride(1)),
        stride(heads.stride(2)) {}
};

class Room {
 public:
  explicit Room(int64_t numbers) : numbers_(at::empty({numbers}, at::kBFloat16)) {}
  operator BFloat16*() { return numbers_.mutable_data_ptr<BFloat16>(); }

 private:
  Tensor numbers_;
};

// A square of rows as [32, padded width], with zeros for what is not there.
void fill_up(const Rows& rows, int64_t square, const Attending& shape, BFloat16* to) {
  const int64_t there = shape.rows_of(square), padded = shape.padded();
  const BFloat16* from = rows.from + square * kDepth * rows.stride;
  for (int64_t k = 0; k < padded; k += kDepth) {
    const __mmask32 in_width = shape.width - k >= kDepth ? ~0u : (1u << (shape.width - k)) - 1;
    for (int64_t i = 0; i < kDepth; i++)
      _mm512_storeu_si512(to + i * padded + k, i < there
                                                   ? _mm512_maskz_loadu_epi16(in_width, from + i * rows.stride + k)
                                                   : _mm512_setzero_si512());
  }
}

// Such a square as the side across of a product over its rows: [steps, 2, 16 pairs of rows, 16, 2].
void pair_square(const BFloat16* from, int64_t padded, BFloat16* to) {
  for (int64_t k = 0; k < padded; k += kDepth)
    pair_rows(from + k, padded, kDepth, kDepth, to + k * kDepth, kTileNumbers);
}

// And as the side down of one: squares of [32 of the width, 32 rows], `further` apart.
void turn_square(const BFloat16* from, int64_t padded, BFloat16* to, int64_t further) {
  alignas(64) BFloat16 pairs[kSquare];
  for (int64_t k = 0; k < padded; k += kDepth, to += further) {
    pair_rows(from + k, padded, kDepth, kDepth, pairs, kTileNumbers);
    turn_pairs(pairs, kTile, to);
    turn_pairs(pairs + kTileNumbers, kTile, to + kTileNumbers);
  }
}

// The products of a square of rows that lie as they are with what stands across.
void multiply_rows(const BFloat16* rows, const BFloat16* across, const Attending& shape, float* sums) {
  clear_square();
  for (int64_t k = 0; k < shape.steps; k++)
    add_to_square(rows + k * kDepth, 2 * shape.padded(), kTile * shape.padded(), across + k * kSquare, kTileNumbers);
  store_square(sums);
}

// The sums of so many squares down the side of a product, with as many across.
void multiply_squares(const BFloat16* down, const BFloat16* across, int64_t count, float* sums) {
  clear_square();
  for (int64_t k = 0; k < count * kSquare; k += kSquare)
    add_to_square(down + k, 64, kTileNumbers, across + k, kTileNumbers);
  store_square(sums);
}

// Which of 32 queries read a key: all, or in the square on the diagonal those that do not come before it.
struct Reads {
  __mmask16 low = 0xffff, high = 0xffff;
  Reads(int64_t key, bool diagonal) {
    if (!diagonal) return;
    const uint32_t from = ~0u << key;
    low = from & 0xffff, high = from >> kTile;
  }
};

// Of squares of scores over keys: their weights as the side across of a product, which are to be multiplied by each
// query's `inverse`; and log2 of each query's sum of exponentials.
void weigh(const float* scores, int64_t squares, float bits_a_score, BFloat16* weights, float* inverse, float* bits) {
  __m512 low_most = _mm512_set1_ps(-INFINITY), high_most = low_most;
  for (int64_t kb = 0; kb < squares; kb++)
    for (int64_t i = 0; i < kDepth; i++) {
      const float* row = low_row(scores + kb * kSquare, i);
      const Reads reads(i, kb + 1 == squares);
      low_most = _mm512_mask_max_ps(low_most, reads.low, low_most, _mm512_load_ps(row));
      high_most = _mm512_mask_max_ps(high_most, reads.high, high_most, _mm512_load_ps(row + kTileSums));
    }
  const __m512 rate = _mm512_set1_ps(bits_a_score);
  const __m512 low_bits = _mm512_mul_ps(low_most, rate), high_bits = _mm512_mul_ps(high_most, rate);
  Vec low_sum(0.f), high_sum(0.f);
  for (int64_t kb = 0; kb < squares; kb++)
    for (int64_t i = 0; i < kDepth; i += 2) {
      Vec found[2][2];
      for (int64_t odd = 0; odd < 2; odd++) {
        const float* row = low_row(scores + kb * kSquare, i + odd);
        const Reads reads(i + odd, kb + 1 == squares);
        const auto weight = [&](__mmask16 read, const float* score, __m512 most) {
          return Vec(_mm512_maskz_mov_ps(read, power_of_two(Vec(_mm512_fmsub_ps(_mm512_load_ps(score), rate, most)))));
        };
        found[odd][0] = weight(reads.low, row, low_bits);
        found[odd][1] = weight(reads.high, row + kTileSums, high_bits);
        low_sum = low_sum + found[odd][0], high_sum = high_sum + found[odd][1];
      }
      store_pairs(found[0][0], found[0][1], found[1][0], found[1][1], weights + kb * kSquare + i / 2 * kDepth,
                  kTileNumbers);
    }
  (Vec(1.f) / low_sum).store(inverse), (Vec(1.f) / high_sum).store(inverse + kTile);
  (Vec(low_bits) + low_sum.log2()).store(bits), (Vec(high_bits) + high_sum.log2()).store(bits + kTile);
}

// Sums [32 of the width, 32 queries] times a factor of each query's.
void multiply_queries(float* sums, const float* factors) {
  for (int64_t i = 0; i < kDepth; i++)
    for (int64_t half = 0; half < 2; half++) {
      float* row = low_row(sums, i) + half * kTileSums;
      (Vec::loadu(row) * Vec::loadu(factors + half * kTile)).store(row);
    }
}

// Sums [32 rows, 32 of the width] as rows.
void write_rows(const float* sums, int64_t rows, int64_t columns, BFloat16* to, int64_t stride) {
  const __mmask32 there = columns >= kDepth ? ~0u : (1u << columns) - 1;
  for (int64_t i = 0; i < rows; i++) _mm512_mask_storeu_epi16(to + i * stride, there, rounded_row(sums, i));
}

std::tuple<Tensor, Tensor> attend_texts(const Tensor& query, const Tensor& key, const Tensor& value, double scaling) {
  const Attending shape(query, key, scaling);
  const Tensor q = with_numbers_in_line(query), k = with_numbers_in_line(key), v = with_numbers_in_line(value);
  Tensor out = at::empty({shape.texts, shape.length, shape.heads, shape.width}, query.options());
  Tensor normalizers = at::empty({shape.texts, shape.heads, shape.squares * kDepth}, query.options().dtype(at::kFloat));
  BFloat16* to = out.mutable_data_ptr<BFloat16>();
  float* bits = normalizers.mutable_data_ptr<float>();
  const int64_t squares = shape.squares, steps = shape.steps, a_square = kDepth * shape.padded();
  at::parallel_for(0, shape.texts * shape.sets, 1, [&](int64_t first, int64_t end) {
    const Tiles tiles;
    Room keys(squares * a_square), values(squares * a_square), block(a_square), asked(a_square),
        weights(squares * kSquare);
    Tensor room = at::empty({squares * kSquare}, at::kFloat);
    float* scores = room.mutable_data_ptr<float>();
    alignas(64) float found[kSquare], inverse[kDepth];
    for (int64_t n = first; n < end; n++) {
      const int64_t text = n / shape.sets, set = n % shape.sets;
      const Rows keys_of(k, text, set), values_of(v, text, set);
      for (int64_t kb = 0; kb < squares; kb++) {
        fill_up(keys_of, kb, shape, keys + kb * a_square);
        fill_up(values_of, kb, shape, block);
        turn_square(block, shape.padded(), values + kb * kSquare, squares * kSquare);
      }
      for (int64_t head = set * shape.group; head < (set + 1) * shape.group; head++)
        for (int64_t qb = 0; qb < squares; qb++) {
          fill_up(Rows(q, text, head), qb, shape, block);
          lay_down(block, kDepth, shape.padded(), asked);
          for (int64_t kb = 0; kb <= qb; kb++) multiply_rows(keys + kb * a_square, asked, shape, scores + kb * kSquare);
          weigh(scores, qb + 1, shape.scaling * kLog2E, weights, inverse,
                bits + ((text * shape.heads + head) * squares + qb) * kDepth);
          BFloat16* there = to + ((text * shape.length + qb * kDepth) * shape.heads + head) * shape.width;
          for (int64_t d = 0; d < steps; d++) {
            multiply_squares(values + d * squares * kSquare, weights, qb + 1, found);
            multiply_queries(found, inverse);
            round_turned(found, shape.rows_of(qb), shape.width - d * kDepth, there + d * kDepth,
                         shape.heads * shape.width);
          }
        }
    }
  });
  return {out, normalizers};
}

// What each of 32 queries' gradients has in common with what came of them: sums over the width.
void common(const Rows& gradient, const Rows& found, int64_t square, const Attending& shape, float* to) {
  const BFloat16 *g = gradient.from + square * kDepth * gradient.stride,
                 *o = found.from + square * kDepth * found.stride;
  for (int64_t i = 0; i < kDepth; i++, g += gradient.stride, o += found.stride) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; i < shape.rows_of(square) && k < shape.width; k += kTile)
      sum = _mm512_fmadd_ps(widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(g + k))),
                            widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(o + k))), sum);
    to[i] = _mm512_reduce_add_ps(sum);
  }
}

// From a square of scores and one of the weights' gradients: the weights, and the scores' gradients, as rows of keys
// and as the side across of a product.
void unweigh(const float* scores, const float* upstream, bool diagonal, const float* bits, const float* in_common,
             float scaling, BFloat16* weights, BFloat16* slopes, BFloat16* across) {
  const Vec rate(scaling * kLog2E), factor(scaling);
  const auto pair_of = [](const float* from) { return std::pair{Vec::loadu(from), Vec::loadu(from + kTile)}; };
  const auto [low_bits, high_bits] = pair_of(bits);
  const auto [low_common, high_common] = pair_of(in_common);
  for (int64_t i = 0; i < kDepth; i += 2) {
    Vec slope[2][2];
    for (int64_t odd = 0; odd < 2; odd++) {
      const float *score = low_row(scores, i + odd), *given = low_row(upstream, i + odd);
      const Reads reads(i + odd, diagonal);
      const auto half = [&](__mmask16 read, int64_t from, Vec bits_here, Vec common_here, Vec& found) {
        const Vec weight(_mm512_maskz_mov_ps(read, power_of_two(Vec::loadu(score + from) * rate - bits_here)));
        found = weight * (Vec::loadu(given + from) - common_here) * factor;
        return weight;
      };
      const Vec low_weight = half(reads.low, 0, low_bits, low_common, slope[odd][0]);
      const Vec high_weight = half(reads.high, kTileSums, high_bits, high_common, slope[odd][1]);
      _mm512_storeu_si512(weights + (i + odd) * kDepth, rounded(low_weight, high_weight));
      _mm512_storeu_si512(slopes + (i + odd) * kDepth, rounded(slope[odd][0], slope[odd][1]));
    }
    store_pairs(slope[0][0], slope[0][1], slope[1][0], slope[1][1], across + i / 2 * kDepth, kTileNumbers);
  }
}

// Gradients of keys or values, squares of rows: from what is down the side, [squares of keys][squares of queries], and
// the queries' rows across. Added to `sums` after the first of the heads that share them, and written after the last.
void gather(const BFloat16* down, const BFloat16* across, const Attending& shape, bool first, bool last, float* sums,
            BFloat16* to, int64_t stride) {
  for (int64_t kb = 0; kb < shape.squares; kb++)
    for (int64_t d = 0; d < shape.steps; d++, sums += kSquare) {
      if (first) clear_square();
      else load_square(sums);
      for (int64_t qb = kb; qb < shape.squares; qb++)
        add_to_square(down + (kb * shape.squares + qb) * kSquare, 64, kTileNumbers,
                      across + (qb * shape.steps + d) * kSquare, kTileNumbers);
      store_square(sums);
      if (last)
        write_rows(sums, shape.rows_of(kb), shape.width - d * kDepth, to + kb * kDepth * stride + d * kDepth, stride);
    }
}

std::tuple<Tensor, Tensor, Tensor> attend_texts_gradients(const Tensor& upstream, const Tensor& query,
                                                          const Tensor& key, const Tensor& value, const Tensor& out,
                                                          const Tensor& normalizers, double scaling) {
  const Attending shape(query, key, scaling);
  const Tensor q = with_numbers_in_line(query), k = with_numbers_in_line(key), v = with_numbers_in_line(value);
  const Tensor g = with_numbers_in_line(upstream).transpose(1, 2), o = with_numbers_in_line(out).transpose(1, 2);
  const auto like = [&](int64_t heads) {
    return at::empty({shape.texts, shape.length, heads, shape.width}, query.options());
  };
  Tensor of_query = like(shape.heads), of_key = like(shape.sets), of_value = like(shape.sets);
  BFloat16 *to_query = of_query.mutable_data_ptr<BFloat16>(), *to_key = of_key.mutable_data_ptr<BFloat16>();
  BFloat16* to_value = of_value.mutable_data_ptr<BFloat16>();
  const float* bits = normalizers.const_data_ptr<float>();
  const int64_t squares = shape.squares, steps = shape.steps, a_square = kDepth * shape.padded();
  at::parallel_for(0, shape.texts * shape.sets, 1, [&](int64_t first, int64_t end) {
    const Tiles tiles;
    Room keys(squares * a_square), turned_keys(squares * a_square), values(squares * a_square), block(a_square);
    Room asked(a_square), given(a_square), all_asked(squares * a_square), all_given(squares * a_square);
    Room weights(squares * squares * kSquare), slopes(squares * squares * kSquare), across(squares * kSquare);
    Tensor sums = at::empty({2, squares * steps * kSquare}, at::kFloat);
    float *sums_of_keys = sums.mutable_data_ptr<float>(), *sums_of_values = sums_of_keys + squares * steps * kSquare;
    alignas(64) float scores[kSquare], of_weights[kSquare], in_common[kDepth];
    for (int64_t n = first; n < end; n++) {
      const int64_t text = n / shape.sets, set = n % shape.sets;
      for (int64_t kb = 0; kb < squares; kb++) {
        fill_up(Rows(k, text, set), kb, shape, keys + kb * a_square);
        turn_square(keys + kb * a_square, shape.padded(), turned_keys + kb * kSquare, squares * kSquare);
        fill_up(Rows(v, text, set), kb, shape, values + kb * a_square);
      }
      for (int64_t head = set * shape.group; head < (set + 1) * shape.group; head++) {
        for (int64_t qb = 0; qb < squares; qb++) {
          fill_up(Rows(q, text, head), qb, shape, block);
          lay_down(block, kDepth, shape.padded(), asked);
          pair_square(block, shape.padded(), all_asked + qb * a_square);
          fill_up(Rows(g, text, head), qb, shape, block);
          lay_down(block, kDepth, shape.padded(), given);
          pair_square(block, shape.padded(), all_given + qb * a_square);
          common(Rows(g, text, head), Rows(o, text, head), qb, shape, in_common);
          for (int64_t kb = 0; kb <= qb; kb++) {
            multiply_rows(keys + kb * a_square, asked, shape, scores);
            multiply_rows(values + kb * a_square, given, shape, of_weights);
            const int64_t place = (kb * squares + qb) * kSquare;
            unweigh(scores, of_weights, kb == qb, bits + ((text * shape.heads + head) * squares + qb) * kDepth,
                    in_common, shape.scaling, weights + place, slopes + place, across + kb * kSquare);
          }
          BFloat16* there = to_query + ((text * shape.length + qb * kDepth) * shape.heads + head) * shape.width;
          for (int64_t d = 0; d < steps; d++) {
            multiply_squares(turned_keys + d * squares * kSquare, across, qb + 1, scores);
            round_turned(scores, shape.rows_of(qb), shape.width - d * kDepth, there + d * kDepth,
                         shape.heads * shape.width);
          }
        }
        const bool begins = head == set * shape.group, ends = head + 1 == (set + 1) * shape.group;
        const int64_t place = (text * shape.length * shape.sets + set) * shape.width, stride = shape.sets * shape.width;
        gather(slopes, all_asked, shape, begins, ends, sums_of_keys, to_key + place, stride);
        gather(weights, all_given, shape, begins, ends, sums_of_values, to_value + place, stride);
      }
    }
  });
  return {of_query.transpose(1, 2), of_key.transpose(1, 2), of_value.transpose(1, 2)};
}

#else

std::tuple<Tensor, Tensor> attend_texts(const Tensor&, const Tensor&, const Tensor&, double) {
  TORCH_CHECK(false, "there are no matrix units for bfloat16");
}

std::tuple<Tensor, Tensor, Tensor> attend_texts_gradients(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                          const Tensor&, const Tensor&, double) {
  TORCH_CHECK(false, "there are no matrix units for bfloat16");
}

#endif

// ---- Attention of a single query ---------------------------------------------------------------------------------

// Query heads that read the same keys and values together.
constexpr int64_t kHeadsTogether = 4;
constexpr float kLowest = std::numeric_limits<float>::lowest();

// What `kHeads` queries read of keys and values [length, kWidth], whose rows are a stride apart; `shares` has `room`
// for a head's scores. The next keys are sent for meanwhile.
template <typename T, int64_t kWidth, int kHeads>
void attend_together(const T* const* queries, const T* keys, int64_t key_stride, const T* values, int64_t value_stride,
                     const T* next_keys, int64_t length, const bool* read, int64_t read_stride, float scaling,
                     float* shares, int64_t room, T* to) {
  constexpr int64_t vecs = kWidth / kLanes;
  Vec asked[kHeads][vecs], sum[kHeads][vecs];
  float greatest[kHeads], total[kHeads];
  for (int h = 0; h < kHeads; h++) {
    greatest[h] = kLowest, total[h] = 0;
    for (int i = 0; i < vecs; i++) asked[h][i] = load(queries[h] + i * kLanes) * Vec(scaling), sum[h][i] = Vec(0.f);
  }
  for (int64_t s = 0; s < length; s++) {
    fetch_ahead<2>(values + s * value_stride, kWidth);
    Vec dot[kHeads];
    for (int i = 0; i < vecs; i++) {
      const Vec key = load(keys + s * key_stride + i * kLanes);
      for (int h = 0; h < kHeads; h++) dot[h] = i ? at::vec::fmadd(asked[h][i], key, dot[h]) : asked[h][i] * key;
    }
    const bool reads = !read || read[s * read_stride];
    for (int h = 0; h < kHeads; h++) {
      const float score = reads ? sum_of(dot[h]) : kLowest;
      shares[h * room + s] = score;
      greatest[h] = std::max(greatest[h], score);
    }
  }
  for (int h = 0; h < kHeads; h++) {
    float* p = shares + h * room;
    for (int64_t s = 0; s < length; s += kLanes) (Vec::loadu(p + s) - Vec(greatest[h])).exp_u20().store(p + s);
    for (int64_t s = 0; s < length; s++) total[h] += p[s];
  }
  for (int64_t s = 0; s < length; s++) {
    fetch_ahead<2>(next_keys + s * key_stride, kWidth);
    for (int i = 0; i < vecs; i++) {
      const Vec value = load(values + s * value_stride + i * kLanes);
      for (int h = 0; h < kHeads; h++) sum[h][i] = at::vec::fmadd(Vec(shares[h * room + s]), value, sum[h][i]);
    }
  }
  for (int h = 0; h < kHeads; h++)
    for (int i = 0; i < vecs; i++) {
      float found[kLanes];
      (sum[h][i] / Vec(total[h])).store(found);
      for (int j = 0; j < kLanes; j++) to[h * kWidth + i * kLanes + j] = T(found[j]);
    }
}

// As `attend_one`, for heads of a width that is known when this is compiled.
template <typename T, int64_t kWidth>
void attend(const Tensor& query, const Tensor& keys, const Tensor& values, const std::optional<Tensor>& mask,
            double scaling, Tensor& out) {
  const int64_t heads = query.size(1), sets = keys.size(1), length = keys.size(2), group = heads / sets;
  const auto qs = query.strides(), ks = keys.strides(), vs = values.strides();
  const T *q = query.const_data_ptr<T>(), *k = keys.const_data_ptr<T>(), *v = values.const_data_ptr<T>();
  const bool* read = mask.has_value() ? mask->const_data_ptr<bool>() : nullptr;
  const int64_t mask_row = read && mask->size(0) > 1 ? mask->stride(0) : 0, mask_place = read ? mask->stride(3) : 0;
  const int64_t room = (length + kLanes - 1) / kLanes * kLanes;
  T* to = out.mutable_data_ptr<T>();
  at::parallel_for(0, query.size(0) * sets, 1, [&](int64_t first, int64_t end) {
    std::vector<float> shares(kHeadsTogether * room);
    for (int64_t n = first; n < end; n++) {
      const int64_t row = n / sets, set = n % sets;
      const T *keys_of = k + row * ks[0] + set * ks[1], *values_of = v + row * vs[0] + set * vs[1];
      const bool* read_of = read ? read + row * mask_row : nullptr;
      // Keys and values are met once a token, so they come from afar: the next are sent for while these are read.
      const T* next_keys = n + 1 < end ? k + (n + 1) / sets * ks[0] + (n + 1) % sets * ks[1] : keys_of;
      for (int64_t head = set * group; head < (set + 1) * group; head += kHeadsTogether) {
        const int64_t together = std::min(kHeadsTogether, (set + 1) * group - head);
        const T* asking[kHeadsTogether];
        for (int64_t h = 0; h < together; h++) asking[h] = q + row * qs[0] + (head + h) * qs[1];
        T* here = to + (row * heads + head) * kWidth;
        const auto attending = [&](auto count) {
          attend_together<T, kWidth, count()>(asking, keys_of, ks[2], values_of, vs[2], next_keys, length, read_of,
                                              mask_place, float(scaling), shares.data(), room, here);
        };
        switch (together) {
          case 1:
            attending(std::integral_constant<int, 1>());
            break;
          case 2:
            attending(std::integral_constant<int, 2>());
            break;
          case 3:
            attending(std::integral_constant<int, 3>());
            break;
          default:
            attending(std::integral_constant<int, 4>());
        }
      }
    }
  });
}

template <typename T>
void attend_by_width(const Tensor& query, const Tensor& keys, const Tensor& values, const std::optional<Tensor>& mask,
                     double scaling, Tensor& out) {
  switch (query.size(3)) {
    case 16:
      return attend<T, 16>(query, keys, values, mask, scaling, out);
    case 32:
      return attend<T, 32>(query, keys, values, mask, scaling, out);
    case 48:
      return attend<T, 48>(query, keys, values, mask, scaling, out);
    case 64:
      return attend<T, 64>(query, keys, values, mask, scaling, out);
    case 80:
      return attend<T, 80>(query, keys, values, mask, scaling, out);
    case 96:
      return attend<T, 96>(query, keys, values, mask, scaling, out);
    case 128:
      return attend<T, 128>(query, keys, values, mask, scaling, out);
    default:
      TORCH_CHECK(false, "heads of width ", query.size(3), " are not among those that this was compiled for");
  }
}

// [B, 1, heads, D] of queries [B, heads, 1, D] to keys and values [B, key heads, S, D], where the mask [1 or B, 1, 1,
// S] is true or there is none.
Tensor attend_one(const Tensor& query, const Tensor& keys, const Tensor& values, const std::optional<Tensor>& mask,
                  double scaling) {
  Tensor out = at::empty({query.size(0), 1, query.size(1), values.size(3)}, query.options());
  const Tensor q = with_numbers_in_line(query), k = with_numbers_in_line(keys), v = with_numbers_in_line(values);
  if (query.scalar_type() == at::kFloat) attend_by_width<float>(q, k, v, mask, scaling, out);
  else attend_by_width<BFloat16>(q, k, v, mask, scaling, out);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tandem_cpu, library) {
  library.def("attend_one(Tensor query, Tensor keys, Tensor values, Tensor? mask, float scaling) -> Tensor");
  library.def("rotate(Tensor heads, Tensor cos, Tensor sin, bool back) -> Tensor");
  library.def("attend_texts(Tensor query, Tensor key, Tensor value, float scaling) -> (Tensor, Tensor)");
  library.def(
      "attend_texts_gradients(Tensor upstream, Tensor query, Tensor key, Tensor value, Tensor out, "
      "Tensor normalizers, float scaling) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(tandem_cpu, CPU, library) {
  library.impl("attend_one", &attend_one);
  library.impl("rotate", &rotate);
  library.impl("attend_texts", &attend_texts);
  library.impl("attend_texts_gradients", &attend_texts_gradients);
}
