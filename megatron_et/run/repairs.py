"""What Megatron cannot do on a CPU without Transformer Engine and Apex, module by module, mended when it is
imported. Part of the CPU backend (cpu.py); the files named are below megatron/ of megatron-core 0.19.2.
"""

import copy
import functools
import importlib.abc
import importlib.machinery
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_et.host import wheel
from megatron_et.host.versions import checked_versions


def _repair_norm(torch_norm: Any) -> None:
    """core/transformer/torch_norm.py refuses sequence parallelism, which MoE with TP demands.

    The norm is the same: each rank normalizes its own tokens. What torch's norm lacks is the mark on its
    parameters by which core/distributed/finalize_model_grads.py sums their gradients over the TP group.
    """
    original_new = torch_norm.WrappedTorchNorm.__new__

    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        without = copy.copy(config)
        without.sequence_parallel = False
        norm = original_new(cls, without, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    torch_norm.WrappedTorchNorm.__new__ = staticmethod(new)


def _repair_distributed_optimizer(distrib_optimizer: Any) -> None:
    """core/optimizer/distrib_optimizer.py over torch's Adam, which keeps a tensor `step` per parameter."""
    cls = distrib_optimizer.DistributedOptimizer
    original_state_dict, original_load = cls.state_dict, cls.load_state_dict
    original_set = cls._set_main_param_and_optimizer_states

    # It asserts that all steps are equal, and a load asks before the first step, when there are none.
    @functools.wraps(original_state_dict)
    def state_dict(self: Any) -> Any:
        if not self.optimizer.state:
            self.init_state_fn(self.optimizer, self.config)
            for state in self.optimizer.state.values():
                state["step"] = torch.tensor(0.0)
        return original_state_dict(self)

    # It gives all parameters one and the same `step`: every update would advance it once per parameter.
    @functools.wraps(original_load)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        original_load(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    # It copies into parameters, in fp32 without no_grad, and into `step`, for which fully reshardable
    # checkpoints have no value and the others a stale one. load_state_dict has set the right one already:
    # copied onto itself it stays.
    @functools.wraps(original_set)
    @torch.no_grad()
    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        group, position = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][position]
        step = self.optimizer.state[main_param]["step"]
        original_set(self, model_param, {**tensors, "step": step})

    cls.state_dict, cls.load_state_dict = state_dict, load_state_dict
    cls._set_main_param_and_optimizer_states = set_states


def _repair_schedules(schedules: Any) -> None:
    """core/pipeline_parallel/schedules.py: of two stages, each is the other's previous and next one.

    Without overlap, interleaving then exchanges two messages between the same two ranks in one batch and
    mixes them up: wrong gradients, silently. training/arguments.py:validate_args refuses it; training loops
    without megatron.training would hear nothing.
    """
    original = schedules.forward_backward_pipelining_with_interleaving

    @functools.wraps(original)
    def interleaving(*, model: Any, **kwargs: Any) -> Any:
        config = schedules.get_model_config(model[0])
        if config.pipeline_model_parallel_size == 2 and not config.overlap_p2p_comm:
            raise ValueError(
                "Two pipeline stages with virtual stages need overlap_p2p_comm=True and "
                "batch_p2p_comm=False: set them, or use more than two pipeline stages."
            )
        return original(model=model, **kwargs)

    schedules.forward_backward_pipelining_with_interleaving = interleaving


def _repair_gating(moe_utils: Any) -> None:
    """core/transformer/moe/moe_utils.py of 0.16 reads a name that it imports from Transformer Engine alone;
    None, as later versions have it, means plain torch."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _repair_inference_layers(inference_layers: Any) -> None:
    """core/tensor_parallel/inference_layers.py of main (August 2026) asks multi-token-prediction layers
    whether they are of classes that are None without Transformer Engine: a TypeError. They are not."""
    if hasattr(inference_layers, "is_inference_column_parallel_linear"):
        inference_layers.is_inference_column_parallel_linear = lambda _: False


REPAIRS: dict[str, Callable[[Any], None]] = {
    "megatron.core.transformer.moe.moe_utils": _repair_gating,
    "megatron.core.datasets.utils": wheel.repair,
    "megatron.core.tensor_parallel.inference_layers": _repair_inference_layers,
    "megatron.core.transformer.torch_norm": _repair_norm,
    "megatron.core.optimizer.distrib_optimizer": _repair_distributed_optimizer,
    "megatron.core.pipeline_parallel.schedules": _repair_schedules,
}


class RepairOnImport(importlib.abc.MetaPathFinder):
    """Runs the repair of a module right after the module itself, before anyone can bind its names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        repair = REPAIRS.get(fullname)
        if repair is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_repair(module: types.ModuleType) -> None:
            execute(module)
            try:
                repair(module)
            except AttributeError as error:
                raise ImportError(
                    f"megatron_et.run.cpu was written for megatron-core {checked_versions()}: {error}"
                ) from error

        spec.loader.exec_module = execute_and_repair  # type: ignore[method-assign]
        return spec
