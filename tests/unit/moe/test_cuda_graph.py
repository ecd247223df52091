"""The router inside a CUDA graph, without a GPU: operations recorded once (tests/tape.py) and run again in
all phases of the capacity schedule, bit for bit what an eager router does.

Dimension letters: T tokens, E experts.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_et.config import ConfigError, ExpertThresholdConfig
from megatron_et.moe import cuda_graphs
from megatron_et.moe.compatibility import check, violations
from megatron_et.rule.quantile import capacity_bounds
from tests.captured import ANNEAL, EXPERTS, SCHEDULES, TOKENS, WARMUP, memory, router
from tests.tape import Tape, record

# Megatron says at every import what is not installed.
pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:megatron\.")


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")


def draw(seed: int) -> torch.Tensor:
    """[T, E] logits with some ties; wider and further off with every seed."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(TOKENS, EXPERTS, generator=generator) * (1 + seed / 10) + seed / 20).round(decimals=2)


def steps_that_differ(
    captured: Any, eager: Any, monkeypatch: pytest.MonkeyPatch, *, capture_at: int = 0
) -> list[int]:
    """Steps of a short training in which replays of one recording and an eager router are not bitwise equal.

    The third step is skipped, and before the fifth both routers load the state that they have.
    """
    from megatron_et.moe.synchronize import commit, discard, finish_reduction, start_reduction, uncounted

    static_TE = draw(0)
    replayed: tuple[Tape, tuple[torch.Tensor, torch.Tensor]] | None = None
    different = set()
    for step in range(WARMUP + ANNEAL + 4):
        if step == capture_at:
            with uncounted([captured]):
                replayed = record(lambda: captured.routing(static_TE), monkeypatch)
            addresses = [tensor.data_ptr() for tensor in memory(captured)]
            assert replayed[0].outside_memory() <= {*addresses, static_TE.data_ptr()}
        if step == 4:
            for one in (captured, eager):
                one.load_state_dict({name: t.clone() for name, t in one.state_dict().items()})
        for micro_batch in range(2):
            logits_TE = draw(10 * step + micro_batch)
            if replayed is None:
                gates_TE, map_TE = captured.routing(logits_TE)
            else:
                tape, (gates_TE, map_TE) = replayed
                with torch.no_grad():
                    static_TE.copy_(logits_TE)
                tape.replay()
            wanted_gates_TE, wanted_map_TE = eager.routing(logits_TE)
            if not (torch.equal(gates_TE, wanted_gates_TE) and torch.equal(map_TE, wanted_map_TE)):
                different.add(step)
        for one in (captured, eager):
            finish_reduction(start_reduction([one]))
            discard([one]) if step == 2 else commit([one])
        records = [one.last_batch for one in (captured, eager)]
        if step == 2:
            assert records == [None, None]
        else:
            assert records[0].num_updates == records[1].num_updates
            counted = [torch.cat([part.view(-1) for part in vars(r.counts).values()]) for r in records]
            if not torch.equal(*counted):
                different.add(step)
        if not all(torch.equal(a, b) for a, b in zip(memory(captured), memory(eager), strict=True)):
            different.add(step)
        assert captured.thresholds.updates_on_host() == eager.thresholds.updates_on_host()
        if replayed is not None:
            assert [tensor.data_ptr() for tensor in memory(captured)] == addresses
    return sorted(different)


@pytest.mark.parametrize("capture_at", [0, 1, WARMUP + 1, WARMUP + ANNEAL + 2])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_recording_routes_and_counts_in_every_phase(
    schedule: str, capture_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured, eager = (router(graph, **SCHEDULES[schedule]) for graph in (True, False))
    assert steps_that_differ(captured, eager, monkeypatch, capture_at=capture_at) == []


@pytest.mark.parametrize(
    "megatron",
    [
        {"moe_expert_capacity_factor": 1.0},
        {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_what_megatron_adds_after_the_routing_is_recorded_too(
    megatron: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    captured, eager = (router(graph, megatron) for graph in (True, False))
    assert steps_that_differ(captured, eager, monkeypatch) == []


def test_a_graph_captured_after_the_warm_up_selects_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a resume, where the number of batches comes from the checkpoint."""
    captured = router(True, **SCHEDULES["anneal"])
    static_TE = draw(0)
    assert record(lambda: captured.routing(static_TE), monkeypatch)[0].names & {"sort", "topk"}
    state = captured.state_dict()
    state["thresholds.num_updates"] = torch.tensor([WARMUP + ANNEAL])
    captured.load_state_dict(state)
    # Before Megatron captures it runs the router, which reads the number once.
    captured.routing(static_TE)
    assert not record(lambda: captured.routing(static_TE), monkeypatch)[0].names & {"sort", "topk"}


def test_the_plain_switch_costs_what_it_costs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = router(True)
    names = record(lambda: captured.routing(draw(0)), monkeypatch)[0].names
    assert "topk" in names
    assert "sort" not in names


def test_evaluation_has_no_bounds_and_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = router(True).eval()
    tape, _ = record(lambda: captured.routing(draw(0)), monkeypatch)
    assert not tape.names & {"sort", "topk"}
    assert not any(tensor.any() for tensor in captured.statistics.integer_parts)


# --- bounds ---


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("capacity", [0.0, 0.3, 1.0, 2.5])
def test_bounds_of_a_capacity_on_the_device(capacity: float, masked: bool) -> None:
    logits_TE = draw(3)
    mask_T = (torch.arange(TOKENS) % 5 == 0) if masked else None
    k = 12 if mask_T is None else (~mask_T).sum() // 4
    for found, wanted in zip(
        capacity_bounds(logits_TE, k, torch.tensor([capacity], dtype=torch.float64), padding_mask_T=mask_T),
        capacity_bounds(logits_TE, k, capacity, padding_mask_T=mask_T),
        strict=True,
    ):
        assert torch.equal(found, wanted)


# --- passes that warm up a graph ---


@pytest.mark.parametrize("fails", [False, True])
def test_warming_up_a_graph_leaves_no_trace(fails: bool) -> None:
    from megatron_et.host import graphs, seam

    assert seam.find("megatron.core.transformer.cuda_graphs", "TECudaGraphHelper.create_cudagraphs")
    one = router(True)
    one.routing(draw(1))
    before = [tensor.clone() for tensor in memory(one)]
    assert before[-2].any()

    def megatrons(helper: Any) -> str:
        assert helper.model == [one]
        for _ in range(3):
            one.routing(draw(2))
        assert not torch.equal(one.statistics.counts, before[-3])
        if fails:
            raise RuntimeError("out of memory")
        return "captured"

    create = graphs._create_cudagraphs(megatrons)
    if fails:
        with pytest.raises(RuntimeError):
            create(SimpleNamespace(model=[one]))
    else:
        assert create(SimpleNamespace(model=[one])) == "captured"
    assert all(torch.equal(a, b) for a, b in zip(memory(one), before, strict=True))


# --- settings ---


class Scope:
    """A member of Megatron's CudaGraphScope or CudaGraphModule."""

    def __init__(self, name: str) -> None:
        self.name = name


def settings(**names: Any) -> SimpleNamespace:
    return SimpleNamespace(num_experts=8, **names)


TE, LOCAL = {"cuda_graph_impl": "transformer_engine"}, {"cuda_graph_impl": "local"}
HOLD_NO_ROUTER: list[dict[str, Any]] = [
    {},
    {"cuda_graph_impl": "none", "cuda_graph_scope": "full"},
    {"cuda_graph_impl": "none", "cuda_graph_scope": ["full_iteration_inference"]},
    TE | {"cuda_graph_modules": ["attn"]},
    TE | {"cuda_graph_scope": "attn,mlp"},
    TE | {"cuda_graph_modules": [], "cuda_graph_scope_deprecated": [Scope("attn"), "mamba"]},
    {"external_cuda_graph": True, "cuda_graph_scope": [Scope("attn")]},
    LOCAL | {"hybrid_layer_pattern": "M*E-", "cuda_graph_modules": ["attn", "mamba"]},
    LOCAL | {"is_hybrid_model": True, "cuda_graph_scope": [Scope("mlp")]},
    {"enable_cuda_graph": True, "hybrid_override_pattern": "M*E-", "cuda_graph_scope": ["mamba"]},
]
HOLD_ROUTER: list[dict[str, Any]] = [
    TE | {"cuda_graph_modules": ["moe_router"]},
    TE | {"cuda_graph_modules": [Scope("attn"), Scope("moe_router")]},
    TE | {"cuda_graph_scope": Scope("moe_router")},
    TE | {"cuda_graph_scope": "attn,moe_router", "cuda_graph_modules": []},
    TE | {"cuda_graph_scope_deprecated": ["mamba", "moe_router"], "cuda_graph_modules": []},
    {"external_cuda_graph": True, "cuda_graph_impl": "none", "cuda_graph_scope": ["moe_router"]},
]
WHOLE, LAYER = "--cuda-graph-impl full_iteration", "--cuda-graph-impl local"
EMPTY = "--cuda-graph-modules / --cuda-graph-scope without a value"
DISPATCHER = "--cuda-graph-modules / --cuda-graph-scope with moe or moe_preprocess"
ROUTER_SCOPE = {"cuda_graph_modules": ["moe_router"]}
REFUSED: list[tuple[str, dict[str, Any]]] = [
    (WHOLE, {"cuda_graph_impl": "full_iteration"}),
    (WHOLE, LOCAL | {"cuda_graph_scope": [Scope("full_iteration")]}),
    (WHOLE, LOCAL | {"cuda_graph_scope": "full_iteration_inference", "is_hybrid_model": True}),
    (WHOLE, {"cuda_graph_impl": "none", "cuda_graph_modules": ["full_iteration"]}),
    (LAYER, LOCAL),
    (LAYER, LOCAL | {"cuda_graph_scope": "full", "is_hybrid_model": True}),
    (LAYER, LOCAL | {"cuda_graph_modules": ["attn"]}),
    (LAYER, LOCAL | ROUTER_SCOPE),
    (LAYER, LOCAL | ROUTER_SCOPE | {"is_hybrid_model": True}),
    (LAYER, {"enable_cuda_graph": True, "cuda_graph_impl": "none", "cuda_graph_scope": []}),
    (
        LAYER,
        LOCAL
        | {"is_hybrid_model": True, "cuda_graph_modules": ["attn"], "inference_cuda_graph_scope": "block"},
    ),
    (LAYER, LOCAL | {"is_hybrid_model": True, "cuda_graph_modules": ["attn"], "mtp_num_layers": 1}),
    (EMPTY, TE),
    (EMPTY, TE | {"cuda_graph_modules": []}),
    (EMPTY, TE | {"cuda_graph_scope": "full"}),
    (EMPTY, TE | {"cuda_graph_scope": ["full"]}),
    (EMPTY, {"external_cuda_graph": True, "cuda_graph_impl": "none", "cuda_graph_scope": ""}),
    (DISPATCHER, TE | {"cuda_graph_modules": ["moe"]}),
    (DISPATCHER, TE | {"cuda_graph_scope": [Scope("moe_router"), Scope("moe_preprocess")]}),
    (DISPATCHER, TE | {"cuda_graph_scope_deprecated": ["attn", "moe"]}),
]


@pytest.mark.parametrize("chosen", HOLD_NO_ROUTER, ids=str)
def test_scopes_outside_the_router_are_accepted(chosen: dict[str, Any]) -> None:
    assert violations(settings(**chosen)) == []
    assert not cuda_graphs.captures_router(settings(**chosen))


@pytest.mark.parametrize("chosen", HOLD_ROUTER, ids=str)
def test_the_routers_scope_is_accepted_and_known(chosen: dict[str, Any]) -> None:
    assert violations(settings(**chosen)) == []
    assert cuda_graphs.captures_router(settings(**chosen))


@pytest.mark.parametrize(("flag", "chosen"), REFUSED, ids=str)
def test_other_scopes_are_refused(flag: str, chosen: dict[str, Any]) -> None:
    (sentence,) = violations(settings(**chosen))
    assert sentence.startswith(f"{flag} cannot be combined")


def test_a_global_pool_is_refused_inside_a_graph_only() -> None:
    et = ExpertThresholdConfig(router_type="expert-threshold", pool="global")
    with pytest.raises(ConfigError, match="--moe-et-pool global with a CUDA graph of moe_router cannot be"):
        check(settings(**HOLD_ROUTER[0]), et)
    check(settings(**HOLD_NO_ROUTER[3]), et)


def test_megatrons_own_enums_are_read() -> None:
    routed = router(True)
    assert cuda_graphs.scopes(routed.config) == {"attn", "moe_router"}
    assert not cuda_graphs.captures_router(router(False).config)
