"""What gpt.py needs differently from the megatron.training of each version: 0.17, 0.18, 0.19 and later.

Every branch asks the installed Megatron for its signature, so that a release candidate or a patched
Megatron gets the branch that fits.
"""

import argparse
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron.training import get_args, pretrain
from megatron.training.arguments import core_transformer_config_from_args

ARGS_DEFAULTS = {"tokenizer_type": "GPT2BPETokenizer"}

# Ways to build a model that only Megatron-LM's own gpt_builders.py has before 0.19.
BUILT_ELSEWHERE = {
    "spec": "--spec",
    "experimental_attention_variant": "--experimental-attention-variant",
    "heterogeneous_layers_config_path": "--heterogeneous-layers-config-path",
    "use_legacy_models": "--use-legacy-models",
}


def start(
    datasets: Callable[..., Any],
    forward_step: Callable[..., Any],
    embedding_ranks: Callable[..., list[int]],
    check: Callable[[argparse.Namespace], None],
) -> None:
    """Parse Megatron's flags from sys.argv and call `megatron.training.pretrain` as this version takes it.

    Args:
        datasets: builds the three datasets.
        forward_step: one forward pass of a micro-batch.
        embedding_ranks: pipeline ranks that hold word embeddings.
        check: called with the validated arguments before any dataset is read.
    """
    from megatron.core.enums import ModelType

    if "cfg_container" not in inspect.signature(pretrain).parameters:  # 0.17: pretrain parses the flags

        def build_checked(*args: Any, **kwargs: Any) -> torch.nn.Module:
            check(get_args())
            return build_model(*args, **kwargs)

        pretrain(
            datasets,
            build_checked,
            ModelType.encoder_or_decoder,
            forward_step,
            args_defaults=ARGS_DEFAULTS,
            get_embedding_ranks=embedding_ranks,
        )
        return
    from megatron.training import argument_utils
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(args_defaults=ARGS_DEFAULTS)
    check(args)
    if hasattr(argument_utils, "gpt_config_from_args"):  # from 0.19 on pretrain builds the model
        model = argument_utils.gpt_config_from_args(args)
        container = argument_utils.pretrain_cfg_container_from_args(args, model)
        positional: tuple[Any, ...] = (container, datasets, ModelType.encoder_or_decoder, forward_step)
    else:
        container = argument_utils.pretrain_cfg_container_from_args(args)
        positional = (container, datasets, build_model, ModelType.encoder_or_decoder, forward_step)
    pretrain(*positional, get_embedding_ranks=embedding_ranks)


def build_model(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> torch.nn.Module:
    """The GPT of Megatron's flags, for versions whose `pretrain` takes a model provider.

    Args:
        pre_process: whether this stage embeds tokens.
        post_process: whether this stage computes logits and loss.
        vp_stage: virtual pipeline stage of this chunk.
        config: TransformerConfig; default: of the flags.
        pg_collection: process groups, default: Megatron's global ones.
    """
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs

    args = get_args()
    asked = [flag for name, flag in BUILT_ELSEWHERE.items() if getattr(args, name, None)]
    if asked:
        raise SystemExit(
            f"megatron_et.pretrain_gpt does not build {', '.join(asked)} on this Megatron-Core: run "
            "Megatron-LM's own script with `python -m megatron_et /path/to/Megatron-LM/pretrain_gpt.py "
            "<flags>`."
        )
    config = core_transformer_config_from_args(args) if config is None else config
    spec_options = {"use_transformer_engine": args.transformer_impl == "transformer_engine"}
    layer_options = {
        **spec_options,
        "normalization": args.normalization,
        "qk_l2_norm": args.qk_l2_norm,
        "vp_stage": vp_stage,
    }
    mtp_spec = None
    if args.mtp_num_layers is not None:
        last_layer = gpt_layer_specs.get_gpt_decoder_layer_specs(config, **layer_options)[-1]
        mtp_spec = gpt_layer_specs.get_gpt_mtp_block_spec(
            config, last_layer, vp_stage=vp_stage, **spec_options
        )
    return GPTModel(
        config=config,
        transformer_layer_spec=gpt_layer_specs.get_gpt_decoder_block_spec(config, **layer_options),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        mtp_block_spec=mtp_spec,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def has_mtp(vp_stage: int | None) -> bool:
    """Whether this pipeline stage holds a multi-token-prediction head."""
    config = core_transformer_config_from_args(get_args())
    if "config" in inspect.signature(mtp_on_this_rank).parameters:  # 0.17
        return mtp_on_this_rank(config, ignore_virtual=False, vp_stage=vp_stage)
    return mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def batch_of_this_rank(
    data_iterator: Iterator[dict[str, Any]] | None, vp_stage: int | None, fields: tuple[str, ...]
) -> dict[str, Any]:
    """The next micro-batch, broadcast over tensor-parallel ranks and cut for context-parallel ones.

    Args:
        data_iterator: the stage's iterator; None on other than the first tensor-parallel rank.
        vp_stage: virtual pipeline stage of the caller.
        fields: names of the tensors, each [micro-batch, sequence].
    """
    from megatron.training import utils as training_utils

    mtp = has_mtp(vp_stage)
    if hasattr(training_utils, "get_batch_on_this_tp_rank"):  # 0.17
        batch = training_utils.get_batch_on_this_tp_rank(data_iterator, mtp_on_this_rank=mtp)
        return get_batch_on_this_cp_rank({name: batch.get(name) for name in fields})
    from megatron.core.utils import get_batch_on_this_tp_rank

    args = get_args()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}  # type: ignore[no-redef]
    if tp_rank == 0:
        assert data_iterator is not None, (
            "tensor-parallel rank 0 of a stage that needs data has no data iterator"
        )
        loaded = next(data_iterator)
        batch = {
            name: value.cuda(non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in loaded.items()
        }
        for name in (*fields, "cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size"):
            batch.setdefault(name, None)
    packed = (
        "is_sft"  # 0.18
        if "is_sft" in inspect.signature(get_batch_on_this_tp_rank).parameters
        else "has_cu_seqlens"
    )
    batch = get_batch_on_this_tp_rank(
        batch,
        **{packed: False},
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
    )
    return get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group()
    )
