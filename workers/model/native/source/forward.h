// One step of the decoder: embedding, layers of attention and feed-forward or experts, logits.

#pragma once

#include "model.h"

namespace baton {

constexpr int64_t kRowsPerTask = 8;

template <class V> void grow(std::vector<V>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
}

template <class T>
void Model<T>::forward(const Step& step, void* pool, void* x_out, int64_t every, void (*on_layer)(int64_t)) {
  T* x = static_cast<T*>(x_out);
  T* kv = static_cast<T*>(pool);
  const int64_t num_rows = step.num_rows, hidden = d_.hidden_size;
  check(step);
  require(!num_rows || (pool && x_out), "a step has rows and nowhere to put them");
  require(every >= 0 && (!every || on_layer), "nobody waits for layers");
  grow(normed_, num_rows * hidden);
  grow(qkv_, num_rows * qkv_width());
  grow(queries_, num_rows * d_.num_heads * d_.head_dim);
  grow(context_, num_rows * d_.num_heads * d_.head_dim);
  embed(step, x);
  turn(step);
  for (int64_t i = 0; i < d_.num_layers; ++i) {
    const Layer<T>& layer = layers_[i];
    normalize_rows(x, layer.input_norm, num_rows);
    threads_.run(layer.qkv.panels(), [&](int64_t p, int) {
      multiply<T>(layer.qkv.panel(p), layer.qkv.groups, num_rows,
                  [&](int64_t row) { return normed_.data() + row * hidden; },
                  [&](int64_t row, const Floats* sums) {
                    T* to = qkv_.data() + row * qkv_width() + p * kPanel;
                    for (int v = 0; v < kVectors; ++v)
                      if (p * kPanel + v * kLanes < qkv_width()) write(to + v * kLanes, sums[v]);
                  });
    });
    place_keys(step, kv, i);
    if (every && (i + 1) % every == 0 && i + 1 < d_.num_layers) {
      const FlushDenormals as_usual(false);
      on_layer(i + 1);
    }
    attend(step, kv, i);
    add_product(layer.output, context_, num_rows, x);
    normalize_rows(x, layer.mlp_norm, num_rows);
    if (layer.bias)
      run_experts(layer, num_rows, x);
    else
      feed_forward(layer, num_rows, x);
  }
}

// Throws invalid_argument where a token, a position or a block does not exist, or a weight: nothing has been written then. The
// arrays of a step are as long as it says.
template <class T> void Model<T>::check(const Step& step) const {
  ledger_.require_complete();
  require(step.num_rows >= 0 && step.num_rows <= kMostRows && step.num_slices >= 0 && step.num_slices <= step.num_rows &&
              step.num_entries >= 0 && step.num_blocks >= 0, "a size of a step is out of range");
  if (!step.num_rows) return;
  require(step.token_ids && step.positions && step.first_rows && step.tables && step.first_blocks, "a step lacks an array");
  require(step.first_rows[0] == 0 && step.first_rows[step.num_slices] == step.num_rows,
          "the slices of a step are not its rows");
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

template <class T> void Model<T>::embed(const Step& step, T* x) {
  const int64_t groups = embedding_.groups;
  for (int64_t t = 0; t < step.num_rows; ++t) {
    const int64_t token = step.token_ids[t];
    const uint32_t* from = embedding_.panel(token / kPanel) + token % kPanel;
    uint32_t* to = reinterpret_cast<uint32_t*>(x + t * d_.hidden_size);
    for (int64_t g = 0; g < groups; ++g) to[g] = from[g * kPanel];
  }
}

// Cosines and sines of every row's position (Su et al. 2021, section 3.4.2).
template <class T> void Model<T>::turn(const Step& step) {
  const int64_t pairs = d_.head_dim / 2;
  grow(cos_, step.num_rows * pairs);
  grow(sin_, step.num_rows * pairs);
  threads_.run(step.num_rows, [&](int64_t t, int) {
    for (int64_t i = 0; i < pairs; ++i)
      sine_cosine(static_cast<float>(step.positions[t]) * frequencies_[i], &sin_[t * pairs + i], &cos_[t * pairs + i]);
  });
}

template <class T> void Model<T>::normalize_rows(const T* x, const T* weight, int64_t num_rows) {
  threads_.run((num_rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
    for (int64_t t = task * kRowsPerTask; t < std::min(num_rows, (task + 1) * kRowsPerTask); ++t)
      normalize(x + t * d_.hidden_size, weight, d_.hidden_size, static_cast<float>(d_.eps),
                normed_.data() + t * d_.hidden_size);
  });
}

// Rotates queries and keys, which go to the pool as values do.
template <class T> void Model<T>::place_keys(const Step& step, T* pool, int64_t layer) {
  const int64_t C = d_.head_dim, H = d_.num_heads, K = d_.num_kv_heads;
  threads_.run((step.num_rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
    const int64_t first = task * kRowsPerTask, last = std::min(step.num_rows, first + kRowsPerTask);
    int64_t s = std::upper_bound(step.first_rows, step.first_rows + step.num_slices, first) - step.first_rows - 1;
    for (int64_t t = first; t < last; ++t) {
      while (t >= step.first_rows[s + 1]) ++s;
      T* row = qkv_.data() + t * qkv_width();
      const float *cos = cos_.data() + t * (C / 2), *sin = sin_.data() + t * (C / 2);
      const int64_t position = step.positions[t];
      const int64_t block = step.tables[step.first_blocks[s] + position / kBlock];
      for (int64_t h = 0; h < H; ++h) rotate(row + h * C, cos, sin, C, queries_.data() + (t * H + h) * C);
      for (int64_t h = 0; h < K; ++h) {
        rotate(row + (H + h) * C, cos, sin, C, slot(pool, block, layer, 0, h) + position % kBlock * C);
        std::memcpy(slot(pool, block, layer, 1, h) + position % kBlock * C, row + (H + K + h) * C, C * sizeof(T));
      }
    }
  });
}

template <class T> void Model<T>::attend(const Step& step, const T* pool, int64_t layer) {
  const int64_t C = d_.head_dim, K = d_.num_kv_heads, G = group();
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
    const auto query = [&](int64_t row) {
      return queries_.data() + ((tile.first + row / G) * d_.num_heads + head * G + row % G) * C;
    };
    for (int64_t first = 0, b = 0; first < end; first += kBlock, ++b) {
      const int64_t block = step.tables[step.first_blocks[tile.slice] + b];
      const int64_t next = first + kBlock < end ? step.tables[step.first_blocks[tile.slice] + b + 1] - block : 0;
      T* base = const_cast<T*>(pool);
      state.take_block(slot(base, block, layer, 0, head), slot(base, block, layer, 1, head),
                       std::min<int64_t>(kBlock, end - first), next * block_words());
      const int64_t unseen = std::max<int64_t>(0, first - start) * G;  // rows before the block
      state.meet(unseen, num_rows - unseen, scale, query, [&](int64_t row) {
        return static_cast<int>(std::min<int64_t>(kBlock, start + row / G + 1 - first));
      });
    }
    for (int64_t row = 0; row < num_rows; ++row)
      state.finish(row, context_.data() + ((tile.first + row / G) * d_.num_heads + head * G + row % G) * C);
  });
}

// x += from W^T
template <class T>
void Model<T>::add_product(const Matrix& matrix, const std::vector<Operand<T>>& from, int64_t num_rows, T* x) {
  threads_.run(matrix.panels(), [&](int64_t p, int) {
    multiply<T>(matrix.panel(p), matrix.groups, num_rows,
                [&](int64_t row) { return from.data() + row * matrix.inputs; },
                [&](int64_t row, const Floats* sums) {
                  T* to = x + row * matrix.outputs + p * kPanel;
                  for (int v = 0; v < kVectors; ++v)
                    if (p * kPanel + v * kLanes < matrix.outputs)
                      write(to + v * kLanes, read(to + v * kLanes) + as_stored<T>(sums[v]));
                });
  });
}

// Writes a panel's 32 gated results at `to`, rounded to T, of which `left` exist.
template <class T> void write_gated(Operand<T>* to, const Floats* sums, int64_t left) {
  write_some(to, as_stored<T>(gated(sums[0], sums[2])), static_cast<int>(left));
  if (left > kLanes) write_some(to + kLanes, as_stored<T>(gated(sums[1], sums[3])), static_cast<int>(left - kLanes));
}

template <class T> void Model<T>::feed_forward(const Layer<T>& layer, int64_t num_rows, T* x) {
  const Expert& mlp = layer.experts[0];
  grow(activated_, num_rows * mlp.width);
  threads_.run(mlp.gate_up.panels(), [&](int64_t p, int) {
    multiply<T>(mlp.gate_up.panel(p), mlp.gate_up.groups, num_rows,
                [&](int64_t row) { return normed_.data() + row * d_.hidden_size; },
                [&](int64_t row, const Floats* sums) {
                  write_gated<T>(activated_.data() + row * mlp.width + p * 32, sums, mlp.width - p * 32);
                });
  });
  add_product(mlp.down, activated_, num_rows, x);
}

// Chosen experts and their weights, in fp32 throughout.
template <class T> void Model<T>::route(const Layer<T>& layer, int64_t num_rows) {
  const int64_t E = d_.num_experts, k = d_.num_choices, hidden = d_.hidden_size;
  grow(wide_, num_rows * hidden);
  grow(scores_, num_rows * E);
  grow(weights_, num_rows * k);
  grow(chosen_, num_rows * k);
  threads_.run((num_rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
    const int64_t first = task * kRowsPerTask, count = std::min(num_rows - first, kRowsPerTask);
    for (int64_t i = first * hidden; i < (first + count) * hidden; i += kLanes)
      write(wide_.data() + i, read(normed_.data() + i));
    for (int64_t p = 0; p < layer.router.panels(); ++p)
      multiply<float>(layer.router.panel(p), layer.router.groups, count,
                      [&](int64_t row) { return wide_.data() + (first + row) * hidden; },
                      [&](int64_t row, const Floats* sums) {
                        std::memcpy(scores_.data() + (first + row) * E + p * kPanel, sums,
                                    std::min<int64_t>(kPanel, E - p * kPanel) * sizeof(float));
                      });
    for (int64_t t = first; t < first + count; ++t)
      choose_experts(scores_.data() + t * E, layer.bias, E, k, static_cast<float>(d_.norm_min),
                     chosen_.data() + t * k, weights_.data() + t * k);
  });
  assigned_.sort(chosen_.data(), num_rows, k, E);
}

// x += sum of weight * expert(normed), plus the ungated shared experts. Outputs of all assignments, sorted by expert, then
// those of the shared experts, token by token, stand in expert_out_.
template <class T> void Model<T>::run_experts(const Layer<T>& layer, int64_t num_rows, T* x) {
  route(layer, num_rows);
  const int64_t E = d_.num_experts, num_assigned = num_rows * d_.num_choices, hidden = d_.hidden_size;
  const int64_t pitch = std::max(d_.expert_width, d_.shared_width);
  grow(activated_, (num_assigned + num_rows) * pitch);
  grow(expert_out_, (num_assigned + num_rows) * hidden);
  struct Work {
    int64_t expert, panel, first, count;
  };
  const auto list = [&](auto&& num_panels) {
    std::vector<Work> works;
    for (int64_t e = 0; e < static_cast<int64_t>(layer.experts.size()); ++e) {
      const int64_t first = e < E ? assigned_.first[e] : num_assigned;
      const int64_t count = e < E ? assigned_.first[e + 1] - first : num_rows;
      if (count)
        for (int64_t p = 0; p < num_panels(layer.experts[e]); ++p) works.push_back({e, p, first, count});
    }
    return works;
  };
  const std::vector<Work> ups = list([](const Expert& expert) { return expert.gate_up.panels(); });
  threads_.run(ups.size(), [&](int64_t task, int) {
    const Work& work = ups[task];
    const Expert& expert = layer.experts[work.expert];
    multiply<T>(expert.gate_up.panel(work.panel), expert.gate_up.groups, work.count,
                [&](int64_t row) {
                  return normed_.data() + (work.expert < E ? assigned_.token[work.first + row] : row) * hidden;
                },
                [&](int64_t row, const Floats* sums) {
                  write_gated<T>(activated_.data() + (work.first + row) * pitch + work.panel * 32, sums,
                              expert.width - work.panel * 32);
                });
  });
  const std::vector<Work> downs = list([](const Expert& expert) { return expert.down.panels(); });
  threads_.run(downs.size(), [&](int64_t task, int) {
    const Work& work = downs[task];
    const Expert& expert = layer.experts[work.expert];
    multiply<T>(expert.down.panel(work.panel), expert.down.groups, work.count,
                [&](int64_t row) { return activated_.data() + (work.first + row) * pitch; },
                [&](int64_t row, const Floats* sums) {
                  T* to = expert_out_.data() + (work.first + row) * hidden + work.panel * kPanel;
                  for (int v = 0; v < kVectors; ++v)
                    if (work.panel * kPanel + v * kLanes < hidden) write(to + v * kLanes, sums[v]);
                });
  });
  combine(num_rows, x);
}

// Adds in the order of the token's choices, the shared experts last.
template <class T> void Model<T>::combine(int64_t num_rows, T* x) {
  const int64_t k = d_.num_choices, hidden = d_.hidden_size;
  threads_.run((num_rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
    for (int64_t t = task * kRowsPerTask; t < std::min(num_rows, (task + 1) * kRowsPerTask); ++t)
      for (int64_t c = 0; c < hidden; c += kLanes) {
        Floats total = Floats{};
        for (int64_t choice = 0; choice < k; ++choice)
          total = multiply_add(read(expert_out_.data() + assigned_.place[t * k + choice] * hidden + c),
                               all(weights_[t * k + choice]), total);
        if (d_.shared_width) total = total + read(expert_out_.data() + (num_rows * k + t) * hidden + c);
        write(x + t * hidden + c, read(x + t * hidden + c) + as_stored<T>(total));
      }
  });
}

// fp32 logits of rows of the last layer's output (left out when `logits` is null), and each row's largest, of equals the
// first.
template <class T> void Model<T>::head(const void* x_in, int64_t num_rows, float* logits, int64_t* best) {
  ledger_.require_complete();
  require(num_rows >= 0 && num_rows <= kMostRows && (!num_rows || (x_in && best)), "a number of rows is out of range");
  const T* x = static_cast<const T*>(x_in);
  const Matrix& matrix = head_.data ? head_ : embedding_;
  const int64_t hidden = d_.hidden_size, V = d_.vocab_size, panels = matrix.panels();
  grow(normed_, num_rows * hidden);
  std::vector<float> peaks(panels * num_rows);
  std::vector<int64_t> places(panels * num_rows);
  normalize_rows(x, norm_, num_rows);
  threads_.run(panels, [&](int64_t p, int) {
    multiply<T>(matrix.panel(p), matrix.groups, num_rows,
                [&](int64_t row) { return normed_.data() + row * hidden; },
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
    best[row] = places[row * panels + (std::max_element(first, first + panels) - first)];
  }
}

}  // namespace baton
