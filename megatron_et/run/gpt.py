"""What megatron.training.pretrain asks of a GPT script: datasets, a forward step and a loss.

Dimension letters: B micro-batch size, S sequence length.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_timers, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_et.run.versions import batch_of_this_rank, has_mtp, start

FIELDS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")

# Features of Megatron-LM's own pretrain_gpt.py whose code no wheel ships, and the flags that ask for them.
ELSEWHERE = {
    "sft": "--sft",
    "fim_data": "--fim-data",
    "logits_load_dir": "--logits-load-dir",
    "hybrid_context_parallel": "--hybrid-context-parallel",
    "dataloader_inter_document_masking": "--dataloader-inter-document-masking",
}


def pretrain_gpt() -> None:
    """Parse Megatron's flags from sys.argv and pretrain."""
    # Every rank asks for the datasets; the builder decides who reads which file.
    train_valid_test_datasets.is_distributed = True  # type: ignore[attr-defined]
    start(train_valid_test_datasets, forward_step, embedding_ranks, _check)


def _check(args: argparse.Namespace) -> None:
    _refuse_elsewhere(args)
    _require_data(args)


def _refuse_elsewhere(args: argparse.Namespace) -> None:
    asked = [flag for name, flag in ELSEWHERE.items() if getattr(args, name, None)]
    if asked:
        raise SystemExit(
            f"megatron_et.pretrain_gpt does not have {', '.join(asked)}: run Megatron-LM's own script with "
            "`python -m megatron_et /path/to/Megatron-LM/pretrain_gpt.py <flags>`."
        )


def _require_data(args: argparse.Namespace) -> None:
    """Name a missing dataset file before processes wait for one another in the dataset builder."""
    if args.mock_data:
        return
    blend, per_split = get_blend_and_blend_per_split(args)
    blends = [blend] if blend is not None else [split for split in per_split or () if split is not None]
    if not blends:
        raise SystemExit(
            "no training data: give --data-path PREFIX (of PREFIX.bin and PREFIX.idx), or --mock-data"
        )
    from pathlib import Path

    prefixes = [prefix for prefixes, _ in blends for prefix in prefixes]
    missing = [
        p + end for p in prefixes if "://" not in p for end in (".bin", ".idx") if not Path(p + end).is_file()
    ]
    if missing:
        raise SystemExit(
            f"dataset file not found: {', '.join(missing)}. `megatron-et prepare` writes PREFIX.bin and "
            "PREFIX.idx; give "
            "PREFIX to --data-path without its ending."
        )


class CheckedGPTDataset(GPTDataset):
    """Megatron's GPTDataset, which counts epochs for ever when its split of the documents holds no token."""

    def _get_num_epochs(self, num_tokens_per_epoch: int) -> int:
        if num_tokens_per_epoch == 0:
            raise ValueError(
                f"the {self.index_split.name} split of {self.dataset_path} holds no token: it got "
                f"{len(self.indices)} of the file's documents by --split {self.config.split}. Give more "
                "documents, "
                "another --split (100,0,0 with --eval-iters 0 for none to evaluate), or --train-data-path "
                "and "
                "--valid-data-path."
            )
        return super()._get_num_epochs(num_tokens_per_epoch)


def train_valid_test_datasets(num_samples: tuple[int, int, int], vp_stage: int | None = None) -> Any:
    """Build the three datasets, reading real data or Megatron's mock data.

    Args:
        num_samples: sequences wanted for training, validation and test.
        vp_stage: virtual pipeline stage of the caller.
    """
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )
    dataset_type = MockGPTDataset if args.mock_data else CheckedGPTDataset
    print_rank_0(f"> building {dataset_type.__name__} for training, validation and test ...")
    builder = BlendedMegatronDatasetBuilder(
        dataset_type, num_samples, partial(_builds_dataset, vp_stage=vp_stage), config
    )
    return builder.build()


def _needs_batch(vp_stage: int | None) -> bool:
    """Whether this stage embeds tokens or computes a loss."""
    return is_first_or_last_pipeline_stage(vp_stage) or has_mtp(vp_stage)


def _builds_dataset(vp_stage: int | None = None) -> bool:
    return parallel_state.get_tensor_model_parallel_rank() == 0 and _needs_batch(vp_stage)


def embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """Pipeline ranks that hold word embeddings: the first, the last when embeddings are tied, and those of
    MTP heads."""
    args = get_args()
    ranks = {pp_ranks[0]}
    if len(pp_ranks) > 1:
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pp_ranks[-1])
        ranks.update(get_mtp_ranks(pp_ranks, core_transformer_config_from_args(args)))
    return sorted(ranks)


def get_batch(data_iterator: Iterator[dict[str, Any]] | None, vp_stage: int | None) -> dict[str, Any]:
    """This rank's part of the next micro-batch: FIELDS, each [B, S] (attention_mask [B, 1, S, S]), or None
    per field."""
    if not _needs_batch(vp_stage):
        return dict.fromkeys(FIELDS)
    batch = batch_of_this_rank(data_iterator, vp_stage, FIELDS)
    return {name: batch.get(name) for name in FIELDS}


def loss_func(
    loss_mask: torch.Tensor, token_losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Summed loss of the unmasked tokens.

    Args:
        loss_mask: [B, S], 1 for tokens that count.
        token_losses: [B, S] cross entropy in nats.

    Returns:
        loss (a sum: Megatron divides by the token count), number of tokens, and what is reported.
    """
    args = get_args()
    mask = loss_mask.reshape(-1).float()
    loss = torch.sum(token_losses.reshape(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    if args.check_for_nan_in_loss_and_grad:
        for reject, word in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=reject,
                message=f"found {word} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    report = torch.cat([loss.detach().view(1), num_tokens.view(1)])
    return loss, num_tokens, {"lm loss": report}


def forward_step(data_iterator: Any, model: torch.nn.Module, return_schedule_plan: bool = False) -> Any:
    """One forward pass of a micro-batch; returns the model's output and the loss function that fits it."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
    if return_schedule_plan:
        plan = model.build_schedule_plan(*inputs, labels=batch["labels"], loss_mask=batch["loss_mask"])  # type: ignore[operator]
        return plan, partial(loss_func, batch["loss_mask"])
    output = model(*inputs, labels=batch["labels"], loss_mask=batch["loss_mask"])
    return output, partial(loss_func, batch["loss_mask"])
