"""What the GPU tests share: they skip themselves without a GPU, and each names the feature that it checks.

The first line of a test's docstring is the feature, `{name}` in it a parameter of the test. `make gpu-check`
reads it from the JUnit report and keeps one row for it in docs/verified.md.
"""

from pathlib import Path
from typing import Any

import pytest

# Before any test imports Transformer Engine, which needs the NCCL and cuDNN libraries that torch loads.
import torch

from tests.gpu.gpu_cases import Outcomes, run_cases

HERE = Path(__file__).parent


def feature(item: pytest.Function) -> str:
    """What a row of docs/verified.md calls the thing that a test checks."""
    text = (item.function.__doc__ or "").strip().partition("\n")[0]
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return text.format(**parameters).rstrip(".")


def shared_by(item: pytest.Function) -> str | None:
    """What is made once for this test and others of its file, if anything."""
    made_once = {"outcomes", "straight"} & set(item.fixturenames)
    return f"{item.path.stem} {made_once.pop()}" if made_once else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Name features and skip (the hook sees the items of the whole session)."""
    for item in items:
        if HERE in item.path.parents and isinstance(item, pytest.Function):
            item.user_properties.append(("feature", feature(item)))
            group = shared_by(item)
            if group is not None:
                # For pytest-xdist (`-n 8 --dist loadgroup`): what is made once is made by one worker.
                item.add_marker(pytest.mark.xdist_group(group))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What became of all selected cases of a test file; its CASES_OF is the module that has them."""
    items = [item for item in request.session.items if item.path == request.path]
    selected: list[Any] = [
        item.callspec.params["case"] for item in items if isinstance(item, pytest.Function)
    ]
    return run_cases(request.module.CASES_OF, selected, tmp_path_factory.mktemp("cases"))
