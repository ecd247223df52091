"""The ranks agree on the kernels before a model is built (host/kernels.py)."""

from argparse import Namespace
from typing import Any

import pytest
import torch

from megatron_et.config import ConfigError
from megatron_et.host import kernels


def args_of(asked: str, router: str = "expert-threshold") -> Namespace:
    return Namespace(moe_router_type=router, moe_et_kernels=asked, num_experts=8)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What each rank's try-out says; this process is rank 0."""
    reasons: list[str | None] = [None, None, None]

    def all_gather_object(values: list[Any], value: Any) -> None:
        assert value == reasons[0]
        values[:] = reasons

    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: len(reasons))
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    monkeypatch.setattr(kernels, "why_not", lambda *_: reasons[0])
    return reasons


@pytest.mark.usefixtures("ranks")
def test_auto_is_triton_where_every_rank_can(capsys: pytest.CaptureFixture[str]) -> None:
    args = args_of("auto")
    kernels.agree(args)
    assert args.moe_et_kernels == "triton"
    assert capsys.readouterr().out == "[megatron_et] kernels: triton (tried on every rank)\n"


@pytest.mark.parametrize(
    ("bad", "told"), [((2,), "rank 2: no"), ((0, 1, 2), "rank 0: no, as 2 further ranks")]
)
def test_auto_is_torch_on_all_ranks_where_one_cannot(
    ranks: list[str | None], capsys: pytest.CaptureFixture[str], bad: tuple[int, ...], told: str
) -> None:
    for rank in bad:
        ranks[rank] = "no"
    args = args_of("auto")
    kernels.agree(args)
    assert args.moe_et_kernels == "torch"
    assert capsys.readouterr().out == f"[megatron_et] kernels: torch ({told})\n"


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_kernels_by_name_are_refused_on_all_ranks_where_one_cannot(
    ranks: list[str | None], name: str
) -> None:
    args = args_of(name)
    kernels.agree(args)
    assert args.moe_et_kernels == name
    ranks[2] = "there is no GPU"
    message = rf"--moe-et-kernels {name} cannot be had: rank 2: there is no GPU\. Use --moe-et-kernels auto"
    with pytest.raises(ConfigError, match=message):
        kernels.agree(args)


@pytest.mark.parametrize(("asked", "router"), [("torch", "expert-threshold"), ("auto", "topk")])
def test_nothing_is_asked_where_nothing_depends_on_it(
    monkeypatch: pytest.MonkeyPatch, asked: str, router: str
) -> None:
    monkeypatch.setattr(kernels, "why_not", pytest.fail)
    args = args_of(asked, router)
    kernels.agree(args)
    assert args.moe_et_kernels == asked


def test_without_a_gpu_auto_is_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the real try-out."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    args = args_of("auto")
    kernels.agree(args)
    assert args.moe_et_kernels == "torch"
    assert "kernels: torch (rank 0: there is no GPU, the router is on cpu)" in capsys.readouterr().out
