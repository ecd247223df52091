"""What TensorBoard gets beside scalars: ready-made charts and the versions, through Megatron's own writer.

It takes the tags of a multi-line chart as regular expressions, matched from the start of a tag: one pattern
draws a metric of all layers into one chart, however many there are, and each needs its end marked. The three
tags of a margin chart (mean, lower, upper) are plain.
"""

import platform
import weakref
from typing import Any

import torch

from megatron_et import __version__
from megatron_et.host.versions import megatron_version
from megatron_et.observe.trace import VERSIONS_TEXT

_LAID_OUT: "weakref.WeakSet[Any]" = weakref.WeakSet()


def layout() -> dict[str, dict[str, list[Any]]]:
    """Category -> chart -> [kind, tags], as SummaryWriter.add_custom_scalars takes it."""
    return {
        "Balance": {
            "expert usage: smallest, mean, largest, target (share of tokens)": _lines(
                "expert_usage_target", "expert_usage_min", "expert_usage_mean", "expert_usage_max"
            ),
            "max violation (max / mean usage - 1)": _lines("max_violation"),
            "dead experts (count)": _lines("dead_experts"),
            "alarms that are on": _lines("alarms"),
        },
        "Fan-out": {
            "mean fan-out and target (routed experts per token)": _lines("fanout_mean", "fanout_target"),
            "tokens with 0, 1, 2 or more experts (share)": _lines(
                "tokens_0_experts", "tokens_1_expert", "tokens_2plus_experts"
            ),
            "largest fan-out": _lines("fanout_max"),
        },
        "Thresholds": {
            "thresholds: mean, smallest to largest (logits)": [
                "Margin",
                [f"moe/threshold_{part}" for part in ("mean", "min", "max")],
            ],
            "|cutoff - threshold| (logits)": _lines("cutoff_gap"),
            "experts restarted by the guard": _lines("restarted_experts"),
        },
        "Capacity": {"loads decided by a capacity bound (share)": _lines("capacity_bound_share")},
        "Layer by layer": {
            "largest expert usage (share of tokens)": _layers("expert_usage_max"),
            "smallest expert usage (share of tokens)": _layers("expert_usage_min"),
            "mean fan-out (routed experts per token)": _layers("fanout_mean"),
            "|cutoff - threshold| (logits)": _layers("cutoff_gap"),
            "mean threshold (logits)": _layers("threshold_mean"),
            "dead experts (count)": _layers("dead_experts"),
            "tokens without a routed expert (share)": _layers("tokens_0_experts"),
            "loads decided by a capacity bound (share)": _layers("capacity_bound_share"),
        },
    }


def _lines(*metrics: str) -> list[Any]:
    return ["Multiline", [f"moe/{metric}$" for metric in metrics]]


def _layers(metric: str) -> list[Any]:
    return ["Multiline", [rf"moe/{metric}_layer_\d+$"]]


def lay_out(writer: Any) -> None:
    """Write charts and versions into the writer's event file, once: a resumed run has a file of its own."""
    if writer in _LAID_OUT:
        return
    _LAID_OUT.add(writer)
    writer.add_custom_scalars(layout())
    writer.add_text(VERSIONS_TEXT, versions())


def versions() -> str:
    """Of what decides numbers, and the device."""
    device = torch.cuda.get_device_name() if torch.cuda.is_initialized() else "CPU"
    return (
        f"megatron_et {__version__}, megatron-core {megatron_version()}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {device}"
    )
