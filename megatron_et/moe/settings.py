"""The settings of a MoE layer: where they come from, and the bound that DeepEP puts on the fan-out.

DeepEP's kernels hold a token's experts in a fixed number of slots and fail on the device past it. So the
router must bound the fan-out, by score: `--moe-et-max-fanout`, which is filled in here where it was left
alone, for stock scripts and for users of a TransformerConfig alike.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_et.config import ExpertThresholdConfig

CONFIG_ATTRIBUTE = "expert_threshold"
"""Attribute of a TransformerConfig that holds an ExpertThresholdConfig, for users without
megatron.training."""

_arguments: Callable[[], Any] | None = None

DEEPEP_SLOTS = 32
"""DeepEP's dispatch and combine kernels assert num_topk <= 32."""
DEEPEP_NODES = 8
"""Its kernels between nodes assert that a token goes to at most 8 of them."""
DEEPEP_RANKS_PER_NODE = 8
"""What DeepEP counts as a node, whatever the machine: its NUM_MAX_NVL_PEERS."""


@dataclass(frozen=True)
class FanoutBound:
    """The most experts that a token may get, and the sentence that says why."""

    most: int
    why: str


def uses_deepep(settings: Any) -> bool:
    """Whether tokens travel by DeepEP: the flex dispatcher with its default backend, or with the old flag."""
    return getattr(settings, "moe_token_dispatcher_type", None) == "flex" and bool(
        getattr(settings, "moe_enable_deepep", False)
        or getattr(settings, "moe_flex_dispatcher_backend", "deepep") == "deepep"
    )


def expert_shards(settings: Any) -> int:
    """Ranks that share one expert: expert tensor parallelism, by default that of the dense layers."""
    return (
        getattr(settings, "expert_tensor_parallel_size", None)
        or getattr(settings, "tensor_model_parallel_size", None)
        or 1
    )


def fanout_bound(settings: Any) -> FanoutBound | None:
    """DeepEP's bound on the fan-out; None where another dispatcher is used or no token can pass it.

    Args:
        settings: Megatron's arguments, before or after its own validation, or its TransformerConfig.
    """
    num_experts = getattr(settings, "num_experts", None) or getattr(settings, "num_moe_experts", None)
    if num_experts is None or not uses_deepep(settings):
        return None
    # Megatron sends a token to every rank that holds a shard of its expert, a slot for each.
    shards = expert_shards(settings)
    ranks = shards * (getattr(settings, "expert_model_parallel_size", None) or 1)
    bound = FanoutBound(
        DEEPEP_SLOTS // shards,
        f"DeepEP has {DEEPEP_SLOTS} slots a token"
        + (f", and expert tensor parallelism over {shards} ranks takes {shards} an expert" * (shards > 1)),
    )
    if ranks > DEEPEP_NODES * DEEPEP_RANKS_PER_NODE and bound.most > DEEPEP_NODES:
        bound = FanoutBound(
            DEEPEP_NODES,
            f"DeepEP sends a token to at most {DEEPEP_NODES} nodes of {DEEPEP_RANKS_PER_NODE} ranks, and "
            f"{ranks} ranks share the experts",
        )
    return bound if bound.most < num_experts else None


def bounded(et: ExpertThresholdConfig, settings: Any) -> ExpertThresholdConfig:
    """The settings with `max_fanout` at the largest legal number where it was left alone and is needed."""
    bound = fanout_bound(settings) if et.active and et.max_fanout is None else None
    return et if bound is None else dataclasses.replace(et, max_fanout=bound.most)


def read_arguments_with(get_args: Callable[[], Any]) -> None:
    """Where settings come from that no TransformerConfig holds: megatron.training's `get_args` (host/)."""
    global _arguments
    _arguments = get_args


def resolve_config(transformer_config: Any) -> ExpertThresholdConfig:
    """Settings for a layer: the TransformerConfig's attribute, else Megatron's global arguments, else plain
    top-k; with the bound on the fan-out that the dispatcher needs."""
    attached = getattr(transformer_config, CONFIG_ATTRIBUTE, None)
    if attached is not None:
        return bounded(attached, transformer_config)
    if _arguments is None:
        return ExpertThresholdConfig()
    try:
        return bounded(ExpertThresholdConfig.from_args(_arguments()), transformer_config)
    except AssertionError:  # a loop without megatron.training's arguments: they were never parsed
        return ExpertThresholdConfig()
