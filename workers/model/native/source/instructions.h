// What differs between instruction sets, for one register: its width, a fused multiply-add, halves, a transposition.
//
// A set is chosen by the compiler's flags (workers.model.native.build); each makes a library of its own.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#else
#error "the kernels need AVX2 with FMA, AVX-512, or NEON of ARM64"
#endif

namespace baton {

// BATON_EMULATE_AVX512, and beside it BATON_EMULATE_AVX512BF16, and BATON_EMULATE_AMX: tests compile these paths for any processor.
#if defined(__AVX512F__) || defined(BATON_EMULATE_AVX512)
#define BATON_WIDE 1
#endif
#if defined(__AVX512BF16__) || defined(BATON_EMULATE_AVX512BF16) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define BATON_PAIRS 1
#endif
#if defined(__AMX_BF16__) || defined(BATON_EMULATE_AMX)
#define BATON_TILES 1
#endif

#if defined(BATON_WIDE)
constexpr int kRegisterBytes = 64, kNumRegisters = 32;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32, kNumRegisters = 16;
#else
constexpr int kRegisterBytes = 16, kNumRegisters = 32;
#endif

typedef float FloatRegister __attribute__((vector_size(kRegisterBytes)));
typedef uint32_t WordRegister __attribute__((vector_size(kRegisterBytes)));
typedef int32_t IntRegister __attribute__((vector_size(kRegisterBytes)));

}  // namespace baton

#if defined(BATON_EMULATE_AVX512)
#include "emulated.h"
#endif

namespace baton {

#if defined(BATON_EMULATE_AVX512)
#elif defined(__AVX512F__)

inline FloatRegister fused(FloatRegister a, FloatRegister b, FloatRegister c) {
  return (FloatRegister)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
inline void accumulate(FloatRegister& acc, FloatRegister a, FloatRegister b) { acc = fused(a, b, acc); }
inline FloatRegister upper_half(WordRegister x) { return (FloatRegister)(x & 0xffff0000u); }
inline WordRegister widen_halves(const uint16_t* from) {
  return (WordRegister)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline void narrow_halves(WordRegister x, uint16_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)x));
}
inline bool has_any(IntRegister mask) { return _mm512_movepi32_mask((__m512i)mask) != 0; }

#elif defined(__AVX2__)

inline FloatRegister fused(FloatRegister a, FloatRegister b, FloatRegister c) {
  return (FloatRegister)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
// acc += a * b in place. Written out, since GCC takes forms that overwrite a factor and then spills sums to memory.
inline void accumulate(FloatRegister& acc, FloatRegister a, FloatRegister b) {
  __asm__("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b));
}
// The upper half of each word as a float. The mask stays in memory: sixteen registers are few.
inline FloatRegister upper_half(WordRegister x) {
  alignas(32) static constexpr uint32_t mask[8] = {0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u,
                                                   0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};
  FloatRegister found;
  __asm__("vpand %2, %1, %0" : "=x"(found) : "x"(x), "m"(mask));
  return found;
}
inline WordRegister widen_halves(const uint16_t* from) {
  return (WordRegister)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline void narrow_halves(WordRegister x, uint16_t* to) {
  const __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)x);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
inline bool has_any(IntRegister mask) { return _mm256_movemask_epi8((__m256i)mask) != 0; }

#else

inline FloatRegister fused(FloatRegister a, FloatRegister b, FloatRegister c) { return vfmaq_f32(c, a, b); }
inline void accumulate(FloatRegister& acc, FloatRegister a, FloatRegister b) { acc = fused(a, b, acc); }
inline FloatRegister upper_half(WordRegister x) { return (FloatRegister)(x & 0xffff0000u); }
inline WordRegister widen_halves(const uint16_t* from) { return vmovl_u16(vld1_u16(from)); }
inline void narrow_halves(WordRegister x, uint16_t* to) { vst1_u16(to, vmovn_u32(x)); }
inline bool has_any(IntRegister mask) { return vmaxvq_u32(vreinterpretq_u32_s32(mask)) != 0; }

#endif

// Writes what each float, none of them a NaN or denormal, is as bfloat16, rounded to nearest even, and returns that as floats.
inline FloatRegister write_rounded(FloatRegister x, uint16_t* to) {
#if defined(__AVX512BF16__) && !defined(BATON_EMULATE_AVX512)
  const __m256i halves = (__m256i)_mm512_cvtneps_pbh((__m512)x);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
  return (FloatRegister)((WordRegister)_mm512_cvtepu16_epi32(halves) << 16);
#else
  const WordRegister bits = (WordRegister)x, words = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  narrow_halves(words, to);
  return (FloatRegister)(words << 16);
#endif
}

// Where the processor multiplies pairs of bfloat16: acc plus the product of the odd members, then that of the even ones, each
// by a fused multiply-add, as the manuals of VDPBF16PS and of BFMLALT and BFMLALB say. Sets without it do the same one by one,
// so that all give the same bits.
#if defined(BATON_PAIRS)
constexpr bool kDotsPairs = true;
#else
constexpr bool kDotsPairs = false;
#endif
#if defined(BATON_EMULATE_AVX512BF16)
#elif defined(__AVX512BF16__)
inline FloatRegister dot_register(FloatRegister acc, WordRegister a, WordRegister b) {
  return (FloatRegister)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}
#elif defined(BATON_PAIRS)
inline FloatRegister dot_register(FloatRegister acc, WordRegister a, WordRegister b) {
  const bfloat16x8_t x = vreinterpretq_bf16_u32(a), y = vreinterpretq_bf16_u32(b);
  return vbfmlalbq_f32(vbfmlaltq_f32(acc, x, y), x, y);
}
#else
inline FloatRegister dot_register(FloatRegister acc, WordRegister, WordRegister) { return acc; }
#endif

// While one lives, this thread's processor takes denormal numbers for zero, and gives zero in place of one; or, with `false`,
// computes with them as C++ has it. VDPBF16PS knows no other way than the first, so every set computes like that.
class FlushDenormals {
 public:
  explicit FlushDenormals(bool flush = true) : before_(read()) {
    constexpr uint64_t bits = kFlushBits;
    write(flush ? before_ | bits : before_ & ~bits);
  }
  ~FlushDenormals() { write(before_); }
  FlushDenormals(const FlushDenormals&) = delete;

 private:
#if defined(__AVX2__)
  static constexpr uint64_t kFlushBits = 0x8040;  // FTZ and DAZ of MXCSR
  static uint64_t read() { return _mm_getcsr(); }
  static void write(uint64_t bits) { _mm_setcsr(static_cast<uint32_t>(bits)); }
#else
  static constexpr uint64_t kFlushBits = 1 << 24;  // FZ of FPCR
  static uint64_t read() {
    uint64_t bits;
    __asm__ volatile("mrs %0, fpcr" : "=r"(bits));
    return bits;
  }
  static void write(uint64_t bits) { __asm__ volatile("msr fpcr, %0" : : "r"(bits) : "memory"); }
#endif
  const uint64_t before_;
};

// The name of this set in workers.model.native.build.
#if defined(BATON_TILES)
constexpr const char* kInstructionSet = "amx";
#elif defined(BATON_WIDE) && defined(BATON_PAIRS)
constexpr const char* kInstructionSet = "avx512bf16";
#elif defined(BATON_WIDE)
constexpr const char* kInstructionSet = "avx512";
#elif defined(__AVX2__)
constexpr const char* kInstructionSet = "avx2";
#elif defined(BATON_PAIRS)
constexpr const char* kInstructionSet = "neonbf16";
#else
constexpr const char* kInstructionSet = "neon";
#endif

// Tells the processor that this thread waits for another one.
inline void pause_briefly() {
#if defined(__AVX2__)
  _mm_pause();
#else
  __asm__ volatile("isb");
#endif
}

// Turns a square of as many rows as a register has lanes: lane j of row i becomes lane i of row j.
inline void transpose_square(WordRegister (&r)[kRegisterBytes / 4]) {
#if defined(BATON_WIDE)
  WordRegister t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const WordRegister a = t[i + j], b = t[i + j + 2];
      r[i + 2 * j] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      r[i + 2 * j + 1] = __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const WordRegister a = r[c], b = r[c + 4], d = r[c + 8], e = r[c + 12];
    const WordRegister p = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    const WordRegister q = __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    const WordRegister u = __builtin_shufflevector(d, e, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    const WordRegister v = __builtin_shufflevector(d, e, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    t[c] = __builtin_shufflevector(p, u, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    t[c + 4] = __builtin_shufflevector(p, u, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    t[c + 8] = __builtin_shufflevector(q, v, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    t[c + 12] = __builtin_shufflevector(q, v, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
#elif defined(__AVX2__)
  WordRegister t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = __builtin_shufflevector(t[i + j], t[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      r[i + 2 * j + 1] = __builtin_shufflevector(t[i + j], t[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const WordRegister a = r[c], b = r[c + 4];
    r[c] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
    r[c + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  }
#else
  const WordRegister a = __builtin_shufflevector(r[0], r[1], 0, 4, 2, 6), b = __builtin_shufflevector(r[0], r[1], 1, 5, 3, 7);
  const WordRegister c = __builtin_shufflevector(r[2], r[3], 0, 4, 2, 6), d = __builtin_shufflevector(r[2], r[3], 1, 5, 3, 7);
  r[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  r[1] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  r[2] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  r[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
#endif
}

}  // namespace baton
