"""The flex dispatcher with the real DeepEP and HybridEP: two GPUs, outputs and gradients against alltoall.

Not run where this was written (no machine with two GPUs and DeepEP); tests/distributed/test_flex.py checks
what the two are handed.
"""

import importlib.util
import os

import pytest
import torch

from tests.launch import TAIL, torchrun

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(importlib.util.find_spec("deep_ep") is None, reason="DeepEP is not installed")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="DeepEP needs two GPUs")
@pytest.mark.parametrize("backend", ["deepep", "hybridep"])
def test_flex(backend: str) -> None:
    """Flex dispatcher with {backend} against alltoall, two GPUs."""
    if backend == "hybridep":
        deep_ep = pytest.importorskip("deep_ep")
        if not hasattr(deep_ep, "HybridEPBuffer"):
            pytest.skip("this DeepEP was not built from its hybrid-ep branch")
    two = ",".join(os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:2])
    env = {"MEGATRON_ET_CPU": "0", "CUDA_VISIBLE_DEVICES": two}
    run = torchrun(["-m", "tests.gpu.flex_gpu", backend], 2, env=env, timeout=300)
    assert run.returncode == 0, run.stdout[-TAIL:]
    assert run.stdout.count(f"flex {backend} passed") == 2
