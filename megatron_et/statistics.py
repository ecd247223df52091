"""What one router counts in a global batch: integers that add up over micro-batches and ranks, whatever the
layout.

Dimension letters: T tokens, E experts, F = E + 1 fan-outs (0..E).
"""

from dataclasses import dataclass

import torch

from megatron_et.quantile import expected_load, kth_largest


@dataclass(frozen=True)
class BatchCounts:
    """The counts of one router as named views of its integer vector; all int64."""

    usage_E: torch.Tensor
    """Tokens that each expert took."""
    at_bound_E: torch.Tensor
    """Micro-batches (over all ranks) in which a capacity bound, not the threshold, decided the expert's
    load."""
    fanout_F: torch.Tensor
    """Tokens with 0, 1, ..., E routed experts."""
    tokens: torch.Tensor
    """[1], unpadded tokens."""
    micro_batches: torch.Tensor
    """[1], forward passes that were counted, summed over ranks."""
    nonfinite: torch.Tensor
    """[1], router logits that were NaN or infinite."""
    samples: torch.Tensor
    """[1], cutoffs in the estimator's sum (kth-largest)."""

    @staticmethod
    def size(num_experts: int) -> int:
        """Length of the integer vector that `split` takes."""
        return 3 * num_experts + 1 + 4

    @classmethod
    def split(cls, counts: torch.Tensor, num_experts: int) -> "BatchCounts":
        """Views into a [size(E)] vector."""
        parts = counts.split([num_experts, num_experts, num_experts + 1, 1, 1, 1, 1])
        return cls(*parts)


@dataclass(frozen=True)
class BatchRecord:
    """What one router did in a global batch, summed over all its ranks; kept until the next batch for
    logging."""

    counts: BatchCounts
    thresholds_E: torch.Tensor
    """fp32, those that routed this batch; NaN before the first update."""
    cutoffs_E: torch.Tensor
    """fp64, the population quantile of this batch; NaN when it had none."""
    phase: str
    """warmup, anneal or threshold."""


class RouterStatistics:
    """Accumulators of one router for the global batch in flight. Never saved: a checkpoint falls between
    batches.

    `counts` holds everything that is an integer. `cutoff_sum` is the paper's estimator: the sum of
    per-micro-batch k-th largest logits, whose mean stands for the quantile of the global batch. fp64, so that
    the order of adding fp32 values does not show in the fp32 threshold.
    """

    def __init__(
        self, num_experts: int, topk: int, *, device: torch.device | int | str | None = None
    ) -> None:
        self.num_experts = num_experts
        self.topk = topk
        # Plain tensors, not buffers: Float16Module would cast the sum, and wrappers would save or broadcast
        # both.
        self.counts = torch.zeros(BatchCounts.size(num_experts), dtype=torch.int64, device=device)
        self.cutoff_sum = torch.zeros(num_experts, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(
        self,
        logits_TE: torch.Tensor,
        routing_map_TE: torch.Tensor,
        thresholds_E: torch.Tensor,
        bounds: tuple[torch.Tensor, torch.Tensor] | None,
        padding_mask_T: torch.Tensor | None,
    ) -> None:
        """Count one micro-batch of this rank. No communication, no host synchronisation.

        Args:
            logits_TE: [tokens, experts] fp32.
            routing_map_TE: [tokens, experts] bool, as routed (before any padding of the map).
            thresholds_E: [experts], before the clamp.
            bounds: (lower, upper) of the clamp, each [experts], or None.
            padding_mask_T: [tokens] bool, True for tokens that do not count.
        """
        self._to(logits_TE.device)
        now = BatchCounts.split(self.counts, self.num_experts)
        num_tokens = logits_TE.shape[0]
        now.usage_E.add_(routing_map_TE.sum(dim=0))
        valid_T = (
            torch.ones(num_tokens, dtype=torch.int64, device=logits_TE.device)
            if padding_mask_T is None
            else (~padding_mask_T).long()
        )
        # index_add_ and not bincount, which asks the device for its largest value and so stalls the host.
        now.fanout_F.index_add_(0, routing_map_TE.sum(dim=1), valid_T)
        now.tokens.add_(valid_T.sum())
        now.micro_batches.add_(1)
        nonfinite_T = (~logits_TE.isfinite()).sum(dim=1)
        now.nonfinite.add_((nonfinite_T * valid_T).sum())
        if bounds is not None:
            now.at_bound_E.add_((bounds[0] > thresholds_E) | (bounds[1] < thresholds_E))
        self._add_cutoffs(
            logits_TE, valid_T.sum() if padding_mask_T is not None else num_tokens, padding_mask_T, now
        )

    def _add_cutoffs(
        self,
        logits_TE: torch.Tensor,
        num_tokens: int | torch.Tensor,
        padding_mask_T: torch.Tensor | None,
        now: BatchCounts,
    ) -> None:
        k = expected_load(num_tokens, self.topk, self.num_experts)
        cutoffs_E = kth_largest(logits_TE, k, padding_mask_T=padding_mask_T).double()
        # A pool too small for one token per expert has no k-th largest logit: it adds nothing.
        if isinstance(k, int):
            if k > 0:
                self.cutoff_sum.add_(cutoffs_E)
                now.samples.add_(1)
        else:
            self.cutoff_sum.add_(torch.where(k > 0, cutoffs_E, 0.0))
            now.samples.add_(k > 0)

    def _to(self, device: torch.device) -> None:
        if self.counts.device != device:
            self.counts = self.counts.to(device)
            self.cutoff_sum = self.cutoff_sum.to(device)

    def reset(self) -> None:
        """Start the next global batch."""
        self.counts.zero_()
        self.cutoff_sum.zero_()
