"""A report as one HTML file that needs nothing else: pictures inside, no script, no address to load from.

Its content security policy makes a browser refuse whatever could still ask for the network.
"""

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from megatron_et import __version__
from megatron_et.observe.alarms import Alarm, details, grouped, headline
from megatron_et.observe.report.read import TensorBoard
from megatron_et.observe.report.summary import LayerSummary, Summary
from megatron_et.observe.report.table import alarm_count, caption, columns, header

PLOTS = {
    "loss.png": "Loss",
    "usage.png": "Expert usage",
    "thresholds.png": "Thresholds and cutoffs",
    "fanout.png": "Fan-out",
    "no_expert.png": "Tokens without a routed expert",
}
LAYOUT = (
    "world_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "num_layers",
    "hidden_size",
    "seq_length",
    "micro_batch_size",
    "global_batch_size",
    "lr",
    "seed",
)
"""Arguments that say what ran on what; shown first where they are logged."""
_FLAG = re.compile(r"--[a-z-]+")

STYLE = """
:root { color-scheme: light dark; --ground: #f6f7f9; --card: #ffffff; --ink: #1c2530; --soft: #5b6775;
  --line: #dde2e8; --blue: #0072b2; --bad: #c23b22; --bad-ground: #fdf0ed; --good: #00785a;
  --good-ground: #ecf7f3; --target: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --ground: #14181d; --card: #1d232a; --ink: #e4e9ee;
  --soft: #9aa7b4; --line: #333c46; --blue: #56b4e9; --bad: #ff8a70; --bad-ground: #33211d; --good: #4fcfa6;
  --good-ground: #192d27; --target: #e69f00; } figure { filter: brightness(.88); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 10px; }
.soft { color: var(--soft); }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 10px;
  margin: 18px 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.facts dt { font-size: 12px; color: var(--soft); }
.facts dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.alarm { background: var(--bad-ground); border-left: 4px solid var(--bad); margin: 10px 0; }
.alarm h3 { margin: 0; font-size: 15px; color: var(--bad); }
.alarm ul { margin: 6px 0; padding-left: 20px; }
.alarm p { margin: 6px 0 0; }
.calm { background: var(--good-ground); border-left: 4px solid var(--good); }
.wide { overflow-x: auto; padding: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 6px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; font-size: 13px; }
th small { display: block; font-weight: 400; color: var(--soft); }
tbody tr:last-child td { border-bottom: 0; }
tr.off td:first-child { box-shadow: inset 4px 0 var(--bad); }
.names td, .names th { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.names td:first-child { width: 40%; color: var(--soft); }
svg.usage { display: block; }
.usage .track { fill: var(--line); } .usage .band { fill: var(--blue); opacity: .45; }
.usage .mean { fill: var(--blue); } .usage .target { stroke: var(--target); stroke-width: 2; }
figure { margin: 0; padding: 10px; background: #ffffff; border: 1px solid var(--line); border-radius: 8px; }
figure img { display: block; width: 100%; height: auto; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--soft); }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 13px;
  overflow-wrap: anywhere; }
.alarm code { white-space: nowrap; }
@media print { body { background: #fff; } figure, .card { break-inside: avoid; } }
"""


def page(summary: Summary, tensorboard: TensorBoard, pngs: Sequence[Path], numbers: str) -> str:
    """The whole file; `numbers` is summary.json's text, which goes into the page for programs to read."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(summary.run)}: Expert Threshold report</title>",
        f"<style>{STYLE}</style></head><body><main>",
        f"<h1>{escape(summary.run)}</h1>",
        f'<div class="soft">Expert Threshold routing, step {summary.last_step:,}</div>',
        _facts(header(summary)[1:]),
        *_alarms(summary),
        *_layers(summary),
        *_notes(summary),
        *_plots(pngs),
        *_settings(tensorboard),
        f'<p class="soft">Written by megatron-et report, megatron_et {escape(__version__)}.</p>',
        # "</" would end the element.
        f'<script type="application/json" id="summary">{numbers.replace("</", "<\\/")}</script>',
        "</main></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _facts(lines: Iterable[tuple[str, str]]) -> str:
    cells = (
        f'<div class="card"><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>' for label, value in lines
    )
    return f'<dl class="facts">{"".join(cells)}</dl>'


def _alarms(summary: Summary) -> Iterable[str]:
    if summary.alarms is None:
        return
    yield "<h2>Alarms</h2>"
    for group in grouped(summary.alarms):
        yield _alarm(group)
    if not summary.alarms:
        yield f'<div class="card calm">{escape(alarm_count(summary))}</div>'
    if summary.past_alarms:
        past = "".join(f"<li>{escape(headline(group))}</li>" for group in grouped(summary.past_alarms))
        yield f"<details><summary>Past alarms</summary><ul>{past}</ul></details>"


def _alarm(group: Sequence[Alarm]) -> str:
    seen = "".join(f"<li>{escape(line)}</li>" for line in details(group))
    return (
        f'<div class="card alarm"><h3>{escape(headline(group))}</h3><ul>{seen}</ul>'
        f"<p><b>What to do:</b> {_FLAG.sub(r'<code>\g<0></code>', escape(group[0].remedy))}</p></div>"
    )


def _layers(summary: Summary) -> Iterable[str]:
    if summary.window is None:
        return
    yield f"<h2>{escape(caption(summary))}</h2>"
    heads = [
        f"<th>{'<br>'.join(map(escape, names))}<small>{escape(unit)}</small></th>"
        for *names, unit in (("", *c.heading) if len(c.heading) == 1 else c.heading for c in columns(summary))
    ]
    bars = summary.target_rate is not None
    if bars:
        heads.insert(1, "<th>smallest, mean,<br>largest usage<small>orange: target</small></th>")
    off = {alarm.layer for alarm in summary.alarms or []}
    rows = []
    for layer in summary.layers:
        cells = [f"<td>{escape(column.cell(layer))}</td>" for column in columns(summary)]
        if bars:
            cells.insert(1, f"<td>{_usage(layer, summary)}</td>")
        rows.append(f"<tr{' class="off"' if layer.layer in off else ''}>{''.join(cells)}</tr>")
    table = f"<table><thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    yield f'<div class="card wide">{table}</div>'


def _usage(layer: LayerSummary, summary: Summary) -> str:
    """Smallest, mean and largest expert on a scale that all layers share; at least twice the target."""
    assert summary.target_rate is not None
    known = (layer.expert_usage_min, layer.expert_usage_mean, layer.expert_usage_max)
    low, mean, high = known
    if low is None or mean is None or high is None:
        return ""
    largest = max(one.expert_usage_max or 0.0 for one in summary.layers)
    width = 150
    scale = width / (1.05 * max(2 * summary.target_rate, largest))
    x = [round(scale * value, 1) for value in (low, mean, high, summary.target_rate)]
    return (
        f'<svg class="usage" width="{width}" height="16" role="img" aria-label="usage">'
        f'<rect class="track" y="7" width="{width}" height="2"/>'
        f'<rect class="band" x="{x[0]}" y="4" width="{max(x[2] - x[0], 1):.1f}" height="8" rx="2"/>'
        f'<circle class="mean" cx="{x[1]}" cy="8" r="4"/>'
        f'<line class="target" x1="{x[3]}" x2="{x[3]}" y1="0" y2="16"/></svg>'
    )


def _notes(summary: Summary) -> Iterable[str]:
    for kind, sentences in (("Missing", summary.missing), ("Warning", summary.warnings)):
        for sentence in sentences:
            yield f'<p class="soft"><b>{kind}:</b> {escape(sentence)}</p>'


def _plots(pngs: Sequence[Path]) -> Iterable[str]:
    for png in pngs:
        title = escape(PLOTS[png.name])
        data = base64.b64encode(png.read_bytes()).decode()
        yield f"<h2>{title}</h2>"
        yield f'<figure><img alt="{title}" src="data:image/png;base64,{data}"></figure>'


def _settings(tensorboard: TensorBoard) -> Iterable[str]:
    arguments = tensorboard.arguments
    if not arguments:
        return
    yield "<h2>Settings</h2>"
    first = {name: arguments[name] for name in LAYOUT if name in arguments}
    routing = {name: value for name, value in sorted(arguments.items()) if name.startswith("moe_")}
    if tensorboard.versions is not None:
        first = {"versions": tensorboard.versions, **first}
    for title, chosen, shown in (
        ("Run", first, True),
        ("Mixture of experts", routing, False),
        (f"All {len(arguments)} arguments of Megatron", dict(sorted(arguments.items())), False),
    ):
        rows = "".join(
            f"<tr><td><code>{escape(name)}</code></td><td><code>{escape(value)}</code></td></tr>"
            for name, value in chosen.items()
        )
        table = f'<div class="card wide"><table class="names"><tbody>{rows}</tbody></table></div>'
        if rows:
            yield f"<details{' open' if shown else ''}><summary>{title}</summary>{table}</details>"
