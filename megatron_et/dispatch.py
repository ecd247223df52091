"""Token dispatchers that allow any number of experts per token.

Megatron's allgather dispatcher already does; its alltoall dispatcher sizes the send buffer as tokens * topk.
"""

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher


class VariableFanoutAlltoAllTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's alltoall dispatcher with the send buffer sized by the routing map.

    The number of rows to send is known on the device only. Megatron copies the split sizes to the host
    anyway; the one copy and its synchronisation move before the permutation, and none is added.
    """

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """As Megatron's, for a routing map [tokens, experts] with any number of ones in a row.

        Returns:
            tokens per local expert [local experts].
        """
        tokens_per_local_expert = super().preprocess(routing_map)
        self.num_out_tokens = routing_map.sum()
        self._maybe_update_cuda_sync_point("before_permutation_1")
        return tokens_per_local_expert
