// Tries whether this processor's product of pairs of bfloat16 rounds as its manual says, and so as all other sets do.

#pragma once

#include "lanes.h"

namespace baton {

// acc plus the product of the odd members, then that of the even ones.
inline FloatRegister dot_by_fma(FloatRegister acc, WordRegister a, WordRegister b) {
  acc = fused((FloatRegister)(a & 0xffff0000u), (FloatRegister)(b & 0xffff0000u), acc);
  return fused((FloatRegister)(a << 16), (FloatRegister)(b << 16), acc);
}

// Whether pairs of any size come out the same: of like sizes, where sums cancel and round; far apart; and at the ends of the
// range, where denormals are flushed. 32,000 pairs.
inline bool dots_like_fma() {
  const FlushDenormals flush;
  uint64_t state = 1;
  const auto next = [&] {
    state = state * 6364136223846793005ull + 1442695040888963407ull;  // Knuth, MMIX
    return static_cast<uint32_t>(state >> 32);
  };
  for (int round = 0; round < 2000; ++round) {
    // Exponents from `least` on, `spread` of them: 127 is that of one.
    const uint32_t spread = round % 5 == 4 ? 100 : 1 + round % 5 * 6, least = round % 2 ? 127 - spread / 2 : next() % 50;
    const auto half = [&] { return (next() & 0x8000) | (least + next() % spread) << 7 | (next() & 0x7f); };
    uint32_t a[kLanes], b[kLanes];
    float sums[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      a[i] = half() << 16 | half();
      b[i] = half() << 16 | half();
      const uint32_t bits = half() << 16 | (next() & 0xffff);
      std::memcpy(&sums[i], &bits, 4);
    }
    for (int p = 0; p < kParts; ++p) {
      const auto x = load<WordRegister>(a + p * kPartLanes), y = load<WordRegister>(b + p * kPartLanes);
      const auto acc = load<FloatRegister>(sums + p * kPartLanes);
      const FloatRegister found = dot_register(acc, x, y), expected = dot_by_fma(acc, x, y);
      if (std::memcmp(&found, &expected, sizeof found) != 0) return false;
    }
  }
  return true;
}

}  // namespace baton
