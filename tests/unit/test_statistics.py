"""RouterStatistics against counting in Python loops (I3, I7).

T tokens, E experts, F = E + 1 fan-outs.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_et.quantile import capacity_bounds, expected_load
from megatron_et.statistics import BatchCounts, RouterStatistics

NAMES = ("usage_E", "at_bound_E", "fanout_F", "tokens", "micro_batches", "nonfinite", "samples")
# Few values, so that logits tie with one another, with thresholds and with bounds; all exact in fp32.
VALUES = st.sampled_from([-3.5, -1.0, -0.25, 0.0, 0.5, 2.0, 7.0])
ODD = st.sampled_from([math.nan, math.inf, -math.inf])


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
        statistics.add(
            torch.tensor(self.logits, dtype=torch.float32).reshape(tokens, experts),
            torch.tensor(self.routed, dtype=torch.bool).reshape(tokens, experts),
            torch.tensor(self.thresholds),
            None if self.bounds is None else tuple(torch.tensor(bound) for bound in self.bounds),
            None if self.padding is None else torch.tensor(self.padding, dtype=torch.bool),
        )

    def counted(self) -> RouterStatistics:
        statistics = RouterStatistics(self.num_experts, self.topk)
        self.add_to(statistics)
        return statistics


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
        "nonfinite": [sum(not math.isfinite(x) for t in tokens for x in batch.logits[t])],
        "samples": [int(len(tokens) * batch.topk // E > 0)],
    }


def naive_cutoffs(batch: MicroBatch) -> list[float]:
    """The k-th largest logit of every expert, 0 where k is 0."""
    E = batch.num_experts
    padding = batch.padding or [False] * len(batch.logits)
    rows = [row for row, pad in zip(batch.logits, padding, strict=True) if not pad]
    k = len(rows) * batch.topk // E
    return [sorted((row[e] for row in rows), reverse=True)[k - 1] if k > 0 else 0.0 for e in range(E)]


# --- one micro-batch ---


@given(micro_batches(odd=True))
def test_counts_equal_naive_counting(batch: MicroBatch) -> None:
    statistics = batch.counted()
    assert statistics.counts.dtype == torch.int64
    assert named(statistics) == naive_counts(batch)


@given(micro_batches())
def test_cutoffs_equal_sorting(batch: MicroBatch) -> None:
    assert batch.counted().cutoff_sum.tolist() == naive_cutoffs(batch)


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
    assert torch.equal(padded.counted().counts, without.counted().counts)
    assert torch.equal(padded.counted().cutoff_sum, without.counted().cutoff_sum)


def test_nan_in_a_real_token_is_counted_once_per_logit() -> None:
    logits = torch.tensor([[math.nan, 1.0, math.inf], [0.0, -math.inf, 2.0], [math.nan] * 3])
    statistics = RouterStatistics(3, 1)
    statistics.add(
        logits, torch.zeros(3, 3, dtype=torch.bool), torch.zeros(3), None, torch.tensor([False, False, True])
    )
    assert named(statistics)["nonfinite"] == [3]


def test_at_bound_counts_the_bound_that_decided_not_the_one_that_is_met() -> None:
    """A bound equal to the threshold changes nothing: the threshold decided."""
    statistics = RouterStatistics(5, 1)
    thresholds = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0])
    lower = torch.tensor([-1.0, 0.5, 0.0, -2.0, 0.0])
    upper = torch.tensor([1.0, 0.9, 0.0, -1.0, 1.0])
    nothing = torch.zeros(5, 5, dtype=torch.bool)
    for _ in range(3):
        statistics.add(torch.randn(5, 5), nothing, thresholds, (lower, upper), None)
    statistics.add(torch.randn(5, 5), nothing, thresholds, None, None)
    assert named(statistics)["at_bound_E"] == [0, 3, 0, 3, 0]
    assert named(statistics)["micro_batches"] == [4]


def test_unreachable_bounds_never_decide() -> None:
    """A capacity of 1 or more has no upper bound (+inf), a pool too small for one token no lower one."""
    logits = torch.randn(6, 3)
    lower, upper = capacity_bounds(logits, expected_load(6, 1, 3), 4.0)
    assert upper.tolist() == [math.inf] * 3
    statistics = RouterStatistics(3, 1)
    statistics.add(logits, logits >= 0.0, torch.zeros(3), (lower.clamp(max=-1.0), upper), None)
    assert named(statistics)["at_bound_E"] == [0, 0, 0]


# --- pools without a sample ---


@pytest.mark.parametrize("masked", [False, True])
def test_a_pool_smaller_than_one_token_per_expert_adds_no_sample(masked: bool) -> None:
    """k = floor(T topk / E) is 0 for 3 tokens of 8 experts with fan-out 2: +inf must not reach the sum."""
    statistics = RouterStatistics(8, 2)
    padding = torch.tensor([False] * 3 + [True] * 5) if masked else None
    logits = torch.randn(8 if masked else 3, 8)
    routed = torch.ones_like(logits, dtype=torch.bool)
    if padding is not None:
        routed &= ~padding[:, None]
    statistics.add(logits, routed, torch.zeros(8), None, padding)
    assert statistics.cutoff_sum.tolist() == [0.0] * 8
    counts = named(statistics)
    assert (counts["samples"], counts["micro_batches"], counts["tokens"]) == ([0], [1], [3])
    assert (counts["usage_E"], counts["fanout_F"]) == ([3] * 8, [0] * 8 + [3])

    # With the next, larger pool the mean is that pool's cutoff alone.
    more = torch.randn(4, 8)
    statistics.add(more, more >= 9.0, torch.zeros(8), None, None)
    assert named(statistics)["samples"] == [1]
    assert statistics.cutoff_sum.tolist() == more.max(dim=0).values.double().tolist()


@pytest.mark.parametrize("padding", [None, torch.zeros(0, dtype=torch.bool), torch.ones(4, dtype=torch.bool)])
def test_no_tokens(padding: torch.Tensor | None) -> None:
    tokens = 0 if padding is None else len(padding)
    statistics = RouterStatistics(3, 1)
    logits = torch.full((tokens, 3), math.nan)
    statistics.add(logits, torch.zeros(tokens, 3, dtype=torch.bool), torch.zeros(3), None, padding)
    assert statistics.cutoff_sum.tolist() == [0.0] * 3
    expected = {name: [0] * len(values) for name, values in named(statistics).items()}
    assert named(statistics) == expected | {"micro_batches": [1]}


# --- many micro-batches ---


@given(st.integers(1, 5).flatmap(lambda E: st.lists(micro_batches(experts=E, topk=1), max_size=5)))
def test_micro_batches_add_up(batches: list[MicroBatch]) -> None:
    """One accumulator over all, and accumulators of their own added as an all-reduce adds them."""
    E = batches[0].num_experts if batches else 2
    together = RouterStatistics(E, 1)
    for batch in batches:
        batch.add_to(together)
    alone = [batch.counted() for batch in batches]
    added = sum((one.counts for one in alone), torch.zeros(BatchCounts.size(E), dtype=torch.int64))
    assert torch.equal(together.counts, added)
    expected = [sum(column) for column in zip(*map(naive_cutoffs, batches), strict=True)] or [0.0] * E
    assert together.cutoff_sum.tolist() == expected


@given(micro_batches(odd=True), st.integers(0, 13))
def test_a_pool_split_in_two_counts_the_same_tokens(batch: MicroBatch, cut: int) -> None:
    """I3, for what does not depend on the pool: usage, fan-outs, tokens and non-finite logits."""
    halves = [
        MicroBatch(
            topk=batch.topk,
            logits=batch.logits[part],
            routed=batch.routed[part],
            thresholds=batch.thresholds,
            bounds=batch.bounds,
            padding=None if batch.padding is None else batch.padding[part],
        )
        for part in (slice(cut), slice(cut, None))
    ]
    split = RouterStatistics(batch.num_experts, batch.topk)
    for half in halves:
        half.add_to(split)
    whole = named(batch.counted())
    assert {k: v for k, v in named(split).items() if k in ("usage_E", "fanout_F", "tokens", "nonfinite")} == {
        k: v for k, v in whole.items() if k in ("usage_E", "fanout_F", "tokens", "nonfinite")
    }
    assert named(split)["micro_batches"] == [2]


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_micro_batches_does_not_show_in_the_threshold(seed: int) -> None:
    """I3: the sum of many fp32 cutoffs, of very different sizes, in any order and any grouping."""
    generator = torch.Generator().manual_seed(seed)
    batches = torch.randn(200, 9, 4, generator=generator) * torch.logspace(-4, 4, 200)[:, None, None]

    def mean(order: list[int], parts: int) -> torch.Tensor:
        ranks = [RouterStatistics(4, 1) for _ in range(parts)]
        for position, index in enumerate(order):
            logits = batches[index]
            ranks[position % parts].add(logits, logits >= 0, torch.zeros(4), None, None)
        total = sum(rank.cutoff_sum for rank in ranks)
        samples = sum(BatchCounts.split(rank.counts, 4).samples for rank in ranks)
        return (total / samples).float()

    straight = mean(list(range(200)), 1)
    for parts in (1, 3, 8):
        order = torch.randperm(200, generator=generator).tolist()
        assert torch.equal(mean(order, parts), straight)


@given(micro_batches())
def test_counts_go_on_beyond_32_bits(batch: MicroBatch) -> None:
    """I7: a pool may pass 2**31 tokens; every count crosses it, and 2**53, exactly."""
    for start in (2**31 - 1, 2**32 - 1, 2**53):
        statistics = RouterStatistics(batch.num_experts, batch.topk)
        injected = torch.arange(statistics.counts.numel()) + start
        statistics.counts += injected
        batch.add_to(statistics)
        assert (statistics.counts - injected).tolist() == batch.counted().counts.tolist()
        assert statistics.counts.dtype == torch.int64


def test_reset_starts_from_nothing_in_place() -> None:
    batch = MicroBatch(1, [[1.0, 2.0], [3.0, 0.5]], [[True, True]] * 2, [0.0, 0.0], None, None)
    statistics = batch.counted()
    counts, cutoff_sum = statistics.counts, statistics.cutoff_sum
    assert counts.any()
    assert cutoff_sum.any()
    statistics.reset()
    assert statistics.counts is counts
    assert statistics.cutoff_sum is cutoff_sum
    assert not counts.any()
    assert not cutoff_sum.any()
    batch.add_to(statistics)
    assert named(statistics) == named(batch.counted())


# --- the vector ---


@pytest.mark.parametrize("num_experts", [1, 2, 7, 384])
def test_split_names_every_number_once(num_experts: int) -> None:
    counts = torch.arange(BatchCounts.size(num_experts))
    parts = BatchCounts.split(counts, num_experts)
    lengths = [getattr(parts, name).numel() for name in NAMES]
    assert lengths == [num_experts, num_experts, num_experts + 1, 1, 1, 1, 1]
    assert torch.cat([getattr(parts, name) for name in NAMES]).tolist() == counts.tolist()
    parts.tokens.add_(1000)  # views: what is counted lands in the vector that is reduced
    assert counts[3 * num_experts + 1] == 3 * num_experts + 1 + 1000


def test_adding_needs_no_gradient_and_keeps_none() -> None:
    logits = torch.randn(6, 3, requires_grad=True)
    statistics = RouterStatistics(3, 1)
    statistics.add(logits, logits >= 0, torch.zeros(3), None, None)
    assert not statistics.cutoff_sum.requires_grad
    assert not statistics.counts.requires_grad
