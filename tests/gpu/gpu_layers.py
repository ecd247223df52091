"""Cases on Megatron's real MoELayer on one GPU: `torchrun -m tests.gpu.gpu_layers RESULTS CASE...`.

test_layer_gpu.py starts it. Every case appends a line {"case", "error"} to RESULTS. With MEGATRON_ET_CPU=1
the cases of the layouts without Transformer Engine run on the CPU backend, for work on this file without a
GPU (no_host_synchronisation excepted).

Dimension letters: T tokens, H hidden size, E experts, F hidden size of an expert.
"""

import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_et.run import cpu

# An odd number of tokens, so that no expert's load is a multiple of a kernel's tile.
SEQUENCE, BATCH, HIDDEN, FFN, EXPERTS, TOPK = 33, 3, 128, 192, 8, 2
TOKENS = SEQUENCE * BATCH

type Precision = Literal["fp32", "bf16"]
type Tensors = dict[str, torch.Tensor]
type Pair = tuple[torch.Tensor, torch.Tensor]
type Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

TOLERANCE: dict[Precision, float] = {
    # fp32 (test_layer_gpu.py switches TF32 off): 2^-24 a rounding, sums of up to 192 products and 99 tokens.
    "fp32": 2e-5,
    # A bf16 rounding is off by 2^-9 = 0.2 % at most and 0.1 % on average, and about ten of them lie between
    # a row and its reference: both GEMMs, the activation, the product with the gate, the sum over experts,
    # and the same backwards. On the CPU the worst row of any tensor is off by 1.1 %, and one lost pair of
    # token and expert, whichever it is, moves some row by more than 50 %.
    "bf16": 3e-2,
}


@dataclass(frozen=True)
class Layout:
    """How a MoELayer computes: what Transformer Engine and Megatron offer on one GPU."""

    experts: Literal["TEGroupedMLP", "TE SequentialMLP", "local SequentialMLP"]
    dispatcher: Literal["alltoall", "allgather"]
    permute_fusion: bool = False
    shared_expert_overlap: bool = False
    router_padding: bool = False
    """--moe-router-padding-for-quantization"""

    @property
    def needs_te(self) -> bool:
        """Whether Transformer Engine takes part."""
        return self.experts != "local SequentialMLP"

    def __str__(self) -> str:
        extras = {
            "permute fusion": self.permute_fusion,
            "shared expert overlap": self.shared_expert_overlap,
            "router padding": self.router_padding,
        }
        return ", ".join([self.experts, self.dispatcher, *(name for name, on in extras.items() if on)])

    @property
    def id(self) -> str:
        """For names of tests."""
        return str(self).replace(", ", "-").replace(" ", "-")


def all_layouts() -> Iterator[Layout]:
    """Every layout that the tests go through."""
    for dispatcher in ("alltoall", "allgather"):
        for experts in ("TEGroupedMLP", "TE SequentialMLP"):
            for fusion in (False, True):
                yield Layout(experts, dispatcher, fusion)
        yield Layout("local SequentialMLP", dispatcher)
    yield Layout("TEGroupedMLP", "alltoall", permute_fusion=True, shared_expert_overlap=True)


LAYOUTS = list(all_layouts())


def start() -> None:
    """torch.distributed with one process, Megatron's groups and RNG."""
    if cpu.requested():
        cpu.install()
    torch.cuda.set_device(0)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    import megatron_et

    megatron_et.install()
    torch.distributed.init_process_group("gloo" if cpu.requested() else "nccl")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(7)


def normal(seed: int, *shape: int) -> torch.Tensor:
    """Drawn on the CPU, so that every layout and device sees the same numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(seed: int, precision: Precision, sequence: int = SEQUENCE, batch: int = BATCH) -> torch.Tensor:
    """[sequence, batch, H]."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return normal(seed, sequence, batch, HIDDEN).to(torch.cuda.current_device(), dtype)


def moe_layer(
    layout: Layout,
    precision: Precision,
    *,
    et: dict[str, Any] | None = None,
    delay_weight_gradients: bool = False,
    **config: Any,
) -> Any:
    """A MoELayer with a shared expert, as a GPT has it, with weights that depend on nothing but their
    place."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_et import ExpertThresholdConfig, ExpertThresholdRouter

    grouped = layout.experts == "TEGroupedMLP"
    settings: dict[str, Any] = {
        "num_layers": 1, "hidden_size": HIDDEN, "num_attention_heads": 2, "num_moe_experts": EXPERTS,
        "moe_router_topk": TOPK, "moe_ffn_hidden_size": FFN, "moe_shared_expert_intermediate_size": FFN,
        "moe_token_dispatcher_type": layout.dispatcher, "moe_grouped_gemm": grouped,
        "moe_permute_fusion": layout.permute_fusion,
        "moe_shared_expert_overlap": layout.shared_expert_overlap,
        "moe_router_padding_for_quantization": layout.router_padding,
        "transformer_impl": "transformer_engine" if layout.needs_te else "local",
        "add_bias_linear": False, "gated_linear_unit": True, "activation_func": torch.nn.functional.silu,
        "bias_activation_fusion": False, "gradient_accumulation_fusion": False,
        "bf16": precision == "bf16",
        "params_dtype": torch.bfloat16 if precision == "bf16" else torch.float32,
    } | config  # fmt: skip
    transformer_config = TransformerConfig(**settings)
    # Not through the constructor: Megatron then asks for the overlapped schedule, which takes several GPUs.
    transformer_config.delay_wgrad_compute = delay_weight_gradients
    transformer_config.expert_threshold = ExpertThresholdConfig(
        router_type="expert-threshold", **{"warmup_steps": 0, "kernels": "torch"} | (et or {})
    )
    build = get_moe_module_spec(use_te=layout.needs_te, num_experts=EXPERTS, moe_grouped_gemm=grouped)
    layer = build(config=transformer_config).cuda()
    layer.set_layer_number(3)
    assert isinstance(layer.router, ExpertThresholdRouter)
    with torch.no_grad():
        layer.router.weight.copy_(normal(0, EXPERTS, HIDDEN) / HIDDEN**0.5)
        # Logits are about standard normal: tokens with 0, 1 and many experts all occur.
        layer.router.thresholds.value.copy_(torch.linspace(0.0, 2.0, EXPERTS))
        for place, (fc1, fc2) in enumerate([*expert_weights(layer), shared_weights(layer)]):
            fc1.copy_(normal(100 + place, *fc1.shape) / HIDDEN**0.5)
            fc2.copy_(normal(200 + place, *fc2.shape) * 2.0 / FFN**0.5)
    return layer.train()


def expert_weights(layer: Any) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """(fc1 [2F, H], fc2 [H, F]) of every expert; all are on this rank."""
    experts = layer.experts
    if hasattr(experts, "local_experts"):
        return [(e.linear_fc1.weight, e.linear_fc2.weight) for e in experts.local_experts]
    return [
        (getattr(experts.linear_fc1, f"weight{i}"), getattr(experts.linear_fc2, f"weight{i}"))
        for i in range(EXPERTS)
    ]


def shared_weights(layer: Any) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """(fc1, fc2) of the shared expert."""
    return layer.shared_experts.linear_fc1.weight, layer.shared_experts.linear_fc2.weight


def run_layer(
    layer: Any,
    x: torch.Tensor,
    upstream: torch.Tensor,
    forward_context: AbstractContextManager[Any] | None = None,
) -> tuple[Tensors, torch.Tensor]:
    """Output and all gradients of the layer by name, and the routing map [T, E] that it used."""
    maps: list[torch.Tensor] = []
    # A copy: --moe-router-padding-for-quantization writes into the map.
    hook = layer.router.register_forward_hook(lambda _module, _inputs, routed: maps.append(routed[1].clone()))
    x = x.clone().requires_grad_()
    with forward_context or nullcontext():
        y, bias = layer(x)
    y.backward(upstream)
    if layer.config.delay_wgrad_compute:
        # TE hands out the gradients' memory before it has computed them.
        for weight in (weight for pair in expert_weights(layer) for weight in pair):
            if weight.grad is not None:
                weight.grad.fill_(torch.nan)
        layer.experts.backward_dw()
        layer.shared_experts.backward_dw()
    hook.remove()
    assert bias is None
    return {"output": y.detach(), "input gradient": gradient(x)} | weight_gradients(
        layer.router.weight, expert_weights(layer), shared_weights(layer)
    ), maps[0]


def weight_gradients(router: torch.Tensor, experts: Sequence[Pair], shared: Pair) -> Tensors:
    """Gradients of all weights; those of the experts stacked to [E, ...]."""
    return {
        "router gradient": gradient(router),
        "fc1 gradient": torch.stack([gradient(fc1) for fc1, _ in experts]),
        "fc2 gradient": torch.stack([gradient(fc2) for _, fc2 in experts]),
        "shared fc1 gradient": gradient(shared[0]),
        "shared fc2 gradient": gradient(shared[1]),
    }


def gradient(tensor: torch.Tensor) -> torch.Tensor:
    """An expert without tokens may have no gradient instead of zeros."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def run_formula(
    layer: Any,
    x: torch.Tensor,
    upstream: torch.Tensor,
    map_TE: torch.Tensor,
    linear: Linear = torch.nn.functional.linear,
) -> Tensors:
    """The same from the dense formula in fp64, every expert on every token, by autograd:
    y = sum_i z * sigmoid(r) * expert_i(x) + shared(x), `linear` for the products with an expert's weights.

    The map is given, since a logit within a rounding of its threshold may fall on either side; here it is
    checked that no other logit did.
    """

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().double().requires_grad_()

    x = leaf(x)
    router = leaf(layer.router.weight)
    experts = [(leaf(fc1), leaf(fc2)) for fc1, fc2 in expert_weights(layer)]
    fc1, fc2 = shared_weights(layer)
    shared = (leaf(fc1), leaf(fc2))

    x_TH = x.reshape(-1, HIDDEN)
    logits_TE = x_TH @ router.T
    distance_TE = logits_TE.detach() - layer.router.thresholds.value
    assert torch.equal(map_TE, (distance_TE >= 0).where(distance_TE.abs() > 1e-4, map_TE))
    gates_TE = map_TE * torch.sigmoid(logits_TE)
    y_TH = mlp(x_TH, *shared, None, linear) + sum(
        mlp(x_TH, *pair, gates_TE[:, i, None], linear) for i, pair in enumerate(experts)
    )
    y = y_TH.reshape(x.shape)
    y.backward(upstream.double())
    return {"output": y.detach(), "input gradient": gradient(x)} | weight_gradients(router, experts, shared)


def mlp(
    x_TH: torch.Tensor, fc1: torch.Tensor, fc2: torch.Tensor, gates_T1: torch.Tensor | None, linear: Linear
) -> torch.Tensor:
    """Gated SiLU expert; its gates, if it has any, before the second product, as in Megatron."""
    gate_TF, up_TF = linear(x_TH, fc1).chunk(2, dim=-1)
    activation_TF = torch.nn.functional.silu(gate_TF) * up_TF
    return linear(activation_TF if gates_T1 is None else gates_T1 * activation_TF, fc2)


def assert_close(actual: Tensors, expected: Tensors, precision: Precision) -> None:
    """Error of the worst row of every tensor, relative to the row, or to the rows' root mean square where
    that is larger (rows cancel, and those of cold experts are 0)."""
    assert actual.keys() == expected.keys()
    errors = {}
    for name, wanted in expected.items():
        size = wanted.norm(dim=-1)
        error = (actual[name].double() - wanted).norm(dim=-1)
        assert error.isfinite().all(), f"{name} is not finite"
        # Where all rows are 0, the error itself.
        errors[name] = (error / size.clamp(min=size.square().mean().sqrt() or 1.0)).max().item()
    print(precision, {name: f"{error:.2e}" for name, error in errors.items()}, flush=True)
    too_large = {name: error for name, error in errors.items() if error > TOLERANCE[precision]}
    assert not too_large, f"relative errors above {TOLERANCE[precision]}: {too_large}"


def dense_formula(layout: Layout, precision: Precision) -> None:
    """Output and gradients against the formula; the counts against the map; evaluation routes the same."""
    from megatron_et.rule.statistics import BatchCounts

    layer = moe_layer(layout, precision)
    x, upstream = inputs(1, precision), inputs(2, precision)
    actual, map_TE = run_layer(layer, x, upstream)
    assert_close(actual, run_formula(layer, x, upstream, map_TE), precision)
    fanout_T = map_TE.sum(1)
    assert (fanout_T == 0).any()
    assert (fanout_T > TOPK).any()
    counts = BatchCounts.split(layer.router.statistics.counts, EXPERTS)
    assert counts.usage_E.tolist() == map_TE.sum(0).tolist()
    assert counts.fanout_F.tolist() == torch.bincount(fanout_T, minlength=EXPERTS + 1).tolist()
    assert counts.tokens.item() == TOKENS
    layer.eval()
    with torch.no_grad():
        gates_TE, eval_map_TE = layer.router(x)
        y, _ = layer(x)
    assert torch.equal(eval_map_TE, map_TE)
    assert gates_TE.dtype == torch.float32
    assert not gates_TE[~eval_map_TE].any()
    assert_close({"output": y}, {"output": actual["output"].double()}, precision)


COLD = {"one expert": range(1), "half of the experts": range(EXPERTS // 2), "all experts": range(EXPERTS)}


def cold_experts(layout: Layout, which: str) -> None:
    """No token reaches these experts: forward and backward run and are right."""
    cold = COLD[which]
    layer = moe_layer(layout, "bf16")
    layer.router.thresholds.value[list(cold)] = 1e9
    x, upstream = inputs(3, "bf16"), inputs(4, "bf16")
    actual, map_TE = run_layer(layer, x, upstream)
    assert not map_TE[:, list(cold)].any()
    assert_close(actual, run_formula(layer, x, upstream, map_TE), "bf16")


def delayed_weight_gradients(layout: Layout, which: str) -> None:
    """--delay-wgrad-compute: the same bits as without, where no token reaches these experts."""
    x, upstream = inputs(7, "bf16"), inputs(8, "bf16")
    results = []
    with deterministic():
        for delay in (False, True):
            layer = moe_layer(layout, "bf16", delay_weight_gradients=delay)
            layer.router.thresholds.value[list(COLD[which])] = 1e9
            tensors, map_TE = run_layer(layer, x, upstream)
            assert not map_TE[:, list(COLD[which])].any()
            results.append(tensors)
    plain, delayed = results
    different = [name for name in plain if not torch.equal(plain[name], delayed[name])]
    assert not different, f"not bitwise equal: {different}"


@contextmanager
def deterministic() -> Iterator[None]:
    """As Megatron's --deterministic-mode: without it, the unfused permutation adds with atomics."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def recompute(layout: Layout, which: str) -> None:
    """Activation recompute changes no bit of the output, the gradients and the statistics."""
    module, _, kernels = which.partition(", kernels ")
    et = {"warmup_steps": 1} | ({"kernels": kernels, "warmup_steps": 0} if kernels else {})
    x, upstream = inputs(5, "bf16"), inputs(6, "bf16")
    results = []
    with deterministic():
        for extra in ({}, {"recompute_granularity": "selective", "recompute_modules": [module]}):
            layer = moe_layer(layout, "bf16", et=et, **extra)
            tensors, _ = run_layer(layer, x, upstream)
            results.append(tensors | {"counts": layer.router.statistics.counts})
    plain, recomputed = results
    different = [name for name in plain if not torch.equal(plain[name], recomputed[name])]
    assert not different, f"not bitwise equal: {different}"


BOUNDARY: dict[str, dict[str, Any]] = {
    "microbatch pool": {},
    "global pool": {"pool": "global"},
}


def batch_boundary(layout: Layout, which: str) -> None:
    """Warm-up loads are exactly k; statistics and thresholds are those of the same logits on the CPU."""
    import megatron_et
    from megatron_et.rule.statistics import RouterStatistics
    from megatron_et.rule.threshold import ThresholdEMA

    settings = BOUNDARY[which]
    layer = moe_layer(layout, "bf16", et={"warmup_steps": 2, "ema_decay": 0.9} | settings)
    router = layer.router
    with torch.no_grad():
        router.thresholds.value.zero_()
    thresholds = ThresholdEMA(EXPERTS, 0.9, device="cpu")
    statistics = RouterStatistics(EXPERTS, TOPK, device="cpu")
    k = TOKENS * TOPK // EXPERTS
    for step in range(4):
        for micro_batch in range(2):
            x = inputs(10 * step + micro_batch, "bf16")
            with torch.no_grad():
                logits_TE = router.gating(x).reshape(TOKENS, EXPERTS).float()
            _, map_TE = run_layer(layer, x, inputs(99, "bf16"))
            if step < 2:
                assert map_TE.sum(0).tolist() == [k] * EXPERTS
            statistics.add(logits_TE.cpu(), map_TE.cpu(), thresholds)
        assert torch.equal(router.thresholds.value.cpu(), thresholds.value)
        megatron_et.finalize_thresholds(layer)
        assert router.thresholds.updates_on_host() == router.thresholds.num_updates.item() == step + 1
        integers = torch.cat(statistics.integer_parts)
        counts, cutoffs_E, _, _ = statistics.reduced(integers, thresholds.last_cutoff)
        record = router.last_batch
        assert record.num_updates.item() == step
        assert torch.equal(record.cutoffs_E.cpu(), cutoffs_E)
        assert record.counts.usage_E.tolist() == counts.usage_E.tolist()
        thresholds.update(cutoffs_E)
        statistics.reset()
    for name, buffer in router.thresholds.state_dict().items():
        assert torch.equal(buffer.cpu(), thresholds.state_dict()[name]), name


def no_host_synchronisation(layout: Layout) -> None:
    """Gating, routing, counting and the reduction at the batch's end never wait for the GPU."""
    from megatron_et.moe.synchronize import commit, finish_reduction, routers_of, start_reduction

    layer = moe_layer(layout, "bf16")
    x = inputs(1, "bf16").requires_grad_()

    def batch() -> None:
        gates_TE, _ = layer.router(x)
        gates_TE.sum().backward()
        finish_reduction(start_reduction(routers_of(layer)))

    # Once before, for what libraries set up at their first call.
    batch()
    commit([layer.router])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    commit([layer.router])
    assert layer.router.thresholds.updates_on_host() == 2


@dataclass(frozen=True)
class Case:
    """One check on one layout."""

    check: Callable[..., None]
    layout: Layout
    variant: str | None = None
    """The check's other argument, if it has one."""
    missing: str | None = None
    """What this machine's GPU lacks for it."""

    @property
    def id(self) -> str:
        """Name of the test and of the case on the command line."""
        words = [self.check.__name__, self.layout.id, self.variant or ""]
        return "-".join(word.replace(" ", "-") for word in words if word)

    def run(self) -> None:
        """Raises when something is wrong."""
        self.check(self.layout, *([] if self.variant is None else [self.variant]))


def all_cases() -> Iterator[Case]:
    """Every case that test_layer_gpu.py runs."""
    for layout in LAYOUTS:
        for precision in TOLERANCE:
            yield Case(dense_formula, layout, precision)
        for which in COLD:
            yield Case(cold_experts, layout, which)
        yield Case(recompute, layout, "moe")
        if layout.experts == "TEGroupedMLP":  # Megatron has it for grouped GEMMs only
            yield Case(recompute, layout, "moe_act")
            for which in ("one expert", "all experts"):
                yield Case(delayed_weight_gradients, layout, which)
    # What does not depend on how tokens travel.
    for experts in ("TEGroupedMLP", "local SequentialMLP"):
        layout = next(layout for layout in LAYOUTS if layout.experts == experts)
        for kernels in ("triton", "cuda"):
            yield Case(recompute, layout, f"moe, kernels {kernels}")
        for which in BOUNDARY:
            yield Case(batch_boundary, layout, which)
        yield Case(no_host_synchronisation, layout)


CASES = {case.id: case for case in all_cases()}


def usable_gpu() -> bool:
    """Whether the GPU still answers: some errors (an illegal access) are final for the process."""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=torch.cuda.current_device()).item()
    except RuntimeError:
        return False
    return True


def main(cases: Mapping[str, Case], results: Path, names: Sequence[str]) -> None:
    """Run cases one after the other; stop after one that took the GPU's context down."""
    start()
    for name in names:
        print(f"case {name}", flush=True)
        error = None
        try:
            cases[name].run()
            torch.cuda.synchronize()
        except Exception:
            error = traceback.format_exc()
            print(error, flush=True)
        with results.open("a") as file:
            file.write(json.dumps({"case": name, "error": error}) + "\n")
        if error is not None and not usable_gpu():
            sys.exit("the GPU's context is lost")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(CASES, Path(sys.argv[1]), sys.argv[2:])
