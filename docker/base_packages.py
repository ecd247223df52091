"""What the base image brought must stay as it is: its torch, Transformer Engine and Apex fit each other.

    base_packages.py record FOLDER [--require NAME ...]    before anything is installed
    base_packages.py check FOLDER                          after everything is installed
    base_packages.py requirements PYPROJECT EXTRA ...      what to hand to pip, without torch and Megatron

`record` writes two files into FOLDER: `packages.json` for `check`, and `constraints.txt`, which pins every
package of the image for pip, so that pip refuses what would change one. NGC images bring such a file
(/etc/pip/constraint.txt, named by PIP_CONSTRAINT), which pip reads too; some bring it empty. Only the
standard library is used: this runs before anything is installed.
"""

import argparse
import hashlib
import importlib.metadata
import json
import re
import sys
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

PACKAGES = "packages.json"
CONSTRAINTS = "constraints.txt"
NEVER_BY_PIP = frozenset({"torch", "megatron-core", "megatron-et"})
"""The base image's, the checkout's, and ourselves."""

# What pip takes in a constraint. Linux distributions use other versions, too: not pinned, but checked.
_PINNABLE = re.compile(
    r"(\d+!)?\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[a-z0-9]+([._-][a-z0-9]+)*)?"
)


def normalized(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, dict[str, str]]:
    """Name -> version, place, digest of the list of files: a package installed anew differs in one."""
    found: dict[str, dict[str, str]] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name is None:  # what is left of an uninstalled package
            continue
        files = distribution.read_text("RECORD") or ""
        seen = {
            "version": distribution.version,
            "place": str(distribution.locate_file("")),
            "files": hashlib.sha256(files.encode()).hexdigest()[:16],
        }
        found.setdefault(normalized(name), seen)  # the first on the path is the one that is imported
    return found


def record(folder: Path, required: Iterable[str]) -> str | None:
    """Write down what is installed; returns what is wrong."""
    found = installed()
    missing = sorted({normalized(name) for name in required} - set(found))
    if missing:
        return f"the base image has no {', '.join(missing)}: an NGC PyTorch image is needed"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PACKAGES).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    pins = [
        f"{name}=={seen['version']}\n" for name, seen in sorted(found.items()) if pinnable(seen["version"])
    ]
    (folder / CONSTRAINTS).write_text("".join(pins))
    print(f"{len(found)} packages of the base image recorded, {len(pins)} of them pinned for pip")
    return None


def pinnable(version: str) -> bool:
    """Whether pip takes `==version`."""
    return _PINNABLE.fullmatch(version) is not None


def check(folder: Path) -> str | None:
    """Compare with what was recorded; returns what is wrong."""
    before = json.loads((folder / PACKAGES).read_text())
    now = installed()
    changed = []
    for name, seen in before.items():
        if name not in now:
            changed.append(f"{name} {seen['version']} is gone")
        elif now[name]["version"] != seen["version"]:
            changed.append(f"{name} was {seen['version']} and is {now[name]['version']}")
        elif now[name] != seen:
            changed.append(f"{name} {seen['version']} was installed anew in {now[name]['place']}")
    if changed:
        return (
            f"packages of the base image were changed: {'; '.join(changed)}. Install with --no-deps, or with "
            f"--constraint {folder / CONSTRAINTS}"
        )
    added = [f"{name} {seen['version']}" for name, seen in sorted(now.items()) if name not in before]
    print(
        f"all {len(before)} packages of the base image are as they were; added: {', '.join(added) or 'none'}"
    )
    return None


def requirements(pyproject: Path, extras: Sequence[str]) -> list[str]:
    """The project's requirements and those of some extras, without torch, megatron-core and itself."""
    project = tomllib.loads(pyproject.read_text())["project"]
    wanted = [*project["dependencies"]]
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    names = {text: normalized(re.split(r"[^\w.-]", text, maxsplit=1)[0]) for text in wanted}
    return [text for text, name in names.items() if name not in NEVER_BY_PIP]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("folder", type=Path)
    recording.add_argument("--require", nargs="+", default=[], metavar="NAME")
    commands.add_parser("check").add_argument("folder", type=Path)
    naming = commands.add_parser("requirements")
    naming.add_argument("pyproject", type=Path)
    naming.add_argument("extras", nargs="*")
    options = parser.parse_args(argv)
    if options.command == "requirements":
        print("\n".join(requirements(options.pyproject, options.extras)))
        return 0
    wrong = record(options.folder, options.require) if options.command == "record" else check(options.folder)
    if wrong is not None:
        print(f"base_packages.py: {wrong}", file=sys.stderr)
    return int(wrong is not None)


if __name__ == "__main__":
    sys.exit(main())
