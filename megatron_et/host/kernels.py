"""Seam: setup_model_and_optimizer, which every rank calls before it builds its model: the ranks of the job
agree on the kernels that route. One that cannot run Triton's would otherwise be the slow one, unnoticed.
"""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch

from megatron_et.config import ConfigError, ExpertThresholdConfig
from megatron_et.host import seam
from megatron_et.host.arguments import exit_on_config_error
from megatron_et.rank_zero import say
from megatron_et.rule.kernels import refusal, why_not


def install() -> None:
    """Bind the seam."""
    seam.wrap("megatron.training.training", "setup_model_and_optimizer", _setup_model_and_optimizer)


def _setup_model_and_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
        from megatron.training.global_vars import get_args

        exit_on_config_error(agree, get_args())
        return original(*args, **kwargs)

    return setup_model_and_optimizer


def agree(args: Namespace) -> None:
    """Set `args.moe_et_kernels` to what every rank can run, where it is `auto`, and say which.

    Raises:
        ConfigError: kernels asked for by name that some rank cannot have; on all ranks.
    """
    et = ExpertThresholdConfig.from_args(args)
    if not et.active or et.kernels == "torch":
        return
    here = torch.empty(0, device=torch.cuda.current_device())
    reasons = _of_all_ranks(why_not(et, args.num_experts, here))
    missing = [f"rank {rank}: {why}" for rank, why in enumerate(reasons) if why is not None]
    if missing and et.kernels != "auto":
        raise ConfigError(refusal(et, missing[0]))
    if et.kernels == "auto":
        args.moe_et_kernels = "torch" if missing else "triton"
        others = f", as {len(missing) - 1} further ranks" if missing[1:] else ""
        say(f"kernels: {args.moe_et_kernels} ({missing[0] + others if missing else 'tried on every rank'})")


def _of_all_ranks(value: str | None) -> list[str | None]:
    if not torch.distributed.is_initialized():
        return [value]
    values: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
