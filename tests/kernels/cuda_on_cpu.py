"""Runs the CUDA kernels of megatron_et/kernels on the CPU: compiled by the host's C++ compiler with
cuda_on_cpu.h."""

import ctypes
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megatron_et.rule.kernels import native, nvrtc, scratch

HERE = Path(__file__).parent
THREADS = 64
"""Fewer than on a GPU: each is a real thread."""

compiler = shutil.which("g++") or shutil.which("clang++")


class OnCpu:
    """`nvrtc.launch` for tensors on the CPU; fails when a launch does not leave its scratch as zeros."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches: Counter[str] = Counter()
        """By the name of the source."""
        self._folder = folder
        self._libraries: dict[nvrtc.Kernel, ctypes.CDLL] = {}
        self._scratch: tuple[torch.Tensor, ...] = ()
        fresh = scratch.zeros

        def zeros(owner: str, device: torch.device, *sizes: int) -> tuple[torch.Tensor, ...]:
            self._scratch = fresh(owner, device, *sizes)
            return self._scratch

        monkeypatch.setattr(scratch, "zeros", zeros)
        monkeypatch.setattr(nvrtc, "launch", self)
        monkeypatch.setattr(native, "THREADS", THREADS)
        monkeypatch.setattr(native, "MOST_ROWS", 2 * THREADS)

    def __call__(
        self,
        kernel: nvrtc.Kernel,
        grid: tuple[int, int],
        pointers: Sequence[int],
        numbers: Sequence[int],
        device: torch.device,
    ) -> None:
        assert device.type == "cpu"
        library = self._libraries.get(kernel)
        if library is None:
            library = self._libraries[kernel] = self._compile(kernel)
        self.launches[kernel.file] += 1
        library.launch(
            *grid, (ctypes.c_void_p * len(pointers))(*pointers), (ctypes.c_int * len(numbers))(*numbers)
        )
        assert not any(vector.any() for vector in self._scratch)

    def _compile(self, kernel: nvrtc.Kernel) -> ctypes.CDLL:
        assert compiler is not None
        library = self._folder / f"kernel{len(self._libraries)}.so"
        command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-ffp-contract=off"]
        command += [*kernel.definitions, f'-DKERNEL_FILE="{kernel.file}"', f"-DKERNEL_NAME={kernel.name}"]
        command += [f"-I{nvrtc.FOLDER}", "-o", str(library), str(HERE / "cuda_on_cpu.cpp")]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        return ctypes.CDLL(str(library))
