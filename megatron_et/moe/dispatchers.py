"""Token dispatchers that allow any number of experts per token, none included. A new one goes here, and into
the table of host/layer.py.

| dispatcher | what Megatron's assumes | what ours does |
| --- | --- | --- |
| alltoall | tokens * topk rows to send | sizes the buffer by the routing map |
| allgather | nothing | |
| flex, DeepEP | exactly topk experts a token | one slot for each expert that the map names, the rest empty |
| flex, HybridEP | nothing: it takes the map | |

DeepEP: a token has as many slots as it may have experts (settings.py); the map fills them, whatever the
gates, and -1 marks an empty one, as DeepEP's interface has it. HybridEP without a rank capacity factor
(refused) sizes its buffers by the map.

NCCL-EP has no empty slot and is refused. Under `--moe-permute-fusion` alltoall and allgather hand Transformer
Engine's kernels an empty permutation when no token is routed, which the kernels refuse (TE >= 2.15): for such
a micro-batch these dispatchers take Megatron's unfused path.

`drop_over_capacity` is Megatron's expert capacity (--moe-expert-capacity-factor) on a map with any number of
experts a token: it bounds, in training and in evaluation, how many of a rank's tokens of a micro-batch an
expert takes, `ceil(tokens * topk / experts * factor)`, by dropping pairs after the thresholds have decided.
So a pair also depends on the other tokens, as it does with Megatron's top-k: thresholds alone are causal.

Dimension letters: T tokens of this rank's micro-batch, E experts, N experts times the ranks that share one
expert by expert tensor parallelism, S slots.
"""

import copy
from typing import Any, Literal, override

import torch
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
    _DeepepManager,
)

from megatron_et.moe.settings import resolve_config, uses_deepep

DropPolicy = Literal["probs", "position"]


def _without_permute_fusion(config: Any) -> Any:
    unfused = copy.copy(config)
    unfused.moe_permute_fusion = False
    return unfused


class VariableFanoutAlltoAllTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's alltoall dispatcher with the send buffer sized by the routing map.

    The number of rows to send is known on the device only. Megatron copies the split sizes to the host
    anyway; the one copy and its synchronisation move before the permutation, and none is added.
    """

    def __init__(self, *args: Any, config: Any, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)
        self._own_config = config

    @override
    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """As Megatron's, for a routing map [tokens, experts] with any number of ones in a row.

        Returns:
            tokens per local expert [local experts].
        """
        self.config = self._own_config
        tokens_per_local_expert = super().preprocess(routing_map)
        if not self.drop_and_pad:  # there every expert has `capacity` rows, and nothing waits for the device
            self.num_out_tokens = routing_map.sum()
            self._maybe_update_cuda_sync_point("before_permutation_1")
        return tokens_per_local_expert

    @override
    def _maybe_dtoh_and_synchronize(
        self, point: str, tokens_per_expert: torch.Tensor | None = None
    ) -> torch.Tensor:
        tokens_per_expert = super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)
        if point == "before_permutation_1" and self.config.moe_permute_fusion and self.num_out_tokens == 0:
            self.config = _without_permute_fusion(self._own_config)
        return tokens_per_expert


class VariableFanoutAllGatherTokenDispatcher(MoEAllGatherTokenDispatcher):
    """Megatron's allgather dispatcher, with an unfused permutation when no gathered token is routed to this
    rank."""

    def __init__(self, *args: Any, config: Any, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)
        self._own_config = config

    @override
    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As Megatron's: permuted tokens, tokens per local expert, permuted gates."""
        self.config = self._own_config
        if self.config.moe_permute_fusion:
            # Megatron waits for the device at this place anyway, for the tokens per expert.
            first, last = self.local_expert_indices[0], self.local_expert_indices[-1]
            if not self.routing_map[:, first : last + 1].any():
                self.config = _without_permute_fusion(self._own_config)
        return super().dispatch_postprocess(hidden_states, probs)


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


def drop_over_capacity(
    gates_TE: torch.Tensor,
    routing_map_TE: torch.Tensor,
    capacity: int,
    *,
    policy: DropPolicy = "probs",
    pad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep at most `capacity` tokens of each expert. Fixed shapes, no host synchronisation.

    Args:
        gates_TE: [tokens, experts], 0 off the map.
        routing_map_TE: [tokens, experts] bool.
        capacity: tokens that an expert takes at most.
        policy: "probs" keeps the largest gates (the first token on ties), "position" the first tokens.
        pad: fill every expert up to `capacity` with tokens that it was not given, first tokens first, at
            gate 0: then all experts have the same load. The map has no more than T ones in a column, so a
            capacity above T is not reached.

    Returns:
        gates [tokens, experts], 0 where dropped or filled; map [tokens, experts] bool.
    """
    with torch.no_grad():
        # The smallest keys are the pairs off the map. A stable sort decides ties the same way on every device
        # and in every recomputation; topk does not promise it.
        scores_TE = gates_TE if policy == "probs" else torch.ones_like(gates_TE)
        key_TE = torch.where(routing_map_TE, scores_TE, -1.0)
        first = key_TE.sort(dim=0, descending=True, stable=True).indices[:capacity]
        kept_TE = torch.zeros_like(routing_map_TE).scatter_(0, first, True)
        if not pad:
            kept_TE &= routing_map_TE
    return torch.where(kept_TE, gates_TE, 0.0), kept_TE
