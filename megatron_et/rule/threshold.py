"""The thresholds of one router: an EMA of population quantiles, with bias correction, a candidate that may be
dropped, and a guard that starts an expert's EMA again.

Dimension letters: E experts, L layers.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Self

import torch

PATIENCE = 3
"""Batches in a row, on the same side of the guard's band, after which an expert's EMA starts again: fewer
would follow a batch that is odd by itself (benchmarks/quantile_error.py)."""
RECENT = 100
"""Batches for which a restart is reported: a single one would fall between two log lines."""


class ThresholdEMA(torch.nn.Module):
    """Thresholds `value` and the number of updates that made them; both are saved with the model.

    The paper keeps a raw EMA from zero and routes with raw / (1 - beta**n). The same numbers come from the
    corrected value alone when its n-th step is weighted: value += (1 - beta) / (1 - beta**n) * (cutoff -
    value). Only that is stored: it is what routes, what is checkpointed, and what an inference engine needs.
    The first update copies the cutoffs.

    A guard may start the EMA of single experts again: then n counts from there, so that the first cutoff is
    copied and the next ones are averaged as at the start of training.

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

    restarted_at: torch.Tensor
    """[E] int64, committed updates before which an expert's EMA forgot everything; 0 without a restart."""
    violations: torch.Tensor
    """[E] int64, length of the current run of batches outside the guard's band; > 0 too much load, < 0 too
    little."""

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
        self.register_buffer("restarted_at", torch.zeros(num_experts, dtype=torch.int64, device=device))
        self.register_buffer("violations", torch.zeros(num_experts, dtype=torch.int64, device=device))
        self._candidate: dict[str, torch.Tensor] | None = None
        self.saw(0)

    def updates_on_host(self) -> int:
        """`num_updates` as an int, without waiting for the device in a step.

        It is what `saw` was told, as long as the buffer is the same and nothing that torch counts as a write
        has changed it (a load, a copy). A write that torch does not count (a broadcast, `.data`) is seen at
        the next `saw`, one global batch later.
        """
        buffer = self.num_updates
        if self._seen[0] is not buffer or self._seen[1] != buffer._version:
            self.saw(int(buffer))
        return self.seen

    @property
    def seen(self) -> int:
        """The last that `saw` was told."""
        return self._seen[2]

    def saw(self, num_updates: int) -> None:
        """What the buffer holds now, from a caller that has it on the host already."""
        self._seen = (self.num_updates, self.num_updates._version, num_updates)

    @property
    def has_candidate(self) -> bool:
        """Whether a proposed update waits for commit or discard."""
        return self._candidate is not None

    @torch.no_grad()
    def propose(
        self,
        cutoffs_E: torch.Tensor,
        *,
        valid: torch.Tensor | None = None,
        band: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Compute the next thresholds without using them; a second call replaces the first one's candidate.

        Args:
            cutoffs_E: [E], k-th largest logits of the global batch.
            valid: one bool; False (no token in the whole batch) leaves thresholds and their count as they
                are.
            band: the guard's (lower, upper), each [E]: the batch's (1+G)k-th and (1-G)k-th largest logits. A
                threshold outside had too much or too little load. None without a guard, which also ends runs
                of violations.
        """
        propose_all([self], stacked([self]), cutoffs_E, valid=valid, band=band)

    def commit(self) -> None:
        """Make the candidate the thresholds. Raises RuntimeError when there is none."""
        commit_all([self])

    def recently_restarted(self) -> torch.Tensor:
        """[1] int64: experts whose EMA the guard started again within the last RECENT committed batches."""
        return recently_restarted(stacked([self]))[0]

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


type Stacked = Mapping[str, torch.Tensor]
"""Buffers of several layers by name, each [L, E] or [L, 1]."""


def stacked(emas: Sequence[ThresholdEMA]) -> Stacked:
    """A copy of the buffers of several layers; those of one dtype and size take one operation."""
    copies: dict[str, torch.Tensor] = {}
    for names in _alike(emas[0], lambda buffer: (buffer.dtype, buffer.shape)):
        together = torch.stack([ema.get_buffer(name) for name in names for ema in emas])
        copies |= zip(names, together.split(len(emas)), strict=True)
    return copies


def _alike(ema: ThresholdEMA, by: Callable[[torch.Tensor], Hashable]) -> Iterable[list[str]]:
    """Names of the buffers that one operation can take together."""
    groups: dict[Hashable, list[str]] = {}
    for name, buffer in ema.named_buffers():
        groups.setdefault(by(buffer), []).append(name)
    return groups.values()


@torch.no_grad()
def propose_all(
    emas: Sequence[ThresholdEMA],
    now: Stacked,
    cutoffs_LE: torch.Tensor,
    *,
    valid: torch.Tensor | None = None,
    band: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """`ThresholdEMA.propose` for several layers of one size and decay at once: as many operations as for one.

    Args:
        emas: L of them.
        now: their buffers.
        cutoffs_LE: [L, E] ([E] will do for one).
        valid: [L, 1] bool.
        band: (lower, upper), each [L, E].

    Returns:
        `num_updates` once committed, [L, 1] int64.
    """
    decay = emas[0].decay
    updates = now["num_updates"] + 1
    restarted_at, violations = now["restarted_at"], torch.zeros_like(now["violations"])
    if band is not None:
        outside = (now["value"] < band[0]).long() - (now["value"] > band[1]).long()
        # Zeros before the first update are no thresholds yet.
        outside *= now["num_updates"] > 0
        # A run that changes side is a new run.
        continued = (now["violations"] + outside) * outside.abs()
        violations = torch.where(now["violations"] * outside < 0, outside, continued)
        restart = violations.abs() >= PATIENCE
        violations = violations.masked_fill(restart, 0)
        restarted_at = torch.where(restart, now["num_updates"], restarted_at)
    log_decay = math.log(decay) if decay > 0.0 else -math.inf
    # float64: (1 - beta**n) cancels for small n, and every layout must round the same way.
    rate_LE = (decay - 1.0) / torch.expm1((updates - restarted_at).double() * log_decay)
    value = now["value"].double()
    candidate = {
        "value": (value + rate_LE * (cutoffs_LE.double() - value)).float(),
        "num_updates": updates,
        "last_cutoff": cutoffs_LE.float().expand_as(value),
        "restarted_at": restarted_at,
        "violations": violations,
    }
    if valid is not None:
        candidate = {name: torch.where(valid, new, now[name]) for name, new in candidate.items()}
    for layer, ema in enumerate(emas):
        ema._candidate = {name: new[layer] for name, new in candidate.items()}
    return candidate["num_updates"]


@torch.no_grad()
def commit_all(emas: Sequence[ThresholdEMA]) -> None:
    """`ThresholdEMA.commit` for several layers at once. Raises RuntimeError when one has no candidate."""
    candidates = []
    for ema in emas:
        if ema._candidate is None:
            raise RuntimeError("commit() without a candidate: call propose() with the batch's cutoffs first")
        candidates.append(ema._candidate)
    for names in _alike(emas[0], lambda buffer: buffer.dtype):
        # In place: checkpoint code, CUDA graphs and users hold on to the buffers.
        torch._foreach_copy_(
            [ema.get_buffer(name) for name in names for ema in emas],
            [new[name] for name in names for new in candidates],
        )
    for ema in emas:
        ema._candidate = None


def recently_restarted(now: Stacked) -> torch.Tensor:
    """`ThresholdEMA.recently_restarted` of several layers, [L, 1]."""
    restarted_at, updates = now["restarted_at"], now["num_updates"]
    return ((restarted_at > 0) & (updates - restarted_at <= RECENT)).sum(dim=1, keepdim=True)
