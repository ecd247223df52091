"""Loads of real runs beside those that the model predicts for them.

Every other one of a run's settled steps gives its `Text` (fit.py); the steps between are what is predicted. A
run at one expert-parallel size is also predicted from the text of the other.

Dimension letters: N steps, L MoE layers, S sequences of a step, R ranks, E experts.
"""

import numpy as np

from benchmarks.scale import runs
from benchmarks.scale.loads import Drawn, Group, Rule, Text, capacity_band, draw
from benchmarks.scale.runs import Loads

DRAWS = 2000
CAPACITY = 0.5


def group(ranks: int) -> Group:
    """A layer of the runs."""
    return Group(runs.EXPERTS, runs.TOPK, ranks, runs.SEQUENCE, batch=runs.SEQUENCES)


def observed(loads: Loads, ranks: int) -> Drawn:
    """A run as if it had been drawn: every step and layer is one draw."""
    counts_DSE = loads.counts_NLSE.reshape(-1, *loads.counts_NLSE.shape[2:])
    counts_DRSE = counts_DSE.reshape(len(counts_DSE), ranks, -1, counts_DSE.shape[-1])
    return Drawn(group(ranks), counts_DRSE.sum(axis=2).astype(np.float64))


def predicted(rule: Rule, ranks: int, text: Text, capacity: float | None = None) -> Drawn:
    """The same from the model."""
    return draw(np.random.default_rng(3), rule, group(ranks), text, DRAWS, capacity=capacity)


def summary(drawn: Drawn) -> dict[str, float]:
    """What the two are compared by; loads are over forced balance."""
    fewest, most = capacity_band(drawn.group, CAPACITY)
    counts = drawn.counts_DREE
    return {
        "busiest rank, mean": float(drawn.grouped_gemm_D.mean()),
        "busiest rank, 90 % quantile": float(np.quantile(drawn.grouped_gemm_D, 0.9)),
        "busiest direction, mean": float(drawn.all_to_all_D.mean()),
        "all rows, mean": float(drawn.receive_DR.mean()),
        "sd of a rank's rows": float(drawn.receive_DR.std()),
        "sd of all rows": float(drawn.receive_DR.mean(axis=1).std()),
        "experts outside (1+-0.5)k": float(((counts < fewest) | (counts > most)).mean()),
    }


def layers_together(loads: Loads, ranks: int) -> dict[str, float]:
    """Variance of a sum over the layers, over what independent layers would have; the number of layers if all
    went alike. Of how a rank differs from the mean of the ranks, of how a sequence's fan-out differs from the
    mean of its step, and of the steps' means (not for top-k, whose fan-out is fixed)."""
    counts_NLSE = loads.counts_NLSE.astype(np.float64)
    counts_NLE = counts_NLSE.sum(axis=2)
    rows_NLR = counts_NLE.reshape(*counts_NLE.shape[:2], ranks, -1).sum(axis=3)
    fanout_NLS = counts_NLSE.sum(axis=3)
    steps_NL = fanout_NLS.mean(axis=2)
    found = {"ranks": _together(rows_NLR - rows_NLR.mean(axis=2, keepdims=True))}
    if steps_NL.std() > 0.0:
        found |= {
            "sequences": _together(fanout_NLS - steps_NL[:, :, None]),
            "steps": _together(steps_NL[:, :, None]),
        }
    return found


def _together(values_NLX: np.ndarray) -> float:
    """Variance over N of the sum over L, over the sum of the variances."""
    return float(values_NLX.sum(axis=1).var(axis=0).mean() / values_NLX.var(axis=0).sum(axis=0).mean())
