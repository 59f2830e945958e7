// Vectors, and the tile of sums in registers that every product here is made of.
//
// Law: a product's sum runs over its axis in order, in one float32 accumulator; so it does not depend, bit for bit, on what is
// computed beside it, nor on the number of threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace djax {

namespace ffi = xla::ffi;

// Floats of a register, and the tile of sums that is kept in registers: rows times registers of columns. Beside it there is
// room for as many registers of weights as it has of columns, and one for a row's value; x86 without AVX has too few.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 6, kColumns = 4;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRows = 6, kColumns = 2;
#else
constexpr int kLanes = 4, kRows = 6, kColumns = 4;
#endif
// Columns of a tile.
constexpr int kPanel = kColumns * kLanes;
// What widths must be whole multiples of, on every machine alike.
constexpr int64_t kWhole = 64;
static_assert(kWhole % kPanel == 0);
// How many rows of a weight matrix ahead memory is asked. A panel's rows lie far apart, which prefetchers do not follow.
constexpr int64_t kAhead = 32;

typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint16_t Shorts __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef int8_t Bytes __attribute__((vector_size(kLanes * sizeof(int8_t))));

struct BFloat16 {
  uint16_t bits;
};

template <typename To, typename From>
inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename To, typename From>
inline To read(const From* p) {
  To out;
  std::memcpy(&out, p, sizeof out);
  return out;
}

inline Floats load(const float* p) { return read<Floats>(p); }
inline Floats load(const BFloat16* p) { return same_bits<Floats>(__builtin_convertvector(read<Shorts>(p), Ints) << 16); }
inline Floats load(const int8_t* p) { return __builtin_convertvector(read<Bytes>(p), Floats); }

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
inline void store(BFloat16* p, Floats v) {
  // To nearest, ties to even. A NaN keeps its upper half, with a bit set so that it stays one.
  Ints bits = same_bits<Ints>(v);
  Ints nan = v != v;
  Ints rounded = bits + 0x7fff + ((bits >> 16) & 1);
  bits = ((nan & (bits | 0x400000)) | (~nan & rounded)) >> 16;
  Shorts out = __builtin_convertvector(bits, Shorts);
  std::memcpy(p, &out, sizeof out);
}

// Whole registers of n values as float32.
template <typename T>
inline void widen(const T* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += kLanes) store(to + i, load(from + i));
}

// e^x within 2 units in the last place, for x where it is a normal number; the nearest such x for all others. NaN stays.
inline Floats exponential(Floats x) {
  const Floats least = Floats{} - 87.0f, most = Floats{} + 88.0f;
  x = x < least ? least : x;
  x = x > most ? most : x;
  // x = n ln 2 + r. Adding and taking away 1.5 * 2^23 rounds to a whole number; ln 2 is in two parts, the first exact when
  // multiplied.
  const Floats n = (x * 1.442695041f + 12582912.0f) - 12582912.0f;
  const Floats r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  // The Taylor series: on |r| <= ln(2) / 2 the first term left out is below 2^-26.
  Floats sum = Floats{} + 1.0f / 5040;
  sum = sum * r + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  return sum * same_bits<Floats>((__builtin_convertvector(n, Ints) + 127) << 23);
}

// How a panel of weights is read by the first tile of rows, and by those after it. The first reads the matrix, whose rows are
// far apart, and leaves a copy that lies together and is float32.
enum Reading : int { kAlone, kFirst, kLater };

template <int value>
using Constant = std::integral_constant<int, value>;

// sums[r][c] = sum over k of rows[r][k * step] * weights[k][column c's register]. soon: what of the next panel's memory is asked
// for meanwhile.
template <int R, int C, int reading, typename W>
inline __attribute__((always_inline)) void multiply(const float* const* rows, int64_t step, int64_t depth,
                                                    const W* const* columns, int64_t stride, float* copy, const W* const* soon, int64_t first_line, int shift,
                                                    Floats (&sums)[R][C]) {
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = Floats{};
  for (int64_t k = 0; k < depth; ++k) {
    Floats w[C];
    for (int c = 0; c < C; ++c) {
      float* here = copy + (k * C + c) * kLanes;
      if constexpr (reading == kLater) {
        w[c] = load(here);
      } else {
        w[c] = load(columns[c] + k * stride);
        __builtin_prefetch(columns[c] + (k + kAhead) * stride);
      }
      if constexpr (reading == kFirst) store(here, w[c]);
    }
    if constexpr (reading == kLater) {
      if (soon) {
        const int64_t line = first_line + (k >> shift);
        __builtin_prefetch(soon[line % C] + line / C * stride);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sums[r][c] += rows[r][k * step] * w[c];
  }
}

// f(rows of a tile, how it reads the panel, its first row) for the tiles of `count` rows; the first two are constants.
// packed: the panel lies together from the start.
template <bool packed, typename F>
inline void for_tiles(int64_t count, F&& f) {
  auto last = [&](auto reading, int64_t first) {
    static_assert(kRows == 6);
    switch (count - first) {
      case 1: return f(Constant<1>(), reading, first);
      case 2: return f(Constant<2>(), reading, first);
      case 3: return f(Constant<3>(), reading, first);
      case 4: return f(Constant<4>(), reading, first);
      case 5: return f(Constant<5>(), reading, first);
      case 6: return f(Constant<6>(), reading, first);
    }
  };
  int64_t first = 0;
  if constexpr (!packed) {
    if (count <= kRows) return last(Constant<kAlone>(), 0);
    f(Constant<kRows>(), Constant<kFirst>(), 0);
    first = kRows;
  }
  for (; count - first > kRows; first += kRows) f(Constant<kRows>(), Constant<kLater>(), first);
  last(Constant<kLater>(), first);
}

// A panel of a product: put(row, its sums) for `count` rows. rows_of: row -> where its values begin, which are `step` apart.
// columns: where each register's weights begin, which are `stride` apart. copy: room for the panel. next: the columns of the
// panel that this thread is likely to take next; and of another that it takes later, whose few rows would not hide how long it
// takes to come, or null.
template <int C, bool packed = false, typename W, typename Rows, typename Put>
inline void product(int64_t count, Rows rows_of, int64_t step, int64_t depth, const W* const* columns, int64_t stride,
                    float* copy, const W* const* next, Put put) {
  const int64_t later = (count - 1) / kRows, wanted = packed ? 0 : next[C] ? 2 * C : C;
  const int shift = later >= 4 * wanted ? 2 : later >= 2 * wanted ? 1 : 0;
  for_tiles<packed>(count, [&](auto tile, auto reading, int64_t first) {
    constexpr int R = decltype(tile)::value;
    const float* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = rows_of(first + r);
    // Lines of the next panel come while the tiles' products keep the thread busy.
    const int64_t first_line = (first / kRows - 1) * (depth >> shift);
    const bool other = first_line >= C * depth;
    const W* const* soon = packed || first_line >= wanted * depth ? nullptr : other ? next + C : next;
    Floats sums[R][C];
    multiply<R, C, decltype(reading)::value>(rows, step, depth, columns, stride, copy, soon, other ? first_line - C * depth : first_line, shift, sums);
    for (int r = 0; r < R; ++r) put(first + r, sums[r]);
  });
}

// The same with a panel of floats that lies together.
template <int C, typename Rows, typename Put>
inline void packed_product(int64_t count, Rows rows_of, int64_t step, int64_t depth, const float* panel, Put put) {
  const float* const* none = nullptr;
  product<C, true>(count, rows_of, step, depth, none, 0, const_cast<float*>(panel), none, put);
}

inline float* whole_register(float* p) {
  const uintptr_t size = kLanes * sizeof(float);
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p) + size - 1) / size * size);
}

// A thread's memory, kept from call to call: `slot` tells apart what is used at the same time. What was in it is lost where it
// grows. Begins at a whole register.
template <int slot>
float* scratch(int64_t floats) {
  thread_local std::unique_ptr<float[]> kept;
  thread_local int64_t size = 0;
  if (size < floats + kLanes) {
    size = 0;
    kept.reset(new float[floats + kLanes]);
    size = floats + kLanes;
  }
  return whole_register(kept.get());
}

// Memory of one call: a thread's own where it is little, which saves asking for it at every layer; else given back at the end.
template <int slot>
class Room {
 public:
  explicit Room(int64_t floats) {
    if (floats <= kMostKept) {
      floats_ = scratch<slot>(floats);
    } else {
      own_.reset(new float[floats + kLanes]);
      floats_ = whole_register(own_.get());
    }
  }
  float* get() const { return floats_; }

 private:
  static constexpr int64_t kMostKept = 1 << 22;  // 16 MiB
  std::unique_ptr<float[]> own_;
  float* floats_;
};

// n values, a whole number of registers, as float32: where they are, if they are that already, else in the room for them.
template <typename T, int slot>
const float* widened(const T* values, int64_t n, const Room<slot>& room) {
  if constexpr (std::is_same_v<T, float>) {
    return values;
  } else {
    widen(values, n, room.get());
    return room.get();
  }
}

// A piece of work for each number from 0 to total - 1.
struct Phase {
  int64_t total;
  std::function<void(int64_t)> run;
};

// One phase after another, each whole, on this thread and on the pool's. This one waits only for what others have begun, so that
// a pool whose threads are all busy, with handlers like this one, too, holds nobody up. Between phases nobody sleeps: waking
// takes as long as a small phase.
inline void in_parallel(ffi::ThreadPool& pool, std::vector<Phase> phases) {
  constexpr int kMostPhases = 4;
  struct Work {
    std::vector<Phase> phases;
    std::atomic<int64_t> next[kMostPhases] = {}, done[kMostPhases] = {};
    // Without memory there is no way on: what others still compute cannot be called back.
    void take() noexcept {
      for (size_t p = 0; p < phases.size(); ++p) {
        const int64_t total = phases[p].total;
        for (int64_t i; (i = next[p].fetch_add(1, std::memory_order_relaxed)) < total;) {
          phases[p].run(i);
          done[p].fetch_add(1, std::memory_order_release);
        }
        while (done[p].load(std::memory_order_acquire) < total) std::this_thread::yield();
      }
    }
  };
  auto work = std::make_shared<Work>();
  int64_t most = 0;
  for (const Phase& phase : phases) most = std::max(most, phase.total);
  work->phases = std::move(phases);
  for (int64_t i = 1; i < std::min<int64_t>(pool.num_threads(), most); ++i) pool.Schedule([work] { work->take(); });
  work->take();
}

template <typename T>
T* data(ffi::AnyBuffer buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

// Whether a buffer has this type and shape.
template <typename T>
bool is(ffi::AnyBuffer buffer, std::initializer_list<int64_t> sizes) {
  constexpr ffi::DataType type = std::is_same_v<T, float>      ? ffi::F32
                                 : std::is_same_v<T, BFloat16> ? ffi::BF16
                                 : std::is_same_v<T, int8_t>   ? ffi::S8
                                 : std::is_same_v<T, int32_t>  ? ffi::S32
                                                               : ffi::PRED;
  auto dimensions = buffer.dimensions();
  return buffer.element_type() == type && std::equal(dimensions.begin(), dimensions.end(), sizes.begin(), sizes.end());
}

}  // namespace djax
