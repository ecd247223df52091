"""The CUDA kernel select.cu: `quantile.kth_largest_of_several` by radix selection.

Dimension letters: T tokens, E experts, Q queries (values of k), of which the kernel answers two at once.
"""

from collections.abc import Sequence

import torch

from megatron_et.rule.kernels import native, nvrtc, scratch
from megatron_et.rule.quantile import Count, kth_largest_of_several

QUERIES, BUCKETS = 2, 2048
LAUNCHES = ((11, 21), (11, 10), (10, 0))
"""Bits of a digit, and below it."""
MOST = 2**31 - 1


def kth_largest(
    logits_TE: torch.Tensor, ks: Sequence[Count], padding_mask_T: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """`quantile.kth_largest_of_several`; what the kernel cannot read or answer goes there.

    The same bits but for the sign of zero, and for a pool with NaN, which commit refuses anyway: NaN is the
    largest logit, as where the oracle sorts; where it takes the least of its topk, that is NaN. Nothing waits
    for the device, and all may be captured in a CUDA graph.
    """
    if not native.reads(logits_TE) or len(ks) > QUERIES:
        return kth_largest_of_several(logits_TE, ks, padding_mask_T)
    num_tokens, num_experts = logits_TE.shape
    device = logits_TE.device
    groups = num_experts // native.EXPERTS
    rows = native.rows_of_stripe(num_tokens, groups, nvrtc.multiprocessors(device))
    histogram, arrived = scratch.zeros("select", device, len(ks) * num_experts * BUCKETS, groups)
    found = torch.empty(2, QUERIES, num_experts, dtype=torch.int32, device=device)
    cutoffs_QE = torch.empty(QUERIES, num_experts, device=device)
    padding = None if padding_mask_T is None else padding_mask_T.contiguous().view(torch.uint8)
    assert all(k.device == device and k.numel() == 1 for k in ks if isinstance(k, torch.Tensor))
    on_device = [k.long() if isinstance(k, torch.Tensor) else None for k in ks]
    on_host = [0 if isinstance(k, torch.Tensor) else min(max(k, 0), MOST) for k in ks]
    missing = QUERIES - len(ks)
    tensors = (logits_TE, padding, *on_device, *[None] * missing, *found, histogram, arrived, cutoffs_QE)
    pointers = [nvrtc.pointer(tensor) for tensor in tensors]
    for bits, shift in LAUNCHES:
        numbers = [num_tokens, num_experts, rows, len(ks), bits, shift, *on_host, *[0] * missing]
        nvrtc.launch(kernel(), (groups, -(-num_tokens // rows)), pointers, numbers, device)
    return list(cutoffs_QE[: len(ks)].unbind(0))


def kernel() -> nvrtc.Kernel:
    """select.cu."""
    table = native.EXPERTS * BUCKETS * torch.int32.itemsize
    return nvrtc.Kernel("select.cu", "select_digit", native.THREADS, (("LOADS", native.LOADS),), table)
