"""RouterStatistics against counting in Python loops (I3, I7).

T tokens, E experts, F = E + 1 fan-outs.
"""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_et.rule.quantile import capacity_bounds, expected_load
from megatron_et.rule.statistics import BatchCounts, RouterStatistics
from megatron_et.rule.threshold import ThresholdEMA

NAMES = ("usage_E", "at_bound_E", "fanout_F", "nonfinite_E", "tokens", "micro_batches")
# Few values, so that logits tie with one another, with thresholds and with bounds; all exact in fp32.
VALUES = st.sampled_from([-3.5, -1.0, -0.25, 0.0, 0.5, 2.0, 7.0])
ODD = st.sampled_from([math.nan, math.inf, -math.inf])


def integers(statistics: RouterStatistics) -> torch.Tensor:
    """All that travels."""
    return torch.cat(statistics.integer_parts)


def thresholds_at(values: torch.Tensor, centers: torch.Tensor | None = None) -> ThresholdEMA:
    """Thresholds `values` after batches of which the last had the cutoffs `centers`."""
    thresholds = ThresholdEMA(len(values))
    thresholds.value.copy_(values)
    thresholds.last_cutoff.copy_(torch.zeros(len(values)) if centers is None else centers)
    return thresholds


@dataclass
class MicroBatch:
    """Arguments of RouterStatistics.add as Python lists."""

    topk: int
    logits: list[list[float]]
    routed: list[list[bool]]
    thresholds: list[float]
    bounds: tuple[list[float], list[float]] | None
    padding: list[bool] | None

    @property
    def num_experts(self) -> int:
        return len(self.thresholds)

    def add_to(self, statistics: RouterStatistics) -> None:
        tokens, experts = len(self.logits), self.num_experts
        bounds = None
        if self.bounds is not None:
            bounds = torch.tensor(self.bounds[0]), torch.tensor(self.bounds[1])
        statistics.add(
            torch.tensor(self.logits, dtype=torch.float32).reshape(tokens, experts),
            torch.tensor(self.routed, dtype=torch.bool).reshape(tokens, experts),
            thresholds_at(torch.tensor(self.thresholds)),
            bounds,
            None if self.padding is None else torch.tensor(self.padding, dtype=torch.bool),
        )

    def counted(self) -> RouterStatistics:
        statistics = RouterStatistics(self.num_experts, self.topk)
        self.add_to(statistics)
        return statistics

    def rows(self) -> list[list[float]]:
        """Logits of the tokens that count."""
        padding = self.padding or [False] * len(self.logits)
        return [row for row, pad in zip(self.logits, padding, strict=True) if not pad]

    def part(self, tokens: slice) -> "MicroBatch":
        return replace(
            self,
            logits=self.logits[tokens],
            routed=self.routed[tokens],
            padding=None if self.padding is None else self.padding[tokens],
        )


@st.composite
def micro_batches(
    draw: st.DrawFn, *, experts: int | None = None, topk: int | None = None, odd: bool = False
) -> MicroBatch:
    """Any micro-batch, empty ones included; with `odd`, some logits are NaN or infinite."""
    E = experts or draw(st.integers(1, 6))
    T = draw(st.integers(0, 13))
    value = st.one_of(VALUES, ODD) if odd else VALUES
    per_expert = st.lists(VALUES, min_size=E, max_size=E)
    padding = draw(st.none() | st.lists(st.booleans(), min_size=T, max_size=T))
    bounds = draw(st.none() | st.tuples(per_expert, per_expert))
    if bounds is not None:
        pairs = list(zip(*bounds, strict=True))
        bounds = [min(pair) for pair in pairs], [max(pair) for pair in pairs]
    routed = draw(st.lists(st.lists(st.booleans(), min_size=E, max_size=E), min_size=T, max_size=T).map(list))
    if padding is not None:
        # The rule sends padding nowhere.
        routed = [[False] * E if pad else row for row, pad in zip(routed, padding, strict=True)]
    return MicroBatch(
        topk=topk or draw(st.integers(1, E)),
        logits=draw(st.lists(st.lists(value, min_size=E, max_size=E), min_size=T, max_size=T)),
        routed=routed,
        thresholds=draw(per_expert),
        bounds=bounds,
        padding=padding,
    )


def named(statistics: RouterStatistics) -> dict[str, list[int]]:
    counts = BatchCounts.split(statistics.counts, statistics.num_experts)
    return {name: getattr(counts, name).tolist() for name in NAMES}


def cutoffs_of(*ranks: RouterStatistics) -> list[float] | None:
    """Cutoffs of the pool that several ranks counted, None when it has none."""
    sums = torch.stack([integers(rank) for rank in ranks]).sum(dim=0, dtype=torch.int32)
    _, cutoffs_E, valid, _ = ranks[0].reduced(sums, torch.zeros(ranks[0].num_experts))
    assert (cutoffs_E.dtype, valid.dtype, valid.shape) == (torch.float64, torch.bool, (1,))
    return cutoffs_E.tolist() if valid else None


def naive_counts(batch: MicroBatch) -> dict[str, list[int]]:
    E = batch.num_experts
    padding = batch.padding or [False] * len(batch.logits)
    tokens = [t for t, pad in enumerate(padding) if not pad]
    fanouts = [sum(batch.routed[t]) for t in tokens]
    at_bound = [0] * E
    if batch.bounds is not None:
        for e, (threshold, lower, upper) in enumerate(zip(batch.thresholds, *batch.bounds, strict=True)):
            at_bound[e] = int(min(max(threshold, lower), upper) != threshold)
    return {
        "usage_E": [sum(batch.routed[t][e] for t in tokens) for e in range(E)],
        "at_bound_E": at_bound,
        "fanout_F": [fanouts.count(n) for n in range(E + 1)],
        "tokens": [len(tokens)],
        "micro_batches": [1],
        "nonfinite_E": [sum(not math.isfinite(batch.logits[t][e]) for t in tokens) for e in range(E)],
    }


def naive_cutoffs(rows: list[list[float]], experts: int, topk: int) -> list[float] | None:
    """The k-th largest logit of every expert, None where k is 0."""
    k = len(rows) * topk // experts
    return [sorted((row[e] for row in rows), reverse=True)[k - 1] for e in range(experts)] if k else None


# --- one micro-batch ---


@given(micro_batches(odd=True))
def test_counts_equal_naive_counting(batch: MicroBatch) -> None:
    statistics = batch.counted()
    assert statistics.counts.dtype == torch.int32
    assert named(statistics) == naive_counts(batch)


@given(micro_batches())
def test_cutoffs_equal_sorting(batch: MicroBatch) -> None:
    """The k-th largest logit to within a bin, 16 to an octave."""
    exact = naive_cutoffs(batch.rows(), batch.num_experts, batch.topk)
    binned = cutoffs_of(batch.counted())
    assert binned == (None if exact is None else pytest.approx(exact, rel=1 / 16, abs=2**-10))


@given(micro_batches(odd=True), st.data())
def test_padding_leaves_no_trace(batch: MicroBatch, data: st.DataObject) -> None:
    """I1: a padded batch counts as the batch without its padding, whatever the padding's logits are."""
    kept = [data.draw(st.booleans()) for _ in batch.logits]
    clean = [[0.0 if not math.isfinite(x) else x for x in row] for row in batch.logits]
    padded = MicroBatch(
        topk=batch.topk,
        logits=[row if keep else odd for row, odd, keep in zip(clean, batch.logits, kept, strict=True)],
        routed=[[r and keep for r in row] for row, keep in zip(batch.routed, kept, strict=True)],
        thresholds=batch.thresholds,
        bounds=batch.bounds,
        padding=[not keep for keep in kept],
    )
    without = MicroBatch(
        topk=batch.topk,
        logits=[row for row, keep in zip(padded.logits, kept, strict=True) if keep],
        routed=[row for row, keep in zip(padded.routed, kept, strict=True) if keep],
        thresholds=batch.thresholds,
        bounds=batch.bounds,
        padding=None,
    )
    assert torch.equal(integers(padded.counted()), integers(without.counted()))


def test_nan_in_a_real_token_is_counted_once_per_logit() -> None:
    logits = torch.tensor([[math.nan, 1.0, math.inf], [0.0, -math.inf, 2.0], [math.nan] * 3])
    statistics = RouterStatistics(3, 1)
    nowhere, padding = torch.zeros(3, 3, dtype=torch.bool), torch.tensor([False, False, True])
    statistics.add(logits, nowhere, thresholds_at(torch.zeros(3)), None, padding)
    assert named(statistics)["nonfinite_E"] == [1, 1, 1]


def test_at_bound_counts_the_bound_that_decided_not_the_one_that_is_met() -> None:
    """A bound equal to the threshold changes nothing: the threshold decided."""
    statistics = RouterStatistics(5, 1)
    # Where the last cutoffs were plays no part.
    thresholds = thresholds_at(torch.zeros(5), centers=torch.full((5,), 9.0))
    lower = torch.tensor([-1.0, 0.5, 0.0, -2.0, 0.0])
    upper = torch.tensor([1.0, 0.9, 0.0, -1.0, 1.0])
    nothing = torch.zeros(5, 5, dtype=torch.bool)
    for _ in range(3):
        statistics.add(torch.randn(5, 5), nothing, thresholds, (lower, upper))
    statistics.add(torch.randn(5, 5), nothing, thresholds)
    assert named(statistics)["at_bound_E"] == [0, 3, 0, 3, 0]
    assert named(statistics)["micro_batches"] == [4]


def test_unreachable_bounds_never_decide() -> None:
    """A capacity of 1 or more has no upper bound (+inf), a pool too small for one token no lower one."""
    logits = torch.randn(6, 3)
    lower, upper = capacity_bounds(logits, expected_load(6, 1, 3), 4.0)
    assert upper.tolist() == [math.inf] * 3
    statistics = RouterStatistics(3, 1)
    thresholds = thresholds_at(torch.zeros(3))
    statistics.add(logits, logits >= 0.0, thresholds, (lower.clamp(max=-1.0), upper))
    assert named(statistics)["at_bound_E"] == [0, 0, 0]


# --- pools without a cutoff ---


@pytest.mark.parametrize("masked", [False, True])
def test_a_micro_batch_smaller_than_one_token_per_expert(masked: bool) -> None:
    """k = floor(T topk / E) is 0 for 3 tokens of 8 experts with fan-out 2, and 1 for seven."""
    padding = torch.tensor([False] * 3 + [True] * 5) if masked else None
    logits = torch.randn(8 if masked else 3, 8)
    routed = torch.ones_like(logits, dtype=torch.bool)
    if padding is not None:
        routed &= ~padding[:, None]
    more = torch.randn(4, 8)
    pool = torch.cat([logits[:3], more])
    thresholds = thresholds_at(torch.zeros(8))
    statistics = RouterStatistics(8, 2)
    statistics.add(logits, routed, thresholds, None, padding)
    assert cutoffs_of(statistics) is None
    counts = named(statistics)
    assert (counts["tokens"], counts["micro_batches"]) == ([3], [1])
    assert (counts["usage_E"], counts["fanout_F"]) == ([3] * 8, [0] * 8 + [3])
    statistics.add(more, more >= 9.0, thresholds)
    assert cutoffs_of(statistics) == pytest.approx(pool.max(dim=0).values.tolist(), rel=1 / 16)


def test_tiny_micro_batches_make_a_pool() -> None:
    """Two tokens on each of four ranks: together one token for each of 8 experts with fan-out 1."""
    logits = torch.randn(4, 2, 8)
    ranks = [RouterStatistics(8, 1) for _ in range(4)]
    for rank, own in zip(ranks, logits, strict=True):
        rank.add(own, own >= 0, thresholds_at(torch.zeros(8)))
    largest = logits.reshape(-1, 8).max(dim=0).values.tolist()
    assert cutoffs_of(*ranks) == pytest.approx(largest, rel=1 / 16)
    assert cutoffs_of(*ranks[:3]) is None


@pytest.mark.parametrize("padding", [None, torch.zeros(0, dtype=torch.bool), torch.ones(4, dtype=torch.bool)])
def test_no_tokens(padding: torch.Tensor | None) -> None:
    tokens = 0 if padding is None else len(padding)
    statistics = RouterStatistics(3, 1)
    logits = torch.full((tokens, 3), math.nan)
    nowhere = torch.zeros(tokens, 3, dtype=torch.bool)
    statistics.add(logits, nowhere, thresholds_at(torch.zeros(3)), None, padding)
    expected = {name: [0] * len(values) for name, values in named(statistics).items()}
    assert named(statistics) == expected | {"micro_batches": [1]}
    assert not statistics.integer_parts[1].any()
    assert cutoffs_of(statistics) is None


# --- many micro-batches ---


@given(
    st.integers(1, 5).flatmap(lambda E: st.lists(micro_batches(experts=E, topk=1), min_size=1, max_size=5))
)
def test_micro_batches_add_up(batches: list[MicroBatch]) -> None:
    """One accumulator over all, and accumulators of their own added as an all-reduce adds them."""
    together = RouterStatistics(batches[0].num_experts, 1)
    for batch in batches:
        batch.add_to(together)
    alone = [batch.counted() for batch in batches]
    assert torch.equal(integers(together), torch.stack([integers(one) for one in alone]).sum(dim=0))
    assert cutoffs_of(together) == cutoffs_of(*alone)


@given(micro_batches(odd=True), st.lists(st.integers(0, 13), max_size=3))
def test_a_pool_split_anyhow_counts_the_same(batch: MicroBatch, cuts: list[int]) -> None:
    """I3: everything but the number of parts, and the histogram's cutoffs to the bit. The bounds' share is
    counted per part."""
    edges = [0, *sorted(cuts), len(batch.logits) + 13]
    parts = [batch.part(slice(*edge)) for edge in itertools.pairwise(edges)]
    split = RouterStatistics(batch.num_experts, batch.topk)
    for part in parts:
        part.add_to(split)
    whole = batch.counted()
    times = {"at_bound_E", "micro_batches"}
    expected = {k: [len(parts) * n for n in v] if k in times else v for k, v in named(whole).items()}
    assert named(split) == expected
    assert torch.equal(split.integer_parts[1], whole.integer_parts[1])
    assert cutoffs_of(split) == cutoffs_of(whole)


@pytest.mark.parametrize("times", [2**20, 2**25 - 1])
def test_the_quantile_of_a_huge_pool(times: int) -> None:
    """I7: the same 64 tokens so many times over have the same quantile, up to the 2**31 - 64 tokens that
    int32 holds; the product with topk is larger."""
    logits = torch.randn(64, 8)
    statistics = RouterStatistics(8, 3)
    statistics.add(logits, logits >= 0, thresholds_at(torch.zeros(8)))
    centers = torch.zeros(8)
    _, cutoffs, _, _ = statistics.reduced(integers(statistics), centers)
    counts, cutoffs_of_many, valid, _ = statistics.reduced(integers(statistics) * times, centers)
    assert counts.tokens.tolist() == [64 * times]
    assert counts.tokens.dtype == torch.int64
    assert valid
    torch.testing.assert_close(cutoffs_of_many, cutoffs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0, 2.0])
def test_the_guards_band_is_where_loads_leave_it(share: float) -> None:
    """To within the bins: a threshold at an end of the band gets (1 -+ share) k of the pool's tokens."""
    logits = torch.randn(4096, 6) * 3 + 10
    k = 4096 // 6
    statistics = RouterStatistics(6, 1)
    centers = logits.sort(dim=0, descending=True).values[k - 1]
    statistics.add(logits, logits >= 0, thresholds_at(torch.zeros(6), centers=centers))
    band = statistics.reduced(integers(statistics), centers, guard=share)[3]
    assert band is not None
    lower, upper = band
    most, fewest = (logits >= lower).sum(0), (logits >= upper).sum(0)
    assert ((most - (1 + share) * k).abs() <= 0.03 * k).all()
    assert ((fewest - max(1 - share, 0.0) * k).abs() <= 0.03 * k).all()


def test_the_guards_band_at_its_ends() -> None:
    """A load of exactly (1+share)k is inside; more tokens than there are is no bound."""
    logits = torch.tensor([[4.0], [3.0], [2.0], [1.0]]).expand(-1, 4).contiguous()
    statistics = RouterStatistics(4, 1)
    statistics.add(logits, logits >= 0, thresholds_at(torch.zeros(4)))

    def band(share: float) -> tuple[torch.Tensor, torch.Tensor]:
        found = statistics.reduced(integers(statistics), torch.zeros(4), guard=share)[3]
        assert found is not None
        return found

    lower, upper = band(1.0)  # k = 1: from 0 to 2 tokens
    assert (lower < 2.1).all()
    assert (lower > 1.8).all()
    assert upper.isposinf().all()
    lower, _ = band(3.0)  # 4 of 4 tokens
    assert lower.isneginf().all()


def test_the_histogram_is_finest_at_the_last_cutoffs() -> None:
    """Centred there, not on the thresholds that route, which may lag far behind."""
    logits = 5.0 + 0.01 * torch.randn(512, 4)
    thresholds = thresholds_at(torch.full((4,), -3.0), centers=torch.full((4,), 5.0))
    statistics = RouterStatistics(4, 1)
    statistics.add(logits, logits >= 0, thresholds)
    _, cutoffs, _, _ = statistics.reduced(integers(statistics), thresholds.last_cutoff)
    exact = logits.sort(dim=0, descending=True).values[127].double()
    torch.testing.assert_close(cutoffs, exact, rtol=0, atol=0.001)


def test_reset_starts_from_nothing() -> None:
    batch = MicroBatch(1, [[1.0, 2.0], [3.0, 0.5]], [[True, True]] * 2, [0.0, 0.0], None, None)
    statistics = batch.counted()
    record, _, _, _ = statistics.reduced(integers(statistics), torch.zeros(2))
    statistics.reset()
    assert not integers(statistics).any()
    assert cutoffs_of(statistics) is None
    batch.add_to(statistics)
    assert torch.equal(integers(statistics), integers(batch.counted()))
    assert cutoffs_of(statistics) == cutoffs_of(batch.counted())
    # What was reduced before is a record of its own, and keeps no histogram of its layer alive.
    assert record.tokens.tolist() == [2]
    assert record.tokens.untyped_storage().nbytes() == 8 * BatchCounts.size(2)


def test_the_size_is_that_of_the_vector_that_travels() -> None:
    """Routers of all layers are stacked for one all-reduce and split by it."""
    for num_experts in (1, 7):
        statistics = RouterStatistics(num_experts, 1)
        assert statistics.size() == integers(statistics).numel()
        assert integers(statistics).dtype == torch.int32


# --- the vector ---


@pytest.mark.parametrize("num_experts", [1, 2, 7, 384])
def test_split_names_every_number_once(num_experts: int) -> None:
    counts = torch.arange(BatchCounts.size(num_experts))
    parts = BatchCounts.split(counts, num_experts)
    lengths = [getattr(parts, name).numel() for name in NAMES]
    assert lengths == [num_experts, num_experts, num_experts + 1, num_experts, 1, 1]
    assert torch.cat([getattr(parts, name) for name in NAMES]).tolist() == counts.tolist()
    parts.tokens.add_(1000)  # views: what is counted lands in the vector that is reduced
    assert counts[4 * num_experts + 1] == 4 * num_experts + 1 + 1000


def test_nothing_keeps_the_graph_alive() -> None:
    logits = torch.randn(6, 3, requires_grad=True)
    statistics = RouterStatistics(3, 1)
    statistics.add(logits, logits >= 0, thresholds_at(torch.zeros(3)))
    assert not integers(statistics).requires_grad
