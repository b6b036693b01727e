// Sixteen lanes of 32 bits: a row of floats, or a row of pairs of bfloat16. Knows no matrices.
//
// Every function here computes each lane by itself, in one fixed way that is the same on every instruction set, so no
// result depends on what stands beside it or on the processor.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "instructions.h"

namespace baton {

#define BATON_INLINE inline __attribute__((always_inline))

// Calls body(0), body(1), ... body(N - 1), each with a constant, so that what they index stays in registers.
template <int N, class Body> BATON_INLINE void repeat(Body&& body) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}
#define BATON_BODY __attribute__((always_inline))

constexpr int kLanes = 16;
constexpr int kPartLanes = kRegisterBytes / 4;   // lanes of one register
constexpr int kParts = kLanes / kPartLanes;      // registers of sixteen lanes

// Sixteen lanes in as many registers as the instruction set needs for them. N is one register's vector type.
template <class N> struct Lanes {
  using Part = N;
  using Element = std::remove_reference_t<decltype(N{}[0])>;
  N part[kParts];

  Element operator[](int lane) const { return part[lane / kPartLanes][lane % kPartLanes]; }
};
using Floats = Lanes<FloatRegister>;
using Words = Lanes<WordRegister>;
using Ints = Lanes<IntRegister>;

struct Bf16 {
  uint16_t bits;
};

// How many numbers of a type share one lane.
template <class T> constexpr int kDepth = 4 / sizeof(T);

// Whether products of this type take pairs of numbers as they are stored; else each number is widened to a float.
template <class T> constexpr bool kTakesPairs = kDotsPairs && sizeof(T) == 2;

// What the rows of a product are kept as: values of T, in the form that the multiplication takes.
template <class T> using Operand = std::conditional_t<kTakesPairs<T>, T, float>;

template <class V> struct IsLanes : std::false_type {};
template <class N> struct IsLanes<Lanes<N>> : std::true_type {};

// Register by register: a copy of all sixteen lanes at once would go through memory in smaller pieces.
template <class V> BATON_INLINE V load(const void* from) {
  V v;
  if constexpr (IsLanes<V>::value) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p)
      v.part[p] = load<typename V::Part>(static_cast<const char*>(from) + p * kRegisterBytes);
  } else {
    std::memcpy(&v, from, sizeof(V));
  }
  return v;
}

template <class V> BATON_INLINE void store(void* to, V v) {
  if constexpr (IsLanes<V>::value) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) store(static_cast<char*>(to) + p * kRegisterBytes, v.part[p]);
  } else {
    std::memcpy(to, &v, sizeof(V));
  }
}

// Calls make(p) for every register and keeps what it returns.
template <class L, class Make> BATON_INLINE L each(Make&& make) {
  L made;
#pragma GCC unroll 4
  for (int p = 0; p < kParts; ++p) made.part[p] = make(p);
  return made;
}

// The same bits under another type.
template <class To, class From> BATON_INLINE To as(From x) {
  return each<To>([&](int p) { return (typename To::Part)x.part[p]; });
}

// x in every lane; x - 0 is x, a negative zero included.
BATON_INLINE FloatRegister all_of_register(float x) { return x - FloatRegister{}; }
BATON_INLINE Floats all(float x) {
  return each<Floats>([&](int) { return all_of_register(x); });
}
BATON_INLINE Words all_words(uint32_t x) {
  return each<Words>([&](int) { return x + WordRegister{}; });
}
BATON_INLINE Ints all_ints(int32_t x) {
  return each<Ints>([&](int) { return x + IntRegister{}; });
}
// 0, 1, 2, ... 15
BATON_INLINE Ints lane_numbers() {
  constexpr int32_t numbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load<Ints>(numbers);
}

#define BATON_BINARY(op)                                                                    \
  template <class N> BATON_INLINE Lanes<N> operator op(Lanes<N> a, Lanes<N> b) {            \
    return each<Lanes<N>>([&](int p) { return a.part[p] op b.part[p]; });                   \
  }
BATON_BINARY(+)
BATON_BINARY(-)
BATON_BINARY(*)
BATON_BINARY(/)
BATON_BINARY(&)
BATON_BINARY(|)
BATON_BINARY(^)
#undef BATON_BINARY
#define BATON_SHIFT(op)                                                          \
  template <class N> BATON_INLINE Lanes<N> operator op(Lanes<N> a, int bits) {   \
    return each<Lanes<N>>([&](int p) { return a.part[p] op bits; });             \
  }
BATON_SHIFT(<<)
BATON_SHIFT(>>)
#undef BATON_SHIFT
// All bits of a lane are set where the comparison holds.
#define BATON_COMPARISON(op)                                                     \
  template <class N> BATON_INLINE Ints operator op(Lanes<N> a, Lanes<N> b) {     \
    return each<Ints>([&](int p) { return (IntRegister)(a.part[p] op b.part[p]); }); \
  }
BATON_COMPARISON(>)
BATON_COMPARISON(<)
BATON_COMPARISON(>=)
BATON_COMPARISON(<=)
BATON_COMPARISON(==)
#undef BATON_COMPARISON
BATON_INLINE Ints operator~(Ints a) {
  return each<Ints>([&](int p) { return ~a.part[p]; });
}
BATON_INLINE Floats operator-(Floats a) {
  return each<Floats>([&](int p) { return -a.part[p]; });
}
BATON_INLINE Floats operator*(Floats a, float b) { return a * all(b); }
BATON_INLINE Floats operator+(Floats a, float b) { return a + all(b); }
BATON_INLINE Floats operator-(Floats a, float b) { return a - all(b); }
BATON_INLINE Floats operator/(Floats a, float b) { return a / all(b); }
BATON_INLINE Ints operator-(int32_t a, Ints b) { return all_ints(a) - b; }

BATON_INLINE Floats pick(Ints mask, Floats yes, Floats no) {
  return as<Floats>((as<Ints>(yes) & mask) | (as<Ints>(no) & ~mask));
}
BATON_INLINE Floats larger(Floats a, Floats b) {
  return each<Floats>([&](int p) { return a.part[p] > b.part[p] ? a.part[p] : b.part[p]; });
}
BATON_INLINE bool any(Ints mask) {
  IntRegister found = mask.part[0];
#pragma GCC unroll 4
  for (int p = 1; p < kParts; ++p) found |= mask.part[p];
  return has_any(found);
}

BATON_INLINE Floats to_floats(Ints x) {
  return each<Floats>([&](int p) { return __builtin_convertvector(x.part[p], FloatRegister); });
}
BATON_INLINE Ints to_ints(Floats x) {
  return each<Ints>([&](int p) { return __builtin_convertvector(x.part[p], IntRegister); });
}

// a * b + c with one rounding.
BATON_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return each<Floats>([&](int p) { return fused(a.part[p], b.part[p], c.part[p]); });
}

// The even (0) or the odd (1) members of a register's pairs of bfloat16; of floats, themselves.
template <class T> BATON_INLINE FloatRegister member_of_register(WordRegister lanes, int which) {
  if constexpr (sizeof(T) == 4) return (FloatRegister)lanes;
  return which == 0 ? (FloatRegister)(lanes << 16) : upper_half(lanes);
}

// The same of sixteen lanes.
template <class T> BATON_INLINE Floats member(Words lanes, int which) {
  return each<Floats>([&](int p) { return member_of_register<T>(lanes.part[p], which); });
}

// The upper half of each float, rounded to nearest even, in the low bits of its lane.
BATON_INLINE Words rounded(Floats x) {
  const Words bits = as<Words>(x);
  return (bits + all_words(0x7fffu) + ((bits >> 16) & all_words(1u))) >> 16;
}

// Sixteen numbers of 16 bits, each in the low half of a lane, and back.
BATON_INLINE Words load_halves(const void* from) {
  return each<Words>([&](int p) { return widen_halves(static_cast<const uint16_t*>(from) + p * kPartLanes); });
}
BATON_INLINE void store_halves(void* to, Words x) {
#pragma GCC unroll 4
  for (int p = 0; p < kParts; ++p) narrow_halves(x.part[p], static_cast<uint16_t*>(to) + p * kPartLanes);
}

// Sixteen consecutive numbers of a type, as floats, and back.
BATON_INLINE Floats read(const float* from) { return load<Floats>(from); }
BATON_INLINE Floats read(const Bf16* from) { return as<Floats>(load_halves(from) << 16); }
BATON_INLINE void write(float* to, Floats x) { store(to, x); }
BATON_INLINE void write(Bf16* to, Floats x) { store_halves(to, rounded(x)); }

// The same, of the first `count` of sixteen; what is missing reads as zero.
template <class T> inline Floats read_some(const T* from, int count) {
  if (count >= kLanes) return read(from);
  T whole[kLanes] = {};
  if (count > 0) std::memcpy(whole, from, count * sizeof(T));
  return read(whole);
}
template <class T> inline void write_some(T* to, Floats x, int count) {
  if (count >= kLanes) return write(to, x);
  T whole[kLanes];
  write(whole, x);
  if (count > 0) std::memcpy(to, whole, count * sizeof(T));
}

// Of thirty-two consecutive numbers those at even and those at odd places, and back.
BATON_INLINE void apart(Floats low, Floats high, Floats& even, Floats& odd) {
  typedef float All __attribute__((vector_size(kLanes * 8)));
  typedef float Half __attribute__((vector_size(kLanes * 4)));
  alignas(64) float numbers[2 * kLanes], halves[2 * kLanes];
  store(numbers, low);
  store(numbers + kLanes, high);
  All all;
  std::memcpy(&all, numbers, sizeof all);
  const Half a = __builtin_shufflevector(all, all, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const Half b = __builtin_shufflevector(all, all, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  std::memcpy(halves, &a, sizeof a);
  std::memcpy(halves + kLanes, &b, sizeof b);
  even = load<Floats>(halves);
  odd = load<Floats>(halves + kLanes);
}
BATON_INLINE void together(Floats even, Floats odd, Floats& low, Floats& high) {
  typedef float Half __attribute__((vector_size(kLanes * 4)));
  alignas(64) float halves[2 * kLanes], numbers[2 * kLanes];
  store(halves, even);
  store(halves + kLanes, odd);
  Half e, o;
  std::memcpy(&e, halves, sizeof e);
  std::memcpy(&o, halves + kLanes, sizeof o);
  const Half a = __builtin_shufflevector(e, o, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const Half b = __builtin_shufflevector(e, o, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  std::memcpy(numbers, &a, sizeof a);
  std::memcpy(numbers + kLanes, &b, sizeof b);
  low = load<Floats>(numbers);
  high = load<Floats>(numbers + kLanes);
}

// What a number becomes when it is stored as T.
template <class T> BATON_INLINE Floats as_stored(Floats x) {
  if constexpr (sizeof(T) == 2) return as<Floats>(rounded(x) << 16);
  return x;
}

// Writes what a number becomes when it is stored as T.
template <class T, class To> BATON_INLINE void write_as(To* to, Floats x) {
  if constexpr (std::is_same_v<T, To>)
    write(to, x);
  else
    write(to, as_stored<T>(x));
}

// One lane out of sixteen: lanes eight apart first, then four, two and one apart.
template <class Join> BATON_INLINE float folded(Floats x, Join&& join) {
  typedef float Four __attribute__((vector_size(16)));
  float lanes[kLanes];
  store(lanes, x);
  const Four a = load<Four>(lanes), b = load<Four>(lanes + 4), c = load<Four>(lanes + 8), d = load<Four>(lanes + 12);
  const Four four = join(join(a, c), join(b, d));
  const Four two = join(four, __builtin_shufflevector(four, four, 2, 3, 0, 1));
  const Four one = join(two, __builtin_shufflevector(two, two, 1, 0, 3, 2));
  return one[0];
}
BATON_INLINE float sum(Floats x) {
  return folded(x, [](auto a, auto b) { return a + b; });
}
BATON_INLINE float largest(Floats x) {
  return folded(x, [](auto a, auto b) { return a > b ? a : b; });
}

// `folded` of each of sixteen rows, in the row's lane. The same bits as row by row; on sixteen lanes a register, all at once.
template <class Join> BATON_INLINE Floats folded_rows(const Floats (&rows)[kLanes], Join&& join) {
  if constexpr (kParts == 1) {
    WordRegister square[kPartLanes];
    repeat<kPartLanes>([&](auto row) BATON_BODY { square[row] = (WordRegister)rows[row].part[0]; });
    transpose_square(square);
    for (int apart = kPartLanes / 2; apart; apart /= 2)
      for (int lane = 0; lane < apart; ++lane)
        square[lane] = (WordRegister)join((FloatRegister)square[lane], (FloatRegister)square[lane + apart]);
    return {(FloatRegister)square[0]};
  } else {
    alignas(64) float found[kLanes];
    for (int row = 0; row < kLanes; ++row) found[row] = folded(rows[row], join);
    return load<Floats>(found);
  }
}

// e^x for x within +-87, and the value there beyond: 2^n times a Taylor polynomial of the rest, 1 ulp or so.
BATON_INLINE Floats exponential(Floats x) {
  x = larger(x, all(-87.0f));
  x = pick(x < all(87.0f), x, all(87.0f));
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
  return as<Floats>(as<Ints>(p) + (to_ints(n) << 23));
}

// 2^x for x up to 0, and 2^-126 below -126; off by 3e-6 of itself at most, which is nothing where it is rounded to bfloat16. Exact
// at whole numbers. The polynomial is the one of degree 4 whose largest relative error on +-1/2 is least among those that are 1 at 0.
BATON_INLINE Floats short_power_of_two(Floats x) {
  x = larger(x, all(-126.0f));
  const Floats magic = all(12582912.0f);
  const Floats shifted = x + magic;  // its lowest bits are the integer next to x
  const Floats r = x - (shifted - magic);
  Floats p = all(0.009582853f);
  p = multiply_add(p, r, all(0.055906426f));
  p = multiply_add(p, r, all(0.24024099f));
  p = multiply_add(p, r, all(0.6931242f));
  p = multiply_add(p, r, all(1.0f));
  return as<Floats>(as<Ints>(p) + (as<Ints>(shifted) << 23));
}

}  // namespace baton
