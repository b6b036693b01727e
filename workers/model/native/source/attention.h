// Causal grouped-query attention over a paged KV pool, block by block of 64 positions, with a running maximum.
//
// A row meets the blocks of its sequence from the first to its own, each by the same operations, whatever rows are
// computed beside it: prefill in chunks of any size and decode give the same bits. The rescaling is that of FlashAttention
// (Dao et al. 2022, algorithm 1). Weights are rounded to the model's type before they meet the values.

#pragma once

#include <cmath>
#include <vector>

#include "product.h"

namespace baton {

constexpr int kBlock = 64;  // positions of a block: a panel's width

// One head's keys and values of a block as panels, and the running state of the rows that meet them.
template <class T> class HeadAttention {
 public:
  static constexpr int kDeep = kDepth<T>;

  // `channels` of a head, a multiple of 32; `max_rows` rows at once.
  HeadAttention(int64_t channels, int64_t max_rows)
      : channels_(channels), groups_(channels / kDeep), panels_((channels + kPanel - 1) / kPanel),
        max_rows_(max_rows), maximum_(max_rows), total_(max_rows) {
    output_.resize(panels_ * max_rows * kVectors);
    keys_.reserve((groups_ + kLanes) * kPanel);
    values_.reserve(panels_ * kBlock / kDeep * kPanel);
  }

  void start(int64_t num_rows) {
    for (int64_t c = 0; c < panels_; ++c) std::fill_n(output(c, 0), num_rows * kVectors, Floats{});
    std::fill_n(maximum_.data(), num_rows, -INFINITY);
    std::fill_n(total_.data(), num_rows, 0.0f);
  }

  // Takes in a block, of which the first `num_valid` positions exist; the others may hold anything. The block to come,
  // `next` words further on, is fetched meanwhile.
  void take_block(const T* keys, const T* values, int64_t num_valid, int64_t next) {
    for (int64_t j = 0; j < kBlock; j += kLanes)
      for (int64_t g = 0; g < groups_; g += kLanes)
        transpose(reinterpret_cast<const uint32_t*>(keys) + j * groups_ + g, groups_,
                  std::clamp<int64_t>(num_valid - j, 0, kLanes), next, keys_.data() + g * kPanel + j);
    for (int64_t j = 0; j < kBlock / kDeep; ++j)
      for (int64_t c = 0; c < channels_; c += kLanes) {
        __builtin_prefetch(reinterpret_cast<const uint32_t*>(values) + (j * channels_ + c) + next);
        store(values_.data() + (c / kPanel * (kBlock / kDeep) + j) * kPanel + c % kPanel,
              value_lanes(values + c, j, num_valid));
      }
  }

  // Rows first .. first+count-1 of one task meet the block; query(i) points at row i, valid(i) positions are visible to it.
  // Rows lie at equal distances.
  template <class Query, class Valid>
  void meet(int64_t first, int64_t count, float scale, Query&& query, Valid&& valid) {
    for (int64_t row = first; row < first + count;) {
      int64_t together;
      if constexpr (kTakesTiles<T>) {
        together = std::min<int64_t>(kTileSide, first + count - row);
        meet_rows<kTileSide>(static_cast<int>(together), row, scale, query, valid);
      } else {
        together = tile_rows(first + count - row);
        with_rows(together, [&](auto M) { meet_rows<M>(M, row, scale, query, valid); });
      }
      row += together;
    }
  }

  // The finished output of a row, rounded to T.
  void finish(int64_t row, Operand<T>* to) const {
    for (int64_t c = 0; c < channels_; c += kLanes)
      write_as<T>(to + c, output(c / kPanel, row)[c % kPanel / kLanes] / total_[row]);
  }

 private:
  // Weights of bfloat16 are powers of two, of scores in units of log2(e); those of fp32 are powers of e.
  static constexpr bool kIsShort = sizeof(T) == 2;
  static constexpr float kUnit = kIsShort ? 1.44269504f : 1.0f;
  BATON_INLINE static Floats power(Floats x) { return kIsShort ? short_power_of_two(x) : exponential(x); }

  // What a weight becomes when it is rounded to T; written at `to` as well.
  BATON_INLINE static Floats write_weight(Floats weight, Operand<T>* to) {
    if constexpr (sizeof(Operand<T>) == 2) {
      return each<Floats>([&](int p) {
        return write_rounded(weight.part[p], reinterpret_cast<uint16_t*>(to) + p * kPartLanes);
      });
    } else {
      weight = as_stored<T>(weight);
      write(to, weight);
      return weight;
    }
  }

  // `folded` of each of the first M rows.
  template <int kMost, class Join>
  BATON_INLINE static void fold(int M, const Floats (&rows)[kLanes], Join&& join, float* to) {
    if constexpr (kMost == kLanes)
      store(to, folded_rows(rows, join));
    else
      for (int m = 0; m < M; ++m) to[m] = folded(rows[m], join);
  }

  // A row's unfinished output for the channels of a panel.
  Floats* output(int64_t panel, int64_t row) { return output_.data() + (panel * max_rows_ + row) * kVectors; }
  const Floats* output(int64_t panel, int64_t row) const { return output_.data() + (panel * max_rows_ + row) * kVectors; }

  // The values that share lanes in row `j` of a panel, for sixteen channels; zero where a position does not exist.
  Words value_lanes(const T* from, int64_t j, int64_t num_valid) const {
    const int64_t first = j * kDeep;
    if (first >= num_valid) return Words{};
    from += first * channels_;
    if constexpr (kDeep == 1) return load<Words>(from);
    const Words even = load_halves(from);
    if (first + 1 == num_valid) return even;
    return even | load_halves(from + channels_) << 16;
  }

  // sums += x . panel; the rows are at equal distances.
  template <int M>
  static void add_products(std::integral_constant<int, M>, const Operand<T>* const* x, const uint32_t* panel, int64_t groups,
                           Floats (*sums)[kVectors]) {
    multiply_tile<T, M>(x, panel, groups, sums);
  }
  static void add_products(int M, const Operand<T>* const* x, const uint32_t* panel, int64_t groups, Floats (*sums)[kVectors]) {
    const char* at = reinterpret_cast<const char*>(x[0]);
    const int64_t pitch = M > 1 ? reinterpret_cast<const char*>(x[1]) - at : 0;
    multiply_tiles({at, pitch}, 1, M, panel, groups, false, sums);
  }

  // `M` rows, a constant where no tiles are, of at most kMost.
  template <int kMost, class Count, class Query, class Valid>
  BATON_INLINE void meet_rows(Count M, int64_t row, float scale, Query& query, Valid& valid) {
    scale *= kUnit;
    const Operand<T>* x[kMost];
    for (int m = 0; m < M; ++m) x[m] = query(row + m);
    Floats scores[kMost][kVectors];
    std::memset(scores, 0, sizeof scores[0] * M);
    add_products(M, x, keys_.data(), groups_, scores);
    alignas(64) Operand<T> weights[kMost][kBlock];
    alignas(64) float peaks[kLanes], rescale[kLanes] = {}, totals[kLanes];
    Floats found[kLanes] = {};  // of each row, lane by lane, the largest score, and then the sum of its weights
    const Ints lane = lane_numbers();
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < kVectors; ++v) scores[m][v] = scores[m][v] * scale;
      if (const int num_valid = valid(row + m); num_valid < kBlock)
        for (int v = 0; v < kVectors; ++v)
          scores[m][v] = pick(lane < all_ints(num_valid - v * kLanes), scores[m][v], all(-INFINITY));
      found[m] = larger(larger(scores[m][0], scores[m][1]), larger(scores[m][2], scores[m][3]));
    }
    fold<kMost>(M, found, [](auto a, auto b) { return a > b ? a : b; }, peaks);
    for (int m = 0; m < M; ++m) {
      const float before = maximum_[row + m];
      maximum_[row + m] = peaks[m] = std::max(before, peaks[m]);
      rescale[m] = before - peaks[m];
    }
    for (int m = 0; m < M; ++m) {
      const Floats peak = all(peaks[m]);
      Floats powers[kVectors];
      for (int v = 0; v < kVectors; ++v) powers[v] = power(scores[m][v] - peak);
      if (const int num_valid = valid(row + m); num_valid < kBlock)
        for (int v = 0; v < kVectors; ++v)
          powers[v] = pick(lane < all_ints(num_valid - v * kLanes), powers[v], Floats{});
      found[m] = Floats{};
      for (int v = 0; v < kVectors; ++v) found[m] = found[m] + write_weight(powers[v], weights[m] + v * kLanes);
    }
    fold<kMost>(M, found, [](auto a, auto b) { return a + b; }, totals);
    store(rescale, power(load<Floats>(rescale)));
    const Operand<T>* p[kMost];
    for (int m = 0; m < M; ++m) {
      total_[row + m] = total_[row + m] * rescale[m] + totals[m];
      p[m] = weights[m];
    }
    for (int64_t c = 0; c < panels_; ++c) {
      auto* const sums = reinterpret_cast<Floats(*)[kVectors]>(output(c, row));
      for (int m = 0; m < M; ++m)
        for (int v = 0; rescale[m] != 1 && v < kVectors; ++v) sums[m][v] = sums[m][v] * rescale[m];
      add_products(M, p, values_.data() + c * kBlock / kDeep * kPanel, kBlock / kDeep, sums);
    }
  }

  int64_t channels_, groups_, panels_, max_rows_;
  Buffer<uint32_t> keys_, values_;
  std::vector<Floats> output_;
  std::vector<float> maximum_, total_;
};

}  // namespace baton
