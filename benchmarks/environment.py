"""Where a benchmark ran: written beside every result."""

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"PyTorch": "torch", "Megatron-Core": "megatron-core", "Transformer Engine": "transformer-engine"}


def environment() -> dict[str, str]:
    """Date, commit, machine and versions; a package that is not installed is left out."""
    found = {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "CPU": f"{_cpu()}, {os.cpu_count()} cores",
        "Python": platform.python_version(),
    }
    for name, package in PACKAGES.items():
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_environment() -> dict[str, str]:
    """`environment` and the GPU with its driver and libraries, where there is one."""
    import torch
    import triton

    found = environment() | {"Triton": triton.__version__}
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name(0)
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["driver"] = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"
        )
    return found


def _output(*command: str) -> str:
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return run.stdout.strip()


def _commit() -> str:
    changed = " with changes in megatron_et" if _output("git", "status", "--porcelain", "megatron_et") else ""
    return (_output("git", "rev-parse", "--short", "HEAD") or "unknown") + changed


def _cpu() -> str:
    information = Path("/proc/cpuinfo")
    for line in information.read_text().splitlines() if information.is_file() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
