"""Puts our classes under Megatron's tests. Imported after Megatron may be imported, in test processes only.

Dimension letters: T tokens, E experts.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_et import ExpertThresholdConfig, ExpertThresholdRouter, install
from megatron_et.moe.dispatchers import (
    VariableFanoutAllGatherTokenDispatcher,
    VariableFanoutAlltoAllTokenDispatcher,
    VariableFanoutFlexTokenDispatcher,
)
from megatron_et.moe.settings import CONFIG_ATTRIBUTE

from .table import Way

#: What every TransformerConfig of an adapted test is given in place of the test's own values.
SETTINGS: dict[str, Any] = {
    "moe_router_score_function": "sigmoid",
    "moe_router_dtype": "fp32",
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
}

_BY_THRESHOLD = ExpertThresholdConfig(router_type="expert-threshold", warmup_steps=0)
"""Thresholds are 0 in a new router: half of the experts, on average, for each token; none for some."""

_WARMING_UP = ExpertThresholdConfig(router_type="expert-threshold", warmup_steps=1)

_current = _BY_THRESHOLD
built: list[str] = []
"""Names of our classes, one for each instance that the running test has built."""


def install_ours(way: Way) -> None:
    """Install the plug-in and make what the tests build ours: dispatchers, and when adapted the router."""
    install()
    for name, ours in (
        ("MoEAlltoAllTokenDispatcher", VariableFanoutAlltoAllTokenDispatcher),
        ("MoEAllGatherTokenDispatcher", VariableFanoutAllGatherTokenDispatcher),
        ("MoEFlexTokenDispatcher", VariableFanoutFlexTokenDispatcher),
    ):
        _count(ours)
        setattr(moe_layer, name, ours)
    if way == "adapted":
        _count(ExpertThresholdRouter)
        _ask_for_thresholds()


def _count(ours: type) -> None:
    original = ours.__init__  # type: ignore[misc]

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        built.append(ours.__name__)

    ours.__init__ = __init__  # type: ignore[misc]


def _ask_for_thresholds() -> None:
    original = TransformerConfig.__post_init__

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        if self.num_moe_experts is not None:
            for name, value in SETTINGS.items():
                setattr(self, name, value)
            setattr(self, CONFIG_ATTRIBUTE, _current)
        original(self)

    TransformerConfig.__post_init__ = __post_init__


@contextlib.contextmanager
def _warm_up() -> Iterator[None]:
    """Routing of the warm-up: every expert takes its k best tokens."""
    global _current
    _current = _WARMING_UP
    try:
        yield
    finally:
        _current = _BY_THRESHOLD


@contextlib.contextmanager
def _replaced(module_name: str, name: str, replacement: Callable[[Any], Any]) -> Iterator[None]:
    """A global of a test module, in all copies of that module (pytest and other tests import their own)."""
    modules = [module for key, module in sys.modules.items() if key.endswith(f".moe.{module_name}")]
    originals = [(module, getattr(module, name)) for module in modules if hasattr(module, name)]
    if not originals:
        raise LookupError(f"no {name} in {module_name}.py of this checkout: the adapter needs an update")
    for module, original in originals:
        setattr(module, name, replacement(original))
    try:
        yield
    finally:
        for module, original in originals:
            setattr(module, name, original)


@contextlib.contextmanager
def _gates_by_fanout() -> Iterator[None]:
    """The test multiplies by 1 / topk to get each token back; with any fan-out that is 1 / fan-out, and
    expert 0 takes every token so that none is without expert."""

    def permuting(original: Callable[..., Any]) -> Callable[..., Any]:
        def token_permutation(
            dispatcher: Any, hidden_states: torch.Tensor, probs_TE: torch.Tensor, map_TE: torch.Tensor
        ) -> Any:
            fanout_T1 = map_TE.sum(1, keepdim=True)
            assert fanout_T1.min() >= 1
            assert fanout_T1.max() > fanout_T1.min(), "a fixed fan-out tests nothing new"
            return original(dispatcher, hidden_states, torch.ones_like(probs_TE) / fanout_T1, map_TE)

        return token_permutation

    init = ExpertThresholdRouter.__init__

    @functools.wraps(init)
    def taking_all(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.thresholds.value[0] = -1e9

    with _replaced("test_token_dispatcher", "token_permutation", permuting):
        ExpertThresholdRouter.__init__ = taking_all  # type: ignore[method-assign]
        try:
            yield
        finally:
            ExpertThresholdRouter.__init__ = init  # type: ignore[method-assign]


@contextlib.contextmanager
def _router_class() -> Iterator[None]:
    """The test builds a TopKRouter by name; here our router."""
    with _replaced("test_aux_loss", "TopKRouter", lambda _: ExpertThresholdRouter):
        yield


ADAPTERS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "warm-up": _warm_up,
    "gates-by-fanout": _gates_by_fanout,
    "router-class": _router_class,
}
