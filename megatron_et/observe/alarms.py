"""Alarms: rules that hold (rules.py), from when to when, and how they are told.

`Monitor` is fed with one logged step after the other, in training, by `megatron-et report` and by
`megatron-et watch`.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from megatron_et.observe.rules import PATIENCE, RULES, WINDOW, Observation, Window, listed

CALM = 2 * PATIENCE
"""Logged steps in a row without its rule that end it: a single better step interrupts a rule for
PATIENCE of them."""


@dataclass(frozen=True)
class Alarm:
    """One rule that holds, or held, in one layer."""

    rule: str
    layer: int
    experts: list[int]
    """Those concerned; empty: the layer as a whole."""
    since: int
    """First of the logged steps that made it."""
    until: int | None
    """Logged step at which its rule had not held for CALM logged steps; None: it is on."""
    seen: str
    """What was seen, with values and units, the last time that the rule held."""
    remedy: str


@dataclass
class _Course:
    """A rule in a layer, from its first finding on."""

    alarm: Alarm
    on: bool
    quiet: int


class Monitor:
    """All alarms of a run; feed it with its logged steps in ascending order."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.past: list[Alarm] = []
        """Alarms that have ended, by their end."""
        self._window: deque[Observation] = deque(maxlen=WINDOW)
        self._courses: dict[tuple[str, int], _Course] = {}

    @property
    def active(self) -> list[Alarm]:
        """Alarms that are on, rule by rule, layer by layer."""
        order = [rule.name for rule in RULES]
        on = [course.alarm for course in self._courses.values() if course.on]
        return sorted(on, key=lambda alarm: (order.index(alarm.rule), alarm.layer))

    def observe(self, now: Observation) -> list[Alarm]:
        """Take in a logged step and return the alarms that start with it.

        Other layers or experts than before, or a step that is not later, begin a new history. A step without
        tokens says nothing and is passed over.
        """
        if now.tokens == 0:
            return []
        if self._window and not _continues(self._window[-1], now):
            self._begin()
        self._window.append(now)
        window = Window(list(self._window))
        found = {
            (rule.name, now.layers[finding.row]): (rule, finding)
            for rule in RULES
            for finding in rule.find(window)
        }
        started = []
        for key, (rule, finding) in found.items():
            course = self._courses.get(key)
            since = course.alarm.since if course else finding.since
            alarm = Alarm(rule.name, key[1], finding.experts, since, None, finding.seen, rule.remedy)
            was_on = course is not None and course.on
            on = was_on or now.step - since >= rule.lasting
            self._courses[key] = _Course(alarm, on, quiet=0)
            if on and not was_on:
                started.append(alarm)
        for key in [known for known in self._courses if known not in found]:
            self._rest(key, now.step)
        return started

    def _rest(self, key: tuple[str, int], step: int) -> None:
        """One logged step in which the rule did not hold in the layer."""
        course = self._courses[key]
        course.quiet += 1
        if not course.on or course.quiet >= CALM:
            del self._courses[key]
            if course.on:
                self.past.append(replace(course.alarm, until=step))


def _continues(last: Observation, now: Observation) -> bool:
    return now.step > last.step and now.layers == last.layers and now.usage_LE.shape == last.usage_LE.shape


# --- words ---


def grouped(alarms: Iterable[Alarm]) -> list[list[Alarm]]:
    """Alarms of one rule together: they have one remedy, and often one cause."""
    groups: dict[str, list[Alarm]] = {}
    for alarm in alarms:
        groups.setdefault(alarm.rule, []).append(alarm)
    return list(groups.values())


def headline(group: Sequence[Alarm]) -> str:
    """'load off target in layers 3, 4, since step 120', of alarms of one rule."""
    layers = listed(sorted({alarm.layer for alarm in group}), "layer")
    since = min(alarm.since for alarm in group)
    ends = [alarm.until for alarm in group if alarm.until is not None]
    steps = f"steps {since} to {max(ends)}" if len(ends) == len(group) else f"since step {since}"
    return f"{group[0].rule} in {layers}, {steps}"


def details(group: Sequence[Alarm], most: int = 8) -> list[str]:
    """What was seen in each layer, of alarms of one rule."""
    more = [f"and {len(group) - most} more"] if len(group) > most else []
    return [f"layer {alarm.layer}: {alarm.seen}" for alarm in group[:most]] + more
