"""Replacing Megatron's symbols, the versions they were checked on, install() and the launcher.

`seam` runs here on made-up modules. What binds the real seams runs in new processes.
"""

import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, override

import pytest

from megatron_et.host import seam, versions
from tests.megatron_here import VERSION, needs_training

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).parents[3]


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a new process without a GPU, a rank or, unless given, the CPU backend."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("MEGATRON_ET_CPU", "RANK")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        env={**inherited, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# --- seam.py on made-up modules ---


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module `host` with a function, a class and a constant."""
    module = types.ModuleType("host")
    exec(
        "def function(x, y=2):\n    'Adds.'\n    return x + y\n"
        "class Layer:\n    def __init__(self, size):\n        self.size = size\n",
        module.__dict__,
    )
    monkeypatch.setitem(sys.modules, "host", module)
    monkeypatch.setattr(seam, "replaced", [])
    return module


def importer(monkeypatch: pytest.MonkeyPatch, name: str, **names: Any) -> types.ModuleType:
    """A module in which `names` have been imported."""
    module = types.ModuleType(name)
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def negated(original: Callable[..., int]) -> Callable[..., int]:
    return lambda *args, **kwargs: -original(*args, **kwargs)


def test_wrap_replaces_the_function_and_copies_imported_by_name(
    host: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = host.function
    copy = importer(monkeypatch, "copy_of_host", function=original)
    namesake = importer(monkeypatch, "namesake", function=negated)
    equal = importer(monkeypatch, "equal", function=_EqualToAll())
    seam.wrap("host", "function", negated)
    assert host.function(1, y=3) == -4
    assert host.function is not original
    assert copy.function is host.function
    # Another function of the same name is none of ours, even if it claims to be equal.
    assert namesake.function is negated
    assert isinstance(equal.function, _EqualToAll)


class _EqualToAll:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def test_wrap_bears_odd_things_in_sys_modules(
    host: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None stands for a module that must not be imported (the CPU backend puts it there); lazy modules are
    objects without a namespace."""
    monkeypatch.setitem(sys.modules, "hidden", None)
    monkeypatch.setitem(sys.modules, "slotted", object())
    seam.wrap("host", "function", negated)
    assert host.function(1) == -3


def test_wrap_keeps_name_documentation_and_the_original(host: types.ModuleType) -> None:
    original = host.function
    seam.wrap("host", "function", negated)
    assert (host.function.__name__, host.function.__doc__) == ("function", "Adds.")
    assert host.function.__wrapped__ is original


def test_wrap_a_method_in_place(host: types.ModuleType) -> None:
    """The class keeps its identity: isinstance, and classes derived before, see the new method."""
    layer, original = host.Layer, host.Layer.__init__
    derived = type("Derived", (layer,), {})

    def doubled(original: Callable[..., None]) -> Callable[..., None]:
        return lambda self, size: original(self, 2 * size)

    seam.wrap("host", "Layer.__init__", doubled)
    assert host.Layer is layer
    assert (layer(3).size, derived(4).size) == (6, 8)
    assert layer.__init__.__wrapped__ is original


def test_replace_changes_one_place_only(host: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    original = host.function
    copy = importer(monkeypatch, "copy_of_host", function=original)
    seam.replace("host", "function", negated)
    assert host.function is negated
    assert copy.function is original


def test_what_was_replaced_is_listed_in_order(host: types.ModuleType) -> None:
    assert host.Layer is seam.find("host", "Layer")
    seam.wrap("host", "function", negated)
    seam.replace("host", "Layer", object)
    assert seam.replaced == ["host.function", "host.Layer"]


@pytest.mark.parametrize(
    ("module", "attribute"),
    [("host", "gone"), ("host", "Layer.gone"), ("host", "gone.__init__"), ("host.gone", "function")],
)
@pytest.mark.parametrize("action", ["find", "wrap", "replace"])
def test_a_missing_symbol_names_itself_and_the_versions(
    host: types.ModuleType, monkeypatch: pytest.MonkeyPatch, module: str, attribute: str, action: str
) -> None:
    monkeypatch.setattr(seam, "megatron_version", lambda: "0.31.4")
    actions = {
        "find": lambda: seam.find(module, attribute),
        "wrap": lambda: seam.wrap(module, attribute, negated),
        "replace": lambda: seam.replace(module, attribute, negated),
    }
    before = dict(vars(host))
    with pytest.raises(ImportError) as error:
        actions[action]()
    message = str(error.value)
    assert message.startswith(f"{module}.{attribute} is not in megatron-core 0.31.4, ")
    assert "versions that have it are 0.16.1, 0.17.1, 0.18.2, 0.19.2, " in message
    assert seam.replaced == []
    assert vars(host) == before


class _Upstream:
    def preprocess(self) -> None: ...


class _Ours(_Upstream):
    @override
    def preprocess(self) -> None: ...


class _OursWithoutUpstreams(_Upstream):
    @override
    def prepare(self) -> None: ...  # type: ignore[misc]


def test_an_override_of_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seam, "megatron_version", lambda: "0.31.4")
    seam.require_overridden(_Ours)
    with pytest.raises(ImportError, match=r"_Upstream\.prepare is not in megatron-core 0\.31\.4"):
        seam.require_overridden(_Ours, _OursWithoutUpstreams)


# --- versions.py ---


MAIN = "0.20.0+d98e8a64d"


@pytest.mark.parametrize(
    "version",
    ["0.16.1", "0.17.1", "0.18.2+571370c82", "0.19.2", "0.19.0+5be962670", MAIN, "0.20.0+d98e8a64ddf3"],
)
def test_a_version_that_was_run_is_silent(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(versions, "megatron_version", lambda: version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check_version()


@pytest.mark.parametrize("version", ["0.15.3", "0.21.0", "1.19.2", "0.190.0", "0.1.9", "0.2"])
def test_a_version_of_another_series_warns_with_those_that_were_run(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(versions, "megatron_version", lambda: version)
    expected = (
        rf"megatron-core {version} was not run, nor any of its series: checked were 0\.16\.1, .*0\.19\.2, "
    )
    with pytest.warns(UserWarning, match=expected) as warned:
        versions.check_version()
    assert len(warned) == 1


@pytest.mark.parametrize(
    ("version", "run"),
    [
        ("0.16.0", "0.16.1"),
        ("0.19.7", "0.19.2"),
        ("0.19.0rc1", "0.19.2"),
        ("0.20.0", "Megatron-LM's main branch of 2026-08-22, commit d98e8a64d"),
        ("0.20.0+", "Megatron-LM's main branch of 2026-08-22, commit d98e8a64d"),
        ("0.20.1+0123456789", "Megatron-LM's main branch of 2026-08-22, commit d98e8a64d"),
    ],
)
def test_a_release_or_commit_that_was_not_run_warns_with_the_one_that_was(
    monkeypatch: pytest.MonkeyPatch, version: str, run: str
) -> None:
    monkeypatch.setattr(versions, "megatron_version", lambda: version)
    expected = re.escape(f"megatron-core {version} was not run, {run} of the same series was")
    with pytest.warns(UserWarning, match=expected) as warned:
        versions.check_version()
    assert len(warned) == 1
    monkeypatch.setenv("RANK", "3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check_version()


@pytest.mark.filterwarnings(r"ignore::UserWarning:megatron\.")
def test_the_version_of_a_wheel_is_its_distributions() -> None:
    """Megatron itself appends the commit of the repository around the environment: 0.19.2+4b2a5a1."""
    from megatron.core import package_info

    installed = importlib.metadata.version("megatron-core")
    here = Path(package_info.__file__)
    if "site-packages" in here.parts:
        assert versions.megatron_version() == installed
    assert versions.megatron_version().partition("+")[0] == installed.partition("+")[0]
    assert versions.is_checked(versions.megatron_version())


@pytest.mark.filterwarnings(r"ignore::UserWarning:megatron\.")
def test_the_version_of_a_checkout_keeps_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from megatron.core import package_info

    monkeypatch.setattr(package_info, "__file__", str(tmp_path / "megatron" / "core" / "package_info.py"))
    monkeypatch.setattr(package_info, "__version__", MAIN)
    assert versions.megatron_version() == MAIN


def test_two_mixed_installations_are_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "megatron_version", lambda: "0.19.2")
    folders = {"megatron.core": Path("/checkout/megatron"), "megatron.training": Path("/wheel/megatron")}
    monkeypatch.setattr(versions, "_folder_of", folders.get)
    with pytest.warns(UserWarning, match=r"/checkout/megatron and megatron\.training from /wheel/megatron"):
        versions.check_version()
    for training in (Path("/checkout/megatron"), None):
        folders["megatron.training"] = training
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            versions.check_version()


# --- install() ---

INSTALL = """
from megatron_et.run import cpu
cpu.install()
import megatron_et, megatron_et.host
from megatron_et.host import seam

def live(name):
    module, _, attribute = name.rpartition(".")
    if module.rpartition(".")[2][0].isupper():  # a method: its class comes before it
        module, _, owner = module.rpartition(".")
        attribute = f"{owner}.{attribute}"
    return seam.find(module, attribute)

megatron_et.install()
first = megatron_et.host.bound()
megatron_et.install()
again = megatron_et.host.bound()
assert first == again and len(set(first)) == len(first), again
print(*first, sep="\\n")

# Each live symbol is ours, and what it wraps is not.
for name in first:
    function = live(name)
    assert "megatron_et" in function.__code__.co_filename, name
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None and hasattr(wrapped, "__code__"):
        assert "megatron_et" not in wrapped.__code__.co_filename, name

# The answer is a copy: what a caller does to it stays with the caller.
again.append("x")
assert "x" not in megatron_et.host.bound()

from megatron.training import arguments, checkpointing, training
import megatron.core.distributed as distributed
# A copy imported by name, before install() as megatron.training.training has it.
assert training.load_checkpoint is checkpointing.load_checkpoint
# The copy for users without megatron.training stays Megatron's.
assert "megatron_et" not in distributed.finalize_model_grads.__code__.co_filename
"""


@needs_training
def test_install_twice_binds_each_symbol_once() -> None:
    result = run("-c", INSTALL, MEGATRON_ET_CPU="1")
    assert result.returncode == 0, result.stderr[-3000:]
    bound = [line for line in result.stdout.splitlines() if line.startswith("megatron.")]
    modules = (
        "megatron.core.transformer.moe.moe_layer",
        "megatron.core.transformer.cuda_graphs",
        "megatron.training.",
    )
    assert all(name.startswith(modules) for name in bound)
    # The places without which thresholds would not route, move, or be asked for.
    endings = ("MoELayer.__init__", "add_megatron_arguments", "validate_args", "finalize_model_grads")
    assert all(any(name.endswith(f".{ending}") for name in bound) for ending in (*endings, "train_step"))
    table = re.findall(r"^\| `([\w.]+)` \|", (ROOT / "docs" / "versions.md").read_text(), re.MULTILINE)
    assert [name for name in bound if not name.endswith(tuple(f".{symbol}" for symbol in table))] == []


# A wrong Megatron: one symbol is gone before install() looks for it.
WITHOUT = """
from megatron_et.run import cpu
cpu.install()
import megatron_et
import megatron.training.training
del megatron.training.training.train_step
megatron_et.install()
"""


@needs_training
def test_install_on_a_megatron_without_a_symbol() -> None:
    result = run("-c", WITHOUT)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(
        f"ImportError: megatron.training.training.train_step is not in megatron-core {VERSION}"
    )


@pytest.mark.filterwarnings(r"ignore::UserWarning:megatron\.")
@pytest.mark.parametrize(
    "name",
    [
        "layer",
        pytest.param("arguments", marks=needs_training),
        pytest.param("logging", marks=needs_training),
    ],
)
def test_a_symbol_that_is_called_only_later_is_missed_at_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seam, "replaced", [])
    binding = importlib.import_module(f"megatron_et.host.{name}")
    for module, attribute in binding.CALLED:
        importlib.import_module(module)
        with monkeypatch.context() as without:
            without.delattr(f"{module}.{attribute}")
            missing = rf"^{re.escape(module)}\.{re.escape(attribute)} is not in megatron-core {VERSION}"
            with pytest.raises(ImportError, match=missing):
                binding.install()
    assert seam.replaced == []


# --- the launcher ---


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ((), "usage: python -m megatron_et SCRIPT [ARGS...]"),
        (("--moe-router-type", "expert-threshold"), "usage: python -m megatron_et SCRIPT [ARGS...]"),
        (("nowhere.py",), "megatron_et: nowhere.py is not a file: give the path of your training script"),
        (("tests",), "megatron_et: tests is not a file: give the path of your training script"),
    ],
)
def test_wrong_use_is_one_sentence(command: tuple[str, ...], sentence: str) -> None:
    result = run("-m", "megatron_et", *command)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith(sentence)
    assert result.stderr.count("\n") == 1


def test_asking_the_launcher_for_help_is_no_error() -> None:
    result = run("-m", "megatron_et", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "usage: python -m megatron_et SCRIPT [ARGS...]" in result.stdout


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A training script with a neighbour that it imports, as Megatron-LM's pretrain_gpt.py has."""
    (tmp_path / "neighbour.py").write_text("NAME = 'neighbour'\n")
    path = tmp_path / "train.py"
    path.write_text("import sys\nfrom neighbour import NAME\nprint('RAN', __name__, NAME, sys.argv)\n")
    return path


def test_no_gpu_is_one_sentence_and_the_script_does_not_run(script: Path) -> None:
    result = run("-m", "megatron_et", str(script))
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("megatron_et: no GPU is visible to this process.")
    assert "set MEGATRON_ET_CPU=1" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("on_cpu", ["0", "1"])
def test_no_megatron_is_one_sentence(script: Path, on_cpu: str) -> None:
    (script.parent / "megatron").mkdir()  # first on the path, and without a core
    (script.parent / "megatron" / "__init__.py").touch()
    result = run("-m", "megatron_et", str(script), MEGATRON_ET_CPU=on_cpu)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("megatron_et: megatron.core is not installed for ")
    assert result.stderr.count("\n") == 1


def test_an_unclear_wish_for_the_cpu_is_one_sentence(script: Path) -> None:
    result = run("-m", "megatron_et", str(script), MEGATRON_ET_CPU="maybe")
    assert result.returncode == 1
    assert "MEGATRON_ET_CPU='maybe' is neither yes nor no" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_launcher_runs_a_script_as_python_would(script: Path) -> None:
    """--help, too, needs no GPU: the script answers it."""
    result = run("-m", "megatron_et", str(script), "--help", "-x")
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"RAN __main__ neighbour {[str(script), '--help', '-x']}" in result.stdout


def test_on_cpu_the_launcher_adds_flags_in_front_of_the_users(script: Path) -> None:
    result = run("-m", "megatron_et", str(script), "--num-workers", "2", MEGATRON_ET_CPU="1", RANK="1")
    assert result.returncode == 0, result.stderr[-3000:]
    (ran,) = [line for line in result.stdout.splitlines() if line.startswith("RAN")]
    assert ran.startswith(f"RAN __main__ neighbour ['{script}', '--distributed-backend', 'gloo'")
    assert ran.endswith("'--num-workers', '2']")
    # Only rank 0 says that flags were added.
    assert "[megatron_et]" not in result.stdout


@needs_training
def test_help_of_pretrain_gpt_shows_our_flags() -> None:
    result = run("-m", "megatron_et.pretrain_gpt", "--help")
    assert result.returncode == 0, result.stderr[-500:]
    assert "expert threshold routing (megatron_et):" in result.stdout
    assert "--moe-et-ema-decay" in result.stdout
