// The per-element formulas of every native kernel, marked host and device. The CPU kernels (csrc/cpu) and the CUDA
// kernels (csrc/cuda) call these and nothing else, so a test on the CPU covers the arithmetic of both.
//
// Everything has internal linkage: this header is compiled once per instruction set, and with external linkage the
// linker could keep the AVX-512 copy of an inline function for all of them.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define RF_HD static __host__ __device__ __forceinline__
#else
#define RF_HD static inline __attribute__((always_inline))
#endif

namespace rlhf_fast {
namespace {

constexpr float LOG2_E = 1.44269504088896341f;
constexpr double LN_2 = 0.69314718055994530942;

RF_HD float infinity() {
  return __builtin_huge_valf();
}

RF_HD uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  return __builtin_bit_cast(uint32_t, value);
#endif
}

RF_HD float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  return __builtin_bit_cast(float, bits);
#endif
}

// a * b + c, in one rounding where the processor does that at no cost. The compilers are told not to fuse on their own:
// x * y - z, with z a product of the same two numbers, must be 0 everywhere.
RF_HD float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

RF_HD float absolute(float x) {
  return float_of(bits_of(x) & 0x7fffffffu);
}

// ---------------------------------------------------------------------------------------------------------------------
// Number formats
// ---------------------------------------------------------------------------------------------------------------------

RF_HD float float_from_bf16(uint16_t bits) {
  return float_of(static_cast<uint32_t>(bits) << 16);
}

// Round to nearest even; NaN stays NaN (rounding alone would carry some NaN payloads into infinity).
RF_HD uint16_t bf16_from_float(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

RF_HD float float_from_half(uint16_t bits) {
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
  // scaling by 2^112 moves the exponent bias from 15 to 127 and makes half's denormals exact
  const float finite = float_of(magnitude) * 0x1p112f;
  const uint32_t nonfinite = magnitude | 0x7f800000u;
  const uint32_t unsigned_bits = magnitude >= 0x0f800000u ? nonfinite : bits_of(finite);
  return float_of(unsigned_bits | (static_cast<uint32_t>(bits & 0x8000u) << 16));
}

// Round to nearest even, overflow to infinity, denormals kept, NaN stays NaN.
RF_HD uint16_t half_from_float(float value) {
  const uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
  const uint32_t magnitude = bits_of(value) & 0x7fffffffu;
  // adding 0.5 aligns a value below 2^-14 so that the float adder rounds it to half's denormal grid
  const uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? denormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return static_cast<uint16_t>(half | sign);
}

// ---------------------------------------------------------------------------------------------------------------------
// Exponential and soft clip
// ---------------------------------------------------------------------------------------------------------------------

// Below this, fast_exp2 returns fast_exp2(EXP2_FLOOR) = 2.4e-38: nothing beside a softmax sum, which is at least 1.
constexpr float EXP2_FLOOR = -125.0f;

// (2^f - 1) / f on [-1/2, 1/2] by a minimax polynomial; f times it, plus 1, is 2^f with a relative error of 2e-9.
RF_HD float exp2_slope(float f) {
  float p = 1.5353361959569156e-4f;
  p = fused(p, f, 1.3398875016719103e-3f);
  p = fused(p, f, 9.6184369176626205e-3f);
  p = fused(p, f, 5.5503323674201965e-2f);
  p = fused(p, f, 2.4022647738456726e-1f);
  return fused(p, f, 6.9314718246459961e-1f);
}

// adding it rounds to the nearest integer and leaves that in the low bits
constexpr float ROUNDER = 12582912.0f;

// 2^x for x <= 127, relative error below 1.1e-7. Branch-free, and only operations that vectorise on every ISA.
// A NaN stays NaN except for exotic payloads: callers also combine with x itself, which carries every NaN.
RF_HD float fast_exp2(float x) {
  x = x < EXP2_FLOOR ? EXP2_FLOOR : x;
  const float shifted = x + ROUNDER;
  const float f = x - (shifted - ROUNDER);
  const float p = fused(exp2_slope(f), f, 1.0f);
  return float_of(bits_of(p) + (bits_of(shifted) << 23));
}

// x = (n + f) ln 2 with |f| <= 1/2, as half a power of two (n reaches 128, one more than a float's exponent) and
// 2^f - 1. Both exponentials are one operation away from it: whoever needs both pays once.
struct Exponential {
  float half_scale;  // 2^(n - 1)
  float fraction;    // 2^f - 1
};

RF_HD Exponential split_exponential(float x) {
  // beyond the upper bound both overflow to infinity by themselves; a NaN passes both comparisons
  const float from_below = x < -86.0f ? -86.0f : x;
  const float bounded = from_below > 89.0f ? 89.0f : from_below;
  const float shifted = fused(bounded, LOG2_E, ROUNDER);
  const float n = shifted - ROUNDER;
  // ln 2 in two parts, the first so short that n times it is exact: dividing by ln 2 outright would multiply the
  // rounding of that quotient by x
  const float f = fused(n, 2.12194440e-4f, fused(n, -0.693359375f, bounded)) * LOG2_E;
  return {float_of((bits_of(shifted) << 23) + 0x3f000000u), exp2_slope(f) * f};
}

// e^x, relative error below 1.3e-7. Overflows to infinity, stays at 4.5e-38 below -86, NaN for NaN.
RF_HD float exponential(float x) {
  const Exponential e = split_exponential(x);
  return fused(e.half_scale, e.fraction, e.half_scale) * 2.0f;
}

// e^x - 1 with all its digits near 0: 2^n (2^f - 1) + (2^n - 1).
RF_HD float exponential_minus_one(float x) {
  const Exponential e = split_exponential(x);
  return fused(e.half_scale, e.fraction, e.half_scale - 0.5f) * 2.0f;
}

// c * tanh(x / c) for c > 0. One form keeps its digits near 0, the other near c.
RF_HD float soft_clip(float x, float c) {
  const float u = absolute(x / c);
  const float u2 = u * u;
  float p = 1.8956410931423306e-3f;
  p = fused(p, u2, -7.8832758590579033e-3f);
  p = fused(p, u2, 2.1571043878793716e-2f);
  p = fused(p, u2, -5.3920950740575790e-2f);
  p = fused(p, u2, 1.3332983851432800e-1f);
  p = fused(p, u2, -3.3333325386047363e-1f);
  const float near_zero = c * fused(u, u2 * p, u);
  const float bounded = u > 20.0f ? 20.0f : u;
  const float near_c = fused(-c, 2.0f / (fast_exp2(bounded * (2.0f * LOG2_E)) + 1.0f), c);
  const float magnitude = u < 0.625f ? near_zero : near_c;
  const float result = float_of(bits_of(magnitude) | (bits_of(x) & 0x80000000u));
  return x == x ? result : x;
}

// d soft_clip / d x, from the clipped value.
RF_HD float soft_clip_slope(float clipped, float inverse_c) {
  const float t = clipped * inverse_c;
  return (1.0f - t) * (1.0f + t);
}

// ---------------------------------------------------------------------------------------------------------------------
// Softmax over the vocabulary
//
// A logit x becomes z = scale * x, scale being 1 / temperature (times logit_scale); with a softcap, x is first replaced
// by soft_clip(x, softcap). The kernels work on d = scale * (x - max) in base 2: subtracting first loses nothing
// where it matters (x near max), and base 2 saves the exponential a multiplication.
// ---------------------------------------------------------------------------------------------------------------------

// The running state of a row: sum = sum 2^d and weighted = sum d 2^d, d = scale_log2 * (x - max).
template <class Real>
struct SoftmaxSum {
  float max;
  Real sum;
  Real weighted;
};

template <class Real>
RF_HD SoftmaxSum<Real> empty_softmax_sum() {
  return {-infinity(), Real(0), Real(0)};
}

// The point that logits are measured from: any finite value while every logit so far is -inf, as -inf - -inf is NaN.
template <class Real>
RF_HD float shift_of(const SoftmaxSum<Real>& state) {
  return state.max == -infinity() ? 0.0f : state.max;
}

// Move the state to a new maximum, at least the old one.
template <class Real>
RF_HD void raise_max(SoftmaxSum<Real>& state, float max, float scale_log2) {
  if (!(max > state.max)) {
    return;
  }
  const bool was_empty = state.max == -infinity();
  const float d = was_empty ? 0.0f : (state.max - max) * scale_log2;
  const Real factor = was_empty ? Real(0) : Real(fast_exp2(d));
  state.weighted = factor * (state.weighted + Real(d < EXP2_FLOOR ? EXP2_FLOOR : d) * state.sum);
  state.sum = factor * state.sum;
  state.max = max;
}

// The distance of a logit to the maximum in base 2, bounded so that a logit of -inf adds 0 * finite to the entropy.
RF_HD float log2_distance(float x, float shift, float scale_log2) {
  const float d = (x - shift) * scale_log2;
  return d < EXP2_FLOOR ? EXP2_FLOOR : d;
}

// Row constants of the gradient. With p the softmax, H its entropy, y the label and g the upstream gradients:
//   d logprob / d z_j = [j = y] - p_j        d H / d z_j = -p_j (log p_j + H)
// hence d loss / d x_j = p_j (constant + slope * log2 p_j), plus g_logprob * scale at the label.
struct RowGradient {
  float shift;   // log2 p_j = (x_j - shift) * scale_log2 - offset: two parts, as one float cannot hold
  float offset;  // the log-sum-exp closely enough when |logit| is 100 and p is near 1
  float scale_log2;
  float constant;
  float slope;
};

RF_HD float logit_gradient(float x, const RowGradient& row) {
  const float log2_p = fused(x - row.shift, row.scale_log2, -row.offset);
  const float bounded = log2_p < EXP2_FLOOR ? EXP2_FLOOR : log2_p;
  const float p = log2_p < EXP2_FLOOR ? 0.0f : fast_exp2(bounded);
  return p * fused(row.slope, bounded, row.constant);
}

// ---------------------------------------------------------------------------------------------------------------------
// Generalized advantage estimation as an affine scan
//
//   A_t = r_t + gamma V_{t+1} - V_t + gamma lam A_{t+1}
//
// needs V and A of the NEXT UNMASKED token. Both reach A_t only through s = V_{t+1} + lam A_{t+1}, so this one number
// is the whole carry: A_t = r_t - V_t + gamma s, and the carry of the token before is V_t + lam A_t, affine in s. A
// masked token is the identity map. Affine maps compose, so a row is one parallel scan of two floats per token.
// ---------------------------------------------------------------------------------------------------------------------

struct Affine {
  float slope;
  float offset;
};

RF_HD Affine identity_map() {
  return {1.0f, 0.0f};
}

// The map that applies `later` (closer to the end of the sequence) first.
RF_HD Affine compose(Affine earlier, Affine later) {
  return {earlier.slope * later.slope, fused(earlier.slope, later.offset, earlier.offset)};
}

RF_HD float apply(Affine map, float carry) {
  return fused(map.slope, carry, map.offset);
}

RF_HD Affine gae_map(float reward, float value, float gamma, float lam) {
  return {gamma * lam, fused(lam, reward - value, value)};
}

RF_HD float gae_advantage(float reward, float value, float carry, float gamma) {
  return fused(gamma, carry, reward - value);
}

RF_HD float gae_return(float reward, float carry, float gamma) {
  return fused(gamma, carry, reward);
}

}  // namespace
}  // namespace rlhf_fast
