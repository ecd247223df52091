"""The two plots of the report."""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.scale.cost import TARGET
from benchmarks.scale.report import Rows
from benchmarks.scale.shapes import GPUS, SHAPES
from benchmarks.scale.tables import LOAD_GPUS

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def statistics(get: Rows, target: Path) -> None:
    """Share of a step over the number of GPUs."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.5), sharey=True, layout="constrained")
    titles = {
        "once share": "reduction + boundary",
        "share with cuda": "+ counting, CUDA kernel",
        "share with torch": "+ counting, torch operations",
    }
    for panel, (quantity, title) in zip(axes, titles.items(), strict=True):
        for shape, color in zip(SHAPES, COLORS, strict=False):
            shares = [100 * get.statistic(shape.name, gpus, quantity)[0] for gpus in GPUS]
            panel.plot(GPUS, shares, "o-", ms=4, color=color, label=shape.name)
        panel.axhline(100 * TARGET, color="black", lw=1, ls="--", label="target")
        panel.set(xscale="log", yscale="log", xlabel="GPUs", title=title)
        panel.set_xticks(GPUS, [f"{gpus:,}" for gpus in GPUS])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("% of a step, nothing hidden")
    axes[0].legend(fontsize=8)
    figure.savefig(target, dpi=110, metadata={"Software": None})
    plt.close(figure)


def loads(get: Rows, target: Path) -> None:
    """Busiest rank and head-room by rule and text."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5), layout="constrained")
    names = get.settings("loads")
    width = 0.8 / len(names)
    place = np.arange(len(SHAPES))
    for i, (name, color) in enumerate(zip(names, COLORS, strict=False)):
        at = place + (i - 0.5 * (len(names) - 1)) * width
        busiest = [get("loads", shape.name, LOAD_GPUS, name, "grouped_gemm") for shape in SHAPES]
        left.bar(at, busiest, width, color=color, label=name)
        kept, one = (
            [get("head-room", shape.name, LOAD_GPUS, name, what) for shape in SHAPES]
            for what in ("kept", "one layer")
        )
        right.bar(at, one, width, color=color, alpha=0.35)
        right.bar(at, kept, width, color=color)
    left.set(ylabel="rows of the busiest rank / forced balance", ylim=(1.0, None))
    left.set_title("busiest rank of an expert-parallel group, mean over layers")
    right.set(ylabel="rows to set aside / mean", ylim=(1.0, None))
    right.set_title("head-room of kept rows for a run; pale: of a single layer")
    right.axhline(1.5, color="black", lw=1, ls="--", label="capacity C=0.5")
    for panel in (left, right):
        panel.set_xticks(place, [f"{shape.name}\nEP{shape.layout.ep}" for shape in SHAPES])
        panel.grid(axis="y", alpha=0.3)
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    figure.savefig(target, dpi=110, metadata={"Software": None})
    plt.close(figure)
