// The functions of instructions.h for AVX-512, and amx.h's tiles, in plain C++: those paths run where no processor has them.
//
// Semantics are those of the Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, for VFMADD213PS,
// VPMOVZXWD, VPMOVDW, VPMOVD2M, VDPBF16PS and TDPBF16PS (their "Operation"): the last two flush denormal inputs and results to
// zero and round to nearest even whatever MXCSR says. VDPBF16PS adds the product of the upper halves, then that of the lower,
// each by an FMA; what TDPBF16PS adds stands in amx.h.

#pragma once

namespace baton {

inline FloatRegister fused(FloatRegister a, FloatRegister b, FloatRegister c) {
  FloatRegister made;
  for (int i = 0; i < 16; ++i) made[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return made;
}

inline void accumulate(FloatRegister& acc, FloatRegister a, FloatRegister b) { acc = fused(a, b, acc); }
inline FloatRegister upper_half(WordRegister x) { return (FloatRegister)(x & 0xffff0000u); }

inline WordRegister widen_halves(const uint16_t* from) {
  WordRegister made;
  for (int i = 0; i < 16; ++i) {
    uint16_t half;
    std::memcpy(&half, from + i, 2);
    made[i] = half;
  }
  return made;
}

inline void narrow_halves(WordRegister x, uint16_t* to) {
  for (int i = 0; i < 16; ++i) {
    const uint16_t half = static_cast<uint16_t>(x[i]);
    std::memcpy(to + i, &half, 2);
  }
}

inline bool has_any(IntRegister mask) {
  bool found = false;
  for (int i = 0; i < 16; ++i) found |= mask[i] < 0;
  return found;
}

namespace emulated {

// Zero with its sign in place of a denormal number.
inline float flushed(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float upper(uint32_t bits) {
  float x;
  bits &= 0xffff0000u;
  std::memcpy(&x, &bits, 4);
  return flushed(x);
}

}  // namespace emulated

#if defined(BATON_EMULATE_AVX512BF16)
inline FloatRegister dot_register(FloatRegister acc, WordRegister a, WordRegister b) {
  FloatRegister made;
  for (int i = 0; i < 16; ++i) {
    using namespace emulated;
    const float odd = flushed(__builtin_fmaf(upper(a[i]), upper(b[i]), flushed(acc[i])));
    made[i] = flushed(__builtin_fmaf(upper(a[i] << 16), upper(b[i] << 16), odd));
  }
  return made;
}
#endif

#if defined(BATON_EMULATE_AMX)
namespace emulated {

// AMX's eight tiles of sixteen rows of sixteen words. Tiles 0 to 5 have `tile_rows` rows in use.
inline thread_local uint32_t tiles[8][16][16];
inline thread_local int tile_rows = 0;

inline void tile_load(int tile, const void* from, int64_t pitch) {
  std::memset(tiles[tile], 0, sizeof tiles[tile]);
  for (int row = 0; row < (tile < 6 ? tile_rows : 16); ++row)
    std::memcpy(tiles[tile][row], static_cast<const char*>(from) + row * pitch, 64);
}

inline void tile_store(int tile, void* to, int64_t pitch) {
  for (int row = 0; row < tile_rows; ++row) std::memcpy(static_cast<char*>(to) + row * pitch, tiles[tile][row], 64);
}

inline void tile_dot(int sums, int rows, int weights) {
  for (int row = 0; row < tile_rows; ++row)
    for (int n = 0; n < 16; ++n) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < 16; ++k) {
        const uint32_t a = tiles[rows][row][k], b = tiles[weights][k][n];
        even = flushed(__builtin_fmaf(upper(a << 16), upper(b << 16), even));
        odd = flushed(__builtin_fmaf(upper(a), upper(b), odd));
      }
      std::memcpy(&sum, &tiles[sums][row][n], 4);
      sum = flushed(flushed(sum) + flushed(even + odd));
      std::memcpy(&tiles[sums][row][n], &sum, 4);
    }
}

}  // namespace emulated
#endif

}  // namespace baton
