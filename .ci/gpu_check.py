"""`make gpu-check`: run the gpu tests on this machine's GPU and record in docs/verified.md what they showed.

    python .ci/gpu_check.py [--commit NAME] [pytest's arguments; all of tests/gpu if they name no tests]
    python .ci/gpu_check.py [--commit NAME] --record REPORT.xml ...   # of pytest runs on this machine

All of tests/gpu is run file by file, each recorded as soon as it has ended. With pytest-xdist,
`-n 4 --dist loadgroup` runs four tests at a time: most of a test's time is the start of its process.

The first line of a test's docstring is its feature (tests/gpu/conftest.py). Every feature that was run gets
one row between two markers of docs/verified.md, which replaces the row of the same feature, hardware and
versions if there is one; all other rows stay. No network is needed. The exit status is pytest's, and 2 on a
machine without a GPU, where nothing is run and nothing written.
"""

import argparse
import importlib.metadata
import platform
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERIFIED = ROOT / "docs" / "verified.md"
REPORT = ROOT / "runs" / "gpu-check.xml"
BEGIN = "<!-- gpu rows: written by make gpu-check -->"
END = "<!-- end of gpu rows -->"


@dataclass(frozen=True)
class Row:
    """What one feature showed on one machine."""

    feature: str
    hardware: str
    versions: str
    date: str
    commit: str
    result: str

    @property
    def key(self) -> tuple[str, str, str]:
        """Rows with the same key are the same thing seen again."""
        return self.feature, self.hardware, self.versions


# ---- docs/verified.md ------------------------------------------------------------------------------------


def table_of(document: str) -> tuple[str, str, str]:
    """The document before the rows' table, the table, and the document after it.

    Raises:
        ValueError: a marker is missing, or there is more than one pair.
    """
    before, begin, rest = document.partition(BEGIN)
    table, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in after or END in after:
        raise ValueError(f"the document must hold one pair of lines {BEGIN} and {END}")
    return before + begin, table, end + after


def read_rows(table: str) -> list[Row]:
    """Rows of a table, without its header."""
    rows = []
    for line in table.splitlines():
        cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        is_header = cells[:1] == ["feature"] or set("".join(cells)) <= set("-: ")
        if len(cells) == len(fields(Row)) and not is_header:
            rows.append(Row(*cells))
    return rows


def write_rows(rows: Iterable[Row]) -> str:
    """A table, header included: a comment between header and rows would end it."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", r"\|") for cell in cells) + " |"

    names = [column.name for column in fields(Row)]
    return "\n".join([line(names), line(["---"] * len(names)), *(line(astuple(row)) for row in rows)])


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Old rows in their order, each replaced by the new one of its key, then the new ones without a
    predecessor."""
    latest = {row.key: row for row in new}
    return [latest.pop(row.key, row) for row in old] + list(latest.values())


def updated(document: str, new: Sequence[Row]) -> str:
    """The document with the new rows in its table."""
    before, table, after = table_of(document)
    return f"{before}\n\n{write_rows(merge(read_rows(table), new))}\n\n{after}"


# ---- what ran --------------------------------------------------------------------------------------------


def results(report: ElementTree.Element) -> dict[str, str]:
    """Feature -> passed, failed or skipped, with numbers, names and reasons, from a JUnit report."""
    cases: dict[str, list[ElementTree.Element]] = {}
    for case in report.iter("testcase"):
        feature = case.find("./properties/property[@name='feature']")
        # Without one: a file that could not be imported.
        name = case.get("name", "?") if feature is None else feature.get("value", "?")
        cases.setdefault(name, []).append(case)
    return {feature: _result(of_feature) for feature, of_feature in cases.items()}


MOST_NAMES = 4
"""Failed tests that a row names."""


def _result(cases: Sequence[ElementTree.Element]) -> str:
    failed = [
        _short_name(case)
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    reasons = [skip.get("message", "") for case in cases if (skip := case.find("skipped")) is not None]
    if failed:
        more = f" and {len(failed) - MOST_NAMES} more" if len(failed) > MOST_NAMES else ""
        return f"failed {len(failed)} of {len(cases)}: {', '.join(failed[:MOST_NAMES])}{more}"
    if len(reasons) == len(cases):
        return f"skipped: {', '.join(dict.fromkeys(reasons))}"
    passed = len(cases) - len(reasons)
    skipped = f", {len(reasons)} skipped: {', '.join(dict.fromkeys(reasons))}" if reasons else ""
    return (f"passed ({passed} tests)" if passed > 1 else "passed") + skipped


def _short_name(case: ElementTree.Element) -> str:
    """'dense-bf16' for 'test_layer[dense-bf16]', the name itself where it has no parameters."""
    name = case.get("name", "?")
    return name.partition("[")[2].removesuffix("]") or name


def _merged(reports: Sequence[Path]) -> ElementTree.Element:
    merged = ElementTree.Element("reports")
    merged.extend(ElementTree.parse(report).getroot() for report in reports)
    return merged


# ---- where it ran ----------------------------------------------------------------------------------------


def hardware() -> str:
    """The GPU that the tests use: they run on one, the first."""
    import torch

    return f"1 x {torch.cuda.get_device_name(0)}, driver {_output('nvidia-smi', *_QUERY_DRIVER) or 'unknown'}"


_QUERY_DRIVER = ("--id=0", "--query-gpu=driver_version", "--format=csv,noheader")


def versions() -> str:
    """Versions of all that takes part."""
    import torch

    te = _version("transformer-engine")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return ", ".join(
        [
            f"Python {platform.python_version()}",
            f"torch {torch.__version__}",
            f"megatron-core {_version('megatron-core') or 'unknown'}",
            f"Transformer Engine {te}" if te else "no TE",
            f"NCCL {nccl}",
        ]
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Short hash of HEAD, with -dirty when files differ from it; the rows themselves do not count."""
    head = _output("git", "rev-parse", "--short", "HEAD")
    if head is None:
        return "unknown"
    changed = _output("git", "status", "--porcelain", "--", ".", f":!{_ROWS_FILE}")
    return f"{head}-dirty" if changed else head


_ROWS_FILE = VERIFIED.relative_to(ROOT).as_posix()


def _output(*command: str) -> str | None:
    """What a command prints; None when it is missing or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def why_no_gpu() -> str | None:
    """Why no GPU test can run here; None when one can."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no CUDA GPU"


# ---- the command -----------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Run and record; returns the exit status."""
    parser = argparse.ArgumentParser(usage=(__doc__ or "").splitlines()[2].strip(), allow_abbrev=False)
    parser.add_argument("--commit", help="what was run, where there is no git")
    parser.add_argument(
        "--record", nargs="+", type=Path, metavar="REPORT.xml", help="run nothing: write these runs' rows"
    )
    arguments, pytest_arguments = parser.parse_known_args(argv)
    missing = why_no_gpu()
    if missing is not None:
        print(f"gpu-check: {missing}: nothing was run and docs/verified.md is as it was.", file=sys.stderr)
        return 2
    try:
        table_of(VERIFIED.read_text())
    except (OSError, ValueError) as error:
        print(f"gpu-check: {VERIFIED}: {error}", file=sys.stderr)
        return 1
    name = arguments.commit or commit()
    if arguments.record:
        record(name, arguments.record)
        return 0
    if any((ROOT / word.partition("::")[0]).exists() for word in pytest_arguments):
        return run(name, pytest_arguments)
    # File by file: what is finished is recorded if the machine is taken away.
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    statuses = [run(name, [str(file.relative_to(ROOT)), *pytest_arguments]) for file in files]
    # A signal's status is negative, and -k may leave a file without tests.
    failed = [status for status in statuses if status not in (0, NO_TESTS)]
    return max(failed, key=abs) if failed else min(statuses)


NO_TESTS = 5
"""pytest's status when it has collected none."""


def run(name: str, pytest_arguments: Sequence[str]) -> int:
    """Run and record; returns pytest's exit status."""
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.unlink(missing_ok=True)
    # xunit1: the schema that has properties of single tests.
    options = ["-m", "gpu", "-o", "junit_family=xunit1", f"--junitxml={REPORT}"]
    status = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *pytest_arguments], cwd=ROOT
    ).returncode
    if REPORT.exists():
        record(name, [REPORT])
    return status


def record(name: str, reports: Sequence[Path]) -> None:
    """Put the reports' results into docs/verified.md and print them."""
    date = datetime.now(UTC).date().isoformat()
    where = hardware(), versions()
    rows = [Row(feature, *where, date, name, result) for feature, result in results(_merged(reports)).items()]
    VERIFIED.write_text(updated(VERIFIED.read_text(), rows))
    print(f"gpu-check: {len(rows)} rows of docs/verified.md are those of {', '.join(where)}:")
    for row in rows:
        print(f"  {row.feature}: {row.result}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
