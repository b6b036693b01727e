// Products of a few or many rows with a packed matrix: y = x W^T. Reads each weight from memory once.
//
// W [outputs, inputs] is kept in panels of 64 outputs; a panel holds, for each lane-wide group of inputs, 64 lanes side by
// side. An output adds its inputs in their order, one after the other, whatever the number of rows: that is what makes
// a row's bits independent of its company and of the number of threads.

#pragma once

#include <algorithm>

#include "lanes.h"

namespace baton {

constexpr int kPanel = 64;      // outputs of a panel
constexpr int kVectors = kPanel / kLanes;
constexpr int kTileRows = 6;    // rows that meet a panel's weights at once
constexpr int kBlockRows = 96;  // rows whose unfinished sums stay in the first cache
constexpr int kChunk = 64;      // groups of inputs whose weights stay in the first cache meanwhile
constexpr int kAhead = 24;      // groups of inputs to fetch ahead of use, where nobody did before

// Vectors of outputs that a tile of `rows` rows computes at once: as many sums as leave registers for weights and a value.
constexpr int tile_vectors(int rows) {
  int vectors = kVectors;
  while (vectors > 1 && rows * vectors * kParts > kNumRegisters * 3 / 4) vectors /= 2;
  return vectors;
}

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

// sums[m] += rows[m] . panel over `groups` groups of inputs, for V vectors of the panel's outputs from vector `first` on. For
// each group, kFetch cache lines of `ahead` are fetched. Each sum adds its inputs one by one, in their order.
template <class T, int M, int V, int kFetch>
BATON_INLINE void multiply_vectors(const Operand<T>* const* rows, const uint32_t* panel, int64_t groups,
                                   Floats (*sums)[kVectors], int first, const uint32_t* ahead) {
  panel += first * kLanes;
  const Operand<T>* x[M];
  Floats y[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    x[m] = rows[m];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) y[m][v] = sums[m][first + v];
  }
#pragma GCC unroll 2
  for (int64_t g = 0; g < groups; ++g) {
    const uint32_t* from = panel + g * kPanel;
#pragma GCC unroll 4
    for (int v = 0; v < kFetch; ++v) __builtin_prefetch(ahead + g * kPanel + (first + v) * kLanes);
    if constexpr (kTakesPairs<T>) {
      Words w[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) w[v] = load<Words>(from + v * kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        uint32_t pair;
        std::memcpy(&pair, x[m] + 2 * g, 4);
        const Words a = all_words(pair);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) y[m][v] = dot_pairs(y[m][v], a, w[v]);
      }
    } else {
#pragma GCC unroll 2
      for (int which = 0; which < kDepth<T>; ++which) {
        Floats w[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) w[v] = member<T>(load<Words>(from + v * kLanes), which);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const Floats a = all(x[m][g * kDepth<T> + which]);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) y[m][v] = multiply_add(a, w[v], y[m][v]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[m][first + v] = y[m][v];
}

// The same for all of the panel's outputs, as many vectors at a time as registers allow; where kFetches, all of `ahead` is
// fetched. Not inlined, so that it is compiled once for each number of rows.
template <class T, int M, bool kFetches>
__attribute__((noinline)) void multiply_tile(const Operand<T>* const* rows, const uint32_t* panel, int64_t groups,
                                             Floats (*sums)[kVectors], const uint32_t* ahead = nullptr) {
  constexpr int V = tile_vectors(M);
#pragma GCC unroll 4
  for (int first = 0; first < kVectors; first += V)
    multiply_vectors<T, M, V, kFetches ? V : 0>(rows, panel, groups, sums, first, ahead);
}

// Calls `body` with the number of rows, 1 to kTileRows, as a constant.
template <class Body> BATON_INLINE void with_rows(int64_t count, Body&& body) {
  switch (count) {
    case 1: return body(std::integral_constant<int, 1>{});
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, 3>{});
    case 4: return body(std::integral_constant<int, 4>{});
    case 5: return body(std::integral_constant<int, 5>{});
    default: return body(std::integral_constant<int, kTileRows>{});
  }
}

// Rows of the next tile when `left` remain: as even as can be.
inline int64_t tile_rows(int64_t left) {
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
      multiply_tile<T, M, true>(rows, here, span, sums, here + kAhead * kPanel);
      for (int m = 0; m < M; ++m) rows[m] += span * kDepth<T>;
    }
  });
}

// The same for at most kBlockRows rows. A chunk of the panel's inputs stays in the first cache while all rows meet it;
// where `is_cold`, the first rows that meet it fetch the next one.
template <class T> void multiply_many(const Operand<T>** rows, int64_t count, const uint32_t* panel, int64_t groups,
                                      bool is_cold, Floats (*sums)[kVectors]) {
  for (int64_t g = 0, span; g < groups; g += span) {
    span = std::min<int64_t>(kChunk, groups - g);
    const uint32_t* here = panel + g * kPanel;
    for (int64_t m = 0, together; m < count; m += together) {
      together = tile_rows(count - m);
      with_rows(together, [&](auto M) {
        if (is_cold && m == 0)
          multiply_tile<T, M, true>(rows, here, span, sums, g ? here + span * kPanel : here + kAhead * kPanel);
        else
          multiply_tile<T, M, false>(rows + m, here, span, sums + m);
      });
    }
    for (int64_t m = 0; m < count; ++m) rows[m] += span * kDepth<T>;
  }
}

// One panel times all rows; `row(i)` points at row i, `take(i, sums)` gets its 64 results.
template <class T, class Row, class Take>
void multiply(const uint32_t* panel, int64_t groups, int64_t num_rows, Row&& row, Take&& take) {
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

}  // namespace baton
