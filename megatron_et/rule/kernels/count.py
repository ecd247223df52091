"""Triton kernel of the statistics that need many tokens of few experts at once: the histogram of the logits,
and tokens by fan-out.

A program takes a stripe of tokens and EXPERTS experts, the last program of a stripe its fan-outs. Counts are
added up inside the program first, warp by warp (`tl.histogram`): one global atomic per pair of a token and
an expert would take longer than routing. Integers, so exact in any order.

Dimension letters: T tokens, E experts, B bins of the histogram, S slots, the bins that are added up first.
"""

import triton
import triton.language as tl

OCTAVES = tl.constexpr(8)
"""Of distances from the centre, on either side, whose bins are slots: 2^-5 to 2^3. What lies outside, some
per cent of the logits of any router that trains, takes a global atomic each."""
FIRST_OCTAVE = tl.constexpr(127 - 5)
FEW = tl.constexpr(64)
"""Fan-outs below FEW - 1 are slots."""


@triton.jit
def _slots_of(slot, valid, S: tl.constexpr):
    """Valid entries by slot, [S] int32. `tl.histogram` has no mask in Triton 3.3: the rest goes to slot 0 and
    is taken off again."""
    all_of_them = tl.histogram(tl.where(valid, slot, 0), S)
    rest = tl.sum((~valid).to(tl.int32), axis=0)
    return all_of_them - tl.where(tl.arange(0, S) == 0, rest, 0)


@triton.jit
def _count_fanout(fanout_t, valid_t, counts):
    few = valid_t & (fanout_t < FEW - 1)
    own = _slots_of(fanout_t, few, FEW)
    tl.atomic_add(counts + tl.arange(0, FEW), own, mask=own > 0, sem="relaxed")
    one_t = tl.full(fanout_t.shape, 1, tl.int32)
    tl.atomic_add(counts + fanout_t, one_t, mask=valid_t & ~few, sem="relaxed")


@triton.jit
def _count_logits(x_t, valid_t, center, histogram, BINS: tl.constexpr, FIRST: tl.constexpr):
    """`Histogram.add` for one expert: the bin of a logit is read off the bits of its distance from the
    centre."""
    SIDE: tl.constexpr = OCTAVES * 16
    NEAREST: tl.constexpr = FIRST_OCTAVE * 16 - FIRST
    distance = x_t - center
    octave = ((distance.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> 19) - FIRST
    magnitude = tl.minimum(tl.maximum(octave, 0), BINS // 2 - 1)
    above = distance >= 0
    near = magnitude - NEAREST
    in_slot = valid_t & (near >= 0) & (near < SIDE)
    own = _slots_of(tl.where(above, SIDE + near, SIDE - 1 - near), in_slot, 2 * SIDE)
    slot = tl.arange(0, 2 * SIDE)
    place = BINS // 2 - SIDE + slot + tl.where(slot < SIDE, -NEAREST, NEAREST)
    tl.atomic_add(histogram + place, own, mask=own > 0, sem="relaxed")
    place_t = tl.where(above, BINS // 2 + magnitude, BINS // 2 - 1 - magnitude)
    one_t = tl.full(x_t.shape, 1, tl.int32)
    tl.atomic_add(histogram + place_t, one_t, mask=valid_t & ~in_slot, sem="relaxed")


@triton.jit
def count(
    logits, fanout, centers, counts, histogram,
    num_tokens, num_experts, stride_t, stride_e,
    BINS: tl.constexpr, FIRST: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Count BLOCK_T tokens of EXPERTS experts, or their fan-outs. `fanout` is -1 for padding; `counts` is
    laid out as statistics.BatchCounts, `histogram` as its counts_EB."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    real_t = t < num_tokens
    fanout_t = tl.load(fanout + t, mask=real_t, other=-1)
    valid_t = fanout_t >= 0
    if tl.program_id(1) == tl.num_programs(1) - 1:
        _count_fanout(fanout_t, valid_t, counts + 2 * num_experts)
        tokens = counts + 4 * num_experts + 1
        tl.atomic_add(tokens, tl.sum(valid_t.to(tl.int32), axis=0), sem="relaxed")
    else:
        for i in tl.static_range(EXPERTS):
            # Masks and no branch: loads of the next expert begin while this one is counted.
            e = (tl.program_id(1) * EXPERTS + i).to(tl.int64)
            counted_t = valid_t & (e < num_experts)
            x_t = tl.load(logits + t.to(tl.int64) * stride_t + e * stride_e, mask=counted_t, other=0.0)
            center = tl.load(centers + e, mask=e < num_experts, other=0.0)
            _count_logits(x_t.to(tl.float32), counted_t, center, histogram + e * BINS, BINS, FIRST)
