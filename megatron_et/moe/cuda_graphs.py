"""What Megatron's settings say about CUDA graphs, in the spelling of every version.

| megatron-core | implementation | scope |
| --- | --- | --- |
| all | `--cuda-graph-impl`; old: `--enable-cuda-graph` (local), `--external-cuda-graph` (TE) | |
| 0.16, 0.17 | a whole iteration is `local` with the scope `full_iteration` | `--cuda-graph-scope` |
| 0.18 and later | a whole iteration is `full_iteration` | `--cuda-graph-modules`; old: `--cuda-graph-scope` |

Scopes are words on a command line that our check reads before Megatron does, and members of an enum after.
"""

from collections.abc import Iterable
from typing import Any

ROUTER = "moe_router"
OUTSIDE_MOE = frozenset({"attn", "mlp", "mamba"})
"""Scopes without any part of a MoE layer, where a layer is captured in parts."""
WHOLE_ITERATION = frozenset({"full_iteration", "full_iteration_inference"})

_SCOPE_NAMES = ("cuda_graph_modules", "cuda_graph_scope", "cuda_graph_scope_deprecated")
_HYBRID_NAMES = ("is_hybrid_model", "hybrid_layer_pattern", "hybrid_override_pattern")


def implementation(settings: Any) -> str:
    """none, local, transformer_engine or full_iteration."""
    chosen = getattr(settings, "cuda_graph_impl", None) or "none"
    old_local = getattr(settings, "enable_cuda_graph", False)
    old_external = getattr(settings, "external_cuda_graph", False)
    words = _words(settings)
    if "full_iteration" in words or (chosen != "none" and words & WHOLE_ITERATION):
        return "full_iteration"
    if chosen != "none":
        return str(chosen)
    return "local" if old_local else "transformer_engine" if old_external else "none"


def scopes(settings: Any) -> frozenset[str]:
    """Names of the captured parts of a layer; empty for the whole layer."""
    return _words(settings) - WHOLE_ITERATION


def hybrid(settings: Any) -> bool:
    """Whether attention, MLP, MoE and Mamba are layers of their own, so that a graph holds one kind."""
    return any(getattr(settings, name, None) for name in _HYBRID_NAMES)


def local_holds_moe(settings: Any) -> bool:
    """Whether a graph of the local implementation holds any part of a MoE layer.

    In a GPT its scope `attn` is the whole layer. In a hybrid model `moe_router` brings the dispatcher's
    preprocessing with it, and generation captures all layers in one graph (scope `block`) and the
    multi-token-prediction head, whatever the scope.
    """
    chosen = scopes(settings)
    one_graph = _word(getattr(settings, "inference_cuda_graph_scope", None)) == "block"
    head = getattr(settings, "mtp_num_layers", None)
    return not (hybrid(settings) and chosen and chosen <= OUTSIDE_MOE) or one_graph or bool(head)


def captures_router(settings: Any) -> bool:
    """Whether our router runs inside a CUDA graph, among the settings that are not refused."""
    return implementation(settings) == "transformer_engine" and ROUTER in scopes(settings)


def _words(settings: Any) -> frozenset[str]:
    found: set[str] = set()
    for name in _SCOPE_NAMES:
        value = getattr(settings, name, None)
        if isinstance(value, str):
            value = value.split(",")
        parts = value if isinstance(value, Iterable) else [value]
        found.update(_word(part) for part in parts)
    # `full` is the oldest word for the whole layer, for which there is now none.
    return frozenset(found) - {"", "full"}


def _word(scope: Any) -> str:
    return "" if scope is None else str(getattr(scope, "name", scope)).strip()
