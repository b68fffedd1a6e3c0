// Runs the CUDA kernel of csrc/cuda/gae.cuh, unchanged, on the host: a block's threads are coroutines that take turns,
// and change at every barrier and shuffle. Slow, but it executes the indexing, the shuffles and the carry across warps
// and tiles that no compiler checks, on machines without a GPU. test_cuda_build.py compiles and calls it.
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(n)
#define __shared__ static

// with the alignment that a GPU insists on; the test compiles this to trap on any other
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(4) uchar4 {
  unsigned char x, y, z, w;
};
struct Index {
  int x;
};
static float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
static Index threadIdx, blockIdx;

namespace host {

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 * 1024);
  bool done = false;
  int barriers = 0;  // passed so far, of the block
  int shuffles = 0;  // and of the warp
  float exchanged[2] = {};
};

static std::vector<Thread> threads;
static ucontext_t scheduler;
static std::function<void()> body;

static void yield() {
  const int self = threadIdx.x;
  swapcontext(&threads[self].context, &scheduler);
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

static void run_block(int count) {
  threads = std::vector<Thread>(count);
  for (Thread& thread : threads) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    makecontext(&thread.context, entry, 0);
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

}  // namespace host

static void __syncthreads() {
  host::meet(&host::Thread::barriers, 0, static_cast<int>(host::threads.size()));
}

// A lane may run one shuffle ahead of another, never two: two slots are enough.
static float __shfl_down_sync(unsigned lanes, float value, int distance) {
  if (lanes != 0xffffffffu) {
    abort();
  }
  const int self = threadIdx.x;
  const int warp = self - self % 32;
  const int slot = host::threads[self].shuffles % 2;
  host::threads[self].exchanged[slot] = value;
  host::meet(&host::Thread::shuffles, warp, warp + 32);
  const int source = self % 32 + distance < 32 ? self + distance : self;
  return host::threads[source].exchanged[slot];
}

#include "csrc/cuda/gae.cuh"

extern "C" void gae_on_host(int threads, const float* rewards, const float* values, const uint8_t* mask,
                            const float* bootstrap, int64_t count, int64_t length, const int32_t* offsets, float gamma,
                            float lam, float* advantages, float* returns) {
  using namespace rlhf_fast;
  const Sequences sequences{count, length, offsets};
  const GaeInputs inputs{rewards, values, mask, bootstrap, gamma, lam};
  for (int64_t block = 0; block < count; block++) {
    blockIdx.x = static_cast<int>(block);
    host::body = [=] {
      if (threads == 32) {
        cuda::gae_kernel<32>(sequences, inputs, advantages, returns);
      } else {
        cuda::gae_kernel<96>(sequences, inputs, advantages, returns);
      }
    };
    host::run_block(threads);
  }
}
