"""Dropping to Megatron's capacity, against a loop and against Megatron's own function.

Dimension letters: T tokens, E experts.
"""

import pytest
import torch

from megatron_et.moe.dispatchers import DropPolicy, drop_over_capacity
from megatron_et.rule.routing import expert_threshold

# Megatron says at every import what is not installed.
pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:megatron\.")

T, E = 40, 6


def routed(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates [T, E] and a map with loads from 0 (expert 0) to all tokens (the last)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(T, E, generator=generator)
    thresholds = torch.tensor([9.0, 1.5, 0.5, 0.0, -0.5, -9.0])
    return expert_threshold(logits, thresholds)


def kept_by_a_loop(
    gates: torch.Tensor, routing_map: torch.Tensor, capacity: int, policy: str
) -> torch.Tensor:
    """The definition: an expert's tokens in order, the first `capacity` of them."""
    kept = torch.zeros_like(routing_map)
    for e in range(E):
        tokens = routing_map[:, e].nonzero().flatten().tolist()
        if policy == "probs":
            tokens.sort(key=lambda t: -gates[t, e].item())  # stable: the first token on ties
        kept[tokens[:capacity], e] = True
    return kept


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("capacity", [0, 1, 7, T, T + 3])
@pytest.mark.parametrize("ties", [False, True])
def test_against_a_loop(policy: DropPolicy, capacity: int, ties: bool) -> None:
    gates, routing_map = routed()
    if ties:
        gates = (gates * 4).round() / 4 * routing_map
    kept = kept_by_a_loop(gates, routing_map, capacity, policy)
    actual_gates, actual_map = drop_over_capacity(gates, routing_map, capacity, policy=policy)
    assert torch.equal(actual_map, kept)
    assert torch.equal(actual_gates, gates * kept)

    filled_gates, filled = drop_over_capacity(gates, routing_map, capacity, policy=policy, pad=True)
    assert (filled | ~kept).all()
    assert filled.sum(0).tolist() == [min(capacity, T)] * E
    assert torch.equal(filled_gates, gates * kept)
    # Filled with the first tokens that the expert was not given.
    for e in range(E):
        extra = (filled & ~kept)[:, e].nonzero().flatten().tolist()
        assert extra == (~routing_map)[:, e].nonzero().flatten().tolist()[: len(extra)]


@pytest.mark.parametrize("pad", [False, True])
def test_against_megatrons_own(pad: bool) -> None:
    """Best gates first, without ties on the map: the same pairs as Megatron's function keeps of a map that it
    would have made itself."""
    from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping, get_capacity

    gates, routing_map = routed(1)
    topk, factor = 2, 0.7
    theirs, their_map = apply_router_token_dropping(
        gates, routing_map, topk, factor, drop_policy="probs", pad_to_capacity=pad
    )
    capacity = get_capacity(T * topk, E, factor)
    ours, our_map = drop_over_capacity(gates, routing_map, capacity, pad=pad)
    assert torch.equal(ours, theirs)
    assert torch.equal(our_map.sum(0), their_map.sum(0))
    assert torch.equal(our_map & routing_map, their_map & routing_map)


def test_the_first_tokens_never_ask_the_later_ones() -> None:
    """By position, a pair depends on earlier tokens alone; by gate it does not."""
    gates, routing_map = routed(2)
    early, late = slice(0, T // 2), slice(T // 2, T)
    other_gates, other_map = routed(3)
    mixed_gates, mixed_map = gates.clone(), routing_map.clone()
    mixed_gates[late], mixed_map[late] = other_gates[late], other_map[late]
    for policy, causal in (("position", True), ("probs", False)):
        kept = drop_over_capacity(gates, routing_map, 9, policy=policy)[1]
        mixed = drop_over_capacity(mixed_gates, mixed_map, 9, policy=policy)[1]
        assert torch.equal(kept[early], mixed[early]) == causal


def test_gradients_reach_kept_gates_alone() -> None:
    gates, routing_map = routed()
    gates.requires_grad_()
    kept_gates, kept = drop_over_capacity(gates, routing_map, 5, pad=True)
    kept_gates.sum().backward()
    assert gates.grad is not None
    assert torch.equal(gates.grad, kept.float())


def test_no_tokens() -> None:
    gates, routing_map = drop_over_capacity(
        torch.zeros(0, E), torch.zeros(0, E, dtype=torch.bool), 0, pad=True
    )
    assert gates.shape == routing_map.shape == (0, E)
