"""Integrals over a standard normal variable, and the joint law of two logits above a threshold."""

import math
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.streams import normal_logit, normal_tail

NODES = np.linspace(-10.0, 10.0, 401)
"""Deviates to integrate over; far out, since tails of 1e-15 are asked for."""
WEIGHTS = np.exp(-0.5 * NODES**2) * (NODES[1] - NODES[0]) / math.sqrt(2.0 * math.pi)
LARGEST_SHARE = 0.9


def share_above(value: np.ndarray) -> np.ndarray:
    """Of a standard normal population."""
    return normal_tail(torch.from_numpy(np.asarray(value, dtype=np.float64))).numpy()


def logit_of(share: np.ndarray | float) -> np.ndarray:
    """Inverse of `share_above`."""
    return normal_logit(torch.from_numpy(np.asarray(share, dtype=np.float64))).numpy()


def rates(rate: float, common: np.ndarray | float, correlation: float) -> np.ndarray:
    """Share of the tokens above the threshold of the rate when this share of their variance is common to
    them and lies at the given deviates."""
    deviates = (logit_of(rate) - math.sqrt(correlation) * common) / math.sqrt(1.0 - correlation)
    return share_above(deviates)


def joint_share(rate: float, correlation: float) -> float:
    """Probability that two normal logits of this correlation both lie above the threshold of the rate."""
    return float(np.square(rates(rate, NODES, correlation)) @ WEIGHTS)


def correlation_of(rate: float, covariance: float) -> float:
    """Inverse of `joint_share` - rate^2, between 0 and LARGEST_SHARE."""
    return solve(lambda share: joint_share(rate, share) - rate**2, covariance)


def solve(
    rising: Callable[[float], float], wanted: float, high: float = LARGEST_SHARE, tolerance: float = 1e-5
) -> float:
    """Where a rising function has a value, between 0 and `high`; one of the ends if it is beyond."""
    low = 0.0
    if wanted <= rising(low):
        return low
    while high - low > tolerance:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return 0.5 * (low + high)
