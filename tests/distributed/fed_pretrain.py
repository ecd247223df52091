"""Pretraining whose routers are fed one fixed stream of logits, whatever the layout (test_layouts.py).

A matrix product may round differently for another number of rows, so layouts can be compared to the bit only
if every token of the global batch has the same logits in all of them: they are drawn by (global batch, layer,
sample, position). The gate's own product is added with weight zero, so that its gradient path stays. The
stream drifts; with FED_JUMP=N it stands still, but at batch N every expert's logits shift.

Dimension letters: G samples of a global batch, S positions, E experts.
"""

import functools
import os
from collections import Counter

import torch


@functools.lru_cache(maxsize=64)
def stream(batch: int, layer: int, samples: int, positions: int, experts: int) -> torch.Tensor:
    """Logits [G, S, E] of a whole global batch in one layer; offset per expert."""
    generator = torch.Generator().manual_seed(1000 * batch + layer)
    logits_GSE = torch.randn(samples, positions, experts, generator=generator)
    logits_GSE += torch.arange(experts) - layer
    jump = os.environ.get("FED_JUMP")
    if jump is None:
        return logits_GSE * (1.0 + 0.1 * batch) + 0.2 * batch
    shift_E = torch.randn(experts, generator=torch.Generator().manual_seed(layer)) * 3.0
    return logits_GSE + shift_E * (batch >= int(jump))


if __name__ == "__main__":  # the guard that spawned checkpoint writers need
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training import get_args

    from megatron_et.moe.router import ExpertThresholdRouter
    from megatron_et.run.gpt import pretrain_gpt

    original = ExpertThresholdRouter.gating
    calls: Counter[tuple[ExpertThresholdRouter, bool]] = Counter()

    def gating(self: ExpertThresholdRouter, input: torch.Tensor) -> torch.Tensor:
        logits = original(self, input)
        if not self.training:
            return logits
        # Every schedule runs the micro-batches of a chunk in order; recomputation is a second series, with
        # grad.
        series = (self, torch.is_grad_enabled())
        micro_batch = calls[series] % get_num_microbatches()
        calls[series] += 1
        args = get_args()
        data_parallel = parallel_state.get_data_parallel_world_size()
        rank = parallel_state.get_data_parallel_rank()
        first = (micro_batch * data_parallel + rank) * args.micro_batch_size
        positions, samples, _ = input.shape
        assert samples == args.micro_batch_size
        start = parallel_state.get_tensor_model_parallel_rank() * positions if args.sequence_parallel else 0
        whole = stream(
            self.thresholds.updates_on_host(),
            self.layer_number,
            get_num_microbatches() * data_parallel * args.micro_batch_size,
            args.seq_length,
            self.num_experts,
        )
        own = whole[first : first + samples, start : start + positions].transpose(0, 1)
        return own + 0.0 * logits

    ExpertThresholdRouter.gating = gating  # type: ignore[method-assign]
    pretrain_gpt()
