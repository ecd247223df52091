"""Expert Threshold routing for Megatron-Core (arXiv 2603.11535).

import megatron_et
megatron_et.install()          # then use Megatron as ever, with --moe-router-type expert-threshold
"""

from typing import TYPE_CHECKING, Any

from megatron_et.config import ExpertThresholdConfig

if TYPE_CHECKING:
    from megatron_et.host import install
    from megatron_et.moe.router import ExpertThresholdRouter
    from megatron_et.moe.synchronize import finalize_thresholds

__version__ = "0.1.0"
__all__ = ["ExpertThresholdConfig", "ExpertThresholdRouter", "finalize_thresholds", "install"]

_LAZY = {
    "ExpertThresholdRouter": "megatron_et.moe.router",
    "finalize_thresholds": "megatron_et.moe.synchronize",
    "install": "megatron_et.host",
}


def __getattr__(name: str) -> Any:
    # Lazy: these import Megatron, which the CPU backend must come before and which `megatron-et --help`
    # does not need.
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
