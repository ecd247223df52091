"""The `megatron-et` command itself; its subcommands have tests of their own."""

import argparse

import pytest

from megatron_et import cli


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said and summary in said for name, (_, summary) in cli.COMMANDS.items())


@pytest.mark.parametrize("argv", [[], ["prepaer"]])
def test_an_unknown_or_missing_command_is_an_error(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_et.observe.report.command.run", interrupted)
    assert cli.main(["report", "somewhere"]) == 130
    assert capsys.readouterr().err == "megatron-et report: interrupted\n"
