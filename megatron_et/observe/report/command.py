"""`megatron-et report`: numbers, tables, plots and alarms of a run, from its TensorBoard files and trace."""

import argparse
import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_et.observe.trace import ReportError

if TYPE_CHECKING:
    from megatron_et.observe.report.summary import Summary


ALARM_STATUS = 3


@dataclass(frozen=True)
class Report:
    """What `make_report` made: the numbers, and the files that hold them."""

    summary: "Summary"
    pngs: list[Path]
    json: Path
    markdown: Path
    html: Path


def make_report(
    run: Path,
    out: Path | None = None,
    *,
    tensorboard_dir: Path | None = None,
    trace: Path | None = None,
    last_steps: int | None = None,
) -> Report:
    """Write PNGs, summary.json, summary.md and report.html of a run into `out` (default: RUN/report).

    Args:
        run: folder of the run; event files and et_trace.jsonl are looked for in it and below.
        out: folder for the results, created where needed; files of an earlier report are overwritten.
        tensorboard_dir: look for event files here instead.
        trace: read this trace instead.
        last_steps: logged steps that the layer table averages (default: the threshold phase's last 20 %).

    Raises:
        ReportError: nothing to report, a malformed trace, a path that does not exist, last_steps below 1, or
            a package of the `report` extra that is not installed.
    """
    try:
        # Here, not at the top: `--help` and the other commands do not need matplotlib and tensorboard.
        from megatron_et.observe.report import page, plots, table
        from megatron_et.observe.report.read import read_run
        from megatron_et.observe.report.summary import layer_histories, summarise
    except ImportError as error:
        raise ReportError(f"{error.name} is not installed: pip install 'megatron-et[report]'") from error

    if last_steps is not None and last_steps < 1:
        raise ReportError(f"--last-steps is {last_steps}: the table needs at least 1 logged step")
    data = read_run(run, tensorboard_dir, trace)
    histories = layer_histories(data)
    summary = summarise(data, histories, last_steps)
    out = out or run / "report"
    out.mkdir(parents=True, exist_ok=True)
    pngs = plots.draw(data, histories, summary, out)
    report = Report(summary, pngs, out / "summary.json", out / "summary.md", out / "report.html")
    text = json.dumps(_finite(dataclasses.asdict(summary)), indent=2, allow_nan=False)
    report.json.write_text(text + "\n", encoding="utf-8")
    report.markdown.write_text(table.markdown(summary), encoding="utf-8")
    report.html.write_text(page.page(summary, data.tensorboard, pngs, text), encoding="utf-8")
    return report


def print_report(report: Report) -> None:
    """Header, layer table and the paths of the files, on standard output."""
    from megatron_et.observe.report.table import print_summary, stdout_console

    console = stdout_console()
    print_summary(report.summary, console)
    for path in (*report.pngs, report.markdown, report.json, report.html):
        console.print(str(path), markup=False, soft_wrap=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `megatron-et report`."""
    parser.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="folder of the run; TensorBoard files and et_trace.jsonl are looked for in it and below",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the results (default: RUN/report)"
    )
    parser.add_argument(
        "--tensorboard-dir", type=Path, metavar="DIR", help="look for TensorBoard files here instead"
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="read this trace instead")
    parser.add_argument(
        "--last-steps",
        type=int,
        metavar="N",
        help="logged steps of the threshold phase that the layer table averages (default: the last 20 %%)",
    )
    parser.add_argument(
        "--fail-on-alarm",
        action="store_true",
        help=f"exit with status {ALARM_STATUS} when an alarm is on at the last logged step",
    )


def run(args: argparse.Namespace) -> int:
    """Make and print the report.

    Returns:
        0; 2 with one sentence on stderr when that is impossible; ALARM_STATUS if asked to and an alarm is on.
    """
    try:
        report = make_report(
            args.run,
            args.out,
            tensorboard_dir=args.tensorboard_dir,
            trace=args.trace,
            last_steps=args.last_steps,
        )
    except (ReportError, OSError) as error:
        print(f"megatron-et report: {error}", file=sys.stderr)
        return 2
    print_report(report)
    if not args.fail_on_alarm:
        return 0
    if report.summary.alarms is None:
        print("megatron-et report: --fail-on-alarm needs a trace (--moe-et-trace-dir)", file=sys.stderr)
        return 2
    return ALARM_STATUS if report.summary.alarms else 0


def _finite(value: Any) -> Any:
    """The same structure with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
