"""Statements of docs/ about a MoE layer, on Megatron's real one (pages.py)."""

import pytest

from tests.launch import TAIL, torchrun

pytestmark = pytest.mark.distributed


def test_what_pages_say_of_a_layer() -> None:
    run = torchrun(["-m", "tests.distributed.pages", "row_bytes", "recalibration"], 1, timeout=120)
    assert run.returncode == 0, run.stdout[-TAIL:]
    assert run.stdout.count("passed") == 2
