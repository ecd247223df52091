"""Record the logits of one trained router on real text: the workload `natural`.

    torchrun ... benchmarks/suite/capture.py --logits LOGITS.npz --layer 3 --after 400 <training flags>

The flags are those of a training run; with `--load DIR` it goes on from a checkpoint. The micro-batches that
rank 0 trains on after the first `--after` are recorded, then the process ends: nothing is saved.

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

    def __init__(self, path: Path, layer: int, after: int, batches: int) -> None:
        self._path, self._layer, self._after, self._batches = path, layer, after, batches
        self._passed = 0
        self._taken: list[np.ndarray] = []

    def take(self, layer: int, topk: int, logits: torch.Tensor) -> None:
        """Called for every forward pass of a router in training.

        Raises:
            SystemExit: there are enough.
        """
        if layer != self._layer:
            return
        self._passed += 1
        if self._passed <= self._after:
            return
        self._taken.append(logits.detach().float().reshape(-1, logits.shape[-1]).cpu().numpy())
        if len(self._taken) == self._batches:
            logits_NE = np.concatenate(self._taken)
            if torch.distributed.get_rank() == 0:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                np.savez_compressed(self._path, logits=logits_NE, topk=topk)
                print(f"{self._path}: {len(logits_NE):,} tokens, {logits_NE.shape[1]} experts", flush=True)
            raise SystemExit(0)


def main() -> None:
    """Train until enough is recorded."""
    from megatron_et.run.launch import prepare_process

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], add_help=False)
    parser.add_argument("--logits", type=Path, required=True)
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--after", type=int, default=0, help="micro-batches of a rank before the recording")
    parser.add_argument("--batches", type=int, default=16, help="micro-batches to record")
    own, megatron = parser.parse_known_args()
    sys.argv[1:] = megatron
    prepare_process()
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_et.run.gpt import pretrain_gpt

    recorder = Recorder(own.logits, own.layer, own.after, own.batches)
    gating = TopKRouter.gating

    def recorded(self: TopKRouter, input: torch.Tensor) -> torch.Tensor:
        logits = gating(self, input)
        if self.training and torch.is_grad_enabled():
            recorder.take(self.layer_number, self.topk, logits)
        return logits

    TopKRouter.gating = recorded
    pretrain_gpt()


if __name__ == "__main__":
    main()
