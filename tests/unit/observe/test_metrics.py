"""Metrics, their packed form and the trace, against numbers counted in Python loops.

T tokens, E experts, F = E + 1 fan-outs, L layers, W numbers of a packed layer.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_et.config import ExpertThresholdConfig
from megatron_et.observe import trace as traces
from megatron_et.observe.alarms import Monitor
from megatron_et.observe.metrics import METRICS, LayerBatch, overall, pack, width
from megatron_et.observe.trace import ALARM_TEXT
from megatron_et.rule.schedule import phase as phase_at
from megatron_et.rule.statistics import BatchCounts, BatchRecord
from tests.megatron_here import needs_training

# Megatron says at every import what is not installed.
pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:megatron\.")

Map = list[list[bool]]
SCHEDULE = ExpertThresholdConfig(router_type="expert-threshold", warmup_steps=2, warmup_anneal_steps=3)
UPDATES = {"warmup": 1, "anneal": 4, "threshold": 5}
"""A number of updates in each phase of it."""
NAN = math.nan


def record(
    routed: Map,
    *,
    experts: int,
    thresholds: list[float] | None = None,
    cutoffs: list[float] | None = None,
    at_bound: list[int] | None = None,
    micro_batches: int = 1,
    phase: str = "threshold",
    restarted: int = 0,
) -> BatchRecord:
    """What a router keeps of a batch in which token t went to expert e where routed[t][e]."""
    fanouts = [sum(row) for row in routed]
    vector = [
        *(sum(row[e] for row in routed) for e in range(experts)),
        *(at_bound or [0] * experts),
        *(fanouts.count(n) for n in range(experts + 1)),
        *[0] * experts,
        len(routed),
        micro_batches,
    ]
    return BatchRecord(
        counts=BatchCounts.split(torch.tensor(vector, dtype=torch.int64), experts),
        thresholds_E=torch.tensor(thresholds or [0.0] * experts),
        cutoffs_E=torch.tensor(cutoffs or [0.0] * experts, dtype=torch.float64),
        num_updates=torch.tensor([UPDATES[phase]]),
        restarted=torch.tensor([restarted]),
    )


def on_host(batch: BatchRecord) -> LayerBatch:
    """As logging sees it."""
    return LayerBatch.unpack(pack(batch), batch.thresholds_E.numel(), SCHEDULE)


@st.composite
def records(draw: st.DrawFn) -> tuple[Map, BatchRecord]:
    """A routing map of any shape, no tokens included, and its record."""
    E, T = draw(st.integers(1, 6)), draw(st.integers(0, 11))
    routed = draw(st.lists(st.lists(st.booleans(), min_size=E, max_size=E), min_size=T, max_size=T))
    logits = st.lists(st.floats(-50, 50, width=32), min_size=E, max_size=E)
    micro_batches = draw(st.integers(1, 5))
    return routed, record(
        routed,
        experts=E,
        thresholds=draw(logits),
        cutoffs=draw(logits),
        at_bound=draw(st.lists(st.integers(0, micro_batches), min_size=E, max_size=E)),
        micro_batches=micro_batches,
        phase=draw(st.sampled_from(list(UPDATES))),
    )


def naive_metrics(routed: Map, batch: BatchRecord) -> dict[str, float]:
    thresholds, cutoffs = batch.thresholds_E.tolist(), batch.cutoffs_E.tolist()
    E, T = len(thresholds), max(len(routed), 1)
    usage = [sum(row[e] for row in routed) / T for e in range(E)]
    fanouts = [sum(row) for row in routed]
    mean_usage = sum(usage) / E
    bound = batch.counts.at_bound_E.tolist()
    return {
        "threshold_min": min(thresholds),
        "threshold_mean": sum(thresholds) / E,
        "threshold_max": max(thresholds),
        "cutoff_gap": sum(abs(c - t) for c, t in zip(cutoffs, thresholds, strict=True)) / E,
        "expert_usage_min": min(usage),
        "expert_usage_mean": mean_usage,
        "expert_usage_max": max(usage),
        "max_violation": max(usage) / mean_usage - 1 if mean_usage else 0.0,
        "fanout_mean": sum(fanouts) / T,
        "fanout_max": max(fanouts, default=0),
        "tokens_0_experts": sum(n == 0 for n in fanouts) / T,
        "tokens_1_expert": sum(n == 1 for n in fanouts) / T,
        "tokens_2plus_experts": sum(n >= 2 for n in fanouts) / T,
        "capacity_bound_share": sum(n / int(batch.counts.micro_batches) for n in bound) / E,
        "dead_experts": sum(share == 0 for share in usage),
        "restarted_experts": int(batch.restarted),
    }


# --- metrics ---


@given(records())
def test_metrics_equal_naive_numbers(sample: tuple[Map, BatchRecord]) -> None:
    routed, batch = sample
    metrics = on_host(batch).metrics()
    assert list(metrics) == list(METRICS)
    # fp64 throughout: sums in another order differ in the last bits only.
    assert metrics == pytest.approx(naive_metrics(routed, batch), rel=1e-12, abs=1e-12)


def test_a_batch_worked_out_by_hand() -> None:
    routed = [[True, True, False], [True, False, False], [False, False, False], [True, True, False]]
    batch = record(
        routed,
        experts=3,
        thresholds=[-1.0, 0.5, 2.0],
        cutoffs=[-1.5, 0.5, 3.0],
        at_bound=[2, 0, 1],
        micro_batches=2,
        restarted=2,
    )
    assert on_host(batch).metrics() == pytest.approx(
        {
            "threshold_min": -1.0,
            "threshold_mean": 0.5,
            "threshold_max": 2.0,
            "cutoff_gap": 0.5,
            "expert_usage_min": 0.0,
            "expert_usage_mean": 5 / 12,
            "expert_usage_max": 0.75,
            "max_violation": 0.8,
            "fanout_mean": 1.25,
            "fanout_max": 2.0,
            "tokens_0_experts": 0.25,
            "tokens_1_expert": 0.25,
            "tokens_2plus_experts": 0.5,
            "capacity_bound_share": 0.5,
            "dead_experts": 1.0,
            "restarted_experts": 2.0,
        },
        rel=1e-12,
    )


def test_shares_are_fp64() -> None:
    batch = on_host(record([[True], [False], [False]], experts=1, at_bound=[1], micro_batches=3))
    assert (batch.usage_E().dtype, batch.at_bound_E().dtype) == (torch.float64, torch.float64)
    assert batch.usage_E().tolist() == batch.at_bound_E().tolist() == [1 / 3]
    assert batch.metrics()["tokens_0_experts"] == 2 / 3


def test_no_tokens_is_all_zeros_and_every_expert_dead() -> None:
    """A batch of nothing but padding divides by nothing."""
    metrics = on_host(record([], experts=4, micro_batches=0)).metrics()
    assert metrics.pop("dead_experts") == 4
    assert set(metrics.values()) == {0.0}


def test_no_token_with_an_expert() -> None:
    metrics = on_host(record([[False] * 3] * 5, experts=3)).metrics()
    assert (metrics["tokens_0_experts"], metrics["fanout_mean"], metrics["fanout_max"]) == (1.0, 0.0, 0.0)
    assert (metrics["max_violation"], metrics["dead_experts"]) == (0.0, 3.0)


def test_one_token_more_in_billions_is_seen() -> None:
    """I7: the counts of a huge batch; one token of 2**33 with an expert more than fp32 could tell apart."""
    counts = BatchCounts.split(
        torch.tensor([2**33, 1, 0, 0, 0, 2**33 - 1, 1, 0, 0, 2**33, 1], dtype=torch.int64), 2
    )
    batch = BatchRecord(
        counts, torch.zeros(2), torch.zeros(2, dtype=torch.float64), torch.tensor([9]), torch.zeros(1)
    )
    metrics = on_host(batch).metrics()
    assert metrics["expert_usage_min"] == pytest.approx(2**-33)
    assert (metrics["expert_usage_max"], metrics["fanout_max"], metrics["dead_experts"]) == (1.0, 2.0, 0.0)
    assert metrics["tokens_2plus_experts"] == pytest.approx(2**-33)


def test_before_the_first_threshold_only_thresholds_are_unknown() -> None:
    metrics = on_host(record([[True, False]], experts=2, thresholds=[NAN, NAN])).metrics()
    unknown = {name for name, value in metrics.items() if math.isnan(value)}
    assert unknown == {"threshold_min", "threshold_mean", "threshold_max", "cutoff_gap"}


# --- pack, unpack ---


@pytest.mark.parametrize("phase", list(UPDATES))
@pytest.mark.parametrize("num_experts", [1, 3, 64])
def test_pack_and_unpack_keep_every_number(phase: str, num_experts: int) -> None:
    # Counts are exact up to 2**53; thresholds are fp32; cutoffs are means in fp64.
    counts = 2**53 - torch.arange(BatchCounts.size(num_experts)) ** 2
    thresholds = torch.randn(num_experts)
    cutoffs = torch.randn(num_experts, dtype=torch.float64) / 3
    thresholds[-1] = cutoffs[0] = NAN
    restarted = torch.tensor([num_experts])
    updates = torch.tensor([UPDATES[phase]])
    packed = pack(
        BatchRecord(BatchCounts.split(counts, num_experts), thresholds, cutoffs, updates, restarted)
    )
    assert packed.shape == (width(num_experts),)
    assert packed.dtype == torch.float64
    batch = LayerBatch.unpack(packed, num_experts, SCHEDULE)
    for name in BatchCounts.__dataclass_fields__:
        there, back = getattr(BatchCounts.split(counts, num_experts), name), getattr(batch.counts, name)
        assert back.dtype == torch.int64
        assert torch.equal(there, back)
    torch.testing.assert_close(batch.thresholds_E, thresholds.double(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(batch.cutoffs_E, cutoffs, rtol=0, atol=0, equal_nan=True)
    assert (batch.phase, batch.restarted) == (phase, num_experts)


def test_unpacking_leaves_the_vector_alone() -> None:
    packed = pack(record([[True, False]], experts=2))
    LayerBatch.unpack(packed, 2, SCHEDULE).counts.tokens.add_(5)
    assert LayerBatch.unpack(packed, 2, SCHEDULE).counts.tokens.tolist() == [1]


# --- the whole model ---


def test_overall_reduces_each_metric_its_own_way() -> None:
    layers = {2: dict.fromkeys(METRICS, 1.0), 3: dict.fromkeys(METRICS, 4.0), 9: dict.fromkeys(METRICS, 4.0)}
    mean = ["threshold_mean", "cutoff_gap", "expert_usage_mean", "fanout_mean", "capacity_bound_share"]
    mean += ["tokens_0_experts", "tokens_1_expert", "tokens_2plus_experts"]
    assert overall(layers) == {
        "threshold_min": 1.0,
        "threshold_max": 4.0,
        "expert_usage_min": 1.0,
        "expert_usage_max": 4.0,
        "max_violation": 4.0,
        "fanout_max": 4.0,
        "dead_experts": 9.0,
        "restarted_experts": 9.0,
        **dict.fromkeys(mean, 3.0),
    }


def test_one_layer_is_the_whole_model() -> None:
    metrics = on_host(record([[True, False], [True, True]], experts=2, cutoffs=[0.5, -1.0])).metrics()
    assert overall({7: metrics}) == metrics


# --- logging ---


class FakeRouter:
    """What gather_layers reads of a router."""

    def __init__(self, layer: int, tokens: int | None, *, mtp: bool = False) -> None:
        self.layer_number, self.is_mtp_layer = layer, mtp
        self.last_batch = None if tokens is None else record([[True, False]] * tokens, experts=2)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Any:
    """megatron_et.host.logging in a process without a GPU and without process groups."""
    from megatron.core import parallel_state

    from megatron_et.host import logging

    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_group", lambda: "pipeline")
    return logging


def depth(num_layers: int, mtp_num_layers: int | None = None) -> argparse.Namespace:
    return argparse.Namespace(num_layers=num_layers, mtp_num_layers=mtp_num_layers, num_experts=2)


def test_layers_are_gathered_by_number_mtp_heads_last(
    one_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    routers = [FakeRouter(2, 5), FakeRouter(4, 7), FakeRouter(1, 3, mtp=True), FakeRouter(3, None)]
    monkeypatch.setattr(one_process.state, "trained_routers", lambda: routers)
    layers = one_process.gather_layers(depth(4, 1))
    assert {number: int(batch.counts.tokens) for number, batch in layers.items()} == {2: 5, 4: 7, 5: 3}


def test_no_router_and_no_batch_is_no_layer(one_process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_process.state, "trained_routers", lambda: [FakeRouter(1, None)])
    assert one_process.gather_layers(depth(2)) == {}


def test_pipeline_stages_are_joined_nan_and_all(one_process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage without thresholds yet must not spoil the other's rows: NaN stays in its own."""
    from megatron.core import parallel_state

    stages = [[FakeRouter(1, 5)], [FakeRouter(2, 7)]]
    stages[0][0].last_batch = record([[True, True]], experts=2, thresholds=[NAN, NAN])
    rows: list[torch.Tensor] = []

    def gather(stage: int) -> dict[int, LayerBatch]:
        monkeypatch.setattr(one_process.state, "trained_routers", lambda: stages[stage])
        return one_process.gather_layers(depth(2))

    def all_reduce(tensor: torch.Tensor, group: object) -> None:
        assert group == "pipeline"
        rows.append(tensor.clone())
        if len(rows) > 1:
            tensor.add_(rows[0])

    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    gather(0)
    layers = gather(1)
    assert {number: int(batch.counts.tokens) for number, batch in layers.items()} == {1: 1, 2: 7}
    assert layers[1].thresholds_E.isnan().all()
    assert layers[2].thresholds_E.tolist() == [0.0, 0.0]


class Due:
    """log_batch with made-up arguments and layers; counts what it gathered and wrote."""

    def __init__(self, logging: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, **settings: Any) -> None:
        from megatron.training import global_vars

        self.gathered = 0
        self.written: list[int] = []
        self.logging = logging
        args: dict[str, Any] = {"log_interval": 4, "tensorboard_log_interval": 6, "rank": 1, "world_size": 2}
        args |= {"moe_router_type": "expert-threshold", "moe_et_trace_dir": str(folder)}
        args |= {"moe_router_topk": 1, "num_experts": 2, "tensorboard_dir": "tb"}
        monkeypatch.setattr(global_vars, "get_args", lambda: argparse.Namespace(**(args | settings)))
        monkeypatch.setattr(logging, "gather_layers", self._gather)
        monkeypatch.setattr(logging, "_write_scalars", lambda step, *_: self.written.append(step))

    def _gather(self, _: Any) -> dict[int, LayerBatch]:
        self.gathered += 1
        return {2: on_host(record([[True, False]] * 3, experts=2))}

    def steps(self, number: int) -> None:
        for step in range(1, number + 1):
            self.logging.log_batch(step)


def traced(folder: Path) -> list[int]:
    path = folder / "et_trace.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


@needs_training
def test_console_trace_and_writers_keep_their_own_intervals(
    one_process: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    due = Due(one_process, monkeypatch, tmp_path)
    due.steps(12)
    assert traced(tmp_path) == [4, 8, 12]
    assert due.written == [6, 12]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[0].split()[-1] for line in lines] == ["4", "8", "12"]
    assert all("phase threshold | fan-out mean 1.000 max 1" in line for line in lines)


@needs_training
def test_every_rank_gathers_and_only_the_last_writes(
    one_process: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gathering communicates between pipeline stages: a rank that stays away hangs the others."""
    due = Due(one_process, monkeypatch, tmp_path, rank=0)
    due.steps(12)
    assert due.gathered == 4  # 4, 6, 8, 12
    assert (traced(tmp_path), due.written, capsys.readouterr().out) == ([], [], "")


@needs_training
def test_nothing_is_gathered_for_writers_that_are_not_there(
    one_process: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else every step would join the pipeline stages, by default, for nobody."""
    due = Due(one_process, monkeypatch, tmp_path, tensorboard_dir=None, wandb_project="")
    due.steps(12)
    assert (due.gathered, due.written) == (3, [])  # 4, 8, 12: the console
    due = Due(one_process, monkeypatch, tmp_path, tensorboard_dir=None, wandb_project="mine")
    due.steps(12)
    assert due.written == [6, 12]


@needs_training
def test_topk_logs_nothing(
    one_process: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    due = Due(one_process, monkeypatch, tmp_path, moe_router_type="topk")
    due.steps(12)
    assert (due.gathered, traced(tmp_path), due.written, capsys.readouterr().out) == (0, [], [], "")


class RecordingWandb:
    """What Megatron's W&B writer, the module wandb, is asked for: signatures of wandb 0.31."""

    def __init__(self) -> None:
        self.logged: dict[int, dict[str, float]] = {}
        self.alerts: list[tuple[str, str]] = []

    def log(
        self,
        data: dict[str, Any],
        step: int | None = None,
        commit: bool | None = None,
        sync: bool | None = None,
    ) -> None:
        assert (commit, sync) == (None, None)
        assert step is not None
        # W&B drops what comes for a step before the last one.
        assert step >= max(self.logged, default=0)
        self.logged.setdefault(step, {}).update(data)

    def alert(self, title: str, text: str, level: Any = None, wait_duration: Any = None) -> None:
        assert (level, wait_duration) == (None, None)
        self.alerts.append((title, text))


class Writers(Due):
    """With a real TensorBoard writer, a recording W&B, and layers whose expert 0 takes every token."""

    def __init__(self, logging: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, **settings: Any) -> None:
        from megatron.training import global_vars
        from torch.utils.tensorboard import SummaryWriter

        write_scalars = logging._write_scalars
        super().__init__(
            logging, monkeypatch, folder, **{"log_interval": 1, "tensorboard_log_interval": 2, **settings}
        )
        monkeypatch.setattr(logging, "_write_scalars", write_scalars)
        monkeypatch.setattr(logging, "_MONITOR", Monitor())
        self.folder, self.writer, self.wandb = (
            folder / "tb",
            SummaryWriter(str(folder / "tb")),
            RecordingWandb(),
        )
        monkeypatch.setattr(global_vars, "get_tensorboard_writer", lambda: self.writer)
        monkeypatch.setattr(global_vars, "get_wandb_writer", lambda: self.wandb)

    def _gather(self, _: Any) -> dict[int, LayerBatch]:
        batch = on_host(record([[True, False]] * 400, experts=2, thresholds=[NAN, 1.0]))
        return {2: batch, 7: batch}

    def events(self) -> EventAccumulator:
        self.writer.close()
        return EventAccumulator(str(self.folder)).Reload()


@needs_training
def test_wandb_gets_what_tensorboard_gets(
    one_process: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Through Megatron's own writers, at the same steps; a NaN (no threshold yet) goes to neither."""
    run = Writers(one_process, monkeypatch, tmp_path)
    run.steps(4)
    unknown = {"threshold_min", "threshold_mean", "threshold_max", "cutoff_gap"}
    names = {
        f"moe/{name}{layer}" for name in set(METRICS) - unknown for layer in ("", "_layer_2", "_layer_7")
    }
    names |= {"moe/expert_usage_target", "moe/fanout_target", "moe/alarms"}
    assert {step: set(values) for step, values in run.wandb.logged.items()} == {2: names, 4: names}
    assert run.wandb.logged[4]["moe/expert_usage_target"] == 0.5
    events = run.events()
    for name in names:
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert shown == pytest.approx({step: values[name] for step, values in run.wandb.logged.items()})


@needs_training
def test_an_alarm_is_said_once_and_everywhere(
    one_process: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Writers(one_process, monkeypatch, tmp_path)
    run.steps(30)
    # Expert 1 gets nothing, and so expert 0 twice its share: two rules.
    said, other = (line for line in capsys.readouterr().out.splitlines() if "ALARM" in line)
    assert "ALARM: load off target in layers 2, 7" in other
    title = "dead expert in layers 2, 7, since step 1"
    assert said.startswith(f" [megatron_et] iteration       10 | ALARM: {title}: layer 2: expert 1: no token")
    assert "; layer 7: expert 1: no token" in said
    assert ". Remedy: its threshold sinks" in said
    (alert_title, text), _ = run.wandb.alerts
    assert alert_title == f"megatron_et: {title}"
    assert text.removeprefix("iteration 10: ") in said
    assert {
        step: values["moe/alarms"] for step, values in run.wandb.logged.items() if step in (8, 10, 30)
    } == {
        8: 0.0,
        10: 4.0,
        30: 4.0,
    }
    written, _ = run.events().Tensors(f"{ALARM_TEXT}/text_summary")
    assert written.step == 10
    assert written.tensor_proto.string_val[0].decode().startswith(title)
    # What the trace says by itself.
    monitor = Monitor()
    for line in (tmp_path / "et_trace.jsonl").read_text().splitlines():
        monitor.observe(traces.parse_record(json.loads(line)).observation())
    assert monitor.active == one_process._MONITOR.active


@needs_training
@pytest.mark.parametrize("settings", [{"rank": 0}, {"tensorboard_dir": None, "wandb_project": ""}])
def test_alarms_need_neither_this_rank_nor_writers(
    one_process: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Other ranks say nothing; without writers the console still does."""
    run = Writers(one_process, monkeypatch, tmp_path, **settings)
    if "rank" not in settings:
        run.writer = run.wandb = None  # type: ignore[assignment]
    run.steps(12)
    assert ("ALARM" in capsys.readouterr().out) == ("rank" not in settings)
    if "rank" in settings:
        assert (run.wandb.logged, run.wandb.alerts) == ({}, [])


def test_the_console_line_bears_a_batch_without_thresholds() -> None:
    from megatron_et.host.logging import console_line

    metrics = on_host(record([[True, False]], experts=2, thresholds=[NAN, NAN])).metrics()
    line = console_line(3, overall({1: metrics}), "warmup")
    assert "iteration        3 | phase warmup |" in line
    assert "|cutoff - threshold| nan" in line
    assert line.endswith("dead experts 1")
    restarted = on_host(record([[True, False]], experts=2, restarted=2)).metrics()
    assert console_line(3, overall({1: restarted}), "threshold").endswith(
        "EMA of 2 experts started again of late"
    )


# --- the trace ---


def write_line(folder: Path, step: int, layers: dict[int, LayerBatch], experts: int) -> None:
    from megatron_et.host.logging import observation

    seen = observation(step, argparse.Namespace(moe_router_topk=1, num_experts=experts), layers)
    traces.append(folder, seen, experts, {number: batch.trace() for number, batch in layers.items()})


@given(st.lists(records(), min_size=1, max_size=3), st.integers(1, 10**6))
def test_the_report_reads_what_the_trace_wrote(
    tmp_path_factory: pytest.TempPathFactory, samples: list[tuple[Map, BatchRecord]], step: int
) -> None:
    """Every number of every layer, through JSON, within fp32."""
    experts = samples[0][1].thresholds_E.numel()
    same_size = [batch for _, batch in samples if batch.thresholds_E.numel() == experts]
    layers = {3 * n + 2: on_host(batch) for n, batch in enumerate(same_size)}
    folder = tmp_path_factory.mktemp("trace")
    write_line(folder, step, layers, experts)
    write_line(folder, step + 5, layers, experts)

    warnings: list[str] = []
    trace = traces.read_traces([folder / traces.TRACE_NAME], warnings)
    assert warnings == []
    assert trace is not None
    assert (trace.topk, trace.num_experts, trace.steps_S.tolist()) == (1, experts, [step, step + 5])
    first = layers[2]
    assert trace.tokens_S.tolist() == [int(first.counts.tokens)] * 2
    assert trace.phases_S.tolist() == [first.phase] * 2
    assert list(trace.layers) == list(layers)
    for number, batch in layers.items():
        layer = trace.layers[number]
        for row in range(2):
            np.testing.assert_array_equal(layer.usage_SE[row], batch.usage_E().float().numpy())
            np.testing.assert_array_equal(layer.at_bound_SE[row], batch.at_bound_E().float().numpy())
            np.testing.assert_array_equal(layer.threshold_SE[row], batch.thresholds_E.float().numpy())
            np.testing.assert_array_equal(layer.cutoff_SE[row], batch.cutoffs_E.float().numpy())
            # The reader drops fan-outs above the largest that occurs.
            fanouts = batch.counts.fanout_F.tolist()
            histogram = layer.fanout_histogram_SF[row].tolist()
            assert histogram == fanouts[: len(histogram)]
            assert sum(histogram) == sum(fanouts)


def test_unknown_thresholds_and_cutoffs_are_null_in_json_and_nan_in_the_report(tmp_path: Path) -> None:
    assert {phase_at(SCHEDULE, n) for n in range(9)} == set(traces.PHASES)
    batch = on_host(
        record([[True, False]], experts=2, thresholds=[NAN, 1.5], cutoffs=[NAN, math.inf], phase="warmup")
    )
    write_line(tmp_path, 1, {1: batch}, 2)
    line = (tmp_path / traces.TRACE_NAME).read_text()
    # Strict JSON: NaN and Infinity are no JSON, and jq and others refuse the line.
    values = json.loads(line, parse_constant=pytest.fail)["layers"]["1"]
    assert (values["threshold"], values["cutoff"]) == ([None, 1.5], [None, None])
    trace = traces.read_traces([tmp_path / traces.TRACE_NAME], [])
    assert trace is not None
    np.testing.assert_array_equal(trace.layers[1].threshold_SE, [[NAN, 1.5]])
    np.testing.assert_array_equal(trace.layers[1].cutoff_SE, [[NAN, NAN]])


# --- append_line ---


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(None, "new\n", id="no-file"),
        pytest.param("", "new\n", id="empty"),
        pytest.param("one\ntwo\n", "one\ntwo\nnew\n", id="whole"),
        pytest.param("one\ntw", "one\nnew\n", id="cut"),
        pytest.param("on", "new\n", id="only-a-cut-line"),
        pytest.param("one\n\n", "one\n\nnew\n", id="empty-last-line"),
        pytest.param("\u00e9\n{\u00e9", "\u00e9\nnew\n", id="not-ascii"),
    ],
)
def test_append_line_drops_a_cut_last_line(tmp_path: Path, before: str | None, after: str) -> None:
    from megatron_et.observe.trace import append_line

    path = tmp_path / "trace.jsonl"
    if before is not None:
        path.write_bytes(before.encode())
    append_line(path, "new")
    assert path.read_bytes().decode() == after
    append_line(path, "again")
    assert path.read_bytes().decode() == after + "again\n"


def test_a_character_cut_in_two_is_dropped_with_its_line(tmp_path: Path) -> None:
    from megatron_et.observe.trace import append_line

    path = tmp_path / "trace.jsonl"
    path.write_bytes(b"one\n" + "\u00e9".encode()[:1])
    append_line(path, "new")
    assert path.read_bytes() == b"one\nnew\n"


def test_append_line_creates_the_folders(tmp_path: Path) -> None:
    from megatron_et.observe.trace import append_line

    path = tmp_path / "runs" / "today" / "trace.jsonl"
    append_line(path, "first")
    append_line(path, "second")
    assert path.read_text() == "first\nsecond\n"
