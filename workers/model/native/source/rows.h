// What is done to one row of hidden states at a time: normalization, rotation, SwiGLU's gate.

#pragma once

#include <cmath>

#include "lanes.h"

namespace baton {

// x / rms(x) in fp32, rounded to T, times the weight (Zhang and Sennrich 2019, eq. 4). `size` is a multiple of 16.
template <class T> void normalize(const T* x, const T* weight, int64_t size, float eps, T* to) {
  Floats squares = Floats{};
  for (int64_t i = 0; i < size; i += kLanes) {
    const Floats v = read(x + i);
    squares = multiply_add(v, v, squares);
  }
  const float scale = 1.0f / std::sqrt(sum(squares) / size + eps);
  for (int64_t i = 0; i < size; i += kLanes) write(to + i, as_stored<T>(read(x + i) * scale) * read(weight + i));
}

// Turns each channel pair (2i, 2i+1) by its angle, in fp32; cos and sin have channels / 2 entries, channels % 32 == 0.
inline void rotate(const Bf16* x, const float* cos, const float* sin, int64_t channels, Bf16* to) {
  for (int64_t i = 0; i < channels / 2; i += kLanes) {
    const Words pairs = load<Words>(x + 2 * i);
    const Floats even = low(pairs), odd = high(pairs), c = load<Floats>(cos + i), s = load<Floats>(sin + i);
    store(to + 2 * i, rounded(even * c - odd * s) | rounded(odd * c + even * s) << 16);
  }
}

inline void rotate(const float* x, const float* cos, const float* sin, int64_t channels, float* to) {
  for (int64_t i = 0; i < channels / 2; i += kLanes) {
    const Floats a = load<Floats>(x + 2 * i), b = load<Floats>(x + 2 * i + kLanes);
    const Floats even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const Floats odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    const Floats c = load<Floats>(cos + i), s = load<Floats>(sin + i);
    const Floats first = even * c - odd * s, second = odd * c + even * s;
    store(to + 2 * i, __builtin_shufflevector(first, second, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
    store(to + 2 * i + kLanes,
          __builtin_shufflevector(first, second, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
  }
}

// silu(gate) * up (Shazeer 2020, eq. 6).
inline Floats gated(Floats gate, Floats up) { return gate / (exponential(-gate) + 1.0f) * up; }

}  // namespace baton
