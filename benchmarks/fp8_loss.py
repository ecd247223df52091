"""Loss of FP8 against bf16, with Expert Threshold routing and with top-k as a control.

    python benchmarks/fp8_loss.py [--routers topk] [--recipes tensorwise] [--output benchmarks/results]

Trains the same GPT once for every router and recipe, on the quickstart's pinned corpus, one process, one GPU;
bf16 (recipe `none`) with every seed, FP8 with the first. Losses go to fp8_loss.csv, where a run replaces the
rows of the same router, recipe and seed, and the table of all runs there to fp8_loss.md. So the work can
be split over several calls: at 200 steps about a minute a run on an H100 is planned, ten runs in all.

A rehearsal without a GPU, with a model of toy size:

    MEGATRON_ET_CPU=1 python benchmarks/fp8_loss.py --model small --recipes none --steps 4 --tail 2 \
        --output /tmp/fp8
"""

import argparse
import csv
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.environment import environment  # noqa: E402
from benchmarks.processes import kill_tree  # noqa: E402
from benchmarks.small_gpt import SMALL_GPT  # noqa: E402

# A dense first layer and seven MoE layers of 32 experts: 0.4e9 parameters, 16,384 tokens a step.
_H100 = """
    --num-layers 8 --hidden-size 1024 --ffn-hidden-size 2816 --num-attention-heads 16 --swiglu
    --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --seq-length 1024 --max-position-embeddings 1024 --attention-dropout 0 --hidden-dropout 0
    --untie-embeddings-and-output-weights --make-vocab-size-divisible-by 128
    --num-experts 32 --moe-router-topk 4 --moe-layer-freq [0,1,1,1,1,1,1,1]
    --moe-ffn-hidden-size 512 --moe-shared-expert-intermediate-size 512
    --moe-token-dispatcher-type alltoall --moe-grouped-gemm --moe-permute-fusion
    --micro-batch-size 8 --global-batch-size 16 --use-distributed-optimizer
    --no-gradient-accumulation-fusion --num-workers 2
"""
_TOY = [flag for flag in SMALL_GPT if flag != "--mock-data"]
MODELS: dict[str, list[str]] = {"h100": _H100.split(), "small": _TOY}

_TRAINING = """
    --bf16 --lr 6e-4 --lr-decay-style constant --lr-warmup-iters {warmup} --clip-grad 1.0
    --train-iters {steps} --lr-decay-iters {steps} --override-opt-param-scheduler --log-interval 1
    --eval-interval 100000 --eval-iters 0 --save-interval 100000 --seed {seed} --split 100,0,0
"""

RECIPES: dict[str, str] = {
    "none": "",
    "delayed": (
        "--fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 16 --fp8-amax-compute-algo max"
    ),
    "tensorwise": "--fp8-format hybrid --fp8-recipe tensorwise",
    "blockwise": "--fp8-format e4m3 --fp8-recipe blockwise",
    "mxfp8": "--fp8-format e4m3 --fp8-recipe mxfp8",
}
ON_HOPPER = ["none", "delayed", "tensorwise", "blockwise"]

ROUTERS: dict[str, str] = {
    # Warm-up a quarter of the run: the last steps, which are compared, are routed by thresholds.
    "expert-threshold": (
        "--moe-router-type expert-threshold --moe-et-warmup-steps {quarter} --moe-et-ema-decay 0.95"
    ),
    "topk": ("--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --moe-router-dtype fp32"),
}

VOCABULARY = 4096
LIMIT = 240  # seconds for a run


@dataclass(frozen=True)
class Row:
    """One step of one run."""

    router: str
    recipe: str
    seed: int
    step: int
    loss: float
    milliseconds: float
    where: str
    """GPU, versions and model; rows that differ in them are not compared."""

    @property
    def run(self) -> tuple[str, str, int]:
        """Rows of the same run belong together."""
        return self.router, self.recipe, self.seed


# ---- training ---------------------------------------------------------------------------------------------


def make_data(folder: Path) -> list[str]:
    """Write the quickstart's corpus (3.4 M tokens), a tokenizer and a dataset; Megatron's flags for them."""
    from examples import corpus
    from megatron_et.data.dataset import write_dataset
    from megatron_et.data.tokenizer import train_tokenizer

    parts = corpus.build(folder, progress=False)
    print(corpus.verdict(folder), flush=True)
    training = [part.path for name, part in parts.items() if name.endswith("train")]
    train_tokenizer(training, folder / "tokenizer", VOCABULARY)
    write_dataset(training, folder / "text", folder / "tokenizer.model")
    return [
        *("--data-path", str(folder / "text"), "--data-cache-path", str(folder / "cache")),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(folder / "tokenizer.model")),
    ]


def flags(model: str, router: str, recipe: str, seed: int, steps: int) -> list[str]:
    """Megatron's flags of a run, data excepted."""
    training = _TRAINING.format(steps=steps, warmup=steps // 10, seed=seed).split()
    routing = ROUTERS[router].format(quarter=steps // 4).split()
    return [*MODELS[model], *training, *routing, *RECIPES[recipe].split()]


def plan(routers: Sequence[str], recipes: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, str, int]]:
    """(router, recipe, seed) of every run: bf16 with all seeds, FP8 with the first."""
    return [
        (router, recipe, seed)
        for router in routers
        for recipe in recipes
        for seed in (seeds if recipe == "none" else seeds[:1])
    ]


def train(arguments: Sequence[str], *, processes: int = 1, limit: int = LIMIT) -> str:
    """One run to its end, within `limit` seconds; its output.

    Raises:
        RuntimeError: it failed, or took too long; with the end of its output.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher, alone = [sys.executable], {}
    if processes == 1:
        # What torchrun would set: with one process there is nothing else for it to do.
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    else:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        launcher += ["--master-addr", "127.0.0.1", "--master-port", port]
    command = [*launcher, "-m", "megatron_et.pretrain_gpt", *arguments]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command,
            env={"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"} | dict(os.environ) | alone,
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            status: int | str = process.wait(limit)
        except BaseException as error:
            kill_tree(process.pid)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            status = f"none after {limit} s"
        log.seek(0)
        output = log.read()
    if status != 0:
        raise RuntimeError(f"{' '.join(command)} ended with status {status}:\n{output[-5000:]}")
    return output


# ---- reading and comparing --------------------------------------------------------------------------------


def read_log(output: str) -> dict[int, tuple[float, float]]:
    """Step -> training loss, milliseconds. The loss of step 2 is the mean of the first two (Megatron's)."""
    pattern = r" iteration +(\d+)/.* elapsed time per iteration \(ms\): (\S+) .* lm loss: (\S+) "
    return {
        int(step): (float(loss), float(milliseconds))
        for step, milliseconds, loss in re.findall(pattern, output)
    }


def merged(old: Iterable[Row], new: Sequence[Row]) -> list[Row]:
    """Old rows, those of the new rows' runs replaced.

    Raises:
        ValueError: the old rows come from another GPU, other versions or another model.
    """
    replaced = {row.run for row in new}
    kept = [row for row in old if row.run not in replaced]
    places = {row.where for row in [*kept, *new]}
    if len(places) > 1:
        raise ValueError(f"rows of different machines cannot be compared: {', '.join(sorted(places))}")
    return kept + list(new)


def read_csv(path: Path) -> list[Row]:
    """Rows of an earlier call; none when there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [
            Row(
                line["router"],
                line["recipe"],
                int(line["seed"]),
                int(line["step"]),
                float(line["loss"]),
                float(line["milliseconds"]),
                line["where"],
            )
            for line in csv.DictReader(file)
        ]


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """All rows."""
    names = [column.name for column in fields(Row)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([getattr(row, name) for name in names] for row in rows)


@dataclass(frozen=True)
class Comparison:
    """A run beside the bf16 run of the same router and the first seed, over the last steps of both."""

    router: str
    recipe: str
    seed: int
    loss: float
    """Mean."""
    difference: float | None
    """Mean of the signed differences, step by step; None for the bf16 run itself."""
    distance: float | None
    """Mean of the absolute differences, step by step."""
    milliseconds: float
    """Median of a step."""


def compare(rows: Iterable[Row], tail: int) -> list[Comparison]:
    """Every run beside its bf16 run, in the order of the rows.

    Raises:
        ValueError: two runs that are compared differ in length, or are shorter than the tail.
    """
    runs: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        runs.setdefault(row.run, []).append(row)
    last = {key: sorted(steps, key=lambda row: row.step)[-tail:] for key, steps in runs.items()}
    first_seed = min((seed for _, _, seed in runs), default=0)
    found = []
    for (router, recipe, seed), steps in last.items():
        if len(steps) < tail:
            raise ValueError(f"{router}, {recipe}, seed {seed}: {len(steps)} steps, {tail} are compared")
        losses = {row.step: row.loss for row in steps}
        base_key = (router, "none", first_seed)
        base = {row.step: row.loss for row in last.get(base_key, [])}
        differences = None
        if base and (router, recipe, seed) != base_key:
            if base.keys() != losses.keys():
                raise ValueError(f"{router}, {recipe}, seed {seed}: not the same steps as the bf16 run's")
            differences = [losses[step] - base[step] for step in losses]
        found.append(
            Comparison(
                router,
                recipe,
                seed,
                mean(losses.values()),
                None if differences is None else mean(differences),
                None if differences is None else mean(map(abs, differences)),
                median(row.milliseconds for row in steps),
            )
        )
    return found


def report(comparisons: Sequence[Comparison], tail: int, run: Mapping[str, str]) -> str:
    """The results page; `run` is what was run where, name -> value."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return "\n".join(
        [
            "# Loss of FP8 against bf16",
            "",
            f"Written by `python benchmarks/fp8_loss.py`. Means over the last {tail} steps. The difference "
            "is to the bf16 run (recipe none) of the same router and the first seed, step by step; a bf16 "
            "run with another seed (other weights, other order of data) shows how far runs are apart that "
            "differ by chance alone.",
            "",
            *(f"- {name}: {value}" for name, value in run.items()),
            "",
            "| router | recipe | seed | loss | difference | absolute difference | ms a step (median) |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
            *(
                f"| {line.router} | {line.recipe} | {line.seed} | {line.loss:.4f} "
                f"| {number(line.difference, '+.4f')} | {number(line.distance, '.4f')} "
                f"| {line.milliseconds:.0f} |"
                for line in comparisons
            ),
            "",
        ]
    )


# ---- the command ------------------------------------------------------------------------------------------


def place() -> str:
    """GPU and versions."""
    import importlib.metadata

    import torch

    names = ("torch", "megatron-core", "transformer-engine")
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    return ", ".join([device, *versions])


def main() -> None:
    """Train, add to the CSV after every run, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", choices=MODELS, default="h100")
    parser.add_argument("--routers", nargs="+", choices=ROUTERS, default=list(ROUTERS))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=ON_HOPPER)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1234, 1235], help="of bf16; FP8: the first")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tail", type=int, default=50, help="last steps that are compared")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    table, page = args.output / "fp8_loss.csv", args.output / "fp8_loss.md"
    rows, where, failed = read_csv(table), f"{place()}, model {args.model}", []
    merged(rows, [Row("", "", 0, 0, 0.0, 0.0, where)])  # before any work: are they from this machine?
    with tempfile.TemporaryDirectory() as scratch:
        data = make_data(Path(scratch))
        for router, recipe, seed in plan(args.routers, args.recipes, args.seeds):
            name = f"{router}, {recipe}, seed {seed}"
            try:
                output = train([*flags(args.model, router, recipe, seed, args.steps), *data])
            except RuntimeError as error:
                # The others are worth their time on the GPU all the same.
                failed.append(name)
                print(f"{name}: {error}", flush=True)
                continue
            new = [
                Row(router, recipe, seed, step, loss, milliseconds, where)
                for step, (loss, milliseconds) in read_log(output).items()
            ]
            [last] = compare(new, args.tail)
            print(f"{name}: {last.loss:.4f}, {last.milliseconds:.0f} ms a step", flush=True)
            rows = merged(rows, new)
            write_csv(table, rows)
    run = environment() | {"machine and model": where, "steps": str(args.steps)}
    page.write_text(report(compare(rows, args.tail), args.tail, run))
    print(page.read_text())
    if failed:
        raise SystemExit(f"fp8_loss: failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
