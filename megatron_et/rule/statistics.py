"""What one router counts in a global batch: integers that add up over micro-batches and ranks, whatever the
layout; and the quantile of the whole batch, which comes of their sum.

All counts are int32: none can pass the tokens of a global batch, and one of 2^31 tokens is refused (I7).

Dimension letters: T tokens, E experts, F = E + 1 fan-outs (0..E), B bins, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_et.rule.quantile import Count, Histogram, capacity_loads, expected_load
from megatron_et.rule.threshold import ThresholdEMA


@dataclass(frozen=True)
class BatchCounts:
    """The counts of one router as named views of its integer vector: int32 while they are counted, int64 once
    they are reduced."""

    usage_E: torch.Tensor
    """Tokens that each expert took."""
    at_bound_E: torch.Tensor
    """Micro-batches (over all ranks) in which a capacity bound, not the threshold, decided the expert's
    load."""
    fanout_F: torch.Tensor
    """Tokens with 0, 1, ..., E routed experts."""
    nonfinite_E: torch.Tensor
    """Router logits of each expert that were NaN or infinite."""
    tokens: torch.Tensor
    """[1], unpadded tokens."""
    micro_batches: torch.Tensor
    """[1], forward passes that were counted, summed over ranks."""

    @staticmethod
    def size(num_experts: int) -> int:
        """Length of the integer vector that `split` takes."""
        return 4 * num_experts + 3

    @classmethod
    def split(cls, counts: torch.Tensor, num_experts: int) -> "BatchCounts":
        """Views into a [size(E)] vector, or into several, [L, size(E)]."""
        E = num_experts
        return cls(*counts.split([E, E, E + 1, E, 1, 1], dim=-1))


@dataclass(frozen=True)
class BatchRecord:
    """What one router did in a global batch, summed over all its ranks; kept until the next batch for
    logging."""

    counts: BatchCounts
    thresholds_E: torch.Tensor
    """fp32, those that routed this batch; NaN before the first update."""
    cutoffs_E: torch.Tensor
    """fp64, the population quantile of this batch; NaN when it had none."""
    num_updates: torch.Tensor
    """[1] int64, updates that the thresholds had when they routed this batch: says in which phase it was."""
    restarted: torch.Tensor
    """[1] int64, experts whose EMA the guard started again in the batches before (threshold.RECENT)."""


@dataclass(frozen=True)
class Counters:
    """Where a kernel counts a micro-batch; everything is added to."""

    counts: torch.Tensor
    """int32, laid out as BatchCounts."""
    histogram: Histogram
    """Of the logits."""


class RouterStatistics:
    """Accumulators of one router for the global batch in flight. Never saved: a checkpoint falls between
    batches.

    Plain tensors, not buffers: Float16Module would cast them, and wrappers would save or broadcast them.
    """

    def __init__(
        self, num_experts: int, topk: int, *, device: torch.device | int | str | None = None
    ) -> None:
        self.num_experts, self.topk = num_experts, topk
        self.counts = torch.zeros(BatchCounts.size(num_experts), dtype=torch.int32, device=device)
        self._histogram = Histogram(num_experts, device=device)

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
            torch.ones(num_tokens, dtype=torch.int32, device=logits_TE.device)
            if padding_mask_T is None
            else (~padding_mask_T).int()
        )
        # index_add_ and not bincount, which asks the device for its largest value and so stalls the host.
        now.fanout_F.index_add_(0, routing_map_TE.sum(dim=1), valid_T)
        now.tokens.add_(valid_T.sum())
        now.micro_batches.add_(1)
        now.nonfinite_E.add_((~logits_TE.isfinite() & valid_T.bool().unsqueeze(1)).sum(dim=0))
        if bounds is not None:
            now.at_bound_E.add_((bounds[0] > thresholds.value) | (bounds[1] < thresholds.value))
        self.counters(thresholds).histogram.add(logits_TE, padding_mask_T)

    def counters(self, thresholds: ThresholdEMA) -> Counters:
        """Where a kernel counts in place of `add`: bins lie around the last batch's cutoffs."""
        self._histogram.centers_E = thresholds.last_cutoff
        return Counters(self.counts, self._histogram)

    @property
    def integer_parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Everything that `add` writes to and that is summed over ranks, flat int32. Changed in place only:
        CUDA graphs hold on to the memory."""
        return self.counts, self._histogram.counts_EB.view(-1)

    def size(self) -> int:
        """Numbers in `integer_parts`."""
        return sum(part.numel() for part in self.integer_parts)

    def reduced(
        self, integers: torch.Tensor, centers_E: torch.Tensor, guard: float | None = None
    ) -> tuple[BatchCounts, torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """Counts (int64), cutoffs [experts] fp64, their validity [1] bool and the guard's band of the sums
        over all ranks.

        The cutoff is the quantile at rho of all tokens of the global batch, to within a bin: counts add up
        exactly, so it is bitwise the same for every split of the batch over micro-batches, accumulation steps
        and ranks (I3). It is not valid when the batch has less than one token for an expert.

        Args:
            integers: sum of `integer_parts`, one after the other.
            centers_E: last cutoffs, as given to `add`.
            guard: G; None asks for no band.

        With a first dimension L on all tensors, those of L routers of one kind at once.
        """
        size = BatchCounts.size(self.num_experts)
        # A copy: records live until the next batch, and a view would keep the histograms of all layers with
        # it. In int64: tokens * topk may pass 2^31.
        counts = BatchCounts.split(integers[..., :size].long(), self.num_experts)
        # Unflattened, a part of each layer's vector needs no copy.
        counts_EB = integers[..., size:].unflatten(-1, (self.num_experts, self._histogram.bins))
        histogram = Histogram.of_counts(counts_EB, centers_E)
        k = expected_load(counts.tokens, self.topk, self.num_experts)
        [cutoffs_E] = histogram.kth_largest_of_several([k])
        valid = counts.tokens * self.topk >= self.num_experts
        band = None if guard is None else _band(histogram, k, counts.tokens, guard)
        return counts, cutoffs_E, valid, band

    def reset(self) -> None:
        """Start the next global batch."""
        for accumulator in self.integer_parts:
            accumulator.zero_()


def _band(
    histogram: Histogram, k: Count, num_tokens: torch.Tensor, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits between which a threshold gives its expert from (1-share)k to (1+share)k of the tokens.

    Returns:
        (lower, upper): the one after the (1+share)k-th largest, since a threshold above it gives no more than
        that, and the (1-share)k-th largest, each [experts] fp64; -inf where that many tokens are more than
        there are, +inf where none are too few.
    """
    fewest, most = capacity_loads(k, share)
    wanted: Sequence[Count] = [most + 1, fewest]
    lower_E, upper_E = histogram.kth_largest_of_several(wanted)
    return torch.where(num_tokens > most, lower_E, -torch.inf), upper_E
