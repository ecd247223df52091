"""The Dockerfiles and the scripts that they run. No image is built here: docs/containers.md says what was."""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

from megatron_et.host.versions import CHECKED
from tests.linters import linter
from tests.megatron_here import needs_training
from tests.unit.project.test_patches import files_of, stand_in

ROOT = Path(__file__).resolve().parents[3]
DOCKER = ROOT / "docker"
GPU, CPU = ROOT / "Dockerfile", DOCKER / "cpu.Dockerfile"
DOCKERFILES = [GPU, CPU]
SCRIPTS = sorted(DOCKER.glob("*.sh"))
each_dockerfile = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)


# ---- reading Dockerfiles ---------------------------------------------------------------------------------


@dataclass
class Stage:
    """What one FROM begins; the arguments before the first FROM are a stage without one."""

    image: str = ""
    name: str = ""
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def arguments(self) -> dict[str, str | None]:
        """ARG names and defaults."""
        words = [text.partition("=") for word, text in self.instructions if word == "ARG"]
        return {name: value if equals else None for name, equals, value in words}

    def environment(self) -> dict[str, str]:
        """ENV names and values."""
        texts = [text for word, text in self.instructions if word == "ENV"]
        return dict(pair.split("=", 1) for text in texts for pair in text.split())


def stages(dockerfile: Path) -> list[Stage]:
    """The stages of a Dockerfile, the global arguments first."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    found = [Stage()]
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        word, _, text = line.strip().partition(" ")
        if word == "FROM":
            image, _, name = text.partition(" AS ")
            found.append(Stage(image, name))
        elif word:
            found[-1].instructions.append((word, text.strip()))
    return found


def versions() -> dict[str, Stage]:
    """Version of Megatron -> its stage."""
    named = {stage.name.partition("megatron-")[2]: stage for stage in stages(GPU)}
    return {version: stage for version, stage in named.items() if version}


def used(name: str, text: str) -> bool:
    return re.search(rf"\$\{{{name}\}}|\${name}\b", text) is not None


@each_dockerfile
def test_every_argument_is_used(dockerfile: Path) -> None:
    everywhere, *rest = stages(dockerfile)
    for name, default in everywhere.arguments().items():
        assert default, f"ARG {name} has no default"
        again = any(name in stage.arguments() for stage in rest)
        assert again or any(used(name, stage.image) for stage in rest), name
    for stage in rest:
        after: list[str] = []
        for word, text in reversed(stage.instructions):
            if word == "ARG":
                name = text.partition("=")[0]
                assert any(used(name, later) for later in after), f"ARG {name} of {stage.name}"
            after.append(text)


@each_dockerfile
def test_every_image_of_a_registry_has_a_tag_and_every_other_is_a_stage(dockerfile: Path) -> None:
    names = {stage.name for stage in stages(dockerfile)}
    for stage in stages(dockerfile)[1:]:
        image = re.sub(r"\$\{\w+\}", "X", stage.image)
        if re.search(r":[\w.-]+$", image):
            continue
        pattern = re.sub(r"\\\$\\\{\w+\\\}", r"[\\w.]+", re.escape(stage.image))
        assert any(re.fullmatch(pattern, name) for name in names), stage.image


@each_dockerfile
def test_the_image_does_not_run_as_root_and_pipes_fail(dockerfile: Path) -> None:
    _, *rest = stages(dockerfile)
    *_, last = [text for stage in rest for word, text in stage.instructions if word == "USER"]
    assert last == "${USER_ID}"
    assert rest[-1].arguments()["USER_ID"] == "1000"
    shells = [text for stage in rest for word, text in stage.instructions if word == "SHELL"]
    assert shells == ['["/bin/bash", "-euo", "pipefail", "-c"]']


@each_dockerfile
def test_labels_name_this_release(dockerfile: Path) -> None:
    release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (labels,) = [text for stage in stages(dockerfile) for word, text in stage.instructions if word == "LABEL"]
    assert f'org.opencontainers.image.version="{release["version"]}"' in labels
    assert f'org.opencontainers.image.licenses="{release["license"]}"' in labels


# ---- versions --------------------------------------------------------------------------------------------


def test_there_is_a_stage_for_every_supported_release() -> None:
    releases = {series for series, version in CHECKED.items() if re.fullmatch(r"[\d.]+", version)}
    assert {version.rpartition(".")[0] for version in versions()} == releases
    patches = {path.stem.removeprefix("core_v") for path in (ROOT / "patches").glob("core_v*.patch")}
    assert set(versions()) == patches
    newest = max(versions(), key=lambda version: [int(part) for part in version.split(".")])
    assert stages(GPU)[0].arguments()["MEGATRON"] == newest


@pytest.mark.parametrize("version", versions())
def test_a_version_is_pinned_as_its_patch_says(version: str) -> None:
    stage = versions()[version]
    assert stage.environment()["MEGATRON_VERSION"] == version
    assert stage.image == f"${{NGC_PYTORCH}}:{stage.environment()['BASE_TAG']}"
    header = (ROOT / "patches" / f"core_v{version}.patch").read_text().partition("diff --git")[0]
    assert f"commit {stage.arguments()['MEGATRON_COMMIT']}." in header
    assert re.fullmatch("[0-9a-f]{40}", stage.arguments()["DEEPEP_COMMIT"] or "")


def test_an_unknown_version_is_told_the_known_ones() -> None:
    """Docker prints the lines around the FROM that it cannot resolve."""
    (before,) = re.findall(r"(.*)\nFROM megatron-\$\{MEGATRON\}", GPU.read_text())
    assert before.startswith("# ")
    assert set(re.findall(r"\d+\.\d+\.\d+", before)) == set(versions())


def test_the_documentation_has_the_same_table() -> None:
    text = (ROOT / "docs" / "containers.md").read_text()
    for version, stage in versions().items():
        tag = stage.environment()["BASE_TAG"]
        arguments = stage.arguments()
        commits = f"{arguments['MEGATRON_COMMIT']} | {arguments['DEEPEP_COMMIT']}"
        assert f"| {version} | `nvcr.io/nvidia/pytorch:{tag}` | {commits} |" in text
    for name in {name for stage in stages(GPU) for name in stage.arguments()}:
        assert f"| `{name}` |" in text, name


# ---- what reaches the image ------------------------------------------------------------------------------


def ignored() -> list[re.Pattern[str]]:
    """.dockerignore as expressions; one that matches a folder excludes all below it."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert not [pattern for pattern in patterns if pattern.startswith("!")], "not understood here"
    parts = {"**/": "(?:.*/)?", "*": "[^/]*"}
    return [
        re.compile("".join(parts.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*)", pattern)))
        for pattern in patterns
    ]


def excluded(path: str) -> bool:
    whole = Path(path)
    prefixes = [part.as_posix() for part in (whole, *whole.parents)]
    return any(pattern.fullmatch(prefix) for pattern in ignored() for prefix in prefixes)


@each_dockerfile
def test_sources_exist_and_are_not_excluded(dockerfile: Path) -> None:
    sources = []
    for stage in stages(dockerfile):
        for word, text in stage.instructions:
            sources += re.findall(r"--mount=type=bind,source=([^,]+),", text)
            if word == "COPY" and "--from=" not in text:
                *copied, _ = [name for name in text.split() if not name.startswith("--")]
                sources += copied
    assert len(sources) > 1
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source == "." or not excluded(source), source


def test_every_tracked_file_reaches_the_image_and_nothing_else_of_size() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0 or not listed.stdout:
        pytest.skip(f"no git repository here: {listed.stderr.strip()}")
    assert not [path for path in listed.stdout.splitlines() if excluded(path)]
    for path in (".git", ".git/HEAD", ".venv/bin/python", "runs/quickstart/train.log", "a/__pycache__/b.pyc"):
        assert excluded(path), path


def pip_installs() -> Iterator[tuple[str, str]]:
    """Every `pip install` of the images, with where it stands."""
    for path in (*DOCKERFILES, *SCRIPTS):
        text = re.sub(r"\\\n", " ", path.read_text())
        for command in re.findall(r"pip install ([^&|;#\n]*)", text):
            yield path.name, command


def test_pip_may_not_touch_torch_transformer_engine_or_apex() -> None:
    commands = list(pip_installs())
    assert len(commands) > 5
    for where, command in commands:
        assert re.search(r"--no-deps|--constraint", command), (where, command)
        named = re.findall(r"(?:^|[\s\"'])(torch|transformer[-_]engine\w*|apex|megatron-core)\b", command)
        assert not named, (where, command)
    assert not {"torch", "megatron-core", "transformer-engine", "apex"} & {
        re.split(r"[^\w-]", text)[0]
        for text in load().requirements(ROOT / "pyproject.toml", ["training", "report"])
    }


# ---- linters ---------------------------------------------------------------------------------------------


def test_hadolint_has_nothing_to_say() -> None:
    command = [linter("hadolint"), "--config", ".hadolint.yaml", *map(str, DOCKERFILES)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stdout + ran.stderr


def test_shellcheck_has_nothing_to_say() -> None:
    command = [linter("shellcheck"), *map(str, SCRIPTS)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_scripts_can_be_run() -> None:
    for script in SCRIPTS:
        assert os.access(script, os.X_OK), script
        assert "set -euo pipefail" in script.read_text(), script


# ---- Megatron's checkout ---------------------------------------------------------------------------------


def run(script: str, *words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(DOCKER / script), *map(str, words)]
    return subprocess.run(
        command, env={**os.environ, **env}, capture_output=True, text=True, check=False, timeout=120
    )


@dataclass(frozen=True)
class Upstream:
    """A repository with the lines that a patch looks for."""

    url: str
    commit: str
    settings: Path
    """In place of the machine's git configuration, which the script changes."""


@pytest.fixture
def upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Upstream:
    folder = tmp_path / "upstream"
    folder.mkdir()
    stand_in("core_v0.19.0", folder)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", str(tmp_path / "gitconfig"))
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for command in (
        ("init", "-q"),
        ("add", "."),
        (*who, "commit", "-q", "-m", "release"),
        ("tag", "core_v0.19.0"),
        (*who, "commit", "-q", "--allow-empty", "-m", "later"),
    ):
        subprocess.run(["git", *command], cwd=folder, check=True)
    named = ["git", "rev-parse", "core_v0.19.0"]
    commit = subprocess.run(named, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
    return Upstream(f"file://{folder}", commit, tmp_path / "gitconfig")


def test_the_tag_is_cloned_and_patched(upstream: Upstream, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    ran = run("clone_megatron.sh", upstream.url, "0.19.0", upstream.commit, clone)
    assert ran.returncode == 0, ran.stderr
    assert f"commit {upstream.commit}, patched" in ran.stdout
    for name in files_of("core_v0.19.0"):
        assert "prepare_process()" in (clone / name).read_text()
    assert str(clone) in upstream.settings.read_text()


def test_a_tag_that_is_another_commit_is_refused(upstream: Upstream, tmp_path: Path) -> None:
    expected = "0123456789abcdef0123456789abcdef01234567"
    ran = run("clone_megatron.sh", upstream.url, "0.19.0", expected, tmp_path / "clone")
    assert ran.returncode == 1
    assert f"core_v0.19.0 of {upstream.url} is commit {upstream.commit} and not {expected}" in ran.stderr
    assert f"--build-arg MEGATRON_COMMIT={upstream.commit}" in ran.stderr


def test_a_tag_that_is_not_there_is_refused(upstream: Upstream, tmp_path: Path) -> None:
    ran = run("clone_megatron.sh", upstream.url, "0.18.2", upstream.commit, tmp_path / "clone")
    assert ran.returncode != 0
    assert "core_v0.18.2 not found" in ran.stderr


def test_a_patch_that_changes_nothing_is_an_error(tmp_path: Path) -> None:
    """git apply skips the files of a folder below a foreign repository and says nothing."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    folder = tmp_path / "sources"
    folder.mkdir()
    stand_in("core_v0.19.0", folder)
    ran = run("apply_patch.sh", ROOT / "patches" / "core_v0.19.0.patch", folder)
    assert ran.returncode == 1
    assert f"changed nothing in {folder}: is it below another git repository?" in ran.stderr


def test_a_checkout_without_its_compiled_helper_is_an_error(tmp_path: Path) -> None:
    """Megatron's setup ends well when the compiler fails; this pip does nothing at all."""
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\necho "constraint: $(cat "$PIP_CONSTRAINT" "$PIP_BUILD_CONSTRAINT")"\n')
    python.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    helper = tmp_path / "megatron" / "core" / "datasets" / "helpers_cpp.x86_64.so"
    failed = run("install_megatron.sh", tmp_path, "79.0.1", PATH=path)
    assert failed.returncode == 1
    assert "the dataset helper was not compiled" in failed.stderr
    assert failed.stdout == "constraint: setuptools==79.0.1\nsetuptools==79.0.1\n"
    helper.parent.mkdir(parents=True)
    helper.touch()
    assert run("install_megatron.sh", tmp_path, "79.0.1", PATH=path).returncode == 0


@needs_training
def test_the_smoke_command_finds_nothing_to_refuse(tmp_path: Path) -> None:
    command = tmp_path / "megatron-et"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m megatron_et.cli "$@"\n')
    command.chmod(0o755)
    (tmp_path / "pretrain_gpt.py").touch()
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ran = run("smoke.sh", tmp_path, PATH=path, PYTHONPATH=str(ROOT), **quiet)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.rstrip().endswith("nothing is refused")
    assert "expert-threshold, target mean fan-out 1 of 8 experts" in " ".join(ran.stdout.split())


# ---- the base image's packages ---------------------------------------------------------------------------


def load() -> ModuleType:
    """docker/base_packages.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("base_packages", DOCKER / "base_packages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


base_packages = load()


def put(site: Path, name: str, version: str, files: str = "module.py,sha256=abc,1\n") -> Path:
    """Make a package look installed."""
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(files)
    return info


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place for packages, with a base image's in it."""
    folder = tmp_path / "site"
    put(folder, "torch", "2.10.0a0+b4e4ee81d3.nv25.11")
    put(folder, "transformer_engine", "2.9.0+70f53666")
    put(folder, "apex", "0.1")
    put(folder, "python-apt", "2.7.7ubuntu4")
    monkeypatch.setattr(sys, "path", [str(folder)])
    importlib.invalidate_caches()
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    importlib.invalidate_caches()
    status = base_packages.main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_a_recorded_image_is_pinned_and_what_is_added_is_named(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    required = ("--require", "torch", "transformer-engine")
    status, text = said(capsys, "record", state, *required)
    assert (status, text) == (0, "4 packages of the base image recorded, 3 of them pinned for pip\n")
    assert (state / "constraints.txt").read_text() == (
        "apex==0.1\ntorch==2.10.0a0+b4e4ee81d3.nv25.11\ntransformer-engine==2.9.0+70f53666\n"
    )
    assert said(capsys, "check", state) == (
        0,
        "all 4 packages of the base image are as they were; added: none\n",
    )
    put(site, "rich", "15.0.0")
    status, text = said(capsys, "check", state)
    assert (status, text.partition("; ")[2]) == (0, "added: rich 15.0.0\n")


def test_another_base_image_is_refused(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(site / "transformer_engine-2.9.0+70f53666.dist-info")
    status, text = said(capsys, "record", tmp_path / "state", "--require", "torch", "transformer-engine")
    assert status == 1
    assert "the base image has no transformer-engine: an NGC PyTorch image is needed" in text
    assert not (tmp_path / "state").exists()


def upgrade(site: Path) -> None:
    shutil.rmtree(site / "torch-2.10.0a0+b4e4ee81d3.nv25.11.dist-info")
    put(site, "torch", "2.13.0")


def uninstall(site: Path) -> None:
    shutil.rmtree(site / "apex-0.1.dist-info")


def replace_with_another_build(site: Path) -> None:
    put(site, "apex", "0.1", "other.py,sha256=def,2\n")


def shadow(site: Path) -> None:
    put(site.parent / "before", "apex", "0.1")
    sys.path.insert(0, str(site.parent / "before"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (upgrade, "torch was 2.10.0a0+b4e4ee81d3.nv25.11 and is 2.13.0"),
        (uninstall, "apex 0.1 is gone"),
        (replace_with_another_build, "apex 0.1 was installed anew in"),
        (shadow, "apex 0.1 was installed anew in"),
    ],
)
def test_a_changed_package_fails_the_build(
    change: object, sentence: str, site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    assert said(capsys, "record", state)[0] == 0
    assert callable(change)
    change(site)
    status, text = said(capsys, "check", state)
    assert status == 1
    assert f"packages of the base image were changed: {sentence}" in text
    assert f"--constraint {state}/constraints.txt" in text


@pytest.mark.parametrize(
    ("version", "is_pinnable"),
    [
        ("2.13.0", True),
        ("2.10.0a0+b4e4ee81d3.nv25.11", True),
        ("1!2.0rc1.post3.dev4", True),
        ("2.7.7+ubuntu5", True),
        ("2.7.7ubuntu4", False),
        ("0.1-bionic", False),
    ],
)
def test_only_what_pip_takes_is_pinned(version: str, is_pinnable: bool) -> None:
    assert base_packages.pinnable(version) is is_pinnable


def test_requirements_are_the_projects_without_torch_and_megatron() -> None:
    found = base_packages.requirements(ROOT / "pyproject.toml", ["training", "report"])
    assert {"numpy", "rich>=13", "sentencepiece", "tensorboard", "matplotlib"} <= set(found)
    assert len(found) == len(set(found))
