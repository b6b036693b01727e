// Small random models behind the kernels' C interface, the same on every processor: no libm, no random device.

#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "baton.cpp"

namespace tiny {

// SplitMix64 (Steele, Lea and Flood 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() { return baton::mixed(state_ += 0x9E3779B97F4A7C15ull); }
  int64_t below(int64_t bound) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(bound)); }
  float centered() { return static_cast<float>(static_cast<int64_t>(bits() >> 40) - (1 << 23)) / (1 << 23); }  // -1 to 1

 private:
  uint64_t state_;
};

[[noreturn]] inline void fail(const std::string& what) {
  std::printf("FAILED %s\n", what.c_str());
  std::fflush(stdout);
  std::exit(1);
}

inline void require(const char* message) {
  if (message) fail(message);
}

inline uint64_t hashed(const void* at, int64_t num_bytes, uint64_t hash = 0xcbf29ce484222325ull) {  // FNV-1a
  const auto* bytes = static_cast<const unsigned char*>(at);
  for (int64_t i = 0; i < num_bytes; ++i) hash = (hash ^ bytes[i]) * 0x100000001b3ull;
  return hash;
}

struct Shape {
  const char* name;
  int64_t vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim, dense_width, num_experts, num_choices,
      expert_width, shared_width, first_mixture;
  bool has_head;
};

inline const Shape kShapes[] = {
    {"dense", 150, 96, 2, 4, 2, 64, 70, 0, 0, 0, 0, 2, true},
    {"mixture", 130, 160, 3, 6, 2, 32, 66, 5, 2, 34, 50, 1, false},
    {"wide-heads", 65, 32, 1, 8, 1, 96, 2, 0, 0, 0, 0, 1, false},
    {"many-choices", 64, 64, 2, 2, 2, 128, 2, 70, 6, 2, 0, 0, true},
};

constexpr int64_t kBlocks = 4, kSequences = 4, kNumBlocks = kBlocks * kSequences;  // blocks of each sequence; and all

// Rows of a sequence that one step computes.
struct Piece {
  int64_t sequence, start, count;
};

// The arrays of a step, each of just its size, so that a sanitizer sees who reads beyond them.
struct Rows {
  std::vector<int64_t> tokens, positions, first_rows = {0}, tables, first_blocks;
  int64_t num_heads = 0, num_pairs = 0;      // of the pool, and of a head's channels
  mutable std::vector<float> cosines, sines;  // which the kernels fill

  baton::Step step() const {
    baton::Step made = {};
    made.num_rows = static_cast<int64_t>(tokens.size());
    made.num_slices = static_cast<int64_t>(first_blocks.size());
    made.num_entries = static_cast<int64_t>(tables.size());
    made.num_blocks = kNumBlocks;
    made.token_ids = tokens.data();
    made.positions = positions.data();
    made.first_rows = first_rows.data();
    made.tables = tables.data();
    made.first_blocks = first_blocks.data();
    made.pool_heads = num_heads;
    cosines.resize(made.num_rows * num_pairs);
    sines.resize(made.num_rows * num_pairs);
    made.cos = cosines.data();
    made.sin = sines.data();
    return made;
  }
};

class Tiny {
 public:
  // Gives the model all its weights but the `kept_back`-th.
  Tiny(const Shape& shape, bool is_bf16, int64_t num_threads, int64_t kept_back = -1) : shape(shape), is_bf16(is_bf16) {
    float turn = 1;
    for (int64_t i = 0; i < shape.head_dim / 2; ++i, turn *= 0.875f) frequencies_.push_back(turn);
    for (int64_t i = 0; i < shape.num_layers; ++i) is_mixture_.push_back(i >= shape.first_mixture);
    dimensions.vocab_size = dimensions.num_tokens = shape.vocab_size;
    dimensions.hidden_size = shape.hidden_size;
    dimensions.num_layers = shape.num_layers;
    dimensions.num_heads = shape.num_heads;
    dimensions.num_kv_heads = shape.num_kv_heads;
    dimensions.head_dim = shape.head_dim;
    dimensions.dense_width = shape.dense_width;
    dimensions.num_experts = dimensions.num_slots = shape.num_experts;
    dimensions.num_choices = shape.num_choices;
    dimensions.expert_width = shape.expert_width;
    dimensions.shared_width = shape.shared_width;
    dimensions.num_threads = num_threads;
    dimensions.eps = 1e-5;
    dimensions.norm_min = 1e-12;
    dimensions.frequencies = frequencies_.data();
    dimensions.is_mixture = is_mixture_.data();
    require(baton_create(&dimensions, is_bf16, &model));
    load(kept_back);
    pool.assign(kNumBlocks * block_bytes(), char(0xff));  // no number, where nothing was written
  }
  ~Tiny() { baton_destroy(model); }
  Tiny(const Tiny&) = delete;

  int64_t item_bytes() const { return is_bf16 ? 2 : 4; }
  int64_t row_bytes() const { return shape.hidden_size * item_bytes(); }
  int64_t block_bytes() const {
    return shape.num_layers * 2 * shape.num_kv_heads * baton::kBlock * shape.head_dim * item_bytes();
  }
  // Sequence s has blocks s, s + kSequences, ... in descending order: neighbours in a table are no neighbours in the pool.
  static int64_t block(int64_t sequence, int64_t index) { return (kBlocks - 1 - index) * kSequences + sequence; }
  int64_t token(int64_t sequence, int64_t position) const {
    return Random(static_cast<uint64_t>(sequence * 1000 + position)).below(shape.vocab_size);
  }

  // Hidden states of the pieces' rows, one after the other.
  std::vector<char> forward(const std::vector<Piece>& pieces) {
    const Rows rows = make_rows(pieces);
    const baton::Step step = rows.step();
    std::vector<char> x(step.num_rows * row_bytes());
    require(baton_forward(model, &step, pool.data(), x.data(), 0, nullptr));
    return x;
  }

  Rows make_rows(const std::vector<Piece>& pieces) const {
    Rows rows;
    rows.num_heads = shape.num_kv_heads;
    rows.num_pairs = shape.head_dim / 2;
    for (const Piece& piece : pieces) {
      for (int64_t t = piece.start; t < piece.start + piece.count; ++t) {
        rows.tokens.push_back(token(piece.sequence, t));
        rows.positions.push_back(t);
      }
      rows.first_rows.push_back(static_cast<int64_t>(rows.tokens.size()));
      rows.first_blocks.push_back(static_cast<int64_t>(rows.tables.size()));
      for (int64_t b = 0; b * baton::kBlock < piece.start + piece.count; ++b)
        rows.tables.push_back(block(piece.sequence, b));
    }
    return rows;
  }

  std::vector<float> logits(const std::vector<char>& x, std::vector<int64_t>* best) {
    const int64_t num_rows = static_cast<int64_t>(x.size()) / row_bytes();
    std::vector<float> found(num_rows * shape.vocab_size);
    best->resize(num_rows);
    std::vector<float> peaks(num_rows);
    require(baton_head(model, x.data(), num_rows, found.data(), best->data(), peaks.data()));
    return found;
  }

  const Shape shape;
  const bool is_bf16;
  std::vector<char> pool;
  baton::Dimensions dimensions = {};
  baton::AnyModel* model = nullptr;

 private:
  void load(int64_t kept_back) {
    left_ = kept_back;
    using baton::Part;
    const int64_t D = shape.hidden_size, C = shape.head_dim, H = shape.num_heads * C, K = shape.num_kv_heads * C;
    give(Part::kEmbedding, 0, 0, shape.vocab_size, D, 0, 1);
    give(Part::kNorm, 0, 0, D, 1, 1, 0.5f);
    if (shape.has_head) give(Part::kHead, 0, 0, shape.vocab_size, D, 0, 0.3f);
    for (int64_t i = 0; i < shape.num_layers; ++i) {
      give(Part::kInputNorm, i, 0, D, 1, 1, 0.5f);
      give(Part::kMlpNorm, i, 0, D, 1, 1, 0.5f);
      give(Part::kQuery, i, 0, H, D, 0, 0.3f);
      give(Part::kKey, i, 0, K, D, 0, 0.3f);
      give(Part::kValue, i, 0, K, D, 0, 0.3f);
      give(Part::kOutput, i, 0, D, H, 0, 0.3f);
      if (!is_mixture_[i]) {
        give_expert(i, 0, shape.dense_width);
        continue;
      }
      give(Part::kRouter, i, 0, shape.num_experts, D, 0, 0.3f, true);
      give(Part::kRouterBias, i, 0, shape.num_experts, 1, 0, 0.1f, true);
      for (int64_t e = 0; e < shape.num_experts; ++e) give_expert(i, e, shape.expert_width);
      if (shape.shared_width) give_expert(i, shape.num_experts, shape.shared_width);
    }
  }

  void give_expert(int64_t layer, int64_t expert, int64_t width) {
    give(baton::Part::kGate, layer, expert, width, shape.hidden_size, 0, 0.3f);
    give(baton::Part::kUp, layer, expert, width, shape.hidden_size, 0, 0.3f);
    give(baton::Part::kDown, layer, expert, shape.hidden_size, width, 0, 0.3f);
  }

  // A weight around `middle`, in two pieces of rows.
  void give(baton::Part part, int64_t layer, int64_t expert, int64_t rows, int64_t columns, float middle, float spread,
            bool is_exact = false) {
    if (left_-- == 0) return;
    Random random((static_cast<uint64_t>(part) * 64 + layer) * 128 + expert);
    std::vector<float> exact(rows * columns);
    for (float& value : exact) value = middle + spread * random.centered();
    // Some values of a token are denormal: every processor must make the same of them.
    if (part == baton::Part::kValue)
      for (int64_t i = 0; i < rows * columns; ++i)
        if (i / columns % 5 == 3) exact[i] *= 0x1p-63f, exact[i] *= 0x1p-63f;
    std::vector<baton::Bf16> halves;
    for (float value : exact) {
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      halves.push_back({static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)});
    }
    const bool is_half = is_bf16 && !is_exact;
    const char* from = is_half ? reinterpret_cast<char*>(halves.data()) : reinterpret_cast<char*>(exact.data());
    const int64_t pitch = columns * (is_half ? 2 : 4), first = rows / 3;
    require(baton_take(model, static_cast<int64_t>(part), layer, expert, first, rows - first, from + first * pitch));
    if (first) require(baton_take(model, static_cast<int64_t>(part), layer, expert, 0, first, from));
  }

  std::vector<float> frequencies_;
  std::vector<int64_t> is_mixture_;
  int64_t left_ = -1;
};

}  // namespace tiny
