"""What the statistics cost besides their all-reduce: operations and bytes, counted by running the real code.

The tensors are small and on the CPU; bytes are given per histogram count and per token-expert pair, which do
not depend on the size.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_et.check.sizes import RouterBytes, router_bytes
from megatron_et.rule.quantile import Histogram
from megatron_et.rule.routing import expert_threshold

EXPERTS, LAYERS, TOKENS = 64, 4, 512
BINS = Histogram(1).bins


_FRESH = ("new_ones", "new_empty", "new_zeros", "new_full", "zeros_like", "ones_like", "empty_like")


class Traffic(TorchDispatchMode):
    """Counts operations, the bytes that they read and write, and the most memory that their results hold at
    once; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = self.most_held = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if function.is_view or name == "_unsafe_view":
            return result
        self.operations += 1
        written = _tensors(result) or _tensors(args[0])  # _foreach_zero_ returns nothing
        self._hold(written)
        if name in ("index_add_", "gather"):
            # Only what the index names is touched: read and, for index_add_, written.
            index = args[2]
            self.bytes += _size(index) + 2 * index.numel() * args[0].element_size()
        elif name == "searchsorted":
            # A halving reads one number.
            sorted_numbers, values = args
            steps = math.log2(sorted_numbers.shape[-1])
            self.bytes += (steps + 1) * _size(values) + _size(result)
        else:
            read = [] if name in _FRESH else _tensors((args, kwargs))
            self.bytes += sum(map(_size, read)) + sum(map(_size, written))
        return result

    def _hold(self, written: list[torch.Tensor]) -> None:
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        for tensor in written:
            storage = tensor.untyped_storage()
            self._held[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.most_held = max(self.most_held, sum(size for _, size in self._held.values()))


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _size(tensor: torch.Tensor) -> int:
    # An expanded tensor is one element in memory.
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@dataclass(frozen=True)
class Costs:
    """Per unit of work."""

    boundary_operations: int
    """Kernels of a whole boundary, whatever the number of layers."""
    boundary_bytes: float
    """Read and written per histogram count (layers * experts * bins)."""
    boundary_memory: float
    """Most bytes held at once per histogram count, the accumulators with them."""
    pair_bytes: float
    """Read and written by `RouterStatistics.add` for each token and expert."""
    pair_operations: int
    """Kernels of one `RouterStatistics.add`."""
    routing_pair_bytes: float
    """The same for the rule itself, forward: what routes must be paid for anyway."""


def traffic(work: Callable[[], Any]) -> Traffic:
    """Run something under the counter."""
    with Traffic() as counted:
        work()
    return counted


@functools.cache
def measure() -> Costs:
    """Run the boundary and a micro-batch of real routers."""
    with mock.patch.object(torch.cuda, "current_device", return_value="cpu"):
        from megatron_et.moe.synchronize import commit, finish_reduction, start_reduction
        from tests.captured import router

        routers = [router(False, megatron={"num_moe_experts": EXPERTS}) for _ in range(LAYERS)]

    def boundary() -> None:
        finish_reduction(start_reduction(routers))
        commit(routers)

    logits_TE = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0))
    first = routers[0]
    _, routing_map_TE = expert_threshold(logits_TE, first.thresholds.value)
    added = traffic(lambda: first.statistics.add(logits_TE, routing_map_TE, first.thresholds))
    routed = traffic(lambda: expert_threshold(logits_TE, first.thresholds.value))
    boundary()
    ended = traffic(boundary)
    return Costs(
        boundary_operations=ended.operations,
        boundary_bytes=ended.bytes / (LAYERS * EXPERTS * BINS),
        boundary_memory=ended.most_held / (LAYERS * EXPERTS * BINS),
        pair_bytes=added.bytes / logits_TE.numel(),
        pair_operations=added.operations,
        routing_pair_bytes=routed.bytes / logits_TE.numel(),
    )


def sizes(experts: int, topk: int) -> RouterBytes:
    """Bytes of one router, as the classes have them."""
    return router_bytes(experts, topk)
