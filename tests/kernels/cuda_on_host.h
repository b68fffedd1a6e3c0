// Runs CUDA kernels, unchanged, on the host: a block's threads are coroutines that take turns, and change at every
// barrier and shuffle; blocks run one after the other, in an order that the test chooses. Slow, but it executes the
// indexing, the shuffles and what blocks leave to each other, which no compiler checks, on machines without a GPU.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

// with the alignment that a GPU insists on; the tests compile this to trap on any other
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(4) uchar4 {
  unsigned char x, y, z, w;
};
struct Index {
  unsigned x;
};
static float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace host {

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(128 * 1024);
  bool done;
  int barriers;  // passed so far, of the block
  int shuffles;  // and of the warp
  unsigned char exchanged[2][8];
};

static std::vector<Thread> threads;
static ucontext_t scheduler;
static std::function<void()> body;

static int block_size() {
  return static_cast<int>(blockDim.x);
}

static void yield() {
  swapcontext(&threads[threadIdx.x].context, &scheduler);
}

// Wait until every thread of [begin, end) has counted as far as this one.
static void meet(int Thread::* counter, int begin, int end) {
  const int mine = ++(threads[threadIdx.x].*counter);
  for (int t = begin; t < end; t++) {
    while (threads[t].*counter < mine) {
      if (threads[t].done) {
        abort();  // a thread left before the others: undefined on a GPU
      }
      yield();
    }
  }
}

static void entry() {
  body();
  threads[threadIdx.x].done = true;
  yield();
}

static void start(Thread& thread) {
  thread.done = false;
  thread.barriers = thread.shuffles = 0;
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.data();
  thread.context.uc_stack.ss_size = thread.stack.size();
  makecontext(&thread.context, entry, 0);
}

static void run_block() {
  const int count = block_size();
  if (static_cast<int>(threads.size()) < count) {
    threads = std::vector<Thread>(count);
  }
  for (int t = 0; t < count; t++) {
    start(threads[t]);
  }
  // warps take turns of random length, so that one gets far ahead of another wherever no barrier forbids it
  uint32_t random = 1;
  for (int left = count; left > 0;) {
    random = random * 1664525u + 1013904223u;
    const int first = static_cast<int>(random >> 8) % (count / 32) * 32;
    const int turns = 1 + static_cast<int>(random >> 24) % 32;
    for (int turn = 0; turn < turns; turn++) {
      for (int t = first; t < first + 32; t++) {
        if (!threads[t].done) {
          threadIdx.x = t;
          swapcontext(&scheduler, &threads[t].context);
          left -= threads[t].done;
        }
      }
    }
  }
}

// Launch `kernel` on a grid. `order` 0 runs the blocks as they are numbered, 1 backwards, others from the middle on.
template <class Kernel>
void launch(int64_t blocks, int64_t threads_per_block, int64_t order, Kernel kernel) {
  blockDim.x = static_cast<unsigned>(threads_per_block);
  gridDim.x = static_cast<unsigned>(blocks);
  body = kernel;
  for (int64_t turn = 0; turn < blocks; turn++) {
    const int64_t block = order == 0 ? turn : order == 1 ? blocks - 1 - turn : (turn + blocks / 2) % blocks;
    blockIdx.x = static_cast<unsigned>(block);
    run_block();
  }
}

// A lane may run one shuffle ahead of another, never two: two slots are enough.
template <class T>
T exchange(unsigned lanes, T value, int source) {
  static_assert(sizeof(T) <= 8);
  if (lanes != 0xffffffffu) {
    abort();
  }
  const int self = static_cast<int>(threadIdx.x);
  const int warp = self - self % 32;
  const int slot = threads[self].shuffles % 2;
  memcpy(threads[self].exchanged[slot], &value, sizeof(T));
  meet(&Thread::shuffles, warp, warp + 32);
  memcpy(&value, threads[warp + source].exchanged[slot], sizeof(T));
  return value;
}

}  // namespace host

static void __syncthreads() {
  host::meet(&host::Thread::barriers, 0, host::block_size());
}

template <class T>
static T __shfl_down_sync(unsigned lanes, T value, int distance) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return host::exchange(lanes, value, lane + distance < 32 ? lane + distance : lane);
}

template <class T>
static T __shfl_xor_sync(unsigned lanes, T value, int distance) {
  return host::exchange(lanes, value, static_cast<int>(threadIdx.x % 32) ^ distance);
}

// blocks do not run at the same time here: a fence has nothing to do
static void __threadfence() {}

static unsigned atomicAdd(unsigned* counter, unsigned amount) {
  const unsigned before = *counter;
  *counter += amount;
  return before;
}

static double __ldcg(const double* address) {
  return *address;
}

template <class T>
static void __stcg(T* address, T value) {
  *address = value;
}

static unsigned __funnelshift_r(unsigned low, unsigned high, unsigned bits) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (bits % 32));
}
