"""Which Megatron this Python would train with: its version, the file of its flags, and whether Muon can run.

Prints three tab-separated fields for cluster.sh. Standard library only, and imports nothing of Megatron: it
takes 50 ms. The second field is `-` where there is no megatron.training (the wheel of 0.16).
"""

import importlib.util
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Print what is found, or end with a sentence."""
    try:
        core = importlib.util.find_spec("megatron.core")
    except ImportError:  # no `megatron` at all
        core = None
    if core is None or core.origin is None:
        sys.exit(f"no megatron-core in {sys.executable}: install it, or set MEGATRON=/path/to/Megatron-LM")
    folder = Path(core.origin).parent
    # Without the commit that it appends: that of any repository around the folder.
    version = runpy.run_path(str(folder / "package_info.py"))["__version__"].partition("+")[0]
    flags = folder.parent / "training" / "arguments.py"
    # The package that both `--optimizer muon` and its distributed form import.
    muon = importlib.util.find_spec("emerging_optimizers") is not None
    print(version, flags if flags.is_file() else "-", "muon" if muon else "-", sep="\t")


if __name__ == "__main__":
    main()
