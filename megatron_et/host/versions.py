"""Versions of megatron-core on which every seam was checked. A further version is an entry here and, where
needed, a branch by feature where it differs; docs/versions.md says what was run on each."""

import importlib.metadata
import importlib.util
import warnings
from pathlib import Path

CHECKED: dict[str, str] = {
    "0.16": "0.16.1",
    "0.17": "0.17.1",
    "0.18": "0.18.2",
    "0.19": "0.19.2",
    "0.20": "Megatron-LM's main branch of 2026-08-22, commit d98e8a64d",
}
"""major.minor -> the release or commit that was run."""


def megatron_version() -> str:
    """Version of the megatron-core that will be imported."""
    from megatron.core import package_info

    return str(package_info.__version__)


def is_checked(version: str) -> bool:
    """Whether a version (major.minor.patch) belongs to a checked series."""
    return ".".join(version.split(".")[:2]) in CHECKED


def checked_versions() -> str:
    """The checked releases and commits, for messages."""
    return ", ".join(CHECKED.values())


def check_version() -> None:
    """Warn when the installed megatron-core belongs to no checked series, or is mixed with another one's
    megatron.training; missing symbols are refused by the seams."""
    version = megatron_version()
    if not is_checked(version):
        warnings.warn(
            f"megatron_et {importlib.metadata.version('megatron-et')} was checked on megatron-core "
            f"{checked_versions()}; this is {version}: every symbol it needs is looked up and refused if "
            "missing, but behaviour may differ. Compare a short run with --moe-router-type topk against "
            "plain Megatron first.",
            stacklevel=2,
        )
    core, training = _folder_of("megatron.core"), _folder_of("megatron.training")
    if training is not None and core != training:
        warnings.warn(
            f"megatron.core {version} is imported from {core} and megatron.training from {training}: two "
            "installations of Megatron are mixed. Unless they are of one version, put the one you mean first "
            "on PYTHONPATH, or uninstall the other.",
            stacklevel=2,
        )


def _folder_of(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).resolve().parent.parent
