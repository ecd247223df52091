"""The global-batch boundary: one reduction of the statistics of all layers, candidate thresholds, then commit
or discard.

    start_reduction(routers)  ->  finish_reduction(pending)  ->  commit(routers)  or  discard(routers)
                              or  abandon_reduction(pending)  ->  discard(routers)

The integer counts of all routers of this rank travel in one all-reduce over the `tp_dp_cp` group: EP lies
inside DP, pipeline stages hold other layers, and under sequence parallelism every rank of the group holds
other tokens. Every rank computes the candidate from the same reduced numbers, so thresholds are bitwise equal
on all replicas.

Dimension letters: L routers of this rank (of one kind), E experts, N numbers of one router.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megatron_et.errors import NonFiniteLogitsError
from megatron_et.moe.router import ExpertThresholdRouter
from megatron_et.rank_zero import say
from megatron_et.rule import threshold
from megatron_et.rule.schedule import settled
from megatron_et.rule.statistics import BatchCounts, BatchRecord


@dataclass(frozen=True)
class PendingReduction:
    """A reduction in flight."""

    routers: Sequence[ExpertThresholdRouter]
    integers: torch.Tensor
    handle: "torch.distributed.Work | None"

    def wait(self) -> None:
        """Until it is done. On a GPU the current stream waits, not the host."""
        if self.handle is not None:
            self.handle.wait()


def routers_of(model_chunks: Iterable[torch.nn.Module] | torch.nn.Module) -> list[ExpertThresholdRouter]:
    """All Expert Threshold routers of a model (or of its pipeline chunks), each once, in module order."""
    chunks = [model_chunks] if isinstance(model_chunks, torch.nn.Module) else model_chunks
    found = (m for chunk in chunks for m in chunk.modules() if isinstance(m, ExpertThresholdRouter))
    return list(dict.fromkeys(found))


@torch.no_grad()
def start_reduction(routers: Sequence[ExpertThresholdRouter]) -> PendingReduction | None:
    """Send the batch's statistics on their way and zero the accumulators; None when there is no router on
    this rank.

    Asynchronous, so that it runs beside Megatron's gradient reduction and the optimizer step.
    """
    if not routers:
        return None
    parts = [part for router in routers for part in router.statistics.integer_parts]
    integers = torch.cat(parts)
    torch._foreach_zero_(parts)
    group = routers[0].tp_dp_cp_group
    handle = None
    if group is not None and torch.distributed.is_initialized() and group.size() > 1:
        handle = torch.distributed.all_reduce(integers, group=group, async_op=True)
    return PendingReduction(routers, integers, handle)


@torch.no_grad()
def finish_reduction(pending: PendingReduction | None) -> None:
    """Wait for the reduction and give every router its candidate thresholds. Nothing is used before
    `commit`."""
    if pending is None:
        return
    pending.wait()
    to_host, first = [], 0
    for routers in _by_kind(pending.routers):
        size = routers[0].statistics.size()
        after = first + len(routers) * size
        to_host.append(_propose(routers, pending.integers[first:after].view(len(routers), size)))
        first = after
    _ON_HOST.send(pending.routers, torch.cat(to_host))


def abandon_reduction(pending: PendingReduction | None) -> None:
    """Wait for the reduction and leave it at that: its forward-backward does not count."""
    if pending is not None:
        pending.wait()


def _by_kind(routers: Sequence[ExpertThresholdRouter]) -> list[list[ExpertThresholdRouter]]:
    """Neighbours of one kind together: the boundary costs as many operations for all of them as for one."""
    return [list(alike) for _, alike in itertools.groupby(routers, key=lambda router: router.kind)]


def _propose(routers: Sequence[ExpertThresholdRouter], integers_LN: torch.Tensor) -> torch.Tensor:
    """Candidates and records of routers of one kind from their reduced statistics.

    Returns:
        what the host has to know of each, [L, 2] int64: non-finite logits, updates once committed.
    """
    emas = [router.thresholds for router in routers]
    now = threshold.stacked(emas)
    counts, cutoffs_LE, valid_L1, band = routers[0].statistics.reduced(
        integers_LN, now["last_cutoff"], routers[0].et_config.guard
    )
    updates_L1 = threshold.propose_all(emas, now, cutoffs_LE, valid=valid_L1, band=band)
    routed_by_LE = now["value"].where(now["num_updates"] > 0, torch.nan)
    known_LE = cutoffs_LE.where(valid_L1, torch.nan)
    restarted_L1 = threshold.recently_restarted(now)
    for layer, router in enumerate(routers):
        router.last_batch = BatchRecord(
            counts=BatchCounts(*(part[layer] for part in vars(counts).values())),
            thresholds_E=routed_by_LE[layer],
            cutoffs_E=known_LE[layer],
            num_updates=now["num_updates"][layer],
            restarted=restarted_L1[layer],
        )
    return torch.cat([counts.nonfinite_E.sum(dim=1, keepdim=True), updates_L1], dim=1)


def commit(routers: Sequence[ExpertThresholdRouter]) -> None:
    """Take over the candidates: the step counted.

    Raises:
        NonFiniteLogitsError: a router saw NaN or infinite logits in this batch, on any rank of its group.
    """
    if not routers:
        return
    updates = _ON_HOST.check()
    threshold.commit_all([router.thresholds for router in routers])
    for router, num_updates in updates:
        _say_if_routed_by_another(router, num_updates)
        router.thresholds.saw(num_updates)


def _say_if_routed_by_another(router: ExpertThresholdRouter, num_updates: int) -> None:
    """One batch is routed without the warm-up when it was put back where the host could not see it."""
    taken_for, et = router.thresholds.seen, router.et_config
    if settled(et, taken_for) and not settled(et, num_updates - 1):
        say(
            f"{router.name}: its thresholds were put back from {taken_for} to {num_updates - 1} updates by a "
            "write that torch does not count (a broadcast, .data), and one global batch was routed without "
            "the warm-up. Load with copy_ or load_state_dict."
        )


def discard(routers: Sequence[ExpertThresholdRouter]) -> None:
    """Drop candidates, records and accumulators: the step was skipped, rerun or aborted and leaves no
    trace."""
    for router in routers:
        router.thresholds.discard()
        router.last_batch = None
        router.statistics.reset()


@contextmanager
def uncounted(routers: Sequence[ExpertThresholdRouter]) -> Iterator[None]:
    """Forward passes inside leave no trace in the statistics of the global batch, as those that only warm up
    a CUDA graph."""
    accumulators = [tensor for router in routers for tensor in router.statistics.integer_parts]
    before = [tensor.clone() for tensor in accumulators]
    try:
        yield
    finally:
        for tensor, value in zip(accumulators, before, strict=True):
            tensor.copy_(value)


def finalize_thresholds(
    model_chunks: Iterable[torch.nn.Module] | torch.nn.Module, *, skipped: bool = False
) -> None:
    """End a global batch in a training loop without megatron.training: reduce, then commit or discard.

    Call it on every rank once per optimizer step, after the last backward pass.

    Args:
        model_chunks: the model, or the list of its pipeline chunks on this rank.
        skipped: the optimizer step did not count (overflow); thresholds stay as they are.

    Raises:
        NonFiniteLogitsError: see `commit`.
    """
    routers = routers_of(model_chunks)
    if skipped:
        discard(routers)
        return
    finish_reduction(start_reduction(routers))
    commit(routers)


def raise_if_nonfinite_locally(routers: Sequence[ExpertThresholdRouter]) -> None:
    """Name the first layer of this rank whose logits were NaN or infinite in the batch in flight.

    For use when a training step has already failed (it waits for the device): Megatron's own message says
    only that the loss is NaN.
    """
    for router in routers:
        counts = BatchCounts.split(router.statistics.counts, router.num_experts)
        _raise_if_nonfinite(router, int(counts.nonfinite_E.sum()))


def _raise_if_nonfinite(router: ExpertThresholdRouter, nonfinite: int) -> None:
    if nonfinite:
        raise NonFiniteLogitsError(
            f"{nonfinite} router logits of {router.name} were NaN or infinite in global batch "
            f"{int(router.thresholds.num_updates) + 1}; thresholds were left as they are. Look for the first "
            "layer with "
            "non-finite activations (--check-for-nan-in-loss-and-grad is Megatron's own check), lower the "
            "learning rate, or "
            "resume from the last checkpoint."
        )


class _OnHost:
    """Brings a few numbers of each router to the host without a synchronisation of its own.

    The copy starts when they are known; it is read at commit, after the optimizer step, where Megatron has
    already waited for the device.
    """

    def __init__(self) -> None:
        self._routers: Sequence[ExpertThresholdRouter] = ()
        self._host: torch.Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def send(self, routers: Sequence[ExpertThresholdRouter], numbers_L2: torch.Tensor) -> None:
        self._routers = routers
        if numbers_L2.is_cuda:
            self._host = torch.empty(numbers_L2.shape, dtype=numbers_L2.dtype, pin_memory=True)
            self._host.copy_(numbers_L2, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._host, self._arrived = numbers_L2, None

    def check(self) -> list[tuple[ExpertThresholdRouter, int]]:
        """Routers with their updates once committed. Raises NonFiniteLogitsError."""
        if self._host is None:
            return []
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers, self._host = self._host.tolist(), None
        for router, (nonfinite, _) in zip(self._routers, numbers, strict=True):
            _raise_if_nonfinite(router, nonfinite)
        return [(router, updates) for router, (_, updates) in zip(self._routers, numbers, strict=True)]


_ON_HOST = _OnHost()
