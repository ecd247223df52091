"""Streams of router logits, one micro-batch a step, after the taxonomy of Megatron-LM #7488.

Every rank has other tokens of the same stream. What is hot, and when, depends on the step alone.

Dimension letters: T tokens of a rank's micro-batch, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class Shape:
    """What a stream of logits is made for."""

    tokens: int
    experts: int
    topk: int
    ranks: int = 1
    rank: int = 0
    device: str = "cpu"
    """Where its random numbers are drawn; each kind of device has its own."""


Stream = Callable[[Shape, int], torch.Tensor]
"""Shape and step to logits [T, E] fp32."""
HOT = 2.0
"""Standard deviations by which a hot expert's logits stand above the others'."""
BURST_PERIOD = 5


def _noise(shape: Shape, step: int) -> torch.Tensor:
    generator = torch.Generator(shape.device).manual_seed(1_000_003 * step + shape.rank)
    return torch.randn(shape.tokens, shape.experts, generator=generator, device=shape.device)


def balanced(shape: Shape, step: int) -> torch.Tensor:
    """Every expert has exactly as many tokens as any other, or one more: by a wide gap between the logits
    of a token's `topk` experts and the rest, the same map for every router."""
    first_T = torch.arange(shape.tokens, device=shape.device) * shape.topk
    chosen = (first_T.unsqueeze(1) + torch.arange(shape.topk, device=shape.device)) % shape.experts
    gap = torch.full((shape.tokens, shape.experts), -4.0, device=shape.device).scatter_(1, chosen, 4.0)
    return gap + _noise(shape, step).clamp(-2.0, 2.0)


def independent(shape: Shape, step: int) -> torch.Tensor:
    """Normal logits, experts alike."""
    return _noise(shape, step)


def hot_expert(shape: Shape, step: int) -> torch.Tensor:
    """One expert that most tokens like."""
    logits_TE = _noise(shape, step)
    logits_TE[:, 0] += HOT
    return logits_TE


def hot_rank(shape: Shape, step: int) -> torch.Tensor:
    """All experts of the first rank are liked."""
    logits_TE = _noise(shape, step)
    logits_TE[:, : _experts_of_a_rank(shape)] += HOT / 2
    return logits_TE


def zero_token_rank(shape: Shape, step: int) -> torch.Tensor:
    """Nobody likes the experts of the last rank."""
    logits_TE = _noise(shape, step)
    logits_TE[:, -_experts_of_a_rank(shape) :] -= 20.0
    return logits_TE


def rotating(shape: Shape, step: int) -> torch.Tensor:
    """Another hot expert each step."""
    logits_TE = _noise(shape, step)
    logits_TE[:, step % shape.experts] += HOT
    return logits_TE


def burst(shape: Shape, step: int) -> torch.Tensor:
    """A hot expert in one step of five."""
    logits_TE = _noise(shape, step)
    if step % BURST_PERIOD == BURST_PERIOD - 1:
        logits_TE[:, 0] += HOT
    return logits_TE


def _experts_of_a_rank(shape: Shape) -> int:
    # With one rank: as if there were two.
    return max(shape.experts // max(shape.ranks, 2), 1)


WORKLOADS: dict[str, Stream] = {
    "balanced": balanced,
    "independent": independent,
    "hot-expert": hot_expert,
    "hot-rank": hot_rank,
    "zero-token-rank": zero_token_rank,
    "rotating": rotating,
    "burst": burst,
}


def natural(path: Path) -> Stream:
    """Logits of a trained router on real text, as benchmarks/suite/capture.py writes them: micro-batches
    follow one another through the text, and every rank reads its own part."""
    recorded_NE = np.load(path)["logits"]

    def stream(shape: Shape, step: int) -> torch.Tensor:
        if recorded_NE.shape[1] != shape.experts:
            raise ValueError(
                f"{path} holds logits of {recorded_NE.shape[1]} experts, the case has {shape.experts}"
            )
        first = (step * shape.ranks + shape.rank) * shape.tokens
        rows = (first + np.arange(shape.tokens)) % len(recorded_NE)
        return torch.from_numpy(recorded_NE[rows].astype(np.float32))

    return stream
