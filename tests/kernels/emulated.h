// The functions of instructions.h for AVX-512, in plain C++: the path of 64-byte registers runs where no processor has them.
//
// Semantics are those of the Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, for VFMADD213PS,
// VPMOVZXWD, VPMOVDW, VPMOVD2M, and VDPBF16PS (its "Operation"): that one flushes denormal inputs and results to zero, rounds
// to nearest even whatever MXCSR says, and adds the product of the upper halves, then that of the lower, each by an FMA.

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

}  // namespace baton
