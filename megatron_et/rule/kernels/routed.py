"""The fused router: `routing.expert_threshold` and the counts of `RouterStatistics.add` in one kernel or two,
with its gradient in another.

Dimension letters: T tokens, E experts.
"""

import functools
from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable
from triton.runtime.interpreter import InterpretedFunction

from megatron_et.config import GateNormalization
from megatron_et.rule.kernels import count, native, route, select
from megatron_et.rule.statistics import Counters, RouterStatistics
from megatron_et.rule.threshold import ThresholdEMA

TILE = 1024
"""Pairs of a token and an expert that a program routes at a time."""
PROGRAMS = 512
"""More programs than this do not fill a GPU better; each takes several tiles instead, up to MAX_TILES."""
MAX_TILES = 4
MAX_EXPERTS = 4096
MAX_TOKENS_OF_TILE = 256
TOKENS_COUNTED, EXPERTS_COUNTED, WARPS_COUNTING = 1024, 8, 8
"""Of a program of `count.count`; 8 fp32 logits are a sector of memory."""
INTERPRETED = isinstance(route.forward, InterpretedFunction)
"""TRITON_INTERPRET=1 was set when Triton was imported: kernels run on the CPU, slowly."""


def expert_threshold(
    logits: torch.Tensor,
    thresholds: torch.Tensor,
    *,
    lower: torch.Tensor | None = None,
    upper: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    max_fanout: int | None = None,
    gate_normalization: GateNormalization = "none",
    counters: Counters | None = None,
    cuda: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`routing.expert_threshold` in one pass; with `counters` it also counts, as `RouterStatistics.add`.

    Map and counts are bitwise those of the oracle; gates are the sigmoid to 1 ulp.

    Args:
        logits: [tokens, experts], fp32, bf16 or fp16 (computed with in fp32), any strides, at most
            MAX_EXPERTS experts.
        thresholds, lower, upper: [experts] fp32; lower and upper both or none.
        padding_mask, max_fanout, gate_normalization: as for the oracle.
        counters: None counts nothing.
        cuda: route and count with route.cu what it takes, fan-out bound and normalization excepted.

    Returns:
        gates [tokens, experts], dtype of the logits, and routing_map [tokens, experts] bool.
    """
    normalized = gate_normalization == "fanout"
    if max_fanout is not None and max_fanout >= logits.shape[1]:
        max_fanout = None
    return _Route.apply(
        logits, thresholds, lower, upper, padding_mask, max_fanout, normalized, counters, cuda
    )


def tile(num_experts: int) -> tuple[int, int]:
    """BLOCK_T, BLOCK_E."""
    block_e = max(triton.next_power_of_2(num_experts), 2)
    return min(max(TILE // block_e, 1), MAX_TOKENS_OF_TILE), block_e


def tiles(num_tokens: int, block_t: int) -> int:
    """BLOCKS of the forward kernel: a power of two, so that few variants are compiled."""
    wanted = max(num_tokens // (block_t * PROGRAMS), 1)
    return min(1 << (wanted.bit_length() - 1), MAX_TILES)


def _count(logits: torch.Tensor, fanout: torch.Tensor, counters: Counters) -> None:
    """What `route.forward` has not counted; fanout [tokens] int32, -1 for padding."""
    num_tokens, num_experts = logits.shape
    histogram = counters.histogram
    groups = triton.cdiv(num_experts, EXPERTS_COUNTED)
    count.count[triton.cdiv(num_tokens, TOKENS_COUNTED), groups + 1](
        logits,
        fanout,
        histogram.centers_E,
        counters.counts,
        histogram.counts_EB,
        num_tokens,
        num_experts,
        *logits.stride(),
        BINS=histogram.bins,
        FIRST=histogram.bits_of_first_octave,
        EXPERTS=EXPERTS_COUNTED,
        BLOCK_T=TOKENS_COUNTED,
        num_warps=WARPS_COUNTING,
    )


@functools.cache
def try_out(device: torch.device, routes: bool, selects: bool) -> None:
    """Route, count and differentiate once, with route.cu if it `routes`, and find a cutoff if select.cu
    `selects`, so that what cannot be compiled or loaded fails now and not in the first step. Raises whatever
    the compilers and the driver raise."""
    experts = 8
    statistics = RouterStatistics(experts, 1, device=device)
    zeros_E = torch.zeros(experts, device=device)
    counting = statistics.counters(ThresholdEMA(experts, device=device))
    with torch.enable_grad():
        logits = torch.zeros(16, experts, device=device, requires_grad=True)
        for counters in (counting, None):
            gates, _ = expert_threshold(logits, zeros_E, counters=counters, cuda=routes)
            gates.sum().backward()
    if selects:
        select.kth_largest(logits.detach(), [1])


class _Route(torch.autograd.Function):
    """Saves the gates only: they are 0 off the map, and so is the gradient (that of a NaN logit, too)."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        thresholds: torch.Tensor,
        lower: torch.Tensor | None,
        upper: torch.Tensor | None,
        padding_mask: torch.Tensor | None,
        max_fanout: int | None,
        normalized: bool,
        counters: Counters | None,
        cuda: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens, num_experts = logits.shape
        padding = None if padding_mask is None else padding_mask.contiguous().view(torch.uint8)
        gates = torch.empty((num_tokens, num_experts), dtype=logits.dtype, device=logits.device)
        routing_map = torch.empty((num_tokens, num_experts), dtype=torch.bool, device=logits.device)
        ctx.normalized = normalized
        ctx.mark_non_differentiable(routing_map)
        if cuda and not normalized and max_fanout is None and native.reads(logits):
            native.expert_threshold(logits, thresholds, lower, upper, padding, counters, gates, routing_map)
            ctx.save_for_backward(gates, None)
            return gates, routing_map
        counted = counters is not None
        num_fanouts = num_tokens if normalized or counted else 0
        fanout = torch.empty(num_fanouts, dtype=torch.int32, device=logits.device)
        block_t, block_e = tile(num_experts)
        blocks = tiles(num_tokens, block_t)
        # One program at least: a micro-batch without tokens is counted, too.
        route.forward[(max(triton.cdiv(num_tokens, block_t * blocks), 1),)](
            logits,
            thresholds,
            lower,
            upper,
            padding,
            gates,
            routing_map,
            fanout,
            None if counters is None else counters.counts,
            num_tokens,
            num_experts,
            *logits.stride(),
            max_fanout or 0,
            BOUNDED=lower is not None,
            PADDED=padding_mask is not None,
            LIMITED=max_fanout is not None,
            NORMALIZED=normalized,
            COUNTED=counted,
            BLOCK_T=block_t,
            BLOCK_E=block_e,
            BLOCKS=blocks,
        )
        if counters is not None and num_tokens > 0:
            _count(logits, fanout, counters)
        ctx.save_for_backward(gates, fanout if normalized else None)
        return gates, routing_map

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_gates: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        gates, fanout = ctx.saved_tensors
        num_tokens, num_experts = gates.shape
        grad_logits = torch.empty_like(gates)
        if num_tokens > 0:
            block_t, block_e = tile(num_experts)
            route.backward[(triton.cdiv(num_tokens, block_t),)](
                gates,
                fanout,
                grad_gates,
                grad_logits,
                num_tokens,
                num_experts,
                *grad_gates.stride(),
                NORMALIZED=ctx.normalized,
                BLOCK_T=block_t,
                BLOCK_E=block_e,
            )
        return grad_logits, *[None] * 8
