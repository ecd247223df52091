"""The rule against loops and against the paper's invariants (I1, I2, I5, I6)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_et.rule.quantile import kth_largest
from megatron_et.rule.routing import applied_thresholds, expert_threshold, limit_fanout
from tests.reference import gate

SIZES = st.tuples(st.integers(1, 67), st.integers(1, 13))


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, experts = draw(SIZES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0, 1e20]))
    logits = torch.randn(tokens, experts, generator=generator) * scale
    if draw(st.booleans()):
        # A coarse grid makes ties, between tokens and with thresholds.
        logits = (logits / scale).round() * scale
    thresholds = logits[torch.randint(tokens, (1,), generator=generator)].squeeze(0).clone()
    return logits, thresholds


def assert_same_gates(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to a few ulp: torch's CPU sigmoid takes another code path for the last few elements of a tensor
    (and for denormals), so a logit may round differently at another position. The map never does."""
    torch.testing.assert_close(actual, expected, rtol=5e-7, atol=1e-37)


@given(cases())
def test_rule_against_loops(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, thresholds = case
    gates, routing_map = expert_threshold(logits.clamp(-80, 80), thresholds.clamp(-80, 80))
    for t, row in enumerate(logits.clamp(-80, 80).tolist()):
        for e, logit in enumerate(row):
            selected = logit >= thresholds.clamp(-80, 80)[e].item()
            assert routing_map[t, e].item() == selected
            assert math.isclose(
                gates[t, e].item(), gate(logit) if selected else 0.0, rel_tol=1e-5, abs_tol=1e-38
            )


@given(cases(), st.data())
def test_causality_other_tokens_do_not_matter(
    case: tuple[torch.Tensor, torch.Tensor], data: st.DataObject
) -> None:
    """I1: change, drop or reorder the other tokens, the row of t stays the same."""
    logits, thresholds = case
    gates, routing_map = expert_threshold(logits, thresholds, max_fanout=3)
    t = data.draw(st.integers(0, len(logits) - 1))
    others = torch.randn_like(logits)
    others[t] = logits[t]
    for pool, row in (
        (logits[t : t + 1], 0),
        (others, t),
        (logits.flip(0), len(logits) - 1 - t),
        (torch.cat([logits[: t + 1], torch.randn(5, logits.shape[1])]), t),
    ):
        other_gates, other_map = expert_threshold(pool, thresholds, max_fanout=3)
        assert_same_gates(other_gates[row], gates[t])
        assert torch.equal(other_map[row], routing_map[t])


@given(cases())
def test_padding_changes_nothing_for_real_tokens_and_routes_none(
    case: tuple[torch.Tensor, torch.Tensor],
) -> None:
    logits, thresholds = case
    mask = torch.zeros(len(logits) + 4, dtype=torch.bool)
    first = min(2, len(logits))
    mask[first : first + 4] = True
    padded = torch.randn(len(mask), logits.shape[1]) * 9
    padded[~mask] = logits
    gates, routing_map = expert_threshold(padded, thresholds, padding_mask=mask)
    plain_gates, plain_map = expert_threshold(logits, thresholds)
    assert_same_gates(gates[~mask], plain_gates)
    assert torch.equal(routing_map[~mask], plain_map)
    assert not routing_map[mask].any()
    assert (gates[mask] == 0).all()


@given(cases())
def test_gates_are_exactly_zero_off_the_map(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    """I6."""
    gates, routing_map = expert_threshold(*case)
    assert (gates[~routing_map] == 0).all()
    assert gates.dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), -torch.inf])
def test_nan_and_minus_inf_are_never_routed(value: float) -> None:
    logits = torch.tensor([[value, 1.0], [0.5, value]])
    gates, routing_map = expert_threshold(logits, torch.full((2,), -torch.inf))
    assert routing_map.tolist() == [[False, True], [True, False]]
    assert gates.isfinite().all()


def test_huge_logits_stay_finite() -> None:
    logits = torch.tensor([[3e38, -3e38]], requires_grad=True)
    gates, _ = expert_threshold(logits, torch.zeros(2))
    gates.sum().backward()
    assert gates.tolist() == [[1.0, 0.0]]
    assert logits.grad.tolist() == [[0.0, 0.0]]


def test_no_tokens_and_one_expert() -> None:
    gates, routing_map = expert_threshold(torch.empty(0, 5), torch.zeros(5), max_fanout=2)
    assert gates.shape == routing_map.shape == (0, 5)
    gates, routing_map = expert_threshold(
        torch.tensor([[1.0], [-1.0]]), torch.zeros(1), gate_normalization="fanout"
    )
    assert routing_map.tolist() == [[True], [False]]
    assert gates[1] == 0


def test_clamp_corners() -> None:
    """I5: lower raises, upper lowers, and lower = upper ignores the threshold."""
    thresholds = torch.tensor([0.0, 5.0, -5.0])
    lower, upper = torch.full((3,), -1.0), torch.full((3,), 1.0)
    assert applied_thresholds(thresholds).tolist() == [0.0, 5.0, -5.0]
    assert applied_thresholds(thresholds, lower, upper).tolist() == [0.0, 1.0, -1.0]
    assert applied_thresholds(thresholds, upper, upper).tolist() == [1.0, 1.0, 1.0]


@given(cases(), st.integers(1, 5))
def test_max_fanout_keeps_the_best(case: tuple[torch.Tensor, torch.Tensor], max_fanout: int) -> None:
    logits, thresholds = case
    _, free = expert_threshold(logits, thresholds)
    _, limited = expert_threshold(logits, thresholds, max_fanout=max_fanout)
    for row, before, after in zip(logits.tolist(), free.tolist(), limited.tolist(), strict=True):
        wanted = sorted((e for e, z in enumerate(before) if z), key=lambda e: (-row[e], e))[:max_fanout]
        assert [e for e, z in enumerate(after) if z] == sorted(wanted)


def test_limit_fanout_above_the_number_of_experts_is_free() -> None:
    routing_map = torch.ones(3, 4, dtype=torch.bool)
    assert limit_fanout(torch.randn(3, 4), routing_map, 4) is routing_map


def test_fanout_normalization() -> None:
    logits = torch.tensor([[1.0, 2.0, -3.0], [-1.0, -1.0, -1.0]])
    gates, routing_map = expert_threshold(logits, torch.zeros(3), gate_normalization="fanout")
    plain, _ = expert_threshold(logits, torch.zeros(3))
    assert torch.equal(gates[0], plain[0] / 2)
    assert routing_map.sum(1).tolist() == [2, 0]
    assert (gates[1] == 0).all()


@settings(max_examples=30)
@given(cases(), st.integers(1, 20))
def test_expert_choice_is_the_clamp_at_the_kth_largest(
    case: tuple[torch.Tensor, torch.Tensor], k: int
) -> None:
    """Each expert takes exactly its k best tokens, plus those that tie with the last of them."""
    logits, thresholds = case
    cutoffs = kth_largest(logits, k)
    _, routing_map = expert_threshold(logits, thresholds, lower=cutoffs, upper=cutoffs)
    for column, taken in zip(logits.T.tolist(), routing_map.T.tolist(), strict=True):
        last = sorted(column, reverse=True)[min(k, len(column)) - 1]
        assert taken == [logit >= last for logit in column]


def test_all_equal_logits_tie_and_all_pass() -> None:
    """Documented: a tie at the cutoff cannot be broken causally, so every tied token is in."""
    logits = torch.full((9, 4), 0.25)
    cutoffs = kth_largest(logits, 2)
    _, routing_map = expert_threshold(logits, torch.zeros(4), lower=cutoffs, upper=cutoffs)
    assert routing_map.all()


@pytest.mark.parametrize("normalization", ["none", "fanout"])
def test_gradient_reaches_logits_only_through_chosen_gates(normalization: str) -> None:
    """Autograd of sum_i z * sigmoid(r) * f_i, with z held fixed; thresholds get no gradient."""
    tokens, experts = 31, 7
    logits = torch.randn(tokens, experts, dtype=torch.float64, requires_grad=True)
    thresholds = torch.randn(experts, dtype=torch.float64, requires_grad=True)
    outputs = torch.randn(tokens, experts, dtype=torch.float64)
    gates, routing_map = expert_threshold(logits, thresholds, gate_normalization=normalization)
    (gates * outputs).sum().backward()
    sigmoid = torch.sigmoid(logits.detach())
    share = routing_map.sum(1, keepdim=True).clamp(min=1) if normalization == "fanout" else 1
    expected = routing_map * sigmoid * (1 - sigmoid) * outputs / share
    torch.testing.assert_close(logits.grad, expected)
    assert thresholds.grad is None
