"""How the runner of upstream's tests classifies, combines and judges; no checkout needed."""

import json
from pathlib import Path

import pytest

from tests.upstream import run
from tests.upstream.et_conformance import settings, table
from tests.upstream.et_conformance.outcome import Outcome, Summary, combine, judge
from tests.upstream.et_conformance.table import ROWS, Row, find


def started(test: str) -> dict[str, str]:
    return {"test": test, "status": "started"}


def ended(test: str, status: str, message: str = "", *ours: str) -> dict[str, object]:
    return {"test": test, "status": status, "message": message, "ours": list(ours)}


# ---- the table


@pytest.mark.parametrize(
    ("test", "ways"),
    [
        (
            "test_a2a_token_dispatcher.py::TestAlltoAllDispatcher::test_forward_backward[False-1-8]",
            table.WAYS,
        ),
        ("test_routers.py::TestTop2Router::test_router_forward[sigmoid-False]", ("adapted",)),
        ("test_routers.py::TestTop2Router::test_router_forward[sigmoid-True]", ()),
        ("test_routers.py::TestTop2Router::test_router_forward[softmax-False]", ()),
        ("test_routers.py::TestTop2Router::test_token_dropping[False-probs-None]", ("adapted",)),
        ("test_aux_loss.py::TestPaddingMaskAuxLoss::test_padding_mask_with_z_loss[8-1-1]", ("adapted",)),
        ("test_aux_loss.py::TestAuxLoss::test_a2a_dispatcher[8-1-1]", ()),
        ("test_router_replay.py::test_global_set_get_clear_indices", ()),
    ],
)
def test_a_test_finds_its_row(test: str, ways: tuple[str, ...]) -> None:
    row = find(test)
    assert row is not None
    assert row.ways == ways
    assert bool(row.reason) != bool(ways)


def test_brackets_are_no_wildcards() -> None:
    assert table.matches("test_x.py::*[a-b]", "test_x.py::test_y[a-b]")
    assert not table.matches("test_x.py::*[a-b]", "test_x.py::test_ya")
    assert not table.matches("test_x.py::test", "test_x.py::test_y")


def test_every_row_says_something() -> None:
    # A row without ways and reason names a flag that compatibility.py does not refuse any more: the tests
    # behind it may apply now.
    assert [row.pattern for row in ROWS if not row.classified] == []


def test_a_row_has_ways_or_a_reason() -> None:
    with pytest.raises(ValueError, match=r"test_x.*either ways"):
        Row("test_x", ("adapted",), reason="no")


def test_a_refused_flag_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = table.REFUSALS[0]
    flag = rule.flag.split(" / ")[0]
    assert table.both("t", flag=flag).ways == ("unadapted",)
    assert table.router("t", flag=flag).reason == f"{flag} is refused: {rule.why}"
    assert table.refused("t", flag).classified
    monkeypatch.setattr(table, "REFUSALS", table.REFUSALS[1:])
    assert table.both("t", flag=flag).ways == table.WAYS
    assert table.router("t", flag=flag).ways == ("adapted",)
    assert not table.refused("t", flag).classified
    assert find("t", [table.refused("t", flag)]) is None


# ---- ranks and ways


def test_one_outcome_from_all_ranks() -> None:
    outcomes = combine(
        [
            [
                {"collected": ["a", "b", "c", "d", "e"]},
                started("a"),
                ended("a", "passed", "", "Router"),
                started("b"),
                ended("b", "failed", "Timed out waiting 60000ms for recv"),
                started("c"),
                ended("c", "skipped", "needs a multiple of 8 processes, not 2"),
                started("d"),
                ended("d", "passed"),
                started("e"),
            ],
            [
                ended("a", "passed", "", "Dispatcher"),
                ended("b", "failed", "AssertionError: the cause"),
                ended("c", "skipped", "needs a multiple of 8 processes, not 2"),
                started("d"),
                started("e"),
            ],
        ]
    )
    assert outcomes["a"] == Outcome("passed", ours=("Dispatcher", "Router"))
    assert outcomes["b"] == Outcome("failed", "AssertionError: the cause")
    assert outcomes["c"] == Outcome("skipped", "needs a multiple of 8 processes, not 2")
    assert outcomes["d"].status == outcomes["e"].status == "failed"


def test_a_failure_that_plain_megatron_shares_is_not_ours() -> None:
    ours = {name: Outcome("failed", "no cuda") for name in ("shared", "ours", "skipped", "unknown")}
    plain = {"shared": Outcome("failed"), "ours": Outcome("passed"), "skipped": Outcome("skipped")}
    judged = judge("adapted", ours, plain)
    assert {name: outcome.status for name, outcome in judged.items()} == {
        "shared": "upstream",
        "ours": "failed",
        "skipped": "failed",
        "unknown": "failed",
    }


@pytest.mark.parametrize(
    ("way", "built", "status"),
    [
        ("adapted", "ExpertThresholdRouter", "passed"),
        ("adapted", "VariableFanoutAlltoAllTokenDispatcher", "vacuous"),
        ("unadapted", "VariableFanoutAlltoAllTokenDispatcher", "passed"),
        ("unadapted", None, "vacuous"),
    ],
)
def test_a_pass_must_have_built_what_it_tests(way: table.Way, built: str | None, status: str) -> None:
    outcome = Outcome("passed", ours=(built,) if built else ())
    assert judge(way, {"t": outcome}, {})["t"].status == status


# ---- the summary

SUMMARY_ROWS = (
    table.both("a.py::test_both"),
    table.both("a.py::test_broken"),
    table.no("b.py::*", "other"),
)


def summary(**statuses: str) -> Summary:
    outcomes = {f"a.py::test_{name}": Outcome(status, "why") for name, status in statuses.items()}
    return Summary(
        ["a.py::test_both", "a.py::test_broken", "b.py::test_x", "b.py::test_y"],
        {"unadapted": outcomes, "adapted": {"a.py::test_both": Outcome("passed")}},
        SUMMARY_ROWS,
    )


def test_the_table_counts_tests_and_runs() -> None:
    counts = summary(both="passed", broken="upstream").counts()
    assert counts["a.py"] == {
        "tests": 2,
        "apply": 2,
        "unadapted passed": 1,
        "upstream": 1,
        "adapted passed": 1,
    }
    assert counts["b.py"] == {"tests": 2, "not applicable": 2}
    text = summary(both="passed", broken="failed").text()
    assert "not applicable: 2 x other" in text
    assert "FAILED" in text
    assert "a.py::test_broken (unadapted)" in text


def test_failures_are_told_by_their_error() -> None:
    report = (
        "def test():\n>       assert a\nE       assert 'cpu' == 'cuda'\nE         - cuda\n\n"
        "/x/test_a.py:7: AssertionError"
    )
    run_with_report = summary(both="passed", broken="upstream")
    run_with_report.outcomes["unadapted"]["a.py::test_broken"].message = report
    assert "fails upstream here too: 1 x assert 'cpu' == 'cuda' (test_a.py:7)" in run_with_report.text()


@pytest.mark.parametrize(
    ("status", "good"),
    [("passed", True), ("skipped", True), ("upstream", True), ("failed", False), ("vacuous", False)],
)
def test_what_makes_a_run_bad(status: str, good: bool) -> None:
    assert summary(both="passed", broken=status).good(version_checked=True) is good


def test_a_new_upstream_test_is_said_and_fails_on_a_checked_version_only() -> None:
    run_with_new = summary(both="passed", broken="passed")
    run_with_new.collected = [*run_with_new.collected, "c.py::test_new"]
    assert run_with_new.unclassified() == ["c.py::test_new"]
    assert "NOT CLASSIFIED in table.py: c.py::test_new" in run_with_new.text()
    assert not run_with_new.good(version_checked=True)
    assert run_with_new.good(version_checked=False)


# ---- launches


def test_settings_travel_and_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    both = "test_a2a_token_dispatcher.py::TestAlltoAllDispatcher::test_forward_backward[False-1-8]"
    routers_only = "test_routers.py::TestTop2Router::test_constructor"
    never = "test_a2a_token_dispatcher.py::test_placeholder"
    sent = settings.Settings(Path("/c"), Path("/o"), "unadapted", done=frozenset({"x"}), only=("y",))
    (value,) = sent.to_environment().values()
    json.loads(value)
    monkeypatch.setenv(settings.ENV, value)
    assert settings.Settings.from_environment() == sent

    def chosen(way: table.Way, **kwargs: object) -> list[str]:
        launch = settings.Settings(Path("/c"), Path("/o"), way, **kwargs)
        return [test for test in (both, routers_only, never, "new.py::test") if launch.wants(test)]

    assert chosen("unadapted") == [both]
    assert chosen("adapted") == chosen("plain") == [both, routers_only]
    assert (
        chosen("adapted", done=frozenset({both})) == chosen("adapted", only=(routers_only,)) == [routers_only]
    )
    assert chosen("plain", pattern="test_routers.py::*") == [routers_only]


def test_a_folder_that_is_no_checkout_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        run.main([str(tmp_path)])
    assert error.value.code == run.USAGE
    assert "no checkout of Megatron-LM" in capsys.readouterr().err
