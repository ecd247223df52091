"""Bytes of one router's statistics, added up from the tensors of the classes themselves.

Nothing is computed: the tensors are on the meta device.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megatron_et.rule.quantile import RADIX_BITS
from megatron_et.rule.statistics import RouterStatistics
from megatron_et.rule.threshold import ThresholdEMA


@dataclass(frozen=True)
class RouterBytes:
    """One router, in bytes."""

    saved: int
    """In the checkpoint, and on the device all the time."""
    accumulated: int
    """On the device all the time, in no checkpoint."""
    reduced: int
    """Sent into the all-reduce at the end of a global batch, which all routers of a rank share."""


def router_bytes(num_experts: int, topk: int) -> RouterBytes:
    """What one router keeps and sends."""
    counted = _bytes(RouterStatistics(num_experts, topk, device="meta").integer_parts)
    saved = _bytes(ThresholdEMA(num_experts, device="meta").buffers())
    return RouterBytes(saved, accumulated=counted, reduced=counted)


def pool_calls() -> int:
    """All-reduces of one router in one forward pass under --moe-et-pool global."""
    return 32 // RADIX_BITS


def pool_bytes(num_experts: int, bounds: int) -> int:
    """Bytes that these all-reduces carry together.

    Args:
        num_experts: E.
        bounds: 1 for Expert Choice, whose lower and upper bound are one; 2 for a capacity above 0.
    """
    counts = num_experts * (1 << RADIX_BITS) * torch.int32.itemsize
    # The first round counts the leading digits, which no bound has narrowed yet.
    return counts * (1 + (pool_calls() - 1) * bounds)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def readable(size: int) -> str:
    """'59.3 MiB'."""
    value = float(size)
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{size} bytes" if unit == "bytes" else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} GiB"
