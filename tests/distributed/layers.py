"""Checks on Megatron's real MoELayer with our router, run under torchrun by test_layers.py: `layers.py CHECK
[ARGS]`.

Dimension letters: T tokens of this rank, H hidden size, E experts.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_et import cpu

HIDDEN, EXPERTS, TOPK, SEQUENCE, BATCH = 16, 8, 2, 12, 2


def start(**parallel: int) -> None:
    """torch.distributed, Megatron's groups and RNG."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    import megatron_et

    megatron_et.install()
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(**parallel)
    model_parallel_cuda_manual_seed(7)


def moe_layer(
    *, warmup: int = 0, capacity: float | None = None, et: dict[str, Any] | None = None, **config: Any
) -> Any:
    """A MoELayer with a shared expert as a GPT of Megatron's local implementation has it."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_et import ExpertThresholdConfig
    from megatron_et.router import ExpertThresholdRouter

    settings = {
        "num_layers": 1, "hidden_size": HIDDEN, "num_attention_heads": 2, "num_moe_experts": EXPERTS,
        "moe_router_topk": TOPK, "moe_ffn_hidden_size": 24, "moe_shared_expert_intermediate_size": 24,
        "moe_token_dispatcher_type": "alltoall", "add_bias_linear": False, "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu, "bias_activation_fusion": False,
        "gradient_accumulation_fusion": False, "use_cpu_initialization": True,
        "moe_router_score_function": "sigmoid",
    } | config  # fmt: skip
    transformer_config = TransformerConfig(**settings)
    transformer_config.expert_threshold = ExpertThresholdConfig(
        router_type="expert-threshold", warmup_steps=warmup, capacity_factor=capacity, **(et or {})
    )
    build = get_moe_module_spec(use_te=False, num_experts=settings["num_moe_experts"], moe_grouped_gemm=False)
    torch.manual_seed(99)
    layer = build(config=transformer_config)
    layer.set_layer_number(3)
    assert isinstance(layer.router, ExpertThresholdRouter)
    with torch.no_grad():
        # Wide enough that tokens with 0, 1 and many experts all occur.
        layer.router.weight.normal_(0, 0.5)
        layer.router.thresholds.value.copy_(torch.linspace(0.8, 2.4, settings["num_moe_experts"]))
        for expert in layer.experts.local_experts:
            for weight in expert.parameters():
                weight.normal_(0, 0.3)
    return layer


def all_experts(layer: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weights (fc1, fc2) of all experts of the EP group, in order; this rank's own carry gradients."""
    from megatron.core import parallel_state

    group = parallel_state.get_expert_model_parallel_group()
    own = [(e.linear_fc1.weight, e.linear_fc2.weight) for e in layer.experts.local_experts]
    gathered: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(gathered, [(a.detach(), b.detach()) for a, b in own], group=group)
    return [
        own[i] if rank == group.rank() else weights
        for rank, part in enumerate(gathered)
        for i, weights in enumerate(part)
    ]


def mlp(x_TH: torch.Tensor, fc1: torch.Tensor, fc2: torch.Tensor) -> torch.Tensor:
    """Gated SiLU expert."""
    gate, up = (x_TH @ fc1.T).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ fc2.T


def dense(
    layer: Any, x: torch.Tensor, router_weight: torch.Tensor, experts: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula, every expert on every token: sum_i z * sigmoid(r) * expert_i(x) + shared(x), and the
    map."""
    x_TH = x.reshape(-1, HIDDEN)
    logits_TE = x_TH @ router_weight.T
    map_TE = logits_TE >= layer.router.thresholds.value
    y_TH = sum(
        (map_TE[:, i] * torch.sigmoid(logits_TE[:, i])).unsqueeze(1) * mlp(x_TH, *weights)
        for i, weights in enumerate(experts)
    )
    shared = layer.shared_experts
    if shared is not None:
        y_TH = y_TH + mlp(x_TH, shared.linear_fc1.weight, shared.linear_fc2.weight)
    return y_TH.reshape(x.shape), map_TE


def inputs(seed: int, sequence: int = SEQUENCE) -> torch.Tensor:
    """[sequence, batch, H], another draw on every rank."""
    generator = torch.Generator().manual_seed(seed + 1000 * torch.distributed.get_rank())
    return torch.randn(sequence, BATCH, HIDDEN, generator=generator)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


def check_dense_formula(dispatcher: str, uneven: str = "0", shared: str = "yes") -> None:
    """Output and all gradients against autograd on the dense formula.

    `uneven` gives rank r that many rows more per rank before it, so that ranks hold different numbers of
    tokens; "empty" leaves rank 0 without any.
    """
    start(expert_model_parallel_size=int(WORLD))
    extra = {} if shared == "yes" else {"moe_shared_expert_intermediate_size": None}
    layer = moe_layer(moe_token_dispatcher_type=dispatcher, expert_model_parallel_size=int(WORLD), **extra)
    layer.train()
    rank = torch.distributed.get_rank()
    own = SEQUENCE * rank if uneven == "empty" else SEQUENCE + int(uneven) * rank
    x = inputs(1, own).requires_grad_()
    upstream = inputs(2, own)
    y, bias = layer(x)
    assert bias is None
    y.backward(upstream)

    experts = all_experts(layer)
    x_dense = x.detach().clone().requires_grad_()
    weight = layer.router.weight.detach().clone().requires_grad_()
    dense_experts = [tuple(w.detach().clone().requires_grad_() for w in pair) for pair in experts]
    y_dense, map_TE = dense(layer, x_dense, weight, dense_experts)
    y_dense.backward(upstream)
    assert y.shape == x.shape
    close(y, y_dense)
    close(x.grad, x_dense.grad)
    close(
        torch.zeros_like(weight) if layer.router.weight.grad is None else layer.router.weight.grad,
        weight.grad,
    )
    # An expert's gradient sums over the tokens of all ranks.
    own_experts = range(layer.local_expert_indices[0], layer.local_expert_indices[-1] + 1)
    for i, pair in enumerate(dense_experts):
        for j, w in enumerate(pair):
            total = torch.zeros_like(w) if w.grad is None else w.grad
            torch.distributed.all_reduce(total)
            if i in own_experts:
                grad = experts[i][j].grad
                close(torch.zeros_like(total) if grad is None else grad, total)
    fanouts = map_TE.sum(1)
    if own:
        assert (fanouts == 0).any()
        assert (fanouts > TOPK).any()
    counted = layer.router.statistics.counts
    from megatron_et.statistics import BatchCounts

    counts = BatchCounts.split(counted, EXPERTS)
    assert counts.usage_E.tolist() == map_TE.sum(0).tolist()
    assert counts.tokens.item() == own * BATCH
    assert counts.fanout_F.tolist() == torch.bincount(fanouts, minlength=EXPERTS + 1).tolist()


def check_causality() -> None:
    """I1 and I2 on the real layer: the routing of a token does not change with the others, nor with train or
    eval."""
    start(expert_model_parallel_size=int(WORLD))
    layer = moe_layer(expert_model_parallel_size=int(WORLD))
    x = inputs(1)
    other = inputs(5)
    t = (4, 1)
    other[t] = x[t]
    for module_input in (x, other):
        for training in (True, False):
            layer.train(training)
            gates, routing_map = layer.router(module_input)
            row = t[0] * BATCH + t[1]
            if module_input is x and training:
                expected_gates, expected_map = gates[row].clone(), routing_map[row].clone()
            assert torch.equal(routing_map[row], expected_map)
            torch.testing.assert_close(gates[row], expected_gates, rtol=1e-6, atol=1e-7)
    layer.eval()
    with torch.no_grad():
        y, _ = layer(x)
        y_other, _ = layer(other)
    close(y_other[t], y[t])


def check_cold_experts() -> None:
    """No token reaches any expert, or any expert of one rank: forward and backward still run, and are
    right."""
    start(expert_model_parallel_size=int(WORLD))
    for cold in (range(EXPERTS), range(EXPERTS // 2)):
        layer = moe_layer(expert_model_parallel_size=int(WORLD))
        with torch.no_grad():
            layer.router.thresholds.value[list(cold)] = 1e9
        x = inputs(3).requires_grad_()
        y, _ = layer(x)
        y.square().sum().backward()
        y_dense, map_TE = dense(layer, x.detach(), layer.router.weight.detach(), all_experts(layer))
        assert not map_TE[:, list(cold)].any()
        close(y, y_dense)
        assert x.grad.isfinite().all()


def check_empty_fused_permutation(dispatcher: str) -> None:
    """Under permute fusion a micro-batch without routed tokens takes the unfused path, and only such a one.

    Stand-ins for Transformer Engine kernels refuse to permute no rows, as those do, and else do their work.
    """
    from megatron.core.transformer.moe import moe_utils

    start(expert_model_parallel_size=int(WORLD))
    permute, unpermute, sort_chunks = moe_utils.permute, moe_utils.unpermute, moe_utils.sort_chunks_by_idxs
    calls = []

    class RowMap:
        """TE's row map: no tensor that the unfused functions could take."""

        def __init__(self, indices: torch.Tensor) -> None:
            self.indices = indices

    def fused_permute(tokens: torch.Tensor, routing_map: torch.Tensor, num_out_tokens: int) -> Any:
        assert int(num_out_tokens) > 0, "num_out_tokens > 0"
        calls.append("permute")
        rows, _, indices, _, _ = permute(tokens, routing_map, num_out_tokens=int(num_out_tokens))
        return rows, RowMap(indices)

    def fused_permute_with_probs(
        tokens: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor, num_out_tokens: int
    ) -> Any:
        assert int(num_out_tokens) > 0, "num_out_tokens > 0"
        calls.append("permute")
        rows, gates, indices, _, _ = permute(
            tokens, routing_map, probs=probs, num_out_tokens=int(num_out_tokens)
        )
        return rows, gates, RowMap(indices)

    def fused_unpermute(rows: torch.Tensor, row_map: Any, *, restore_shape: Any, **_: Any) -> torch.Tensor:
        return unpermute(rows, row_map.indices, restore_shape=restore_shape)

    moe_utils.HAVE_TE = True
    moe_utils.fused_permute, moe_utils.fused_permute_with_probs = fused_permute, fused_permute_with_probs
    moe_utils.fused_permute_and_pad_with_probs, moe_utils.fused_unpermute = None, fused_unpermute
    moe_utils.fused_sort_chunks_by_index_with_probs = lambda x, p, sizes, order: sort_chunks(
        x, sizes, order, probs=p
    )
    moe_utils.fused_sort_chunks_by_index = lambda x, sizes, order: sort_chunks(x, sizes, order)[0]
    moe_utils.is_te_min_version = lambda *_, **__: True

    layer = moe_layer(moe_token_dispatcher_type=dispatcher, expert_model_parallel_size=int(WORLD))
    layer.config.moe_permute_fusion = True  # after the copy without it was made, as no TE is here
    warm = layer.router.thresholds.value.clone()
    for cold in (False, True, False):
        calls.clear()
        layer.zero_grad()
        layer.router.thresholds.value.copy_(torch.full_like(warm, 1e9) if cold else warm)
        x = inputs(3).requires_grad_()
        y, _ = layer(x)
        y.square().sum().backward()
        y_dense, map_TE = dense(layer, x.detach(), layer.router.weight.detach(), all_experts(layer))
        assert map_TE.any() != cold
        assert bool(calls) != cold
        close(y, y_dense)
        assert x.grad.isfinite().all()


def check_batch_boundary(quantile: str) -> None:
    """I4: nothing moves within a step; discard, evaluation, no-grad and recompute leave no trace; ranks agree
    bitwise."""
    import megatron_et
    from megatron_et.synchronize import finish_reduction, routers_of, start_reduction

    start(expert_model_parallel_size=int(WORLD))
    layer = moe_layer(
        warmup=2, expert_model_parallel_size=int(WORLD), et={"ema_decay": 0.9, "quantile": quantile}
    )
    router = layer.router
    with torch.no_grad():
        router.thresholds.value.zero_()

    def state() -> dict[str, torch.Tensor]:
        return {key: value.clone() for key, value in router.state_dict().items()}

    def same(before: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(value, before[key]) for key, value in router.state_dict().items())

    def untouched() -> bool:
        return not router.statistics.integers().any() and not router.statistics.estimator.reals.any()

    before = state()
    layer.eval()
    layer(inputs(1))
    layer.train()
    with torch.no_grad():
        layer(inputs(2))
    assert untouched()
    layer(inputs(3))
    assert same(before)
    megatron_et.finalize_thresholds(layer, skipped=True)
    assert same(before)
    assert untouched()

    for step in range(4):
        before = state()
        pool = [inputs(10 * step + i) for i in range(3)]
        for x in pool:
            layer(x)
        assert same(before)
        # A rerun (rerun state machine): the same forward passes again, reduced again; only the last one
        # counts.
        finish_reduction(start_reduction(routers_of(layer)))
        for x in pool:
            layer(x)
        assert same(before)
        megatron_et.finalize_thresholds([layer])
        assert untouched()
        assert router.num_committed_batches == router.committed_batches.item() == step + 1
        k = SEQUENCE * BATCH * TOPK // EXPERTS
        logits = [(x.reshape(-1, HIDDEN) @ router.weight.T).detach() for x in pool]
        if quantile == "kth-largest":
            expected = torch.stack([part.topk(k, dim=0).values[-1] for part in logits]).double().sum(0)
            torch.distributed.all_reduce(expected)
            expected /= 3 * int(WORLD)
            torch.testing.assert_close(router.last_batch.cutoffs_E, expected, rtol=1e-5, atol=1e-5)
        else:
            # Between the neighbours of the k-th largest of all ranks' tokens, give or take a bin.
            parts = [torch.empty(3 * SEQUENCE * BATCH, EXPERTS) for _ in range(int(WORLD))]
            torch.distributed.all_gather(parts, torch.cat(logits))
            ranked = torch.cat(parts).sort(dim=0, descending=True).values
            wanted, bin_width = 3 * k * int(WORLD), 0.1 if step == 0 else 0.07
            assert (router.last_batch.cutoffs_E <= ranked[wanted - 2] + bin_width).all()
            assert (router.last_batch.cutoffs_E >= ranked[wanted] - bin_width).all()
        cutoffs = router.last_batch.cutoffs_E
        n = step + 1
        rate = (1 - 0.9) / (1 - 0.9**n)
        old = before["thresholds.value"].double()
        close(router.thresholds.value, (old + rate * (cutoffs - old)).float())
        assert torch.equal(router.thresholds.last_cutoff, cutoffs.float())
        gathered = [torch.empty(EXPERTS) for _ in range(int(WORLD))]
        torch.distributed.all_gather(gathered, router.thresholds.value)
        assert all(torch.equal(part, gathered[0]) for part in gathered)
        usage = router.last_batch.counts.usage_E
        if step < 2:
            assert usage.tolist() == [3 * k * int(WORLD)] * EXPERTS
        assert router.last_batch.phase == ("warmup" if step < 2 else "threshold")
        assert router.last_batch.counts.tokens.item() == 3 * SEQUENCE * BATCH * int(WORLD)


def check_global_pool() -> None:
    """--moe-et-pool global: warm-up and capacity hold for the tokens of all ranks together, exactly, not for
    each."""
    start(expert_model_parallel_size=int(WORLD))
    total = SEQUENCE * BATCH * int(WORLD)
    k = total * TOPK // EXPERTS
    for warmup, capacity, thresholds, load in (
        (1, None, 0.0, k),
        (0, 0.5, -9.0, int(1.5 * k)),
        (0, 0.5, 9.0, k // 2),
    ):
        layer = moe_layer(
            warmup=warmup, capacity=capacity, expert_model_parallel_size=int(WORLD), et={"pool": "global"}
        )
        layer.router.thresholds.value.fill_(thresholds)
        # Ranks see different data: scaled, so that a local quota would choose otherwise.
        x = inputs(1) * (1.0 + torch.distributed.get_rank())
        _, routing_map = layer.router(x)
        usage = routing_map.sum(0)
        local = usage.tolist()
        torch.distributed.all_reduce(usage)
        assert usage.tolist() == [load] * EXPERTS
        assert local != [load // int(WORLD)] * EXPERTS


def check_fixed_stream(micro_batches: str, recompute: str = "no") -> None:
    """I3: one stream of logits, split over ranks and micro-batches as told; prints the thresholds' bits."""
    import megatron_et

    start(expert_model_parallel_size=int(WORLD))
    extra = {"recompute_granularity": "selective", "recompute_modules": ["moe"]} if recompute == "yes" else {}
    layer = moe_layer(
        warmup=2, expert_model_parallel_size=int(WORLD), et={"ema_decay": 0.9, "pool": "global"}, **extra
    )
    generator = torch.Generator().manual_seed(3)
    rank, parts = torch.distributed.get_rank(), int(micro_batches)
    for step in range(5):
        stream = torch.randn(96, EXPERTS, generator=generator) * (1 + step) + 0.3 * step
        for part in stream.chunk(int(WORLD))[rank].chunk(parts):
            # The logits are fed: a matrix product may round differently for another number of rows.
            layer.router.gating = lambda x, part=part: part.reshape(*x.shape[:-1], EXPERTS).clone()
            layer(torch.zeros(len(part) // 2, 2, HIDDEN, requires_grad=True))[0].sum().backward()
        megatron_et.finalize_thresholds(layer)
    value = layer.router.thresholds.value.view(torch.int32).tolist()
    if rank == 0:
        print(f"bits {value} tokens {layer.router.last_batch.counts.tokens.item()}", flush=True)


def check_recompute() -> None:
    """Under activation recompute each micro-batch is counted once and the same tokens are chosen twice."""
    start(expert_model_parallel_size=int(WORLD))
    recompute = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    results = []
    for extra in ({}, recompute):
        layer = moe_layer(warmup=1, expert_model_parallel_size=int(WORLD), **extra)
        x = inputs(1).requires_grad_()
        y, _ = layer(x)
        y.square().sum().backward()
        results.append((y, x.grad, layer.router.weight.grad, layer.router.statistics.counts))
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def check_capacity() -> None:
    """Loads stay between (1-C)k and (1+C)k in training, and are free in evaluation."""
    start(expert_model_parallel_size=int(WORLD))
    layer = moe_layer(capacity=0.5, expert_model_parallel_size=int(WORLD))
    k = SEQUENCE * BATCH * TOPK // EXPERTS
    for thresholds in (-9.0, 9.0):
        layer.router.thresholds.value.fill_(thresholds)
        _, routing_map = layer.train().router(inputs(1))
        bound = int(1.5 * k) if thresholds < 0 else int(0.5 * k)
        assert routing_map.sum(0).tolist() == [bound] * EXPERTS
        _, routing_map = layer.eval().router(inputs(1))
        assert routing_map.all() if thresholds < 0 else not routing_map.any()


def check_bfloat16() -> None:
    """I7: under Float16Module thresholds stay fp32, and logits are compared in fp32."""
    from megatron.core.transformer.module import Float16Module

    start()
    layer = moe_layer(bf16=True, params_dtype=torch.bfloat16)
    layer.router.thresholds.value.fill_(1.000001)
    wrapped = Float16Module(layer.config, layer)
    assert layer.router.weight.dtype == torch.bfloat16
    assert layer.router.thresholds.value.dtype == torch.float32
    assert (layer.router.thresholds.value == 1.000001 * torch.ones(EXPERTS)).all()
    y, _ = wrapped.module(inputs(1).bfloat16())
    y.sum().backward()
    gates, _ = layer.router(inputs(1).bfloat16())
    assert gates.dtype == torch.float32


def check_padding_mask() -> None:
    """Padded tokens are routed nowhere, counted nowhere, and change nothing for the others."""
    from megatron_et.statistics import BatchCounts

    start()
    for warmup in (0, 1):
        layer = moe_layer(warmup=warmup)
        x = inputs(1)
        mask = torch.zeros(BATCH, SEQUENCE, dtype=torch.bool)
        mask[:, 9:] = True
        layer(x, padding_mask=mask)
        padded = BatchCounts.split(layer.router.statistics.counts.clone(), EXPERTS)
        estimate = layer.router.statistics.estimator.integers.clone()
        layer.router.statistics.reset()
        layer(x[:9].contiguous())
        plain = BatchCounts.split(layer.router.statistics.counts, EXPERTS)
        assert padded.tokens.item() == 9 * BATCH
        for name in BatchCounts.__dataclass_fields__:
            assert torch.equal(getattr(padded, name), getattr(plain, name)), name
        assert torch.equal(estimate, layer.router.statistics.estimator.integers)


def check_nonfinite_logits() -> None:
    """NaN or inf logits of one rank stop every rank of the group, naming layer and global batch."""
    import megatron_et
    from megatron_et.errors import NonFiniteLogitsError

    start(expert_model_parallel_size=int(WORLD))
    for bad in (float("nan"), float("inf")):
        layer = moe_layer(warmup=1, expert_model_parallel_size=int(WORLD))
        layer(inputs(1))
        megatron_et.finalize_thresholds(layer)
        before = layer.router.thresholds.value.clone()
        x = inputs(1)
        if torch.distributed.get_rank() == 0:
            x[2, 1, 3] = bad
        layer(x)
        with pytest.raises(NonFiniteLogitsError, match=r"layer 3 .* in global batch 2"):
            megatron_et.finalize_thresholds(layer)
        assert torch.equal(layer.router.thresholds.value, before)


def check_one_expert() -> None:
    """E = topk = 1: everything is routed while warming up, and training goes on by threshold."""
    import megatron_et

    start()
    layer = moe_layer(warmup=1, num_moe_experts=1, moe_router_topk=1)
    for step in range(3):
        y, _ = layer(inputs(step))
        y.sum().backward()
        usage = layer.router.statistics.counts[0].item()
        assert usage == SEQUENCE * BATCH if step == 0 else usage > 0
        megatron_et.finalize_thresholds(layer)


def check_odd_sizes() -> None:
    """Seven experts, target fan-out 3, fan-out bound 4: the bound holds and the layer equals itself on one
    rank."""
    start()
    layer = moe_layer(num_moe_experts=7, moe_router_topk=3, et={"max_fanout": 4})
    layer.router.thresholds.value.fill_(-9.0)
    gates, routing_map = layer.router(inputs(1, 13))
    assert routing_map.sum(1).tolist() == [4] * 13 * BATCH
    assert (gates[~routing_map] == 0).all()
    y, _ = layer(inputs(1, 13))
    assert y.shape == (13, BATCH, HIDDEN)


CHECKS: dict[str, Callable[..., None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}

if __name__ == "__main__":
    import os

    WORLD = os.environ["WORLD_SIZE"]
    cpu.install()
    CHECKS[sys.argv[1]](*sys.argv[2:])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    print(f"check {sys.argv[1]} passed on rank {os.environ['RANK']}", flush=True)
