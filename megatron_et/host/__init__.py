"""Everything that touches Megatron's globals, one seam a file.

| file | seam | what for |
| --- | --- | --- |
| arguments.py | `add_megatron_arguments`, `validate_args` | flags and refusals |
| arguments.py | `load_args_from_checkpoint` | --use-checkpoint-args |
| kernels.py | `setup_model_and_optimizer` | the ranks agree on the kernels that route |
| layer.py | `MoELayer.__init__` | our router in every MoE layer |
| layer.py | `moe_layer.MoEAlltoAllTokenDispatcher`, `...AllGather...` | dispatchers for any fan-out |
| graphs.py | `TECudaGraphHelper.create_cudagraphs` | passes that warm up CUDA graphs are not counted |
| grads.py | `finalize_model_grads` | reduce the batch's statistics beside the gradients |
| step.py | `logical_and_across_model_parallel_group` | wait for the reduction behind the optimizer step |
| step.py | `train_step` | commit or discard once the optimizer step is known to count |
| logging.py | `training_log` | TensorBoard, W&B, console line, trace |
| wheel.py | `compile_helpers` | runs from pip packages alone |
| checkpoint.py | `load_checkpoint`, `_load_base_checkpoint` | top-k checkpoints start a warm-up and say so |
"""

import importlib
import importlib.util

from megatron_et.host import seam
from megatron_et.host.versions import check_version

_installed = False
_failure: Exception | None = None


def install() -> None:
    """Put Expert Threshold routing into Megatron-Core. Idempotent; call it before Megatron parses its
    arguments.

    With `--moe-router-type topk` (the default) Megatron behaves exactly as without this package.

    Raises:
        ImportError: this Megatron lacks a symbol that a seam needs; names it and the versions that have it.
        RuntimeError: an earlier call failed halfway; what it bound cannot be bound again.
    """
    global _installed, _failure
    if _installed:
        return
    if _failure is not None:
        raise RuntimeError(
            f"megatron_et.install() failed before: {_failure}. Start a new process."
        ) from _failure
    try:
        _bind()
    except Exception as error:
        _failure = error
        raise
    _installed = True


def _bind() -> None:
    check_version()
    for name in seams():
        importlib.import_module(f"{__name__}.{name}").install()


def seams() -> list[str]:
    """Modules of this package that bind the Megatron that is installed, in order; those of megatron.training
    where it is there."""
    training = importlib.util.find_spec("megatron.training") is not None
    return [
        "layer",
        "graphs",
        "wheel",
        *(["arguments", "kernels", "checkpoint", "grads", "step", "logging"] if training else []),
    ]


def bound() -> list[str]:
    """Full names of Megatron's symbols that this process has replaced."""
    return list(seam.replaced)
