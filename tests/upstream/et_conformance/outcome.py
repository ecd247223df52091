"""From the ranks' records to one outcome for each test and way, and to the table that is printed."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from .table import ROWS, WAYS, Row, Way, find

Status = Literal["passed", "failed", "upstream", "skipped", "vacuous"]
"""upstream: it fails on plain Megatron too, on this machine. vacuous: it passed, but built none of ours."""

_WAITED = ("Timed out waiting", "Connection closed by peer", "wait timeout", "Application timeout")
"""How a rank fails that only waited for one that failed before it."""


@dataclasses.dataclass
class Outcome:
    """What came of one test."""

    status: Status
    message: str = ""
    ours: tuple[str, ...] = ()
    """Classes of ours that it built."""


def combine(ranks: Iterable[Sequence[Mapping[str, Any]]]) -> dict[str, Outcome]:
    """One outcome for each test from all ranks' records: failed if it failed anywhere or never ended."""
    by_test: dict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for rank, records in enumerate(ranks):
        for record in records:
            if "test" in record:
                by_test[record["test"]][rank] = record
    return {test: _combine_one(list(records.values())) for test, records in by_test.items()}


def _combine_one(records: list[Mapping[str, Any]]) -> Outcome:
    failed = [record["message"] for record in records if record["status"] == "failed"]
    if failed:
        first_hand = [message for message in failed if not any(sign in message for sign in _WAITED)]
        return Outcome("failed", (first_hand or failed)[0])
    if any(record["status"] == "started" for record in records):
        return Outcome("failed", "the test ended the process, or took too long")
    ours = tuple(sorted({name for record in records for name in record.get("ours", ())}))
    if any(record["status"] == "passed" for record in records):
        return Outcome("passed", ours=ours)
    return Outcome("skipped", records[0]["message"], ours)


def judge(way: Way, ours: Mapping[str, Outcome], plain: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """The outcomes of a way, beside those of plain Megatron for the tests that failed.

    A test that fails without us as well says nothing about us. One that passes without having built our
    router (adapted) or our dispatcher (unadapted) says nothing either.
    """
    wanted = "Router" if way == "adapted" else "TokenDispatcher"
    judged = {}
    for test, outcome in ours.items():
        if outcome.status == "failed" and test in plain and plain[test].status == "failed":
            outcome = dataclasses.replace(outcome, status="upstream")
        elif outcome.status == "passed" and not any(name.endswith(wanted) for name in outcome.ours):
            outcome = dataclasses.replace(outcome, status="vacuous")
        judged[test] = outcome
    return judged


@dataclasses.dataclass
class Summary:
    """A whole run: what upstream has, and what came of it."""

    collected: Sequence[str]
    outcomes: Mapping[Way, Mapping[str, Outcome]]
    rows: Sequence[Row] = ROWS

    def of(self, status: Status) -> list[tuple[str, Way, Outcome]]:
        """All tests with a status, with the way they were run."""
        return [
            (test, way, outcome)
            for way, outcomes in self.outcomes.items()
            for test, outcome in outcomes.items()
            if outcome.status == status
        ]

    def unclassified(self) -> list[str]:
        """New tests of upstream that no row speaks of."""
        return [test for test in self.collected if find(test, self.rows) is None]

    def not_applicable(self) -> dict[str, list[str]]:
        """Reason -> tests."""
        reasons = defaultdict(list)
        for test in self.collected:
            row = find(test, self.rows)
            if row is not None and row.reason:
                reasons[row.reason].append(test)
        return dict(reasons)

    def counts(self) -> dict[str, Counter[str]]:
        """File -> column -> number."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for test in self.collected:
            row = find(test, self.rows)
            column = "unclassified" if row is None else "not applicable" if row.reason else "apply"
            counts[_file(test)].update(("tests", column))
        for way, outcomes in self.outcomes.items():
            for test, outcome in outcomes.items():
                status = outcome.status
                counts[_file(test)][f"{way} passed" if status == "passed" else status] += 1
        return dict(counts)

    def record(self, version: str) -> dict[str, Any]:
        """All of it, for a JSON file."""
        return {
            "megatron": version,
            "outcomes": {
                way: {test: dataclasses.asdict(outcome) for test, outcome in outcomes.items()}
                for way, outcomes in self.outcomes.items()
            },
            "not applicable": self.not_applicable(),
            "unclassified": self.unclassified(),
        }

    def good(self, *, version_checked: bool) -> bool:
        """Nothing failed because of us, every pass means something, and on a Megatron that the plug-in is
        checked on every test is classified."""
        return not (self.of("failed") or self.of("vacuous") or (version_checked and self.unclassified()))

    def text(self) -> str:
        """The table and the lists below it, as printed."""
        return "\n".join([*self._table(), "", *self._lists()])

    def _table(self) -> list[str]:
        columns = {
            "tests": "tests",
            "apply": "apply",
            **{f"{way} passed": f"{way}: passed" for way in (*WAYS, "plain")},
            "failed": "failed",
            "vacuous": "built nothing of ours",
            "upstream": "fails upstream here too",
            "skipped": "skipped here",
            "not applicable": "not applicable",
            "unclassified": "not classified",
        }
        counts = self.counts()
        total = sum(counts.values(), Counter())
        columns = {key: title for key, title in columns.items() if total[key] or key == "failed"}
        rows = [["file", *columns.values()]]
        rows += [
            [file, *(str(count[key] or "") for key in columns)] for file, count in sorted(counts.items())
        ]
        rows.append(["all", *(str(total[key]) for key in columns)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
            for row in rows
        ]
        return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]

    def _lists(self) -> Iterable[str]:
        for status, title in (
            ("failed", "FAILED, and does not fail on plain Megatron"),
            ("vacuous", "PASSED, BUT BUILT NOTHING OF OURS: classify anew in table.py"),
        ):
            for test, way, outcome in self.of(status):  # type: ignore[arg-type]
                yield f"{title}: {test} ({way})"
                yield from (f"    {line}" for line in outcome.message.splitlines()[-25:])
        for test in self.unclassified():
            yield f"NEW UPSTREAM TEST, NOT CLASSIFIED in table.py: {test}"
        for title, tests in (
            ("fails upstream here too", _by_message(self.of("upstream"))),
            ("skipped here", _by_message(self.of("skipped"))),
            ("not applicable", {key: len(tests) for key, tests in self.not_applicable().items()}),
        ):
            for message, count in sorted(tests.items(), key=lambda item: -item[1]):
                yield f"{title}: {count} x {message}"


def _file(test: str) -> str:
    return test.partition("::")[0]


def _by_message(found: Iterable[tuple[str, Way, Outcome]]) -> Counter[str]:
    return Counter(_gist(outcome.message) for _, _, outcome in found)


def _gist(message: str) -> str:
    """The line of pytest's report that names the error, with the file that raised it; else the last line."""
    lines = [line for line in message.splitlines() if line.strip()] or ["no message"]
    errors = [line[1:].strip() for line in lines if line.startswith("E  ")]
    if not errors:
        return lines[-1]
    raised = lines[-1].rpartition("/")[2].partition(": ")[0]
    return f"{errors[0]} ({raised})"
