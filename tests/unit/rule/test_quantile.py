"""The k-th largest logit against sorting, at every corner of k and of the pool."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_et.rule.quantile import capacity_bounds, expected_load, kth_largest


@given(st.integers(1, 50), st.integers(1, 9), st.integers(-2, 60), st.integers(0, 2**31), st.booleans())
def test_kth_largest_against_sorting(tokens: int, experts: int, k: int, seed: int, ties: bool) -> None:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * 3
    if ties:
        logits = logits.round()
    expected = [
        math.inf if k <= 0 else sorted(column, reverse=True)[min(k, tokens) - 1]
        for column in logits.T.tolist()
    ]
    assert kth_largest(logits, k).tolist() == expected
    assert kth_largest(logits, torch.tensor(k)).tolist() == expected


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**31))
def test_padding_is_not_in_the_pool(tokens: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, 3, generator=generator)
    mask = torch.rand(tokens, generator=generator) < 0.4
    expected = kth_largest(logits[~mask], k)
    assert torch.equal(kth_largest(logits, k, padding_mask_T=mask), expected)
    assert torch.equal(kth_largest(logits, torch.tensor([k]), padding_mask_T=mask), expected)


def test_empty_pool_lets_nobody_pass() -> None:
    assert kth_largest(torch.empty(0, 2), 3).tolist() == [math.inf, math.inf]
    assert kth_largest(torch.empty(0, 2), torch.tensor(3)).tolist() == [math.inf, math.inf]
    everything_padded = torch.ones(4, dtype=torch.bool)
    assert kth_largest(torch.randn(4, 1), 1, padding_mask_T=everything_padded).tolist() == [math.inf]


def test_minus_inf_logits() -> None:
    logits = torch.tensor([[-math.inf], [1.0], [-math.inf]])
    assert kth_largest(logits, 1).item() == 1.0
    assert kth_largest(logits, 2).item() == -math.inf


def test_expected_load_rounds_down_as_the_authors_do() -> None:
    assert expected_load(31, 1, 16) == 1
    assert expected_load(15, 1, 16) == 0
    assert expected_load(100, 3, 7) == 42
    assert expected_load(torch.tensor(100), 3, 7).item() == 42
    # 2**33 tokens x topk 8 does not fit 32 bits.
    assert expected_load(torch.tensor(2**33), 8, 256).item() == 2**28


@pytest.mark.parametrize("capacity", [0.0, 0.25, 0.5, 1.0, 3.0])
@pytest.mark.parametrize(("tokens", "k"), [(64, 8), (61, 7), (5, 1), (9, 9)])
def test_capacity_bounds(capacity: float, tokens: int, k: int) -> None:
    logits = torch.randn(tokens, 5)
    lower, upper = capacity_bounds(logits, k, capacity)
    assert torch.equal(upper, kth_largest(logits, int(k * max(1 - capacity, 0))))
    assert torch.equal(lower, kth_largest(logits, int(k * (1 + capacity))))
    assert (upper >= lower).all()
    on_device = capacity_bounds(logits, torch.tensor(k), capacity)
    assert torch.equal(on_device[0], lower)
    assert torch.equal(on_device[1], upper)
