"""What is known of a watched run: its last logged steps, its alarms, its losses.

L MoE layers.
"""

import importlib.util
import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_et.observe.alarms import Monitor
from megatron_et.observe.rules import Array, Observation
from megatron_et.observe.trace import TRACE_NAME, TRAINING_LOSS, parse_record
from megatron_et.observe.watch.tail import LineTail, RecordTail

KEPT_STEPS = 400
"""Logged steps whose numbers are kept for the view."""
KEPT_OBSERVATIONS = 64
"""Logged steps that alarms are raised from anew when the run resumes from an earlier one."""
LOOK_AGAIN = 15.0
"""Seconds between two searches for files that were not there: a run's folder may be large and far away."""
DEPTH = 4
"""Folders below the run's that are searched."""
BUDGET = 0.5
"""Seconds of one look that go into event files."""
SCALARS = (
    "expert_usage_min",
    "expert_usage_mean",
    "expert_usage_max",
    "fanout_mean",
    "cutoff_gap",
    "dead_experts",
)
"""Metrics of a layer that the view shows."""

HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None
"""Event files cannot be read without it."""

_SCALAR = re.compile(rf"moe/({'|'.join(SCALARS)})_layer_(\d+)")


@dataclass(frozen=True)
class Step:
    """One logged step. Phase None: not known without a trace."""

    step: int
    phase: str | None
    layers: tuple[int, ...]
    metrics: dict[str, Array]
    """Each of SCALARS, [L]; NaN where it is unknown."""


@dataclass
class Watched:
    """A run that is being watched; `look` reads what is new."""

    run: Path
    tensorboard_dir: Path | None = None
    trace: Path | None = None

    steps: deque[Step] = field(default_factory=lambda: deque(maxlen=KEPT_STEPS))
    losses: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=KEPT_STEPS))
    monitor: Monitor = field(default_factory=Monitor)
    topk: float | None = None
    target: float | None = None
    """Share of the tokens that each expert should take."""
    alarms_logged: int | None = None
    """Number of alarms as logged in training; only looked at without a trace."""
    news_at: float | None = None
    """time.time() at which a file was last written to."""
    malformed: int = 0
    """Lines of the trace that were skipped."""

    def __post_init__(self) -> None:
        self._trace: LineTail | None = None
        self._events: dict[Path, RecordTail] = {}
        self._observations: deque[Observation] = deque(maxlen=KEPT_OBSERVATIONS)
        self._searched = -LOOK_AGAIN
        self._scalars: dict[int, dict[tuple[str, int], float]] = {}

    @property
    def last(self) -> Step | None:
        """The last logged step."""
        return self.steps[-1] if self.steps else None

    @property
    def has_trace(self) -> bool:
        """Whether a trace was found; else numbers come from event files."""
        return self._trace is not None

    @property
    def sources(self) -> list[Path]:
        """Files that are read."""
        return ([self._trace.path] if self._trace else []) + list(self._events)

    @property
    def more(self) -> bool:
        """Whether files hold more than the last look could take in."""
        return any(tail.more for tail in self._events.values())

    def look(self) -> None:
        """Read what is new in the run's files; search for files that are not known yet now and then."""
        if time.monotonic() - self._searched >= LOOK_AGAIN:
            self._search()
            self._searched = time.monotonic()
        if self._trace is not None:
            self._read_trace(self._trace)
        deadline = time.monotonic() + BUDGET
        for tail in self._events.values():
            for record in tail.look(deadline):
                self._take_event(record)
        if not self.has_trace:
            self._collect_scalars()
        self.news_at = max(map(_written_at, self.sources), default=None)

    # --- files ---

    def _search(self) -> None:
        trace = self.trace or newest(found(self.run, lambda name: name == TRACE_NAME))
        known = self._trace.path if self._trace else None
        if trace is not None and trace != known and trace.exists():
            self._forget()
            self._trace = LineTail(trace)
        if not HAS_TENSORBOARD:
            return
        # Without a trace every metric is read from the event files: that is many more records.
        needles = [TRAINING_LOSS.encode()] if self.has_trace else [TRAINING_LOSS.encode(), b"moe/"]
        folder = self.tensorboard_dir or self.run
        for path in sorted(found(folder, lambda name: "tfevents" in name), key=lambda path: path.name):
            self._events.setdefault(path, RecordTail(path, needles)).needles = needles

    def _forget(self) -> None:
        """Another trace than before: its steps have nothing to do with those known so far."""
        self.steps.clear()
        self._observations.clear()
        self.monitor = Monitor()

    # --- trace ---

    def _read_trace(self, tail: LineTail) -> None:
        news = tail.look()
        if news.fresh:
            self._forget()
        for line in news.lines:
            if not line.strip():
                continue
            try:
                record = parse_record(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                self.malformed += 1
                continue
            if record.layers:
                self._take(record.observation())

    def _take(self, seen: Observation) -> None:
        """One more logged step; a step that is not later is a resume, and what lay behind it is gone."""
        if self.steps and seen.step <= self.steps[-1].step:
            _drop(self.steps, seen.step)
            kept = [old for old in self._observations if old.step < seen.step]
            self._observations = deque(kept, KEPT_OBSERVATIONS)
            self.monitor = Monitor()
            for old in kept:
                self.monitor.observe(old)
        self._observations.append(seen)
        self.monitor.observe(seen)
        self.topk, self.target = seen.topk, seen.topk / seen.usage_LE.shape[1]
        self.steps.append(Step(seen.step, seen.phase, seen.layers, metrics_of(seen)))

    # --- event files ---

    def _take_event(self, record: bytes) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        event = Event.FromString(record)
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                self._take_scalar(event.step, value.tag, value.simple_value)

    def _take_scalar(self, step: int, tag: str, value: float) -> None:
        if tag == TRAINING_LOSS:
            while self.losses and self.losses[-1][0] >= step:
                self.losses.pop()
            self.losses.append((step, value))
        elif self.has_trace:
            return
        elif tag == "moe/expert_usage_target":
            self.target = value
        elif tag == "moe/fanout_target":
            self.topk = value
        elif tag == "moe/alarms":
            self.alarms_logged = int(value)
        elif match := _SCALAR.fullmatch(tag):
            self._scalars.setdefault(step, {})[match[1], int(match[2])] = value

    def _collect_scalars(self) -> None:
        """Steps from the scalars read so far; those of one step are written together."""
        for step, values in self._scalars.items():
            known = {}
            if self.steps and self.steps[-1].step == step:
                last = self.steps.pop()
                known = {
                    (name, layer): float(vector[i])
                    for name, vector in last.metrics.items()
                    for i, layer in enumerate(last.layers)
                }
            _drop(self.steps, step)
            values = known | values
            layers = tuple(sorted({layer for _, layer in values}))
            metrics = {
                name: np.array([values.get((name, layer), np.nan) for layer in layers]) for name in SCALARS
            }
            self.steps.append(Step(step, None, layers, metrics))
        self._scalars = {}


def metrics_of(seen: Observation) -> dict[str, Array]:
    """Each of SCALARS, [L]."""
    gap_LE = np.ma.masked_invalid(np.abs(seen.cutoff_LE - seen.threshold_LE))
    return {
        "expert_usage_min": seen.usage_LE.min(axis=1),
        "expert_usage_mean": seen.usage_LE.mean(axis=1),
        "expert_usage_max": seen.usage_LE.max(axis=1),
        "fanout_mean": seen.usage_LE.sum(axis=1),
        "cutoff_gap": gap_LE.mean(axis=1).filled(np.nan),
        "dead_experts": (seen.usage_LE == 0).sum(axis=1),
    }


def found(folder: Path, wanted: Callable[[str], bool], depth: int = DEPTH) -> Iterator[Path]:
    """Files below a folder whose name is wanted; checkpoints, which are large, are not looked into."""
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            if depth > 0 and not entry.name.startswith("iter_"):
                yield from found(Path(entry.path), wanted, depth - 1)
        elif wanted(entry.name):
            yield Path(entry.path)


def newest(paths: Iterable[Path]) -> Path | None:
    """The file that was written to last."""
    return max(paths, key=_written_at, default=None)


def _written_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _drop(steps: deque[Step], step: int) -> None:
    while steps and steps[-1].step >= step:
        steps.pop()
