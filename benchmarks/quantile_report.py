"""Tables and plot from quantile_error.csv. Cells are text; an empty cell is a limit that was not reached."""

import csv
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import matplotlib as mpl
import torch

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

type Row = dict[str, str]

ROOT = Path(__file__).resolve().parents[1]
SHOWN_GUARDS = (
    "none",
    "clamp",
    "restart",
    "restart after 2",
    "restart after 3",
    "clamp and hurry",
    "tracking signal x3",
)
COLORS = {"4096": "#0072B2", "65536": "#D55E00", "1048576": "#009E73"}
SIZE_NAMES = {"4096": "4k tokens", "65536": "64k tokens", "1048576": "1M tokens"}


def read(path: Path) -> list[Row]:
    """All rows."""
    with path.open() as file:
        return list(csv.DictReader(file))


def select(rows: Iterable[Row], **wanted: str) -> list[Row]:
    """Rows whose columns have these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def distinct(rows: Iterable[Row], column: str) -> list[str]:
    """Values of a column, in order of appearance."""
    return list(dict.fromkeys(row[column] for row in rows))


def percent(row: Row, column: str, digits: int = 2) -> str:
    """A share as a percentage, without a sign for the zero that rounding makes."""
    return f"{round(100 * float(row[column]), digits) + 0.0:.{digits}f} %" if row[column] else "-"


def count(row: Row, column: str) -> str:
    """A number of batches; > means: not by the end of the run."""
    return row[column] or "not"


def pivot(
    rows: Sequence[Row], across: str, down: Sequence[str], cell: Callable[[Row], str], name: str = "{}"
) -> list[str]:
    """A markdown table: a line for each combination of the `down` columns, a column a value of `across`."""
    heads = distinct(rows, across)
    lines = ["| " + " | ".join([*down, *(name.format(head) for head in heads)]) + " |"]
    lines.append("| " + " | ".join(["---"] * (len(down) + len(heads))) + " |")
    keys = list(dict.fromkeys(tuple(row[key] for key in down) for row in rows))
    for key in keys:
        here = {row[across]: row for row in rows if tuple(row[k] for k in down) == key}
        cells = [cell(here[head]) if head in here else "" for head in heads]
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    return [*lines, ""]


def environment(how: str) -> list[str]:
    """Where and when the numbers were made."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        if cpuinfo.exists()
        else []
    )
    cpu = names[0].split(":")[1].strip() if names else platform.machine()
    made = f"{datetime.now(UTC):%Y-%m-%d}, commit {commit or 'unknown'}"
    return [
        f"{made}; {cpu}, one core; Python {platform.python_version()}, torch {torch.__version__}; {how}.",
        "",
    ]


def estimator_tables(rows: Sequence[Row]) -> list[str]:
    """Single batches."""
    lines = ["## One batch: mean load error / rms of the population's load at its cutoff", ""]
    lines += [
        "Centre (full run): 128 experts, topk 8, 8 ranks x 2 micro-batches x 4,096 tokens, normal logits.",
        "",
    ]
    cell = lambda row: f"{percent(row, 'load_bias')} / {percent(row, 'load_rms')}"  # noqa: E731
    down = ["sweep", "value", "tokens", "ranks", "microbatch"]
    lines += pivot(rows, "estimator", down, cell)
    lines += ["Largest load error of all experts, mean over batches:", ""]
    return lines + pivot(rows, "estimator", down, lambda row: percent(row, "max_violation", 1))


def settled_tables(rows: Sequence[Row]) -> list[str]:
    """Thresholds that have settled."""
    lines = [f"## {rows[0]['case'].capitalize()}: mean load error / rms on the next batch's population", ""]
    cell = lambda row: f"{percent(row, 'load_bias')} / {percent(row, 'load_rms')}"  # noqa: E731
    down = ["sweep", "value", "drift", "estimator"]
    lines += pivot(rows, "beta", down, cell, "beta {}")
    lines += ["Threshold noise in sd of the logits, measured / sqrt((1-beta)/(1+beta)) x sampling sd:", ""]
    still = select(rows, drift="0")
    cell = lambda row: f"{float(row['threshold_sd']):.2g} / {float(row['predicted_sd']):.2g}"  # noqa: E731
    return lines + pivot(still, "beta", down, cell, "beta {}")


def optimum_tables(rows: Sequence[Row]) -> list[str]:
    """Closed form against simulation."""
    lines = ["## Best beta for a steady drift (sd of the logits per batch)", ""]
    lines += [
        "| tokens | unevenness | drift | closed form | best of grid | rms at the closed form | at the best |"
    ]
    lines += ["| " + " | ".join(["---"] * 7) + " |"]
    for row in select(rows, sweep="best"):
        best, closed = float(row["best_beta"]), float(row["closed_form_beta"])
        case = f"{row['tokens']} | {row['unevenness']} | {row['drift']}"
        errors = f"{float(row['rms_at_closed_form']):.2g} | {float(row['rms_at_best']):.2g}"
        lines.append(f"| {case} | {closed:.4f} | {best:.4f} | {errors} |")
    return [*lines, ""]


def warmup_tables(rows: Sequence[Row]) -> list[str]:
    """From nothing."""
    lines = ["## Batches until a new threshold's mean |load error| stays within 5 % / 1 %", ""]
    lines += ["`young d`: the logits' mean moves d / batch sd; `not`: not within 57,000 batches.", ""]
    cell = lambda row: f"{count(row, 'within_0.05')} / {count(row, 'within_0.01')}"  # noqa: E731
    return lines + pivot(rows, "beta", ["event", "unevenness", "tokens"], cell, "beta {}")


def recovery_tables(rows: Sequence[Row]) -> list[str]:
    """After an event, no guard."""
    lines = ["## Recovery without a guard: batches until mean |load error| stays within 10 %", ""]
    lines += pivot(rows, "beta", ["event", "tokens"], lambda row: count(row, "within_0.1"), "beta {}")
    lines += ["Largest / least load error of an expert after the first batch, 64k tokens:", ""]
    cell = lambda row: f"{float(row['violation_later']):.2f} / {float(row['starvation_later']):.2f}"  # noqa: E731
    return lines + pivot(select(rows, tokens="65536"), "beta", ["event"], cell, "beta {}")


def guard_tables(still: Sequence[Row], events: Sequence[Row]) -> list[str]:
    """Guards: what they cost and what they gain."""
    lines = ["## Guards when nothing happens: load rms (false alarms per million expert-batches)", ""]

    def cost(row: Row) -> str:
        alarms = float(row["restarts_per_million"]) + float(row["clamps_per_million"])
        return f"{percent(row, 'load_rms')} ({alarms:.0f})"

    lines += [
        "`uneven batches`: every 2,048 tokens share an offset of 0.5 sd, new each batch. `1 % odd batches`:"
    ]
    lines += ["an expert's logits are shifted by an offset of 1 sd in 1 % of the batches.", ""]
    for beta in [beta for beta in distinct(still, "beta") if beta in ("0.99", "0.999")]:
        lines += [f"beta {beta}:", ""]
        rows = [row | {"batch": f"{row['event']}, {row['tokens']}"} for row in select(still, beta=beta)]
        lines += pivot(rows, "batch", ["guard", "band"], cost)
    lines += [
        "## Guards after an event: batches to within 10 % / batches' worth of load error above 10 %",
        "",
    ]
    lines += ["64k tokens; `not`: not within the run.", ""]
    for beta in [beta for beta in distinct(events, "beta") if beta in ("0.99", "0.999")]:
        lines += [f"beta {beta}:", ""]
        cell = lambda row: f"{count(row, 'within_0.1')} / {float(row['excess']):.0f}"  # noqa: E731
        lines += pivot(select(events, beta=beta, tokens="65536"), "event", ["guard", "band"], cell)
    lines += ["Restart after 3 with G = 0.5, all batch sizes and betas: batches to within 10 %:", ""]
    chosen = select(events, guard="restart after 3", band="0.5")
    lines += pivot(chosen, "beta", ["event", "tokens"], lambda row: count(row, "within_0.1"), "beta {}")
    lines += ["The same, largest / least load error of an expert after the first batch:", ""]
    cell = lambda row: f"{float(row['violation_later']):.2f} / {float(row['starvation_later']):.2f}"  # noqa: E731
    return lines + pivot(chosen, "beta", ["event", "tokens"], cell, "beta {}")


def write_tables(source: Path, target: Path, how: str) -> None:
    """quantile_error.md of the cases that the csv has."""
    rows = read(source)
    cases = {case: select(rows, case=case) for case in distinct(rows, "case")}
    lines = ["# Quantile error", "", "Written by `benchmarks/quantile_error.py` from quantile_error.csv.", ""]
    lines += environment(how)
    if "estimator" in cases:
        lines += estimator_tables(cases["estimator"])
    for case in ("settled", "settled estimator"):
        lines += settled_tables(cases[case]) if case in cases else []
    lines += optimum_tables(cases["optimum"]) if "optimum" in cases else []
    lines += warmup_tables(cases["warm-up"]) if "warm-up" in cases else []
    lines += recovery_tables(cases["recovery"]) if "recovery" in cases else []
    if "guard, still" in cases and "guard, event" in cases:
        lines += guard_tables(cases["guard, still"], cases["guard, event"])
    target.write_text("\n".join(lines).rstrip() + "\n")


def _estimator_panel(axes: Axes, rows: Sequence[Row], sweep: str, label: str, *, log: bool) -> None:
    for name in distinct(rows, "estimator"):
        here = select(rows, sweep=sweep, estimator=name)
        x = [float(row["value"]) for row in here]
        axes.plot(x, [100 * abs(float(row["load_bias"])) for row in here], "o-", ms=4, label=name)
    axes.set(xlabel=label, ylabel="|mean load error|, %", yscale="log", xscale="log" if log else "linear")
    axes.set_title("one batch; exact and histogram: sampling noise only", fontsize=9)
    axes.legend(fontsize=7)


def _noise_panel(axes: Axes, rows: Sequence[Row]) -> None:
    for tokens, color in COLORS.items():
        here = select(rows, sweep="grid", tokens=tokens, drift="0.001", unevenness="0")
        x = [1.0 - float(row["beta"]) for row in here]
        axes.plot(
            x, [float(row["threshold_rms"]) for row in here], "o", ms=4, color=color, label=SIZE_NAMES[tokens]
        )
        axes.plot(x, [float(row["predicted_rms"]) for row in here], "-", lw=1, color=color)
    axes.set(xscale="log", yscale="log", xlabel="1 - beta", ylabel="threshold rms error, sd")
    axes.set_title("drift 0.001 sd a batch; lines: closed form", fontsize=9)
    axes.legend(fontsize=7)


def _batches_panel(axes: Axes, rows: Sequence[Row], column: str, lines: str, tokens: str, title: str) -> None:
    for name in distinct(rows, lines):
        here = [row for row in select(rows, tokens=tokens, **{lines: name}) if row[column]]
        here = [row for row in here if float(row["beta"]) > 0 and float(row[column]) > 0]
        x = [1.0 - float(row["beta"]) for row in here]
        axes.plot(x, [float(row[column]) for row in here], "o-", ms=4, label=name)
    axes.set(xscale="log", yscale="log", xlabel="1 - beta", ylabel="batches")
    axes.invert_xaxis()
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=5.5, framealpha=0.6)


def _guard_panel(axes: Axes, still: Sequence[Row], events: Sequence[Row]) -> None:
    for guard in SHOWN_GUARDS:
        gain = select(events, tokens="65536", event="shift per expert, sd 1", guard=guard)
        for beta in [beta for beta in distinct(gain, "beta") if beta == "0.99"]:
            points = []
            for row in select(gain, beta=beta):
                if row["band"] == "5/sqrt(k)":
                    continue
                cost = select(still, guard=guard, band=row["band"], tokens="65536", beta=beta)
                worst = max(float(condition["load_rms"]) for condition in cost)
                points.append((100 * worst, float(row["excess"]), row["band"]))
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o", ms=5, label=guard)
            for x, y, band in points:
                axes.annotate(band, (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="load rms without an event, worst condition, %")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("load error above 10 %, batches")
    axes.set_title("guards: cost and per-expert jump, 64k tokens, beta 0.99", fontsize=9)
    axes.legend(fontsize=6)


def write_plot(source: Path, target: Path) -> None:
    """quantile_error.png: six panels; a panel whose case the csv lacks stays empty."""
    rows = read(source)
    cases = {case: select(rows, case=case) for case in distinct(rows, "case")}
    figure, axes = plt.subplots(2, 3, figsize=(14, 8), layout="constrained")
    if "estimator" in cases:
        _estimator_panel(axes[0, 0], cases["estimator"], "skew", "sd of the ranks' offsets, sd", log=False)
        _estimator_panel(
            axes[0, 1], cases["estimator"], "micro-batch", "tokens of a micro-batch (1M in all)", log=True
        )
    if "optimum" in cases:
        _noise_panel(axes[0, 2], cases["optimum"])
    if "warm-up" in cases:
        title = "warm-up: within 5 %, 64k tokens"
        even = select(cases["warm-up"], unevenness="0")
        _batches_panel(axes[1, 0], even, "within_0.05", "event", "65536", title)
    if "recovery" in cases:
        title = "recovery without a guard: within 10 %, 64k tokens"
        _batches_panel(axes[1, 1], cases["recovery"], "within_0.1", "event", "65536", title)
    if "guard, still" in cases and "guard, event" in cases:
        _guard_panel(axes[1, 2], cases["guard, still"], cases["guard, event"])
    figure.savefig(target, dpi=110, metadata={"Software": None})
    plt.close(figure)
