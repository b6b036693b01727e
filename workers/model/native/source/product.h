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
constexpr int kTileRows = 6;    // rows at once: 24 sums, 4 weights and a broadcast value fill 32 registers
constexpr int kBlockRows = 96;  // rows whose unfinished sums stay in the first cache
constexpr int kChunk = 64;      // groups of inputs whose weights stay in the first cache meanwhile
constexpr int kAhead = 24;      // groups of inputs to fetch ahead of use, where nobody did before

struct Matrix {
  int64_t outputs = 0, inputs = 0, groups = 0;  // groups: lanes' worth of inputs
  uint32_t* data = nullptr;
  int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }
  int64_t num_words() const { return panels() * groups * kPanel; }
  const uint32_t* panel(int64_t index) const { return data + index * groups * kPanel; }
};

// Sixteen rows of sixteen lanes to sixteen columns of a panel, in steps of 32, 64 and 128 bits; rows from `rows` on read as
// zero. What lies `next` lanes further on is fetched meanwhile.
inline void transpose(const uint32_t* from, int64_t stride, int64_t rows, int64_t next, uint32_t* to) {
  Words r[kLanes], t[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    __builtin_prefetch(from + next + i * stride);
    r[i] = i < rows ? load<Words>(from + i * stride) : Words{};
  }
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 2) {
    t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const Words a = t[i + j], b = t[i + j + 2];
      r[i + 2 * j] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      r[i + 2 * j + 1] = __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const Words a = r[c], b = r[c + 4], d = r[c + 8], e = r[c + 12];
    const Words p = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    const Words q = __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    const Words u = __builtin_shufflevector(d, e, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    const Words v = __builtin_shufflevector(d, e, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    const auto keep = [&](int column, Words x) { store(to + column * kPanel, x); };
    keep(c, __builtin_shufflevector(p, u, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27));
    keep(c + 4, __builtin_shufflevector(p, u, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
    keep(c + 8, __builtin_shufflevector(q, v, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27));
    keep(c + 12, __builtin_shufflevector(q, v, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
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

// sums[m] += rows[m] . panel over `groups` groups of inputs. For each group, kFetch cache lines of `ahead` are fetched.
template <class T, int M, int kFetch>
inline __attribute__((always_inline)) void multiply_tile(
    const uint32_t* const* rows, const uint32_t* panel, int64_t groups, Floats (&sums)[M][kVectors],
    const uint32_t* ahead = nullptr) {
  const uint32_t* x[M];
  Floats y[M][kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    x[m] = rows[m];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) y[m][v] = sums[m][v];
  }
#pragma GCC unroll 2
  for (int64_t g = 0; g < groups; ++g) {
    Words w[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if (v < kFetch) __builtin_prefetch(ahead + g * kPanel + v * kLanes);
      w[v] = load<Words>(panel + g * kPanel + v * kLanes);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Words a = all_words(x[m][g]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) y[m][v] = dot<T>(y[m][v], a, w[v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[m][v] = y[m][v];
}

// Calls `body` with the number of rows, 1 to kTileRows, as a constant.
template <class Body> inline __attribute__((always_inline)) void with_rows(int64_t count, Body&& body) {
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

// One panel times all rows; `row(i)` points at row i, `take(i, sums)` gets its 64 results.
template <class T, class Row, class Take>
void multiply(const uint32_t* panel, int64_t groups, int64_t num_rows, Row&& row, Take&& take) {
  const uint32_t* x[kBlockRows];
  if (num_rows <= kTileRows) {
    for (int64_t m = 0; m < num_rows; ++m) x[m] = reinterpret_cast<const uint32_t*>(row(m));
    with_rows(num_rows, [&](auto M) {
      Floats sums[M][kVectors] = {};
      multiply_tile<T, M, kVectors>(x, panel, groups, sums, panel + kAhead * kPanel);
      for (int m = 0; m < M; ++m) take(m, sums[m]);
    });
    return;
  }
  Floats sums[kBlockRows][kVectors];
  for (int64_t first = 0; first < num_rows; first += kBlockRows) {
    const int64_t count = std::min<int64_t>(kBlockRows, num_rows - first);
    for (int64_t m = 0; m < count; ++m) {
      x[m] = reinterpret_cast<const uint32_t*>(row(first + m));
      for (int v = 0; v < kVectors; ++v) sums[m][v] = Floats{};
    }
    for (int64_t g = 0; g < groups; g += kChunk) {
      const int64_t span = std::min<int64_t>(kChunk, groups - g);
      const uint32_t *here = panel + g * kPanel, *ahead = here + span * kPanel;
      const bool fetches = first == 0 && g + span < groups;  // the next chunk, shared out among the first tiles
      for (int64_t m = 0, tile = 0; m < count; ++tile) {
        const int64_t together = tile_rows(count - m);
        with_rows(together, [&](auto M) {
          const uint32_t* rows[M];
          for (int i = 0; i < M; ++i) rows[i] = x[m + i] + g;
          auto& part = reinterpret_cast<Floats(&)[M][kVectors]>(sums[m]);
          if (first == 0 && g == 0 && tile == 0)
            multiply_tile<T, M, kVectors>(rows, here, span, part, here + kAhead * kPanel);
          else if (fetches && tile < 2)
            multiply_tile<T, M, 2>(rows, here, span, part, ahead + tile * 2 * kLanes);
          else
            multiply_tile<T, M, 0>(rows, here, span, part);
        });
        m += together;
      }
    }
    for (int64_t m = 0; m < count; ++m) take(first + m, sums[m]);
  }
}

}  // namespace baton
