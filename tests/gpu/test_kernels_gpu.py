"""The routing kernels on a GPU, against the oracle on the same GPU (tests/kernels/route_cases.py)."""

import pytest
import torch

from tests.kernels import select_cases
from tests.kernels.route_cases import CUDA, NAMED, Case, check, check_every_sigmoid

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


BIG_CUDA = {
    "64k-8": Case(65_536, 8),
    "4k-1024": Case(4_096, 1_024, bounded=True),
    "16k-128": Case(16_384, 128),
    "16k-128-padded": Case(16_385, 128, bounded=True, padded=True),
    "16k-128-all": Case(16_384, 128, thresholds_at=-torch.inf),
    "1k-2304": Case(1_000, 2_304),
}


@pytest.mark.parametrize("case", (CUDA | BIG_CUDA).values(), ids=CUDA | BIG_CUDA)
def test_cuda_kernel(case: Case) -> None:
    """`--moe-et-kernels cuda`: map, counts and histogram bitwise the oracle's, gates to 1 ulp, gradients"""
    check(case, "cuda", cuda=True)


BIG_SELECT = {
    "16k-128": select_cases.Case(16_384, 128, ks=(512, 1536)),
    "16k-128-padded-k-on-device": select_cases.Case(16_385, 128, ks=(512, 1536), padded=0.3, on_device=True),
    "64k-8": select_cases.Case(65_536, 8, ks=(8_192,)),
    "64k-8-all-equal": select_cases.Case(65_536, 8, ks=(100, 8_192), levels=1),
    "1k-2304": select_cases.Case(1_000, 2_304, ks=(2, 6)),
}


@pytest.mark.parametrize(
    "case", (select_cases.CASES | BIG_SELECT).values(), ids=select_cases.CASES | BIG_SELECT
)
def test_selection(case: select_cases.Case) -> None:
    """`--moe-et-kernels cuda`: bounds of Expert Choice and capacity by radix selection, as by sorting"""
    select_cases.check(case, "cuda")


@pytest.mark.parametrize("kernels", ["triton", "cuda"])
def test_every_sigmoid(kernels: str) -> None:
    """the kernels' sigmoid over the range of fp32, to 1 ulp"""
    check_every_sigmoid("cuda", cuda=kernels == "cuda")


def test_captured_cuda_kernel() -> None:
    """`--moe-et-kernels cuda` in a CUDA graph beside eager launches: counts as without"""
    from megatron_et.rule.kernels.routed import expert_threshold
    from megatron_et.rule.statistics import RouterStatistics
    from megatron_et.rule.threshold import ThresholdEMA

    logits = torch.randn(5000, 64, device="cuda")
    ema = ThresholdEMA(64, device="cuda")
    eager, graphed = (RouterStatistics(64, 4, device="cuda") for _ in range(2))

    def route(statistics: RouterStatistics) -> torch.Tensor:
        return expert_threshold(logits, ema.value, counters=statistics.counters(ema), cuda=True)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        route(graphed)  # compiles
    torch.cuda.synchronize()
    graphed.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        gates = route(graphed)
    for _ in range(3):
        logits.normal_()
        expected = route(eager)
        graph.replay()
        assert torch.equal(gates, expected)
    assert torch.equal(torch.cat(graphed.integer_parts), torch.cat(eager.integer_parts))
    assert int(graphed.counts.sum()) > 0


def test_captured_selection() -> None:
    """Radix selection in a CUDA graph beside eager launches, k on the device: bounds as by sorting"""
    from megatron_et.rule.kernels.select import kth_largest
    from megatron_et.rule.quantile import kth_largest_of_several

    logits = torch.randn(5000, 64, device="cuda")
    ks = [torch.tensor(k, device="cuda") for k in (150, 450)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        kth_largest(logits, ks)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = kth_largest(logits, ks)
    for added in (0, 1, 2):
        logits.normal_()
        for k in ks:
            k.add_(added)
        expected = kth_largest_of_several(logits, ks)
        eager = kth_largest(logits, ks)
        graph.replay()
        torch.testing.assert_close(captured, expected, rtol=0, atol=0)
        torch.testing.assert_close(eager, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kernels", ["triton", "cuda"])
def test_no_host_synchronisation(kernels: str) -> None:
    """`--moe-et-kernels {kernels}` waits for nothing: forward, counting, backward under the sync detector"""
    from megatron_et.rule.kernels.routed import expert_threshold
    from megatron_et.rule.kernels.select import kth_largest
    from megatron_et.rule.quantile import capacity_bounds
    from megatron_et.rule.statistics import RouterStatistics
    from megatron_et.rule.threshold import ThresholdEMA

    logits = torch.randn(4096, 64, device="cuda", requires_grad=True)
    ema, statistics = ThresholdEMA(64, device="cuda"), RouterStatistics(64, 4, device="cuda")
    upstream = torch.randn_like(logits)
    for mode in ("default", "error"):  # the first pass compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            lower, upper = (
                capacity_bounds(logits.detach(), 512, 0.5, select=kth_largest)
                if kernels == "cuda"
                else (None, None)
            )
            gates, _ = expert_threshold(
                logits,
                ema.value,
                lower=lower,
                upper=upper,
                counters=statistics.counters(ema),
                cuda=kernels == "cuda",
            )
            gates.backward(upstream)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert int(statistics.counts.sum()) > 0
