"""What one router counts in a global batch: integers that add up over micro-batches and ranks, whatever the
layout.

Dimension letters: T tokens, E experts, F = E + 1 fan-outs (0..E).
"""

from dataclasses import dataclass

import torch

from megatron_et.config import Quantile
from megatron_et.rule.estimator import HistogramQuantile, make_estimator
from megatron_et.rule.quantile import Histogram
from megatron_et.rule.threshold import ThresholdEMA


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

    @staticmethod
    def size(num_experts: int) -> int:
        """Length of the integer vector that `split` takes."""
        return 3 * num_experts + 1 + 3

    @classmethod
    def split(cls, counts: torch.Tensor, num_experts: int) -> "BatchCounts":
        """Views into a [size(E)] vector, or into several, [L, size(E)]."""
        parts = counts.split([num_experts, num_experts, num_experts + 1, 1, 1, 1], dim=-1)
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
    restarted: torch.Tensor
    """[1] int64, experts whose EMA the guard started again in the batches before (threshold.RECENT)."""


@dataclass(frozen=True)
class Counters:
    """Where a kernel counts a micro-batch; everything is added to."""

    counts: torch.Tensor
    """int64, laid out as BatchCounts."""
    histogram: Histogram | None
    """Of the logits; None where the estimator keeps none."""


class RouterStatistics:
    """Accumulators of one router for the global batch in flight. Never saved: a checkpoint falls between
    batches.

    Plain tensors, not buffers: Float16Module would cast them, and wrappers would save or broadcast them.
    """

    def __init__(
        self,
        num_experts: int,
        topk: int,
        *,
        quantile: Quantile = "histogram",
        device: torch.device | int | str | None = None,
    ) -> None:
        self.num_experts = num_experts
        self.counts = torch.zeros(BatchCounts.size(num_experts), dtype=torch.int64, device=device)
        self.estimator = make_estimator(quantile, num_experts, topk, device)

    @torch.no_grad()
    def add(
        self,
        logits_TE: torch.Tensor,
        routing_map_TE: torch.Tensor,
        thresholds: ThresholdEMA,
        bounds: tuple[torch.Tensor, torch.Tensor] | None = None,
        padding_mask_T: torch.Tensor | None = None,
    ) -> None:
        """Count one micro-batch of this rank. No communication, no host synchronisation.

        Args:
            logits_TE: [tokens, experts] fp32.
            routing_map_TE: [tokens, experts] bool, as routed (before any padding of the map).
            thresholds: those that routed, before the clamp.
            bounds: (lower, upper) of the clamp, each [experts], or None.
            padding_mask_T: [tokens] bool, True for tokens that do not count.
        """
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
            now.at_bound_E.add_((bounds[0] > thresholds.value) | (bounds[1] < thresholds.value))
        self.add_to_pool(logits_TE, thresholds, padding_mask_T)

    def add_to_pool(
        self, logits_TE: torch.Tensor, thresholds: ThresholdEMA, padding_mask_T: torch.Tensor | None = None
    ) -> None:
        """The part of `add` that the quantile of the global batch needs; arguments as there."""
        num_tokens = logits_TE.shape[0] if padding_mask_T is None else (~padding_mask_T).sum()
        self.estimator.add(logits_TE, num_tokens, padding_mask_T, thresholds.last_cutoff)

    def counters(self, thresholds: ThresholdEMA) -> Counters:
        """Where a kernel counts in place of `add`; without a histogram there, `add_to_pool` must follow."""
        return Counters(self.counts, self.estimator.histogram(thresholds.last_cutoff))

    @property
    def integer_parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Everything that is summed as integers, flat int64."""
        return self.counts, self.estimator.integers

    def integers(self) -> torch.Tensor:
        """`integer_parts` as one vector."""
        return torch.cat(self.integer_parts)

    def sizes(self) -> tuple[int, int]:
        """Lengths of `integers()` and of the estimator's `reals`."""
        return self.counts.numel() + self.estimator.integers.numel(), self.estimator.reals.numel()

    def reduced(
        self, integers: torch.Tensor, reals: torch.Tensor, centers_E: torch.Tensor
    ) -> tuple[BatchCounts, torch.Tensor, torch.Tensor]:
        """Counts, cutoffs [experts] fp64 and their validity [1] bool of the sums over all ranks.

        Args:
            integers: sum of `integers()`.
            reals: sum of the estimator's `reals`.
            centers_E: last cutoffs, as given to `add`.

        With a first dimension L on all arguments, those of L routers of one kind at once.
        """
        size = BatchCounts.size(self.num_experts)
        # A copy: records live until the next batch, and a view would keep the histograms of all layers with
        # it.
        counts = BatchCounts.split(integers[..., :size].clone(), self.num_experts)
        cutoffs_E, valid = self.estimator.cutoffs(integers[..., size:], reals, counts.tokens, centers_E)
        return counts, cutoffs_E, valid

    def band(
        self, integers: torch.Tensor, num_tokens: torch.Tensor, centers_E: torch.Tensor, share: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The guard's band of the sums over all ranks: see `HistogramQuantile.band`; arguments as for
        `reduced`."""
        assert isinstance(self.estimator, HistogramQuantile), "the settings refuse a guard without histogram"
        return self.estimator.band(
            integers[..., BatchCounts.size(self.num_experts) :], num_tokens, centers_E, share
        )

    @property
    def accumulators(self) -> tuple[torch.Tensor, ...]:
        """Everything that `add` writes to. Changed in place only: CUDA graphs hold on to the memory."""
        return self.counts, self.estimator.integers, self.estimator.reals

    def reset(self) -> None:
        """Start the next global batch."""
        for accumulator in self.accumulators:
            accumulator.zero_()
