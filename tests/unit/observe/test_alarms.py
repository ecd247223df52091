"""Alarms: none on a healthy run, each rule on its cause, and what they say.

S logged steps, L layers, E experts.
"""

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_et.observe import alarms
from megatron_et.observe.alarms import CALM, Alarm, Monitor
from megatron_et.observe.rules import PATIENCE, RULES, SWITCH, WINDOW, Observation, Row
from megatron_et.observe.trace import parse_record
from tests.simulated import observations

pytestmark = pytest.mark.megatron_free

HERE = Path(__file__).parent


def seen(
    step: int,
    load_E: Sequence[float] = (1.0,) * 4,
    *,
    phase: str = "threshold",
    tokens: int = 4096,
    gap: float = 0.0,
    at_bound: float = 0.0,
    restarted: int = 0,
    layers: int = 1,
) -> Observation:
    """A step with these loads over the target, topk 1, in every one of the layers 2, 3, ..."""
    E = len(load_E)
    # On alternate sides unless told otherwise, as a threshold that follows has them.
    gap_E = np.full(E, gap or 0.01 * (-1) ** step)
    row = Row(np.array(load_E) / E, np.zeros(E), gap_E, np.full(E, at_bound), restarted)
    return Observation.of(step, phase, tokens, 1, {2 + n: row for n in range(layers)})


def run(steps: Iterable[Observation]) -> tuple[Monitor, list[Alarm]]:
    """The monitor at the end, and every alarm that started."""
    monitor = Monitor()
    return monitor, [alarm for step in steps for alarm in monitor.observe(step)]


def rules(started: Iterable[Alarm]) -> list[str]:
    return [alarm.rule for alarm in started]


# --- no false alarm ---


@given(
    E=st.integers(1, 12),
    expected=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
    steps=st.integers(1, 60),
    warmup=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_loads_drawn_at_target_raise_no_alarm(
    E: int, expected: int, seed: int, steps: int, warmup: int
) -> None:
    """However few tokens an expert expects (k = `expected`, drawn by chance); cutoffs scatter around
    thresholds."""
    rng, tokens = np.random.default_rng(seed), E * expected
    drawn = []
    for step in range(1, steps + 1):
        phase = "warmup" if step <= warmup else "threshold"
        usage_E = np.full(E, 1 / E) if step <= warmup else rng.binomial(tokens, 1 / E, E) / tokens
        row = Row(usage_E, rng.normal(size=E), rng.normal(size=E), np.zeros(E), 0)
        drawn.append(Observation.of(step, phase, tokens, 1, {2: row, 3: row}))
    assert run(drawn)[1] == []


@pytest.mark.parametrize("uneven", [0.0, 0.15], ids=["even", "uneven"])
def test_a_simulated_healthy_run_raises_no_alarm(uneven: float) -> None:
    """Through the package's own rule, statistics and EMA: warm-up, anneal, thresholds with capacity."""
    settings_ = {"warmup_steps": 30, "warmup_anneal_steps": 10, "ema_decay": 0.9, "capacity_factor": 0.5}
    monitor, started = run(observations(120, uneven=uneven, layers=(2, 3), E=16, T=1024, **settings_))
    assert (started, monitor.active, monitor.past) == ([], [], [])


def test_a_real_healthy_run_raises_no_alarm() -> None:
    """The quickstart from step 155 on: real text, 4 k tokens a batch, loads swing by 30 % a step."""
    with gzip.open(HERE / "quickstart_trace.jsonl.gz", "rt") as file:
        steps = [parse_record(json.loads(line)).observation() for line in file]
    assert {step.phase for step in steps} == {"warmup", "threshold"}
    assert max(float(step.usage_LE.max()) for step in steps) > 1.9 / 16
    assert run(steps)[1] == []


# --- each rule on its cause ---


def test_a_dead_expert() -> None:
    monitor, started = run(seen(10 * n, (0.0, 1.3, 1.3, 1.4)) for n in range(1, PATIENCE + 1))
    dead = Alarm(
        "dead expert",
        2,
        [0],
        10,
        None,
        "expert 0: no token, target 25 % of tokens, 10 logged steps, 10 to 100",
        RULES[0].remedy,
    )
    assert started == monitor.active == [dead]


def test_a_pool_of_one_token_an_expert_needs_twenty_steps_to_call_it_dead() -> None:
    steps = [seen(n, (0.0, 1.0), tokens=2) for n in range(1, 21)]
    assert run(steps[:-1])[1] == []
    assert rules(run(steps)[1]) == ["dead expert"]


def test_loads_off_target_name_the_worst_expert_first() -> None:
    monitor, _ = run(seen(n, (1.6, 0.1, 1.0, 1.3)) for n in range(1, PATIENCE + 1))
    (alarm,) = monitor.active
    assert (alarm.rule, alarm.experts, alarm.since) == ("load off target", [1, 0], 1)
    assert alarm.seen.startswith("experts 1, 0: load 0.10 to 1.60 times the target of 25 % of tokens")


def test_a_load_on_both_sides_of_the_target_is_noise() -> None:
    steps = [seen(n, (1.6, 0.4) if n % 2 else (0.4, 1.6)) for n in range(1, 50)]
    assert run(steps)[1] == []


@pytest.mark.parametrize(("load", "fires"), [(1.3, True), (0.75, True), (1.15, False), (0.85, False)])
def test_fanout_off_target(load: float, fires: bool) -> None:
    _, started = run(seen(n, (load,) * 4) for n in range(1, PATIENCE + 1))
    assert rules(started) == (["fan-out off target"] if fires else [])
    if fires:
        assert started[0].experts == []
        assert f"mean fan-out {load:.3g} experts per token, target 1" in started[0].seen


def test_warmup_and_anneal_are_let_off() -> None:
    steps = [seen(n, (1.9,) * 4, phase="warmup", at_bound=1.0) for n in range(1, 40)]
    steps += [seen(n, (1.9,) * 4, phase="anneal", at_bound=1.0) for n in range(40, 80)]
    assert run(steps)[1] == []


@pytest.mark.parametrize("phase", ["anneal", "threshold"])
def test_thresholds_drifting(phase: str) -> None:
    steps = [seen(n, (0.85,) * 4, gap=-0.01 * n, phase=phase) for n in range(1, WINDOW + 1)]
    assert run(steps[:-1])[1] == []
    (alarm,) = run(steps)[1]
    assert (alarm.rule, alarm.experts, alarm.since) == ("thresholds drifting", [0, 1, 2, 3], 1)
    assert (
        "4 of 4 experts always lay below their thresholds and of 0 above, by 0.055 and then 0.155"
        in alarm.seen
    )
    assert "their load is off by 15 % of the target; 20 logged steps, 1 to 20" in alarm.seen


def test_a_lag_that_costs_no_load_is_no_drift() -> None:
    """Of a huge batch, whose cutoffs hardly scatter, any lag shows; what counts is the load."""
    assert run(seen(n, (0.95,) * 4, gap=-0.001) for n in range(1, 3 * WINDOW))[1] == []


def test_capacity_hit_too_often() -> None:
    steps = [seen(n, at_bound=0.4) for n in range(1, PATIENCE + 1)]
    (alarm,) = run(steps)[1]
    assert alarm.rule == "capacity hit too often"
    assert alarm.seen.startswith("a capacity bound decided 40 % of the loads")
    assert run([*steps[1:], seen(11, at_bound=0.1)])[1] == []


def test_the_guard_may_restart_once_but_not_on_and_on() -> None:
    # One restart is told of for 100 batches.
    once = [seen(n, restarted=int(50 <= n < 150)) for n in range(0, 600, 10)]
    assert run(once)[1] == []
    often = [seen(n, restarted=3) for n in range(50, 360, 10)]
    assert run(often[:-1])[1] == []
    (alarm,) = run(often)[1]
    assert (alarm.rule, alarm.since) == ("guard restarting often", 50)
    assert "3 of 4 within 100 batches, at step 350" in alarm.seen


def test_a_warmup_that_was_too_short() -> None:
    steps = [seen(n, phase="warmup") for n in range(1, 6)]
    steps += [seen(n, (3.0, 2.0, 0.5, 1.5), gap=0.2) for n in range(6, 6 + SWITCH)]
    (alarm,) = run(steps)[1]
    assert (alarm.rule, alarm.since) == ("warm-up too short", 6)
    assert "off by 100 % of the target on average, and cutoffs 0.2 logits from" in alarm.seen
    # Without having seen the warm-up nothing is known about it.
    assert run(steps[5:])[1] == []


def drift(step: int, logits_TE: torch.Tensor) -> torch.Tensor:
    """Falls by 0.03 sd a batch."""
    return logits_TE - 0.03 * step


def jump(step: int, logits_TE: torch.Tensor) -> torch.Tensor:
    """Expert 3 rises by 1 sd at step 60."""
    logits_TE[:, 3] += float(step >= 60)
    return logits_TE


def wobble(step: int, logits_TE: torch.Tensor) -> torch.Tensor:
    """Every tenth batch all logits change their place."""
    return logits_TE + 2.0 * (step // 10 % 2)


SIMULATED = {
    "lag": (
        {"move": drift, "ema_decay": 0.99, "warmup_steps": 40},
        {"fan-out off target", "thresholds drifting", "load off target", "warm-up too short"},
    ),
    "one expert jumps": ({"move": jump, "ema_decay": 0.999, "warmup_steps": 20}, {"load off target"}),
    "capacity hides a lag": (
        {"move": drift, "ema_decay": 0.99, "warmup_steps": 40, "capacity_factor": 0.05},
        {"capacity hit too often"},
    ),
    "guard at work all the time": (
        {"move": wobble, "ema_decay": 0.999, "warmup_steps": 20, "guard": 0.5},
        {"guard restarting often"},
    ),
}


@pytest.mark.parametrize(("how", "expected"), SIMULATED.values(), ids=SIMULATED)
def test_simulated_trouble(how: dict[str, object], expected: set[str]) -> None:
    """Causes, not numbers: through the package's own rule, statistics and EMA."""
    steps = 420 if "guard" in how else 120
    _, started = run(observations(steps, T=512, **how))  # type: ignore[arg-type]
    assert set(rules(started)) == expected
    if how["move"] is jump:
        assert all(alarm.experts == [3] for alarm in started)


def test_every_rule_was_seen_to_fire_here() -> None:
    """A rule without a test above is no rule."""
    text = Path(__file__).read_text()
    assert all(text.count(f'"{rule.name}"') >= 2 for rule in RULES)


# --- the course of an alarm ---


def test_an_alarm_starts_once_and_ends_when_its_cause_is_gone_for_a_while() -> None:
    bad, good = (1.8, 1.0, 0.7, 0.5), (1.0,) * 4
    loads = [bad] * 15 + [good] * 3 + [bad] * 12 + [good] * CALM
    steps = [seen(n, load) for n, load in enumerate(loads, start=1)]
    monitor, started = run(steps[:-1])
    assert rules(started) == ["load off target"]
    assert monitor.active[0].since == 1
    assert monitor.past == []
    assert monitor.observe(steps[-1]) == []
    assert monitor.active == []
    (past,) = monitor.past
    assert (past.since, past.until, past.experts) == (1, len(loads), [0])
    # It can start again.
    _, again = run([*steps, *(seen(n, bad) for n in range(100, 120))])
    assert [alarm.since for alarm in again] == [1, 100]


def test_a_resume_from_an_earlier_step_and_another_model_start_afresh() -> None:
    steps = [seen(n, (1.8, 0.2)) for n in range(1, PATIENCE + 1)]
    monitor, _ = run(steps)
    assert monitor.active
    assert monitor.observe(seen(PATIENCE, (1.8, 0.2))) == []
    assert (monitor.active, monitor.past) == ([], [])
    monitor, _ = run(steps)
    monitor.observe(seen(PATIENCE + 1, layers=2))
    assert monitor.active == []


def test_a_step_without_tokens_is_passed_over() -> None:
    steps = [seen(n, (0.0,) * 4, tokens=0) for n in range(1, 40)]
    assert run(steps)[1] == []
    loads = [seen(n, (1.8, 0.2)) for n in range(1, PATIENCE + 1)]
    assert rules(run([*loads[:4], replace(loads[4], step=4, tokens=0), *loads[4:]])[1])


def test_unknown_thresholds_and_cutoffs_raise_no_alarm_and_no_warning() -> None:
    row = Row(np.full(4, 0.25), np.full(4, np.nan), np.full(4, np.nan), np.zeros(4), 0)
    steps = [
        Observation.of(n, "warmup" if n < 3 else "threshold", 64, 1, {2: row}) for n in range(1, WINDOW + 5)
    ]
    assert run(steps)[1] == []
    assert run(replace(step, cutoff_LE=step.cutoff_LE + np.inf) for step in steps)[1] == []
    # At the switch, with loads that are off and no cutoff to tell of.
    far = replace(row, usage_E=np.array([0.9, 0.0, 0.05, 0.05]))
    steps = [
        Observation.of(n, "warmup" if n < 3 else "threshold", 64, 1, {2: row if n < 3 else far})
        for n in range(1, 3 + SWITCH)
    ]
    assert rules(run(steps)[1]) == ["warm-up too short"]


def test_layers_are_judged_one_by_one() -> None:
    def step(n: int) -> Observation:
        good, bad = seen(n), seen(n, (1.9, 0.9, 0.6, 0.6))
        layers = {2: good, 5: bad, 9: good}
        rows = {
            number: Row(one.usage_LE[0], one.threshold_LE[0], one.cutoff_LE[0], one.at_bound_LE[0], 0)
            for number, one in layers.items()
        }
        return Observation.of(n, "threshold", 4096, 1, rows)

    assert [alarm.layer for alarm in run(map(step, range(1, 20)))[1]] == [5]


# --- words ---


def test_alarms_of_one_rule_share_a_headline() -> None:
    _, started = run(seen(n, (1.8, 0.2), layers=9) for n in range(1, PATIENCE + 1))
    (group,) = alarms.grouped(started)
    assert alarms.headline(group) == "load off target in layers 2, 3, 4, 5, 6, 7 and 3 more, since step 1"
    assert alarms.headline(group[:1]) == "load off target in layer 2, since step 1"
    assert [line.split(":")[0] for line in alarms.details(group)] == [
        *(f"layer {n}" for n in range(2, 10)),
        "and 1 more",
    ]
    past = [replace(alarm, until=50 + alarm.layer) for alarm in group[:2]]
    assert alarms.headline(past) == "load off target in layers 2, 3, steps 1 to 53"


def test_remedies_name_flags_that_exist() -> None:
    known = (HERE.parents[2] / "docs" / "flags.md").read_text()
    for rule in RULES:
        flags = {word.strip(";,:.()") for word in rule.remedy.split() if word.startswith("--")}
        assert flags, rule.name
        assert all(f"`{flag}`" in known for flag in flags)
