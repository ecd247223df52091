"""Megatron's expert capacity (--moe-expert-capacity-factor) on a map with any number of experts a token.

It bounds, in training and in evaluation, how many of a rank's tokens of a micro-batch an expert takes:
`ceil(tokens * topk / experts * factor)`, by dropping pairs after the thresholds have decided. So a pair also
depends on the other tokens, as it does with Megatron's top-k: thresholds alone are causal.

Dimension letters: T tokens, E experts.
"""

from typing import Literal

import torch

DropPolicy = Literal["probs", "position"]


def drop_over_capacity(
    gates_TE: torch.Tensor,
    routing_map_TE: torch.Tensor,
    capacity: int,
    *,
    policy: DropPolicy = "probs",
    pad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep at most `capacity` tokens of each expert. Fixed shapes, no host synchronisation.

    Args:
        gates_TE: [tokens, experts], 0 off the map.
        routing_map_TE: [tokens, experts] bool.
        capacity: tokens that an expert takes at most.
        policy: "probs" keeps the largest gates (the first token on ties), "position" the first tokens.
        pad: fill every expert up to `capacity` with tokens that it was not given, first tokens first, at
            gate 0: then all experts have the same load. The map has no more than T ones in a column, so a
            capacity above T is not reached.

    Returns:
        gates [tokens, experts], 0 where dropped or filled; map [tokens, experts] bool.
    """
    with torch.no_grad():
        # The smallest keys are the pairs off the map. A stable sort decides ties the same way on every device
        # and in every recomputation; topk does not promise it.
        scores_TE = gates_TE if policy == "probs" else torch.ones_like(gates_TE)
        key_TE = torch.where(routing_map_TE, scores_TE, -1.0)
        first = key_TE.sort(dim=0, descending=True, stable=True).indices[:capacity]
        kept_TE = torch.zeros_like(routing_map_TE).scatter_(0, first, True)
        if not pad:
            kept_TE &= routing_map_TE
    return torch.where(kept_TE, gates_TE, 0.0), kept_TE
