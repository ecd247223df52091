"""Kernels behind routing.py, statistics.py and quantile.py: Triton's, and two in CUDA C++."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_et.config import ConfigError, ExpertThresholdConfig, flag_of
from megatron_et.rule.quantile import Select, kth_largest_of_several

type Route = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""`kernels.routed.expert_threshold`."""


@dataclass(frozen=True)
class Kernels:
    """What a router calls."""

    route: Route | None = None
    """Routes and counts in place of routing.py and statistics.py; None: they do it."""
    select: Select = kth_largest_of_several
    """Finds the bounds of Expert Choice and of a capacity."""


def load_kernels(et: ExpertThresholdConfig, num_experts: int, on_device: torch.Tensor) -> Kernels:
    """The kernels that the settings ask for. Triton and the CUDA bindings are imported only if they are asked
    for.

    Args:
        et: the router's settings.
        num_experts: E.
        on_device: any tensor where the router's logits will be.

    Raises:
        ConfigError: the kernels cannot be had: a package is missing, no GPU, too many experts.
    """
    if et.kernels == "torch":
        return Kernels()
    asked = f"{flag_of('kernels')} {et.kernels}"
    try:
        from megatron_et.rule.kernels import routed
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
    # What the CUDA kernels never take needs none of their compiler.
    whole_rows = et.max_fanout is not None or et.gate_normalization == "fanout"
    bounded = et.router_type == "expert-choice" or et.warmup_steps > 0 or et.capacity_factor is not None
    cuda = et.kernels == "cuda" and num_experts % routed.native.EXPERTS == 0
    routes = cuda and not whole_rows
    selects = cuda and bounded and et.pool == "microbatch"
    if routes or selects:
        try:
            from cuda.bindings import driver, nvrtc  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"{asked} needs NVIDIA's cuda-bindings ({error}): pip install the cuda-bindings of your CUDA "
                f"version, or use {flag_of('kernels')} triton"
            ) from error
    if on_device.is_cuda:
        try:
            routed.try_out(on_device.device, routes, selects)
        except Exception as error:  # of compilers and drivers, of any kind
            raise ConfigError(
                f"{asked}: its kernels cannot be had on this GPU: {error}. Leave the flag out"
            ) from error
    route = functools.partial(routed.expert_threshold, cuda=routes)
    return Kernels(route, routed.select.kth_largest) if selects else Kernels(route)
