"""Warm-up, annealing and capacity over a training: one schedule, driven by the number of updates that the
thresholds have really had.

It is computed on the device, from the thresholds' own buffer: nothing on the host has to keep up with a
checkpoint that is loaded, broadcast or refitted into it, and a CUDA graph that was captured in the warm-up
lasts through its end.
"""

import torch

from megatron_et.config import ExpertThresholdConfig


def phase(et: ExpertThresholdConfig, num_updates: int) -> str:
    """Name of the phase that routes the next training batch: warmup, anneal or threshold."""
    if et.router_type == "expert-choice" or num_updates < et.warmup_steps:
        return "warmup"
    return "anneal" if num_updates < et.warmup_steps + et.warmup_anneal_steps else "threshold"


def settled(et: ExpertThresholdConfig, num_updates: int) -> bool:
    """Whether the capacity stays `final_capacity` for the rest of the training."""
    return et.router_type == "expert-choice" or num_updates >= et.warmup_steps + et.warmup_anneal_steps


def final_capacity(et: ExpertThresholdConfig) -> float | None:
    """Capacity factor C of a settled schedule; None means that nothing bounds the load."""
    return 0.0 if et.router_type == "expert-choice" else et.capacity_factor


def capacity(
    et: ExpertThresholdConfig, num_updates: torch.Tensor
) -> tuple[float | torch.Tensor, torch.Tensor]:
    """Capacity factor C in force for the next training batch, without a branch on the host.

    0 in the warm-up (Expert Choice). While annealing it grows from 0 to the training capacity: linearly to a
    finite one, and as x / (1 - x) of the annealed share x to an infinite one, so that neither end jumps.

    Args:
        et: settings of --moe-router-type expert-threshold.
        num_updates: [1] int64, updates that the thresholds have had.

    Returns:
        capacity, [1] fp64, or the number 0.0 where it is 0 as long as anything is bounded;
        bounded [1] bool, False where nothing bounds the load.
    """
    annealed = num_updates - et.warmup_steps
    if et.capacity_factor is None:
        bounded = annealed < et.warmup_anneal_steps
        if et.warmup_anneal_steps == 0:
            return 0.0, bounded
    else:
        bounded = torch.ones_like(annealed, dtype=torch.bool)
    share = annealed.double() / max(et.warmup_anneal_steps, 1)
    annealing = share / (1.0 - share) if et.capacity_factor is None else share * et.capacity_factor
    now = torch.where(annealed < et.warmup_anneal_steps, annealing, et.capacity_factor or 0.0)
    return torch.where(annealed < 0, 0.0, now), bounded
