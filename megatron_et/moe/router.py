"""ExpertThresholdRouter: the glue between the rule (routing.py) and Megatron's MoE layer.

Dimension letters: T tokens of this rank's micro-batch, E experts.
"""

import inspect
from typing import Any, override

import torch
from megatron.core.transformer.moe.moe_utils import get_capacity
from megatron.core.transformer.moe.router import TopKRouter

from megatron_et.config import ConfigError, ExpertThresholdConfig
from megatron_et.moe import compatibility
from megatron_et.moe.dispatchers import drop_over_capacity
from megatron_et.moe.settings import bounded, resolve_config
from megatron_et.rule.kernels import load_kernels
from megatron_et.rule.quantile import (
    Count,
    capacity_bounds,
    capacity_loads,
    expected_load,
    kth_largest_of_parts,
)
from megatron_et.rule.routing import expert_threshold
from megatron_et.rule.schedule import capacity, final_capacity, settled
from megatron_et.rule.statistics import BatchRecord, RouterStatistics
from megatron_et.rule.threshold import ThresholdEMA


def _mtp_keyword(is_mtp_layer: bool) -> dict[str, bool]:
    """megatron-core 0.16 does not tell a router that it belongs to a multi-token-prediction head: it numbers
    those layers on from the decoder's."""
    known = "is_mtp_layer" in inspect.signature(TopKRouter.__init__).parameters
    return {"is_mtp_layer": is_mtp_layer} if known else {}


_THRESHOLD_BUFFERS = tuple(f"thresholds.{name}" for name, _ in ThresholdEMA(1).named_buffers())


class ExpertThresholdRouter(TopKRouter):
    """Routes each token to every expert whose threshold its logit reaches (paper eq. 6; routing.py).

    A drop-in for TopKRouter: `forward` (gating, jitter, forced balance) is Megatron's, `routing` is ours, and
    the routing map it returns has any number of experts a token. While training it counts what it routes; the
    thresholds move only at the global-batch boundary (synchronize.py), so that they are constant within a
    step.

    Args:
        config: Megatron's TransformerConfig; `moe_router_topk` is the target mean fan-out.
        pg_collection: process groups, as for TopKRouter.
        is_mtp_layer: whether the router belongs to a multi-token-prediction head.
        et_config: settings; default: `resolve_config(config)`.

    Raises:
        ConfigError: a setting that ET does not run with, saying what to change.
    """

    def __init__(
        self,
        config: Any,
        pg_collection: Any = None,
        is_mtp_layer: bool = False,
        *,
        et_config: ExpertThresholdConfig | None = None,
    ) -> None:
        et_config = resolve_config(config) if et_config is None else bounded(et_config, config)
        if not et_config.active:
            raise ConfigError(
                "ExpertThresholdRouter was built with --moe-router-type topk: choose expert-threshold or "
                "expert-choice, "
                "or use Megatron's TopKRouter"
            )
        compatibility.check(config, et_config)
        super().__init__(config=config, pg_collection=pg_collection, **_mtp_keyword(is_mtp_layer))
        self.is_mtp_layer = is_mtp_layer
        # TopKRouter keeps a copy of the balancing type, taken before `check` could have run elsewhere.
        self.routing_type = config.moe_router_load_balancing_type
        self.et_config = et_config
        # Like Megatron's own router buffers: the weight may still be on the CPU here.
        device = torch.cuda.current_device()
        self.thresholds = ThresholdEMA(self.num_experts, et_config.ema_decay, device=device)
        self.statistics = RouterStatistics(self.num_experts, self.topk, device=device)
        self.last_batch: BatchRecord | None = None
        kernels = load_kernels(et_config, self.num_experts, self.thresholds.value)
        self._route, self._select = kernels.route, kernels.select

    @override
    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Megatron's gate, which cannot reshape the logits of a rank that holds no token at all.

        Args:
            input: [sequence, batch, hidden].

        Returns:
            logits [sequence, batch, experts] fp32.
        """
        if input.numel() > 0:
            return super().gating(input)
        bias = None if self.bias is None else self.bias.float()
        return torch.nn.functional.linear(input.float(), self.weight.float(), bias)

    @override
    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route the logits of one micro-batch.

        Args:
            logits: [sequence, batch, experts] or [tokens, experts] fp32.
            padding_mask: [sequence, batch] bool, True for padding (Megatron's docstrings say the contrary of
                its code).

        Returns:
            gates [tokens, experts] fp32 and routing_map [tokens, experts] bool.
        """
        logits_TE = logits.reshape(-1, self.num_experts)
        padding_mask_T = None if padding_mask is None else padding_mask.reshape(-1)
        logits_TE = self.apply_z_loss(logits_TE, padding_mask=padding_mask_T)
        bounds = self._bounds(logits_TE.detach(), padding_mask_T) if self.training else None
        lower_E, upper_E = bounds if bounds is not None else (None, None)
        settings: dict[str, Any] = {
            "lower": lower_E,
            "upper": upper_E,
            "padding_mask": padding_mask_T,
            "max_fanout": self.et_config.max_fanout,
            "gate_normalization": self.et_config.gate_normalization,
        }
        # With activation recompute the first forward runs without grad: each micro-batch is counted exactly
        # once.
        counted = self.training and torch.is_grad_enabled()
        thresholds_E = self.thresholds.value
        if self._route is None:
            gates_TE, routing_map_TE = expert_threshold(logits_TE, thresholds_E, **settings)
            if counted:
                self.statistics.add(
                    logits_TE.detach(), routing_map_TE, self.thresholds, bounds, padding_mask_T
                )
        else:
            counters = self.statistics.counters(self.thresholds) if counted else None
            gates_TE, routing_map_TE = self._route(logits_TE, thresholds_E, **settings, counters=counters)
        return self._for_dispatch(gates_TE, routing_map_TE)

    def _for_dispatch(
        self, gates_TE: torch.Tensor, routing_map_TE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What Megatron's settings make of the routing after it was counted: the thresholds aim at the load
        that tokens ask for, not at the one that a capacity leaves."""
        # Read anew at each call: Megatron's text generation changes them between prefill and decoding.
        factor = self.config.moe_expert_capacity_factor
        if factor is not None:
            capacity = get_capacity(gates_TE.shape[0] * self.topk, self.num_experts, factor)
            gates_TE, routing_map_TE = drop_over_capacity(
                gates_TE,
                routing_map_TE,
                capacity,
                policy=self.config.moe_token_drop_policy,
                pad=self.config.moe_pad_expert_input_to_capacity,
            )
        if self.config.moe_router_padding_for_quantization:
            # The dispatcher writes its padding into the map, and autograd holds the one that made the gates.
            routing_map_TE = routing_map_TE.clone()
        return gates_TE, routing_map_TE

    def _bounds(
        self, logits_TE: torch.Tensor, padding_mask_T: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        et = self.et_config
        if settled(et, self.thresholds.updates_on_host()):
            constant = final_capacity(et)
            return None if constant is None else self._bounds_at(constant, logits_TE, padding_mask_T)
        # On the device: a graph captured now is still replayed when the capacity has changed or gone, and no
        # bounds are infinite ones.
        factor, in_force = capacity(et, self.thresholds.num_updates)
        lower_E, upper_E = self._bounds_at(factor, logits_TE, padding_mask_T)
        return lower_E.where(in_force, -torch.inf), upper_E.where(in_force, torch.inf)

    def _bounds_at(
        self,
        factor: float | torch.Tensor,
        logits_TE: torch.Tensor,
        padding_mask_T: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.et_config.pool == "global":
            return self._global_bounds(logits_TE, factor, padding_mask_T)
        k = self._expected_load(logits_TE, padding_mask_T)
        return capacity_bounds(logits_TE, k, factor, padding_mask_T=padding_mask_T, select=self._select)

    def _expected_load(self, logits_TE: torch.Tensor, padding_mask_T: torch.Tensor | None) -> Count:
        num_tokens = logits_TE.shape[0] if padding_mask_T is None else (~padding_mask_T).sum()
        return expected_load(num_tokens, self.topk, self.num_experts)

    def _global_bounds(
        self,
        logits_TE: torch.Tensor,
        factor: float | torch.Tensor,
        padding_mask_T: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def loads(num_tokens: torch.Tensor) -> list[torch.Tensor]:
            k = expected_load(num_tokens, self.topk, self.num_experts)
            if not isinstance(factor, torch.Tensor) and factor == 0.0:
                return [torch.as_tensor(k)]
            return [torch.as_tensor(load).reshape(()) for load in capacity_loads(k, factor)]

        cutoffs = kth_largest_of_parts(logits_TE, loads, self._add_up, padding_mask_T=padding_mask_T)
        return cutoffs[-1], cutoffs[0]

    def _add_up(self, counts: torch.Tensor) -> None:
        group = self.tp_dp_cp_group
        if group is not None and group.size() > 1:
            torch.distributed.all_reduce(counts, group=group)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Routers with equal kinds are reduced together: their statistics have one layout and one rule."""
        et = self.et_config
        return self.num_experts, self.topk, et.guard, et.ema_decay

    @property
    def name(self) -> str:
        """How messages call this router: 'layer 3' or 'MTP layer 1'."""
        return f"{'MTP layer' if self.is_mtp_layer else 'layer'} {self.layer_number}"

    def state_keys(self, prefix: str) -> list[str]:
        """Names of this class's own entries in a state dict."""
        return [prefix + name for name in _THRESHOLD_BUFFERS]

    @override
    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Megatron's sharded state dict; without our entries while a checkpoint that has none is being
        loaded."""
        state = super().sharded_state_dict(prefix, *args, **kwargs)
        if LoadingWithoutThresholds.active:
            for key in self.state_keys(prefix):
                state.pop(key, None)
        return state

    @override
    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Of checkpoints from before it was one with `thresholds.num_updates`.
        state_dict.pop(prefix + "committed_batches", None)
        if LoadingWithoutThresholds.active:
            # Fresh thresholds are this router's own, as built: putting them in keeps a strict load strict for
            # all else.
            own = self.state_dict(prefix=prefix)
            state_dict.update({key: own[key].detach().clone() for key in self.state_keys(prefix)})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class LoadingWithoutThresholds:
    """Context in which routers load a checkpoint that holds no thresholds (top-k) and keep their own, fresh
    ones."""

    active = False

    def __enter__(self) -> None:
        LoadingWithoutThresholds.active = True

    def __exit__(self, *_: object) -> None:
        LoadingWithoutThresholds.active = False
