"""Level `memory`: bytes that a MoE layer keeps for its backward pass, and on a GPU its peak.

Kept bytes are those of every storage that autograd saves in the layer's forward pass, the layer's weights and
its input left out: the same number on every device, so it is measured on CPU too.

Dimension letters: T tokens of a rank.
"""

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.suite.layer_level import Case, Pass
from benchmarks.suite.methods import METHODS
from benchmarks.suite.results import Row, row
from benchmarks.suite.router_level import fanout_note
from benchmarks.suite.workloads import Stream

MIB = 2**20


def kept_bytes(one: Pass) -> int:
    """Of one forward pass, weights and input left out."""
    own = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*one.fed.layer.parameters(), one.hidden, one.fed.logits())
    }
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output, _ = one.fed.layer(one.hidden)
    size = sum(storage.nbytes() for storage in kept.values())
    # Gone through backwards, else router and dispatcher keep the graph and all of this for good.
    kept.clear()
    output.sum().backward()
    return size


def peak_bytes(one: Pass) -> int:
    """Above what was in use before, of a forward and a backward pass on a GPU."""
    one.run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    one.run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(
    case: Case, stream: Stream, methods: Sequence[str], device: str, environment: str, *, steps: int = 16
) -> list[Row]:
    """Every method's bytes over some steps of the stream, the worst rank of each; and those of the worst
    step, which is what memory must be there for."""
    rows = []
    for name in methods:
        missing = METHODS[name].missing(device)
        if missing:
            rows.append(row("memory", str(case), name, "kept", environment, note=f"not run: {missing}"))
            continue
        one = Pass(METHODS[name], case, stream, device)
        quantities: dict[str, list[float]] = {"kept": []} | ({"peak": []} if device == "cuda" else {})
        for _ in range(steps):
            taken: dict[str, Any] = {"kept": kept_bytes(one)}
            one.fed.note_load()
            if device == "cuda":
                taken["peak"] = peak_bytes(one)
            one.fed.end_batch()
            for quantity, size in taken.items():
                worst = torch.tensor(float(size), device=one.hidden.device)
                torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX)
                quantities[quantity].append(worst.item() / MIB)
        fanout, load = one.fed.fanout_and_load()
        worst_steps = {f"worst {quantity}": [max(values)] for quantity, values in quantities.items()}
        for quantity, values in (quantities | worst_steps).items():
            rows.append(
                row(
                    "memory", str(case), name, quantity, environment, unit="MiB", values=values,
                    fanout=fanout, max_load=load, note=fanout_note(fanout, case.topk),
                )
            )  # fmt: skip
    return rows
