// Exponential, logarithm and noise as workers/sampling/arithmetic.py and noise.py define them, operation by operation.
//
// Compiled without contraction of products and sums, so every instruction set computes the same bits as PyTorch.

#pragma once

#include <cstdint>

#include "lanes.h"

namespace baton {

constexpr int kWeightBits = 40;                // the weight of the likeliest token is 2^40
constexpr float kRounding = 12582912.0f;       // 1.5 * 2^23: adding it rounds to an integer
constexpr int32_t kRoundingBits = 0x4b400000;  // its bits; those of kRounding + n are larger by n
constexpr int32_t kRootHalfBits = 0x3f3504f3;

// ln((1 + f) 2^exponent)
BATON_INLINE Floats logarithm_from(Floats f, Floats exponent) {
  const Floats s = f / (f + 2.0f), z = s * s;
  const Floats series = ((z * 0.29874422f + 0.39977449f) * z + 0.66666777f) * z + 2.0f;
  return series * s + exponent * 0.69314718f;
}

BATON_INLINE Floats logarithm(Floats x) {
  const Ints bits = as<Ints>(x), exponent = (bits - all_ints(kRootHalfBits)) >> 23;
  return logarithm_from(as<Floats>(bits - (exponent << 23)) - 1.0f, to_floats(exponent));
}

// The weights of tempered logits before they are rounded to integers.
BATON_INLINE Floats weights(Floats logits, float largest) {
  Floats x = logits - largest;
  x = larger(x, all(-40.0f));
  const Floats shifted = x * 1.44269504f + kRounding, n = shifted - kRounding;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f;
  p = (p + 1.3981999507e-3f) * r;
  p = (p + 8.3334519073e-3f) * r;
  p = (p + 4.1665795894e-2f) * r;
  p = (p + 1.6666665459e-1f) * r;
  p = (p + 5.0000001201e-1f) * (r * r) + r + 1.0f;
  return as<Floats>(((as<Ints>(shifted) - all_ints(kRoundingBits - kWeightBits)) << 23) + as<Ints>(p));
}

BATON_INLINE Floats rounded_weights(Floats w) {
  return pick(w < all(0x1p23f), (w + 0x1p23f) - 0x1p23f, w);
}

// Adds weights, rounded to integers, exactly: the upper and the lower twenty bits of each in sums of their own.
class WeightSum {
 public:
  BATON_INLINE void add(Floats w) {
    const Floats shifted = w * 0x1p-20f + kRounding;
    high_ = high_ + as<Words>(shifted);
    low_ = low_ + as<Words>((w - (shifted - kRounding) * 0x1p20f) + kRounding);
    if (++count_ == kMost) flush();
  }
  int64_t total() {
    flush();
    return total_;
  }

 private:
  static constexpr int kMost = 1024;  // a lane's upper parts are up to 2^20: so many of them stay below 2^31

  void flush() {
    const uint32_t excess = static_cast<uint32_t>(count_) * kRoundingBits;  // 32-bit sums wrap, and so does this
    for (int lane = 0; lane < kLanes; ++lane)
      total_ += (static_cast<int64_t>(static_cast<int32_t>(high_[lane] - excess)) << 20) +
                static_cast<int32_t>(low_[lane] - excess);
    high_ = low_ = Words{};
    count_ = 0;
  }

  Words high_ = {}, low_ = {};
  int count_ = 0;
  int64_t total_ = 0;
};

// ln(total / 2^40)
inline double log_total(int64_t total) {
  const double x = static_cast<double>(total);
  int64_t bits;
  std::memcpy(&bits, &x, 8);
  double exponent = static_cast<double>((bits >> 52) - 1023), m;
  bits = (bits & ((int64_t{1} << 52) - 1)) | (int64_t{1023} << 52);
  std::memcpy(&m, &bits, 8);
  if (m > 1.4142135623730951) {
    m = m * 0.5;
    exponent = exponent + 1.0;
  }
  const double s = (m - 1.0) / (m + 1.0), z = s * s;
  double series = 2.0 / 21;
  for (int power = 19; power > 0; power -= 2) series = series * z + 2.0 / power;
  return series * s + (exponent - kWeightBits) * 0.6931471805599453;
}

// Half a unit more than the 31 random bits of each token; `ids` are token ids plus the key's low half.
BATON_INLINE Floats random_numerators(Words ids, Words key_high) {
  Words x = (ids ^ (ids >> 17)) * all_words(0xED5AD4BBu) + key_high;
  x = (x ^ (x >> 11)) * all_words(0xAC4C1B51u);
  x = (x ^ (x >> 15)) * all_words(0x31848BABu);
  return to_floats(as<Ints>((x ^ (x >> 14)) >> 1)) + 0.5f;
}

// The Gumbel variates of these numerators.
BATON_INLINE Floats gumbel(Floats numerators) {
  Floats u = numerators * 0x1p-31f;
  u = pick(u < all(1 - 0x1p-24f), u, all(1 - 0x1p-24f));
  const Floats rest = all(1.0f) - u;
  const Ints bits = as<Ints>(rest), exponent = (bits - all_ints(kRootHalfBits)) >> 23;
  const Floats f = as<Floats>(bits - (exponent << 23)) - 1.0f;
  return -logarithm(-logarithm_from(pick(exponent == Ints{}, -u, f), to_floats(exponent)));
}

// No less than the variates, and more by at most 0.07 where they are large: they are at most -ln u, and ln x is at least
// ln 2 times what the bits of x, read as an integer, say of its binary logarithm. 0.001 is far above all rounding.
BATON_INLINE Floats gumbel_bound(Floats numerators) {
  return all(158 * 0.69314718f + 1e-3f) - to_floats(as<Ints>(numerators)) * (0.69314718f * 0x1p-23f);
}

}  // namespace baton
