"""benchmarks/migration.py: its flags, what it reads, and its table."""

import json
from pathlib import Path

import pytest

from benchmarks import migration
from benchmarks.migration import AFTER, BEFORE, STARTS, TAIL, WARMUP, WAYS, Continued, page, routing, row


def continued(above: float, no_expert: float | None) -> Continued:
    """Losses of 3 at every step, `above` more after the warm-up."""
    steps = range(BEFORE + 1, BEFORE + AFTER + 1)
    losses = {step: 3.0 + (above if step > BEFORE + WARMUP else 0.0) for step in steps}
    return Continued(losses, {} if no_expert is None else dict.fromkeys(steps, no_expert))


def test_a_row_is_the_loss_and_its_distance_from_the_control() -> None:
    control = continued(0.0, None)
    line = row("loss-free bias", "thresholds", continued(0.5, 0.25), control)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2:5] == ["3.000 (+0.000)"] * 3
    assert cells[5:7] == ["3.500 (+0.500)"] * 2
    assert cells[7:] == ["25.0", "25.0"]
    assert row("loss-free bias", "as before", control, control).endswith("| 0 | 0 |")


def test_the_page_has_a_column_for_every_cell() -> None:
    before = {start: dict.fromkeys(range(1, BEFORE + 1), 4.0) for start in STARTS}
    control = continued(0.0, None)
    text = page(
        [row(start, way, control, control) for start in STARTS for way in WAYS], before, {"date": "now"}
    )
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 2 + len(STARTS) * len(WAYS)
    assert f"loss before the switch, loss-free bias, last {TAIL} steps: 4.000" in text


def test_the_control_keeps_its_router_and_the_others_change_it() -> None:
    assert "--moe-router-enable-expert-bias" in routing("loss-free bias", "as before")
    for way in list(WAYS)[1:]:
        flags = routing("loss-free bias", way)
        assert flags[flags.index("--moe-router-type") + 1] == "expert-threshold"
        assert "--moe-router-enable-expert-bias" not in flags


@pytest.mark.parametrize("steps", [[], [101, 102]])
def test_tokens_without_an_expert_are_read_from_the_trace(steps: list[int], tmp_path: Path) -> None:
    layers = {"2": {"fanout_histogram": [10, 90]}, "3": {"fanout_histogram": [30, 70]}}
    lines = [json.dumps({"step": step, "tokens": 100, "layers": layers}) for step in steps]
    if lines:
        (tmp_path / "et_trace.jsonl").write_text("\n".join(lines))
    assert migration.without_expert(tmp_path) == dict.fromkeys(steps, 0.2)
