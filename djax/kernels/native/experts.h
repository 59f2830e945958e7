// The chosen experts of each token: out(silu(gate) * up) for the tokens of each expert together, whatever their number; nothing
// is dropped.
//
// Letters: T tokens, D width, E experts, J experts a token, F expert width. A row is a (token, choice) pair.

#pragma once

#include "tile.h"

namespace djax {

// Registers of hidden features a panel: as many again are their gates.
constexpr int kHalf = kColumns / 2;
// F is whole in multiples of this.
constexpr int64_t kWholeHidden = kWhole / 2;
// Rows that one thread takes at a time of one panel of an expert's weights: enough to pay for bringing it near.
constexpr int64_t kMostRows = 96;
// Hidden rows that exist at a time, but for what a part has more.
constexpr int64_t kMostHidden = 16384;

// The arrays of a call, in row-major order: x [T, D], ids [T, J], w_in [E, D, 2F], w_out [E, F, D]; y [T, D], each token's sum
// over its choices, times gates [T, J]; without gates (null) y [T, J, D]. int8 weights are times a scale: in_scale [E, 1, 2F],
// out_scale [E, F, 1]; others have empty ones, [0, 1, 2F] and [0, F, 1].
template <typename X, typename W>
struct Experts {
  const X* x;
  const int32_t* ids;
  const float* gates;
  const W* w_in;
  const W* w_out;
  const float* in_scale;
  const float* out_scale;
  X* y;
  int64_t tokens, choices, experts, width, hidden;

  // Rows of one expert that lie together in `order`. other: an expert of few rows that comes after this one, whose weights are
  // asked for beside the products of this one's many, or -1.
  struct Part {
    int64_t expert, first, count, other;
  };

  bool has_expert(int64_t row) const { return ids[row] >= 0 && ids[row] < experts; }

  void run(ffi::ThreadPool& pool) const {
    const int64_t total = tokens * choices;
    std::vector<int64_t> ends(experts + 1, 0), order(total);
    for (int64_t row = 0; row < total; ++row)
      if (has_expert(row)) ++ends[ids[row] + 1];
    for (int64_t e = 0; e < experts; ++e) ends[e + 1] += ends[e];
    std::vector<int64_t> place(ends.begin(), ends.end() - 1);
    for (int64_t row = 0; row < total; ++row) {
      if (has_expert(row)) {
        order[place[ids[row]]++] = row;
      } else if (!gates) {
        std::memset(static_cast<void*>(y + row * width), 0, width * sizeof(X));
      }
    }
    const Room<4> wide(std::is_same_v<X, float> ? 0 : tokens * width);
    const Room<5> hidden_rows(std::min(total, kMostHidden + kMostRows) * hidden);
    const Room<6> outputs_of_rows(gates ? total * width : 0);
    float* h = hidden_rows.get();
    float* outputs = gates ? outputs_of_rows.get() : nullptr;
    const float* inputs = widened(x, tokens * width, wide);
    std::vector<Part> parts;
    int64_t rows = 0;
    auto compute = [&](bool last) {
      pass(pool, parts, order, inputs, h, outputs, last);
      parts.clear();
      rows = 0;
    };
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t count = ends[e + 1] - ends[e], pieces = (count + kMostRows - 1) / kMostRows;
      for (int64_t p = 0; p < pieces; ++p) {
        const int64_t first = ends[e] + count * p / pieces, end = ends[e] + count * (p + 1) / pieces;
        parts.push_back({e, first, end - first, -1});
        rows += end - first;
        if (rows >= kMostHidden) compute(false);
      }
    }
    compute(true);
  }

  // All hidden rows of some parts, then all their outputs, and after the last of them the tokens' sums. A piece of work is a
  // panel of columns of a part, or a token.
  void pass(ffi::ThreadPool& pool, std::vector<Part>& parts, const std::vector<int64_t>& order, const float* inputs,
            float* h, float* outputs, bool last) const {
    const int64_t begin = parts.empty() ? 0 : parts[0].first, count = parts.size(), threads = pool.num_threads();
    pair(parts);
    const int64_t panels = hidden / (kHalf * kLanes);
    auto in_columns = [&](int64_t expert, int64_t column, const W** columns) {
      for (int c = 0; c < kColumns; ++c)
        columns[c] = w_in + expert * width * 2 * hidden + column + c / kHalf * hidden + c % kHalf * kLanes;
    };
    const Phase in{count * panels, [&](int64_t i) {
      const W *columns[kColumns], *next[2 * kColumns] = {};
      const int64_t soon = std::min(i + threads, count * panels - 1), column = i % panels * kHalf * kLanes;
      const Part& part = parts[i / panels];
      in_columns(part.expert, column, columns);
      in_columns(parts[soon / panels].expert, soon % panels * kHalf * kLanes, next);
      if (part.other >= 0) in_columns(part.other, column, next + kColumns);
      into(part, column, columns, next, order, inputs, h - begin * hidden);
    }};
    const int64_t panels_out = width / kPanel;
    auto out_columns = [&](int64_t expert, int64_t column, const W** columns) {
      for (int c = 0; c < kColumns; ++c) columns[c] = w_out + expert * hidden * width + column + c * kLanes;
    };
    const Phase out{count * panels_out, [&](int64_t i) {
      const W *columns[kColumns], *next[2 * kColumns] = {};
      const int64_t soon = std::min(i + threads, count * panels_out - 1), column = i % panels_out * kPanel;
      const Part& part = parts[i / panels_out];
      out_columns(part.expert, column, columns);
      out_columns(parts[soon / panels_out].expert, soon % panels_out * kPanel, next);
      if (part.other >= 0) out_columns(part.other, column, next + kColumns);
      out_of(part, column, columns, next, order, h - begin * hidden, outputs);
    }};
    const Phase sums{gates && last ? tokens : 0, [&](int64_t t) { sum(t, outputs); }};
    in_parallel(pool, {in, out, sums});
  }

  // Put a part of few rows after each of many, as far as there are.
  static void pair(std::vector<Part>& parts) {
    std::vector<Part> many, few, rest;
    for (const Part& part : parts)
      (part.count > 2 * kColumns * kRows ? many : part.count <= 2 * kRows ? few : rest).push_back(part);
    parts.clear();
    for (size_t i = 0; i < std::max(many.size(), few.size()); ++i) {
      if (i < many.size()) {
        if (i < few.size()) many[i].other = few[i].expert;
        parts.push_back(many[i]);
      }
      if (i < few.size()) parts.push_back(few[i]);
    }
    parts.insert(parts.end(), rest.begin(), rest.end());
  }

  // A panel of hidden features from `column` on: silu(gate) * up, times the second matrix' scale. h: by place in the order.
  void into(const Part& part, int64_t column, const W* const* columns, const W* const* next, const std::vector<int64_t>& order,
            const float* inputs, float* h) const {
    auto row = [&](int64_t r) { return inputs + order[part.first + r] / choices * width; };
    float* copy = scratch<0>(width * kPanel);
    product<kColumns>(part.count, row, 1, width, columns, 2 * hidden, copy, next, [&](int64_t r, auto& sums) {
      for (int c = 0; c < kHalf; ++c) {
        const int64_t feature = column + c * kLanes;
        Floats gate = sums[c], up = sums[kHalf + c];
        if constexpr (std::is_same_v<W, int8_t>) {
          gate *= load(in_scale + part.expert * 2 * hidden + feature);
          up *= load(in_scale + (part.expert * 2 + 1) * hidden + feature);
        }
        Floats value = gate / (exponential(-gate) + 1.0f) * up;
        if constexpr (std::is_same_v<W, int8_t>) value *= load(out_scale + part.expert * hidden + feature);
        store(h + (part.first + r) * hidden + feature, value);
      }
    });
  }

  // A panel of outputs from `column` on.
  void out_of(const Part& part, int64_t column, const W* const* columns, const W* const* next,
              const std::vector<int64_t>& order, const float* h, float* outputs) const {
    auto row = [&](int64_t r) { return h + (part.first + r) * hidden; };
    float* copy = scratch<0>(hidden * kPanel);
    product<kColumns>(part.count, row, 1, hidden, columns, width, copy, next, [&](int64_t r, auto& sums) {
      const int64_t to = order[part.first + r] * width + column;
      for (int c = 0; c < kColumns; ++c) {
        if (outputs)
          store(outputs + to + c * kLanes, sums[c]);
        else
          store(y + to + c * kLanes, sums[c]);
      }
    });
  }

  // A token's choices times their gates, in their order.
  void sum(int64_t token, const float* outputs) const {
    for (int64_t i = 0; i < width; i += kLanes) {
      Floats all{};
      for (int64_t j = 0; j < choices; ++j) {
        const int64_t row = token * choices + j;
        if (has_expert(row)) all += gates[row] * load(outputs + row * width + i);
      }
      store(y + token * width + i, all);
    }
  }
};

template <typename X, typename W>
ffi::Error experts(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer ids, ffi::AnyBuffer gates, ffi::AnyBuffer w_in, ffi::AnyBuffer w_out,
                   ffi::AnyBuffer in_scale, ffi::AnyBuffer out_scale, ffi::Result<ffi::AnyBuffer> y) {
  if (x.dimensions().size() != 2 || ids.dimensions().size() != 2 || gates.dimensions().size() != 2 ||
      w_out.dimensions().size() != 3)
    return ffi::Error::InvalidArgument("expected x [T, D], ids [T, J], gates [T, J] or [0, J], w_out [E, F, D]");
  const int64_t T = x.dimensions()[0], D = x.dimensions()[1], J = ids.dimensions()[1];
  const int64_t E = w_out.dimensions()[0], F = w_out.dimensions()[1];
  const int64_t scales = std::is_same_v<W, int8_t> ? E : 0;
  const bool summed = y->dimensions().size() == 2;
  if (!is<X>(x, {T, D}) || !is<int32_t>(ids, {T, J}) || !is<W>(w_in, {E, D, 2 * F}) || !is<W>(w_out, {E, F, D}) ||
      !is<float>(in_scale, {scales, 1, 2 * F}) || !is<float>(out_scale, {scales, F, 1}) || !is<float>(gates, {summed ? T : 0, J}) || !(summed ? is<X>(*y, {T, D}) : is<X>(*y, {T, J, D})))
    return ffi::Error::InvalidArgument("expected other shapes or types: see Experts");
  if (D % kWhole || F % kWholeHidden) return ffi::Error::InvalidArgument("expected D in whole multiples of 64, F of 32");
  Experts<X, W>{data<X>(x),
                data<int32_t>(ids),
                summed ? data<float>(gates) : nullptr,
                data<W>(w_in),
                data<W>(w_out),
                data<float>(in_scale),
                data<float>(out_scale),
                data<X>(*y),
                T,
                J,
                E,
                D,
                F}
      .run(pool);
  return ffi::Error::Success();
}

}  // namespace djax
