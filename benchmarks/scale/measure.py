"""What is measured here: loads of real training runs and gloo's times, as rows of scale_measured.csv."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks.environment import environment
from benchmarks.scale import check, runs
from benchmarks.scale.fit import fit
from benchmarks.scale.loads import Rule
from examples import quickstart
from tests.launch import TAIL, torchrun

RUNS = (("ET", 2), ("ET", 4), ("top-k", 2), ("top-k", 4), ("ET, C=0.5", 4))


class Measured(NamedTuple):
    """One number."""

    kind: str
    """environment, text (fitted to every other step), load (of the steps between), vector or routers."""
    setting: str
    ranks: int
    quantity: str
    value: str


def rule_of(router: str) -> Rule:
    """Which rule of the model a router follows."""
    return "top-k" if router == "top-k" else "ET"


def of_run(router: str, ranks: int, loads: runs.Loads) -> list[Measured]:
    """Text of every other step, loads of those between."""
    rows = []
    if router in ("ET", "top-k"):
        text = fit(loads.every_other(0), rule_of(router), check.group(ranks))
        rows += [Measured("text", router, ranks, *pair) for pair in _texts(vars(text))]
    between = check.summary(check.observed(loads.every_other(1), ranks))
    alike = check.layers_together(loads, ranks)
    between |= {f"layers together, {what}": value for what, value in alike.items()}
    if loads.at_bound is not None:
        between["at capacity bound, traced"] = loads.at_bound
    return rows + [Measured("load", router, ranks, *pair) for pair in _texts(between)]


def _texts(numbers: dict[str, float]) -> list[tuple[str, str]]:
    return [(name, f"{value:.6g}") for name, value in numbers.items()]


def of_gloo(ranks: int, scratch: Path) -> list[Measured]:
    """Times of plain and of real reductions."""
    output = scratch / f"gloo{ranks}.json"
    if not output.is_file():
        run = torchrun(["benchmarks/scale/gloo.py", str(output)], ranks)
        if run.returncode != 0:
            raise SystemExit(f"scale_model: gloo.py failed:\n{run.stdout[-TAIL:]}")
    return gloo_rows(ranks, json.loads(output.read_text()))


def gloo_rows(ranks: int, found: dict[str, dict]) -> list[Measured]:
    """Rows of gloo.py's output."""
    rows = [Measured("vector", "", ranks, size, f"{value:.6g}") for size, value in found["vectors"].items()]
    for name, times in found["routers"].items():
        rows += [Measured("routers", name, ranks, *pair) for pair in _texts(times)]
    return rows


def measure(scratch: Path) -> list[Measured]:
    """Everything; about 15 minutes on 2 cores. What is in `scratch` already is not done again."""
    quickstart.prepare_data(scratch / "corpus", scratch / "data")
    rows = [Measured("environment", "", 0, *pair) for pair in environment().items()]
    for ranks in (2, 4):
        rows += of_gloo(ranks, scratch)
    for router, ranks in RUNS:
        rows += of_run(router, ranks, runs.train(router, ranks, scratch / "data", scratch / "runs"))
    return rows


def write(rows: Iterable[Measured], path: Path) -> None:
    """As CSV."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Measured._fields)
        writer.writerows(rows)


def read(path: Path) -> list[Measured]:
    """As written."""
    with path.open() as file:
        return [Measured(**row | {"ranks": int(row["ranks"])}) for row in csv.DictReader(file)]


def numbers(rows: Iterable[Measured], kind: str, setting: str, ranks: int) -> dict[str, float]:
    """quantity -> value of one run."""
    wanted = (kind, setting, ranks)
    return {row.quantity: float(row.value) for row in rows if row[:3] == wanted}
