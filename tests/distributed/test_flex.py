"""Megatron's flex dispatcher with our router: what DeepEP and HybridEP are handed, and what comes of it
(flex_layers.py). The kernels themselves need GPUs: tests/gpu/test_flex_gpu.py."""

import pytest

from tests.launch import TAIL, torchrun

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("processes", "check"),
    [
        pytest.param(2, "deepep", marks=pytest.mark.smoke),
        pytest.param(2, "hybridep", marks=pytest.mark.smoke),
        (4, "expert_tensor_parallel"),
        (2, "empty_fused_permutation"),
    ],
)
def test_flex(processes: int, check: str) -> None:
    run = torchrun(["-m", "tests.distributed.flex_layers", check], processes, timeout=180)
    assert run.returncode == 0, run.stdout[-TAIL:]
    assert run.stdout.count(f"check {check} passed") == processes
