"""The CUDA kernel route.cu: compiled for this GPU by NVRTC at its first use, launched on torch's stream.

Dimension letters: T tokens, E experts.
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_et.quantile import Histogram
from megatron_et.statistics import Counters

SOURCE = Path(__file__).with_name("route.cu")
EXPERTS = 8
"""Of a block; route.cu's."""
THREADS, LOADS = 512, 2
ROWS_AT_ONCE = THREADS // 2
MOST_ROWS = 2048
"""Tokens of a stripe: more blocks than the GPU runs at once gain nothing, but this many tokens hide what a
block costs to begin and end."""


@dataclass(frozen=True)
class Work:
    """What blocks share while they run; zero before and after every launch."""

    fanout: torch.Tensor
    """[tokens or more] int32."""
    arrived: torch.Tensor
    """[stripes or more] int32."""


_WORK: dict[tuple[int, int], Work] = {}
"""(device, stream) -> work; launches of a stream follow one another."""


def takes(logits: torch.Tensor, counters: Counters | None) -> bool:
    """Whether the kernel can route and count these: fp32, contiguous, a multiple of 8 experts, and counted
    in a histogram if at all."""
    return (
        (counters is None or counters.histogram is not None)
        and logits.dtype == torch.float32
        and logits.is_contiguous()
        and logits.data_ptr() % 16 == 0
        and logits.shape[0] > 0
        and logits.shape[1] % EXPERTS == 0
    )


def expert_threshold(
    logits: torch.Tensor,
    thresholds: torch.Tensor,
    lower: torch.Tensor | None,
    upper: torch.Tensor | None,
    padding: torch.Tensor | None,
    counters: Counters | None,
    gates: torch.Tensor,
    routing_map: torch.Tensor,
) -> None:
    """Write gates and map and add to the counters, in one launch; arguments as for
    `routed.expert_threshold`, `padding` [tokens] uint8. What `takes` has refused must not be given."""
    num_tokens, num_experts = logits.shape
    groups = num_experts // EXPERTS
    rows = rows_of_stripe(num_tokens, groups, multiprocessors(logits.device))
    stripes = -(-num_tokens // rows)
    constants = constants_for(None)
    counted: tuple[torch.Tensor | None, ...] = (None,) * 4
    centers = None
    if counters is not None and counters.histogram is not None:
        histogram = counters.histogram
        work = work_for(logits.device, num_tokens, stripes)
        centers = histogram.centers_E
        counted = work.fanout, work.arrived, counters.counts, histogram.counts_EB
        constants = constants_for(histogram)
    tensors = (logits, thresholds, lower, upper, padding, centers, gates, routing_map, *counted)
    launch(
        (groups, stripes),
        [0 if tensor is None else tensor.data_ptr() for tensor in tensors],
        [num_tokens, num_experts, rows],
        logits.device,
        constants,
    )


def constants_for(histogram: Histogram | None) -> dict[str, int]:
    """What route.cu is compiled with to count into this histogram, or to count nothing."""
    if histogram is None:
        return {"COUNTED": 0, "BINS": 0, "FIRST": 0}
    return {"COUNTED": 1, "BINS": histogram.bins, "FIRST": histogram.bits_of_first_octave}


def rows_of_stripe(num_tokens: int, groups: int, blocks: int) -> int:
    """Tokens of a stripe, a multiple of ROWS_AT_ONCE: as many blocks as run at once, if that is enough."""
    wanted = -(-num_tokens * groups // (blocks * ROWS_AT_ONCE)) * ROWS_AT_ONCE
    return min(max(wanted, ROWS_AT_ONCE), MOST_ROWS)


def work_for(device: torch.device, num_tokens: int, stripes: int) -> Work:
    """Memory for one launch on the current stream."""

    def zeros(tokens: int, stripes: int) -> Work:
        return Work(*(torch.zeros(n, dtype=torch.int32, device=device) for n in (tokens, stripes)))

    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        # A graph zeroes its own: memory that an eager launch uses may be in use when the graph is replayed.
        return zeros(num_tokens, stripes)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    work = _WORK.get(key)
    if work is None or work.fanout.numel() < num_tokens or work.arrived.numel() < stripes:
        work = _WORK[key] = zeros(num_tokens, max(stripes, 1024))
    return work


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; the CPU, where tests run the kernel, does one block at a time."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(
    grid: tuple[int, int],
    pointers: Sequence[int],
    numbers: Sequence[int],
    device: torch.device,
    constants: dict[str, int],
) -> None:
    """Start the kernel on torch's current stream."""
    from cuda.bindings import driver

    function = _function(device.index, *constants.items())
    types = (ctypes.c_void_p,) * len(pointers) + (ctypes.c_int,) * len(numbers)
    stream = torch.cuda.current_stream(device).cuda_stream
    [status] = driver.cuLaunchKernel(
        function, *grid, 1, THREADS, 1, 1, 0, stream, ((*pointers, *numbers), types), 0
    )
    _check(status, "launching route.cu")


@functools.cache
def _function(device: int, *constants: tuple[str, int]) -> Any:
    """The kernel in the GPU's current context, which is torch's."""
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    status, module = driver.cuModuleLoadData(compiled(f"sm_{major}{minor}", dict(constants)))
    _check(status, "loading route.cu")
    status, function = driver.cuModuleGetFunction(module, b"route_and_count")
    _check(status, "finding route_and_count")
    return function


def compiled(architecture: str, constants: dict[str, int]) -> bytes:
    """Machine code for a GPU (sm_90), which need not be here.

    Raises:
        RuntimeError: the compiler's messages.
    """
    from cuda.bindings import nvrtc

    defined = constants | {"THREADS": THREADS, "LOADS": LOADS}
    options = [f"--gpu-architecture={architecture}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in defined.items()]
    status, program = nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), SOURCE.name.encode(), 0, [], [])
    _check(status, "starting NVRTC")
    [status] = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if int(status) != 0:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = bytearray(size)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC could not compile {SOURCE.name} for {architecture}: {bytes(log).decode()}")
    status, size = nvrtc.nvrtcGetCUBINSize(program)
    _check(status, "compiling route.cu")
    code = bytearray(size)
    nvrtc.nvrtcGetCUBIN(program, code)
    nvrtc.nvrtcDestroyProgram(program)
    return bytes(code)


def _check(status: Any, what: str) -> None:
    if int(status) != 0:
        raise RuntimeError(f"{what} failed: {status!r}")
