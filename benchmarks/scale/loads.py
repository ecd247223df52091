"""How evenly a MoE layer loads the ranks of an expert-parallel group: what they send and receive, simulated.

A token's logit for an expert is normal: a part that all tokens of its sequence share, expert by expert
(`own`), a part that they share for all experts (`common`), and the rest, its own. Expert Threshold takes
every logit above a threshold, so an expert's load is a sum over sequences of binomials with different
rates, and neither the loads nor their sum is fixed. Top-k takes a token's k best: the sum is fixed, and
only differences between experts remain.

Top-k is simulated by its mean field: within a sequence all tokens meet the same threshold, at which k
experts take a token on average. The spread of a token's k-th largest logit is put on its own part.

Dimension letters: D draws, S sequences of the group, P slices (the part of a sequence that a rank holds),
R ranks, E experts.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.scale.quadrature import logit_of, share_above

type Rule = Literal["ET", "top-k"]


@dataclass(frozen=True)
class Text:
    """How far tokens are from independent draws. All zero: they are."""

    own: float = 0.0
    """Share of a logit's variance that the tokens of a sequence have in common, for each expert another."""
    common: float = 0.0
    """Share that they have in common for all experts: it moves fan-outs, and is nothing to top-k."""
    dispersion: float = 0.0
    """Variance of a token's fan-out over that of independent experts, less 1."""
    wander: float = 0.0
    """Sd of an expert's expected load around the target, relative; lognormal. ET: how far thresholds are from
    the batch's quantile (noise and lag). Top-k: what the auxiliary loss leaves of unequal popularity."""
    sway: float = 0.0
    """Sd of the expected load of all experts together, relative, lognormal: thresholds that are all too high
    or all too low. Nothing to top-k."""
    level: float = 1.0
    """Mean expected load over the target: not 1 while the logits of all experts drift one way."""


@dataclass(frozen=True)
class Group:
    """A MoE layer over an expert-parallel group, for one micro-batch of each rank."""

    experts: int
    topk: int
    ranks: int
    sequence: int
    """Tokens of a sequence."""
    batch: int = 1
    """Sequences of a micro-batch."""
    sharers: int = 1
    """Ranks that share a sequence: tensor times context parallel."""

    @property
    def rate(self) -> float:
        """Target share of the tokens that an expert takes."""
        return self.topk / self.experts

    @property
    def rank_tokens(self) -> int:
        """Tokens of one rank."""
        return self.batch * self.sequence // self.sharers

    @property
    def sequences(self) -> int:
        """Different sequences of the group; one when the group holds only a part of it."""
        return self.batch * max(self.ranks // self.sharers, 1)

    @property
    def target(self) -> float:
        """Rows that a rank sends and receives under forced balance."""
        return self.rank_tokens * self.topk

    @property
    def sequence_of_slice(self) -> np.ndarray:
        """Which sequence each of the ranks * batch slices belongs to, rank by rank."""
        rank, place = np.divmod(np.arange(self.ranks * self.batch), self.batch)
        return rank // self.sharers * self.batch + place


@dataclass(frozen=True)
class Drawn:
    """Loads of D independent layers and micro-batches."""

    group: Group
    counts_DREE: np.ndarray
    """[draws, sending ranks, experts], rows."""

    @property
    def receive_DR(self) -> np.ndarray:
        """Rows that each rank receives, over the target."""
        counts_DE = self.counts_DREE.sum(axis=1)
        return counts_DE.reshape(len(counts_DE), self.group.ranks, -1).sum(axis=2) / self.group.target

    @property
    def send_DR(self) -> np.ndarray:
        """Rows that each rank sends, over the target."""
        return self.counts_DREE.sum(axis=2) / self.group.target

    @property
    def grouped_gemm_D(self) -> np.ndarray:
        """What the experts of the slowest rank have to do, over the target: all others wait for it."""
        return self.receive_DR.max(axis=1)

    @property
    def all_to_all_D(self) -> np.ndarray:
        """The busiest direction of the busiest rank, over the target."""
        return np.maximum(self.receive_DR, self.send_DR).max(axis=1)


def draw(
    rng: np.random.Generator,
    rule: Rule,
    group: Group,
    text: Text,
    draws: int,
    *,
    capacity: float | None = None,
) -> Drawn:
    """Loads of a layer.

    Args:
        capacity: C of the pool `microbatch`: an expert takes (1-C)k to (1+C)k of each rank's tokens.
    """
    rates_DSE = sequence_rates(rng, rule, group, text, draws)
    rates_DPE = rates_DSE[:, group.sequence_of_slice]
    tokens = group.sequence // group.sharers
    counts_DPE = rng.binomial(tokens, rates_DPE).astype(np.float64)
    if rule == "ET":
        pair = text.dispersion * group.rate * (1.0 - group.rate) / max(group.experts - 1, 1)
        together_DP1 = rng.standard_normal((*counts_DPE.shape[:2], 1))
        counts_DPE = np.clip(counts_DPE + math.sqrt(tokens * max(pair, 0.0)) * together_DP1, 0.0, tokens)
    else:
        # Exactly k rows a token: what independent experts have too many is taken where it varies most.
        variance_DPE = rates_DPE * (1.0 - rates_DPE)
        excess_DP1 = counts_DPE.sum(axis=2, keepdims=True) - tokens * group.topk
        counts_DPE -= excess_DP1 * variance_DPE / variance_DPE.sum(axis=2, keepdims=True)
    counts_DRE = counts_DPE.reshape(draws, group.ranks, group.batch, group.experts).sum(axis=2)
    if capacity is not None:
        counts_DRE = counts_DRE.clip(*capacity_band(group, capacity))
    return Drawn(group, counts_DRE)


def capacity_band(group: Group, capacity: float) -> tuple[int, int]:
    """Fewest and most rows of one expert from one rank's micro-batch."""
    k = group.rank_tokens * group.topk // group.experts
    return int(k * max(1.0 - capacity, 0.0)), int(k * (1.0 + capacity))


def sequence_rates(rng: np.random.Generator, rule: Rule, group: Group, text: Text, draws: int) -> np.ndarray:
    """Share of its tokens that each sequence sends to each expert, in expectation, [D, S, E]."""
    size = (draws, group.sequences, group.experts)
    apart_D1E = lognormal(rng, text.wander, (draws, 1, group.experts))
    together_D11 = text.level * lognormal(rng, text.sway, (draws, 1, 1))
    target_D1E = (group.rate * together_D11 * apart_D1E).clip(max=0.999)
    own_DSE = math.sqrt(text.own) * rng.standard_normal(size) if text.own else np.zeros(size)
    spread = 1.0 - text.own - text.common
    if rule == "ET":
        common_DS1 = math.sqrt(text.common) * rng.standard_normal((*size[:2], 1))
        deviate = (own_DSE + common_DS1 - logit_of(target_D1E)) / math.sqrt(spread)
        return share_above(-deviate)
    spread += cutoff_variance(group)
    deviate = (own_DSE - logit_of(target_D1E) * math.sqrt(text.own + spread)) / math.sqrt(spread)
    shift_DS1 = np.zeros((*size[:2], 1))
    for _ in range(12):
        shifted = deviate + shift_DS1
        density = np.exp(-0.5 * shifted**2).sum(axis=2, keepdims=True) / math.sqrt(2.0 * math.pi)
        missing = group.topk - share_above(-shifted).sum(axis=2, keepdims=True)
        # Newton's steps, kept short where the sum is flat.
        shift_DS1 += (missing / np.maximum(density, 1e-12)).clip(-0.5, 0.5)
    return share_above(-(deviate + shift_DS1))


def lognormal(rng: np.random.Generator, sd: float, size: tuple[int, ...]) -> np.ndarray:
    """Factors of mean 1 and this standard deviation."""
    width = math.sqrt(math.log1p(sd**2))
    return np.exp(width * rng.standard_normal(size) - 0.5 * width**2)


def cutoff_variance(group: Group) -> float:
    """Of a token's k-th largest of E standard normal logits (first order)."""
    cutoff = float(logit_of(group.rate))
    density = math.exp(-0.5 * cutoff**2) / math.sqrt(2.0 * math.pi)
    return group.rate * (1.0 - group.rate) / (group.experts * density**2)
