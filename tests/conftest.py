"""Shared fixtures. The CPU backend is not installed in the pytest process: unit tests see torch as it is."""

import os

import pytest
import torch
from hypothesis import settings

# No deadline: on two busy cores a single example may take any time. CI draws the same examples every time,
# so that a red run is a change of the code; at a desk they vary.
settings.register_profile("house", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("house")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1234)
