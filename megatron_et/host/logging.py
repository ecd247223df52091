"""Seam: training_log. Writes the metrics of the last committed global batch to TensorBoard, W&B, the console
and the trace, and says when an alarm starts.

Dimension letters: L MoE layers of the whole model, W numbers per layer (metrics.py).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_et.config import ExpertThresholdConfig
from megatron_et.host import seam, state, tensorboard
from megatron_et.observe import trace
from megatron_et.observe.alarms import Alarm, Monitor, details, grouped, headline
from megatron_et.observe.metrics import LayerBatch, overall, pack, width
from megatron_et.observe.rules import Observation, Row
from megatron_et.observe.trace import ALARM_TEXT

_MONITOR = Monitor()
"""Of this process: a resumed run starts without a history."""


_GLOBALS = "megatron.training.global_vars"
CALLED = (
    (_GLOBALS, "get_args"),
    (_GLOBALS, "get_tensorboard_writer"),
    (_GLOBALS, "get_wandb_writer"),
    ("megatron.core.parallel_state", "get_pipeline_model_parallel_world_size"),
    ("megatron.core.parallel_state", "get_pipeline_model_parallel_group"),
)
"""What is imported when there is something to log."""


def install() -> None:
    """Bind the seam."""
    seam.require(*CALLED)
    seam.wrap("megatron.training.training", "training_log", _training_log)


def _training_log(original: Callable[..., Any]) -> Callable[..., Any]:
    def training_log(
        loss_dict: Any, total_loss_dict: Any, learning_rate: Any, iteration: int, *rest: Any, **kw: Any
    ) -> Any:
        result = original(loss_dict, total_loss_dict, learning_rate, iteration, *rest, **kw)
        log_batch(iteration)
        return result

    return training_log


def log_batch(iteration: int) -> None:
    """Log the last global batch if this iteration is due; every rank calls it, the last rank writes."""
    from megatron.training.global_vars import get_args

    args = get_args()
    et = ExpertThresholdConfig.from_args(args)
    if not et.active:
        return
    to_console = iteration % args.log_interval == 0
    # Pipeline stages are joined for it: every rank must decide the same, and only one holds the writers.
    writes = bool(args.tensorboard_dir or getattr(args, "wandb_project", None))
    to_writers = writes and iteration % (args.tensorboard_log_interval or args.log_interval) == 0
    if not (to_console or to_writers):
        return
    layers = gather_layers(args)
    if not layers or args.rank != args.world_size - 1:
        return
    metrics = {number: batch.metrics() for number, batch in layers.items()}
    summary = overall(metrics)
    # At the steps of the trace, so that the report comes to the same alarms.
    seen = observation(iteration, args, layers)
    started = _MONITOR.observe(seen) if to_console else []
    if to_writers:
        _write_scalars(iteration, args, metrics, summary)
    if to_console:
        print(console_line(iteration, summary, next(iter(layers.values())).phase), flush=True)
        if et.trace_dir is not None:
            traces = {number: batch.trace() for number, batch in layers.items()}
            trace.append(Path(et.trace_dir), seen, args.num_experts, traces)
    for group in grouped(started):
        _announce(iteration, group)


def gather_layers(args: Any) -> dict[int, LayerBatch]:
    """Layer number -> its last global batch, on every rank, for the layers of all pipeline stages.

    Counts are already summed over the data-parallel ranks; only pipeline stages have to be joined. Layers of
    multi-token-prediction heads follow the decoder's.
    """
    from megatron.core import parallel_state

    depth = args.num_layers + (getattr(args, "mtp_num_layers", None) or 0)
    packed_LW = torch.zeros(
        depth, width(args.num_experts) + 1, dtype=torch.float64, device=torch.cuda.current_device()
    )
    for router in state.trained_routers():
        if router.last_batch is not None:
            row = router.layer_number - 1 + (args.num_layers if router.is_mtp_layer else 0)
            packed_LW[row, :-1] = pack(router.last_batch)
            packed_LW[row, -1] = 1.0
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        group = parallel_state.get_pipeline_model_parallel_group()
        torch.distributed.all_reduce(packed_LW, group=group)
    packed_LW, et = packed_LW.cpu(), ExpertThresholdConfig.from_args(args)
    present = packed_LW[:, -1].nonzero().flatten().tolist()
    return {row + 1: LayerBatch.unpack(packed_LW[row, :-1], args.num_experts, et) for row in present}


def console_line(iteration: int, summary: Mapping[str, float], phase: str) -> str:
    """One line for people, beside Megatron's own."""
    restarted = int(summary["restarted_experts"])
    guard = f" | guard: EMA of {restarted} experts started again of late" if restarted else ""
    return (
        f" [megatron_et] iteration {iteration:8d} | phase {phase} | fan-out mean "
        f"{summary['fanout_mean']:.3f} "
        f"max {summary['fanout_max']:.0f} | usage min {summary['expert_usage_min']:.4f} max "
        f"{summary['expert_usage_max']:.4f} | "
        f"max violation {summary['max_violation']:.3f} | |cutoff - threshold| {summary['cutoff_gap']:.4f} | "
        f"no expert {100 * summary['tokens_0_experts']:.1f} % of tokens | dead experts "
        f"{summary['dead_experts']:.0f}{guard}"
    )


def observation(iteration: int, args: Any, layers: Mapping[int, LayerBatch]) -> Observation:
    """What alarms are raised from; everything is on the host already."""
    first = next(iter(layers.values()))
    rows = {
        number: Row(
            batch.usage_E().numpy(),
            batch.thresholds_E.numpy(),
            batch.cutoffs_E.numpy(),
            batch.at_bound_E().numpy(),
            batch.restarted,
        )
        for number, batch in layers.items()
    }
    return Observation.of(iteration, first.phase, int(first.counts.tokens), args.moe_router_topk, rows)


def _announce(iteration: int, group: Sequence[Alarm]) -> None:
    """Alarms of one rule that have just started: a line on the console, and to both writers."""
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    title, text = headline(group), f"{'; '.join(details(group))}. Remedy: {group[0].remedy}"
    print(f" [megatron_et] iteration {iteration:8d} | ALARM: {title}: {text}", flush=True)
    if (writer := get_tensorboard_writer()) is not None:
        writer.add_text(ALARM_TEXT, f"{title}: {text}", iteration)
    if (wandb := get_wandb_writer()) is not None:
        wandb.alert(title=f"megatron_et: {title}", text=f"iteration {iteration}: {text}")


def _write_scalars(
    iteration: int,
    args: Any,
    metrics: Mapping[int, Mapping[str, float]],
    summary: Mapping[str, float],
) -> None:
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    scalars = {f"moe/{name}": value for name, value in summary.items()}
    scalars |= {
        "moe/expert_usage_target": args.moe_router_topk / args.num_experts,
        "moe/fanout_target": float(args.moe_router_topk),
        "moe/alarms": float(len(_MONITOR.active)),
    }
    for number, layer in metrics.items():
        scalars |= {f"moe/{name}_layer_{number}": value for name, value in layer.items()}
    # The first batch is routed without thresholds: there is nothing to draw.
    scalars = {name: value for name, value in scalars.items() if math.isfinite(value)}
    if (writer := get_tensorboard_writer()) is not None:
        tensorboard.lay_out(writer)
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
    if (wandb := get_wandb_writer()) is not None:
        wandb.log(scalars, iteration)
