"""The router and the global-batch boundary never wait for the device (on a GPU: tests/gpu)."""

from typing import Any

import pytest
import torch

from tests.captured import EXPERTS, SCHEDULES, router
from tests.host_syncs import host_syncs

# Megatron says at every import what is not installed.
pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:megatron\.")


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.numpy(),
        lambda x: bool(x[0] > 0),
        lambda x: int(x[0]),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: torch.where(x > 0),
        lambda x: x.long().bincount(),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x.__setitem__(0, 0.0),
    ],
)
def test_the_detector_sees(read: Any) -> None:
    with host_syncs() as found:
        read(torch.ones(3))
    assert found
    assert "test_host_syncs.py" in found[0]


def test_the_detector_is_silent_about_what_stays_on_the_device() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    with host_syncs() as found:
        y = torch.where(x > 0, x, 0.0).sum() + x[torch.tensor([0, 1])].sum() + x.to(torch.float64).sum()
        y.backward()
    assert found == []


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("pool", ["microbatch", "global"])
def test_no_phase_of_training_waits(schedule: dict[str, Any], pool: str, padded: bool) -> None:
    from megatron_et.moe.synchronize import commit, finish_reduction, start_reduction

    routers = [router(False, pool=pool, **schedule) for _ in range(2)]
    for one in routers:
        _ = one.thresholds.updates_on_host()  # after a load this is read once
    waited: list[str] = []
    read_at_commit: list[str] = []
    for _ in range(7):
        for one in routers:
            logits = torch.randn(20, EXPERTS, requires_grad=True)
            mask = torch.arange(20) % 3 == 1 if padded else None
            with host_syncs() as found:
                gates, _ = one.routing(logits, padding_mask=mask)
                gates.sum().backward()
            waited += found
        with host_syncs() as found:
            finish_reduction(start_reduction(routers))
        waited += found
        with host_syncs() as found:
            commit(routers)
        read_at_commit += found
    assert waited == []
    # Whether logits were finite, for all layers in one copy that started before the optimizer step.
    assert [place.split()[0] for place in read_at_commit] == ["tolist"] * 7
