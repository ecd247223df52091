"""Expands every example with every router and precision, and lets Megatron parse and check the flags, on CPU.

    make examples-dry-run                                   # or: python examples/dry_run.py [MODEL ...]
    MEGATRON=/path/to/Megatron-LM python examples/dry_run.py      by the flags of that checkout

Nothing is trained. One line for each case; exit status 1 when one of them is refused.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

# Run as a script: the repository is the place of `examples` and megatron_et.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.common import check
from megatron_et.check.findings import REFUSED

EXAMPLES = Path(__file__).resolve().parent
NODES = {
    "d12": (1, 8),
    "d20": (1, 8),
    "mixtral_8x7b": (1, 8, 64),
    "qwen3_30b_a3b": (1, 8, 64),
    "qwen3_235b_a22b": (8, 64),
    "deepseek_v3_proxy": (1, 8, 64),
}
"""Every example, and the numbers of nodes of 8 H100s that its layouts are made for."""
ROUTERS = ("et", "ec", "topk-aux", "topk-bias", "quantile-balancing")
PRECISIONS = ("bf16", "fp8")
# Not in every Megatron; the example then ends with this sentence.
TOO_OLD = "needs Megatron-Core 0.19 or newer"

Settings = Mapping[str, str | int]


class ExampleError(Exception):
    """An example refused to start; says why."""

    def __init__(self, sentence: str, printed: str) -> None:
        super().__init__(sentence)
        self.printed = printed
        """What it had said before."""


@dataclass(frozen=True)
class Expansion:
    """What an example would run."""

    text: str
    """All that it printed: a shell script."""
    environment: dict[str, str]
    launcher: list[str]
    """Up to the name of the script or module."""
    flags: list[str]


def expand(model: str, settings: Settings = {}, extra: Sequence[str] = ()) -> Expansion:  # noqa: B006
    """Run an example with DRY_RUN=command.

    Args:
        model: its name.
        settings: environment variables. Of the caller's own, those that examples read are left out.
        extra: flags behind the example's name.

    Raises:
        ExampleError: it refused.
    """
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "MEGATRON", "LANG") if name in os.environ}
    given = {name: str(value) for name, value in settings.items()}
    ran = subprocess.run(
        ["bash", str(EXAMPLES / f"{model}.sh"), *extra],
        env={"PYTHON": sys.executable, "GPU_MEMORY_GIB": "80", "NPROC_PER_NODE": "8"}
        | kept
        | {"DRY_RUN": "command"}
        | given,
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode != 0:
        raise ExampleError(ran.stderr.strip(), ran.stdout)
    return parse(ran.stdout)


def parse(text: str) -> Expansion:
    """The printed command, read as a shell would."""
    code = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    words = shlex.split(code.replace("\\\n", " "))
    assert words.pop(0) == "env"
    environment = {}
    while re.match(r"\w+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    module = next(i for i, word in enumerate(words) if word.startswith("megatron_et"))
    first_flag = module + (2 if words[module] == "megatron_et" else 1)
    return Expansion(text, environment, words[:first_flag], words[first_flag:])


@dataclass(frozen=True)
class Case:
    """One example in one form."""

    model: str
    nodes: int
    settings: Settings = field(default_factory=dict)

    def __str__(self) -> str:
        settings = " ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{self.model} NNODES={self.nodes} {settings}"

    def expand(self) -> Expansion | ExampleError:
        """The command, or why there is none."""
        try:
            return expand(self.model, {"NNODES": self.nodes, **self.settings})
        except ExampleError as error:
            return error


def cases(models: Iterable[str]) -> list[Case]:
    """Every router in every precision on the fewest nodes; larger layouts, Muon and extras with ET alone."""
    found = []
    for model in models:
        fewest, *more = NODES[model]
        found += [
            Case(model, fewest, {"ROUTER": router, "PRECISION": precision})
            for router in ROUTERS
            for precision in PRECISIONS
        ]
        found += [Case(model, nodes, {"ROUTER": "et"}) for nodes in more]
        if model in ("d12", "d20"):
            found.append(Case(model, fewest, {"ROUTER": "et", "OPTIMIZER": "muon"}))
        else:
            found.append(Case(model, more[-1], {"ROUTER": "et", "DISPATCHER": "deepep", "SHARED_EXPERT": 1}))
    return found


def judge(case: Case, expansion: Expansion) -> list[str]:
    """What Megatron and this package refuse of a command."""
    os.environ.update({k: v for k, v in expansion.environment.items() if k.startswith("CUDA")})
    found = check.judge(expansion.flags, case.nodes * 8)
    return [finding.text for finding in found if finding.mark == REFUSED]


def main(argv: Sequence[str]) -> int:
    """Expand and judge all cases of the models named, or of all; 1 when one is refused."""
    unknown = sorted(set(argv) - set(NODES))
    if unknown:
        print(f"no example {', '.join(unknown)}: there are {', '.join(NODES)}", file=sys.stderr)
        return 2
    started = time.monotonic()
    todo = cases(argv or NODES)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        expansions = list(pool.map(Case.expand, todo))
    told = check.prepare()
    if told is not None:
        print(told.text)
    refused = skipped = 0
    for case, expansion in zip(todo, expansions, strict=True):
        if isinstance(expansion, ExampleError):
            wrong = [str(expansion)]
            if TOO_OLD in wrong[0]:
                skipped += 1
                print(f"skipped  {case}: {wrong[0]}")
                continue
        else:
            wrong = judge(case, expansion)
        refused += bool(wrong)
        print(f"{'REFUSED' if wrong else 'ok':<7}  {case}", *wrong, sep="\n           ", flush=True)
    print(f"{len(todo)} commands, {refused} refused, {skipped} skipped, {time.monotonic() - started:.0f} s")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
