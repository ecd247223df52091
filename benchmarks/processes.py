"""Ending what a benchmark or a test has started."""

import contextlib

import psutil


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants: torchrun gives each worker a session, so killpg is not enough."""
    try:
        parent = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return
    for process in [*parent.children(recursive=True), parent]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
