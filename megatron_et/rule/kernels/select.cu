// Radix selection: the k-th largest logit of every expert, exactly, for one k or two at once.
//
// An order-preserving key of 32 bits is found from the top, a digit a launch. A launch counts, by their next digit,
// the tokens whose key begins with the digits found so far; the last block of a group of experts to arrive
// finds the digit with the k-th largest and zeroes the counts for the next launch. What it takes does not depend on
// the logits but for tokens that meet in one bucket.
//
// A block takes `rows` tokens (a stripe) and the EXPERTS experts that make one 32-byte sector of fp32 logits;
// two neighbouring threads share a token. Integers only: exact in any order.
//
// T tokens, E experts (a multiple of EXPERTS). THREADS is given to the compiler by select.py.

typedef unsigned int u32;

#define EXPERTS 8
#define BUCKETS 2048
#define QUERIES 2
#define ROWS_AT_ONCE (THREADS / 2)
#define WARPS (THREADS / 32)
#define SHARE (BUCKETS / 32)  // buckets of a lane
#define NOBODY 0xffffffffu    // no key begins so, as beginnings are shorter than 32 bits

#ifdef ON_CPU
static u32 table[EXPERTS * BUCKETS];
#else
extern __shared__ u32 table[];  // [EXPERTS, BUCKETS]: more than a kernel may have without asking for it
#endif

// quantile.py's _ordered_keys, and NaN above all, as torch sorts it.
__device__ __forceinline__ u32 key_of(float x) {
  const u32 bits = (u32)__float_as_int(x + 0.0f);
  const u32 key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return isnan(x) ? 0xffffffffu : key;
}

__device__ __forceinline__ float logit_of(u32 key) {
  return __int_as_float((int)(key & 0x80000000u ? key & 0x7fffffffu : ~key));
}

extern "C" __global__ void __launch_bounds__(THREADS) select_digit(
    const float* __restrict__ logits,           // [T, E]
    const unsigned char* __restrict__ padding,  // [T], or null: none
    const long long* __restrict__ wanted_0,     // [1], k of the first query, or null: it is k_0
    const long long* __restrict__ wanted_1,     // [1], of the second
    u32* __restrict__ prefix,                   // [QUERIES, E], digits found so far
    u32* __restrict__ left,                     // [QUERIES, E], the k-th largest is the left-th of those that begin so
    u32* __restrict__ histogram,                // [queries, E, BUCKETS], zero before and after
    u32* __restrict__ arrived,                  // [groups], zero before and after
    float* __restrict__ cutoffs,                // [QUERIES, E], written by the launch with shift 0
    int num_tokens, int num_experts, int rows, int queries, int bits, int shift, int k_0, int k_1) {
  __shared__ u32 is_last;

  const int thread = threadIdx.x, group = blockIdx.x, stripe = blockIdx.y;
  const int e = group * EXPERTS + (thread & 1) * 4;
  const int begin = stripe * rows, end = min(begin + rows, num_tokens);
  const bool first = bits + shift == 32;

  for (int i = thread; i < EXPERTS * BUCKETS; i += THREADS) table[i] = 0;
  u32 begins[QUERIES][4];
#pragma unroll
  for (int q = 0; q < QUERIES; q++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int place = q * num_experts + e + i;
      begins[q][i] = !first && q < queries && left[place] > 0 ? prefix[place] : NOBODY;
    }
  __syncthreads();

  u32* const own_table = table + (thread & 1) * 4 * BUCKETS;
  const u32 mask = (1u << bits) - 1;
  for (int base = begin; base < end; base += ROWS_AT_ONCE * LOADS) {
    float4 loaded[LOADS];
    bool valid[LOADS];
#pragma unroll
    for (int l = 0; l < LOADS; l++) {
      const int t = base + l * ROWS_AT_ONCE + (thread >> 1);
      valid[l] = t < end && (padding == nullptr || padding[t] == 0);
      loaded[l] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (valid[l]) loaded[l] = *(const float4*)(logits + (size_t)t * num_experts + e);
    }
#pragma unroll
    for (int l = 0; l < LOADS; l++) {
      if (!valid[l]) continue;
      const float x[4] = {loaded[l].x, loaded[l].y, loaded[l].z, loaded[l].w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const u32 key = key_of(x[i]);
        u32 one = 1;
        if (!first) {
          // Both queries in one table, 16 bits each: a stripe has fewer than 2^16 tokens.
          const u32 beginning = key >> (bits + shift);
          one = (u32)(beginning == begins[0][i]) | (u32)(beginning == begins[1][i]) << 16;
        }
        if (one) atomicAdd(own_table + i * BUCKETS + (key >> shift & mask), one);
      }
    }
  }
  __syncthreads();

  const size_t own_part = (size_t)group * EXPERTS * BUCKETS, query_part = (size_t)num_experts * BUCKETS;
  for (int i = thread; i < EXPERTS * BUCKETS; i += THREADS) {
    const u32 n = table[i];
    const u32 of_first = first ? n : n & 0xffffu, of_second = first ? 0 : n >> 16;
    if (of_first) atomicAdd(histogram + own_part + i, of_first);
    if (of_second) atomicAdd(histogram + query_part + own_part + i, of_second);
  }
  __threadfence();  // this thread's counts, before its block says that it has arrived
  __syncthreads();
  if (thread == 0) {
    __threadfence();  // and all threads' counts that the barrier has shown to this one
    is_last = atomicAdd(arrived + group, 1u) == gridDim.y - 1;
  }
  __syncthreads();
  if (!is_last) return;

  __threadfence();
  if (thread == 0) arrived[group] = 0;
  const int lane = thread & 31;
  // In the first launch all tokens are counted once for both queries.
  for (int counted = 0; counted < (first ? 1 : queries); counted++) {
    __syncthreads();
    for (int i = thread; i < EXPERTS * BUCKETS; i += THREADS)
      table[i] = atomicExch(histogram + counted * query_part + own_part + i, 0u);
    __syncthreads();
    for (int task = thread / 32; task < EXPERTS * (first ? queries : 1); task += WARPS) {
      const int expert = task % EXPERTS, query = first ? task / EXPERTS : counted;
      const int place = query * num_experts + group * EXPERTS + expert;
      const u32 before = first ? 0 : left[place];
      // Lane 0 has the buckets at the top. Each begins elsewhere in its share, or all would meet in one bank.
      const u32* const share = table + expert * BUCKETS + BUCKETS - (lane + 1) * SHARE;
      u32 sum = 0;
      for (int j = 0; j < SHARE; j++) sum += share[(j + lane) & (SHARE - 1)];
      u32 above = 0, total = sum;  // tokens in higher lanes' buckets, and in all
      for (int lanes = 1; lanes < 32; lanes *= 2) {
        const u32 other = __shfl_xor_sync(0xffffffffu, total, lanes);
        if (lane & lanes) above += other;
        total += other;
      }
      u32 k = before;
      if (first) {
        const long long* const wanted = query == 0 ? wanted_0 : wanted_1;
        const long long asked = wanted != nullptr ? *wanted : query == 0 ? k_0 : k_1;
        k = asked <= 0 ? 0 : asked < total ? (u32)asked : total;
      }
      __syncwarp();   // all lanes have read `left`, which one of them writes now
      if (k == 0) {  // nobody is wanted
        if (lane == 0) {
          left[place] = 0;
          if (shift == 0) cutoffs[place] = __int_as_float(0x7f800000);
        }
      } else if (above < k && k <= above + sum) {
        int bucket = SHARE - 1;
        for (; above + share[bucket] < k; bucket--) above += share[bucket];
        const u32 digit = BUCKETS - (lane + 1) * SHARE + bucket;
        const u32 digits = (first ? 0 : prefix[place] << bits) | digit;
        prefix[place] = digits;
        left[place] = k - above;
        if (shift == 0) cutoffs[place] = logit_of(digits);
      }
    }
  }
}
