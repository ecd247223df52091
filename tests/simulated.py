"""Runs without a network: random logits through the package's own rule, statistics and EMA, as trace lines.

T tokens, E experts.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_et.config import ExpertThresholdConfig
from megatron_et.observe.metrics import LayerBatch, pack
from megatron_et.observe.rules import Observation
from megatron_et.observe.trace import parse_record
from megatron_et.rule.quantile import capacity_bounds, expected_load
from megatron_et.rule.routing import expert_threshold
from megatron_et.rule.schedule import phase
from megatron_et.rule.statistics import BatchRecord, RouterStatistics
from megatron_et.rule.threshold import ThresholdEMA
from tests.reference import capacity

Move = Callable[[int, torch.Tensor], torch.Tensor]


def still(_: int, logits_TE: torch.Tensor) -> torch.Tensor:
    """The same distribution for ever."""
    return logits_TE


def trace_lines(
    steps: int,
    *,
    move: Move = still,
    layers: tuple[int, ...] = (2,),
    E: int = 8,
    topk: int = 1,
    T: int = 1024,
    log_interval: int = 1,
    seed: int = 0,
    uneven: float = 0.0,
    **settings: Any,
) -> Iterator[dict[str, Any]]:
    """The trace of a run, one line per logged step.

    Args:
        move: what becomes of a batch's logits (normal, mean 0, sd 1) at a step.
        uneven: sd of an offset that all tokens of a batch share for an expert.
        settings: of ExpertThresholdConfig.
    """
    config = ExpertThresholdConfig(router_type="expert-threshold", **settings)
    draw = torch.Generator().manual_seed(seed)
    emas = {layer: ThresholdEMA(E, config.ema_decay) for layer in layers}
    for step in range(1, steps + 1):
        batches = {}
        for layer, ema in emas.items():
            offset_E = uneven * torch.randn(E, generator=draw)
            logits_TE = move(step, torch.randn(T, E, generator=draw) + offset_E)
            batches[layer] = _batch(config, ema, logits_TE, step - 1, topk)
        if step % log_interval == 0:
            yield {
                "schema": 1,
                "step": step,
                "phase": phase(config, step - 1),
                "tokens": T,
                "topk": topk,
                "num_experts": E,
                "layers": {str(layer): batch.trace() for layer, batch in batches.items()},
            }


def _batch(
    config: ExpertThresholdConfig, ema: ThresholdEMA, logits_TE: torch.Tensor, committed: int, topk: int
) -> LayerBatch:
    """Route one global batch of one layer, count it, move the thresholds."""
    (T, E), factor = logits_TE.shape, capacity(config, committed)
    bounds = None if factor is None else capacity_bounds(logits_TE, expected_load(T, topk, E), factor)
    lower, upper = bounds or (None, None)
    _, map_TE = expert_threshold(logits_TE, ema.value, lower=lower, upper=upper)
    statistics = RouterStatistics(E, topk)
    statistics.add(logits_TE, map_TE, ema, bounds)
    integers = torch.cat(statistics.integer_parts)
    counts, cutoffs_E, valid, band = statistics.reduced(integers, ema.last_cutoff, config.guard)
    record = BatchRecord(
        counts,
        ema.value.where(ema.num_updates > 0, torch.nan),
        cutoffs_E,
        ema.num_updates.clone(),
        ema.recently_restarted(),
    )
    ema.propose(cutoffs_E, valid=valid, band=band)
    ema.commit()
    return LayerBatch.unpack(pack(record), E, config)


def observations(*args: Any, **settings: Any) -> Iterator[Observation]:
    """`trace_lines` as alarms see them."""
    for line in trace_lines(*args, **settings):
        yield parse_record(line).observation()
