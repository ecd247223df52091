"""The documents say what the code does."""

import re
import runpy
from pathlib import Path

import pytest

from megatron_et.cli import COMMANDS
from megatron_et.observe.metrics import METRICS

ROOT = Path(__file__).resolve().parents[3]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "examples" / "README.md",
    ROOT / "patches" / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_flags_page_is_written_from_the_code() -> None:
    text = runpy.run_path(str(ROOT / "docs" / "flags.py"))["text"]()
    assert (ROOT / "docs" / "flags.md").read_text() == text, "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for name in re.findall(r"`((?:megatron_et|tests|docs|examples)/[\w/.]+)`", text):
        assert (ROOT / name).exists(), name


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_into_a_page_hit_a_heading(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text()):
        there = page.parent / target if target else page
        assert there.is_file(), target
        assert anchor in anchors(there), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_exist(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= targets
    assert set(re.findall(r"megatron-et (\w+) [-R]", text)) <= set(COMMANDS)


def test_flags_named_in_the_documents_exist() -> None:
    known = (ROOT / "docs" / "flags.md").read_text()
    for page in PAGES:
        for flag in re.findall(r"--moe-et-[a-z-]+[a-z]", page.read_text()):
            assert f"`{flag}`" in known, (page.name, flag)


def test_every_metric_is_explained() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    explained = set()
    for cell in re.findall(r"^\| (`[^|]+`) \|", text, re.MULTILINE):
        names = re.findall(r"`([^`]+)`", cell)
        stem = names[0].rsplit("_", 1)[0]
        explained |= {stem + name if name.startswith("_") else name for name in names}
    assert explained >= set(METRICS)
