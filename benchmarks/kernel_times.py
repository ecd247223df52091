"""Times of the routing kernels on a GPU, beside a copy of the bytes that they cannot avoid.

    python benchmarks/kernel_times.py [--output DIR]     # a minute; writes kernel_times.md

Forward, and forward with backward through autograd, each with and without the statistics, which is what
counting costs; and the bounds of a capacity, by `topk`, by a sort (padding, or k on the device) and by the
CUDA kernel. Times are the GPU's, medians, with everything enqueued ahead and the L2 cache overwritten
before each; `host` is how long the host takes to enqueue both passes. The suite's level `router` times
Megatron's whole `routing` instead.

Dimension letters: T tokens, E experts.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

# As a script this file has its own folder on the path, not the one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.environment import ROOT, device_environment
from benchmarks.suite.results import one_line
from benchmarks.suite.router_level import minimal_bytes
from benchmarks.suite.timing import Stopwatch, in_turns

SHAPES = ((16384, 128, 8), (4096, 1024, 8), (65536, 128, 8), (16384, 8, 2), (4096, 64, 6))
HOST_CALLS = 100


class Passes:
    """The kernels on normal logits of one shape."""

    def __init__(self, tokens: int, experts: int, topk: int) -> None:
        from megatron_et.rule.statistics import RouterStatistics
        from megatron_et.rule.threshold import ThresholdEMA

        generator = torch.Generator("cuda").manual_seed(0)
        drawn = torch.randn(2, tokens, experts, device="cuda", generator=generator)
        self.logits, self.upstream = drawn[0].requires_grad_(), drawn[1]
        self.ema = ThresholdEMA(experts, device="cuda")
        cutoff = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1.0 - topk / experts))
        self.ema.value.fill_(cutoff.item())
        self.ema.last_cutoff.fill_(cutoff.item())
        self.statistics = RouterStatistics(experts, topk, device="cuda")

    def run(self, kernels: str, counted: bool, backward: bool) -> None:
        """Route once."""
        from megatron_et.rule.kernels.routed import expert_threshold

        counters = self.statistics.counters(self.ema) if counted else None
        gates, _ = expert_threshold(self.logits, self.ema.value, counters=counters, cuda=kernels == "cuda")
        if backward:
            self.logits.grad = None
            gates.backward(self.upstream)

    def host(self, kernels: str, counted: bool) -> float:
        """Microseconds to enqueue both passes."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(HOST_CALLS):
            self.run(kernels, counted, True)
        taken = time.perf_counter() - start
        torch.cuda.synchronize()
        return 1e6 * taken / HOST_CALLS


def medians[Name](turns: dict[Name, Callable[[], float]]) -> dict[Name, float]:
    """Of samples taken in turns, us."""
    return {name: 1e3 * sorted(values)[len(values) // 2] for name, values in in_turns(turns).items()}


def rows(tokens: int, experts: int, topk: int) -> Iterator[str]:
    """Lines of the table for one shape."""
    watch = Stopwatch("cuda")
    passes = Passes(tokens, experts, topk)
    size = minimal_bytes(tokens, experts)

    def timed(work: Callable[[], object]) -> Callable[[], float]:
        return lambda: watch(work)

    def copy(part: str) -> Callable[[], float]:
        source, target = torch.zeros(2, size[part] // 2, dtype=torch.int8, device="cuda")
        return timed(lambda: target.copy_(source))

    turns = {("copy", part): copy(part) for part in ("forward", "both")}
    settings = [(kernels, counted) for kernels in ("triton", "cuda") for counted in (True, False)]
    for setting in settings:
        for part in ("forward", "both"):
            turns[setting, part] = timed(lambda s=setting, p=part: passes.run(*s, p == "both"))
    taken = medians(turns)
    shape = f"T{tokens} E{experts}"
    yield f"| {shape} | copy | {taken['copy', 'forward']:.1f} | {taken['copy', 'both']:.1f} | 1.00 | - |"
    for setting in settings:
        both = taken[setting, "both"]
        name = f"`{setting[0]}`" + (", statistics included" if setting[1] else "")
        yield (
            f"| {shape} | {name} | {taken[setting, 'forward']:.1f} | {both:.1f} "
            f"| {both / taken['copy', 'both']:.2f} | {passes.host(*setting):.0f} |"
        )


def selection_row(tokens: int, experts: int, topk: int) -> str:
    """A line of the second table: both bounds of a capacity of a half, three ways."""
    from megatron_et.rule.kernels.select import kth_largest
    from megatron_et.rule.quantile import kth_largest_of_several

    watch = Stopwatch("cuda")
    logits = torch.randn(tokens, experts, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    k = tokens * topk // experts
    ks = [k // 2, k + k // 2]
    on_device = [torch.full((), k, device="cuda") for k in ks]
    ways: dict[str, Callable[[], object]] = {
        "topk": lambda: kth_largest_of_several(logits, ks),
        "sort": lambda: kth_largest_of_several(logits, on_device),
        "cuda": lambda: kth_largest(logits, ks),
    }
    turns = {name: (lambda way=way: watch(way)) for name, way in ways.items()}
    taken = medians(turns)
    return f"| T{tokens} E{experts} | " + " | ".join(f"{taken[name]:.1f}" for name in ways) + " |"


def main() -> None:
    """Time every shape and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("kernel_times: no GPU is visible: nothing was measured")
    head = "| shape | kernels | forward, us | both passes, us | over the copy | host, us |"
    lines = [
        "# Times of the routing kernels", "",
        "Written by `python benchmarks/kernel_times.py`.", "",
        f"Environment: {one_line(device_environment())}.", "", head, "| --- | --- |" + " ---: |" * 4,
    ]  # fmt: skip
    for shape in SHAPES:
        lines += rows(*shape)
        print("\n".join(lines[-5:]), flush=True)
    lines += ["", "Both bounds of a capacity of 0.5, us:", ""]
    lines += ["| shape | `topk` | a sort | `cuda` |", "| --- | ---: | ---: | ---: |"]
    for shape in SHAPES:
        lines.append(selection_row(*shape))
        print(lines[-1], flush=True)
    (args.output / "kernel_times.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
