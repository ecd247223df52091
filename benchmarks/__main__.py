"""The benchmark suite: routers side by side, from the kernel to the training step.

    python -m benchmarks run router            # or layer, memory, step, all; on a GPU if there is one
    python -m benchmarks run layer --methods et topk-aux --workloads balanced hot-expert
    python -m benchmarks compare OLD.csv NEW.csv
    python -m benchmarks table                 # writes all tables and pictures from benchmarks/results

Results go to benchmarks/results/LEVEL_DEVICE.csv, .md and .png; a run replaces the rows that it measured
again. Without a GPU set MEGATRON_ET_CPU=1: real Megatron over gloo, two processes where a level needs ranks.
"""

import argparse
import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path

from benchmarks.environment import ROOT, device_environment
from benchmarks.suite import compare, plots, step_level, tables
from benchmarks.suite.results import RESULTS, one_line, read, write
from benchmarks.suite.worker import Order

LEVELS = ("router", "layer", "memory", "step")
CPU_RANKS = {"router": 1, "layer": 2, "memory": 2}


def device() -> str:
    """What is measured: cpu where the CPU backend was asked for, else cuda."""
    import torch

    from megatron_et.run import cpu

    if cpu.requested():
        return "cpu"
    if not torch.cuda.is_available():
        sys.exit(
            "no GPU is visible: set MEGATRON_ET_CPU=1 to measure on the CPU, or see CUDA_VISIBLE_DEVICES"
        )
    return "cuda"


def measure(level: str, args: argparse.Namespace) -> None:
    """One level, its tables and its picture."""
    output = tables.result_file(level, device(), args.output)
    if level == "step":
        rows = step_level.measure(
            args.methods,
            device(),
            one_line(device_environment()),
            rounds=args.rounds,
            steps=args.steps,
            skipped=min(args.steps * 2 // 5, 60),
            say=lambda line: print(line, flush=True),
        )
        write(output, rows)
    else:
        order = Order(level, args.methods, args.workloads, args.samples, output, args.natural, args.first)
        launch(order, CPU_RANKS[level] if device() == "cpu" else args.ranks)
    pages(level, device(), args.output)


def pages(level: str, of_device: str, folder: Path) -> None:
    """The table and the picture of a result file, if there is one."""
    file = tables.result_file(level, of_device, folder)
    rows = read(file)
    if rows:
        file.with_suffix(".md").write_text(tables.markdown(rows, level, of_device))
        plots.draw(rows, level, file.with_suffix(".png"))


def launch(order: Order, ranks: int) -> None:
    """Start the worker, one process a rank; its failure is ours."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = ["torch.distributed.run", "--nproc-per-node", str(ranks), "--master-addr", "127.0.0.1"]
    launcher += ["--master-port", port, "-m"]
    command = [
        sys.executable,
        "-m",
        *(launcher if ranks > 1 else []),
        "benchmarks.suite.worker",
        *order.words(),
    ]
    run = subprocess.run(command, cwd=ROOT, env={"OMP_NUM_THREADS": "1"} | dict(os.environ), check=False)
    if run.returncode:
        sys.exit(run.returncode)


def main() -> None:
    """Run, compare or write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", parents=[Order.parser()], help="measure a level")
    run.add_argument("level", choices=(*LEVELS, "all"))
    run.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    run.add_argument("--ranks", type=int, default=1, help="GPUs of the levels layer and memory (default 1)")
    run.add_argument("--rounds", type=int, default=3, help="of level step: runs of each method (default 3)")
    run.add_argument("--steps", type=int, default=100, help="of level step: training steps (default 100)")
    both = commands.add_parser("compare", help="two result files side by side")
    both.add_argument("old", type=Path)
    both.add_argument("new", type=Path)
    commands.add_parser("table", help="write the README's table, and every result file's own and its picture")
    args = parser.parse_args()
    if args.command == "compare":
        for path in (args.old, args.new):
            if not path.is_file():
                parser.error(f"{path} is no file: results are benchmarks/results/LEVEL_DEVICE.csv")
        print(compare.text(compare.changes(read(args.old), read(args.new))))
    elif args.command == "table":
        for level, of_device in itertools.product(LEVELS, tables.DEVICES):
            pages(level, of_device, RESULTS)
        readme = ROOT / "README.md"
        readme.write_text(tables.put_into(readme.read_text(), tables.readme_table()))
    else:
        for level in LEVELS if args.level == "all" else (args.level,):
            measure(level, args)


if __name__ == "__main__":
    main()
