"""The CUDA kernel route.cu: the rule and its counts in one launch.

Dimension letters: T tokens, E experts.
"""

import torch

from megatron_et.rule.kernels import nvrtc, scratch
from megatron_et.rule.quantile import Histogram
from megatron_et.rule.statistics import Counters

EXPERTS = 8
"""Of a block; route.cu's and select.cu's."""
THREADS, LOADS = 512, 2
MOST_ROWS = 2048
"""Tokens of a stripe: more blocks than the GPU runs at once gain nothing, but this many tokens hide what a
block costs to begin and end."""


def reads(logits: torch.Tensor) -> bool:
    """Whether the kernels of this folder can read these: fp32, contiguous, a multiple of 8 experts."""
    return (
        logits.dtype == torch.float32
        and logits.is_contiguous()
        and logits.data_ptr() % 16 == 0
        and logits.shape[0] > 0
        and logits.shape[1] % EXPERTS == 0
    )


def expert_threshold(
    logits: torch.Tensor,
    thresholds: torch.Tensor,
    lower: torch.Tensor | None,
    upper: torch.Tensor | None,
    padding: torch.Tensor | None,
    counters: Counters | None,
    gates: torch.Tensor,
    routing_map: torch.Tensor,
) -> None:
    """Write gates and map and add to the counters, in one launch; arguments as for
    `routed.expert_threshold`, `padding` [tokens] uint8. What `reads` has refused must not be given."""
    num_tokens, num_experts = logits.shape
    groups = num_experts // EXPERTS
    rows = rows_of_stripe(num_tokens, groups, nvrtc.multiprocessors(logits.device))
    stripes = -(-num_tokens // rows)
    counted: tuple[torch.Tensor | None, ...] = (None,) * 4
    histogram = None if counters is None else counters.histogram
    if counters is not None:
        fanout, arrived = scratch.zeros("route", logits.device, num_tokens, stripes)
        counted = fanout, arrived, counters.counts, counters.histogram.counts_EB
    centers = None if histogram is None else histogram.centers_E
    tensors = (logits, thresholds, lower, upper, padding, centers, gates, routing_map, *counted)
    nvrtc.launch(
        kernel(histogram),
        (groups, stripes),
        [nvrtc.pointer(tensor) for tensor in tensors],
        [num_tokens, num_experts, rows],
        logits.device,
    )


def kernel(histogram: Histogram | None) -> nvrtc.Kernel:
    """route.cu as it counts into this histogram, or as it counts nothing."""
    constants = {"LOADS": LOADS, "COUNTED": 0, "BINS": 0, "FIRST": 0}
    if histogram is not None:
        constants |= {"COUNTED": 1, "BINS": histogram.bins, "FIRST": histogram.bits_of_first_octave}
    return nvrtc.Kernel("route.cu", "route_and_count", THREADS, tuple(constants.items()))


def rows_of_stripe(num_tokens: int, groups: int, blocks: int) -> int:
    """Tokens of a stripe, a multiple of what a block reads at once: as many blocks as run at once, if that is
    enough."""
    at_once = THREADS // 2
    wanted = -(-num_tokens * groups // (blocks * at_once)) * at_once
    return min(max(wanted, at_once), MOST_ROWS)
