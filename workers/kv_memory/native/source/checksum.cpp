// XXH3-64 (seed 0, inputs above 240 bytes) of many buffers, alone or while they are copied: each byte is read once.
// The algorithm: xxHash specification, "XXH3 algorithm description", long inputs. Shorter inputs are the caller's business.

#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef BATON_LABEL
#define BATON_LABEL ""
#endif

namespace {

constexpr uint64_t kSecret[24] = {
    0xbe4ba423396cfeb8, 0x1cad21f72c81017c, 0xdb979083e96dd4de, 0x1f67b3b7a4a44072, 0x78e5c0cc4ee679cb, 0x2172ffcc7dd05a82,
    0x8e2443f7744608b8, 0x4c263a81e69035e0, 0xcb00c391bb52283c, 0xa32e531b8b65d088, 0x4ef90da297486471, 0xd8acdea946ef1938,
    0x3f349ce33f76faa8, 0x1d4f0bc7c7bbdcf9, 0x3159b4cd4be0518a, 0x647378d9c97e9fc8, 0xc3ebd33483acc5ea, 0xeb6313faffa081c5,
    0x49daf0b751dd0d17, 0x9e68d429265516d3, 0xfca1477d58be162b, 0xce31d07ad1b8f88f, 0x280416958f3acb45, 0x7e404bbbcafbd7af};
constexpr uint64_t kPrime32[3] = {0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D};
constexpr uint64_t kPrime64[5] = {0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63,
                                  0x27D4EB2F165667C5};
constexpr int64_t kStripe = 64, kStripesPerBlock = (192 - 64) / 8, kBlock = kStripe * kStripesPerBlock;
constexpr int64_t kLastStripeSecret = 192 - 64 - 7, kMergeSecret = 11;

const char* secret() { return reinterpret_cast<const char*>(kSecret); }

uint64_t word(const char* at) {
  uint64_t value;
  std::memcpy(&value, at, 8);
  return value;
}

uint64_t folded_product(uint64_t a, uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

enum class Copy { kNone, kCached, kStreaming };  // streaming goes past the caches; its target is aligned to 64 bytes

// Eight 64-bit lanes. `take` adds a stripe, and stores it where it is to be copied to, from the register that it is in.
#if defined(__AVX512F__)
struct Lanes {
  __m512i lanes;
  explicit Lanes(const uint64_t* from) : lanes(_mm512_loadu_si512(from)) {}
  void save(uint64_t* to) const { _mm512_storeu_si512(to, lanes); }

  template <Copy copy>
  void take(const char* stripe, const char* key, char* target) {
    const __m512i data = _mm512_loadu_si512(stripe);
    if constexpr (copy == Copy::kStreaming) _mm512_stream_si512(reinterpret_cast<__m512i*>(target), data);
    if constexpr (copy == Copy::kCached) _mm512_storeu_si512(target, data);
    const __m512i keyed = _mm512_xor_si512(data, _mm512_loadu_si512(key));
    const __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
    const __m512i swapped = _mm512_shuffle_epi32(data, _MM_PERM_BADC);
    lanes = _mm512_add_epi64(lanes, _mm512_add_epi64(swapped, product));
  }

  void scramble(const char* key) {
    __m512i mixed = _mm512_xor_si512(lanes, _mm512_srli_epi64(lanes, 47));
    mixed = _mm512_xor_si512(mixed, _mm512_loadu_si512(key));
    const __m512i prime = _mm512_set1_epi64(kPrime32[0]);
    const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(mixed, 32), prime);
    lanes = _mm512_add_epi64(_mm512_mul_epu32(mixed, prime), _mm512_slli_epi64(high, 32));
  }
};
#elif defined(__AVX2__)
struct Lanes {
  __m256i lanes[2];
  explicit Lanes(const uint64_t* from) {
    for (int h = 0; h < 2; ++h) lanes[h] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 4 * h));
  }
  void save(uint64_t* to) const {
    for (int h = 0; h < 2; ++h) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 4 * h), lanes[h]);
  }

  template <Copy copy>
  void take(const char* stripe, const char* key, char* target) {
    for (int h = 0; h < 2; ++h) {
      const __m256i data = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(stripe) + h);
      if constexpr (copy == Copy::kStreaming) _mm256_stream_si256(reinterpret_cast<__m256i*>(target) + h, data);
      if constexpr (copy == Copy::kCached) _mm256_storeu_si256(reinterpret_cast<__m256i*>(target) + h, data);
      const __m256i keyed = _mm256_xor_si256(data, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(key) + h));
      const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
      const __m256i swapped = _mm256_shuffle_epi32(data, 0x4E);
      lanes[h] = _mm256_add_epi64(lanes[h], _mm256_add_epi64(swapped, product));
    }
  }

  void scramble(const char* key) {
    const __m256i prime = _mm256_set1_epi64x(kPrime32[0]);
    for (int h = 0; h < 2; ++h) {
      __m256i mixed = _mm256_xor_si256(lanes[h], _mm256_srli_epi64(lanes[h], 47));
      mixed = _mm256_xor_si256(mixed, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(key) + h));
      const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime);
      lanes[h] = _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), _mm256_slli_epi64(high, 32));
    }
  }
};
#else
struct Lanes {
  uint64_t lanes[8];
  explicit Lanes(const uint64_t* from) { std::memcpy(lanes, from, sizeof lanes); }
  void save(uint64_t* to) const { std::memcpy(to, lanes, sizeof lanes); }

  template <Copy copy>
  void take(const char* stripe, const char* key, char* target) {
    if constexpr (copy != Copy::kNone) std::memcpy(target, stripe, kStripe);
    for (int i = 0; i < 8; ++i) {
      const uint64_t data = word(stripe + 8 * i), keyed = data ^ word(key + 8 * i);
      lanes[i ^ 1] += data;
      lanes[i] += (keyed & 0xFFFFFFFF) * (keyed >> 32);
    }
  }

  void scramble(const char* key) {
    for (int i = 0; i < 8; ++i) lanes[i] = (lanes[i] ^ (lanes[i] >> 47) ^ word(key + 8 * i)) * kPrime32[0];
  }
};
#endif

template <Copy copy>
uint64_t run(const char* source, int64_t size, char* target) {
  const uint64_t start[8] = {kPrime32[2], kPrime64[0], kPrime64[1], kPrime64[2],
                             kPrime64[3], kPrime32[1], kPrime64[4], kPrime32[0]};
  Lanes lanes(start);
  const int64_t num_blocks = (size - 1) / kBlock;
  int64_t at = 0;
  for (int64_t block = 0; block < num_blocks; ++block) {
    for (int64_t i = 0; i < kStripesPerBlock; ++i, at += kStripe)
      lanes.take<copy>(source + at, secret() + 8 * i, target + at);
    lanes.scramble(secret() + 192 - kStripe);
  }
  const int64_t num_stripes = (size - 1 - at) / kStripe;
  for (int64_t i = 0; i < num_stripes; ++i, at += kStripe)
    lanes.take<copy>(source + at, secret() + 8 * i, target + at);
  // The last stripe overlaps what came before unless the size is a multiple of 64.
  if constexpr (copy != Copy::kNone) std::memcpy(target + at, source + at, size - at);
  lanes.take<Copy::kNone>(source + size - kStripe, secret() + kLastStripeSecret, nullptr);

  uint64_t sums[8];
  lanes.save(sums);
  uint64_t hash = static_cast<uint64_t>(size) * kPrime64[0];
  for (int i = 0; i < 4; ++i) {
    const char* key = secret() + kMergeSecret + 16 * i;
    hash += folded_product(sums[2 * i] ^ word(key), sums[2 * i + 1] ^ word(key + 8));
  }
  hash = (hash ^ (hash >> 37)) * 0x165667919E3779F9;
  return hash ^ (hash >> 32);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// What this was built from: workers.machine.native_build looks for it in the file.
const char* baton_label() { return BATON_LABEL; }

// Every size is above 240.
void baton_checksum(const char* const* sources, const int64_t* sizes, int64_t count, uint64_t* checksums) {
  for (int64_t i = 0; i < count; ++i) checksums[i] = run<Copy::kNone>(sources[i], sizes[i], nullptr);
}

// Every size is above 240; no target overlaps a source. `streaming` asks for stores that go past the caches.
void baton_copy_and_checksum(char* const* targets, const char* const* sources, const int64_t* sizes, int64_t count,
                             int64_t streaming, uint64_t* checksums) {
  for (int64_t i = 0; i < count; ++i) {
    const bool is_aligned = reinterpret_cast<uintptr_t>(targets[i]) % kStripe == 0;
    checksums[i] = streaming && is_aligned ? run<Copy::kStreaming>(sources[i], sizes[i], targets[i])
                                           : run<Copy::kCached>(sources[i], sizes[i], targets[i]);
  }
#if defined(__AVX512F__) || defined(__AVX2__)
  if (streaming) _mm_sfence();
#endif
}
}  // extern "C"
#pragma GCC visibility pop
