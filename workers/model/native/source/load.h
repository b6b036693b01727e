// Brings a checkpoint's weights into the layout of the kernels, one tensor at a time.

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
  for (int64_t e = 0; e < d_.num_experts; ++e) layer.experts.push_back(make_expert(d_.expert_width));
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
    if (!head_.data) head_ = arena_.matrix<T>(d_.vocab_size, hidden);
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

}  // namespace baton
