"""One schedule, on the device, against the naive one on the host."""

import itertools

import pytest
import torch

from megatron_et.config import ExpertThresholdConfig
from megatron_et.rule.quantile import capacity_loads
from megatron_et.rule.schedule import capacity, final_capacity, phase, settled
from tests import reference


def et(**knobs: object) -> ExpertThresholdConfig:
    return ExpertThresholdConfig(router_type="expert-threshold", **knobs)  # type: ignore[arg-type]


def test_the_naive_schedule() -> None:
    """The naive schedule that the tests of the real one compare with."""
    plain = et(warmup_steps=3)
    assert [reference.capacity(plain, n) for n in range(5)] == [0.0, 0.0, 0.0, None, None]
    assert [phase(plain, n) for n in (0, 2, 3)] == ["warmup", "warmup", "threshold"]
    bounded = et(warmup_steps=2, warmup_anneal_steps=4, capacity_factor=0.5)
    assert [reference.capacity(bounded, n) for n in range(8)] == [0.0, 0.0, 0.0, 0.125, 0.25, 0.375, 0.5, 0.5]
    assert [phase(bounded, n) for n in (1, 2, 5, 6)] == ["warmup", "anneal", "anneal", "threshold"]
    unbounded = et(warmup_steps=0, warmup_anneal_steps=4)
    assert [reference.capacity(unbounded, n) for n in range(5)] == [0.0, pytest.approx(1 / 3), 1.0, 3.0, None]
    assert reference.capacity(et(warmup_steps=0), 0) is None
    choice = ExpertThresholdConfig(router_type="expert-choice", warmup_steps=1)
    assert [reference.capacity(choice, n) for n in (0, 1, 10**6)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("warmup", "anneal", "factor"),
    itertools.product([0, 3], [0, 1, 7], [None, 0.0, 0.3, 1.0, 2.5]),
)
def test_the_schedule_is_the_naive_one(warmup: int, anneal: int, factor: float | None) -> None:
    et = ExpertThresholdConfig(
        router_type="expert-threshold", warmup_steps=warmup, warmup_anneal_steps=anneal,
        capacity_factor=factor,
    )  # fmt: skip
    for committed in range(warmup + anneal + 3):
        wanted = reference.capacity(et, committed)
        found, bounded = capacity(et, torch.tensor([committed]))
        assert bounded.item() == (wanted is not None)
        if wanted is not None:
            assert float(found) == wanted
            for k in (0, 1, 17, 48, 1000):
                loads = [int(load) for load in capacity_loads(k, torch.tensor([wanted], dtype=torch.float64))]
                assert loads == list(capacity_loads(k, wanted))
        constant = all(
            reference.capacity(et, later) == wanted for later in range(committed, warmup + anneal + 5)
        )
        # One more batch than necessary may be taken as unsettled where C is what it was before.
        assert constant or not settled(et, committed)
        assert not constant or settled(et, committed) or wanted == factor or factor is None


@pytest.mark.parametrize("factor", [None, 0.0, 0.3])
def test_expert_choice_is_settled_at_once(factor: float | None) -> None:
    choice = ExpertThresholdConfig(router_type="expert-choice")
    assert settled(choice, 0)
    assert final_capacity(choice) == 0.0
    assert final_capacity(et(capacity_factor=factor)) == factor
