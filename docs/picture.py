"""Draws docs/expert_threshold.png, the README's picture: `.venv/bin/python docs/picture.py`."""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

TOKENS = ["def", "best", "k", "(", "x", ",", "k", ")", ":", "\\n", "return", "x"]
EXPERTS, TARGET = 4, 0.25


def main() -> None:
    """Logits of twelve tokens for four experts, each expert's threshold, and the fan-out that comes of it."""
    rng = np.random.default_rng(5)
    logits_ET = rng.normal(size=(EXPERTS, len(TOKENS))) + 0.9 * rng.normal(size=len(TOKENS))
    stream_EN = rng.normal(size=(EXPERTS, 4000)) + 0.9 * rng.normal(size=4000)
    thresholds_E = np.quantile(stream_EN, 1 - TARGET, axis=1)
    chosen_ET = logits_ET >= thresholds_E[:, None]

    figure, axes = plt.subplots(
        EXPERTS, 2, figsize=(10, 5.2), sharey=True, width_ratios=(1, 4), layout="constrained"
    )
    for e, (stream, tokens) in enumerate(axes):
        bins = np.linspace(-4.5, 4.5, 60)
        counts, _ = np.histogram(stream_EN[e], bins)
        above = bins[:-1] >= thresholds_E[e]
        stream.barh(bins[:-1], counts, 0.15, color=np.where(above, "#0072B2", "#c8c8c8"), align="edge")
        stream.set_ylabel(f"expert {e + 1}\nlogit", fontsize=9)
        tokens.scatter(range(len(TOKENS)), logits_ET[e], s=60, c=np.where(chosen_ET[e], "#0072B2", "#c8c8c8"))
        for axis in (stream, tokens):
            axis.axhline(thresholds_E[e], color="#D55E00", lw=1.6)
            axis.set(xticks=[], ylim=(-4.2, 4.2), yticks=[])
            axis.spines[["top", "right", "bottom"]].set_visible(False)
    axes[0, 0].set_title("global token stream:\nthe best 1/4 is above the line", fontsize=9)
    rule = "this sequence: a token goes to every expert whose threshold its logit reaches"
    axes[0, 1].set_title(rule, fontsize=9)
    fanouts = chosen_ET.sum(axis=0)
    axes[-1, 1].set_xticks(range(len(TOKENS)), [f"{t}\n{n}" for t, n in zip(TOKENS, fanouts, strict=True)])
    axes[-1, 1].tick_params(axis="x", length=0)
    axes[-1, 1].set_xlabel("token, and its fan-out: 0, 1 or many experts, target mean 1", fontsize=9)
    axes[-1, 0].set_xlabel("threshold = EMA of\nthe stream's quantile", fontsize=9, color="#D55E00")
    figure.savefig(Path(__file__).with_name("expert_threshold.png"), dpi=110)


if __name__ == "__main__":
    main()
