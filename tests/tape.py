"""A CUDA graph for tests without a GPU: it runs the same operations on the same memory again, and nothing of
Python between them.

What a graph cannot hold fails while recording: reading a value on the host, an operation whose output has a
size that depends on values, and a number that the host sends to the device. A tensor that was replaced after
recording is not seen by a replay, as in a graph.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "unique_dim",
    "_unique2", "unique_consecutive", "repeat_interleave", "allclose",
}  # fmt: skip


class Tape(TorchDispatchMode):
    """Records the operations that run inside `with`; `replay` runs them again."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run and keep one operation."""
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in tree_leaves(args[1])
        )
        if name in _WAITS or by_mask:
            raise AssertionError(f"{func} waits for the device: a CUDA graph cannot hold it")
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    @property
    def names(self) -> set[str]:
        """Names of the recorded operations."""
        return {func.overloadpacket.__name__ for func, *_ in self.operations}

    @torch.no_grad()
    def replay(self) -> None:
        """Run again, each result into the memory that it had when it was recorded."""
        for func, args, kwargs, out in self.operations:
            aliases = [result.alias_info for result in func._schema.returns]
            writes = any(alias is not None and alias.is_write for alias in aliases)
            if any(aliases) and not writes:
                continue  # a view: the memory is its base's
            new = func(*args, **kwargs)
            if not writes:
                for kept, result in zip(tree_leaves(out), tree_leaves(new), strict=True):
                    kept.copy_(result)

    def outside_memory(self) -> set[int]:
        """Addresses of all memory that the recorded operations read or write and did not make."""
        made: set[int] = set()
        used: set[int] = set()
        for func, args, kwargs, out in self.operations:
            used |= _addresses((args, kwargs))
            if not any(result.alias_info for result in func._schema.returns):
                made |= _addresses(out)
        return used - made


def _addresses(values: Any) -> set[int]:
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors} - {0}


@contextmanager
def _no_numbers_from_the_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(value: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert isinstance(value, torch.Tensor), f"{value} goes from the host to the device"
        return torch.Tensor.to(value, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "as_tensor", refuse)
        patch.setattr(torch, "tensor", refuse)
        yield


def record[Result](function: Callable[[], Result], monkeypatch: pytest.MonkeyPatch) -> tuple[Tape, Result]:
    """Run a function once and keep what it did.

    Returns:
        the tape, and the function's result, which every replay fills anew.
    """
    tape = Tape()
    with _no_numbers_from_the_host(monkeypatch), tape:
        result = function()
    return tape, result
