"""A training loop of your own on megatron-core alone: no megatron.training, no NeMo, no Megatron-Bridge.

    torchrun --nproc-per-node 8 examples/own_loop.py                                    # GPUs
    MEGATRON_ET_CPU=1 OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/own_loop.py  # a laptop, 10 s
    torchrun ... examples/own_loop.py --steps 15 --save runs/own                          # stop, then
    torchrun ... examples/own_loop.py --steps 30 --load runs/own                          # go on, bit by bit

Three lines of it belong to megatron_et, marked (1), (2) and (3); the rest is what any loop on megatron-core
does. docs/own_loops.md puts the same three lines into Megatron-Bridge and NeMo.

Dimension letters: B sequences of a micro-batch, S sequence length.
"""

import argparse
import logging
import os
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import megatron_et
from megatron_et import ExpertThresholdConfig
from megatron_et.run import cpu

if cpu.requested():
    cpu.install()  # MEGATRON_ET_CPU=1: before megatron is imported

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_et.moe.synchronize import routers_of
from megatron_et.observe.metrics import LayerBatch, overall, pack

VOCABULARY, SEQUENCE, MICRO_BATCH, MICRO_BATCHES = 64, 64, 4, 2
OPTIMIZER_LAYOUT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
EVALUATION_SEED = 1_000_000  # data that no training step sees


def initialize(expert_parallel: int) -> None:
    """torch.distributed, Megatron's process groups and random numbers."""
    if not cpu.requested():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("gloo" if cpu.requested() else "nccl")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=expert_parallel)
    torch.manual_seed(1234)
    model_parallel_cuda_manual_seed(1234)


def build_config(expert_parallel: int, warmup_steps: int, *, fp16: bool) -> TransformerConfig:
    """A GPT with a dense first layer and two MoE layers of 8 routed experts + 1 shared."""
    config = TransformerConfig(
        num_layers=3,
        moe_layer_freq=[0, 1, 1],
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_moe_experts=8,
        moe_router_topk=2,  # the target mean fan-out
        moe_ffn_hidden_size=64,
        moe_shared_expert_intermediate_size=64,  # serves the tokens that no routed expert takes
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=expert_parallel,
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        masked_softmax_fusion=False,
        fp16=fp16,
        params_dtype=torch.float16 if fp16 else torch.float32,
        pipeline_dtype=torch.float16 if fp16 else torch.float32,
    )
    # (2) Which layers route by threshold, and how: those built from this config. Without the attribute they
    # are Megatron's top-k layers, whatever is installed.
    config.expert_threshold = ExpertThresholdConfig(
        router_type="expert-threshold", ema_decay=0.9, warmup_steps=warmup_steps
    )
    return config


def build_model(config: TransformerConfig) -> tuple[GPTModel, DistributedDataParallel]:
    """The model, bare and wrapped for training."""
    device = torch.cuda.current_device()
    model = GPTModel(
        config,
        get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm"),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
    ).to(device)
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True)
    wrapped = DistributedDataParallel(
        config, ddp_config, Float16Module(config, model) if config.fp16 else model
    )
    wrapped.broadcast_params()
    return model, wrapped


def build_optimizer(config: TransformerConfig, model: DistributedDataParallel) -> Any:
    """Megatron's distributed Adam; in fp16 the first loss scales overflow, as they do now and then in long
    runs."""
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=3e-3,
            weight_decay=0.0,
            fp16=config.fp16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=True,
            clip_grad=1.0,
            initial_loss_scale=2.0**23,
            min_loss_scale=1.0,
            loss_scale_window=1000,
            hysteresis=1,
        ),
        [model],
    )


def batches(seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's micro-batches of a made-up language, a function of the seed alone, so that a resumed run
    has no data to skip: a walk over the vocabulary whose stride changes with every sequence."""
    device = torch.cuda.current_device()
    rank = parallel_state.get_data_parallel_rank()
    generator = torch.Generator().manual_seed(seed * 4096 + rank)
    while True:
        start_B1 = torch.randint(VOCABULARY, (MICRO_BATCH, 1), generator=generator)
        stride_B1 = torch.randint(1, 5, (MICRO_BATCH, 1), generator=generator)
        noise_BS = torch.randint(2, (MICRO_BATCH, SEQUENCE + 1), generator=generator)
        text_BS = (start_B1 + stride_B1 * torch.arange(SEQUENCE + 1) + noise_BS) % VOCABULARY
        positions_BS = torch.arange(SEQUENCE).expand(MICRO_BATCH, -1)
        yield {
            "tokens": text_BS[:, :-1].to(device),
            "labels": text_BS[:, 1:].to(device),
            "positions": positions_BS.to(device),
        }


def forward_step(data: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> Any:
    """Megatron's forward step: the output, and the function that makes a loss of it."""
    batch = next(data)
    output = model(batch["tokens"], batch["positions"], None, labels=batch["labels"])
    return output, mean_loss


def mean_loss(losses_BS: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean cross entropy in nats, and the same for reporting."""
    loss = losses_BS.float().mean()
    return loss, {"loss": loss.detach().clone()}  # Megatron divides the loss in place


def forward_backward(model: torch.nn.Module, seed: int, *, forward_only: bool) -> float:
    """All micro-batches of a global batch; the mean loss over them and over the ranks.

    The schedule calls config.finalize_model_grads_func, which reduces gradients, after the last backward.
    """
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches(seed),
        model=[model],
        num_microbatches=MICRO_BATCHES,
        seq_length=SEQUENCE,
        micro_batch_size=MICRO_BATCH,
        forward_only=forward_only,
    )
    loss = torch.stack([output["loss"] for output in outputs]).mean()
    torch.distributed.all_reduce(loss, group=parallel_state.get_data_parallel_group())
    return loss.item() / parallel_state.get_data_parallel_world_size()


def train_step(model: DistributedDataParallel, optimizer: Any, step: int) -> tuple[float, bool]:
    """One global batch; its loss and whether the optimizer step counted."""
    model.zero_grad_buffer()
    optimizer.zero_grad()
    loss = forward_backward(model, seed=step, forward_only=False)
    update_successful, _, _ = optimizer.step()
    # (3) Thresholds move here and nowhere else: once a global batch, after its last backward, from the
    # logits of all ranks. A step that fp16 overflow made void must not move them. Every rank calls it,
    # with the same `skipped`.
    megatron_et.finalize_thresholds([model], skipped=not update_successful)
    return loss, update_successful


@torch.no_grad()
def evaluate(model: DistributedDataParallel) -> float:
    """Loss on fresh data, routed by the thresholds that training would use now; nothing is counted."""
    model.eval()
    loss = forward_backward(model, seed=EVALUATION_SEED, forward_only=True)
    model.train()
    return loss


def sharded_state(model: GPTModel, optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    """What a checkpoint holds. Thresholds and the warm-up's counter are buffers of the model: they travel
    with it, also to other parallel layouts."""
    model_state = model.sharded_state_dict()
    return {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict(
            model_state, is_loading=is_loading, metadata=OPTIMIZER_LAYOUT
        ),
    }


def save(folder: Path, step: int, model: GPTModel, optimizer: Any) -> None:
    """Write a checkpoint, between two steps: a batch in flight is not part of it."""
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    state = {**sharded_state(model, optimizer, is_loading=False), "step": step}
    dist_checkpointing.save(state, str(folder))


def load(folder: Path, model: GPTModel, optimizer: Any) -> int:
    """Read a checkpoint; the step it was written after."""
    state = dist_checkpointing.load(sharded_state(model, optimizer, is_loading=True), str(folder))
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def fingerprint(model: torch.nn.Module) -> str:
    """Eight digits of all thresholds on this rank: equal on every rank, and in a resumed run."""
    thresholds = torch.cat([router.thresholds.value for router in routers_of(model)])
    return f"{zlib.crc32(thresholds.cpu().numpy().tobytes()):08x}"


def routing(model: torch.nn.Module) -> str:
    """Metrics of the last committed batch, from the counts that were reduced for the thresholds anyway."""
    layers = {
        router.layer_number: LayerBatch.unpack(pack(router.last_batch), router.num_experts, router.et_config)
        for router in routers_of(model)
        if router.last_batch is not None
    }
    if not layers:
        return "skipped"
    tokens = {int(layer.counts.tokens) for layer in layers.values()}
    metrics = overall({number: layer.metrics() for number, layer in layers.items()})
    return (
        f"fan-out {metrics['fanout_mean']:.3f}  max violation {metrics['max_violation']:.3f}  "
        f"tokens {', '.join(map(str, tokens))}"
    )


def main() -> None:
    """Train, evaluate, and save or resume if told to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30, help="last training step, counted from the start")
    parser.add_argument("--warmup-steps", type=int, default=10, help="steps routed by Expert Choice first")
    parser.add_argument("--expert-parallel", type=int, default=2, help="ranks that share the experts")
    parser.add_argument("--fp16", action="store_true", help="fp16 whose first steps overflow: skipped steps")
    parser.add_argument("--save", type=Path, help="folder for a checkpoint")
    parser.add_argument("--save-step", type=int, help="step after which it is written, the last if left out")
    parser.add_argument("--load", type=Path, help="folder of a checkpoint to go on from")
    options = parser.parse_args()
    logging.getLogger("megatron.core").setLevel(logging.ERROR)  # it lists every parameter

    # (1) Megatron's MoE layers learn the new router and dispatchers for any fan-out. Before the model is
    # built; the order of imports does not matter.
    megatron_et.install()
    initialize(options.expert_parallel)
    config = build_config(options.expert_parallel, options.warmup_steps, fp16=options.fp16)
    bare, model = build_model(config)
    optimizer = build_optimizer(config, model)
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    first = 1 if options.load is None else load(options.load, bare, optimizer) + 1

    rank = torch.distributed.get_rank()
    say = partial(print, flush=True) if rank == 0 else lambda *_: None
    model.train()
    for step in range(first, options.steps + 1):
        loss, _ = train_step(model, optimizer, step)
        say(f"step {step:2d}  loss {loss:.7f}  {routing(model)}  thresholds {fingerprint(model)}")
        if options.save is not None and step == (options.save_step or options.steps):
            save(options.save, step, bare, optimizer)
    say(f"evaluation loss {evaluate(model):.7f}")
    # One rank prints: lines of several processes can run into each other.
    fingerprints = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(fingerprints, fingerprint(model))
    for other, digits in enumerate(fingerprints):
        say(f"rank {other}: thresholds {digits}")
    torch.distributed.destroy_process_group()


# Megatron's checkpoint writers are processes that import this file again: keep the guard.
if __name__ == "__main__":
    main()
