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
    """The kernels that the settings ask for; `auto` is Triton's where they can be had, else none. Triton and
    the CUDA bindings are imported only if they are asked for.

    Args:
        et: the router's settings.
        num_experts: E.
        on_device: any tensor where the router's logits will be.

    Raises:
        ConfigError: kernels asked for by name cannot be had: a package is missing, no GPU, too many experts.
    """
    if et.kernels == "torch":
        return Kernels()
    if (why := why_not(et, num_experts, on_device)) is not None:
        if et.kernels == "auto":
            return Kernels()
        raise ConfigError(refusal(et, why))
    from megatron_et.rule.kernels import routed

    routes, selects = _in_cuda(et, num_experts)
    route = functools.partial(routed.expert_threshold, cuda=routes)
    return Kernels(route, routed.select.kth_largest) if selects else Kernels(route)


def refusal(et: ExpertThresholdConfig, why: str) -> str:
    """The sentence about kernels that were asked for by name."""
    return f"{flag_of('kernels')} {et.kernels} cannot be had: {why}. Use {flag_of('kernels')} auto"


def why_not(et: ExpertThresholdConfig, num_experts: int, on_device: torch.Tensor) -> str | None:
    """Why the kernels that the settings ask for (`auto`: Triton's) cannot be had in this process; None when
    they passed their try-out. Arguments as for `load_kernels`."""
    no_gpu = f"there is no GPU, the router is on {on_device.device}"
    if et.kernels == "auto" and not on_device.is_cuda:
        return no_gpu
    try:
        from megatron_et.rule.kernels import routed
    except ImportError as error:
        return f"Triton cannot be imported ({error}): install the one that your torch was built with"
    if not (on_device.is_cuda or routed.INTERPRETED):
        return no_gpu
    if num_experts > routed.MAX_EXPERTS:
        return f"they take at most {routed.MAX_EXPERTS} experts, and there are {num_experts}"
    routes, selects = _in_cuda(et, num_experts)
    if routes or selects:
        try:
            from cuda.bindings import driver, nvrtc  # noqa: F401
        except ImportError as error:
            return (
                f"NVIDIA's cuda-bindings cannot be imported ({error}): pip install those of your CUDA version"
            )
    if on_device.is_cuda:
        try:
            routed.try_out(on_device.device, routes, selects)
        except Exception as error:  # of compilers and drivers, of any kind
            return f"their try-out on this GPU failed: {error}"
    return None


def _in_cuda(et: ExpertThresholdConfig, num_experts: int) -> tuple[bool, bool]:
    """Whether route.cu and select.cu have work: what they never take needs none of their compiler."""
    whole_rows = et.max_fanout is not None or et.gate_normalization == "fanout"
    bounded = et.router_type == "expert-choice" or et.warmup_steps > 0 or et.capacity_factor is not None
    cuda = et.kernels == "cuda" and num_experts % 8 == 0
    return cuda and not whole_rows, cuda and bounded and et.pool == "microbatch"
