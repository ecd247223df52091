"""CUDA C++ kernels of this folder: compiled for this GPU by NVRTC at their first use, launched on torch's
stream."""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Kernel:
    """One kernel as it is compiled and launched."""

    file: str
    name: str
    threads: int
    """Of a block; the source's THREADS."""
    constants: tuple[tuple[str, int], ...] = ()
    """What else the source leaves to be defined."""
    shared_bytes: int = 0
    """Dynamic shared memory of a block."""

    @property
    def definitions(self) -> list[str]:
        """The compiler's options."""
        return [f"-D{name}={value}" for name, value in (("THREADS", self.threads), *self.constants)]


def launch(
    kernel: Kernel,
    grid: tuple[int, int],
    pointers: Sequence[int],
    numbers: Sequence[int],
    device: torch.device,
) -> None:
    """Start the kernel on torch's current stream.

    Args:
        kernel: which; compiled if this GPU has not had it yet.
        grid: blocks in x and y.
        pointers: the kernel's first arguments, 0 for null.
        numbers: the rest, 32-bit integers.
        device: where the pointers point.
    """
    from cuda.bindings import driver

    types = (ctypes.c_void_p,) * len(pointers) + (ctypes.c_int,) * len(numbers)
    stream = torch.cuda.current_stream(device).cuda_stream
    arguments = ((*pointers, *numbers), types)
    # The driver loads and launches in the current context, whichever device that is of.
    with torch.cuda.device(device):
        function = _function(device.index, kernel)
        [status] = driver.cuLaunchKernel(
            function, *grid, 1, kernel.threads, 1, 1, kernel.shared_bytes, stream, arguments, 0
        )
    _check(status, f"launching {kernel.file}")


def pointer(tensor: torch.Tensor | None) -> int:
    """For `launch`."""
    return 0 if tensor is None else tensor.data_ptr()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; the CPU, where tests run the kernels, does one block at a time."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _function(device: int, kernel: Kernel) -> Any:
    """The kernel in the current context, which must be the device's."""
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    status, module = driver.cuModuleLoadData(compiled(f"sm_{major}{minor}", kernel))
    _check(status, f"loading {kernel.file}")
    status, function = driver.cuModuleGetFunction(module, kernel.name.encode())
    _check(status, f"finding {kernel.name}")
    if kernel.shared_bytes:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        [status] = driver.cuFuncSetAttribute(function, attribute, kernel.shared_bytes)
        _check(status, f"giving {kernel.file} {kernel.shared_bytes} bytes of shared memory")
    return function


def compiled(architecture: str, kernel: Kernel) -> bytes:
    """Machine code for a GPU (sm_90), which need not be here.

    Raises:
        RuntimeError: the compiler's messages.
    """
    from cuda.bindings import nvrtc

    source = (FOLDER / kernel.file).read_bytes()
    options = [f"--gpu-architecture={architecture}", "--std=c++17", *kernel.definitions]
    status, program = nvrtc.nvrtcCreateProgram(source, kernel.file.encode(), 0, [], [])
    _check(status, "starting NVRTC")
    [status] = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if int(status) != 0:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = bytearray(size)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC could not compile {kernel.file} for {architecture}: {bytes(log).decode()}")
    status, size = nvrtc.nvrtcGetCUBINSize(program)
    _check(status, f"compiling {kernel.file}")
    code = bytearray(size)
    nvrtc.nvrtcGetCUBIN(program, code)
    nvrtc.nvrtcDestroyProgram(program)
    return bytes(code)


def _check(status: Any, what: str) -> None:
    if int(status) != 0:
        raise RuntimeError(f"{what} failed: {status!r}")
