"""Development backend: unmodified Megatron-Core, `megatron.training.pretrain` included, on CPU and gloo.

For laptops and CI. Set MEGATRON_ET_CPU=1 and start training as on GPUs, with the flags of `CPU_ARGS` appended. A CPU
run proves logic, layouts and checkpoints; it proves nothing about NCCL, Transformer Engine, FP8, streams, CUDA graphs
or speed. The backend is never on by accident: it must be asked for, refuses where a GPU is visible, and says so.

`install()` makes `torch.cuda` a facade over the CPU, teaches gloo the collectives that it lacks, and repairs what
Megatron cannot do without Transformer Engine or Apex. Each entry below names who in Megatron asks (files of
megatron-core 0.19.2, below megatron/; "many" where it is everywhere) and why the answer is what it is.

Limits: no flex dispatcher (DeepEP), no permute or RoPE fusion (Transformer Engine), no CUDA graphs. One generator is
both the CPU's and the "GPU's", so dropout masks differ from those of a GPU. Pipelines of two stages with virtual
stages need `overlap_p2p_comm` (Megatron's own rule, enforced here for training loops without megatron.training too).
"""

import contextlib
import copy
import functools
import importlib.abc
import importlib.machinery
import logging
import multiprocessing
import os
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

ENV = "MEGATRON_ET_CPU"

#: Megatron flags of a CPU run. The first four are required, the others only avoid fusions that need a GPU.
CPU_ARGS: tuple[str, ...] = (
    *("--distributed-backend", "gloo"),
    "--no-gradient-accumulation-fusion",
    "--no-rope-fusion",
    *("--transformer-impl", "local"),
    "--no-persist-layer-norm",
    "--no-masked-softmax-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    *("--attention-backend", "unfused"),
    *("--num-workers", "0"),
)

CPU = torch.device("cpu")
_installed = False


def requested() -> bool:
    """Whether the environment asks for the CPU backend (MEGATRON_ET_CPU=1). ValueError for a value that is no answer."""
    value = os.environ.get(ENV, "").strip().lower()
    if value in {"1", "true", "yes"}:
        return True
    if value in {"", "0", "false", "no"}:
        return False
    raise ValueError(
        f"{ENV}={os.environ[ENV]!r} is neither yes nor no: set it to 1 (true, yes) or 0 (false, no)."
    )


def installed() -> bool:
    """Whether `install()` has run in this process."""
    return _installed


def install() -> None:
    """Turn this process into one that runs Megatron on CPU. Call it before megatron is imported; repeated calls do nothing.

    It imports torch only: the repairs of Megatron happen when Megatron's modules are imported, so that processes that
    Megatron spawns (checkpoint writers re-import `__main__`) pay nothing.

    Raises:
        RuntimeError: a GPU is visible, or megatron.core has been imported already.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise RuntimeError(
            "The CPU development backend refuses to run on a machine with a GPU: "
            f"unset {ENV} to train on the GPU, or set CUDA_VISIBLE_DEVICES= to hide it."
        )
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "megatron_et.cpu.install() came after the import of megatron.core, which has bound the functions that it "
            f"replaces: call it first, or start the script as `{ENV}=1 python -m megatron_et SCRIPT ...`."
        )
    _replace_devices()
    _replace_streams()
    _replace_rng()
    _replace_tensor_functions()
    _replace_collectives()
    _silence()
    sys.meta_path.insert(0, _RepairOnImport())
    _installed = True
    if os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None:
        logger.warning(
            "megatron_et: the CPU development backend is on (%s): Megatron runs on CPU and gloo. "
            "This proves nothing about GPU speed.",
            ENV,
        )


# ---- torch.cuda --------------------------------------------------------------------------------------------
# Every replaced torch name gets a function object of its own: torch._dynamo asserts that none stands for two.


def _replace_devices() -> None:
    cuda: Any = torch.cuda
    # training/initialize.py:initialize_megatron asserts it.
    cuda.is_available = lambda: True
    # training/initialize.py:_initialize_distributed, _set_random_seed: 0 means no model-parallel groups or seeds.
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # many: `device=torch.cuda.current_device()`.
    cuda.current_device = lambda: CPU
    # training/initialize.py:_initialize_distributed
    cuda.set_device = lambda *_, **__: None
    # core/timers.py:Timer, core/pipeline_parallel/p2p_communication.py:P2PCommunicator
    cuda.synchronize = lambda *_, **__: None
    # training/arguments.py:validate_args with --moe-grouped-gemm wants 8 or more.
    cuda.get_device_capability = lambda *_, **__: (10, 0)
    # training/utils/common_utils.py:get_device_arch_version. Below 10, CUDA_DEVICE_MAX_CONNECTIONS=1 is demanded.
    cuda.get_device_properties = lambda *_, **__: types.SimpleNamespace(name="cpu", major=10, minor=0)
    # torch's own optimizers and DataLoader ask torch.accelerator, which would believe is_available() above.
    torch.accelerator.is_available = lambda: False
    torch.accelerator.current_accelerator = lambda *_, **__: None


class _Stream:
    """torch.cuda.Stream where all work is done when the call returns."""

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
    # core/transformer/moe/token_dispatcher.py:MoEAlltoAllTokenDispatcher, core/transformer/moe/shared_experts.py,
    # core/distributed/param_and_grad_buffer.py: side streams for copies, shared experts and communication.
    the_stream = _Stream()
    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = lambda *_, **__: the_stream
    cuda.stream = contextlib.nullcontext


class _OneGenerator:
    """torch.cuda.default_generators: the CPU's generator for every index (an int, or `current_device()`)."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator


def _replace_rng() -> None:
    # core/tensor_parallel/random.py:CudaRNGStatesTracker, training/initialize.py, training/checkpointing.py. The
    # CPU's generator must play the GPU's: it is the one that dropout on CPU tensors draws from.
    torch.cuda.default_generators = _OneGenerator()  # type: ignore[assignment]
    modules: tuple[Any, ...] = (torch.cuda, torch.cuda.random)
    for module in modules:
        module.get_rng_state = lambda *_, **__: torch.get_rng_state()
        module.set_rng_state = lambda new_state, *_, **__: torch.set_rng_state(new_state)
        module.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed)) and None
    # core/tensor_parallel/random.py:_set_cuda_rng_state sets the state in a callback. torch would queue it until
    # CUDA is initialized: for ever.
    torch.cuda._lazy_call = lambda callback, *_, **__: callback()
    # core/tensor_parallel/random.py:CudaRNGStatesTracker.fork warns when the CPU's state moved, as it must here.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    # training/training.py:build_train_valid_test_data_iterators starts DataLoaders after a checkpoint has restored the
    # generators, and each draws a seed from the CPU's. Dropout, which shares it here, must not notice on resume.
    start_iteration = torch.utils.data.DataLoader.__iter__

    @functools.wraps(start_iteration)
    def iterate(self: Any) -> Any:
        with torch.random.fork_rng(devices=()):
            return start_iteration(self)

    torch.utils.data.DataLoader.__iter__ = iterate  # type: ignore[method-assign]


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _is_cuda(device: Any) -> bool:
    return device.type == "cuda" if isinstance(device, torch.device) else str(device).startswith("cuda")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return on_cpu


def _replace_tensor_functions() -> None:
    # many: `device="cuda"`, as in core/pipeline_parallel/schedules.py and core/optimizer/clip_grads.py.
    for name in ("empty", "empty_like", "full", "ones", "rand", "randn", "tensor", "zeros"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    # many: batches, models, reduced losses.
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]

    # core/optimizer/optimizer.py and distrib_optimizer.py sort parameters by 'torch.cuda.FloatTensor' and its like.
    original_type = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original_type(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = type_  # type: ignore[method-assign,assignment]


# ---- gloo ------------------------------------------------------------------------------------------------------------


def _as_list(split_sizes: Any) -> Any:
    return split_sizes.tolist() if hasattr(split_sizes, "tolist") else split_sizes


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def _replace_collectives() -> None:
    # core/transformer/moe/token_dispatcher.py:MoEAlltoAllTokenDispatcher leaves split sizes as tensors on CPU (it
    # copies only GPU tensors to the host); the binding of all_to_all_single takes lists.
    original_all_to_all = dist.all_to_all_single

    @functools.wraps(original_all_to_all)
    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        sizes = _as_list(output_split_sizes), _as_list(input_split_sizes)
        return original_all_to_all(output, input, *sizes, *args, **kwargs)

    dist.all_to_all_single = all_to_all_single

    # core/transformer/moe/token_dispatcher.py:MoEAllGatherTokenDispatcher gathers the boolean routing map through
    # core/tensor_parallel/mappings.py:_gather_along_first_dim; gloo has no bool.
    def byte_gather(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def gather(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return original(_as_bytes(output), _as_bytes(input), *args, **kwargs)

        return gather

    for name in ("all_gather_into_tensor", "_all_gather_base"):
        setattr(dist, name, byte_gather(getattr(dist, name)))

    # core/tensor_parallel/mappings.py:_gather_along_first_dim and _reduce_scatter_along_first_dim with split sizes
    # (MoE with expert TP > 1): lists of tensors of different lengths, which gloo refuses.
    original_all_gather, original_reduce_scatter = dist.all_gather, dist.reduce_scatter

    @functools.wraps(original_all_gather)
    def all_gather(
        tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        if len({part.shape for part in tensor_list}) == 1:
            return original_all_gather(tensor_list, tensor, group=group, async_op=async_op)
        _refuse_async(async_op)
        padded = tensor.new_zeros((max(part.shape[0] for part in tensor_list), *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        gathered = [torch.empty_like(padded) for _ in tensor_list]
        original_all_gather(gathered, padded, group=group)
        for part, full in zip(tensor_list, gathered, strict=True):
            part.copy_(full[: part.shape[0]])
        return None

    @functools.wraps(original_reduce_scatter)
    def reduce_scatter(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if len({part.shape for part in input_list}) == 1:
            return original_reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
        _refuse_async(async_op)
        total = torch.cat(input_list)
        dist.all_reduce(total, op=op, group=group)
        output.copy_(total.split([part.shape[0] for part in input_list])[dist.get_rank(group)])
        return None

    dist.all_gather, dist.reduce_scatter = all_gather, reduce_scatter


def _refuse_async(async_op: bool) -> None:
    if async_op:
        raise NotImplementedError(
            "The CPU backend has no asynchronous collective for parts of different sizes."
        )


# ---- Megatron --------------------------------------------------------------------------------------------------------


def _silence() -> None:
    """Hide warnings that are true of every CPU run and say nothing to its user."""
    for message in (
        ".*Apex (is|are) not installed",  # core/optimizer, core/models: at import, on every rank
        "Only transformer-engine>=1.7.0 supports MoE experts",  # core/extensions
        "'pin_memory' argument is set as true but no accelerator is found",  # training/datasets/data_samplers.py
    ):
        warnings.filterwarnings("ignore", message=message, category=UserWarning)


class _RepairOnImport(importlib.abc.MetaPathFinder):
    """Runs a module's repair of `_REPAIRS` right after the module itself, before anyone can bind its names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        repair = _REPAIRS.get(fullname)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target) if repair else None
        if repair is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_repair(module: types.ModuleType) -> None:
            execute(module)
            try:
                repair(module)
            except AttributeError as error:
                raise ImportError(
                    f"megatron_et.cpu knows megatron-core 0.19.2; this one differs: {error}"
                ) from error

        spec.loader.exec_module = execute_and_repair  # type: ignore[method-assign]
        return spec


def _repair_jit(jit: Any) -> None:
    """core/jit.py: no torch.compile, which would build C++ kernels for minutes; decorators apply it at import."""
    jit.disable_jit_fuser()


def _repair_dataset_helpers(utils: Any) -> None:
    """training/initialize.py runs `make` for the C++ helper; the wheel ships it compiled and has no Makefile."""
    if not (Path(utils.__file__).parent / "Makefile").exists():
        utils.compile_helpers = lambda: None


def _repair_norm(torch_norm: Any) -> None:
    """core/transformer/torch_norm.py refuses sequence parallelism, which MoE with TP demands.

    The norm itself is the same: each rank normalizes its tokens. What is missing is the mark on the parameters by
    which core/distributed/finalize_model_grads.py sums their gradients over the TP group.
    """
    original = torch_norm.WrappedTorchNorm.__new__

    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        quiet = copy.copy(config)
        quiet.sequence_parallel = False
        norm = original(cls, quiet, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    torch_norm.WrappedTorchNorm.__new__ = staticmethod(new)


def _repair_distributed_optimizer(distrib_optimizer: Any) -> None:
    """core/optimizer/distrib_optimizer.py over torch's Adam, which keeps a 0-dim tensor `step` for each parameter."""
    cls = distrib_optimizer.DistributedOptimizer
    original_state_dict, original_load = cls.state_dict, cls.load_state_dict
    original_set = cls._set_main_param_and_optimizer_states

    # Asserts that all steps are equal, which fails when there are none: a load asks before the first step was made.
    @functools.wraps(original_state_dict)
    def state_dict(self: Any) -> Any:
        if not self.optimizer.state:
            self.init_state_fn(self.optimizer, self.config)
            for state in self.optimizer.state.values():
                state["step"] = torch.tensor(0.0)
        return original_state_dict(self)

    # Gives one `step` tensor to all parameters: each step would then count once for each of them.
    @functools.wraps(original_load)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        original_load(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    # Copies parameters in place, outside no_grad for some formats, and the step too: missing in the fully reshardable
    # format, the stale one of before the load in the other. load_state_dict has restored the right one: None skips it.
    @functools.wraps(original_set)
    @torch.no_grad()
    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        original_set(self, model_param, {**tensors, "step": None})

    cls.state_dict, cls.load_state_dict = state_dict, load_state_dict
    cls._set_main_param_and_optimizer_states = set_states


_REPAIRS: dict[str, Callable[[Any], None]] = {
    "megatron.core.jit": _repair_jit,
    "megatron.core.datasets.utils": _repair_dataset_helpers,
    "megatron.core.transformer.torch_norm": _repair_norm,
    "megatron.core.optimizer.distrib_optimizer": _repair_distributed_optimizer,
}
