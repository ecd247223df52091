"""Starting processes on this machine's first GPU from a test: tests.launch without its CPU backend."""

import importlib.util
import os

import pytest

GPU_ENV = {
    # tests.launch asks for the CPU backend and hides GPUs; both are undone here.
    "MEGATRON_ET_CPU": "0",
    "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0],
}

HAS_TE = importlib.util.find_spec("transformer_engine") is not None
"""Installed; it is not imported here, so that one that does not load fails its tests and is not skipped."""

needs_te = pytest.mark.skipif(not HAS_TE, reason="Transformer Engine is not installed")
