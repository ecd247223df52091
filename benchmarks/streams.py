"""Synthetic router logits with a known population, and what one global batch of them gives.

Nothing here knows of time: a stream is one expert's population of logits; its tail function says exactly
which share of tokens lies above a cutoff. Small pools are drawn token by token; large ones through the
exact joint law of the order statistics that are wanted, or of the histogram's counts, so that a pool of
millions costs no more than a small one.

Dimension letters: E experts, B bins or their edges, K ranks (order statistics) asked for.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_et.rule.quantile import Histogram

MINORITY, MINORITY_DISTANCE = 1 / 12, 6.0
"""The bimodal shape: this share of the tokens lies this many sd of the majority above it."""


def normal_tail(logit: torch.Tensor) -> torch.Tensor:
    """Share of a standard normal population above a logit, fp64."""
    return torch.special.ndtr(-logit)


def normal_logit(tail: torch.Tensor) -> torch.Tensor:
    """Inverse of `normal_tail`; a tail of 0 gives +inf."""
    return -torch.special.ndtri(tail)


def _t3_tail(logit: torch.Tensor) -> torch.Tensor:
    y = logit / math.sqrt(3.0)
    return 0.5 - (y / (1.0 + y.square()) + torch.atan(y)) / math.pi


def _bimodal_tail(logit: torch.Tensor) -> torch.Tensor:
    majority = (1.0 - MINORITY) * normal_tail(logit)
    return majority + MINORITY * normal_tail(logit - MINORITY_DISTANCE)


def _t3_sample(size: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    normals = torch.randn(4, *size, generator=generator)
    return normals[0] / normals[1:].square().mean(dim=0).sqrt()


def _bimodal_sample(size: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    minority = torch.rand(*size, generator=generator) < MINORITY
    return torch.randn(*size, generator=generator) + MINORITY_DISTANCE * minority


@dataclass(frozen=True)
class Shape:
    """A distribution before it is brought to mean 0 and sd 1."""

    tail: Callable[[torch.Tensor], torch.Tensor]
    sample: Callable[[Sequence[int], torch.Generator], torch.Tensor]
    mean: float
    sd: float


SHAPES = {
    "normal": Shape(normal_tail, lambda size, generator: torch.randn(*size, generator=generator), 0.0, 1.0),
    "t3": Shape(_t3_tail, _t3_sample, 0.0, math.sqrt(3.0)),
    "bimodal": Shape(
        _bimodal_tail,
        _bimodal_sample,
        MINORITY * MINORITY_DISTANCE,
        math.sqrt(1.0 + MINORITY * (1.0 - MINORITY) * MINORITY_DISTANCE**2),
    ),
}


@functools.cache
def _inverse_table(shape: str) -> tuple[np.ndarray, np.ndarray]:
    """Normal deviates, and the logits of a shape that have the same tails: from one to the other the map is
    smooth."""
    logits = torch.sinh(torch.linspace(-12.0, 12.0, 40001, dtype=torch.float64))
    tails = SHAPES[shape].tail(logits)
    inside = (tails > 1e-13) & (tails < 1.0 - 1e-13)
    return normal_logit(tails[inside]).numpy(), logits[inside].numpy()


@dataclass(frozen=True)
class Stream:
    """Population of one expert's logits: a shape brought to mean `center` and standard deviation `sd`."""

    shape: str = "normal"
    center: float = 0.0
    sd: float = 1.0

    def tail(self, logit: torch.Tensor) -> torch.Tensor:
        """Share of the population above each logit, fp64."""
        shape = SHAPES[self.shape]
        return shape.tail((logit.double() - self.center) / self.sd * shape.sd + shape.mean)

    def logit(self, tail: torch.Tensor) -> torch.Tensor:
        """Logits that the given shares of the population exceed, fp64."""
        shape = SHAPES[self.shape]
        raw = normal_logit(tail)
        if self.shape != "normal":
            deviates, logits = _inverse_table(self.shape)
            raw = torch.as_tensor(np.interp(raw.numpy(), deviates, logits))
        return self.center + self.sd * (raw - shape.mean) / shape.sd

    def sample(self, size: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """Logits, fp32."""
        shape = SHAPES[self.shape]
        return self.center + self.sd * (shape.sample(size, generator) - shape.mean) / shape.sd

    def load_slope(self, rate: float) -> float:
        """Relative change of the load per logit that the threshold falls, at the threshold of this rate."""
        cutoff = self.logit(torch.tensor(rate, dtype=torch.float64))
        step = 1e-4 * self.sd
        return float((self.tail(cutoff - step) - self.tail(cutoff + step)) / (2 * step)) / rate

    def sampling_sd(self, rate: float, tokens: int) -> float:
        """Standard deviation of a pool's quantile over pools of this many i.i.d. tokens (first order)."""
        return math.sqrt((1.0 - rate) / (rate * tokens)) / self.load_slope(rate)


NORMAL = Stream()


def order_tails(
    rng: np.random.Generator, tokens: int, ranks: Sequence[int], size: tuple[int, ...]
) -> torch.Tensor:
    """Population tails of the pool's order statistics at several ranks, jointly and exactly.

    The tail of the k-th largest of N i.i.d. logits is the k-th smallest of N uniforms, whatever the
    distribution, and uniforms' order statistics are sums of exponential gaps: a Gamma variable per gap.

    Args:
        tokens: N.
        ranks: ascending, 0 <= rank <= N; rank 0 has the tail 0.
        size: leading shape of independent pools.

    Returns:
        [*size, K] fp64.
    """
    gaps = np.diff([0, *ranks, tokens + 1])
    cumulative = np.cumsum(rng.standard_gamma(gaps.astype(float), (*size, len(gaps))), axis=-1)
    return torch.from_numpy(cumulative[..., :-1] / cumulative[..., -1:])


def part_mean(
    rng: np.random.Generator, stream: Stream, tokens: int, rank: int, parts: int, size: tuple[int, ...]
) -> torch.Tensor:
    """Mean over a pool's parts of each part's rank-th largest logit, [*size] fp64.

    Args:
        tokens: tokens of one part.
    """
    return stream.logit(order_tails(rng, tokens, [rank], (*size, parts)))[..., 0].mean(dim=-1)


def histogram_cutoff(
    rng: np.random.Generator, stream: Stream, tokens: int, rank: int, centers_E: torch.Tensor
) -> torch.Tensor:
    """Cutoffs [E] fp64 that `Histogram` finds in a pool of i.i.d. tokens.

    Only the adding of tokens is replaced: the counts of the bins are drawn from their exact joint law, a
    multinomial.
    """
    pool = Histogram(len(centers_E), centers=centers_E)
    edges_EB = pool.centers_E.double().unsqueeze(1) + pool.edges()
    # The outermost bins reach to infinity.
    everything = torch.ones(len(centers_E), 1, dtype=torch.float64)
    tails_EB = torch.cat([everything, stream.tail(edges_EB[:, 1:-1]), 0.0 * everything], dim=1)
    shares_EB = -tails_EB.diff(dim=1).clamp(max=0.0)
    pool.counts_EB = torch.from_numpy(rng.multinomial(tokens, shares_EB.numpy()))
    return pool.kth_largest(rank)
