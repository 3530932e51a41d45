// Numbers in float32 vectors, whichever type they lie in.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <limits>

namespace tandem {

using at::BFloat16;
using at::Tensor;
using Vec = at::vec::Vectorized<float>;

constexpr int64_t kLanes = Vec::size();

// Into the nearest cache (3), or the next one (2), from which more can be on its way at once.
template <int kNearness, typename T>
inline void fetch_ahead(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + i, 0, kNearness);
}

inline Vec load(const float* from) { return Vec::loadu(from); }

inline Vec load(const BFloat16* from) {
  Vec found;
  at::vec::load_fp32_from_bf16(from, found);
  return found;
}

// The first `count` of a vector, and minus infinity in the place of the others.
template <typename T>
inline Vec load(const T* from, int64_t count) {
  if (count >= kLanes) return load(from);
  float found[kLanes];
  for (int64_t i = 0; i < kLanes; i++) found[i] = i < count ? float(from[i]) : -std::numeric_limits<float>::infinity();
  return Vec::loadu(found);
}

inline float sum_of(Vec vec) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, vec);
}

inline float greatest_of(Vec vec) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, vec);
}

inline void store(Vec numbers, float* to) { numbers.store(to); }

inline void store(Vec numbers, BFloat16* to) { at::vec::convert_float_bfloat16(numbers, numbers).store(to, kLanes); }

}  // namespace tandem
