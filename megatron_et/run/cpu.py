"""Development backend: unmodified Megatron-Core, `megatron.training.pretrain` included, on CPU and gloo.

For laptops and CI: set MEGATRON_ET_CPU=1 and start training as on GPUs, with the flags of `CPU_ARGS`
appended. A CPU run proves logic, layouts and checkpoints. It proves nothing about NCCL, Transformer Engine,
FP8, streams, CUDA graphs or speed on GPUs. The backend must be asked for, refuses where a GPU is visible,
and says that it is on.

`install()` turns `torch.cuda` into a facade over the CPU, teaches gloo what it lacks, and repairs what
Megatron cannot do without Transformer Engine and Apex (which it hides). The comment of each entry names who
asks, as a file and function of megatron-core 0.19.2 below megatron/, and why the answer is what it is.

Limits: no flex dispatcher (DeepEP), no permute or RoPE fusion (Transformer Engine), no CUDA graphs, and
pipelines of two stages with virtual stages only with `overlap_p2p_comm` (repairs.py). The
CPU's generator also plays the GPU's: runs are reproducible and resume exactly, dropout included, but their
dropout masks are not those of a GPU.
"""

import atexit
import collections
import contextlib
import functools
import logging
import multiprocessing
import os
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_et.rank_zero import say
from megatron_et.run.repairs import RepairOnImport

ENV = "MEGATRON_ET_CPU"
CPU = torch.device("cpu")

#: Megatron's flags for a CPU run: first the required ones, then those that avoid fusions made for GPUs.
CPU_ARGS: tuple[str, ...] = (
    *("--distributed-backend", "gloo"),
    "--no-gradient-accumulation-fusion",
    "--no-rope-fusion",
    *("--transformer-impl", "local"),
    "--no-persist-layer-norm",
    #
    "--no-masked-softmax-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    *("--attention-backend", "unfused"),
    *("--num-workers", "0"),
)

_installed = False


def requested() -> bool:
    """Whether MEGATRON_ET_CPU asks for the CPU backend. ValueError if its value is neither a yes nor a no."""
    value = os.environ.get(ENV, "").strip().lower()
    if value in ("1", "true", "yes"):
        return True
    if value in ("", "0", "false", "no"):
        return False
    raise ValueError(
        f"{ENV}={os.environ[ENV]!r} is neither yes nor no: set it to 1 (true, yes) or 0 (false, no)."
    )


def installed() -> bool:
    """Whether `install()` has run in this process."""
    return _installed


def install() -> None:
    """Make this process run Megatron on CPU, before it imports megatron.core. Repeated calls do nothing.

    It imports torch and nothing of Megatron: Megatron's modules are repaired when they are imported. So it
    costs nothing in the processes that Megatron spawns to write checkpoints, which import `__main__` again.

    Raises:
        RuntimeError: a GPU is visible, or megatron.core has been imported already.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise RuntimeError(
            "The CPU development backend refuses to run on a machine with a GPU: "
            f"unset {ENV} to train on the GPU, or set CUDA_VISIBLE_DEVICES= (empty) to hide the GPU."
        )
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "The CPU development backend came too late: megatron.core has been imported and holds the "
            "functions that it replaces. Call megatron_et.run.cpu.install() before the import, or run "
            f"{ENV}=1 python -m megatron_et SCRIPT ARGS..."
        )
    _replace_devices()
    _replace_streams()
    _replace_rng()
    _replace_tensor_functions()
    _replace_compile()
    _replace_collectives()
    _hide_gpu_libraries()
    sys.meta_path.insert(0, RepairOnImport())
    atexit.register(_close_process_groups)
    _installed = True
    if multiprocessing.parent_process() is None:  # not in spawned checkpoint writers
        say(f"{ENV}: the CPU development backend is on. It proves nothing about GPU speed.")


def _close_process_groups() -> None:
    """Megatron leaves the process groups open; gloo's threads, still running when the interpreter ends, then
    abort the process now and then ("terminate called without an active exception") after a good run."""
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- torch.cuda ------------------------------------------------------------------------------------------
# Every replaced torch name gets a function object of its own: torch._dynamo asserts that none stands for two.


def _replace_devices() -> None:
    cuda: Any = torch.cuda
    # training/initialize.py:initialize_megatron asserts it.
    cuda.is_available = lambda: True
    # training/initialize.py:_initialize_distributed, _set_random_seed: 0 would mean no model-parallel
    # groups and no seeds.
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # everywhere: `device=torch.cuda.current_device()`.
    cuda.current_device = lambda: CPU
    # training/initialize.py:_initialize_distributed
    cuda.set_device = lambda *_, **__: None
    # core/timers.py:Timer, core/pipeline_parallel/p2p_communication.py:P2PCommunicator
    cuda.synchronize = lambda *_, **__: None
    # training/arguments.py:validate_args wants 8 or more for --moe-grouped-gemm.
    cuda.get_device_capability = lambda *_, **__: (10, 0)
    # training/utils/common_utils.py:get_device_arch_version. Below 10, validate_args
    # demands CUDA_DEVICE_MAX_CONNECTIONS=1.
    cuda.get_device_properties = lambda *_, **__: types.SimpleNamespace(name="cpu", major=10, minor=0)
    # training/training.py:training_log with --log-memory-to-tensorboard
    cuda.memory_stats = lambda *_, **__: collections.defaultdict(int)
    # torch's own optimizers and DataLoader ask torch.accelerator, which would believe is_available() above.
    torch.accelerator.is_available = lambda: False


class _Stream:
    """torch.cuda.Stream where all work is done when a call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> "_Event":
        return event or _Event()


class _Event:
    """torch.cuda.Event that has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _replace_streams() -> None:
    # core/transformer/moe/token_dispatcher.py:MoEAlltoAllTokenDispatcher,
    # core/transformer/moe/shared_experts.py, core/distributed/param_and_grad_buffer.py: side streams for
    # copies, shared experts and communication.
    default = _Stream()
    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = lambda *_, **__: default
    cuda.stream = lambda stream: contextlib.nullcontext(stream)


class _OneGenerator:
    """torch.cuda.default_generators: the CPU's generator for every index (an int, or `current_device()`)."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator


def _replace_rng() -> None:
    # core/tensor_parallel/random.py:CudaRNGStatesTracker, training/initialize.py,
    # training/checkpointing.py. The CPU's generator must play the GPU's: it is the one that dropout on CPU
    # tensors draws from.
    modules: tuple[Any, ...] = (torch.cuda, torch.cuda.random)
    for module in modules:
        module.get_rng_state = lambda *_, **__: torch.get_rng_state()
        module.set_rng_state = lambda new_state, *_, **__: torch.set_rng_state(new_state)
        module.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    torch.cuda.default_generators = _OneGenerator()  # type: ignore[assignment]
    # core/tensor_parallel/random.py:_set_cuda_rng_state sets the state in a callback. torch would queue it
    # until CUDA is initialized: for ever.
    torch.cuda._lazy_call = lambda callback, *_, **__: callback()
    # core/tensor_parallel/random.py:CudaRNGStatesTracker.fork warns if the CPU's state moved. Here it must.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    # training/training.py:build_train_valid_test_data_iterators starts the DataLoaders after a checkpoint
    # restored the generators, and each draws a seed from the CPU's. Dropout, which shares it here, must not
    # notice: a resumed run would leave the straight one.
    start_iteration = torch.utils.data.DataLoader.__iter__

    @functools.wraps(start_iteration)
    def start_iteration_aside(self: Any) -> Any:
        with torch.random.fork_rng(devices=()):
            return start_iteration(self)

    torch.utils.data.DataLoader.__iter__ = start_iteration_aside  # type: ignore[method-assign]


# ---- tensors ---------------------------------------------------------------------------------------------


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return on_cpu


def _replace_tensor_functions() -> None:
    # everywhere: device="cuda", as in core/pipeline_parallel/schedules.py, core/optimizer/clip_grads.py.
    for name in ("empty", "empty_like", "full", "ones", "rand", "randn", "tensor", "zeros"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    # everywhere: batches, models, reduced losses.
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    # core/pipeline_parallel/utils.py:ScheduleNode (--overlap-moe-expert-parallel-comm). No stream outlives a
    # call here.
    torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]

    # core/optimizer/optimizer.py, distrib_optimizer.py: know parameters by 'torch.cuda.FloatTensor' etc.
    original_type = torch.Tensor.type

    @functools.wraps(original_type)
    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original_type(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = cuda_type  # type: ignore[method-assign,assignment]


def _replace_compile() -> None:
    # core/jit.py:jit_fuser, core/transformer/moe/router.py: compile at import. Eager, imports take half the
    # time and nothing builds C++ kernels.
    def stay_eager(model: Any = None, *_: Any, **__: Any) -> Any:
        return model if model is not None else lambda decorated: decorated

    torch.compile = stay_eager


# ---- gloo ------------------------------------------------------------------------------------------------


def _replace_collectives() -> None:
    # core/transformer/moe/token_dispatcher.py:MoEAlltoAllTokenDispatcher turns split sizes that are on a
    # GPU into lists. On CPU they stay tensors, which the binding does not take.
    original_all_to_all = dist.all_to_all_single

    @functools.wraps(original_all_to_all)
    def all_to_all_single(
        output: Any,
        input: Any,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        *rest: Any,
        **kw: Any,
    ) -> Any:
        sizes = (output_split_sizes, input_split_sizes)
        to, of = (size.tolist() if isinstance(size, torch.Tensor) else size for size in sizes)
        return original_all_to_all(output, input, to, of, *rest, **kw)

    # core/tensor_parallel/mappings.py:_gather_along_first_dim with split sizes (MoE with expert TP > 1)
    # gathers parts of different lengths, which gloo refuses.
    original_all_gather = dist.all_gather

    @functools.wraps(original_all_gather)
    def all_gather(
        tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        if len({part.shape for part in tensor_list}) == 1:
            return original_all_gather(tensor_list, tensor, group=group, async_op=async_op)
        if async_op:
            raise NotImplementedError(
                "The CPU backend has no asynchronous all_gather of parts of different lengths."
            )
        padded = tensor.new_zeros((max(len(part) for part in tensor_list), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        gathered = [torch.empty_like(padded) for _ in tensor_list]
        original_all_gather(gathered, padded, group=group)
        for part, full in zip(tensor_list, gathered, strict=True):
            part.copy_(full[: len(part)])
        return None

    dist.all_to_all_single, dist.all_gather = all_to_all_single, all_gather


def _hide_gpu_libraries() -> None:
    # core/utils.py:get_te_version and many imports: Megatron would call the kernels of what is installed.
    for name in ("transformer_engine", "apex"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    # core/optimizer, core/models, core/extensions, training/datasets/data_samplers.py: warnings that are true
    # of every CPU run, come from every rank and tell its user nothing.
    for message in (
        ".*Apex (is|are) not installed",
        "Only transformer-engine>=1.7.0 supports MoE experts",
        "'pin_memory' argument is set as true but no accelerator",
    ):
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
