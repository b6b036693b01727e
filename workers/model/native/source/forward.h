// One step of the decoder: embedding, layers of attention and feed-forward or experts, logits. `forward` is all of it; a rank of
// a group calls its parts.

#pragma once

#include "model.h"

namespace baton {

constexpr int64_t kRowsPerTask = 8;

template <class T>
void Model<T>::forward(const Step& step, void* pool, void* x_out, int64_t every, void (*on_layer)(int64_t)) {
  T* x = static_cast<T*>(x_out);
  T* kv = static_cast<T*>(pool);
  require(d_.num_slots == d_.num_experts && d_.num_tokens == d_.vocab_size,
          "a rank of a group computes a step part by part");
  require(!step.num_rows || (pool && x_out), "a step has rows and nowhere to put them");
  require(every >= 0 && (!every || on_layer), "nobody waits for layers");
  begin(step, x);
  for (int64_t i = 0; i < d_.num_layers; ++i) {
    const Layer<T>& layer = layers_[i];
    project(step, i, kv, x);
    if (every && (i + 1) % every == 0 && i + 1 < d_.num_layers) {
      const FlushDenormals as_usual(false);
      release_tiles();
      on_layer(i + 1);
    }
    meet_keys(step, kv, i);
    add_product(layer.output, context_, step.num_rows, x, x);
    if (layer.bias)
      mix(layer, step.num_rows, x);
    else
      feed_forward(i, step.num_rows, x, nullptr);
  }
}

template <class T> void Model<T>::begin(const Step& step, void* x) {
  check(step);
  embed(step, static_cast<T*>(x));
  turn(step);
}

// Queries, and keys and values in the pool.
template <class T> void Model<T>::project(const Step& step, int64_t index, T* pool, const T* x) {
  const Layer<T>& layer = layers_.at(index);
  const int64_t num_rows = step.num_rows;
  grow(qkv_, num_rows * qkv_width());
  normalize_rows(x, layer.input_norm, num_rows);
  threads_.run(layer.qkv.panels(), [&](int64_t p, int) {
    multiply<T>(layer.qkv.panel(p), layer.qkv.groups, num_rows,
                [&](int64_t row) { return normed_[row]; },
                [&](int64_t row, const Floats* sums) {
                  T* to = qkv_.data() + row * qkv_width() + p * kPanel;
                  for (int v = 0; v < kVectors; ++v)
                    if (p * kPanel + v * kLanes < qkv_width()) write(to + v * kLanes, sums[v]);
                });
  });
  place_keys(step, pool, index);
}

template <class T> void Model<T>::attend(const Step& step, int64_t index, void* pool, void* x_in, void* to) {
  T *x = static_cast<T*>(x_in), *kv = static_cast<T*>(pool);
  check(step);
  check_rows(step.num_rows, {pool, x_in});
  project(step, index, kv, x);
  meet_keys(step, kv, index);
  add_product(layers_[index].output, context_, step.num_rows, to ? nullptr : x, to ? static_cast<T*>(to) : x);
}

// Throws invalid_argument where a token, a position or a block does not exist, or a weight: nothing has been written then. The
// arrays of a step are as long as it says.
template <class T> void Model<T>::check(const Step& step) const {
  ledger_.require_complete();
  require(step.num_rows >= 0 && step.num_rows <= kMostRows && step.num_slices >= 0 && step.num_slices <= step.num_rows &&
              step.num_entries >= 0 && step.num_blocks >= 0, "a size of a step is out of range");
  if (!step.num_rows) return;
  require(step.token_ids && step.positions && step.first_rows && step.tables && step.first_blocks && step.cos && step.sin,
          "a step lacks an array");
  require(step.first_rows[0] == 0 && step.first_rows[step.num_slices] == step.num_rows,
          "the slices of a step are not its rows");
  require(step.pool_heads >= d_.num_kv_heads, "the pool has fewer heads than the model");
  for (int64_t t = 0; t < step.num_rows; ++t)
    require(step.token_ids[t] >= 0 && step.token_ids[t] < d_.vocab_size, "a token is not in the vocabulary");
  for (int64_t i = 0; i < step.num_entries; ++i)
    require(step.tables[i] >= 0 && step.tables[i] < step.num_blocks, "a block is not in the pool");
  for (int64_t s = 0; s < step.num_slices; ++s) {
    const int64_t first = step.first_rows[s], last = step.first_rows[s + 1];
    require(first < last && last <= step.num_rows, "a slice has no rows");
    const int64_t start = step.positions[first];
    require(start >= 0 && start < kMostPositions - (last - first), "a position is out of range");
    for (int64_t t = first; t < last; ++t)
      require(step.positions[t] == start + (t - first), "the positions of a slice do not follow each other");
    require(step.first_blocks[s] >= 0 &&
                step.positions[last - 1] / kBlock < step.num_entries - step.first_blocks[s],
            "a block table is too short for its slice");
  }
}

// Throws invalid_argument where a part of a step cannot be computed: it has no such number of rows, or not all of its arrays.
template <class T> void Model<T>::check_rows(int64_t num_rows, std::initializer_list<const void*> arrays) const {
  ledger_.require_complete();
  require(num_rows >= 0 && num_rows <= kMostRows, "a number of rows is out of range");
  for (const void* array : arrays) require(!num_rows || array, "a step has rows and nowhere to put them");
}

template <class T> void Model<T>::embed(const Step& step, T* x) {
  const int64_t groups = embedding_.groups;
  for (int64_t t = 0; t < step.num_rows; ++t) {
    const int64_t token = step.token_ids[t] - d_.first_token;
    uint32_t* to = reinterpret_cast<uint32_t*>(x + t * d_.hidden_size);
    if (token < 0 || token >= d_.num_tokens) {
      std::fill_n(to, groups, 0u);
      continue;
    }
    const uint32_t* from = embedding_.panel(token / kPanel) + token % kPanel;
    for (int64_t g = 0; g < groups; ++g) to[g] = from[g * kPanel];
  }
}

// Cosines and sines of every row's position (Su et al. 2021, section 3.4.2).
template <class T> void Model<T>::turn(const Step& step) {
  const int64_t pairs = d_.head_dim / 2;
  threads_.run(step.num_rows, [&](int64_t t, int) {
    for (int64_t i = 0; i < pairs; ++i)
      sine_cosine(static_cast<float>(step.positions[t]) * frequencies_[i], &step.sin[t * pairs + i],
                  &step.cos[t * pairs + i]);
  });
}

template <class T> void Model<T>::normalize_rows(const T* x, const T* weight, int64_t num_rows) {
  normed_.reserve(num_rows, d_.hidden_size);
  threads_.run((num_rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
    for (int64_t t = task * kRowsPerTask; t < std::min(num_rows, (task + 1) * kRowsPerTask); ++t)
      normalize(x + t * d_.hidden_size, weight, d_.hidden_size, static_cast<float>(d_.eps),
                normed_[t]);
  });
}

// Rotates queries and keys, which go to the pool as values do.
template <class T> void Model<T>::place_keys(const Step& step, T* pool, int64_t layer) {
  const int64_t C = d_.head_dim, H = d_.num_heads, K = d_.num_kv_heads, G = group();
  queries_.reserve(step.num_rows * H, C);
  threads_.run((step.num_rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
    const int64_t first = task * kRowsPerTask, last = std::min(step.num_rows, first + kRowsPerTask);
    int64_t s = std::upper_bound(step.first_rows, step.first_rows + step.num_slices, first) - step.first_rows - 1;
    for (int64_t t = first; t < last; ++t) {
      while (t >= step.first_rows[s + 1]) ++s;
      T* row = qkv_.data() + t * qkv_width();
      const float *cos = step.cos + t * (C / 2), *sin = step.sin + t * (C / 2);
      const int64_t position = step.positions[t];
      const int64_t block = step.tables[step.first_blocks[s] + position / kBlock];
      for (int64_t h = 0; h < H; ++h)
        rotate(row + h * C, cos, sin, C, queries_[(h / G * step.num_rows + t) * G + h % G]);
      for (int64_t h = 0; h < K; ++h) {
        rotate(row + (H + h) * C, cos, sin, C, slot(step, pool, block, layer, 0, h) + position % kBlock * C);
        std::memcpy(slot(step, pool, block, layer, 1, h) + position % kBlock * C, row + (H + K + h) * C, C * sizeof(T));
      }
    }
  });
}

template <class T> void Model<T>::meet_keys(const Step& step, const T* pool, int64_t layer) {
  const int64_t C = d_.head_dim, K = d_.num_kv_heads, G = group();
  context_.reserve(step.num_rows, d_.num_heads * C);
  const float scale = 1.0f / std::sqrt(static_cast<float>(C));
  struct Tile {
    int64_t slice, first, last;
  };
  std::vector<Tile> tiles;
  for (int64_t s = 0; s < step.num_slices; ++s)
    for (int64_t t = step.first_rows[s]; t < step.first_rows[s + 1]; t += tile_tokens())
      tiles.push_back({s, t, std::min(t + tile_tokens(), step.first_rows[s + 1])});
  threads_.run(static_cast<int64_t>(tiles.size()) * K, [&](int64_t task, int thread) {
    const Tile tile = tiles[task / K];
    const int64_t head = task % K, num_rows = (tile.last - tile.first) * G;
    const int64_t start = step.positions[tile.first], end = step.positions[tile.last - 1] + 1;
    HeadAttention<T>& state = *attention_[thread];
    state.start(num_rows);
    const auto query = [&](int64_t row) { return queries_[(head * step.num_rows + tile.first) * G + row]; };
    for (int64_t first = 0, b = 0; first < end; first += kBlock, ++b) {
      const int64_t block = step.tables[step.first_blocks[tile.slice] + b];
      const int64_t next = first + kBlock < end ? step.tables[step.first_blocks[tile.slice] + b + 1] - block : 0;
      T* base = const_cast<T*>(pool);
      state.take_block(slot(step, base, block, layer, 0, head), slot(step, base, block, layer, 1, head),
                       std::min<int64_t>(kBlock, end - first), next * block_words(step));
      const int64_t unseen = std::max<int64_t>(0, first - start) * G;  // rows before the block
      state.meet(unseen, num_rows - unseen, scale, query, [&](int64_t row) {
        return static_cast<int>(std::min<int64_t>(kBlock, start + row / G + 1 - first));
      });
    }
    for (int64_t row = 0; row < num_rows; ++row)
      state.finish(row, context_[tile.first + row / G] + (head * G + row % G) * C);
  });
}

// to = x + from W^T, or from W^T where x is null
template <class T>
void Model<T>::add_product(const Matrix& matrix, const Rows<Operand<T>>& from, int64_t num_rows, const T* x, T* to) {
  threads_.run(matrix.panels(), [&](int64_t p, int) {
    multiply<T>(matrix.panel(p), matrix.groups, num_rows,
                [&](int64_t row) { return from[row]; },
                [&](int64_t row, const Floats* sums) {
                  for (int v = 0; v < kVectors; ++v) {
                    const int64_t at = row * matrix.outputs + p * kPanel + v * kLanes;
                    if (p * kPanel + v * kLanes >= matrix.outputs) break;
                    const Floats product = as_stored<T>(sums[v]);
                    write(to + at, x ? read(x + at) + product : product);
                  }
                });
  });
}

// Writes a panel's 32 gated results at `to`, rounded to T, of which `left` exist.
template <class T> void write_gated(Operand<T>* to, const Floats* sums, int64_t left) {
  write_some(to, as_stored<T>(gated(sums[0], sums[2])), static_cast<int>(left));
  if (left > kLanes) write_some(to + kLanes, as_stored<T>(gated(sums[1], sums[3])), static_cast<int>(left - kLanes));
}

// Gates the up-projections of rows 0, 1, ... of the assignments, as far as `spans` have them, in activated_. For AMX, a span's
// rows are brought together where they lie at unequal distances.
template <class T>
template <class Row>
void Model<T>::activate(const Layer<T>& layer, const std::vector<Span>& spans, Row&& row) {
  if constexpr (kTakesTiles<T>) {
    const auto is_even = [&](const Span& span) {
      const auto pitch = span.count > 1 ? row(span.first + 1) - row(span.first) : 0;
      for (int64_t i = 2; i < span.count; ++i)
        if (row(span.first + i) != row(span.first) + i * pitch) return false;
      return span.count < kTileSide || pitch > 0;
    };
    if (!std::all_of(spans.begin(), spans.end(), is_even)) {
      const int64_t num_rows = spans.back().first + spans.back().count, hidden = d_.hidden_size;
      gathered_.reserve(num_rows, hidden);
      threads_.run((num_rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
        for (int64_t i = task * kRowsPerTask; i < std::min(num_rows, (task + 1) * kRowsPerTask); ++i)
          std::memcpy(gathered_[i], row(i), hidden * sizeof(Operand<T>));
      });
      return activate_rows(layer, spans, [&](int64_t i) -> const Operand<T>* { return gathered_[i]; });
    }
  }
  activate_rows(layer, spans, row);
}

template <class T>
template <class Row>
void Model<T>::activate_rows(const Layer<T>& layer, const std::vector<Span>& spans, Row&& row) {
  struct Work {
    const Span* span;
    int64_t panel;
  };
  std::vector<Work> works;
  for (const Span& span : spans)
    for (int64_t p = 0; p < layer.experts[span.expert].gate_up.panels(); ++p) works.push_back({&span, p});
  threads_.run(works.size(), [&](int64_t task, int) {
    const auto [span, panel] = works[task];
    const Expert& expert = layer.experts[span->expert];
    multiply<T>(expert.gate_up.panel(panel), expert.gate_up.groups, span->count,
                [&, first = span->first](int64_t i) { return row(first + i); },
                [&, first = span->first, panel = panel](int64_t i, const Floats* sums) {
                  write_gated<T>(activated_[first + i] + panel * 32, sums, expert.width - panel * 32);
                });
  });
}

template <class T> void Model<T>::feed_forward(int64_t index, int64_t num_rows, void* x_in, void* to) {
  const Layer<T>& layer = layers_.at(index);
  const Expert& mlp = layer.experts.at(0);
  T* x = static_cast<T*>(x_in);
  require(!layer.bias, "the layer has experts");
  check_rows(num_rows, {x_in});
  normalize_rows(x, layer.mlp_norm, num_rows);
  activated_.reserve(num_rows, mlp.width);
  activate(layer, {{0, 0, num_rows}}, [&](int64_t i) { return normed_[i]; });
  add_product(mlp.down, activated_, num_rows, to ? nullptr : x, to ? static_cast<T*>(to) : x);
}

template <class T> const Layer<T>& Model<T>::mixture(int64_t index) const {
  const Layer<T>& layer = layers_.at(index);
  require(layer.bias, "the layer has no experts");
  return layer;
}

// Rows in the form that products take.
template <class T> const Rows<Operand<T>>& Model<T>::operands(const T* rows, int64_t num_rows) {
  const int64_t hidden = d_.hidden_size;
  normed_.reserve(num_rows, hidden);
  threads_.run((num_rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
    for (int64_t t = task * kRowsPerTask; t < std::min(num_rows, (task + 1) * kRowsPerTask); ++t)
      for (int64_t i = 0; i < hidden; i += kLanes) write(normed_[t] + i, read(rows + t * hidden + i));
  });
  return normed_;
}

// Chosen experts of the rows in normed_ and their weights, in fp32 throughout.
template <class T>
void Model<T>::choose(const Layer<T>& layer, int64_t num_rows, float* weights, int64_t* chosen) {
  const int64_t E = d_.num_experts, k = d_.num_choices, hidden = d_.hidden_size;
  wide_.reserve(num_rows, hidden);
  grow(scores_, num_rows * E);
  threads_.run((num_rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
    const int64_t first = task * kRowsPerTask, count = std::min(num_rows - first, kRowsPerTask);
    for (int64_t t = first; t < first + count; ++t)
      for (int64_t i = 0; i < hidden; i += kLanes) write(wide_[t] + i, read(normed_[t] + i));
    for (int64_t p = 0; p < layer.router.panels(); ++p)
      multiply<float>(layer.router.panel(p), layer.router.groups, count,
                      [&](int64_t row) { return wide_[first + row]; },
                      [&](int64_t row, const Floats* sums) {
                        std::memcpy(scores_.data() + (first + row) * E + p * kPanel, sums,
                                    std::min<int64_t>(kPanel, E - p * kPanel) * sizeof(float));
                      });
    for (int64_t t = first; t < first + count; ++t)
      choose_experts(scores_.data() + t * E, layer.bias, E, k, static_cast<float>(d_.norm_min), chosen + t * k,
                     weights + t * k);
  });
}

template <class T>
void Model<T>::route(int64_t index, int64_t num_rows, const void* x, void* normed, float* weights, int64_t* chosen) {
  const Layer<T>& layer = mixture(index);
  const int64_t hidden = d_.hidden_size;
  check_rows(num_rows, {x, normed, weights, chosen});
  normalize_rows(static_cast<const T*>(x), layer.mlp_norm, num_rows);
  threads_.run(num_rows, [&](int64_t t, int) {
    for (int64_t i = 0; i < hidden; i += kLanes) write(static_cast<T*>(normed) + t * hidden + i, read(normed_[t] + i));
  });
  choose(layer, num_rows, weights, chosen);
}

// Outputs of experts: assignment i takes row(i) to to(i), by the expert whose span it is in.
template <class T>
template <class Row, class To>
void Model<T>::run_experts(const Layer<T>& layer, const std::vector<Span>& spans, Row&& row, To&& to) {
  const int64_t hidden = d_.hidden_size;
  if (spans.empty()) return;
  activated_.reserve(spans.back().first + spans.back().count, std::max(d_.expert_width, d_.shared_width));
  activate(layer, spans, row);
  const int64_t panels = (hidden + kPanel - 1) / kPanel;
  threads_.run(spans.size() * panels, [&](int64_t task, int) {
    const Span& span = spans[task / panels];
    const int64_t panel = task % panels;
    const Matrix& down = layer.experts[span.expert].down;
    multiply<T>(down.panel(panel), down.groups, span.count,
                [&](int64_t i) { return activated_[span.first + i]; },
                [&](int64_t i, const Floats* sums) {
                  T* at = to(span.first + i) + panel * kPanel;
                  for (int v = 0; v < kVectors; ++v)
                    if (panel * kPanel + v * kLanes < hidden) write(at + v * kLanes, sums[v]);
                });
  });
}

template <class T>
void Model<T>::run_slots(int64_t index, const SlotWork& work, const void* rows, void* to) {
  const Layer<T>& layer = mixture(index);
  const int64_t hidden = d_.hidden_size;
  check_rows(work.num_rows, {rows, to, work.ends, work.source, work.target});
  if (!work.num_rows) return;
  std::vector<Span> spans;
  int64_t first = 0;
  for (int64_t s = 0; s < d_.num_slots; first = work.ends[s++]) {
    require(work.ends[s] >= first, "the slots of assignments are not in order");
    if (work.ends[s] > first) spans.push_back({s, first, work.ends[s] - first});
  }
  for (int64_t i = 0; i < first; ++i)
    require(work.source[i] >= 0 && work.source[i] < work.num_rows && work.target[i] >= 0 && work.target[i] < first,
            "an assignment has no row or no place");
  const Rows<Operand<T>>& from = operands(static_cast<const T*>(rows), work.num_rows);
  run_experts(layer, spans, [&](int64_t i) { return from[work.source[i]]; },
              [&](int64_t i) { return static_cast<T*>(to) + work.target[i] * hidden; });
}

template <class T> void Model<T>::run_shared(int64_t index, int64_t num_rows, const void* rows, void* to) {
  const Layer<T>& layer = mixture(index);
  require(d_.shared_width, "the model has no shared experts");
  check_rows(num_rows, {rows, to});
  if (!num_rows) return;
  const Rows<Operand<T>>& from = operands(static_cast<const T*>(rows), num_rows);
  run_experts(layer, {{d_.num_slots, 0, num_rows}}, [&](int64_t i) { return from[i]; },
              [&](int64_t i) { return static_cast<T*>(to) + i * d_.hidden_size; });
}

// x += sum of weight * expert(norm(x)), plus the ungated shared experts. Outputs of all assignments, sorted by expert, then
// those of the shared experts, token by token, stand in expert_out_.
template <class T> void Model<T>::mix(const Layer<T>& layer, int64_t num_rows, T* x) {
  const int64_t E = d_.num_experts, k = d_.num_choices, num_assigned = num_rows * k, hidden = d_.hidden_size;
  normalize_rows(x, layer.mlp_norm, num_rows);
  grow(weights_, num_assigned);
  grow(chosen_, num_assigned);
  choose(layer, num_rows, weights_.data(), chosen_.data());
  assigned_.sort(chosen_.data(), num_rows, k, E);
  std::vector<Span> spans;
  for (int64_t e = 0; e < E; ++e)
    if (assigned_.first[e + 1] > assigned_.first[e])
      spans.push_back({e, assigned_.first[e], assigned_.first[e + 1] - assigned_.first[e]});
  if (d_.shared_width) spans.push_back({E, num_assigned, num_rows});
  grow(expert_out_, (num_assigned + num_rows) * hidden);
  run_experts(layer, spans,
              [&](int64_t i) { return normed_[i < num_assigned ? assigned_.token[i] : i - num_assigned]; },
              [&](int64_t i) { return expert_out_.data() + i * hidden; });
  combine_rows(num_rows, expert_out_.data(), assigned_.place.data(), weights_.data(),
               d_.shared_width ? expert_out_.data() + num_assigned * hidden : nullptr, x, x);
}

// Adds in the order of the token's choices, the shared experts last, and then to x where that is not null.
template <class T>
void Model<T>::combine_rows(int64_t num_rows, const T* outputs, const int64_t* places, const float* weights,
                            const T* shared, const T* x, T* to) {
  const int64_t k = d_.num_choices, hidden = d_.hidden_size;
  threads_.run((num_rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
    for (int64_t t = task * kRowsPerTask; t < std::min(num_rows, (task + 1) * kRowsPerTask); ++t)
      for (int64_t c = 0; c < hidden; c += kLanes) {
        Floats total = Floats{};
        for (int64_t choice = 0; choice < k; ++choice)
          total = multiply_add(read(outputs + places[t * k + choice] * hidden + c), all(weights[t * k + choice]), total);
        if (shared) total = total + read(shared + t * hidden + c);
        total = as_stored<T>(total);
        write(to + t * hidden + c, x ? read(x + t * hidden + c) + total : total);
      }
  });
}

template <class T>
void Model<T>::combine(int64_t num_rows, const void* outputs, const int64_t* places, const float* weights,
                       const void* shared, void* to) {
  check_rows(num_rows, {outputs, places, weights, to});
  for (int64_t i = 0; i < num_rows * d_.num_choices; ++i)
    require(places[i] >= 0 && places[i] < num_rows * d_.num_choices, "an output has no place");
  combine_rows(num_rows, static_cast<const T*>(outputs), places, weights, static_cast<const T*>(shared), nullptr,
               static_cast<T*>(to));
}

// fp32 logits of rows of the last layer's output (left out when `logits` is null), of own tokens, and each row's largest and
// its place among them, of equals the first.
template <class T>
void Model<T>::head(const void* x_in, int64_t num_rows, float* logits, int64_t* best, float* largest_logits) {
  check_rows(num_rows, {x_in, best, largest_logits});
  const T* x = static_cast<const T*>(x_in);
  const Matrix& matrix = head_.data ? head_ : embedding_;
  const int64_t V = d_.num_tokens, panels = matrix.panels();
  std::vector<float> peaks(panels * num_rows);
  std::vector<int64_t> places(panels * num_rows);
  normalize_rows(x, norm_, num_rows);
  threads_.run(panels, [&](int64_t p, int) {
    multiply<T>(matrix.panel(p), matrix.groups, num_rows,
                [&](int64_t row) { return normed_[row]; },
                [&](int64_t row, const Floats* sums) {
                  Floats values[kVectors];
                  const Ints lane = lane_numbers();
                  for (int v = 0; v < kVectors; ++v) {
                    const int left = static_cast<int>(std::min<int64_t>(kLanes, V - p * kPanel - v * kLanes));
                    values[v] = sums[v];
                    if (logits && left > 0) write_some(logits + row * V + p * kPanel + v * kLanes, values[v], left);
                    if (left < kLanes) values[v] = pick(lane < all_ints(left), values[v], all(-INFINITY));
                  }
                  const float peak = largest(larger(larger(values[0], values[1]), larger(values[2], values[3])));
                  const float* one = reinterpret_cast<const float*>(values);
                  int64_t place = 0;
                  while (place < kPanel - 1 && one[place] != peak) ++place;
                  peaks[row * panels + p] = peak;
                  places[row * panels + p] = p * kPanel + place;
                });
  });
  for (int64_t row = 0; row < num_rows; ++row) {
    const float* first = peaks.data() + row * panels;
    const float* peak = std::max_element(first, first + panels);
    best[row] = places[row * panels + (peak - first)];
    largest_logits[row] = *peak;
  }
}

}  // namespace baton
