"""Pool quantiles: which logit is the k-th largest of an expert.

Three answers to one question: `kth_largest` of a pool that is at hand, `kth_largest_of_parts` of a pool that
is spread over ranks (exact, without gathering logits), and `Histogram` of a pool that is spread over
micro-batches and ranks (to within a bin, with one reduction at the end). Nothing here communicates.

Dimension letters: T tokens of the pool, E experts, B bins, Q quantiles asked for at once.
"""

import functools
from collections.abc import Callable, Sequence

import torch

type Count = int | torch.Tensor
"""A number of tokens: an int, or an int64 tensor that stays on its device."""

type Select = Callable[[torch.Tensor, Sequence[Count], torch.Tensor | None], list[torch.Tensor]]
"""`kth_largest_of_several`, or a kernel in its place."""

BINS_PER_OCTAVE = 16
MANTISSA_SHIFT = 23 - 4
"""Bits of an fp32 mantissa below the four that number a bin inside its octave."""


def expected_load(num_tokens: Count, topk: int, num_experts: int) -> Count:
    """k = floor(rho * N): tokens that one expert should take of a pool of N, with rho = topk / num_experts
    (eq. 4).

    Args:
        num_tokens: N, an int or an int64 tensor (a count of unpadded tokens that stays on the device).
    """
    return num_tokens * topk // num_experts


def kth_largest(
    logits_TE: torch.Tensor, k: Count, *, padding_mask_T: torch.Tensor | None = None
) -> torch.Tensor:
    """The k-th largest logit of every expert (column), exactly.

    A token whose logit equals the cutoff passes it (`>=`), so at least k tokens pass and, with ties at the
    cutoff, more.

    Args:
        logits_TE: [tokens, experts], any floating dtype.
        k: tokens wanted per expert, an int or a one-element int64 tensor. More than there are tokens means
            all of them; 0 (or an empty pool) means none, and the cutoff is +inf.
        padding_mask_T: [tokens] bool, True for tokens that do not belong to the pool.

    Returns:
        cutoffs [experts], dtype of the logits.
    """
    return kth_largest_of_several(logits_TE, [k], padding_mask_T)[0]


def kth_largest_of_several(
    logits_TE: torch.Tensor, ks: Sequence[Count], padding_mask_T: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """`kth_largest` for several k, cheaper than one by one. No number crosses from the host to the device,
    which a CUDA graph could not hold."""
    if padding_mask_T is None and not any(isinstance(k, torch.Tensor) for k in ks):
        return _select_by_topk(logits_TE, [int(k) for k in ks])
    return _select_by_sorting(logits_TE, ks, padding_mask_T)


def _select_by_topk(logits_TE: torch.Tensor, ks: Sequence[int]) -> list[torch.Tensor]:
    num_tokens, num_experts = logits_TE.shape
    ks = [max(min(k, num_tokens), 0) for k in ks]
    found = {0: logits_TE.new_full((num_experts,), torch.inf)}
    largest_ET = logits_TE.t().contiguous()
    # From the largest k down: the logits that it keeps hold those of the next one.
    for k in sorted({*ks} - {0}, reverse=True):
        # Only the smallest of the k largest is wanted, so they need no order among themselves.
        largest_ET = largest_ET.topk(k, dim=1, sorted=False).values
        found[k] = largest_ET.amin(dim=1)
    return [found[k] for k in ks]


def _select_by_sorting(
    logits_TE: torch.Tensor, ks: Sequence[Count], padding_mask_T: torch.Tensor | None
) -> list[torch.Tensor]:
    num_tokens, num_experts = logits_TE.shape
    if num_tokens == 0:
        return [logits_TE.new_full((num_experts,), torch.inf) for _ in ks]
    if padding_mask_T is not None:
        logits_TE = logits_TE.masked_fill(padding_mask_T.unsqueeze(1), -torch.inf)
    descending_TE = logits_TE.sort(dim=0, descending=True).values
    valid = num_tokens if padding_mask_T is None else num_tokens - padding_mask_T.sum()
    cutoffs = []
    for k in ks:
        k_11 = _smaller(k, valid).reshape(1, 1)
        row = (k_11 - 1).clamp(min=0).expand(1, num_experts)
        cutoffs.append(torch.where(k_11.squeeze(0) > 0, descending_TE.gather(0, row).squeeze(0), torch.inf))
    return cutoffs


def _smaller(a: Count, b: Count) -> torch.Tensor:
    """min of two counts, at least one of them a tensor."""
    if isinstance(a, torch.Tensor):
        return torch.minimum(a, b) if isinstance(b, torch.Tensor) else a.clamp(max=b)
    assert isinstance(b, torch.Tensor)
    return b.clamp(max=a)


def capacity_bounds(
    logits_TE: torch.Tensor,
    k: Count,
    capacity_factor: float | torch.Tensor,
    *,
    padding_mask_T: torch.Tensor | None = None,
    select: Select | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits between which a threshold keeps an expert's load within [(1-C)k, (1+C)k] tokens (F.1).

    `upper` is the (1-C)k-th and `lower` the (1+C)k-th largest logit, both counts rounded down; upper >=
    lower. With C = 0 both are the k-th largest (Expert Choice); with C >= 1 `upper` is +inf, so no missing
    token is filled in.

    Args:
        logits_TE: [tokens, experts].
        k: tokens wanted per expert.
        capacity_factor: C, a number or a one-element fp64 tensor that stays on its device.
        padding_mask_T: [tokens] bool, True for tokens that do not belong to the pool.
        select: finds the cutoffs; `kth_largest_of_several` if left out.

    Returns:
        (lower, upper), each [experts].
    """
    select = select or kth_largest_of_several
    if not isinstance(capacity_factor, torch.Tensor) and capacity_factor == 0.0:
        [both] = select(logits_TE, [k], padding_mask_T)
        return both, both
    upper, lower = select(logits_TE, [*capacity_loads(k, capacity_factor)], padding_mask_T)
    return lower, upper


def capacity_loads(k: Count, capacity_factor: float | torch.Tensor) -> tuple[Count, Count]:
    """Fewest and most tokens that an expert may take: (1-C)k, not below 0, and (1+C)k, rounded down (F.1)."""

    def scaled(factor: float | torch.Tensor) -> Count:
        # float64 like the authors' int(k * (1 +- C)); a tensor stays on its device.
        if isinstance(factor, torch.Tensor):
            return (k * factor).long()
        return int(k * factor) if isinstance(k, int) else (k.double() * factor).long()

    if isinstance(capacity_factor, torch.Tensor):
        return scaled((1.0 - capacity_factor).clamp(min=0.0)), scaled(1.0 + capacity_factor)
    return scaled(max(1.0 - capacity_factor, 0.0)), scaled(1.0 + capacity_factor)


RADIX_BITS = 8
"""Digits of the radix selection: four rounds of 256 counts for a 32-bit key."""


def _ordered_keys(logits: torch.Tensor) -> torch.Tensor:
    """int64 keys in [0, 2^32) that order like the fp32 logits; -0.0 and 0.0 share one."""
    bits = (logits.float() + 0.0).view(torch.int32).long()
    return torch.where(bits < 0, -1 - bits, bits + 2**31)


def _logits_of_keys(keys: torch.Tensor) -> torch.Tensor:
    """Inverse of `_ordered_keys`."""
    bits = torch.where(keys < 2**31, -1 - keys, keys - 2**31)
    return bits.int().view(torch.float32)


@torch.no_grad()
def kth_largest_of_parts(
    logits_TE: torch.Tensor,
    loads: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    add_up: Callable[[torch.Tensor], None],
    *,
    padding_mask_T: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """k-th largest logits of the pool that several ranks hold together, exactly, for several k at once.

    Radix selection: the 32 bits of an order-preserving key are found 8 at a time from counts summed over the
    ranks. Four sums of [Q, E, 256] int32, whatever the number of tokens; every rank must call it, with or
    without tokens.

    Args:
        logits_TE: [tokens, experts] fp32 of this rank.
        loads: gives the wanted k, int64 scalars, from N, the pool's number of tokens (an int64 scalar on the
            device).
        add_up: sums a tensor over the ranks that share the pool, in place.
        padding_mask_T: [tokens] bool, True for tokens that do not belong to the pool.

    Returns:
        for each k the cutoffs [experts] fp32, as `kth_largest` of the gathered logits would give them.
    """
    num_experts = logits_TE.shape[1]
    buckets = 1 << RADIX_BITS
    keys_TE = _ordered_keys(logits_TE)
    row_E = torch.arange(num_experts, device=logits_TE.device) * buckets
    valid_T = 1 if padding_mask_T is None else (~padding_mask_T).int().unsqueeze(1)
    # The digits found so far. None at first, so that every key agrees with them, for whichever k.
    prefix_QE = torch.zeros(1, num_experts, dtype=torch.int64, device=logits_TE.device)
    wanted_QE = remaining_QE = prefix_QE
    for shift in range(32 - RADIX_BITS, -1, -RADIX_BITS):
        bucket_TE = ((keys_TE >> shift) & (buckets - 1)) + row_E
        counts = torch.zeros(
            len(prefix_QE), num_experts * buckets, dtype=torch.int32, device=logits_TE.device
        )
        for counts_EB, prefix_E in zip(counts, prefix_QE, strict=True):
            candidate_TE = (keys_TE >> (shift + RADIX_BITS) == prefix_E).int() * valid_T
            counts_EB.index_add_(0, bucket_TE.reshape(-1), candidate_TE.reshape(-1))
        add_up(counts)
        descending_QEB = counts.view(-1, num_experts, buckets).flip(2)
        if shift == 32 - RADIX_BITS:
            total = descending_QEB[0, 0].sum()
            wanted_Q = torch.stack([torch.minimum(k, total) for k in loads(total)])
            wanted_QE = remaining_QE = wanted_Q.unsqueeze(1).expand(-1, num_experts)
            descending_QEB = descending_QEB.expand(len(wanted_Q), -1, -1)
        cumulative_QEB = descending_QEB.cumsum(dim=2)
        place_QE1 = (
            (cumulative_QEB < remaining_QE.unsqueeze(2)).sum(dim=2, keepdim=True).clamp_(max=buckets - 1)
        )
        above_QE1 = cumulative_QEB.gather(2, place_QE1) - descending_QEB.gather(2, place_QE1)
        remaining_QE = remaining_QE - above_QE1.squeeze(2)
        prefix_QE = (prefix_QE << RADIX_BITS) | (buckets - 1 - place_QE1.squeeze(2))
    cutoffs_QE = torch.where(wanted_QE > 0, _logits_of_keys(prefix_QE), torch.inf)
    return list(cutoffs_QE.unbind(0))


class Histogram:
    """Integer counts (int32: pools of less than 2^31 tokens) of an expert's logits in bins around a centre;
    quantiles of any merged pool come from them.

    Bins are spaced log-linearly on both sides of the centre: 16 in every octave of |logit - centre|, from
    2^-10 to 2^6 for 512 bins. They are fine where the quantile is expected and reach everywhere: the
    outermost bins take the rest of the number line, so a quantile that is far off is only found coarsely, and
    the next batch, centred on that finding, finds it finely. No scale has to be known, and the first batch
    starts at centre 0.

    The bin of a logit is read off its bits (sign, exponent and four bits of mantissa of logit - centre), so
    it is the same on every device, and counts are integers: `merge` is exact, and a pool's quantile does not
    depend on how the pool was split over micro-batches and ranks.

    Args:
        num_experts: E.
        bins: bins per expert, a multiple of 64.
        centers: [E] fp32, where each expert's quantile is expected; 0 if left out.
        device: where the counts live.
    """

    def __init__(
        self,
        num_experts: int,
        bins: int = 512,
        *,
        centers: torch.Tensor | None = None,
        device: torch.device | int | str | None = None,
    ) -> None:
        if bins <= 0 or bins % 64:
            raise ValueError(f"bins is {bins}: it must be a positive multiple of 64")
        self.num_experts, self.bins = num_experts, bins
        self.centers_E = (
            torch.zeros(num_experts, device=device) if centers is None else centers.detach().float().clone()
        )
        self.counts_EB = torch.zeros(num_experts, bins, dtype=torch.int32, device=self.centers_E.device)

    @classmethod
    def of_counts(cls, counts_EB: torch.Tensor, centers_E: torch.Tensor) -> "Histogram":
        """Counts that are there already, taken over without a copy; of L layers at once with a first
        dimension L, on what it returns too."""
        histogram = cls.__new__(cls)
        histogram.num_experts, histogram.bins = counts_EB.shape[-2:]
        histogram.centers_E, histogram.counts_EB = centers_E, counts_EB
        return histogram

    @property
    def _octaves(self) -> tuple[int, int]:
        """Exponents of the smallest distance that has an octave of its own and of the largest."""
        octaves = self.bins // (2 * BINS_PER_OCTAVE)
        return octaves * 3 // 8 - octaves, octaves * 3 // 8

    @torch.no_grad()
    def add(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        """Count one part of the pool. No communication, no host synchronisation.

        Args:
            logits: [tokens, experts] fp32.
            padding_mask: [tokens] bool, True for tokens that do not belong to the pool.
        """
        half = self.bins // 2
        distance_TE = logits - self.centers_E
        # In place and in int32: T * E of anything is memory that a micro-batch has to find.
        bin_TE = distance_TE.abs().view(torch.int32)
        bin_TE.bitwise_right_shift_(MANTISSA_SHIFT).sub_(self.bits_of_first_octave).clamp_(0, half - 1)
        # half + magnitude, and half - 1 - magnitude below the centre: -1 - m is m with all bits turned.
        below_TE = (distance_TE >= 0).logical_not_().int().neg_()
        row_E = torch.arange(self.num_experts, dtype=torch.int32, device=logits.device) * self.bins + half
        bin_TE.bitwise_xor_(below_TE).add_(row_E)
        if padding_mask is None:
            weights = self.counts_EB.new_ones(1).expand(bin_TE.numel())  # no copy
        else:
            weights = (~padding_mask).int().unsqueeze(1).expand(bin_TE.shape).reshape(-1)
        self.counts_EB.view(-1).index_add_(0, bin_TE.reshape(-1), weights)

    @property
    def bits_of_first_octave(self) -> int:
        """Upper bits (sign, exponent and four bits of mantissa) of the smallest distance that has a bin of
        its own."""
        return (127 + self._octaves[0]) * BINS_PER_OCTAVE

    def merge(self, other: "Histogram") -> None:
        """Add another part of the pool. Raises ValueError when it was counted in other bins."""
        if other.bins != self.bins or not torch.equal(other.centers_E, self.centers_E):
            raise ValueError(
                "histograms with different bins or centres count different things and do not merge"
            )
        self.counts_EB += other.counts_EB

    def kth_largest(self, k: Count) -> torch.Tensor:
        """The k-th largest logit of every expert, to within a bin, interpolated linearly inside it.

        Args:
            k: tokens wanted per expert, an int or an int64 tensor of one or of E elements; as in the function
                `kth_largest`, all tokens if there are fewer, and +inf for 0 or an empty histogram.

        Returns:
            cutoffs [experts] fp64.
        """
        return self.kth_largest_of_several([k])[0]

    def kth_largest_of_several(self, ks: Sequence[Count]) -> list[torch.Tensor]:
        """`kth_largest` for several k from one sum over the bins."""
        device = self.counts_EB.device
        # Tokens up to and in each bin: the only temporary of the size of the counts, which many layers share.
        upto_EB = self.counts_EB.cumsum(dim=-1, dtype=torch.int32)
        total_E1 = upto_EB[..., -1:].long()
        # broadcast_to and not expand: one k may stand for all experts, or for all of a layer.
        wanted = [torch.as_tensor(k, device=device).broadcast_to(total_E1.shape[:-1]) for k in ks]
        k_EQ = torch.minimum(torch.stack(wanted, dim=-1), total_E1)
        # The bins that hold, together with those below them, tokens below the k largest only.
        bin_EQ = torch.searchsorted(upto_EB, (total_E1 - k_EQ).int(), right=True).clamp_(max=self.bins - 1)
        inside_EQ = self.counts_EB.gather(-1, bin_EQ)
        above_EQ = total_E1 - upto_EB.gather(-1, bin_EQ)
        edges = self.edges()
        high_EQ, low_EQ = edges[bin_EQ + 1], edges[bin_EQ]
        share_EQ = (k_EQ - above_EQ).double() / inside_EQ.clamp(min=1)
        cutoffs_EQ = self.centers_E.double().unsqueeze(-1) + high_EQ - (high_EQ - low_EQ) * share_EQ
        return list(torch.where(k_EQ > 0, cutoffs_EQ, torch.inf).unbind(-1))

    def edges(self) -> torch.Tensor:
        """Distances from the centre that bound the bins, ascending, [bins + 1] fp64."""
        return _edges(self.bins, self.bits_of_first_octave, self.counts_EB.device)


@functools.cache
def _edges(bins: int, bits_of_first_octave: int, device: torch.device) -> torch.Tensor:
    # Once a device. masked_fill and not an assignment, which would copy its number to the device and wait.
    steps = torch.arange(bins // 2 + 1, dtype=torch.int32, device=device)
    positive = ((steps + bits_of_first_octave) << MANTISSA_SHIFT).view(torch.float32).double()
    positive.masked_fill_(steps == 0, 0.0)
    return torch.cat([-positive.flip(0), positive[1:]])
