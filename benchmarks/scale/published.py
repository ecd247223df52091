"""The one published measurement of what uneven loads cost: Qwen3-235B-A22B on 256 H100s, natural (dropless)
routing by top-k with an auxiliary loss against forced balance. How far the model was trained is not said.

Source: yanring/Megatron-MoE-ModelZoo, best_practice/Qwen3/readme.md, "Long Context": bf16, DeepEP, TP4 PP8
EP8, MoE layers recomputed, all-to-all not overlapped.
"""

from dataclasses import dataclass

import numpy as np

from benchmarks.scale.assumptions import Hardware
from benchmarks.scale.cost import Exposure
from benchmarks.scale.loads import Group, Text, draw
from benchmarks.scale.network import NODE
from benchmarks.scale.quadrature import solve
from benchmarks.scale.shapes import SHAPES

SHAPE = next(shape for shape in SHAPES if shape.name == "Qwen3-235B-A22B")
TENSOR, EXPERT = 4, 8


@dataclass(frozen=True)
class Point:
    """One row of the published table."""

    sequence: int
    context: int
    """Context-parallel size."""
    forced: float
    natural: float
    """Model TFLOP/s per GPU."""

    @property
    def slowdown(self) -> float:
        """Step time, natural over forced."""
        return self.forced / self.natural

    @property
    def group(self) -> Group:
        """A layer: a sequence is shared by the tensor and context parallel ranks."""
        return Group(SHAPE.experts, SHAPE.topk, EXPERT, self.sequence, sharers=TENSOR * self.context)

    def exposure(self, hardware: Hardware) -> Exposure:
        """Seconds of one rank's tokens in all layers. Recomputed: a second forward pass of the experts (4/3
        of their FLOPs) and of both of its all-to-alls (6 passes instead of 4)."""
        tokens = self.group.rank_tokens
        gemm = hardware.multiplying(tokens * SHAPE.expert_flops * 4 / 3, SHAPE.fp8)
        rows = tokens * SHAPE.topk * SHAPE.moe_layers * (NODE - 1) / NODE
        traffic = 6 * rows * 2.0 * SHAPE.hidden / hardware.network.nvlink
        step = tokens * SHAPE.flops(self.sequence) / (self.forced * 1e12)
        return Exposure(gemm, traffic, step)

    def implied(self, hardware: Hardware) -> float:
        """Rows of the busiest rank over the mean that make the published slowdown."""
        base = self.exposure(hardware)
        return 1.0 + (self.slowdown - 1.0) * base.step / (base.grouped_gemm + base.all_to_all)

    def predicted(self, hardware: Hardware, busiest: float) -> float:
        """The slowdown that a busiest rank makes."""
        base = self.exposure(hardware)
        return 1.0 + (base.grouped_gemm + base.all_to_all) * (busiest - 1.0) / base.step

    def simulated(self, text: Text, draws: int) -> float:
        """Busiest rank of top-k on this text; for top-k the busiest direction is the same."""
        drawn = draw(np.random.default_rng(2), "top-k", self.group, text, draws)
        return float(drawn.grouped_gemm_D.mean())


POINTS = (
    Point(16384, 1, 295.0, 237.0),
    Point(32768, 2, 335.0, 277.0),
    Point(65536, 4, 368.0, 320.0),
    Point(131072, 8, 389.0, 357.0),
)


def implied(hardware: Hardware) -> float:
    """Mean of the rows."""
    return float(np.mean([point.implied(hardware) for point in POINTS]))


def uneven_sequences(hardware: Hardware, draws: int) -> Text:
    """Text that explains the first row by uneven sequences alone, all experts equally popular."""
    first = POINTS[0]
    own = solve(lambda own: first.simulated(Text(own=own), draws), first.implied(hardware), tolerance=0.005)
    return Text(own=own)
