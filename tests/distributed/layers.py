"""Checks on Megatron's real MoELayer with our router, run under torchrun by test_layers.py: `layers.py CHECK
[ARGS]`.

Dimension letters: T tokens of this rank, H hidden size, E experts.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_et.run import cpu

HIDDEN, EXPERTS, TOPK, SEQUENCE, BATCH = 16, 8, 2, 12, 2

Kept = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Gates [T, E] and map [T, E] to the map without the pairs that a capacity drops."""


def start(**parallel: int) -> None:
    """torch.distributed, Megatron's groups and RNG."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    import megatron_et

    megatron_et.install()
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(**parallel)
    model_parallel_cuda_manual_seed(7)


def moe_config(
    *, warmup: int = 0, capacity: float | None = None, et: dict[str, Any] | None = None, **config: Any
) -> Any:
    """A TransformerConfig of a MoE layer with a shared expert, our settings attached."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_et import ExpertThresholdConfig

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
    return transformer_config


def moe_layer(**config: Any) -> Any:
    """A MoELayer as a GPT of Megatron's local implementation has it; arguments as for `moe_config`."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec

    from megatron_et.moe.router import ExpertThresholdRouter

    transformer_config = moe_config(**config)
    num_experts = transformer_config.num_moe_experts
    build = get_moe_module_spec(use_te=False, num_experts=num_experts, moe_grouped_gemm=False)
    torch.manual_seed(99)
    layer = build(config=transformer_config)
    layer.set_layer_number(3)
    assert isinstance(layer.router, ExpertThresholdRouter)
    with torch.no_grad():
        # Wide enough that tokens with 0, 1 and many experts all occur.
        layer.router.weight.normal_(0, 0.5)
        layer.router.thresholds.value.copy_(torch.linspace(0.8, 2.4, num_experts))
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
    layer: Any, x: torch.Tensor, router_weight: torch.Tensor, experts: Any, kept: Kept | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula, every expert on every token: sum_i z * sigmoid(r) * expert_i(x) + shared(x), and the map
    z. With `kept`, only the pairs that it leaves of z enter the sum."""
    x_TH = x.reshape(-1, HIDDEN)
    logits_TE = x_TH @ router_weight.T
    gates_TE = torch.sigmoid(logits_TE)
    map_TE = logits_TE >= layer.router.thresholds.value
    summed_TE = map_TE if kept is None else kept(gates_TE.detach(), map_TE)
    y_TH = sum(
        (summed_TE[:, i] * gates_TE[:, i]).unsqueeze(1) * mlp(x_TH, *weights)
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


def compare_with_dense(layer: Any, own: int, kept: Kept | None = None) -> torch.Tensor:
    """Output, all gradients and what was counted, against autograd on the dense formula; returns its map.

    Args:
        layer: a MoELayer in training mode.
        own: sequence length on this rank.
        kept: see `dense`; what is counted is the map before it.
    """
    x = inputs(1, own).requires_grad_()
    upstream = inputs(2, own)
    y, bias = layer(x)
    assert bias is None
    y.backward(upstream)

    experts = all_experts(layer)
    x_dense = x.detach().clone().requires_grad_()
    weight = layer.router.weight.detach().clone().requires_grad_()
    dense_experts = [tuple(w.detach().clone().requires_grad_() for w in pair) for pair in experts]
    y_dense, map_TE = dense(layer, x_dense, weight, dense_experts, kept)
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
    from megatron_et.rule.statistics import BatchCounts

    counts = BatchCounts.split(layer.router.statistics.counts, EXPERTS)
    assert counts.usage_E.tolist() == map_TE.sum(0).tolist()
    assert counts.tokens.item() == own * BATCH
    assert counts.fanout_F.tolist() == torch.bincount(fanouts, minlength=EXPERTS + 1).tolist()
    return map_TE


def check_dense_formula(dispatcher: str, uneven: str = "0", shared: str = "yes") -> None:
    """The layer against the dense formula.

    `uneven` gives rank r that many rows more per rank before it, so that ranks hold different numbers of
    tokens; "empty" leaves rank 0 without any. `shared` "no" leaves the shared expert out, "overlap" runs it
    during the dispatch.
    """
    start(expert_model_parallel_size=int(WORLD))
    shared_settings: dict[str, dict[str, Any]] = {
        "yes": {},
        "no": {"moe_shared_expert_intermediate_size": None},
        "overlap": {"moe_shared_expert_overlap": True},
    }
    extra = shared_settings[shared]
    layer = moe_layer(moe_token_dispatcher_type=dispatcher, expert_model_parallel_size=int(WORLD), **extra)
    layer.train()
    rank = torch.distributed.get_rank()
    compare_with_dense(layer, SEQUENCE * rank if uneven == "empty" else SEQUENCE + int(uneven) * rank)


def expert_loads(layer: Any) -> list[torch.Tensor]:
    """The tokens of each local expert at every later call of the layer's experts, appended as they run."""
    loads: list[torch.Tensor] = []
    forward = layer.experts.forward

    def recorded(tokens: Any, tokens_per_expert: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        loads.append(tokens_per_expert.clone())
        return forward(tokens, tokens_per_expert, *args, **kwargs)

    layer.experts.forward = recorded
    return loads


def check_token_dropping(dispatcher: str, policy: str, pad: str) -> None:
    """Megatron's capacity: an expert keeps its best (or first) tokens of each rank, in training and in
    evaluation; what is counted is the load before. Padded, all experts have the same load."""
    from megatron.core.inference.utils import set_decode_expert_padding

    start(expert_model_parallel_size=int(WORLD))
    layer = moe_layer(
        moe_token_dispatcher_type=dispatcher,
        expert_model_parallel_size=int(WORLD),
        moe_router_load_balancing_type="none",
        moe_expert_capacity_factor=0.8,
        moe_token_drop_policy=policy,
        moe_pad_expert_input_to_capacity=pad == "pad",
    )
    capacity = 5  # 0.8 of 24 tokens * 2 / 8 experts, rounded up

    def kept(gates_TE: torch.Tensor, map_TE: torch.Tensor) -> torch.Tensor:
        left_TE = torch.zeros_like(map_TE)
        for e in range(EXPERTS):
            taken = map_TE[:, e].nonzero().flatten().tolist()
            if policy == "probs":
                taken.sort(key=lambda t: -gates_TE[t, e].item())
            left_TE[taken[:capacity], e] = True
        return left_TE

    loads = expert_loads(layer)
    map_TE = compare_with_dense(layer.train(), SEQUENCE, kept)
    load_E = map_TE.sum(0)
    assert (load_E > capacity).any()
    assert (load_E < capacity).any()
    if pad == "pad":
        assert loads[0].tolist() == [capacity * int(WORLD)] * layer.num_local_experts
        assert getattr(layer.token_dispatcher, "cuda_sync_point", "no_sync") == "no_sync"
    else:
        torch.distributed.all_reduce(expected := load_E.clamp(max=capacity))
        assert loads[0].tolist() == expected[layer.local_expert_indices].tolist()

    layer.eval()
    weight, experts = layer.router.weight, all_experts(layer)
    with torch.no_grad():
        x = inputs(3)
        close(layer(x)[0], dense(layer, x, weight, experts, kept)[0])
        if dispatcher == "alltoall" and pad == "pad":
            # --moe-pad-experts-for-cuda-graph-inference: decoding with fixed shapes, nothing dropped.
            set_decode_expert_padding(layer, True, EXPERTS // TOPK)
            close(layer(x)[0], dense(layer, x, weight, experts)[0])
            assert loads[-1].tolist() == [SEQUENCE * BATCH * int(WORLD)] * layer.num_local_experts
            set_decode_expert_padding(layer, False)
            close(layer(x)[0], dense(layer, x, weight, experts)[0])
            assert loads[-1].sum() < loads[-2].sum()


def check_padded_map() -> None:
    """--moe-router-padding-for-quantization: each expert gets a multiple of 16 tokens, the padding at gate 0;
    outputs, gradients and what is counted stay those of the map before it."""
    from megatron.core.transformer.moe import token_dispatcher

    start(expert_model_parallel_size=int(WORLD))
    layer = moe_layer(expert_model_parallel_size=int(WORLD))
    # Afterwards: Megatron asks for FP8 in its configuration, and FP8 for a GPU.
    layer.config.moe_router_padding_for_quantization = True
    token_dispatcher.get_align_size_for_quantization = lambda _: 16
    loads = expert_loads(layer)
    map_TE = compare_with_dense(layer.train(), 16)
    torch.distributed.all_reduce(padded_E := (map_TE.sum(0) + 15) // 16 * 16)
    assert (map_TE.sum(0) % 16 > 0).any()
    assert loads[0].tolist() == padded_E[layer.local_expert_indices].tolist()


def check_expert_parallel_overlap() -> None:
    """--overlap-moe-expert-parallel-comm, with and without --delay-wgrad-compute: a schedule that splits MoE
    layers and puts one micro-batch's forward pass amid another's backward pass gives the same gradients and
    counts, bit for bit, also where no token is routed. (The local linear layers have no weight gradient to
    delay: of the delay, this runs the schedule only.)"""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
    from megatron.core.tensor_parallel.layers import RowParallelLinear
    from megatron.core.transformer.module import Float16Module

    start(expert_model_parallel_size=int(WORLD))
    config = moe_config(
        num_layers=2,
        expert_model_parallel_size=int(WORLD),
        bf16=True,
        params_dtype=torch.bfloat16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        overlap_moe_expert_parallel_comm=True,
    )
    spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)
    torch.manual_seed(99)
    model = GPTModel(config, spec, vocab_size=32, max_sequence_length=SEQUENCE)
    model = Float16Module(config, model).module.train()  # casts what Megatron creates in fp32
    routers = [layer.mlp.router for layer in model.decoder.layers]
    batches = torch.randint(32, (3, BATCH, SEQUENCE)).split(1)
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    events: list[str] = []
    # megatron-core 0.16's local linear layers do not know of a delay.
    delays = (False, True) if hasattr(RowParallelLinear, "backward_dw") else (False,)

    def step(data: Any, model: Any, return_schedule_plan: bool = False) -> Any:
        events.append("split" if return_schedule_plan else "whole")
        tokens = next(data)[0]
        forward = model.build_schedule_plan if return_schedule_plan else model
        output = forward(tokens, positions, None, labels=tokens.roll(-1, 1))
        return output, lambda losses: (losses.float().mean(), {"loss": losses.detach()})

    def run(overlap: bool, delay: bool) -> tuple[dict[str, torch.Tensor], list[torch.Tensor], list[Any]]:
        config.overlap_moe_expert_parallel_comm, config.delay_wgrad_compute = overlap, delay
        config.finalize_model_grads_func = lambda *_, **__: events.append("finalize")
        events.clear()
        for router in routers:
            router.statistics.reset()
        model.zero_grad()
        losses = forward_backward_no_pipelining(
            forward_step_func=step,
            data_iterator=iter(batches),
            model=model,
            num_microbatches=len(batches),
            seq_length=SEQUENCE,
            micro_batch_size=BATCH,
        )
        assert events == ["split" if overlap else "whole"] * len(batches) + ["finalize"]
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        counts = [torch.cat(router.statistics.integer_parts) for router in routers]
        return gradients, counts, [loss["loss"] for loss in losses]

    for cold in (False, True):
        for router in routers:
            router.thresholds.value.copy_(torch.linspace(-0.1, 0.1, EXPERTS))
        if cold:
            routers[1].thresholds.value.fill_(1e9)
        plain = run(overlap=False, delay=False)
        usage = [counts[:EXPERTS] for counts in plain[1]]
        assert (usage[0] > 0).all()
        assert usage[1].any() != cold
        for delay in delays:
            torch.testing.assert_close(run(overlap=True, delay=delay), plain, rtol=0, atol=0)


def check_host_syncs(dispatcher: str) -> None:
    """A layer waits for the device where Megatron's with top-k does, forward and backward, and nowhere
    else."""
    import collections

    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec

    from megatron_et.config import ExpertThresholdConfig
    from tests.host_syncs import host_syncs

    start(expert_model_parallel_size=int(WORLD))
    settings = {"moe_token_dispatcher_type": dispatcher, "expert_model_parallel_size": int(WORLD)}
    config = moe_config(**settings)
    config.expert_threshold = ExpertThresholdConfig()
    build = get_moe_module_spec(use_te=False, num_experts=EXPERTS, moe_grouped_gemm=False)
    plain = build(config=config)
    plain.set_layer_number(1)
    waits = []
    for layer in (plain, moe_layer(**settings)):
        layer.train()
        y, _ = layer(inputs(0))  # whatever happens once
        with host_syncs() as found:
            y, _ = layer(inputs(1).requires_grad_())
            y.sum().backward()
        waits.append(collections.Counter(found))
    assert type(plain.router).__name__ == "TopKRouter"
    assert waits[0], "Megatron copies split sizes to the host, or asks where the map is true"
    added = list((waits[1] - waits[0]).elements())
    # The number of rows to send (before 0.17 with top-k, too). On a GPU Megatron has copied it to the host
    # together with the split sizes by then (dispatch.py), and its one wait is for all of them.
    assert len(added) <= (dispatcher == "alltoall"), added
    assert all(rows.startswith("__index__ at ") and "moe_utils.py" in rows for rows in added), added


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
        rows, _, indices, *_ = permute(tokens, routing_map, num_out_tokens=int(num_out_tokens))
        return rows, RowMap(indices)

    def fused_permute_with_probs(
        tokens: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor, num_out_tokens: int
    ) -> Any:
        assert int(num_out_tokens) > 0, "num_out_tokens > 0"
        calls.append("permute")
        rows, gates, indices, *_ = permute(
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
    layer.config.moe_permute_fusion = True  # afterwards: at its construction Megatron asks for TE
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


def check_batch_boundary() -> None:
    """I4: nothing moves within a step; discard, evaluation, no-grad and recompute leave no trace; ranks agree
    bitwise."""
    import megatron_et
    from megatron_et.moe.synchronize import finish_reduction, routers_of, start_reduction

    start(expert_model_parallel_size=int(WORLD))
    layer = moe_layer(warmup=2, expert_model_parallel_size=int(WORLD), et={"ema_decay": 0.9})
    router = layer.router
    with torch.no_grad():
        router.thresholds.value.zero_()

    def state() -> dict[str, torch.Tensor]:
        return {key: value.clone() for key, value in router.state_dict().items()}

    def same(before: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(value, before[key]) for key, value in router.state_dict().items())

    def untouched() -> bool:
        return not torch.cat(router.statistics.integer_parts).any()

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
        assert router.thresholds.updates_on_host() == router.thresholds.num_updates.item() == step + 1
        k = SEQUENCE * BATCH * TOPK // EXPERTS
        logits = [(x.reshape(-1, HIDDEN) @ router.weight.T).detach() for x in pool]
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
        assert router.last_batch.num_updates.item() == step
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


def check_fused_router(kernels: str = "triton") -> None:
    """--moe-et-kernels triton, in Triton's interpreter, and cuda, compiled for the CPU: a layer routes,
    counts, learns and moves its thresholds as with torch, through warm-up, capacity, padding and
    evaluation."""
    import os

    os.environ["TRITON_INTERPRET"] = "1"
    import megatron_et

    start(expert_model_parallel_size=int(WORLD))
    # What the CUDA kernel leaves to Triton's.
    rest = {"max_fanout": 3, "gate_normalization": "fanout"} if kernels == "triton" else {}
    launches = cuda_on_cpu() if kernels == "cuda" else {}
    layers = [
        moe_layer(
            warmup=2,
            capacity=0.5,
            expert_model_parallel_size=int(WORLD),
            et={"kernels": chosen, **rest},
        )
        for chosen in ("torch", kernels)
    ]
    assert layers[0].router._route is None
    assert layers[1].router._route is not None
    layers[1].load_state_dict(layers[0].state_dict())
    for step in range(4):
        seen = []
        for layer in layers:
            layer.train().zero_grad()
            x = inputs(step).requires_grad_()
            padded = torch.zeros(BATCH, SEQUENCE, dtype=torch.bool)
            padded[0, -step:] = step > 0
            y, _ = layer(x, padding_mask=padded)
            y.square().mean().backward()
            counts = torch.cat(layer.router.statistics.integer_parts).clone()
            megatron_et.finalize_thresholds(layer)
            with torch.no_grad():
                evaluated = layer.eval()(inputs(99))[0]
            seen.append(
                (
                    y,
                    x.grad,
                    layer.router.weight.grad,
                    evaluated,
                    layer.router.thresholds.value.clone(),
                    counts,
                )
            )
        (*torchs, torchs_counts), (*fused, fused_counts) = seen
        assert torch.equal(torchs_counts, fused_counts)
        for expected, actual in zip(torchs, fused, strict=True):
            close(actual, expected)
    # Routes in training and in evaluation, each step; finds the bounds in training, in three launches.
    assert launches == ({"route.cu": 8, "select.cu": 12} if kernels == "cuda" else {})


def cuda_on_cpu() -> dict[str, int]:
    """Lets the CUDA kernels run on the CPU in this process; returns where their launches are counted."""
    import tempfile
    from pathlib import Path

    from tests.kernels.cuda_on_cpu import OnCpu

    return OnCpu(Path(tempfile.mkdtemp()), pytest.MonkeyPatch()).launches


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
    from megatron_et.rule.statistics import BatchCounts

    start()
    for warmup in (0, 1):
        layer = moe_layer(warmup=warmup)
        x = inputs(1)
        mask = torch.zeros(BATCH, SEQUENCE, dtype=torch.bool)
        mask[:, 9:] = True
        layer(x, padding_mask=mask)
        padded = BatchCounts.split(layer.router.statistics.counts.clone(), EXPERTS)
        estimate = layer.router.statistics.integer_parts[1].clone()
        layer.router.statistics.reset()
        layer(x[:9].contiguous())
        plain = BatchCounts.split(layer.router.statistics.counts, EXPERTS)
        assert padded.tokens.item() == 9 * BATCH
        for name in BatchCounts.__dataclass_fields__:
            assert torch.equal(getattr(padded, name), getattr(plain, name)), name
        assert torch.equal(estimate, layer.router.statistics.integer_parts[1])


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


def check_foreign_routers() -> None:
    """A layer spec with a router of its own, or with settings that the dispatcher does not see, is refused;
    one that names our router is as good as one that leaves it to us."""
    import dataclasses
    import functools

    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_et.config import ConfigError, ExpertThresholdConfig
    from megatron_et.moe.router import ExpertThresholdRouter

    start()
    layer = moe_layer()
    config = layer.config

    def build(router: Any) -> Any:
        return MoELayer(config, dataclasses.replace(layer.submodules, router=router), layer_number=1)

    class Foreign(TopKRouter): ...

    with pytest.raises(ConfigError, match="brings its own router Foreign: use a spec"):
        build(Foreign)
    assert type(build(ExpertThresholdRouter).router) is ExpertThresholdRouter
    assert type(build(functools.partial(ExpertThresholdRouter)).router) is ExpertThresholdRouter
    other = ExpertThresholdConfig(router_type="expert-threshold", warmup_steps=7)
    with pytest.raises(ConfigError, match=r"warmup_steps=7.*set config.expert_threshold"):
        build(functools.partial(ExpertThresholdRouter, et_config=other))
    # Without settings on the config Megatron's own dispatchers would take what fixed top-k fills.
    del config.expert_threshold
    with pytest.raises(ConfigError, match=r"set config.expert_threshold"):
        build(functools.partial(ExpertThresholdRouter, et_config=other))
    config.expert_threshold = other
    assert build(functools.partial(ExpertThresholdRouter, et_config=other)).router.et_config == other


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
