"""Thresholds over time: the real `ThresholdEMA` fed with the cutoffs of drifting and jumping streams.

Time runs in global batches. The threshold that batch s leaves behind routes batch s + 1; its load error is
that of the population of batch s + 1, so sampling of the routed batch itself is not in it. Several lanes
(settings) ride side by side in one EMA per beta, as if they were experts.

In closed form, with a = 1 - beta, sampling variance v of one batch's cutoff and drift d per batch:
noise variance = v * a / (2 - a), lag = d / a, and their mean square is least near a = (2 d / sqrt(v))^(2/3).

Dimension letters: S batches of a chunk, L lanes, E experts of a lane, V betas.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.streams import NORMAL, Stream, histogram_cutoff, order_tails, part_mean
from megatron_et.rule.threshold import ThresholdEMA

CHUNK = 256
EXPERTS = 32
"""Experts of a lane: alike and independent, so they stand for any number."""
SETTLED_UPDATES = 10**9
BETAS = (0.0, 0.9, 0.99, 0.999, 0.9999)

UNEVEN_TOKENS = 2048
"""Tokens that share an offset in uneven batches: a sequence."""

type Path = Callable[[torch.Tensor], torch.Tensor]
"""From batch numbers [S] to mean (or sd) of the logits, [S, 1] or [S, E], in sd of the undisturbed logits."""


def drifting(speed: float) -> Path:
    """The mean moves by `speed` a batch."""
    return lambda batch_S: (speed * batch_S).unsqueeze(1)


def young(speed: float) -> Path:
    """The mean's speed falls as speed / batch: it moves as far from batch 10 to 100 as from 100 to 1,000."""
    return lambda batch_S: (speed * (batch_S + 1.0).log()).unsqueeze(1)


def constant(value: float) -> Path:
    """No change."""
    return lambda batch_S: torch.full((len(batch_S), 1), value, dtype=torch.float64)


def uneven_sd(unevenness: float, tokens: int) -> float:
    """Standard deviation of a batch's mean offset when every sequence has one of its own."""
    return unevenness * math.sqrt(UNEVEN_TOKENS / tokens)


UNMOVED, UNSCALED = constant(0.0), constant(1.0)


@dataclass(frozen=True)
class Lane:
    """One setting: an i.i.d. global batch, how its cutoff is estimated, and how its logits move.

    Args:
        unevenness: sd, in sd of the logits, of an offset that every sequence has. A batch is shifted by the
            mean of its sequences' offsets, drawn anew for each batch; the population is not.
    """

    tokens: int = 1 << 16
    rate: float = 1 / 16
    stream: Stream = NORMAL
    mean: Path = UNMOVED
    sd: Path = UNSCALED
    estimator: str = "exact"
    parts: int = 16
    unevenness: float = 0.0

    @property
    def k(self) -> int:
        """Target tokens of one expert."""
        return round(self.tokens * self.rate)

    @property
    def noise_sd(self) -> float:
        """Standard deviation of one batch's cutoff around the population's, in sd of the logits."""
        sampling = self.stream.sampling_sd(self.rate, self.tokens) / self.stream.sd
        return math.hypot(sampling, uneven_sd(self.unevenness, self.tokens))

    def cutoffs(self, rng: np.random.Generator, batch_S: torch.Tensor, last_E: torch.Tensor) -> torch.Tensor:
        """[S, E] fp64; last_E: the cutoffs of the batch before, where a histogram is centred."""
        size = (len(batch_S), len(last_E))
        part, part_k = self.tokens // self.parts, self.k // self.parts
        if self.estimator == "exact":
            still_SE = self.stream.logit(order_tails(rng, self.tokens, [self.k], size))[..., 0]
        elif self.estimator == "kth-largest":
            still_SE = part_mean(rng, self.stream, part, part_k, self.parts, size)
        elif self.estimator == "megatron-average":
            still_SE = part_mean(rng, self.stream, part, part_k + 1, self.parts, size)
        else:
            return self._histogram_cutoffs(rng, batch_S, last_E)
        if self.unevenness:
            offset_SE = uneven_sd(self.unevenness, self.tokens) * torch.from_numpy(rng.standard_normal(size))
            still_SE = still_SE + self.stream.sd * offset_SE
        return self.moved(batch_S, still_SE)

    def moved(self, batch_S: torch.Tensor, still_SE: torch.Tensor) -> torch.Tensor:
        """Logits of the undisturbed stream as the batches' streams have them."""
        center, unit = self.stream.center, self.stream.sd
        return center + unit * (self.mean(batch_S) + self.sd(batch_S) * (still_SE - center) / unit)

    def _histogram_cutoffs(
        self, rng: np.random.Generator, batch_S: torch.Tensor, last_E: torch.Tensor
    ) -> torch.Tensor:
        cutoffs = []
        for batch in batch_S.unsqueeze(1):
            # The batch's stream stands still and the centre moves: the same distances, the same bins.
            shift = self.moved(batch, torch.zeros(1, len(last_E), dtype=torch.float64))[0]
            still_E = histogram_cutoff(rng, self.stream, self.tokens, self.k, (last_E - shift).float())
            last_E = self.moved(batch, still_E.unsqueeze(0))[0]
            cutoffs.append(last_E)
        return torch.stack(cutoffs)

    def load_error(self, batch_S: torch.Tensor, thresholds_SVE: torch.Tensor) -> torch.Tensor:
        """Load of each batch's population at the thresholds over its target, less 1, [S, V, E]."""
        mean, sd = self.mean(batch_S).unsqueeze(1), self.sd(batch_S).unsqueeze(1)
        center, unit = self.stream.center, self.stream.sd
        still_SVE = center + unit * ((thresholds_SVE.double() - center) / unit - mean) / sd
        return self.stream.tail(still_SVE) * self.tokens / self.k - 1.0


@dataclass
class Chunk:
    """Batches, thresholds left by the batch before each, and the load errors that they make."""

    batch_S: torch.Tensor
    thresholds_SVLE: torch.Tensor
    errors_SVLE: torch.Tensor


def run(
    lanes: Sequence[Lane],
    betas: Sequence[float],
    batches: int,
    seed: int,
    *,
    settled: bool = False,
) -> Iterator[Chunk]:
    """Feed all lanes' cutoffs to a `ThresholdEMA` per beta.

    Args:
        settled: start from thresholds as a long still past leaves them, at the quantile with the EMA's
            noise; otherwise from nothing, and the first batch, which no threshold routes, is left out.
    """
    rng = np.random.default_rng(seed)
    emas = [ThresholdEMA(len(lanes) * EXPERTS, beta) for beta in betas]
    rates = torch.tensor([lane.rate for lane in lanes], dtype=torch.float64).unsqueeze(1)
    quantiles_L = [lane.stream.logit(rate) for lane, rate in zip(lanes, rates, strict=True)]
    if settled:
        sampling_L = [lane.noise_sd * lane.stream.sd for lane in lanes]
        for ema, beta in zip(emas, betas, strict=True):
            noise_LE = torch.from_numpy(rng.standard_normal((len(lanes), EXPERTS)))
            noise_LE *= math.sqrt((1 - beta) / (1 + beta)) * torch.tensor(sampling_L).unsqueeze(1)
            ema.value.copy_((torch.stack(quantiles_L) + noise_LE).flatten())
            ema.num_updates.fill_(SETTLED_UPDATES)
    last_LE = torch.stack(quantiles_L).expand(-1, EXPERTS)
    for start in range(0, batches, CHUNK):
        batch_S = torch.arange(start, min(start + CHUNK, batches), dtype=torch.float64)
        cutoffs_SLE = torch.stack(
            [lane.cutoffs(rng, batch_S, last_E) for lane, last_E in zip(lanes, last_LE, strict=True)], dim=1
        )
        last_LE = cutoffs_SLE[-1]
        before = []
        for cutoffs in cutoffs_SLE.flatten(1):
            before.append(torch.stack([ema.value for ema in emas]))
            for ema in emas:
                ema.update(cutoffs)
        thresholds_SVLE = torch.stack(before).unflatten(2, (len(lanes), EXPERTS))
        if start == 0 and not settled:
            batch_S, thresholds_SVLE = batch_S[1:], thresholds_SVLE[1:]
        errors = [lane.load_error(batch_S, thresholds_SVLE[:, :, i]) for i, lane in enumerate(lanes)]
        yield Chunk(batch_S, thresholds_SVLE, torch.stack(errors, dim=2))


class SettledSums:
    """Moments of load errors and thresholds per beta and lane, over the batches after it has settled."""

    def __init__(self, lanes: Sequence[Lane], betas: Sequence[float], batches: int, settle: float) -> None:
        self.lanes, self.betas = lanes, betas
        self.first_V = torch.tensor([min(settle / (1.0 - beta), 0.85 * batches) for beta in betas])
        self.first_V[torch.tensor(betas) == 0.0] = 16
        self.count_V = torch.zeros(len(betas), dtype=torch.float64)
        self.sums = torch.zeros(5, len(betas), len(lanes), dtype=torch.float64)

    def add(self, chunk: Chunk) -> None:
        """Take in one chunk."""
        use_SV = (chunk.batch_S.unsqueeze(1) >= self.first_V).double()
        self.count_V += use_SV.sum(dim=0)
        gaps = []
        for i, lane in enumerate(self.lanes):
            still = lane.stream.logit(torch.tensor([[lane.rate]], dtype=torch.float64))
            population = lane.moved(chunk.batch_S, still).unsqueeze(1)
            gaps.append((chunk.thresholds_SVLE[:, :, i].double() - population) / lane.stream.sd)
        gaps_SVLE, errors_SVLE = torch.stack(gaps, dim=2), chunk.errors_SVLE
        statistics = (
            errors_SVLE.mean(dim=3),
            errors_SVLE.square().mean(dim=3),
            errors_SVLE.amax(dim=3),
            gaps_SVLE.mean(dim=3),
            gaps_SVLE.square().mean(dim=3),
        )
        for total_VL, value_SVL in zip(self.sums, statistics, strict=True):
            total_VL += (value_SVL * use_SV.unsqueeze(2)).sum(dim=0)

    def row(self, v: int, i: int) -> dict[str, Any]:
        """Numbers of one beta and lane beside their closed forms."""
        bias, square, worst, gap, gap_square = (self.sums[:, v, i] / self.count_V[v]).tolist()
        lane, beta = self.lanes[i], self.betas[v]
        return {
            "load_bias": bias,
            "load_rms": math.sqrt(square),
            "max_violation": worst,
            "threshold_sd": math.sqrt(max(gap_square - gap**2, 0.0)),
            "predicted_sd": math.sqrt((1 - beta) / (1 + beta)) * lane.noise_sd,
            "threshold_gap": gap,
            "threshold_rms": math.sqrt(gap_square),
        }


def settled_rows(
    lanes: Sequence[Lane],
    betas: Sequence[float],
    batches: int,
    seed: int,
    *,
    settle: float = 5.0,
) -> list[list[dict[str, Any]]]:
    """Settled numbers per lane and beta, from a start from nothing.

    Args:
        settle: batches before measuring, in units of 1 / (1 - beta); at most 85 % of the run.
    """
    sums = SettledSums(lanes, betas, batches, settle)
    for chunk in run(lanes, betas, batches, seed):
        sums.add(chunk)
    return [[sums.row(v, i) for v in range(len(betas))] for i in range(len(lanes))]


def best_rate(lane: Lane, drift: float) -> float:
    """1 - beta of least mean square threshold error in closed form, at most 1; drift in sd per batch."""
    return min((2.0 * drift / lane.noise_sd) ** (2 / 3), 1.0)


def predicted_rms(lane: Lane, drift: float, beta: float) -> float:
    """Root of noise variance + lag squared of a threshold, in closed form, in sd of the logits."""
    return math.hypot(math.sqrt((1 - beta) / (1 + beta)) * lane.noise_sd, drift / (1 - beta))


def batches_until(
    lanes: Sequence[Lane],
    betas: Sequence[float],
    batches: int,
    seed: int,
    limits: Sequence[float],
    *,
    settled: bool,
) -> list[list[dict[str, Any]]]:
    """Per lane and beta: batches until the mean over experts of |load error| stays within each limit.

    Returns:
        rows with `within_<limit>` (None: not by the end of the run), and the largest load error of all
        experts at batch 0 and after, and the least after.
    """
    last = torch.full((len(limits), len(betas), len(lanes)), -1.0, dtype=torch.float64)
    first_violation = torch.full((len(betas), len(lanes)), -1.0, dtype=torch.float64)
    most, least = first_violation.clone(), first_violation.new_full((len(betas), len(lanes)), torch.inf)
    for chunk in run(lanes, betas, batches, seed, settled=settled):
        mean_SVL = chunk.errors_SVLE.abs().mean(dim=3)
        batch_S11 = chunk.batch_S.view(-1, 1, 1)
        for last_VL, limit in zip(last, limits, strict=True):
            outside = torch.where(mean_SVL > limit, batch_S11, -1.0).amax(dim=0)
            last_VL.copy_(torch.maximum(last_VL, outside))
        if chunk.batch_S[0] == 0.0:
            first_violation = chunk.errors_SVLE[0].amax(dim=2)
        later = chunk.errors_SVLE[chunk.batch_S >= 1.0]
        most = torch.maximum(most, later.amax(dim=(0, 3)))
        least = torch.minimum(least, later.amin(dim=(0, 3)))
    rows = []
    for i in range(len(lanes)):
        rows.append([])
        for v in range(len(betas)):
            row: dict[str, Any] = {}
            for limit, last_VL in zip(limits, last, strict=True):
                # A threshold needs one batch; one that still strays in the last twentieth never settles.
                batch = max(int(last_VL[v, i]) + 1, 0 if settled else 1)
                row[f"within_{limit:g}"] = batch if batch < 0.95 * batches else None
            if settled:
                row["violation_first"] = first_violation[v, i].item()
            row |= {"violation_later": most[v, i].item(), "starvation_later": least[v, i].item()}
            rows[-1].append(row)
    return rows
