"""The parts of benchmarks/fp8_loss.py that need no GPU: flags, reading logs, the comparison, the files."""

from pathlib import Path

import pytest

from benchmarks.fp8_loss import Row, compare, flags, merged, plan, read_csv, read_log, report, write_csv

LOG = """
 [2026-11-24 04:00:00] iteration        1/       3 | consumed samples:           16 | elapsed time per \
iteration (ms): 812.5 | throughput | learning rate: 3.0E-05 | global batch size:    16 | lm loss: 8.4E+00 | \
loss scale: 1.0 | grad norm: 3.1 |
step 2 | et: nothing to read here
 [2026-11-24 04:00:01] iteration        2/       3 | consumed samples:           32 | elapsed time per \
iteration (ms): 201.0 | learning rate: 6.0E-05 | global batch size:    16 | lm loss: 8.000000E+00 | \
loss scale: 1.0 | grad norm: 2.1 |
 validation loss at iteration 2 | lm loss value: 7.0E+00 | lm loss PPL: 1.0E+03 |
"""


def run(router: str, recipe: str, seed: int, losses: list[float], where: str = "H100") -> list[Row]:
    return [
        Row(router, recipe, seed, step, loss, 100.0 + step, where)
        for step, loss in enumerate(losses, start=1)
    ]


def test_log_is_read() -> None:
    assert read_log(LOG) == {1: (8.4, 812.5), 2: (8.0, 201.0)}


def test_last_steps_are_compared_with_bf16_of_the_first_seed() -> None:
    rows = [
        *run("topk", "none", 7, [9.0, 4.0, 3.0]),
        *run("topk", "none", 8, [9.0, 4.5, 3.5]),
        *run("topk", "delayed", 7, [0.0, 4.25, 2.5]),
        *run("et", "delayed", 7, [0.0, 1.0, 2.0]),
    ]
    base, seed, fp8, alone = compare(rows, 2)
    assert (base.loss, base.difference, base.distance, base.milliseconds) == (3.5, None, None, 102.5)
    assert (seed.difference, seed.distance) == (0.5, 0.5)
    assert (fp8.loss, fp8.difference, fp8.distance) == (3.375, -0.125, 0.375)
    assert (alone.loss, alone.difference) == (1.5, None)
    text = report([base, fp8], 2, {"machine": "H100"})
    assert "| topk | none | 7 | 3.5000 | - | - | 102 |" in text
    assert "| topk | delayed | 7 | 3.3750 | -0.1250 | 0.3750 | 102 |" in text
    assert "- machine: H100" in text


def test_runs_of_different_length_are_not_compared() -> None:
    rows = [*run("topk", "none", 7, [9.0, 4.0, 3.0]), *run("topk", "delayed", 7, [0.0, 4.0])]
    with pytest.raises(ValueError, match="not the same steps"):
        compare(rows, 2)
    with pytest.raises(ValueError, match="2 steps, 3 are compared"):
        compare(rows, 3)


def test_a_run_replaces_its_own_rows_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "fp8_loss.csv"
    assert read_csv(file) == []
    bf16, fp8 = run("topk", "none", 7, [9.0, 4.0]), run("topk", "delayed", 7, [9.5, 4.5])
    write_csv(file, [*bf16, *fp8])
    again = run("topk", "delayed", 7, [9.25])
    assert merged(read_csv(file), again) == [*bf16, *again]
    with pytest.raises(ValueError, match=r"different machines.*H100, H200"):
        merged(bf16, run("topk", "delayed", 7, [9.0], "H200"))


def test_plan_and_flags() -> None:
    runs = plan(["topk"], ["none", "delayed"], [7, 8])
    assert runs == [("topk", "none", 7), ("topk", "none", 8), ("topk", "delayed", 7)]
    bf16 = flags("h100", "expert-threshold", "none", 7, 200)
    fp8 = flags("h100", "expert-threshold", "tensorwise", 7, 200)
    assert fp8 == [*bf16, "--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"]
    assert bf16[bf16.index("--moe-et-warmup-steps") + 1] == "50"
    assert bf16[bf16.index("--seed") + 1] == "7"
    assert "--mock-data" not in flags("small", "topk", "none", 7, 4)
