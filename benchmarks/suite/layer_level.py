"""Level `layer`: router, dispatch, experts and combine of Megatron's MoE layer, forward and backward, over
the ranks of an expert-parallel group. The slowest rank counts.

Run under torchrun by `python -m benchmarks run layer`.

Dimension letters: T tokens of a rank, H hidden size.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.suite.layers import Fed, Sizes, build
from benchmarks.suite.methods import METHODS, Method
from benchmarks.suite.results import Row, row
from benchmarks.suite.router_level import fanout_note
from benchmarks.suite.timing import Stopwatch, in_turns
from benchmarks.suite.workloads import WORKLOADS, Shape, Stream


@dataclass(frozen=True)
class Case:
    """A layer, its ranks and a stream."""

    tokens: int
    experts: int
    topk: int
    hidden: int
    ffn: int
    ranks: int
    workload: str

    def __str__(self) -> str:
        return (
            f"T{self.tokens} E{self.experts} k{self.topk} H{self.hidden} F{self.ffn} EP{self.ranks} "
            f"{self.workload}"
        )


# Qwen3-30B-A3B's layer and one of Mixtral's kind, as far as they fit one card.
_GPU = (Case(16384, 128, 8, 2048, 768, 1, ""), Case(16384, 8, 2, 4096, 3584, 1, ""))
_CPU = (Case(2048, 16, 2, 256, 256, 2, ""),)


def cases(device: str, workloads: Sequence[str] = tuple(WORKLOADS)) -> list[Case]:
    """Every size with every workload."""
    sizes = _GPU if device == "cuda" else _CPU
    return [
        Case(**vars(size) | {"workload": workload}) for size, workload in itertools.product(sizes, workloads)
    ]


class Pass:
    """Forward and backward of a layer."""

    def __init__(
        self,
        method: Method,
        case: Case,
        stream: Stream,
        device: str,
        kept: dict[int, torch.Tensor] | None = None,
    ) -> None:
        rank = torch.distributed.get_rank()
        shape = Shape(case.tokens, case.experts, case.topk, case.ranks, rank, device)
        sizes = Sizes(case.hidden, case.ffn)
        layer = build(method, shape, sizes, device)
        self.fed = Fed(layer, stream, shape, sizes, device, kept)
        self.fed.settle()
        generator = torch.Generator().manual_seed(5 + rank)
        hidden = torch.randn(case.tokens, 1, case.hidden, generator=generator)
        self.hidden = hidden.to(device, layer.config.params_dtype).requires_grad_()
        self._gradient = torch.ones_like(hidden).to(self.hidden)
        self._watch = Stopwatch(device)

    def __call__(self) -> float:
        """Milliseconds of the slowest rank."""
        torch.distributed.barrier()
        milliseconds = self._watch(self.run)
        self.fed.note_load()
        self.fed.end_batch()
        slowest = torch.tensor(milliseconds, device=self.hidden.device)
        torch.distributed.all_reduce(slowest, op=torch.distributed.ReduceOp.MAX)
        return slowest.item()

    def run(self) -> None:
        """Once through and back."""
        self.hidden.grad = None
        self.fed.layer.zero_grad(set_to_none=True)
        output, _ = self.fed.layer(self.hidden)
        output.backward(self._gradient)


def measure(
    case: Case, stream: Stream, methods: Sequence[str], device: str, environment: str, **timing: Any
) -> list[Row]:
    """All methods in turns; every rank must call it, and rank 0's rows are those to keep."""
    rows, passes = [], {}
    kept: dict[int, torch.Tensor] = {}
    for name in methods:
        missing = METHODS[name].missing(device)
        if missing:
            rows.append(row("layer", str(case), name, "both", environment, note=f"not run: {missing}"))
        else:
            passes[name] = Pass(METHODS[name], case, stream, device, kept)
    turns: dict[str, Callable[[], float]] = dict(passes)
    for name, values in in_turns(turns, **timing).items():
        fanout, load = passes[name].fed.fanout_and_load()
        note = fanout_note(fanout, case.topk)
        rows.append(
            row(
                "layer", str(case), name, "both", environment,
                values=values, fanout=fanout, max_load=load, note=note,
            )
        )  # fmt: skip
    return rows
