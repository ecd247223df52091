"""Triton kernels behind routing.py and statistics.py."""

from types import ModuleType

import torch

from megatron_et.config import ConfigError, ExpertThresholdConfig, flag_of


def load_kernels(et: ExpertThresholdConfig, num_experts: int, on_device: torch.Tensor) -> ModuleType | None:
    """The module `kernels.routed` if the settings ask for Triton, else None. Triton is imported only then.

    Args:
        et: the router's settings.
        num_experts: E.
        on_device: any tensor where the router's logits will be.

    Raises:
        ConfigError: Triton is asked for and cannot be had: not installed, no GPU, too many experts.
    """
    if et.kernels == "torch":
        return None
    asked = f"{flag_of('kernels')} triton"
    try:
        from megatron_et.kernels import routed
    except ImportError as error:
        raise ConfigError(
            f"{asked} needs Triton, which cannot be imported ({error}): install the one that your torch was "
            "built with, or leave the flag out"
        ) from error
    if not (on_device.is_cuda or routed.INTERPRETED):
        raise ConfigError(f"{asked} needs a GPU, and the router is on {on_device.device}: leave it out")
    if num_experts > routed.MAX_EXPERTS:
        raise ConfigError(
            f"{asked} takes at most {routed.MAX_EXPERTS} experts, and there are {num_experts}: leave it out"
        )
    return routed
