// Sixteen lanes of 32 bits: a row of floats, or a row of pairs of bfloat16. Knows no matrices.
//
// Every function here computes each lane by itself, in one fixed way, so no result depends on what stands beside it.

#pragma once

#include <cstdint>
#include <cstring>
#include <immintrin.h>

#if !defined(__AVX512F__)
#error "the kernels need AVX-512"
#endif

namespace baton {

constexpr int kLanes = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

struct Bf16 {
  uint16_t bits;
};

// How many numbers of a type share one lane.
template <class T> constexpr int kDepth = 4 / sizeof(T);

template <class V> inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <class V> inline void store(void* to, V v) { std::memcpy(to, &v, sizeof(V)); }

inline Floats all(float x) { return Floats{} + x; }
inline Words all_words(uint32_t x) { return Words{} + x; }
inline Floats pick(Ints mask, Floats yes, Floats no) { return (Floats)(((Ints)yes & mask) | ((Ints)no & ~mask)); }
inline Floats larger(Floats a, Floats b) { return pick(a > b, a, b); }

// a * b + c with one rounding.
inline Floats multiply_add(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

// The even and the odd members of sixteen pairs of bfloat16.
inline Floats low(Words pairs) { return (Floats)(pairs << 16); }
inline Floats high(Words pairs) { return (Floats)(pairs & 0xffff0000u); }

// acc += a * b, where a lane holds kDepth<T> numbers of each; their order of addition is fixed.
template <class T> inline Floats dot(Floats acc, Words a, Words b) {
  if constexpr (kDepth<T> == 1) return multiply_add((Floats)a, (Floats)b, acc);
#if defined(__AVX512BF16__)
  return (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  return multiply_add(high(a), high(b), multiply_add(low(a), low(b), acc));
#endif
}

// The upper half of each float, rounded to nearest even, in the low bits of its lane.
inline Words rounded(Floats x) {
  const Words bits = (Words)x;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

// Sixteen consecutive numbers of a type, as floats, and back.
template <class T> inline Floats read(const T* from);
template <> inline Floats read(const float* from) { return load<Floats>(from); }
template <> inline Floats read(const Bf16* from) {
  return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
}
template <class T> inline void write(T* to, Floats x);
template <> inline void write(float* to, Floats x) { store(to, x); }
template <> inline void write(Bf16* to, Floats x) { store(to, __builtin_convertvector(rounded(x), Halves)); }

// The same, of the first `count` of sixteen; what is missing reads as zero.
template <class T> inline Floats read_some(const T* from, int count) {
  if (count >= kLanes) return read(from);
  T whole[kLanes] = {};
  std::memcpy(whole, from, count * sizeof(T));
  return read(whole);
}
template <class T> inline void write_some(T* to, Floats x, int count) {
  if (count >= kLanes) return write(to, x);
  T whole[kLanes];
  write(whole, x);
  std::memcpy(to, whole, count * sizeof(T));
}

// What a number becomes when it is stored as T.
template <class T> inline Floats as_stored(Floats x) {
  if constexpr (sizeof(T) == 2) return (Floats)(rounded(x) << 16);
  return x;
}

inline float sum(Floats x) {
  x += __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  x += __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  return x[0];
}

inline float largest(Floats x) {
  x = larger(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  x = larger(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  x = larger(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  x = larger(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
  return x[0];
}

// e^x for x within +-87, and the value there beyond: 2^n times a Taylor polynomial of the rest, 1 ulp or so.
inline Floats exponential(Floats x) {
  x = larger(x, all(-87.0f));
  x = pick(x < 87.0f, x, all(87.0f));
  const Floats magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats n = multiply_add(x, all(1.44269504f), magic) - magic;
  Floats r = multiply_add(n, all(-0.693359375f), x);
  r = multiply_add(n, all(2.12194440e-4f), r);
  Floats p = all(1.0f / 5040);
  p = multiply_add(p, r, all(1.0f / 720));
  p = multiply_add(p, r, all(1.0f / 120));
  p = multiply_add(p, r, all(1.0f / 24));
  p = multiply_add(p, r, all(1.0f / 6));
  p = multiply_add(p, r, all(0.5f));
  p = multiply_add(p, r, all(1.0f));
  p = multiply_add(p, r, all(1.0f));
  return (Floats)((Ints)p + (__builtin_convertvector(n, Ints) << 23));
}

}  // namespace baton
