"""The `megatron-et` command.

Each subcommand lives in its own module with add_arguments(parser) and run(args).
"""

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence

# name -> (module, one-line help). Modules are imported only when their command runs: start-up stays quick.
COMMANDS: dict[str, tuple[str, str]] = {
    "check": ("megatron_et.check.command", "versions, seams, refused flags and cost of a training command"),
    "prepare": ("megatron_et.data.prepare", "tokenizer and Megatron datasets from text, JSONL or Parquet"),
    "report": (
        "megatron_et.observe.report.command",
        "tables, plots, alarms of a run: terminal, PNGs, HTML",
    ),
    "watch": ("megatron_et.observe.watch.command", "live terminal view of a run, with its alarms"),
}

# Whose words are another program's: argparse would take its --help, its abbreviations and its `--` for ours.
VERBATIM = {"check"}
_HELP = ["-h"], ["--help"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the process's exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="megatron-et", description=__doc__.split(".")[0] + ".")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if argv and argv[0] == name:
            importlib.import_module(module).add_arguments(subparser)
    if argv and argv[0] in VERBATIM and argv[1:] not in _HELP:
        args = argparse.Namespace(command=argv[0], words=argv[1:])
    else:
        args = parser.parse_args(argv)
    try:
        return importlib.import_module(COMMANDS[args.command][0]).run(args)
    except KeyboardInterrupt:
        print(f"megatron-et {args.command}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
