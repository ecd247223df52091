"""Metrics of a global batch, from the counts that were reduced for the thresholds anyway.

Dimension letters: E experts, F = E + 1 fan-outs, W = width(E) numbers that describe a layer.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from megatron_et.config import ExpertThresholdConfig
from megatron_et.rule.schedule import phase
from megatron_et.rule.statistics import BatchCounts, BatchRecord

# How one number for the whole model is made of the layers' numbers.
METRICS: dict[str, str] = {
    "threshold_min": "min",
    "threshold_mean": "mean",
    "threshold_max": "max",
    "cutoff_gap": "mean",
    "expert_usage_min": "min",
    "expert_usage_mean": "mean",
    "expert_usage_max": "max",
    "max_violation": "max",
    "fanout_mean": "mean",
    "fanout_max": "max",
    "tokens_0_experts": "mean",
    "tokens_1_expert": "mean",
    "tokens_2plus_experts": "mean",
    "capacity_bound_share": "mean",
    "dead_experts": "sum",
    "restarted_experts": "sum",
}


def width(num_experts: int) -> int:
    """W: numbers in a packed layer."""
    return BatchCounts.size(num_experts) + 2 * num_experts + 2


def pack(record: BatchRecord) -> torch.Tensor:
    """One layer's record as a vector [W] fp64, which holds counts up to 2**53 exactly; summed with zeros over
    PP ranks."""
    counts = torch.cat([getattr(record.counts, name) for name in BatchCounts.__dataclass_fields__]).double()
    # NaN (a batch without a quantile) would survive the sum over pipeline stages: it travels as it is, rows
    # are disjoint.
    return torch.cat(
        [
            counts,
            record.thresholds_E.double(),
            record.cutoffs_E,
            record.num_updates.double(),
            record.restarted.double(),
        ]
    )


@dataclass(frozen=True)
class LayerBatch:
    """One layer's global batch, on the host."""

    counts: BatchCounts
    thresholds_E: torch.Tensor
    cutoffs_E: torch.Tensor
    phase: str
    restarted: int

    @classmethod
    def unpack(cls, packed_W: torch.Tensor, num_experts: int, et: ExpertThresholdConfig) -> "LayerBatch":
        """Inverse of `pack`."""
        counts, thresholds_E, cutoffs_E, num_updates, restarted = packed_W.cpu().split(
            [BatchCounts.size(num_experts), num_experts, num_experts, 1, 1]
        )
        return cls(
            BatchCounts.split(counts.long(), num_experts),
            thresholds_E,
            cutoffs_E,
            phase(et, int(num_updates)),
            int(restarted),
        )

    def usage_E(self) -> torch.Tensor:
        """Share of the batch's tokens that each expert took, [experts] fp64."""
        return self.counts.usage_E.double() / self.counts.tokens.clamp(min=1)

    def at_bound_E(self) -> torch.Tensor:
        """Share of the micro-batches in which a capacity bound decided the expert's load, [experts] fp64."""
        return self.counts.at_bound_E.double() / self.counts.micro_batches.clamp(min=1)

    def metrics(self) -> dict[str, float]:
        """Every metric of METRICS. Shares are in [0, 1] of tokens or experts; thresholds are on the logits'
        scale."""
        usage_E = self.usage_E()
        tokens = max(int(self.counts.tokens), 1)
        share_F = self.counts.fanout_F.double() / tokens
        fanouts_F = torch.arange(share_F.numel(), dtype=torch.float64)
        present = self.counts.fanout_F.nonzero()
        mean_usage = usage_E.mean().item()
        return {
            "threshold_min": self.thresholds_E.min().item(),
            "threshold_mean": self.thresholds_E.mean().item(),
            "threshold_max": self.thresholds_E.max().item(),
            "cutoff_gap": (self.cutoffs_E - self.thresholds_E).abs().mean().item(),
            "expert_usage_min": usage_E.min().item(),
            "expert_usage_mean": mean_usage,
            "expert_usage_max": usage_E.max().item(),
            "max_violation": usage_E.max().item() / mean_usage - 1.0 if mean_usage > 0.0 else 0.0,
            "fanout_mean": (share_F * fanouts_F).sum().item(),
            "fanout_max": float(present.max()) if present.numel() else 0.0,
            "tokens_0_experts": share_F[0].item(),
            "tokens_1_expert": share_F[1].item(),
            "tokens_2plus_experts": share_F[2:].sum().item(),
            "capacity_bound_share": self.at_bound_E().mean().item(),
            "dead_experts": float((self.counts.usage_E == 0).sum()),
            "restarted_experts": float(self.restarted),
        }

    def trace(self) -> dict[str, int | list[float] | list[int] | list[float | None]]:
        """Per-expert numbers for et_trace.jsonl (docs/metrics.md)."""
        return {
            "usage": self.usage_E().tolist(),
            "threshold": _finite(self.thresholds_E),
            "cutoff": _finite(self.cutoffs_E),
            "fanout_histogram": self.counts.fanout_F.tolist(),
            "at_bound": self.at_bound_E().tolist(),
            "restarted": self.restarted,
        }


def _finite(values_E: torch.Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values_E.tolist()]


def overall(layers: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """The model's metrics from its layers', reduced as METRICS says."""
    reduce: dict[str, Callable[[list[float]], float]] = {
        "min": min,
        "max": max,
        "sum": sum,
        "mean": lambda values: sum(values) / len(values),
    }
    return {
        name: reduce[how]([metrics[name] for metrics in layers.values()]) for name, how in METRICS.items()
    }
