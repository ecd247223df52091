"""The EMA against Adam-style bias correction, and the two halves of an update (I4)."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_et.rule.threshold import PATIENCE, RECENT, ThresholdEMA


@given(st.sampled_from([0.0, 0.5, 0.9, 0.999, 0.99999]), st.integers(1, 60), st.integers(0, 2**31))
def test_equals_raw_ema_with_bias_correction(decay: float, steps: int, seed: int) -> None:
    """The paper's form: raw EMA from zero, routed with raw / (1 - beta**n)."""
    cutoffs = torch.randn(steps, 4, generator=torch.Generator().manual_seed(seed)) * 5
    ema, raw = ThresholdEMA(4, decay), torch.zeros(4, dtype=torch.float64)
    for n, batch in enumerate(cutoffs, start=1):
        ema.update(batch)
        raw = decay * raw + (1 - decay) * batch.double()
        torch.testing.assert_close(ema.value.double(), raw / (1 - decay**n), rtol=1e-5, atol=1e-5)
    assert ema.num_updates.item() == steps


def test_first_update_copies() -> None:
    ema = ThresholdEMA(3, 0.999)
    cutoffs = torch.tensor([1.5, -2.25, 1e30])
    ema.update(cutoffs)
    assert torch.equal(ema.value, cutoffs)


def test_constant_cutoffs_stay_exactly() -> None:
    ema = ThresholdEMA(2, 0.999)
    for _ in range(100):
        ema.update(torch.tensor([0.1, -7.3]))
    assert torch.equal(ema.value, torch.tensor([0.1, -7.3]))


def test_candidate_is_invisible_until_commit() -> None:
    ema = ThresholdEMA(2, 0.9)
    ema.update(torch.tensor([1.0, 2.0]))
    before = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    ema.propose(torch.tensor([5.0, 5.0]))
    assert ema.has_candidate
    assert all(torch.equal(ema.state_dict()[name], tensor) for name, tensor in before.items())
    ema.discard()
    assert not ema.has_candidate
    with pytest.raises(RuntimeError, match="without a candidate"):
        ema.commit()
    ema.propose(torch.tensor([7.0, 7.0]))
    ema.propose(torch.tensor([5.0, 5.0]))
    ema.commit()
    again = ThresholdEMA(2, 0.9)
    again.update(torch.tensor([1.0, 2.0]))
    again.update(torch.tensor([5.0, 5.0]))
    assert torch.equal(ema.value, again.value)
    assert torch.equal(ema.num_updates, again.num_updates)


BATCHES = st.lists(
    st.lists(st.sampled_from([-3.0, -1.0, 0.0, 1.0, 4.0]), min_size=3, max_size=3), max_size=25
)


@given(BATCHES, st.sampled_from([0.0, 0.9, 0.999]), st.sampled_from([0.5, 1.5]))
def test_the_guard_restarts_after_a_run_on_one_side(
    batches: list[list[float]], decay: float, width: float
) -> None:
    """Against a plain loop: the restarted EMA is that of the cutoffs since then, nothing older."""
    ema = ThresholdEMA(3, decay)
    seen: list[list[float]] = [[], [], []]
    runs = [0, 0, 0]
    for cutoffs in batches:
        before = ema.value.tolist()
        batch = torch.tensor(cutoffs)
        n = ema.num_updates.item()
        ema.propose(batch, band=(batch - width, batch + width))
        ema.commit()
        for e, cutoff in enumerate(cutoffs):
            side = (before[e] < cutoff - width) - (before[e] > cutoff + width) if seen[e] else 0
            runs[e] = side if runs[e] * side <= 0 else runs[e] + side
            expected = abs(runs[e]) == PATIENCE
            assert (n > 0 and ema.restarted_at[e].item() == n) == expected
            if expected:
                runs[e], seen[e] = 0, []
            seen[e].append(cutoff)
            fresh = ThresholdEMA(1, decay)
            for value in seen[e]:
                fresh.update(torch.tensor([value]))
            assert ema.value[e].item() == pytest.approx(fresh.value.item(), rel=1e-6, abs=1e-6)
        assert ema.violations.tolist() == runs


def test_a_guard_that_never_acts_changes_nothing() -> None:
    plain, guarded = ThresholdEMA(4, 0.9), ThresholdEMA(4, 0.9)
    for batch in torch.randn(40, 4):
        plain.update(batch)
        guarded.propose(batch, band=(torch.full((4,), -torch.inf), torch.full((4,), torch.inf)))
        guarded.commit()
    for name, value in plain.state_dict().items():
        assert torch.equal(guarded.state_dict()[name], value)


def test_a_discarded_or_invalid_batch_is_no_violation() -> None:
    ema = ThresholdEMA(1, 0.9)
    ema.update(torch.tensor([0.0]))
    far = torch.tensor([9.0])
    for _ in range(2 * PATIENCE):
        ema.propose(far, band=(far, far))
        ema.discard()
        ema.propose(far, band=(far, far), valid=torch.tensor([False]))
        ema.commit()
    assert not ema.restarted_at
    assert (ema.value.item(), ema.violations.item(), ema.num_updates.item()) == (0.0, 0, 1)


def test_batches_without_the_guard_end_a_run_of_violations() -> None:
    """A run resumed without the flag and later with it has not seen three batches in a row."""
    ema, far = ThresholdEMA(1, 0.9), torch.tensor([9.0])
    ema.update(torch.tensor([0.0]))
    for _ in range(PATIENCE - 1):
        ema.propose(far, band=(far, far))
        ema.commit()
    assert ema.violations.item() == 1 - PATIENCE or ema.violations.item() == PATIENCE - 1
    ema.update(far)
    ema.propose(far, band=(far, far))
    ema.commit()
    assert not ema.restarted_at
    assert abs(ema.violations.item()) == 1


def test_a_restart_is_reported_for_a_while() -> None:
    ema, far = ThresholdEMA(2, 0.9), torch.tensor([9.0, 0.0])
    ema.update(torch.zeros(2))
    assert ema.recently_restarted().tolist() == [0]
    for _ in range(PATIENCE):
        ema.propose(far, band=(far, far))
        ema.commit()
    for _ in range(RECENT - 1):
        assert ema.recently_restarted().tolist() == [1]
        ema.update(far)
    ema.update(far)
    assert ema.recently_restarted().tolist() == [0]


def test_an_invalid_batch_changes_neither_value_nor_count() -> None:
    ema = ThresholdEMA(2, 0.9)
    ema.update(torch.tensor([1.0, 2.0]))
    ema.propose(torch.tensor([float("nan"), float("inf")]), valid=torch.tensor([False]))
    ema.commit()
    assert ema.value.tolist() == [1.0, 2.0]
    assert ema.num_updates.item() == 1


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.float64)])
def test_casting_the_model_leaves_fp32_bits(cast: object) -> None:
    """I7: Float16Module casts the whole model."""
    ema = ThresholdEMA(3, 0.9)
    ema.update(torch.tensor([1.000001, -2.000003, 3e-39]))
    bits = ema.value.clone()
    cast(torch.nn.Sequential(ema))
    assert ema.value.dtype == torch.float32
    assert torch.equal(ema.value, bits)
    assert ema.num_updates.dtype == torch.int64


def test_meta_construction_comes_to_life_fresh() -> None:
    with torch.device("meta"):
        ema = ThresholdEMA(3, 0.9)
    ema.to_empty(device="cpu")
    assert ema.value.tolist() == [0.0, 0.0, 0.0]
    assert ema.num_updates.tolist() == [0]


def test_state_dict_round_trip_is_bitwise() -> None:
    ema, other = ThresholdEMA(3, 0.99), ThresholdEMA(3, 0.99)
    for _ in range(7):
        ema.update(torch.randn(3))
    other.load_state_dict(ema.state_dict())
    cutoffs = torch.randn(3)
    ema.update(cutoffs)
    other.update(cutoffs)
    assert torch.equal(ema.value, other.value)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, float("nan")])
def test_bad_decay(decay: float) -> None:
    with pytest.raises(ValueError, match="decay is"):
        ThresholdEMA(2, decay)


WRITES = {
    "copy": lambda ema: ema.num_updates.copy_(torch.tensor([3])),
    "load_state_dict": lambda ema: ema.load_state_dict(
        {**ema.state_dict(), "num_updates": torch.tensor([3])}
    ),
    "assigned": lambda ema: ema.load_state_dict(
        {**ema.state_dict(), "num_updates": torch.tensor([3])}, assign=True
    ),
    "moved": lambda ema: ema._buffers.update(num_updates=torch.tensor([3])),
    "filled": lambda ema: ema.num_updates.fill_(3),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_load_is_seen_at_once_on_the_host(write: Callable[[ThresholdEMA], object]) -> None:
    ema = ThresholdEMA(2, 0.9)
    for _ in range(5):
        ema.update(torch.zeros(2))
    assert ema.updates_on_host() == 5
    write(ema)
    assert ema.updates_on_host() == 3


def test_a_write_that_torch_does_not_count_is_seen_when_the_host_is_told() -> None:
    """As a broadcast's: one global batch later (synchronize.commit)."""
    ema = ThresholdEMA(2, 0.9)
    ema.num_updates.data.fill_(7)
    assert ema.updates_on_host() == 0
    ema.saw(int(ema.num_updates))
    assert ema.updates_on_host() == 7
