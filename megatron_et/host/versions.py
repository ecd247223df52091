"""Versions of megatron-core on which every seam was checked. A further version is an entry here and, where
needed, a branch by feature where it differs; docs/versions.md says what was run on each."""

import importlib.metadata
import importlib.util
import warnings
from pathlib import Path

from megatron_et.rank_zero import is_rank_zero

CHECKED: dict[str, str] = {
    "0.16": "0.16.1",
    "0.17": "0.17.1",
    "0.18": "0.18.2",
    "0.19": "0.19.2",
    "0.20": "Megatron-LM's main branch of 2026-08-22, commit d98e8a64d",
}
"""major.minor -> the release or commit that was run."""
MAIN_SERIES, MAIN_COMMIT = "0.20", "d98e8a64ddf34856e74b24714e3bedb2f5a39553"
"""The version number of a development branch says nothing: its commit counts."""
CHECKOUTS = frozenset({"0.19.0"})
"""Releases of which the scripts of a checkout were run, beside the one of their series above."""
SHORTEST_COMMIT = 7


def megatron_version() -> str:
    """Version of the megatron-core that will be imported.

    Megatron appends the commit of the git repository around its files. Around a wheel's files that is
    anybody's (a .venv in a project), so there it is the distribution's version.
    """
    from megatron.core import package_info

    here = Path(package_info.__file__).resolve().parent
    for distribution in importlib.metadata.distributions(name="megatron-core"):
        if Path(str(distribution.locate_file("megatron/core"))).resolve() == here:
            return distribution.version
    return str(package_info.__version__)


def series(version: str) -> str:
    """major.minor"""
    return ".".join(version.split(".")[:2])


def is_checked(version: str) -> bool:
    """Whether a version (major.minor.patch, and +commit of a checkout) is one that was run."""
    release, _, commit = version.partition("+")
    if series(version) == MAIN_SERIES:
        return len(commit) >= SHORTEST_COMMIT and MAIN_COMMIT.startswith(commit)
    return release in CHECKED.values() or release in CHECKOUTS


def checked_versions() -> str:
    """The checked releases and commits, for messages."""
    return ", ".join(CHECKED.values())


def not_checked(version: str) -> str:
    """What to say of a version that was not run."""
    if (run := CHECKED.get(series(version))) is not None:
        return f"{version} was not run, {run} of the same series was (checked were {checked_versions()})"
    return f"{version} was not run, nor any of its series: checked were {checked_versions()}"


def check_version() -> None:
    """Warn, on rank 0, when the installed megatron-core is none that was run, or is mixed with another one's
    megatron.training; missing symbols are refused by the seams."""
    if not is_rank_zero():
        return
    version = megatron_version()
    if not is_checked(version):
        warnings.warn(
            f"megatron_et {importlib.metadata.version('megatron-et')}: megatron-core {not_checked(version)}. "
            "Every symbol it needs is looked up and refused if missing, but behaviour may differ. Compare a "
            "short run with --moe-router-type topk against plain Megatron first.",
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
