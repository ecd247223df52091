"""Lets Megatron's own parser and checks, and this package's, judge the flags of an example, on CPU.

    WORLD_SIZE=64 python examples/common/check.py <flags of the training command>

Exit status 1 when something is refused. `MEGATRON=/path/to/Megatron-LM` judges by that checkout. Unlike
`megatron-et check` it does not ask what is installed here: where Transformer Engine or DeepEP is missing, it
is stood in for, so that a command for a GPU container can be judged on a laptop or in CI.
"""

import contextlib
import importlib
import importlib.machinery
import io
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path

# Run as a script: the repository is the place of megatron_et; a checkout goes before an installed Megatron.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if os.environ.get("MEGATRON"):
    sys.path.insert(0, os.environ["MEGATRON"])

from megatron_et.check.findings import NOTE, REFUSED, Finding, lines, width
from megatron_et.run import cpu

TRANSFORMER_ENGINE = "2.14.0"
"""The version that Megatron is told of: no checked series of Megatron asks the examples for a later one."""

KERNELS = {
    "megatron.core.transformer.moe.moe_utils": (
        *("fused_permute", "fused_permute_with_probs", "fused_unpermute"),
        *("fused_sort_chunks_by_index", "fused_sort_chunks_by_index_with_probs"),
    ),
    "megatron.core.models.common.embeddings.rope_utils": (
        *("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd"),
    ),
}
"""Module of Megatron -> names that it has from Transformer Engine, and that are None without it."""


def prepare() -> Finding | None:
    """Import Megatron for the judging, once; says what is stood in for."""
    if cpu.requested():
        cpu.install()
    import megatron.training.arguments  # noqa: F401
    from megatron.core import utils
    from packaging.version import Version

    if not importable("deep_ep"):
        sys.modules["deep_ep"] = _deep_ep()
    if cpu.requested() or importable("transformer_engine"):
        return None
    # All that Megatron asks of it before it builds a model.
    utils._te_version = Version(TRANSFORMER_ENGINE)
    for module, names in KERNELS.items():
        for name in names:
            setattr(importlib.import_module(module), name, object())
    text = f"no Transformer Engine here: Megatron was told of version {TRANSFORMER_ENGINE}"
    return Finding(NOTE, "", text)


def _deep_ep() -> types.ModuleType:
    """Stands in for DeepEP, which `flags.judge` asks for and nothing here calls."""
    module = types.ModuleType("deep_ep")
    module.__spec__ = importlib.machinery.ModuleSpec("deep_ep", None, origin="a stand-in")
    module.HybridEPBuffer = object  # type: ignore[attr-defined]
    return module


def importable(module: str) -> bool:
    """Whether a module can be imported, which an installed one of the wrong CUDA cannot."""
    try:
        __import__(module)
    except Exception:
        return False
    return True


def judge(words: Sequence[str], world: int) -> list[Finding]:
    """What Megatron and this package say of a command's flags; `prepare` comes first.

    Args:
        words: the flags.
        world: number of processes.
    """
    from megatron_et.check import flags

    environment, argv = dict(os.environ), list(sys.argv)
    os.environ["WORLD_SIZE"] = str(world)
    try:
        given = [*cpu.CPU_ARGS, *words] if cpu.requested() else words
        with contextlib.redirect_stdout(io.StringIO()):  # Megatron prints all its arguments
            sections = flags.judge(given, script=None)
    finally:
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = argv
    return [finding for section in sections if section.title == "flags" for finding in section.findings]


def main() -> int:
    """Judge sys.argv; 1 when something is refused."""
    from megatron_et.check.findings import Section

    told = prepare()
    found = [*([told] if told else []), *judge(sys.argv[1:], int(os.environ["WORLD_SIZE"]))]
    for line in lines([Section("check", found)], width() - 2):
        print(f"# {line}")
    return 1 if any(finding.mark == REFUSED for finding in found) else 0


if __name__ == "__main__":
    sys.exit(main())
