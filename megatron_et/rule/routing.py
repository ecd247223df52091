"""The rule of Expert Threshold routing: pure functions on tensors, no Megatron, no communication. The naive
oracle.

One clamp makes all three routings (docs/architecture.md): the threshold really applied to expert i is

    t_i = clamp(c_i, min=lower_i, max=upper_i)        z[t, i] = r[t, i] >= t_i        y_t = sum_i z *
    sigmoid(r) * expert_i(x_t)

No bounds is Expert Threshold (eq. 6), lower = upper = the k-th largest logit of the pool is Expert Choice
(eq. 4), and the (1+C)k-th and (1-C)k-th largest logits as bounds are ET with capacity (F.1).

Dimension letters: T tokens, E experts.
"""

import torch

from megatron_et.config import GateNormalization


def applied_thresholds(
    thresholds_E: torch.Tensor, lower_E: torch.Tensor | None = None, upper_E: torch.Tensor | None = None
) -> torch.Tensor:
    """Clamp the thresholds between the capacity bounds, [experts]."""
    if lower_E is not None:
        thresholds_E = torch.maximum(thresholds_E, lower_E)
    if upper_E is not None:
        thresholds_E = torch.minimum(thresholds_E, upper_E)
    return thresholds_E


def expert_threshold(
    logits: torch.Tensor,
    thresholds: torch.Tensor,
    *,
    lower: torch.Tensor | None = None,
    upper: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    max_fanout: int | None = None,
    gate_normalization: GateNormalization = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Route every token to the experts whose threshold its logit reaches (eq. 6).

    Given the thresholds (and bounds), the row of a token depends on that token alone. A logit of -inf or NaN
    is never selected. Gradients reach the logits only through the gates of selected experts; thresholds get
    none.

    Args:
        logits: [tokens, experts] fp32 router logits r.
        thresholds: [experts] fp32, on the logits' scale.
        lower: [experts], the threshold is raised to at least this (it bounds an expert's load from above).
        upper: [experts], the threshold is lowered to at most this (it bounds an expert's load from below).
        padding_mask: [tokens] bool, True for padding: such a token is sent nowhere.
        max_fanout: at most this many experts a token, the largest logits first, the lowest expert index on
            ties.
        gate_normalization: "fanout" divides a token's gates by its fan-out (E.4).

    Returns:
        gates [tokens, experts], dtype of the logits: sigmoid(r) on the map and exactly 0 off it;
        routing_map [tokens, experts] bool.
    """
    with torch.no_grad():
        routing_map = logits >= applied_thresholds(thresholds, lower, upper)
        # Thresholds of -inf exist (fewer than k finite logits in a pool), but -inf marks a pair that must not
        # be routed.
        routing_map &= logits > -torch.inf
        if padding_mask is not None:
            routing_map &= ~padding_mask.unsqueeze(1)
        if max_fanout is not None:
            routing_map = limit_fanout(logits, routing_map, max_fanout)
    gates = torch.where(routing_map, torch.sigmoid(logits), 0.0)
    if gate_normalization == "fanout":
        gates = gates / routing_map.sum(dim=1, keepdim=True).clamp(min=1)
    return gates, routing_map


def limit_fanout(logits_TE: torch.Tensor, routing_map_TE: torch.Tensor, max_fanout: int) -> torch.Tensor:
    """Keep at most `max_fanout` experts of each token: largest logits first, lowest expert index on ties.

    Returns:
        routing map [tokens, experts] bool, a subset of the one given.
    """
    if max_fanout >= routing_map_TE.shape[1]:
        return routing_map_TE
    selected_TE = logits_TE.masked_fill(~routing_map_TE, -torch.inf)
    # A stable sort decides ties the same way on every device and in every recomputation; topk does not
    # promise it.
    best = selected_TE.sort(dim=1, descending=True, stable=True).indices[:, :max_fanout]
    kept_TE = torch.zeros_like(routing_map_TE).scatter_(1, best, True)
    return kept_TE & routing_map_TE
