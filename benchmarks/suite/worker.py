"""The process that measures: started by `python -m benchmarks run`, alone or one for each rank."""

import argparse
import gc
import logging
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.suite import layer_level, layers, memory_level, router_level
from benchmarks.suite.methods import METHODS
from benchmarks.suite.results import Row, one_line, write
from benchmarks.suite.workloads import WORKLOADS, Stream, natural


@dataclass(frozen=True)
class Order:
    """What to measure."""

    level: str
    methods: list[str]
    workloads: list[str]
    samples: int
    output: Path
    natural: Path | None
    """Recorded logits: adds the workload `natural`."""
    first: int | None
    """Only so many cases."""

    @classmethod
    def parser(cls) -> argparse.ArgumentParser:
        """Its command line; `words` is the way back."""
        parser = argparse.ArgumentParser(add_help=False)
        parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
        parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
        parser.add_argument("--samples", type=int, default=20)
        parser.add_argument(
            "--natural", type=Path, metavar="LOGITS.npz", help="from benchmarks/suite/capture.py"
        )
        parser.add_argument("--first", type=int, metavar="N", help="only the first N cases")
        return parser

    def words(self) -> list[str]:
        """The order as a command line for a worker."""
        said = {name: value for name, value in asdict(self).items() if value is not None}
        return [
            word
            for name, value in said.items()
            for word in (f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)]))
        ]


def cases(order: Order, device: str) -> list[Any]:
    """Those of the level and device whose workload was asked for."""
    if order.level == "router":
        found: list[Any] = router_level.GPU_CASES if device == "cuda" else router_level.CPU_CASES
        recorded = [router_level.Case(4096, *sizes, "natural") for sizes in _recorded(order)]
    else:
        found = layer_level.cases(device)
        recorded = [
            layer_level.Case(**vars(found[0]) | {"experts": e, "topk": k, "workload": "natural"})
            for e, k in _recorded(order)
        ]
    chosen = [case for case in found if case.workload in order.workloads]
    return [*recorded, *chosen][: order.first]


def _recorded(order: Order) -> list[tuple[int, int]]:
    """Experts and top-k of the recorded logits, if there are some."""
    if order.natural is None:
        return []
    recorded = np.load(order.natural)
    return [(recorded["logits"].shape[1], int(recorded["topk"]))]


def _stream(order: Order, workload: str) -> Stream:
    if workload == "natural":
        assert order.natural is not None
        return natural(order.natural)
    return WORKLOADS[workload]


def measure(order: Order, case: Any, device: str, environment: str) -> list[Row]:
    """One case at its level."""
    stream = _stream(order, case.workload)
    if order.level == "memory":
        return memory_level.measure(case, stream, order.methods, device, environment)
    level = router_level if order.level == "router" else layer_level
    return level.measure(case, stream, order.methods, device, environment, samples=order.samples)


def main() -> None:
    """Measure every case; rank 0 writes after each."""
    parser = argparse.ArgumentParser(parents=[Order.parser()])
    parser.add_argument("--level", required=True)
    parser.add_argument("--output", type=Path, required=True)
    order = Order(**vars(parser.parse_args()))
    warnings.filterwarnings("ignore")  # Megatron's, about what is not installed, once a process
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    import os

    import torch

    from benchmarks.environment import device_environment

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    environment = one_line(device_environment() | {"processes": str(ranks)})  # before the CPU backend's CUDA
    device = layers.start(expert_parallel=ranks)
    for case in cases(order, device):
        rows = measure(order, case, device, environment)
        if torch.distributed.get_rank() == 0:
            write(order.output, rows)
            for one in rows:
                value = f"{one.median:10.3f} {one.unit}" if one.measured else f"{'':10} -"
                print(f"{one.case:44} {one.method:20} {one.quantity:10} {value}  {one.note}", flush=True)
        gc.collect()  # layers and their routers hold on to one another
        if device == "cuda":
            torch.cuda.empty_cache()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
