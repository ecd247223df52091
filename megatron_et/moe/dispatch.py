"""Token dispatchers that allow any number of experts per token, none included.

Megatron's alltoall dispatcher sizes the send buffer as tokens * topk; its allgather dispatcher does not.
Under `--moe-permute-fusion` both hand Transformer Engine's kernels an empty permutation when no token is
routed, which the kernels refuse (TE >= 2.15): for such a micro-batch these dispatchers take Megatron's
unfused path.
"""

import copy
from typing import Any, override

import torch
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
)


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
