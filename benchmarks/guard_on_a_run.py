"""The guard on real training: what a sudden change of the network does to the loads, with it and without.

    python benchmarks/guard_on_a_run.py [--output benchmarks/results]

A small GPT trains on two CPU processes (gloo, EP=2) until its thresholds have settled, and goes on from that
checkpoint with a fresh optimizer, either at the same learning rate or at 30 times as much, with
`--moe-et-guard 0.5` and without. Results go to guard_on_a_run.md.

Dimension letters: S steps.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

# Run as a script, whose own folder is on the path and the repository not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.environment import environment
from benchmarks.fault_injection import MODEL
from benchmarks.faults.life import ROOT, Life

SETTLED, END, WARMUP, TOKENS = 60, 100, 30, 32 * 64
LIMIT = 600  # seconds for a run of some 15
CALM, SPIKE = "1e-3", "3e-2"
BAD = 0.25
"""Mean |load error| from which on a step counts as off target; its noise here is about 0.05."""


def train(folder: Path, *flags: str) -> str:
    """One run to its end; its output."""
    command = ["-m", "megatron_et.pretrain_gpt", *MODEL, "--expert-model-parallel-size", "2"]
    command += ["--micro-batch-size", "4", "--global-batch-size", "32", "--eval-iters", "0"]
    command += ["--save-interval", str(END), "--moe-et-warmup-steps", str(WARMUP)]
    with Life([*command, "--moe-et-trace-dir", str(folder), *flags], 2, folder / "log") as life:
        if life.wait(LIMIT) != 0:
            raise SystemExit(f"guard_on_a_run: a run failed or took {LIMIT} s:\n{life.output[-5000:]}")
        return life.output


def load_errors(folder: Path) -> dict[int, list[float]]:
    """Step -> load / target - 1 of every expert of every layer."""
    records = [json.loads(line) for line in (folder / "et_trace.jsonl").read_text().splitlines()]
    return {
        record["step"]: [
            share * record["num_experts"] / record["topk"] - 1.0
            for layer in record["layers"].values()
            for share in layer["usage"]
        ]
        for record in records
    }


def row(folder: Path, output: str, beta: str, rate: str, guard: bool) -> str:
    """One line of the table."""
    errors = load_errors(folder)
    mean = {step: sum(map(abs, error)) / len(error) for step, error in errors.items()}
    off = [step for step in sorted(mean) if mean[step] > BAD]
    # All restarts of these steps are "of late"; an expert that restarted twice counts once.
    restarts = int((re.findall(r"guard: EMA of (\d+) experts", output) or ["0"])[-1])
    loss = re.findall(rf" iteration +{END}/.* lm loss: (\S+) ", output)[-1]
    overall = sum(mean.values()) / len(mean)
    worst = max(max(error) for error in errors.values())
    return (
        f"| {beta} | {'spike' if rate == SPIKE else 'calm'} | {'0.5' if guard else 'none'} "
        f"| {100 * overall:.1f} % | {len(off)} | {off[-1] - SETTLED if off else 0} "
        f"| {worst:+.2f} | {restarts} | {float(loss):.4f} |"
    )


def main() -> None:
    """Run all cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    lines = [
        "# The guard on a real run",
        "",
        f"Written by `python benchmarks/guard_on_a_run.py`: {SETTLED} steps at learning rate {CALM}, of them "
        f"{WARMUP} warm-up, then {END - SETTLED} more with a fresh optimizer at {CALM} (calm) or {SPIKE} "
        f"(spike). 3 MoE layers of 8 experts, topk 2, {TOKENS} tokens a batch, mock data, one seed.",
        "",
        *(f"- {name}: {value}" for name, value in environment().items()),
        "",
        f"| beta | learning rate | guard | mean load error | steps off by > {100 * BAD:.0f} % "
        "| last of them, steps after the change | worst violation | experts restarted | loss at the end |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for beta in ("0.9", "0.99", "0.999"):
            base = Path(scratch) / beta
            decay = ["--moe-et-ema-decay", beta]
            train(base, *decay, "--train-iters", str(SETTLED), "--lr", CALM, "--save", str(base))
            for rate in (CALM, SPIKE):
                for guard in (False, True):
                    folder = Path(scratch) / f"{beta}-{rate}-{guard}"
                    flags = [*decay, "--train-iters", str(END), "--lr", rate, "--load", str(base)]
                    flags += ["--no-load-optim", *(["--moe-et-guard", "0.5"] if guard else [])]
                    lines.append(row(folder, train(folder, *flags), beta, rate, guard))
                    print(lines[-1], flush=True)
    (args.output / "guard_on_a_run.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
