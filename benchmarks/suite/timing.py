"""Samples of how long something takes, in turns, and what they say."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

WARMUPS, SAMPLES = 5, 20
FLUSHED_BYTES = 256 * 2**20
"""Written before every sample on a GPU, so that it starts with a cache that holds nothing of its own: more
than the largest L2."""
FLUSHES = 24
"""That often: two milliseconds of an H100, in which the host enqueues what is timed. Else the sample would
be the host's time wherever that is the longer one."""


@dataclass(frozen=True)
class Spread:
    """Median and 20 % / 80 % quantiles of some samples."""

    median: float
    q20: float
    q80: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        ordered = sorted(values)
        if len(ordered) == 1:
            return cls(ordered[0], ordered[0], ordered[0], 1)
        fifths = statistics.quantiles(ordered, n=5, method="inclusive")
        return cls(statistics.median(ordered), fifths[0], fifths[3], len(ordered))


class Stopwatch:
    """Milliseconds of a call, on the device that does the work."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.host_milliseconds = 0.0
        """Of the last call: until everything was enqueued on the GPU."""
        if self.on_gpu:
            self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)

    def __call__(self, function: Callable[[], object]) -> float:
        """Run it once."""
        if not self.on_gpu:
            start = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(FLUSHES):
            self._flushed.zero_()
        begin.record()
        start = time.perf_counter()
        function()
        self.host_milliseconds = 1e3 * (time.perf_counter() - start)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def in_turns(
    functions: Mapping[str, Callable[[], float]], *, warmups: int = WARMUPS, samples: int = SAMPLES
) -> dict[str, list[float]]:
    """Samples of each function, taken in turns: what slows the machine down slows all of them.

    Args:
        functions: name -> something that does its work once and returns its milliseconds.
    """
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmups + samples):
        for name, function in functions.items():
            milliseconds = function()
            if turn >= warmups:
                taken[name].append(milliseconds)
    return taken
