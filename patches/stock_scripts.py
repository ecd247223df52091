"""`make check-stock-scripts MEGATRON=...`: unmodified training scripts through the launcher, on CPU.

For every tag, `torchrun -m megatron_et SCRIPT` trains two steps, the first a warm-up, the second routed by
thresholds, and saves: pretrain_gpt.py, the same with a multi-token-prediction layer, and the hybrid scripts
on attention and MoE layers.
"""

import sys
from pathlib import Path

from patches import trial


def check(folder: Path, tag: str, logs: Path) -> list[str]:
    """Train with each stock script of a tag; returns what is wrong."""
    hybrid = trial.hybrid_args(folder)
    cases = [
        ("pretrain_gpt.py", [], 3),
        ("pretrain_gpt.py", ["--mtp-num-layers", "1"], 4),
        *((script, hybrid, 2) for script in trial.hybrid_scripts(folder)),
    ]
    problems = []
    for script, args, routers in cases:
        name = f"{script} {' '.join(args[:2])}".strip()
        log = logs / f"{name.replace(' ', '_')}.log"
        run = trial.train(folder, script, [*trial.ET, *args], log, through=["-m", "megatron_et"])
        found = trial.problems_of_et(run, routers)
        print(f"{tag:14}   {name}: {'; '.join(found) or 'ok'}", flush=True)
        problems += [f"{name}: {problem}" for problem in found]
    return problems


if __name__ == "__main__":
    sys.exit(trial.main("check-stock-scripts", "train two steps with each stock script of each tag", check))
