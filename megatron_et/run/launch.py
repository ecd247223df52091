"""Starting a training process: CPU backend if asked for, then our seams, then the script."""

import importlib.util
import sys

from megatron_et.rank_zero import say
from megatron_et.run import cpu

_QUESTIONS = {"-h", "--help"}

_prepared = False


def prepare_process() -> None:
    """Make this process ready for a Megatron script: the CPU backend if MEGATRON_ET_CPU asks for it, then
    install().

    Call it before anything imports Megatron, and in a script of your own below `if __name__ == "__main__":`,
    because checkpoint writers import the script again. On the CPU backend the Megatron flags that a CPU run
    needs are put in front of the user's, who can still override them. Idempotent: a patched script
    (patches/) may be run through the launcher, too.
    """
    global _prepared
    if _prepared:
        return
    _require_megatron()
    try:
        on_cpu = cpu.requested()
    except ValueError as error:
        sys.exit(f"megatron_et: {error}")
    if on_cpu:
        cpu.install()
        if not _QUESTIONS & set(sys.argv[1:]):
            sys.argv[1:1] = cpu.CPU_ARGS
            say(f"CPU run: Megatron flags added: {' '.join(cpu.CPU_ARGS)}")
    else:
        _require_gpu()
    from megatron_et import install

    install()
    _prepared = True


def _require_megatron() -> None:
    try:
        found = importlib.util.find_spec("megatron.core") is not None
    except ModuleNotFoundError:  # no `megatron` either
        found = False
    if not found:
        sys.exit(
            f"megatron_et: megatron.core is not installed for {sys.executable} and not beside the script. "
            "pip install megatron-core, or run the script of a Megatron-LM checkout (or put its folder on "
            "PYTHONPATH)."
        )


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available() and not _QUESTIONS & set(sys.argv[1:]):
        sys.exit(
            "megatron_et: no GPU is visible to this process. Check the driver and CUDA_VISIBLE_DEVICES; for "
            "a development run "
            "on CPU set MEGATRON_ET_CPU=1."
        )
