"""`make check-patches MEGATRON=...`: each patch applies to its tag and does what it says, on CPU.

For every tag, on sources in a folder of their own:
1. without the patch the training command fails: the flag is unknown;
2. the patch applies;
3. pretrain_gpt.py trains two steps, the first a warm-up, the second routed by thresholds, and saves;
4. without our flags it trains plain top-k;
5. so does each hybrid script with Expert Threshold routing, on attention and MoE layers.
"""

import os
import subprocess
import sys
from pathlib import Path

from patches import trial


def check(folder: Path, tag: str, logs: Path) -> list[str]:
    """Check a tag's patch on its sources; returns what is wrong."""
    # One process: it must not come as far as needing the other.
    stock = trial.train(
        folder,
        "pretrain_gpt.py",
        trial.ET,
        logs / "without_patch.log",
        through=[str(trial.PATCHES / "cpu_only.py")],
        processes=1,
    )
    problems = [f"without the patch: {problem}" for problem in problems_of_stock(stock)]
    try:
        apply(trial.PATCHES / f"{tag}.patch", folder)
    except trial.TrialError as error:
        return [*problems, str(error)]
    trained = trial.train(folder, "pretrain_gpt.py", trial.ET, logs / "gpt.log")
    problems += [f"pretrain_gpt.py: {problem}" for problem in trial.problems_of_et(trained, 3)]
    plain = trial.train(folder, "pretrain_gpt.py", [], logs / "topk.log")
    problems += [f"pretrain_gpt.py with top-k: {problem}" for problem in trial.problems_of_topk(plain)]
    for script in trial.hybrid_scripts(folder):
        args = [*trial.ET, *trial.hybrid_args(folder)]
        hybrid = trial.train(folder, script, args, logs / f"{Path(script).stem}.log")
        problems += [f"{script}: {problem}" for problem in trial.problems_of_et(hybrid, 2)]
    return problems


def problems_of_stock(run: trial.Run) -> list[str]:
    """What is wrong with a run that must not know our flags."""
    if run.status == 0:
        return ["--moe-router-type is known to the stock script"]
    if "unrecognized arguments: --moe-router-type expert-threshold" not in run.output:
        return [f"it failed for another reason than the unknown flag: {run.error}"]
    return []


def apply(patch: Path, folder: Path) -> None:
    """`git apply`, and a look whether it did: below a foreign repository git skips the files in silence.

    Raises:
        TrialError: the patch does not apply.
    """
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", str(patch)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise trial.TrialError(f"git apply {patch.name}: {' '.join(done.stderr.split())}")
    if "megatron_et" not in (folder / "pretrain_gpt.py").read_text():
        raise trial.TrialError(f"git apply {patch.name} changed nothing")


if __name__ == "__main__":
    sys.exit(trial.main("check-patches", "apply each patch to its tag and train two steps with it", check))
