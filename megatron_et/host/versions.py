"""Versions of megatron-core on which every seam was checked. A further version is an entry here and, where
needed, a branch."""

import importlib.metadata
import warnings

CHECKED: dict[str, str] = {
    "0.19": "0.19.2: whole test suite on CPU and gloo",
}
"""major.minor -> what was run on it."""


def megatron_version() -> str:
    """Version of the megatron-core that will be imported."""
    from megatron.core import package_info

    return str(package_info.__version__)


def is_checked(version: str) -> bool:
    """Whether a version (major.minor.patch) belongs to a checked series."""
    return ".".join(version.split(".")[:2]) in CHECKED


def check_version() -> None:
    """Warn when the installed megatron-core belongs to no checked series; missing symbols are refused by the
    seams."""
    version = megatron_version()
    if not is_checked(version):
        warnings.warn(
            f"megatron_et {importlib.metadata.version('megatron-et')} was checked on megatron-core "
            f"{', '.join(CHECKED)}.x, this is {version}: every symbol it needs is looked up and refused if "
            "missing, "
            "but behaviour may differ. Compare a short run with --moe-router-type topk against plain "
            "Megatron first.",
            stacklevel=2,
        )
