"""Runs megatron_et/kernels/route.cu on the CPU: compiled by the host's C++ compiler with cuda_on_cpu.h."""

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megatron_et.kernels import native

HERE = Path(__file__).parent
THREADS, LOADS = 64, 2
"""Fewer than on a GPU: each is a real thread."""

compiler = shutil.which("g++") or shutil.which("clang++")


class OnCpu:
    """`native.launch` for tensors on the CPU."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches = 0
        self._folder = folder
        self._libraries: dict[str, ctypes.CDLL] = {}
        monkeypatch.setattr(native, "launch", self)
        monkeypatch.setattr(native, "ROWS_AT_ONCE", THREADS // 2)
        monkeypatch.setattr(native, "MOST_ROWS", 2 * THREADS)

    def __call__(
        self,
        grid: tuple[int, int],
        pointers: Sequence[int],
        numbers: Sequence[int],
        device: torch.device,
        constants: dict[str, int],
    ) -> None:
        assert device.type == "cpu"
        library = self._libraries.get(str(constants))
        if library is None:
            library = self._libraries[str(constants)] = self._compile(constants)
        self.launches += 1
        library.launch(*grid, (ctypes.c_void_p * len(pointers))(*pointers), *numbers)

    def _compile(self, constants: dict[str, int]) -> ctypes.CDLL:
        assert compiler is not None
        library = self._folder / f"route{len(self._libraries)}.so"
        defined = constants | {"THREADS": THREADS, "LOADS": LOADS}
        command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-ffp-contract=off"]
        command += [f"-D{name}={value}" for name, value in defined.items()]
        command += [f"-I{native.SOURCE.parent}", "-o", str(library), str(HERE / "cuda_on_cpu.cpp")]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        return ctypes.CDLL(str(library))
