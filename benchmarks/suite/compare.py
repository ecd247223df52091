"""Two result files side by side: what became faster or slower, and what is only noise."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.suite.results import Row


@dataclass(frozen=True)
class Change:
    """One quantity in both files."""

    old: Row
    new: Row

    @property
    def ratio(self) -> float:
        """New over old median."""
        return self.new.median / self.old.median if self.old.median else float("nan")

    @property
    def beyond_noise(self) -> bool:
        """The 20 % to 80 % ranges do not touch."""
        return self.new.q20 > self.old.q80 or self.new.q80 < self.old.q20


def changes(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """What both files measured."""
    before = {row.key: row for row in old if row.measured}
    return [Change(before[row.key], row) for row in new if row.measured and row.key in before]


def text(found: Sequence[Change]) -> str:
    """A table, largest change beyond noise first, and what differs in the environments."""
    if not found:
        return "nothing was measured in both files"
    ordered = sorted(found, key=lambda change: (not change.beyond_noise, -abs(change.ratio - 1.0)))
    width = max(len(" ".join(change.new.key)) for change in found)
    lines = [f"{'':{width}} {'old':>10} {'new':>10} {'new/old':>8}"]
    for change in ordered:
        noise = "" if change.beyond_noise else "  within noise"
        key = " ".join(change.new.key)
        lines.append(
            f"{key:{width}} {change.old.median:10.4g} {change.new.median:10.4g} {change.ratio:8.3f}{noise}"
        )
    places = {change.old.environment for change in found}, {change.new.environment for change in found}
    if places[0] != places[1]:
        lines += ["", "the environments differ:"]
        lines += [f"  old: {one}" for one in sorted(places[0])] + [
            f"  new: {one}" for one in sorted(places[1])
        ]
    return "\n".join(lines)
