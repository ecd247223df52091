"""The global-batch boundary over many layers at once: what each layer alone would get, for the operations of
one.

Dimension letters: T tokens, E experts.
"""

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.captured import memory, router

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guard": {"guard": 0.2},
    "slow": {"ema_decay": 0.99},
    "small": {"megatron": {"num_moe_experts": 4}},
}


# Megatron says at every import what is not installed.
pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:megatron\.")


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")


def train(routers: list[Any], step: int) -> None:
    for layer, one in enumerate(routers):
        generator = torch.Generator().manual_seed(1000 * step + layer)
        # Loads drift apart, so that the guard has something to do; layer 1 sometimes has too few tokens.
        tokens = 1 if layer == 1 and step % 2 else 40 + layer
        one.routing(torch.randn(tokens, one.num_experts, generator=generator) + step * layer)


def boundary(routers: list[Any]) -> None:
    from megatron_et.moe.synchronize import commit, finish_reduction, start_reduction

    finish_reduction(start_reduction(routers))
    commit(routers)


def test_many_layers_get_what_each_alone_would() -> None:
    names = [
        "plain",
        "plain",
        "small",
        "guard",
        "guard",
        "guard",
        "plain",
        "slow",
    ]
    together = [router(False, **KINDS[name]) for name in names]
    alone = copy.deepcopy(together)
    for step in range(6):
        for routers in (together, alone):
            train(routers, step)
        boundary(together)
        for one in alone:
            boundary([one])
        for one, other in zip(together, alone, strict=True):
            for ours, theirs in zip(memory(one), memory(other), strict=True):
                assert torch.equal(ours, theirs)
            assert one.thresholds.updates_on_host() == other.thresholds.updates_on_host()
            ours, theirs = one.last_batch, other.last_batch
            assert ours.num_updates == theirs.num_updates
            for name in ("thresholds_E", "cutoffs_E", "restarted"):
                torch.testing.assert_close(
                    getattr(ours, name), getattr(theirs, name), rtol=0, atol=0, equal_nan=True
                )
            for mine, its in zip(vars(ours.counts).values(), vars(theirs.counts).values(), strict=True):
                assert torch.equal(mine, its)
    assert any(one.thresholds.restarted_at.any() for one in together), "the guard was never needed"


class _Operations(TorchDispatchMode):
    """Counts operations, those that only look at memory in another way left out."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not function.is_view
        return function(*args, **(kwargs or {}))


def operations(layers: int) -> int:
    routers = [router(False) for _ in range(layers)]
    train(routers, 0)
    with _Operations() as counted:
        boundary(routers)
    return counted.number


def test_the_number_of_operations_does_not_grow_with_the_layers() -> None:
    """60 layers that each launched 70 kernels would hold up a step for milliseconds."""
    assert 20 < operations(2) == operations(24) < 75


def test_a_layer_without_candidate_is_an_error_that_commits_none() -> None:
    from megatron_et.moe.synchronize import commit

    routers = [router(False) for _ in range(3)]
    train(routers, 0)
    routers[0].thresholds.propose(torch.ones(8))
    before = routers[0].thresholds.value.clone()
    with pytest.raises(RuntimeError, match=r"commit\(\) without a candidate"):
        commit(routers)
    assert torch.equal(routers[0].thresholds.value, before)
    assert routers[0].thresholds.updates_on_host() == 0


def test_thresholds_put_back_unseen_are_told_once_and_the_warm_up_comes_back(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A broadcast into num_updates of a router that had passed its warm-up of 2 batches."""
    one = router(False)
    for step in range(3):
        train([one], step)
        boundary([one])
    one.thresholds.num_updates.data.zero_()
    one.thresholds.value.fill_(99.0)
    for step in (3, 4):
        _, routing_map = one.routing(torch.randn(40, 8))
        # The first batch is routed by a threshold that nobody reaches, the next by Expert Choice again.
        assert routing_map.sum(dim=0).tolist() == ([0] * 8 if step == 3 else [10] * 8)
        boundary([one])
        one.thresholds.value.fill_(99.0)
    said = capsys.readouterr().out
    assert said.count("put back from 3 to 0 updates by a write that torch does not count") == 1


def test_a_state_dict_from_before_there_was_one_counter_loads() -> None:
    """Strictly: it has `committed_batches` beside the thresholds' own count."""
    old, new = router(False), router(False)
    for step in range(3):
        train([old], step)
        boundary([old])
    state = old.state_dict() | {"committed_batches": torch.tensor([3])}
    new.load_state_dict(state)
    assert new.thresholds.updates_on_host() == 3
    assert torch.equal(new.thresholds.value, old.thresholds.value)
