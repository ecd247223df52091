"""Numbers and flags of docs/cluster.md, migration.md and faq.md: computed again, parsed and checked."""

import math
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import NormalDist

import pytest

from benchmarks.migration import STARTS
from benchmarks.suite.methods import METHODS
from megatron_et.check import flags as check_flags
from megatron_et.check import sizes
from megatron_et.check.findings import REFUSED
from megatron_et.host.arguments import explicit_names
from tests.documents import ROOT, blocks
from tests.megatron_here import HAS_TRAINING, absent, needs_newest

# Megatron says at every import what is not installed.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CLUSTER, MIGRATION, FAQ = (ROOT / "docs" / f"{name}.md" for name in ("cluster", "migration", "faq"))
HIDDEN, WIDTH, EXPERTS, TOPK, LAYERS, TOKENS = 2048, 768, 128, 8, 48, 4096
"""Qwen3-30B-A3B, a micro-batch of one sequence."""


def cells(page: Path, start: str) -> list[str]:
    """The table row that begins so."""
    (row,) = (line for line in page.read_text().splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def gib(size: float) -> str:
    return f"{size / 2**30:.4g} GiB"


# --- memory ---


def test_memory_of_the_example() -> None:
    rows = TOKENS * TOPK
    kept, recomputed = 2 * HIDDEN + 6 * WIDTH, 2 * HIDDEN + 4 * WIDTH
    expected = {
        "rows that a rank processes": f"{rows:,}",
        "kept for the backward pass": f"{kept:,}",
        "the same with `--recompute-modules moe_act`": f"{recomputed:,}",
        "kept rows of a layer": f"{rows * kept / 2**20:.0f} MiB",
        "of 48 layers": gib(LAYERS * rows * kept),
        "the same with `moe_act`": gib(LAYERS * rows * recomputed),
        "logits, gates and map": f"{9 * TOKENS * EXPERTS / 2**20:.1f} MiB",
        "`--moe-et-capacity-factor 0.5`": f"+{LAYERS * rows * kept / 2 / 2**30:.1f} GiB",
        "none | experts / topk": f"+{LAYERS * rows * kept * (EXPERTS / TOPK - 1) / 2**30:.0f} GiB",
    }
    for start, number in expected.items():
        assert cells(CLUSTER, start)[-1].startswith(number), (start, number)


def test_statistics_of_the_example() -> None:
    one = sizes.router_bytes(EXPERTS, TOPK)
    reduced = sizes.readable(LAYERS * one.reduced)
    assert cells(CLUSTER, "statistics")[-1] == reduced == sizes.readable(LAYERS * one.accumulated)
    text = CLUSTER.read_text()
    assert f"{LAYERS} routers; {sizes.readable(LAYERS * one.saved)} of thresholds in the checkpoint" in text
    assert f"{reduced} for {LAYERS} layers of {EXPERTS} experts" in FAQ.read_text()
    # "2 KiB for each expert and layer", up to the counts beside the histogram.
    assert 2048 <= one.reduced / EXPERTS < 2100


def test_traffic_of_the_global_pool() -> None:
    assert sizes.pool_bytes(EXPERTS, 1) == 2**19 == 4 * 1024 * EXPERTS
    assert 1.7 < sizes.pool_bytes(EXPERTS, 2) / 2**19 < 2
    assert sizes.pool_calls() == 4


@pytest.mark.parametrize(("layout", "split"), [("TP1, CP1", 1), ("TP4 + SP |", 4), ("TP4 + SP, CP4", 16)])
def test_pools_of_layouts(layout: str, split: int) -> None:
    tokens = TOKENS // split
    assert cells(CLUSTER, layout)[1:3] == [f"{tokens:,}", str(tokens * TOPK // EXPERTS)]


# --- chance ---


def test_the_scale_of_the_gates() -> None:
    """Normal logits, 8 of 128: threshold, mean gate, sum of a token's gates."""
    normal = NormalDist()
    threshold = normal.inv_cdf(1 - TOPK / EXPERTS)
    step = 1e-4
    logits = [threshold + step * (i + 0.5) for i in range(int(8 / step))]
    gate = math.fsum(normal.pdf(x) / (1 + math.exp(-x)) * step for x in logits) * EXPERTS / TOPK
    text = " ".join(MIGRATION.read_text().split())
    assert f"the threshold lies at {threshold:.2f}, the mean gate is {gate:.2f}" in text
    assert f"add up to {TOPK * gate:.1f} on average" in text


def test_tokens_without_an_expert_by_chance() -> None:
    text = FAQ.read_text()
    assert f"(15/16)^16 = {100 * (15 / 16) ** 16:.0f} %" in text
    assert f"8 of 128 would leave {100 * (1 - 8 / 128) ** 128:.2f} %" in text


def test_the_measured_distances_are_those_of_the_results() -> None:
    lines = (ROOT / "benchmarks" / "results" / "migration.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    found = {tuple(row[:2]): re.findall(r"\(([+-][\d.]+)\)", " ".join(row)) for row in table}
    text = " ".join(MIGRATION.read_text().split())
    start, warm, end = (
        [float(found[checkpoint, "thresholds"][column]) for checkpoint in STARTS] for column in (0, 2, 4)
    )
    assert f"was {start[0]:.3f} (auxiliary loss) and {start[1]:.3f} (bias) above" in text
    assert f"end of the warm-up {warm[0]:.3f} and {warm[1]:.3f}, over the last 20 steps" in text
    assert f"over the last 20 steps {end[0]:.3f} and {end[1]:.3f};" in text
    first, last = (
        [float(found[checkpoint, "thresholds, gates by fan-out"][column]) for checkpoint in STARTS]
        for column in (0, 4)
    )
    assert f"{first[0]:.3f} and {first[1]:.3f} at first, {last[0]:.3f} and {last[1]:.3f} at last" in text


# --- flags ---

GPT = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--micro-batch-size 1 --global-batch-size 8 --train-iters 5000 --lr 1e-3 --transformer-impl local "
    "--no-rope-fusion --no-gradient-accumulation-fusion --no-persist-layer-norm --no-bias-swiglu-fusion "
    "--disable-bias-linear"
)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What this package and Megatron's own checks refuse of flags."""
    if not HAS_TRAINING:
        absent("megatron.training, whose parser it asks")
    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    def judged(flags: str, world_size: int = 1) -> list[str]:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        sections = check_flags.judge(flags.split(), script=None)
        return [found.text for section in sections for found in section.findings if found.mark == REFUSED]

    return judged


def flag_blocks(page: Path) -> list[str]:
    """Blocks that hold flags alone."""
    return [" ".join(block.text.split()) for block in blocks(page) if block.text.startswith("--")]


def test_the_example_passes_all_checks(refused: Callable[..., list[str]]) -> None:
    (flags,) = flag_blocks(CLUSTER)
    assert refused(flags, world_size=512) == []


MOVES = {"auxiliary loss": 0, "loss-free bias": 2}


@pytest.mark.parametrize("first", MOVES.values(), ids=MOVES)
def test_before_and_after(first: int, refused: Callable[..., list[str]]) -> None:
    before, after = flag_blocks(MIGRATION)[first : first + 2]
    assert refused(f"{GPT} {after}") == []
    # What is refused of the old flags is what the new ones have not.
    said = refused(f"{GPT} {before} --moe-router-type expert-threshold")
    gone = explicit_names(before.split()) - explicit_names(after.split())
    named = {name for name in gone if any("--" + name.replace("_", "-") in sentence for sentence in said)}
    assert gone - named <= {"moe_router_bias_update_rate"}
    assert len(said) == len(gone - {"moe_router_bias_update_rate", "moe_router_group_topk"})


def test_the_bias_rate_alone_is_accepted(refused: Callable[..., list[str]]) -> None:
    flags = "--num-experts 8 --moe-router-topk 2 --moe-router-type expert-threshold"
    assert refused(f"{GPT} {flags} --moe-router-bias-update-rate 1e-2") == []


@pytest.mark.parametrize("method", ["topk-aux", "topk-seq-aux", "topk-bias"])
def test_baselines_are_those_of_the_benchmarks(method: str) -> None:
    rows = re.findall(
        r"^\| .* \| `(--moe-router-load-balancing-type [^`]*)` \|$", MIGRATION.read_text(), re.M
    )
    listed = [_pairs(row.split()) for row in rows]
    flags = _pairs(METHODS[method].flags())
    del flags["--moe-router-dtype"]  # of all of them
    assert flags in listed
    assert len(listed) == 3


def _pairs(words: list[str]) -> dict[str, float | str | None]:
    found: dict[str, float | str | None] = {}
    for word, after in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            value: float | str | None = None if after.startswith("--") else after
            found[word] = float(value) if value and re.fullmatch(r"[\d.e-]+", value) else value
    return found


@cache
def _known_flags() -> set[str]:
    import argparse

    from megatron.training.arguments import add_megatron_arguments
    from torch.distributed.run import get_args_parser

    from megatron_et.host.arguments import add_arguments

    parsers = (add_arguments(add_megatron_arguments(argparse.ArgumentParser())), get_args_parser())
    return {flag for parser in parsers for action in parser._actions for flag in action.option_strings}


@needs_newest
@pytest.mark.parametrize("name", ["cluster", "migration", "faq", "troubleshooting", "choosing", "metrics"])
def test_flags_exist(name: str) -> None:
    spans = re.findall(r"`([^`]+)`", (ROOT / "docs" / f"{name}.md").read_text())
    named = {flag for span in spans for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", span)}
    elsewhere = {"--signal"}  # sbatch's
    assert named - elsewhere <= _known_flags(), named - elsewhere - _known_flags()
