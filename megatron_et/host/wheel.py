"""Seam: a gap of megatron-core's wheel. It ships the C++ dataset helper compiled, but Megatron runs `make`
for it at start-up, and the wheel has no Makefile: every run from pip packages alone would stop, on GPUs too.
"""

from pathlib import Path
from typing import Any

from megatron_et.host import seam


def repair(utils: Any) -> None:
    """Make `compile_helpers` do nothing where there is no Makefile; a checkout compiles as ever.

    Args:
        utils: the module megatron.core.datasets.utils.
    """
    if not (Path(utils.__file__).parent / "Makefile").exists():
        utils.compile_helpers = _nothing


def _nothing() -> None:
    """The wheel's helper is compiled."""


def install() -> None:
    """Bind the seam."""
    seam.find("megatron.core.datasets.utils", "compile_helpers")
    import megatron.core.datasets.utils

    repair(megatron.core.datasets.utils)
