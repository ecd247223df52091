"""What a training writes for `report` and `watch`: the trace (et_trace.jsonl), the numbers of every expert at
each logged step, written a line at a time and read into arrays; and the names of tags in TensorBoard files.

S logged steps, E routed experts, F fan-out bins (0 .. largest fan-out seen, at most E).
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_et import __version__
from megatron_et.observe.rules import Observation, Row

TRACE_NAME = "et_trace.jsonl"
TRACE_SCHEMA = 1
PHASES = ("warmup", "anneal", "threshold")

# Megatron's tags (megatron/training/training.py: training_log and evaluate_and_print_results).
TRAINING_LOSS = "lm loss"
VALIDATION_LOSS = "lm loss validation"
SECONDS_PER_STEP = "iteration-time"
BY_SAMPLES = " vs samples"
# Text that this package logs beside Megatron's arguments (host/tensorboard.py).
OWN_TEXT = "megatron_et/"
ALARM_TEXT = "megatron_et/alarms"
VERSIONS_TEXT = "megatron_et/versions"

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]


class ReportError(ValueError):
    """A run, or a file of it, that cannot be reported."""


def append(folder: Path, observation: Observation, num_experts: int, layers: Mapping[int, Any]) -> None:
    """Append one logged step, `layers` holding LayerBatch.trace() of each layer by its number.

    A last line that a killed process left unfinished is dropped first. Raises OSError.
    """
    line = {
        "schema": TRACE_SCHEMA,
        "step": observation.step,
        "phase": observation.phase,
        "tokens": observation.tokens,
        "topk": observation.topk,
        "num_experts": num_experts,
        "layers": {str(number): values for number, values in layers.items()},
    }
    append_line(folder / TRACE_NAME, json.dumps(line))


def append_line(path: Path, line: str) -> None:
    """Append a line; a last line that a killed process left unfinished is dropped first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode() + b"\n")


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
    restarted_S: Ints

    def row(self, step: int) -> Row:
        """One of its logged steps."""
        i = int(np.searchsorted(self.steps_S, step))
        vectors = (self.usage_SE[i], self.threshold_SE[i], self.cutoff_SE[i], self.at_bound_SE[i])
        return Row(*vectors, int(self.restarted_S[i]))


@dataclass(frozen=True)
class Trace:
    """All traced layers of a run; `phases_S` and `tokens_S` (tokens of one step) are those of `steps_S`."""

    topk: int
    num_experts: int
    steps_S: Ints
    phases_S: NDArray[np.str_]
    tokens_S: Ints
    layers: dict[int, LayerTrace]

    def observations(self) -> Iterator[Observation]:
        """What alarms are raised from: the logged steps that all layers have."""
        common_S = reduce(np.intersect1d, (traced.steps_S for traced in self.layers.values()))
        for step in common_S:
            i = int(np.searchsorted(self.steps_S, step))
            rows = {number: traced.row(int(step)) for number, traced in self.layers.items()}
            yield Observation.of(int(step), str(self.phases_S[i]), int(self.tokens_S[i]), self.topk, rows)


@dataclass(frozen=True)
class LayerRecord(Row):
    """One layer of a line."""

    step: int
    phase: str
    fanout_histogram_F: Ints


@dataclass(frozen=True)
class Record:
    """One line of a trace."""

    step: int
    phase: str
    tokens: int
    topk: int
    num_experts: int
    layers: dict[int, LayerRecord]

    def observation(self) -> Observation:
        """As alarms are raised from."""
        return Observation.of(self.step, self.phase, self.tokens, self.topk, self.layers)


def read_traces(files: Sequence[Path], warnings: list[str]) -> Trace | None:
    """Merge traces in the given order; None when they hold no step.

    A file's last line is skipped with a warning when it is cut (a killed process).

    Raises:
        ReportError: any other malformed line, an unknown schema, or another number of experts or top-k than
            in the first line; names file and line.
    """
    layers: dict[int, list[LayerRecord]] = {}
    logged: dict[int, Record] = {}
    first: Record | None = None
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
        warnings.append(abandoned("trace", steps[-1], furthest))
    return Trace(
        topk=first.topk,
        num_experts=first.num_experts,
        steps_S=np.array(steps, dtype=np.int64),
        phases_S=np.array([logged[step].phase for step in steps]),
        tokens_S=np.array([logged[step].tokens for step in steps], dtype=np.int64),
        layers={layer: _stack(layers[layer]) for layer in sorted(layers)},
    )


def _records(path: Path, warnings: list[str]) -> Iterable[tuple[str, Record]]:
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
                yield where, parse_record(fields)
            except KeyError as error:
                raise ReportError(f"{where}: field {error} is missing") from error
            except (TypeError, ValueError, AttributeError) as error:
                raise ReportError(f"{where}: {error}") from error


def parse_record(fields: Any) -> Record:
    """A line of a trace from its JSON.

    Raises:
        KeyError: a field is missing.
        TypeError, ValueError, AttributeError: a field is malformed, or the schema another one.
    """
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
    return Record(step, phase, int(fields["tokens"]), int(fields["topk"]), E, layers)


def _parse_layer(step: int, phase: str, E: int, values: dict[str, Any]) -> LayerRecord:
    histogram = _vector("fanout_histogram", values["fanout_histogram"], E + 1).astype(np.int64)
    if not (histogram >= 0).all():
        raise ValueError("fanout_histogram holds a negative count")
    return LayerRecord(
        step=step,
        phase=phase,
        # float32: traces of big runs hold 10^8 values. Usage and thresholds are float32 where they come from.
        usage_E=_vector("usage", values["usage"], E).astype(np.float32),
        threshold_E=_vector("threshold", values["threshold"], E).astype(np.float32),
        cutoff_E=_vector("cutoff", values["cutoff"] or [None] * E, E).astype(np.float32),
        at_bound_E=_vector("at_bound", values["at_bound"], E).astype(np.float32),
        # Older traces lack it.
        restarted=int(values.get("restarted", 0)),
        fanout_histogram_F=histogram[: np.max(np.nonzero(histogram), initial=0) + 1],
    )


def _vector(name: str, values: Any, length: int) -> NDArray[np.float64]:
    vector = np.array(values, dtype=np.float64)
    if vector.shape != (length,):
        raise ValueError(f"{name} has shape {vector.shape}, expected {length} numbers")
    return vector


def _stack(records: list[LayerRecord]) -> LayerTrace:
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
        restarted_S=np.array([record.restarted for record in records], dtype=np.int64),
    )


def abandoned(where: str, last: int, furthest: int) -> str:
    """A warning about steps that belong to weights that no longer exist."""
    return (
        f"{where}: the run was resumed from before step {furthest} and has reached step {last} so far; "
        f"steps {last + 1} to {furthest} of an earlier start are left out"
    )
