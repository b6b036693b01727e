// Calls that the kernels must refuse: sizes, weights and rows that do not exist. A refusal has a message and has written nothing.
//
// Meant for a build with AddressSanitizer and UBSan, which see what is read or written elsewhere, and what is not freed.

#pragma once

#include <cstring>
#include <limits>

#include "tiny.h"

namespace hostile {

using tiny::Random;
using tiny::Tiny;

// A number that is at an end of something, or beyond it.
inline int64_t number(Random& random) {
  constexpr int64_t kEnds[] = {0, 1, 2, 31, 33, 63, 64, 65, 1 << 20, 1 << 24, (1 << 24) + 1, int64_t{1} << 32, int64_t{1} << 61,
                               std::numeric_limits<int64_t>::max()};
  const int64_t chosen = kEnds[random.below(std::size(kEnds))];
  switch (random.below(4)) {
    case 0: return -chosen;
    case 1: return std::numeric_limits<int64_t>::min() + (chosen & 1);
    default: return chosen;
  }
}

inline void require_refused(const char* message, const char* what) {
  if (!message || !*message) tiny::fail(std::string("accepted: ") + what);
}

// Sizes of a model. What is accepted is made and freed again.
inline void dimensions(Random& random, const Tiny& model) {
  baton::Dimensions changed = model.dimensions;
  int64_t* fields = &changed.vocab_size;
  constexpr int64_t kNumFields = 12;  // the last is the number of threads, of which no thousand are wanted here
  for (int64_t i = 0; i <= random.below(2); ++i) {
    const int64_t field = random.below(kNumFields), value = number(random);
    if (field != kNumFields - 1 || value < 4 || value > baton::kMostThreads) fields[field] = value;
  }
  // A width that is in range may take more memory than a test should.
  const int64_t* widths[] = {&changed.vocab_size, &changed.hidden_size, &changed.dense_width, &changed.expert_width,
                             &changed.shared_width, &changed.num_layers, &changed.num_experts};
  for (const int64_t* width : widths)
    if (*width > 4096 && *width <= baton::kMostWidth) return;
  baton::AnyModel* made = nullptr;
  const std::vector<int64_t> kinds(std::max<int64_t>(1, std::min<int64_t>(changed.num_layers, 4096)), random.below(2));
  const std::vector<float> frequencies(std::max<int64_t>(1, std::min<int64_t>(changed.head_dim / 2, 4096)), 0.5f);
  changed.is_mixture = kinds.data();
  changed.frequencies = frequencies.data();
  const char* refused = baton_create(&changed, random.below(2), &made);
  if ((refused != nullptr) == (made != nullptr)) tiny::fail("a model was refused and made, or neither");
  if (made) baton_destroy(made);
}

// Rows of a weight. `source` is as long as the longest weight.
inline void take(Random& random, const Tiny& model, const std::vector<char>& source) {
  const int64_t part = random.below(20) - 2, layer = random.below(3) ? random.below(model.shape.num_layers) : number(random);
  const int64_t expert = random.below(2) ? 0 : number(random), first = random.below(2) ? number(random) : 0;
  const int64_t count = number(random);
  if (part == 1 && !model.shape.has_head) return;  // it would have to come whole
  const char* refused = baton_take(model.model, part, layer, expert, first, count, source.data());
  const int64_t longest = std::max({model.shape.vocab_size, model.shape.hidden_size, model.shape.dense_width,
                                    model.shape.num_heads * model.shape.head_dim, model.shape.num_experts});
  if (!refused && (part < 0 || part > 13 || first < 0 || count < 0 || first > longest || count > longest - first))
    tiny::fail("took rows that no weight has");
}

// Rows of a step, of which some numbers are changed.
inline void forward(Random& random, Tiny& model) {
  std::vector<tiny::Piece> pieces;
  for (int64_t s = 0; s < 1 + random.below(3); ++s) pieces.push_back({s, random.below(70), 1 + random.below(5)});
  tiny::Rows rows = model.make_rows(pieces);
  const bool is_changed = random.below(8) != 0;
  std::vector<int64_t>* arrays[] = {&rows.tokens, &rows.positions, &rows.first_rows, &rows.tables, &rows.first_blocks};
  for (int64_t i = 0; is_changed && i <= random.below(2); ++i) {
    std::vector<int64_t>& array = *arrays[random.below(5)];
    array[random.below(static_cast<int64_t>(array.size()))] = number(random);
  }
  baton::Step step = rows.step();
  void *pool = model.pool.data(), *place = nullptr;
  std::vector<char> x(step.num_rows * model.row_bytes(), 0x55);
  place = x.data();
  if (is_changed && !random.below(4)) {
    int64_t* counts[] = {&step.num_rows, &step.num_slices, &step.num_entries, &step.num_blocks};
    int64_t& count = *counts[random.below(4)];
    count = random.below(2) ? random.below(count) : -count;  // never more than there are: who calls vouches for that
  }
  if (is_changed && !random.below(16)) place = nullptr;
  if (is_changed && !random.below(16)) step.tables = nullptr;
  const int64_t every = random.below(16) ? 0 : number(random) | 1;
  const std::vector<char> untouched = x, kept = model.pool;
  const char* refused = baton_forward(model.model, &step, pool, place, every, nullptr);
  if (refused && (x != untouched || model.pool != kept)) tiny::fail("a step was refused and wrote something");
  if (!refused && every) tiny::fail("layers were to be reported to nobody");
  if (refused && !is_changed && !every) tiny::fail(std::string("refused a good step: ") + refused);
}

inline void head(Random& random, const Tiny& model) {
  const int64_t num_rows = random.below(2) ? random.below(4) : number(random), real = num_rows >= 0 && num_rows < 4 ? num_rows : 1;
  const std::vector<char> x(real * model.row_bytes());
  std::vector<float> logits(real * model.shape.vocab_size);
  std::vector<int64_t> best(real);
  std::vector<float> peaks(real);
  if (num_rows > real && num_rows <= baton::kMostRows) return;  // rows that are not there: who calls vouches for that
  const char* refused = baton_head(model.model, x.data(), num_rows, logits.data(), best.data(), peaks.data());
  if ((num_rows < 0 || num_rows > baton::kMostRows) != (refused != nullptr)) tiny::fail("a number of rows");
}

// A model that lacks a weight computes nothing.
inline void incomplete(const tiny::Shape& shape, bool is_bf16) {
  for (int64_t kept_back = 0; kept_back < 12; ++kept_back) {
    Tiny model(shape, is_bf16, 1, kept_back);
    const tiny::Rows rows = model.make_rows({{0, 0, 1}});
    const baton::Step step = rows.step();
    std::vector<char> x(model.row_bytes());
    std::vector<float> logits(shape.vocab_size);
    int64_t best;
    // A head of its own is the one weight that a model may do without.
    if (shape.has_head && kept_back == 2) continue;
    require_refused(baton_forward(model.model, &step, model.pool.data(), x.data(), 0, nullptr), "a step without a weight");
    float peak = 0;
    require_refused(baton_head(model.model, x.data(), 1, logits.data(), &best, &peak), "logits without a weight");
  }
}

inline void sampling(Random& random) {
  const int64_t size = random.below(40);
  std::vector<float> logits(size), sums(size);
  for (float& logit : logits) logit = random.below(9) ? random.centered() : random.below(2) ? NAN : INFINITY;
  std::vector<int64_t> tokens(random.below(3));
  baton_candidates(logits.data(), size, random.bits(), sums.data(), tokens.data(), static_cast<int64_t>(tokens.size()));
  float threshold = 0, wanted = random.below(3) ? random.centered() * 2 : NAN;
  baton_nucleus(logits.data(), size, wanted, &threshold);
  baton_drop_below(logits.data(), size, wanted, sums.data());
}

inline void run(uint64_t seed) {
  constexpr int64_t kRounds = 100;
  for (const tiny::Shape& shape : {tiny::kShapes[0], tiny::kShapes[1]})
    for (bool is_bf16 : {false, true}) {
      Random random(seed++);
      Tiny model(shape, is_bf16, 2);
      std::vector<char> source(std::max({shape.vocab_size, shape.num_heads * shape.head_dim, shape.hidden_size}) *
                               std::max({shape.hidden_size, shape.num_heads * shape.head_dim, shape.dense_width}) * 4);
      for (int64_t round = 0; round < kRounds; ++round) {
        dimensions(random, model);
        take(random, model, source);
        forward(random, model);
        head(random, model);
        sampling(random);
      }
      incomplete(shape, is_bf16);
    }
}

}  // namespace hostile
