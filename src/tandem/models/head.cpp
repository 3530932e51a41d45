// A policy's log-probabilities and their gradients, by products with its head whose logits are read while they are
// made. Built and described by kernels.py.
//
// Logits lie as squares [V / 32, N / 32, 32 of V, 32 of N]: a vector holds one token's of many rows, so that what is
// summed over the vocabulary is summed lane by lane. While the matrix units multiply one square, the vector units read
// the square before it.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "tiles.h"

namespace {

using namespace tandem;

#ifdef TANDEM_HAS_MATRIX_UNITS

// The states' gradient is summed for so many squares of rows at a time, over so many squares of the vocabulary in turn,
// that both stay in the cache.
constexpr int64_t kSquaresOfRows = 16, kSquaresOfTokens = 8;

// Where each row's target is, in the order in which the squares of logits are walked through.
struct Place {
  int64_t square, token, row;
};

std::vector<Place> places_of(const Tensor& targets) {
  const int64_t* target = targets.const_data_ptr<int64_t>();
  const int64_t count = targets.size(0), across = squares_of(count);
  std::vector<Place> places(count);
  for (int64_t n = 0; n < count; n++)
    places[n] = {target[n] / kDepth * across + n / kDepth, target[n] % kDepth, n % kDepth};
  std::sort(places.begin(), places.end(), [](const Place& a, const Place& b) { return a.square < b.square; });
  return places;
}

std::vector<Place>::const_iterator first_place(const std::vector<Place>& places, int64_t square) {
  return std::lower_bound(places.begin(), places.end(), square,
                          [](const Place& place, int64_t from) { return place.square < from; });
}

// Reads a square of logits in 64 strides: 32 in which one token's are rounded, and 32 in which they are added to the
// rows' sums of exponentials.
class Reading {
 public:
  // `kept` is where the rounded logits go, if anywhere; `greatest` and `sum` are so far those of the 32 rows.
  void begin(const float* sums, BFloat16* kept, float* greatest, float* sum) {
    sums_ = sums, kept_ = kept, greatest_ = greatest, sum_ = sum, done_ = 0;
    low_greatest_ = Vec::loadu(greatest), high_greatest_ = Vec::loadu(greatest + kTile);
  }

  void advance(int64_t strides) {
    const int64_t end = std::min(done_ + strides, 2 * kDepth), middle = std::min(end, kDepth);
    for (; done_ < middle; done_++) {
      const __m512i row = rounded_row(sums_, done_);
      _mm512_store_si512(rows_ + done_ * kDepth, row);
      if (kept_) _mm512_stream_si512(reinterpret_cast<__m512i*>(kept_ + done_ * kDepth), row);
      low_greatest_ = at::vec::maximum(low_greatest_, low(row));
      high_greatest_ = at::vec::maximum(high_greatest_, high(row));
      if (done_ == kDepth - 1) raise_greatest();
    }
    Vec low_sum = low_sum_, high_sum = high_sum_;
    for (; done_ < end; done_++) {
      const __m512i row = _mm512_load_si512(rows_ + (done_ - kDepth) * kDepth);
      low_sum = low_sum + exp_of_difference(low(row), low_bits_);
      high_sum = high_sum + exp_of_difference(high(row), high_bits_);
    }
    low_sum_ = low_sum, high_sum_ = high_sum;
  }

  void end() {
    advance(2 * kDepth);
    add(low_greatest_, low_sum_, greatest_, sum_);
    add(high_greatest_, high_sum_, greatest_ + kTile, sum_ + kTile);
  }

  float at(int64_t token, int64_t row) const { return rows_[token * kDepth + row]; }

 private:
  void raise_greatest() {
    low_bits_ = low_greatest_ * Vec(kLog2E), high_bits_ = high_greatest_ * Vec(kLog2E);
    low_sum_ = high_sum_ = Vec(0.f);
  }

  static void add(Vec greatest, Vec sum, float* before, float* sum_before) {
    (Vec::loadu(sum_before) * power_of_two((Vec::loadu(before) - greatest) * Vec(kLog2E)) + sum).store(sum_before);
    greatest.store(before);
  }

  const float* sums_;
  BFloat16* kept_;
  float *greatest_, *sum_;
  int64_t done_ = 2 * kDepth;
  Vec low_greatest_, high_greatest_, low_bits_, high_bits_, low_sum_, high_sum_;
  alignas(64) BFloat16 rows_[kSquare];
};

// Of states [N, H], a head [V, H] and targets [N]: log-probabilities [N], log sum exp of the logits [N], and the logits
// in squares if they are to be kept.
std::tuple<Tensor, Tensor, Tensor> head_logprobs(const Tensor& given, const Tensor& weight, const Tensor& targets,
                                                 bool keep) {
  const Tensor states = given.contiguous();
  const int64_t count = states.size(0), width = states.size(1), across = squares_of(count), steps = width / kDepth;
  const int64_t down = weight.size(0) / kDepth, padded = across * kDepth, parts = at::get_num_threads();
  const Tensor laid_out = at::empty({padded * width}, states.options());
  BFloat16* x = laid_out.mutable_data_ptr<BFloat16>();
  const BFloat16 *given_rows = states.const_data_ptr<BFloat16>(), *w = weight.const_data_ptr<BFloat16>();
  at::parallel_for(0, across, 1, [&](int64_t first, int64_t end) {
    for (int64_t n = first; n < end; n++)
      lay_down(given_rows + n * kDepth * width, count - n * kDepth, width, x + n * kDepth * width);
  });
  Tensor logits = at::empty({keep ? down * across * kSquare : 0}, states.options());
  BFloat16* kept = keep ? logits.mutable_data_ptr<BFloat16>() : nullptr;
  const auto numbers = states.options().dtype(at::kFloat);
  Tensor logprobs = at::empty({count}, numbers), normalizers = at::empty({count}, numbers);
  const std::vector<Place> places = places_of(targets);
  std::vector<float> greatest(parts * padded, std::numeric_limits<float>::lowest()), sums(parts * padded, 0.f);
  std::vector<float> chosen(padded);
  at::parallel_for(0, parts, 1, [&](int64_t first_part, int64_t end_part) {
    const Tiles tiles;
    alignas(64) float square[2][4 * kTileSums];
    Reading reading;
    for (int64_t part = first_part; part < end_part; part++) {
      const int64_t first = part * down / parts * across, end = (part + 1) * down / parts * across;
      auto place = first_place(places, first);
      const auto finish = [&](int64_t n) {
        reading.end();
        for (; place != places.end() && place->square == n; place++)
          chosen[n % across * kDepth + place->row] = reading.at(place->token, place->row);
      };
      for (int64_t n = first; n < end; n++) {
        const BFloat16 *rows = w + n / across * kDepth * width, *columns = x + n % across * kDepth * width;
        clear_square();
        for (int64_t k = 0; k < steps; k++, columns += kSquare) {
          fetch_ahead<3>(columns + 2 * kSquare, kSquare);
          add_to_square(rows + k * kDepth, 2 * width, kTile * width, columns, kTileNumbers);
          reading.advance((2 * kDepth + steps - 1) / steps);
        }
        if (n > first) finish(n - 1);
        store_square(square[n % 2]);
        const int64_t of_rows = part * padded + n % across * kDepth;
        reading.begin(square[n % 2], keep ? kept + n * kSquare : nullptr, &greatest[of_rows], &sums[of_rows]);
      }
      if (first < end) finish(end - 1);
      // What was streamed past the caches is seen by other threads from here on.
      _mm_sfence();
    }
  });
  float *of_target = logprobs.mutable_data_ptr<float>(), *of_all = normalizers.mutable_data_ptr<float>();
  for (int64_t n = 0; n < count; n++) {
    float most = greatest[n], sum = 0;
    for (int64_t part = 1; part < parts; part++) most = std::max(most, greatest[part * padded + n]);
    for (int64_t part = 0; part < parts; part++)
      sum += sums[part * padded + n] * std::exp(greatest[part * padded + n] - most);
    of_target[n] = (chosen[n] - most) - std::log(sum);
    of_all[n] = most + std::log(sum);
  }
  return {logprobs, normalizers, logits};
}

// What the logits' gradient is made of, for whole squares of rows; those that are not there have none.
struct Slopes {
  std::vector<float> bits, factors, at_target;

  Slopes(const Tensor& logprobs, const Tensor& of_all, const Tensor& upstream) {
    const int64_t count = logprobs.size(0), padded = squares_of(count) * kDepth;
    bits.resize(padded), factors.resize(padded), at_target.resize(padded);
    const float *logprob = logprobs.const_data_ptr<float>(), *normalizer = of_all.const_data_ptr<float>();
    const float* factor = upstream.const_data_ptr<float>();
    for (int64_t n = 0; n < count; n++) {
      bits[n] = normalizer[n] * kLog2E, factors[n] = -factor[n];
      // Where p is nearly one, 1 - p of two rounded numbers would be nothing but rounding.
      at_target[n] = -factor[n] * std::expm1(logprob[n]);
    }
  }

  // Of 32 rows' logits of one token, two vectors.
  std::pair<Vec, Vec> of(const BFloat16* logits, int64_t rows) const {
    const __m512i z = _mm512_loadu_si512(logits);
    const auto half = [&](Vec numbers, int64_t from) {
      return exp_of_difference(numbers, Vec::loadu(&bits[from])) * Vec::loadu(&factors[from]);
    };
    return {half(low(z), rows), half(high(z), rows + kTile)};
  }
};

// Slopes of some squares of rows as the side across of a product, pairs of tokens beside each other: for a group of
// `tokens` squares of the vocabulary from `group` on, [squares of rows][2][tokens][16 pairs of tokens][16 rows][2].
struct WovenSlopes {
  const Slopes& slopes;
  const BFloat16* logits;
  const int64_t* targets;
  // Squares and rows there are in all, and the squares that are woven.
  int64_t across, count, first, squares;

  int64_t strides(int64_t tokens) const { return squares * tokens * kTile; }

  void weave(int64_t group, int64_t tokens, int64_t stride, BFloat16* to) const {
    const int64_t pair = stride % kTile, token = stride / kTile % tokens, n = stride / kTile / tokens;
    const BFloat16* from = logits + ((group + token) * across + first + n) * kSquare + 2 * pair * kDepth;
    const auto [low_even, high_even] = slopes.of(from, (first + n) * kDepth);
    const auto [low_odd, high_odd] = slopes.of(from + kDepth, (first + n) * kDepth);
    BFloat16* here = to + (2 * n * tokens + token) * kTileNumbers + pair * kDepth;
    store_pairs(low_even, high_even, low_odd, high_odd, here, tokens * kTileNumbers);
  }

  void put_targets(int64_t group, int64_t tokens, BFloat16* to) const {
    for (int64_t row = 0; row < std::min(squares * kDepth, count - first * kDepth); row++) {
      const int64_t token = targets[first * kDepth + row] - group * kDepth;
      if (token < 0 || token >= tokens * kDepth) continue;
      BFloat16* tile = to + (row / kTile * tokens + token / kDepth) * kTileNumbers;
      tile[token % kDepth / 2 * kDepth + row % kTile * 2 + token % 2] = slopes.at_target[first * kDepth + row];
    }
  }
};

// Some squares of the head's rows as the side down of a product: [H / 16][tokens][16 of H][32 tokens].
void turn_head(const BFloat16* rows, int64_t width, int64_t tokens, BFloat16* to) {
  alignas(64) BFloat16 pairs[kSquare];
  for (int64_t token = 0; token < tokens; token++)
    for (int64_t k = 0; k < width / kTile; k += 2) {
      pair_rows(rows + token * kDepth * width + k * kTile, width, kDepth, kDepth, pairs, kTileNumbers);
      for (int64_t half = 0; half < 2; half++)
        turn_pairs(pairs + half * kTileNumbers, kTile, to + ((k + half) * tokens + token) * kTileNumbers);
    }
}

// The gradient of the states [N, H].
Tensor head_states_gradient(const Tensor& logits, const Tensor& weight, const Tensor& targets, const Tensor& logprobs,
                            const Tensor& normalizers, const Tensor& upstream) {
  const int64_t count = targets.size(0), width = weight.size(1), across = squares_of(count);
  const int64_t down = weight.size(0) / kDepth, steps = width / kDepth;
  const Slopes slopes(logprobs, normalizers, upstream);
  const BFloat16 *z = logits.const_data_ptr<BFloat16>(), *w = weight.const_data_ptr<BFloat16>();
  Tensor gradient = at::empty({count, width}, weight.options());
  BFloat16* out = gradient.mutable_data_ptr<BFloat16>();
  const int64_t threads = at::get_num_threads();
  const int64_t a_range = std::max<int64_t>(1, std::min(kSquaresOfRows, (across + threads - 1) / threads));
  at::parallel_for(0, (across + a_range - 1) / a_range, 1, [&](int64_t first_range, int64_t end_range) {
    const Tiles tiles;
    const auto room = [&](int64_t numbers) { return at::empty({numbers}, weight.options()); };
    Tensor woven[2] = {room(kSquaresOfTokens * a_range * kSquare), room(kSquaresOfTokens * a_range * kSquare)};
    Tensor turned = room(kSquaresOfTokens * kDepth * width);
    Tensor sums = at::empty({a_range * kDepth * width}, weight.options().dtype(at::kFloat));
    BFloat16 *slope[2] = {woven[0].mutable_data_ptr<BFloat16>(), woven[1].mutable_data_ptr<BFloat16>()};
    BFloat16* head = turned.mutable_data_ptr<BFloat16>();
    float* sum = sums.mutable_data_ptr<float>();
    const auto tokens_of = [&](int64_t group) { return std::min(kSquaresOfTokens, down - group); };
    for (int64_t range = first_range; range < end_range; range++) {
      const int64_t first = range * a_range, squares = std::min(a_range, across - first);
      const WovenSlopes rows{slopes, z, targets.const_data_ptr<int64_t>(), across, count, first, squares};
      for (int64_t stride = 0; stride < rows.strides(tokens_of(0)); stride++)
        rows.weave(0, tokens_of(0), stride, slope[0]);
      for (int64_t group = 0, turn = 0; group < down; group += kSquaresOfTokens, turn = 1 - turn) {
        const int64_t tokens = tokens_of(group), next = group + kSquaresOfTokens, products = steps * squares * tokens;
        const int64_t ahead = next < down ? rows.strides(tokens_of(next)) : 0, pace = (ahead + products - 1) / products;
        rows.put_targets(group, tokens, slope[turn]);
        turn_head(w + group * kDepth * width, width, tokens, head);
        int64_t stride = 0;
        for (int64_t square = 0; square < steps * squares; square++) {
          const BFloat16* down_side = head + square / squares * 2 * tokens * kTileNumbers;
          const BFloat16* across_side = slope[turn] + square % squares * 2 * tokens * kTileNumbers;
          if (group) load_square(sum + square * kSquare);
          else clear_square();
          for (int64_t token = 0; token < tokens; token++) {
            add_to_square(down_side + token * kTileNumbers, 64, tokens * kTileNumbers,
                          across_side + token * kTileNumbers, tokens * kTileNumbers);
            for (const int64_t end = std::min(stride + pace, ahead); stride < end; stride++)
              rows.weave(next, tokens_of(next), stride, slope[1 - turn]);
          }
          store_square(sum + square * kSquare);
        }
      }
      for (int64_t square = 0; square < steps * squares; square++) {
        const int64_t row = (first + square % squares) * kDepth;
        round_turned(sum + square * kSquare, count - row, kDepth, out + row * width + square / squares * kDepth, width);
      }
    }
  });
  return gradient;
}

// The gradient of the head [V, H].
Tensor head_weight_gradient(const Tensor& logits, const Tensor& given, const Tensor& targets, const Tensor& logprobs,
                            const Tensor& normalizers, const Tensor& upstream, int64_t vocabulary) {
  const Tensor states = given.contiguous();
  const int64_t width = states.size(1), across = squares_of(states.size(0)), steps = width / kDepth;
  const int64_t down = vocabulary / kDepth;
  const Slopes slopes(logprobs, normalizers, upstream);
  const std::vector<Place> places = places_of(targets);
  const BFloat16* z = logits.const_data_ptr<BFloat16>();
  const Tensor laid_out = lay_across(states);
  const BFloat16* x = laid_out.const_data_ptr<BFloat16>();
  Tensor gradient = at::empty({vocabulary, width}, states.options());
  BFloat16* out = gradient.mutable_data_ptr<BFloat16>();
  at::parallel_for(0, down, 1, [&](int64_t first, int64_t end) {
    const Tiles tiles;
    alignas(64) float square[4 * kTileSums];
    Tensor both[2] = {at::empty({across * kSquare}, states.options()), at::empty({across * kSquare}, states.options())};
    BFloat16* slope[2] = {both[0].mutable_data_ptr<BFloat16>(), both[1].mutable_data_ptr<BFloat16>()};
    auto place = first_place(places, first * across);
    // Stride n is token n % 32 of the square n / 32 of rows.
    const auto put = [&](int64_t v, int64_t stride, BFloat16* to) {
      const auto [low, high] = slopes.of(z + v * across * kSquare + stride * kDepth, stride / kDepth * kDepth);
      _mm512_store_si512(to + stride * kDepth, rounded(low, high));
    };
    for (int64_t stride = 0; stride < across * kDepth; stride++) put(first, stride, slope[0]);
    for (int64_t v = first, turn = 0; v < end; v++, turn = 1 - turn) {
      for (; place != places.end() && place->square < (v + 1) * across; place++) {
        const int64_t n = place->square - v * across;
        slope[turn][n * kSquare + place->token * kDepth + place->row] = slopes.at_target[n * kDepth + place->row];
      }
      const int64_t ahead = v + 1 < end ? across * kDepth : 0, pace = (kDepth + steps - 1) / steps;
      int64_t stride = 0;
      const BFloat16* rows = x;
      for (int64_t k = 0; k < steps; k++) {
        clear_square();
        for (int64_t n = 0; n < across; n++, rows += kSquare) {
          fetch_ahead<3>(rows + 2 * kSquare, kSquare);
          add_to_square(slope[turn] + n * kSquare, 64, kTileNumbers, rows, kTileNumbers);
          for (const int64_t stop = std::min(stride + pace, ahead); stride < stop; stride++)
            put(v + 1, stride, slope[1 - turn]);
        }
        store_square(square);
        for (int64_t i = 0; i < kDepth; i++)
          _mm512_storeu_si512(out + (v * kDepth + i) * width + k * kDepth, rounded_row(square, i));
      }
    }
  });
  return gradient;
}

#else

std::tuple<Tensor, Tensor, Tensor> head_logprobs(const Tensor&, const Tensor&, const Tensor&, bool) {
  TORCH_CHECK(false, "there are no matrix units for bfloat16");
}

Tensor head_states_gradient(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&) {
  TORCH_CHECK(false, "there are no matrix units for bfloat16");
}

Tensor head_weight_gradient(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                            int64_t) {
  TORCH_CHECK(false, "there are no matrix units for bfloat16");
}

#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(tandem_cpu, library) {
  library.def("head_logprobs(Tensor states, Tensor weight, Tensor targets, bool keep) -> (Tensor, Tensor, Tensor)");
  library.def("head_states_gradient(Tensor logits, Tensor weight, Tensor targets, Tensor logprobs, Tensor normalizers, "
              "Tensor upstream) -> Tensor");
  library.def("head_weight_gradient(Tensor logits, Tensor states, Tensor targets, Tensor logprobs, Tensor normalizers, "
              "Tensor upstream, int vocabulary) -> Tensor");
}

TORCH_LIBRARY_IMPL(tandem_cpu, CPU, library) {
  library.impl("head_logprobs", &head_logprobs);
  library.impl("head_states_gradient", &head_states_gradient);
  library.impl("head_weight_gradient", &head_weight_gradient);
}
