"""What the router keeps and what it needs meanwhile, in bytes per pair of a token and an expert.

Dimension letters: T tokens, E experts.
"""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_et.rule.quantile import Histogram
from megatron_et.rule.routing import expert_threshold

TOKENS, EXPERTS = 512, 64
SETTINGS: dict[str, dict[str, Any]] = {
    "threshold": {},
    "fanout-normalised": {"gate_normalization": "fanout"},
    "bounded-fanout": {"max_fanout": 3},
    "capacity-and-padding": {
        "lower": torch.full((EXPERTS,), -0.1),
        "upper": torch.full((EXPERTS,), 0.1),
        "padding_mask": torch.arange(TOKENS) % 5 == 0,
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_at_most_five_bytes_of_activations(settings: dict[str, Any]) -> None:
    """Beside the logits autograd keeps the gates (4) and the map (1), which the dispatcher keeps anyway."""
    logits = torch.randn(TOKENS, EXPERTS, requires_grad=True) * 1.0
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() != logits.untyped_storage().data_ptr():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        expert_threshold(logits, torch.zeros(EXPERTS), **settings)
    per_token = 8  # the divisor of the normalisation
    assert 4 * TOKENS * EXPERTS <= sum(kept.values()) <= 5 * TOKENS * EXPERTS + per_token * TOKENS


class _Largest(TorchDispatchMode):
    """The size of the largest tensor that is made, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


def test_the_histogram_is_counted_without_anything_larger_than_the_logits() -> None:
    """Nothing of size T * E * bins, and no int64 per pair either."""
    histogram = Histogram(EXPERTS)
    with _Largest() as made:
        histogram.add(torch.randn(16 * TOKENS, EXPERTS))
    assert made.bytes == 4 * 16 * TOKENS * EXPERTS
