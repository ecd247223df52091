"""The main job on one laptop-class machine: real text, real Megatron pretraining, a resume, and a report.

    make quickstart                                  # or: .venv/bin/python examples/quickstart.py
    make quickstart QUICKSTART_ARGS="--iterations 60 --run runs/short"

Steps, each skipped when its result is already there:
 1. a corpus of code and prose from pinned packages' files           runs/corpus
 2. a SentencePiece tokenizer and Megatron .bin/.idx datasets        runs/data
 3. torchrun, 2 processes, EP=2: a GPT with a dense first layer and MoE layers of 16 routed experts + 1
    shared; Expert Choice warm-up, then thresholds; stopped          runs/quickstart/checkpoints, tensorboard
 4. resumed from the checkpoint and finished                         runs/quickstart/train.log
 5. tables and plots                                                 runs/quickstart/report

`--router topk` trains Megatron's own top-k with an auxiliary loss on the same data instead, for comparison.
"""

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Run as a script: the repository is the place of `examples`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples import corpus as pinned_corpus
from megatron_et.data.dataset import write_dataset
from megatron_et.data.tokenizer import train_tokenizer
from megatron_et.observe.report.command import make_report, print_report

console = Console()
DOMAINS = ("code", "prose")
VOCABULARY = 4096
PROCESSES = 2
LOG_INTERVAL = 5

MODEL_ARGS = [
    *("--num-layers", "4", "--hidden-size", "128", "--ffn-hidden-size", "384", "--num-attention-heads", "4"),
    *("--seq-length", "256", "--max-position-embeddings", "256", "--position-embedding-type", "rope"),
    *("--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear"),
    *("--untie-embeddings-and-output-weights", "--attention-dropout", "0", "--hidden-dropout", "0"),
]
MOE_ARGS = [
    *("--num-experts", "16", "--moe-router-topk", "1", "--moe-ffn-hidden-size", "128"),
    *("--moe-shared-expert-intermediate-size", "128", "--moe-layer-freq", "([0]+[1]*3)"),
    *("--moe-token-dispatcher-type", "alltoall", "--expert-model-parallel-size", "2"),
]
TRAINING_ARGS = [
    *("--micro-batch-size", "8", "--global-batch-size", "16", "--lr", "2e-3", "--min-lr", "1e-4"),
    *("--lr-decay-style", "cosine", "--lr-warmup-iters", "20", "--weight-decay", "0.0", "--clip-grad", "1.0"),
    *(
        "--use-distributed-optimizer",
        "--seed",
        "1234",
        "--log-interval",
        str(LOG_INTERVAL),
        "--eval-iters",
        "8",
    ),
    *("--log-throughput", "--ckpt-format", "torch_dist"),
]


def warmup_steps(iterations: int) -> int:
    """Global batches routed by Expert Choice first."""
    return iterations // 2


def router_args(router: str, iterations: int, run: Path) -> list[str]:
    """Flags of the router under test: the only difference between the runs."""
    if router == "topk":
        # Megatron demands the softmax before the selection when one expert is selected.
        balance = ["--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", "1e-2"]
        return [*balance, "--moe-router-pre-softmax"]
    return [
        *("--moe-router-type", router, "--moe-et-trace-dir", str(run)),
        # The paper's decay 0.999 and warm-up 4000 are for 20k steps; both shrink with the run.
        *("--moe-et-ema-decay", "0.9", "--moe-et-warmup-steps", str(warmup_steps(iterations))),
    ]


def data_args(data: Path) -> list[str]:
    """Both domains at equal weight; validation files were held out when the corpus was built."""
    splits = {
        split: [word for domain in DOMAINS for word in ("1", str(data / f"{domain}.{split}"))]
        for split in ("train", "valid")
    }
    return [
        *("--train-data-path", *splits["train"], "--valid-data-path", *splits["valid"]),
        *("--tokenizer-type", "SentencePieceTokenizer"),
        *("--tokenizer-model", str(data / "tokenizer.model")),
        *("--data-cache-path", str(data / "cache")),
    ]


def prepare_data(corpus: Path, data: Path) -> None:
    """Corpus, tokenizer and datasets; what exists is kept."""
    texts = {f"{d}.{s}": corpus / f"{d}.{s}.jsonl" for d in DOMAINS for s in ("train", "valid")}
    if not all(path.is_file() for path in texts.values()):
        console.print("[bold]1/5[/] building a corpus from pinned packages' sources, docstrings and licences")
        for name, part in pinned_corpus.build(corpus, "quickstart").items():
            console.print(f"      {name:12} {part.documents:5d} documents  {part.bytes / 1e6:6.2f} MB")
    console.print(f"      {pinned_corpus.verdict(corpus)}", soft_wrap=True, highlight=False)
    if pinned_corpus.differences(corpus) and data.is_dir():
        console.print(f"      datasets of an earlier corpus, if any, stay: remove {data} too", soft_wrap=True)
    model = data / "tokenizer.model"
    data.mkdir(parents=True, exist_ok=True)
    if not model.is_file():
        console.print(f"[bold]2/5[/] training a SentencePiece tokenizer of {VOCABULARY} pieces")
        training_texts = [path for name, path in texts.items() if name.endswith("train")]
        train_tokenizer(training_texts, model.with_suffix(""), VOCABULARY)
    for name, path in texts.items():
        if not (data / f"{name}.idx").is_file():
            console.print(f"      {write_dataset([path], data / name, model)}")


def train(args: list[str], iterations: int, log: Path, what: str) -> None:
    """Run the pretraining command under torchrun, showing progress; stop with the log's end if it fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(PROCESSES)),
        *("--master-addr", "127.0.0.1", "--master-port", str(port)),
        *("-m", "megatron_et.pretrain_gpt", *args),
    ]
    env = {**os.environ, "MEGATRON_ET_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    steps = TextColumn("{task.completed}/{task.total} steps")
    columns = (TextColumn("{task.description}"), BarColumn(), steps)
    with (
        log.open("a", buffering=1) as file,
        subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
        Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress,
    ):
        task = progress.add_task(f"      {what}: starting", total=iterations)
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if match := re.search(r"iteration\s+(\d+)/\s*\d+ .*?lm loss: ([\d.E+-]+)", line):
                loss = float(match.group(2))
                progress.update(
                    task, completed=int(match.group(1)), description=f"      {what}: loss {loss:.3f}"
                )
        status = process.wait()
    if status != 0:
        lines = log.read_text(errors="replace").splitlines()
        # The cause stands above torchrun's own report, which is all that the log's end would show.
        causes = [line for line in lines if re.search(r"^megatron_et: |\w+Error: ", line)]
        causes = [line for line in causes if "ChildFailedError" not in line] or lines[-30:]
        console.print("\n".join(causes[-5:]), markup=False, highlight=False)
        sys.exit(f"quickstart: {what} failed with status {status}; the whole log is {log}")


def finished(checkpoints: Path) -> int:
    """Last saved iteration, 0 when there is none."""
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.is_file() else 0


def main(argv: Iterable[str] | None = None) -> None:
    """Run all five steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run",
        type=Path,
        default=Path("runs/quickstart"),
        help="folder of the run; corpus and data lie beside it",
    )
    parser.add_argument("--iterations", type=int, default=400, help="training steps (at least 30)")
    parser.add_argument(
        "--router", choices=("expert-threshold", "expert-choice", "topk"), default="expert-threshold"
    )
    parser.add_argument("--fresh", action="store_true", help="train again even if this run is finished")
    options = parser.parse_args(None if argv is None else list(argv))
    if options.iterations < 30:
        parser.error(f"--iterations is {options.iterations}: at least 30, or the warm-up has no time to end")
    run: Path = options.run.absolute()
    run.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    prepare_data(run.parent / "corpus", run.parent / "data")

    checkpoints, log, settings = run / "checkpoints", run / "train.log", run / "settings.txt"
    wanted = f"{options.router}, {options.iterations} iterations"
    if options.fresh:
        for old in (checkpoints, run / "tensorboard", run / "report"):
            shutil.rmtree(old, ignore_errors=True)
        for old in (log, run / "et_trace.jsonl", settings):
            old.unlink(missing_ok=True)
    if settings.is_file() and settings.read_text() != wanted:
        parser.error(f"{run} holds a run of {settings.read_text()}: give another --run, or --fresh")
    settings.write_text(wanted)
    total, stop = options.iterations, options.iterations * 3 // 4
    args = [
        *MODEL_ARGS,
        *MOE_ARGS,
        *TRAINING_ARGS,
        *("--train-iters", str(total), "--eval-interval", str(max(total // 6, 1))),
        *("--save", str(checkpoints), "--load", str(checkpoints), "--save-interval", str(max(total // 4, 1))),
        *("--tensorboard-dir", str(run / "tensorboard"), "--tensorboard-log-interval", str(LOG_INTERVAL)),
        *data_args(run.parent / "data"),
        *router_args(options.router, total, run),
    ]
    if finished(checkpoints) < stop:
        console.print(f"[bold]3/5[/] training, {PROCESSES} processes, EP=2 (log: {log})")
        train([*args, "--exit-interval", str(stop)], total, log, f"steps 1 to {stop}")
    if finished(checkpoints) < total:
        console.print(f"[bold]4/5[/] stopped at step {finished(checkpoints)}; resuming from its checkpoint")
        train(args, total, log, f"steps {finished(checkpoints) + 1} to {total}")
    else:
        console.print(f"this run is finished ({total} steps): drawing its report again; --fresh trains anew")
    console.print("[bold]5/5[/] report")
    # All logged steps after the warm-up, the ones right after the switch included.
    logged_after_warmup = (total - warmup_steps(total)) // LOG_INTERVAL
    topk = options.router == "topk"
    print_report(make_report(run, last_steps=None if topk else logged_after_warmup))
    console.print(f"all done in {time.monotonic() - started:.0f} s; everything is in {run}")


if __name__ == "__main__":
    main()
