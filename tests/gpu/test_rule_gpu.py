"""The rule, its quantiles, statistics and thresholds on a GPU, equal to the CPU's.

Maps, counts and quantiles are selections and sums of integers: bitwise equal. Thresholds are the same fp64
arithmetic rounded to fp32: bitwise equal. Gates are equal to 1-2 ulp, since the devices' exp differ.

Dimension letters: T tokens, E experts.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_et.rule.quantile import capacity_bounds, expected_load, kth_largest, kth_largest_of_parts
from megatron_et.rule.routing import expert_threshold, limit_fanout
from megatron_et.rule.statistics import RouterStatistics
from megatron_et.rule.threshold import ThresholdEMA

pytestmark = pytest.mark.gpu

SIZES = [(tokens, experts) for tokens in (1, 63, 4097) for experts in (1, 7, 16, 128)]
IDS = [f"T{tokens}-E{experts}" for tokens, experts in SIZES]
sizes = pytest.mark.parametrize(("tokens", "experts"), SIZES, ids=IDS)
ties = pytest.mark.parametrize("tied", [False, True], ids=["distinct", "ties"])


def draw(tokens: int, experts: int, tied: bool = False, seed: int = 0) -> torch.Tensor:
    """[T, E] fp32 logits on the CPU, on a coarse grid when ties are wanted."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = 2.0 * torch.randn(tokens, experts, generator=generator)
    return (4.0 * logits_TE).round() / 4.0 if tied else logits_TE


def padding(tokens: int) -> torch.Tensor:
    """[T] bool, every third token is padding."""
    return torch.arange(tokens) % 3 == 1


def some_thresholds(logits_TE: torch.Tensor) -> torch.Tensor:
    """[E], one logit of each expert: comparisons at equality occur."""
    tokens, experts = logits_TE.shape
    return logits_TE[torch.arange(experts) % tokens, torch.arange(experts)].clone()


def on_gpu(value: Any) -> Any:
    """The same value on the GPU; what is no tensor stays as it is."""
    return value.cuda() if isinstance(value, torch.Tensor) else value


def same_bits(on_device: torch.Tensor, on_cpu: torch.Tensor) -> None:
    assert on_device.is_cuda
    assert on_device.dtype == on_cpu.dtype
    assert torch.equal(on_device.cpu(), on_cpu)


def same_gates(on_device: torch.Tensor, on_cpu: torch.Tensor) -> None:
    assert on_device.is_cuda
    torch.testing.assert_close(on_device.cpu(), on_cpu, rtol=5e-7, atol=1e-37)


def rule_variants(logits_TE: torch.Tensor) -> dict[str, dict[str, Any]]:
    """Keyword arguments of expert_threshold, by name."""
    tokens, experts = logits_TE.shape
    load = expected_load(tokens, 1, experts)
    lower_E, upper_E = capacity_bounds(logits_TE, load, 0.5)
    return {
        "threshold": {},
        "capacity": {"lower": lower_E, "upper": upper_E},
        "expert choice": {"lower": upper_E, "upper": upper_E},
        "padding": {"padding_mask": padding(tokens)},
        "fan-out bound": {"max_fanout": 2, "padding_mask": padding(tokens)},
        "normalized": {"gate_normalization": "fanout"},
    }


@sizes
@ties
def test_rule(tokens: int, experts: int, tied: bool) -> None:
    """Rule (thresholds, capacity, Expert Choice, padding, fan-out bound) equal to the CPU."""
    logits_TE = draw(tokens, experts, tied)
    thresholds_E = some_thresholds(logits_TE)
    for options in rule_variants(logits_TE).values():
        gates, routing_map = expert_threshold(logits_TE, thresholds_E, **options)
        gates_gpu, map_gpu = expert_threshold(
            logits_TE.cuda(), thresholds_E.cuda(), **{name: on_gpu(value) for name, value in options.items()}
        )
        same_bits(map_gpu, routing_map)
        same_gates(gates_gpu, gates)
        assert not gates_gpu[~map_gpu].any()


@sizes
def test_gradient(tokens: int, experts: int) -> None:
    """Gradient of the gates equal to the CPU."""
    thresholds_E = some_thresholds(draw(tokens, experts))
    upstream_TE = draw(tokens, experts, seed=1)
    on_cpu = draw(tokens, experts).requires_grad_()
    on_device = draw(tokens, experts).cuda().requires_grad_()
    for logits_TE in (on_cpu, on_device):
        gates, _ = expert_threshold(logits_TE, thresholds_E.to(logits_TE.device))
        gates.backward(upstream_TE.to(logits_TE.device))
    assert on_cpu.grad is not None
    assert on_device.grad is not None
    # y (1 - y): near y = 1 the last bit of y is worth more than an ulp of the product.
    torch.testing.assert_close(on_device.grad.cpu(), on_cpu.grad, rtol=1e-6, atol=1e-6)


@sizes
@ties
def test_limit_fanout(tokens: int, experts: int, tied: bool) -> None:
    """Fan-out bound equal to the CPU, ties included."""
    logits_TE = draw(tokens, experts, tied)
    routing_map = logits_TE >= 0.0
    for max_fanout in (1, 3, experts):
        same_bits(
            limit_fanout(logits_TE.cuda(), routing_map.cuda(), max_fanout),
            limit_fanout(logits_TE, routing_map, max_fanout),
        )


@sizes
@ties
def test_kth_largest(tokens: int, experts: int, tied: bool) -> None:
    """k-th largest logit (k on host and device, padding, bf16) equal to the CPU."""
    for dtype in (torch.float32, torch.bfloat16):
        logits_TE = draw(tokens, experts, tied).to(dtype)
        for k in (0, 1, tokens // 2, tokens, tokens + 5):
            for mask_T in (None, padding(tokens), torch.ones(tokens, dtype=torch.bool)):
                expected = kth_largest(logits_TE, k, padding_mask_T=mask_T)
                for given in (k, torch.tensor(k, device="cuda")):
                    same_bits(kth_largest(logits_TE.cuda(), given, padding_mask_T=on_gpu(mask_T)), expected)


@sizes
@ties
def test_capacity_bounds(tokens: int, experts: int, tied: bool) -> None:
    """Capacity bounds equal to the CPU."""
    logits_TE = draw(tokens, experts, tied)
    k = max(tokens // 4, 1)
    for factor in (0.0, 0.25, 0.5, 1.0, 2.0):
        expected = capacity_bounds(logits_TE, k, factor)
        for given in (k, torch.tensor(k, device="cuda")):
            for bound, wanted in zip(capacity_bounds(logits_TE.cuda(), given, factor), expected, strict=True):
                same_bits(bound, wanted)


@sizes
@ties
def test_kth_largest_of_parts(tokens: int, experts: int, tied: bool) -> None:
    """Radix selection of the global pool equal to the CPU."""
    logits_TE = draw(tokens, experts, tied)
    wanted = [0, 1, tokens // 2, tokens, tokens + 5]
    for mask_T in (None, padding(tokens)):
        found = kth_largest_of_parts(
            logits_TE.cuda(),
            lambda total: [total.new_tensor(k) for k in wanted],
            None,
            padding_mask_T=on_gpu(mask_T),
        )
        for cutoffs_E, k in zip(found, wanted, strict=True):
            same_bits(cutoffs_E, kth_largest(logits_TE, k, padding_mask_T=mask_T))


@sizes
@ties
def test_statistics(tokens: int, experts: int, tied: bool) -> None:
    """Statistics of a global batch and its cutoffs equal to the CPU."""
    cpu_and_gpu = [
        (
            ThresholdEMA(experts, 0.9, device=device),
            RouterStatistics(experts, 1, device=device),
        )
        for device in ("cpu", "cuda")
    ]
    for batch in range(2):
        for micro_batch in range(3):
            logits_TE = draw(tokens, experts, tied, seed=10 * batch + micro_batch)
            logits_TE[0, 0] = (1.0, torch.nan, -torch.inf)[micro_batch]
            mask_T = padding(tokens) if micro_batch == 1 else None
            bounds = capacity_bounds(logits_TE, max(tokens // 4, 1), 0.5) if micro_batch == 2 else None
            _, routing_map = expert_threshold(logits_TE, some_thresholds(logits_TE), padding_mask=mask_T)
            for thresholds, statistics in cpu_and_gpu:
                device = thresholds.value.device
                statistics.add(
                    logits_TE.to(device),
                    routing_map.to(device),
                    thresholds,
                    None if bounds is None else (bounds[0].to(device), bounds[1].to(device)),
                    None if mask_T is None else mask_T.to(device),
                )
        (ema_cpu, statistics_cpu), (ema_gpu, statistics_gpu) = cpu_and_gpu
        same_bits(torch.cat(statistics_gpu.integer_parts), torch.cat(statistics_cpu.integer_parts))
        results = []
        for thresholds, statistics in cpu_and_gpu:
            _, cutoffs_E, valid, _ = statistics.reduced(
                torch.cat(statistics.integer_parts), thresholds.last_cutoff
            )
            thresholds.propose(cutoffs_E, valid=valid)
            thresholds.commit()
            statistics.reset()
            results.append((cutoffs_E, valid))
        for on_cpu, on_device in zip(*results, strict=True):
            same_bits(on_device.nan_to_num(), on_cpu.nan_to_num())
        for name, on_device in ema_gpu.state_dict().items():
            same_bits(on_device.nan_to_num(), ema_cpu.state_dict()[name].nan_to_num())


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
def test_ema(decay: float) -> None:
    """Threshold EMA (propose, commit, discard) equal to the CPU."""
    on_cpu = ThresholdEMA(128, decay, device="cpu")
    on_device = ThresholdEMA(128, decay, device="cuda")
    for update in range(40):
        cutoffs_E = draw(1, 128, seed=update)[0].double()
        valid = torch.tensor([update % 5 != 3])
        for ema in (on_cpu, on_device):
            device = ema.value.device
            ema.propose(cutoffs_E.to(device), valid=valid.to(device))
            if update % 7 == 6:
                ema.discard()
            else:
                ema.commit()
        for name, buffer in on_device.state_dict().items():
            same_bits(buffer, on_cpu.state_dict()[name])


@contextlib.contextmanager
def host_sync_is_an_error() -> Iterator[None]:
    """Every operation of torch that waits for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """torch.use_deterministic_algorithms, as Megatron's --deterministic-mode sets it."""
    torch.use_deterministic_algorithms(enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_sync_debug_mode_works() -> None:
    """Routing, counting and the EMA never wait for the GPU (use_deterministic_algorithms off and on).

    The check of it: an operation that waits is noticed.
    """
    counted = torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"), host_sync_is_an_error():
        counted.item()


@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("phase", ["threshold", "capacity", "warm-up", "warm-up, global pool"])
def test_no_host_synchronisation(phase: str, padded: bool, deterministic: bool) -> None:
    """Routing, counting and the EMA never wait for the GPU (use_deterministic_algorithms off and on)."""
    tokens, experts, topk = 4097, 16, 2
    logits_TE = draw(tokens, experts).cuda().requires_grad_()
    upstream_TE = draw(tokens, experts, seed=1).cuda()
    mask_T = padding(tokens).cuda() if padded else None
    thresholds = ThresholdEMA(experts, 0.9, device="cuda")
    statistics = RouterStatistics(experts, topk, device="cuda")

    def pool_bounds() -> tuple[torch.Tensor, torch.Tensor] | None:
        """As ExpertThresholdRouter._bounds: a count on the device where there is padding."""
        if phase == "threshold":
            return None
        if phase == "warm-up, global pool":
            (cutoffs_E,) = kth_largest_of_parts(
                logits_TE.detach(),
                lambda total: [torch.as_tensor(expected_load(total, topk, experts))],
                lambda _: None,
                padding_mask_T=mask_T,
            )
            return cutoffs_E, cutoffs_E
        k = expected_load(tokens if mask_T is None else (~mask_T).sum(), topk, experts)
        return capacity_bounds(
            logits_TE.detach(), k, 0.0 if phase == "warm-up" else 0.5, padding_mask_T=mask_T
        )

    with deterministic_algorithms(deterministic), host_sync_is_an_error():
        for _ in range(3):
            bounds = pool_bounds()
            lower_E, upper_E = (None, None) if bounds is None else bounds
            gates, routing_map = expert_threshold(
                logits_TE, thresholds.value, lower=lower_E, upper=upper_E, padding_mask=mask_T, max_fanout=8
            )
            gates.backward(upstream_TE)
            statistics.add(logits_TE.detach(), routing_map, thresholds, bounds, mask_T)
            _, cutoffs_E, valid, _ = statistics.reduced(
                torch.cat(statistics.integer_parts), thresholds.last_cutoff
            )
            thresholds.propose(cutoffs_E, valid=valid)
            thresholds.commit()
            statistics.reset()
