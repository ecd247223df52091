"""What Expert Threshold routing costs and needs on 64 to 16,384 GPUs: a model, and checks of it.

    python benchmarks/scale_model.py [--measured FILE.csv] [--output DIR]    # the report: half a minute
    python benchmarks/scale_model.py measure [--scratch DIR] [--output DIR]  # runs for its checks: 15 minutes

The first writes scale_model.csv, .md and two plots from benchmarks/results/scale_measured.csv, which the
second writes. Nothing needs a GPU. The same input gives the same csv.
"""

import argparse
import csv
import sys
from pathlib import Path

# As a script this file has its own folder on the path, not the one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.environment import environment
from benchmarks.faults.life import ROOT
from benchmarks.scale import assumptions, measure, plots, report, tables

DRAWS = 200


def rows_of(measured: list[measure.Measured], hardware: assumptions.Hardware, draws: int) -> list[tables.Row]:
    """Every number of the report."""
    chosen = tables.settings(measured)
    return [
        *tables.shape_rows(),
        *tables.statistics_rows(hardware),
        *tables.sensitivity_rows(hardware),
        *tables.load_rows(chosen, hardware, draws),
        *tables.threshold_rows(),
        *tables.head_room_rows(chosen),
        *tables.capacity_rows(chosen, hardware, draws),
        *tables.check_rows(measured, hardware, draws),
    ]


def write(rows: list[tables.Row], path: Path) -> None:
    """As CSV."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(tables.Row._fields)
        writer.writerows([*row[:-1], f"{row.value:.6g}"] for row in rows)


def main() -> None:
    """Measure, or write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("what", nargs="?", choices=("report", "measure"), default="report")
    parser.add_argument(
        "--measured", type=Path, help="csv of measured numbers (name, value, source) in place of assumed ones"
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        default=ROOT / "runs" / "scale",
        help="where measure keeps its runs; those that are finished are read again",
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    results = options.output / "scale_measured.csv"
    if options.what == "measure":
        measure.write(measure.measure(options.scratch), results)
        return
    entries, hardware = assumptions.read(options.measured)
    measured = measure.read(results)
    rows = rows_of(measured, hardware, DRAWS)
    write(rows, options.output / "scale_model.csv")
    environments = {
        "Report": environment(),
        "Measured runs": {row.quantity: row.value for row in measured if row.kind == "environment"},
    }
    (options.output / "scale_model.md").write_text(report.write(rows, entries, environments))
    get = report.Rows(rows)
    plots.statistics(get, options.output / "scale_statistics.png")
    plots.loads(get, options.output / "scale_loads.png")


if __name__ == "__main__":
    main()
