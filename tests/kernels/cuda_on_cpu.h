// Enough of CUDA to run our kernels on a CPU: blocks one after another, the threads of a block as real threads.
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <thread>
#include <tuple>
#include <type_traits>
#include <vector>

struct Index { int x, y, z; };
static thread_local Index threadIdx, blockIdx;
static Index gridDim;
static std::barrier<>* block_barrier;
static std::barrier<>* warp_barriers[THREADS / 32];
static unsigned exchanged[THREADS];

struct alignas(16) float4 { float x, y, z, w; };
struct uchar4 { unsigned char x, y, z, w; };
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uchar4 make_uchar4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {(unsigned char)x, (unsigned char)y, (unsigned char)z, (unsigned char)w};
}

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __restrict__
#define __shared__ static
#define ON_CPU

static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }
static float __fdividef(float a, float b) { return a / b; }
static int __float_as_int(float x) { int i; std::memcpy(&i, &x, 4); return i; }
static float __int_as_float(int i) { float x; std::memcpy(&x, &i, 4); return x; }
static bool isnan(float x) { return std::isnan(x); }
template <class T> static T atomicAdd(T* p, T n) { return __atomic_fetch_add(p, n, __ATOMIC_SEQ_CST); }
template <class T> static T atomicExch(T* p, T n) { return __atomic_exchange_n(p, n, __ATOMIC_SEQ_CST); }
static void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
static void __syncthreads() { block_barrier->arrive_and_wait(); }
static void __syncwarp() { warp_barriers[threadIdx.x / 32]->arrive_and_wait(); }
static unsigned __shfl_xor_sync(unsigned, unsigned value, int lanes) {
  std::barrier<>& warp = *warp_barriers[threadIdx.x / 32];
  exchanged[threadIdx.x] = value;
  warp.arrive_and_wait();
  const unsigned other = exchanged[threadIdx.x ^ lanes];
  warp.arrive_and_wait();
  return other;
}
