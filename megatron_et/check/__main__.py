"""A child process of `megatron-et check`: `python -m megatron_et.check TASK WORDS...` (child.py)."""

import sys
from collections.abc import Callable
from typing import Any

from megatron_et.check.child import give


def _package(words: list[str]) -> Any:
    from megatron_et.check.packages import probe

    return probe(words[0])


def _plugin(words: list[str]) -> Any:
    from megatron_et.check.plugin import examine

    hidden, script, *flags = words
    return examine(flags, script=script or None, hidden=hidden.split())


TASKS: dict[str, Callable[[list[str]], Any]] = {"package": _package, "plugin": _plugin}


if __name__ == "__main__":
    give(TASKS[sys.argv[1]](sys.argv[2:]))
