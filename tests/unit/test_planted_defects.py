"""The table of planted defects fits the code: `python -m tests.planted_defects` plants them."""

import pytest

from tests.planted_defects import DEFECTS, ROOT, Defect, place_of

pytestmark = pytest.mark.megatron_free


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_the_snippet_and_the_tests_are_there(defect: Defect) -> None:
    place_of(defect, ROOT)
    names = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    last = defect.tests.split("|")[0].split()
    assert {word.partition("::")[0] for word in last} <= names
