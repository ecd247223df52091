"""Rows of results, one CSV file a level and device; a run replaces the rows that it measured again."""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.suite.timing import Spread

RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True)
class Row:
    """One quantity of one method in one case."""

    level: str
    case: str
    """Sizes and workload, 'T16384 E128 k8 balanced'."""
    method: str
    quantity: str
    unit: str
    median: float
    """NaN where the method could not run; `note` says why."""
    q20: float
    q80: float
    samples: int
    fanout: float
    """Mean experts a token over the steps that were measured; NaN where nothing is routed."""
    max_load: float
    """Largest load of an expert over the mean load, the mean of the steps measured."""
    note: str
    environment: str
    """Machine, versions, date and commit: 'name=value; ...'."""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Rows with one key are the same thing measured again."""
        return self.level, self.case, self.method, self.quantity

    @property
    def measured(self) -> bool:
        """There is a number."""
        return not math.isnan(self.median)


def row(
    level: str,
    case: str,
    method: str,
    quantity: str,
    environment: str,
    *,
    unit: str = "ms",
    values: Sequence[float] = (),
    fanout: float = math.nan,
    max_load: float = math.nan,
    note: str = "",
) -> Row:
    """A row of samples; of none for a method that could not run."""
    spread = Spread.of(values) if values else Spread(math.nan, math.nan, math.nan, 0)
    return Row(level, case, method, quantity, unit, *_of(spread), fanout, max_load, note, environment)


def _of(spread: Spread) -> tuple[float, float, float, int]:
    return spread.median, spread.q20, spread.q80, spread.samples


def one_line(environment: dict[str, str]) -> str:
    """The environment as it stands in a row."""
    return "; ".join(f"{name}={value}" for name, value in environment.items())


def read(path: Path) -> list[Row]:
    """All rows of a file; none when there is no file.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        names = [column.name for column in fields(Row)]
        if reader.fieldnames != names:
            raise ValueError(f"{path} has the columns {reader.fieldnames}, not {names}")
        types: dict[str, Any] = {column.name: column.type for column in fields(Row)}
        return [Row(**{name: types[name](text) for name, text in line.items()}) for line in reader]


def write(path: Path, new: Iterable[Row]) -> list[Row]:
    """Put rows into a file, in the place of those with the same key; all rows of the file."""
    rows = {old.key: old for old in read(path)} | {fresh.key: fresh for fresh in new}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(column.name for column in fields(Row))
        for one in rows.values():
            writer.writerow(_short(value) for value in astuple(one))
    partial.replace(path)
    return list(rows.values())


def _short(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value
