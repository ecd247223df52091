"""Seam: train_step, the first place that knows whether the optimizer step counted."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_et.errors import HookNotCalledError
from megatron_et.host import seam, state
from megatron_et.synchronize import (
    PendingReduction,
    abandon_reduction,
    commit,
    discard,
    finish_reduction,
    raise_if_nonfinite_locally,
)


def install() -> None:
    """Bind the seam."""
    seam.wrap("megatron.training.training", "train_step", _train_step)


def _train_step(original: Callable[..., Any]) -> Callable[..., Any]:
    def train_step(
        forward_step_func: Any,
        data_iterator: Any,
        model: Sequence[torch.nn.Module],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        routers = state.routers(model)
        try:
            result = original(forward_step_func, data_iterator, model, *args, **kwargs)
        except Exception:
            raise_if_nonfinite_locally(routers)
            raise
        # The second item is skipped_iter; an exit without an optimizer step returns True there.
        pending = state.take_pending(model)
        if result[1]:
            abandon_reduction(pending)
            discard(routers)
        else:
            _require_reduction(routers, pending)
            # Only now, so that the all-reduce has had the optimizer step to hide behind.
            finish_reduction(pending)
            commit(routers)
        return result

    return train_step


def _require_reduction(routers: Sequence[Any], pending: PendingReduction | None) -> None:
    if routers and pending is None:
        raise HookNotCalledError(
            "the thresholds' statistics were not reduced in this step: "
            "config.finalize_model_grads_func was set to a function that does not call "
            "megatron.training.training.finalize_model_grads. Call that function (not "
            "megatron.core.distributed's) in it, or leave config.finalize_model_grads_func unset."
        )
