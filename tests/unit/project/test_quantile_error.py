"""The quantile benchmark: its samplers against drawn tokens, its simulations against closed forms, its guards
against hand-made cases.

Dimension letters: T tokens, E experts, C conditions, P policies.
"""

import csv
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import guards, pool_estimates, quantile_error, threshold_series
from benchmarks.guards import NONE, Guard, GuardedThresholds
from benchmarks.pool_estimates import Pool
from benchmarks.streams import NORMAL, Stream, histogram_cutoff, order_tails, part_mean
from benchmarks.threshold_series import Lane, constant, drifting
from megatron_et.rule.quantile import Histogram, kth_largest
from megatron_et.rule.threshold import ThresholdEMA

pytestmark = pytest.mark.megatron_free

STREAMS = {
    "normal": NORMAL,
    "t3": Stream("t3"),
    "bimodal": Stream("bimodal"),
    "narrow": Stream(center=10.0, sd=0.01),
}


@pytest.mark.parametrize("name", STREAMS)
def test_stream_is_what_its_tail_says(name: str) -> None:
    stream = STREAMS[name]
    tails = torch.tensor([0.9, 0.5, 1 / 8, 1 / 16, 1 / 256], dtype=torch.float64)
    assert torch.allclose(stream.tail(stream.logit(tails)), tails, rtol=1e-4)
    logits_T = stream.sample((200_000,), torch.Generator().manual_seed(3))
    shares = torch.stack([(logits_T >= cutoff).double().mean() for cutoff in stream.logit(tails)])
    assert ((shares - tails).abs() <= 5 * (tails * (1 - tails) / 200_000).sqrt()).all()
    assert logits_T.mean().item() == pytest.approx(stream.center, abs=0.02 * stream.sd)
    if name != "t3":  # whose variance no sample finds
        assert logits_T.std().item() == pytest.approx(stream.sd, rel=0.02)


def test_order_statistics_are_those_of_sorted_tokens() -> None:
    rng, pools, tokens, ranks = np.random.default_rng(2), 4000, 64, [0, 3, 8, 20]
    tails = order_tails(rng, tokens, ranks, (pools,))
    sorted_tails = torch.from_numpy(np.sort(rng.random((pools, tokens)), axis=1))[:, [2, 7, 19]]
    assert (tails[:, 0] == 0).all()
    assert (tails.diff(dim=1) > 0).all()
    assert torch.allclose(tails[:, 1:].mean(0), sorted_tails.mean(0), rtol=0.05)
    assert torch.allclose(torch.cov(tails[:, 1:].T), torch.cov(sorted_tails.T), rtol=0.15)


def test_sampled_cutoffs_are_distributed_like_drawn_ones() -> None:
    tokens, experts, k = 512, 2000, 32
    rng = np.random.default_rng(5)
    logits_TE = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(5))
    histogram = Histogram(experts, centers=torch.full((experts,), 1.5))
    histogram.add(logits_TE)
    pairs = [
        (histogram.kth_largest(k), histogram_cutoff(rng, NORMAL, tokens, k, histogram.centers_E)),
        (
            torch.stack([kth_largest(part, k // 4).double() for part in logits_TE.chunk(4)]).mean(0),
            part_mean(rng, NORMAL, tokens // 4, k // 4, 4, (experts,)),
        ),
    ]
    for drawn_E, sampled_E in pairs:
        standard_error = drawn_E.std() * math.sqrt(2 / experts)
        assert abs(drawn_E.mean() - sampled_E.mean()) <= 4 * standard_error
        assert sampled_E.std().item() == pytest.approx(drawn_E.std().item(), rel=0.1)


def test_estimators_on_ranks_that_see_different_domains() -> None:
    pool = Pool(tokens=1 << 13, ranks=8, microbatch=1 << 10, skew=1.0)
    rows = {row["estimator"]: row for row in pool_estimates.measure(pool, 1, 1, drawn=True)}
    assert rows["histogram"]["rms_from_exact"] < 0.005
    assert abs(rows["histogram"]["load_bias"]) < 0.02
    assert rows["kth-largest"]["load_bias"] > 0.5
    assert rows["megatron-average"]["load_bias"] > rows["kth-largest"]["load_bias"]


def test_small_micro_batches_bias_the_averages_in_opposite_directions() -> None:
    pool = Pool(tokens=1 << 18, microbatch=256)
    rows = {row["estimator"]: row for row in pool_estimates.measure(pool, 1, 2, drawn=False)}
    assert -0.035 < rows["kth-largest"]["load_bias"] < -0.02
    assert 0.03 < rows["megatron-average"]["load_bias"] < 0.045
    assert abs(rows["histogram"]["load_bias"]) < 0.005


def test_settled_noise_and_lag_are_the_closed_form() -> None:
    lanes = [Lane(), Lane(mean=drifting(1e-3)), Lane(estimator="histogram")]
    still, drifts, histogram = threshold_series.settled_rows(lanes, (0.9,), 400, 1)
    for row in (still[0], histogram[0]):
        assert row["threshold_sd"] == pytest.approx(row["predicted_sd"], rel=0.1)
    assert drifts[0]["threshold_gap"] == pytest.approx(-1e-3 / (1 - 0.9), rel=0.05)
    assert drifts[0]["threshold_rms"] == pytest.approx(
        threshold_series.predicted_rms(lanes[1], 1e-3, 0.9), rel=0.05
    )


def test_closed_form_rate_is_the_least_error() -> None:
    for tokens, drift in itertools.product((1 << 12, 1 << 16, 1 << 20), (1e-5, 1e-4, 1e-3)):
        lane = Lane(tokens=tokens)
        errors = [
            threshold_series.predicted_rms(lane, drift, 1 - rate) for rate in np.geomspace(1e-4, 1, 400)
        ]
        rate = threshold_series.best_rate(lane, drift)
        # It takes a / 2 for a / (2 - a): exact for small rates.
        assert threshold_series.predicted_rms(lane, drift, 1 - rate) <= 1.1 * min(errors)


def test_recovery_takes_as_long_as_the_ema_forgets() -> None:
    rows = threshold_series.batches_until([Lane(mean=constant(1.0))], (0.9,), 200, 1, (0.1,), settled=True)
    # The load is within 10 % when the threshold is within about 0.05 sd.
    assert rows[0][0]["within_0.1"] == pytest.approx(math.log(1 / 0.05) / -math.log(0.9), abs=2)
    assert rows[0][0]["violation_first"] == pytest.approx(3.75, abs=0.1)


def thresholds(guard: Guard, beta: float = 0.99, value: float = 0.0) -> GuardedThresholds:
    start_CEP = torch.full((1, 1, 1), value, dtype=torch.float64)
    return GuardedThresholds([(beta, guard)], start_CEP, torch.full_like(start_CEP, 0.01))


def feed(thresholds: GuardedThresholds, cutoff: float, width: float = 0.2) -> tuple[float, bool, bool]:
    """One batch whose band reaches `width` to either side of its cutoff."""
    cutoffs_CE1 = torch.full((1, 1, 1), cutoff, dtype=torch.float64)
    restart, clamped = thresholds.update(cutoffs_CE1, cutoffs_CE1 - width, cutoffs_CE1 + width)
    return thresholds.value.item(), bool(restart), bool(clamped)


def test_no_guard_is_the_threshold_ema() -> None:
    ours, ema = thresholds(NONE, 0.9), ThresholdEMA(1, 0.9)
    ours.updates.zero_()
    for cutoff in torch.randn(50, generator=torch.Generator().manual_seed(1)).tolist():
        ema.update(torch.tensor([cutoff]))
        assert feed(ours, cutoff)[0] == pytest.approx(ema.value.item(), abs=1e-5)


def test_restart_needs_its_patience_on_one_side() -> None:
    once, twice = thresholds(Guard("", "0.5", patience=1)), thresholds(Guard("", "0.5", patience=2))
    assert feed(once, 1.0) == (1.0, True, False)
    value, restarted, _ = feed(twice, 1.0)
    assert not restarted
    assert value == pytest.approx(0.01)
    assert not feed(twice, 0.0)[1]  # inside the band: the run is over
    assert not feed(twice, 1.0)[1]
    assert not feed(twice, -1.0)[1]  # the other side: a new run
    assert feed(twice, -1.0) == (-1.0, True, False)
    # Then it averages from n = 1.
    assert feed(twice, -1.1)[0] == pytest.approx(-1.0 - 0.1 / (1 + 0.99))


def test_clamp_moves_to_the_edge_and_hurry_averages_faster() -> None:
    plain = thresholds(Guard("", "0.5", clamp=True))
    hurried = thresholds(Guard("", "0.5", clamp=True, hurry=10))
    assert feed(plain, 1.0) == (0.8, False, True)
    assert feed(hurried, 1.0) == (0.8, False, True)
    assert feed(plain, 1.0)[0] == pytest.approx(0.802)
    assert feed(hurried, 1.0)[0] > 0.81


def test_guards_bring_loads_back_and_rest_when_nothing_happens() -> None:
    policies = [
        (0.99, NONE),
        (0.99, Guard("restart", "0.5", patience=1)),
        (0.99, Guard("", "0.5", patience=2)),
    ]
    sizes = (1 << 16,)
    event = guards.recovery(policies, sizes, [guards.EVENTS["shift +1"]], 400, 1)[0]
    assert [row["within_0.1"] for row in event[1:]] == [1, 2]
    assert 280 < event[0]["within_0.1"] < 320
    still = guards.stationary(policies, sizes, [guards.STILL["still"]], 400, 1)[0]
    assert all(row["restarts_per_million"] == 0 for row in still)
    assert still[1]["load_rms"] == still[2]["load_rms"] == still[0]["load_rms"]


def test_command_writes_the_same_csv_twice(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        assert quantile_error.main(["--quick", "--cases", "warm-up", "--output", str(tmp_path / folder)]) == 0
    text = (tmp_path / "a" / "quantile_error.csv").read_text()
    assert text == (tmp_path / "b" / "quantile_error.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert len(rows) == 2 * 3 * 3 * 3
    assert "within 5 %" in (tmp_path / "a" / "quantile_error.md").read_text()
    assert (tmp_path / "a" / "quantile_error.png").stat().st_size > 10_000
