"""Level `step`: real pretraining of a small GPT on real text, one run a method and round, the methods in
turns.

Reported are milliseconds of a step, tokens and model TFLOP a second, and beside them the loss and the mean
fan-out, so that nobody wins by routing fewer tokens. Steps of the warm-up, Megatron's and ours, are left out.
"""

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.fp8_loss import MODELS, make_data, read_log, train
from benchmarks.suite.methods import METHODS, Method
from benchmarks.suite.results import Row, row
from benchmarks.suite.router_level import fanout_note

SEQUENCE, BATCH = 256, 16
_CPU = f"""
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 384 --num-attention-heads 4 --swiglu
    --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE} --attention-dropout 0 --hidden-dropout 0
    --untie-embeddings-and-output-weights --make-vocab-size-divisible-by 128
    --num-experts 16 --moe-router-topk 2 --moe-layer-freq [0,1,1,1]
    --moe-ffn-hidden-size 128 --moe-shared-expert-intermediate-size 128
    --moe-token-dispatcher-type alltoall --expert-model-parallel-size 2
    --micro-batch-size 8 --global-batch-size {BATCH} --use-distributed-optimizer
"""
_TRAINING = """
    --lr 1e-3 --lr-decay-style constant --lr-warmup-iters 10 --clip-grad 1.0 --weight-decay 0
    --train-iters {steps} --lr-decay-iters {steps} --override-opt-param-scheduler --log-interval 1
    --eval-interval 100000 --eval-iters 0 --save-interval 100000 --seed {seed} --split 100,0,0
    --log-throughput
"""


@dataclass(frozen=True)
class Model:
    """A GPT and the machine that it is for."""

    flags: tuple[str, ...]
    processes: int
    tokens: int
    """Of a global batch."""
    topk: int
    description: str


MODELS_BY_DEVICE = {
    "cpu": Model(
        tuple(_CPU.split()), 2, SEQUENCE * BATCH, 2,
        f"GPT 4 layers H128, E16 k2 + 1 shared, EP2, {SEQUENCE * BATCH} tokens a step",
    ),
    "cuda": Model(
        (*MODELS["h100"], "--bf16"), 1, 16_384, 4,
        "GPT 8 layers H1024, E32 k4 + 1 shared, bf16, 16384 tokens a step",
    ),
}  # fmt: skip


@dataclass
class Measured:
    """What the rounds of one method gave."""

    milliseconds: list[float] = field(default_factory=list)
    tflops: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """One a round: mean of the last fifth of its steps."""
    fanouts: list[float] = field(default_factory=list)
    max_loads: list[float] = field(default_factory=list)


def measure(
    methods: Sequence[str],
    device: str,
    environment: str,
    *,
    rounds: int,
    steps: int,
    skipped: int,
    say: Callable[[str], None],
) -> list[Row]:
    """Train every method `rounds` times, each round with another seed; steps up to `skipped` do not count."""
    model = MODELS_BY_DEVICE[device]
    measured, missing = {name: Measured() for name in methods}, {}
    with tempfile.TemporaryDirectory() as scratch:
        data = make_data(Path(scratch))
        for turn in range(rounds):
            for name in methods:
                missing[name] = METHODS[name].missing(device)
                if missing[name] is None:
                    one = _run(
                        METHODS[name], model, data, Path(scratch) / f"{turn}-{name}", 1234 + turn, steps
                    )
                    _add(measured[name], one, skipped, model.topk)
                    say(f"round {turn + 1}, {name}: loss {measured[name].losses[-1]:.4f}")
    rows: list[Row] = []
    for name, found in measured.items():
        rows += _rows(name, found, missing[name], model, steps, environment)
    return rows


@dataclass(frozen=True)
class Run:
    """One run's output and the trace of an Expert Threshold run."""

    output: str
    trace: list[dict[str, Any]]


def _run(method: Method, model: Model, data: Sequence[str], folder: Path, seed: int, steps: int) -> Run:
    # In the first hundred steps logits drift fast: thresholds that lag ten batches would send fewer tokens,
    # and the work would not be the same.
    following = ["--moe-et-ema-decay", "0.0"]
    traced = ["--moe-et-trace-dir", str(folder), *following] if method.et is not None else []
    training = _TRAINING.format(steps=steps, seed=seed).split()
    output = train([*model.flags, *training, *method.flags(), *traced, *data], processes=model.processes)
    file = folder / "et_trace.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return Run(output, [json.loads(line) for line in lines])


def _add(measured: Measured, run: Run, skipped: int, topk: int) -> None:
    log = {step: values for step, values in read_log(run.output).items() if step > skipped}
    measured.milliseconds += [milliseconds for _, milliseconds in log.values()]
    measured.tflops += throughputs(run.output)[skipped:]
    losses = [loss for loss, _ in log.values()]
    measured.losses.append(mean(losses[-max(len(losses) // 5, 1) :]))
    layers = [
        layer for record in run.trace if record["step"] > skipped for layer in record["layers"].values()
    ]
    if not layers:
        measured.fanouts.append(float(topk))
        return
    measured.fanouts.append(mean(sum(layer["usage"]) for layer in layers))
    measured.max_loads.append(mean(max(u) / mean(u) for u in (layer["usage"] for layer in layers)))


def throughputs(output: str) -> list[float]:
    """Model TFLOP/s of a GPU, of every step that Megatron logged; none where it prints 0.0, as on CPU."""
    printed = [float(x) for x in re.findall(r"throughput per GPU \(TFLOP/s/GPU\): (\S+)", output)]
    return printed if any(printed) else []


def _rows(
    name: str, found: Measured, missing: str | None, model: Model, steps: int, environment: str
) -> list[Row]:
    case = f"{model.description}, {steps} steps"
    if missing is not None:
        return [row("step", case, name, "step", environment, note=f"not run: {missing}")]
    fanout = mean(found.fanouts)
    load = mean(found.max_loads) if found.max_loads else float("nan")
    quantities = {
        "step": ("ms", found.milliseconds),
        "throughput": ("tokens/s", [1e3 * model.tokens / ms for ms in found.milliseconds]),
        "model throughput": ("TFLOP/s per GPU", found.tflops),
        "loss": ("nats", found.losses),
    }
    return [
        row(
            "step", case, name, quantity, environment, unit=unit, values=values,
            fanout=fanout, max_load=load, note=fanout_note(fanout, model.topk),
        )
        for quantity, (unit, values) in quantities.items()
        if values
    ]  # fmt: skip
