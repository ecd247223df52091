"""The thresholds of one router: an EMA of population quantiles, with bias correction and a candidate that may
be dropped.

Dimension letters: E experts.
"""

import math
from collections.abc import Callable
from typing import Self

import torch


class ThresholdEMA(torch.nn.Module):
    """Thresholds `value` and the number of updates that made them; both are saved with the model.

    The paper keeps a raw EMA from zero and routes with raw / (1 - beta**n). The same numbers come from the
    corrected value alone when its n-th step is weighted: value += (1 - beta) / (1 - beta**n) * (cutoff -
    value). Only that is stored: it is what routes, what is checkpointed, and what an inference engine needs.
    The first update copies the cutoffs.

    An update has two halves, since only after the optimizer step is known whether the global batch counted:
    `propose` computes a candidate, `commit` makes it the thresholds, `discard` drops it. Nothing synchronises
    with the host.

    Args:
        num_experts: E.
        decay: beta, in [0, 1).
        device: where the buffers live.
    """

    value: torch.Tensor
    """[E] fp32, the thresholds that route; 0 before the first update."""
    num_updates: torch.Tensor
    """[1] int64, committed updates n."""
    last_cutoff: torch.Tensor
    """[E] fp32, cutoffs of the last committed batch: where the next batch's histogram is centred. It follows
    drift at once, which the EMA does not, so that bins are finest where the next quantile is."""

    def __init__(
        self, num_experts: int, decay: float = 0.999, *, device: torch.device | int | str | None = None
    ) -> None:
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay is {decay}: the EMA's beta must be in [0, 1)")
        self.decay = decay
        self.register_buffer("value", torch.zeros(num_experts, dtype=torch.float32, device=device))
        self.register_buffer("num_updates", torch.zeros(1, dtype=torch.int64, device=device))
        self.register_buffer("last_cutoff", torch.zeros(num_experts, dtype=torch.float32, device=device))
        self._candidate: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    @property
    def has_candidate(self) -> bool:
        """Whether a proposed update waits for commit or discard."""
        return self._candidate is not None

    @torch.no_grad()
    def propose(self, cutoffs_E: torch.Tensor, *, valid: torch.Tensor | None = None) -> None:
        """Compute the next thresholds without using them; a second call replaces the first one's candidate.

        Args:
            cutoffs_E: [E], k-th largest logits of the global batch.
            valid: one bool; False (no token in the whole batch) leaves thresholds and their count as they
                are.
        """
        updates = self.num_updates + 1
        log_decay = math.log(self.decay) if self.decay > 0.0 else -math.inf
        # float64: (1 - beta**n) cancels for small n, and every layout must round the same way.
        rate = (1.0 - self.decay) / -torch.expm1(updates.double() * log_decay)
        value = self.value.double()
        candidate = (value + rate * (cutoffs_E.double() - value)).float()
        last_cutoff = cutoffs_E.float()
        if valid is not None:
            candidate = torch.where(valid, candidate, self.value)
            updates = torch.where(valid, updates, self.num_updates)
            last_cutoff = torch.where(valid, last_cutoff, self.last_cutoff)
        self._candidate = (candidate, updates, last_cutoff)

    @torch.no_grad()
    def commit(self) -> None:
        """Make the candidate the thresholds. Raises RuntimeError when there is none."""
        if self._candidate is None:
            raise RuntimeError("commit() without a candidate: call propose() with the batch's cutoffs first")
        # In place: checkpoint code, CUDA graphs and users hold on to the buffers.
        self.value.copy_(self._candidate[0])
        self.num_updates.copy_(self._candidate[1])
        self.last_cutoff.copy_(self._candidate[2])
        self._candidate = None

    def discard(self) -> None:
        """Drop the candidate, if there is one (a skipped, rerun or overflowed step leaves no trace)."""
        self._candidate = None

    def update(self, cutoffs: torch.Tensor) -> None:
        """One whole update from the cutoffs [E] of a global batch that counts."""
        self.propose(cutoffs)
        self.commit()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # Float16Module casts every floating buffer of the model; thresholds must stay fp32 (invariant I7), so
        # only the device that `fn` moves tensors to is taken over. Meta tensors come to life as fresh
        # thresholds.
        def move(tensor: torch.Tensor) -> torch.Tensor:
            device = fn(tensor.new_empty(0)).device
            return torch.zeros_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"num_experts={self.value.numel()}, decay={self.decay}"
