"""Cases of FP8 on Megatron's real MoELayer on one GPU: `torchrun -m tests.gpu.fp8_layers RESULTS CASE...`.

The layer runs in Megatron's FP8 context as a transformer block runs it, forward inside, backward outside.
The reference is the dense formula of gpu_layers.py in fp64. How far FP8 may be from it is computed, not
guessed: the same formula is run once more with both operands of every product of an expert rounded to FP8 as
the recipe rounds them, forward and backward. The layer rounds at the same places, with scales that differ
(by block, to powers of two, from the batch before), so its errors have the same distribution but not the same
values: SLACK times the rounded formula's worst error is allowed, and the bf16 tolerance on top.

Dimension letters: T tokens, H hidden size, E experts, I and O features in and out of a product.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.gpu.gpu_layers import (
    EXPERTS,
    TOLERANCE,
    Case,
    Layout,
    Tensors,
    deterministic,
    inputs,
    main,
    moe_layer,
    run_formula,
    run_layer,
)

# A whole number of every recipe's blocks, which the shared expert's products need: nothing pads its tokens.
SEQUENCE, BATCH = 64, 4
TOKENS = SEQUENCE * BATCH
# Weights in whole blocks of 128 x 128, as --fp8-recipe blockwise scales them.
SHAPE = {"moe_ffn_hidden_size": 256, "moe_shared_expert_intermediate_size": 256}

COUNTS = (0, 1, 15, 16, 17, 129, 255, 256)
"""Tokens per expert: none, around one and eight blocks of 16, all."""
NONE = (0,) * EXPERTS

SLACK = 2.0
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class Recipe:
    """An FP8 recipe of Megatron."""

    config: dict[str, Any]
    gradients: torch.dtype
    """Format of the gradients; activations and weights are e4m3."""
    rows: int
    """Tokens of an expert are padded to a multiple of this."""


_MAX = {"fp8_amax_history_len": 16, "fp8_amax_compute_algo": "max"}
RECIPES = {
    "delayed": Recipe({"fp8": "hybrid", "fp8_recipe": "delayed"} | _MAX, E5M2, 16),
    "tensorwise": Recipe({"fp8": "hybrid", "fp8_recipe": "tensorwise"}, E5M2, 16),
    "blockwise": Recipe({"fp8": "e4m3", "fp8_recipe": "blockwise"}, E4M3, 16),
    "mxfp8": Recipe({"fp8": "e4m3", "fp8_recipe": "mxfp8"}, E4M3, 32),
}


def missing(recipe: str) -> str | None:
    """What this machine's GPU lacks for a recipe: what Transformer Engine itself asks for."""
    if not torch.cuda.is_available():
        return None  # then the whole suite is skipped
    capability = torch.cuda.get_device_capability()
    if capability < (8, 9):
        return "FP8 needs an Ada, Hopper or newer GPU"
    if recipe == "blockwise" and capability < (9, 0):
        return "blockwise FP8 needs a Hopper or newer GPU"
    if recipe == "mxfp8" and not (10, 0) <= capability < (12, 0):
        return "MXFP8 needs a datacenter Blackwell GPU"
    return None


def fp8_layer(layout: Layout, recipe: str, **config: Any) -> Any:
    """A MoELayer under a recipe, beside no other in Transformer Engine's global FP8 state."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    FP8GlobalStateManager.reset()
    return moe_layer(layout, "bf16", **SHAPE, **RECIPES[recipe].config, **config)


def fp8_context(layer: Any) -> AbstractContextManager[Any]:
    """The context in which Megatron runs a layer's forward pass."""
    from megatron.core.fp8_utils import get_fp8_context

    layer.set_is_first_microbatch()
    return get_fp8_context(layer.config)


# ---- the formula, rounded ---------------------------------------------------------------------------------


def rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To the nearest values of an FP8 format, scaled so that the largest entry is the format's largest."""
    amax = tensor.abs().max()
    scale = torch.finfo(dtype).max / amax.where(amax > 0, 1.0)
    return (tensor * scale).float().to(dtype).to(tensor.dtype) / scale


class RoundedLinear(torch.autograd.Function):
    """x W^T with both operands of all three products, forward and backward, rounded to FP8."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: torch.Tensor, weight_OI: torch.Tensor, gradients: torch.dtype
    ) -> torch.Tensor:
        x_TI, weight_OI = rounded(x_TI, E4M3), rounded(weight_OI, E4M3)
        ctx.save_for_backward(x_TI, weight_OI)
        ctx.gradients = gradients
        return x_TI @ weight_OI.T

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x_TI, weight_OI = ctx.saved_tensors
        upstream_TO = rounded(upstream[0], ctx.gradients)
        return upstream_TO @ weight_OI, upstream_TO.T @ x_TI, None


def rounded_linear(gradients: torch.dtype) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """For run_formula."""
    return lambda x, weight: RoundedLinear.apply(x, weight, gradients)


def worst_errors(actual: Tensors, exact: Tensors) -> dict[str, float]:
    """Relative error of every tensor's worst part. A part is a token of the output and of the input gradient,
    an expert of a weight gradient, which must be zero where the exact one is."""
    errors = {}
    for name, wanted in exact.items():
        difference = actual[name].double() - wanted
        assert difference.isfinite().all(), f"{name} is not finite"
        if name in ("output", "input gradient", "router gradient"):
            size, error = wanted.norm(dim=-1), difference.norm(dim=-1)
            # Sums cancel: a small row is as wrong as the others, and relatively more.
            size = size.clamp(min=size.square().mean().sqrt() or 1.0)
        else:
            size, error = (part.flatten(-2).norm(dim=-1) for part in (wanted, difference))
            assert not error[size == 0.0].any(), f"{name} of an expert without tokens is not zero"
            size = size.where(size > 0.0, 1.0)
        errors[name] = (error / size).max().item()
    return errors


def assert_close(
    layer: Any,
    x: torch.Tensor,
    upstream: torch.Tensor,
    actual: Tensors,
    map_TE: torch.Tensor,
    recipe: str,
) -> None:
    """Compare a run of the layer with the formula."""
    exact = run_formula(layer, x, upstream, map_TE)
    model = run_formula(layer, x, upstream, map_TE, rounded_linear(RECIPES[recipe].gradients))
    expected = worst_errors(model, exact)
    allowed = {name: SLACK * error + TOLERANCE["bf16"] for name, error in expected.items()}
    errors = worst_errors(actual, exact)
    print(
        recipe,
        {name: f"{error:.3f} of {allowed[name]:.3f}" for name, error in errors.items()},
        flush=True,
    )
    too_large = {name: error for name, error in errors.items() if error > allowed[name]}
    assert not too_large, f"errors {too_large} are above {allowed}"
    assert errors["output"] > expected["output"] / 4, "the layer did not compute in FP8"


# ---- checks -----------------------------------------------------------------------------------------------


def set_counts(layer: Any, x: torch.Tensor, counts: tuple[int, ...]) -> None:
    """Thresholds by which exactly so many tokens reach each expert."""
    with torch.no_grad():
        logits_TE = layer.router.gating(x).reshape(TOKENS, EXPERTS)
        ordered_TE = logits_TE.sort(dim=0, descending=True).values
        for expert, count in enumerate(counts):
            layer.router.thresholds.value[expert] = ordered_TE[count - 1, expert] if count else 1e9


def padded_splits(layer: Any, seen: list[list[int]]) -> None:
    """Record the tokens per expert of every grouped product."""

    def note(_module: Any, arguments: tuple[Any, ...]) -> None:
        seen.append([int(count) for count in arguments[1]])

    for linear in (layer.experts.linear_fc1, layer.experts.linear_fc2):
        linear.register_forward_pre_hook(note)


def assert_scales_are_finite(layer: Any) -> None:
    """Delayed scaling keeps scales from batch to batch; an expert without tokens must not spoil its own."""
    states = [
        state
        for module in layer.modules()
        for name, state in getattr(module, "fp8_meta", {}).items()
        if name in ("scaling_fwd", "scaling_bwd")
    ]
    assert states
    for state in states:
        assert state.scale.isfinite().all()
        assert (state.scale > 0.0).all()


def fp8_counts(layout: Layout, recipe: str) -> None:
    """Any number of tokens per expert, an expert that wakes up, and no token at all; routing as without
    FP8."""
    import megatron_et

    plain = moe_layer(replace(layout, router_padding=False), "bf16", **SHAPE)
    layer = fp8_layer(layout, recipe)
    splits: list[list[int]] = []
    if layout.experts == "TEGroupedMLP":
        padded_splits(layer, splits)
    x, upstream = inputs(1, "bf16", SEQUENCE, BATCH), inputs(2, "bf16", SEQUENCE, BATCH)
    for counts in (COUNTS, COUNTS[::-1], NONE, COUNTS):
        for each in (plain, layer):
            set_counts(each, x, counts)
        # Twice: delayed scaling learns its scales from the batches before.
        for _ in range(2):
            plain.zero_grad()
            layer.zero_grad()
            splits.clear()
            _, plain_map_TE = run_layer(plain, x, upstream)
            actual, map_TE = run_layer(layer, x, upstream, fp8_context(layer))
            assert map_TE.sum(0).tolist() == list(counts)
            assert torch.equal(map_TE, plain_map_TE)
        assert_close(layer, x, upstream, actual, map_TE, recipe)
        rows = RECIPES[recipe].rows
        if layout.experts == "TEGroupedMLP":
            assert splits == [[math.ceil(count / rows) * rows for count in counts]] * 2
        if recipe == "delayed":
            assert_scales_are_finite(layer)
        assert_same_routing(plain, layer, x)
        for each in (plain, layer):
            megatron_et.finalize_thresholds(each)
        assert torch.equal(plain.router.thresholds.value, layer.router.thresholds.value)


def assert_same_routing(plain: Any, layer: Any, x: torch.Tensor) -> None:
    """The router computes in fp32 inside the FP8 context too: bitwise the same logits, gates and counts."""
    assert layer.router.weight.dtype == plain.router.weight.dtype == torch.bfloat16
    with torch.no_grad():
        with fp8_context(layer):
            logits, (gates_TE, map_TE) = layer.router.gating(x), layer.router(x)
        plain_logits, (plain_gates_TE, plain_map_TE) = plain.router.gating(x), plain.router(x)
    assert logits.dtype == gates_TE.dtype == torch.float32
    assert torch.equal(logits, plain_logits)
    assert torch.equal(gates_TE, plain_gates_TE)
    assert torch.equal(map_TE, plain_map_TE)
    assert not gates_TE[~map_TE].any()
    assert torch.equal(layer.router.statistics.counts, plain.router.statistics.counts)


def fp8_recompute(layout: Layout, recipe: str) -> None:
    """Recomputing the layer changes no bit of the output, the gradients and the statistics."""
    x, upstream = inputs(5, "bf16", SEQUENCE, BATCH), inputs(6, "bf16", SEQUENCE, BATCH)
    results = []
    with deterministic():
        for extra in ({}, {"recompute_granularity": "selective", "recompute_modules": ["moe"]}):
            layer = fp8_layer(layout, recipe, **extra)
            set_counts(layer, x, COUNTS)
            tensors, _ = run_layer(layer, x, upstream, fp8_context(layer))
            results.append(tensors | {"counts": layer.router.statistics.counts})
    plain, recomputed = results
    different = [name for name in plain if not torch.equal(plain[name], recomputed[name])]
    assert not different, f"not bitwise equal: {different}"


FUSED = Layout("TEGroupedMLP", "alltoall", permute_fusion=True)
LAYOUTS = (
    FUSED,
    Layout("TEGroupedMLP", "alltoall"),
    Layout("TEGroupedMLP", "allgather", permute_fusion=True),
    Layout("TEGroupedMLP", "alltoall", permute_fusion=True, router_padding=True),
    Layout("TE SequentialMLP", "alltoall"),
)


def all_cases() -> Iterator[Case]:
    """Every case that test_fp8_gpu.py runs."""
    for recipe in RECIPES:
        for layout in LAYOUTS:
            yield Case(fp8_counts, layout, recipe, missing(recipe))
        yield Case(fp8_recompute, FUSED, recipe, missing(recipe))


CASES = {case.id: case for case in all_cases()}


if __name__ == "__main__":
    main(CASES, Path(sys.argv[1]), sys.argv[2:])
