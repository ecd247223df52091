"""Prototypes of guards: rules that let one expert's threshold catch up when its logits have jumped.

All look at past batches only, at one expert at a time, and at nothing but the batch's cutoffs. The load of
the last batch at the threshold that routed it needs no counting of its own: it is above (1+G)k exactly when
the threshold is below the batch's (1+G)k-th largest logit, and below (1-G)k when it is above the (1-G)k-th.
Both come from the histogram that gives the cutoff, so they are as independent of the layout as it is.

Dimension letters: S batches, C conditions (batch size x event), E experts, P policies (beta x guard), G
bands, K ranks.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.streams import Stream, normal_logit, normal_tail, order_tails
from benchmarks.threshold_series import EXPERTS, SETTLED_UPDATES, UNMOVED, UNSCALED, Path, constant, uneven_sd

RATE = 1 / 16
BANDS = ("0.1", "0.2", "0.5", "1", "factor 2", "5/sqrt(k)")
"""G: share of k by which a load may miss its target; "factor 2" is the band from k/2 to 2k."""
FAST, SLOW = 0.2, 0.01
"""Averaging rates of the tracking signal's mean gap and mean absolute gap."""
CHUNK = 128


@dataclass(frozen=True)
class Guard:
    """One rule, added to the EMA.

    Args:
        band: G of the clamp and of the violations.
        clamp: after the update the threshold is clamped to where this batch's load is within (1 +- G) k.
        hurry: a clamped EMA also counts as made of this many updates, so that it averages faster for a while.
        patience: after this many batches in a row that violated the band on the same side the EMA starts
            again: the threshold becomes this batch's cutoff, and the following ones are averaged.
        tracking: the EMA starts again when the mean of the last few gaps (cutoff - threshold) is this many
            times the long mean of their size. Needs no band, but two more numbers per expert.
    """

    name: str
    band: str | None = None
    clamp: bool = False
    hurry: int | None = None
    patience: int | None = None
    tracking: float | None = None


NONE = Guard("none")
GUARDS = (
    NONE,
    *(Guard("clamp", band, clamp=True) for band in BANDS),
    *(Guard("restart", band, patience=1) for band in BANDS),
    *(Guard("restart after 2", band, patience=2) for band in BANDS),
    *(Guard("restart after 3", band, patience=3) for band in BANDS),
    *(Guard("clamp, restart after 2", band, clamp=True, patience=2) for band in BANDS),
    *(Guard("clamp and hurry", band, clamp=True, hurry=10) for band in BANDS),
    Guard("tracking signal x2", tracking=2.0),
    Guard("tracking signal x3", tracking=3.0),
)


class GuardedThresholds:
    """Thresholds [C, E, P] of many policies at once; without a guard the rule of `ThresholdEMA`, in fp64.

    An expert's state: value, update count n, and what its guard needs: signed length of the current run of
    violations, or the two means of the tracking signal.
    """

    def __init__(
        self, policies: Sequence[tuple[float, Guard]], start_CEP: torch.Tensor, gap_size_CEP: torch.Tensor
    ) -> None:
        self.value = start_CEP.clone()
        self.updates = torch.full_like(start_CEP, SETTLED_UPDATES)
        self.run = torch.zeros_like(start_CEP)
        self.gap, self.gap_size = torch.zeros_like(start_CEP), gap_size_CEP.clone()
        self.decay_P = torch.tensor([beta for beta, _ in policies], dtype=torch.float64)
        never = math.inf
        self.patience_P = torch.tensor([float(guard.patience or never) for _, guard in policies])
        self.tracking_P = torch.tensor([guard.tracking or never for _, guard in policies])
        self.hurry_P = torch.tensor([float(guard.hurry or never) for _, guard in policies])
        self.clamp_P = torch.tensor([guard.clamp for _, guard in policies])

    def update(
        self, cutoffs_CE1: torch.Tensor, lower_CEP: torch.Tensor, upper_CEP: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One batch.

        Args:
            cutoffs_CE1: the batch's k-th largest logits.
            lower_CEP: its (1+G)k-th largest (-inf without a band).
            upper_CEP: its (1-G)k-th largest (+inf without a band or with G >= 1).

        Returns:
            which EMAs started again, and which thresholds were clamped.
        """
        gap = cutoffs_CE1 - self.value
        restart = self._run_is_long(lower_CEP, upper_CEP) | self._gap_persists(gap)
        self.run.masked_fill_(restart, 0.0)
        self.gap.masked_fill_(restart, 0.0)
        self.updates.masked_fill_(restart, 0.0)
        self.updates += 1
        self.value += (1.0 - self.decay_P) / -torch.expm1(self.updates * self.decay_P.log()) * gap
        inside = self.value.clamp(lower_CEP, upper_CEP)
        clamped = self.clamp_P & (inside != self.value)
        self.value = torch.where(self.clamp_P, inside, self.value)
        self.updates = torch.where(clamped, torch.minimum(self.updates, self.hurry_P), self.updates)
        return restart, clamped

    def _run_is_long(self, lower_CEP: torch.Tensor, upper_CEP: torch.Tensor) -> torch.Tensor:
        violation = (self.value < lower_CEP).double() - (self.value > upper_CEP).double()
        # A run that changes side is a new run.
        self.run = torch.where(violation * self.run < 0, violation, (self.run + violation) * violation.abs())
        return self.run.abs() >= self.patience_P

    def _gap_persists(self, gap: torch.Tensor) -> torch.Tensor:
        self.gap += FAST * (gap - self.gap)
        persists = self.gap.abs() > self.tracking_P * self.gap_size
        self.gap_size += SLOW * (gap.abs() - self.gap_size)
        return persists


@dataclass(frozen=True)
class Event:
    """How the logits' mean and sd move from batch 0 on, in sd of the logits before.

    Args:
        unevenness: as for a `Lane`.
        odd_share: share of (batch, expert) pairs that are shifted by a normal offset of 1 sd, alone.
    """

    mean: Path = UNMOVED
    sd: Path = UNSCALED
    unevenness: float = 0.0
    odd_share: float = 0.0


def pulse(height: float, batches: int) -> Path:
    """Up for some batches, then back."""
    return lambda batch_S: torch.where(batch_S < batches, height, 0.0).double().unsqueeze(1)


def ramp(height: float, batches: int) -> Path:
    """Up at a constant speed, then still."""
    return lambda batch_S: ((batch_S + 1.0) * height / batches).clamp(max=height).unsqueeze(1)


def per_expert(size: float) -> Path:
    """A jump of its own for every expert: offsets of this sd, the same in every run."""
    offsets_E = size * torch.from_numpy(np.random.default_rng(12).standard_normal(EXPERTS))
    return lambda batch_S: offsets_E.expand(len(batch_S), -1)


EVENTS: Mapping[str, Event] = {
    "shift +0.5": Event(mean=constant(0.5)),
    "shift +1": Event(mean=constant(1.0)),
    "shift +3": Event(mean=constant(3.0)),
    "shift -1": Event(mean=constant(-1.0)),
    "shift per expert, sd 1": Event(mean=per_expert(1.0)),
    "scale x2": Event(sd=constant(2.0)),
    "scale x0.5": Event(sd=constant(0.5)),
    "shift +1, uneven batches": Event(mean=constant(1.0), unevenness=0.5),
    "spike +3 for 1 batch": Event(mean=pulse(3.0, 1)),
    "spike +3 for 5 batches": Event(mean=pulse(3.0, 5)),
    "ramp +1 over 500 batches": Event(mean=ramp(1.0, 500)),
}
STILL: Mapping[str, Event] = {
    "still": Event(),
    "still, uneven batches": Event(unevenness=0.5),
    "still, 1 % odd batches": Event(odd_share=0.01),
}


def band_ranks(tokens: int) -> tuple[list[int], int, list[int]]:
    """Ranks of the upper ends of all bands, of the cutoff and of the lower ends."""
    k = round(tokens * RATE)
    widths = {"factor 2": (0.5, 1.0), "5/sqrt(k)": (5.0 / math.sqrt(k),) * 2}
    pairs = [widths.get(band) or (float(band),) * 2 for band in BANDS]
    return (
        [round(k * (1.0 - below)) for below, _ in pairs],
        k,
        [round(k * (1.0 + above)) for _, above in pairs],
    )


def batch_deviates(rng: np.random.Generator, tokens: int, batches: int) -> torch.Tensor:
    """Standard normal order statistics of i.i.d. batches, jointly, [S, E, K].

    K = upper ends of all bands, cutoff, lower ends.
    """
    upper, k, lower = band_ranks(tokens)
    wanted = [*upper, k, *lower]
    ranks = sorted(set(wanted))
    logits = normal_logit(order_tails(rng, tokens, ranks, (batches, EXPERTS)))
    return logits[..., [ranks.index(rank) for rank in wanted]]


@dataclass
class Step:
    """One batch of a simulation: load errors of its population, and what the guards did after it."""

    batch: int
    errors_CEP: torch.Tensor
    restarts_CEP: torch.Tensor
    clamps_CEP: torch.Tensor


def simulate(
    policies: Sequence[tuple[float, Guard]],
    sizes: Sequence[int],
    events: Sequence[Event],
    batches: int,
    seed: int,
) -> Iterator[Step]:
    """All policies through all events on the same random numbers; conditions C are sizes x events.

    Thresholds start settled: at the quantile, with the EMA's stationary noise.
    """
    rng = np.random.default_rng(seed)
    conditions = list(itertools.product(range(len(sizes)), range(len(events))))
    of_size = [n for n, _ in conditions]
    # Columns of -inf and +inf for policies without a band.
    bands = {band: i for i, band in enumerate(BANDS)}
    nowhere = 2 * len(BANDS) + 1
    upper_P = [nowhere + 1 if guard.band is None else bands[guard.band] for _, guard in policies]
    lower_P = [nowhere if guard.band is None else len(BANDS) + 1 + bands[guard.band] for _, guard in policies]

    sampling_C1 = torch.tensor([[Stream().sampling_sd(RATE, sizes[n])] for n, _ in conditions])
    uneven_C1 = torch.tensor([[uneven_sd(events[e].unevenness, sizes[n])] for n, e in conditions])
    odd_C1 = torch.tensor([[events[e].odd_share] for _, e in conditions])
    gap_sd_C11 = torch.hypot(sampling_C1, uneven_C1).double().unsqueeze(2)
    decay_P = torch.tensor([beta for beta, _ in policies])
    noise_CE1 = torch.from_numpy(rng.standard_normal((len(conditions), EXPERTS, 1)))
    start_CEP = normal_logit(torch.tensor(RATE, dtype=torch.float64)) + noise_CE1 * (
        gap_sd_C11 * ((1 - decay_P) / (1 + decay_P)).sqrt()
    )
    mean_size_of_normal = math.sqrt(2.0 / math.pi)
    thresholds = GuardedThresholds(
        policies, start_CEP, (mean_size_of_normal * gap_sd_C11).expand_as(start_CEP)
    )
    for start in range(0, batches, CHUNK):
        batch_S = torch.arange(start, min(start + CHUNK, batches), dtype=torch.float64)
        still = torch.stack([batch_deviates(rng, size, len(batch_S)) for size in sizes], dim=1)
        ends = still.new_tensor([-math.inf, math.inf]).expand(*still.shape[:-1], 2)
        still_SNEK = torch.cat([still, ends], dim=-1)
        mean_SCE, sd_SCE = (
            torch.stack(
                [getattr(events[e], what)(batch_S).expand(-1, EXPERTS) for _, e in conditions],
                dim=1,
            )
            for what in ("mean", "sd")
        )
        offset_SCE = torch.from_numpy(rng.standard_normal(mean_SCE.shape)) * uneven_C1
        odd_SCE = torch.from_numpy(rng.random(mean_SCE.shape)) < odd_C1
        offset_SCE += odd_SCE * torch.from_numpy(rng.standard_normal(mean_SCE.shape))
        for s in range(len(batch_S)):
            mean_CE1, sd_CE1 = mean_SCE[s].unsqueeze(2), sd_SCE[s].unsqueeze(2)
            errors_CEP = normal_tail((thresholds.value - mean_CE1) / sd_CE1) / RATE - 1.0
            logits_CEK = mean_CE1 + offset_SCE[s].unsqueeze(2) + sd_CE1 * still_SNEK[s, of_size]
            middle = len(BANDS)
            restarts, clamps = thresholds.update(
                logits_CEK[..., middle : middle + 1], logits_CEK[..., lower_P], logits_CEK[..., upper_P]
            )
            yield Step(start + s, errors_CEP, restarts, clamps)


def recovery(
    policies: Sequence[tuple[float, Guard]],
    sizes: Sequence[int],
    events: Sequence[Event],
    batches: int,
    seed: int,
) -> list[list[dict[str, Any]]]:
    """Per condition and policy: how long and how far loads are off after an event at batch 0.

    `within_0.1`: batches until the mean over experts of |load error| stays below 10 % (None: not by the end);
    `violation_first` and `_later`, `starvation_later`: largest (least) load error of an expert at batch 0 and
    after; `excess`: sum over batches of what the mean exceeds 10 % by; `restarts` per expert.
    """
    shape = (len(sizes) * len(events), len(policies))
    last, excess, restarts = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    most, least = (
        torch.full(shape, -1.0, dtype=torch.float64),
        torch.full(shape, math.inf, dtype=torch.float64),
    )
    first = most
    for step in simulate(policies, sizes, events, batches, seed):
        mean_CP = step.errors_CEP.abs().mean(dim=1)
        last = torch.where(mean_CP > 0.1, step.batch + 1.0, last)
        excess += (mean_CP - 0.1).clamp(min=0.0)
        restarts += step.restarts_CEP.double().mean(dim=1)
        if step.batch == 0:
            first = step.errors_CEP.amax(dim=1)
        else:
            most = torch.maximum(most, step.errors_CEP.amax(dim=1))
            least = torch.minimum(least, step.errors_CEP.amin(dim=1))
    return [
        [
            {
                "within_0.1": int(last[c, p]) if last[c, p] < batches else None,
                "violation_first": first[c, p].item(),
                "violation_later": most[c, p].item(),
                "starvation_later": least[c, p].item(),
                "excess": excess[c, p].item(),
                "restarts": restarts[c, p].item(),
            }
            for p in range(shape[1])
        ]
        for c in range(shape[0])
    ]


def stationary(
    policies: Sequence[tuple[float, Guard]],
    sizes: Sequence[int],
    events: Sequence[Event],
    batches: int,
    seed: int,
) -> list[list[dict[str, Any]]]:
    """Per condition and policy, without an event: load rms error, alarms per million (expert, batch)."""
    shape = (len(sizes) * len(events), len(policies))
    squares, restarts, clamps = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    for step in simulate(policies, sizes, events, batches, seed):
        squares += step.errors_CEP.square().mean(dim=1)
        restarts += step.restarts_CEP.double().mean(dim=1)
        clamps += step.clamps_CEP.double().mean(dim=1)
    return [
        [
            {
                "load_rms": (squares[c, p] / batches).sqrt().item(),
                "restarts_per_million": 1e6 * restarts[c, p].item() / batches,
                "clamps_per_million": 1e6 * clamps[c, p].item() / batches,
                "samples": batches * EXPERTS,
            }
            for p in range(shape[1])
        ]
        for c in range(shape[0])
    ]
