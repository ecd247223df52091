"""Megatron's own GPT through megatron.training.pretrain on mock data: of ours, the CPU backend only (and, on
Megatrons that leave it to scripts, how the model is built).

torchrun --nproc-per-node 2 tests/distributed/plain_pretrain.py MEGATRON_ARGS...
"""

from typing import Any

import torch

from megatron_et.run import cpu


def datasets(num_samples: list[int], vp_stage: int | None = None) -> Any:  # noqa: ARG001 (Megatron asks for it)
    """Train, validation and test data: random tokens, built on every rank, so that none need be sent."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import get_args

    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split=args.split,
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(MockGPTDataset, num_samples, lambda: True, config).build()


datasets.is_distributed = True  # type: ignore[attr-defined]


def forward_step(iterator: Any, model: Any) -> tuple[Any, Any]:
    """One micro-batch; returns the model's output and what reduces it to (loss, tokens, report)."""
    batch = {name: tensor.cuda() for name, tensor in next(iterator).items()}

    def loss_function(losses: Any) -> tuple[Any, Any, dict[str, Any]]:
        mask = batch["loss_mask"].view(-1)
        loss, tokens = (losses.view(-1).float() * mask).sum(), mask.sum().int()
        report = torch.stack([loss.detach(), tokens.float()])
        return loss, tokens, {"lm loss": report}

    return model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]), loss_function


if __name__ == "__main__":  # the guard that spawned checkpoint writers need
    cpu.install()

    from megatron.core.enums import ModelType
    from megatron.training import argument_utils, pretrain

    if hasattr(argument_utils, "gpt_config_from_args"):
        from megatron.training.arguments import parse_and_validate_args

        args = parse_and_validate_args()
        config = argument_utils.pretrain_cfg_container_from_args(
            args, argument_utils.gpt_config_from_args(args)
        )
        pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step)
    else:
        from megatron_et.run import gpt
        from megatron_et.run import versions as gpt_versions

        gpt_versions.start(datasets, forward_step, gpt.embedding_ranks, lambda _: None)
