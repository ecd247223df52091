"""The benchmark suite: what it compares is what it says, and its files say what was measured.

Dimension letters: T tokens, E experts.
"""

import argparse
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.suite import step_level, tables
from benchmarks.suite.compare import changes, text
from benchmarks.suite.methods import METHODS
from benchmarks.suite.results import Row, read, row, write
from benchmarks.suite.router_level import fanout_note, minimal_bytes
from benchmarks.suite.timing import Spread, Stopwatch, in_turns
from benchmarks.suite.workloads import WORKLOADS, Shape, natural
from tests.launch import ROOT, TAIL
from tests.megatron_here import needs_newest

SHAPE = Shape(tokens=64, experts=16, topk=2, ranks=2, rank=1)


def topk_loads(logits_TE: torch.Tensor, topk: int) -> torch.Tensor:
    return torch.zeros_like(logits_TE).scatter_(1, logits_TE.topk(topk, dim=1).indices, 1.0).sum(dim=0)


@pytest.mark.parametrize("name", WORKLOADS)
def test_streams_repeat_and_differ_by_step_and_rank(name: str) -> None:
    stream = WORKLOADS[name]
    logits_TE = stream(SHAPE, 3)
    assert logits_TE.shape == (64, 16)
    assert logits_TE.dtype == torch.float32
    assert torch.equal(logits_TE, stream(SHAPE, 3))
    other_rank = Shape(tokens=64, experts=16, topk=2, ranks=2, rank=0)
    assert not torch.equal(logits_TE, stream(SHAPE, 4))
    assert not torch.equal(logits_TE, stream(other_rank, 3))


def test_what_is_hot() -> None:
    shape = Shape(tokens=4096, experts=16, topk=2, ranks=2)

    def loads(name: str, step: int = 0) -> torch.Tensor:
        return topk_loads(WORKLOADS[name](shape, step), shape.topk)

    fair = shape.tokens * shape.topk / shape.experts
    assert loads("balanced").tolist() == [fair] * 16
    assert loads("independent").max() < 1.2 * fair
    assert loads("hot-expert")[0] > 3 * fair
    assert loads("hot-rank")[:8].min() > 1.3 * fair
    assert loads("zero-token-rank")[8:].max() == 0
    assert [int(loads("rotating", step).argmax()) for step in range(18)] == [*range(16), 0, 1]
    calm = [loads("burst", step).max() < 1.2 * fair for step in range(10)]
    assert calm == [True, True, True, True, False] * 2


def test_natural_logits_go_through_the_text_and_name_a_wrong_shape(tmp_path: Path) -> None:
    path = tmp_path / "logits.npz"
    recorded_NE = np.arange(96.0 * 16).reshape(96, 16)
    np.savez(path, logits=recorded_NE)
    stream = natural(path)
    seen = [stream(Shape(32, 16, 2, 2, rank), step)[0, 0].item() / 16 for step in (0, 1) for rank in (0, 1)]
    assert seen == [0, 32, 64, 0]
    with pytest.raises(ValueError, match="holds logits of 16 experts, the case has 8"):
        stream(Shape(32, 8, 2), 0)


@needs_newest
@pytest.mark.filterwarnings("ignore::UserWarning")  # Megatron says at import what is not installed
@pytest.mark.parametrize("name", METHODS)
def test_flags_of_a_method_give_its_settings(name: str) -> None:
    """A method is the same thing in a layer and in a training run."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_et.config import ExpertThresholdConfig
    from megatron_et.host.arguments import add_arguments

    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    args = parser.parse_args(METHODS[name].flags())
    method = METHODS[name]
    parsed = {key: getattr(args, key) for key in method.config}
    # Lists of one, until Megatron validates them.
    alone = {key: value[0] if isinstance(value, list) else value for key, value in parsed.items()}
    assert alone == method.config
    settings = ExpertThresholdConfig.from_args(args)
    assert settings == ExpertThresholdConfig(**method.et or {})


def test_spread_and_turns() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == Spread(3.5, 2.0, 5.0, 6)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 1)
    order: list[str] = []
    taken = in_turns(
        {name: lambda name=name: (order.append(name), float(len(order)))[1] for name in ("a", "b")},
        warmups=1,
        samples=2,
    )
    assert order == ["a", "b"] * 3
    assert taken == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert Stopwatch("cpu")(lambda: sum(range(1000))) > 0.0


def test_minimal_bytes() -> None:
    """T = 2, E = 3: six fp32 logits in, six gates and flags out; gates and two gradients on the way back."""
    assert minimal_bytes(2, 3) == {"forward": 24 + 24 + 6, "backward": 24 * 3, "both": 126}


def test_another_amount_of_work_is_said() -> None:
    assert fanout_note(2.01, 2) == ""
    assert fanout_note(1.9, 2) == "not comparable: mean fan-out 1.900, not 2"


def a_row(method: str, *values: float, **given: object) -> Row:
    settings = {"level": "router", "case": "T16384 E128 k8 balanced", "quantity": "both"} | given
    fanout = settings.pop("fanout", 8.0)
    return row(
        str(settings["level"]), str(settings["case"]), method, str(settings["quantity"]), "CPU=x",
        values=values, fanout=fanout, note=str(settings.get("note", "")),
    )  # fmt: skip


def same(left: Row, right: Row) -> bool:
    """Equal, NaN too."""
    return repr(left) == repr(right)


def test_files_keep_what_was_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    missing = a_row("topk-fused", note="not run: no GPU")
    first = [a_row("et", 1.0, 2.0, 3.0), a_row("topk-aux", 4.0), missing]
    write(path, first)
    assert all(map(same, read(path), first))
    again = a_row("et", 5.0)
    write(path, [again])
    assert all(map(same, read(path), [again, *first[1:]]))
    assert not missing.measured
    assert read(tmp_path / "nothing.csv") == []
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has the columns"):
        read(path)


def test_compare_tells_changes_from_noise() -> None:
    old = [a_row("et", 1.0, 1.1, 1.2), a_row("topk", 1.0, 2.0, 3.0), a_row("topk-fused")]
    new = [a_row("et", 2.0, 2.1, 2.2), a_row("topk", 1.5, 2.5, 3.5), a_row("topk-fused")]
    found = changes(old, new)
    assert [(change.new.method, change.beyond_noise) for change in found] == [("et", True), ("topk", False)]
    assert found[0].ratio == pytest.approx(2.1 / 1.1)
    lines = text(found).splitlines()
    assert "et" in lines[1]
    assert lines[2].endswith("within noise")
    assert text([]) == "nothing was measured in both files"


def test_tables_leave_other_work_out_of_the_ratios(tmp_path: Path) -> None:
    rows = [
        a_row("topk-aux", 4.0), a_row("et", 1.0),
        a_row("ec", 2.0, note="not comparable: mean fan-out 3.000, not 8", fanout=3.0),
        a_row("topk-fused", note="not run: no GPU"),
    ]  # fmt: skip
    [only] = tables.ratios(rows).values()
    assert only == {"topk-aux": 1.0, "et": 0.25}
    page = tables.markdown(rows, "router", "cpu")
    assert "| `et` | 1 [0.25] | 8.000 |" in page
    assert "not comparable: mean fan-out 3.000" in page
    assert "| `topk-fused` | - |" in page
    write(tables.result_file("router", "cpu", tmp_path), rows)
    table = tables.readme_table(tmp_path)
    assert "| `et` | 1 [0.25] | - | - | - |" in table
    assert "`ec`" not in table
    assert "Not measured: layer, step, memory." in table
    assert "On a GPU: not measured yet." in table


def test_the_table_goes_between_its_markers() -> None:
    document = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter"
    assert tables.put_into(document, "new") == f"before\n{tables.BEGIN}\n\nnew\n{tables.END}\nafter"
    with pytest.raises(ValueError, match="must hold"):
        tables.put_into("no markers", "new")


def test_readme_table_is_written_from_the_results() -> None:
    readme = (ROOT / "README.md").read_text()
    assert tables.put_into(readme, tables.readme_table()) == readme, "run `python -m benchmarks table`"


def test_a_training_run_is_read() -> None:
    output = "\n".join(
        f" iteration {step:8}/ 10 | elapsed time per iteration (ms): {100.0 + step} | "
        f"throughput per GPU (TFLOP/s/GPU): {step / 2} | lm loss: {5.0 - step / 10:.6E} | loss scale: 1.0 |"
        for step in range(1, 11)
    )
    trace = [{"step": step, "layers": {"2": {"usage": [0.5, 1.0, 0.5]}}} for step in range(1, 11)]
    measured = step_level.Measured()
    step_level._add(measured, step_level.Run(output, trace), skipped=4, topk=2)
    assert measured.milliseconds == [105.0, 106.0, 107.0, 108.0, 109.0, 110.0]
    assert measured.tflops == [2.5, 3.0, 3.5, 4.0, 4.5, 5.0]
    assert measured.losses == [pytest.approx(4.0)]
    assert measured.fanouts == [2.0]
    assert measured.max_loads == [pytest.approx(1.5)]
    assert step_level.throughputs("throughput per GPU (TFLOP/s/GPU): 0.0 | x") == []


@needs_newest
@pytest.mark.distributed
@pytest.mark.parametrize("level", ["router", "layer", "memory"])
def test_a_level_runs(level: str, tmp_path: Path) -> None:
    """Real routers and layers, one case, fewest samples: equal work, numbers, table and picture."""
    command = [sys.executable, "-m", "benchmarks", "run", level, "--first", "1", "--samples", "1"]
    command += ["--methods", "topk-aux", "topk-fused", "et", "--output", str(tmp_path)]
    env = {**os.environ, "MEGATRON_ET_CPU": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, (run.stdout + run.stderr)[-TAIL:]
    rows = {(r.method, r.quantity): r for r in read(tmp_path / f"{level}_cpu.csv")}
    quantity = tables.QUANTITY[level]
    ours, theirs = rows["et", quantity], rows["topk-aux", quantity]
    assert ours.median > 0
    assert theirs.median > 0
    assert ours.fanout == pytest.approx(theirs.fanout, rel=0.02)
    assert not ours.note
    # Balanced logits are one map for every router, so the experts' work is the same.
    assert ours.max_load == pytest.approx(1.0, abs=0.02)
    fused = next(r for r in rows.values() if r.method == "topk-fused")
    assert math.isnan(fused.median)
    assert fused.note.startswith("not run: ")
    if level == "memory":
        # Five bytes a pair of token and expert, and what ties at the threshold add.
        assert ours.median < theirs.median + 0.02 * theirs.median
    assert (tmp_path / f"{level}_cpu.md").read_text().startswith(f"# Level `{level}`")
    assert (tmp_path / f"{level}_cpu.png").stat().st_size > 1000


def test_comparing_a_file_that_is_not_there_is_an_error() -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "compare",
        "benchmarks/results/router_cpu.csv",
        "no/such.csv",
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "no/such.csv is no file" in run.stderr


def test_kernel_times_need_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks import kernel_times

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["kernel_times.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="no GPU is visible: nothing was measured"):
        kernel_times.main()
    assert not list(tmp_path.iterdir())


def test_the_page_of_kernel_times_selects_three_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arithmetic, with times that are given, and that each way finds the same: no GPU."""
    from benchmarks import kernel_times

    watched: list[list[torch.Tensor]] = []
    on_cpu = SimpleNamespace(
        randn=lambda *shape, **_: torch.randn(*shape),
        full=lambda shape, value, **_: torch.full(shape, value),
        Generator=lambda _: SimpleNamespace(manual_seed=lambda _: None),
    )
    monkeypatch.setattr(kernel_times, "torch", on_cpu)
    monkeypatch.setattr(kernel_times, "Stopwatch", lambda _: lambda way: watched.append(way()) or 1.0)
    monkeypatch.setattr("megatron_et.rule.kernels.native.reads", lambda _: False)
    times = {"topk": 0.3, "sort": 0.2, "cuda": 0.05}

    def given(turns: dict[str, Any]) -> dict[str, list[float]]:
        return {name: [turn() * times[name]] * 3 for name, turn in turns.items()}

    monkeypatch.setattr(kernel_times, "in_turns", given)
    assert kernel_times.selection_row(64, 8, 1) == "| T64 E8 | 300.0 | 200.0 | 50.0 |"
    for found in watched:
        torch.testing.assert_close(found, watched[0], rtol=0, atol=0)
    assert len(watched) == 3
    assert (watched[0][0] > watched[0][1]).all()  # 4 and 12 tokens


def test_the_page_of_kernel_times_compares_with_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arithmetic, with times that are given: no GPU."""
    from benchmarks import kernel_times

    passes = SimpleNamespace(run=lambda *_: None, host=lambda *_: 150.0)
    monkeypatch.setattr(kernel_times, "Passes", lambda *_: passes)
    monkeypatch.setattr(kernel_times, "Stopwatch", lambda _: None)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: (None, None))

    def given(turns: dict[tuple[object, str], object]) -> dict[object, list[float]]:
        times = {("copy", "both"): 0.020, (("cuda", True), "both"): 0.030}
        return {name: [times.get(name, 0.010)] * 3 for name in turns}

    monkeypatch.setattr(kernel_times, "in_turns", given)
    lines = list(kernel_times.rows(64, 8, 1))
    assert lines[0] == "| T64 E8 | copy | 10.0 | 20.0 | 1.00 | - |"
    assert "| T64 E8 | `cuda`, statistics included | 10.0 | 30.0 | 1.50 | 150 |" in lines
    assert len(lines) == 5
