// Draws a token from one row of logits, and finds its logprobs, as workers.sampling defines them: bit for bit.
//
// The first look at a row keeps the largest logit of every run of lanes. What the filters keep, the likeliest tokens and
// the rank of a token are then found in the few runs that can hold them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>
#include <vector>

#include "fixed.h"

namespace baton {

constexpr int kMaxTop = 20;

// How to draw from one row; what each field does is said in workers/request.py, workers/sampling/edits.py.
struct DrawSpec {
  int64_t token;         // given: only its logprobs are wanted; -1: draw one
  uint32_t key_low, key_high;
  float temperature;     // 0: the largest logit
  float min_p_offset;    // -infinity: off
  double top_p;          // 1: off
  int64_t top_k;         // 0: off
  double presence, frequency;
  float repetition;
  int32_t num_top;       // -1: no logprobs
  int64_t num_biases, num_banned, num_seen;
  const int32_t* bias_ids;
  const float* biases;
  const int32_t* banned_ids;
  const int32_t* seen_ids;
  const int32_t* seen_counts;
  const uint32_t* allowed;  // 32 tokens a word; nullptr: all
};

struct Drawn {
  int64_t token;    // kNoNumber: a logit is +infinity or no number; kOutside: a token id is not in the vocabulary
  int64_t rank;
  float logprob;
  int32_t num_top;
  int32_t top_ids[kMaxTop];
  float top_logprobs[kMaxTop];
};
constexpr int64_t kNoNumber = -1, kOutside = -2;

// Draws from rows one after the other; keeps its memory between them.
class RowDraw {
 public:
  // The logits are changed on the way, and are as they were afterwards.
  void run(float* logits, int64_t size, const DrawSpec& spec, Drawn* drawn) {
    look_at(logits, size);
    drawn->token = kOutside;
    if (!is_inside(&spec.token, spec.token < 0 ? 0 : 1) || !is_inside(spec.bias_ids, spec.num_biases) ||
        !is_inside(spec.banned_ids, spec.num_banned) || !is_inside(spec.seen_ids, spec.num_seen))
      return;
    if (spec.token >= 0) {
      drawn->token = spec.token;
    } else {
      edit(spec);
      if (spec.allowed) keep_allowed(spec.allowed);
      drawn->token = draw(spec);
      if (x_ != logits) look_at(logits, size);
      restore();
    }
    if (drawn->token < 0 || spec.num_top < 0) return;
    if (scan() && top_ > -INFINITY)
      find_logprobs(spec.num_top, drawn);
    else
      drawn->token = kNoNumber;
  }

 private:
  static constexpr int64_t kGroup = 1024;  // tokens of a group: 64 a lane

  struct Edit {
    int32_t id;
    float value;
  };
  struct Candidate {
    float logit;
    int32_t id;
  };

  void look_at(float* logits, int64_t size) {
    x_ = logits;
    size_ = size;
    num_groups_ = (size + kGroup - 1) / kGroup;
    is_scanned_ = false;
  }

  template <class Id> bool is_inside(const Id* ids, int64_t count) const {
    return std::all_of(ids, ids + count, [&](Id id) { return id >= 0 && id < size_; });
  }
  int64_t end_of(int64_t group) const { return std::min(size_, (group + 1) * kGroup); }

  // Sixteen logits from `at` on; beyond the end there is nothing that could be drawn.
  BATON_INLINE Floats logits(int64_t at) const {
    if (at + kLanes <= size_) return read(x_ + at);
    float some[kLanes];
    std::fill_n(some, kLanes, -INFINITY);
    std::copy_n(x_ + at, size_ - at, some);
    return read(some);
  }

  void edit(const DrawSpec& spec) {
    edits_.clear();
    const auto set = [&](int32_t id, float value) {
      edits_.push_back({id, x_[id]});
      x_[id] = value;
    };
    for (int64_t i = 0; i < spec.num_biases; ++i) set(spec.bias_ids[i], x_[spec.bias_ids[i]] + spec.biases[i]);
    for (int64_t i = 0; i < spec.num_banned; ++i) set(spec.banned_ids[i], -INFINITY);
    for (int64_t i = 0; i < spec.num_seen; ++i) {
      const int32_t id = spec.seen_ids[i], count = spec.seen_counts[i];
      float value = x_[id];
      if (spec.repetition != 1) value = value > 0 ? value / spec.repetition : value * spec.repetition;
      if (spec.presence != 0 || spec.frequency != 0)
        value -= static_cast<float>(spec.frequency * count + (count > 0 ? spec.presence : 0.0));
      set(id, value);
    }
  }

  // Looks from now on at a copy of the row in which nothing else can be drawn.
  void keep_allowed(const uint32_t* allowed) {
    allowed_.resize(size_);
    for (int64_t first = 0; first < size_; first += 32) {
      const int64_t end = std::min(size_, first + 32);
      const uint32_t word = allowed[first / 32];
      if (word == 0)
        std::fill(allowed_.begin() + first, allowed_.begin() + end, -INFINITY);
      else
        for (int64_t i = first; i < end; ++i) allowed_[i] = (word >> (i - first)) & 1 ? x_[i] : -INFINITY;
    }
    look_at(allowed_.data(), size_);
  }

  void restore() {
    for (auto at = edits_.rbegin(); at != edits_.rend(); ++at) x_[at->id] = at->value;
    if (!edits_.empty()) is_scanned_ = false;
  }

  // Finds the largest logit of every lane and every group, and of all; false where one is +infinity or no number.
  bool scan() {
    if (is_scanned_) return is_sound_;
    maxima_.resize(num_groups_ * kLanes);
    tops_.resize(num_groups_);
    top_ = -INFINITY;
    Ints bad = {};
    for (int64_t group = 0; group < num_groups_; ++group) {
      Floats most = all(-INFINITY);
      for (int64_t i = group * kGroup, end = end_of(group); i < end; i += kLanes) {
        const Floats x = logits(i);
        bad = bad | ~(x < all(INFINITY));
        most = larger(most, x);
      }
      store(&maxima_[group * kLanes], most);
      tops_[group] = largest(most);
      top_ = std::max(top_, tops_[group]);
    }
    is_scanned_ = true;
    return is_sound_ = !any(bad);
  }

  int64_t draw(const DrawSpec& spec) {
    const bool has_top_k = spec.top_k > 0 && spec.top_k < size_, has_top_p = spec.top_p < 1;
    const bool is_greedy = spec.temperature == 0, has_min_p = spec.min_p_offset > -INFINITY;
    const bool is_filtered = has_top_k || has_top_p || has_min_p;
    if (is_greedy || is_filtered) {
      if (!scan()) return kNoNumber;
      if (top_ == -INFINITY) return 0;
    }
    if (is_greedy) return first_top();
    temperature_ = spec.temperature;
    kept_ = {};
    if (is_filtered) {
      kept_.top = top_ / temperature_;
      if (kept_.top == INFINITY) return kNoNumber;
      if (has_top_k) keep_largest(spec.top_k);
      if (has_top_p) keep_nucleus(spec.top_p);
      if (has_min_p) kept_.least = std::max(kept_.least, kept_.top + spec.min_p_offset);
    }
    const bool is_tempered = temperature_ != 1;
    if (has_top_k) return is_tempered ? best_sum<true, true, true>(spec) : best_sum<false, true, true>(spec);
    if (is_filtered) return is_tempered ? best_sum<true, true>(spec) : best_sum<false, true>(spec);
    return is_tempered ? best_sum<true, false>(spec) : best_sum<false, false>(spec);
  }

  int64_t first_top() const {
    for (int64_t group = 0;; ++group)
      if (tops_[group] == top_)
        for (int64_t i = group * kGroup;; ++i)
          if (x_[i] == top_) return i;
  }

  // Looks from now on at nothing but the k largest logits, and those that tie with the last of them once they are tempered.
  void keep_largest(int64_t k) {
    collect(k);
    const auto tempered = [&](float logit) { return logit / temperature_; };
    few_.clear();
    for (const Candidate& candidate : candidates_) few_.push_back(candidate.logit);
    std::nth_element(few_.begin(), few_.begin() + (k - 1), few_.end(), std::greater<float>());
    const float least = tempered(few_[k - 1]);
    few_.clear();
    few_ids_.clear();
    for (const Candidate& candidate : candidates_) {
      if (!(tempered(candidate.logit) >= least)) continue;
      few_.push_back(candidate.logit);
      few_ids_.push_back(candidate.id);
    }
    few_ids_.resize((few_ids_.size() + kLanes - 1) / kLanes * kLanes);
    look_at(few_.data(), static_cast<int64_t>(few_.size()));
    scan();
  }

  // Fills candidates_ with at least the k largest logits, and all that division by a temperature up to 2 could make equal to
  // the last of them, in the order of their tokens.
  void collect(int64_t k) {
    const int64_t num_lanes = num_groups_ * kLanes;
    float least = -INFINITY;
    if (k <= num_lanes / 4) {  // as many lanes as that have a maximum that reaches this one
      least = bound_of(maxima_, k, bound_of(tops_, k, -INFINITY));
    } else if (const int64_t part = k * num_lanes / size_ * 5 / 4 + 32; part < num_lanes) {  // judged by some of all
      few_.resize(num_lanes);
      for (int64_t group = 0; group < num_groups_; ++group) store(&few_[group * kLanes], logits(group * kGroup));
      least = bound_of(few_, part, -INFINITY);
    }
    for (int i = 0; i < 4; ++i) least = std::nextafter(least, -INFINITY);
    collect_from(least);
    if (static_cast<int64_t>(candidates_.size()) < std::min(k, size_)) collect_from(-INFINITY);
  }

  void collect_from(float least) {
    candidates_.clear();
    for (int64_t group = 0; group < num_groups_; ++group) {
      if (tops_[group] < least) continue;
      for (int64_t i = group * kGroup, end = end_of(group); i < end; i += kLanes) {
        if (!any(logits(i) >= all(least))) continue;
        for (int64_t id = i; id < std::min(end, i + kLanes); ++id)
          if (x_[id] >= least) candidates_.push_back({x_[id], static_cast<int32_t>(id)});
      }
    }
  }

  // The k-th largest of those values that reach `least`; `least` where there are not so many.
  float bound_of(const std::vector<float>& values, int64_t k, float least) {
    bounds_.clear();
    for (float value : values)
      if (value >= least) bounds_.push_back(value);
    if (k > static_cast<int64_t>(bounds_.size())) return least;
    std::nth_element(bounds_.begin(), bounds_.begin() + (k - 1), bounds_.end(), std::greater<float>());
    return bounds_[k - 1];
  }

  // What the filters keep: tempered logits from `least` on that have at least this weight; `top` is the largest.
  struct Kept {
    float top = INFINITY, least = -INFINITY, weight = 0;
  };

  // The sum of all weights, of tokens that are kept so far. `members_` gets those of at least `member`, rounded.
  template <bool kIsTempered, bool kHasMembers> int64_t add_weights(float member) {
    WeightSum sum;
    const bool are_all_kept = kept_.least == -INFINITY;
    start_members();
    for (int64_t group = 0; group < num_groups_; ++group) {
      const float most = kIsTempered ? tops_[group] / temperature_ : tops_[group];
      if (most < kept_.least || most - kept_.top < -29.0f) continue;  // all of them weigh nothing
      for (int64_t i = group * kGroup, end = end_of(group); i < end; i += kLanes) {
        const Floats logit = kIsTempered ? logits(i) / temperature_ : logits(i);
        Floats w = weights(logit, kept_.top);
        if (!are_all_kept) w = pick(logit >= all(kept_.least), w, Floats{});
        sum.add(w);
        if (kHasMembers && any(w >= all(member - 0.5f))) add_members(rounded_weights(w), member);
      }
    }
    return sum.total();
  }

  // members_ has room for every token and a vector more, so that each can be written before it is known to stay.
  void start_members() {
    members_.resize(std::max(members_.size(), static_cast<size_t>(size_) + 2 * kLanes));
    num_members_ = 0;
  }

  BATON_INLINE void add_members(Floats w, float member) {
    float some[kLanes];
    store(some, w);
    float* to = members_.data() + num_members_;
    for (float weight : some) {
      *to = weight;
      to += weight >= member;  // no branch: it would be guessed wrong half of the time
    }
    num_members_ = to - members_.data();
  }

  // Finds the weight that ends the nucleus. Only the heaviest tokens are looked at one by one; how light they have to be is
  // guessed from some of all tokens. Where the guess was too high, all that weigh anything are looked at.
  void keep_nucleus(double p) {
    const bool is_tempered = temperature_ != 1;
    const float guess = guess_weight(p + (1 - p) / 2);
    const int64_t total = is_tempered ? add_weights<true, true>(guess) : add_weights<false, true>(guess);
    const int64_t wanted = static_cast<int64_t>(std::ceil(static_cast<double>(total) * p));
    kept_.weight = last_weight(wanted);
    if (kept_.weight == 0) {
      is_tempered ? add_weights<true, true>(1) : add_weights<false, true>(1);
      kept_.weight = last_weight(wanted);
    }
    // A logit below this cannot weigh so much: logarithm and weights are far more exact than one in a thousand.
    const float reach = std::log(kept_.weight) - kWeightBits * 0.6931472f;
    kept_.least = std::max(kept_.least, kept_.top + reach - (1e-3f + 1e-6f * std::fabs(kept_.top)));
  }

  // A weight that about this part of the sum reaches, judged by one vector of every group; at least 1.
  float guess_weight(double part) {
    start_members();
    WeightSum sum;
    for (int64_t group = 0; group < num_groups_; ++group) {
      const Floats logit = logits(group * kGroup) / temperature_;
      const Floats w = rounded_weights(pick(logit >= all(kept_.least), weights(logit, kept_.top), Floats{}));
      sum.add(w);
      if (any(w >= all(1.0f))) add_members(w, 1);
    }
    const int64_t total = sum.total();
    return total == 0 ? 1 : std::max(1.0f, last_weight(static_cast<int64_t>(static_cast<double>(total) * part)));
  }

  // The least of the fewest heaviest members that add up to `wanted`; 0 where all together do not. Members are added up by the
  // upper bits of their weight, those of the decisive run by the next bits; only what shares all of these is sorted.
  float last_weight(int64_t wanted) {
    constexpr int32_t kRuns = 1024, kTables = 4, kBitsOfOne = 127 << 23;
    float* const members = members_.data();
    for (const int shift : {19, 9}) {
      if (num_members_ < 64) break;
      const auto place = [&](float weight) {
        int32_t bits;
        std::memcpy(&bits, &weight, 4);
        return ((bits - kBitsOfOne) >> shift) & (kRuns - 1);  // 2^40 is 640 runs of the first kind above 1
      };
      // Several sums a run: neighbours often share one, and each would wait for the other.
      sums_.assign(kTables * kRuns, 0);
      for (int64_t i = 0; i < num_members_; ++i)
        sums_[kTables * place(members[i]) + (i & (kTables - 1))] += static_cast<int64_t>(members[i]);
      const auto sum_of = [&](int32_t run) {
        const int64_t* first = sums_.data() + kTables * run;
        return std::accumulate(first, first + kTables, int64_t{0});
      };
      int32_t run = kRuns - 1;
      for (; run >= 0 && sum_of(run) < wanted; --run) wanted -= sum_of(run);
      if (run < 0) return 0;
      const auto is_elsewhere = [&](float weight) { return place(weight) != run; };
      num_members_ = std::remove_if(members, members + num_members_, is_elsewhere) - members;
    }
    std::sort(members, members + num_members_, std::greater<float>());
    for (int64_t i = 0; i < num_members_; ++i) {
      wanted -= static_cast<int64_t>(members[i]);
      if (wanted <= 0) return members[i];
    }
    return 0;
  }

  // The token with the largest sum of tempered logit and noise among those kept, of equals the lowest.
  template <bool kIsTempered, bool kIsFiltered, bool kIsFew = false> int64_t best_sum(const DrawSpec& spec) const {
    const Words key_high = all_words(spec.key_high);
    const Words numbers = as<Words>(lane_numbers());
    const Floats least = all(kept_.least);
    float best = -INFINITY;
    int64_t token = 0;
    Ints bad = {};
    for (int64_t group = 0; group < num_groups_; ++group) {
      if (kIsFiltered && (kIsTempered ? tops_[group] / temperature_ : tops_[group]) < kept_.least) continue;
      for (int64_t i = group * kGroup, end = end_of(group); i < end; i += kLanes) {
        Floats x = logits(i);
        if (!kIsFiltered) bad = bad | ~(x < all(INFINITY));
        if (kIsTempered) x = x / temperature_;
        const Words ids = kIsFew ? load<Words>(&few_ids_[i]) : numbers + all_words(static_cast<uint32_t>(i));
        const Floats numerators = random_numerators(ids + all_words(spec.key_low), key_high);
        Ints can_win = x + gumbel_bound(numerators) > all(best);
        if (kIsFiltered) can_win = can_win & (x >= least);
        if (!any(can_win)) continue;
        if (kIsFiltered && kept_.weight > 0) {
          can_win = can_win & (rounded_weights(weights(x, kept_.top)) >= all(kept_.weight));
          if (!any(can_win)) continue;
        }
        float sums[kLanes];
        store(sums, pick(can_win, x + gumbel(numerators), all(-INFINITY)));
        for (int lane = 0; lane < kLanes; ++lane)
          if (sums[lane] > best) {
            best = sums[lane];
            token = i + lane;
          }
      }
    }
    if (any(bad) || best == INFINITY) return kNoNumber;
    return kIsFew ? few_ids_[token] : token;
  }

  void find_logprobs(int32_t num_top, Drawn* drawn) {
    kept_ = {.top = top_};
    const double base = static_cast<double>(top_) + log_total(add_weights<false, false>(0));
    const auto logprob = [&](float logit) { return static_cast<float>(static_cast<double>(logit) - base); };
    drawn->logprob = logprob(x_[drawn->token]);
    drawn->rank = rank_of(drawn->token);
    drawn->num_top = static_cast<int32_t>(std::min<int64_t>({num_top, kMaxTop, size_}));
    if (drawn->num_top == 0) return;
    collect(drawn->num_top);
    std::partial_sort(candidates_.begin(), candidates_.begin() + drawn->num_top, candidates_.end(), [](auto a, auto b) {
      return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
    });
    for (int32_t i = 0; i < drawn->num_top; ++i) {
      drawn->top_ids[i] = candidates_[i].id;
      drawn->top_logprobs[i] = logprob(candidates_[i].logit);
    }
  }

  // From 1 on: tokens that are likelier, or as likely with a lower id, come first.
  int64_t rank_of(int64_t token) const {
    const float own = x_[token];
    int64_t rank = 1;
    for (int64_t group = 0; group < num_groups_; ++group) {
      if (tops_[group] < own) continue;
      Ints before = {};
      for (int64_t i = group * kGroup, end = end_of(group); i < end; i += kLanes) {
        const Floats x = logits(i);
        const Ints is_lower = lane_numbers() < all_ints(static_cast<int32_t>(token - i));
        before = before - ((x > all(own)) | ((x == all(own)) & is_lower));
      }
      for (int lane = 0; lane < kLanes; ++lane) rank += before[lane];
    }
    return rank;
  }

  float* x_ = nullptr;
  int64_t size_ = 0, num_groups_ = 0;
  bool is_scanned_ = false, is_sound_ = false;
  std::vector<float> maxima_, tops_, bounds_, members_, few_, allowed_;
  std::vector<int32_t> few_ids_;
  int64_t num_members_ = 0;
  float top_ = 0, temperature_ = 1;
  Kept kept_;
  std::vector<Edit> edits_;
  std::vector<Candidate> candidates_;
  std::vector<int64_t> sums_;
};

}  // namespace baton
