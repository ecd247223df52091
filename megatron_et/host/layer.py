"""Seam: MoELayer. Every MoE layer (GPT, hybrid, MTP, --spec models) gets our router and a dispatcher for any
fan-out."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from megatron_et.config import ConfigError
from megatron_et.host import seam
from megatron_et.moe.settings import CONFIG_ATTRIBUTE, resolve_config

MOE_LAYER = "megatron.core.transformer.moe.moe_layer"
TOKEN_DISPATCHER = "megatron.core.transformer.moe.token_dispatcher"
_ROUTER = "megatron.core.transformer.moe.router"
CALLED = (
    (_ROUTER, "TopKRouter"),
    (_ROUTER, "TopKRouter.apply_z_loss"),
    ("megatron.core.transformer.moe.moe_utils", "get_capacity"),
    (TOKEN_DISPATCHER, "MoEAlltoAllTokenDispatcher"),
    (TOKEN_DISPATCHER, "MoEAlltoAllTokenDispatcher._maybe_update_cuda_sync_point"),
    (TOKEN_DISPATCHER, "MoEAllGatherTokenDispatcher"),
    (TOKEN_DISPATCHER, "MoEFlexTokenDispatcher"),
    (TOKEN_DISPATCHER, "_DeepepManager"),
)
"""What router.py, dispatch.py and flex.py import and call, beside what they override."""


def install() -> None:
    """Bind the seam. The router's default sits in MoESubmodules' generated __init__, so patching its class
    would do nothing."""
    seam.require(*CALLED)
    seam.wrap(MOE_LAYER, "MoELayer.__init__", _moe_layer_init)
    from megatron_et.moe.dispatchers import (
        VariableFanoutAllGatherTokenDispatcher,
        VariableFanoutAlltoAllTokenDispatcher,
        VariableFanoutDeepepManager,
        VariableFanoutFlexTokenDispatcher,
    )
    from megatron_et.moe.router import ExpertThresholdRouter

    seam.require_overridden(
        ExpertThresholdRouter,
        VariableFanoutAlltoAllTokenDispatcher,
        VariableFanoutAllGatherTokenDispatcher,
        VariableFanoutDeepepManager,
        VariableFanoutFlexTokenDispatcher,
    )
    # Only the names that MoELayer builds from: the classes themselves stay what isinstance and Megatron's
    # class attributes expect.
    for name, ours in (
        ("MoEAlltoAllTokenDispatcher", VariableFanoutAlltoAllTokenDispatcher),
        ("MoEAllGatherTokenDispatcher", VariableFanoutAllGatherTokenDispatcher),
        ("MoEFlexTokenDispatcher", VariableFanoutFlexTokenDispatcher),
    ):
        seam.replace(MOE_LAYER, name, _chooser(seam.find(MOE_LAYER, name), ours))


def _moe_layer_init(original: Callable[..., None]) -> Callable[..., None]:
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_et.moe.router import ExpertThresholdRouter

    def __init__(self: Any, config: Any, submodules: Any = None, *args: Any, **kwargs: Any) -> None:
        if submodules is not None and resolve_config(config).active:
            router = submodules.router
            if router is TopKRouter:
                submodules = dataclasses.replace(submodules, router=ExpertThresholdRouter)
            elif not _builds(router, ExpertThresholdRouter):
                raise ConfigError(
                    "--moe-router-type asks for Expert Threshold routing, but the layer spec brings its "
                    "own router "
                    f"{getattr(router, '__name__', router)}: use a spec with Megatron's TopKRouter, or "
                    "--moe-router-type topk"
                )
        original(self, config, submodules, *args, **kwargs)
        built = getattr(self, "router", None)
        if isinstance(built, ExpertThresholdRouter) and built.et_config != resolve_config(config):
            raise ConfigError(
                f"The layer spec gives ExpertThresholdRouter the settings {built.et_config}, and the "
                f"dispatcher goes by {resolve_config(config)}: set config.{CONFIG_ATTRIBUTE}, which both "
                "read, instead of et_config"
            )

    return __init__


def _builds(router: Any, base: type) -> bool:
    builder = router.func if isinstance(router, functools.partial) else router
    return isinstance(builder, type) and issubclass(builder, base)


def _chooser(megatrons: type, ours: type) -> Callable[..., Any]:
    def dispatcher(*args: Any, config: Any, **kwargs: Any) -> Any:
        chosen = ours if resolve_config(config).active else megatrons
        return chosen(*args, config=config, **kwargs)

    return dispatcher
