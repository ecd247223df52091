"""Estimators of the global batch's quantile: what a router accumulates for it, and the cutoffs that come of
the sum.

Both accumulate flat vectors that are added over micro-batches and ranks; neither communicates or waits for
the device.

Dimension letters: T tokens of a micro-batch, E experts, B bins.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from megatron_et.config import Quantile
from megatron_et.rule.quantile import Count, Histogram, capacity_loads, expected_load, kth_largest

type Device = torch.device | int | str | None


class CutoffEstimator(Protocol):
    """What `RouterStatistics` and the reduction need of an estimator."""

    integers: torch.Tensor
    """Flat int64 accumulator, summed exactly."""
    reals: torch.Tensor
    """Flat fp64 accumulator, empty for an estimator that only counts."""

    def add(
        self,
        logits_TE: torch.Tensor,
        num_tokens: Count,
        padding_mask_T: torch.Tensor | None,
        centers_E: torch.Tensor,
    ) -> None:
        """Accumulate one micro-batch of `num_tokens` unpadded tokens; centers_E is where quantiles are
        expected."""

    def histogram(self, centers_E: torch.Tensor) -> Histogram | None:
        """The histogram that `add` counts into, for a kernel that counts in its place; None if there is
        none."""

    def cutoffs(
        self, integers: torch.Tensor, reals: torch.Tensor, num_tokens: torch.Tensor, centers_E: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From the reduced accumulators: cutoffs [experts] fp64, and [1] bool, False when the batch has
        none.

        With a first dimension L on all arguments, those of L layers of one kind at once.
        """


class KthLargestMean:
    """The paper's estimator: the mean over micro-batches and ranks of each one's k-th largest logit.

    The sum is fp64, so that the order of adding fp32 values does not show in the fp32 threshold. It is not
    the quantile of the global batch, and it depends on how the batch is split.
    """

    def __init__(self, num_experts: int, topk: int, device: Device = None) -> None:
        self.num_experts, self.topk = num_experts, topk
        self.integers = torch.zeros(1, dtype=torch.int64, device=device)
        self.reals = torch.zeros(num_experts, dtype=torch.float64, device=device)

    def add(
        self,
        logits_TE: torch.Tensor,
        num_tokens: Count,
        padding_mask_T: torch.Tensor | None,
        centers_E: torch.Tensor,  # noqa: ARG002 (the protocol's)
    ) -> None:
        """Add the k-th largest logits of this micro-batch; one too small for a token per expert has none."""
        k = expected_load(num_tokens, self.topk, self.num_experts)
        # 0 tokens wanted gives +inf: the mark of a micro-batch that has no cutoff and adds nothing.
        cutoffs_E = kth_largest(logits_TE, k, padding_mask_T=padding_mask_T).double()
        self.reals.add_(cutoffs_E.where(cutoffs_E < torch.inf, 0.0))
        self.integers.add_((cutoffs_E < torch.inf).all())

    def histogram(self, centers_E: torch.Tensor) -> Histogram | None:  # noqa: ARG002
        """None."""
        return None

    def cutoffs(
        self,
        integers: torch.Tensor,
        reals: torch.Tensor,
        num_tokens: torch.Tensor,  # noqa: ARG002
        centers_E: torch.Tensor,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean."""
        return reals / integers, integers > 0


class HistogramQuantile:
    """The quantile of all tokens of the global batch, to within a bin: counts add up exactly, so it is
    bitwise the same for every split of the batch over micro-batches, accumulation steps and ranks (invariant
    I3)."""

    def __init__(self, num_experts: int, topk: int, device: Device = None) -> None:
        self.num_experts, self.topk = num_experts, topk
        self._histogram = Histogram(num_experts, device=device)
        self.integers = self._histogram.counts_EB.view(-1)
        self.reals = torch.zeros(0, dtype=torch.float64, device=device)

    def add(
        self,
        logits_TE: torch.Tensor,
        num_tokens: Count,  # noqa: ARG002
        padding_mask_T: torch.Tensor | None,
        centers_E: torch.Tensor,
    ) -> None:
        """Count the logits of this micro-batch."""
        self.histogram(centers_E).add(logits_TE, padding_mask_T)

    def histogram(self, centers_E: torch.Tensor) -> Histogram:
        """The counts, in bins around the centres given."""
        self._histogram.centers_E = centers_E
        return self._histogram

    def cutoffs(
        self,
        integers: torch.Tensor,
        reals: torch.Tensor,  # noqa: ARG002
        num_tokens: torch.Tensor,
        centers_E: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The quantile at rho of the whole batch."""
        k = expected_load(num_tokens, self.topk, self.num_experts)
        [cutoffs_E] = self._kth_largest(integers, centers_E, [k])
        return cutoffs_E, num_tokens * self.topk >= self.num_experts

    def band(
        self, integers: torch.Tensor, num_tokens: torch.Tensor, centers_E: torch.Tensor, share: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits between which a threshold gives its expert from (1-share)k to (1+share)k of the tokens.

        Returns:
            (lower, upper): the one after the (1+share)k-th largest, since a threshold above it gives no more
            than that, and the (1-share)k-th largest, each [experts] fp64; -inf where that many tokens are
            more than there are, +inf where none are too few. Of L layers at once as for `cutoffs`.
        """
        fewest, most = capacity_loads(expected_load(num_tokens, self.topk, self.num_experts), share)
        lower_E, upper_E = self._kth_largest(integers, centers_E, [most + 1, fewest])
        return torch.where(num_tokens > most, lower_E, -torch.inf), upper_E

    def _kth_largest(
        self, integers: torch.Tensor, centers_E: torch.Tensor, ks: Sequence[Count]
    ) -> list[torch.Tensor]:
        # Unflattened, a part of each layer's vector needs no copy.
        counts_EB = integers.unflatten(-1, (self.num_experts, self._histogram.bins))
        return Histogram.of_counts(counts_EB, centers_E).kth_largest_of_several(ks)


def make_estimator(quantile: Quantile, num_experts: int, topk: int, device: Device = None) -> CutoffEstimator:
    """The estimator that --moe-et-quantile names."""
    kind = HistogramQuantile if quantile == "histogram" else KthLargestMean
    return kind(num_experts, topk, device)
