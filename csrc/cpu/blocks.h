// Short runs of numbers between their formats and float32. Compiled once per instruction set, with internal linkage
// (see math.h). The loops are functions of their own, with their constants in local variables: inlined among others
// they keep sums on the stack, or are not vectorised at all.
#pragma once

#include "../math.h"
#include "ops.h"

#define RF_LOOP __attribute__((noinline))

namespace rlhf_fast::RF_ISA {
namespace {

int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

int64_t item_size(Dtype dtype) {
  return dtype == Dtype::float32 ? 4 : 2;
}

RF_LOOP void widen_bf16(const uint16_t* x, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    out[i] = float_from_bf16(x[i]);
  }
}

RF_LOOP void widen_half(const uint16_t* x, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    out[i] = float_from_half(x[i]);
  }
}

RF_LOOP void narrow_to_bf16(const float* x, int64_t n, uint16_t* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    out[i] = bf16_from_float(x[i]);
  }
}

RF_LOOP void narrow_to_half(const float* x, int64_t n, uint16_t* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    out[i] = half_from_float(x[i]);
  }
}

RF_LOOP float block_max(const float* x, int64_t n) {
  float max = -infinity();
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < n; i++) {
    max = x[i] > max ? x[i] : max;
  }
  return max;
}

// `n` numbers as float32: where they are, if they are that already, else in `buffer`.
const float* widened(const void* source, Dtype dtype, int64_t n, float* buffer) {
  if (dtype == Dtype::float32) {
    return static_cast<const float*>(source);
  }
  const auto widen = dtype == Dtype::bfloat16 ? widen_bf16 : widen_half;
  widen(static_cast<const uint16_t*>(source), n, buffer);
  return buffer;
}

// Into a 16-bit format.
void narrow(const float* x, int64_t n, Dtype dtype, void* destination) {
  const auto to = dtype == Dtype::bfloat16 ? narrow_to_bf16 : narrow_to_half;
  to(x, n, static_cast<uint16_t*>(destination));
}

}  // namespace
}  // namespace rlhf_fast::RF_ISA
