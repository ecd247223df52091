"""pytest plugin of a test process: `-p et_conformance.plugin`, below torchrun, started by run.py.

Rank by rank it runs the tests that run.py asks for, in step with the other ranks, and writes what happened
into a file of its own. A rank that fails a test leaves the others waiting in a collective: they give up after
COLLECTIVE_SECONDS, all meet again, and the next test starts with new process groups.
"""

import contextlib
import datetime
import faulthandler
import functools
import gc
import importlib.util
import inspect
import json
import math
import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from packaging.version import Version

from megatron_et.run import cpu

from . import table
from .settings import FOLDER, Settings

COLLECTIVE_SECONDS = 60
MESSAGE = 4000  # characters of a failure that are kept

SETTINGS = Settings.from_environment()
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
GPU = torch.cuda.is_available()

NEEDS: dict[str, Callable[[], bool]] = {
    "transformer-engine": lambda: GPU and importlib.util.find_spec("transformer_engine") is not None,
}


def _prepare() -> None:
    """All that must come before the first import of Megatron or of its tests."""
    if not GPU:
        cpu.install()
    # `tests` is a namespace package in a checkout: any package of that name on the path would hide it.
    tests = types.ModuleType("tests")
    tests.__path__ = [str(SETTINGS.checkout / "tests")]
    sys.modules["tests"] = tests
    # Imported by upstream's conftest to download data for other tests than these.
    download = types.ModuleType("download_unit_tests_dataset")
    download.download_and_extract_asset = lambda **_: None  # type: ignore[attr-defined]
    sys.modules["tests.test_utils.python_scripts.download_unit_tests_dataset"] = download
    # Without Transformer Engine 0.16 compares versions with None; later ones take this number themselves.
    from megatron.core import utils

    if utils.get_te_version() is None:
        utils._te_version = Version("0.0.0")
    _in_step()
    if SETTINGS.way != "plain":
        from . import adapt

        adapt.install_ours(SETTINGS.way)


# ---- processes -------------------------------------------------------------------------------------------

_generation = 0
_skipped_inside = False
"""Whether the running test was skipped while it built something, which then lives on in the traceback."""


def _in_step() -> None:
    """Process groups: gloo where there is no GPU, fresh keys after each fresh start, and short waits."""
    import megatron.core.parallel_state as parallel_state

    init_process_group = torch.distributed.init_process_group
    initialize_model_parallel = parallel_state.initialize_model_parallel
    signature = inspect.signature(initialize_model_parallel)

    @functools.wraps(init_process_group)
    def init(backend: str, **kwargs: Any) -> None:
        kwargs["store"] = torch.distributed.PrefixStore(f"{SETTINGS.way}-{_generation}", kwargs["store"])
        kwargs["timeout"] = datetime.timedelta(seconds=COLLECTIVE_SECONDS)
        init_process_group(backend if GPU else "gloo", **kwargs)

    @functools.wraps(initialize_model_parallel)
    def initialize(*args: Any, **kwargs: Any) -> None:
        sizes = signature.bind(*args, **kwargs)
        sizes.apply_defaults()
        given = sizes.arguments
        tp, pp = given["tensor_model_parallel_size"], given["pipeline_model_parallel_size"]
        dense = tp * pp * given["context_parallel_size"]
        experts = (
            (given["expert_tensor_parallel_size"] or tp) * pp * (given["expert_model_parallel_size"] or 1)
        )
        wanted = math.lcm(dense, experts)
        if WORLD % wanted:
            global _skipped_inside
            _skipped_inside = True
            pytest.skip(f"needs a multiple of {wanted} processes, not {WORLD}")
        kwargs.setdefault("distributed_timeout_minutes", COLLECTIVE_SECONDS / 60)
        initialize_model_parallel(*args, **kwargs)

    torch.distributed.init_process_group = init  # type: ignore[assignment]
    parallel_state.initialize_model_parallel = initialize


@functools.cache
def _store() -> Any:
    store, _, _ = next(torch.distributed.rendezvous("env://"))
    return torch.distributed.PrefixStore("meetings", store)


def _meet(place: str, status: str) -> bool:
    """Wait for all ranks; whether one of them brings `failed`. Who brings `skipped` does not wait."""
    _store().set(f"{place}-{RANK}", status)
    if status == "skipped":
        return False
    keys = [f"{place}-{rank}" for rank in range(WORLD)]
    _store().wait(keys, datetime.timedelta(seconds=SETTINGS.test_seconds))
    return any(_store().get(key) == b"failed" for key in keys)


def _start_afresh(*, collect: bool) -> None:
    """No process group, no parallel state, and if asked no object of a test that did not end well:
    upstream's containers communicate and destroy the parallel state when they are collected."""
    global _generation
    _generation += 1
    import megatron.core.parallel_state as parallel_state

    with contextlib.suppress(Exception):
        parallel_state.destroy_model_parallel()
    with contextlib.suppress(Exception):
        torch.distributed.destroy_process_group()
    if not collect:
        return
    for name in ("last_exc", "last_value", "last_traceback", "last_type"):
        if hasattr(sys, name):
            delattr(sys, name)
    gc.collect()


# ---- pytest ----------------------------------------------------------------------------------------------


def _write(**record: Any) -> None:
    with open(SETTINGS.out / f"rank{RANK}.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def _name(nodeid: str) -> str:
    return nodeid.split(FOLDER + "/", 1)[-1]


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be imported."""
    if report.failed:
        _write(test=_name(report.nodeid), status="failed", message=str(report.longrepr)[-MESSAGE:])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tell run.py what there is, and keep what it asks for."""
    _write(collected=[_name(item.nodeid) for item in items])
    items[:] = [item for item in items if SETTINGS.wants(_name(item.nodeid))]
    _meet("collection", "done")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run."""
    row = table.find(_name(item.nodeid))
    for need in row.needs if row else ():
        if not NEEDS[need]():
            pytest.skip(f"needs {need}")


_reports: list[pytest.TestReport] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the reports of set-up, call and tear-down."""
    _reports.append(report)


@contextlib.contextmanager
def _adapted(test: str) -> Iterator[list[str]]:
    """Our classes that the test builds."""
    if SETTINGS.way == "plain":
        yield []
        return
    from . import adapt

    row = table.find(test)
    adapt.built.clear()
    with contextlib.ExitStack() as stack:
        if SETTINGS.way == "adapted" and row is not None:
            for name in row.adapters:
                stack.enter_context(adapt.ADAPTERS[name]())
        yield adapt.built


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """One test on all ranks. A test that takes too long ends this process, and run.py starts another."""
    global _skipped_inside
    _skipped_inside = False
    test = _name(item.nodeid)
    _write(test=test, status="started")
    _reports.clear()
    faulthandler.dump_traceback_later(SETTINGS.test_seconds, exit=True)
    began = time.monotonic()
    with _adapted(test) as built:
        result = yield
        ours = sorted(set(built))
    status, message = _verdict(_reports)
    _write(test=test, status=status, message=message, ours=ours, seconds=round(time.monotonic() - began, 1))
    failed = _meet(test, status)
    # Megatron's tests never destroy their groups, and gloo's threads slow the machine down until tests fail.
    if failed or _skipped_inside or (status == "passed" and not GPU):
        _start_afresh(collect=failed or _skipped_inside)
    faulthandler.cancel_dump_traceback_later()
    return result


def _verdict(reports: list[pytest.TestReport]) -> tuple[str, str]:
    for report in reports:
        if report.failed:
            return "failed", str(report.longrepr)[-MESSAGE:]
    for report in reports:
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            return "skipped", reason.removeprefix("Skipped: ")
    return "passed", ""


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Failures are in the files; a failing exit status would make torchrun kill the other ranks."""
    _write(finished=True)
    session.exitstatus = 0


_prepare()
