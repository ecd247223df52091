"""What run.py tells the processes that it starts, in one environment variable."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from .table import Way, find, matches

ENV = "ET_CONFORMANCE"
FOLDER = "tests/unit_tests/transformer/moe"
"""Megatron's MoE unit tests in a checkout."""


@dataclass(frozen=True)
class Settings:
    """One launch of test processes."""

    checkout: Path
    out: Path
    """Folder for `rankR.jsonl`."""
    way: Way
    pattern: str = "*"
    """Tests to run, as in table.py."""
    only: tuple[str, ...] = ()
    """Tests to run, by name; none: all that match and that the way has."""
    done: frozenset[str] = field(default_factory=frozenset)
    """Tests that an earlier launch has run."""
    test_seconds: int = 240

    def wants(self, test: str) -> bool:
        """Whether this launch runs a test."""
        if test in self.done or not matches(self.pattern, test) or (self.only and test not in self.only):
            return False
        row = find(test)
        return row is not None and (self.way in row.ways or (self.way == "plain" and bool(row.ways)))

    def to_environment(self) -> dict[str, str]:
        """The variable that carries these settings."""
        plain = {
            **self.__dict__,
            "checkout": str(self.checkout),
            "out": str(self.out),
            "only": list(self.only),
            "done": sorted(self.done),
        }
        return {ENV: json.dumps(plain)}

    @classmethod
    def from_environment(cls) -> Self:
        """Read them back. KeyError outside of a launch."""
        plain = json.loads(os.environ[ENV])
        return cls(
            **{
                **plain,
                "checkout": Path(plain["checkout"]),
                "out": Path(plain["out"]),
                "only": tuple(plain["only"]),
                "done": frozenset(plain["done"]),
            }
        )
