// What the kernels refuse: sizes of a model that they cannot compute, and weights that the model does not have or still lacks.
// Included by model.h, whose Dimensions and Part it reads.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>

namespace baton {

constexpr int64_t kMostWidth = 1 << 24;      // of any matrix: the bytes of two such widths are far from the end of an int64
constexpr int64_t kMostLayers = 1 << 12;
constexpr int64_t kMostThreads = 1 << 10;
constexpr int64_t kMostRows = 1 << 22;       // of a step
constexpr int64_t kMostPositions = 1 << 20;  // sines of larger angles lose accuracy (rows.h)

inline void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

// Throws invalid_argument. `depth` numbers of the model's type fill a lane.
inline void check(const Dimensions& d, int64_t depth) {
  const auto within = [](int64_t value, int64_t least, int64_t most, const char* what) {
    require(value >= least && value <= most, what);
  };
  const auto width = [&](int64_t value, const char* what) {
    within(value, 1, kMostWidth, what);
    require(value % depth == 0, what);
  };
  within(d.vocab_size, 1, kMostWidth, "vocab_size is out of range");
  within(d.num_tokens, 1, d.vocab_size, "num_tokens is out of range");
  within(d.first_token, 0, d.vocab_size - d.num_tokens, "first_token is out of range");
  within(d.hidden_size, 32, kMostWidth, "hidden_size is out of range");
  require(d.hidden_size % 32 == 0, "hidden_size is no multiple of 32");
  within(d.num_layers, 0, kMostLayers, "num_layers is out of range");
  within(d.head_dim, 32, 1 << 12, "head_dim is out of range");
  require(d.head_dim % 32 == 0, "head_dim is no multiple of 32");
  within(d.num_kv_heads, 1, 1 << 12, "num_kv_heads is out of range");
  within(d.num_heads, 1, 1 << 12, "num_heads is out of range");
  require(d.num_heads % d.num_kv_heads == 0, "num_heads is no multiple of num_kv_heads");
  within(d.num_threads, 1, kMostThreads, "num_threads is out of range");
  require(std::isfinite(d.eps) && d.eps >= 0 && std::isfinite(d.norm_min) && d.norm_min >= 0, "a least value is no number");
  require(d.frequencies && d.is_mixture, "a model needs frequencies and kinds of layers");
  for (int64_t i = 0; i < d.head_dim / 2; ++i)
    require(d.frequencies[i] >= 0 && d.frequencies[i] <= 1, "a frequency is not between 0 and 1");
  bool has_mixture = false, has_dense = false;
  for (int64_t i = 0; i < d.num_layers; ++i) (d.is_mixture[i] ? has_mixture : has_dense) = true;
  if (has_dense) width(d.dense_width, "dense_width is out of range");
  if (!has_mixture) return;
  within(d.num_experts, 1, (1 << 16) / std::max<int64_t>(1, d.num_layers), "num_experts is out of range");
  within(d.num_choices, 1, d.num_experts, "num_choices is out of range");
  within(d.num_slots, 1, d.num_experts, "num_slots is out of range");
  width(d.expert_width, "expert_width is out of range");
  if (d.shared_width) width(d.shared_width, "shared_width is out of range");
}

// How many rows of each weight have not come yet. A model computes nothing before all have. Several threads may take.
class Ledger {
 public:
  explicit Ledger(const Dimensions& d) : head_rows_(d.num_tokens) {
    expect(Part::kEmbedding, 0, 0, d.num_tokens);
    expect(Part::kNorm, 0, 0, d.hidden_size);
    for (int64_t i = 0; i < d.num_layers; ++i) {
      expect(Part::kInputNorm, i, 0, d.hidden_size);
      expect(Part::kMlpNorm, i, 0, d.hidden_size);
      expect(Part::kQuery, i, 0, d.num_heads * d.head_dim);
      expect(Part::kKey, i, 0, d.num_kv_heads * d.head_dim);
      expect(Part::kValue, i, 0, d.num_kv_heads * d.head_dim);
      expect(Part::kOutput, i, 0, d.hidden_size);
      if (!d.is_mixture[i]) {
        expect_expert(i, 0, d.dense_width, d.hidden_size);
        continue;
      }
      expect(Part::kRouter, i, 0, d.num_experts);
      expect(Part::kRouterBias, i, 0, d.num_experts);
      for (int64_t s = 0; s < d.num_slots; ++s) expect_expert(i, s, d.expert_width, d.hidden_size);
      if (d.shared_width) expect_expert(i, d.num_slots, d.shared_width, d.hidden_size);
    }
  }

  // Notes that these rows come. Throws invalid_argument where the weight has no such rows. A row may come again.
  void take(Part part, int64_t layer, int64_t expert, int64_t first, int64_t count) {
    const std::lock_guard lock(mutex_);
    if (part == Part::kHead) expect(part, 0, 0, head_rows_);  // a model may do without
    const auto found = weights_.find({part, layer, expert});
    require(found != weights_.end(), "the model has no such weight");
    Rows& rows = found->second;
    require(first >= 0 && count >= 0 && first <= rows.total && count <= rows.total - first, "a weight has no such rows");
    rows.left -= std::min(rows.left, count);
    if (!rows.left && rows.is_awaited) --num_awaited_, rows.is_awaited = false;
  }

  // All rows of all weights have come by another way.
  void complete() {
    const std::lock_guard lock(mutex_);
    for (auto& [weight, rows] : weights_) rows.is_awaited = false;
    num_awaited_ = 0;
  }

  void require_complete() const { require(num_awaited_ == 0, "not all weights of the model have been given"); }

 private:
  struct Rows {
    int64_t total, left;
    bool is_awaited;
  };

  void expect(Part part, int64_t layer, int64_t expert, int64_t rows) {
    num_awaited_ += weights_.try_emplace({part, layer, expert}, Rows{rows, rows, true}).second;
  }
  void expect_expert(int64_t layer, int64_t expert, int64_t width, int64_t hidden) {
    expect(Part::kGate, layer, expert, width);
    expect(Part::kUp, layer, expert, width);
    expect(Part::kDown, layer, expert, hidden);
  }

  std::mutex mutex_;
  int64_t head_rows_, num_awaited_ = 0;
  std::map<std::tuple<Part, int64_t, int64_t>, Rows> weights_;
};

}  // namespace baton
