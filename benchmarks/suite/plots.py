"""One picture a level: each method's time over that of top-k with an auxiliary loss, in every case."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.suite.methods import METHODS
from benchmarks.suite.results import Row
from benchmarks.suite.tables import BASELINE, QUANTITY, ratios


def draw(rows: Sequence[Row], level: str, path: Path) -> None:
    """A dot a case and method; left of 1 is cheaper than the baseline."""
    found = {case: of for (case, quantity), of in ratios(rows).items() if quantity == QUANTITY[level]}
    if not found:
        return
    methods = [name for name in METHODS if any(name in of for of in found.values())]
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.42 * len(found)), layout="constrained")
    colours = plt.get_cmap("tab10")
    for place, of in enumerate(found.values()):
        axes.axhline(place, color="0.9", zorder=0)
        for method, ratio in of.items():
            if method in methods:
                ours = METHODS[method].et is not None
                known = method in axes.get_legend_handles_labels()[1]
                axes.plot(
                    ratio, place, marker="o" if ours else "s", markersize=8 if ours else 6,
                    color=colours(methods.index(method) % 10), markeredgecolor="black" if ours else "none",
                    linestyle="none", label=None if known else method,
                )  # fmt: skip
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel(f"median over that of {BASELINE} (round: this package)")
    axes.set_title(f"level {level}")
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=110)
    plt.close(figure)
