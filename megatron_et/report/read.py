"""What a run left behind, read into arrays: TensorBoard event files and traces (et_trace.jsonl).

Both may hold several starts of one run. A start that resumes from a checkpoint writes some steps a second
time: the later written values win, and what an earlier start wrote for steps after the resume is dropped,
since those steps belong to weights that no longer exist.

S logged steps, E routed experts, F fan-out bins (0 .. largest fan-out seen, at most E).
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_et import __version__
from megatron_et.report import ReportError

TRACE_NAME = "et_trace.jsonl"
TRACE_SCHEMA = 1
PHASES = ("warmup", "anneal", "threshold")

# Tags that Megatron writes (megatron/training/training.py: training_log and evaluate_and_print_results).
TRAINING_LOSS = "lm loss"
VALIDATION_LOSS = "lm loss validation"
SECONDS_PER_STEP = "iteration-time"
BY_SAMPLES = " vs samples"

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]


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
class LayerTrace:
    """One MoE layer over its logged steps. Usage and at_bound are shares; thresholds and cutoffs are logits.

    NaN where the trace has null (no cutoff yet).
    """

    steps_S: Ints
    phases_S: NDArray[np.str_]
    usage_SE: Floats
    threshold_SE: Floats
    cutoff_SE: Floats
    at_bound_SE: Floats
    fanout_histogram_SF: Ints


@dataclass(frozen=True)
class Trace:
    """All traced layers of a run; `phases_S` and `tokens_S` (tokens of one step) are those of `steps_S`."""

    topk: int
    num_experts: int
    steps_S: Ints
    phases_S: NDArray[np.str_]
    tokens_S: Ints
    layers: dict[int, LayerTrace]


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
        missing.append(f"no {TRACE_NAME}: no phases, single experts, cutoffs or fan-out histograms")
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
        warnings.append(_abandoned("TensorBoard files", last, furthest))
    return TensorBoard({tag: _series(points) for tag, points in merged.items() if points}, arguments, samples)


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


def _abandoned(where: str, last: int, furthest: int) -> str:
    return (
        f"{where}: the run was resumed from before step {furthest} and has reached step {last} so far; "
        f"steps {last + 1} to {furthest} of an earlier start are left out"
    )


# --- traces ---


@dataclass(frozen=True)
class _LayerRecord:
    step: int
    phase: str
    usage_E: Floats
    threshold_E: Floats
    cutoff_E: Floats
    at_bound_E: Floats
    fanout_histogram_F: Ints


@dataclass(frozen=True)
class _Record:
    """One line of a trace."""

    step: int
    phase: str
    tokens: int
    topk: int
    num_experts: int
    layers: dict[int, _LayerRecord]


def read_traces(files: Sequence[Path], warnings: list[str]) -> Trace | None:
    """Merge traces in the given order; None when they hold no step.

    A file's last line is skipped with a warning when it is cut (a killed process).

    Raises:
        ReportError: any other malformed line, an unknown schema, or another number of experts or top-k than
            in the first line; names file and line.
    """
    layers: dict[int, list[_LayerRecord]] = {}
    logged: dict[int, _Record] = {}
    first: _Record | None = None
    furthest = 0
    for path in files:
        for where, record in _records(path, warnings):
            first = first or record
            if (record.num_experts, record.topk) != (first.num_experts, first.topk):
                raise ReportError(
                    f"{where}: num_experts {record.num_experts} and topk {record.topk}, but the run began "
                    f"with {first.num_experts} and {first.topk}: report the two runs one by one with --trace"
                )
            logged[record.step] = record
            furthest = max(furthest, record.step)
            for layer, values in record.layers.items():
                kept = layers.setdefault(layer, [])
                while kept and kept[-1].step >= record.step:
                    kept.pop()
                kept.append(values)
    if first is None or not layers:
        return None
    steps = sorted({values.step for kept in layers.values() for values in kept})
    if steps[-1] < furthest:
        warnings.append(_abandoned("trace", steps[-1], furthest))
    return Trace(
        topk=first.topk,
        num_experts=first.num_experts,
        steps_S=np.array(steps, dtype=np.int64),
        phases_S=np.array([logged[step].phase for step in steps]),
        tokens_S=np.array([logged[step].tokens for step in steps], dtype=np.int64),
        layers={layer: _stack(layers[layer]) for layer in sorted(layers)},
    )


def _records(path: Path, warnings: list[str]) -> Iterable[tuple[str, _Record]]:
    """Pairs of ('FILE, line N', record)."""
    with path.open("rb") as file:
        lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        following = next(lines, None)
        while following is not None:
            number, line = following
            following = next(lines, None)
            where = f"{path}, line {number}"
            try:
                fields = json.loads(line)
            except ValueError as error:
                if following is None:
                    warnings.append(f"{path.name}, line {number}: the last line is cut and was skipped")
                    return
                raise ReportError(f"{where}: not JSON ({error}): remove or repair the line") from error
            try:
                yield where, _parse(fields)
            except KeyError as error:
                raise ReportError(f"{where}: field {error} is missing") from error
            except (TypeError, ValueError, AttributeError) as error:
                raise ReportError(f"{where}: {error}") from error


def _parse(fields: Any) -> _Record:
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, got {type(fields).__name__}")
    if fields["schema"] != TRACE_SCHEMA:
        raise ValueError(
            f"trace schema {fields['schema']!r}, but megatron_et {__version__} reads schema {TRACE_SCHEMA}: "
            "report with the version of megatron_et that wrote the trace"
        )
    step, phase, E = int(fields["step"]), fields["phase"], int(fields["num_experts"])
    if phase not in PHASES:
        raise ValueError(f"phase is {phase!r}, expected one of {', '.join(PHASES)}")
    layers = {int(n): _parse_layer(step, phase, E, values) for n, values in fields["layers"].items()}
    return _Record(step, phase, int(fields["tokens"]), int(fields["topk"]), E, layers)


def _parse_layer(step: int, phase: str, E: int, values: dict[str, Any]) -> _LayerRecord:
    histogram = _vector("fanout_histogram", values["fanout_histogram"], E + 1).astype(np.int64)
    if not (histogram >= 0).all():
        raise ValueError("fanout_histogram holds a negative count")
    return _LayerRecord(
        step=step,
        phase=phase,
        # float32: traces of big runs hold 10^8 values. Usage and thresholds are float32 where they come from.
        usage_E=_vector("usage", values["usage"], E).astype(np.float32),
        threshold_E=_vector("threshold", values["threshold"], E).astype(np.float32),
        cutoff_E=_vector("cutoff", values["cutoff"] or [None] * E, E).astype(np.float32),
        at_bound_E=_vector("at_bound", values["at_bound"], E).astype(np.float32),
        fanout_histogram_F=histogram[: np.max(np.nonzero(histogram), initial=0) + 1],
    )


def _vector(name: str, values: Any, length: int) -> NDArray[np.float64]:
    vector = np.array(values, dtype=np.float64)
    if vector.shape != (length,):
        raise ValueError(f"{name} has shape {vector.shape}, expected {length} numbers")
    return vector


def _stack(records: list[_LayerRecord]) -> LayerTrace:
    F = max(record.fanout_histogram_F.size for record in records)
    return LayerTrace(
        steps_S=np.array([record.step for record in records], dtype=np.int64),
        phases_S=np.array([record.phase for record in records]),
        usage_SE=np.stack([record.usage_E for record in records]),
        threshold_SE=np.stack([record.threshold_E for record in records]),
        cutoff_SE=np.stack([record.cutoff_E for record in records]),
        at_bound_SE=np.stack([record.at_bound_E for record in records]),
        fanout_histogram_SF=np.stack(
            [np.pad(h, (0, F - h.size)) for h in (r.fanout_histogram_F for r in records)]
        ),
    )
