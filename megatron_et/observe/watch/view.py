"""The frame of `megatron-et watch`: lines of text that fit a terminal, 80 x 24 included.

L MoE layers.
"""

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from rich.text import Text

from megatron_et.observe.alarms import Alarm, details, grouped, headline
from megatron_et.observe.rules import Array
from megatron_et.observe.trace import TRACE_NAME
from megatron_et.observe.watch.state import Step, Watched

PHASE_NAMES = {"warmup": "warm-up", "anneal": "anneal", "threshold": "threshold", None: "phase not known"}
BAR = 19
"""Characters of a usage bar; the target is at a third of them."""
SPAN = 3.0
"""Load over the target at the end of a bar."""
TABLE = 70
"""Characters of a row before its sparkline."""
NOTED = 0.5
"""Relative load error of one expert that colours its layer, without being an alarm."""


@dataclass(frozen=True)
class Glyphs:
    """Characters to draw with."""

    band: str
    mean: str
    target: str
    beyond: str
    levels: str
    overflow: Literal["ellipsis", "crop"]


UNICODE = Glyphs("━", "●", "┃", "▶", "▁▂▃▄▅▆▇█", "ellipsis")
ASCII = Glyphs("=", "o", "|", ">", ".:-=+*#@", "crop")


def frame(
    state: Watched, width: int, height: int | None, *, now: float, glyphs: Glyphs, footer: str
) -> list[Text]:
    """The lines to show; at most `height` of them (None: as many as there are), none wider than `width`.

    Args:
        now: time.time(), for the age of what is shown.
        footer: the last line.
    """
    last = state.last
    lines = _top(state, width, now, glyphs)
    if last is None:
        lines += [Text(), *(Text(line, "yellow") for line in textwrap.wrap(_waiting(state), width))]
    else:
        alarms = _alarm_blocks(state, width)
        fixed = len(lines) + 6
        room = math.inf if height is None else max(height - fixed, 2)
        wanted = sum(map(len, alarms))
        for_alarms = int(min(wanted, max(room // 2, room - len(last.layers))))
        for_layers = len(last.layers) if room == math.inf else int(room) - for_alarms
        lines += [Text(), *_table(state, last, width, max(for_layers, 1), glyphs), Text()]
        lines += _fitted(alarms, for_alarms)
    lines += [Text(), Text(footer, "dim")]
    for line in lines:
        line.truncate(width, overflow=glyphs.overflow)
    return lines if height is None else lines[:height]


# --- the head ---


def _top(state: Watched, width: int, now: float, glyphs: Glyphs) -> list[Text]:
    last = state.last
    right = "waiting" if last is None else f"step {last.step:,}  {PHASE_NAMES[last.phase]}"
    title = Text(f"megatron-et watch  {state.run}")
    title.truncate(max(width - len(right) - 2, 0), overflow=glyphs.overflow, pad=True)
    lines = [Text.assemble((title.plain, "bold"), "  ", (right, "bold cyan"))]
    facts = []
    if last is not None and state.target is not None and state.topk is not None:
        fanout = float(np.nanmean(last.metrics["fanout_mean"]))
        facts.append(f"target {_short(100 * state.target)} % of tokens an expert")
        facts.append(f"fan-out {fanout:.3f} of {state.topk:g}")
    if state.news_at is not None:
        facts.append(f"written {_age(now - state.news_at)} ago")
    if state.more:
        facts.append("still reading event files")
    if facts:
        lines.append(Text("   ".join(facts)))
    if state.losses:
        values = [value for _, value in state.losses]
        shown = values[-max(width - 40, 8) :]
        drawn = spark(shown, min(shown), max(shown), glyphs)
        lines.append(Text.assemble(f"loss {values[-1]:.4f}  ", (drawn, "cyan"), f"  {len(shown)} logged"))
    return lines


def _waiting(state: Watched) -> str:
    if not state.run.is_dir():
        return f"waiting: the folder {state.run} does not exist yet"
    if state.sources:
        return "waiting for the first logged step; read so far: " + ", ".join(map(str, state.sources))
    return (
        f"waiting: no {TRACE_NAME} (--moe-et-trace-dir) and no TensorBoard file (--tensorboard-dir) in or "
        f"below {state.run} yet"
    )


# --- the layers ---


def _table(state: Watched, last: Step, width: int, most: int, glyphs: Glyphs) -> list[Text]:
    """Head, a row per layer, and one for all; of more layers than there is room for, the worst."""
    sparkline = min(max(width - TABLE, 0), 60)
    history = [step for step in state.steps if step.layers == last.layers][-sparkline:] if sparkline else []
    fanout_SL = np.array([step.metrics["fanout_mean"] for step in history])
    alarmed = {alarm.layer for alarm in state.monitor.active}
    target = f"target {glyphs.target}" if state.target else "target not known"
    head = (
        f"{'layer':>5}  {target:<{BAR}}  {'min':>5} {'mean':>5} {'max %':>5}  {'fan-out':>7} {'gap':>8} "
        f"{'dead':>4}  {'fan-out' if sparkline >= 7 else ''}"
    )
    rows = [Text(head, "bold")]
    order = sorted(range(len(last.layers)), key=lambda i: -_badness(state, last, i, alarmed))
    folded = len(order) > most
    shown = sorted(order[: most - 1] if folded else order)
    for i in shown:
        rows.append(_row(state, last, i, last.layers[i] in alarmed, fanout_SL, glyphs))
    if folded:
        rest = len(order) - len(shown)
        rows.append(Text(f"  ... {rest} more layers; the worst are shown", "dim"))
    rows.append(_overall(state, last, fanout_SL, glyphs))
    return rows


def _badness(state: Watched, last: Step, i: int, alarmed: set[int]) -> float:
    far = _far(state, last, i)
    return 1000.0 * (last.layers[i] in alarmed) + float(last.metrics["dead_experts"][i]) + far


def _far(state: Watched, last: Step, i: int) -> float:
    """Largest relative load error of the layer's experts."""
    if state.target is None:
        return 0.0
    low, high = last.metrics["expert_usage_min"][i], last.metrics["expert_usage_max"][i]
    return float(max(high / state.target - 1, 1 - low / state.target))


def _row(state: Watched, last: Step, i: int, alarmed: bool, fanout_SL: Array, glyphs: Glyphs) -> Text:
    values = {name: float(vector[i]) for name, vector in last.metrics.items()}
    style = "red" if alarmed else "yellow" if _far(state, last, i) > NOTED else ""
    fanout_S = fanout_SL[:, i] if fanout_SL.size else np.array([])
    return _line(f"{last.layers[i]:>5}", values, fanout_S, state, glyphs, style)


def _overall(state: Watched, last: Step, fanout_SL: Array, glyphs: Glyphs) -> Text:
    how: dict[str, Callable[[Array], Any]] = {
        "expert_usage_min": np.nanmin,
        "expert_usage_max": np.nanmax,
        "dead_experts": np.nansum,
    }
    values = {
        name: float(how.get(name, np.nanmean)(vector)) if np.isfinite(vector).any() else math.nan
        for name, vector in last.metrics.items()
    }
    fanout_S = fanout_SL.mean(axis=1) if fanout_SL.size else np.array([])
    return _line("  all", values, fanout_S, state, glyphs, "bold")


def _line(
    label: str, values: dict[str, float], fanout_S: Array, state: Watched, glyphs: Glyphs, style: str
) -> Text:
    usage = [values[f"expert_usage_{part}"] for part in ("min", "mean", "max")]
    cells = " ".join(f"{_short(100 * share):>5}" for share in usage)
    bar = usage_bar([share / state.target for share in usage], glyphs) if state.target else " " * BAR
    numbers = (
        f"{values['fanout_mean']:>7.3f} {values['cutoff_gap']:>8.4f} {_short(values['dead_experts']):>4}"
    )
    drawn = spark(fanout_S, 0.0, 2.0 * (state.topk or 1.0), glyphs)
    return Text.assemble(
        (label, style), "  ", (bar, style or "cyan"), f"  {cells}  {numbers}  ", (drawn, "cyan")
    )


def usage_bar(load: Sequence[float], glyphs: Glyphs) -> str:
    """Smallest, mean and largest load over the target, from 0 to SPAN, with the target's mark."""
    if not all(map(math.isfinite, load)):
        return " " * BAR
    low, mean, high = (min(int(value * BAR / SPAN), BAR - 1) for value in load)
    cells = [glyphs.band if low <= i <= high else " " for i in range(BAR)]
    cells[int(BAR / SPAN)] = glyphs.target
    cells[mean] = glyphs.mean
    if load[2] > SPAN:
        cells[-1] = glyphs.beyond
    return "".join(cells)


def spark(values: Iterable[float], low: float, high: float, glyphs: Glyphs) -> str:
    """One character per value; a gap where it is not finite."""
    last = len(glyphs.levels) - 1
    scale = last / (high - low) if high > low else 0.0
    return "".join(
        glyphs.levels[round(min(max((value - low) * scale, 0), last))] if math.isfinite(value) else " "
        for value in values
    )


# --- the alarms ---


def _alarm_blocks(state: Watched, width: int) -> list[list[Text]]:
    """A block of lines per rule, most needed first: where, what to do, what was seen."""
    if not state.has_trace:
        on = "not known" if state.alarms_logged is None else f"{state.alarms_logged} on"
        note = "their text is in the training log and in TensorBoard; with a trace it is here"
        return [[Text(f"alarms: {on} ({note})", "yellow")]]
    groups = grouped(state.monitor.active)
    if not groups:
        return [[Text("alarms: none", "green")]]
    return [_block(group, width) for group in groups]


def _block(group: Sequence[Alarm], width: int) -> list[Text]:
    remedy = _indented(f"remedy: {group[0].remedy}", width)
    seen = [line for detail in details(group, most=3) for line in _indented(detail, width)]
    return [Text(f"ALARM {headline(group)}", "bold red"), *remedy, *seen]


def _indented(text: str, width: int) -> list[Text]:
    return [
        Text(line)
        for line in textwrap.wrap(
            text, width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
        )
    ]


def _fitted(blocks: list[list[Text]], room: int) -> list[Text]:
    """As many lines as there is room for: first lines first, then the others in turn."""
    taken = [0] * len(blocks)
    while room > 0 and any(n < len(block) for n, block in zip(taken, blocks, strict=True)):
        least = min(n for n, block in zip(taken, blocks, strict=True) if n < len(block))
        place = next(i for i, block in enumerate(blocks) if taken[i] == least and least < len(block))
        taken[place] += 1
        room -= 1
    return [line for n, block in zip(taken, blocks, strict=True) for line in block[:n]]


# --- words ---


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def _age(seconds: float) -> str:
    if seconds < 120:
        return f"{max(seconds, 0):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
