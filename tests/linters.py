"""Linters of what is not Python: requirements.lock brings them."""

import os
import shutil
import sys
from pathlib import Path

import pytest


def linter(name: str) -> str:
    """A program beside this Python or on the PATH; skips where there is none."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found
