"""The ways in which a training run can end too early, and when."""

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from .life import Life

LONGEST_LIFE = 5  # steps until the kill: at least one checkpoint further on average, kills all over the run
LOADING = 0.5  # seconds from the first line about loading to the first step, on two idle cores
FINISH = "finish"


@dataclass(frozen=True)
class Pace:
    """How long things take when nothing is killed, in seconds."""

    startup: float
    """From the launch to the first step."""
    step: float
    first_save: float
    """The first checkpoint of a process starts helpers and takes longer than all others."""
    save: float


@dataclass(frozen=True)
class Plan:
    """When and whom to kill."""

    step: int
    """The step, or the checkpoint, after whose log line it happens."""
    delay: float
    """Seconds after that line (after the launch for `startup`)."""
    rank: int


def step_line(step: int | str) -> str:
    """Pattern of the log line of a step (a number, or a pattern of its own), to its end."""
    return rf" iteration +{step}/ .*grad norm"


def make_plan(kind: str, start: int, steps: "Steps", pace: Pace, rng: random.Random) -> Plan:
    """A random moment in a life that starts from checkpoint `start`."""
    rank = rng.randrange(steps.processes)
    if kind == "checkpoint":
        saves = range(start // steps.save + 1, steps.total // steps.save + 1)[:2]
        save = rng.choice(saves)
        longest = pace.first_save if save == saves[0] else pace.save
        return Plan(steps.save * save, rng.uniform(0.0, longest), rank)
    longest = {"startup": pace.startup, "loading": LOADING}.get(kind, pace.step)
    last = min(start + LONGEST_LIFE, steps.total)
    step = rng.randint(min(start + 1, last), last)
    if start < steps.warmup <= last:  # at the switch of the routing when that is near
        step = min(last, steps.warmup + rng.randint(0, 1))
    return Plan(step, rng.uniform(0.0, longest), rank)


@dataclass(frozen=True)
class Steps:
    """The shape of the run."""

    total: int
    warmup: int
    save: int
    """Steps from checkpoint to checkpoint."""
    processes: int

    def phase(self, last: int | None) -> str:
        """Where in the training a run was after its last step; None if it had none."""
        if last is None:
            return "start-up"
        if last in (self.warmup, self.warmup + 1):
            return "switch"
        return "warm-up" if last < self.warmup else "threshold"


def flags(kind: str, plan: Plan) -> list[str]:
    """Megatron's flags that belong to a kind."""
    if kind in ("sigterm", "sigterm-launcher"):
        return ["--exit-signal-handler"]
    return ["--exit-interval", str(plan.step)] if kind == "exit-interval" else []


def _between(life: Life, plan: Plan) -> None:
    life.wait_for(step_line(plan.step))
    life.kill_all()


def _during(life: Life, plan: Plan) -> None:
    life.wait_for(step_line(plan.step))
    time.sleep(plan.delay)
    life.kill_all()


def _one_rank(life: Life, plan: Plan) -> None:
    life.wait_for(step_line(plan.step))
    time.sleep(plan.delay)
    life.signal_workers(signal.SIGKILL, lambda rank: rank == plan.rank)


def _checkpoint(life: Life, plan: Plan) -> None:
    life.wait_for(rf"saving checkpoint at iteration +{plan.step} to")
    time.sleep(plan.delay)
    life.kill_all()


def _startup(life: Life, plan: Plan) -> None:
    life.wait_for(step_line(r"\d+"), within=plan.delay)  # not later, where this start is a fast one
    life.kill_all()


def _loading(life: Life, plan: Plan) -> None:
    life.wait_for("loading distributed checkpoint from")
    time.sleep(plan.delay)
    life.kill_all()


def _sigterm(life: Life, plan: Plan) -> None:
    life.wait_for(step_line(plan.step))
    time.sleep(plan.delay)
    life.signal_workers(signal.SIGTERM)


def _sigterm_launcher(life: Life, plan: Plan) -> None:
    life.wait_for(step_line(plan.step))
    time.sleep(plan.delay)
    life.signal_launcher(signal.SIGTERM)


def _by_itself(life: Life, _: Plan) -> None:
    life.wait_for(r"exiting program|on test set +\|")


#: Kind -> what makes it happen; the order is that of the rotation.
KINDS: dict[str, Callable[[Life, Plan], None]] = {
    "checkpoint": _checkpoint,
    "one-rank": _one_rank,
    "sigterm": _sigterm,
    "during": _during,
    "loading": _loading,
    "exit-interval": _by_itself,
    "between": _between,
    "sigterm-launcher": _sigterm_launcher,
    "startup": _startup,
    FINISH: _by_itself,
}
WHAT = {
    "checkpoint": "SIGKILL to all while a checkpoint is being written",
    "one-rank": "SIGKILL to one rank within a step; torchrun ends the others",
    "sigterm": "SIGTERM to all ranks, --exit-signal-handler: saves and ends by itself",
    "during": "SIGKILL to all within a step",
    "loading": "SIGKILL to all while the checkpoint is being loaded",
    "exit-interval": "--exit-interval: saves and ends by itself",
    "between": "SIGKILL to all right after a step's log line",
    "sigterm-launcher": "SIGTERM to torchrun alone, as a scheduler does, --exit-signal-handler",
    "startup": "SIGKILL to all before the first step",
    FINISH: "not killed: runs to the end",
}
ASKED_TO_SAVE = ("sigterm", "sigterm-launcher", "exit-interval")
ENDS_WELL = ("sigterm", "exit-interval", FINISH)
