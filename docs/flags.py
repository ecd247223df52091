"""Writes docs/flags.md from ExpertThresholdConfig and the refusals: `make docs`."""

from dataclasses import fields
from pathlib import Path

from megatron_et.config import ExpertThresholdConfig, choices, flag_of, scalar_type
from megatron_et.host.arguments import YAML
from megatron_et.moe.compatibility import NEEDED, POOL_IN_GRAPH, REFUSALS


def text() -> str:
    """The whole page."""
    rows = [
        f"| `{flag_of(knob.name)}` | {' / '.join(choices(knob.name)) or scalar_type(knob.name).__name__} "
        f"| {knob.default if knob.default is not None else 'none'} | {knob.metadata['help']} |"
        for knob in fields(ExpertThresholdConfig)
    ]
    needed = [
        f"| `--{need.name.replace('_', '-')}` | {need.value} | {need.default} | {need.why} |"
        for need in NEEDED
    ]
    refused = [
        f"| `{rule.flag}` | {rule.why} | {rule.instead} |" for rule in (*REFUSALS, POOL_IN_GRAPH, YAML)
    ]
    return "\n".join(
        [
            "# Flags",
            "",
            "Written from `megatron_et/config.py` and `compatibility.py` by `make docs`.",
            "",
            "Megatron's `--moe-router-topk` is the target mean fan-out: the expert compute that a token gets "
            "on average.",
            "",
            "| flag | values | default | meaning |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            "## Megatron's flags that Expert Threshold routing needs",
            "",
            "Set when left at Megatron's default (one line at start-up says so), refused when given another "
            "value.",
            "",
            "| flag | needed | Megatron's default | why |",
            "| --- | --- | --- | --- |",
            *needed,
            "",
            "## Megatron's flags that are refused with it",
            "",
            "| flag | why | instead |",
            "| --- | --- | --- |",
            *refused,
            "",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_name("flags.md").write_text(text())
