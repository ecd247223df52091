"""Checks on Megatron's flex dispatcher with our router, run under torchrun by test_flex.py: `flex_layers.py
CHECK`.

DeepEP is a stand-in that moves tokens over gloo and asserts what DeepEP asserts (fake_deep_ep.py). Every
outcome, output and gradients, is compared with the alltoall dispatcher's on a layer with the same weights,
one of each also with the dense formula (layers.py).

Dimension letters: T tokens of this rank, E experts, N experts times the ranks that share one, S slots.
"""

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from megatron_et.run import cpu
from tests.distributed import fake_deep_ep, layers
from tests.distributed.fake_deep_ep import Buffer, Dispatched, DispatchedMap, HybridEPBuffer
from tests.distributed.layers import EXPERTS, close, inputs, moe_layer, start

DROPPING: dict[str, Any] = {"moe_expert_capacity_factor": 0.8, "moe_router_load_balancing_type": "none"}
CAPACITY = 5  # 0.8 of 24 tokens * 2 / 8 experts, rounded up


def outcome(layer: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Output and all gradients by name, and the routing map [T, E]."""
    maps: list[torch.Tensor] = []
    hook = layer.router.register_forward_hook(lambda _module, _inputs, routed: maps.append(routed[1]))
    x = inputs(1).requires_grad_()
    y, bias = layer(x)
    hook.remove()
    assert bias is None
    y.backward(inputs(2))
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in layer.named_parameters()
    }
    return {"output": y.detach(), "input": x.grad, **gradients}, maps[0]


def twins(
    backend: str,
    prepare: Callable[[Any], None] = lambda _: None,
    *,
    adjust: Callable[[Any], None] = lambda _: None,
    **settings: Any,
) -> tuple[Any, torch.Tensor]:
    """A layer with the flex dispatcher gives what its twin with alltoall gives.

    Args:
        backend: deepep or hybridep.
        prepare: called on both layers, `adjust` on the one with flex.
        settings: of layers.moe_layer.

    Returns:
        the layer with flex, and the routing map [T, E].
    """
    flex = moe_layer(moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend=backend, **settings)
    plain = moe_layer(**settings, et={"max_fanout": flex.router.et_config.max_fanout})
    for layer in (flex, plain):
        with torch.no_grad():
            prepare(layer)
    adjust(flex)
    actual, map_TE = outcome(flex)
    expected, plain_map_TE = outcome(plain)
    assert torch.equal(map_TE, plain_map_TE)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.isfinite().all(), name
        close(actual[name], tensor)
    return flex, map_TE


def chosen(given: Dispatched, num_experts: int) -> torch.Tensor:
    """The experts in DeepEP's slots as a map [T, N]."""
    return torch.nn.functional.one_hot(given.experts_TS + 1, num_experts + 1).sum(1)[:, 1:].bool()


def check_slots(given: Dispatched, map_TN: torch.Tensor, slots: int) -> None:
    """A token's slots hold the experts of its row of the map, each once, and the rest are empty."""
    assert given.experts_TS.shape == given.gates_TS.shape == (len(map_TN), slots)
    assert torch.equal(chosen(given, map_TN.shape[1]), map_TN)
    assert (given.experts_TS >= 0).sum() == map_TN.sum()
    assert (given.gates_TS[given.experts_TS < 0] == 0.0).all()


def cold(experts: range) -> Callable[[Any], None]:
    """No token reaches these experts."""

    def prepare(layer: Any) -> None:
        layer.router.thresholds.value[list(experts)] = 1e9

    return prepare


def wide_logits(layer: Any) -> None:
    """Gates on the map that are 0, as sigmoid(-110) is in fp32, beside experts off the map."""
    layer.router.weight.normal_(0, 25.0, generator=torch.Generator().manual_seed(5))
    layer.router.thresholds.value.fill_(-150.0)


def everything(layer: Any) -> None:
    """Every token reaches every expert."""
    layer.router.thresholds.value.fill_(-1e9)


def overlap_shared_expert(backend: str) -> None:
    """The shared expert during the dispatch; megatron-core 0.16 and 0.17 refuse it with flex."""
    from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher

    if "set_shared_experts" not in vars(MoEFlexTokenDispatcher):
        twins(backend, expert_model_parallel_size=2, moe_shared_expert_overlap=True)


def check_deepep() -> None:
    """What DeepEP is handed, and what comes of it, on two ranks."""
    deepep: dict[str, Any] = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}
    layers.moe_layer = functools.partial(moe_layer, **deepep)
    layers.check_dense_formula("flex", "3")
    parallel: dict[str, Any] = {"expert_model_parallel_size": 2}
    half = EXPERTS // 2

    flex, map_TE = twins("deepep", **parallel)
    fanouts = map_TE.sum(1)
    assert (fanouts == 0).any()
    assert (fanouts > flex.config.moe_router_topk).any()
    check_slots(Buffer.dispatched[-1], map_TE, EXPERTS)
    assert Buffer.num_sms == 20

    for experts in (range(half), range(half, EXPERTS), range(EXPERTS), range(2, 3)):
        flex, map_TE = twins("deepep", cold(experts), **parallel)
        assert not map_TE[:, list(experts)].any()
        check_slots(Buffer.dispatched[-1], map_TE, EXPERTS)

    _, map_TE = twins("deepep", everything, **parallel)
    assert map_TE.all()
    check_slots(Buffer.dispatched[-1], map_TE, EXPERTS)

    _, map_TE = twins("deepep", wide_logits, **parallel)
    given = Buffer.dispatched[-1]
    assert ((given.experts_TS >= 0) & (given.gates_TS == 0.0)).any()
    assert not map_TE.all()
    check_slots(given, map_TE, EXPERTS)

    _, map_TE = twins("deepep", **DROPPING, **parallel)
    assert map_TE.sum(0).max() == CAPACITY
    check_slots(Buffer.dispatched[-1], map_TE, EXPERTS)
    overlap_shared_expert("deepep")

    # The old flag, which becomes the new one.
    flex = moe_layer(moe_token_dispatcher_type="flex", moe_enable_deepep=True, **parallel)
    _, map_TE = outcome(flex)
    check_slots(Buffer.dispatched[-1], map_TE, EXPERTS)

    # More experts than slots: the fan-out is bounded by score, also where nobody set a bound.
    many: dict[str, Any] = {"expert_model_parallel_size": 2, "num_moe_experts": 40, "moe_router_topk": 3}
    flex, map_TE = twins("deepep", everything, **many)
    assert flex.router.et_config.max_fanout == 32
    assert (map_TE.sum(1) == 32).all()
    check_slots(Buffer.dispatched[-1], map_TE, 32)

    tight = moe_layer(moe_token_dispatcher_type="flex", et={"max_fanout": 5}, **many)
    with torch.no_grad():
        everything(tight)
    _, map_TE = outcome(tight)
    assert (map_TE.sum(1) == 5).all()
    check_slots(Buffer.dispatched[-1], map_TE, 5)


def check_hybridep() -> None:
    """What HybridEP is handed, and what comes of it, on two ranks."""
    hybridep: dict[str, Any] = {
        "moe_token_dispatcher_type": "flex",
        "moe_flex_dispatcher_backend": "hybridep",
    }
    layers.moe_layer = functools.partial(moe_layer, **hybridep)
    layers.check_dense_formula("flex")
    parallel: dict[str, Any] = {"expert_model_parallel_size": 2}
    half = EXPERTS // 2

    def given(map_TE: torch.Tensor, pad_multiple: int | None = None) -> DispatchedMap:
        last = HybridEPBuffer.dispatched[-1]
        assert torch.equal(last.map_TN, map_TE)
        assert (last.gates_TN[~map_TE] == 0.0).all()
        assert last.pad_multiple == pad_multiple
        return last

    for experts in (range(0), range(half), range(half, EXPERTS), range(EXPERTS), range(2, 3)):
        _, map_TE = twins("hybridep", cold(experts), **parallel)
        assert not map_TE[:, list(experts)].any()
        given(map_TE, None)
    _, map_TE = twins("hybridep", wide_logits, **parallel)
    assert (given(map_TE).gates_TN[map_TE] == 0.0).any()

    def fp8(layer: Any) -> None:
        # Of the dispatcher alone: the experts' fp8 needs a GPU, the padding that it asks for does not.
        manager = layer.token_dispatcher._comm_manager
        manager.config = copy.copy(manager.config)
        manager.config.fp8, manager.config.fp8_recipe = "e4m3", "blockwise"

    for experts in (range(0), range(half), range(EXPERTS)):
        _, map_TE = twins("hybridep", cold(experts), adjust=fp8, **parallel)
        given(map_TE, 16)

    _, map_TE = twins("hybridep", **DROPPING, **parallel)
    assert map_TE.sum(0).max() == CAPACITY
    given(map_TE)
    _, map_TE = twins("hybridep", **DROPPING, moe_pad_expert_input_to_capacity=True, **parallel)
    assert map_TE.sum(0).tolist() == [CAPACITY] * EXPERTS
    given(map_TE)
    overlap_shared_expert("hybridep")

    flex, map_TE = twins("hybridep", everything, num_moe_experts=40, **parallel)
    assert flex.router.et_config.max_fanout is None
    assert map_TE.all()

    optional: dict[str, Any] = {
        "moe_hybridep_pad_uneven_dispatch_inputs": True,
        "moe_permute_fusion_into_hybridep": True,
    }
    for name, value in optional.items():
        if hasattr(layers.moe_layer().config, name):
            twins("hybridep", **parallel, **{name: value})


def check_expert_tensor_parallel() -> None:
    """Two ranks share each expert: a token takes a slot for each of them, and the bound is half as large."""
    parallel: dict[str, Any] = {
        "tensor_model_parallel_size": 2,
        "expert_tensor_parallel_size": 2,
        "expert_model_parallel_size": 2,
    }
    start(**parallel)
    parallel["sequence_parallel"] = True

    def over_shards(map_TE: torch.Tensor) -> torch.Tensor:
        # Megatron's order of the group: expert-parallel rank, then the ranks that share its experts.
        return map_TE.unflatten(1, (2, 1, -1)).expand(-1, -1, 2, -1).flatten(1)

    _, map_TE = twins("deepep", **parallel)
    check_slots(Buffer.dispatched[-1], over_shards(map_TE), 2 * EXPERTS)
    flex, map_TE = twins("deepep", everything, num_moe_experts=20, **parallel)
    assert flex.router.et_config.max_fanout == 16
    assert (map_TE.sum(1) == 16).all()
    check_slots(Buffer.dispatched[-1], over_shards(map_TE), 32)
    _, map_TE = twins("hybridep", **parallel)
    assert torch.equal(HybridEPBuffer.dispatched[-1].map_TN, over_shards(map_TE))


def check_empty_fused_permutation() -> None:
    """As of the other dispatchers: nothing received, nothing permuted by Transformer Engine's kernels."""
    layers.check_empty_fused_permutation("flex")


CHECKS: dict[str, Callable[[], None]] = {
    "deepep": check_deepep,
    "hybridep": check_hybridep,
    "expert_tensor_parallel": check_expert_tensor_parallel,
    "empty_fused_permutation": check_empty_fused_permutation,
}

if __name__ == "__main__":
    import os

    layers.WORLD = os.environ["WORLD_SIZE"]
    cpu.install()
    fake_deep_ep.install()
    CHECKS[sys.argv[1]]()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    print(f"check {sys.argv[1]} passed on rank {os.environ['RANK']}", flush=True)
