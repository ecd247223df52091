"""`Text` of a real run, by the method of moments from the tokens that each sequence sent to each expert.

Dimension letters: N steps, L MoE layers, S sequences of a step, E experts.
"""

import math

import numpy as np

from benchmarks.scale.loads import Group, Rule, Text, sequence_rates
from benchmarks.scale.quadrature import correlation_of, solve
from benchmarks.scale.runs import Loads


def fit(loads: Loads, rule: Rule, group: Group) -> Text:
    """The text whose loads have the run's moments, layers averaged."""
    counts_NLSE = loads.counts_NLSE.astype(np.float64)
    tokens, experts = group.sequence, group.experts
    pairs = tokens * (tokens - 1)
    rate = counts_NLSE.mean() / tokens
    # Two tokens of one sequence; of two sequences of a step.
    same = (counts_NLSE * (counts_NLSE - 1)).mean() / pairs
    other = _different_sequences(counts_NLSE) / tokens**2
    if rule == "top-k":
        wander = math.sqrt(max(other / rate**2 - 1.0, 0.0))
        return Text(own=_own_of_topk(group, same - other), wander=wander)
    fanout_NLS = counts_NLSE.sum(axis=3)
    squares = loads.fanout_squares_NLS.mean()
    same_fanout = (np.square(fanout_NLS).mean() - squares) / pairs
    other_fanout = _different_sequences(fanout_NLS[..., None]) / tokens**2
    # Expected loads are a factor of all experts times one of each: their second moments.
    all_together = other_fanout / (experts * rate) ** 2
    one = other / rate**2
    together = (experts * all_together - one) / (experts - 1)
    between_experts = (same_fanout - other_fanout - experts * (same - other)) / (experts * (experts - 1))
    common = correlation_of(rate, between_experts)
    binomial = experts * (rate - same)
    dispersion = (squares / tokens - same_fanout) / binomial - 1.0
    own = max(correlation_of(rate, same - other) - common, 0.0)
    return Text(
        own=own,
        common=common,
        dispersion=float(dispersion),
        wander=math.sqrt(max(one / together - 1.0, 0.0)),
        sway=math.sqrt(max(together - 1.0, 0.0)),
        level=float(rate) / group.rate,
    )


def _different_sequences(counts_NLSE: np.ndarray) -> float:
    """Mean product of the counts of two sequences of a step."""
    sequences = counts_NLSE.shape[2]
    products = np.square(counts_NLSE.sum(axis=2)) - np.square(counts_NLSE).sum(axis=2)
    return float(products.mean()) / (sequences * (sequences - 1))


def _own_of_topk(group: Group, variance: float) -> float:
    def simulated(own: float) -> float:
        rates = sequence_rates(np.random.default_rng(0), "top-k", group, Text(own=own), 400)
        return float(rates.var())

    return solve(simulated, variance)
