"""Seam: loading a checkpoint that was written without thresholds (plain Megatron, top-k).

Thresholds are ordinary persistent buffers, so saving, resuming and resharding need no code. Only their
absence does: Megatron would stop with a missing key. Here the routers keep fresh thresholds, which starts the
warm-up, and one line says so; every other missing key stays an error.
"""

import contextlib
from collections.abc import Callable
from typing import Any

from megatron_et.config import ExpertThresholdConfig
from megatron_et.host import seam
from megatron_et.moe.router import LoadingWithoutThresholds
from megatron_et.rank_zero import say

_CHECKPOINTING = "megatron.training.checkpointing"


def install() -> None:
    """Bind the seam."""
    seam.wrap(_CHECKPOINTING, "_load_base_checkpoint", _load_base_checkpoint)
    seam.wrap(_CHECKPOINTING, "load_checkpoint", _load_checkpoint)


_loading: contextlib.ExitStack | None = None


def _load_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        global _loading
        with contextlib.ExitStack() as _loading:
            try:
                return original(*args, **kwargs)
            finally:
                _loading = None

    return load_checkpoint


def _load_base_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_base_checkpoint(load_dir: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        result = original(load_dir, args, *rest, **kwargs)
        # load_checkpoint first reads what is not sharded, the saved arguments among it, then builds the
        # sharded state
        # dict: the moment to leave our buffers out of it.
        if _loading is not None and not LoadingWithoutThresholds.active:
            explanation = _without_thresholds(args, result[0])
            if explanation is not None:
                say(explanation)
                _loading.enter_context(LoadingWithoutThresholds())
        return result

    return load_base_checkpoint


def _without_thresholds(args: Any, state_dict: Any) -> str | None:
    """Why the checkpoint has no thresholds for this run; None when it has, or when none are wanted."""
    et = ExpertThresholdConfig.from_args(args)
    if not et.active or not state_dict or state_dict.get("args") is None:
        return None
    saved = ExpertThresholdConfig.from_args(state_dict["args"])
    if saved.active:
        return None
    return (
        "the checkpoint was trained with top-k routing and holds no thresholds: they start fresh, and the "
        "warm-up of "
        f"{et.warmup_steps} global batches (--moe-et-warmup-steps) begins now"
    )
