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
from megatron_et.moe.router import ExpertThresholdRouter, commit_all
from megatron_et.rule import threshold
from megatron_et.rule.statistics import BatchCounts, BatchRecord


@dataclass(frozen=True)
class PendingReduction:
    """A reduction in flight."""

    routers: Sequence[ExpertThresholdRouter]
    integers: torch.Tensor
    reals: torch.Tensor
    handles: Sequence["torch.distributed.Work"]

    def wait(self) -> None:
        """Until it is done. On a GPU the current stream waits, not the host."""
        for handle in self.handles:
            handle.wait()


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
    integers = torch.cat([part for router in routers for part in router.statistics.integer_parts])
    reals = torch.cat([router.statistics.estimator.reals for router in routers])
    # By dtype: a list of several is zeroed one by one.
    torch._foreach_zero_([part for router in routers for part in router.statistics.integer_parts])
    torch._foreach_zero_([router.statistics.estimator.reals for router in routers])
    group = routers[0].tp_dp_cp_group
    handles = []
    if group is not None and torch.distributed.is_initialized() and group.size() > 1:
        handles = [
            torch.distributed.all_reduce(tensor, group=group, async_op=True)
            for tensor in (integers, reals)
            if tensor.numel() > 0
        ]
    return PendingReduction(routers, integers, reals, handles)


@torch.no_grad()
def finish_reduction(pending: PendingReduction | None) -> None:
    """Wait for the reduction and give every router its candidate thresholds. Nothing is used before
    `commit`."""
    if pending is None:
        return
    pending.wait()
    nonfinite, first_integer, first_real = [], 0, 0
    for routers in _by_kind(pending.routers):
        integer_size, real_size = routers[0].statistics.sizes()
        after_integers = first_integer + len(routers) * integer_size
        after_reals = first_real + len(routers) * real_size
        integers_LN = pending.integers[first_integer:after_integers].view(len(routers), integer_size)
        reals_LN = pending.reals[first_real:after_reals].view(len(routers), real_size)
        nonfinite.append(_propose(routers, integers_LN, reals_LN))
        first_integer, first_real = after_integers, after_reals
    _NONFINITE.send(pending.routers, torch.cat(nonfinite))


def abandon_reduction(pending: PendingReduction | None) -> None:
    """Wait for the reduction and leave it at that: its forward-backward does not count."""
    if pending is not None:
        pending.wait()


def _by_kind(routers: Sequence[ExpertThresholdRouter]) -> list[list[ExpertThresholdRouter]]:
    """Neighbours of one kind together: the boundary costs as many operations for all of them as for one."""
    return [list(alike) for _, alike in itertools.groupby(routers, key=lambda router: router.kind)]


def _propose(
    routers: Sequence[ExpertThresholdRouter], integers_LN: torch.Tensor, reals_LN: torch.Tensor
) -> torch.Tensor:
    """Candidates and records of routers of one kind from their reduced statistics; returns the numbers of
    non-finite logits [L]."""
    emas = [router.thresholds for router in routers]
    statistics, et = routers[0].statistics, routers[0].et_config
    now = threshold.stacked(emas)
    centers_LE = now["last_cutoff"]
    counts, cutoffs_LE, valid_L1 = statistics.reduced(integers_LN, reals_LN, centers_LE)
    band = None if et.guard is None else statistics.band(integers_LN, counts.tokens, centers_LE, et.guard)
    threshold.propose_all(emas, now, cutoffs_LE, valid=valid_L1, band=band)
    routed_by_LE = now["value"].where(now["num_updates"] > 0, torch.nan)
    known_LE = cutoffs_LE.where(valid_L1, torch.nan)
    restarted_L1 = threshold.recently_restarted(now)
    for layer, router in enumerate(routers):
        router.last_batch = BatchRecord(
            counts=BatchCounts(*(part[layer] for part in vars(counts).values())),
            thresholds_E=routed_by_LE[layer],
            cutoffs_E=known_LE[layer],
            phase=router.et_config.phase(router.num_committed_batches),
            restarted=restarted_L1[layer],
        )
    return counts.nonfinite.flatten()


def commit(routers: Sequence[ExpertThresholdRouter]) -> None:
    """Take over the candidates: the step counted.

    Raises:
        NonFiniteLogitsError: a router saw NaN or infinite logits in this batch, on any rank of its group.
    """
    if not routers:
        return
    _NONFINITE.check()
    for alike in _by_kind(routers):
        commit_all(alike)


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
    accumulators = [tensor for router in routers for tensor in router.statistics.accumulators]
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
        _raise_if_nonfinite(router, int(counts.nonfinite))


def _raise_if_nonfinite(router: ExpertThresholdRouter, nonfinite: int) -> None:
    if nonfinite:
        raise NonFiniteLogitsError(
            f"{nonfinite} router logits of {router.name} were NaN or infinite in global batch "
            f"{router.num_committed_batches + 1}; thresholds were left as they are. Look for the first "
            "layer with "
            "non-finite activations (--check-for-nan-in-loss-and-grad is Megatron's own check), lower the "
            "learning rate, or "
            "resume from the last checkpoint."
        )


class _NonFiniteCounts:
    """Brings the counts of non-finite logits to the host without a synchronisation of its own.

    The copy starts when the counts are known; it is read at commit, after the optimizer step, where Megatron
    has already waited for the device.
    """

    def __init__(self) -> None:
        self._routers: Sequence[ExpertThresholdRouter] = ()
        self._host: torch.Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def send(self, routers: Sequence[ExpertThresholdRouter], nonfinite_L: torch.Tensor) -> None:
        self._routers = routers
        if nonfinite_L.is_cuda:
            self._host = torch.empty(nonfinite_L.shape, dtype=nonfinite_L.dtype, pin_memory=True)
            self._host.copy_(nonfinite_L, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._host, self._arrived = nonfinite_L, None

    def check(self) -> None:
        if self._host is None:
            return
        if self._arrived is not None:
            self._arrived.synchronize()
        nonfinite, self._host = self._host.flatten().tolist(), None
        for router, count in zip(self._routers, nonfinite, strict=True):
            _raise_if_nonfinite(router, count)


_NONFINITE = _NonFiniteCounts()
