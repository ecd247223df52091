"""Seam: finalize_model_grads, which Megatron calls once per forward-backward of a global batch, before the
optimizer step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_et.host import seam, state
from megatron_et.moe.synchronize import abandon_reduction, start_reduction


def install() -> None:
    """Bind the seam in megatron.training only: other loops call megatron_et.finalize_thresholds
    themselves."""
    # Not `wrap`: the copy in megatron.core belongs to users of megatron-core without megatron.training.
    original = seam.find("megatron.training.training", "finalize_model_grads")
    seam.replace("megatron.training.training", "finalize_model_grads", _finalize_model_grads(original))


def _finalize_model_grads(original: Callable[..., Any]) -> Callable[..., Any]:
    def finalize_model_grads(model: Sequence[torch.nn.Module], *args: Any, **kwargs: Any) -> Any:
        # A forward-backward that is run again takes the place of the first.
        abandon_reduction(state.take_pending())
        state.set_pending(start_reduction(state.routers(model)))
        return original(model, *args, **kwargs)

    return finalize_model_grads
