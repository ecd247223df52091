"""How many routers each pipeline stage holds: Megatron's own split of the layers, and which of them are MoE
layers.

A list has one entry per layer, True for a MoE layer.
"""

import argparse
from collections.abc import Iterator
from typing import Any


def known(args: argparse.Namespace) -> bool:
    """Whether the flags say which layers there are."""
    return args.num_layers is not None or _hybrid_pattern(args) is not None


def decoder(args: argparse.Namespace) -> list[bool]:
    """The decoder's layers, in order."""
    if (pattern := _hybrid_pattern(args)) is not None:
        main, _, _ = pattern.partition("/")
        return [symbol == "E" for symbol in main.replace("|", "")]
    frequency = args.moe_layer_freq
    if isinstance(frequency, int):
        return [number % frequency == 0 for number in range(args.num_layers)]
    return [bool(moe) for moe in frequency]


def prediction_heads(args: argparse.Namespace) -> int:
    """Routers in the multi-token-prediction heads."""
    depths = getattr(args, "mtp_num_layers", None) or 0
    if depths and getattr(args, "mtp_use_repeated_layer", False):
        depths = 1  # one layer, called for every depth
    pattern = _hybrid_pattern(args)
    if pattern is None:
        # A head repeats the decoder's last layer.
        return depths * decoder(args)[-1]
    return depths * pattern.partition("/")[2].partition("/")[0].count("E")


def per_stage(args: argparse.Namespace, config: Any) -> list[int]:
    """Routers of each pipeline stage, its virtual stages together.

    Args:
        args: Megatron's validated arguments.
        config: the TransformerConfig made of them.
    """
    moe = decoder(args)
    stages = config.pipeline_model_parallel_size
    main = (_hybrid_pattern(args) or "").partition("/")[0]
    if "|" in main:
        # Virtual stages take turns: segment i belongs to stage i mod the number of stages.
        counts = [sum(part.count("E") for part in main.split("|")[stage::stages]) for stage in range(stages)]
    else:
        counts = [sum(moe[number] for number in _layers_of(config, stage)) for stage in range(stages)]
    counts[_stage_of_heads(config)] += prediction_heads(args)
    return counts


def _layers_of(config: Any, stage: int) -> list[int]:
    """Numbers, from 0, of a stage's decoder layers."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    if config.pipeline_model_parallel_layout is not None:
        # Not by the functions below: with a layout they answer for the rank that asks, whatever the stage.
        holders = [holder for holder, kind in _cells(config) if kind is LayerType.decoder]
        return [number for number, holder in enumerate(holders) if holder == stage]
    numbers: list[int] = []
    virtual = config.virtual_pipeline_model_parallel_size
    for vp_stage in range(virtual) if virtual else (None,):
        first = get_transformer_layer_offset(config, vp_stage, stage)
        numbers += range(first, first + get_num_layers_to_build(config, vp_stage, stage))
    return numbers


def _stage_of_heads(config: Any) -> int:
    """All prediction heads are on one stage: the last, unless a layout says where."""
    from megatron.core.transformer.enums import LayerType

    last = config.pipeline_model_parallel_size - 1
    if config.pipeline_model_parallel_layout is None:
        return last
    return next((holder for holder, kind in _cells(config) if kind is LayerType.mtp), last)


def _cells(config: Any) -> Iterator[tuple[int, Any]]:
    """(stage, LayerType) of everything in a pipeline layout, in the model's order."""
    stages = config.pipeline_model_parallel_layout.layout
    for parts in zip(*stages, strict=True):  # virtual stages take turns
        for stage, kinds in enumerate(parts):
            yield from ((stage, kind) for kind in kinds)


def _hybrid_pattern(args: argparse.Namespace) -> str | None:
    # The second name is 0.16's, and an alias later.
    return getattr(args, "hybrid_layer_pattern", None) or getattr(args, "hybrid_override_pattern", None)
