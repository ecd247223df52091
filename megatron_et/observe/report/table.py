"""A report as text: for the terminal (rich) and as Markdown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megatron_et.observe.alarms import Alarm, details, grouped, headline
from megatron_et.observe.report.summary import PHASE_NAMES, RECENT_LOSSES, FinalLoss, LayerSummary, Summary

# Wide enough for the table where the output is a file or a pipe, which have no width of their own.
PIPE_WIDTH = 120


@dataclass(frozen=True)
class Column:
    """A column of the layer table; the heading's last line is the unit."""

    heading: tuple[str, ...]
    cell: Callable[[LayerSummary], str]


def header(summary: Summary) -> list[tuple[str, str]]:
    """(label, value) lines about the whole run."""
    tokens = "unknown" if summary.tokens is None else _count(summary.tokens)
    lines = [("run", summary.run), ("steps", f"{summary.last_step:,}"), ("tokens", tokens)]
    if summary.seconds_per_step is not None:
        lines.append(("time", f"{summary.seconds_per_step:.3g} s per step (median)"))
    if summary.num_experts is not None and summary.topk is not None and summary.target_rate is not None:
        lines.append(
            (
                "routing",
                f"{summary.num_experts} experts, top-k {summary.topk}: target rate "
                f"{_percent(summary.target_rate)} % of tokens per expert",
            )
        )
    recent = summary.training_loss_recent
    spread = "" if recent is None else f" (mean of the last {RECENT_LOSSES} logged: {recent:.4f})"
    lines.append(("training loss", _loss(summary.training_loss) + spread))
    lines += [(f"{name} loss", _loss(loss)) for name, loss in summary.validation_losses.items()]
    if phases := _phases(summary):
        lines.append(("phases", phases))
    if summary.alarms is not None:
        lines.append(("alarms", alarm_count(summary)))
    return lines


def alarm_count(summary: Summary) -> str:
    """Which rules hold, and how many held."""
    on = [group[0].rule for group in grouped(summary.alarms or [])]
    past = len(grouped(summary.past_alarms))
    return (f"{len(on)} on: {', '.join(on)}" if on else "none on") + (f"; {past} past" if past else "")


def columns(summary: Summary) -> list[Column]:
    """The layer table's columns; shares are shown in per cent."""
    target = "target not logged" if summary.target_rate is None else f"target {_percent(summary.target_rate)}"
    fanout_target = "target not logged" if summary.topk is None else f"target {summary.topk}"
    return [
        Column(("layer",), lambda layer: str(layer.layer)),
        Column(
            ("expert usage", "min / mean / max", f"%, {target}"),
            lambda x: _joined(x.expert_usage_min, x.expert_usage_mean, x.expert_usage_max),
        ),
        Column(("max", "violation", "max/mean - 1"), lambda layer: _number(layer.max_violation)),
        Column(("mean", "fan-out", fanout_target), lambda layer: _number(layer.fanout_mean)),
        Column(
            ("tokens with", "0 / 1 / 2+ experts", "% of tokens"),
            lambda x: _joined(x.tokens_0_experts, x.tokens_1_expert, x.tokens_2plus_experts),
        ),
        Column(("|cutoff -", "threshold|", "logits"), lambda layer: _number(layer.cutoff_gap)),
        Column(("dead", "experts", "count"), lambda layer: _number(layer.dead_experts)),
        Column(("at capacity", "bound", "% of experts"), lambda layer: _percent(layer.capacity_bound_share)),
    ]


def print_summary(summary: Summary, console: Console) -> None:
    """The header and the layer table."""
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for line in header(summary):
        facts.add_row(*map(Text, line))
    console.print(facts)
    if summary.window is not None:
        table = Table(box=box.SIMPLE_HEAD, title=caption(summary), title_justify="left", title_style="bold")
        for column in columns(summary):
            table.add_column("\n".join(column.heading), justify="right")
        for layer in summary.layers:
            table.add_row(*(column.cell(layer) for column in columns(summary)))
        console.print(table)
    for group in grouped(summary.alarms or []):
        print_alarm(group, console)
    for group in grouped(summary.past_alarms):
        console.print(f"past alarm: {headline(group)}", markup=False, soft_wrap=True)
    for sentence in summary.missing:
        console.print(f"missing: {sentence}", style="yellow", markup=False, soft_wrap=True)
    for sentence in summary.warnings:
        console.print(f"warning: {sentence}", style="yellow", markup=False, soft_wrap=True)


def print_alarm(group: Sequence[Alarm], console: Console) -> None:
    """One rule's alarms: where, what was seen, what to do."""
    console.print(f"ALARM: {headline(group)}", style="bold red", markup=False, soft_wrap=True)
    for line in details(group):
        console.print(Padding(Text(line), (0, 0, 0, 2)))
    console.print(Padding(Text(f"remedy: {group[0].remedy}"), (0, 0, 0, 2)))


def stdout_console() -> Console:
    """A console on standard output, wide enough for the table where that is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPE_WIDTH)


def markdown(summary: Summary) -> str:
    """The same header and table, for a README."""
    blocks = ["\n".join(f"- {label}: {value}" for label, value in header(summary))]
    if summary.window is not None:
        # A bar would end the cell.
        heads = ["<br>".join(column.heading).replace("|", "\\|") for column in columns(summary)]
        rows = [heads, ["---:"] * len(heads)]
        rows += [[column.cell(layer) for column in columns(summary)] for layer in summary.layers]
        blocks += [caption(summary) + ":", "\n".join(f"| {' | '.join(row)} |" for row in rows)]
    for group in grouped(summary.alarms or []):
        lines = [f"**Alarm: {headline(group)}**", "", *(f"- {line}" for line in details(group))]
        blocks.append("\n".join([*lines, f"- remedy: {group[0].remedy}"]))
    if summary.past_alarms:
        blocks.append("\n".join(f"- past alarm: {headline(group)}" for group in grouped(summary.past_alarms)))
    if summary.missing:
        blocks.append("\n".join(f"Missing: {sentence}." for sentence in summary.missing))
    return "\n\n".join(blocks) + "\n"


def caption(summary: Summary) -> str:
    """Which layers, and which steps, the table is about."""
    assert summary.window is not None
    return f"MoE layers, {summary.window.describe()}"


def _phases(summary: Summary) -> str:
    if summary.window is None or summary.window.phase is None:
        return ""
    reached = PHASE_NAMES[summary.window.phase]
    first_steps = {"anneal": summary.warmup_end, "threshold": summary.threshold_start}
    if summary.threshold_start == summary.warmup_end:
        del first_steps["anneal"]
    later = [f"{phase} from step {step:,}" for phase, step in first_steps.items() if step is not None]
    return ", ".join(["warm-up", *later]) if later else f"{reached} at every logged step"


def _loss(loss: FinalLoss | None) -> str:
    if loss is None:
        return "not logged"
    return f"{loss.value:.4f} at step {loss.step:,}"


def _count(value: int) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3g}"


def _joined(*shares: float | None) -> str:
    return " / ".join(_percent(share) for share in shares)
