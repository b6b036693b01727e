// Products of a few or many rows with a packed matrix: y = x W^T. Reads each weight from memory once.
//
// W [outputs, inputs] is kept in panels of 64 outputs; a panel holds, for each lane-wide group of inputs, 64 lanes side by
// side. An output adds its inputs pair after pair, each one by itself, whatever the number of rows: that is what makes
// a row's bits independent of its company and of the number of threads.

#pragma once

#include <algorithm>
#include <vector>

#include "amx.h"

namespace baton {

constexpr int kPanel = 64;      // outputs of a panel
constexpr int kVectors = kPanel / kLanes;
constexpr int kTileRows = kNumRegisters == 16 ? 5 : 6;  // rows that meet a panel's weights at once: no sum leaves its register
constexpr int kBlockRows = 96;  // rows whose unfinished sums stay in the first cache
constexpr int kChunk = kNumRegisters == 16 ? 32 : 64;  // groups of inputs whose weights stay in the first cache meanwhile
constexpr int kAhead = 24;      // groups of inputs to fetch ahead of use, where nobody did before

// Vectors of outputs that a tile of `rows` rows computes at once: as many sums as leave registers for weights and a value.
constexpr int tile_vectors(int rows) {
  int vectors = kVectors;
  while (vectors > 1 && rows * vectors * kParts > kNumRegisters * 3 / 4) vectors /= 2;
  return vectors;
}

// Numbers that begin at the start of a cache line.
template <class V> class Buffer {
 public:
  // Room for at least so many. Where there was less, what they were is lost.
  void reserve(int64_t size) {
    constexpr int64_t kLine = 64 / sizeof(V);
    if (static_cast<int64_t>(values_.size()) < size + kLine) values_.resize(size + kLine);
    const auto address = reinterpret_cast<uintptr_t>(values_.data());
    first_ = values_.data() + (64 - address % 64) % 64 / sizeof(V);
  }
  V* data() { return first_; }
  const V* data() const { return first_; }

 private:
  std::vector<V> values_;
  V* first_ = nullptr;
};

struct Matrix {
  int64_t outputs = 0, inputs = 0, groups = 0;  // groups: lanes' worth of inputs
  uint32_t* data = nullptr;
  int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }
  int64_t num_words() const { return panels() * groups * kPanel; }
  const uint32_t* panel(int64_t index) const { return data + index * groups * kPanel; }
};

// Sixteen rows of sixteen lanes to sixteen columns of a panel; rows from `rows` on read as zero. What lies `next` lanes
// further on is fetched meanwhile.
inline void transpose(const uint32_t* from, int64_t stride, int64_t rows, int64_t next, uint32_t* to) {
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) {
    WordRegister square[kParts][kPartLanes];
#pragma GCC unroll 16
    for (int k = 0; k < kPartLanes; ++k) {
      const int row = i * kPartLanes + k;
      __builtin_prefetch(from + next + row * stride);
#pragma GCC unroll 4
      for (int j = 0; j < kParts; ++j)
        square[j][k] = row < rows ? load<WordRegister>(from + row * stride + j * kPartLanes) : WordRegister{};
    }
#pragma GCC unroll 4
    for (int j = 0; j < kParts; ++j) {
      transpose_square(square[j]);
#pragma GCC unroll 16
      for (int k = 0; k < kPartLanes; ++k) store(to + (j * kPartLanes + k) * kPanel + i * kPartLanes, square[j][k]);
    }
  }
}

// Copies rows of a row-major matrix to panels: row i goes to lane `offset + i % width` of panel `i / width`.
template <class T>
void pack(const Matrix& matrix, const T* source, int64_t first, int64_t count, int64_t width, int64_t offset) {
  const int64_t groups = matrix.groups;
  for (int64_t row = 0; row < count;) {
    const int64_t at = first + row, panel = at / width, lane = at % width;
    const int64_t together = std::min({count - row, width - lane, int64_t(kLanes)});
    uint32_t* target = matrix.data + panel * groups * kPanel + offset + lane;
    const uint32_t* words = reinterpret_cast<const uint32_t*>(source + row * matrix.inputs);
    int64_t g = 0;
    if (together == kLanes)
      for (; g + kLanes <= groups; g += kLanes) transpose(words + g, groups, kLanes, kLanes, target + g * kPanel);
    for (; g < groups; ++g)
      for (int64_t i = 0; i < together; ++i) target[g * kPanel + i] = words[i * groups + g];
    row += together;
  }
}

// y[m] += input `index` of row m times the members `which` of R registers of words. What there are fewer of, values or weights,
// stays in registers.
template <class T, int M, int R>
BATON_INLINE void multiply_members(const Operand<T>* const (&x)[M], int64_t index, const uint32_t* from, int which,
                                   FloatRegister (&y)[M][R]) {
  const auto weight = [&](int r) BATON_BODY {
    return member_of_register<T>(load<WordRegister>(from + r * kPartLanes), which);
  };
  if constexpr (M < R) {
    FloatRegister a[M];
    repeat<M>([&](auto m) BATON_BODY { a[m] = all_of_register(x[m][index]); });
    repeat<R>([&](auto r) BATON_BODY {
      const FloatRegister w = weight(r);
      repeat<M>([&](auto m) BATON_BODY { accumulate(y[m][r], a[m], w); });
    });
  } else {
    FloatRegister w[R];
    repeat<R>([&](auto r) BATON_BODY { w[r] = weight(r); });
    repeat<M>([&](auto m) BATON_BODY {
      const FloatRegister a = all_of_register(x[m][index]);
      repeat<R>([&](auto r) BATON_BODY { accumulate(y[m][r], a, w[r]); });
    });
  }
}

// The same for a whole pair of bfloat16, where the processor multiplies pairs.
template <class T, int M, int R>
BATON_INLINE void multiply_pairs(const Operand<T>* const (&x)[M], int64_t g, const uint32_t* from, FloatRegister (&y)[M][R]) {
  WordRegister w[R];
  repeat<R>([&](auto r) BATON_BODY { w[r] = load<WordRegister>(from + r * kPartLanes); });
  repeat<M>([&](auto m) BATON_BODY {
    const WordRegister a = load<uint32_t>(x[m] + 2 * g) + WordRegister{};
    repeat<R>([&](auto r) BATON_BODY { y[m][r] = dot_register(y[m][r], a, w[r]); });
  });
}

// sums[m] += rows[m] . panel over `groups` groups of inputs, for V vectors of the panel's outputs from vector `first` on. For
// each group, kFetch cache lines of `ahead` are fetched. Each sum adds its inputs one by one, pair after pair, in their order.
template <class T, int M, int V, int kFetch>
BATON_INLINE void multiply_vectors(const Operand<T>* const* rows, const uint32_t* panel, int64_t groups,
                                   Floats (*sums)[kVectors], int first, const uint32_t* ahead) {
  constexpr int R = V * kParts;
  const Operand<T>* x[M];
  FloatRegister y[M][R];
  repeat<M>([&](auto m) BATON_BODY {
    x[m] = rows[m];
    repeat<R>([&](auto r) BATON_BODY { y[m][r] = sums[m][first + r / kParts].part[r % kParts]; });
  });
  for (int64_t g = 0; g < groups; ++g) {
    const uint32_t* from = panel + first * kLanes + g * kPanel;
    repeat<kFetch>([&](auto v) BATON_BODY { __builtin_prefetch(ahead + g * kPanel + v * kLanes); });
    if constexpr (kTakesPairs<T>) {
      multiply_pairs<T>(x, g, from, y);
    } else {
      if constexpr (kDepth<T> == 2) multiply_members<T>(x, g * 2 + 1, from, 1, y);  // odd before even, as pairs are
      multiply_members<T>(x, g * kDepth<T>, from, 0, y);
    }
  }
  repeat<M>([&](auto m) BATON_BODY {
    repeat<R>([&](auto r) BATON_BODY { sums[m][first + r / kParts].part[r % kParts] = y[m][r]; });
  });
}

// The same for all of the panel's outputs, as many vectors at a time as registers allow. Of each group's four lines, those from
// `fetch_from` to `fetch_to` are fetched at `ahead`. Not inlined, so that it is compiled once for each number of rows.
template <class T, int M>
__attribute__((noinline)) void multiply_tile(const Operand<T>* const* rows, const uint32_t* panel, int64_t groups,
                                             Floats (*sums)[kVectors], const uint32_t* ahead = nullptr,
                                             int fetch_from = 0, int fetch_to = 0) {
  constexpr int V = tile_vectors(M), kSome = V > 1 ? V / 2 : V;
#pragma GCC unroll 4
  for (int first = 0; first < kVectors; first += V) {
    const int from = std::max(first, fetch_from), lines = std::min(first + V, fetch_to) - from;
    if (lines <= 0)
      multiply_vectors<T, M, V, 0>(rows, panel, groups, sums, first, nullptr);
    else if (lines >= V)
      multiply_vectors<T, M, V, V>(rows, panel, groups, sums, first, ahead + from * kLanes);
    else
      multiply_vectors<T, M, V, kSome>(rows, panel, groups, sums, first, ahead + from * kLanes);
  }
}

// Calls `body` with the number of rows, 1 to kTileRows, as a constant.
template <class Body> BATON_INLINE void with_rows(int64_t count, Body&& body) {
  repeat<kTileRows>([&](auto before) BATON_BODY {
    if (count == before + 1) body(std::integral_constant<int, before + 1>{});
  });
}

// Rows of the next tile when `left` remain: as even as can be. Of sixteen registers, tiles of five rows or of three leave none
// without a sum, and those of four do.
inline int64_t tile_rows(int64_t left) {
  if (kNumRegisters == 16 && left > 2 && left != 4 && left != 7) return left <= 12 && left % 3 == 0 ? 3 : 5;
  const int64_t tiles = (left + kTileRows - 1) / kTileRows;
  return (left + tiles - 1) / tiles;
}

// sums = rows . panel for at most kTileRows rows: the panel streams by, and what comes next is fetched ahead.
template <class T> void multiply_few(const Operand<T>** rows, int64_t count, const uint32_t* panel, int64_t groups,
                                     Floats (*sums)[kVectors]) {
  with_rows(count, [&](auto M) {
    for (int64_t g = 0, span; g < groups; g += span) {
      span = tile_vectors(M) == kVectors ? groups : std::min<int64_t>(kAhead, groups - g);
      const uint32_t* here = panel + g * kPanel;
      multiply_tile<T, M>(rows, here, span, sums, here + kAhead * kPanel, 0, kVectors);
      for (int m = 0; m < M; ++m) rows[m] += span * kDepth<T>;
    }
  });
}

// The same for at most kBlockRows rows. A chunk of the panel's inputs stays in the first cache while all rows meet it. Where
// `is_cold`, the first tiles that meet a chunk share in fetching the next one; the very first tile also fetches its own.
template <class T> void multiply_many(const Operand<T>** rows, int64_t count, const uint32_t* panel, int64_t groups,
                                      bool is_cold, Floats (*sums)[kVectors]) {
  const int64_t num_tiles = (count + kTileRows - 1) / kTileRows;
  const int share = num_tiles >= kVectors ? 1 : num_tiles >= kVectors / 2 ? 2 : kVectors;  // lines of a group for each tile
  for (int64_t g = 0, span; g < groups; g += span) {
    span = std::min<int64_t>(g ? kChunk : kAhead, groups - g);
    const uint32_t *here = panel + g * kPanel, *ahead = here + span * kPanel;
    int from = is_cold ? 0 : kVectors;
    for (int64_t m = 0, together; m < count; m += together, from += share) {
      together = tile_rows(count - m);
      with_rows(together, [&](auto M) {
        multiply_tile<T, M>(rows + m, here, span, sums + m, ahead, from, std::min(from + share, kVectors));
      });
    }
    for (int64_t m = 0; m < count; ++m) rows[m] += span * kDepth<T>;
  }
}

// `multiply` by AMX. Rows lie at equal distances; of more than sixteen, the last is followed by memory for six more (Rows has it).
template <class T, class Row, class Take>
void multiply_by_tiles(const uint32_t* panel, int64_t groups, int64_t num_rows, Row&& row, Take&& take) {
  static_assert(kTilePanel == kPanel);
  Floats sums[kBlockRows + kTileSide][kVectors];
  for (int64_t first = 0; first < num_rows; first += kBlockRows) {
    const int64_t count = std::min<int64_t>(kBlockRows, num_rows - first);
    const int tiles = static_cast<int>((count + kTileSide - 1) / kTileSide);
    const int side = static_cast<int>((count + tiles - 1) / tiles);
    const char* at = reinterpret_cast<const char*>(row(first));
    const int64_t pitch = count > 1 ? reinterpret_cast<const char*>(row(first + 1)) - at : 0;
    std::memset(sums, 0, sizeof(Floats) * kVectors * tiles * side);
    multiply_tiles({at, pitch}, tiles, side, panel, groups, first == 0, sums);
    for (int64_t m = 0; m < count; ++m) take(first + m, sums[m]);
  }
}

// One panel times all rows; `row(i)` points at row i, `take(i, sums)` gets its 64 results.
template <class T, class Row, class Take>
void multiply(const uint32_t* panel, int64_t groups, int64_t num_rows, Row&& row, Take&& take) {
  if constexpr (kTakesTiles<T>) {
    multiply_by_tiles<T>(panel, groups, num_rows, row, take);
  } else {
    const Operand<T>* rows[kBlockRows];
    Floats sums[kBlockRows][kVectors];
    for (int64_t first = 0; first < num_rows; first += kBlockRows) {
      const int64_t count = std::min<int64_t>(kBlockRows, num_rows - first);
      for (int64_t m = 0; m < count; ++m) {
        rows[m] = row(first + m);
        for (int v = 0; v < kVectors; ++v) sums[m][v] = Floats{};
      }
      if (num_rows <= kTileRows)
        multiply_few<T>(rows, count, panel, groups, sums);
      else
        multiply_many<T>(rows, count, panel, groups, first == 0, sums);
      for (int64_t m = 0; m < count; ++m) take(first + m, sums[m]);
    }
  }
}

}  // namespace baton
