"""Seam: TECudaGraphHelper.create_cudagraphs, which runs every captured part of a layer several times, with
gradients, before it captures it.

Megatron undoes what these passes add to its own accumulators (reset_model_temporary_tensors, which also runs
in every step and so is no place for ours).
"""

from collections.abc import Callable
from typing import Any

from megatron_et.host import seam
from megatron_et.moe.synchronize import routers_of, uncounted


def install() -> None:
    """Bind the seam."""
    seam.wrap(
        "megatron.core.transformer.cuda_graphs", "TECudaGraphHelper.create_cudagraphs", _create_cudagraphs
    )


def _create_cudagraphs(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_cudagraphs(self: Any, *args: Any, **kwargs: Any) -> Any:
        with uncounted(routers_of(self.model)):
            return original(self, *args, **kwargs)

    return create_cudagraphs
