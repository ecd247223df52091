"""Megatron's real MoE layer with each method's router, fed with prepared logits.

Dimension letters: T tokens of a rank's micro-batch, H hidden size, E experts.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.suite.methods import Method
from benchmarks.suite.workloads import Shape, Stream

SETTLING = 30
"""Global batches before the measurement, so that thresholds (and biases) know the stream. Megatron's bias
moves by 0.001 a batch: like an auxiliary loss, it balances over thousands of steps and shows here what it
costs, not what it can do."""


@dataclass(frozen=True)
class Sizes:
    """A MoE layer."""

    hidden: int
    ffn: int
    batch: int = 1
    """Sequences of the micro-batch; the sequence length is tokens / batch."""


def start(*, expert_parallel: int = 1) -> str:
    """torch.distributed, Megatron's groups, our router; returns the device: cuda or cpu."""
    from megatron_et.run import cpu

    if cpu.requested():
        cpu.install()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    alone = None
    if "MASTER_PORT" not in os.environ:
        alone = torch.distributed.HashStore()  # one process: no port to be taken
    device = "cpu" if cpu.requested() else "cuda"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        store=alone,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    import megatron_et

    megatron_et.install()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=expert_parallel)
    model_parallel_cuda_manual_seed(7)
    return device


def build(method: Method, shape: Shape, sizes: Sizes, device: str) -> Any:
    """A MoELayer in training mode; experts in bf16 on a GPU, in fp32 on the CPU."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_et import ExpertThresholdConfig

    on_gpu = device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    engine = on_gpu and method_engine()
    settings: dict[str, Any] = {
        "num_layers": 1, "hidden_size": sizes.hidden, "num_attention_heads": 1, "add_bias_linear": False,
        "num_moe_experts": shape.experts, "moe_router_topk": shape.topk, "moe_ffn_hidden_size": sizes.ffn,
        "expert_model_parallel_size": shape.ranks, "moe_token_dispatcher_type": "alltoall",
        "gated_linear_unit": True, "activation_func": torch.nn.functional.silu,
        "bias_activation_fusion": False,
        "gradient_accumulation_fusion": False, "moe_grouped_gemm": engine, "moe_permute_fusion": engine,
        "params_dtype": dtype, "bf16": on_gpu, "use_cpu_initialization": not on_gpu,
    }  # fmt: skip
    config = TransformerConfig(**settings | method.config)
    if method.et is not None:
        config.expert_threshold = ExpertThresholdConfig(**method.et | {"warmup_steps": 0})
    spec = get_moe_module_spec(use_te=engine, num_experts=shape.experts, moe_grouped_gemm=engine)
    torch.manual_seed(99)
    layer = spec(config=config) if callable(spec) else _built(spec, config)
    layer.set_layer_number(1)
    return layer.to(device).train()


def method_engine() -> bool:
    """Whether Transformer Engine is there."""
    import importlib.util

    return importlib.util.find_spec("transformer_engine") is not None


def _built(spec: Any, config: Any) -> Any:
    from megatron.core.transformer.spec_utils import build_module

    return build_module(spec, config=config)


class Fed:
    """A layer whose router sees a stream's logits instead of its own; the gate's product stays, times zero.

    Args:
        layer: from `build`.
        stream: the logits; those of a few steps are made beforehand and repeated.
        kept: the logits made so far, by step; shared by all methods of a case.
    """

    def __init__(
        self,
        layer: Any,
        stream: Stream,
        shape: Shape,
        sizes: Sizes,
        device: str,
        kept: dict[int, torch.Tensor] | None = None,
    ) -> None:
        self.layer, self.shape = layer, shape
        self.router = layer.router
        self._stream, self._device, self._batch = stream, device, sizes.batch
        self._kept = {} if kept is None else kept
        self.step = 0
        own_gating = self.router.gating
        self.router.gating = lambda hidden: self.logits() + 0.0 * own_gating(hidden).float()
        self.loads: list[torch.Tensor] = []
        """Tokens of each expert, of every step that was not settling."""
        self.routed: torch.Tensor | None = None
        own_routing = self.router.routing

        def routing(*args: Any, **kwargs: Any) -> Any:
            probs, routing_map = own_routing(*args, **kwargs)
            self.routed = routing_map
            return probs, routing_map

        self.router.routing = routing

    def logits(self) -> torch.Tensor:
        """[sequence, batch, E] of this step."""
        step = self.step % PERIOD
        if step not in self._kept:
            made_TE = self._stream(self.shape, step).to(self._device)
            self._kept[step] = made_TE.view(-1, self._batch, self.shape.experts)
        return self._kept[step]

    def note_load(self) -> None:
        """Remember what the last forward pass routed."""
        assert self.routed is not None
        self.loads.append(self.routed.sum(dim=0))

    def end_batch(self) -> None:
        """The global-batch boundary, as finalize_model_grads and the step after it do it."""
        boundary(self.router)()
        self.step += 1

    def settle(self) -> None:
        """Let thresholds find the stream's quantiles."""
        with torch.enable_grad():
            for _ in range(SETTLING):
                self.router.routing(self.logits())
                self.end_batch()

    def fanout_and_load(self) -> tuple[float, float]:
        """Mean experts a token, and largest over mean load of an expert (its mean over steps), of all
        ranks."""
        loads_SE = torch.stack(self.loads).double()
        tokens = torch.tensor(float(self.shape.tokens), dtype=torch.float64, device=loads_SE.device)
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(loads_SE)
            torch.distributed.all_reduce(tokens)
        fanout = loads_SE.sum(dim=1) / tokens
        highest = loads_SE.amax(dim=1) / loads_SE.mean(dim=1).clamp(min=1e-9)
        return fanout.mean().item(), highest.mean().item()


PERIOD = 16
"""Steps of a stream before it repeats."""


def boundary(router: Any) -> Callable[[], None]:
    """What a router does once a global batch, beside the gradients."""
    from megatron_et.moe.router import ExpertThresholdRouter
    from megatron_et.moe.synchronize import commit, finish_reduction, start_reduction

    if isinstance(router, ExpertThresholdRouter):

        def reduce_and_commit() -> None:
            finish_reduction(start_reduction([router]))
            commit([router])

        return reduce_and_commit
    updates = _megatron_updates(router)

    def update() -> None:
        for one in updates:
            one([router], router.config)

    return update


def _megatron_updates(router: Any) -> list[Callable[..., None]]:
    import importlib

    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    config, found = router.config, []
    if getattr(config, "moe_router_enable_expert_bias", False):
        found.append(module._update_router_expert_bias)
    if config.moe_router_load_balancing_type == "quantile_balancing":
        found.append(module._update_router_qb_beta)
    return found
