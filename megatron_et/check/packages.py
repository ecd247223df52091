"""Versions of the packages that Megatron calls. Each probe runs in a child process of its own: an import of
compiled code may crash without a driver."""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_et.check.findings import NOTE, OK, PLAIN, REFUSED, Finding

UNRELATED_APEX = (
    "a package called apex is installed that is not NVIDIA's (it has no apex.optimizers; PyPI's apex is "
    "another project): Megatron takes it for NVIDIA's. Remedy: pip uninstall apex"
)


def torch_and_cuda() -> list[Finding]:
    """torch, GPUs, NCCL, Triton and CUDA's Python bindings."""
    import torch

    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "no CUDA build"
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    seen = f"{gpus} x {torch.cuda.get_device_name(0)}" if gpus else "none visible (none is needed here)"
    found = [Finding(PLAIN, "torch", f"{torch.__version__}, {build}"), Finding(PLAIN, "GPU", seen)]
    try:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    except Exception:  # a build without NCCL says so in ways that differ between versions
        nccl = "not in this build of torch"
    found.append(Finding(PLAIN, "NCCL", nccl))
    triton = "not installed"
    if importlib.util.find_spec("triton") is not None:
        triton = importlib.import_module("triton").__version__
    found.append(Finding(PLAIN, "Triton", triton))
    bindings = "not installed (--moe-et-kernels cuda needs them)"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        bindings = importlib.metadata.version("cuda-bindings")
    return [*found, Finding(PLAIN, "cuda-bindings", bindings)]


def transformer_engine() -> list[Finding]:
    """Transformer Engine for torch."""
    importlib.import_module("transformer_engine.pytorch")
    return [Finding(OK, "Transformer Engine", _version("transformer_engine"))]


def apex() -> list[Finding]:
    """NVIDIA's Apex, told from PyPI's."""
    spec = importlib.util.find_spec("apex")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    # Looked for, not imported: the other project may not import at all.
    if not any(Path(folder, "optimizers").is_dir() for folder in folders):
        return [Finding(NOTE, "Apex", f"{UNRELATED_APEX} ({', '.join(folders)})")]
    importlib.import_module("apex.optimizers")
    if importlib.util.find_spec("amp_C") is None:
        return [Finding(NOTE, "Apex", "NVIDIA's, without its compiled kernels (amp_C)")]
    importlib.import_module("amp_C")
    return [Finding(OK, "Apex", f"NVIDIA's, {_version('apex')}")]


def deep_ep() -> list[Finding]:
    """DeepEP, and whether it brings HybridEP."""
    module = importlib.import_module("deep_ep")
    hybrid = hasattr(module, "HybridEPBuffer")
    return [
        Finding(OK, "DeepEP", _version("deep_ep")),
        Finding(
            OK if hybrid else PLAIN, "HybridEP", "in it" if hybrid else "not in this DeepEP (HybridEPBuffer)"
        ),
    ]


_PROBES: dict[str, Callable[[], list[Finding]]] = {
    "torch": torch_and_cuda,
    "transformer_engine": transformer_engine,
    "apex": apex,
    "deep_ep": deep_ep,
}

ABSENT: dict[str, list[Finding]] = {
    "torch": [Finding(REFUSED, "torch", "not installed")],
    "transformer_engine": [Finding(PLAIN, "Transformer Engine", "not installed: --transformer-impl local")],
    "apex": [Finding(PLAIN, "Apex", "not installed: Megatron uses Transformer Engine or torch")],
    "deep_ep": [
        Finding(PLAIN, "DeepEP", "not installed: for --moe-token-dispatcher-type flex only"),
        Finding(PLAIN, "HybridEP", "not installed"),
    ],
}
"""Top-level module -> what to say when it is not there."""


def probe(name: str) -> list[Finding]:
    """Import a package and say what it is.

    Args:
        name: a key of ABSENT.
    """
    return _PROBES[name]() if installed(name) else ABSENT[name]


def installed(name: str) -> bool:
    """Whether a top-level module is there, whatever its import does."""
    spec = importlib.util.find_spec(name)
    # A folder of that name on the path makes a spec too, without a file.
    return spec is not None and spec.origin is not None


def _version(name: str) -> str:
    """Version of an imported package; NVIDIA's Apex and DeepEP have no `__version__`."""
    value: Any = getattr(sys.modules[name], "__version__", None)
    if value is None:
        try:
            value = importlib.metadata.version(name.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            value = "version unknown"
    return str(value)
