"""What pages of docs/ say of a MoE layer, on Megatron's real one; run by test_pages.py, one process.

Dimension letters: T tokens, E experts.
"""

import sys
from typing import Any

import torch
from torch.nn.functional import silu

from megatron_et.run import cpu
from tests.distributed.layers import EXPERTS, HIDDEN, TOPK, moe_layer, start
from tests.documents import ROOT, blocks

TOKENS = 512


def recalibration() -> None:
    """docs/faq.md's function, as it stands there, on two layers in a row and data of another kind."""
    (block,) = (block for block in blocks(ROOT / "docs" / "faq.md") if block.info == "python")
    page: dict[str, Any] = {}
    exec(block.text, page)
    model = torch.nn.Sequential(moe_layer(), moe_layer()).train()
    weights = [parameter.clone() for parameter in model.parameters()]
    shifted = [torch.randn(TOKENS, 1, HIDDEN) * 2 + 0.5 for _ in range(3)]

    def forward(batch: torch.Tensor) -> None:
        for layer in model:
            batch = batch + layer(batch)[0]

    def loads() -> list[torch.Tensor]:
        """Expert loads over their target on the shifted data, as in evaluation, of both layers."""
        found = []
        with torch.no_grad():
            hidden = torch.cat(shifted)
            for layer in model:
                routing_map_TE = layer.router(hidden)[1]
                found.append(routing_map_TE.sum(dim=0) / (hidden.shape[0] * TOPK / EXPERTS))
                hidden = hidden + layer(hidden)[0]
        return found

    model.eval()
    assert all((load - 1.0).abs().max() > 0.2 for load in loads()), "the data is not of another kind"
    page["recalibrate"](model, forward, shifted)
    after = loads()
    torch.testing.assert_close(after[0], torch.ones(EXPERTS), rtol=0.01, atol=0.01)
    torch.testing.assert_close(after[1], torch.ones(EXPERTS), rtol=0.05, atol=0.05)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert all(layer.router.statistics.counts.sum() == 0 for layer in model)


def kept_bytes(layer: Any, threshold: float) -> tuple[int, int]:
    """Rows that the experts process at this threshold, and bytes that the layer keeps for its backward
    pass, weights and input left out."""
    layer.router.statistics.reset()
    layer.router.thresholds.value.fill_(threshold)
    hidden = torch.randn(TOKENS, 1, layer.config.hidden_size).bfloat16().requires_grad_()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), hidden)}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(hidden)
    return int(layer.router.statistics.counts[:EXPERTS].sum()), sum(s.nbytes() for s in kept.values())


def row_bytes() -> None:
    """docs/cluster.md: 2h + 6f + 12 bytes a row, in bf16 with the fused SwiGLU."""
    for hidden, ffn in ((64, 48), (128, 48), (64, 96)):
        layer = moe_layer(
            hidden_size=hidden, moe_ffn_hidden_size=ffn, moe_shared_expert_intermediate_size=None,
            params_dtype=torch.bfloat16, bf16=True, bias_activation_fusion=True, activation_func=silu,
            moe_router_dtype="fp32",
        ).bfloat16().train()  # fmt: skip
        (few, least), (many, most) = kept_bytes(layer, 4.0), kept_bytes(layer, -4.0)
        assert many > 1.5 * few > 0
        assert most - least == (many - few) * (2 * hidden + 6 * ffn + 12)


def main() -> None:
    """Run the checks named on the command line."""
    cpu.install()
    start()
    for name in sys.argv[1:]:
        {"recalibration": recalibration, "row_bytes": row_bytes}[name]()
        print(f"check {name} passed", flush=True)


if __name__ == "__main__":
    main()
