"""Triton kernels where there is no GPU: their suite in Triton's interpreter, machine code for GPUs that are
not here, and when they are refused."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_et.config import ConfigError, ExpertThresholdConfig
from megatron_et.rule.kernels import Kernels, load_kernels

pytestmark = pytest.mark.megatron_free

ROOT = Path(__file__).parents[3]
TRITON = ExpertThresholdConfig(router_type="expert-threshold", kernels="triton")


def python(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )


def test_kernels_in_the_interpreter() -> None:
    """tests/kernels: the interpreter must be asked for before Triton is imported, so in a new process."""
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels"]
    run = python(*command, TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """To machine code of A100, H100 and B200, which needs none of them."""
    run = python("-m", "tests.kernels.compiled", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert run.returncode == 0, run.stdout[-4000:]
    compiled = [line for line in run.stdout.splitlines() if line.startswith("compiled ")]
    assert {line.split()[1] for line in compiled} == {"sm_80", "sm_90", "sm_100"}


def test_without_a_gpu_the_default_is_torch_and_imports_no_triton() -> None:
    assert load_kernels(ExpertThresholdConfig(router_type="expert-threshold"), 8, torch.zeros(1)) == Kernels()
    code = (
        "import sys, torch; from megatron_et import ExpertThresholdConfig as C;"
        "from megatron_et.rule.kernels import load_kernels;"
        "load_kernels(C(router_type='expert-threshold'), 8, torch.zeros(1)); print('triton' in sys.modules)"
    )
    assert python("-c", code).stdout.splitlines()[-1] == "False"


def test_triton_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="triton cannot be had: there is no GPU, the router is on cpu"):
        load_kernels(TRITON, 8, torch.zeros(1))


def test_triton_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "megatron_et.rule.kernels.routed", raising=False)
    monkeypatch.delattr("megatron_et.rule.kernels.routed", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError, match="triton cannot be had: Triton cannot be imported"):
        load_kernels(TRITON, 8, torch.zeros(1))


CUDA = replace(TRITON, kernels="cuda")
GPU = SimpleNamespace(is_cuda=True, device="cuda:0")


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """What load_kernels has tried out: whether route.cu routes and select.cu selects."""
    from megatron_et.rule.kernels import routed

    seen: list[tuple[bool, bool]] = []
    monkeypatch.setattr(routed, "try_out", lambda device, *cuda: seen.append(cuda))  # noqa: ARG005
    return seen


@pytest.mark.parametrize(
    ("settings", "experts", "routes", "selects"),
    [
        (CUDA, 8, True, True),
        (CUDA, 12, False, False),
        (replace(CUDA, max_fanout=4), 8, False, True),
        (replace(CUDA, gate_normalization="fanout"), 8, False, True),
        (replace(CUDA, pool="global"), 8, True, False),
        (replace(CUDA, warmup_steps=0), 8, True, False),
        (replace(CUDA, warmup_steps=0, capacity_factor=0.5), 8, True, True),
        (replace(CUDA, warmup_steps=0, router_type="expert-choice"), 8, True, True),
        (TRITON, 8, False, False),
    ],
)
def test_kernels_are_tried_out_before_the_first_step(
    settings: ExpertThresholdConfig,
    experts: int,
    routes: bool,
    selects: bool,
    tried: list[tuple[bool, bool]],
) -> None:
    from megatron_et.rule.kernels import select

    kernels = load_kernels(settings, experts, GPU)  # type: ignore[arg-type]
    assert tried == [(routes, selects)]
    assert kernels.route is not None
    assert kernels.route.keywords == {"cuda": routes}  # type: ignore[attr-defined]
    assert kernels.select == (select.kth_largest if selects else Kernels().select)


def test_kernels_that_do_not_compile_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_et.rule.kernels import native, nvrtc, routed

    def no_such_gpu(device: str, *_: bool) -> None:  # noqa: ARG001
        nvrtc.compiled("sm_1", native.kernel(None))

    monkeypatch.setattr(routed, "try_out", no_such_gpu)
    message = (
        r"cuda cannot be had: their try-out on this GPU failed: NVRTC could not compile route\.cu for sm_1"
    )
    with pytest.raises(ConfigError, match=message):
        load_kernels(CUDA, 8, GPU)  # type: ignore[arg-type]


def test_cuda_without_its_bindings_is_refused_if_it_needs_them(
    monkeypatch: pytest.MonkeyPatch, tried: list[tuple[bool, bool]]
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(ConfigError, match="cuda cannot be had: NVIDIA's cuda-bindings cannot be imported"):
        load_kernels(CUDA, 8, GPU)  # type: ignore[arg-type]
    assert load_kernels(CUDA, 7, GPU).route is not None  # type: ignore[arg-type]
    assert tried == [(False, False)]


@pytest.mark.parametrize(
    ("tokens", "experts", "rows"),
    [(16_384, 128, 2048), (4_096, 1_024, 2048), (16_384, 8, 256), (1, 8, 256), (65_536, 64, 2048)],
)
def test_stripes_of_the_cuda_kernel(tokens: int, experts: int, rows: int) -> None:
    """One wave of blocks on an H100's 132 multiprocessors where stripes of at most 2,048 tokens allow it."""
    from megatron_et.rule.kernels.native import rows_of_stripe

    assert rows_of_stripe(tokens, experts // 8, 132) == rows


def test_scratch_is_kept_for_a_stream_and_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_et.rule.kernels import scratch

    stream, capturing, zeros = SimpleNamespace(cuda_stream=1), False, torch.zeros
    monkeypatch.setattr(scratch, "_SCRATCH", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch, "zeros", lambda size, dtype, **_: zeros(size, dtype=dtype))

    def kept(owner: str, *sizes: int) -> tuple[torch.Tensor, ...]:
        return scratch.zeros(owner, torch.device("cuda:0"), *sizes)

    first = kept("route", 5, 2)
    assert kept("route", 3, 2) is first
    assert [vector.numel() for vector in kept("route", 4, 7)] == [5, 7]  # never less than before
    assert kept("select", 3, 2) is kept("select", 3, 2) is not kept("route", 3, 2)
    stream.cuda_stream = 2
    second = kept("route", 3, 2)
    assert [vector.numel() for vector in second] == [3, 2]
    capturing = True
    assert kept("route", 3, 2) is not second
    assert all(vector.dtype == torch.int32 and not vector.any() for vector in second)


@pytest.mark.parametrize("fails", [False, True])
def test_auto_is_triton_on_a_gpu_that_passes_the_try_out(
    fails: bool, tried: list[tuple[bool, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_et.rule.kernels import routed

    if fails:
        monkeypatch.setattr(routed, "try_out", lambda *_: 1 / 0)
    kernels = load_kernels(replace(TRITON, kernels="auto"), 8, GPU)  # type: ignore[arg-type]
    assert (kernels.route is None) == fails
    assert tried == ([] if fails else [(False, False)])


def test_too_many_experts_are_refused(tried: list[tuple[bool, bool]]) -> None:
    assert load_kernels(TRITON, 4096, GPU).route is not None  # type: ignore[arg-type]
    assert tried == [(False, False)]
    with pytest.raises(ConfigError, match="at most 4096 experts, and there are 4097"):
        load_kernels(TRITON, 4097, GPU)  # type: ignore[arg-type]
