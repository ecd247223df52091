"""What a top-k checkpoint does when it goes on with thresholds: the loss at the switch and after it.

    MEGATRON_ET_CPU=1 OMP_NUM_THREADS=1 python benchmarks/migration.py [--output benchmarks/results]

A small GPT is trained by top-k with an auxiliary loss, and by top-k with the loss-free bias. Each checkpoint
then goes on in three ways over the same data: as before (the control), with Expert Threshold routing, and
with it and `--moe-et-gate-normalization fanout`. Results go to migration.md.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

# Run as a script, whose own folder is on the path and the repository not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.environment import ROOT, environment
from benchmarks.fp8_loss import make_data, read_log, train
from benchmarks.suite.methods import METHODS
from benchmarks.suite.step_level import MODELS_BY_DEVICE

BEFORE, AFTER, WARMUP, BETA = 100, 60, 30, 0.9
TAIL = 20
LIMIT = 900  # seconds for a run of some 100
MODEL = MODELS_BY_DEVICE["cpu"]

_TRAINING = """
    --lr 1e-3 --lr-decay-style constant --lr-decay-iters 1000 --lr-warmup-iters 10 --clip-grad 1.0
    --override-opt-param-scheduler --weight-decay 0 --log-interval 1 --eval-interval 100000 --eval-iters 0
    --seed 1234 --split 100,0,0
"""
_ET = (
    f"--moe-router-type expert-threshold --moe-et-warmup-steps {WARMUP} --moe-et-ema-decay {BETA}"
    " --moe-router-load-balancing-type none"
)
STARTS = {"top-k + auxiliary loss": "topk-aux", "loss-free bias": "topk-bias"}
WAYS = {
    "as before": None,
    "thresholds": _ET,
    "thresholds, gates by fan-out": f"{_ET} --moe-et-gate-normalization fanout",
}


@dataclass(frozen=True)
class Continued:
    """One way on from one checkpoint."""

    losses: dict[int, float]
    """Step -> training loss."""
    no_expert: dict[int, float]
    """Step -> share of tokens without a routed expert, mean of the layers; empty for top-k."""


def routing(start: str, way: str) -> list[str]:
    """Flags of the router."""
    flags = WAYS[way]
    return METHODS[STARTS[start]].flags() if flags is None else flags.split()


def begin(start: str, folder: Path, data: Sequence[str]) -> dict[int, float]:
    """Train by top-k and save; step -> loss."""
    flags = [
        *_TRAINING.split(),
        "--train-iters",
        str(BEFORE),
        "--save",
        str(folder),
        "--save-interval",
        "1000",
    ]
    log = train(
        [*MODEL.flags, *flags, *METHODS[STARTS[start]].flags(), *data],
        processes=MODEL.processes,
        limit=LIMIT,
    )
    return {step: loss for step, (loss, _) in read_log(log).items()}


def go_on(start: str, way: str, folder: Path, trace: Path, data: Sequence[str]) -> Continued:
    """Load what `begin` saved in `folder` and train on."""
    flags = [*_TRAINING.split(), "--train-iters", str(BEFORE + AFTER), "--load", str(folder)]
    traced = [] if WAYS[way] is None else ["--moe-et-trace-dir", str(trace)]
    log = train(
        [*MODEL.flags, *flags, *routing(start, way), *traced, *data], processes=MODEL.processes, limit=LIMIT
    )
    return Continued({step: loss for step, (loss, _) in read_log(log).items()}, without_expert(trace))


def without_expert(folder: Path) -> dict[int, float]:
    """Step -> share of tokens without a routed expert, from a trace; empty without one."""
    file = folder / "et_trace.jsonl"
    records: list[dict[str, Any]] = (
        [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    )
    return {
        record["step"]: mean(
            layer["fanout_histogram"][0] / record["tokens"] for layer in record["layers"].values()
        )
        for record in records
    }


def row(start: str, way: str, one: Continued, control: Continued) -> str:
    """One line of the table: the loss less the control's at the switch, and means over later steps."""

    def apart(first: int, last: int) -> str:
        steps = range(BEFORE + first, BEFORE + last + 1)
        difference = mean(one.losses[step] - control.losses[step] for step in steps)
        return f"{mean(one.losses[step] for step in steps):.3f} ({difference:+.3f})"

    def alone(first: int, last: int) -> str:
        if not one.no_expert:
            return "0"
        return f"{100 * mean(one.no_expert[BEFORE + step] for step in range(first, last + 1)):.1f}"

    spans = ((1, 1), (11, 20), (WARMUP - 9, WARMUP), (WARMUP + 1, WARMUP + 1), (AFTER - TAIL + 1, AFTER))
    cells = [start, way, *(apart(*span) for span in spans), alone(1, 1), alone(AFTER - TAIL + 1, AFTER)]
    return f"| {' | '.join(cells)} |"


def page(rows: Sequence[str], before: dict[str, dict[int, float]], run: dict[str, str]) -> str:
    """The results page."""
    last = {
        start: mean(losses[step] for step in range(BEFORE - TAIL + 1, BEFORE + 1))
        for start, losses in before.items()
    }
    return "\n".join(
        [
            "# A top-k checkpoint goes on with thresholds",
            "",
            f"Written by `python benchmarks/migration.py`: {BEFORE} steps of top-k, then {AFTER} more from "
            f"its checkpoint, optimizer state included, over the same data. {MODEL.description}, real text, "
            f"learning rate 1e-3, one seed. Thresholds: {WARMUP} steps of warm-up, beta {BETA}. Losses are "
            "those of training, in brackets the difference from the control (as before) on the same batches.",
            "",
            *(f"- {name}: {value}" for name, value in run.items()),
            *(
                f"- loss before the switch, {start}, last {TAIL} steps: {loss:.3f}"
                for start, loss in last.items()
            ),
            "",
            "| checkpoint of | goes on with | 1st step | steps 11 to 20 "
            f"| {WARMUP - 9} to {WARMUP}, end of the warm-up | {WARMUP + 1}, first by threshold "
            f"| {AFTER - TAIL + 1} to {AFTER} | tokens without expert, 1st step, % | at the end, % |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            *rows,
            "",
        ]
    )


def main() -> None:
    """Run all cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    rows, before = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        data = make_data(work)
        for start in STARTS:
            before[start] = begin(start, work / start, data)
            found = {way: go_on(start, way, work / start, work / start / way, data) for way in WAYS}
            for way, one in found.items():
                rows.append(row(start, way, one, found["as before"]))
                print(rows[-1], flush=True)
    (args.output / "migration.md").write_text(page(rows, before, environment()))


if __name__ == "__main__":
    main()
