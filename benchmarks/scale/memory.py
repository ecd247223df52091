"""Memory that routed rows need, and how much of it to keep free for a run that must not run out.

A rank's rows vary from micro-batch to micro-batch. The chance that they ever exceed what was set aside is
bounded by Chernoff's inequality, P(X >= x) <= exp(K(t) - t x) for every t > 0, with the exact cumulant
generating function K of the loads of loads.py, times the number of occasions: nothing is extrapolated from
simulated tails.
"""

import math
from dataclasses import dataclass

import numpy as np

from benchmarks.scale.loads import Group, Text
from benchmarks.scale.quadrature import NODES, WEIGHTS, rates

TILTS = np.geomspace(1e-7, 3.0, 240)
"""Values of t to try; any of them gives a valid bound."""


@dataclass(frozen=True)
class Kept:
    """What is kept of a row for the backward pass."""

    name: str
    hidden: float
    """Bytes per element of the hidden width."""
    expert: float
    """Bytes per element of the expert width."""

    def row_bytes(self, hidden: int, expert_width: int) -> float:
        """Of one token at one expert."""
        return self.hidden * hidden + self.expert * expert_width


KEPT = (
    # Input of the first GEMM; its output (gate and up); input of the second.
    Kept("bf16", 2.0, 2.0 * 3),
    # The activation is computed again: --recompute-modules moe_act.
    Kept("bf16, activation recomputed", 2.0, 2.0 * 2),
    # Inputs of both GEMMs in FP8, what the activation's gradient needs in bf16.
    Kept("FP8 inputs", 1.0, 2.0 * 2 + 1.0),
)


def cumulants(group: Group, text: Text, layers: int = 1, popularity: float = 1.0) -> np.ndarray:
    """log E exp(t X) for TILTS, X the rows that a rank receives in one micro-batch, layers added.

    `dispersion` and `wander` are left out: both are small beside what sequences have in common. For top-k it
    is an upper bound: that more for one expert is less for another is not used.

    Args:
        layers: in which a sequence's common part is the same and everything else independent, as real runs
            have it (check.layers_together).
        popularity: expected load of the rank's experts over the target.
    """
    target = min(group.rate * popularity, 0.999)
    experts = layers * group.experts // group.ranks
    tokens = group.rank_tokens * group.ranks // group.sequences
    share = text.own / (1.0 - text.common)
    per_sequence_V = np.full((len(TILTS), len(NODES) if text.common else 1), -np.inf)
    common_V = NODES if text.common else np.zeros(1)
    for column, common in enumerate(common_V):
        # Given the common part, an expert's rate is that of a threshold moved the other way.
        rate = float(rates(target, common, text.common))
        rate_U = rates(rate, NODES, share) if share else np.full(1, rate)
        weight_U = WEIGHTS if share else np.ones(1)
        # log E (1 + p (e^t - 1))^tokens
        exponent_TU = tokens * np.log1p(rate_U * np.expm1(TILTS)[:, None])
        per_sequence_V[:, column] = experts * _log_mean(exponent_TU, weight_U)
    weight_V = WEIGHTS if text.common else np.ones(1)
    return group.sequences * _log_mean(per_sequence_V, weight_V)


def _log_mean(exponent: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """log of the weighted mean of exp(exponent), along the last dimension."""
    largest = exponent.max(axis=-1, keepdims=True)
    return largest[..., 0] + np.log(np.exp(exponent - largest) @ weight)


def head_room(cumulant: np.ndarray, mean: float, occasions: float, probability: float) -> float:
    """What to set aside, over the mean, so that no occasion exceeds it with more than this probability.

    Args:
        cumulant: `cumulants` of all rows that are held at once; those of independent micro-batches add up.
        mean: of these rows.
        occasions: ranks * steps * micro-batches that must all fit.
    """
    bound = (cumulant + math.log(occasions / probability)) / TILTS
    return float(bound.min()) / mean
