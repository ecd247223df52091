"""The flex dispatcher with the real DeepEP on two GPUs, against alltoall: `torchrun --nproc-per-node 2 -m
tests.gpu.flex_gpu BACKEND`, started by test_flex_gpu.py.

Dimension letters: E experts.
"""

import os
import sys
from typing import Any

import torch

EXPERTS, TOPK, HIDDEN, SEQUENCE, BATCH = 8, 2, 2048, 128, 2
TOLERANCE = 3e-2  # bf16, as gpu_layers.py has it: the order of sums differs


def layer_of(thresholds_E: torch.Tensor, **dispatcher: Any) -> Any:
    """A MoELayer in bf16 whose weights depend on nothing but their place."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_et import ExpertThresholdConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=8, num_moe_experts=EXPERTS,
        moe_router_topk=TOPK, moe_ffn_hidden_size=256, add_bias_linear=False, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, bias_activation_fusion=False,
        gradient_accumulation_fusion=False, expert_model_parallel_size=2, bf16=True,
        params_dtype=torch.bfloat16, moe_router_score_function="sigmoid", moe_router_dtype="fp32",
        moe_router_load_balancing_type="none", **dispatcher,
    )  # fmt: skip
    config.expert_threshold = ExpertThresholdConfig(
        router_type="expert-threshold", warmup_steps=0, kernels="torch"
    )
    layer = get_moe_module_spec(use_te=False, num_experts=EXPERTS, moe_grouped_gemm=False)(config=config)
    layer = layer.cuda().train()
    layer.set_layer_number(1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        layer.router.thresholds.value.copy_(thresholds_E)
        layer.router.weight.copy_(torch.randn(EXPERTS, HIDDEN, generator=generator) / HIDDEN**0.5)
        for place, expert in enumerate(layer.experts.local_experts):
            own = torch.Generator().manual_seed(10 + layer.local_expert_indices[place])
            for weight in expert.parameters():
                weight.copy_(torch.randn(weight.shape, generator=own) / weight.shape[1] ** 0.5)
    return layer


def outcome(layer: Any) -> dict[str, torch.Tensor]:
    """Output and all gradients by name."""
    generator = torch.Generator().manual_seed(100 + torch.distributed.get_rank())
    x, upstream = (
        torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator).cuda().bfloat16() for _ in range(2)
    )
    x.requires_grad_()
    y, _ = layer(x)
    y.backward(upstream)
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in layer.named_parameters()
    }
    return {"output": y.detach(), "input": x.grad, **gradients}


def main(backend: str) -> None:
    """Typical thresholds, a cold expert, a cold rank, nothing routed, everything routed."""
    import megatron_et

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    megatron_et.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("nccl")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    model_parallel_cuda_manual_seed(7)
    typical_E = torch.linspace(0.0, 2.0, EXPERTS)
    for cold in (range(0), range(2, 3), range(EXPERTS // 2), range(EXPERTS), None):
        thresholds_E = torch.full_like(typical_E, -1e9) if cold is None else typical_E.clone()
        thresholds_E[list(cold or ())] = 1e9
        flex = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": backend}
        actual = outcome(layer_of(thresholds_E, **flex))
        expected = outcome(layer_of(thresholds_E, moe_token_dispatcher_type="alltoall"))
        for name, wanted in expected.items():
            error = (actual[name].double() - wanted.double()).norm() / (wanted.double().norm() or 1.0)
            assert error.isfinite(), name
            assert error < TOLERANCE, f"{name}, cold {cold}: relative error {error:.3g}"
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    print(f"flex {backend} passed on rank {os.environ['RANK']}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
