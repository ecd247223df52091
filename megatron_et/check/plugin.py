"""The child process that imports Megatron: which one it is, which seams bind, what it says of the flags."""

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_et import host
from megatron_et.check.findings import NOTE, OK, PLAIN, REFUSED, Finding, Section, last_line
from megatron_et.host import seam, versions
from megatron_et.run import cpu


def examine(words: Sequence[str], *, script: str | None, hidden: Iterable[str] = ()) -> list[Section]:
    """Everything that needs Megatron. Changes this process for good: seams are bound in it.

    Args:
        words: the training command's flags; none means that nobody asks about flags.
        script: the training script, if the command named one.
        hidden: modules that did not import when they were tried; Megatron shall not try them again.
    """
    for module in hidden:
        sys.modules[module] = None  # type: ignore[assignment]
    on_cpu = cpu.requested()
    if on_cpu:
        cpu.install()  # before anything imports Megatron
    which = _which_megatron()
    if any(finding.mark == REFUSED for finding in which):
        return [Section("Megatron", which)]
    if on_cpu:
        which.append(Finding(NOTE, "backend", f"{cpu.ENV} is set: checked with Megatron on CPU and gloo"))
    sections = [Section("Megatron", which)]
    has_training = _has_training()
    # Before the seams: they need Megatron's own parser.
    if not has_training:
        judged = _own_loop(words)
    else:
        from megatron_et.check import flags

        judged = flags.judge([*cpu.CPU_ARGS, *words] if on_cpu and words else words, script=script)
    return [*sections, Section("seams", bind_seams()), *judged]


def _which_megatron() -> list[Finding]:
    core, training = _folder("megatron.core"), _folder("megatron.training")
    if core is None:
        remedy = "pip install megatron-core, or name the script of a Megatron-LM checkout"
        return [Finding(REFUSED, "megatron-core", f"not installed: {remedy}")]
    try:
        version = versions.megatron_version()
    except Exception as error:
        return [Finding(REFUSED, "megatron-core", f"{core} does not import: {last_line(error)}")]
    if versions.is_checked(version):
        found = [Finding(OK, "megatron-core", f"{version}, one that was run")]
    else:
        text = f"{versions.not_checked(version)}. Seams are looked up one by one below; behaviour may differ"
        found = [Finding(NOTE, "megatron-core", text)]
    found.append(Finding(PLAIN, "", str(core)))
    if training is None:
        found.append(Finding(NOTE, "megatron.training", "not there: only training loops of your own can run"))
    elif training.parent != core.parent:
        found.append(
            Finding(
                REFUSED,
                "megatron.training",
                f"comes from {training}, another Megatron than megatron.core: halves of two Megatrons do not "
                "fit together. Remedy: a whole Megatron-LM checkout (its folder first on PYTHONPATH), or a "
                "megatron-core wheel that holds both (0.17 and later do)",
            )
        )
    else:
        found.append(Finding(OK, "megatron.training", "of the same Megatron"))
    return found


def _folder(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:  # no `megatron` at all
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))).resolve()


def _has_training() -> bool:
    return _folder("megatron.training") is not None


def bind_seams() -> list[Finding]:
    """Bind every seam as `megatron_et.install()` does, but go on after one that fails."""
    found = []
    for name in host.seams():
        before = len(seam.replaced)
        try:
            importlib.import_module(f"{host.__name__}.{name}").install()
        except Exception as error:
            found.append(Finding(REFUSED, name, f"{last_line(error)}. It is for: {_purpose(name)}"))
            continue
        symbols = ", ".join(".".join(full.split(".")[-2:]) for full in seam.replaced[before:])
        found.append(Finding(OK, name, f"{symbols} ({_purpose(name)})" if symbols else _purpose(name)))
    if not _has_training():
        found.append(
            Finding(
                NOTE,
                "your own loop",
                "without megatron.training only the layer is bound. Call "
                "megatron_et.finalize_thresholds(model) on every rank, once per optimizer step and after the "
                "last backward pass, or the thresholds never move; set config.expert_threshold = "
                "ExpertThresholdConfig(...) on the TransformerConfig",
            )
        )
    return found


def _purpose(name: str) -> str:
    """What a seam is for: the last column of the table in megatron_et.host."""
    rows = (row.strip("| ").split(" | ") for row in (host.__doc__ or "").splitlines() if row.startswith("|"))
    return "; ".join(dict.fromkeys(row[-1] for row in rows if row[0] == f"{name}.py"))


def _own_loop(words: Sequence[str]) -> list[Section]:
    if not words:
        return []
    text = (
        "cannot be checked: their parser is in megatron.training, which is not there. Settings of a "
        "TransformerConfig are checked when a router is built"
    )
    return [Section("flags", [Finding(REFUSED, "", text)])]
