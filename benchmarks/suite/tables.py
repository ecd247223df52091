"""Results as Markdown, also the README's table: ratios to top-k with an auxiliary loss, side by side in
one run."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.suite.methods import METHODS
from benchmarks.suite.results import RESULTS, Row, read

BASELINE = "topk-aux"
BEGIN, END = "<!-- speed: written by python -m benchmarks table -->", "<!-- end of speed -->"
DEVICES = {"cuda": "a GPU", "cpu": "2 CPU cores"}
README_COLUMNS = {
    "router": "router forward + backward, ms",
    "layer": "MoE layer forward + backward, ms",
    "step": "training step, ms",
    "memory": "kept by a MoE layer, MiB",
}
QUANTITY = {"router": "both", "layer": "both", "step": "step", "memory": "kept"}


def result_file(level: str, device: str, folder: Path = RESULTS) -> Path:
    """Where the rows of a level and device are."""
    return folder / f"{level}_{device}.csv"


def ratios(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, float]]:
    """(case, quantity) -> method -> median over the baseline's; rows of other work (fan-out) are left out."""
    table: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row.measured and not row.note:
            table.setdefault((row.case, row.quantity), {})[row.method] = row.median
    return {
        key: {method: median / medians[BASELINE] for method, median in medians.items()}
        for key, medians in table.items()
        if medians.get(BASELINE)
    }


def markdown(rows: Sequence[Row], level: str, device: str) -> str:
    """Everything that a file holds: a table a case, methods down, quantities across."""
    lines = [
        f"# Level `{level}`, {_name(rows, device)}",
        "",
        f"Written by `python -m benchmarks run {level}`; the csv beside it has every number with its 20 % "
        "and 80 % quantiles. "
        f"Median [ratio to `{BASELINE}` of the same run]. Methods of one case were measured in turns.",
        "",
    ]
    for environment in sorted({row.environment for row in rows}):
        lines += [f"Environment: {environment}.", ""]
    for case in dict.fromkeys(row.case for row in rows):
        here = [row for row in rows if row.case == case]
        quantities = list(dict.fromkeys(row.quantity for row in here if row.measured))
        heads = [f"{q}, {next(r.unit for r in here if r.quantity == q and r.measured)}" for q in quantities]
        lines += [f"## {case}", "", f"| method | {' | '.join(heads)} | mean fan-out | max / mean load | |"]
        lines += ["| --- |" + " ---: |" * (len(heads) + 2) + " --- |"]
        for method in dict.fromkeys(row.method for row in here):
            own = {row.quantity: row for row in here if row.method == method}
            cells = [_cell(own.get(q), here) for q in quantities]
            one = next(iter(own.values()))
            shown = [f"`{method}`", *cells, _number(one.fanout), _number(one.max_load), one.note]
            lines.append(f"| {' | '.join(shown)} |")
        lines.append("")
    lines += ["Methods:", ""]
    lines += [
        f"- `{name}`: {METHODS[name].source}" for name in METHODS if any(row.method == name for row in rows)
    ]
    return "\n".join(lines) + "\n"


def _name(rows: Sequence[Row], device: str) -> str:
    """What the rows were measured on."""
    names = {found[1] for row in rows if (found := re.search(r"GPU=([^;]+)", row.environment))}
    return ", ".join(sorted(names)) if device == "cuda" and names else DEVICES[device]


def _cell(row: Row | None, here: Sequence[Row]) -> str:
    if row is None or not row.measured:
        return "-"
    base = [r for r in here if r.method == BASELINE and r.quantity == row.quantity and r.measured]
    # At the boundary an auxiliary loss does nothing, and nothing is no measure.
    compared = base and row.unit == "ms" and row.quantity != "boundary"
    ratio = f" [{row.median / base[0].median:.2f}]" if compared else ""
    return f"{row.median:.4g}{ratio}"


def _number(value: float) -> str:
    return "" if value != value else f"{value:.3f}"


def readme_table(folder: Path = RESULTS) -> str:
    """The README's part: one case a level and device, medians and ratios; what is not measured is said."""
    heads = ["method", *README_COLUMNS.values()]
    lines = []
    for device in DEVICES:
        found = {level: read(result_file(level, device, folder)) for level in README_COLUMNS}
        if not any(found.values()):
            lines += [f"On {DEVICES[device]}: not measured yet.", ""]
            continue
        where = _name([row for rows in found.values() for row in rows], device)
        chosen = {level: _chosen(level, rows) for level, rows in found.items()}
        lines += [f"On {where}, median [ratio to `{BASELINE}`]:", ""]
        lines += [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * len(README_COLUMNS)]
        names = dict.fromkeys(row.method for rows in chosen.values() for row in rows)
        for name in [n for n in METHODS if n in names]:
            cells = [
                _cell(next((r for r in rows if r.method == name and not r.note), None), rows)
                for rows in chosen.values()
            ]
            if any(cell != "-" for cell in cells):
                lines.append(f"| `{name}` | {' | '.join(cells)} |")
        lines.append("")
        cases = [f"{level}: {rows[0].case}" for level, rows in chosen.items() if rows]
        lines += [f"{'; '.join(cases)}.", ""]
        missing = [level for level, rows in chosen.items() if not rows]
        if missing:
            lines += [f"Not measured: {', '.join(missing)}.", ""]
    return "\n".join(lines).rstrip() + "\n"


PREFERRED = {"router": "T16384 E128 k8 balanced", "layer": "balanced", "memory": "balanced"}


def _chosen(level: str, rows: Sequence[Row]) -> list[Row]:
    """The rows of the level's one case in the README."""
    wanted = [row for row in rows if row.quantity == QUANTITY[level]]
    cases = [row.case for row in wanted if row.case.endswith(PREFERRED.get(level, ""))]
    return [row for row in wanted if cases and row.case == cases[0]]


def put_into(document: str, table: str) -> str:
    """The document with the table between its markers.

    Raises:
        ValueError: the markers are not there.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the document must hold {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table}\n{END}{after}"
