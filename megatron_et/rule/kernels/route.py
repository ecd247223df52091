"""Triton kernels of the rule: one pass forward, one pass backward.

What `routing.py` says with a dozen tensor operations: gates and routing map, and while training counts, what
`RouterStatistics.add` counts of whole rows; count.py counts the rest. The functions there are the oracle: map
and counts are equal bit for bit, gates are the sigmoid to 1 ulp.

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
"""1.5 * 2^23: adding it to a small fp32 number leaves no room for a fraction: its bits end in an integer."""
SCALE = tl.constexpr(5.960464477539063e-08)
"""2^-24: 1 + exp(-x) times it neither overflows nor is subnormal where the sigmoid is neither 0 nor 1."""
BITS_OF_SCALE = tl.constexpr((127 - 24) << 23)


@triton.jit
def _sigmoid(x):
    """Sigmoid of fp32 x, 1 / (1 + exp(-x)), to 1 ulp; a number for NaN.

    exp(-x) = 2^n (1 + s) with |s| < 0.42, the sum with 1 in two parts, and one step of Newton's for its
    reciprocal: the hardware's exp2 and reciprocal alone are off by several ulp.
    """
    # Below -104 it is 0 in fp32, and above 64 it is 1.
    x = tl.minimum(tl.maximum(x, -104.0), 64.0)
    shifted = tl.fma(x, -LOG2_E, ROUND_TO_INTEGER)
    n = shifted - ROUND_TO_INTEGER
    r = tl.fma(n, -LN2_LOW, tl.fma(n, -LN2_HIGH, -x))
    # (exp(r) - 1 - r) / r^2 by its Taylor polynomial: |r| <= ln(2) / 2 makes what is left out 2^-27.
    p = tl.full(x.shape, 1.0 / 5040.0, tl.float32)
    p = tl.fma(p, r, 1.0 / 720.0)
    p = tl.fma(p, r, 1.0 / 120.0)
    p = tl.fma(p, r, 1.0 / 24.0)
    p = tl.fma(p, r, 1.0 / 6.0)
    p = tl.fma(p, r, 0.5)
    s = tl.fma(p * r, r, r)
    power = ((shifted.to(tl.int32, bitcast=True) << 23) + BITS_OF_SCALE).to(tl.float32, bitcast=True)
    # The denominator times SCALE, and what each of the two additions rounds off.
    both = power + SCALE
    off_both = SCALE - (both - power)
    denominator = tl.fma(power, s, both)
    low = tl.fma(power, s, both - denominator) + off_both
    reciprocal = 1.0 / denominator
    left = tl.fma(-reciprocal, low, tl.fma(-reciprocal, denominator, 1.0))
    return tl.fma(left, reciprocal, reciprocal) * SCALE


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
def forward(
    logits, thresholds, lower, upper, padding,
    gates, routing_map, fanout, counts,
    num_tokens, num_experts, stride_t, stride_e, max_fanout,
    BOUNDED: tl.constexpr, PADDED: tl.constexpr, LIMITED: tl.constexpr, NORMALIZED: tl.constexpr,
    COUNTED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Route BLOCKS times BLOCK_T tokens. `counts` is laid out as statistics.BatchCounts; `fanout` is -1 for
    padding."""
    e = tl.arange(0, BLOCK_E)
    real_e = e < num_experts
    threshold = tl.load(thresholds + e, mask=real_e, other=float("inf"))
    applied = threshold
    if BOUNDED:
        low = tl.load(lower + e, mask=real_e, other=float("-inf"))
        high = tl.load(upper + e, mask=real_e, other=float("inf"))
        # As torch's clamp: an expert with NaN among its bounds takes nobody.
        applied = tl.maximum(applied, low, propagate_nan=tl.PropagateNan.ALL)
        applied = tl.minimum(applied, high, propagate_nan=tl.PropagateNan.ALL)
    # Tokens that the expert took, and in the upper half of the bits its logits that are not finite.
    tally = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    for block in range(BLOCKS):
        t = (tl.program_id(0) * BLOCKS + block) * BLOCK_T + tl.arange(0, BLOCK_T)
        real_t = t < num_tokens
        real = real_t[:, None] & real_e[None, :]
        row = t.to(tl.int64)[:, None]
        place = row * stride_t + e.to(tl.int64)[None, :] * stride_e
        x = tl.load(logits + place, mask=real, other=float("-inf")).to(tl.float32)
        valid_t = real_t
        if PADDED:
            valid_t = real_t & (tl.load(padding + t, mask=real_t, other=1) == 0)
        counted = valid_t[:, None] & real_e[None, :]
        chosen = (x >= applied[None, :]) & (x > float("-inf")) & counted
        if LIMITED:
            chosen = _limit_fanout(x, chosen, max_fanout)
        gate = tl.where(chosen, _sigmoid(x), 0.0)
        if NORMALIZED or COUNTED:
            fanout_t = tl.sum(chosen.to(tl.int32), axis=1)
            tl.store(fanout + t, tl.where(valid_t, fanout_t, -1), mask=real_t)
        if NORMALIZED:
            gate = tl.div_rn(gate, tl.maximum(fanout_t, 1).to(tl.float32)[:, None] + tl.zeros_like(gate))
        place = row * num_experts + e[None, :]
        tl.store(gates + place, gate, mask=real)
        tl.store(routing_map + place, chosen, mask=real)
        if COUNTED:
            odd = counted & ~(tl.abs(x) < float("inf"))
            tally += chosen.to(tl.int32) + (odd.to(tl.int32) << 16)

    if COUNTED:
        tally_e = tl.sum(tally, axis=0)
        used = tally_e & 0xFFFF
        tl.atomic_add(counts + e, used, mask=real_e & (used > 0), sem="relaxed")
        odd_e = tally_e >> 16
        tl.atomic_add(counts + 3 * num_experts + 1 + e, odd_e, mask=real_e & (odd_e > 0), sem="relaxed")
        if tl.program_id(0) == 0:
            micro_batches = counts + 4 * num_experts + 2
            tl.atomic_add(micro_batches, tl.full([], 1, tl.int32), sem="relaxed")
            if BOUNDED:
                at_bound = ((low > threshold) | (high < threshold)) & real_e
                tl.atomic_add(counts + num_experts + e, at_bound.to(tl.int32), mask=at_bound, sem="relaxed")


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
