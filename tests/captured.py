"""Routers for tests of CUDA graphs: as one that Megatron captures, or eager; on the device that
`torch.cuda.current_device` names."""

from types import SimpleNamespace
from typing import Any

import torch

from megatron_et.config import ExpertThresholdConfig

TOKENS, EXPERTS, TOPK = 48, 8, 2
WARMUP, ANNEAL = 2, 3


def router(graph: bool, megatron: dict[str, Any] | None = None, **et: Any) -> Any:
    """A router in training, as Megatron's TransformerConfig asks for it."""
    from megatron.core.transformer import TransformerConfig

    from megatron_et.moe.router import ExpertThresholdRouter

    settings: dict[str, Any] = {
        "num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "num_moe_experts": EXPERTS,
        "moe_router_topk": TOPK, "use_cpu_initialization": True,
    }  # fmt: skip
    if graph:
        spelling = "cuda_graph_modules" if hasattr(TransformerConfig, "cuda_graph_modules") else None
        settings |= {
            "cuda_graph_impl": "transformer_engine", spelling or "cuda_graph_scope": ["attn", "moe_router"]
        }  # fmt: skip
    config = TransformerConfig(**settings | (megatron or {}))
    one = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    groups = SimpleNamespace(tp=one, cp=one, tp_cp=one, tp_dp_cp=one)
    options = {
        "router_type": "expert-threshold",
        "warmup_steps": WARMUP,
        "ema_decay": 0.5,
        "kernels": "torch",
    } | et
    built = ExpertThresholdRouter(
        config=config, pg_collection=groups, et_config=ExpertThresholdConfig(**options)
    )
    return built.train()


def memory(routed: Any) -> list[torch.Tensor]:
    """All that lives from one micro-batch to the next."""
    return [*routed.buffers(), *routed.statistics.integer_parts]


SCHEDULES: dict[str, dict[str, Any]] = {
    "switch": {},
    "anneal": {"warmup_anneal_steps": ANNEAL},
    "capacity": {"capacity_factor": 0.3},
    "anneal-to-capacity": {"warmup_anneal_steps": ANNEAL, "capacity_factor": 0.7},
    "capacity-above-one": {"warmup_anneal_steps": ANNEAL, "capacity_factor": 1.7},
    "no-warmup": {"warmup_steps": 0, "capacity_factor": 0.3},
    "expert-choice": {"router_type": "expert-choice"},
    "guard": {"guard": 0.2},
    "fanout": {"max_fanout": 3, "gate_normalization": "fanout", "warmup_anneal_steps": ANNEAL},
}
