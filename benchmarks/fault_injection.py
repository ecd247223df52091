"""Nothing is lost when training is killed: kill a run again and again, compare with one that never was.

    python benchmarks/fault_injection.py [--kills 30] [--seed 0] [--folder DIR]

A small GPT with Expert Threshold routing trains on CPU processes (gloo, EP, distributed optimizer) to the
end: the reference. The same command then trains the victim, which is killed at random moments and started
again until the kills are spent and the end is reached. After every life all that it left is compared with the
reference to the bit: trace records, printed losses and gradient norms, and everything in the newest complete
checkpoint. The reference saves after every step, so that each checkpoint of the victim has its counterpart.

The exit status is 1 when anything differed. Results go to benchmarks/results/fault_injection.md.
"""

import argparse
import itertools
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

# Run as a script, whose own folder is on the path and the repository not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.faults.comparison import (
    TRACE_FILE,
    Checkpoint,
    Printed,
    Trace,
    compare_checkpoints,
    compare_printed,
    compare_trace,
    latest_iteration,
    unfinished_checkpoints,
)
from benchmarks.faults.kinds import ENDS_WELL, FINISH, KINDS, Pace, Steps, flags, make_plan, step_line
from benchmarks.faults.life import ROOT, EndedEarly, Life
from benchmarks.faults.report import Row, make_console, print_row, summary, write_report
from benchmarks.small_gpt import SMALL_GPT

SAVE_INTERVAL = 3
ENDING = 120  # seconds; what does not end is killed by torchrun itself after 30
LEAVING = 5  # seconds that other processes may take to end after torchrun

MODEL = [
    *SMALL_GPT,
    *("--moe-router-type", "expert-threshold", "--moe-et-ema-decay", "0.9"),
    *("--eval-interval", "7", "--eval-iters", "1"),
]


@dataclass(frozen=True)
class Settings:
    """What is run."""

    kills: int
    seed: int
    steps: Steps
    folder: Path

    def command(self, folder: Path, *extra: str) -> list[str]:
        """Arguments of torchrun for a run that lives in `folder`."""
        return [
            *("-m", "megatron_et.pretrain_gpt", *MODEL),
            *("--expert-model-parallel-size", str(self.steps.processes)),
            *("--train-iters", str(self.steps.total), "--moe-et-warmup-steps", str(self.steps.warmup)),
            *("--save-interval", str(self.steps.save), "--moe-et-trace-dir", str(folder)),
            *("--load", str(folder), "--save", str(folder), *extra),
        ]


@dataclass(frozen=True)
class Reference:
    """The run that nobody killed."""

    printed: Printed
    trace: dict[int, str]
    folder: Path
    pace: Pace


def run_reference(settings: Settings) -> Reference:
    """Train to the end in one life."""
    folder, total = settings.folder / "reference", settings.steps.total
    log = settings.folder / "logs" / "reference.log"
    with Life(settings.command(folder, "--save-interval", "1"), settings.steps.processes, log) as life:
        life.wait_for(step_line(total))
        if life.wait(ENDING) != 0:
            raise SystemExit(f"fault_injection: the reference run failed, see {log}")
        output, launched = life.output, life.started
    printed, trace = Printed.parse(output), Trace.read(folder / TRACE_FILE)
    complete = list(range(1, total + 1))
    if sorted(printed.losses) != complete or [step for step, _ in trace.records] != complete:
        raise SystemExit(f"fault_injection: the reference run lacks steps, see {log}")
    return Reference(printed, dict(trace.records), folder, measure_pace(output, launched))


def measure_pace(output: str, launched: datetime) -> Pace:
    """Read off the output of an uninterrupted run."""
    began, done = _stamps("saving checkpoint at", output), _stamps("successfully saved", output)
    saves = [(end - begin).total_seconds() for begin, end in zip(began, done, strict=True)]
    steps = [float(ms) / 1000 for ms in re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", output)]
    return Pace(
        startup=(_stamps("iteration", output)[0] - launched).total_seconds(),
        step=statistics.median(steps),
        first_save=saves[0],
        save=statistics.median(saves[1:]),
    )


def _stamps(text: str, output: str) -> list[datetime]:
    """Megatron's time stamps before a text."""
    return [datetime.fromisoformat(stamp) for stamp in re.findall(rf"\[([\d-]+ [\d:.]+)\] {text}", output)]


def run_life(row: Row, victim: Path, settings: Settings, reference: Reference, rng: random.Random) -> str:
    """One life of the victim, to its end; its output."""
    plan = make_plan(row.kind, row.start, settings.steps, reference.pace, rng)
    log = settings.folder / "logs" / f"life-{row.number:03d}.log"
    course = row.differences.setdefault("course", [])
    with Life(settings.command(victim, *flags(row.kind, plan)), settings.steps.processes, log) as life:
        try:
            KINDS[row.kind](life, plan)
        except EndedEarly as error:
            course.append(f"{error}; see {log.name}")
        status = life.wait(ENDING)
        row.ended_in = life.seconds_since_signal()
        if status is None:
            course.append(f"hangs: still running {ENDING} s after its end was due")
        elif row.kind in ENDS_WELL and status != 0:
            course.append(f"exit status {status}")
        left = life.left_behind(LEAVING) if status is not None else []
        row.helpers = sum("from multiprocessing" in command for command in left)
        if len(left) > row.helpers:
            course.append(f"{len(left) - row.helpers} ranks still ran {LEAVING} s after torchrun had ended")
        row.launched = life.started
        return life.output


def examine(row: Row, victim: Path, output: str, reference: Reference, steps: Steps, reached: int) -> None:
    """Fill in what a life did, and compare all that it left with the reference.

    Args:
        row: its row, kind and start known.
        victim: its folder.
        output: what it printed.
        reference: the uninterrupted run.
        steps: the shape of both.
        reached: the last step of all lives before.
    """
    printed = Printed.parse(output)
    if printed.losses:
        row.came_back = (_stamps("iteration", output)[0] - row.launched).total_seconds()
        row.last, row.steps = max(printed.losses), len(printed.losses)
        row.repeated = sum(step <= reached for step in printed.losses)
    row.phase = steps.phase(row.last)
    try:
        row.saved = latest_iteration(victim)
    except ValueError as error:
        row.differences["course"].append(f"the file that names the latest checkpoint is broken: {error}")
    trace = Trace.read(victim / TRACE_FILE)
    row.torn_line = trace.unfinished
    begun = {int(i) for i in re.findall(r"saving checkpoint at iteration +(\d+)", output)}
    row.unfinished = [i for i in unfinished_checkpoints(victim) if i in begun]
    row.differences["course"] += check_course(row, printed, output, steps.save)
    row.differences["trace"] = compare_trace(reference.trace, trace, row.saved)
    row.differences["losses"] = compare_printed(reference.printed, printed, row.start)
    if row.saved > 0:
        row.differences |= compare_saved(victim, reference.folder, row.saved)


def check_course(row: Row, printed: Printed, output: str, save_interval: int) -> list[str]:
    """Whether it resumed where it should have, and no complete checkpoint was lost."""
    course = []
    loaded = re.search(r"successfully loaded checkpoint from .* at iteration (\d+)", output)
    if loaded and int(loaded.group(1)) != row.start:
        course.append(f"resumed from {loaded.group(1)}, the newest checkpoint was {row.start}")
    if printed.losses and min(printed.losses) != row.start + 1:
        course.append(f"went on with step {min(printed.losses)}, its checkpoint was of step {row.start}")
    said = re.findall(r"successfully saved checkpoint from iteration +(\d+)", output)
    # A step is logged only after the checkpoint before it is complete.
    due = 0 if row.last is None else (row.last - 1) // save_interval * save_interval
    complete = max([row.start, due, *map(int, said)])
    if row.saved < complete:
        course.append(f"checkpoint {complete} was complete, but {row.saved} is named as the latest")
    if row.kind in ENDS_WELL and row.lost > 0:
        course.append(f"ended in order after step {row.last}, but saved {row.saved} only")
    return course


def compare_saved(victim: Path, reference: Path, iteration: int) -> dict[str, list[str]]:
    """Both runs' checkpoints of an iteration."""
    try:
        actual = Checkpoint.read(victim, iteration)
    except Exception as error:  # whatever PyTorch raises: that it cannot be loaded is the finding
        return {"checkpoint": [f"checkpoint {iteration} cannot be loaded: {error!r}"]}
    expected = Checkpoint.read(reference, iteration)
    return {
        "router": compare_checkpoints(expected.router_state(), actual.router_state()),
        "checkpoint": compare_checkpoints(expected, actual),
    }


def run_all(settings: Settings, show: Callable[[Row], None]) -> list[Row]:
    """The reference, then lives until the kills are spent and every victim has reached the end."""
    reference, steps = run_reference(settings), settings.steps
    rng = random.Random(settings.seed)
    waiting = [kind for kind in KINDS if kind != FINISH]
    rows: list[Row] = []
    kills, round_number, reached, start = 0, 1, 0, 0
    for number in itertools.count(1):
        victim = settings.folder / f"victim-{round_number}"
        if start == steps.total or kills == settings.kills:
            kind = FINISH
        else:
            kind = next(kind for kind in waiting if start > 0 or kind != "loading")
            waiting.remove(kind)
            waiting.append(kind)
            kills += 1
        row = Row(number, round_number, kind, start)
        output = run_life(row, victim, settings, reference, rng)
        examine(row, victim, output, reference, steps, reached)
        if kind == FINISH and row.saved != steps.total:
            row.differences["course"].append(f"reached step {row.saved} of {steps.total}")
        rows.append(row)
        show(row)
        start, reached = row.saved, max(reached, row.last or 0)
        if kind == FINISH:
            if kills == settings.kills or row.sentences:
                return rows
            round_number, start, reached = round_number + 1, 0, 0
    return rows


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--iterations", type=int, default=60, help=f"steps, a multiple of {SAVE_INTERVAL}")
    parser.add_argument("--processes", type=int, default=2, help="the size of EP too: 1, 2, 4 or 8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for runs and logs; new, kept (default: temporary)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    if options.iterations % SAVE_INTERVAL or options.iterations < 2 * SAVE_INTERVAL:
        parser.error(f"--iterations is {options.iterations}: not a multiple of {SAVE_INTERVAL}, 6 or more")
    if options.folder is not None and options.folder.exists() and any(options.folder.iterdir()):
        parser.error(f"--folder {options.folder} is not empty")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; the exit status."""
    options = parse_arguments(arguments)
    # So that ending this script ends the run that it is watching.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="fault-injection-"))
    # Expert Choice for a third of the run: kills fall before, at and after the switch.
    steps = Steps(options.iterations, options.iterations // 3, SAVE_INTERVAL, options.processes)
    console = make_console()
    settings = Settings(options.kills, options.seed, steps, folder.resolve())
    rows = run_all(settings, lambda row: print_row(console, row))
    run = {
        "processes": f"{steps.processes}, EP={steps.processes}, gloo",
        "steps": f"{steps.total}, {steps.warmup} of them warm-up, a checkpoint every {steps.save}",
        "seed": str(options.seed),
    }
    report = options.output / "fault_injection.md"
    write_report(report, rows, run)
    console.print(f"\n[bold]{summary(rows)}[/]\n{report}")
    differed = any(row.sentences for row in rows)
    if differed:
        console.print(f"runs and logs are kept in {folder}")
    elif options.folder is None:
        shutil.rmtree(folder)
    return int(differed)


if __name__ == "__main__":
    sys.exit(main())
