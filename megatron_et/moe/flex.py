"""The flex token dispatcher (DeepEP, HybridEP) for any number of experts per token, none included.

DeepEP takes a token's experts in a fixed number of slots. Megatron fills exactly topk of them with the
largest gates: it loses experts of a token that has more, and sends a token that has fewer to experts that
nobody chose. Here a token has as many slots as it may have experts (fanout.py), holds those that the routing
map names, whatever their gates, and marks the rest empty with -1, as DeepEP's interface has it.

HybridEP takes the boolean map itself, and without a rank capacity factor (refused, compatibility.py) sizes
its buffers by it: Megatron's manager is right as it is. NCCL-EP has no empty slot and is refused.

Dimension letters: T tokens of this rank's micro-batch, E experts, N experts times the ranks that share one
expert by expert tensor parallelism, S slots.
"""

from typing import Any, override

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher, _DeepepManager

from megatron_et.moe.fanout import uses_deepep
from megatron_et.moe.router import resolve_config


class VariableFanoutDeepepManager(_DeepepManager):
    """Megatron's DeepEP manager with the slots filled from the routing map.

    `router_topk` is the number of slots S. Shapes stay static and nothing waits for the device here.
    """

    @override
    def setup_metadata(self, routing_map: torch.Tensor, probs: torch.Tensor) -> None:
        """Set `token_indices` [T, S] int64, -1 in empty slots, and `token_probs` [T, S], 0 there.

        Args:
            routing_map: [T, ranks, local experts] bool, at most S ones a token.
            probs: the gates, of the same shape; the order of a token's slots means nothing.
        """
        map_TN = routing_map.reshape(-1, self.num_experts)
        # -1 off the map: a gate on it may be 0, since a sigmoid underflows, and that expert is still chosen.
        gates_TN = probs.reshape(-1, self.num_experts).masked_fill(~map_TN, -1.0)
        gates_TS, experts_TS = torch.topk(gates_TN, self.router_topk, dim=-1)
        empty_TS = gates_TS < 0.0
        self.token_probs = gates_TS.masked_fill(empty_TS, 0.0)
        self.token_indices = experts_TS.masked_fill(empty_TS, -1)

    @override
    def get_permuted_hidden_states_by_experts(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As Megatron's, unfused when this rank received nothing: Transformer Engine (>= 2.15) refuses to
        permute no rows."""
        # DeepEP has counted on the host already: no wait for the device.
        received = int(self.tokens_per_expert.sum())
        self.permute_fusion = self.config.moe_permute_fusion and received > 0
        return super().get_permuted_hidden_states_by_experts(hidden_states)


class VariableFanoutFlexTokenDispatcher(MoEFlexTokenDispatcher):
    """Megatron's flex dispatcher with our DeepEP manager; its HybridEP manager takes any map as it is."""

    def __init__(self, *args: Any, config: Any, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)
        if uses_deepep(config):
            most = resolve_config(config).max_fanout or config.num_moe_experts
            self._comm_manager = VariableFanoutDeepepManager(
                group=self.tp_ep_group,
                num_local_experts=self.num_local_experts,
                router_topk=self.tp_size * min(most, config.num_moe_experts),
                num_experts=self.tp_size * config.num_moe_experts,
                config=config,
            )
