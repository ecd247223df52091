"""Seconds and bytes of the statistics on a placement, and what uneven loads add to its step."""

import math
from dataclasses import dataclass

import numpy as np

from benchmarks.scale import boundary
from benchmarks.scale.assumptions import Hardware
from benchmarks.scale.loads import Drawn, Group, Rule, Text, draw
from benchmarks.scale.network import ALGORITHMS, NODE, best
from benchmarks.scale.quadrature import share_above
from benchmarks.scale.shapes import SEQUENCE, Placement

COUNT_BYTES = 4
TARGET = 1e-3
"""Share of a step that counting, reduction and boundary are to stay below together."""


@dataclass(frozen=True)
class Statistics:
    """What the statistics cost one rank in a step."""

    reduced_bytes: int
    memory_bytes: float
    reduce_seconds: dict[str, float]
    """By algorithm."""
    best_algorithm: str
    boundary_seconds: float
    counting_seconds: dict[str, float]
    """By --moe-et-kernels."""
    step_seconds: float

    @property
    def once_seconds(self) -> float:
        """Reduction and boundary: once a step, whatever the number of tokens. Nothing is taken as hidden."""
        return self.reduce_seconds[self.best_algorithm] + self.boundary_seconds

    def share(self, kernels: str | None = None) -> float:
        """Of the step: reduction and boundary, and the counting too if its kernels are named."""
        counting = 0.0 if kernels is None else self.counting_seconds[kernels]
        return (self.once_seconds + counting) / self.step_seconds


def statistics(
    placement: Placement, hardware: Hardware, *, count_bytes: int = COUNT_BYTES, bins: int = boundary.BINS
) -> Statistics:
    """With another width of the counts or another number of bins than the code has, everything that depends
    on the histograms scales."""
    costs, shape = boundary.measure(), placement.shape
    now = boundary.sizes(shape.experts, shape.topk).reduced
    histogram = COUNT_BYTES * shape.experts * boundary.BINS
    scale = count_bytes / COUNT_BYTES * bins / boundary.BINS
    reduced = int(placement.stage_routers * (now + histogram * (scale - 1.0)))
    counts = placement.stage_routers * shape.experts * boundary.BINS * scale
    ranks = placement.statistics_ranks
    times = {name: algorithm(reduced, ranks, hardware.network) for name, algorithm in ALGORITHMS.items()}
    name, _ = best(reduced, ranks, hardware.network)
    tokens = placement.layout.sequences * SEQUENCE / placement.gpus
    pairs = tokens * shape.moe_layers * shape.experts
    return Statistics(
        reduced_bytes=reduced,
        memory_bytes=costs.boundary_memory * counts,
        reduce_seconds=times,
        best_algorithm=name,
        boundary_seconds=max(
            hardware.copying(costs.boundary_bytes * counts),
            hardware["kernel_launch"] * costs.boundary_operations,
        ),
        counting_seconds={
            "torch": hardware.copying(costs.pair_bytes * pairs),
            "triton": hardware["triton_pair"] * pairs,
            "cuda": hardware["cuda_pair"] * pairs,
        },
        step_seconds=placement.step_seconds,
    )


def group_of(placement: Placement) -> Group:
    """A layer over the expert-parallel group, one sequence a micro-batch."""
    shape, layout = placement.shape, placement.layout
    return Group(shape.experts, shape.topk, layout.ep, SEQUENCE, sharers=layout.tp)


@dataclass(frozen=True)
class Exposure:
    """Seconds of a step, under forced balance, that grow with the load of the busiest rank."""

    grouped_gemm: float
    all_to_all: float
    step: float


def exposure(placement: Placement, hardware: Hardware) -> Exposure:
    """Of one GPU. Dispatch and combine carry bf16 rows, forward and backward: four passes; across nodes a
    token is sent once to every node that has one of its experts."""
    shape, layout = placement.shape, placement.layout
    tokens = layout.sequences * SEQUENCE / placement.gpus
    row = 2.0 * shape.hidden
    passes = 4.0 * tokens * shape.moe_layers * row
    nodes = max(layout.ep // NODE, 1)
    network = hardware.network
    inside = passes * shape.topk * (min(layout.ep, NODE) - 1) / min(layout.ep, NODE) / network.nvlink
    others = (nodes - 1) * (1.0 - (1.0 - 1.0 / nodes) ** shape.topk)
    across = passes * others / network.nic
    gemm = hardware.multiplying(tokens * shape.expert_flops, shape.fp8)
    return Exposure(gemm, max(inside, across), placement.step_seconds)


@dataclass(frozen=True)
class Slowdown:
    """What uneven loads do to the step; 1 is forced balance."""

    grouped_gemm: float
    """Rows of the busiest rank over the mean, averaged over layers and micro-batches, of the slowest
    pipeline."""
    all_to_all: float
    step_hidden: float
    """Of the step, the all-to-all hidden behind other work."""
    step_exposed: float
    """Of the step, nothing of the all-to-all hidden."""


def slowdown(placement: Placement, hardware: Hardware, drawn: Drawn) -> Slowdown:
    """All ranks of an expert-parallel group wait for each other in every layer; pipelines wait for the
    slowest of them once a step."""
    layers = placement.stage_routers * placement.micro_batches
    chains = placement.gpus // placement.layout.ep
    gemm, traffic = (
        float(load.mean() + load.std() / math.sqrt(layers) * largest_of(chains))
        for load in (drawn.grouped_gemm_D, drawn.all_to_all_D)
    )
    return slowed(exposure(placement, hardware), gemm, traffic)


def slowed(base: Exposure, busiest: float, direction: float) -> Slowdown:
    """A step whose busiest rank and busiest direction have so many times the mean."""
    hidden = base.grouped_gemm * (busiest - 1.0) / base.step
    exposed = hidden + base.all_to_all * (direction - 1.0) / base.step
    return Slowdown(busiest, direction, 1.0 + hidden, 1.0 + exposed)


def largest_of(number: int) -> float:
    """Expected largest of so many standard normal variables."""
    if number == 1:
        return 0.0
    grid = np.linspace(-8.0, 8.0, 4001)
    below = (1.0 - share_above(grid)) ** number
    return float(grid[-1] - np.trapezoid(below, grid))


def drawn_loads(
    placement: Placement, rule: Rule, text: Text, draws: int, *, capacity: float | None = None
) -> Drawn:
    """The same random numbers for every rule, text and capacity of a placement."""
    return draw(np.random.default_rng(1), rule, group_of(placement), text, draws, capacity=capacity)
