// What decoders ask of a vocabulary: the likeliest token beside the mask, and the sum of all exponentials, in one visit.
//
// Letters: R rows, V vocabulary.

#pragma once

#include <cmath>
#include <limits>

#include "tile.h"

namespace djax {

struct Peak {
  int32_t other;
  float highest, of_mask_id, total;
};

inline Peak peak(const float* logits, int64_t vocab, int64_t mask_id) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  const bool has_mask = mask_id >= 0 && mask_id < vocab;
  const float of_mask_id = has_mask ? logits[mask_id] : kLowest;
  const int64_t mask_at = has_mask ? mask_id / kLanes * kLanes : -1;
  // A lane's highest and where it was first.
  Floats highest = Floats{} + kLowest;
  Ints at{}, here{}, nan{};
  for (int n = 0; n < kLanes; ++n) here[n] = n;
  at = here;
  for (int64_t i = 0; i < vocab; i += kLanes) {
    Floats x = load(logits + i);
    if (i == mask_at) x[mask_id - mask_at] = kLowest;
    const Ints higher = x > highest;
    highest = higher ? x : highest;
    at = higher ? here : at;
    nan |= x != x;
    here += kLanes;
  }
  Peak out{at[0], highest[0], of_mask_id, 0};
  bool any_nan = nan[0];
  for (int n = 1; n < kLanes; ++n) {
    any_nan |= nan[n] != 0;
    if (highest[n] > out.highest || (highest[n] == out.highest && at[n] < out.other)) out.highest = highest[n], out.other = at[n];
  }
  if (any_nan) out.highest = std::numeric_limits<float>::quiet_NaN(), out.other = vocab - 1;
  const float top = any_nan || of_mask_id != of_mask_id ? std::numeric_limits<float>::quiet_NaN()
                                                         : std::max(out.highest, of_mask_id);
  Floats totals{};
  for (int64_t i = 0; i < vocab; i += kLanes) {
    const Floats below = load(logits + i) - top;
    totals += below < -87.0f ? Floats{} : exponential(below);
  }
  for (int n = 0; n < kLanes; ++n) out.total += totals[n];
  return out;
}

// logits [R, V], mask_id scalar; other, highest, of_mask_id, total [R].
inline ffi::Error peaks(ffi::ThreadPool pool, ffi::AnyBuffer logits, ffi::AnyBuffer mask_id, ffi::Result<ffi::AnyBuffer> other,
                        ffi::Result<ffi::AnyBuffer> highest, ffi::Result<ffi::AnyBuffer> of_mask_id,
                        ffi::Result<ffi::AnyBuffer> total) {
  if (logits.dimensions().size() != 2) return ffi::Error::InvalidArgument("expected logits [R, V]");
  const int64_t R = logits.dimensions()[0], V = logits.dimensions()[1];
  if (!is<float>(logits, {R, V}) || !is<int32_t>(mask_id, {}) || !is<int32_t>(*other, {R}) || !is<float>(*highest, {R}) ||
      !is<float>(*of_mask_id, {R}) || !is<float>(*total, {R}) || V % (kWhole / 4) || !V)
    return ffi::Error::InvalidArgument("expected logits [R, V], V a whole multiple of 16, mask_id a scalar, results [R]");
  const Phase rows{R, [&](int64_t row) {
    const Peak p = peak(data<float>(logits) + row * V, V, *data<int32_t>(mask_id));
    data<int32_t>(*other)[row] = p.other;
    data<float>(*highest)[row] = p.highest;
    data<float>(*of_mask_id)[row] = p.of_mask_id;
    data<float>(*total)[row] = p.total;
  }};
  in_parallel(pool, {rows});
  return ffi::Error::Success();
}

}  // namespace djax
