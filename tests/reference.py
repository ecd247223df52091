"""The method as its authors run it (docs/architecture.md, METHOD of the paper), written naively: Python
loops, one expert at a time.

Nothing here is shared with megatron_et: sorting instead of a clamp, a raw EMA with bias correction instead of
the corrected value, token lists instead of boolean maps.
"""

import math

from megatron_et.config import ExpertThresholdConfig


class AuthorsRouter:
    """State and rule of one layer. Logits are lists of rows; a routing is, per expert, the set of its
    tokens."""

    def __init__(self, num_experts: int, topk: int, decay: float, capacity: float | None) -> None:
        self.num_experts, self.topk, self.decay, self.capacity = num_experts, topk, decay, capacity
        self.raw = [0.0] * num_experts
        self.updates = 0
        self.sums = [0.0] * num_experts
        self.micro_batches = 0

    def thresholds(self) -> list[float]:
        if self.updates == 0:
            return list(self.raw)
        return [raw / (1.0 - self.decay**self.updates) for raw in self.raw]

    def load(self, num_tokens: int) -> int:
        return num_tokens * self.topk // self.num_experts

    def _ranked(self, logits: list[list[float]], expert: int) -> list[int]:
        return sorted(range(len(logits)), key=lambda token: -logits[token][expert])

    def expert_choice(self, logits: list[list[float]]) -> list[set[int]]:
        """Warm-up: exactly the k best tokens of every expert."""
        k = self.load(len(logits))
        self._accumulate(logits, k)
        return [set(self._ranked(logits, expert)[:k]) for expert in range(self.num_experts)]

    def threshold(self, logits: list[list[float]], training: bool) -> list[set[int]]:
        """After the warm-up: all tokens at or above the threshold, in training held between (1-C)k and
        (1+C)k."""
        k = self.load(len(logits))
        chosen = []
        for expert, threshold in enumerate(self.thresholds()):
            ranked = self._ranked(logits, expert)
            count = sum(row[expert] >= threshold for row in logits)
            if training and self.capacity is not None:
                count = max(count, int(k * (1 - self.capacity)))
                count = min(count, int(k * (1 + self.capacity)))
            chosen.append(set(ranked[:count]))
        if training:
            self._accumulate(logits, k)
        return chosen

    def _accumulate(self, logits: list[list[float]], k: int) -> None:
        for expert in range(self.num_experts):
            self.sums[expert] += logits[self._ranked(logits, expert)[k - 1]][expert]
        self.micro_batches += 1

    def step(self) -> None:
        """After the optimizer step: one EMA update from the mean over micro-batches."""
        for expert in range(self.num_experts):
            mean = self.sums[expert] / self.micro_batches
            self.raw[expert] = self.decay * self.raw[expert] + (1 - self.decay) * mean
        self.updates += 1
        self.sums, self.micro_batches = [0.0] * self.num_experts, 0


def gate(logit: float) -> float:
    """sigmoid, eq. 2."""
    return 1.0 / (1.0 + math.exp(-logit))


def capacity(et: ExpertThresholdConfig, num_updates: int) -> float | None:
    """Capacity factor C in force for the next training batch; None means that nothing bounds the load.

    0 in the warm-up (Expert Choice). While annealing it grows from 0 to the training capacity: linearly
    to a finite one, and as x / (1 - x) of the annealed share x to an infinite one, so that neither end
    jumps.

    Args:
        num_updates: of the thresholds.
    """
    if et.router_type == "expert-choice" or num_updates < et.warmup_steps:
        return 0.0
    annealed = num_updates - et.warmup_steps
    if annealed < et.warmup_anneal_steps:
        share = annealed / et.warmup_anneal_steps
        return share / (1.0 - share) if et.capacity_factor is None else share * et.capacity_factor
    return et.capacity_factor
