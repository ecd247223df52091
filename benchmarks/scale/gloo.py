"""Times of all-reduces over gloo: of plain int64 vectors, and of the statistics of real routers.

    torchrun --nproc-per-node N benchmarks/scale/gloo.py OUTPUT.json

Every time is the median of repetitions of the slowest rank.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

SIZES = [1 << power for power in range(13, 25)]
"""Bytes."""
ROUTERS = {
    "3 layers x 16 experts": (3, 16),
    "8 layers x 8 experts": (8, 8),
    "12 layers x 64 experts": (12, 64),
    "12 layers x 128 experts": (12, 128),
}
WARMUP, REPEAT = 3, 21


def seconds(work: Callable[[], object]) -> float:
    """Of the slowest rank, median."""
    times = []
    for _ in range(WARMUP + REPEAT):
        dist.barrier()
        start = time.perf_counter()
        work()
        taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        times.append(taken.item())
    return statistics.median(times[WARMUP:])


def statistics_seconds(layers: int, experts: int) -> dict[str, float]:
    """From the start of the reduction to its end, with the group and alone, and the bytes of the vector."""
    from megatron_et.moe.synchronize import start_reduction
    from tests.captured import router

    routers = [router(False, megatron={"num_moe_experts": experts}) for _ in range(layers)]
    alone = routers[0].tp_dp_cp_group

    def reduce() -> None:
        pending = start_reduction(routers)
        assert pending is not None
        for handle in pending.handles:
            handle.wait()

    found = {"bytes": 8.0 * sum(part.numel() for r in routers for part in r.statistics.integer_parts)}
    for name, group in (("group", dist.group.WORLD), ("alone", alone)):
        routers[0].tp_dp_cp_group = group
        found[name] = seconds(reduce)
    return found


def main() -> None:
    """Measure and write."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    vectors = {}
    for size in SIZES:
        vector = torch.zeros(size // 8, dtype=torch.int64)
        vectors[size] = seconds(lambda vector=vector: dist.all_reduce(vector))
    routers = {name: statistics_seconds(*shape) for name, shape in ROUTERS.items()}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps({"vectors": vectors, "routers": routers}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
