"""Record the logits of one trained router on real text: the workload `natural`.

    torchrun ... benchmarks/suite/capture.py --logits LOGITS.npz --layer 3 --batches 8 <flags of the
    training run>

The flags are those of the run whose checkpoint is loaded (`--load DIR`), with a `--train-iters` beyond it.
The first micro-batches that rank 0 trains on are recorded, then the process ends: nothing is saved.

Dimension letters: N recorded tokens, E experts.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

# Run as a script, whose own folder is on the path and the repository not.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


class Recorder:
    """Takes the logits of one layer until it has enough of them, then writes them and ends the run."""

    def __init__(self, path: Path, layer: int, batches: int) -> None:
        self._path, self._layer, self._batches = path, layer, batches
        self._taken: list[np.ndarray] = []

    def take(self, layer: int, logits: torch.Tensor) -> None:
        """Called for every forward pass of a router in training.

        Raises:
            SystemExit: there are enough.
        """
        if layer != self._layer:
            return
        self._taken.append(logits.detach().float().reshape(-1, logits.shape[-1]).cpu().numpy())
        if len(self._taken) == self._batches:
            logits_NE = np.concatenate(self._taken)
            if torch.distributed.get_rank() == 0:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                np.savez_compressed(self._path, logits=logits_NE)
                print(f"{self._path}: {len(logits_NE):,} tokens, {logits_NE.shape[1]} experts", flush=True)
            raise SystemExit(0)


def main() -> None:
    """Train until enough is recorded."""
    from megatron_et import cpu

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], add_help=False)
    parser.add_argument("--logits", type=Path, required=True)
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--batches", type=int, default=8)
    own, megatron = parser.parse_known_args()
    sys.argv[1:] = megatron
    if cpu.requested():
        cpu.install()
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_et.gpt import pretrain_gpt

    recorder = Recorder(own.logits, own.layer, own.batches)
    gating = TopKRouter.gating

    def recorded(self: TopKRouter, input: torch.Tensor) -> torch.Tensor:
        logits = gating(self, input)
        if self.training and torch.is_grad_enabled():
            recorder.take(self.layer_number, logits)
        return logits

    TopKRouter.gating = recorded
    pretrain_gpt()


if __name__ == "__main__":
    main()
