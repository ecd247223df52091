"""The routers of the model that megatron.training trains in this process."""

import weakref
from collections.abc import Sequence

import torch

from megatron_et.moe.router import ExpertThresholdRouter
from megatron_et.moe.synchronize import PendingReduction, routers_of

_ROUTERS: weakref.WeakKeyDictionary[torch.nn.Module, list[ExpertThresholdRouter]] = (
    weakref.WeakKeyDictionary()
)
_pending: PendingReduction | None = None


def routers(model: Sequence[torch.nn.Module]) -> list[ExpertThresholdRouter]:
    """Routers of the model chunks of this rank; searched for once, since walking all modules costs
    milliseconds a step."""
    if model[0] not in _ROUTERS:
        _ROUTERS[model[0]] = routers_of(model)
    return _ROUTERS[model[0]]


def trained_routers() -> list[ExpertThresholdRouter]:
    """Routers of every model seen by `routers` that is still alive; training_log is not given the model."""
    return [router for found in _ROUTERS.values() for router in found]


def set_pending(pending: PendingReduction | None) -> None:
    """Keep the reduction that this step has started."""
    global _pending
    _pending = pending


def take_pending() -> PendingReduction | None:
    """What `set_pending` has kept, once; None if nothing was."""
    global _pending
    pending, _pending = _pending, None
    return pending
