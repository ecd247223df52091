"""Collectives of the CPU backend against plain references, on two processes (test_cpu_backend.py runs it)."""

import torch
import torch.distributed as dist

from megatron_et.run import cpu


def gathered(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The reference: every rank's tensor, by way of pickles."""
    everyone = [torch.empty(0)] * dist.get_world_size()
    dist.all_gather_object(everyone, tensor)
    return everyone


def rows(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Small integers, exact in every dtype, different on every rank."""
    return (torch.arange(count * 3).view(count, 3) + 20 * dist.get_rank()).to(dtype)


def check(dtype: torch.dtype, sizes: list[int]) -> None:
    """Uneven parts: `sizes[r]` rows belong to rank r; zero is a size like any other."""
    rank = dist.get_rank()

    own = rows(sizes[rank], dtype)
    output = torch.empty(sum(sizes), 3, dtype=dtype)
    dist.all_gather(list(output.split(sizes)), own)
    assert torch.equal(output, torch.cat(gathered(own)))

    full = rows(sum(sizes), dtype)
    reduced = torch.empty(sizes[rank], 3, dtype=dtype)
    dist.reduce_scatter(reduced, list(full.split(sizes)))
    assert torch.equal(reduced, sum(gathered(full)).split(sizes)[rank])

    # Rank r sends sizes[0] rows to rank 0 and sizes[1] to rank 1; it receives sizes[r] from each.
    received = torch.empty(2 * sizes[rank], 3, dtype=dtype)
    dist.all_to_all_single(received, full, torch.tensor([sizes[rank]] * 2), torch.tensor(sizes))
    assert torch.equal(received, torch.cat([theirs.split(sizes)[rank] for theirs in gathered(full)]))


if __name__ == "__main__":
    cpu.install()
    dist.init_process_group("gloo")

    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        for sizes in ([2, 3], [0, 4], [3, 3]):
            check(dtype, sizes)

    routing_map = rows(4, torch.float32) % 2 == 0
    for gather in (dist.all_gather_into_tensor, dist._all_gather_base):
        output = torch.empty(8, 3, dtype=torch.bool)
        gather(output, routing_map)
        assert torch.equal(output, torch.cat(gathered(routing_map)))

    dist.destroy_process_group()
