// Stands in for the kernels where a test needs a library that compiles at once: the same C interface, and a head that adds WRONG.

#include <cstdint>
#include <cstring>
#include <vector>

#ifndef BATON_LABEL
#define BATON_LABEL ""
#endif
#ifndef NAME
#define NAME "avx2"
#endif
#ifndef WRONG
#define WRONG 0
#endif
#include "rest.h"  // written by kernels_stub.py: sizes, and the functions that are not below

#pragma GCC visibility push(default)
extern "C" {
struct Sizes { int64_t vocab, first_token, num_tokens, hidden; };
struct Stub { int64_t vocab, hidden, is_bf16; const void* head; };

const char* baton_label() { return BATON_LABEL; }
void baton_struct_bytes(int64_t* sizes) { sizes[0] = DIMENSIONS_BYTES; sizes[1] = STEP_BYTES; }
const char* baton_instruction_set() { return NAME; }
const char* baton_arithmetic(int64_t) { return "stub"; }
const char* baton_create(const Sizes* sizes, int64_t is_bf16, Stub** made) {
  *made = new Stub{sizes->vocab, sizes->hidden, is_bf16, nullptr};
  return nullptr;
}
void baton_destroy(Stub* stub) { delete stub; }
const char* baton_take(Stub* stub, int64_t part, int64_t, int64_t, int64_t, int64_t, const void* source) {
  if (part == 0) stub->head = source;
  return nullptr;
}
static float element(const void* from, int64_t at, bool is_bf16) {
  if (!is_bf16) return static_cast<const float*>(from)[at];
  const uint32_t word = static_cast<uint32_t>(static_cast<const uint16_t*>(from)[at]) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}
const char* baton_head(Stub* stub, const void* x, int64_t rows, float* logits, int64_t* best, float*) {
  for (int64_t r = 0; r < rows; ++r) {
    best[r] = 0;
    for (int64_t v = 0; v < stub->vocab; ++v) {
      float sum = WRONG;
      for (int64_t i = 0; i < stub->hidden; ++i)
        sum += element(x, r * stub->hidden + i, stub->is_bf16) * element(stub->head, v * stub->hidden + i, stub->is_bf16);
      logits[r * stub->vocab + v] = sum;
      if (sum > logits[r * stub->vocab + best[r]]) best[r] = v;
    }
  }
  return nullptr;
}
}
#pragma GCC visibility pop
