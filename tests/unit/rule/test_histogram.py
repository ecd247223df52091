"""The histogram's quantiles against sorting, and the exact selection over ranks on one process."""

import functools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_et.rule.quantile import Histogram, kth_largest, kth_largest_of_parts

DISTRIBUTIONS: dict[str, Callable[[int], torch.Tensor]] = {
    "normal": torch.randn,
    "heavy-tailed": lambda n: torch.randn(n) / torch.randn(3, n).square().mean(0).sqrt(),
    "bimodal": lambda n: torch.randn(n) + 8.0 * (torch.rand(n) < 0.5),
    "narrow": lambda n: 1e-3 * torch.randn(n),
    "narrow-with-offset": lambda n: 10.0 + 1e-2 * torch.randn(n),
    "wide": lambda n: 300.0 * torch.randn(n) - 50.0,
}
SHARES = [2, 8, 16, 64, 512]


@functools.cache
def pool(name: str, share: int) -> tuple[torch.Tensor, int, torch.Tensor]:
    """Logits, k and the exact cutoff. A small share takes a larger pool: the test is of bins, not of luck."""
    torch.manual_seed(5)
    logits = DISTRIBUTIONS[name](1 << (20 if share > 64 else 17))
    k = len(logits) // share
    return logits, k, logits.topk(k).values[-1]


def load_error(logits: torch.Tensor, cutoff: torch.Tensor, k: int) -> float:
    """|selected - k| / k."""
    return abs(int((logits >= cutoff.float()).sum()) - k) / k


def cutoff_of(logits: torch.Tensor, center: torch.Tensor, k: int, bins: int = 1024) -> torch.Tensor:
    histogram = Histogram(1, bins, centers=center.reshape(1))
    histogram.add(logits.unsqueeze(1))
    return histogram.kth_largest(k)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_load_error_near_the_quantile(name: str, share: int) -> None:
    """Within 0.3 standard deviations: 0.5 %."""
    logits, k, exact = pool(name, share)
    for offset in (-0.3, -0.05, 0.05, 0.3):
        error = load_error(logits, cutoff_of(logits, exact + offset * logits.std(), k), k)
        assert error <= 0.005, (offset, error)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_first_batch_needs_no_warm_start_and_settles(name: str, share: int) -> None:
    """From centre 0, each batch centred on the last one's cutoff: 0.1 % from the fifth batch on."""
    logits, k, _ = pool(name, share)
    center = torch.zeros(1)
    for batch in range(8):
        center = cutoff_of(logits, center, k)
        if batch >= 4:
            assert load_error(logits, center, k) <= 0.001


def test_drifting_logits_are_followed() -> None:
    tokens = 1 << 17
    center, k = torch.zeros(1), tokens // 16
    for step in range(12):
        logits = torch.randn(tokens) * (1.0 + 0.1 * step) + 0.3 * step
        center = cutoff_of(logits, center, k)
        if step >= 2:
            assert load_error(logits, center, k) <= 0.005


@pytest.mark.parametrize("far", [1e5, -1e5, 3e4, 3e5])
def test_never_lost_when_far_off(far: float) -> None:
    """Beyond the outermost edge (4,096) each batch moves the centre to that edge at most, and so arrives."""
    logits = far + torch.randn(4096)
    center, k = torch.zeros(1), 256
    for _ in range(int(abs(far) / 4096) + 12):
        center = cutoff_of(logits, center, k)
    assert load_error(logits, center, k) <= 0.05


@given(
    st.integers(1, 90),
    st.integers(1, 9),
    st.integers(0, 2**31),
    st.sampled_from([64, 512, 1024]),
    st.booleans(),
)
def test_quantile_is_within_its_bin_and_independent_of_the_split(
    tokens: int, experts: int, seed: int, bins: int, ties: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator) * 4
    if ties:
        logits = logits.round()
    centers = torch.randn(experts, generator=generator)
    whole = Histogram(experts, bins, centers=centers)
    whole.add(logits)
    parts = [Histogram(experts, bins, centers=centers) for _ in range(3)]
    cuts = sorted(torch.randint(tokens + 1, (2,), generator=generator).tolist())
    for part, start, end in zip(parts, [0, *cuts], [*cuts, tokens], strict=True):
        part.add(logits[start:end])
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    assert torch.equal(parts[0].counts_EB, whole.counts_EB)
    assert whole.counts_EB.sum(1).tolist() == [tokens] * experts
    for k in (1, max(tokens // 2, 1), tokens):
        cutoffs = whole.kth_largest(k)
        exact = kth_largest(logits, k).double()
        distance = (exact - centers).abs()
        # A bin is a sixteenth of its octave, or the innermost one.
        low, high = whole._octaves
        tolerance = (distance / 8).clamp(min=2.0**low * 1.1)
        reachable = distance < 2.0**high
        assert ((cutoffs - exact).abs() <= tolerance)[reachable].all()


def test_corners_of_k_and_of_the_pool() -> None:
    histogram = Histogram(2)
    assert histogram.kth_largest(1).tolist() == [math.inf, math.inf]
    histogram.add(torch.empty(0, 2))
    assert histogram.kth_largest(1).tolist() == [math.inf, math.inf]
    histogram.add(torch.tensor([[1.0, -1.0], [2.0, 0.0]]))
    assert histogram.kth_largest(0).tolist() == [math.inf, math.inf]
    assert torch.equal(histogram.kth_largest(5), histogram.kth_largest(2))
    assert torch.equal(histogram.kth_largest(torch.tensor(2)), histogram.kth_largest(2))


def test_constant_logits_are_found_to_a_millionth() -> None:
    """Ties cannot be split: the threshold ends within the innermost bin of the constant, load all or none."""
    center = torch.zeros(1)
    for _ in range(10):
        center = cutoff_of(torch.full((100,), 3.25), center, 10)
    assert abs(center.item() - 3.25) <= 2.0**-19


def test_padding_is_not_counted() -> None:
    logits, mask = torch.randn(50, 3), torch.rand(50) < 0.5
    padded, plain = Histogram(3), Histogram(3)
    padded.add(logits, mask)
    plain.add(logits[~mask])
    assert torch.equal(padded.counts_EB, plain.counts_EB)


def test_counts_up_to_32_bits() -> None:
    """I7, by injection: a pool of nearly 2^31 tokens."""
    histogram = Histogram(2)
    histogram.add(torch.randn(4000, 2))
    small = histogram.kth_largest(500)
    histogram.counts_EB *= 2**19
    assert torch.equal(histogram.kth_largest(500 * 2**19), small)


def test_other_bins_do_not_merge() -> None:
    with pytest.raises(ValueError, match="do not merge"):
        Histogram(2, 512).merge(Histogram(2, 1024))
    with pytest.raises(ValueError, match="do not merge"):
        Histogram(1).merge(Histogram(1, centers=torch.ones(1)))
    with pytest.raises(ValueError, match="bins is 100"):
        Histogram(2, 100)


def alone(_: torch.Tensor) -> None:
    """The sum over one rank."""


@given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 2**31), st.booleans(), st.booleans())
def test_radix_selection_is_exact(tokens: int, experts: int, seed: int, ties: bool, padded: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator) * 10 ** float(
        torch.randint(-30, 30, (1,), generator=generator)
    )
    if ties:
        logits = torch.where(logits.abs() < logits.abs().median(), -0.0, logits)
    mask = torch.rand(tokens, generator=generator) < 0.3 if padded else None
    ks = [0, 1, tokens // 3, tokens, tokens + 3]
    wanted = [torch.tensor(k) for k in ks]
    found = kth_largest_of_parts(logits, lambda _: wanted, alone, padding_mask_T=mask)
    for k, cutoffs in zip(ks, found, strict=True):
        assert torch.equal(cutoffs, kth_largest(logits, k, padding_mask_T=mask))


def test_radix_selection_of_extremes() -> None:
    logits = torch.tensor([[-math.inf], [3e38], [-3e38], [1e-45], [0.0], [-0.0], [math.inf]])
    for k in range(1, 8):
        found = kth_largest_of_parts(logits, lambda _, k=k: [torch.tensor(k)], alone)
        assert torch.equal(found[0], kth_largest(logits, k))
