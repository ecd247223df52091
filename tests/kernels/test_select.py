"""select.cu on the CPU (cuda_on_cpu.py)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_et.rule.kernels.select import kth_largest
from megatron_et.rule.quantile import capacity_bounds
from tests.kernels.cuda_on_cpu import OnCpu
from tests.kernels.select_cases import CASES, LEFT_TO_TORCH, Case, check


@pytest.mark.parametrize("name", CASES)
def test_named_cases(name: str, cuda_on_cpu: OnCpu) -> None:
    before = cuda_on_cpu.launches["select.cu"]
    check(CASES[name], "cpu")
    assert cuda_on_cpu.launches["select.cu"] - before == (0 if name in LEFT_TO_TORCH else 6)


@settings(max_examples=40, deadline=None)
@given(
    case=st.builds(
        Case,
        tokens=st.integers(1, 300),
        experts=st.sampled_from([8, 16, 24]),
        ks=st.lists(st.integers(0, 310), min_size=1, max_size=2).map(tuple),
        seed=st.integers(0, 10_000),
        scale=st.sampled_from([0.0, 1e-30, 1e-5, 1.0, 1e30]),
        center=st.sampled_from([0.0, 1.0, -7.0]),
        levels=st.none() | st.integers(1, 5),
        padded=st.sampled_from([0.0, 0.5]),
        on_device=st.booleans(),
        odd_values=st.booleans(),
    )
)
def test_any_case(case: Case, cuda_on_cpu: OnCpu) -> None:
    before = cuda_on_cpu.launches["select.cu"]
    check(case, "cpu")
    assert cuda_on_cpu.launches["select.cu"] - before == 6


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.5, torch.tensor([0.5], dtype=torch.float64)])
def test_capacity_bounds(factor: float | torch.Tensor, cuda_on_cpu: OnCpu) -> None:
    """Both bounds of a capacity in one selection."""
    logits = torch.randn(200, 8)
    before = cuda_on_cpu.launches["select.cu"]
    bounds = capacity_bounds(logits, 25, factor, select=kth_largest)
    assert cuda_on_cpu.launches["select.cu"] - before == 3
    for bound, expected in zip(bounds, capacity_bounds(logits, 25, factor), strict=True):
        assert torch.equal(bound, expected)
