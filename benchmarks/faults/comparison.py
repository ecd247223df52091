"""What training runs leave behind, compared to the bit: printed numbers, et_trace.jsonl, checkpoints.

Every `compare_*` returns one sentence per difference and an empty list when there is none.
"""

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

TRACE_FILE = "et_trace.jsonl"
TRACKER = "latest_checkpointed_iteration.txt"
# Ranks share one log: messages may be glued together but each is whole, so nothing anchors at a line's start.
STEP = re.compile(r" iteration +(\d+)/ +\d+ \|[^\n]*?lm loss: (\S+)[^\n]*?grad norm: (\S+) \|")
VALIDATION = re.compile(r"validation loss at (iteration \d+[^|\n]*?) *\| lm loss value: (\S+)")
# The saved command line differs on purpose: --exit-interval, folders.
COMMAND_LINE = "common_state"


@dataclass(frozen=True)
class Printed:
    """The numbers in a run's output, as the text that was printed."""

    losses: Mapping[int, str]
    grad_norms: Mapping[int, str]
    evaluations: Mapping[str, str]

    @classmethod
    def parse(cls, output: str) -> "Printed":
        """Read one run's output."""
        steps = STEP.findall(output)
        return cls(
            losses={int(step): loss for step, loss, _ in steps},
            grad_norms={int(step): norm for step, _, norm in steps},
            evaluations=dict(VALIDATION.findall(output)),
        )


def compare_printed(expected: Printed, actual: Printed, resumed_from: int) -> list[str]:
    """Losses, gradient norms and evaluations of a run that resumed from a checkpoint (0: from scratch)."""
    # The second loss that a process prints is the mean of its first two (training_log keeps its sums once):
    # it compares with the reference, which has the same, only when both started from scratch.
    averaged = {2, resumed_from + 2} if resumed_from > 0 else set()
    losses = {step: loss for step, loss in actual.losses.items() if step not in averaged}
    return [
        *_compare_values("loss of step", expected.losses, losses),
        *_compare_values("gradient norm of step", expected.grad_norms, actual.grad_norms),
        *_compare_values("evaluation at", expected.evaluations, actual.evaluations),
    ]


def _compare_values(what: str, expected: Mapping[Any, str], actual: Mapping[Any, str]) -> list[str]:
    return [
        f"{what} {key}: {value}, in the reference {expected.get(key, 'missing')}"
        for key, value in actual.items()
        if expected.get(key) != value
    ]


@dataclass(frozen=True)
class Trace:
    """A trace file: its records as text, in order, and what is not a record."""

    records: list[tuple[int, str]]
    broken: list[int]
    """Numbers of lines that are no record, an unfinished last line aside."""
    unfinished: bool
    """Whether the last line lacks its end: the writer was killed in it, the next one drops it."""

    @classmethod
    def read(cls, path: Path) -> "Trace":
        """Read a trace file; a missing one is empty."""
        text = path.read_text(errors="replace") if path.is_file() else ""
        *lines, last = text.split("\n")
        records, broken = [], []
        for number, line in enumerate(lines, start=1):
            step = _step_of(line)
            if step is None:
                broken.append(number)
            else:
                records.append((step, line))
        return cls(records, broken, unfinished=bool(last))


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return None


def compare_trace(expected: Mapping[int, str], trace: Trace, complete_to: int) -> list[str]:
    """All records, those of repeated steps too, and that no step up to the checkpoint is missing."""
    differences = [f"line {number} of {TRACE_FILE} is broken" for number in trace.broken]
    for step, line in trace.records:
        if step not in expected:
            differences.append(f"trace: the reference has no step {step}")
        elif line != expected[step]:
            differences.append(f"trace, step {step}: {_first_difference(expected[step], line)}")
    missing = set(range(1, complete_to + 1)) - {step for step, _ in trace.records}
    if missing:
        differences.append(f"trace: steps {sorted(missing)} are missing, the checkpoint is at {complete_to}")
    return differences


def _first_difference(expected: str, actual: str) -> str:
    left, right = dict(_leaves(json.loads(expected))), dict(_leaves(json.loads(actual)))
    for path in left | right:
        if left.get(path) != right.get(path):
            return f"{path} is {right.get(path)}, in the reference {left.get(path)}"
    return "the same values, written differently"


def _leaves(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    )
    if children is None:
        yield path, value
        return
    for key, child in children:
        yield from _leaves(child, f"{path}/{key}")


@dataclass(frozen=True)
class Checkpoint:
    """The content of a torch_dist checkpoint, the saved command line left out."""

    tensors: Mapping[str, torch.Tensor]
    objects: Mapping[str, bytes]
    """What is not a tensor, as it was pickled: RNG states, optimizer settings."""

    @classmethod
    def read(cls, folder: Path, iteration: int) -> "Checkpoint":
        """Load every tensor whole, from all shards. Raises what PyTorch raises when it cannot be loaded."""
        path = iteration_folder(folder, iteration)
        metadata = FileSystemReader(path).read_metadata()
        tensors = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(tensors, storage_reader=FileSystemReader(path), no_dist=True)
        objects = {
            index.fqn: _slice(path / stored.relative_path, stored.offset, stored.length)
            for index, stored in metadata.storage_data.items()
            if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata)
            and not index.fqn.startswith(COMMAND_LINE)
        }
        return cls(tensors, objects)

    def router_state(self) -> "Checkpoint":
        """Thresholds and their counters of the Expert Threshold routers alone."""
        ours = re.compile(r"\.router\.thresholds\.\w+$")
        return Checkpoint({key: value for key, value in self.tensors.items() if ours.search(key)}, {})


def _slice(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def compare_checkpoints(expected: Checkpoint, actual: Checkpoint) -> list[str]:
    """Bits, not values: NaN equals itself, 0.0 differs from -0.0."""
    if not actual.tensors:
        return ["checkpoint: no tensor in it"]
    differences = [
        f"checkpoint: {key} is in one of the two only"
        for left, right in ((expected.tensors, actual.tensors), (expected.objects, actual.objects))
        for key in sorted(left.keys() ^ right.keys())
    ]
    differences += [
        f"checkpoint: {key} differs"
        for key in sorted(expected.tensors.keys() & actual.tensors.keys())
        if not _same_bits(expected.tensors[key], actual.tensors[key])
    ]
    differences += [
        f"checkpoint: {key} differs"
        for key in sorted(expected.objects.keys() & actual.objects.keys())
        if expected.objects[key] != actual.objects[key]
    ]
    return differences


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def iteration_folder(folder: Path, iteration: int) -> Path:
    """Where Megatron keeps the checkpoint of an iteration."""
    return folder / f"iter_{iteration:07d}"


def latest_iteration(folder: Path) -> int:
    """The iteration that Megatron will resume from, 0 when there is none. ValueError if the file is bad."""
    tracker = folder / TRACKER
    return int(tracker.read_text()) if tracker.is_file() else 0


def unfinished_checkpoints(folder: Path) -> list[int]:
    """Iterations whose folder a killed run left without the file that Megatron writes last."""
    folders = sorted(folder.glob("iter_*"))
    return [int(path.name[5:]) for path in folders if not (path / "metadata.json").is_file()]
