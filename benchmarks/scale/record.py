"""Pretraining that also writes down how many tokens each sequence sends to each expert.

    SCALE_RECORD=FOLDER torchrun ... benchmarks/scale/record.py MEGATRON_ARGS...

Runs `megatron_et.pretrain_gpt` with any router, Megatron's own top-k included. Only training passes are
recorded, each once; activation recompute is not expected. Every rank writes FOLDER/rank<R>.npz.

Dimension letters: N micro-batches, L MoE layers, B sequences of a micro-batch, E experts.
"""

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = "SCALE_RECORD"


def main() -> None:
    """Train and write."""
    from megatron_et.run.launch import prepare_process

    prepare_process()
    # Only now: the CPU backend must come before Megatron.
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_et.run.gpt import pretrain_gpt

    loads: dict[int, list[np.ndarray]] = defaultdict(list)
    squares: dict[int, list[np.ndarray]] = defaultdict(list)
    forward = TopKRouter.forward

    def recorded(self: Any, input: Any, *rest: Any, **kw: Any) -> Any:
        gates, routing_map = forward(self, input, *rest, **kw)
        if self.training:
            sequence, batch = input.shape[:2]
            map_SBE = routing_map.view(sequence, batch, -1)
            loads[self.layer_number].append(map_SBE.sum(dim=0).int().numpy())
            squares[self.layer_number].append(map_SBE.sum(dim=2).square().sum(dim=0).int().numpy())
        return gates, routing_map

    TopKRouter.forward = recorded
    pretrain_gpt()
    layers = sorted(loads)
    folder = Path(os.environ[FOLDER])
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        folder / f"rank{os.environ['RANK']}.npz",
        loads_NLBE=np.stack([np.stack(loads[layer]) for layer in layers], axis=1),
        fanout_squares_NLB=np.stack([np.stack(squares[layer]) for layer in layers], axis=1),
    )


if __name__ == "__main__":  # the guard that spawned checkpoint writers need
    main()
