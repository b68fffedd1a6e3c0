// What the kernels share: 16-byte accesses, reductions over a block in a fixed order, and the last block of a grid.
//
// Kernels are apart from their launches (*.cu), so that tests/kernels/cuda_on_host.h can run this very code on the
// host.
#pragma once

#include "../math.h"

namespace rlhf_fast::cuda {

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int WARP = 32;
constexpr int MAX_WARPS = 32;

__device__ __forceinline__ bool is_aligned(const void* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Four neighbouring values in one access where `aligned` and the end allow it; x may be null: zeros
// ---------------------------------------------------------------------------------------------------------------------

struct Four {
  float x[4];
};

struct FourFlags {
  bool x[4];
};

__device__ __forceinline__ Four load_four(const float* in, int64_t at, int64_t end, bool aligned) {
  Four four{};
  if (in == nullptr) {
    return four;
  }
  if (aligned && at + 4 <= end) {
    const float4 loaded = *reinterpret_cast<const float4*>(in + at);
    return {{loaded.x, loaded.y, loaded.z, loaded.w}};
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    four.x[i] = at + i < end ? in[at + i] : 0.0f;
  }
  return four;
}

// Tokens outside the sequence count as masked: what is loaded for them is never used.
__device__ __forceinline__ FourFlags load_mask(const uint8_t* mask, int64_t at, int64_t end, bool aligned) {
  if (aligned && at + 4 <= end) {
    const uchar4 loaded = *reinterpret_cast<const uchar4*>(mask + at);
    return {{loaded.x != 0, loaded.y != 0, loaded.z != 0, loaded.w != 0}};
  }
  FourFlags counts;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    counts.x[i] = at + i < end && mask[at + i];
  }
  return counts;
}

__device__ __forceinline__ void store_four(float* out, const Four& four, int64_t at, int64_t end, bool aligned) {
  if (aligned && at + 4 <= end) {
    *reinterpret_cast<float4*>(out + at) = make_float4(four.x[0], four.x[1], four.x[2], four.x[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (at + i < end) {
      out[at + i] = four.x[i];
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Reductions. Their order follows from the number of threads alone, so a result is the same bits on every run.
// ---------------------------------------------------------------------------------------------------------------------

struct Add {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

// a NaN wins, as in torch.amax
struct Max {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b || a != a ? a : b;
  }
};

template <class T, class Op>
__device__ __forceinline__ T warp_reduce(T x, Op op) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) {
    x = op(x, __shfl_xor_sync(ALL_LANES, x, distance));
  }
  return x;
}

// Every thread gets the result.
template <class T, class Op>
__device__ T block_reduce(T x, Op op) {
  __shared__ T of_warp[MAX_WARPS];
  const int warps = blockDim.x / WARP;
  x = warp_reduce(x, op);
  if (threadIdx.x % WARP == 0) {
    of_warp[threadIdx.x / WARP] = x;
  }
  __syncthreads();
  T result = of_warp[0];
  for (int warp = 1; warp < warps; warp++) {
    result = op(result, of_warp[warp]);
  }
  __syncthreads();  // before the next reduction overwrites of_warp
  return result;
}

// True in every thread of the block that finishes last: what the other blocks wrote before is then visible to it (past
// the L1 cache, by __ldcg). `counter` is 0 when the grid starts.
__device__ __forceinline__ bool is_last_block(unsigned* counter) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counter, 1u) + 1u == gridDim.x;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// Several numbers of a whole grid: the first SUMS are added up, the other MAXIMA are not negative. Every block leaves
// its totals in `partials`, (SUMS + MAXIMA, blocks); the last one reduces those in an order that does not depend on
// which block it is, and returns true with the result in `totals`, which is in shared memory.
template <int SUMS, int MAXIMA>
__device__ bool grid_reduce(const double (&mine)[SUMS + MAXIMA], double* partials, unsigned* counter,
                            double (&totals)[SUMS + MAXIMA]) {
  constexpr int FIELDS = SUMS + MAXIMA;
  __shared__ double of_warp[FIELDS][MAX_WARPS];
  const int warps = blockDim.x / WARP;
  const int warp = threadIdx.x / WARP;
  const int lane = threadIdx.x % WARP;
  const int64_t blocks = gridDim.x;
#pragma unroll
  for (int field = 0; field < FIELDS; field++) {
    const double reduced = field < SUMS ? warp_reduce(mine[field], Add()) : warp_reduce(mine[field], Max());
    if (lane == 0) {
      of_warp[field][warp] = reduced;
    }
  }
  __syncthreads();
  if (threadIdx.x < FIELDS) {
    const int field = threadIdx.x;
    double total = of_warp[field][0];
    for (int w = 1; w < warps; w++) {
      total = field < SUMS ? Add()(total, of_warp[field][w]) : Max()(total, of_warp[field][w]);
    }
    partials[field * blocks + blockIdx.x] = total;
  }
  if (!is_last_block(counter)) {
    return false;
  }
  for (int field = warp; field < FIELDS; field += warps) {
    double total = 0.0;
    for (int64_t block = lane; block < blocks; block += WARP) {
      const double x = __ldcg(partials + field * blocks + block);
      total = field < SUMS ? Add()(total, x) : Max()(total, x);
    }
    total = field < SUMS ? warp_reduce(total, Add()) : warp_reduce(total, Max());
    if (lane == 0) {
      totals[field] = total;
    }
  }
  __syncthreads();
  return true;
}

}  // namespace rlhf_fast::cuda
