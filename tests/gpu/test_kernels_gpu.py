"""The routing kernels on a GPU, against the oracle on the same GPU (tests/kernels/route_cases.py)."""

import pytest
import torch

from tests.kernels.route_cases import NAMED, Case, check, check_every_sigmoid

pytestmark = pytest.mark.gpu

BIG = {
    "16k-128": Case(16_384, 128),
    "16k-128-all": Case(16_384, 128, bounded=True, padded=True, max_fanout=8, normalized=True),
    "64k-8": Case(65_536, 8),
    "4k-1024": Case(4_096, 1_024, bounded=True),
}


@pytest.mark.parametrize("case", (NAMED | BIG).values(), ids=NAMED | BIG)
def test_fused_router(case: Case) -> None:
    """`--moe-et-kernels triton`: map, counts and histogram bitwise the oracle's, gates to 1 ulp, gradients"""
    check(case, "cuda")


def test_every_sigmoid() -> None:
    """the kernels' sigmoid over the range of fp32, to 1 ulp"""
    check_every_sigmoid("cuda")


def test_no_host_synchronisation() -> None:
    """`--moe-et-kernels triton` waits for nothing: forward, counting and backward under the sync detector"""
    from megatron_et.kernels.routed import expert_threshold
    from megatron_et.statistics import RouterStatistics
    from megatron_et.threshold import ThresholdEMA

    logits = torch.randn(4096, 64, device="cuda", requires_grad=True)
    ema, statistics = ThresholdEMA(64, device="cuda"), RouterStatistics(64, 4, device="cuda")
    upstream = torch.randn_like(logits)
    for mode in ("default", "error"):  # the first pass compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            gates, _ = expert_threshold(logits, ema.value, counters=statistics.counters(ema))
            gates.backward(upstream)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert int(statistics.counts.sum()) > 0
