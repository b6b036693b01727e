// Which experts a token takes, and the order in which their work is laid out. Knows no weights.

#pragma once

#include <cmath>
#include <vector>

#include "lanes.h"

namespace baton {

// Turns one token's router logits into `num_choices` experts and their weights, which sum to one.
//
// The bias decides with the probabilities who is chosen but never enters the weights (Wang et al. 2024, arXiv 2408.15664).
// Of equals the lowest expert is chosen. `logits` is overwritten with probabilities.
inline void choose_experts(
    float* logits, const float* bias, int64_t num_experts, int64_t num_choices, float norm_min, int64_t* experts,
    float* weights) {
  float peak = -INFINITY, total = 0;
  for (int64_t e = 0; e < num_experts; ++e) peak = std::max(peak, logits[e]);
  for (int64_t e = 0; e < num_experts; e += kLanes) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes, num_experts - e));
    write_some(logits + e, exponential(read_some(logits + e, count) - peak), count);
  }
  for (int64_t e = 0; e < num_experts; ++e) total += logits[e];
  for (int64_t e = 0; e < num_experts; ++e) logits[e] /= total;
  float chosen_total = 0;
  for (int64_t choice = 0; choice < num_choices; ++choice) {
    int64_t best = -1;
    for (int64_t e = 0; e < num_experts; ++e) {
      if (best >= 0 && !(logits[e] + bias[e] > logits[best] + bias[best])) continue;
      bool is_taken = false;
      for (int64_t earlier = 0; earlier < choice; ++earlier) is_taken |= experts[earlier] == e;
      if (!is_taken) best = e;
    }
    experts[choice] = best;
    weights[choice] = logits[best];
    chosen_total += logits[best];
  }
  for (int64_t choice = 0; choice < num_choices; ++choice) weights[choice] /= std::max(chosen_total, norm_min);
}

// Assignments (token, choice) sorted by expert, tokens in order within one.
struct Assignments {
  std::vector<int64_t> first;  // of expert e among the sorted ones; one more entry at the end
  std::vector<int64_t> token;  // of each sorted assignment
  std::vector<int64_t> place;  // where assignment token * num_choices + choice landed

  void sort(const int64_t* experts, int64_t num_tokens, int64_t num_choices, int64_t num_experts) {
    const int64_t count = num_tokens * num_choices;
    first.assign(num_experts + 1, 0);
    token.resize(count);
    place.resize(count);
    for (int64_t a = 0; a < count; ++a) ++first[experts[a] + 1];
    for (int64_t e = 0; e < num_experts; ++e) first[e + 1] += first[e];
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t a = 0; a < count; ++a) {
      place[a] = next[experts[a]]++;
      token[place[a]] = a / num_choices;
    }
  }
};

}  // namespace baton
