"""Messages that appear once per job."""

import os


def is_rank_zero() -> bool:
    """Whether this process is the job's first (RANK as torchrun and srun set it; also before
    torch.distributed is up)."""
    return int(os.environ.get("RANK", "0")) == 0


def say(message: str) -> None:
    """Print one line on rank 0."""
    if is_rank_zero():
        print(f"[megatron_et] {message}", flush=True)
