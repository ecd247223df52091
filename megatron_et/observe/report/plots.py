"""The PNGs of a report, drawn with matplotlib's Agg canvas (no display, no global state).

S logged steps, E routed experts, F fan-out bins. Colours are Okabe and Ito's, which colour-blind readers can
tell apart; layers are drawn in a colour map whose lightness follows their depth.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from megatron_et.observe.report.read import RunData
from megatron_et.observe.report.summary import LayerHistory, Summary, in_window
from megatron_et.observe.trace import TRAINING_LOSS, Floats, Ints, LayerTrace

BLUE, ORANGE, VERMILLION, GREEN, PURPLE, BLACK = (
    "#0072B2",
    "#E69F00",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#000000",
)
DPI = 130
MAX_PANELS = 12
# More cells than a panel has pixels would only be averaged away by the rasterizer.
MAX_HEATMAP_STEPS = 300
MAX_HEATMAP_EXPERTS = 150
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.titlesize": 12,
    "font.size": 9,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "savefig.facecolor": "white",
}


def draw(data: RunData, histories: list[LayerHistory], summary: Summary, out: Path) -> list[Path]:
    """Write every plot that the run has data for into `out`, and return the paths in reading order."""
    drawn: list[tuple[str, Figure]] = []
    with matplotlib.rc_context(STYLE):
        if summary.training_loss is not None or summary.validation_losses:
            drawn.append(("loss.png", _losses(data, summary)))
        if histories:
            drawn.append(("usage.png", _usage(histories, summary)))
            drawn.append(("thresholds.png", _thresholds(histories, summary)))
            drawn.append(("fanout.png", _fanout(histories, summary)))
            drawn.append(("no_expert.png", _no_expert(histories, summary)))
        for name, figure in drawn:
            figure.savefig(out / name, dpi=DPI)
    return [out / name for name, _ in drawn]


# --- one function per PNG ---


def _losses(data: RunData, summary: Summary) -> Figure:
    """The whole run, and its second half on an axis of its own: the first steps hide everything later."""
    training = data.tensorboard.scalars.get(TRAINING_LOSS)
    validation = data.tensorboard.validation_losses()
    figure = _figure(11, 4.2, f"{summary.run}: loss")
    whole, half = figure.subplots(1, 2)
    everything = ([training] if training else []) + list(validation.values())
    middle = max(series.steps_S[-1] for series in everything) / 2
    for axes, start in ((whole, -math.inf), (half, middle)):
        if training is not None:
            _training_loss(axes, training.steps_S, training.values_S, start)
        for (name, series), color in zip(validation.items(), _cycle(len(validation)), strict=True):
            late_S = series.steps_S >= start
            axes.plot(
                series.steps_S[late_S],
                series.values_S[late_S],
                "o-",
                ms=3.5,
                color=color,
                label=f"{name} loss",
            )
        _mark_phases(axes, summary, start)
        axes.set_xlabel("training step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    whole.set(title="whole run", ylabel="loss (nats per token)")
    half.set(title="second half")
    _legend(figure, whole)
    return figure


def _usage(histories: list[LayerHistory], summary: Summary) -> Figure:
    """Per layer: the range over experts with the target, and below it a heat map that has every expert."""
    with_experts = histories[0].experts is not None and summary.target_rate is not None
    chosen = _evenly_spaced(histories)
    title = f"{summary.run}: expert usage" + ("" if with_experts else " (single experts need a trace)")
    figure, grid = _grid(chosen, histories, title, panel_heights=(1.4, 1.8) if with_experts else (2.2,))
    image = None
    for place, history in enumerate(chosen):
        row, column = divmod(place, _columns(len(chosen)))
        band = figure.add_subplot(grid[(row * 2, column) if with_experts else (row, column)])
        _band(
            band, history, "expert_usage", BLUE, "mean over experts", "smallest to largest expert", scale=100
        )
        if summary.target_rate is not None:
            band.axhline(100 * summary.target_rate, color=VERMILLION, ls="--", lw=1, label="target rate")
        _mark_phases(band, summary)
        band.set_title(f"layer {history.layer}")
        band.set_ylim(0, 1.05 * band.get_ylim()[1])
        band.set_ylabel("" if column else "% of tokens")
        lowest = band
        if history.experts is not None and summary.target_rate is not None:
            band.tick_params(labelbottom=False)
            lowest = figure.add_subplot(grid[row * 2 + 1, column], sharex=band)
            image = _heat_map(lowest, history.experts, summary.target_rate)
            lowest.set_ylabel("" if column else "expert")
        _step_axis(lowest, place, len(chosen))
    _legend(figure, figure.axes[0])
    if image is not None:
        bar = figure.colorbar(image, cax=figure.add_subplot(grid[:2, -1]))
        bar.set_ticks([-2, -1, 0, 1, 2], labels=["1/4 or less", "1/2", "target", "2 x", "4 x or more"])
        bar.set_label("usage of one expert (black: no token)")
    return figure


def _thresholds(histories: list[LayerHistory], summary: Summary) -> Figure:
    """Per layer: range and mean over experts, and three experts with the cutoff of each logged step."""
    chosen = _evenly_spaced(histories)
    figure, grid = _grid(chosen, histories, f"{summary.run}: thresholds and cutoffs", panel_heights=(2.6,))
    for place, history in enumerate(chosen):
        row, column = divmod(place, _columns(len(chosen)))
        axes = figure.add_subplot(grid[row, column])
        _band(axes, history, "threshold", BLUE, "threshold, mean", "threshold, all experts")
        if history.experts is not None:
            _single_experts(axes, history.experts)
        _mark_phases(axes, summary)
        axes.set_title(f"layer {history.layer}")
        axes.set_ylabel("" if column else "router logit")
        _step_axis(axes, place, len(chosen))
    _legend(figure, figure.axes[0])
    return figure


def _fanout(histories: list[LayerHistory], summary: Summary) -> Figure:
    """Per layer: tokens by fan-out in the window; below: mean fan-out of all layers over steps."""
    assert summary.window is not None
    chosen = _evenly_spaced(histories)
    title = f"{summary.run}: fan-out, {summary.window.describe()}"
    figure, grid = _grid(chosen, histories, title, panel_heights=(2.2,), last_row=3.0)
    columns = _columns(len(chosen))
    for place, history in enumerate(chosen):
        row, column = divmod(place, columns)
        axes = figure.add_subplot(grid[row, column])
        _fanout_histogram(axes, history, summary)
        axes.set_title(f"layer {history.layer}")
        axes.set_ylabel("" if column else "% of tokens")
        if place + columns >= len(chosen):
            axes.set_xlabel("routed experts of a token")
    over_steps = figure.add_subplot(grid[-1, :columns])
    _all_layers(figure, over_steps, histories, "fanout_mean", summary)
    if summary.topk is not None:
        over_steps.axhline(summary.topk, color=VERMILLION, ls="--", lw=1, label="target")
    over_steps.set(title="mean fan-out over steps, all layers", ylabel="routed experts per token")
    _legend(figure, over_steps)
    return figure


def _no_expert(histories: list[LayerHistory], summary: Summary) -> Figure:
    """All layers over steps, and the share that experts at the target rate would leave out by chance."""
    figure = _figure(9, 4.6, f"{summary.run}: tokens without a routed expert")
    axes = figure.subplots()
    _all_layers(figure, axes, histories, "tokens_0_experts", summary, scale=100)
    if summary.target_rate is not None and summary.num_experts is not None:
        chance = 100 * (1 - summary.target_rate) ** summary.num_experts
        label = f"if experts chose independently: {chance:.3g} %"
        axes.axhline(chance, color=BLACK, ls=":", lw=1.2, label=label)
    axes.set(ylabel="% of tokens", ylim=(0, None))
    _legend(figure, axes)
    return figure


# --- parts ---


def _training_loss(axes: Axes, steps_S: Ints, values_S: Floats, start: float) -> None:
    window = steps_S.size // 50
    late_S = steps_S >= start
    if window < 2:
        axes.plot(steps_S[late_S], values_S[late_S], color=BLUE, label="training loss")
        return
    axes.plot(steps_S[late_S], values_S[late_S], color=BLUE, alpha=0.25, lw=0.7, label="training loss")
    smooth_steps_S = _running_mean(steps_S, window)
    late_S = smooth_steps_S >= start
    axes.plot(
        smooth_steps_S[late_S],
        _running_mean(values_S, window)[late_S],
        color=BLUE,
        label=f"training loss, mean of {window} logged steps",
    )


def _band(
    axes: Axes, history: LayerHistory, metric: str, color: str, mean: str, extent: str, scale: float = 1.0
) -> None:
    low_S, mean_S, high_S = (scale * history.metrics[f"{metric}_{part}"] for part in ("min", "mean", "max"))
    axes.fill_between(history.steps_S, low_S, high_S, color=color, alpha=0.2, lw=0, label=extent)
    axes.plot(history.steps_S, mean_S, color=color, label=mean)


def _heat_map(axes: Axes, experts: LayerTrace, target_rate: float) -> ScalarMappable:
    """Usage over the target rate, log2, of every expert and step; where there are many, some share a cell.

    Steps of a cell are averaged. Experts of a cell show the one that is farthest from the target, so that no
    stray expert is averaged away.
    """
    blocks_S = _blocks(experts.steps_S.size, MAX_HEATMAP_STEPS)
    usage_ES = np.add.reduceat(experts.usage_SE, blocks_S, axis=0, dtype=np.float64).T
    usage_ES /= np.diff(np.append(blocks_S, experts.steps_S.size))
    with np.errstate(divide="ignore"):
        ratio_ES = np.log2(usage_ES / target_rate)
    starts_E = _blocks(ratio_ES.shape[0], MAX_HEATMAP_EXPERTS)
    groups = np.split(ratio_ES, starts_E[1:])
    shown = np.stack([np.take_along_axis(g, np.abs(g).argmax(axis=0)[None], axis=0)[0] for g in groups])
    colors = matplotlib.colormaps["PuOr_r"].with_extremes(bad=BLACK)
    axes.grid(False)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    return axes.pcolormesh(
        _edges(experts.steps_S, blocks_S),
        np.append(starts_E, ratio_ES.shape[0]) - 0.5,
        np.ma.masked_invalid(shown),
        cmap=colors,
        vmin=-2,
        vmax=2,
    )


def _single_experts(axes: Axes, experts: LayerTrace) -> None:
    """Range of all cutoffs, and the experts with the lowest, median and highest threshold at the end."""
    cutoff_SE = np.ma.masked_invalid(experts.cutoff_SE)
    for extreme_S, label in (
        (cutoff_SE.min(axis=1), "cutoff, lowest and highest expert"),
        (cutoff_SE.max(axis=1), None),
    ):
        axes.plot(experts.steps_S, extreme_S, color=BLACK, lw=0.5, alpha=0.5, label=label)
    dot = 1.6 if experts.steps_S.size > 60 else 3.0
    order_E = np.argsort(experts.threshold_SE[-1], kind="stable")
    E = order_E.size
    places = {0: ("lowest", GREEN), E // 2: ("median", ORANGE), E - 1: ("highest", PURPLE)}
    for place, (name, color) in places.items():
        expert = order_E[place]
        axes.plot(experts.steps_S, cutoff_SE[:, expert], ".", ms=dot, color=color, alpha=0.6)
        axes.plot(
            experts.steps_S,
            experts.threshold_SE[:, expert],
            color=color,
            lw=1.1,
            label=f"expert with the {name} threshold at the end",
        )
    axes.plot([], [], ".", ms=3, color=BLACK, alpha=0.6, label="its cutoff at each logged step")


def _fanout_histogram(axes: Axes, history: LayerHistory, summary: Summary) -> None:
    """Share of tokens by fan-out, log scale; without a trace three classes are known, on a linear scale."""
    assert summary.window is not None
    inside_S = in_window(history, summary.window)
    if history.experts is None:
        parts = ("tokens_0_experts", "tokens_1_expert", "tokens_2plus_experts")
        share_F = np.array([100 * history.metrics[part][inside_S].mean() for part in parts])
        lowest = 0.0
        axes.set_xticks([0, 1, 2], labels=["0", "1", "2 or more"])
    else:
        counts_F = history.experts.fanout_histogram_SF[inside_S].sum(axis=0)
        share_F = 100 * counts_F[: np.max(np.nonzero(counts_F), initial=0) + 1] / max(int(counts_F.sum()), 1)
        lowest = share_F[share_F > 0].min(initial=0.2) / 2
        axes.set(yscale="log", ylim=(lowest, 150))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        if summary.topk is not None:
            axes.axvline(summary.topk, color=VERMILLION, ls="--", lw=1)
    edges = np.arange(share_F.size + 1) - 0.5
    share_F = np.maximum(share_F, lowest)
    axes.stairs(share_F, edges, baseline=lowest, fill=True, color=BLUE)
    axes.stairs(share_F[:1], edges[:2], baseline=lowest, fill=True, color=ORANGE)


def _all_layers(
    figure: Figure,
    axes: Axes,
    histories: list[LayerHistory],
    metric: str,
    summary: Summary,
    scale: float = 1.0,
) -> None:
    """One line per layer, coloured by depth; a colour bar stands for the legend where there are many."""
    few = len(histories) <= MAX_PANELS
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(histories)))
    for history, color in zip(histories, colors, strict=True):
        label = f"layer {history.layer}" if few else None
        axes.plot(history.steps_S, scale * history.metrics[metric], color=color, lw=1.1, label=label)
    if not few:
        first, last = histories[0].layer, histories[-1].layer
        # The lines use 90 % of the map, whose end is too light for white paper.
        mappable = ScalarMappable(Normalize(first, first + (last - first) / 0.9), "viridis")
        bar = figure.colorbar(mappable, ax=axes, pad=0.01, label="layer")
        bar.ax.set_ylim(first, last)
    _mark_phases(axes, summary)
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def _mark_phases(axes: Axes, summary: Summary, start: float = -math.inf) -> None:
    """Vertical lines where the warm-up ends and, after an anneal, where the threshold phase begins."""
    if summary.warmup_end is not None and summary.warmup_end >= start:
        axes.axvline(summary.warmup_end, color=BLACK, ls="--", lw=0.9, label="end of warm-up")
    if summary.threshold_start not in (None, summary.warmup_end) and summary.threshold_start >= start:
        axes.axvline(summary.threshold_start, color=BLACK, ls=":", lw=0.9, label="threshold phase begins")


# --- layout ---


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    return figure


def _columns(panels: int) -> int:
    """Panels side by side; 4 are better as a square."""
    return 2 if panels == 4 else min(panels, 3 if panels <= 9 else 4)


def _grid(
    chosen: Sequence[LayerHistory],
    histories: Sequence[LayerHistory],
    title: str,
    *,
    panel_heights: tuple[float, ...],
    last_row: float = 0.0,
) -> tuple[Figure, GridSpec]:
    """A figure with the stacked axes of a panel (heights in inches) for each chosen layer.

    Where `last_row` (inches) is given, the grid ends with one more row. The last column is narrow: a colour
    bar's.
    """
    columns = _columns(len(chosen))
    if len(chosen) < len(histories):
        title += f" ({len(chosen)} of {len(histories)} MoE layers, evenly spaced)"
    heights = [*panel_heights * math.ceil(len(chosen) / columns), *([last_row] if last_row else [])]
    width = max(8.0, 3.7 * columns)
    figure = _figure(width, sum(heights) + 0.3 * len(heights) + 0.9, title)
    ratios = [1.0] * columns + [0.12 / (width / columns)]
    return figure, figure.add_gridspec(len(heights), columns + 1, height_ratios=heights, width_ratios=ratios)


def _step_axis(axes: Axes, place: int, panels: int) -> None:
    """Few ticks, and a label under the last panel of a column."""
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if place + _columns(panels) >= panels:
        axes.set_xlabel("training step")


def _legend(figure: Figure, axes: Axes) -> None:
    """One legend for the figure, in as many columns as its width holds."""
    handles, labels = axes.get_legend_handles_labels()
    inches_per_entry = 0.6 + 0.075 * max(map(len, labels))
    columns = max(1, int(figure.get_figwidth() / inches_per_entry))
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(handles), columns))


def _evenly_spaced(histories: list[LayerHistory]) -> list[LayerHistory]:
    if len(histories) <= MAX_PANELS:
        return histories
    return [histories[i] for i in np.linspace(0, len(histories) - 1, MAX_PANELS).round().astype(int)]


def _cycle(count: int) -> list[str]:
    colors = [VERMILLION, GREEN, PURPLE, ORANGE, BLACK]
    return [colors[i % len(colors)] for i in range(count)]


def _running_mean(values_S: NDArray[np.number], window: int) -> Floats:
    """Means of `window` neighbours, [S - window + 1]."""
    return np.convolve(values_S.astype(np.float64), np.full(window, 1 / window), mode="valid")


def _blocks(length: int, most: int) -> NDArray[np.intp]:
    """First indices of at most `most` blocks of nearly equal length."""
    return np.unique(np.linspace(0, length, min(length, most), endpoint=False).astype(np.intp))


def _edges(steps_S: Ints, blocks_S: NDArray[np.intp]) -> Floats:
    """Step numbers between which the blocks lie, one more than there are blocks."""
    first, last = steps_S[blocks_S], steps_S[np.append(blocks_S[1:], steps_S.size) - 1]
    between = (last[:-1] + first[1:]) / 2
    margin = (steps_S[-1] - steps_S[0]) / (2 * max(steps_S.size - 1, 1)) or 0.5
    return np.concatenate([[steps_S[0] - margin], between, [steps_S[-1] + margin]])
