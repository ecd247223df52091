"""Counts, on the CPU, what would make the host wait for a GPU.

On a GPU torch.cuda.set_sync_debug_mode tells (tests/gpu). Here every way to turn what is in a tensor into
something that Python knows is watched: reading a number, a truth value, a list or an array, copying to the
host, and operations whose result has a size that depends on values. So is a number that is assigned into a
tensor: torch copies it to the device, and waits.
"""

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "is_nonzero", "equal", "item"}
SIZED_BY_VALUES = {
    "nonzero", "masked_select", "unique_dim", "_unique", "_unique2", "unique_consecutive", "bincount",
    "argwhere",
}  # fmt: skip
METHODS = ("tolist", "numpy", "cpu", "__array__", "__bool__", "__int__", "__float__", "__index__")


class HostSyncs(TorchDispatchMode):
    """While it is entered, `found` grows by the place of each."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def note(self, what: str) -> None:
        """Remember who did it: the innermost line outside torch and this file."""
        frames = [
            frame
            for frame in traceback.extract_stack()
            if "/torch/" not in frame.filename and frame.filename != __file__
        ]
        self.found.append(f"{what} at {frames[-1].filename}:{frames[-1].lineno}")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.rpartition("::")[2]
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in READS | SIZED_BY_VALUES or by_mask:
            self.note(name)
        if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            self.note(name)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def host_syncs() -> Iterator[list[str]]:
    """The places of all host synchronisations inside."""
    mode = HostSyncs()
    originals = {name: getattr(torch.Tensor, name) for name in METHODS}
    moved, assigned = torch.Tensor.to, torch.Tensor.__setitem__
    inside = False

    def watched(name: str) -> Any:
        def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:  # tolist and numpy call each other
                return originals[name](self, *args, **kwargs)
            mode.note(name)
            inside = True
            try:
                with torch.utils._python_dispatch._disable_current_modes():
                    return originals[name](self, *args, **kwargs)
            finally:
                inside = False

        return method

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if any(str(place) == "cpu" for place in (*args, kwargs.get("device"))):
            mode.note("to('cpu')")
        return moved(self, *args, **kwargs)

    def setitem(self: torch.Tensor, index: Any, value: Any) -> None:
        if not isinstance(value, torch.Tensor):
            mode.note("__setitem__")
        assigned(self, index, value)

    try:
        for name in METHODS:
            setattr(torch.Tensor, name, watched(name))
        torch.Tensor.to = to  # type: ignore[method-assign,assignment]
        torch.Tensor.__setitem__ = setitem  # type: ignore[method-assign,assignment]
        with mode:
            yield mode.found
    finally:
        for name, original in originals.items():
            setattr(torch.Tensor, name, original)
        torch.Tensor.to = moved  # type: ignore[method-assign]
        torch.Tensor.__setitem__ = assigned  # type: ignore[method-assign]
