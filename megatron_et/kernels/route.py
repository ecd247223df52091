"""Triton kernels of the rule: one pass forward, one pass backward.

What `routing.py` and `RouterStatistics.add` say with a dozen tensor operations each, in one launch: gates,
routing map and, while training counts, every integer of the statistics. The functions there are the oracle:
map and counts are equal bit for bit, gates are the sigmoid correct to 1 ulp.

A program takes BLOCK_T tokens with all their experts, so that the fan-out of a token is known where its gates
are written. Counts are integer atomics: exact in any order.

Dimension letters: T tokens, E experts, F = E + 1 fan-outs, B bins of the histogram.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# ln 2 in two parts: the first has zeros in its last bits, so that a small integer times it is exact.
LN2_HIGH = tl.constexpr(0.693145751953125)
LN2_LOW = tl.constexpr(1.428606765330187e-06)
ROUND_TO_INTEGER = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding it to a small fp32 number leaves no room for a fraction."""


@triton.jit
def _exp_of_nonpositive(x):
    """exp(x) for fp32 x <= 0 as high + low, high without rounding error beyond low: the hardware's exp2 is
    off by more than an ulp, and its argument by many for large |x|."""
    n = (x * LOG2_E + ROUND_TO_INTEGER) - ROUND_TO_INTEGER
    exact = tl.fma(n, -LN2_HIGH, x)
    r = exact - n * LN2_LOW
    low_of_r = (exact - r) - n * LN2_LOW
    # exp(r) - 1 - r by its Taylor polynomial: |r| <= ln(2) / 2 makes the first term left out 2^-32.
    p = tl.full(x.shape, 1.0 / 40320.0, tl.float32)
    p = tl.fma(p, r, 1.0 / 5040.0)
    p = tl.fma(p, r, 1.0 / 720.0)
    p = tl.fma(p, r, 1.0 / 120.0)
    p = tl.fma(p, r, 1.0 / 24.0)
    p = tl.fma(p, r, 1.0 / 6.0)
    p = tl.fma(p, r, 0.5)
    rest = tl.fma(p * r, r, tl.fma(low_of_r, r, low_of_r))
    # 1 + r + rest, and what the two additions round off.
    sum_of_small = r + rest
    high = 1.0 + sum_of_small
    low = (sum_of_small - (high - 1.0)) + ((r - sum_of_small) + rest)
    # 2^n in two factors: the result may be subnormal where 2^n itself is none.
    exponent = n.to(tl.int32)
    half = exponent >> 1
    first = ((half + 127) << 23).to(tl.float32, bitcast=True)
    second = ((exponent - half + 127) << 23).to(tl.float32, bitcast=True)
    return high * first * second, low * first * second


@triton.jit
def _sigmoid(x):
    """Sigmoid of fp32 x, correct to 1 ulp; NaN gives NaN."""
    # Below -104 it is 0 in fp32, and above 104 it is 1.
    z, low_of_z = _exp_of_nonpositive(tl.maximum(-tl.abs(x), -104.0))
    denominator = 1.0 + z
    low_of_denominator = (z - (denominator - 1.0)) + low_of_z
    numerator = tl.where(x < 0, z, 1.0)
    low_of_numerator = tl.where(x < 0, low_of_z, 0.0)
    quotient = tl.div_rn(numerator, denominator)
    # One step of Newton's: what the quotient leaves of the numerator, with the parts that were rounded off.
    left = tl.fma(-quotient, denominator, numerator) + low_of_numerator - quotient * low_of_denominator
    return tl.where(x != x, x, quotient + left / denominator)


@triton.jit
def _ordered_key(x):
    """uint32 keys in the order of fp32 x; -0.0 and 0.0 share one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    flipped = tl.where(bits < 0, ~bits, bits ^ -2147483648)
    return flipped.to(tl.uint32, bitcast=True)


@triton.jit
def _limit_fanout(x, chosen, most):
    """The `most` largest of the chosen logits of each row, the first ones on ties."""
    key = tl.where(chosen, _ordered_key(x), 0)
    # The largest key that `most` of the chosen reach, bit by bit from the top; 0 if fewer are chosen.
    cutoff = tl.zeros([x.shape[0]], tl.uint32)
    for bit in range(32):
        trial = cutoff | (tl.full([x.shape[0]], 1, tl.uint32) << (31 - bit))
        reached = tl.sum((chosen & (key >= trial[:, None])).to(tl.int32), axis=1)
        cutoff = tl.where(reached >= most, trial, cutoff)
    above = chosen & (key > cutoff[:, None])
    tied = chosen & (key == cutoff[:, None])
    places = most - tl.sum(above.to(tl.int32), axis=1)
    return above | (tied & (tl.cumsum(tied.to(tl.int32), axis=1) <= places[:, None]))


@triton.jit
def _count_fanout(fanout_t, valid_t, fanout_counts, BLOCK_E: tl.constexpr):
    """Tokens by their number of experts: most have few, and all programs add to the same few counts, so a
    program adds up its own first. The last slot is for the rest: padding, and tokens with more experts."""
    SLOTS: tl.constexpr = min(BLOCK_E * 2, 64)
    few = valid_t & (fanout_t < SLOTS - 1)
    own = tl.histogram(tl.where(few, fanout_t, SLOTS - 1), SLOTS).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    tl.atomic_add(fanout_counts + slot, own, mask=(slot < SLOTS - 1) & (own > 0), sem="relaxed")
    one_t = tl.full(fanout_t.shape, 1, tl.int64)
    tl.atomic_add(fanout_counts + fanout_t, one_t, mask=valid_t & (fanout_t >= SLOTS - 1), sem="relaxed")


@triton.jit
def _count_logits(x, counted, centers, e, real_e, histogram, BINS: tl.constexpr, FIRST: tl.constexpr):
    """`Histogram.add`: the bin of a logit is read off the bits of its distance from the centre."""
    center = tl.load(centers + e, mask=real_e, other=0.0)
    distance = x - center[None, :]
    octave = ((distance.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> 19) - FIRST
    magnitude = tl.minimum(tl.maximum(octave, 0), BINS // 2 - 1)
    place = tl.where(distance >= 0, BINS // 2 + magnitude, BINS // 2 - 1 - magnitude)
    one = tl.full(x.shape, 1, tl.int64)
    tl.atomic_add(histogram + e[None, :] * BINS + place, one, mask=counted, sem="relaxed")


@triton.jit
def forward(
    logits, thresholds, lower, upper, padding, centers,
    gates, routing_map, fanout, counts, histogram,
    num_tokens, num_experts, stride_t, stride_e, max_fanout,
    BOUNDED: tl.constexpr, PADDED: tl.constexpr, LIMITED: tl.constexpr, NORMALIZED: tl.constexpr,
    COUNTED: tl.constexpr, BINS: tl.constexpr, FIRST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Route BLOCK_T tokens; `counts` is laid out as statistics.BatchCounts, `histogram` as its counts_EB."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    real_t, real_e = t < num_tokens, e < num_experts
    real = real_t[:, None] & real_e[None, :]
    row = t.to(tl.int64)[:, None]
    x = tl.load(logits + row * stride_t + e.to(tl.int64)[None, :] * stride_e, mask=real, other=float("-inf"))
    x = x.to(tl.float32)

    threshold = tl.load(thresholds + e, mask=real_e, other=float("inf"))
    applied = threshold
    if BOUNDED:
        low = tl.load(lower + e, mask=real_e, other=float("-inf"))
        high = tl.load(upper + e, mask=real_e, other=float("inf"))
        applied = tl.minimum(tl.maximum(applied, low), high)
    valid_t = real_t
    if PADDED:
        valid_t = real_t & (tl.load(padding + t, mask=real_t, other=1) == 0)
    chosen = (x >= applied[None, :]) & (x > float("-inf")) & valid_t[:, None] & real_e[None, :]
    if LIMITED:
        chosen = _limit_fanout(x, chosen, max_fanout)
    fanout_t = tl.sum(chosen.to(tl.int32), axis=1)

    gate = tl.where(chosen, _sigmoid(x), 0.0)
    if NORMALIZED:
        gate = tl.div_rn(gate, tl.maximum(fanout_t, 1).to(tl.float32)[:, None] + tl.zeros_like(gate))
        tl.store(fanout + t, fanout_t, mask=real_t)
    place = row * num_experts + e[None, :]
    tl.store(gates + place, gate, mask=real)
    tl.store(routing_map + place, chosen, mask=real)

    if COUNTED:
        usage = tl.sum(chosen.to(tl.int32), axis=0).to(tl.int64)
        tl.atomic_add(counts + e, usage, mask=real_e & (usage > 0), sem="relaxed")
        _count_fanout(fanout_t, valid_t, counts + 2 * num_experts, BLOCK_E)
        scalars = counts + 3 * num_experts + 1
        tl.atomic_add(scalars, tl.sum(valid_t.to(tl.int64), axis=0), sem="relaxed")
        counted = valid_t[:, None] & real_e[None, :]
        odd = counted & ((x != x) | (tl.abs(x) == float("inf")))
        nonfinite = tl.sum(tl.sum(odd.to(tl.int32), axis=1), axis=0).to(tl.int64)
        tl.atomic_add(scalars + 2, nonfinite, mask=nonfinite > 0, sem="relaxed")
        if tl.program_id(0) == 0:
            tl.atomic_add(scalars + 1, tl.full([], 1, tl.int64), sem="relaxed")
            if BOUNDED:
                at_bound = ((low > threshold) | (high < threshold)) & real_e
                tl.atomic_add(counts + num_experts + e, at_bound.to(tl.int64), mask=at_bound, sem="relaxed")
        if BINS > 0:
            _count_logits(x, counted, centers, e, real_e, histogram, BINS, FIRST)


@triton.jit
def backward(
    gates, fanout, grad_gates, grad_logits,
    num_tokens, num_experts, stride_t, stride_e,
    NORMALIZED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """d sigmoid = g (1 - g) where a gate was given; off the map g is 0 and so is the gradient."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    real = (t < num_tokens)[:, None] & (e < num_experts)[None, :]
    row = t.to(tl.int64)[:, None]
    place = row * num_experts + e[None, :]
    gate = tl.load(gates + place, mask=real, other=0.0).to(tl.float32)
    grad = tl.load(grad_gates + row * stride_t + e.to(tl.int64)[None, :] * stride_e, mask=real, other=0.0)
    grad = grad.to(tl.float32)
    if NORMALIZED:
        divisor = tl.maximum(tl.load(fanout + t, mask=t < num_tokens, other=1), 1).to(tl.float32)[:, None]
        gate, grad = gate * divisor, grad / divisor
    tl.store(grad_logits + place, tl.where(gate > 0, grad * (1.0 - gate) * gate, 0.0), mask=real)
