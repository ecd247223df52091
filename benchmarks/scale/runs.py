"""Real training runs whose loads the model has to predict: the quickstart's GPT on its text, CPU and gloo.

Every run has one micro-batch per rank and step and an expert-parallel group of all its ranks, so that a
rank's load is its experts' load over the whole global batch.

Dimension letters: N steps, L MoE layers, S sequences of a step over all ranks, E experts.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.scale.record import FOLDER
from examples import quickstart
from tests.launch import TAIL, torchrun

STEPS, WARMUP, SETTLE = 180, 60, 20
"""Steps in all, of Expert Choice before, and left out after it (or, of the top-k run, at its start)."""
BETA = 0.9
SEQUENCES, SEQUENCE = 4, 256
"""Of a rank's micro-batch; tokens of one."""
EXPERTS, TOPK = 16, 1
LIMIT = 600
ROUTERS = {
    "ET": ["--moe-router-type", "expert-threshold", "--moe-et-ema-decay", str(BETA)],
    "ET, C=0.5": [
        *("--moe-router-type", "expert-threshold", "--moe-et-ema-decay", str(BETA)),
        *("--moe-et-capacity-factor", "0.5"),
    ],
    "top-k": [
        *("--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", "1e-2"),
        "--moe-router-pre-softmax",
    ],
}


@dataclass(frozen=True)
class Loads:
    """What a run sent where, its settled steps only."""

    counts_NLSE: np.ndarray
    """Tokens of each sequence that each expert took; the sequences of a rank are neighbours."""
    fanout_squares_NLS: np.ndarray
    """Sum over a sequence's tokens of the squared fan-out."""
    at_bound: float | None
    """Share of experts and micro-batches in which capacity decided the load, from the trace."""

    def every_other(self, first: int) -> "Loads":
        """Half of the steps, from the first (0) or the second (1) on. Not halves of the run: a network that
        learns is another one later."""
        steps = slice(first, None, 2)
        return Loads(self.counts_NLSE[steps], self.fanout_squares_NLS[steps], self.at_bound)


def train(router: str, ranks: int, data: Path, scratch: Path) -> Loads:
    """One run; a finished one in `scratch` is read again."""
    name = f"{router.replace(', ', '-').replace('=', '')}-{ranks}"
    if all((scratch / name / f"rank{rank}.npz").is_file() for rank in range(ranks)):
        return read(scratch / name, ranks)
    trace = ["--moe-et-trace-dir", str(scratch / name)] if router != "top-k" else []
    warmup = ["--moe-et-warmup-steps", str(WARMUP)] if router != "top-k" else []
    arguments = [
        "benchmarks/scale/record.py",
        *(*quickstart.MODEL_ARGS, *quickstart.MOE_ARGS, *quickstart.TRAINING_ARGS),
        *("--expert-model-parallel-size", str(ranks), "--micro-batch-size", str(SEQUENCES)),
        *("--global-batch-size", str(SEQUENCES * ranks), "--train-iters", str(STEPS)),
        *("--eval-iters", "1", "--eval-interval", str(STEPS), "--log-interval", "1"),
        *quickstart.data_args(data),
        *(*ROUTERS[router], *warmup, *trace),
    ]
    run = torchrun(arguments, ranks, env={FOLDER: str(scratch / name)}, timeout=LIMIT)
    if run.returncode != 0:
        raise SystemExit(f"scale_model: the run {name} failed:\n{run.stdout[-TAIL:]}")
    return read(scratch / name, ranks)


def read(folder: Path, ranks: int) -> Loads:
    """The settled steps of a finished run; what ranks wrote is checked against the trace."""
    files = [np.load(folder / f"rank{rank}.npz") for rank in range(ranks)]
    counts_NLSE = np.concatenate([file["loads_NLBE"] for file in files], axis=2)
    squares_NLS = np.concatenate([file["fanout_squares_NLB"] for file in files], axis=2)
    first = WARMUP + SETTLE
    trace, at_bound = folder / "et_trace.jsonl", None
    if trace.is_file():
        records = [json.loads(line) for line in trace.read_text().splitlines()]
        usage_NLE = np.array([[layer["usage"] for layer in record["layers"].values()] for record in records])
        tokens = records[0]["tokens"]
        if not np.array_equal(np.rint(usage_NLE * tokens), counts_NLSE.sum(axis=2)):
            raise SystemExit(f"scale_model: {folder}: the recorded loads are not those of et_trace.jsonl")
        bound = [[layer["at_bound"] for layer in record["layers"].values()] for record in records]
        at_bound = float(np.mean(bound[first:]))
    return Loads(counts_NLSE[first:], squares_NLS[first:], at_bound)
