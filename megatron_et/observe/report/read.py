"""What a run left behind, read into arrays: TensorBoard event files and traces (et_trace.jsonl).

Both may hold several starts of one run. A start that resumes from a checkpoint writes some steps a second
time: the later written values win, and what an earlier start wrote for steps after the resume is dropped,
since those steps belong to weights that no longer exist.

S logged steps.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_et.observe.trace import (
    BY_SAMPLES,
    OWN_TEXT,
    TRACE_NAME,
    TRAINING_LOSS,
    VALIDATION_LOSS,
    VERSIONS_TEXT,
    Floats,
    Ints,
    ReportError,
    Trace,
    abandoned,
    read_traces,
)


@dataclass(frozen=True)
class Series:
    """One scalar over training steps, ascending."""

    steps_S: Ints
    values_S: Floats


@dataclass(frozen=True)
class TensorBoard:
    """Scalars of a run by tag, and Megatron's arguments as the text that it logs at start-up.

    `samples` counts the sequences consumed at the last logged step.
    """

    scalars: dict[str, Series] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    samples: int | None = None
    versions: str | None = None
    """Of the packages that trained, as megatron_et logs them."""

    def validation_losses(self) -> dict[str, Series]:
        """Series by name: 'validation', or 'validation-NAME' for each of several validation sets."""
        pattern = re.compile(f"{VALIDATION_LOSS}(-(?!.* ppl$).*)?")
        prefix = TRAINING_LOSS + " "
        return {t.removeprefix(prefix): s for t, s in self.scalars.items() if pattern.fullmatch(t)}

    def argument(self, name: str) -> int | None:
        """An integer argument of the run, None when it was not logged or is not an integer."""
        text = self.arguments.get(name, "")
        return int(text) if text.isdecimal() else None


@dataclass(frozen=True)
class RunData:
    """Everything read from one run; `missing` and `warnings` are sentences for the reader of the report."""

    name: str
    tensorboard: TensorBoard
    trace: Trace | None
    missing: list[str]
    warnings: list[str]


def read_run(run: Path, tensorboard_dir: Path | None = None, trace: Path | None = None) -> RunData:
    """Read a run directory; `tensorboard_dir` and `trace` are looked at instead of the directory where given.

    Raises:
        ReportError: a path does not exist, a trace is malformed, or there is neither a trace nor a scalar.
    """
    for folder in [run] if tensorboard_dir is None else [run, tensorboard_dir]:
        if not folder.is_dir():
            raise ReportError(f"{folder} is not a folder: give the folder that holds the run's logs")
    if trace is not None and not trace.is_file():
        raise ReportError(f"{trace} is not a file: --trace takes one {TRACE_NAME}")
    event_folder = tensorboard_dir or run
    event_files = sorted(path for path in event_folder.rglob("*tfevents*") if path.is_file())
    trace_files = [trace] if trace else sorted(run.rglob(TRACE_NAME), key=lambda path: path.stat().st_mtime)

    warnings: list[str] = []
    if len({path.parent for path in event_files}) > 1:
        warnings.append(
            "TensorBoard files of several folders were read as one run; --tensorboard-dir picks one"
        )
    if len(trace_files) > 1:
        warnings.append(
            f"{len(trace_files)} traces were read as one run, oldest file first; --trace picks one"
        )
    tensorboard = read_tensorboard(event_files, warnings)
    traced = read_traces(trace_files, warnings)
    missing = []
    if not tensorboard.scalars:
        missing.append("no TensorBoard scalars: no losses (Megatron writes them with --tensorboard-dir)")
    if traced is None:
        missing.append(f"no {TRACE_NAME}: no phases, alarms, single experts, cutoffs or fan-out histograms")
    if len(missing) == 2:
        raise ReportError(
            f"nothing to report: no TensorBoard scalars in or below {event_folder} and no trace steps in "
            f"{trace or f'any {TRACE_NAME} in or below {run}'}"
        )
    return RunData(run.resolve().name, tensorboard, traced, missing, warnings)


# --- TensorBoard ---


@dataclass(frozen=True)
class _EventFile:
    started: float  # seconds since the epoch
    points: dict[str, list[tuple[int, float]]]
    arguments: dict[str, str]


def read_tensorboard(files: Iterable[Path], warnings: list[str]) -> TensorBoard:
    """Merge event files in the order in which they were started; files without scalars are passed over."""
    merged: dict[str, dict[int, float]] = {}
    arguments: dict[str, str] = {}
    samples: int | None = None
    furthest = 0
    loaded = [events for path in files if (events := _load_events(path)) is not None]
    for events in sorted(loaded, key=lambda events: events.started):
        arguments |= events.arguments
        if TRAINING_LOSS in events.points:
            # Training ran from here in this start: what earlier starts wrote from here on was abandoned.
            resumed_at = min(step for step, _ in events.points[TRAINING_LOSS])
            merged = {
                tag: {step: value for step, value in points.items() if step < resumed_at}
                for tag, points in merged.items()
            }
            furthest = max(furthest, *(step for step, _ in events.points[TRAINING_LOSS]))
            by_samples = events.points.get(TRAINING_LOSS + BY_SAMPLES, [])
            samples = max((count for count, _ in by_samples), default=samples)
        for tag, points in events.points.items():
            if tag.endswith(BY_SAMPLES):
                continue
            if tag.startswith(VALIDATION_LOSS):
                # At the end of training Megatron logs the test loss under the validation tag, at the same
                # step and after the validation loss: the first value of a step is the validation loss.
                points = points[::-1]
            merged.setdefault(tag, {}).update(points)
    last = max(merged.get(TRAINING_LOSS, {}), default=0)
    if last < furthest:
        warnings.append(abandoned("TensorBoard files", last, furthest))
    scalars = {tag: _series(points) for tag, points in merged.items() if points}
    versions = arguments.get(VERSIONS_TEXT)
    arguments = {name: value for name, value in arguments.items() if not name.startswith(OWN_TEXT)}
    return TensorBoard(scalars, arguments, samples, versions)


def _load_events(path: Path) -> _EventFile | None:
    accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    if not tags["scalars"]:
        return None
    points = {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in tags["scalars"]}
    suffix = "/text_summary"
    arguments = {
        tag.removesuffix(suffix): accumulator.Tensors(tag)[-1]
        .tensor_proto.string_val[0]
        .decode(errors="replace")
        for tag in tags["tensors"]
        if tag.endswith(suffix)
    }
    return _EventFile(accumulator.FirstEventTimestamp(), points, arguments)


def _series(points: dict[int, float]) -> Series:
    steps = sorted(points)
    return Series(
        np.array(steps, dtype=np.int64), np.array([points[step] for step in steps], dtype=np.float64)
    )
