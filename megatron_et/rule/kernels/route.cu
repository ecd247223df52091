// The rule and all its counts in one CUDA kernel, for many tokens of few experts at once: what Triton cannot
// say is counting in shared memory, without which the histogram costs as much as all the rest.
//
// A block takes ROWS tokens (a stripe) and the EXPERTS experts that make one 32-byte sector of fp32 logits.
// It counts its histogram in shared memory and adds it to the global one at its end. Fan-outs cross blocks:
// every block adds its share to `fanout`, and the last one of a stripe counts them and clears `fanout` for the
// next micro-batch. Integers only, so that all counts are exact in any order.
//
// Two neighbouring threads share a token: each has four experts. T tokens, E experts (a multiple of EXPERTS).
// The numbers in capitals that are not defined here are given to the compiler by native.py; with COUNTED 0 the
// kernel routes only, to the same bits, and the pointers of what is counted are null.

typedef unsigned int u32;

#define EXPERTS 8
#define ROWS_AT_ONCE (THREADS / 2)
#define WARPS (THREADS / 32)
#define INFINITE __int_as_float(0x7f800000)
#define NOT_A_NUMBER __int_as_float(0x7fc00000)
#define MOST_FANOUTS 64  // fan-outs that are added up in shared memory; the rest, of few tokens, are not

// route.py's _sigmoid: 1 / (1 + exp(-x)) to 1 ulp.
__device__ __forceinline__ float sigmoid_of(float x) {
  const float scale = 5.960464477539063e-08f;  // 2^-24
  x = fminf(fmaxf(x, -104.0f), 64.0f);
  const float shifted = fmaf(x, -1.4426950408889634f, 12582912.0f);
  const float n = shifted - 12582912.0f;
  const float r = fmaf(n, -1.428606765330187e-06f, fmaf(n, -0.693145751953125f, -x));
  float p = 1.0f / 5040.0f;
  p = fmaf(p, r, 1.0f / 720.0f);
  p = fmaf(p, r, 1.0f / 120.0f);
  p = fmaf(p, r, 1.0f / 24.0f);
  p = fmaf(p, r, 1.0f / 6.0f);
  p = fmaf(p, r, 0.5f);
  const float s = fmaf(p * r, r, r);
  const float power = __int_as_float((__float_as_int(shifted) << 23) + ((127 - 24) << 23));
  const float both = power + scale;
  const float off_both = scale - (both - power);
  const float denominator = fmaf(power, s, both);
  const float low = fmaf(power, s, both - denominator) + off_both;
  const float reciprocal = __fdividef(1.0f, denominator);
  const float left = fmaf(-reciprocal, low, fmaf(-reciprocal, denominator, 1.0f));
  return fmaf(left, reciprocal, reciprocal) * scale;
}

// quantile.py's Histogram.add: the bin is read off the bits of the distance from the centre.
__device__ __forceinline__ int bin_of(float x, float center) {
  const float distance = x - center;
  const int octave = ((__float_as_int(distance) & 0x7fffffff) >> 19) - FIRST;
  const int magnitude = min(max(octave, 0), BINS / 2 - 1);
  return distance >= 0.0f ? BINS / 2 + magnitude : BINS / 2 - 1 - magnitude;
}

extern "C" __global__ void __launch_bounds__(THREADS) route_and_count(
    const float* __restrict__ logits,         // [T, E]
    const float* __restrict__ thresholds,     // [E]
    const float* __restrict__ lower,          // [E], or null: no clamp
    const float* __restrict__ upper,          // [E]
    const unsigned char* __restrict__ padding,  // [T], or null: none
    const float* __restrict__ centers,        // [E]
    float* __restrict__ gates,                // [T, E]
    uchar4* __restrict__ routing_map,         // [T, E]
    u32* __restrict__ fanout,                 // [T], zero before and after
    u32* __restrict__ arrived,                // [stripes], zero before and after
    u32* __restrict__ counts,                 // laid out as statistics.BatchCounts
    u32* __restrict__ histogram,              // [E, BINS]
    int num_tokens, int num_experts, int rows) {
#if COUNTED
  __shared__ u32 table[EXPERTS * BINS];
  __shared__ u32 used[EXPERTS];
  __shared__ u32 odd[EXPERTS];  // logits that are not finite
  __shared__ u32 scalars[2];    // tokens, whether this block is the last one
  __shared__ u32 fanouts[MOST_FANOUTS];
#endif

  const int thread = threadIdx.x, group = blockIdx.x, stripe = blockIdx.y;
  const int e = group * EXPERTS + (thread & 1) * 4;
  const int first = stripe * rows, end = min(first + rows, num_tokens);

#if COUNTED
  for (int i = thread; i < EXPERTS * BINS; i += THREADS) table[i] = 0;
  if (thread < EXPERTS) used[thread] = odd[thread] = 0;
  if (thread < 2) scalars[thread] = 0;
  if (thread < MOST_FANOUTS) fanouts[thread] = 0;
  float center[4];
#pragma unroll
  for (int i = 0; i < 4; i++) center[i] = centers[e + i];
#endif

  float applied[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    applied[i] = thresholds[e + i];
    if (lower != nullptr) {
      const float low = lower[e + i], high = upper[e + i];
      if (COUNTED && stripe == 0 && thread < 2 && (low > applied[i] || high < applied[i]))
        atomicAdd(counts + num_experts + e + i, 1u);
      const float clamped = fminf(fmaxf(applied[i], low), high);
      // As torch's clamp: an expert with NaN among its bounds takes nobody.
      applied[i] = isnan(low) || isnan(high) || isnan(applied[i]) ? NOT_A_NUMBER : clamped;
    }
  }
#if COUNTED
  if (stripe == 0 && group == 0 && thread == 0) atomicAdd(counts + 4 * num_experts + 2, 1u);
  __syncthreads();

  u32* const own_table = table + (thread & 1) * 4 * BINS;
  u32 tally[4] = {0, 0, 0, 0}, tokens = 0;
#endif
  for (int base = first; base < end; base += ROWS_AT_ONCE * LOADS) {
    float4 loaded[LOADS];
#pragma unroll
    for (int l = 0; l < LOADS; l++) {
      const int t = base + l * ROWS_AT_ONCE + (thread >> 1);
      loaded[l] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (t < end) loaded[l] = *(const float4*)(logits + (size_t)t * num_experts + e);
    }
#pragma unroll
    for (int l = 0; l < LOADS; l++) {
      const int t = base + l * ROWS_AT_ONCE + (thread >> 1);
      const bool valid = t < end && (padding == nullptr || padding[t] == 0);
      const float x[4] = {loaded[l].x, loaded[l].y, loaded[l].z, loaded[l].w};
      float gate[4];
      u32 chosen[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        // Without a branch: some lane of a warp has almost always a token for the expert.
        const float g = sigmoid_of(x[i]);
        const bool passes = valid & (x[i] >= applied[i]) & (x[i] > -INFINITE);
        chosen[i] = passes;
        gate[i] = passes ? g : 0.0f;
      }
      if (t < end) {
        const size_t place = (size_t)t * num_experts + e;
        *(float4*)(gates + place) = make_float4(gate[0], gate[1], gate[2], gate[3]);
        routing_map[place / 4] = make_uchar4(chosen[0], chosen[1], chosen[2], chosen[3]);
      }
#if COUNTED
      int bin[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        bin[i] = bin_of(x[i], center[i]);
        tally[i] += chosen[i];
        if (valid && !(fabsf(x[i]) < INFINITE)) atomicAdd(odd + (thread & 1) * 4 + i, 1u);
      }
      if (valid) {
#pragma unroll
        for (int i = 0; i < 4; i++) atomicAdd(own_table + i * BINS + bin[i], 1u);
      }
      tokens += valid;
      const u32 share = chosen[0] + chosen[1] + chosen[2] + chosen[3];
      const u32 shares = share + __shfl_xor_sync(0xffffffffu, share, 1);
      if ((thread & 1) == 0 && shares > 0) atomicAdd(fanout + t, shares);
#endif
    }
  }
#if COUNTED
#pragma unroll
  for (int i = 0; i < 4; i++) {
    // Lanes of one half have the same experts.
#pragma unroll
    for (int lanes = 2; lanes < 32; lanes *= 2) tally[i] += __shfl_xor_sync(0xffffffffu, tally[i], lanes);
    if ((thread & 31) < 2) atomicAdd(used + (thread & 1) * 4 + i, tally[i]);
  }
  if (group == 0 && (thread & 1) == 0 && tokens) atomicAdd(scalars, tokens);
  __threadfence();  // this thread's fan-outs, before its block says that it has arrived
  __syncthreads();

  for (int i = thread; i < EXPERTS * BINS; i += THREADS)
    if (table[i]) atomicAdd(histogram + (size_t)group * EXPERTS * BINS + i, table[i]);
  if (thread < EXPERTS && used[thread]) atomicAdd(counts + group * EXPERTS + thread, used[thread]);
  if (thread < EXPERTS && odd[thread])
    atomicAdd(counts + 3 * num_experts + 1 + group * EXPERTS + thread, odd[thread]);
  if (thread == 0) {
    if (scalars[0]) atomicAdd(counts + 4 * num_experts + 1, scalars[0]);
    __threadfence();  // and all threads' fan-outs that the barrier has shown to this one
    scalars[1] = atomicAdd(arrived + stripe, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!scalars[1]) return;

  __threadfence();
  for (int t = first + thread; t < end; t += THREADS) {
    const u32 n = atomicExch(fanout + t, 0u);
    if (padding != nullptr && padding[t] != 0) continue;
    if (n < MOST_FANOUTS)
      atomicAdd(fanouts + n, 1u);
    else
      atomicAdd(counts + 2 * num_experts + n, 1u);
  }
  if (thread == 0) arrived[stripe] = 0;
  __syncthreads();
  if (thread < MOST_FANOUTS && fanouts[thread]) atomicAdd(counts + 2 * num_experts + thread, fanouts[thread]);
#endif
}
