// Generalized advantage estimation, padded or packed. Compiled once per instruction set (see logprobs.cpp).
//
// The recurrence (math.h: one affine map of a carry per token) runs from the last token to the first, and each step
// waits for the one before. So it is cut into tiles: the maps of a tile are made by vector code, then ROWS sequences
// walk their carries side by side, each using the time the others wait, then vector code turns carries into results.
#include "../math.h"
#include "ops.h"

namespace rlhf_fast::RF_ISA {
namespace {

constexpr int ROWS = 8;
constexpr int64_t TILE = 128;

// Sequences of one group; the tokens of [begin, end) are still to do.
struct Group {
  int rows;
  int64_t begin[ROWS];
  int64_t end[ROWS];
  float carry[ROWS];
};

// The maps of one tile, aligned at its end; `offset` then holds the carry that comes in from the next token.
struct Tile {
  alignas(64) float slope[ROWS][TILE];
  alignas(64) float offset[ROWS][TILE];
};

Group group_of(const Sequences& sequences, int64_t first, const float* bootstrap) {
  Group group{};
  const int64_t left = sequences.count - first;
  group.rows = left < ROWS ? static_cast<int>(left) : ROWS;
  for (int k = 0; k < group.rows; k++) {
    const int64_t row = first + k;
    group.begin[k] = sequences.offsets ? sequences.offsets[row] : row * sequences.length;
    group.end[k] = sequences.offsets ? sequences.offsets[row + 1] : group.begin[k] + sequences.length;
    group.carry[k] = bootstrap ? bootstrap[row] : 0.0f;
  }
  return group;
}

int64_t tokens_in_tile(const Group& group, int row) {
  const int64_t left = group.end[row] - group.begin[row];
  return left < TILE ? left : TILE;
}

int64_t longest(const Group& group) {
  int64_t most = 0;
  for (int k = 0; k < group.rows; k++) {
    const int64_t n = tokens_in_tile(group, k);
    most = n > most ? n : most;
  }
  return most;
}

// Selects, never multiplies by the mask: what is masked may be NaN.
__attribute__((noinline)) void make_maps(const GaeInputs& in, int64_t at, int64_t n, float* slope, float* offset) {
  const float* rewards = in.rewards + at;
  const float* values = in.values + at;
  const uint8_t* mask = in.mask + at;
  const float gamma = in.gamma;
  const float lam = in.lam;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const Affine map = gae_map(rewards[i], values[i], gamma, lam);
    const Affine identity = identity_map();
    slope[i] = mask[i] ? map.slope : identity.slope;
    offset[i] = mask[i] ? map.offset : identity.offset;
  }
}

void walk_carries(Tile& tile, int64_t first, float (&carry)[ROWS]) {
  float c[ROWS];
  for (int k = 0; k < ROWS; k++) {
    c[k] = carry[k];
  }
  for (int64_t i = TILE - 1; i >= first; i--) {
#pragma GCC unroll 8
    for (int k = 0; k < ROWS; k++) {
      const float incoming = c[k];
      c[k] = apply({tile.slope[k][i], tile.offset[k][i]}, incoming);
      tile.offset[k][i] = incoming;
    }
  }
  for (int k = 0; k < ROWS; k++) {
    carry[k] = c[k];
  }
}

__attribute__((noinline)) void write_results(const GaeInputs& in, int64_t at, int64_t n, const float* carry,
                                             float* advantages, float* returns) {
  const float* rewards = in.rewards + at;
  const float* values = in.values + at;
  const uint8_t* mask = in.mask + at;
  const float gamma = in.gamma;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    advantages[at + i] = mask[i] ? gae_advantage(rewards[i], values[i], carry[i], gamma) : 0.0f;
    returns[at + i] = mask[i] ? gae_return(rewards[i], carry[i], gamma) : 0.0f;
  }
}

void run_group(Group group, const GaeInputs& in, float* advantages, float* returns) {
  Tile tile;
  for (int64_t most = longest(group); most > 0; most = longest(group)) {
    const int64_t first = TILE - most;
    for (int k = 0; k < ROWS; k++) {
      const int64_t n = k < group.rows ? tokens_in_tile(group, k) : 0;
      // a sequence shorter than the longest ends in identity maps, which keep its carry
      for (int64_t i = first; i < TILE - n; i++) {
        tile.slope[k][i] = identity_map().slope;
        tile.offset[k][i] = identity_map().offset;
      }
      make_maps(in, group.end[k] - n, n, &tile.slope[k][TILE - n], &tile.offset[k][TILE - n]);
    }
    walk_carries(tile, first, group.carry);
    for (int k = 0; k < group.rows; k++) {
      const int64_t n = tokens_in_tile(group, k);
      group.end[k] -= n;
      write_results(in, group.end[k], n, &tile.offset[k][TILE - n], advantages, returns);
    }
  }
}

}  // namespace

void gae(const Sequences& sequences, const GaeInputs& inputs, float* advantages, float* returns, int threads) {
  const int64_t tokens = sequences.offsets ? sequences.offsets[sequences.count] : sequences.count * sequences.length;
  const int used = tokens < 65536 ? 1 : threads;
#pragma omp parallel for schedule(dynamic) num_threads(used)
  for (int64_t first = 0; first < sequences.count; first += ROWS) {
    run_group(group_of(sequences, first, inputs.bootstrap), inputs, advantages, returns);
  }
}

}  // namespace rlhf_fast::RF_ISA
