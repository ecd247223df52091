"""Run an unmodified Megatron training script with Expert Threshold routing available:

torchrun --nproc-per-node 8 -m megatron_et pretrain_gpt.py --moe-router-type expert-threshold ...
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Install, then run sys.argv[1] as __main__ with the remaining arguments."""
    usage = "usage: python -m megatron_et SCRIPT [ARGS...]   (SCRIPT is your pretrain_gpt.py)"
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(usage)
        return
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(usage)
    script = Path(sys.argv[1])
    if not script.is_file():
        sys.exit(f"megatron_et: {script} is not a file: give the path of your training script")
    sys.argv = sys.argv[1:]
    # As `python SCRIPT` does: the script's neighbours (gpt_builders.py, model_provider.py) are importable.
    sys.path.insert(0, str(script.resolve().parent))

    from megatron_et.run.launch import prepare_process

    prepare_process()
    runpy.run_path(str(script), run_name="__main__")


# Checkpoint writers are spawned and import this module again, under another name: they must not train.
if __name__ == "__main__":
    main()
