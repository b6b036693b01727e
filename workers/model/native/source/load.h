// Brings a checkpoint's weights into the layout of the kernels, one tensor at a time, and experts' back out of it.

#pragma once

#include "model.h"

namespace baton {

template <class T> Layer<T> Model<T>::make_layer(bool is_mixture) {
  Layer<T> layer;
  layer.input_norm = arena_.vector<T>(d_.hidden_size);
  layer.mlp_norm = arena_.vector<T>(d_.hidden_size);
  layer.qkv = arena_.matrix<T>(qkv_width(), d_.hidden_size);
  layer.output = arena_.matrix<T>(d_.hidden_size, d_.num_heads * d_.head_dim);
  if (!is_mixture) {
    layer.experts.push_back(make_expert(d_.dense_width));
    return layer;
  }
  layer.router = arena_.matrix<float>(d_.num_experts, d_.hidden_size);
  layer.bias = arena_.vector<float>(d_.num_experts);
  for (int64_t s = 0; s < d_.num_slots; ++s) layer.experts.push_back(make_expert(d_.expert_width));
  if (d_.shared_width) layer.experts.push_back(make_expert(d_.shared_width));
  return layer;
}

template <class T>
void Model<T>::take(Part part, int64_t index, int64_t expert, int64_t first, int64_t count, const void* source) {
  require(source || !count, "the rows of a weight are nowhere");
  ledger_.take(part, index, expert, first, count);
  const int64_t hidden = d_.hidden_size, queries = d_.num_heads * d_.head_dim, keys = d_.num_kv_heads * d_.head_dim;
  const auto vector = [&](const auto* to) {
    std::memcpy(const_cast<void*>(static_cast<const void*>(to + first)), source, count * sizeof(*to));
  };
  const auto matrix = [&](const Matrix& to, int64_t offset) {
    pack(to, static_cast<const T*>(source), offset + first, count, kPanel, 0);
  };
  if (part == Part::kEmbedding) return matrix(embedding_, 0);
  if (part == Part::kHead) {
    if (!head_.data) head_ = arena_.matrix<T>(d_.num_tokens, hidden);
    return matrix(head_, 0);
  }
  if (part == Part::kNorm) return vector(norm_);
  Layer<T>& layer = layers_.at(index);
  const auto half = [&](int64_t lane) {
    pack(layer.experts.at(expert).gate_up, static_cast<const T*>(source), first, count, kPanel / 2, lane);
  };
  switch (part) {
    case Part::kInputNorm: return vector(layer.input_norm);
    case Part::kMlpNorm: return vector(layer.mlp_norm);
    case Part::kQuery: return matrix(layer.qkv, 0);
    case Part::kKey: return matrix(layer.qkv, queries);
    case Part::kValue: return matrix(layer.qkv, queries + keys);
    case Part::kOutput: return matrix(layer.output, 0);
    case Part::kRouter: return pack(layer.router, static_cast<const float*>(source), first, count, kPanel, 0);
    case Part::kRouterBias: return vector(layer.bias);
    case Part::kGate: return half(0);
    case Part::kUp: return half(kPanel / 2);
    case Part::kDown: return matrix(layer.experts.at(expert).down, 0);
    default: throw std::invalid_argument("no such part");
  }
}

// The inverse of `pack`: rows 0 .. count - 1 of a matrix, row-major.
template <class T> void unpack(const Matrix& matrix, int64_t count, int64_t width, int64_t offset, T* to) {
  const int64_t groups = matrix.groups;
  uint32_t* words = reinterpret_cast<uint32_t*>(to);
  for (int64_t row = 0; row < count; ++row) {
    const uint32_t* from = matrix.panel(row / width) + offset + row % width;
    for (int64_t g = 0; g < groups; ++g) words[row * groups + g] = from[g * kPanel];
  }
}

template <class T> void Model<T>::give(int64_t index, int64_t slot, void* to) const {
  require(to && slot >= 0 && slot < d_.num_slots, "no such slot, or nowhere to put it");
  const Expert& expert = mixture(index).experts[slot];
  T* values = static_cast<T*>(to);
  const int64_t size = d_.expert_width * d_.hidden_size;
  unpack(expert.gate_up, d_.expert_width, kPanel / 2, 0, values);
  unpack(expert.gate_up, d_.expert_width, kPanel / 2, kPanel / 2, values + size);
  unpack(expert.down, d_.hidden_size, kPanel, 0, values + 2 * size);
}

// A slot's memory goes to the first that takes its weights over; others copy them. What nobody takes over is filled anew.
template <class T> void Model<T>::rearrange(int64_t index, const int64_t* slots, const void* const* given) {
  mixture(index);
  Layer<T>& layer = layers_[index];
  const int64_t size = d_.expert_width * d_.hidden_size, num_slots = d_.num_slots;
  const std::vector<Expert> before(layer.experts.begin(), layer.experts.begin() + num_slots);
  std::vector<bool> is_taken(num_slots, false), has_memory(num_slots, false);
  require(slots && given, "the slots are to be filled with nothing");
  for (int64_t s = 0; s < num_slots; ++s) {
    require(slots[s] < num_slots, "no such slot");
    require(slots[s] >= 0 || given[s], "a slot gets no weights");
  }
  for (int64_t s = 0; s < num_slots; ++s) {
    if (slots[s] < 0 || is_taken[slots[s]]) continue;
    layer.experts[s] = before[slots[s]];
    is_taken[slots[s]] = has_memory[s] = true;
  }
  for (int64_t s = 0, free = 0; s < num_slots; ++s) {
    if (has_memory[s]) continue;
    while (is_taken[free]) ++free;
    const Expert expert = layer.experts[s] = before[free];
    is_taken[free] = true;
    if (slots[s] >= 0) {
      const Expert& source = before[slots[s]];
      std::memcpy(expert.gate_up.data, source.gate_up.data, source.gate_up.num_words() * 4);
      std::memcpy(expert.down.data, source.down.data, source.down.num_words() * 4);
      continue;
    }
    const T* values = static_cast<const T*>(given[s]);
    pack(expert.gate_up, values, 0, d_.expert_width, kPanel / 2, 0);
    pack(expert.gate_up, values + size, 0, d_.expert_width, kPanel / 2, kPanel / 2);
    pack(expert.down, values + 2 * size, 0, d_.hidden_size, kPanel, 0);
  }
}

}  // namespace baton
