"""Two steps of Megatron-LM's own training scripts on CPU: the sources of a tag in a folder of their own, a
training through torchrun, and what its output and its checkpoint say."""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.small_gpt import SMALL_GPT
from megatron_et.run import cpu

ROOT = Path(__file__).resolve().parent.parent
PATCHES = ROOT / "patches"

TAGS = ("core_v0.16.1", "core_v0.17.1", "core_v0.18.2", "core_v0.19.0", "main")
MAIN_REFS = ("refs/remotes/origin/main", "refs/heads/main", "HEAD")
"""What `main` means in the user's repository: the first of these that exists. In full, because mirrors hold
branches with names like origin/main."""

# Of the two steps the first warms up and the second is routed by thresholds.
_TWO_STEPS = (
    "--train-iters 2 --eval-iters 0 --eval-interval 2 --save-interval 2 --expert-model-parallel-size 2"
)
TRAINING = [*SMALL_GPT, *_TWO_STEPS.split()]
ET = ["--moe-router-type", "expert-threshold", "--moe-et-warmup-steps", "1"]
MOST_SECONDS = 600
"""A training that takes longer hangs."""


class TrialError(Exception):
    """Nothing could be tried: a sentence for the user."""


# ---- sources ---------------------------------------------------------------------------------------------


def git(repository: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run git in a checkout or a bare repository; the status is the caller's to check."""
    return subprocess.run(["git", "-C", str(repository), *args], capture_output=True, text=True, check=False)


def commit_of(repository: Path, tag: str, main: str | None = None) -> str | None:
    """The commit that a tag, or `main`, names in this repository; None when it has none.

    Args:
        repository: a checkout or a bare repository.
        tag: one of TAGS.
        main: the reference that `main` stands for; the first existing one of MAIN_REFS when left out.
    """
    if tag != "main":
        names: Sequence[str] = (f"refs/tags/{tag}",)
    else:
        names = MAIN_REFS if main is None else (main,)
    for name in names:
        found = git(repository, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
        if found.returncode == 0:
            return found.stdout.strip()
    return None


def extract(repository: Path, commit: str, folder: Path) -> None:
    """Write what the training scripts need of a commit into a folder; the repository is only read."""
    command = ["git", "-C", str(repository), "archive", commit, "megatron", ":(glob)*.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as archive:
        assert archive.stdout is not None
        with tarfile.open(fileobj=archive.stdout, mode="r|") as files:
            files.extractall(folder, filter="data")
    if archive.returncode != 0:
        raise TrialError(f"git archive {commit} failed in {repository}")
    shutil.copy(PATCHES / "local_hybrid_spec.py", folder)
    _place_dataset_helper(folder)


def _place_dataset_helper(folder: Path) -> None:
    """Use the installed wheel's C++ dataset helper, whose source is the same in all these versions.

    A checkout would compile it with the first python3 of the PATH, pybind11 and g++, which a machine that
    installs wheels need not have. Without an installed helper it is left to do so.
    """
    core = importlib.util.find_spec("megatron.core")
    assert core is not None
    assert core.origin is not None
    helpers = list((Path(core.origin).parent / "datasets").glob("helpers_cpp*.so"))
    for helper in helpers:
        shutil.copy(helper, folder / "megatron" / "core" / "datasets")
    if helpers:
        (folder / "megatron" / "core" / "datasets" / "Makefile").unlink()


def hybrid_args(folder: Path) -> list[str]:
    """Flags for a hybrid of attention and MoE layers (two of each) from layers that run on CPU."""
    arguments = (folder / "megatron" / "training" / "arguments.py").read_text()
    pattern = (
        "--hybrid-layer-pattern" if "'--hybrid-layer-pattern'" in arguments else "--hybrid-override-pattern"
    )
    return ["--spec", "local_hybrid_spec", "STACK", pattern, "*E*E"]


def hybrid_scripts(folder: Path) -> list[str]:
    """The hybrid training scripts of this version."""
    return [name for name in ("pretrain_hybrid.py", "pretrain_mamba.py") if (folder / name).is_file()]


# ---- a training ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a training printed, and the names of what it saved."""

    status: int
    output: str
    metadata: bytes
    """The checkpoint's list of tensors, empty without a checkpoint."""

    @property
    def iterations(self) -> list[int]:
        """Iterations that Megatron logged."""
        return [int(i) for i in re.findall(r" iteration +(\d+)/ +\d+ \|", self.output)]

    @property
    def phases(self) -> list[tuple[int, str]]:
        """Iteration and phase of our log lines."""
        lines = re.findall(r"\[megatron_et\] iteration +(\d+) \| phase (\w+)", self.output)
        return [(int(iteration), phase) for iteration, phase in lines]

    @property
    def thresholds(self) -> set[bytes]:
        """Routers that saved thresholds."""
        return set(re.findall(rb"((?:decoder|mtp)\.layers\.[\w.]+)\.thresholds\.num_updates", self.metadata))

    @property
    def error(self) -> str:
        """The first line that names an error."""
        named = re.search(r"^.*(?:\w+Error|\w+Exception|error): .*$", self.output, re.MULTILINE)
        return named.group().strip() if named else f"exit status {self.status}"


def train(
    folder: Path,
    script: str,
    args: Sequence[str],
    log: Path,
    *,
    through: Sequence[str] = (),
    processes: int = 2,
) -> Run:
    """Train two steps on CPU and save, as a team would: torchrun in an empty working directory.

    Args:
        folder: sources.
        script: name of the training script.
        args: flags after TRAINING.
        log: file for the output.
        through: what starts the script, itself when left out.
        processes: number of ranks.
    """
    env = {**os.environ, cpu.ENV: "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    # This python first, where the dataset helper must be compiled.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work, log.open("w") as output:
        command = [
            sys.executable,
            *torchrun,
            *through,
            str(folder / script),
            *TRAINING,
            "--save",
            "checkpoint",
            *args,
        ]
        process = subprocess.Popen(command, env=env, cwd=work, stdout=output, stderr=subprocess.STDOUT)
        try:
            status = process.wait(MOST_SECONDS)
        except BaseException as error:
            process.terminate()  # torchrun ends its workers
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            output.write(f"\nTimeoutError: ran past {MOST_SECONDS} s\n")
            status = 124
        file = Path(work, "checkpoint", "iter_0000002", ".metadata")
        metadata = file.read_bytes() if file.is_file() else b""
    return Run(status, log.read_text(errors="replace"), metadata)


def problems_of_et(run: Run, routers: int) -> list[str]:
    """What is wrong with a run that must warm up, route by thresholds and save; `routers` have thresholds."""
    if run.status != 0:
        return [run.error]
    problems = []
    if run.iterations != [1, 2]:
        problems.append(f"logged iterations {run.iterations} instead of 1 and 2")
    if run.phases != [(1, "warmup"), (2, "threshold")]:
        problems.append(f"phases {run.phases} instead of warmup and threshold")
    if len(run.thresholds) != routers:
        problems.append(f"{len(run.thresholds)} routers saved thresholds instead of {routers}")
    # Once a job: checkpoint writers import the script again and must say and do nothing.
    if (said := run.output.count("[megatron_et] CPU run:")) != 1:
        problems.append(f"{said} processes prepared themselves aloud instead of 1")
    return problems


def problems_of_topk(run: Run) -> list[str]:
    """What is wrong with a run that must train plain top-k."""
    if run.status != 0:
        return [run.error]
    problems = []
    if run.iterations != [1, 2]:
        problems.append(f"logged iterations {run.iterations} instead of 1 and 2")
    if not run.metadata:
        problems.append("saved no checkpoint")
    if run.phases or run.thresholds:
        problems.append("routed by thresholds, unasked")
    return problems


# ---- the command -----------------------------------------------------------------------------------------


def main(
    command: str,
    description: str,
    check: Callable[[Path, str, Path], list[str]],
    argv: Sequence[str] | None = None,
) -> int:
    """Check every wanted tag, a line each.

    Args:
        command: make's target, for messages and for the folder of the logs.
        description: of the command.
        check: gets the sources, the tag and a folder for logs; returns what is wrong.
        argv: command line, the process's own when left out.

    Returns:
        exit status: 0 when some tag was checked and none failed, 2 when nothing could be checked.
    """
    parser = argparse.ArgumentParser(prog=command, description=description)
    parser.add_argument("--megatron", type=Path)
    parser.add_argument("--tags", nargs="+", choices=TAGS, default=TAGS)
    parser.add_argument("--main", help=f"what `main` stands for (the first of {', '.join(MAIN_REFS)})")
    args = parser.parse_args(argv)
    try:
        repository = _repository(args.megatron, command)
        return _check_tags(command, repository, args.tags, args.main, check)
    except TrialError as error:
        print(error, file=sys.stderr)
        return 2


def _repository(path: Path | None, command: str) -> Path:
    usage = (
        f"usage: make {command} MEGATRON=/path/to/Megatron-LM [TAGS='core_v0.19.0 main'] [MAIN=ref]   "
        "(MEGATRON is a git checkout or a bare repository; it is only read)"
    )
    if path is None:
        raise TrialError(usage)
    if not path.is_dir():
        raise TrialError(f"MEGATRON={path} is not a folder\n{usage}")
    if (asked := git(path, "rev-parse", "--git-dir")).returncode != 0:
        raise TrialError(f"MEGATRON={path} is no git repository: {asked.stderr.strip()}\n{usage}")
    return path


def _check_tags(
    command: str,
    repository: Path,
    tags: Sequence[str],
    main_ref: str | None,
    check: Callable[[Path, str, Path], list[str]],
) -> int:
    outcomes = []
    for tag in tags:
        commit = commit_of(repository, tag, main_ref)
        if commit is None:
            print(f"{tag:14} skipped: {repository} has no {main_ref if tag == 'main' and main_ref else tag}")
            continue
        logs = ROOT / "runs" / command / tag
        shutil.rmtree(logs, ignore_errors=True)
        with tempfile.TemporaryDirectory() as folder:
            extract(repository, commit, Path(folder))
            problems = check(Path(folder), tag, logs)
        outcomes.append(not problems)
        result = f"FAILED: {'; '.join(problems)} (logs in {logs})" if problems else "ok"
        print(f"{tag:14} {commit} {result}", flush=True)
    if not outcomes:
        raise TrialError(f"nothing was checked: {repository} has none of {', '.join(tags)}")
    return 0 if all(outcomes) else 1
