"""The capacity schedule for a router inside a CUDA graph: computed on the device from the number of committed
batches, since a Python branch would stay as it was when the graph was captured.

`ExpertThresholdConfig.capacity` is the same schedule for a router that runs eagerly; both give the same
numbers, bit for bit (tests/unit/moe/test_cuda_graph.py).
"""

import torch

from megatron_et.config import ExpertThresholdConfig


def settled(et: ExpertThresholdConfig, committed_batches: int) -> bool:
    """Whether `et.capacity(committed_batches)` stays what it is for the rest of the training, so that a graph
    may hold it as a constant."""
    return et.router_type == "expert-choice" or committed_batches >= et.warmup_steps + et.warmup_anneal_steps


def capacity_on_device(
    et: ExpertThresholdConfig, committed_batches: torch.Tensor
) -> tuple[float | torch.Tensor, torch.Tensor]:
    """Capacity factor C in force for the next training batch, without a branch on the host.

    Args:
        et: settings of --moe-router-type expert-threshold.
        committed_batches: [1] int64, global batches that have already moved the thresholds.

    Returns:
        capacity, [1] fp64, or the number 0.0 where it is 0 as long as anything is bounded;
        bounded [1] bool, False where nothing bounds the load.
    """
    annealed = committed_batches - et.warmup_steps
    if et.capacity_factor is None:
        bounded = annealed < et.warmup_anneal_steps
        if et.warmup_anneal_steps == 0:
            return 0.0, bounded
    else:
        bounded = torch.ones_like(annealed, dtype=torch.bool)
    # The same operations in the same order as on the host, in fp64 as there.
    share = annealed.double() / max(et.warmup_anneal_steps, 1)
    annealing = share / (1.0 - share) if et.capacity_factor is None else share * et.capacity_factor
    capacity = torch.where(annealed < et.warmup_anneal_steps, annealing, et.capacity_factor or 0.0)
    return torch.where(annealed < 0, 0.0, capacity), bounded
