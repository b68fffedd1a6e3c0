// Number formats in vectors of 16 bytes, and rows that begin at any address.
#pragma once

#include "device.cuh"

namespace rlhf_fast::cuda {

// Items are what lies in memory. A vector is the 16 bytes that one load takes.
struct Float32 {
  using Item = float;
  static constexpr int WIDTH = 4;
  static constexpr uint32_t LOWEST = 0xff800000u;

  static __device__ __forceinline__ uint32_t bits(Item item) {
    return bits_of(item);
  }
  static __device__ __forceinline__ float widened(Item item) {
    return item;
  }
  static __device__ __forceinline__ Item narrowed(float x) {
    return x;
  }
  static __device__ __forceinline__ void unpack(const uint4& words, float (&x)[WIDTH]) {
    x[0] = float_of(words.x);
    x[1] = float_of(words.y);
    x[2] = float_of(words.z);
    x[3] = float_of(words.w);
  }
  static __device__ __forceinline__ uint32_t pack(float low, float) {
    return bits_of(low);
  }
};

struct Bfloat16 {
  using Item = uint16_t;
  static constexpr int WIDTH = 8;
  static constexpr uint32_t LOWEST = 0xff80u;

  static __device__ __forceinline__ uint32_t bits(Item item) {
    return item;
  }
  static __device__ __forceinline__ float widened(Item item) {
    return float_from_bf16(item);
  }
  static __device__ __forceinline__ Item narrowed(float x) {
    return static_cast<Item>(pack(x, 0.0f) & 0xffffu);
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
#if defined(__CUDA_ARCH__)
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    return bf16_from_float(low) | static_cast<uint32_t>(bf16_from_float(high)) << 16;
#endif
  }
  static __device__ __forceinline__ void unpack(const uint4& words, float (&x)[WIDTH]) {
    const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      x[2 * i] = float_of(w[i] << 16);
      x[2 * i + 1] = float_of(w[i] & 0xffff0000u);
    }
  }
};

struct Float16 {
  using Item = uint16_t;
  static constexpr int WIDTH = 8;
  static constexpr uint32_t LOWEST = 0xfc00u;

  static __device__ __forceinline__ uint32_t bits(Item item) {
    return item;
  }
  static __device__ __forceinline__ float widened(Item item) {
#if defined(__CUDA_ARCH__)
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(item));
    return x;
#else
    return float_from_half(item);
#endif
  }
  static __device__ __forceinline__ Item narrowed(float x) {
    return static_cast<Item>(pack(x, 0.0f) & 0xffffu);
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
#if defined(__CUDA_ARCH__)
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    return half_from_float(low) | static_cast<uint32_t>(half_from_float(high)) << 16;
#endif
  }
  static __device__ __forceinline__ void unpack(const uint4& words, float (&x)[WIDTH]) {
    const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      x[2 * i] = widened(static_cast<uint16_t>(w[i] & 0xffffu));
      x[2 * i + 1] = widened(static_cast<uint16_t>(w[i] >> 16));
    }
  }
};

// 16 bytes at any address of whole items, from the two aligned vectors that hold them.
__device__ __forceinline__ uint4 load_shifted(const char* at, int past) {
  const uint4 low = *reinterpret_cast<const uint4*>(at - past);
  const uint4 high = *reinterpret_cast<const uint4*>(at - past + 16);
  uint32_t w[7] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z};
  if (past & 8) {
    w[0] = w[2], w[1] = w[3], w[2] = w[4], w[3] = w[5], w[4] = w[6], w[5] = high.w;
  }
  if (past & 4) {
    w[0] = w[1], w[1] = w[2], w[2] = w[3], w[3] = w[4], w[4] = w[5];
  }
  const int bits = past % 4 * 8;
  return {__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits), __funnelshift_r(w[2], w[3], bits),
          __funnelshift_r(w[3], w[4], bits)};
}

// Columns [column, column + WIDTH) of a row of `columns`; -inf for those outside it. Never reads outside the row.
template <class Format>
__device__ __forceinline__ uint4 load_vector(const typename Format::Item* row, int64_t column, int64_t columns) {
  constexpr int WIDTH = Format::WIDTH;
  constexpr int PER_WORD = WIDTH / 4;
  const char* at = reinterpret_cast<const char*>(row + column);
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(at) % 16);
  if (past == 0 && column >= 0 && column + WIDTH <= columns) {
    return *reinterpret_cast<const uint4*>(at);
  }
  if (column >= WIDTH && column + 2 * WIDTH <= columns) {
    return load_shifted(at, past);
  }
  uint32_t w[4] = {};
#pragma unroll
  for (int i = 0; i < WIDTH; i++) {
    const bool inside = column + i >= 0 && column + i < columns;
    const uint32_t bits = inside ? Format::bits(row[column + i]) : Format::LOWEST;
    w[i / PER_WORD] |= bits << (i % PER_WORD * 16);
  }
  return {w[0], w[1], w[2], w[3]};
}

// N vectors, `step` columns apart, all of them asked for before the first is used. `aligned`: so is column `begin`.
template <class Format, int N>
__device__ __forceinline__ void load_vectors(const typename Format::Item* row, int64_t begin, int64_t step,
                                             int64_t columns, bool aligned, uint4 (&words)[N]) {
  const int64_t end = begin + (N - 1) * step;
  const int64_t first = begin < end ? begin : end;
  const int64_t last = begin < end ? end : begin;
  if (aligned && first >= 0 && last + Format::WIDTH <= columns) {
#pragma unroll
    for (int k = 0; k < N; k++) {
      words[k] = *reinterpret_cast<const uint4*>(row + begin + k * step);
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < N; k++) {
    words[k] = load_vector<Format>(row, begin + k * step, columns);
  }
}

// N values from `column` on; whole vectors where the address allows.
template <class Format, int N>
__device__ __forceinline__ void store_vector(typename Format::Item* row, int64_t column, int64_t columns,
                                             const float (&x)[N]) {
  constexpr int PER_WORD = Format::WIDTH / 4;
  constexpr int WORDS = N / PER_WORD;
  typename Format::Item* at = row + column;
  if (column >= 0 && column + N <= columns && is_aligned(at, 4 * WORDS)) {
    uint32_t w[WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
      w[i] = Format::pack(x[i * PER_WORD], x[i * PER_WORD + PER_WORD - 1]);
    }
    // a plain assignment is cut into stores of 4 bytes
    if constexpr (WORDS == 4) {
      __stcg(reinterpret_cast<uint4*>(at), uint4{w[0], w[1], w[2], w[3]});
    } else {
      __stcg(reinterpret_cast<uint2*>(at), uint2{w[0], w[1]});
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < N; i++) {
    if (column + i >= 0 && column + i < columns) {
      at[i] = Format::narrowed(x[i]);
    }
  }
}

}  // namespace rlhf_fast::cuda
