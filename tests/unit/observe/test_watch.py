"""`megatron-et watch`: files that grow, shrink and start again; frames that fit; the live view in a terminal.

L layers, E experts.
"""

import fcntl
import itertools
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from megatron_et import cli
from megatron_et.observe.report.read import read_run
from megatron_et.observe.report.summary import layer_histories, summarise
from megatron_et.observe.watch import command, state, tail, view
from megatron_et.observe.watch.state import SCALARS, Watched
from megatron_et.observe.watch.tail import LineTail, RecordTail
from tests.simulated import trace_lines

pytestmark = pytest.mark.megatron_free

LATER = time.monotonic() + 1e6


def append(path: Path, lines: Iterable[Any], end: str = "\n") -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(line) + end for line in lines))


def line(
    step: int, load: float = 1.0, *, layers: int = 1, E: int = 4, phase: str = "threshold"
) -> dict[str, Any]:
    """A trace line; expert 0 of the last layer takes `load` times its share."""
    good = {
        "usage": [1 / E] * E,
        "threshold": [0.0] * E,
        "cutoff": [0.01 * (-1) ** step] * E,
        "fanout_histogram": [0, 4096, *[0] * (E - 1)],
        "at_bound": [0.0] * E,
    }
    rows = {str(2 + n): good for n in range(layers)}
    rows[str(1 + layers)] = {**good, "usage": [load / E, *[1 / E] * (E - 1)]}
    head = {"schema": 1, "step": step, "phase": phase, "tokens": 4096, "topk": 1, "num_experts": E}
    return {**head, "layers": rows}


def watched(run: Path, **where: Path) -> Watched:
    """After a first look."""
    seen = Watched(run, **where)
    seen.look()
    return seen


def steps(seen: Watched) -> list[int]:
    return [step.step for step in seen.steps]


# --- tails ---


def test_a_partial_last_line_waits_for_its_end(tmp_path: Path) -> None:
    path, looks = tmp_path / "lines", []
    follow = LineTail(path)
    looks.append(follow.look())
    for part in (b"one\ntw", b"o\n", b"", b"three\nfour\n"):
        with path.open("ab") as file:
            file.write(part)
        looks.append(follow.look())
    assert [news.lines for news in looks] == [[], [b"one"], [b"two"], [], [b"three", b"four"]]
    assert not any(news.fresh for news in looks)


@pytest.mark.parametrize("how", ["truncated", "replaced", "rewritten longer", "rewritten as long"])
def test_a_file_that_starts_again_is_read_from_its_beginning(tmp_path: Path, how: str) -> None:
    path = tmp_path / "lines"
    path.write_text("one\ntwo\n")
    follow = LineTail(path)
    follow.look()
    if how == "replaced":
        other = tmp_path / "other"
        other.write_text("one\ntwo\nthree\n")
        other.replace(path)
    else:
        path.write_text({"truncated": "x\n", "rewritten longer": "one\nTWO\nx\n"}.get(how, "one\nTWO\n"))
    news = follow.look()
    assert news.fresh
    assert news.lines == [part.encode() for part in path.read_text().split()]
    assert follow.look() == tail.News([], fresh=False)


def test_a_file_that_goes_away_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("one\n")
    follow = LineTail(path)
    follow.look()
    path.unlink()
    assert follow.look() == tail.News([], fresh=False)
    path.write_text("two\n")
    assert follow.look().lines == [b"two"]


def test_a_cut_line_that_the_next_start_drops_was_never_read(tmp_path: Path) -> None:
    """What observe/trace.append_line does after a kill."""
    from megatron_et.observe.trace import append_line

    path = tmp_path / "lines"
    path.write_text("one\ncut")
    follow = LineTail(path)
    assert follow.look().lines == [b"one"]
    append_line(path, "two")
    assert follow.look() == tail.News([b"two"], fresh=False)


def test_of_a_long_file_only_the_end_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "FIRST_LOOK", 10)
    path = tmp_path / "lines"
    path.write_text("".join(f"{n:03}\n" for n in range(100)))
    assert LineTail(path).look().lines == [b"098", b"099"]


@given(st.lists(st.binary(max_size=40), max_size=12), st.data())
@settings(max_examples=60, deadline=None)
def test_records_come_whole_and_in_order_however_the_file_grows(
    tmp_path_factory: pytest.TempPathFactory, records: list[bytes], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("records") / "events"
    whole = b"".join(struct.pack("<QI", len(r), 0) + r + b"crc!" for r in records)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=5)))
    follow, got = RecordTail(path, [b""]), []
    for start, end in itertools.pairwise([0, *cuts, len(whole)]):
        with path.open("ab") as file:
            file.write(whole[start:end])
        got += list(follow.look(LATER))
        assert not follow.more
    assert got == records


def test_a_look_stops_in_time_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "events"
    path.write_bytes(b"".join(struct.pack("<QI", 3, 0) + b"one" + b"crc!" for _ in range(5)))
    follow = RecordTail(path, [b"one"])
    assert list(follow.look(time.monotonic() - 1)) == []
    assert follow.more
    assert list(follow.look(LATER)) == [b"one"] * 5
    assert not follow.more


def test_no_event_file_at_all_does_not_hang(tmp_path: Path) -> None:
    path = tmp_path / "events"
    path.write_bytes(b"\xff" * 100)
    follow = RecordTail(path, [b""])
    assert list(follow.look(LATER)) == []
    assert not follow.more


# --- the state ---


def test_a_run_that_does_not_exist_yet_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "LOOK_AGAIN", 0.0)
    run = tmp_path / "later"
    seen = watched(run)
    assert (seen.last, seen.sources) == (None, [])
    run.mkdir()
    seen.look()
    append(run / "et_trace.jsonl", [line(10)])
    seen.look()
    assert steps(seen) == [10]


def test_files_are_not_searched_for_at_every_look(tmp_path: Path) -> None:
    seen = watched(tmp_path)
    append(tmp_path / "et_trace.jsonl", [line(10)])
    seen.look()
    assert steps(seen) == []


def test_checkpoints_are_not_searched(tmp_path: Path) -> None:
    for name in ("iter_0000010", "logs"):
        (tmp_path / name).mkdir()
        append(tmp_path / name / "et_trace.jsonl", [line(10)])
    assert [path.parent.name for path in watched(tmp_path).sources] == ["logs"]


def test_the_newest_trace_of_several_is_watched(tmp_path: Path) -> None:
    for age, name in ((100, "a"), (10, "b"), (50, "c")):
        (tmp_path / name).mkdir()
        append(tmp_path / name / "et_trace.jsonl", [line(age)])
        os.utime(tmp_path / name / "et_trace.jsonl", (time.time() - age,) * 2)
    assert steps(watched(tmp_path)) == [10]
    assert steps(watched(tmp_path, trace=tmp_path / "c" / "et_trace.jsonl")) == [50]


def test_malformed_lines_are_counted_and_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "et_trace.jsonl"
    append(path, [line(10), {"schema": 9}, [1], {**line(15), "layers": {}}])
    with path.open("a") as file:
        file.write("not JSON\n\n")
    append(path, [line(20)])
    seen = watched(tmp_path)
    assert (steps(seen), seen.malformed) == ([10, 20], 3)


def test_a_resume_drops_the_steps_after_it_and_their_alarms(tmp_path: Path) -> None:
    """As the report does, whose alarms are those of the steps that are left."""
    path = tmp_path / "et_trace.jsonl"
    append(path, [line(n, 1.8 if n > 12 else 1.0) for n in range(1, 31)])
    seen = watched(tmp_path)
    assert [(alarm.rule, alarm.since) for alarm in seen.monitor.active] == [("load off target", 13)]
    append(path, [line(20, 1.8)])
    seen.look()
    assert steps(seen) == list(range(1, 21))
    assert seen.monitor.active == []
    append(path, [line(n, 1.8) for n in range(21, 25)])
    seen.look()
    data = read_run(tmp_path)
    assert seen.monitor.active == summarise(data, layer_histories(data)).alarms
    assert [alarm.since for alarm in seen.monitor.active] == [13]


def test_a_trace_that_starts_again_starts_the_view_again(tmp_path: Path) -> None:
    path = tmp_path / "et_trace.jsonl"
    append(path, [line(n, 1.8) for n in range(1, 31)])
    seen = watched(tmp_path)
    assert seen.monitor.active
    path.write_text("")
    append(path, [line(40, layers=2)])
    seen.look()
    assert (steps(seen), seen.monitor.active) == ([40], [])


def test_numbers_are_those_of_the_report(tmp_path: Path) -> None:
    append(tmp_path / "et_trace.jsonl", trace_lines(6, layers=(2, 5), warmup_steps=3, ema_decay=0.9))
    seen = watched(tmp_path)
    assert seen.last is not None
    assert (seen.last.layers, seen.last.phase, seen.target) == ((2, 5), "threshold", 1 / 8)
    for i, history in enumerate(layer_histories(read_run(tmp_path))):
        for name in SCALARS:
            got = [float(step.metrics[name][i]) for step in seen.steps]
            assert got == pytest.approx(history.metrics[name].tolist(), rel=1e-5, nan_ok=True)


def write_scalars(folder: Path, values: dict[str, float], at: Iterable[int]) -> None:
    writer = SummaryWriter(str(folder))
    for step in at:
        for tag, value in values.items():
            writer.add_scalar(tag, value + step, step)
        writer.add_text("some text", "moe/", step)
    writer.close()


def test_losses_come_from_the_event_files_of_every_start(tmp_path: Path) -> None:
    append(tmp_path / "et_trace.jsonl", [line(10)])
    scalars = {"lm loss": 0.5, "lm loss validation": 9.0, "moe/fanout_mean": 7.0}
    write_scalars(tmp_path / "tb", scalars, (10, 20, 30))
    time.sleep(1.1)  # event files are named by the second
    write_scalars(tmp_path / "tb", scalars, (20, 30))
    seen = watched(tmp_path)
    assert list(seen.losses) == [(10, 10.5), (20, 20.5), (30, 30.5)]
    assert steps(seen) == [10]


def test_without_a_trace_the_scalars_are_shown(tmp_path: Path) -> None:
    scalars = {f"moe/{name}_layer_{layer}": 0.25 for name in SCALARS for layer in (3, 12)}
    scalars |= {"moe/expert_usage_target": 0.0, "moe/fanout_target": 0.0, "moe/alarms": 0.0, "lm loss": 0.0}
    write_scalars(tmp_path, {**scalars, "moe/fanout_mean_layer_x": 0.0}, (1, 2))
    seen = watched(tmp_path)
    assert steps(seen) == [1, 2]
    assert seen.last is not None
    assert (seen.last.layers, seen.last.phase, seen.alarms_logged) == ((3, 12), None, 2)
    assert (seen.target, seen.topk) == (2.0, 2.0)
    assert all(vector.tolist() == [2.25, 2.25] for vector in seen.last.metrics.values())
    # A trace that comes later is better.
    append(tmp_path / "et_trace.jsonl", [line(5)])
    seen._searched = -1e9
    seen.look()
    assert (steps(seen), seen.has_trace) == ([5], True)


def test_scalars_of_one_step_may_come_in_two_looks(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    seen = Watched(tmp_path)
    for name in SCALARS:
        writer.add_scalar(f"moe/{name}_layer_2", 1.0, 7)
        writer.flush()
        seen.look()
    assert steps(seen) == [7]
    assert seen.last is not None
    assert {name: vector.tolist() for name, vector in seen.last.metrics.items()} == {
        name: [1.0] for name in SCALARS
    }
    writer.close()


def test_without_tensorboard_the_trace_alone_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "HAS_TENSORBOARD", False)
    append(tmp_path / "et_trace.jsonl", [line(10)])
    write_scalars(tmp_path, {"lm loss": 1.0}, (10,))
    seen = watched(tmp_path)
    assert (steps(seen), len(seen.sources)) == ([10], 1)


# --- frames ---


def frame(
    seen: Watched, width: int = 80, height: int | None = 24, glyphs: view.Glyphs = view.UNICODE
) -> list[str]:
    lines = view.frame(seen, width, height, now=0.0, glyphs=glyphs, footer="the footer")
    assert all(text.cell_len <= width for text in lines)
    assert height is None or len(lines) <= height
    return [text.plain for text in lines]


def test_a_frame_of_a_few_layers(tmp_path: Path) -> None:
    append(tmp_path / "et_trace.jsonl", [line(n, 1.8, layers=3) for n in range(1, 21)])
    write_scalars(tmp_path, {"lm loss": 0.25}, range(1, 21))
    lines = frame(watched(tmp_path))
    assert lines[0].endswith("step 20  threshold")
    assert lines[1].startswith("target 25 % of tokens an expert   fan-out 1.067 of 1   written ")
    assert lines[2].startswith("loss 20.2500  ▁")
    head = "layer target ┃ min mean max % fan-out gap dead fan-out"
    assert lines[4].split() == head.split()
    assert lines[5].split() == ["2", "●", "25", "25", "25", "1.000", "0.0100", "0", "▅" * 10]
    assert lines[7].split()[0] == "4"
    assert lines[7].split()[2:7] == ["25", "30", "45", "1.200", "0.0100"]
    assert lines[8].split()[0] == "all"
    assert lines[10] == "ALARM load off target in layer 4, since step 1"
    assert lines[-1] == "the footer"


@pytest.mark.parametrize("size", [(80, 24), (80, 12), (40, 8), (200, 60)])
@pytest.mark.parametrize("load", [1.0, 1.9])
def test_sixty_layers_fold_into_the_worst_few(tmp_path: Path, size: tuple[int, int], load: float) -> None:
    append(tmp_path / "et_trace.jsonl", [line(n, load, layers=60, E=8) for n in range(1, 12)])
    lines = frame(watched(tmp_path), *size)
    layers = [int(words[0]) for text in lines if (words := text.split()) and words[0].isdigit()]
    folded = [text for text in lines if "more layers" in text]
    assert layers == sorted(layers)
    assert len(layers) + int(folded[0].split()[1]) == 60
    if load > 1 and len(layers):
        assert 61 in layers
    assert lines[-1] == "the footer" or size[1] < 12
    assert any("ALARM load off target in layer 61" in text for text in lines) == (load > 1)


def test_alarms_of_every_rule_share_the_room() -> None:
    """First lines of all before second lines of any."""
    blocks = [[Text(f"{n}.{i}") for i in range(4)] for n in range(3)]
    for room in range(15):
        shown = [text.plain for text in view._fitted(blocks, room)]
        assert len(shown) == min(room, 12)
        counts = [sum(text.startswith(f"{n}.") for text in shown) for n in range(3)]
        assert max(counts) - min(counts) <= 1
        assert shown == sorted(shown)


def test_an_old_terminal_gets_ascii(tmp_path: Path) -> None:
    append(tmp_path / "et_trace.jsonl", [line(n, 4.0) for n in range(1, 4)])
    lines = frame(watched(tmp_path), glyphs=view.ASCII)
    assert all(text.isascii() for text in lines)
    assert lines[4].split()[:2] == ["2", "|====o======>"]


@pytest.mark.parametrize(
    ("load", "bar"),
    [
        ([1.0, 1.0, 1.0], "      ●            "),
        ([0.5, 1.0, 1.5], "   ━━━●━━━         "),
        ([0.0, 0.5, 4.0], "━━━●━━┃━━━━━━━━━━━▶"),
        ([0.0, 0.0, 0.0], "●     ┃            "),
        ([1.3, 2.0, 2.0], "      ┃ ━━━━●      "),
        ([float("nan"), 1.0, 1.0], " " * 19),
    ],
)
def test_usage_bar(load: list[float], bar: str) -> None:
    assert view.usage_bar(load, view.UNICODE) == bar


def test_spark() -> None:
    assert view.spark([0, 1, 2, 9, -9, float("nan")], 0, 2, view.UNICODE) == "▁▅██▁ "
    assert view.spark([3, 3], 3, 3, view.UNICODE) == "▁▁"
    assert view.spark([], 0, 1, view.UNICODE) == ""


def test_what_is_waited_for_is_said(tmp_path: Path) -> None:
    def said(seen: Watched) -> str:
        return " ".join(frame(seen))

    assert "the folder nowhere does not exist yet" in said(watched(Path("nowhere")))
    assert "no et_trace.jsonl (--moe-et-trace-dir) and no TensorBoard file" in said(watched(tmp_path))
    (tmp_path / "et_trace.jsonl").touch()
    assert "waiting for the first logged step" in said(watched(tmp_path))


def test_without_a_trace_alarms_are_only_counted(tmp_path: Path) -> None:
    write_scalars(tmp_path, {"moe/fanout_mean_layer_2": 1.0, "moe/alarms": 2.0}, (1,))
    lines = frame(watched(tmp_path))
    assert lines[0].endswith("step 1  phase not known")
    assert any(text.startswith("alarms: 3 on") for text in lines)
    assert any("target not known" in text for text in lines)


# --- the command ---


def test_once_prints_a_frame(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append(tmp_path / "et_trace.jsonl", [line(n, 1.8, layers=40) for n in range(1, 12)])
    assert cli.main(["watch", str(tmp_path), "--once"]) == 0
    out = capsys.readouterr().out
    # A log has no height: all layers.
    assert [int(text.split()[0]) for text in out.splitlines()[4:44]] == list(range(2, 42))
    assert "ALARM load off target in layer 41, since step 1" in out
    assert "remedy: " in out
    assert "\x1b" not in out


def test_once_without_anything_to_show_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["watch", str(tmp_path / "later"), "--once"]) == 1
    assert "does not exist yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}", "--interval", "0"], "--interval is 0: it must be at least 0.2 seconds"),
        (["{tmp}", "--interval", "nan"], "--interval is nan"),
        (["{tmp}/file"], "file is not a folder"),
        (["{tmp}"], "standard output is no terminal: give --once"),
        (["{tmp}", "--once", "--trace", "{tmp}"], "Is a directory"),
    ],
)
def test_command_fails_with_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["watch", *(argument.format(tmp=tmp_path) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("megatron-et watch: ")
    assert message in captured.err


class Terminal:
    """`megatron-et watch` in a terminal of 80 x 24."""

    def __init__(self, *arguments: str) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(self.slave)
        environment = {**os.environ, "TERM": "xterm-256color", "PYTHONUTF8": "1"}
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megatron_et.cli", "watch", "--interval", "0.2", *arguments],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env=environment,
            # As in a terminal, also where the tests run in the background of a script, which ignores it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.shown = b""

    def wait_for(self, text: bytes) -> None:
        """Read what is shown until `text` comes."""
        deadline = time.monotonic() + 60
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown[-2000:]
            if select.select([self.master], [], [], 1.0)[0]:
                self.shown += os.read(self.master, 65536)

    def end(self) -> int:
        """Exit status; the terminal must be as it was before."""
        deadline = time.monotonic() + 60
        while self.process.poll() is None:
            assert time.monotonic() < deadline
            if select.select([self.master], [], [], 0.1)[0]:
                self.shown += os.read(self.master, 65536)
        assert termios.tcgetattr(self.slave) == self.before
        while select.select([self.master], [], [], 0)[0]:
            self.shown += os.read(self.master, 65536)
        assert self.shown.rstrip().endswith((b"\x1b[?1049l", b"\x1b[?25h"))  # the screen and cursor as before
        return int(self.process.returncode)


@pytest.fixture
def terminal() -> Iterator[Any]:
    """Starts terminals, and ends them whatever happens."""
    started: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        started.append(Terminal(*arguments))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()
        os.close(each.master)
        os.close(each.slave)


def test_live_follows_a_writer_until_q(tmp_path: Path, terminal: Any) -> None:
    run = tmp_path / "run"
    run.mkdir()
    path = run / "et_trace.jsonl"
    path.touch()
    live = terminal(str(run))
    live.wait_for(b"waiting for the first logged step")
    append(path, [line(10)])
    live.wait_for(b"step 10")
    # Half a line, the other half, a resume, and then trouble.
    half = json.dumps(line(20))
    with path.open("a") as file:
        file.write(half[:50])
    time.sleep(0.5)
    with path.open("a") as file:
        file.write(half[50:] + "\n")
    live.wait_for(b"step 20")
    append(path, [line(n, 1.9) for n in range(11, 31)])
    live.wait_for(b"ALARM load off target in layer 2, since step 11")
    os.write(live.master, b"xq")
    assert live.end() == 0


def test_live_ends_cleanly_at_ctrl_c(tmp_path: Path, terminal: Any) -> None:
    live = terminal(str(tmp_path / "later"))
    live.wait_for(b"does not exist yet")
    live.process.send_signal(signal.SIGINT)
    assert live.end() == 0
    assert b"Traceback" not in live.shown


def test_live_waits_between_two_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No busy loop; at once only while files hold more than one look takes in."""
    waits: list[float] = []

    def wait(_: object, seconds: float) -> str:
        waits.append(seconds)
        return "q" if len(waits) == 3 else " "

    monkeypatch.setattr(command._Keys, "wait", wait)
    monkeypatch.setattr(Watched, "more", property(lambda _: len(waits) == 1))
    with open(os.devnull, "w") as nowhere:
        console = command.Console(file=nowhere, force_terminal=True, width=80, height=24)
        command._live(Watched(tmp_path), console, 2.0)
    assert waits == [2.0, 0.0, 2.0]
