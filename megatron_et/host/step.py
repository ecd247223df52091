"""Seam: train_step, the first place that knows whether the optimizer step counted.

The reduction that grads.py has started is waited for when the optimizer step has been enqueued, so that it
runs beside it, and before Megatron asks all ranks for its success: there the host waits for the GPU, which
would have nothing to do while the host enqueues ours.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_et.errors import HookNotCalledError
from megatron_et.host import seam, state
from megatron_et.moe.synchronize import (
    abandon_reduction,
    commit,
    discard,
    finish_reduction,
    raise_if_nonfinite_locally,
)


def install() -> None:
    """Bind the seam."""
    seam.wrap("megatron.training.training", "train_step", _train_step)
    agree = "logical_and_across_model_parallel_group"
    original = seam.find("megatron.training.training", agree)
    seam.replace("megatron.training.training", agree, _agree_on_success(original))


def _train_step(original: Callable[..., Any]) -> Callable[..., Any]:
    def train_step(
        forward_step_func: Any,
        data_iterator: Any,
        model: Sequence[torch.nn.Module],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        routers = state.routers(model)
        abandon_reduction(state.take_pending())  # of a step that failed
        try:
            result = original(forward_step_func, data_iterator, model, *args, **kwargs)
        except Exception:
            raise_if_nonfinite_locally(routers)
            raise
        # The second item is skipped_iter; an exit without an optimizer step returns True there.
        if result[1]:
            abandon_reduction(state.take_pending())  # of a step that was left before the optimizer
            discard(routers)
        else:
            _require_candidates(routers)
            commit(routers)
        return result

    return train_step


def _agree_on_success(original: Callable[..., Any]) -> Callable[..., Any]:
    def logical_and_across_model_parallel_group(*args: Any, **kwargs: Any) -> Any:
        finish_reduction(state.take_pending())
        return original(*args, **kwargs)

    return logical_and_across_model_parallel_group


def _require_candidates(routers: Sequence[Any]) -> None:
    if not all(router.thresholds.has_candidate for router in routers):
        raise HookNotCalledError(
            "the thresholds' statistics were not reduced in this step: "
            "config.finalize_model_grads_func was set to a function that does not call "
            "megatron.training.training.finalize_model_grads. Call that function (not "
            "megatron.core.distributed's) in it, or leave config.finalize_model_grads_func unset."
        )
