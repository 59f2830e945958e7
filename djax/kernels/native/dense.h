// One product of a matrix of few rows with one of weights, times a scale for each output where the weights are int8.
//
// Letters: M rows, K what is summed over, N outputs.

#pragma once

#include "tile.h"

namespace djax {

// Rows that a thread takes at a time of one panel.
constexpr int64_t kMostDenseRows = 512;

// x [M, K], w [K, N], scale [N] or null, y [M, N], in row-major order.
template <typename X, typename W, typename Y>
void multiply_dense(ffi::ThreadPool& pool, const X* x, const W* w, const float* scale, Y* y, int64_t M, int64_t K, int64_t N) {
  if (!M || !N) return;
  const Room<4> room(std::is_same_v<X, float> ? 0 : M * K);
  const float* inputs = widened(x, M * K, room);
  const int64_t panels = N / kPanel, threads = pool.num_threads();
  // Where there are few panels, rows are dealt out, too, but in whole tiles.
  const int64_t wanted = std::max((M + kMostDenseRows - 1) / kMostDenseRows, (4 * threads + panels - 1) / panels);
  const int64_t tiles = (M + kRows - 1) / kRows, parts = std::min(wanted, tiles), total = panels * parts;
  auto columns_of = [&](int64_t i, const W** columns) {
    for (int c = 0; c < kColumns; ++c) columns[c] = w + i / parts * kPanel + c * kLanes;
  };
  const Phase columns{total, [&](int64_t i) {
    const W *now[kColumns], *next[kColumns + 1];
    columns_of(i, now);
    columns_of(std::min(i + threads, total - 1), next);
    next[kColumns] = nullptr;
    const int64_t part = i % parts, column = i / parts * kPanel;
    const int64_t first = tiles * part / parts * kRows, end = std::min(tiles * (part + 1) / parts * kRows, M);
    auto row = [&](int64_t r) { return inputs + (first + r) * K; };
    product<kColumns>(end - first, row, 1, K, now, N, scratch<0>(K * kPanel), next, [&](int64_t r, auto& sums) {
      for (int c = 0; c < kColumns; ++c) {
        const int64_t at = column + c * kLanes;
        store(y + (first + r) * N + at, scale ? sums[c] * load(scale + at) : sums[c]);
      }
    });
  }};
  in_parallel(pool, {columns});
}

template <typename X, typename W>
ffi::Error dense(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::AnyBuffer scale,
                 ffi::Result<ffi::AnyBuffer> y) {
  if (x.dimensions().size() != 2 || w.dimensions().size() != 2)
    return ffi::Error::InvalidArgument("expected x [M, K] and w [K, N]");
  const int64_t M = x.dimensions()[0], K = x.dimensions()[1], N = w.dimensions()[1];
  const bool scaled = std::is_same_v<W, int8_t>;
  const bool wide = y->element_type() == ffi::F32;
  if (!is<X>(x, {M, K}) || !is<W>(w, {K, N}) || !is<float>(scale, {scaled ? N : 0}) ||
      !(wide ? is<float>(*y, {M, N}) : is<X>(*y, {M, N})))
    return ffi::Error::InvalidArgument("expected x [M, K], w [K, N], y [M, N], for int8 a scale [N]");
  if (N % kWhole || K % (kWhole / 4)) return ffi::Error::InvalidArgument("expected N in whole multiples of 64, K of 16");
  const float* scales = scaled ? data<float>(scale) : nullptr;
  if (wide)
    multiply_dense(pool, data<X>(x), data<W>(w), scales, data<float>(*y), M, K, N);
  else
    multiply_dense(pool, data<X>(x), data<W>(w), scales, data<X>(*y), M, K, N);
  return ffi::Error::Success();
}

}  // namespace djax
