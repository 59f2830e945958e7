// Attention of a window over the cached and its own positions that each query sees, from the projection's output on.
//
// Letters: B rows of a batch, W window, L canvas, G key/value heads, R queries a key/value head, K head width. Queries of a head
// lie side by side as columns, (w, r) at w * R + r, so that a softmax runs down a column and keys are read where they lie.

#pragma once

#include <cmath>

#include "tile.h"

namespace djax {

// The arrays of a call, in row-major order: qkv [B, W, G, R + 2, K]; q_norm and k_norm [K] or null; cos and sin [B, W, K / 2];
// rank [B, W]; context, copy and own [B, W] or null; cached_k and cached_v [B, G, L, K]; cached_rank [B, L]; out
// [B, W, G * R, K]; k and v [B, G, W, K]. What rank, context, copy and own mean is in models/sight.py.
template <typename X>
struct Attention {
  const X* qkv;
  const X* q_norm;
  const X* k_norm;
  const float* cos;
  const float* sin;
  const int32_t* rank;
  const int32_t* context;
  const int32_t* copy;
  const int32_t* own;
  const X* cached_k;
  const X* cached_v;
  const int32_t* cached_rank;
  X* out;
  X* k;
  X* v;
  int64_t batch, window, groups, per_group, width, length;
  float eps;

  static constexpr int32_t kHidden = 1 << 30;

  // What of the cache, and then of the window, some query of a row sees; and whether some other query does not.
  struct Seen {
    std::vector<int64_t> cached, fresh;
    bool cached_differs = false, fresh_differs = false;
    int64_t count() const { return cached.size() + fresh.size(); }
  };

  Seen find_seen(int64_t b) const {
    int32_t lowest = kHidden, highest = kHidden, furthest = kHidden;
    if (context) {
      const auto [low, high] = std::minmax_element(context + b * window, context + (b + 1) * window);
      lowest = *low, highest = *high;
    }
    if (copy) furthest = own ? std::max(highest, *std::max_element(own + b * window, own + (b + 1) * window)) : kHidden;
    else furthest = highest;
    Seen seen;
    for (int64_t l = 0; l < length; ++l) {
      const int32_t one = cached_rank[b * length + l];
      if (one >= highest) continue;
      seen.cached.push_back(l);
      seen.cached_differs |= one >= lowest;
    }
    for (int64_t w = 0; w < window; ++w) {
      const int32_t one = rank[b * window + w];
      if (one >= furthest) continue;
      seen.fresh.push_back(w);
      seen.fresh_differs |= copy || one >= lowest;
    }
    return seen;
  }

  void run(ffi::ThreadPool& pool) const {
    std::vector<Seen> seen;
    for (int64_t b = 0; b < batch; ++b) seen.push_back(find_seen(b));
    const int64_t columns = window * per_group, panels = (columns + kPanel - 1) / kPanel;
    const int64_t size = panels * width * kPanel;
    const Room<4> room(batch * groups * size);
    float* queries = room.get();
    const Phase heads{batch * groups, [&](int64_t i) { prepare(i / groups, i % groups, &queries[i * size], size); }};
    const Phase attended{batch * groups * panels, [&](int64_t i) {
                           const int64_t b = i / panels / groups, g = i / panels % groups, first = i % panels * kPanel;
                           const int64_t count = std::min<int64_t>(kPanel, columns - first);
                           attend(b, g, seen[b], &queries[i * width * kPanel], first, count);
                         }};
    in_parallel(pool, {heads, attended});
  }

  // Normalise and rotate a head: its keys and values as they are kept, its queries as panels of columns.
  void prepare(int64_t b, int64_t g, float* queries, int64_t size) const {
    std::fill(queries, queries + size, 0.0f);
    float* one = scratch<1>(width);
    for (int64_t w = 0; w < window; ++w) {
      const X* from = qkv + ((b * window + w) * groups + g) * (per_group + 2) * width;
      const int64_t to = ((b * groups + g) * window + w) * width;
      for (int64_t r = 0; r < per_group; ++r) {
        rotated(from + r * width, q_norm, b * window + w, one);
        const int64_t column = w * per_group + r;
        float* panel = queries + column / kPanel * width * kPanel + column % kPanel;
        for (int64_t i = 0; i < width; ++i) panel[i * kPanel] = one[i];
      }
      rotated(from + per_group * width, k_norm, b * window + w, one);
      for (int64_t i = 0; i < width; i += kLanes) store(k + to + i, load(one + i));
      std::memcpy(static_cast<void*>(v + to), from + (per_group + 1) * width, width * sizeof(X));
    }
  }

  void rotated(const X* from, const X* norm, int64_t position, float* to) const {
    float scale = 1;
    if (norm) {
      Floats squares{};
      for (int64_t i = 0; i < width; i += kLanes) squares += load(from + i) * load(from + i);
      float sum = 0;
      for (int n = 0; n < kLanes; ++n) sum += squares[n];
      scale = 1 / std::sqrt(sum / width + eps);
    }
    const int64_t half = width / 2;
    const float* c = cos + position * half;
    const float* s = sin + position * half;
    for (int64_t i = 0; i < half; i += kLanes) {
      Floats low = load(from + i) * scale, high = load(from + half + i) * scale;
      if (norm) low *= load(norm + i), high *= load(norm + half + i);
      store(to + i, low * load(c + i) - high * load(s + i));
      store(to + half + i, high * load(c + i) + low * load(s + i));
    }
  }

  // A panel of a head's queries, `count` columns from `first` on, against all they see.
  void attend(int64_t b, int64_t g, const Seen& seen, const float* queries, int64_t first, int64_t count) const {
    const int64_t keys = seen.count(), old = seen.cached.size(), head = b * groups + g;
    auto row = [&](const X* cached, const X* fresh, int64_t n) {
      return n < old ? cached + (head * length + seen.cached[n]) * width : fresh + (head * window + seen.fresh[n - old]) * width;
    };
    const float scale = 1 / std::sqrt(static_cast<float>(width));
    const bool differs = seen.cached_differs || seen.fresh_differs;
    Ints limit[kColumns], own_limit[kColumns], own_copy[kColumns];
    for (int n = 0; differs && n < kPanel; ++n) {
      const int64_t w = std::min(first + n, window * per_group - 1) / per_group + b * window;
      limit[n / kLanes][n % kLanes] = context ? context[w] : kHidden;
      own_limit[n / kLanes][n % kLanes] = own ? own[w] : kHidden;
      own_copy[n / kLanes][n % kLanes] = copy ? copy[w] : 0;
    }
    // Whether a column's query sees a key: lanes of all ones or zeros.
    auto sees = [&](int64_t n, int c) -> Ints {
      if (n < old) return Ints{} + cached_rank[b * length + seen.cached[n]] < limit[c];
      const int64_t w = b * window + seen.fresh[n - old];
      const Ints shared = Ints{} + rank[w] < limit[c];
      if (!copy) return shared;
      const Ints mine = (own_copy[c] == Ints{} + copy[w]) & (Ints{} + rank[w] < own_limit[c]);
      return copy[w] == 0 ? shared | mine : mine;
    };
    // Scores, and weights in their place: a key's for all columns, one key after another.
    float* weights = scratch<1>(keys * kPanel);
    float* wide = scratch<2>(kRows * width);
    Floats top[kColumns], total[kColumns];
    for (int c = 0; c < kColumns; ++c) top[c] = Floats{} - 1e30f, total[c] = Floats{};
    auto key = [&](int64_t n) {
      const X* there = row(cached_k, k, n);
      // Its value is read soon after, and later keys sooner.
      const X* value = row(cached_v, v, n);
      const X* later = row(cached_k, k, std::min(n + kAhead, keys - 1));
      for (int64_t i = 0; i < width; i += kLanes) __builtin_prefetch(value + i), __builtin_prefetch(later + i);
      if constexpr (std::is_same_v<X, float>) {
        return there;
      } else {
        // A tile's rows are consecutive, and there are no more of them.
        float* to = wide + n % kRows * width;
        widen(there, width, to);
        return static_cast<const float*>(to);
      }
    };
    packed_product<kColumns>(keys, key, 1, width, queries, [&](int64_t n, Floats(&sums)[kColumns]) {
      for (int c = 0; c < kColumns; ++c) {
        Floats score = sums[c] * scale;
        if (n < old ? seen.cached_differs : seen.fresh_differs) score = sees(n, c) ? score : Floats{} - 1e30f;
        top[c] = score > top[c] ? score : top[c];
        store(weights + n * kPanel + c * kLanes, score);
      }
    });
    for (int64_t n = 0; n < keys; ++n) {
      for (int c = 0; c < kColumns; ++c) {
        float* at = weights + n * kPanel + c * kLanes;
        const Floats below = load(at) - top[c];
        const Floats weight = below < -87.0f ? Floats{} : exponential(below);
        total[c] += weight;
        store(at, weight);
      }
    }
    const int64_t registers = width / kLanes;
    if (registers % kColumns == 0) {
      for (int64_t c = 0; c < registers; c += kColumns) sum<kColumns>(b, g, keys, row, weights, total, first, count, c * kLanes);
    } else {
      for (int64_t c = 0; c < registers; c += 2) sum<2>(b, g, keys, row, weights, total, first, count, c * kLanes);
    }
  }

  // C registers of features of the weighted sums of values.
  template <int C, typename Row>
  void sum(int64_t b, int64_t g, int64_t keys, Row row, const float* weights, const Floats* total, int64_t first,
           int64_t count, int64_t feature) const {
    float* values = scratch<3>(keys * C * kLanes);
    for (int64_t n = 0; n < keys; ++n) widen(row(cached_v, v, n) + feature, C * kLanes, values + n * C * kLanes);
    auto column = [&](int64_t n) { return weights + n; };
    packed_product<C>(count, column, kPanel, keys, values, [&](int64_t n, Floats(&sums)[C]) {
      const int64_t w = (first + n) / per_group, r = (first + n) % per_group;
      X* to = out + ((b * window + w) * groups * per_group + g * per_group + r) * width + feature;
      const float all = total[n / kLanes][n % kLanes];
      for (int c = 0; c < C; ++c) store(to + c * kLanes, all == 0 ? Floats{} : sums[c] / all);
    });
  }
};

template <typename X>
ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer qkv, ffi::AnyBuffer q_norm, ffi::AnyBuffer k_norm,
                     ffi::AnyBuffer cos, ffi::AnyBuffer sin, ffi::AnyBuffer rank, ffi::AnyBuffer context, ffi::AnyBuffer copy,
                     ffi::AnyBuffer own, ffi::AnyBuffer cached_k, ffi::AnyBuffer cached_v, ffi::AnyBuffer cached_rank,
                     ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> k, ffi::Result<ffi::AnyBuffer> v,
                     float eps) {
  if (qkv.dimensions().size() != 5 || cached_rank.dimensions().size() != 2 || q_norm.dimensions().size() != 1 ||
      context.dimensions().size() != 2 || copy.dimensions().size() != 2 || own.dimensions().size() != 2)
    return ffi::Error::InvalidArgument("expected qkv [B, W, G, R + 2, K], cached_rank [B, L], norms [K], sight [B, W]");
  auto sizes = qkv.dimensions();
  const int64_t B = sizes[0], W = sizes[1], G = sizes[2], R = sizes[3] - 2, K = sizes[4], L = cached_rank.dimensions()[1];
  const int64_t N = q_norm.dimensions()[0];
  const int64_t C = context.dimensions()[1], D = copy.dimensions()[1], O = own.dimensions()[1];
  if (!is<X>(qkv, {B, W, G, R + 2, K}) || !is<X>(q_norm, {N}) || !is<X>(k_norm, {N}) || (N && N != K) ||
      !is<float>(cos, {B, W, K / 2}) || !is<float>(sin, {B, W, K / 2}) || !is<int32_t>(rank, {B, W}) ||
      !is<X>(cached_k, {B, G, L * K}) || !is<X>(cached_v, {B, G, L * K}) || !is<int32_t>(cached_rank, {B, L}) ||
      !is<int32_t>(context, {B, C}) || (C && C != W) || !is<int32_t>(copy, {B, D}) || (D && D != W) ||
      !is<int32_t>(own, {B, O}) || (O && O != W) || !is<X>(*out, {B, W, G * R, K}) || !is<X>(*k, {B, G, W * K}) ||
      !is<X>(*v, {B, G, W * K}))
    return ffi::Error::InvalidArgument("expected other shapes or types: see Attention");
  if (K % (kWhole / 2)) return ffi::Error::InvalidArgument("expected K in whole multiples of 32");
  Attention<X>{data<X>(qkv),
               N ? data<X>(q_norm) : nullptr,
               N ? data<X>(k_norm) : nullptr,
               data<float>(cos),
               data<float>(sin),
               data<int32_t>(rank),
               C ? data<int32_t>(context) : nullptr,
               D ? data<int32_t>(copy) : nullptr,
               O ? data<int32_t>(own) : nullptr,
               data<X>(cached_k),
               data<X>(cached_v),
               data<int32_t>(cached_rank),
               data<X>(*out),
               data<X>(*k),
               data<X>(*v),
               B,
               W,
               G,
               R,
               K,
               L,
               eps}
      .run(pool);
  return ffi::Error::Success();
}

}  // namespace djax
