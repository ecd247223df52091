"""Run a script on the CPU backend without Expert Threshold routing: python cpu_only.py SCRIPT ARGS...

Megatron before 0.18 asks for a GPU before it looks at its flags.
"""

import runpy
import sys
from pathlib import Path

from megatron_et.run import cpu

if __name__ == "__main__":
    cpu.install()
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
