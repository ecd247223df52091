"""Starting pretraining runs from tests and reading what they leave behind."""

import functools
import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from benchmarks.small_gpt import SMALL_GPT
from megatron_et.rule.threshold import ThresholdEMA
from tests.forked import forked
from tests.launch import TAIL, torchrun, words

GPT_ARGS = [
    *SMALL_GPT,
    *words("--save-interval 100 --eval-interval 4 --eval-iters 1 --tensorboard-log-interval 1"),
]
ET_ARGS = words("--moe-router-type expert-threshold --moe-et-warmup-steps 4 --moe-et-ema-decay 0.9")
MOE_LAYERS = ["2", "3", "4"]

type Launch = Callable[..., subprocess.CompletedProcess[str]]
"""`launch.torchrun` or `forked.forked`."""


@dataclass
class Run:
    """What a training run printed and wrote."""

    status: int
    output: str
    trace: dict[int, dict[str, Any]]

    @property
    def loss(self) -> dict[int, str]:
        """Iteration -> training loss as printed."""
        return {int(i): x for i, x in re.findall(r" iteration +(\d+)/.* lm loss: (\S+) ", self.output)}

    @property
    def grad_norm(self) -> dict[int, str]:
        """Iteration -> gradient norm as printed."""
        return {int(i): x for i, x in re.findall(r" iteration +(\d+)/.* grad norm: (\S+) ", self.output)}

    @property
    def evaluation(self) -> list[str]:
        """Final validation and test losses as printed."""
        return re.findall(r"on (?:validation|test) set \| lm loss value: (\S+)", self.output)


def pretrain(
    args: str | list[str],
    *,
    processes: int = 2,
    folder: Path | None = None,
    command: tuple[str, ...] = ("-m", "megatron_et.pretrain_gpt"),
    et: list[str] = ET_ARGS,
    model: list[str] = GPT_ARGS,
    env: dict[str, str] | None = None,
    succeeds: bool = True,
    timeout: int = 200,
    launch: Launch = torchrun,
) -> Run:
    """Train the small GPT; with a folder the trace goes there. Megatron's argparse lets later flags win."""
    extra = args.split() if isinstance(args, str) else args
    trace_args = ["--moe-et-trace-dir", str(folder)] if folder is not None and et else []
    result = launch([*command, *model, *et, *trace_args, *extra], processes, env=env, timeout=timeout)
    if succeeds:
        assert result.returncode == 0, result.stdout[-TAIL:]
    file = None if folder is None else folder / "et_trace.jsonl"
    lines = file.read_text().splitlines() if file is not None and file.is_file() else []
    trace = {record["step"]: record for record in map(json.loads, lines)}
    return Run(result.returncode, result.stdout, trace)


forked_pretrain = functools.partial(pretrain, launch=forked)
"""`pretrain` where Megatron is imported already: for tests that start many runs."""


def checkpoint_tensors(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """All tensors of a torch_dist checkpoint, whole, by key."""
    path = folder / f"iter_{iteration:07d}"
    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(tensors, storage_reader=FileSystemReader(path), no_dist=True)
    return tensors


def assert_same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Bitwise equality of two checkpoints."""
    assert left.keys() == right.keys()
    different = [key for key in left if not torch.equal(left[key], right[key])]
    assert not different, different


def assert_thresholds_replay(run: Run, *, decay: float = 0.9) -> None:
    """The thresholds of every traced step are, to the bit, the EMA of the cutoffs of those before it."""
    for layer in run.trace[min(run.trace)]["layers"]:
        records = [run.trace[step]["layers"][layer] for step in sorted(run.trace)]
        ema = ThresholdEMA(len(records[0]["cutoff"]), decay)
        for n, record in enumerate(records):
            assert record["threshold"] == (ema.value.tolist() if n else [None] * len(record["cutoff"]))
            ema.update(torch.tensor(record["cutoff"], dtype=torch.float64))


def router_counters(tensors: dict[str, torch.Tensor]) -> set[int]:
    """The distinct values of the counters of all routers in a checkpoint."""
    values = [v.item() for k, v in tensors.items() if k.endswith("num_updates")]
    assert len(values) == len(MOE_LAYERS)
    return {int(value) for value in values}
