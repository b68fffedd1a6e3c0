// Attention of decoding: a query per sequence over that sequence's keys and values. Compiled once per instruction set
// (see logprobs.cpp).
//
// Reading the cache is what takes time, so a key and a value are read once for all the query heads that share them, in
// fours, and only as far as the sequence goes. The softmax is online (Milakov & Gimelshein 2018, arXiv:1805.02867),
// block after block in order: what a sequence gets does not depend on the others, nor on the number of threads.
#include "blocks.h"

namespace rlhf_fast::RF_ISA {
namespace {

constexpr int64_t BLOCK = 64;    // keys
constexpr int64_t QUERIES = 8;   // heads that read a key together
constexpr int64_t WIDEST = 512;  // WIDEST of kernels/attention/cpu_impl.py
constexpr int64_t FOUR = 4;

struct Four {
  const float* row[FOUR];
};

// Dot products of a query with four keys.
RF_LOOP void dot_four(const float* query, Four keys, int64_t width, float* out) {
  const float *k0 = keys.row[0], *k1 = keys.row[1], *k2 = keys.row[2], *k3 = keys.row[3];
  float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t i = 0; i < width; i++) {
    a = fused(query[i], k0[i], a);
    b = fused(query[i], k1[i], b);
    c = fused(query[i], k2[i], c);
    d = fused(query[i], k3[i], d);
  }
  out[0] = a;
  out[1] = b;
  out[2] = c;
  out[3] = d;
}

// Add four weighted values.
RF_LOOP void add_four(const float* weights, Four values, int64_t width, float* out) {
  const float *v0 = values.row[0], *v1 = values.row[1], *v2 = values.row[2], *v3 = values.row[3];
  const float a = weights[0], b = weights[1], c = weights[2], d = weights[3];
#pragma omp simd
  for (int64_t i = 0; i < width; i++) {
    out[i] = fused(d, v3[i], fused(c, v2[i], fused(b, v1[i], fused(a, v0[i], out[i]))));
  }
}

RF_LOOP void multiply(float* x, int64_t n, float factor) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    x[i] *= factor;
  }
}

// 2^(x - shift) in place of each x; returns their sum.
RF_LOOP float exponentials(float* x, int64_t n, float shift) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) {
    x[i] = fast_exp2(x[i] - shift);
    sum += x[i];
  }
  return sum;
}

// The places of one sequence and key head.
struct Places {
  const char* data;
  int64_t bytes;  // from one to the next
};

Places places_of(const Cache& cache, int64_t row, int64_t head, Dtype dtype) {
  const int64_t size = item_size(dtype);
  return {static_cast<const char*>(cache.data) + (row * cache.row_stride + head * cache.head_stride) * size,
          cache.place_stride * size};
}

// Places [at, at + 4); those from `end` on are the last one again, which gets weight 0.
Four four_of(const Places& places, int64_t at, int64_t end, Dtype dtype, int64_t width, float* buffer) {
  Four found;
  for (int64_t j = 0; j < FOUR; j++) {
    const char* source = places.data + smaller(at + j, end - 1) * places.bytes;
    found.row[j] = widened(source, dtype, width, buffer + j * WIDEST);
  }
  return found;
}

// The running softmax of a few query heads.
struct Softmax {
  float top[QUERIES];
  float total[QUERIES];
  alignas(64) float result[QUERIES * WIDEST];
};

// Take in the scores (QUERIES, BLOCK) of `n` keys: they become weights.
void raise(Softmax& state, float* scores, int64_t queries, int64_t n, int64_t width) {
  for (int64_t q = 0; q < queries; q++) {
    float* mine = scores + q * BLOCK;
    const float block = block_max(mine, n);
    if (block > state.top[q]) {
      const float faded = fast_exp2(state.top[q] - block);
      state.total[q] *= faded;
      multiply(state.result + q * WIDEST, width, faded);
      state.top[q] = block;
    }
    state.total[q] += exponentials(mine, n, state.top[q]);
    for (int64_t j = n; j % FOUR; j++) {
      mine[j] = 0.0f;
    }
  }
}

// Queries [first, first + queries) of a sequence over keys [begin, end) of their key head.
void attend(const DecodeInputs& in, int64_t row, int64_t key_head, int64_t first, int64_t queries, int64_t begin,
            int64_t end, void* out) {
  alignas(64) float query[QUERIES * WIDEST];
  alignas(64) float scores[QUERIES * BLOCK];
  alignas(64) float buffer[FOUR * WIDEST];
  Softmax state;
  const int64_t size = item_size(in.dtype);
  const char* own = static_cast<const char*>(in.query) + (row * in.heads + first) * in.width * size;
  for (int64_t q = 0; q < queries; q++) {
    const float* wide = widened(own + q * in.width * size, in.dtype, in.width, buffer);
    __builtin_memcpy(query + q * WIDEST, wide, in.width * sizeof(float));
    multiply(query + q * WIDEST, in.width, in.scale * LOG2_E);
    __builtin_memset(state.result + q * WIDEST, 0, in.value_width * sizeof(float));
    state.top[q] = -infinity();
    state.total[q] = 0.0f;
  }
  const Places keys = places_of(in.keys, row, key_head, in.dtype);
  const Places values = places_of(in.values, row, key_head, in.dtype);
  for (int64_t at = begin; at < end; at += BLOCK) {
    const int64_t n = smaller(BLOCK, end - at);
    for (int64_t j = 0; j < n; j += FOUR) {
      const Four four = four_of(keys, at + j, end, in.dtype, in.width, buffer);
      for (int64_t q = 0; q < queries; q++) {
        dot_four(query + q * WIDEST, four, in.width, scores + q * BLOCK + j);
      }
    }
    raise(state, scores, queries, n, in.value_width);
    for (int64_t j = 0; j < n; j += FOUR) {
      const Four four = four_of(values, at + j, end, in.dtype, in.value_width, buffer);
      for (int64_t q = 0; q < queries; q++) {
        add_four(scores + q * BLOCK + j, four, in.value_width, state.result + q * WIDEST);
      }
    }
  }
  for (int64_t q = 0; q < queries; q++) {
    float* result = state.result + q * WIDEST;
    multiply(result, in.value_width, begin < end ? 1.0f / state.total[q] : 0.0f);
    char* destination = static_cast<char*>(out) + ((row * in.heads + first + q) * in.value_width) * size;
    if (in.dtype == Dtype::float32) {
      __builtin_memcpy(destination, result, in.value_width * sizeof(float));
    } else {
      narrow(result, in.value_width, in.dtype, destination);
    }
  }
}

}  // namespace

void decode_attention(const DecodeInputs& in, void* out, int threads) {
  const int64_t group = in.heads / in.key_heads;
  int64_t numbers = 0;
  for (int64_t row = 0; row < in.batch; row++) {
    numbers += smaller(in.lengths[row], in.window) * in.key_heads * (in.width + in.value_width);
  }
  const int workers = numbers < 65536 ? 1 : threads;
  // a sequence's turn is as long as the sequence: threads take heads as they come
#pragma omp parallel for schedule(dynamic) num_threads(workers)
  for (int64_t task = 0; task < in.batch * in.key_heads; task++) {
    const int64_t row = task / in.key_heads;
    const int64_t key_head = task % in.key_heads;
    const int64_t end = in.lengths[row];
    const int64_t begin = larger(end - in.window, 0);
    for (int64_t q = 0; q < group; q += QUERIES) {
      attend(in, row, key_head, key_head * group + q, smaller(QUERIES, group - q), begin, end, out);
    }
  }
}

}  // namespace rlhf_fast::RF_ISA
