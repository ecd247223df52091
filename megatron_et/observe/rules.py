"""Rules of the alarms: what the routing of a run shows that somebody should act on, and what to do about it.

Every rule is a function of the last WINDOW logged steps, and a row of RULES. Numpy only. docs/watching.md has
them in words.

Dimension letters: S logged steps of the window, L MoE layers, E routed experts.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

WINDOW = 20
"""Logged steps that the rules look back on."""
PATIENCE = 10
"""Logged steps in a row that make an alarm."""
LOAD_OFF = 0.5
"""Relative distance of one expert's load from the target: the band of the guard as recommended."""
FANOUT_OFF = 0.2
"""Relative distance of a layer's mean fan-out from the target."""
SAMPLING_SDS = 3.0
"""A load is off only beyond so many standard deviations of k tokens drawn by chance, 1 / sqrt(k) each."""
DEAD_TOKENS = 20.0
"""Tokens that a dead expert should have got meanwhile: chance withholds them once in 5e8 times."""
DRIFTING_EXPERTS = 4
"""At least so many, and half of the layer's: the sides of a cutoff that is followed are coin tosses, in one
layer not independent ones, and WINDOW equal tosses come once in 5e5 times."""
DRIFT_OFF = 0.1
"""Mean relative load error of those experts from which on their drift matters."""
AT_BOUND = 0.2
"""Share of (expert, micro-batch) pairs whose load a capacity bound decided."""
RESTARTING = 300
"""Steps over which the guard keeps restarting experts; it tells of each for 100 batches."""
SWITCH = 3
"""Logged steps right after the warm-up, in all of which loads are off by LOAD_OFF on average."""


@dataclass(frozen=True)
class Row:
    """One layer of an observation; the vectors are per expert."""

    usage_E: Array
    threshold_E: Array
    cutoff_E: Array
    at_bound_E: Array
    restarted: int


@dataclass(frozen=True)
class Observation:
    """What the routers of all layers did in one logged global batch."""

    step: int
    phase: str
    """warmup, anneal or threshold."""
    tokens: int
    topk: int
    layers: tuple[int, ...]
    """Numbers of the L layers."""
    usage_LE: Array
    """Share of the tokens that each expert took."""
    threshold_LE: Array
    """Logits; NaN before the first update."""
    cutoff_LE: Array
    """Logits; NaN where the batch had none."""
    at_bound_LE: Array
    """Share of the micro-batches in which a capacity bound decided the load."""
    restarted_L: Array
    """Experts that the guard restarted within the last 100 batches."""

    @classmethod
    def of(cls, step: int, phase: str, tokens: int, topk: int, rows: Mapping[int, Row]) -> "Observation":
        """From the rows of all layers by number; at least one."""
        usage_LE, threshold_LE, cutoff_LE, at_bound_LE = (
            np.stack([getattr(row, name) for row in rows.values()], dtype=np.float32, casting="same_kind")
            for name in ("usage_E", "threshold_E", "cutoff_E", "at_bound_E")
        )
        restarted_L = np.array([row.restarted for row in rows.values()])
        layers = tuple(rows)
        return cls(
            step, phase, tokens, topk, layers, usage_LE, threshold_LE, cutoff_LE, at_bound_LE, restarted_L
        )


@dataclass(frozen=True)
class Finding:
    """One rule holds in one layer at the end of a window."""

    row: int
    experts: list[int]
    since: int
    seen: str


class Window:
    """The last logged steps, stacked; at most WINDOW of them."""

    def __init__(self, steps: Sequence[Observation]) -> None:
        self._steps = steps
        self.now = steps[-1]
        self.target = self.now.topk / self.now.usage_LE.shape[1]
        """Share of the tokens that each expert should take."""
        self.k = self.now.tokens * self.target
        """Tokens that each expert should take."""

    def step(self, steps: int) -> int:
        """Training step of the last `steps` logged ones' first."""
        return self._steps[-steps].step

    def span(self, steps: int) -> str:
        """Which steps the last `steps` logged ones are."""
        return f"{steps} logged steps, {self.step(steps)} to {self.now.step}"

    def phases(self, steps: int) -> set[str]:
        """Of the last `steps` logged steps; empty where there are not so many."""
        return {seen.phase for seen in self._steps[-steps:]} if len(self._steps) >= steps else set()

    def __len__(self) -> int:
        return len(self._steps)

    def _stack(self, name: str) -> Array:
        return np.stack([getattr(seen, name) for seen in self._steps])

    @cached_property
    def load_SLE(self) -> Array:
        """Over the target."""
        return self._stack("usage_LE") / self.target

    @cached_property
    def gap_SLE(self) -> Array:
        """Cutoff less threshold, logits."""
        with np.errstate(invalid="ignore"):  # two infinities
            return self._stack("cutoff_LE") - self._stack("threshold_LE")

    @cached_property
    def at_bound_SL(self) -> Array:
        """Mean over experts."""
        return np.stack([seen.at_bound_LE.mean(axis=1) for seen in self._steps])


# --- rules ---


def dead(window: Window) -> Iterator[Finding]:
    """Experts without any token."""
    steps = max(PATIENCE, math.ceil(DEAD_TOKENS / window.k))
    if len(window) < steps:
        return
    dead_LE = (window.load_SLE[-steps:] == 0.0).all(axis=0)
    for row in np.flatnonzero(dead_LE.any(axis=1)):
        experts = np.flatnonzero(dead_LE[row]).tolist()
        yield Finding(
            int(row),
            experts,
            window.step(steps),
            f"{listed(experts, 'expert')}: no token, target {_percent(window.target)} of tokens, "
            f"{window.span(steps)}",
        )


def load_off_target(window: Window) -> Iterator[Finding]:
    """Experts that get far more or far fewer tokens than they should, all the time."""
    if window.phases(PATIENCE) != {"threshold"}:
        return
    load_SLE = window.load_SLE[-PATIENCE:]
    far = max(LOAD_OFF, SAMPLING_SDS / math.sqrt(window.k))
    # No token at all is the rule above.
    off_LE = (load_SLE > 1 + far).all(axis=0) | ((load_SLE < 1 - far).all(axis=0) & load_SLE.any(axis=0))
    for row in np.flatnonzero(off_LE.any(axis=1)):
        experts = np.flatnonzero(off_LE[row])
        load_E = load_SLE[:, row, experts].mean(axis=0)
        worst_first = np.argsort(-np.abs(np.log(load_E)), kind="stable")
        yield Finding(
            int(row),
            experts[worst_first].tolist(),
            window.step(PATIENCE),
            f"{listed(experts[worst_first].tolist(), 'expert')}: load {_span(load_E)} times the target of "
            f"{_percent(window.target)} of tokens, mean of {window.span(PATIENCE)}",
        )


def fanout_off_target(window: Window) -> Iterator[Finding]:
    """Layers whose tokens get more or fewer experts than they should, on average."""
    if window.phases(PATIENCE) != {"threshold"}:
        return
    load_SL = window.load_SLE[-PATIENCE:].mean(axis=2)
    far = max(FANOUT_OFF, SAMPLING_SDS / math.sqrt(window.k * window.load_SLE.shape[2]))
    off_L = (load_SL > 1 + far).all(axis=0) | (load_SL < 1 - far).all(axis=0)
    for row in np.flatnonzero(off_L):
        yield Finding(
            int(row),
            [],
            window.step(PATIENCE),
            f"mean fan-out {window.now.topk * load_SL[:, row].mean():.3g} experts per token, target "
            f"{window.now.topk}, mean of {window.span(PATIENCE)}",
        )


def thresholds_drifting(window: Window) -> Iterator[Finding]:
    """Layers whose thresholds are always on the same side of the cutoffs, and whose loads suffer."""
    phases = window.phases(WINDOW)
    if not phases or "warmup" in phases:
        return
    sign_SLE = np.sign(window.gap_SLE)
    lagging_LE = np.abs(sign_SLE.sum(axis=0)) == WINDOW
    error_LE = np.abs(window.load_SLE.mean(axis=0) - 1)
    E = lagging_LE.shape[1]
    for row in np.flatnonzero(lagging_LE.sum(axis=1) >= max(E / 2, DRIFTING_EXPERTS)):
        experts = np.flatnonzero(lagging_LE[row])
        error = error_LE[row, experts].mean()
        if error <= DRIFT_OFF:
            continue
        gap_SE = window.gap_SLE[:, row, experts]
        half = WINDOW // 2
        early, late = np.abs(gap_SE[:half]).mean(), np.abs(gap_SE[half:]).mean()
        falling = int((gap_SE[-1] < 0).sum())
        yield Finding(
            int(row),
            experts.tolist(),
            window.step(WINDOW),
            f"the cutoffs of {falling} of {E} experts always lay below their thresholds and of "
            f"{experts.size - falling} above, by {early:.3g} and then {late:.3g} logits; their load is off "
            f"by {_percent(error)} of the target; {window.span(WINDOW)}",
        )


def capacity_hit(window: Window) -> Iterator[Finding]:
    """Layers in which a capacity bound, not the threshold, often decides."""
    if window.phases(PATIENCE) != {"threshold"}:
        return
    at_bound_SL = window.at_bound_SL[-PATIENCE:]
    for row in np.flatnonzero((at_bound_SL > AT_BOUND).all(axis=0)):
        yield Finding(
            int(row),
            [],
            window.step(PATIENCE),
            f"a capacity bound decided {_percent(at_bound_SL[:, row].mean())} of the loads (experts x "
            f"micro-batches), mean of {window.span(PATIENCE)}",
        )


def guard_restarting(window: Window) -> Iterator[Finding]:
    """Layers in which the guard restarted an expert lately: an alarm only if that goes on (RULES)."""
    for row in np.flatnonzero(window.now.restarted_L > 0):
        yield Finding(
            int(row),
            [],
            window.now.step,
            f"the guard restarts experts again and again: {int(window.now.restarted_L[row])} of "
            f"{window.load_SLE.shape[2]} within 100 batches, at step {window.now.step}",
        )


def warmup_too_short(window: Window) -> Iterator[Finding]:
    """Layers whose thresholds were far from the cutoffs when they began to route."""
    if window.phases(SWITCH) != {"threshold"} or window.phases(SWITCH + 1) in (set(), {"threshold"}):
        return
    error_SL = np.abs(window.load_SLE[-SWITCH:] - 1).mean(axis=2)
    far = max(LOAD_OFF, SAMPLING_SDS / math.sqrt(window.k))
    for row in np.flatnonzero((error_SL > far).all(axis=0)):
        gap_SE = np.abs(window.gap_SLE[-SWITCH:, row])
        known = gap_SE[np.isfinite(gap_SE)]
        gap = f", and cutoffs {known.mean():.3g} logits from their thresholds" if known.size else ""
        yield Finding(
            int(row),
            [],
            window.step(SWITCH),
            f"in the first {SWITCH} logged steps after the warm-up loads were off by "
            f"{_percent(error_SL[:, row].mean())} of the target on average{gap}",
        )


@dataclass(frozen=True)
class Rule:
    """A rule, its name and its remedy; `lasting`: steps over which it must be found again and again."""

    name: str
    find: Callable[[Window], Iterator[Finding]]
    remedy: str
    lasting: int = 0


RULES = (
    Rule(
        "dead expert",
        dead,
        "its threshold sinks to its logits by itself within some 1 / (1 - beta) batches; --moe-et-guard 0.5 "
        "does it at once, a smaller --moe-et-ema-decay sooner. Dead for longer: its logits are all equal, "
        "look at the router's initialisation and the layer's input",
    ),
    Rule(
        "load off target",
        load_off_target,
        "the threshold is not where the expert's logits are now: --moe-et-guard 0.5 restarts it, a smaller "
        "--moe-et-ema-decay follows faster; --moe-et-capacity-factor 0.5 bounds the memory meanwhile",
    ),
    Rule(
        "fan-out off target",
        fanout_off_target,
        "thresholds lag behind the layer's logits: smaller --moe-et-ema-decay, after a jump --moe-et-guard "
        "0.5, right after the warm-up a longer --moe-et-warmup-steps. Below the target under "
        "--moe-et-max-fanout: that bound cuts tokens, raise it",
    ),
    Rule(
        "thresholds drifting",
        thresholds_drifting,
        "the EMA forgets too slowly for logits that move: smaller --moe-et-ema-decay (docs/choosing.md: by "
        "batch size and drift), or a longer --moe-et-warmup-steps while the network is young",
    ),
    Rule(
        "capacity hit too often",
        capacity_hit,
        "routing then depends on the other tokens of the pool, unlike in evaluation. Loads off target: "
        "smaller --moe-et-ema-decay, longer --moe-et-warmup-steps. Loads on target: the pool is small, "
        "--moe-et-pool global or a larger --moe-et-capacity-factor",
    ),
    Rule(
        "guard restarting often",
        guard_restarting,
        "the EMA cannot follow, or batches are uneven: smaller --moe-et-ema-decay; where cutoffs jump to and "
        "fro from batch to batch, a larger --moe-et-guard or none",
        lasting=RESTARTING,
    ),
    Rule(
        "warm-up too short",
        warmup_too_short,
        "resume from a checkpoint of the warm-up with a longer --moe-et-warmup-steps or a smaller "
        "--moe-et-ema-decay; --moe-et-warmup-anneal-steps makes the switch gradual",
    ),
)


# --- words ---


def listed(numbers: Sequence[int], noun: str, most: int = 6) -> str:
    """'expert 3', 'experts 3, 7' or 'experts 3, 7, ... and 5 more'."""
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"{noun}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:most]))}{more}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _span(values: Array) -> str:
    low, high = f"{values.min():.2f}", f"{values.max():.2f}"
    return low if low == high else f"{low} to {high}"
