"""Memory that the blocks of a kernel share while they run: integers, zero before and after every launch."""

import torch

_SCRATCH: dict[tuple[str, int, int], tuple[torch.Tensor, ...]] = {}
"""(whose, device, stream) -> what it has; launches of a stream follow one another."""


def zeros(owner: str, device: torch.device, *sizes: int) -> tuple[torch.Tensor, ...]:
    """Vectors of at least these sizes, int32, for one launch on the current stream; the kernel must leave
    them as zeros."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        # A graph zeroes its own: memory that an eager launch uses may be in use when the graph is replayed.
        return tuple(torch.zeros(size, dtype=torch.int32, device=device) for size in sizes)
    key = (owner, device.index, torch.cuda.current_stream(device).cuda_stream)
    kept = _SCRATCH.get(key, ())
    if not kept or any(vector.numel() < size for vector, size in zip(kept, sizes, strict=True)):
        before = [vector.numel() for vector in kept] or [0] * len(sizes)
        kept = _SCRATCH[key] = tuple(
            torch.zeros(max(both), dtype=torch.int32, device=device)
            for both in zip(sizes, before, strict=True)
        )
    return kept
