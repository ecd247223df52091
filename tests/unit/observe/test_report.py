"""`megatron-et report` on synthetic runs: numbers, resumes, cut and malformed traces, plots, errors.

S logged steps, T tokens, E experts, L layers.
"""

import base64
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from megatron_et import cli
from megatron_et.observe import metrics
from megatron_et.observe.report.command import Report, make_report, print_report
from megatron_et.observe.report.plots import MAX_HEATMAP_EXPERTS, MAX_HEATMAP_STEPS, _heat_map
from megatron_et.observe.report.read import read_run, read_tensorboard
from megatron_et.observe.report.summary import METRICS, Summary, layer_histories, summarise, trace_metrics
from megatron_et.observe.report.table import columns
from megatron_et.observe.trace import ALARM_TEXT, VERSIONS_TEXT, LayerTrace, ReportError, read_traces

pytestmark = pytest.mark.megatron_free

ALL_PNGS = ["loss.png", "usage.png", "thresholds.png", "fanout.png", "no_expert.png"]
T = 200


def layer_record(rng: np.random.Generator, E: int, rate: float = 0.3) -> dict[str, Any]:
    """One layer of one traced step, from a random routing map."""
    map_TE = rng.random((T, E)) < rate
    return {
        "usage": map_TE.mean(axis=0).tolist(),
        "threshold": rng.normal(size=E).tolist(),
        "cutoff": rng.normal(size=E).tolist(),
        "fanout_histogram": np.bincount(map_TE.sum(axis=1), minlength=E + 1).tolist(),
        "at_bound": rng.integers(0, 2, E).astype(float).tolist(),
    }


def record(
    step: int, phase: str = "threshold", *, E: int = 4, layers: Sequence[int] = (2,), seed: int = 0
) -> dict[str, Any]:
    """One line of a trace; `seed` changes its values."""
    rng = np.random.default_rng([seed, step])
    return {
        "schema": 1,
        "step": step,
        "phase": phase,
        "tokens": T,
        "topk": 1,
        "num_experts": E,
        "layers": {str(layer): layer_record(rng, E) for layer in layers},
    }


def write_trace(run: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    path = run / "et_trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in records))
    return path


def write_events(
    folder: Path,
    points: Mapping[str, Sequence[tuple[int, float]]],
    arguments: Mapping[str, int] | None = None,
) -> None:
    """One event file, as one start of a run writes it."""
    writer = SummaryWriter(str(folder))
    for name, value in (arguments or {}).items():
        writer.add_text(name, str(value), global_step=0)
    for tag, series in points.items():
        for step, value in series:
            writer.add_scalar(tag, value, step)
    writer.close()


def phases(warmup: int, anneal: int, threshold: int) -> list[str]:
    return ["warmup"] * warmup + ["anneal"] * anneal + ["threshold"] * threshold


def losses(last: int = 100) -> dict[str, list[tuple[int, float]]]:
    steps = range(10, last + 1, 10)
    return {
        "lm loss": [(step, 5.0 - step / 100) for step in steps],
        "lm loss vs samples": [(8 * step, 5.0 - step / 100) for step in steps],
        "lm loss validation": [(step, 5.5 - step / 100) for step in steps[4::5]],
        "lm loss validation ppl": [(step, 99.0) for step in steps[4::5]],
        "iteration-time": [(step, 0.5) for step in steps],
    }


def write_run(
    run: Path, phase_S: Sequence[str], *, E: int = 4, layers: Sequence[int] = (2, 3)
) -> list[dict[str, Any]]:
    """A whole run, logged every 10 steps; returns its trace."""
    records = [record(10 * i, phase, E=E, layers=layers) for i, phase in enumerate(phase_S, start=1)]
    write_trace(run, records)
    write_events(run / "tensorboard", losses(10 * len(records)), {"seq_length": 64})
    return records


def traced(records: Sequence[Mapping[str, Any]]) -> LayerTrace:
    """Layer 2 of a trace, written and read."""
    with tempfile.TemporaryDirectory() as folder:
        trace = read_traces([write_trace(Path(folder), records)], [])
    assert trace is not None
    return trace.layers[2]


def summary_of(run: Path, last_steps: int | None = None) -> Summary:
    """The numbers alone: plots take a second."""
    data = read_run(run)
    return summarise(data, layer_histories(data), last_steps)


def assert_is_drawn(png: Path) -> None:
    with Image.open(png) as image:
        assert image.format == "PNG"
        assert image.width >= 800
        assert image.height >= 400
        assert len(image.convert("RGB").getcolors(maxcolors=2**24) or []) > 20


def assert_full_report(report: Report) -> None:
    assert [png.name for png in report.pngs] == ALL_PNGS
    for png in report.pngs:
        assert_is_drawn(png)
    assert json.loads(report.json.read_text())["schema"] == 1


# --- numbers ---


def test_metrics_equal_those_of_the_routing_map() -> None:
    E, rng = 5, np.random.default_rng(1)
    map_TE = rng.random((T, E)) < 0.25
    map_TE[:, 3] = False
    thresholds, cutoffs = rng.normal(size=E), rng.normal(size=E)
    line = record(10, E=E)
    line["layers"]["2"] = {
        "usage": map_TE.mean(axis=0).tolist(),
        "threshold": thresholds.tolist(),
        "cutoff": cutoffs.tolist(),
        "fanout_histogram": np.bincount(map_TE.sum(axis=1), minlength=E + 1).tolist(),
        "at_bound": [1.0, 0.0, 0.5, 0.0, 0.0],
    }
    fanout_T, usage_E = map_TE.sum(axis=1), map_TE.mean(axis=0)
    expected = {
        "expert_usage_min": 0.0,
        "expert_usage_mean": usage_E.mean(),
        "expert_usage_max": usage_E.max(),
        "max_violation": usage_E.max() / usage_E.mean() - 1,
        "fanout_mean": fanout_T.mean(),
        "fanout_max": fanout_T.max(),
        "tokens_0_experts": (fanout_T == 0).mean(),
        "tokens_1_expert": (fanout_T == 1).mean(),
        "tokens_2plus_experts": (fanout_T >= 2).mean(),
        "threshold_min": thresholds.min(),
        "threshold_mean": thresholds.mean(),
        "threshold_max": thresholds.max(),
        "cutoff_gap": np.abs(cutoffs - thresholds).mean(),
        "dead_experts": 1,
        "capacity_bound_share": 0.3,
    }
    got = {name: values_S[0] for name, values_S in trace_metrics(traced([line])).items()}
    assert got == pytest.approx(expected, rel=1e-6)


def test_metrics_are_those_that_the_router_logs() -> None:
    """All but the guard's restarts, which are events and no state of a layer to average."""
    assert set(METRICS) == set(metrics.METRICS) - {"restarted_experts"}


def test_unknown_cutoffs_and_thresholds_leave_their_metrics_out() -> None:
    first, second = record(10), record(20)
    first["layers"]["2"]["cutoff"] = [None] * 4
    first["layers"]["2"]["threshold"] = [float("nan")] * 4
    second["layers"]["2"]["cutoff"] = None
    values = trace_metrics(traced([first, second]))
    assert np.isnan(values["cutoff_gap"]).all()
    assert np.isnan(values["threshold_mean"]).tolist() == [True, False]


def test_a_step_without_tokens_has_no_shares() -> None:
    empty = record(10)
    empty["layers"]["2"] |= {"usage": [0.0] * 4, "fanout_histogram": [0] * 5}
    values = trace_metrics(traced([empty]))
    assert np.isnan(values["tokens_0_experts"][0])
    assert values["max_violation"][0] == 0.0
    assert values["dead_experts"][0] == 4


def test_header_numbers(tmp_path: Path) -> None:
    write_run(tmp_path, phases(3, 2, 5))
    summary = summary_of(tmp_path)
    assert summary.run == tmp_path.name
    assert summary.last_step == 100
    assert summary.tokens == 64 * 8 * 100
    assert (summary.num_experts, summary.topk, summary.target_rate) == (4, 1, 0.25)
    assert summary.training_loss is not None
    assert (summary.training_loss.step, summary.training_loss.value) == (100, 4.0)
    assert summary.training_loss_recent is None
    assert list(summary.validation_losses) == ["validation"]
    assert summary.validation_losses["validation"].value == 4.5
    assert summary.seconds_per_step == 0.5
    assert (summary.warmup_end, summary.threshold_start) == (40, 60)


def test_tokens_are_estimated_from_the_trace_alone(tmp_path: Path) -> None:
    write_trace(tmp_path, [record(10), record(20), record(25)])
    report = make_report(tmp_path)
    assert report.summary.tokens == 25 * T
    assert report.summary.training_loss is None
    assert [png.name for png in report.pngs] == ALL_PNGS[1:]
    assert any("no TensorBoard scalars" in sentence for sentence in report.summary.missing)


def test_recent_loss_is_the_mean_of_twenty(tmp_path: Path) -> None:
    write_events(tmp_path, {"lm loss": [(step, float(step)) for step in range(1, 41)]})
    assert summary_of(tmp_path).training_loss_recent == pytest.approx(np.arange(21, 41).mean())


@pytest.mark.parametrize(
    ("phase_S", "last_steps", "window"),
    [
        (phases(5, 0, 20), None, ("threshold", 220, 250, 4)),
        (phases(5, 0, 20), 1, ("threshold", 250, 250, 1)),
        (phases(5, 0, 3), 99, ("threshold", 60, 80, 3)),
        (phases(5, 5, 0), None, ("anneal", 100, 100, 1)),
        (phases(6, 0, 0), None, ("warmup", 50, 60, 2)),
        (phases(0, 0, 1), None, ("threshold", 10, 10, 1)),
    ],
    ids=["last-fifth", "last-step", "all-there-is", "anneal-only", "warm-up-only", "one-step"],
)
def test_window_and_its_means(
    tmp_path: Path, phase_S: list[str], last_steps: int | None, window: tuple[str, int, int, int]
) -> None:
    records = [record(10 * i, phase) for i, phase in enumerate(phase_S, start=1)]
    write_trace(tmp_path, records)
    summary = summary_of(tmp_path, last_steps)
    assert summary.window is not None
    got = summary.window
    assert (got.phase, got.first_step, got.last_step, got.logged_steps) == window
    inside = [line["layers"]["2"] for line in records if window[1] <= line["step"] <= window[2]]
    (layer,) = summary.layers
    assert layer.expert_usage_max == pytest.approx(np.mean([max(line["usage"]) for line in inside]), rel=1e-6)
    assert layer.tokens_0_experts == pytest.approx(
        np.mean([line["fanout_histogram"][0] / T for line in inside])
    )


def test_window_takes_only_its_own_phase(tmp_path: Path) -> None:
    # A run whose warm-up was switched on again: the warm-up step lies between two threshold steps.
    records = [record(10), record(20, "warmup", seed=7), record(30)]
    write_trace(tmp_path, records)
    (layer,) = summary_of(tmp_path, 2).layers
    expected = np.mean([np.mean(line["layers"]["2"]["usage"]) for line in (records[0], records[2])])
    assert layer.expert_usage_mean == pytest.approx(expected, rel=1e-6)


def test_scalars_alone_give_the_same_table(tmp_path: Path) -> None:
    write_run(tmp_path / "traced", phases(0, 0, 10))
    expected = summary_of(tmp_path / "traced")
    scalars: dict[str, list[tuple[int, float]]] = {
        "moe/fanout_mean": [(10, 1.0)],
        "moe/fanout_mean_layer_x": [(10, 1.0)],
    }
    for history in layer_histories(read_run(tmp_path / "traced")):
        for name, values_S in history.metrics.items():
            tag = f"moe/{name}_layer_{history.layer}"
            scalars[tag] = list(zip(history.steps_S.tolist(), values_S.tolist(), strict=True))
    arguments = {"num_experts": 4, "moe_router_topk": 1}
    write_events(tmp_path / "scalars", {**losses(), **scalars}, arguments)
    report = make_report(tmp_path / "scalars")
    assert_full_report(report)
    assert report.summary.window is not None
    assert report.summary.window.phase is None
    assert report.summary.target_rate == 0.25
    for got, want in zip(report.summary.layers, expected.layers, strict=True):
        assert vars(got) == pytest.approx(vars(want), rel=1e-5)


def test_metrics_of_unequal_length_are_filled_up(tmp_path: Path) -> None:
    scalars = {"moe/fanout_mean_layer_4": [(10, 1.0), (20, 2.0)], "moe/fanout_max_layer_4": [(20, 3.0)]}
    write_events(tmp_path, scalars)
    (history,) = layer_histories(read_run(tmp_path))
    assert history.steps_S.tolist() == [10, 20]
    assert history.metrics["fanout_max"].tolist() == pytest.approx([np.nan, 3.0], nan_ok=True)


# --- resumed, cut and malformed inputs ---


def test_a_resumed_run_keeps_the_later_scalars(tmp_path: Path) -> None:
    write_events(
        tmp_path / "a", {"lm loss": [(10, 1.0), (20, 2.0), (30, 3.0)], "lm loss validation": [(20, 9.0)]}
    )
    write_events(tmp_path / "a", {"lm loss": [(20, 22.0), (30, 33.0), (40, 44.0)]})
    data = read_run(tmp_path)
    loss = data.tensorboard.scalars["lm loss"]
    assert loss.steps_S.tolist() == [10, 20, 30, 40]
    assert loss.values_S.tolist() == [1.0, 22.0, 33.0, 44.0]
    # Validated with weights that were thrown away.
    assert "lm loss validation" not in data.tensorboard.scalars
    assert data.warnings == []


def test_steps_after_a_resume_that_were_not_reached_again_are_left_out(tmp_path: Path) -> None:
    write_events(tmp_path, {"lm loss": [(step, 1.0) for step in range(10, 60, 10)]})
    write_events(tmp_path, {"lm loss": [(20, 2.0)]})
    write_trace(tmp_path, [record(step) for step in (10, 20, 30, 20)])
    data = read_run(tmp_path)
    assert data.tensorboard.scalars["lm loss"].steps_S.tolist() == [10, 20]
    assert data.trace is not None
    assert data.trace.steps_S.tolist() == [10, 20]
    assert [warning.split(":")[0] for warning in data.warnings] == ["TensorBoard files", "trace"]
    assert "steps 21 to 50 of an earlier start are left out" in data.warnings[0]


def test_order_of_event_files_is_that_of_their_starts(tmp_path: Path) -> None:
    write_events(tmp_path, {"lm loss": [(10, 1.0), (20, 1.0)]})
    write_events(tmp_path, {"lm loss": [(20, 2.0)]})
    first, second = sorted(tmp_path.iterdir())
    assert read_tensorboard([second, first], []).scalars["lm loss"].values_S.tolist() == [1.0, 2.0]


def test_the_test_loss_does_not_replace_the_validation_loss(tmp_path: Path) -> None:
    # Megatron logs the test loss under the validation tag, at the same step.
    write_events(tmp_path, {"lm loss": [(10, 1.0)], "lm loss validation": [(10, 2.0), (10, 3.0)]})
    assert summary_of(tmp_path).validation_losses["validation"].value == 2.0


def test_several_validation_sets(tmp_path: Path) -> None:
    tags = ["lm loss validation-code", "lm loss validation-code ppl", "lm loss validation-code vs samples"]
    write_events(tmp_path, {"lm loss": [(10, 1.0)], **{tag: [(10, 2.0)] for tag in tags}})
    assert list(summary_of(tmp_path).validation_losses) == ["validation-code"]


def test_unreadable_event_files_are_passed_over(tmp_path: Path) -> None:
    write_events(tmp_path, {"lm loss": [(10, 1.0), (20, 2.0)]})
    (whole,) = tmp_path.iterdir()
    (tmp_path / "events.out.tfevents.1.cut").write_bytes(whole.read_bytes()[:-5])
    (tmp_path / "events.out.tfevents.2.empty").touch()
    assert read_run(tmp_path).tensorboard.scalars["lm loss"].steps_S.tolist() == [10, 20]


def test_a_later_trace_line_wins(tmp_path: Path) -> None:
    records = [record(10), record(20, "warmup"), record(20, seed=1), record(30, seed=1)]
    trace = read_traces([write_trace(tmp_path, records)], [])
    assert trace is not None
    assert trace.steps_S.tolist() == [10, 20, 30]
    assert trace.phases_S.tolist() == ["threshold"] * 3
    got = trace.layers[2].usage_SE
    want = [records[i]["layers"]["2"]["usage"] for i in (0, 2, 3)]
    np.testing.assert_allclose(got, want, rtol=1e-6)


@given(steps=st.lists(st.integers(1, 30), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_any_sequence_of_resumes_gives_one_history(steps: list[int]) -> None:
    got = traced([record(step, E=1, seed=i) for i, step in enumerate(steps)])
    # Written after the last line that began at the step or before it, and never overtaken by a resume.
    want = [s for i, s in enumerate(steps) if all(later > s for later in steps[i + 1 :])]
    assert got.steps_S.tolist() == want
    assert want[-1] == steps[-1]


def test_traces_of_several_folders_are_joined_oldest_first(tmp_path: Path) -> None:
    for age, name, lines in (
        (200, "z", [record(10), record(20)]),
        (100, "a", [record(20, seed=5), record(30)]),
    ):
        path = write_trace(tmp_path / name, lines)
        os.utime(path, (1e9 - age, 1e9 - age))
    data = read_run(tmp_path)
    assert data.trace is not None
    assert data.trace.steps_S.tolist() == [10, 20, 30]
    want = record(20, seed=5)["layers"]["2"]["usage"]
    np.testing.assert_allclose(data.trace.layers[2].usage_SE[1], want, rtol=1e-6)
    assert "2 traces were read as one run" in data.warnings[0]


@pytest.mark.parametrize("kept", [1, 40, -3])
def test_a_cut_last_line_is_skipped_with_a_warning(tmp_path: Path, kept: int) -> None:
    path = write_trace(tmp_path, [record(10), record(20)])
    path.write_text(path.read_text() + json.dumps(record(30))[:kept])
    data = read_run(tmp_path)
    assert data.trace is not None
    assert data.trace.steps_S.tolist() == [10, 20]
    assert data.warnings == ["et_trace.jsonl, line 3: the last line is cut and was skipped"]


def broken(**changes: Any) -> dict[str, Any]:
    return {**record(20), **changes}


def broken_layer(**changes: Any) -> dict[str, Any]:
    line = record(20)
    line["layers"]["2"] |= changes
    return line


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in record(20).items() if key != name}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{'step': 1}", "not JSON"),
        ("[1, 2]", "expected a JSON object, got list"),
        (without("tokens"), "field 'tokens' is missing"),
        (broken(schema=2), "trace schema 2, but megatron_et .* reads schema 1"),
        (broken(phase="cooldown"), "phase is 'cooldown', expected one of warmup, anneal, threshold"),
        (broken(layers=[]), "no attribute 'items'"),
        (broken(step="late"), "invalid literal"),
        (broken(topk=2), "num_experts 4 and topk 2, but the run began with 4 and 1"),
        (broken_layer(usage=[0.5] * 3), r"usage has shape \(3,\), expected 4 numbers"),
        (broken_layer(usage=["a"] * 4), "could not convert"),
        (broken_layer(fanout_histogram=[1] * 4), "fanout_histogram has shape"),
        (broken_layer(fanout_histogram=[-1] * 5), "negative count"),
    ],
)
def test_a_malformed_line_names_file_and_line(tmp_path: Path, line: Any, reason: str) -> None:
    text = line if isinstance(line, str) else json.dumps(line)
    path = write_trace(tmp_path, [record(10)])
    path.write_text(path.read_text() + "\n" + text + "\n" + json.dumps(record(30)) + "\n")
    with pytest.raises(ReportError, match=rf"et_trace\.jsonl, line 3: .*{reason}"):
        read_run(tmp_path)


def test_a_complete_last_line_with_wrong_fields_is_an_error(tmp_path: Path) -> None:
    write_trace(tmp_path, [record(10), broken(schema="1.5")])
    with pytest.raises(ReportError, match=r"line 2: trace schema '1\.5'"):
        read_run(tmp_path)


# --- reports ---


@pytest.mark.parametrize(
    ("phase_S", "E", "layers"),
    [
        (phases(3, 2, 10), 16, range(2, 6)),
        (phases(1, 0, 2), 1, [1]),
        (phases(4, 0, 0), 8, [2, 3]),
        (phases(0, 0, 1), 3, [5]),
        (phases(1, 0, 1), 200, range(60)),
    ],
    ids=["usual", "one-layer-one-expert", "warm-up-only", "one-step", "many-layers-and-experts"],
)
def test_report_of_any_size(tmp_path: Path, phase_S: list[str], E: int, layers: Sequence[int]) -> None:
    write_run(tmp_path, phase_S, E=E, layers=layers)
    report = make_report(tmp_path)
    assert_full_report(report)
    assert [layer.layer for layer in report.summary.layers] == list(layers)
    assert all(png.parent == tmp_path / "report" for png in report.pngs)


def test_a_stray_expert_stays_in_the_heat_map_of_many() -> None:
    S, E, stray = 700, 500, 123
    usage_SE = np.full((S, E), 0.25)
    usage_SE[:, stray] = 0.0
    layer = replace(traced([record(1, E=E)]), steps_S=np.arange(S), usage_SE=usage_SE)
    shown = np.ma.masked_array(_heat_map(Figure().subplots(), layer, 0.25).get_array())
    assert shown.shape == (MAX_HEATMAP_EXPERTS, MAX_HEATMAP_STEPS)
    # One row is "no token" from end to end, all others are at the target.
    assert shown.mask.all(axis=1).sum() == shown.mask.any(axis=1).sum() == 1
    assert not shown.compressed().any()


def test_top_k_baseline_gets_losses_and_header(tmp_path: Path) -> None:
    write_events(
        tmp_path / "tensorboard", losses(), {"num_experts": 16, "moe_router_topk": 2, "seq_length": 64}
    )
    report = make_report(tmp_path)
    assert [png.name for png in report.pngs] == ["loss.png"]
    assert_is_drawn(report.pngs[0])
    assert (report.summary.topk, report.summary.num_experts) == (2, 16)
    assert report.summary.tokens == 64 * 800
    assert report.summary.layers == []
    assert report.summary.window is None
    assert "no et_trace.jsonl" in report.markdown.read_text()


def test_a_dense_run_has_no_target_rate(tmp_path: Path) -> None:
    write_events(tmp_path, losses(), {"moe_router_topk": 2})
    summary = summary_of(tmp_path)
    assert (summary.topk, summary.target_rate) == (None, None)


def test_a_diverged_loss_is_null_in_json(tmp_path: Path) -> None:
    write_events(tmp_path, {"lm loss": [(10, 1.0), (20, float("nan"))]})
    assert json.loads(make_report(tmp_path).json.read_text())["training_loss"] == {"step": 20, "value": None}


def test_json_and_markdown_hold_the_table(tmp_path: Path) -> None:
    write_run(tmp_path, phases(2, 0, 5))
    report = make_report(tmp_path, tmp_path / "elsewhere" / "deep")
    assert report.json.parent == tmp_path / "elsewhere" / "deep"
    layers = json.loads(report.json.read_text())["layers"]
    assert layers[1] == vars(report.summary.layers[1])
    text = report.markdown.read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(layers)
    assert {line.replace("\\|", "").count("|") for line in table} == {9}
    assert f"| {100 * layers[0]['expert_usage_min']:.3g} / " in table[2]
    assert "warm-up, threshold from step 30" in text
    assert str(tmp_path) not in text + report.json.read_text()


def test_printed_report_is_whole_in_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run[1]"
    write_run(run, phases(1, 1, 2))
    report = make_report(run)
    print_report(report)
    out = capsys.readouterr().out
    for text in (
        "run[1]",
        "warm-up, anneal from step 20, threshold from step 30",
        "at step 40, threshold phase",
    ):
        assert text in out
    assert all(str(path) in out for path in report.pngs)
    fanout = report.summary.layers[0].fanout_mean
    assert fanout is not None
    assert f" {fanout:.3g} " in out
    assert "…" not in out


# --- alarms ---


def sick_trace(run: Path, **changes: Any) -> list[dict[str, Any]]:
    """Expert 0 of layer 3 gets twice its share from step 50 on."""
    records = [record(10 * n, E=4, layers=(2, 3)) for n in range(1, 16)]
    for line in records:
        for layer in line["layers"].values():
            layer |= {"usage": [0.25] * 4, "at_bound": [0.0] * 4}
        if line["step"] >= 50:
            line["layers"]["3"]["usage"] = [0.5, 0.2, 0.2, 0.1 + 0.06]
        line |= changes
    write_trace(run, records)
    return records


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without plots, which take a second."""
    from megatron_et.observe.report import plots

    monkeypatch.setattr(plots, "draw", lambda *_: [])


@pytest.mark.usefixtures("undrawn")
def test_alarms_are_in_every_form_of_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sick_trace(tmp_path)
    report = make_report(tmp_path)
    print_report(report)
    alarms = json.loads(report.json.read_text())["alarms"]
    assert [(a["rule"], a["layer"], a["experts"], a["since"], a["until"]) for a in alarms] == [
        ("load off target", 3, [0], 50, None)
    ]
    headline = "load off target in layer 3, since step 50"
    out = capsys.readouterr().out
    assert f"ALARM: {headline}" in out
    assert "1 on: load off target" in out
    for text in (out, report.markdown.read_text(), report.html.read_text()):
        flat = " ".join(re.sub("<[^>]*>", "", text).split())
        assert headline in flat
        assert "expert 0: load 2.00 times the target of 25 % of tokens, mean of 10 logged steps" in flat
        assert alarms[0]["remedy"] in flat.replace("&#x27;", "'")


@pytest.mark.usefixtures("undrawn")
def test_past_alarms_are_told_as_past(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = sick_trace(tmp_path)
    healthy = json.dumps(records[0])
    records += [{**json.loads(healthy), "step": 1000 + step} for step in range(30)]
    write_trace(tmp_path, records)
    report = make_report(tmp_path)
    print_report(report)
    assert report.summary.alarms == []
    headline = "load off target in layer 3, steps 50 to 1019"
    out = capsys.readouterr().out
    assert f"past alarm: {headline}" in out
    assert "none on; 1 past" in out
    assert headline in report.markdown.read_text()
    assert headline in report.html.read_text()


def test_layers_that_were_not_logged_at_a_step_do_not_stop_the_alarms(tmp_path: Path) -> None:
    records = sick_trace(tmp_path)
    del records[0]["layers"]["2"]
    write_trace(tmp_path, records)
    assert [alarm.layer for alarm in summary_of(tmp_path).alarms or []] == [3]


@pytest.mark.parametrize(
    ("make", "status"),
    [
        (sick_trace, 3),
        (lambda run: write_run(run, phases(0, 0, 3)), 0),
        (lambda run: write_events(run, losses()), 2),
    ],
    ids=["alarm", "healthy", "no-trace"],
)
@pytest.mark.usefixtures("undrawn")
def test_fail_on_alarm(
    tmp_path: Path, make: Callable[[Path], object], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path)
    assert cli.main(["report", str(tmp_path)]) == 0
    assert cli.main(["report", str(tmp_path), "--fail-on-alarm"]) == status
    assert ("--fail-on-alarm needs a trace" in capsys.readouterr().err) == (status == 2)


# --- the page ---

VOID = {"meta", "img", "br", "rect", "circle", "line"}


class Page(HTMLParser):
    """What a browser would build; every element must be closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.cells: list[str] = []
        self.data: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag == "td":
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, _: list[tuple[str, str | None]]) -> None:
        assert tag in VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.data[self.open[-1] if self.open else ""] = data
        if "td" in self.open:
            self.cells[-1] += data


def test_the_page_needs_nothing_else_and_holds_the_same_numbers(tmp_path: Path) -> None:
    run = tmp_path / "a <b> & 'c'"
    write_run(run, phases(2, 0, 5))
    arguments = {"world_size": 8, "moe_et_warmup_steps": 20, "</script>": 1}
    write_events(run / "arguments", {"lm loss": [(70, 4.3)]}, arguments)
    report = make_report(run)
    text = report.html.read_text()
    page = Page(text)
    assert text.startswith("<!doctype html>")
    assert page.data["h1"] == run.name
    # Nothing to load: pictures are in the page, and the policy forbids all else.
    assert len(page.references) == len(report.pngs)
    for reference, png in zip(page.references, report.pngs, strict=True):
        kind, _, data = reference.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == png.read_bytes()
    assert not re.search(r"https?:|url\(|@import|<link", text)
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\"" in text
    # The numbers are summary.json's: as data, and as shown.
    assert json.loads(page.data["script"]) == json.loads(report.json.read_text())
    for layer in report.summary.layers:
        shown = [column.cell(layer) for column in columns(report.summary)]
        at = page.cells.index(shown[0])
        assert page.cells[at : at + len(shown) + 1] == [shown[0], "", *shown[1:]]
    at = page.cells.index("world_size")
    assert page.cells[at : at + 2] == ["world_size", "8"]
    assert "none on" in text
    assert "prefers-color-scheme: dark" in text


def test_the_page_of_a_topk_run_has_no_alarms_and_no_layers(tmp_path: Path) -> None:
    write_events(tmp_path, losses(), {"num_experts": 16, "moe_router_topk": 2})
    text = make_report(tmp_path).html.read_text()
    Page(text)
    assert "<h2>Alarms" not in text
    assert "<h2>Loss" in text


def test_the_versions_that_trained_are_no_argument(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    writer.add_text(VERSIONS_TEXT, "megatron_et 0.1.0, <torch> 9")
    writer.add_text(ALARM_TEXT, "one", 5)
    writer.add_text("seed", "3")
    writer.add_scalar("lm loss", 1.0, 10)
    writer.close()
    data = read_run(tmp_path)
    assert data.tensorboard.arguments == {"seed": "3"}
    assert data.tensorboard.versions == "megatron_et 0.1.0, <torch> 9"
    assert "megatron_et 0.1.0, &lt;torch&gt; 9" in make_report(tmp_path).html.read_text()


# --- the command ---


def test_command_reports_and_returns_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, phases(2, 0, 4))
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "out"), "--last-steps", "3"]) == 0
    assert "mean over 3 logged steps, 40 to 60" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [*ALL_PNGS, "summary.json", "summary.md", "report.html"]
    )


def test_command_takes_inputs_from_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    write_run(run, phases(0, 0, 2))
    trace = write_trace(tmp_path / "other", [record(70)])
    write_events(tmp_path / "scalars", {"lm loss": [(5, 1.25)]})
    arguments = ["report", str(run), "--trace", str(trace), "--tensorboard-dir", str(tmp_path / "scalars")]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "at step 70" in out
    assert "1.2500 at step 5" in out


def test_event_files_of_several_folders_are_pointed_out(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_events(tmp_path / name, {"lm loss": [(10, 1.0)]})
    assert "TensorBoard files of several folders" in read_run(tmp_path).warnings[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/empty"], "nothing to report: no TensorBoard scalars in or below"),
        (["{tmp}/nowhere"], "nowhere is not a folder"),
        (["{tmp}/run", "--tensorboard-dir", "{tmp}/nowhere"], "nowhere is not a folder"),
        (["{tmp}/run", "--trace", "{tmp}/nowhere"], "nowhere is not a file"),
        (["{tmp}/run", "--last-steps", "0"], "--last-steps is 0"),
        (["{tmp}/run", "--out", "{tmp}/run/et_trace.jsonl"], "File exists"),
    ],
)
def test_command_fails_with_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    write_trace(tmp_path / "run", [record(10)])
    assert cli.main(["report", *(argument.format(tmp=tmp_path) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("megatron-et report: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_command_says_which_package_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in list(sys.modules):
        if module.startswith(("megatron_et.observe.report.plots", "matplotlib")):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr("megatron_et.observe.report.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "matplotlib is not installed: pip install 'megatron-et[report]'" in capsys.readouterr().err
