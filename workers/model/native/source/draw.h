// Shortcuts of drawing a token from one row of logits. The draw itself is defined by workers.sampling, in PyTorch: what is
// found here are the few tokens that can win, and the threshold of a nucleus, or that this way cannot tell.

#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "lanes.h"

namespace baton {


// ln x for normal positive x, within 2 ulp: x = 2^k m, m in [sqrt(1/2), sqrt(2)), a series in (m-1)/(m+1) (as in FreeBSD's logf).
inline Floats logarithm(Floats x) {
  const Words bits = as<Words>(x) + all_words(0x3f800000u - 0x3f3504f3u);
  const Ints k = as<Ints>(bits >> 23) - all_ints(127);
  const Floats f = as<Floats>((bits & all_words(0x007fffffu)) + all_words(0x3f3504f3u)) - 1.0f;
  const Floats s = f / (f + 2.0f), z = s * s, w = z * z;
  const Floats r = z * (w * 0.28498786688f + 0.66666662693f) + w * (w * 0.24279078841f + 0.40000972152f);
  const Floats half_square = f * f * 0.5f;
  return s * (half_square + r) - half_square + f + to_floats(k) * 0.69314718056f;
}

// 64 random bits of a token id, from a state of workers.sampling.noise (SplitMix64, Steele, Lea and Flood 2014).
inline uint64_t mixed(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// -log(-log1p(-u)) with the u that PyTorch computes from the same bits; within 1e-5 of its result.
inline Floats gumbel(Floats u) {
  const Floats rest = all(1.0f) - u, gap = all(1.0f) - rest;  // gap is u as far as `rest` knows it
  const Floats exponential = pick(gap > Floats{}, -logarithm(rest) * u / pick(gap > Floats{}, gap, all(1.0f)), u);
  return -logarithm(exponential);
}

// No less than gumbel(u), by at most 0.7 where u is small: -log(-log1p(-u)) <= -log u <= -ln 2 floor(log2 u).
inline Floats gumbel_bound(Floats u) {
  return to_floats(127 - as<Ints>(as<Words>(u) >> 23)) * 0.69314724f;
}

// What a sum must reach to be a candidate: far less below the largest than both errors and both roundings could hide.
inline float least_sum(float largest_sum) { return largest_sum - (1e-3f + 1e-6f * std::fabs(largest_sum)); }

// The tokens that may have the largest sum of logit and noise, in ascending order: their number, or -1 when that cannot be
// told, or is above `capacity`. `sums` gets the sums, within 1e-5 and rounding, and -infinity for tokens that cannot win.
inline int64_t find_candidates(const float* logits, int64_t size, uint64_t key, float* sums, int64_t* tokens,
                               int64_t capacity) {
  constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;
  float top = -INFINITY, least = -INFINITY;
  const Floats most = all(1 - 0x1p-24f);
  for (int64_t i = 0; i < size; i += kLanes) {
    uint32_t bits[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) bits[lane] = static_cast<uint32_t>(mixed(key + kGolden * (i + lane + 1)) >> 32);
    Floats u = (to_floats(load<Words>(bits)) + 0.5f) * 0x1p-32f;
    u = pick(u < most, u, most);
    const int count = static_cast<int>(std::min<int64_t>(kLanes, size - i));
    const Ints used = lane_numbers() < all_ints(count);
    const Floats logit = pick(used, read_some(logits + i, count), all(-INFINITY));
    if (any(~(logit < all(INFINITY)))) return -1;  // infinity or no number
    Floats sum = all(-INFINITY);
    if (any(logit + gumbel_bound(u) > all(least))) {
      sum = logit + gumbel(u);
      const float here = largest(sum);
      if (here > top) {
        top = here;
        least = least_sum(top);
      }
    }
    write_some(sums + i, sum, count);
  }
  if (!std::isfinite(top)) return -1;
  int64_t found = 0;
  for (int64_t i = 0; i < size; i += kLanes) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes, size - i));
    if (count == kLanes && !any(load<Floats>(sums + i) >= all(least))) continue;
    for (int lane = 0; lane < count; ++lane)
      if (sums[i + lane] >= least) {
        if (found == capacity) return -1;
        tokens[found++] = i + lane;
      }
  }
  return found;
}

// The least probability among the fewest likeliest tokens that add up to `wanted`, as found by summing in descending order
// in double and rounding each sum to float; false when a sum comes so close that its rounding errors could decide.
//
// Tokens are counted by the upper bits of their probability, then those of the decisive group by the next bits; only what
// shares all of these is sorted.
inline bool find_nucleus(const float* probabilities, int64_t size, float wanted, float* threshold) {
  constexpr double kSlack = 1e-9;  // sums of up to 2^20 probabilities in another order differ by less than 1e-9
  constexpr int64_t kGroups = 1024;
  if (size > (1 << 20)) return false;
  const double enough = (static_cast<double>(wanted) + std::nextafterf(wanted, 0.0f)) / 2;
  static thread_local std::vector<double> sums;
  static thread_local std::vector<float> members, last;
  double before = 0;
  const auto decisive = [&](const float* from, int64_t count, auto&& group) {
    sums.assign(2 * kGroups, 0.0);  // two sums a group: neighbours often share one, and each would wait for the other
    for (int64_t i = 0; i < count; ++i) sums[2 * group(from[i]) + (i & 1)] += from[i];
    for (int64_t g = kGroups; g-- > 0;) {
      const double sum = sums[2 * g] + sums[2 * g + 1];
      if (before + sum >= enough - kSlack) return g;
      before += sum;
    }
    return int64_t{-1};
  };
  const auto keep = [](const float* from, int64_t count, int64_t wanted_group, auto&& group, std::vector<float>& to) {
    to.clear();
    for (int64_t i = 0; i < count; ++i)
      if (group(from[i]) == wanted_group) to.push_back(from[i]);
  };
  const auto word = [](float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
  };
  for (int64_t i = 0; i < size; ++i)
    if (!(probabilities[i] >= 0.0f && probabilities[i] < 2.0f)) return false;
  const auto coarse = [&](float x) -> int64_t { return word(x) >> 20; };
  const auto fine = [&](float x) -> int64_t { return word(x) >> 10 & (kGroups - 1); };
  const int64_t upper = decisive(probabilities, size, coarse);
  if (upper < 0) return false;
  keep(probabilities, size, upper, coarse, members);
  const int64_t lower = decisive(members.data(), members.size(), fine);
  if (lower < 0) return false;
  keep(members.data(), members.size(), lower, fine, last);
  std::sort(last.begin(), last.end(), std::greater<float>());
  for (float probability : last) {
    before += probability;
    if (before < enough - kSlack) continue;
    *threshold = probability;
    return before > enough + kSlack;
  }
  return false;
}

// Makes logits impossible whose key does not reach the threshold.
inline void drop_below(const float* keys, int64_t size, float threshold, float* logits) {
  for (int64_t i = 0; i < size; ++i) logits[i] = keys[i] >= threshold ? logits[i] : -INFINITY;
}

}  // namespace baton
