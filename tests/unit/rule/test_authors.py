"""The clamp reproduces the authors' router over warm-up, switch, capacity and evaluation (I5), at odd
sizes."""

import pytest
import torch

from megatron_et.config import ExpertThresholdConfig
from megatron_et.rule.quantile import capacity_bounds, expected_load, kth_largest
from megatron_et.rule.routing import expert_threshold
from megatron_et.rule.threshold import ThresholdEMA
from tests.reference import AuthorsRouter
from tests.reference import capacity as capacity_at

CASES = [
    # experts, topk, tokens per micro-batch, micro-batches, capacity
    pytest.param(16, 1, 160, 1, None, id="paper"),
    pytest.param(16, 1, 163, 3, 0.5, id="capacity-odd-pool"),
    pytest.param(7, 2, 61, 2, 0.25, id="odd-everything"),
    pytest.param(13, 4, 52, 2, 0.0, id="capacity-zero"),
    pytest.param(5, 5, 11, 1, 0.5, id="every-expert"),
    pytest.param(1, 1, 9, 2, 0.5, id="one-expert"),
    pytest.param(3, 1, 3, 4, 1.5, id="one-token-per-expert"),
]


def tokens_of(routing_map: torch.Tensor) -> list[set[int]]:
    return [set(column.nonzero().flatten().tolist()) for column in routing_map.T]


@pytest.mark.parametrize(("experts", "topk", "tokens", "micro_batches", "capacity"), CASES)
@pytest.mark.parametrize("seed", range(3))
def test_same_routing_and_thresholds(
    experts: int, topk: int, tokens: int, micro_batches: int, capacity: float | None, seed: int
) -> None:
    warmup, decay = 4, 0.9
    config = ExpertThresholdConfig(
        router_type="expert-threshold", warmup_steps=warmup, ema_decay=decay, capacity_factor=capacity
    )
    authors = AuthorsRouter(experts, topk, decay, capacity)
    ema = ThresholdEMA(experts, decay)
    generator = torch.Generator().manual_seed(seed)
    drift = torch.zeros(experts)
    for step in range(12):
        drift += 0.2 * torch.randn(experts, generator=generator)
        # The paper's estimator: the mean of the micro-batches' k-th largest logits.
        cutoffs = torch.zeros(experts, dtype=torch.float64)
        for _ in range(micro_batches):
            logits = torch.randn(tokens, experts, generator=generator) + drift
            rows = logits.tolist()
            wanted = authors.expert_choice(rows) if step < warmup else authors.threshold(rows, training=True)
            in_force = capacity_at(config, step)
            k = expected_load(tokens, topk, experts)
            bounds = None if in_force is None else capacity_bounds(logits, k, in_force)
            lower, upper = bounds or (None, None)
            _, routing_map = expert_threshold(logits, ema.value, lower=lower, upper=upper)
            assert tokens_of(routing_map) == wanted
            cutoffs += kth_largest(logits, k) / micro_batches
        authors.step()
        ema.update(cutoffs)
        torch.testing.assert_close(ema.value, torch.tensor(authors.thresholds()), rtol=1e-5, atol=1e-5)
        evaluation = torch.randn(tokens + 2, experts, generator=generator) + drift
        _, routing_map = expert_threshold(evaluation, ema.value)
        assert tokens_of(routing_map) == authors.threshold(evaluation.tolist(), training=False)
