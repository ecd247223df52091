"""`megatron-et check`: versions, seams, refused flags, and the cost of the statistics, without a GPU."""

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_et.check.child import Child, ChildError
from megatron_et.check.findings import NOTE, PLAIN, REFUSED, Finding, Section, lines, refused, width
from megatron_et.check.packages import ABSENT

USAGE = "megatron-et check [SCRIPT] [FLAGS OF YOUR TRAINING COMMAND ...]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `megatron-et check`: there are none of our own, all words are the training command's."""
    parser.usage = USAGE
    parser.add_argument(
        "words",
        nargs="*",
        metavar="WORDS",
        help="the training command from its script on: a Megatron-LM checkout beside the script is the one "
        "that is checked. Exit status 0: it will run; 1: something is refused or does not bind",
    )


def run(args: argparse.Namespace) -> int:
    """Print what is found; 0 when nothing stands in the way, 1 when something does, 2 for wrong use."""
    script, flags = _split(args.words)
    if (wrong := _wrong_use(script)) is not None:
        print(f"megatron-et check: {wrong}", file=sys.stderr)
        return 2
    sections = check(flags, script)
    print("\n".join(lines(sections, width())))
    count = refused(sections)
    print(f"\n{f'{count} finding(s) marked {REFUSED}' if count else 'nothing is refused'}")
    return 1 if count else 0


def check(flags: Sequence[str], script: Path | None = None) -> list[Section]:
    """All sections of the check.

    Args:
        flags: the training command's flags.
        script: the training script; its folder goes first on the path from which Megatron is imported.
    """
    environment, hidden = _environment(script)
    # A library that did not import here would crash or hang Megatron too: it is hidden from it.
    words = [" ".join(hidden), "" if script is None else str(script), *flags]
    try:
        answer = Child("plugin", words, script=script).answer()
    except ChildError as error:
        return [
            environment,
            Section("Megatron", [Finding(REFUSED, "", f"the check of Megatron ended: {error}")]),
        ]
    return [environment, *_sections(answer)]


def _split(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    if words and not words[0].startswith("-"):
        return Path(words[0]), list(words[1:])
    return None, list(words)


def _wrong_use(script: Path | None) -> str | None:
    if script is not None and not script.is_file():
        return (
            f"{script} is not a file: give your training script and its flags, without torchrun and its own. "
            f"usage: {USAGE}"
        )
    world_size = os.environ.get("WORLD_SIZE", "1")
    if not world_size.isdigit() or int(world_size) < 1:
        return (
            f"WORLD_SIZE is {world_size!r} in the environment: set it to the number of processes, or unset it"
        )
    return None


def _environment(script: Path | None) -> tuple[Section, list[str]]:
    """What is installed, and the modules that did not import."""
    found = [Finding(PLAIN, "Python", f"{platform.python_version()}, {sys.executable}")]
    hidden = []
    children = {name: Child("package", [name], script=script) for name in ABSENT}
    try:
        for name, child in children.items():
            try:
                found += [Finding(*item) for item in child.answer()]
            except ChildError as error:
                hidden.append(name)
                text = f"does not import here: {error}. Left out of the rest"
                found.append(Finding(REFUSED if name == "torch" else NOTE, ABSENT[name][0].label, text))
    finally:
        for child in children.values():
            child.end()
    return Section("environment", found), hidden


def _sections(answer: Any) -> list[Section]:
    return [Section(title, [Finding(*item) for item in items]) for title, items in answer]
