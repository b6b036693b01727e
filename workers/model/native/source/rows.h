// What is done to one row of hidden states at a time: normalization, rotation, SwiGLU's gate.

#pragma once

#include <cmath>

#include "lanes.h"

namespace baton {

// x / rms(x) in fp32, rounded to T, times the weight (Zhang and Sennrich 2019, eq. 4), rounded to T. `size` is a multiple of 16.
template <class T> void normalize(const T* x, const T* weight, int64_t size, float eps, Operand<T>* to) {
  Floats squares = Floats{};
  for (int64_t i = 0; i < size; i += kLanes) {
    const Floats v = read(x + i);
    squares = multiply_add(v, v, squares);
  }
  const float scale = 1.0f / std::sqrt(sum(squares) / size + eps);
  for (int64_t i = 0; i < size; i += kLanes)
    write_as<T>(to + i, as_stored<T>(read(x + i) * scale) * read(weight + i));
}

// Turns each channel pair (2i, 2i+1) by its angle, in fp32, and rounds to T; cos and sin have channels / 2 entries,
// channels % 32 == 0. `to` may be `x`.
template <class T, class To> void rotate(const T* x, const float* cos, const float* sin, int64_t channels, To* to) {
  for (int64_t i = 0; i < channels; i += 2 * kLanes) {
    Floats even, odd;
    apart(read(x + i), read(x + i + kLanes), even, odd);
    const Floats c = load<Floats>(cos + i / 2), s = load<Floats>(sin + i / 2);
    Floats low, high;
    together(even * c - odd * s, odd * c + even * s, low, high);
    write_as<T>(to + i, low);
    write_as<T>(to + i + kLanes, high);
  }
}

// Sine and cosine of an angle, in double and rounded once, with operations that are the same on every host: the angle less a
// multiple of pi/2 (in two parts, as in FreeBSD's rem_pio2), then Taylor's polynomials. For angles up to 2^20.
inline void sine_cosine(float angle, float* sine, float* cosine) {
  const double x = angle, magic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  const double turns = (x * 0.63661977236758134308 + magic) - magic;
  const double r = (x - turns * 1.57079632673412561417) - turns * 6.07710050650619224932e-11, z = r * r;
  double s = 1.0 / 6227020800, c = 1.0 / 479001600;
  s = s * z - 1.0 / 39916800;
  s = s * z + 1.0 / 362880;
  s = s * z - 1.0 / 5040;
  s = s * z + 1.0 / 120;
  s = s * z - 1.0 / 6;
  s = r + r * z * s;
  c = c * z - 1.0 / 3628800;
  c = c * z + 1.0 / 40320;
  c = c * z - 1.0 / 720;
  c = c * z + 1.0 / 24;
  c = c * z - 0.5;
  c = 1.0 + z * c;
  const int64_t quadrant = static_cast<int64_t>(turns) & 3;
  const double first = quadrant & 1 ? c : s, second = quadrant & 1 ? s : c;
  *sine = static_cast<float>(quadrant & 2 ? -first : first);
  *cosine = static_cast<float>((quadrant + 1) & 2 ? -second : second);
}

// silu(gate) * up (Shazeer 2020, eq. 6).
inline Floats gated(Floats gate, Floats up) { return gate / (exponential(-gate) + 1.0f) * up; }

}  // namespace baton
