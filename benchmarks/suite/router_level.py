"""Level `router`: logits in, gates and map out, and the gradient back, in one process.

What is timed is `routing(logits)` of Megatron's router classes, everything that the method does there
included: auxiliary losses, counting for biases, and the statistics of Expert Threshold. `boundary` is what
a method does once a global batch. `copy` moves the bytes that no router can avoid (see `minimal_bytes`).
On a GPU these are times of the GPU, with everything enqueued ahead; `host` is how long the host takes to
enqueue forward and backward: where it is the longer one, an eager run waits for it.

Dimension letters: T tokens, E experts.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.suite.layers import Fed, Sizes, boundary, build
from benchmarks.suite.methods import METHODS, Method
from benchmarks.suite.results import Row, row
from benchmarks.suite.timing import Stopwatch, in_turns
from benchmarks.suite.workloads import Shape, Stream

TOLERANCE = 0.02
"""Largest relative difference of the mean fan-out from top-k that still counts as the same work."""


@dataclass(frozen=True)
class Case:
    """Sizes and a stream."""

    tokens: int
    experts: int
    topk: int
    workload: str

    def __str__(self) -> str:
        return f"T{self.tokens} E{self.experts} k{self.topk} {self.workload}"


# The ends and the middle of what is asked for; the full grid is `GRID`.
GPU_CASES = [
    Case(t, e, k, "balanced")
    for t, (e, k) in itertools.product((4096, 16384, 65536), ((8, 2), (64, 6), (128, 8), (256, 8), (1024, 8)))
] + [Case(16384, 128, 8, w) for w in ("independent", "hot-expert", "rotating", "burst")]
CPU_CASES = [
    *(Case(4096, e, k, "balanced") for e, k in ((8, 2), (16, 2), (64, 6), (128, 8), (256, 8))),
    Case(16384, 128, 8, "balanced"),
    *(Case(4096, 64, 6, w) for w in ("independent", "hot-expert", "rotating", "burst")),
]


def minimal_bytes(tokens: int, experts: int) -> dict[str, int]:
    """Bytes that must move: forward reads logits (4) and writes gates (4) and map (1); backward reads the
    gates and their gradient and writes that of the logits."""
    pairs = tokens * experts
    return {"forward": 9 * pairs, "backward": 12 * pairs, "both": 21 * pairs}


class Passes:
    """The timed parts of one method."""

    def __init__(
        self, method: Method, case: Case, stream: Stream, device: str, kept: dict[int, torch.Tensor]
    ) -> None:
        shape = Shape(case.tokens, case.experts, case.topk, device=device)
        sizes = Sizes(hidden=8, ffn=8)
        self.fed = Fed(build(method, shape, sizes, device), stream, shape, sizes, device, kept)
        self.fed.settle()
        self._watch = Stopwatch(device)
        self._boundary = boundary(self.fed.router)
        self.host: list[float] = []
        """Milliseconds in which the host enqueued each call of `both`."""

    def _leaf(self) -> torch.Tensor:
        return self.fed.logits().detach().requires_grad_()

    def forward(self) -> float:
        """One micro-batch, and the end of the batch, which is not timed."""
        logits = self._leaf()
        milliseconds = self._watch(lambda: self.fed.router.routing(logits))
        self.fed.note_load()
        self.fed.end_batch()
        return milliseconds

    def backward(self) -> float:
        """From the gradient of the gates to that of the logits."""
        probs, gradient = self._routed()
        return self._watch(lambda: probs.backward(gradient))

    def both(self) -> float:
        """Forward and backward."""
        logits = self._leaf()
        _, gradient = self._routed()

        def passes() -> None:
            probs, _ = self.fed.router.routing(logits)
            probs.backward(gradient)

        milliseconds = self._watch(passes)
        self.host.append(self._watch.host_milliseconds)
        self.fed.end_batch()
        return milliseconds

    def at_boundary(self) -> float:
        """One layer's share of the global batch's end."""
        self.fed.router.routing(self._leaf())
        milliseconds = self._watch(self._boundary)
        self.fed.step += 1
        return milliseconds

    def _routed(self) -> tuple[torch.Tensor, torch.Tensor]:
        probs, _ = self.fed.router.routing(self._leaf())
        self.fed.end_batch()
        return probs, torch.ones_like(probs)


class Copy:
    """As many bytes as a router must move, moved by a plain copy."""

    def __init__(self, case: Case, device: str) -> None:
        self._watch = Stopwatch(device)
        self._pairs = {
            part: tuple(torch.zeros(2, size // 2, dtype=torch.int8, device=device))
            for part, size in minimal_bytes(case.tokens, case.experts).items()
        }

    def part(self, name: str) -> Callable[[], float]:
        """Half of the bytes are read and half are written."""
        source, target = self._pairs[name]
        return lambda: self._watch(lambda: target.copy_(source))


def measure(
    case: Case, stream: Stream, methods: Sequence[str], device: str, environment: str, **timing: Any
) -> list[Row]:
    """All quantities of all methods in one case, in turns."""
    rows, passes = [], {}
    kept: dict[int, torch.Tensor] = {}
    for name in methods:
        missing = METHODS[name].missing(device)
        if missing:
            rows.append(row("router", str(case), name, "both", environment, note=f"not run: {missing}"))
        else:
            passes[name] = Passes(METHODS[name], case, stream, device, kept)
    copy = Copy(case, device)
    for quantity in ("forward", "backward", "both", "boundary"):
        method = "at_boundary" if quantity == "boundary" else quantity
        turns: dict[str, Callable[[], float]] = {name: getattr(p, method) for name, p in passes.items()}
        if quantity != "boundary":
            turns["copy"] = copy.part(quantity)
        for name, values in in_turns(turns, **timing).items():
            if name == "copy":
                rows.append(row("router", str(case), name, quantity, environment, values=values))
                continue
            taken = {quantity: values}
            if quantity == "both" and device == "cuda":
                taken["host"] = passes[name].host[-len(values) :]
            fanout, load = passes[name].fed.fanout_and_load()
            note = fanout_note(fanout, case.topk)
            rows += [
                row(
                    "router", str(case), name, what, environment,
                    values=numbers, fanout=fanout, max_load=load, note=note,
                )
                for what, numbers in taken.items()
            ]  # fmt: skip
    return rows


def fanout_note(fanout: float, topk: int) -> str:
    """Says that a method did another amount of work: such a row is left out of comparisons."""
    if abs(fanout / topk - 1.0) <= TOLERANCE:
        return ""
    return f"not comparable: mean fan-out {fanout:.3f}, not {topk}"
