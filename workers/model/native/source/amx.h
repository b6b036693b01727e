// Products by AMX's tiles: sixteen rows meet sixteen groups of inputs and sixteen outputs in one instruction.
//
// The matrix is the one that product.h describes: sixteen groups of a panel are a tile as they lie there. TDPBF16PS adds the
// even members of its sixteen pairs to one sum and the odd ones to another, each from zero by fused multiply-adds, then the two,
// and that to the result (Intel's manual, volume 2): an order of sums that no other instruction set has, and a row's own whatever
// the number of rows. So AMX is exact by itself and is named in the fingerprint as an arithmetic of its own.

#pragma once

#include <algorithm>

#include "lanes.h"

#if defined(BATON_TILES) && !defined(BATON_EMULATE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace baton {

#if defined(BATON_TILES)
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
#endif
// Whether products of this type go through tiles.
template <class T> constexpr bool kTakesTiles = kHasTiles && sizeof(T) == 2;

constexpr int kTilePanel = 64;    // outputs of a panel, four tiles
constexpr int kTileSide = 16;     // rows, groups of inputs or outputs of a tile
constexpr int kTileAhead = 32;    // groups of inputs to fetch ahead of use
constexpr int64_t kTilePitch = kTilePanel * 4;

// Rows of bfloat16 that lie `pitch` bytes apart.
struct TileRows {
  const char* first;
  int64_t pitch;
  TileRows from(int64_t row, int64_t group) const { return {first + row * pitch + group * 4, pitch}; }
};

#if defined(BATON_TILES)

#if defined(BATON_EMULATE_AMX)
inline bool allow_tiles() { return true; }
inline void shape_tiles(int rows) { emulated::tile_rows = rows; }
inline void release_tiles() {}
#define BATON_TILE_LOAD emulated::tile_load
#define BATON_TILE_STORE emulated::tile_store
#define BATON_TILE_DOT emulated::tile_dot
#else

// Asks the system for the tiles' registers, for all threads of the process.
inline bool allow_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

inline thread_local int tile_rows_now = 0;

// Gives tiles 0 to 5 so many rows on this thread, and tiles 6 and 7, of weights, sixteen.
inline void shape_tiles(int rows) {
  if (rows == tile_rows_now) return;
  struct alignas(64) {
    uint8_t palette = 1, start = 0, unused[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
  } shapes;
  for (int t = 0; t < 8; ++t) shapes.rows[t] = static_cast<uint8_t>(t < 6 ? rows : kTileSide);
  __asm__ volatile("" : : "r"(&shapes) : "memory");
  _tile_loadconfig(&shapes);
  tile_rows_now = rows;
}

// Other code on this thread may use the tiles, and the system need not keep them.
inline void release_tiles() {
  if (!tile_rows_now) return;
  _tile_release();
  tile_rows_now = 0;
}

#define BATON_TILE_LOAD(tile, from, pitch) _tile_loadd(tile, from, pitch)
#define BATON_TILE_STORE(tile, to, pitch) _tile_stored(tile, to, pitch)
#define BATON_TILE_DOT(sums, rows, weights) _tile_dpbf16ps(sums, rows, weights)
#endif

// Fetches the first `lines` of the four that a group of a panel has to the second cache, for sixteen groups.
inline void fetch_groups(const uint32_t* ahead, int lines) {
  for (int g = 0; g < kTileSide; ++g)
    for (int v = 0; v < lines; ++v) __builtin_prefetch(ahead + g * kTilePanel + v * kLanes, 0, 2);
}

// One tile of rows times all of a panel's outputs: sums += rows . panel over `groups` groups, a multiple of sixteen.
inline void multiply_one_tile(TileRows rows, const uint32_t* panel, int64_t groups, float* sums, const uint32_t* ahead) {
  BATON_TILE_LOAD(0, sums, kTilePitch);
  BATON_TILE_LOAD(1, sums + kLanes, kTilePitch);
  BATON_TILE_LOAD(2, sums + 2 * kLanes, kTilePitch);
  BATON_TILE_LOAD(3, sums + 3 * kLanes, kTilePitch);
  for (int64_t g = 0; g < groups; g += kTileSide) {
    const uint32_t* from = panel + g * kTilePanel;
    if (ahead) fetch_groups(ahead + g * kTilePanel, 4);
    BATON_TILE_LOAD(4, rows.first + g * 4, rows.pitch);
    BATON_TILE_LOAD(6, from, kTilePitch);
    BATON_TILE_LOAD(7, from + kLanes, kTilePitch);
    BATON_TILE_DOT(0, 4, 6);
    BATON_TILE_DOT(1, 4, 7);
    BATON_TILE_LOAD(6, from + 2 * kLanes, kTilePitch);
    BATON_TILE_LOAD(7, from + 3 * kLanes, kTilePitch);
    BATON_TILE_DOT(2, 4, 6);
    BATON_TILE_DOT(3, 4, 7);
  }
  BATON_TILE_STORE(0, sums, kTilePitch);
  BATON_TILE_STORE(1, sums + kLanes, kTilePitch);
  BATON_TILE_STORE(2, sums + 2 * kLanes, kTilePitch);
  BATON_TILE_STORE(3, sums + 3 * kLanes, kTilePitch);
}

// Two tiles of rows, the second `next` floats of sums further on, times half of a panel's outputs.
inline void multiply_two_tiles(TileRows rows, TileRows others, const uint32_t* panel, int64_t groups, float* sums, int64_t next,
                               const uint32_t* ahead) {
  BATON_TILE_LOAD(0, sums, kTilePitch);
  BATON_TILE_LOAD(1, sums + kLanes, kTilePitch);
  BATON_TILE_LOAD(2, sums + next, kTilePitch);
  BATON_TILE_LOAD(3, sums + next + kLanes, kTilePitch);
  for (int64_t g = 0; g < groups; g += kTileSide) {
    const uint32_t* from = panel + g * kTilePanel;
    if (ahead) fetch_groups(ahead + g * kTilePanel, 2);
    BATON_TILE_LOAD(4, rows.first + g * 4, rows.pitch);
    BATON_TILE_LOAD(6, from, kTilePitch);
    BATON_TILE_DOT(0, 4, 6);
    BATON_TILE_LOAD(7, from + kLanes, kTilePitch);
    BATON_TILE_DOT(1, 4, 7);
    BATON_TILE_LOAD(5, others.first + g * 4, others.pitch);
    BATON_TILE_DOT(2, 5, 6);
    BATON_TILE_DOT(3, 5, 7);
  }
  BATON_TILE_STORE(0, sums, kTilePitch);
  BATON_TILE_STORE(1, sums + kLanes, kTilePitch);
  BATON_TILE_STORE(2, sums + next, kTilePitch);
  BATON_TILE_STORE(3, sums + next + kLanes, kTilePitch);
}

// The groups that fill no tile, fewer than sixteen: zeros stand in for those that are missing.
inline void multiply_rest(TileRows rows, int tiles, int side, const uint32_t* panel, int64_t groups, float* sums) {
  alignas(64) uint32_t weights[kTileSide * kTilePanel] = {}, values[kTileSide * kTileSide] = {};
  std::memcpy(weights, panel, groups * kTilePitch);
  for (int tile = 0; tile < tiles; ++tile) {
    for (int row = 0; row < side; ++row)
      std::memcpy(values + row * kTileSide, rows.from(tile * side + row, 0).first, groups * 4);
    __asm__ volatile("" : : "r"(values), "r"(weights) : "memory");
    multiply_one_tile({reinterpret_cast<const char*>(values), kTileSide * 4}, weights, kTileSide,
                      sums + tile * side * kTilePanel, nullptr);
  }
}

// sums += rows . panel for `tiles` tiles of `side` rows each. A panel stays in the second cache while all rows meet it. Where it
// `is_cold`, one tile of rows fetches it a little ahead, and the first two of several fetch the panel behind it meanwhile.
inline void multiply_tiles(TileRows rows, int tiles, int side, const uint32_t* panel, int64_t groups, bool is_cold,
                           Floats (*sums_MV)[4]) {
  float* sums = reinterpret_cast<float*>(sums_MV);
  const int64_t whole = groups / kTileSide * kTileSide, height = int64_t{side} * kTilePanel;
  shape_tiles(side);
  __asm__ volatile("" : : : "memory");  // the compiler does not know what loading a tile reads
  if (tiles == 1) {
    multiply_one_tile(rows, panel, whole, sums, is_cold ? panel + kTileAhead * kTilePanel : nullptr);
  } else {
    const uint32_t* next = is_cold ? panel + groups * kTilePanel : nullptr;
    int tile = 0;
    for (; tile + 1 < tiles; tile += 2, next = nullptr)
      for (int first = 0; first < kTilePanel; first += 2 * kLanes)
        multiply_two_tiles(rows.from(tile * side, 0), rows.from((tile + 1) * side, 0), panel + first, whole,
                           sums + tile * height + first, height, next ? next + first : nullptr);
    if (tile < tiles) multiply_one_tile(rows.from(tile * side, 0), panel, whole, sums + tile * height, nullptr);
  }
  if (whole < groups) multiply_rest(rows.from(0, whole), tiles, side, panel + whole * kTilePanel, groups - whole, sums);
}

#else
inline bool allow_tiles() { return true; }
inline void release_tiles() {}
void multiply_tiles(TileRows, int, int, const uint32_t*, int64_t, bool, Floats (*)[4]);  // nobody calls it
#endif

}  // namespace baton
