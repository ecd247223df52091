"""The routing kernels against the oracle, on whichever device they run: routing.py and RouterStatistics.add.

Dimension letters: T tokens, E experts.
"""

from dataclasses import dataclass

import torch

from megatron_et.rule import routing
from megatron_et.rule.kernels.routed import expert_threshold
from megatron_et.rule.statistics import RouterStatistics
from megatron_et.rule.threshold import ThresholdEMA


@dataclass(frozen=True)
class Case:
    """One micro-batch and its settings, made from a seed."""

    tokens: int
    experts: int
    seed: int = 0
    scale: float = 3.0
    bounded: bool = False
    padded: bool = False
    max_fanout: int | None = None
    normalized: bool = False
    transposed: bool = False
    """Logits and upstream gradients have the tokens' stride 1."""
    dtype: torch.dtype = torch.float32
    thresholds_at: float | None = None
    """None: normal."""
    nan_bounds: bool = False
    """Bounds of a pool with NaN among its logits: NaN, too."""
    odd_values: bool = True
    """NaN, infinities, zeros of both signs, subnormals, huge values and ties are among the logits."""


NAMED = {
    "no-token": Case(0, 4),
    "no-token-padded": Case(0, 4, padded=True, bounded=True),
    "one-pair": Case(1, 1),
    "one-expert": Case(300, 1, bounded=True),
    "odd-sizes": Case(37, 7, padded=True, max_fanout=2, normalized=True),
    "most-experts": Case(3, 2304, bounded=True, padded=True, max_fanout=5, normalized=True),
    "two-tiles": Case(70, 130, padded=True),
    "not-contiguous": Case(65, 24, transposed=True, normalized=True),
    "bf16": Case(33, 16, dtype=torch.bfloat16, max_fanout=3),
    "fp16": Case(33, 16, dtype=torch.float16, scale=1.0, odd_values=False),
    "all-equal": Case(20, 8, scale=0.0, odd_values=False, max_fanout=3),
    "huge": Case(20, 8, scale=1e37),
    "fan-out-of-all": Case(20, 8, max_fanout=8),
    "bounds-of-nan": Case(40, 8, bounded=True, nan_bounds=True),
}


CUDA = {
    "one-stripe": Case(100, 8),
    "two-groups": Case(70, 16, padded=True),
    "stripes": Case(300, 24, bounded=True, padded=True),
    "every-expert": Case(40, 72, thresholds_at=-torch.inf),
    "all-equal": Case(33, 8, scale=0.0, odd_values=False),
    "huge": Case(20, 8, scale=1e37),
    "nan-bounds": Case(70, 16, bounded=True, nan_bounds=True),
    "not-multiple-of-8": Case(37, 7),
    "fan-out-bound": Case(37, 16, max_fanout=2),
    "normalized": Case(37, 16, normalized=True),
    "bf16": Case(33, 16, dtype=torch.bfloat16),
    "not-contiguous": Case(65, 24, transposed=True),
    "no-token": Case(0, 8, padded=True),
}
"""Of route.cu: what it takes, and what it leaves to Triton."""


def check(case: Case, device: str, *, cuda: bool = False) -> None:
    """Route, count and differentiate with both; map and counts equal to the bit, gates to 1 ulp."""
    t, e = case.tokens, case.experts
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    logits = normal(t, e) * case.scale
    thresholds = normal(e) if case.thresholds_at is None else torch.full((e,), case.thresholds_at)
    if case.odd_values and t > 0:
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, 0.5])
        where = torch.randint(t * e, (min(t * e, 24),), generator=generator)
        logits.view(-1)[where] = odd[torch.randint(len(odd), where.shape, generator=generator)]
        thresholds[0] = 0.5
    logits = laid_out(logits.to(device, case.dtype), case.transposed)
    ema = ThresholdEMA(e, device=device)
    ema.value.copy_(thresholds)
    ema.last_cutoff.copy_(normal(e))
    if t > 0:
        ema.last_cutoff[0] = logits[0, 0].nan_to_num(0.0, 0.0, 0.0)  # a logit that is its histogram's centre
    bounds = (normal(e).to(device) - 0.5, normal(e).to(device) + 0.5) if case.bounded else None
    if case.nan_bounds and bounds is not None:
        bounds[0][0] = bounds[1][0] = torch.nan
    padding = (torch.rand(t, generator=generator) < 0.3).to(device) if case.padded else None
    settings = {
        "lower": bounds and bounds[0],
        "upper": bounds and bounds[1],
        "padding_mask": padding,
        "max_fanout": case.max_fanout,
        "gate_normalization": "fanout" if case.normalized else "none",
    }

    expected_logits = logits.detach().float().requires_grad_()
    expected_gates, expected_map = routing.expert_threshold(expected_logits, ema.value, **settings)
    expected = RouterStatistics(e, 1, device=device)
    expected.add(expected_logits.detach(), expected_map, ema, bounds, padding)

    own_logits = logits.detach().requires_grad_()
    counted = RouterStatistics(e, 1, device=device)
    for _ in range(2):  # counts are added to, not written
        gates, routing_map = expert_threshold(
            own_logits, ema.value, **settings, counters=counted.counters(ema), cuda=cuda
        )
    torch.testing.assert_close(routing_map, expected_map, rtol=0, atol=0)
    assert torch.equal(counted.counts, 2 * expected.counts)
    assert torch.equal(counted.integer_parts[1], 2 * expected.integer_parts[1])

    exact = exact_gates(expected_logits.detach(), expected_map, case.normalized)
    if case.dtype == torch.float32:
        # A division more rounds once more.
        assert ulps_apart(gates.detach(), exact.float()) <= (2 if case.normalized else 1)
    else:
        torch.testing.assert_close(gates.detach(), exact.to(case.dtype), rtol=2e-2, atol=1e-6)
    assert (gates[~expected_map] == 0).all()

    upstream = laid_out(normal(t, e).to(device, case.dtype), case.transposed)
    gates.backward(upstream)
    expected_gates.backward(upstream.float())
    assert own_logits.grad is not None
    assert expected_logits.grad is not None
    # 1 - g loses what rounding g to fp32 has lost: an ulp of 1 times the upstream gradient, in both.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if case.dtype == torch.float32 else {"rtol": 3e-2, "atol": 2e-2}
    # The oracle's autograd makes NaN of 0 * NaN where a logit is NaN; the pair is off the map.
    expected_grad = expected_logits.grad.masked_fill(logits.isnan(), 0.0)
    torch.testing.assert_close(own_logits.grad.float(), expected_grad, **tolerance)

    # Counting nothing routes the same.
    again, map_again = expert_threshold(own_logits, ema.value, **settings, cuda=cuda)
    assert torch.equal(again, gates)
    assert torch.equal(map_again, routing_map)


def laid_out(tensor: torch.Tensor, transposed: bool) -> torch.Tensor:
    """The same values; not contiguous if `transposed`."""
    return tensor.t().contiguous().t() if transposed else tensor


def exact_gates(logits: torch.Tensor, routing_map: torch.Tensor, normalized: bool) -> torch.Tensor:
    """fp64. torch's own fp32 sigmoid is off by many ulp where it is small."""
    gates = torch.where(routing_map, torch.sigmoid(logits.double()), 0.0)
    return gates / routing_map.sum(dim=1, keepdim=True).clamp(min=1) if normalized else gates


def ulps_apart(left: torch.Tensor, right: torch.Tensor) -> int:
    """The most representable fp32 numbers between two tensors of numbers that are not negative."""
    if left.numel() == 0:
        return 0
    distance = left.contiguous().view(torch.int32) - right.contiguous().view(torch.int32)
    return int(distance.abs().max())


def check_every_sigmoid(device: str, *, cuda: bool = False) -> None:
    """Gates over the whole range of logits: 1 ulp from the exact sigmoid, also where it is subnormal."""
    logits = torch.cat([torch.linspace(-110, 110, 40_001), torch.linspace(-2, 2, 20_007)]).to(device)
    thresholds = torch.full((8,), -torch.inf, device=device)
    gates, routing_map = expert_threshold(logits.view(-1, 8), thresholds, cuda=cuda)
    assert routing_map.all()
    assert ulps_apart(gates, torch.sigmoid(logits.view(-1, 8).double()).float()) <= 1
